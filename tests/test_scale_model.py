"""The scale model: documented numbers put in exactly, valid files, and chapters 1 and 2 that find what was put in."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from lungct import annotations as an
from lungct import course, dicom
from lungct import scale_model as sm
from lungct.annotations import Outcome
from lungct.runs import InputError


@pytest.fixture(scope="module")
def whole():
    return sm.plan_model(1.0, seed=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return sm.make_scale_model(tmp_path_factory.mktemp("scale") / "model", fraction=0.03, workers=1)


@pytest.fixture(scope="module")
def found(small):
    """Tables of chapters 1 and 2 on a small part of the model."""
    instances, problems = dicom.index_dicom(small / "Lung-PET-CT-Dx", workers=2)
    assert problems.empty
    stacks, instances = dicom.build_stacks(instances, root=small / "Lung-PET-CT-Dx")
    boxes, unread = an.read_annotations(small / "Annotation")
    return instances, stacks, boxes, unread, an.reconcile(instances, stacks, boxes, unread)


# ---------------------------------------------------------------- on paper

@pytest.mark.parametrize("seed", [0, 5])
def test_every_documented_number_is_put_in_at_once(seed):
    put_in = sm.planned_numbers(sm.plan_model(1.0, seed))
    documented = pd.Series(sm.DOCUMENTED, dtype=float)
    assert put_in.reindex(documented.index).to_dict() == documented.to_dict()


def test_the_documented_numbers_are_those_of_the_published_table(real_data):
    published = pd.read_csv(real_data / "metadata.csv")
    kind = published["SOP Class Name"].str.split().str[0]
    images = published["Number of Images"]
    assert published["Subject ID"].nunique() == sm.DOCUMENTED["patients"]
    assert published["Study UID"].nunique() == sm.DOCUMENTED["studies"]
    for word, name in (("CT", "CT"), ("Secondary", "secondary capture"), ("Positron", "PET")):
        assert (kind == word).sum() == sm.DOCUMENTED[f"{name} series"]
        assert images[kind == word].sum() == sm.DOCUMENTED[f"{name} images"]
    ct = published[kind == "CT"]
    assert (ct.groupby("Subject ID")["Study UID"].nunique() > 1).sum() == (
        sm.DOCUMENTED["patients with CT in several studies"])
    assert ct["Number of Images"].max() == sm.DOCUMENTED["images in the longest CT series"]
    assert published["Subject ID"].str[8].drop_duplicates().size == len(sm.PATIENTS)


def test_planned_outcomes_follow_from_where_files_lie(whole):
    files = whole.files
    assert not files.duplicated(["folder", "sop_uid"]).any()
    owner = files["spot"].map(lambda spot: spot.patient if spot else None)
    own = files[owner == files["folder"]]
    assert not own["outcome"].isin([Outcome.DUPLICATE, Outcome.OTHER_PATIENT, Outcome.UNKNOWN_UID]).any()
    strangers = files[owner.notna() & (owner != files["folder"])]
    annotated = set(own["sop_uid"])
    assert (strangers["sop_uid"].isin(annotated) == (strangers["outcome"] == Outcome.DUPLICATE)).all()
    assert set(files.loc[owner.isna(), "outcome"]) == {Outcome.NO_IMAGES, Outcome.UNKNOWN_UID}
    assert set(files.loc[files["outcome"] == Outcome.NO_IMAGES, "folder"]) == set(sm.WITHOUT_IMAGES)


def test_quirks_known_by_name_are_where_they_are_known(whole):
    files = whole.files
    assert files.loc[files["outcome"] == Outcome.UNPARSEABLE, "folder"].tolist() == ["A0024"]
    assert files.loc[files["outcome"] == Outcome.NO_AREA, "folder"].tolist() == ["A0188"]
    assert files.loc[files["word"] == "Q", "folder"].value_counts().to_dict() == {"A0118": 10}
    assert files.loc[files["word"] == "g", "folder"].value_counts().to_dict() == {"A0212": 4}
    assert not files["folder"].isin(["A0058", "A0251"]).any()
    shared = files[files["folder"] == "A0003"]
    assert (shared["outcome"] == Outcome.DUPLICATE).sum() == 5
    assert not whole.patients.loc[whole.patients["patient"].str[0] == "E", "pet"].any()


def test_series_lengths_have_the_published_shape(real_data):
    published = pd.read_csv(real_data / "metadata.csv")
    for kind, word in (("ct", "CT"), ("sc", "Secondary"), ("pet", "Positron")):
        true = published.loc[published["SOP Class Name"].str.startswith(word), "Number of Images"]
        ours = sm.slice_counts(kind)
        assert (len(ours), sum(ours)) == (len(true), true.sum())
        middle = np.linspace(0, 1, 17)[1:-1]
        np.testing.assert_allclose(np.quantile(ours, middle), np.quantile(true, middle), rtol=0.06)


def test_a_fraction_keeps_every_quirk_and_whole_patients(whole):
    part = sm.plan_model(0.03)
    assert len(part.patients) < 30 and set(sm.NAMED) <= set(part.patients["patient"])
    assert set(part.series["quirk"]) == set(whole.series["quirk"])
    assert set(part.files["outcome"]) == set(whole.files["outcome"])
    kept = whole.series[whole.series["patient"].isin(part.patients["patient"])]
    pd.testing.assert_frame_equal(part.series, kept.reset_index(drop=True))
    owners = {spot.patient for spot in part.files["spot"] if spot}
    assert owners <= set(part.patients["patient"])
    assert len(sm.plan_model(0.2).patients) in range(71, 90)


@pytest.mark.parametrize("fraction", [0, -1, 1.01, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(InputError, match="expected a fraction above 0 and at most 1"):
        sm.plan_model(fraction)


# ---------------------------------------------------------------- on disk

def test_the_ledger_reproduces_the_numbers_put_in(small, found):
    instances, _, boxes, unread, ledger = found
    truth = pd.read_parquet(small / "truth" / "files.parquet")
    put_in = pd.read_csv(small / "truth" / "numbers.csv", index_col="number")["put in"]
    assert sm.check_ledger(truth, ledger).empty
    assert sm.check_numbers(put_in, sm.recount(instances, boxes, unread, ledger)).empty
    assert len(ledger) == len(truth) == len(list((small / "Annotation").rglob("*.xml"))) > 900
    never = ["outcome image size disagrees", "outcome box outside the image", "outcome on an image of several frames",
             "outcome on an image that is no slice"]
    assert (put_in.filter(like="outcome").drop(never) > 0).all()


def test_what_is_moved_or_lost_is_named(small, found):
    ledger, truth = found[-1], pd.read_parquet(small / "truth" / "files.parquet")
    wrong = ledger.assign(outcome=ledger["outcome"].mask(ledger.index == 3, "matched!"))
    assert sm.check_ledger(truth, wrong)["file"].tolist() == [ledger["file"].iloc[3]]
    assert sm.check_ledger(truth, ledger.iloc[1:])["file"].tolist() == [ledger["file"].iloc[0]]
    assert sm.check_ledger(truth.iloc[1:], ledger)["outcome_put_in"].isna().tolist() == [True]
    numbers = pd.Series({"a": 1.0, "b": 2.0})
    assert sm.check_numbers(numbers, pd.Series({"a": 1.0, "c": 4.0})).to_dict("index") == {
        "b": {"put in": 2.0, "found": 0.0}, "c": {"put in": 0.0, "found": 4.0}}


def test_only_what_was_meant_to_be_excluded_is(found):
    stacks = found[1]
    quirks = sm.plan_model(0.03).series
    ct = quirks[quirks["kind"] == "ct"]
    reasons = stacks.loc[stacks["status"] == "excluded", "reason"].value_counts().to_dict()
    assert reasons.pop("secondary capture") == (quirks["kind"] == "sc").sum()
    odd = (ct["images"] < 8).sum() + (ct["quirk"] == "no position").sum()
    assert sum(reasons.values()) == odd and set(reasons) <= {"too few slices", "localizer", "no geometry"}
    accepted = stacks[stacks["status"] == "accepted"]
    assert (accepted["modality"] == "PT").sum() == (quirks["kind"] == "pet").sum()
    assert accepted.loc[accepted["modality"] == "PT", "suv_refusal"].isna().all()
    phases = accepted[accepted.duplicated("series_uid", keep=False)]
    assert len(phases) == 3 and phases["slices"].nunique() == 1
    assert stacks["dropped_duplicates"].sum() == (quirks["quirk"] == "repeat").sum()


def test_lesions_are_the_runs_that_were_put_in(found):
    _, stacks, boxes, _, ledger = found
    lesions, boxes = an.join_lesions(an.place_boxes(boxes, ledger), stacks)
    files = sm.plan_model(0.03).files
    runs = files[files["outcome"] == Outcome.MATCHED].groupby("session").size()
    several = files.loc[files["objects"] == 2, "session"].nunique()
    phases, repeats = (int((sm.plan_model(0.03).series["quirk"] == quirk).sum()) for quirk in ("phases", "repeat"))
    assert len(lesions) == len(runs) + several + 2 * phases + repeats and repeats > 0    # one far off on each repeat
    assert lesions["bridged_slices"].sum() > 0
    pairs = an.pair_lesions(lesions, stacks)
    assert set(pairs["kind"]) == {"phase", "reconstruction"} and pairs["iou"].median() > 0.5


def test_images_are_valid_and_small(small, found):
    instances = found[0]
    for uid, part in instances.groupby("sop_class_uid"):
        for path in part["path"].iloc[[0, 1, -1]]:
            file = small / "Lung-PET-CT-Dx" / path
            image = pydicom.dcmread(file)
            assert image.SOPClassUID == uid and image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
            assert image.SOPInstanceUID.is_valid and image.pixel_array.shape[:2] == (sm.MATRIX, sm.MATRIX)
            assert file.stat().st_size < 4096 and file.name == f"1-{image.InstanceNumber:03d}.dcm"
            if image.Modality == "PT":
                assert image.ImageIndex == image.InstanceNumber and 0 < image.RescaleSlope < 1
    assert instances["sop_uid"].is_unique
    assert instances["transfer_syntax_uid"].nunique() == 2


def test_same_seed_same_bytes_on_any_number_of_processes(small, tmp_path):
    def digest(root):
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return [(path.relative_to(root), hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]

    code = ("from lungct import scale_model as sm\n"
            "if __name__ == '__main__':\n"
            f"    model = sm.plan_model(0.03)\n    sm._write_model(sm.Path({str(tmp_path / 'again')!r}), model, 2)")
    (tmp_path / "again" / "Annotation").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    ours = [row for row in digest(small) if row[0].name != "phantom.json"]
    assert len(ours) > 150 and ours == [row for row in digest(tmp_path / "again") if row[0].name != "phantom.json"]


def test_a_finished_model_is_kept_and_foreign_folders_are_refused(small, tmp_path):
    stamp = (small / "metadata.csv").stat().st_mtime_ns
    assert sm.make_scale_model(small, fraction=0.03) == small
    assert (small / "metadata.csv").stat().st_mtime_ns == stamp
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no phantoms"):
        sm.make_scale_model(tmp_path, fraction=0.03)


def test_the_command_writes_a_fraction(tmp_path, capsys):
    course.phantom(str(tmp_path / "model"), scale_model=True, fraction=0.03)
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    assert (tmp_path / "model" / "phantom.json").is_file() and (tmp_path / "model" / "metadata.csv").is_file()
