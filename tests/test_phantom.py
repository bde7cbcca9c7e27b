"""The generated cohort: same bytes from the same seed, valid files, truth that agrees with voxels, every quirk."""

import hashlib
import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungct import phantom, runs
from lungct.runs import InputError

TYPE_1 = {
    "ct": ("ImageType", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleIntercept",
           "RescaleSlope", "FrameOfReferenceUID"),
    "pet": ("SeriesType", "Units", "CountsSource", "NumberOfSlices", "CorrectedImage", "DecayCorrection",
            "FrameReferenceTime", "RescaleSlope", "ImageIndex", "PixelSpacing", "ImagePositionPatient",
            "RadiopharmaceuticalInformationSequence"),
    "sc": ("ConversionType", "PlanarConfiguration"),
}
SHARED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns",
          "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
          "PhotometricInterpretation")
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
          "AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "InstanceNumber", "Manufacturer")
KIND = {uid: kind for kind, (uid, _) in phantom.SOP_CLASSES.items()}


def tree_digest(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Cohort:
    """A cohort on disk with everything the tests ask of it, read once."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.quirks = pd.read_parquet(self.root / "truth" / "quirks.parquet").fillna("")
        self.lesions = pd.read_parquet(self.root / "truth" / "lesions.parquet")
        self.metadata = pd.read_csv(self.root / "metadata.csv", keep_default_na=False)
        self.images = [pydicom.dcmread(path) for path in sorted(self.root.rglob("*.dcm"))]
        self.by_uid = {image.SOPInstanceUID: image for image in self.images}
        self.notes = sorted(self.root.rglob("*.xml"))

    def series(self, uid: str) -> list:
        return [image for image in self.images if image.SeriesInstanceUID == uid]

    def carriers(self, quirk: str) -> pd.DataFrame:
        found = self.quirks[self.quirks.quirk == quirk]
        assert len(found), f"no file carries {quirk}"
        return found

    def boxes(self, path: Path) -> list[tuple]:
        edges = ("xmin", "ymin", "xmax", "ymax")
        return [(item.findtext("name"), *(int(item.find("bndbox").findtext(edge)) for edge in edges))
                for item in ET.parse(path).getroot().iter("object")]


@pytest.fixture(scope="module")
def full(phantom_dir) -> Cohort:
    return Cohort(phantom_dir)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Cohort:
    return Cohort(phantom.make_cohort(tmp_path_factory.mktemp("clean") / "c", patients=4, seed=3, quirks=(), matrix=64))


# Chance and small tools


@given(st.integers(0, 2**31), st.text(max_size=8))
def test_uids_are_valid_and_repeatable(seed, name):
    uid = phantom.named_uid(seed, name)
    assert pydicom.uid.UID(uid).is_valid and len(uid) <= 64
    assert uid == phantom.named_uid(seed, name) != phantom.named_uid(seed + 1, name)


@given(st.floats(-9e4, 9e4))
def test_decimal_strings_fit_and_keep_their_value(value):
    for text in (phantom.number(value), phantom.pad(phantom.number(value))):
        assert len(text) <= 16
        assert float(text) == pytest.approx(value, abs=1e-3 if text.startswith(" ") else 1e-5)


@given(st.integers(1, 400))
def test_shares_of_subtypes_sum_to_the_cohort(patients):
    shares = phantom._shares(patients)
    assert sum(shares.values()) == patients and list(shares) == ["A", "B", "E", "G"]


def test_soft_edge_is_half_at_the_surface():
    distance = np.linspace(-5, 5, 101)
    share = phantom.soft(distance, 2.0)
    assert share[50] == 0.5 and share[0] == 1 and share[-1] == 0 and (np.diff(share) <= 0).all()


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(ValueError, match="PixelSpaceing is no DICOM keyword"):
        phantom.fill(pydicom.Dataset(), PixelSpaceing="1")


# The cohort as a whole


def test_same_seed_same_bytes_on_any_number_of_workers(tmp_path):
    one = phantom.make_cohort(tmp_path / "one", patients=3, seed=11, workers=1, matrix=32)
    two = phantom.make_cohort(tmp_path / "two", patients=3, seed=11, workers=2, matrix=32)
    assert tree_digest(one) == tree_digest(two)
    other = phantom.make_cohort(tmp_path / "other", patients=1, seed=12, quirks=(), matrix=32)
    assert not set(tree_digest(one).values()) & {h for name, h in tree_digest(other).items() if name.endswith(".dcm")}


def test_a_complete_cohort_is_returned_at_once_and_a_broken_one_made_again(tmp_path, monkeypatch):
    ask = {"patients": 1, "seed": 1, "quirks": (), "matrix": 32}
    out = phantom.make_cohort(tmp_path / "c", **ask)
    before = tree_digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "write_patient", lambda *_: pytest.fail("written again"))
        assert phantom.make_cohort(out, **ask) == out
    (out / "phantom.json").rename(out / "phantom.partial.json")
    shutil.rmtree(out / "Lung-PET-CT-Dx")
    assert tree_digest(phantom.make_cohort(out, **ask)) == before
    assert tree_digest(phantom.make_cohort(out, **{**ask, "seed": 2})) != before
    assert json.loads((out / "phantom.json").read_text())["seed"] == 2


@pytest.mark.parametrize("place", ["Lung-PET-CT-Dx/1.3.6/1.dcm", "Annotation/A0001/mine.xml", "notes.txt"])
def test_what_others_put_among_phantoms_is_not_lost(tmp_path, place):
    ask = {"patients": 1, "seed": 1, "quirks": (), "matrix": 32}
    out = phantom.make_cohort(tmp_path / "c", **ask)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("mine")
    before = tree_digest(out)
    assert phantom.make_cohort(out, **ask) == out
    with pytest.raises(InputError, match="something else may be among them"):
        phantom.make_cohort(out, **{**ask, "seed": 2})
    assert tree_digest(out) == before


def test_phantoms_are_not_written_through_a_link(tmp_path):
    ask = {"patients": 1, "seed": 1, "quirks": (), "matrix": 32}
    out = phantom.make_cohort(tmp_path / "c", **ask)
    (out / "Lung-PET-CT-Dx").rename(tmp_path / "store")
    (out / "Lung-PET-CT-Dx").symlink_to(tmp_path / "store")
    before = tree_digest(tmp_path / "store")
    with pytest.raises(InputError, match="something else may be among them"):
        phantom.make_cohort(out, **{**ask, "seed": 2})
    assert tree_digest(tmp_path / "store") == before


def test_two_at_once_do_not_share_a_folder(tmp_path):
    with runs.alone(tmp_path / "c"), pytest.raises(InputError, match="another lungct is at work"):
        phantom.make_cohort(tmp_path / "c", patients=1)


def test_requests_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown quirk 'nonsense'; known: two_reconstructions"):
        phantom.make_cohort(tmp_path / "c", quirks=["nonsense"])
    with pytest.raises(InputError, match="patients=0 and matrix=128"):
        phantom.make_cohort(tmp_path / "c", patients=0)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="is not empty and holds no phantoms"):
        phantom.make_cohort(tmp_path, patients=1)
    assert (tmp_path / "mine.txt").exists()


def test_clean_cohort_has_one_tidy_annotated_series_a_patient(clean):
    assert clean.quirks.empty and len(clean.metadata) == 4
    assert list(clean.metadata.columns) == list(phantom.METADATA_COLUMNS)
    assert {Path(p).parent.name for p in clean.notes} == {uid[8:] for uid in clean.metadata["Subject ID"]}
    for path in clean.notes:
        image = clean.by_uid[path.stem]
        assert path.read_text().startswith("<?xml")
        for label, x0, y0, x1, y1 in clean.boxes(path):
            assert label == path.parent.name[0] and 0 <= x0 < x1 <= image.Columns and 0 <= y0 < y1 <= image.Rows


def test_tables_and_folders_agree(full):
    for row in full.metadata.to_dict("records"):
        folder = full.root / row["File Location"].replace("\\", "/")
        images = full.series(row["Series UID"])
        assert len(list(folder.glob("*.dcm"))) == row["Number of Images"] == len(images)
        assert {i.SOPClassUID for i in images} == {row["SOP Class UID"]}
        assert {i.PatientID for i in images} == {row["Subject ID"]}
        assert folder.name.endswith("-" + row["Series UID"][-5:])
        assert folder.parent.name.endswith("-" + row["Study UID"][-5:])
    lines = (full.root / "Lung-PET-CT-Dx-phantom.tcia").read_text().splitlines()
    assert lines[5] == "ListOfSeriesToDownload=" and lines[6:] == list(full.metadata["Series UID"])
    assert len({i.SOPInstanceUID for i in full.images}) == len(full.images)


# Valid files


def test_headers_hold_up_to_strict_reading(full, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    broken = set(full.carriers("empty_pixel_spacing").sop_uid) | set(full.carriers("empty_image_position").sop_uid)
    for path in sorted(full.root.rglob("*.dcm"))[::5]:
        image = pydicom.dcmread(path)
        for element in image.iterall():
            assert element.value is not element
        kind = KIND[image.SOPClassUID]
        if image.SOPInstanceUID not in broken:
            assert [k for k in (*SHARED, *TYPE_1[kind]) if image.get(k) in (None, "")] == []
        assert [k for k in TYPE_2 if k not in image] == []
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert len(image.PixelData) == image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
        assert "phantom" in image.InstitutionName


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(full):
    damaged = set(full.carriers("empty_pixel_spacing").sop_uid) | set(full.carriers("empty_image_position").sop_uid)
    for folder in sorted({path.parent for path in full.root.rglob("*.dcm")}):
        path = sorted(folder.iterdir())[-1]
        if pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID in damaged:
            path = sorted(folder.iterdir())[len(list(folder.iterdir())) // 2]
        report = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        assert "Error" not in report.stdout + report.stderr, f"{path}: {report.stderr}"


def test_simpleitk_reads_a_series_with_the_right_geometry(clean):
    sitk = pytest.importorskip("SimpleITK")
    row = clean.metadata.iloc[0]
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(clean.root / row["File Location"]), row["Series UID"])
    image = sitk.ReadImage(names)
    first = clean.by_uid[pydicom.dcmread(names[0]).SOPInstanceUID]
    spacing = (*map(float, first.PixelSpacing[::-1]), float(first.SliceThickness))
    assert image.GetSpacing() == pytest.approx(spacing, abs=1e-3)
    assert image.GetOrigin() == pytest.approx([float(v) for v in first.ImagePositionPatient])
    assert image.GetSize()[2] == row["Number of Images"]
    assert sitk.GetArrayViewFromImage(image).min() >= -1024


# Truth


def hu_and_places(images: list) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    images = sorted(images, key=lambda i: float(i.ImagePositionPatient[2]))
    hu = np.stack([i.pixel_array * float(i.RescaleSlope) + float(i.RescaleIntercept) for i in images])
    x, y, _ = (float(v) for v in images[0].ImagePositionPatient)
    row, column = (float(v) for v in images[0].PixelSpacing)
    z = np.array([float(i.ImagePositionPatient[2]) for i in images])
    return hu, x + column * np.arange(hu.shape[2]), y + row * np.arange(hu.shape[1]), z


def test_truth_agrees_with_the_voxels(clean):
    plans = {plan.patient_id: plan for plan in phantom.plan_cohort(4, 3, (), 64)}
    for row in clean.lesions.to_dict("records"):
        chest, (lesion,) = phantom.draw_patient(plans[row["patient_id"]])
        hu, x, y, z = hu_and_places(clean.series(row["series_uid"]))
        shift = np.subtract(row["centre_mm"], lesion.centre_mm)
        share = phantom.lesion_occupancy(chest, lesion, (x - shift[0])[None, None], (y - shift[1])[None, :, None],
                                         (z - shift[2])[:, None, None], 1.0)
        rim = (phantom.lesion_distance(lesion, (x - shift[0])[None, None], (y - shift[1])[None, :, None],
                                       (z - shift[2])[:, None, None]) > -0.3 * lesion.radius_mm)
        inside = share > 0.99
        volume = share.sum() * (x[1] - x[0]) * (y[1] - y[0]) * (z[1] - z[0])
        assert volume == pytest.approx(row["volume_mm3"], rel=0.12), row["patient_id"]
        assert np.median(hu[inside & rim]) > (-750 if row["ground_glass"] else -150)
        used = [np.flatnonzero((share > 0.5).any(axes)) for axes in ((0, 1), (0, 2), (1, 2))]
        for axis, place, index in zip("xyz", (x, y, z), used, strict=True):
            slack = 1.01 * (place[1] - place[0])
            assert row[f"{axis}0_mm"] - slack <= place[index[0]] and place[index[-1]] <= row[f"{axis}1_mm"] + slack
        assert row["x0_mm"] < row["x1_mm"] and 4 <= row["diameter_mm"] <= 190
        assert np.median(hu[(hu < -500) & (np.abs(hu + 1000) > 60)]) < -700


def test_boxes_cover_the_truth(clean):
    for row in clean.lesions.to_dict("records"):
        _, x, y, _ = hu_and_places(clean.series(row["series_uid"]))
        notes = [p for p in clean.notes if clean.by_uid[p.stem].SeriesInstanceUID == row["series_uid"]]
        boxes = np.array([clean.boxes(p)[0][1:] for p in notes])
        half = (x[1] - x[0]) / 2
        hull = (x[0] - half + boxes[:, 0].min() * 2 * half, x[0] - half + boxes[:, 2].max() * 2 * half,
                y[0] - half + boxes[:, 1].min() * 2 * half, y[0] - half + boxes[:, 3].max() * 2 * half)
        for low, high, a, b in ((hull[0], hull[1], "x0_mm", "x1_mm"), (hull[2], hull[3], "y0_mm", "y1_mm")):
            covered = min(high, row[b]) - max(low, row[a])
            assert covered > 0.85 * (row[b] - row[a])
            assert high - low < 1.4 * (row[b] - row[a]) + 15
        heights = sorted(float(clean.by_uid[p.stem].ImagePositionPatient[2]) for p in notes)
        assert row["z0_mm"] - 8 <= heights[0] and heights[-1] <= row["z1_mm"] + 8


def box_iou(first, second):
    wide, high = (max(0, min(first[k + 2], second[k + 2]) - max(first[k], second[k])) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return wide * high / (sum(areas) - wide * high)


def test_two_readers_agree_about_as_well_as_people_do():
    overlaps = []
    for k in range(24):
        chest = phantom.draw_thorax(5, f"p{k}")
        lesion = phantom.draw_lesion(chest, "ABEG"[k % 4], phantom.named_rng(5, k))
        axis = (np.arange(128) - 63.5) * 2.8
        scan = phantom.Scan(axis, axis, np.arange(-150.0, 150, 5), 5.0)
        first, second = (phantom.draw_boxes(chest, lesion, scan, phantom.named_rng(5, k, reader)) for reader in "ab")
        overlaps += [box_iou(first[z], second[z]) for z in first.keys() & second.keys()]
    assert 0.74 < np.mean(overlaps) < 0.88


def test_subtypes_lean_as_the_textbooks_say_and_overlap():
    rows = []
    for plan in phantom.plan_cohort(600, 1, ()):
        _, (lesion,) = phantom.draw_patient(plan)
        rows.append((plan.letter, 2 * lesion.radius_mm, lesion.central, lesion.cavity > 0, len(lesion.spicules) > 0))
    table = pd.DataFrame(rows, columns=["subtype", "size", "central", "cavity", "spiculated"]).groupby("subtype")
    size, signs = table["size"].median(), table[["central", "cavity", "spiculated"]].mean()
    assert size["A"] < size["B"] < size["E"]
    assert signs.central["B"] > signs.central["A"] and signs.cavity.idxmax() == "G" and signs.spiculated.idxmax() == "A"
    assert ((signs > 0) & (signs < 1)).loc[["A", "G"]].all(axis=None)


# Every quirk, found again in the files


def labels(cohort: Cohort, found: pd.DataFrame) -> list[str]:
    return [box[0] for file in found.file for box in cohort.boxes(cohort.root / file)]


def z_of(images) -> list[float]:
    return [float(i.ImagePositionPatient[2]) for i in images if i.get("ImagePositionPatient")]


def by_number(images) -> list:
    return sorted(images, key=lambda i: int(i.InstanceNumber))


def check_two_reconstructions(c, found):
    for _, part in found.groupby("patient_id"):
        kernels = {c.series(uid)[0].ConvolutionKernel for uid in part.series_uid}
        assert len(kernels) == 2
        annotated = {c.by_uid[p.stem].SeriesInstanceUID for p in c.notes if p.stem in c.by_uid}
        lost = set(c.quirks[c.quirks.quirk.isin(phantom._LOSES_LABELS)].patient_id)
        assert set(part.series_uid) <= annotated or part.patient_id.iloc[0] in lost


def check_unlabelled_series(c, found):
    annotated = {c.by_uid[p.stem].SeriesInstanceUID for p in c.notes if p.stem in c.by_uid}
    assert not set(found.series_uid) & annotated


def check_multi_phase(c, found):
    images = c.series(found.series_uid.iloc[0])
    phases = Counter(int(i.AcquisitionNumber) for i in images)
    assert list(phases) == [1, 2, 3] and len(set(phases.values())) == 1
    assert set(Counter(z_of(images)).values()) == {3}


def check_reversed_instance_numbers(c, found):
    images = [i for i in by_number(c.series(found.series_uid.iloc[0])) if int(i.AcquisitionNumber) == 1]
    heights = z_of(images)
    assert heights == sorted(heights, reverse=True)


def check_duplicate_positions(c, found):
    heights = Counter(z_of(c.series(found.series_uid.iloc[0])))
    assert sum(count == 2 for count in heights.values()) == 2


def check_slice_gap(c, found):
    steps = np.diff(sorted(set(z_of(c.series(found.series_uid.iloc[0])))))
    assert steps.max() == pytest.approx(4 * np.median(steps))


def check_single_slice_series(c, found):
    assert all(len(c.series(uid)) == 1 for uid in found.series_uid)


def check_five_slice_series(c, found):
    assert all(len(c.series(uid)) == 5 for uid in found.series_uid)


def check_smart_prep(c, found):
    images = c.series(found.series_uid.iloc[0])
    assert len(images) == 7 and len(set(z_of(images))) == 1 and images[0].SeriesDescription == "Smart Prep Series"


def check_localizer(c, found):
    (image,) = c.series(found.series_uid.iloc[0])
    assert "LOCALIZER" in image.ImageType and image.SliceThickness == 410
    assert [float(v) for v in image.ImageOrientationPatient] == [1, 0, 0, 0, 0, -1]


def check_secondary_capture(c, found):
    images = c.series(found.series_uid.iloc[0])
    assert {(i.Modality, i.SamplesPerPixel, i.BitsStored, KIND[i.SOPClassUID]) for i in images} == {("CT", 3, 8, "sc")}
    assert not any("PixelSpacing" in i or "ImagePositionPatient" in i for i in images)
    assert {i.SOPInstanceUID for i in images} & {p.stem for p in c.notes}


def check_ge_padding(c, found):
    for image in c.series(found.series_uid.iloc[0]):
        assert image.PixelPaddingValue == -2000 and image.PixelRepresentation == 1
        assert image.pixel_array[0, 0] + image.RescaleIntercept == -3024


def check_feet_first(c, found):
    assert {i.PatientPosition for uid in found.series_uid for i in c.series(uid)} == {"FFS"}


def check_padded_ds(c, found):
    image = c.series(found.series_uid.iloc[0])[0]
    assert image.SliceThickness.original_string.endswith("00") and image.PixelSpacing[0] > 0


def check_empty_pixel_spacing(c, found):
    assert all("PixelSpacing" in c.by_uid[u] and not c.by_uid[u].PixelSpacing for u in found.sop_uid)
    series = c.series(found.series_uid.iloc[0])
    assert sum(not i.PixelSpacing for i in series) == 2 < len(series)


def check_empty_image_position(c, found):
    assert all("ImagePositionPatient" in c.by_uid[u] and not c.by_uid[u].ImagePositionPatient for u in found.sop_uid)


def check_implicit_vr(c, found):
    syntax = {uid: {i.file_meta.TransferSyntaxUID.name for i in c.series(uid)} for uid in c.metadata["Series UID"]}
    assert {name for uid in found.series_uid for name in syntax[uid]} == {"Implicit VR Little Endian"}
    assert any(names == {"Explicit VR Little Endian"} for names in syntax.values())


def suv(image) -> np.ndarray:
    tracer = image.RadiopharmaceuticalInformationSequence[0]
    scan, injection = image.SeriesDate + image.SeriesTime, str(tracer.RadiopharmaceuticalStartDateTime)
    wait = (pd.Timestamp(scan) - pd.Timestamp(injection)).total_seconds()
    dose = float(tracer.RadionuclideTotalDose) * 0.5 ** (wait / float(tracer.RadionuclideHalfLife))
    return image.pixel_array * float(image.RescaleSlope) * float(image.PatientWeight) * 1000 / dose


def ct_frames_of(c, image) -> set:
    study = [i for i in c.images if i.StudyInstanceUID == image.StudyInstanceUID]
    return {i.FrameOfReferenceUID for i in study if KIND[i.SOPClassUID] == "ct"}


def check_pet(c, found):
    images = c.series(found.series_uid.iloc[0])
    assert {i.Units for i in images} == {"BQML"} and len({float(i.RescaleSlope) for i in images}) > len(images) // 2
    assert images[0].FrameOfReferenceUID in ct_frames_of(c, images[0])
    values = np.stack([suv(i) for i in images])
    assert 2 < values.max() < 20 and 0.3 < np.median(values[values > 0.2]) < 2


def check_pet_other_frame(c, found):
    image = c.series(found.series_uid.iloc[0])[0]
    assert image.Modality == "PT" and image.FrameOfReferenceUID not in ct_frames_of(c, image)


def check_second_study(c, found):
    days = {(i.StudyInstanceUID, i.StudyDate) for i in c.images if i.PatientID == found.patient_id.iloc[0]}
    assert len(days) == 2 and len({day for _, day in days}) == 2
    rows = c.lesions[c.lesions.patient_id == found.patient_id.iloc[0]]
    assert rows.study_uid.nunique() == 2 and rows.volume_mm3.nunique() > 1


def check_lower_case_labels(c, found):
    whole = [p for p in c.notes if p.stem in c.by_uid and "</annotation>" in p.read_text()]
    whole = [p for p in whole if c.by_uid[p.stem].SeriesInstanceUID in set(found.series_uid)]
    names = Counter(box[0] for p in whole for box in c.boxes(p))
    assert names.most_common(1)[0][0] in set("abeg")


def check_unknown_label_q(c, found):
    assert set(labels(c, found)) == {"Q"}


def check_unknown_label_id(c, found):
    assert set(labels(c, found)) == {"A0192"}


def check_malformed_xml(c, found):
    with pytest.raises(ET.ParseError):
        ET.parse(c.root / found.file.iloc[0])


def check_zero_area_box(c, found):
    (_, x0, y0, x1, y1), *_ = c.boxes(c.root / found.file.iloc[0])
    assert (x1 - x0) * (y1 - y0) == 0


def check_box_outside_image(c, found):
    for row in found.itertuples():
        assert max(box[3] for box in c.boxes(c.root / row.file)) > c.by_uid[row.sop_uid].Columns


def check_several_boxes(c, found):
    assert max(len(c.boxes(p)) for p in c.notes if p.stem in set(found.sop_uid)) == 2
    assert (c.lesions[c.lesions.patient_id == found.patient_id.iloc[0]].lesion == 1).any()


def check_empty_annotation_folder(c, found):
    folder = c.root / found.file.iloc[0]
    assert folder.is_dir() and not list(folder.iterdir())


def check_no_annotation_folder(c, found):
    assert not (c.root / found.file.iloc[0]).exists()
    assert found.patient_id.iloc[0] in set(c.metadata["Subject ID"])


def check_annotation_without_images(c, found):
    assert not set(found.patient_id) & set(c.metadata["Subject ID"]) and all((c.root / f).is_file() for f in found.file)


def check_unmatched_xml(c, found):
    assert not set(found.sop_uid) & set(c.by_uid) and all((c.root / f).is_file() for f in found.file)


def check_xml_in_two_folders(c, found):
    for row in found.itertuples():
        here, there = (p for p in c.notes if p.stem == row.sop_uid)
        assert here.parent != there.parent and here.read_text() != there.read_text()
        assert c.by_uid[row.sop_uid].PatientID != row.patient_id


def check_label_against_patient(c, found):
    assert all(label.upper() != row.patient_id[8] and label.upper() in "ABEG"
               for row in found.itertuples() for label in [c.boxes(c.root / row.file)[0][0]])


def check_untidy_xml(c, found):
    text = next(p.read_text() for p in c.notes if p.parent.name == found.patient_id.iloc[0][8:])
    assert text.startswith("<annotation") and "<source>Unknow<database>" in text and "<Difficult>" in text


def check_windows_paths(c, found):
    rows = c.metadata[c.metadata["Series UID"].isin(found.series_uid)]
    assert rows["File Location"].str.startswith(".\\Lung-PET-CT-Dx\\").all()


def check_clinical_spelling(c, found):
    sheet = openpyxl.load_workbook(c.root / found.file.iloc[0]).active
    header, *rows = sheet.iter_rows(values_only=True)
    assert "Ｍ-Stage" in header
    grades = {row[header.index("Histopathological grading")] for row in rows}
    assert {"G1-2", "G1-G2", "G2-3", "G2-G3", " G3"} <= grades
    assert any(None in row for row in rows)
    assert [row[1] for row in rows] == sorted(uid[8:] for uid in set(c.metadata["Subject ID"]))


@pytest.mark.parametrize("quirk", phantom.QUIRKS)
def test_quirk_is_in_the_small_cohort_and_in_its_files(full, quirk):
    globals()[f"check_{quirk}"](full, full.carriers(quirk))


@pytest.mark.parametrize("seed", range(4))
def test_every_quirk_is_planned_for_any_seed(seed):
    for patients in (8, 60):
        plans = phantom.plan_cohort(patients, seed)
        assert set().union(*(plan.quirks for plan in plans)) == set(phantom.QUIRKS)
        lost = [plan for plan in plans if plan.quirks & set(phantom._LOSES_LABELS)]
        assert len(lost) == 2


def test_one_quirk_alone(tmp_path):
    cohort = Cohort(phantom.make_cohort(tmp_path / "c", patients=1, seed=2, quirks="slice_gap", matrix=32))
    assert set(cohort.quirks.quirk) == {"slice_gap"}
    check_slice_gap(cohort, cohort.carriers("slice_gap"))


def test_an_emptied_attribute_is_not_padded():
    assert phantom.pad(None) is None and phantom.pad([None, "1.5"]) == [None, " 1.5000"]


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "seed"), [(1, 0), (2, 0), (4, 0), (6, 1)])
def test_small_cohorts_of_any_seed_are_written(tmp_path, patients, seed):
    root = phantom.make_cohort(tmp_path / "cohort", patients=patients, seed=seed, matrix=32, workers=1)
    assert len(list((root / "Lung-PET-CT-Dx").iterdir())) == patients
