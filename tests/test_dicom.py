"""Chapter 1: every file accounted for, every series judged, voxels and millimetres as SimpleITK has them."""

import json
import math
import os
import pickle
import re
import signal
import time
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from lungct import dicom, headers, pixels, plots, runs
from lungct.dicom import Exclusion, FileProblem

GEOMETRY_TOLERANCE_MM = 1e-4
AXIAL = [1, 0, 0, 0, 1, 0]


# ---- made-up files ---------------------------------------------------------------------------------------------------

def write_slice(path, number=1, position=(0, 0, 0), pixels=None, syntax=ImplicitVRLittleEndian, **changes):
    """Write one CT slice; `changes` set elements by keyword, None removes them."""
    pixels = np.full((4, 6), 1064, np.uint16) if pixels is None else pixels
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"1.2.3.{zlib.crc32(os.fsencode(path))}"
    image.PatientID, image.StudyInstanceUID, image.SeriesInstanceUID = "Toy", "1.2.1", "1.2.2"
    image.Modality, image.ImageType, image.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], number
    image.ImagePositionPatient, image.ImageOrientationPatient = [float(x) for x in position], AXIAL
    image.PixelSpacing, image.SliceThickness = [0.8, 0.5], 1.25
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape[:2]
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    image.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    image["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            image.pop(keyword, None)
        else:
            setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.compress(syntax, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, depths, **changes):
    """Axial slices at these z; a callable change gets the slice's place in the list."""
    for i, z in enumerate(depths):
        own = {key: value(i) if callable(value) else value for key, value in changes.items()}
        position = own.pop("position", (0, 0, z))
        write_slice(folder / f"{i + 1:03}.dcm", own.pop("number", i + 1), position, **own)
    return folder


def stacks_of(folder, min_slices=4, with_root=True):
    instances, problems = dicom.index_dicom(folder, workers=1)
    assert problems.empty
    return dicom.build_stacks(instances, min_slices, folder if with_root else None)


def only(stacks):
    assert len(stacks) == 1, stacks[["slices", "reason", "detail"]]
    return stacks.iloc[0]


# ---- the index -------------------------------------------------------------------------------------------------------

@pytest.fixture()
def tree(tmp_path):
    write_series(tmp_path / "tree", [0, 5, 10])
    return tmp_path / "tree"


def problem_of(folder, path):
    instances, problems = dicom.index_dicom(folder, workers=1)
    files, unlisted = dicom.list_files(folder)
    assert len(instances) + len(problems) == len(files) + len(unlisted)
    assert set(instances["path"]) | set(problems["path"]) == set(files) | {row["path"] for row in unlisted}
    row = problems.set_index("path").loc[path]
    return row["reason"], row["detail"]


def test_good_tree(tree):
    instances, problems = dicom.index_dicom(tree)
    assert problems.empty and instances["path"].tolist() == ["001.dcm", "002.dcm", "003.dcm"]
    assert instances.dtypes.astype(str).to_dict() == dicom.INSTANCE_DTYPES
    assert problems.dtypes.astype(str).to_dict() == dicom.PROBLEM_DTYPES
    row = instances.iloc[1]
    assert row["position_mm"] == [0, 0, 5] and row["pixel_spacing_mm"] == [0.8, 0.5] and row["rows"] == 4
    assert row["file_bytes"] - row["pixel_offset"] == 4 * 6 * 2


@pytest.mark.parametrize("name, content, problem, words", [
    ("notes.dcm", b"text" * 100, FileProblem.NOT_DICOM, "DICM"),
    ("short.dcm", b"x", FileProblem.NOT_DICOM, "DICM"),
    ("nothing.dcm", b"", FileProblem.ZERO_BYTE, "empty"),
    ("LICENSE", b"words\n" * 50, FileProblem.NOT_DICOM, "DICM"),
    ("ohne Ende – ü.txt", b"y", FileProblem.NOT_DICOM, "DICM"),
])
def test_other_files(tree, name, content, problem, words):
    (tree / name).write_bytes(content)
    reason, detail = problem_of(tree, name)
    assert reason == problem.value and words in detail


@pytest.mark.parametrize("cut, problem", [(1, "truncated"), (48, "truncated"), (60, "truncated")])
def test_truncated(tree, cut, problem):
    content = write_slice(tree / "004.dcm").read_bytes()
    (tree / "004.dcm").write_bytes(content[:-cut])
    assert problem_of(tree, "004.dcm")[0] == problem


def test_truncated_says_how_much(tree):
    content = write_slice(tree / "004.dcm").read_bytes()
    (tree / "004.dcm").write_bytes(content[:-10])
    assert problem_of(tree, "004.dcm")[1] == "pixel data has 38 of 48 bytes"


def test_cut_inside_the_header_costs_that_file(tree):
    content = write_slice(tree / "004.dcm").read_bytes()
    for end in range(133, len(content) - 60, 37):
        (tree / "004.dcm").write_bytes(content[:end])
        assert problem_of(tree, "004.dcm")[0] in ("truncated", "unreadable", "no image")


def test_duplicate_uid_names_the_first(tree):
    (tree / "zz copy.dcm").write_bytes((tree / "002.dcm").read_bytes())
    assert problem_of(tree, "zz copy.dcm") == ("duplicate SOP UID", "same SOP Instance UID as 002.dcm")


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless, DeflatedExplicitVRLittleEndian],
                         ids=lambda uid: uid.name)
def test_of_two_copies_the_whole_one_stays(tree, syntax):
    pixels = np.random.default_rng(0).integers(0, 4096, (36, 34)).astype(np.uint16)
    whole = write_slice(tree / "b.dcm", 4, (0, 0, 15), pixels, syntax).read_bytes()
    (tree / "a.dcm").write_bytes(whole[:-20])
    assert problem_of(tree, "a.dcm")[0] == "truncated"
    assert "b.dcm" in dicom.index_dicom(tree)[0]["path"].tolist()


def test_links_and_pipes(tree):
    (tree / "gone.dcm").symlink_to(tree / "nowhere")
    (tree / "round").symlink_to(tree)
    (tree / "self").symlink_to(tree / "self")
    os.mkfifo(tree / "pipe.dcm")
    assert problem_of(tree, "gone.dcm")[0] == "dangling link"
    assert problem_of(tree, "self")[0] == "dangling link"
    assert problem_of(tree, "round")[0] == "folder already read"
    assert problem_of(tree, "pipe.dcm")[0] == "not a regular file"


def test_linked_folder_is_read(tree, tmp_path):
    write_series(tmp_path / "elsewhere", [50, 55], SOPInstanceUID=lambda i: f"1.9.{i}")
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    instances, problems = dicom.index_dicom(tree)
    assert len(instances) == 5 and problems.empty


def test_folders_are_told_apart_where_entries_do_not_know_who_they_are(tree, monkeypatch):
    class Entry:                                           # as on Windows: a listing tells no device and no inode
        def __init__(self, entry):
            self.name, self.path, self.entry = entry.name, entry.path, entry

        def stat(self):
            mode, _, _, *rest = self.entry.stat()
            return os.stat_result((mode, 0, 0, *rest), {"st_ctime_ns": 0})

    for name in ("one", "two"):
        (tree / name).mkdir()
        (tree / name / "a.txt").write_text("x")
    scan = os.scandir

    def listing(path):
        return nullcontext([Entry(entry) for entry in scan(path)])

    monkeypatch.setattr(os, "scandir", listing)
    files, problems = dicom.list_files(tree)
    assert {"one/a.txt", "two/a.txt"} <= set(files) and problems == []


def lock(monkeypatch, name):
    """Play that a file may not be opened: root may open everything."""
    def locked(read):
        def refuse(path, *more):
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied")
            return read(path, *more)
        return refuse

    for reader in ("_read_start", "read_header_pydicom"):
        monkeypatch.setattr(headers, reader, locked(getattr(headers, reader)))


def test_no_permission(tree, monkeypatch):
    lock(monkeypatch, "002.dcm")
    assert problem_of(tree, "002.dcm") == ("no permission", "Permission denied")


def test_locked_folder(tree, monkeypatch):
    (tree / "locked").mkdir()
    scan = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert problem_of(tree, "locked") == ("no permission", "Permission denied")


def test_name_that_is_not_utf8(tree):
    with open(os.fsencode(tree) + b"/\xff.dcm", "wb") as stream:
        stream.write(b"x")
    assert problem_of(tree, r"\udcff.dcm")[0] == "name is not UTF-8"


def test_dicomdir_and_objects_without_pixels(tree):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", "1.2"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory = Dataset()
    directory.file_meta, directory.FileSetID = meta, "X"
    directory.save_as(tree / "DICOMDIR", enforce_file_format=True)
    assert problem_of(tree, "DICOMDIR")[0] == "DICOMDIR"
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID, report.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.5", "1.6"
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.save_as(tree / "report.dcm", enforce_file_format=True)
    assert problem_of(tree, "report.dcm") == ("no image", "Basic Text SR Storage holds no pixels")


def test_missing_uid_is_named(tree):
    write_slice(tree / "004.dcm", SeriesInstanceUID=None)
    assert problem_of(tree, "004.dcm") == ("unreadable", "SeriesInstanceUID (0020,000E) is missing")


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "is empty"),
    (lambda path: path.write_text("x"), "is a file"),
    (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), r"holds no DICOM image \(1 not DICOM\)"),
])
def test_hopeless_folders(tmp_path, make, words):
    make(tmp_path / "in")
    with pytest.raises(runs.InputError, match=words) as caught:
        dicom.index_dicom(tmp_path / "in")
    assert "\n" not in str(caught.value) and str(tmp_path / "in") in str(caught.value)


def test_processes_give_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "FILES_A_WORKER", 1000)
    template = write_slice(tmp_path / "t.dcm", SOPInstanceUID="1.2.3.10000").read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(2000):
        (tmp_path / "many" / f"{i:04}.dcm").write_bytes(template.replace(b"1.2.3.10000", b"1.2.3.1%04d" % i))
    calls = []
    two, _ = dicom.index_dicom(tmp_path / "many", workers=2, progress=lambda done, files: calls.append((done, files)))
    one, _ = dicom.index_dicom(tmp_path / "many", workers=1)
    pd.testing.assert_frame_equal(one, two)
    assert len(one) == 2000 and calls[-1] == (2000, 2000) and calls == sorted(calls)


class Bomb(float):
    """A number that kills the process which unpickles it, after leaving a mark."""

    mark = None

    def __reduce__(self):
        return _explode, (self.mark,)


def _explode(mark):
    Path(mark).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_costs_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Bomb, "mark", str(tmp_path / "exploded"))
    batches = [Bomb(0.3)] * 8                              # seconds: this process sleeps, the other one dies
    assert list(dicom._shared(time.sleep, batches, 1)) == [None] * 8
    assert (tmp_path / "exploded").exists()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.tuples(st.integers(132, 700), st.integers(0, 255)), min_size=1, max_size=6),
       end=st.integers(0, 700))
def test_mutated_files_never_stop_the_index(tmp_path, changes, end):
    path = tmp_path / "in" / "mutant.dcm"
    content = bytearray(write_slice(path).read_bytes())
    for at, value in changes:
        content[at % len(content)] = value
    path.write_bytes(content[: end + 132] if end < 300 else content)
    table = headers.read_headers(path.parent, [("mutant.dcm", path.stat().st_size, 0)])
    assert len(table) == 1
    instances, problems = dicom._as_tables(table, [])
    assert len(instances) + len(problems) == 1
    if len(instances):
        dicom.build_stacks(instances)
        assert instances["rows"][0] > 0
    else:
        assert problems["reason"][0] in set(FileProblem) and problems["detail"][0]


def test_odd_names_and_a_crowded_folder(tmp_path):
    template = write_slice(tmp_path / "t.dcm", SOPInstanceUID="1.2.3.10000").read_bytes()
    names = ["ohne Ende – ü 肺.dcm", " leading blank", "a'b\"c;$(d).dcm", "new\nline.dcm", "-rf", "x" * 250,
             *(f"{i}" for i in range(10_000 - 6))]
    folder = tmp_path / "one folder" / "ünd zwei"
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(template.replace(b"1.2.3.10000", b"1.2.3.%05d" % i))
    instances, problems = dicom.index_dicom(tmp_path / "one folder", workers=1)
    assert problems.empty and instances["path"].tolist() == sorted(f"ünd zwei/{name}" for name in names)


def test_folders_nested_deep(tmp_path):
    folder = tmp_path / "in"
    for _ in range(200):
        folder = folder / "d"
    write_slice(folder / "a.dcm")
    (folder / "back").symlink_to(tmp_path / "in")
    instances, problems = dicom.index_dicom(tmp_path / "in")
    assert instances["path"].tolist() == ["d/" * 200 + "a.dcm"]
    assert problems["reason"].tolist() == ["folder already read"]


# ---- the cache of the index ------------------------------------------------------------------------------------------

@pytest.fixture()
def opened(monkeypatch):
    """Names of the files that were opened since the list was cleared."""
    names, read = [], headers._read_start

    def note(path, count):
        names.append(os.path.basename(path))
        return read(path, count)

    monkeypatch.setattr(headers, "_read_start", note)
    return names


def assert_same_index(one, two):
    for a, b in zip(one, two, strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_unchanged_files_are_not_opened(tree, tmp_path, opened):
    (tree / "notes.txt").write_text("words")
    (tree / "zz copy.dcm").write_bytes((tree / "002.dcm").read_bytes())
    cache = tmp_path / "cache" / "index.parquet"
    first = dicom.index_dicom(tree, cache=cache)
    assert set(opened) == {"001.dcm", "002.dcm", "003.dcm", "notes.txt", "zz copy.dcm"}
    opened.clear()
    stamp = cache.stat().st_mtime_ns
    assert_same_index(first, dicom.index_dicom(tree, cache=cache))
    assert_same_index(first, dicom.index_dicom(tree))
    assert cache.stat().st_mtime_ns == stamp
    opened.clear()
    dicom.index_dicom(tree, cache=cache)
    assert opened == [] and list(cache.parent.iterdir()) == [cache]


def test_changed_new_and_lost_files(tree, tmp_path, opened):
    cache = tmp_path / "index.parquet"
    dicom.index_dicom(tree, cache=cache)
    opened.clear()
    write_slice(tree / "002.dcm", 2, (0, 0, 5), PatientID="Changed")
    write_slice(tree / "000 new.dcm", 9, (0, 0, 20))
    (tree / "001.dcm").unlink()
    now = dicom.index_dicom(tree, cache=cache)
    assert opened == ["000 new.dcm", "002.dcm"]
    assert_same_index(now, dicom.index_dicom(tree))
    opened.clear()
    assert_same_index(now, dicom.index_dicom(tree, cache=cache))
    os.utime(tree / "003.dcm", ns=(1, 1))                  # same size, other time: looked at again
    opened.clear()
    dicom.index_dicom(tree, cache=cache)
    assert opened == ["003.dcm"]
    (tree / "000 new.dcm").unlink()                        # nothing new, one less: the cache forgets it
    assert len(dicom.index_dicom(tree, cache=cache)[0]) == 2 == len(dicom._load_cache(cache, str(tree)))


@pytest.mark.parametrize("harm", [
    lambda path: path.write_bytes(b"no table"), lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b""), lambda path: pd.DataFrame({"path": ["001.dcm"]}).to_parquet(path),
    lambda path: path.write_bytes(path.read_bytes().replace(b"002.dcm", b"\xff\xff2.dcm"))])
def test_damaged_caches_are_ignored(tree, tmp_path, harm):
    cache = tmp_path / "index.parquet"
    first = dicom.index_dicom(tree, cache=cache)
    harm(cache)
    assert_same_index(first, dicom.index_dicom(tree, cache=cache))
    assert_same_index(first, dicom.index_dicom(tree, cache=cache))


def test_a_cache_that_cannot_be_written_is_told_before_reading(tree, tmp_path, opened, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for cache, words in ((tmp_path / "folder", "folder is a folder: give the name of a file"),
                         (tmp_path / "file" / "index.parquet", "file is no folder"),
                         (tmp_path / "file" / "a" / "index.parquet", "file is no folder")):
        with pytest.raises(runs.InputError, match=f"cannot be kept in .*: .*{words}$"):
            dicom.index_dicom(tree, cache=cache)
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked"))
    with pytest.raises(runs.InputError, match=r"cannot be kept in .*: .*locked cannot be written to$"):
        dicom.index_dicom(tree, cache=tmp_path / "locked" / "new" / "index.parquet")
    assert opened == []


def test_a_cache_that_knows_all_need_not_be_written(tree, tmp_path, monkeypatch):
    cache = tmp_path / "index.parquet"
    first = dicom.index_dicom(tree, cache=cache)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_same_index(first, dicom.index_dicom(tree, cache=cache))


def test_other_code_finds_nothing_in_a_cache(tree, tmp_path, opened, monkeypatch):
    cache = tmp_path / "index.parquet"
    dicom.index_dicom(tree, cache=cache)
    opened.clear()
    monkeypatch.setattr(dicom, "_stamp", lambda root: b"other")
    dicom.index_dicom(tree, cache=cache)
    assert opened == ["001.dcm", "002.dcm", "003.dcm"]


def test_what_may_pass_is_tried_again(tree, tmp_path, monkeypatch):
    cache = tmp_path / "index.parquet"
    with monkeypatch.context() as patch:
        lock(patch, "002.dcm")
        assert dicom.index_dicom(tree, cache=cache)[1]["reason"].tolist() == ["no permission"]
    assert len(dicom.index_dicom(tree, cache=cache)[0]) == 3


# ---- reasons ---------------------------------------------------------------------------------------------------------

EVEN = [0, 5, 10, 15, 20, 25]
REASONS = {
    Exclusion.SECONDARY_CAPTURE: (EVEN, {"SOPClassUID": SecondaryCaptureImageStorage}, "Secondary Capture"),
    Exclusion.OTHER_MODALITY: (EVEN, {"Modality": "MR"}, "modality MR"),
    Exclusion.LOCALIZER: (EVEN, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALIZER"),
    Exclusion.PROJECTION: (EVEN, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "AXIAL\\MIP"),
    Exclusion.TOO_FEW_SLICES: ([0, 5, 10], {}, "3 slices, at least 4 needed"),
    Exclusion.DUPLICATE_POSITIONS: ([7] * 6, {"number": 1, "pixels": lambda i: np.full((4, 6), i, np.uint16)},
                                    "6 slices at 1 position, the first again"),
    Exclusion.GAP: ([0, 5, 10, 20, 25, 30], {}, "between 10.0 and 20.0 mm"),
    Exclusion.UNEVEN_SPACING: ([0, 5, 11, 15, 20, 25], {}, "slice 2 is 1.00 mm off"),
    Exclusion.TILTED_GANTRY: (EVEN, {"position": lambda i: (0, i, 5 * i)}, "lean 11.3 degrees"),
    Exclusion.NO_GEOMETRY: (EVEN, {"ImagePositionPatient": None}, "ImagePositionPatient (0020,0032) missing in 6 of 6"),
    Exclusion.MIXED_SIZE: (EVEN, {"PixelSpacing": lambda i: [0.8, 0.5 + (i == 2) / 10]}, "5 of 4 x 6 pixels"),
    Exclusion.MISSING_RESCALE: (EVEN, {"RescaleSlope": None}, "RescaleSlope (0028,1053) missing in 6 of 6"),
}


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.value)
def test_each_reason(tmp_path, reason):
    depths, changes, words = REASONS[reason]
    stacks, instances = stacks_of(write_series(tmp_path / "s", depths, **changes))
    row = only(stacks)
    assert (row["status"], row["reason"]) == ("excluded", reason.value)
    assert words in row["detail"]
    assert row["ordered_by"] == ("instance number" if reason is Exclusion.NO_GEOMETRY else "position")
    assert instances["stack_id"].eq(row["stack_id"]).all()


@pytest.mark.parametrize(("changes", "words"), [
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR: the numbers stand for colours"),
    ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "RescaleSlope": 1, "RescaleIntercept": 0},
     "no stored number can mean less than 0 HU"),
    ({"BitsStored": 10, "HighBit": 9, "PixelRepresentation": 1, "RescaleSlope": -1, "RescaleIntercept": 0},
     "no stored number can mean less than -511 HU"),
])
def test_numbers_that_are_no_hounsfield_units_are_excluded(tmp_path, changes, words):
    def narrow(i):
        return np.full((16, 16), i, np.uint8 if changes.get("BitsAllocated") == 8 else np.uint16)

    row = only(stacks_of(write_series(tmp_path / "s", range(0, 50, 5), pixels=narrow, **changes))[0])
    assert row["reason"] == Exclusion.OTHER_UNIT.value and words in row["detail"]


def test_a_pixel_spacing_that_some_slices_round_is_one(tmp_path):
    tree = write_series(tmp_path / "s", range(0, 100, 5), pixels=different,
                        PixelSpacing=lambda i: ["0.703125", "0.703125"] if i % 2 else ["0.703", "0.703"])
    row = only(stacks_of(tree)[0])
    assert row["status"] == "accepted" and row["slices"] == 20 and row["spacing_mm"][2] == pytest.approx(5)


def test_two_scans_half_a_step_apart_are_two_volumes(tmp_path):
    depths = [*range(0, 100, 5), *(z + 2.5 for z in range(0, 100, 5))]
    stacks, _ = stacks_of(write_series(tmp_path / "s", depths, AcquisitionNumber=1, pixels=different,
                                       AcquisitionTime=lambda i: "120000" if i < 20 else "120500"))
    assert stacks["status"].eq("accepted").all() and stacks["slices"].tolist() == [20, 20]


def test_unsupported_syntax(tmp_path):
    instances, _ = dicom.index_dicom(write_series(tmp_path / "s", EVEN))
    stacks, _ = dicom.build_stacks(instances.assign(transfer_syntax_uid="1.2.840.10008.1.2.4.100"), 4)
    assert only(stacks)["reason"] == "unsupported syntax" and "MPEG2" in only(stacks)["detail"]


@pytest.mark.parametrize("syntax, changes, words", [
    (ImplicitVRLittleEndian, {"BitsAllocated": 12}, r"BitsAllocated \(0028,0100\) is 12, expected 1, 8, 16"),
    (ImplicitVRLittleEndian, {"HighBit": 3, "BitsStored": 12}, r"12 bits stored up to bit 3 .* HighBit \(0028,0102\)"),
    (ExplicitVRBigEndian, {"HighBit": 16}, r"16 bits stored up to bit 16 do not fit in 16 bits"),
    (ExplicitVRLittleEndian, {"BitsStored": 17, "HighBit": 16}, r"17 bits .* in 16 bits .* BitsStored \(0028,0101\)"),
    (DeflatedExplicitVRLittleEndian, {"BitsStored": None}, r"BitsStored \(0028,0101\) is missing"),
    (ExplicitVRBigEndian, {"PixelRepresentation": None}, r"PixelRepresentation \(0028,0103\) is missing"),
])
def test_bits_that_cannot_be_are_excluded(tmp_path, syntax, changes, words):
    stacks, instances = stacks_of(write_series(tmp_path / "s", EVEN, syntax=syntax, **changes))
    row = only(stacks)
    assert row["reason"] == "unsupported syntax" and re.search(words, row["detail"])
    with pytest.raises(ValueError, match="cannot be read as a volume: unsupported syntax"):
        dicom.read_stack(instances, tmp_path / "s")


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(syntax=st.sampled_from([ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian,
                               RLELossless]),
       told=st.dictionaries(st.sampled_from(["BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
                                             "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"]),
                            st.sampled_from([None, 0, 1, 2, 3, 8, 11, 12, 15, 16, 17, 24, 32]), max_size=3))
def test_what_is_accepted_can_be_read(tmp_path, syntax, told):
    """Whatever a header says of its bits, a stack that is accepted is read without an error."""
    if "PhotometricInterpretation" in told:
        told["PhotometricInterpretation"] = None
    if syntax == RLELossless:                              # its stream tells the bytes of a pixel, and is not read yet
        told.pop("BitsAllocated", None)
    folder = tmp_path / "s"
    write_series(folder, EVEN[:4], pixels=np.full((8, 6), 1064, np.uint16), syntax=syntax)
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        for keyword, value in told.items():
            image.pop(keyword, None)
            if value is not None:
                setattr(image, keyword, value)
        image.save_as(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            instances, _ = dicom.index_dicom(folder, workers=1)
        except ValueError:                                 # no image at all
            return
        stacks, instances = dicom.build_stacks(instances, 4, folder)
        for name in stacks.loc[stacks["status"] == "accepted", "stack_id"]:
            assert dicom.read_stack(instances[instances["stack_id"] == name], folder).hu_zyx.shape[1:] == (8, 6)


def test_missing_decoder_is_named(tmp_path, monkeypatch):
    class Absent:
        is_available = False

    monkeypatch.setattr(pixels, "get_decoder", lambda uid: Absent)
    instances, _ = dicom.index_dicom(write_series(tmp_path / "s", EVEN))
    stacks, _ = dicom.build_stacks(instances.assign(transfer_syntax_uid="1.2.840.10008.1.2.4.80"), 4)
    assert only(stacks)["reason"] == "unsupported syntax"
    assert "needs a decoder: pip install 'lungct[codecs]'" in only(stacks)["detail"]


def test_thick_slice_is_a_localizer(tmp_path):
    stacks, _ = stacks_of(write_series(tmp_path / "s", [0], SliceThickness=410))
    assert only(stacks)["reason"] == "localizer"


@pytest.mark.parametrize("changes, words", [
    ({"SliceThickness": 410, "ImageType": None}, "slice thickness 410 mm"),
    ({"SliceThickness": None, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
     "image type ORIGINAL\\PRIMARY\\LOCALIZER")])
def test_a_localizer_tells_only_what_its_header_tells(tmp_path, changes, words):
    assert only(stacks_of(write_series(tmp_path / "s", [0], **changes))[0])["detail"] == words


@pytest.mark.parametrize("value, projected", [
    ("MIP", True), ("MINIP", True), ("MIN IP", True), ("MIN_IP", True), ("CT_SOM5 MIP", True), ("MAX IP", True),
    ("AVERAGE", False), ("MPR", False), ("MIPS", False), ("CT_SOM7 SPI", False)])
def test_projections_are_no_volume_and_averages_are(tmp_path, value, projected):
    """A slab of the brightest or darkest values has numbers that no tissue has there."""
    folder = write_series(tmp_path / "s", EVEN, ImageType=["DERIVED", "SECONDARY", "REFORMATTED", value])
    row = only(stacks_of(folder)[0])
    assert row["reason"] == "projection" if projected else row["status"] == "accepted"


def test_projections_leave_the_volume_they_were_made_of(tmp_path):
    write_series(tmp_path / "s", EVEN, pixels=noise)
    write_series(tmp_path / "m", EVEN, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"], number=lambda i: 50 + i)
    stacks, _ = stacks_of(tmp_path)
    assert stacks["slices"].tolist() == [6, 6]
    assert set(stacks["reason"].fillna("accepted")) == {"accepted", "projection"}


def test_colour_is_a_capture_whatever_it_says(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint16)
    stacks, _ = stacks_of(write_series(tmp_path / "s", EVEN, pixels=pixels, SamplesPerPixel=3, PlanarConfiguration=0,
                                       PhotometricInterpretation="RGB"))
    assert only(stacks)["reason"] == "secondary capture" and "RGB" in only(stacks)["detail"]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)), st.floats(0.1, 10), st.floats(-500, 500))
def test_order_of_files_and_numbers_does_not_matter(order, step, start):
    row = {"patient_id": "T", "series_uid": "1", "modality": "CT", "sop_class_uid": str(CTImageStorage),
           "orientation": [1.0, 0, 0, 0, 1, 0], "pixel_spacing_mm": [1.0, 1.0], "rows": 4, "columns": 4,
           "rescale_slope": 1.0, "rescale_intercept": 0.0, "transfer_syntax_uid": str(ImplicitVRLittleEndian)}
    rows = [row | {"path": f"{i}", "instance_number": 9 - i, "position_mm": [0.0, 0.0, start + k * step]}
            for i, k in enumerate(order)]
    stacks, instances = dicom.build_stacks(dicom._table(rows, dicom.INSTANCE_DTYPES))
    assert only(stacks)["status"] == "accepted" and math.isclose(only(stacks)["spacing_mm"][2], step, rel_tol=1e-6)
    assert instances["slice_index"].tolist() == list(order)


# ---- what a series is ------------------------------------------------------------------------------------------------

def different(i):
    return np.full((4, 6), i, np.uint16) + np.arange(6, dtype=np.uint16)


def test_phases_by_acquisition_number(tmp_path):
    stacks, instances = stacks_of(write_series(
        tmp_path / "s", EVEN * 3, pixels=different, AcquisitionNumber=lambda i: 3 - i // 6, number=lambda i: i % 6))
    assert stacks["slices"].tolist() == [6, 6, 6] and stacks["status"].eq("accepted").all()
    assert sorted(stacks["phase"]) == [1, 2, 3] and stacks["stack_id"].is_unique
    numbers = instances.merge(stacks[["stack_id", "phase"]]).groupby("phase")["acquisition_number"].unique()
    assert [list(n) for n in numbers] == [[1], [2], [3]]


def test_phases_by_passes_and_by_turns(tmp_path):
    passes, _ = stacks_of(write_series(tmp_path / "a", EVEN * 2, pixels=different))
    turns, instances = stacks_of(write_series(tmp_path / "b", sorted(EVEN * 2), pixels=different))
    for stacks in (passes, turns):
        assert stacks["slices"].tolist() == [6, 6] and stacks["status"].eq("accepted").all()
    assert instances.groupby("stack_id")["instance_number"].apply(lambda n: len({k % 2 for k in n})).tolist() == [1, 1]


def test_unordered_phases_are_not_guessed(tmp_path):
    numbers = np.random.default_rng(1).permutation(12)
    stacks, _ = stacks_of(write_series(
        tmp_path / "s", EVEN * 2, pixels=different, number=lambda i: int(numbers[i])))
    assert only(stacks)["reason"] == "duplicate positions"


UNORDERED = np.random.default_rng(1).permutation(40)
DIFFERENCES = {
    "kernel": {"ConvolutionKernel": lambda i: "B30f" if i < 20 else "B70f"},
    "image type": {"ImageType": lambda i: ["ORIGINAL" if i < 20 else "DERIVED", "PRIMARY", "AXIAL"]},
    "time": {"AcquisitionTime": lambda i: "101500" if i < 20 else "101545.5"},
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("number", [lambda i: i % 20, lambda i: int(UNORDERED[i])], ids=["repeated", "unordered"])
def test_volumes_of_one_series_are_told_apart_by_how_and_when_they_were_made(tmp_path, difference, number):
    stacks, instances = stacks_of(write_series(
        tmp_path / "s", list(range(0, 100, 5)) * 2, number=number, AcquisitionNumber=1, pixels=different,
        **DIFFERENCES[difference]))
    assert stacks["status"].eq("accepted").all() and stacks["slices"].tolist() == [20, 20]
    halves = instances.assign(half=instances["path"] > "020.dcm").groupby("stack_id")["half"].nunique()
    assert halves.tolist() == [1, 1]


def test_two_kernels_in_two_phases_are_four_volumes(tmp_path):
    stacks, _ = stacks_of(write_series(
        tmp_path / "s", EVEN * 4, number=lambda i: i % 6, pixels=different, AcquisitionNumber=lambda i: 1 + i // 12,
        ConvolutionKernel=lambda i: "B30f" if i // 6 % 2 else "B70f"))
    assert stacks["status"].eq("accepted").all() and stacks["slices"].tolist() == [6] * 4


def test_a_time_for_each_turn_of_the_tube_does_not_cut_phases_into_slabs(tmp_path):
    stacks, _ = stacks_of(write_series(
        tmp_path / "s", list(range(24)) * 2, pixels=different, AcquisitionTime=lambda i: f"1015{i // 8:02}"))
    assert stacks["slices"].tolist() == [24, 24] and stacks["status"].eq("accepted").all()


def test_equal_blank_slices_of_two_kernels_are_no_repeats(tmp_path):
    stacks, _ = stacks_of(write_series(
        tmp_path / "s", EVEN * 2, number=lambda i: i % 6, ConvolutionKernel=lambda i: "B30f" if i < 6 else "B70f"))
    assert stacks["slices"].tolist() == [6, 6] and stacks["dropped_duplicates"].sum() == 0


def test_a_slice_of_another_kernel_alone_costs_nothing(tmp_path):
    folder = write_series(tmp_path / "s", EVEN, ConvolutionKernel=lambda i: "B70f" if i == 2 else "B30f")
    row = only(stacks_of(folder)[0])
    assert row["status"] == "accepted" and row["slices"] == 6


def test_a_whole_phase_survives_a_broken_one(tmp_path):
    depths = [*EVEN, 0, 5, 15, 20, 25]
    stacks, _ = stacks_of(write_series(
        tmp_path / "s", depths, pixels=different, AcquisitionNumber=lambda i: 1 + (i >= 6)))
    by_phase = stacks.set_index("phase")
    assert by_phase.loc[1, "status"] == "accepted" and by_phase.loc[1, "slices"] == 6
    assert by_phase.loc[2, "reason"] == "gap"


def naive_clusters(values, tolerance):
    """Each row joins the first earlier kind it is near to, rows in sorted order; one comparison after the other."""
    found, labels = [], {}
    rows = [tuple(row) for row in np.nan_to_num(values, nan=-1e9).tolist()]
    for row in sorted(set(rows)):
        near = (k for k, known in enumerate(found)
                if all(abs(a - b) <= tolerance for a, b in zip(row, known, strict=True)))
        labels[row] = next(near, len(found))
        if labels[row] == len(found):
            found.append(row)
    return [labels[row] for row in rows]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4).flatmap(lambda width: st.lists(
    st.tuples(*[st.integers(0, 12) | st.just(math.nan) | st.floats(-5, 5)] * width), min_size=1, max_size=40)))
def test_kinds_are_those_of_plain_comparison(rows):
    for tolerance in (0.0, 1.0, 2.5):
        assert dicom._cluster(np.array(rows, float), tolerance).tolist() == naive_clusters(np.array(rows), tolerance)


@pytest.mark.parametrize("distinct", [0, 2, 3])
def test_many_kinds_take_no_time(distinct):
    values = np.tile([512.0, 512.0, 0.7, 0.7], (10_000, 1))
    values[:, distinct] += np.random.default_rng(0).permutation(10_000) / 100
    began = time.process_time()
    assert len(set(dicom._cluster(values, dicom.SAME_SPACING_MM))) == 10_000
    assert time.process_time() - began < 2


def test_a_series_of_many_sizes_takes_little_time():
    row = {"patient_id": "T", "series_uid": "1", "modality": "CT", "sop_class_uid": str(CTImageStorage),
           "orientation": AXIAL, "rows": 4, "columns": 4, "rescale_slope": 1.0, "rescale_intercept": 0.0,
           "transfer_syntax_uid": str(ImplicitVRLittleEndian)}
    rows = [row | {"path": f"{i:05}", "instance_number": i, "position_mm": [0.0, 0.0, float(i)],
                   "pixel_spacing_mm": [0.5 + i / 100] * 2} for i in range(2000)]
    instances, began = dicom._table(rows, dicom.INSTANCE_DTYPES), time.process_time()
    stacks, _ = dicom.build_stacks(instances)
    assert time.process_time() - began < 10
    assert only(stacks)["reason"] == "mixed size" and "and 1,997 more sizes" in only(stacks)["detail"]
    assert len(only(stacks)["detail"]) < 300


@pytest.mark.parametrize("thickness, step, remark", [
    (2, 5, "slices of 2 mm every 5 mm: 60% of the length not imaged"), (5, 2.5, None), (5, 5, None), (2, 3, None),
    (2, 3.01, "slices of 2 mm every 3.01 mm: 34% of the length not imaged"), (None, 5, None), (0, 5, None),
    (1.25, 2.5, "slices of 1.25 mm every 2.5 mm: 50% of the length not imaged")])
def test_what_lies_between_slices_is_told(tmp_path, thickness, step, remark):
    depths = [step * k for k in range(6)]
    row = only(stacks_of(write_series(tmp_path / "s", depths, SliceThickness=thickness))[0])
    assert row["status"] == "accepted" and row["spacing_mm"][2] == pytest.approx(step) and pd.isna(row["detail"])
    assert row["remark"] == remark if remark else pd.isna(row["remark"])


def test_excluded_stacks_have_a_reason_and_no_remark(tmp_path):
    row = only(stacks_of(write_series(tmp_path / "s", [0, 5, 10, 20, 25, 30]))[0])
    assert row["reason"] == "gap" and pd.isna(row["remark"])


def test_step_and_shoot_stays_whole(tmp_path):
    stacks, _ = stacks_of(write_series(tmp_path / "s", EVEN, AcquisitionNumber=lambda i: i))
    assert only(stacks)["status"] == "accepted"


def test_equal_repeats_are_dropped_and_counted(tmp_path):
    folder = write_series(tmp_path / "s", [*EVEN, 10, 10], pixels=lambda i: different(2 if i > 5 else i))
    stacks, instances = stacks_of(folder)
    assert only(stacks)["status"] == "accepted" and only(stacks)["slices"] == 6
    assert only(stacks)["dropped_duplicates"] == 2
    dropped = instances[instances["slice_index"].isna()]
    assert len(dropped) == 2 and dropped["stack_id"].eq(only(stacks)["stack_id"]).all()
    assert dropped["repeats_slice"].tolist() == [2, 2], "they were given the pixels and the place of the third slice"
    assert instances.loc[instances["slice_index"].notna(), "repeats_slice"].isna().all()
    unknown, _ = stacks_of(folder, with_root=False)
    assert unknown["dropped_duplicates"].sum() == 0 and "accepted" in set(unknown["status"])


def test_localizer_and_lost_positions_leave_the_volume(tmp_path):
    write_series(tmp_path / "s", EVEN)
    write_slice(tmp_path / "s" / "101.dcm", 101, (0, 0, 0), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    write_slice(tmp_path / "s" / "102.dcm", 102, (0, 0, 0), ImagePositionPatient=None)
    write_slice(tmp_path / "s" / "103.dcm", 103, (0, 0, 0), np.zeros((8, 8), np.uint16))
    stacks, instances = stacks_of(tmp_path / "s")
    assert stacks["status"].value_counts().to_dict() == {"accepted": 1, "excluded": 3}
    assert stacks.set_index("status").loc["accepted", "slices"] == 6
    assert instances["stack_id"].notna().all()


def test_real_collection(real_data):
    root = real_data / "Lung-PET-CT-Dx"
    instances, problems = dicom.index_dicom(root)
    stacks, _ = dicom.build_stacks(instances, root=root)
    assert len(instances) == 477 and problems["path"].tolist() == ["LICENSE"]
    phases = stacks[stacks["patient_id"] == "Lung_Dx-E0003"].groupby("series_uid")["slices"].apply(list)
    assert sorted(phases) == [[53], [53, 53, 53]]
    assert stacks[stacks["patient_id"] == "Lung_Dx-E0003"]["status"].eq("accepted").all()
    fragments = stacks[stacks["patient_id"] == "Lung_Dx-A0003"]
    assert sorted(zip(fragments["slices"], fragments["reason"].fillna(""), strict=True)) == [
        (1, "too few slices"), (1, "too few slices"), (2, "too few slices"), (12, "")]


@pytest.fixture(scope="module")
def phantom_tables(phantom_dir):
    """Root, stacks and instances of the phantoms."""
    root = phantom_dir / "Lung-PET-CT-Dx"
    instances, problems = dicom.index_dicom(root, workers=1)
    assert problems.empty
    return root, *dicom.build_stacks(instances, root=root)


def test_phantoms_tell_their_quirks(phantom_dir, phantom_tables):
    _, stacks, _ = phantom_tables
    quirks = pd.read_parquet(phantom_dir / "truth" / "quirks.parquet").dropna(subset="series_uid")
    found = quirks.merge(stacks, on="series_uid").groupby("quirk")
    for quirk, reason in {"secondary_capture": "secondary capture", "localizer": "localizer",
                          "single_slice_series": "too few slices", "slice_gap": "gap"}.items():
        assert reason in set(found.get_group(quirk)["reason"].dropna()), quirk
    assert found.get_group("multi_phase").groupby("series_uid")["stack_id"].nunique().min() > 1
    assert found.get_group("pet")["suv_refusal"].isna().any()


def test_step_by_step_reasons_change_with_the_number_of_gaps():
    assert only_reason([0, 5, 10, 20, 25, 30, 40, 45, 50, 55]) == ("gap", "2 gaps, the first between 10.0 and 20.0 mm")
    assert only_reason([0, 5, 20, 25, 40, 45, 60])[0] == "uneven spacing"      # no step is the usual one any more


def only_reason(depths):
    row = {"patient_id": "T", "series_uid": "1", "modality": "CT", "sop_class_uid": str(CTImageStorage),
           "orientation": [1.0, 0, 0, 0, 1, 0], "pixel_spacing_mm": [1.0, 1.0], "rows": 4, "columns": 4,
           "rescale_slope": 1.0, "rescale_intercept": 0.0, "transfer_syntax_uid": str(ImplicitVRLittleEndian)}
    rows = [row | {"path": f"{i}", "instance_number": i, "position_mm": [0.0, 0.0, z]} for i, z in enumerate(depths)]
    found = only(dicom.build_stacks(dicom._table(rows, dicom.INSTANCE_DTYPES), 4)[0])
    return found["reason"], found["detail"].split(" (")[0]


@pytest.mark.parametrize("start", [0.0, -312.7, 0.05, 1.0375])
@pytest.mark.parametrize("step", [0.5, 0.6, 0.625, 0.75, 0.8, 1.25])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(step, start):
    depths = [round(start + step * k, 1) for k in range(300)]
    assert rounded(depths)["status"] == "accepted"
    for lost in (1, 150, 298):                             # and a lost slice is still found
        assert rounded(np.delete(depths, lost))["reason"] == "gap"


@pytest.mark.parametrize("step", [0.2, 0.3, 0.5, 0.625, 1])
def test_small_steps_with_holes_do_not_pass_for_larger_ones(step):
    depths = [step * k for k in range(300)]
    assert rounded([z for k, z in enumerate(depths) if k % 3])["status"] == "excluded"
    assert rounded([z + 0.45 * step * (k == 77) for k, z in enumerate(depths)])["reason"] == "uneven spacing"


def rounded(depths):
    row = {"patient_id": "T", "series_uid": "1", "modality": "CT", "sop_class_uid": str(CTImageStorage),
           "orientation": [1.0, 0, 0, 0, 1, 0], "pixel_spacing_mm": [1.0, 1.0], "rows": 4, "columns": 4,
           "rescale_slope": 1.0, "rescale_intercept": 0.0, "transfer_syntax_uid": str(ImplicitVRLittleEndian)}
    rows = [row | {"path": f"{i:03}", "instance_number": i, "position_mm": [0.0, 0.0, float(z)]}
            for i, z in enumerate(depths)]
    return only(dicom.build_stacks(dicom._table(rows, dicom.INSTANCE_DTYPES), 4)[0])


angles = st.tuples(*[st.floats(-3.1, 3.1)] * 3)


@settings(max_examples=60, deadline=None)
@given(angles=angles, order=st.permutations(range(9)), numbers=st.permutations(range(9)), step=st.floats(0.3, 10),
       spacing=st.tuples(st.floats(0.3, 2), st.floats(0.3, 2)), start=st.tuples(*[st.floats(-500, 500)] * 3))
def test_any_orientation_is_ordered_along_its_normal(angles, order, numbers, step, spacing, start):
    """Files in any order, numbers in any order, slices turned any way: place and affine come from positions alone."""
    turned = rotation(angles)
    row = {"patient_id": "T", "series_uid": "1", "modality": "CT", "sop_class_uid": str(CTImageStorage),
           "orientation": [*turned[:, 0].tolist(), *turned[:, 1].tolist()], "pixel_spacing_mm": list(spacing),
           "rows": 4, "columns": 4, "rescale_slope": 1.0, "rescale_intercept": 0.0,
           "transfer_syntax_uid": str(ImplicitVRLittleEndian), "slice_thickness_mm": 2 * step}
    rows = [row | {"path": f"{i}", "instance_number": numbers[i],
                   "position_mm": (start + turned[:, 2] * step * k).tolist()} for i, k in enumerate(order)]
    stacks, instances = dicom.build_stacks(dicom._table(rows, dicom.INSTANCE_DTYPES))
    found = only(stacks)
    assert found["status"] == "accepted" and found["ordered_by"] == "position"
    assert instances["slice_index"].tolist() == list(order)
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = turned * (spacing[1], spacing[0], step), start
    corner = np.array([[0, 0, 0], [3, 3, 8]])
    affine = np.reshape(found["affine"], (4, 4))
    assert np.abs(dicom.to_mm(affine, corner) - dicom.to_mm(expected, corner)).max() <= GEOMETRY_TOLERANCE_MM


def test_order_by_number_only_without_geometry(tmp_path):
    stacks, instances = stacks_of(write_series(
        tmp_path / "s", EVEN, number=lambda i: 6 - i, position=lambda i: (0, 0, 0), ImagePositionPatient=None))
    assert only(stacks)["ordered_by"] == "instance number" and only(stacks)["reason"] == "no geometry"
    assert instances.sort_values("slice_index")["instance_number"].tolist() == [1, 2, 3, 4, 5, 6]
    assert only(stacks)["affine"] is None and only(stacks)["spacing_mm"] is None


def test_slope_of_zero_is_no_rescale(tmp_path):
    stacks, _ = stacks_of(write_series(tmp_path / "s", EVEN, RescaleSlope=0))
    assert only(stacks)["reason"] == "missing rescale" and "is 0 in 6 of 6" in only(stacks)["detail"]


def test_each_phase_of_e0003_is_one_acquisition(real_data):
    instances, _ = dicom.index_dicom(real_data / "Lung-PET-CT-Dx" / "Lung_Dx-E0003")
    stacks, instances = dicom.build_stacks(instances, root=real_data / "Lung-PET-CT-Dx" / "Lung_Dx-E0003")
    phases = instances.groupby("stack_id")
    assert phases["acquisition_number"].nunique().eq(1).all()
    several = stacks[stacks.groupby("series_uid")["stack_id"].transform("size") == 3].sort_values("phase")
    numbers = [phases.get_group(stack_id)["acquisition_number"].iloc[0] for stack_id in several["stack_id"]]
    assert len(set(numbers)) == 3 and numbers == sorted(numbers)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, "other bits"],
                         ids=str)
def test_equal_repeats_in_any_packing(tmp_path, syntax):
    """The second copy of a slice may be packed in another way and is still the same slice."""
    folder = write_series(tmp_path / "s", EVEN, pixels=different)
    other = {"syntax": syntax} if syntax != "other bits" else {"pixels": different(3) + np.uint16(1)}
    write_slice(folder / "900.dcm", 900, (0, 0, 15), **{"pixels": different(3)} | other)
    stacks, _ = stacks_of(folder)
    if syntax == "other bits":
        assert stacks["dropped_duplicates"].sum() == 0
    else:
        assert only(stacks)["status"] == "accepted" and only(stacks)["dropped_duplicates"] == 1


# ---- images of many frames ------------------------------------------------------------------------------------------

@pytest.fixture()
def single_and_enhanced(phantom_tables, tmp_path):
    """A phantom's CT stack as single images, and the same made into one enhanced image by highdicom."""
    root, stacks, instances = phantom_tables
    accepted = stacks[(stacks["status"] == "accepted") & (stacks["modality"] == "CT")]
    instances = instances[instances["stack_id"] == accepted["stack_id"].iloc[0]]
    images = [pydicom.dcmread(root / path) for path in instances["path"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enhanced = LegacyConvertedEnhancedCTImage(images[::-1], "1.2.7.1", 7, "1.2.7.2", 1)
    (tmp_path / "enhanced").mkdir()
    enhanced.save_as(tmp_path / "enhanced" / "all.dcm")
    return dicom.read_stack(instances, root), tmp_path / "enhanced"


@pytest.mark.parametrize("shuffled, syntax", [
    (False, None), (True, None), (True, RLELossless), (False, JPEG2000Lossless),
    (True, DeflatedExplicitVRLittleEndian)])
def test_enhanced_image_equals_its_single_images(single_and_enhanced, shuffled, syntax):
    single, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    if shuffled:
        order = np.random.default_rng(0).permutation(image.NumberOfFrames)
        frames = image.pixel_array[order]
        image.PerFrameFunctionalGroupsSequence = [image.PerFrameFunctionalGroupsSequence[int(k)] for k in order]
        image.PixelData = frames.tobytes()
    if syntax in (RLELossless, JPEG2000Lossless):
        image.compress(syntax, generate_instance_uid=False)
    elif syntax:
        image.file_meta.TransferSyntaxUID = syntax
    image.save_as(folder / "all.dcm", enforce_file_format=True)
    instances = dicom.index_dicom(folder)[0]
    stacks, instances = dicom.build_stacks(instances, root=folder)
    row = only(stacks)
    assert row["status"] == "accepted" and row["slices"] == len(single.hu_zyx) and row["ordered_by"] == "position"
    assert len(instances) == 1 and pd.isna(instances["slice_index"][0])
    assert instances["stack_id"][0] == row["stack_id"]
    stack = dicom.read_stack(instances, folder)
    assert np.array_equal(stack.hu_zyx, single.hu_zyx) and stack.hu_zyx.dtype == single.hu_zyx.dtype
    assert np.allclose(stack.affine, single.affine, atol=GEOMETRY_TOLERANCE_MM)
    assert stack.padding_voxels == single.padding_voxels and stack.sop_uids == ("1.2.7.2",) * len(single.hu_zyx)
    opened = dicom.open_stack(row, instances, folder)
    assert np.array_equal(np.stack([opened[k] for k in range(len(opened))]), single.hu_zyx)
    travelled = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(travelled[1], single.hu_zyx[1])


def test_frames_survive_parquet(single_and_enhanced, tmp_path):
    single, folder = single_and_enhanced
    _, instances = dicom.build_stacks(dicom.index_dicom(folder)[0], root=folder)
    instances.to_parquet(tmp_path / "i.parquet")
    stack = dicom.read_stack(pd.read_parquet(tmp_path / "i.parquet"), folder)
    assert np.array_equal(stack.hu_zyx, single.hu_zyx)


def test_frames_without_places_are_excluded(tmp_path):
    folder = write_series(tmp_path / "s", EVEN, pixels=np.zeros((8, 6), np.uint16), NumberOfFrames=2, Rows=4)
    instances, _ = dicom.index_dicom(folder, workers=1)
    for positions in (None, [[0.0, 0.0, 0.0]]):
        told = pd.Series([positions] * len(instances), dtype=object)
        stacks, _ = dicom.build_stacks(instances.assign(frame_positions_mm=told), 4)
        assert only(stacks)["reason"] == "no geometry" and only(stacks)["slices"] == 6


def test_frames_with_gaps_and_repeats_are_judged_too(tmp_path):
    write_slice(tmp_path / "s" / "a.dcm", pixels=np.zeros((24, 6), np.uint16), NumberOfFrames=6, Rows=4)
    instances, _ = dicom.index_dicom(tmp_path / "s", workers=1)
    for depths, reason in (([0, 5, 10, 20, 25, 30], "gap"), ([0, 5, 5, 10, 15, 20], "duplicate positions")):
        told = pd.Series([[[0.0, 0.0, z] for z in depths]], dtype=object)
        stacks, _ = dicom.build_stacks(instances.assign(frame_positions_mm=told), 4, tmp_path / "s")
        assert only(stacks)["reason"] == reason


def test_a_rescale_that_differs_from_frame_to_frame_is_not_called_missing(single_and_enhanced):
    _, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    for k, groups in enumerate(image.PerFrameFunctionalGroupsSequence):
        groups.PixelValueTransformationSequence = [Dataset()]
        groups.PixelValueTransformationSequence[0].RescaleSlope = 1 + k
        groups.PixelValueTransformationSequence[0].RescaleIntercept = -1024
    image.SharedFunctionalGroupsSequence[0].pop("PixelValueTransformationSequence", None)
    image.save_as(folder / "all.dcm")
    row = only(stacks_of(folder)[0])
    n, what = image.NumberOfFrames, "missing, or not the same in all frames, which is not supported,"
    assert row["reason"] == "missing rescale"
    assert row["detail"] == f"RescaleSlope (0028,1053) {what} in {n} of {n} frames"


def test_one_rescale_written_in_two_ways_is_one(single_and_enhanced):
    single, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    for k, groups in enumerate(image.PerFrameFunctionalGroupsSequence):
        groups.PixelValueTransformationSequence = [Dataset()]
        groups.PixelValueTransformationSequence[0].RescaleSlope = ["1", "1.0"][k % 2]
        groups.PixelValueTransformationSequence[0].RescaleIntercept = ["-1024", "-1024.00"][k % 2]
    image.SharedFunctionalGroupsSequence[0].pop("PixelValueTransformationSequence", None)
    image.save_as(folder / "all.dcm")
    stacks, instances = stacks_of(folder)
    assert only(stacks)["status"] == "accepted"
    assert np.array_equal(dicom.read_stack(instances, folder).hu_zyx, single.hu_zyx)


@pytest.mark.parametrize("slopes, reason", [((1, 1), None), ((2, 2), None), ((1, 2), "missing rescale")])
def test_the_rescale_of_frames_goes_before_one_outside_of_them(single_and_enhanced, slopes, reason):
    single, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    for k, groups in enumerate(image.PerFrameFunctionalGroupsSequence):
        groups.PixelValueTransformationSequence = [Dataset()]
        groups.PixelValueTransformationSequence[0].RescaleSlope = slopes[k % 2]
        groups.PixelValueTransformationSequence[0].RescaleIntercept = -1024
    image.SharedFunctionalGroupsSequence[0].pop("PixelValueTransformationSequence", None)
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    image.save_as(folder / "all.dcm")
    stacks, instances = stacks_of(folder)
    assert stacks["reason"].fillna("").tolist() == [reason or ""]
    if not reason:
        hu = dicom.read_stack(instances, folder).hu_zyx
        want = np.maximum((single.hu_zyx.astype(float) + 1024) * slopes[0] - 1024, -1024)
        assert np.array_equal(hu, want)


def test_frames_that_are_counted_in_two_ways_are_a_problem_with_a_name(single_and_enhanced):
    _, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    n = image.NumberOfFrames
    image.NumberOfFrames = n - 1
    image.save_as(folder / "few.dcm")
    problem = only(dicom.index_dicom(folder, workers=1)[1])
    assert problem["reason"] == "unreadable"
    assert problem["detail"] == f"NumberOfFrames (0028,0008) is {n - 1}, its functional groups describe {n}"


@pytest.mark.parametrize("numbers", [(1, 2), (1, 1), (2, 1)])
def test_two_enhanced_images_of_one_series_are_two_stacks(single_and_enhanced, numbers):
    single, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    for k, number in enumerate(numbers):
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.7.{k + 2}"
        image.InstanceNumber = number
        image.PixelData = (image.pixel_array + k).astype(image.pixel_array.dtype).tobytes()
        image.save_as(folder / f"phase{k}.dcm")
    (folder / "all.dcm").unlink()
    stacks, instances = stacks_of(folder)
    assert stacks["status"].tolist() == ["accepted"] * 2 and stacks["slices"].tolist() == [len(single.hu_zyx)] * 2
    assert instances.groupby("stack_id")["sop_uid"].nunique().tolist() == [1, 1]


@pytest.mark.parametrize("changes, told", [
    ({}, ""), ({"SeriesInstanceUID": "1.2.9"}, ", of another series"),
    ({"SeriesInstanceUID": "1.2.9", "PatientID": "P2"}, ", of another patient")])
def test_whose_the_first_of_two_equal_uids_is(tmp_path, changes, told):
    uids = {"SOPInstanceUID": lambda i: f"1.2.8.{i}"}
    write_series(tmp_path / "a", range(6), **uids)
    write_series(tmp_path / "b", range(6), **uids, **changes)
    problems = dicom.index_dicom(tmp_path, workers=1)[1]
    said = problems["detail"].str.extract(r"^same SOP Instance UID as a/00[1-6]\.dcm(.*)$")[0]
    assert said.tolist() == [told] * 6


# ---- tables ----------------------------------------------------------------------------------------------------------

def test_empty_tables(tmp_path):
    empty = dicom._table([], dicom.INSTANCE_DTYPES)
    stacks, instances = dicom.build_stacks(empty)
    assert len(stacks) == len(instances) == 0
    assert stacks.dtypes.astype(str).to_dict() == dicom.STACK_DTYPES
    assert instances.dtypes.astype(str).to_dict() == dicom.INSTANCE_DTYPES
    stacks.to_parquet(tmp_path / "s.parquet")
    assert list(pd.read_parquet(tmp_path / "s.parquet")) == list(stacks)


def test_tables_survive_parquet(tmp_path):
    stacks, instances = stacks_of(write_series(tmp_path / "s", EVEN))
    instances.to_parquet(tmp_path / "i.parquet")
    again = pd.read_parquet(tmp_path / "i.parquet")
    assert (again.dtypes == instances.dtypes).all()
    stack = dicom.read_stack(again, tmp_path / "s")
    rebuilt, _ = dicom.build_stacks(again, 4, tmp_path / "s")
    assert np.array_equal(np.reshape(rebuilt["affine"][0], (4, 4)), stack.affine)
    assert stack.stack_id == stacks["stack_id"][0] == rebuilt["stack_id"][0]


def test_stack_id_is_a_safe_file_name(tmp_path):
    stacks, _ = stacks_of(write_series(tmp_path / "s", EVEN, PatientID="a/b c"))
    assert only(stacks)["stack_id"].startswith("a_b_c_") and only(stacks)["patient_id"] == "a/b c"
    stacks, _ = stacks_of(write_series(tmp_path / "t", EVEN, PatientID=None))
    assert only(stacks)["stack_id"].startswith("unknown_")
    long = ["L" * 300, "L" * 299 + "M"]
    ids = {dicom._stack_id(name, "1.2", 1) for name in long}
    assert len(ids) == 2 and all(len(name) < 80 for name in ids)      # a file is named after it


# ---- voxels and millimetres ------------------------------------------------------------------------------------------

def compare_with_simpleitk(instances, root):
    stack = dicom.read_stack(instances, root)
    rows = instances.dropna(subset="slice_index").sort_values("slice_index")
    image = sitk.ReadImage([os.path.join(root, path) for path in rows["path"]])
    values = sitk.GetArrayFromImage(image)
    if stack.modality == "CT":
        values = np.maximum(values, dicom.AIR_HU)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    corner = np.array(stack.values_zyx.shape[::-1]) - 1
    assert np.abs(dicom.to_mm(stack.affine, [[0, 0, 0], corner]) - dicom.to_mm(affine, [[0, 0, 0], corner])).max() \
        <= GEOMETRY_TOLERANCE_MM
    return stack, values


def test_real_stacks_equal_simpleitk(real_data):
    root = real_data / "Lung-PET-CT-Dx"
    instances, _ = dicom.index_dicom(root)
    stacks, instances = dicom.build_stacks(instances)
    accepted = stacks[stacks["status"] == "accepted"]
    assert len(accepted) == 10
    for stack_id in accepted["stack_id"]:
        stack, values = compare_with_simpleitk(instances[instances["stack_id"] == stack_id], root)
        assert stack.hu_zyx.dtype == np.int16 and np.array_equal(stack.hu_zyx, values)
    assert stack.padding_voxels > 0, "the GE series of E0003 has padding around its round field of view"


def test_phantom_stacks_equal_simpleitk(phantom_tables):
    root, stacks, instances = phantom_tables
    accepted = stacks[(stacks["status"] == "accepted") & (stacks["modality"] == "CT")]
    assert len(accepted) > 8
    for stack_id in accepted["stack_id"]:
        stack, values = compare_with_simpleitk(instances[instances["stack_id"] == stack_id], root)
        assert np.array_equal(stack.hu_zyx, values)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless], ids=lambda uid: uid.name)
def test_packed_stacks_equal_simpleitk(tmp_path, syntax):
    volume = np.random.default_rng(0).integers(0, 4096, (6, 40, 36)).astype(np.uint16)
    folder = write_series(tmp_path / "s", EVEN, pixels=lambda i: volume[i], syntax=syntax, BitsStored=12, HighBit=11)
    stacks, instances = stacks_of(folder)
    assert only(stacks)["status"] == "accepted"
    stack, values = compare_with_simpleitk(instances, folder)
    assert np.array_equal(stack.hu_zyx, values) and np.array_equal(stack.hu_zyx, volume.astype(int) - 1024)


def test_leaning_stack_is_straightened_on_request(tmp_path):
    """A phantom of known structure in mm, scanned with a leaned gantry: a straightened volume has it where it was."""
    shape, lean = (12, 24, 20), math.radians(12)
    orientation = np.array([[1, 0, 0], [0, math.cos(lean), math.sin(lean)]])
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = orientation.T * (0.5, 0.8), (0, 0, 2.5)      # the table moves along z
    affine[:3, 3] = -5, -9, 40
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)[..., ::-1]

    def plane_hu(mm):
        return mm @ [30, 20, -10]                                                # linear, so linear steps are exact

    stored = np.rint(plane_hu(dicom.to_mm(affine, grid)) + 3000).astype(np.uint16)
    write_series(tmp_path / "s", range(12), pixels=lambda i: stored[i],
                 position=lambda i: (affine[:3, 3] + i * affine[:3, 2]).tolist(), RescaleIntercept=-3000,
                 ImageOrientationPatient=orientation.ravel().round(12).tolist(), PixelSpacing=[0.8, 0.5])
    stacks, instances = stacks_of(tmp_path / "s")
    assert only(stacks)["reason"] == "tilted gantry" and "12.0 degrees" in only(stacks)["detail"]
    with pytest.raises(ValueError, match="cannot be read as a volume: tilted gantry"):
        dicom.read_stack(instances, tmp_path / "s")
    stack = dicom.read_stack(instances, tmp_path / "s", straighten=True)
    steps = stack.affine[:3, :3]
    assert np.abs(steps.T @ steps - np.diag(np.square(stack.spacing_zyx_mm[::-1]))).max() <= GEOMETRY_TOLERANCE_MM
    assert np.allclose(stack.spacing_zyx_mm, (2.5 * math.cos(lean), 0.8, 0.5), atol=GEOMETRY_TOLERANCE_MM)
    places = np.moveaxis(np.indices(stack.hu_zyx.shape), 0, -1)[..., ::-1]
    mm = dicom.to_mm(stack.affine, places)
    back = dicom.to_voxel(np.reshape(only(stacks)["affine"], (4, 4)), mm)
    inside = ((back > -1e-6) & (back < np.array(shape[::-1]) - 1 + 1e-6)).all(-1)
    assert inside.sum() > 0.9 * np.prod(shape) and (stack.hu_zyx[~inside] == dicom.AIR_HU).mean() > 0.5
    assert np.abs(stack.hu_zyx[inside] - plane_hu(mm[inside])).max() <= 1.5      # each value was rounded twice


def test_straightening_forgives_nothing_else(tmp_path):
    folder = write_series(tmp_path / "s", EVEN, position=lambda i: (0, i, 5 * i + 20 * (i > 2)))
    _, instances = stacks_of(folder)
    with pytest.raises(ValueError, match="gap"):
        dicom.read_stack(instances, folder, straighten=True)
    lean = write_series(tmp_path / "t", EVEN, position=lambda i: (0, i, 5 * i), RescaleSlope=None)
    _, instances = stacks_of(lean)
    with pytest.raises(ValueError, match="missing rescale"):
        dicom.read_stack(instances, lean, straighten=True)


def rotation(angles):
    a, b, c = angles
    about_z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    about_y = np.array([[math.cos(c), 0, math.sin(c)], [0, 1, 0], [-math.sin(c), 0, math.cos(c)]])
    return about_z @ about_x @ about_y


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian,
                                    DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.name)
@pytest.mark.parametrize("kind, slope, intercept", [
    ("<u2", 1, -1024), ("<i2", 1, -1024), ("<u2", 0.5, -1000.25), ("<i2", 2, 0)])
def test_oblique_stacks_equal_simpleitk(tmp_path, syntax, kind, slope, intercept):
    random = np.random.default_rng(3)
    turned = rotation((0.4, -0.3, 0.2))
    volume = random.integers(0 if kind == "<u2" else -900, 3000, (7, 5, 9)).astype(kind)
    write_series(tmp_path / "s", range(7), number=lambda i: int(7 - i), pixels=lambda i: volume[i], syntax=syntax,
                 position=lambda i: (np.array([-30.5, 12.25, 100]) + turned[:, 2] * 2.3 * i).round(9).tolist(),
                 ImageOrientationPatient=[*turned[:, 0].round(12), *turned[:, 1].round(12)],
                 RescaleSlope=slope, RescaleIntercept=intercept)
    _, instances = stacks_of(tmp_path / "s")
    stack, values = compare_with_simpleitk(instances, tmp_path / "s")
    assert np.allclose(stack.spacing_zyx_mm, (2.3, 0.8, 0.5))
    assert stack.hu_zyx.dtype == (np.int16 if slope in (1, 2) else np.float32)
    assert np.array_equal(stack.hu_zyx, np.maximum(volume.astype(float) * slope + intercept, -1024))
    assert np.array_equal(stack.hu_zyx, values)


def test_run_length_encoding(tmp_path):
    volume = np.random.default_rng(0).integers(0, 3000, (6, 8, 8)).astype(np.uint16)
    folder = write_series(tmp_path / "s", EVEN, pixels=lambda i: volume[i], syntax=RLELossless)
    stacks, instances = stacks_of(folder)
    assert only(stacks)["status"] == "accepted"
    assert np.array_equal(dicom.read_stack(instances, folder).hu_zyx, volume.astype(int) - 1024)


@pytest.mark.parametrize("bits", [8, 12, 13])
def test_unused_bits_are_not_values(tmp_path, bits):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6)
    dirty = values | np.uint16(1 << bits)
    _, instances = stacks_of(write_series(tmp_path / "s", EVEN, pixels=dirty, BitsStored=bits, HighBit=bits - 1))
    stack = dicom.read_stack(instances, tmp_path / "s")
    assert np.array_equal(stack.hu_zyx[0], values.astype(int) - 1024)


def test_padding_is_air_and_counted(tmp_path):
    pixels = np.full((4, 6), 1064, np.int16)
    pixels[0, :3], pixels[1, :2], pixels[2, 0] = -2000, -1500, 4         # padding, far below air, -1020 HU
    _, instances = stacks_of(write_series(tmp_path / "s", EVEN, pixels=pixels, PixelPaddingValue=-2000))
    stack = dicom.read_stack(instances, tmp_path / "s")
    assert stack.hu_zyx[0, :3, 0].tolist() == [-1024, -1024, -1020]
    assert stack.padding_voxels == 6 * 5


def test_padding_range(tmp_path):
    pixels = np.array([[0, 3, 5, 6], [1000, 1064, 5, 2]], np.uint16)
    _, instances = stacks_of(write_series(
        tmp_path / "s", EVEN, pixels=pixels, PixelPaddingValue=5, PixelPaddingRangeLimit=2))
    stack = dicom.read_stack(instances, tmp_path / "s")
    assert stack.hu_zyx[0].tolist() == [[-1024, -1024, -1024, -1018], [-24, 40, -1024, -1024]]
    assert stack.padding_voxels == 6 * 4


def test_values_beyond_int16_widen(tmp_path):
    pixels = np.full((4, 6), 60000, np.uint16)
    _, instances = stacks_of(write_series(tmp_path / "s", EVEN, pixels=pixels))
    stack = dicom.read_stack(instances, tmp_path / "s")
    assert stack.hu_zyx.dtype == np.float32 and (stack.hu_zyx == 60000 - 1024).all()


def test_read_stack_refuses(tmp_path):
    folder = write_series(tmp_path / "s", [0, 5, 10, 20, 25, 30])
    _, instances = stacks_of(folder)
    with pytest.raises(ValueError, match=r"stack Toy_.* cannot be read as a volume: gap \(1 gap, the first between"):
        dicom.read_stack(instances, folder)
    with pytest.raises(ValueError, match="instances of one stack, got 0"):
        dicom.read_stack(instances.iloc[:0], folder)
    with pytest.raises(ValueError, match="instances of one stack, got 2"):
        dicom.read_stack(instances.assign(stack_id=["a", "b"] * 3), folder)


def test_file_changed_since_the_index(tmp_path):
    folder = write_series(tmp_path / "s", EVEN)
    _, instances = stacks_of(folder)
    write_slice(folder / "002.dcm", 2, (0, 0, 5), np.zeros((8, 8), np.uint16))
    with pytest.raises(ValueError, match=r"002\.dcm changed since it was indexed: [\d,]+ bytes, expected [\d,]+"):
        dicom.read_stack(instances, folder)


angle = st.floats(-3.1, 3.1)
spacing = st.floats(0.2, 10)


@given(st.tuples(angle, angle, angle), st.tuples(spacing, spacing, spacing),
       st.lists(st.tuples(*[st.floats(-600, 600)] * 3), min_size=1, max_size=5))
def test_voxel_to_mm_and_back(angles, spacing_xyz, points):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * spacing_xyz
    affine[:3, 3] = (-250, -180, 900)
    points = np.array(points)
    assert np.allclose(dicom.to_voxel(affine, dicom.to_mm(affine, points)), points, atol=1e-6)
    assert dicom.to_voxel(affine, dicom.to_mm(affine, points[0])).shape == (3,)


# ---- PET -------------------------------------------------------------------------------------------------------------

def tracer(**changes):
    item = Dataset()
    item.RadiopharmaceuticalStartTime, item.RadionuclideTotalDose, item.RadionuclideHalfLife = "100000", 350e6, 6586.2
    for keyword, value in changes.items():
        setattr(item, keyword, value)
    return [item]


def write_pet(folder, **changes):
    volume = np.random.default_rng(0).integers(0, 30000, (6, 4, 6)).astype(np.int16)
    elements = {
        "SOPClassUID": PositronEmissionTomographyImageStorage, "Modality": "PT", "Units": "BQML",
        "DecayCorrection": "START", "PatientWeight": 70, "RescaleIntercept": 0,
        "SeriesTime": "114946.2", "AcquisitionTime": lambda i: f"{115530 - i}",
        "CorrectedImage": ["DECY", "ATTN"], "RadiopharmaceuticalInformationSequence": tracer(),
        "RescaleSlope": lambda i: 0.5 + i / 4, "pixels": lambda i: volume[i]} | changes
    return write_series(folder, EVEN, **elements), volume


def test_pet_volume(tmp_path):
    folder, volume = write_pet(tmp_path / "pet")
    stacks, instances = stacks_of(folder)
    assert only(stacks)["modality"] == "PT" and pd.isna(only(stacks)["suv_refusal"])
    stack, values = compare_with_simpleitk(instances, folder)
    slopes = 0.5 + np.arange(6)[:, None, None] / 4
    assert stack.hu_zyx is None and stack.suv_zyx.dtype == np.float32
    assert np.allclose(stack.suv_zyx, volume * slopes * 0.0004, rtol=1e-6)
    assert np.allclose(stack.suv_zyx, values * 0.0004, rtol=1e-6)


def test_pet_without_weight_is_refused(tmp_path):
    folder, _ = write_pet(tmp_path / "pet", PatientWeight=None)
    stacks, instances = stacks_of(folder)
    assert only(stacks)["status"] == "accepted" and "PatientWeight" in only(stacks)["suv_refusal"]
    with pytest.raises(dicom.SuvError, match="PatientWeight"):
        dicom.read_stack(instances, folder)


def test_pet_without_decay_correction_has_a_factor_a_slice(tmp_path):
    times = ["100000", "100000", "114946.2", "114946.2", "133932.4", "133932.4"]
    folder, volume = write_pet(tmp_path / "pet", DecayCorrection="NONE", CorrectedImage=["ATTN"], SeriesTime="100000",
                               AcquisitionTime=lambda i: times[i], ActualFrameDuration="180000")
    stacks, instances = stacks_of(folder)
    assert pd.isna(only(stacks)["suv_refusal"])
    expected = volume * (0.5 + np.arange(6)[:, None, None] / 4) * 0.0002 * np.repeat([1, 2, 4], 2)[:, None, None]
    decays = np.log(2) * 180 / 6586.2                      # during the frame, whose mean is what was measured
    expected *= decays / (1 - np.exp(-decays))
    assert np.allclose(dicom.read_stack(instances, folder).suv_zyx, expected, rtol=1e-6)


@pytest.mark.parametrize("changes, words", [
    ({"RadiopharmaceuticalInformationSequence": lambda i: tracer() * 2},
     r"RadiopharmaceuticalInformationSequence \(0054,0016\) has 2 items"),
    ({"Units": "CNTS"}, r"Units \(0054,1001\) is CNTS"), ({"CorrectedImage": ["DECY"]}, "without ATTN"),
    ({"PatientWeight": lambda i: 70 + i // 5}, r"PatientWeight \(0010,1030\) differs within the stack, 70.0 and 71.0")])
def test_pet_is_refused_with_the_tag(tmp_path, changes, words):
    folder, _ = write_pet(tmp_path / "pet", **changes)
    stacks, instances = stacks_of(folder)
    assert re.search(words, only(stacks)["suv_refusal"])
    with pytest.raises(dicom.SuvError, match=words):
        dicom.read_stack(instances, folder)


@pytest.mark.parametrize("frame, expected", [("1.2.9", "1.2.9"), (None, None)])
def test_stack_remembers_its_frame_of_reference(tmp_path, frame, expected):
    folder = write_series(tmp_path / "s", EVEN, FrameOfReferenceUID=frame)
    assert dicom.read_stack(stacks_of(folder)[1], folder).frame_of_reference_uid == expected


# ---- one grid on another ---------------------------------------------------------------------------------------------

def made_up(shape, affine, frame="1.2", modality="PT", kind=np.float32, seed=0):
    values = np.random.default_rng(seed).uniform(-900, 900, shape).astype(kind)
    pair = (None, values) if modality == "PT" else (values, None)
    return dicom.Stack(modality, pair[0], affine, modality, (), 0, pair[1], frame)


def grid(spacing, origin, angles=(0, 0, 0)):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * spacing
    affine[:3, 3] = origin
    return affine


def as_sitk(values, affine):
    image, spacing = sitk.GetImageFromArray(values), np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


@pytest.mark.parametrize("angles", [(0, 0, 0), (0.3, 0, 0), (0.4, -0.3, 0.2)], ids=["straight", "turned", "oblique"])
@pytest.mark.parametrize("modality, kind", [("PT", np.float32), ("CT", np.int16), ("CT", np.float32)])
def test_resampling_equals_simpleitk(angles, modality, kind):
    stack = made_up((7, 9, 11), grid((4.07, 3.9, 5.0), (-20, -15, -12), angles), modality=modality, kind=kind)
    like = made_up((15, 21, 18), grid((1.9, 2.1, 2.3), (-17, -23, -18), (0.1, 0.05, 0)), modality="CT", kind=np.int16)
    found, outside = dicom.resample_to(stack, like), 0 if modality == "PT" else dicom.AIR_HU
    expected = sitk.GetArrayFromImage(sitk.Resample(
        as_sitk(stack.values_zyx.astype(np.float32), stack.affine), as_sitk(like.values_zyx, like.affine),
        sitk.Transform(), sitk.sitkLinear, float(outside), sitk.sitkFloat32))
    assert found.values_zyx.dtype == np.float32 and np.allclose(found.values_zyx, expected, rtol=0, atol=2e-3)
    assert 0 < found.padding_voxels < expected.size and found.padding_voxels == (expected == outside).sum()
    assert np.array_equal(found.affine, like.affine) and found.modality == modality and found.sop_uids == ()
    assert (found.hu_zyx is None) == (modality == "PT")


def test_resampling_to_itself_changes_nothing():
    stack = made_up((5, 6, 7), grid((0.8, 0.8, 2.5), (3, 4, 5), (0.4, -0.3, 0.2)))
    again = dicom.resample_to(stack, stack)
    assert np.allclose(again.suv_zyx, stack.suv_zyx, atol=1e-3) and again.padding_voxels == 0


@pytest.mark.parametrize("one, other", [("1.2", "1.3"), (None, "1.3"), ("1.2", None), (None, None)])
def test_resampling_needs_one_frame_of_reference(one, other):
    pet, ct = made_up((3, 3, 3), np.eye(4), one), made_up((3, 3, 3), np.eye(4), other, "CT")
    words = f"one frame of reference.* PT is in {one or 'none'}, CT is in {other or 'none'}"
    with pytest.raises(ValueError, match=words):
        dicom.resample_to(pet, ct)


# ---- what looks right and is not -------------------------------------------------------------------------------------

def noise(seed):
    return np.random.default_rng(seed).integers(0, 2000, (4, 6)).astype(np.uint16)


def test_the_cache_is_not_deceived_by_equal_sizes_and_times(tmp_path):
    for name in ("a", "b"):
        write_series(tmp_path / name, range(6), PatientID=name * 3, pixels=noise)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (1e9, 1e9))
    cache = tmp_path / "c.parquet"
    dicom.index_dicom(tmp_path / "a", cache=cache)
    other, _ = dicom.index_dicom(tmp_path / "b", cache=cache)
    assert set(other["patient_id"]) == {"bbb"}, "another root is another cache"
    one, two = tmp_path / "b" / "002.dcm", tmp_path / "b" / "005.dcm"
    for source, target in ((one, tmp_path / "x"), (two, one), (tmp_path / "x", two)):
        source.rename(target)
    swapped, _ = dicom.index_dicom(tmp_path / "b", cache=cache)
    pd.testing.assert_frame_equal(swapped, dicom.index_dicom(tmp_path / "b")[0])


def test_two_phases_between_each_other_are_not_one_thin_volume(tmp_path):
    write_series(tmp_path / "a", np.arange(0, 40, 5), AcquisitionNumber=1, pixels=noise)
    write_series(tmp_path / "b", np.arange(2.5, 42, 5), AcquisitionNumber=2, number=lambda i: 100 + i)
    stacks, instances = stacks_of(tmp_path)
    assert stacks["status"].eq("accepted").all() and stacks["slices"].tolist() == [8, 8]
    assert instances.groupby("stack_id")["acquisition_number"].nunique().eq(1).all()


@pytest.mark.parametrize("other", [{"ConvolutionKernel": "B70f"}, {"ImageType": ["DERIVED", "SECONDARY", "AVERAGE"]}])
def test_two_makings_between_each_other_are_apart(tmp_path, other):
    write_series(tmp_path / "a", np.arange(0, 40, 5), ConvolutionKernel="B30f")
    changes = {"ConvolutionKernel": "B30f", "number": lambda i: i + 50} | other
    write_series(tmp_path / "b", np.arange(2.5, 42, 5), **changes)
    assert stacks_of(tmp_path)[0]["slices"].tolist() == [8, 8]


def test_turns_of_the_tube_one_after_the_other_stay_one_volume(tmp_path):
    write_series(tmp_path, np.arange(0, 60, 5), AcquisitionNumber=lambda i: i // 4)
    assert only(stacks_of(tmp_path)[0])["slices"] == 12


def test_patients_whose_names_look_alike_share_no_stack(tmp_path):
    write_series(tmp_path / "a", range(6), PatientID="P 1")
    write_series(tmp_path / "b", range(6, 12), PatientID="P_1")
    stacks, instances = stacks_of(tmp_path)
    assert stacks["stack_id"].is_unique and len(stacks) == 2
    with pytest.raises(ValueError, match="instances of one stack, got 1 of 2 series"):
        dicom.read_stack(instances.assign(stack_id="same"), tmp_path)


@pytest.mark.parametrize("changes", [
    {"PixelSpacing": [0, 0]}, {"PixelSpacing": [-1, 1]}, {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]},
    {"ImageOrientationPatient": [1, 0, 0, 0.5, 0.866, 0]}, {"ImageOrientationPatient": [1, 0, 0, 1, 0.001, 0]}])
def test_impossible_geometry_is_no_geometry(tmp_path, changes):
    row = only(stacks_of(write_series(tmp_path, range(6), **changes))[0])
    assert row["reason"] == Exclusion.NO_GEOMETRY.value and row["ordered_by"] == "instance number"


def test_equal_blank_slices_of_two_phases_are_no_repeats(tmp_path):
    def slices(phase):
        return lambda i: np.zeros((4, 6), np.uint16) if i < 3 else noise(100 * phase + i)
    for phase in (1, 2):
        write_series(tmp_path / str(phase), range(10), AcquisitionNumber=phase, pixels=slices(phase),
                     number=lambda i, phase=phase: 100 * phase + i)
    stacks, _ = stacks_of(tmp_path)
    assert stacks["slices"].tolist() == [10, 10] and stacks["dropped_duplicates"].sum() == 0


def test_maps_in_another_unit_are_not_hounsfield(tmp_path):
    row = only(stacks_of(write_series(tmp_path, range(6), RescaleType="MGML"))[0])
    assert row["reason"] == "not in Hounsfield units" and "RescaleType (0028,1054) is MGML" in row["detail"]
    for kind in ("HU", "US", None):
        assert only(stacks_of(write_series(tmp_path, range(6), RescaleType=kind))[0])["status"] == "accepted"


def test_two_frames_of_reference_are_two_stacks(tmp_path):
    write_series(tmp_path, range(10), FrameOfReferenceUID=lambda i: "1.2.9" if i < 5 else "1.2.10")
    stacks, _ = stacks_of(tmp_path)
    assert stacks["slices"].tolist() == [5, 5] and set(stacks["frame_of_reference_uid"]) == {"1.2.9", "1.2.10"}


@pytest.mark.parametrize("lost", [0, 7])
def test_a_slice_without_a_frame_of_reference_stays_in_its_volume(tmp_path, lost):
    write_series(tmp_path, range(20), FrameOfReferenceUID=lambda i: None if i == lost else "1.2.9")
    stacks, instances = stacks_of(tmp_path)
    assert only(stacks)["status"] == "accepted" and only(stacks)["slices"] == 20
    assert only(stacks)["frame_of_reference_uid"] == "1.2.9"
    assert dicom.read_stack(instances, tmp_path).frame_of_reference_uid == "1.2.9"
    assert dicom.open_stack(only(stacks), instances, tmp_path).frame_of_reference_uid == "1.2.9"


def test_where_a_series_knows_two_frames_of_reference_none_is_guessed(tmp_path):
    write_series(tmp_path, range(15), FrameOfReferenceUID=lambda i: [None, "1.2.9", "1.2.10"][i // 5])
    stacks, _ = stacks_of(tmp_path)
    assert stacks["slices"].tolist() == [5, 5, 5] and stacks["frame_of_reference_uid"].isna().sum() == 1


def test_slices_that_change_places_after_the_index_are_noticed(tmp_path):
    write_series(tmp_path, range(6), pixels=noise)
    _, instances = stacks_of(tmp_path)
    one, two = tmp_path / "002.dcm", tmp_path / "005.dcm"
    for source, target in ((one, tmp_path / "x"), (two, one), (tmp_path / "x", two)):
        source.rename(target)
    with pytest.raises(ValueError, match=r"002.dcm.*changed|changed.*002.dcm"):
        dicom.read_stack(instances, tmp_path)


def test_of_a_folder_without_images_no_cache_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "letter.txt").write_text("dear colleague")
    with pytest.raises(runs.InputError, match="holds no DICOM image"):
        dicom.index_dicom(tmp_path / "in", cache=tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()


# ------------------------------------------------------------------ a stack on disk


def test_a_stack_on_disk_is_the_stack_in_memory(phantom_dir):
    root = phantom_dir / "Lung-PET-CT-Dx"
    instances, _ = dicom.index_dicom(root, workers=1)
    stacks, instances = dicom.build_stacks(instances, root=root)
    accepted = stacks[stacks["status"] == "accepted"]
    assert {"CT", "PT"} == set(accepted["modality"])
    for _, row in accepted.iterrows():
        own = instances[instances["stack_id"] == row["stack_id"]].sample(frac=1, random_state=0)
        if isinstance(row["suv_refusal"], str):
            with pytest.raises(dicom.SuvError):
                dicom.open_stack(row, own, root)
            continue
        whole, opened = dicom.read_stack(own, root), dicom.open_stack(row, own, root)
        assert opened.shape == whole.values_zyx.shape == (len(opened), *opened[0].shape)
        assert np.allclose(opened.affine, whole.affine, atol=1e-9)
        assert opened.frame_of_reference_uid == whole.frame_of_reference_uid
        assert tuple(header["sop_uid"] for header in opened.slices) == whole.sop_uids
        assert all(np.array_equal(opened[k], plane) for k, plane in enumerate(whole.values_zyx))


def test_an_excluded_or_incomplete_stack_is_not_opened(tree):
    instances, _ = dicom.index_dicom(tree)
    stacks, instances = dicom.build_stacks(instances, min_slices=2)
    row = stacks.iloc[0]
    with pytest.raises(ValueError, match=f"{row['stack_id']} cannot be opened: .* slices of {row['slices']} are there"):
        dicom.open_stack(row, instances[1:], tree)
    twice = pd.concat([instances[1:], instances[-1:]])
    with pytest.raises(ValueError, match=f"{len(instances) - 1} slices of {row['slices']} are there"):
        dicom.open_stack(row, twice, tree)
    with pytest.raises(ValueError, match="rows of other stacks"):
        dicom.open_stack(row, instances.assign(stack_id="other"), tree)
    with pytest.raises(ValueError, match=r"it is excluded \(gap\)"):
        dicom.open_stack(row.replace({"accepted": "excluded"}).fillna({"reason": "gap"}), instances, tree)


def test_packed_files_that_changed_places_are_noticed(tree):
    paths = sorted(tree.glob("*.dcm"))[:2]
    for path in paths:
        image = pydicom.dcmread(path)
        image.compress(RLELossless, generate_instance_uid=False)
        image.save_as(path)
    size = max(path.stat().st_size for path in paths)
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    instances, _ = dicom.index_dicom(tree)
    stacks, instances = dicom.build_stacks(instances, min_slices=2)
    one, two = (path.read_bytes() for path in paths)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    with pytest.raises(ValueError, match="changed since it was indexed: another image than"):
        dicom.read_stack(instances[instances["stack_id"] == stacks["stack_id"][0]], tree)


# ------------------------------------------------------------------ one example, not a certain one

def packed_series(folder, names):
    """Run-length encoded series, and a function that damages one of them so that only unpacking shows it."""
    for name in names:
        write_series(folder / name, range(10), SeriesInstanceUID=f"1.2.2.{ord(name)}", syntax=RLELossless, pixels=noise)
    stacks, instances = stacks_of(folder)
    assert stacks["status"].eq("accepted").all() and len(stacks) == len(names)

    def damage(stack_id):
        path = folder / instances.loc[instances["stack_id"] == stack_id, "path"].iloc[2]
        raw = bytearray(path.read_bytes())
        at = raw.index(b"\xe0\x7f\x10\x00")
        raw[at + 28 : at + 92] = b"\xff" * 64
        path.write_bytes(raw)

    return stacks, instances, damage


def test_a_candidate_that_cannot_be_read_is_passed_over_in_one_line(tmp_path, capsys):
    stacks, instances, damage = packed_series(tmp_path, "abc")
    names = stacks["stack_id"].tolist()
    for name in names[:2]:
        damage(name)

    def read(stack_id):
        return dicom.read_stack(instances[instances["stack_id"] == stack_id], tmp_path)

    assert dicom.first_readable(names, read, print).stack_id == names[2]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "skipped 2 that cannot be read" in said and "003.dcm: frame 0 cannot" in said
    assert dicom.first_readable(names[:2], read, print) is None and dicom.first_readable([], read, print) is None


def chapter_cells(name, *ids):
    """Source of cells of a notebook."""
    cells = json.loads((Path(__file__).resolve().parents[1] / "nbs" / name).read_text())["cells"]
    return ["".join(cell["source"]) for wanted in ids for cell in cells if cell["id"] == wanted]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_chapter_that_meets_damage_looks_at_the_next_stack(tmp_path, capsys, damaged):
    stacks, instances, damage = packed_series(tmp_path, "ab")
    names = stacks["stack_id"].tolist()
    for name in names[:damaged]:
        damage(name)
    world = vars(dicom) | {"stacks": stacks, "instances": instances, "root": tmp_path, "source": "toys", "plt": plt,
                           "accepted": stacks[stacks["status"] == "accepted"], "plots": plots}
    for source in chapter_cells("01_explore_dicom.ipynb", "8e7ba9fa", "80ebc001", "b3d00501", "9b55c7f7", "f65012c1",
                                "c7eea3b5", "27880ecb"):
        exec(source, world)
    plt.close("all")
    assert capsys.readouterr().out.count(f"skipped {damaged} that cannot be read") == 2
    assert world["stack"] is None if damaged == 2 else world["stack"].stack_id == names[1]


# ---- walks, repeats and series that are not what they seem -----------------------------------------------------------

FORTY = [*range(40)]


@pytest.mark.parametrize("depths, accepted, others", [
    ([10] * 5 + FORTY, [40], [1] * 5),                         # a pile to see the contrast come, then the scan
    ([-20] * 5 + FORTY, [40], [1] * 5),
    ([10, *FORTY], [40], [1]),
    ([1, *FORTY], [40], [1]),
    ([*FORTY[:11], *FORTY[10:]], [40], [1]),                   # one slice again, at once
    ([*FORTY[:20], 10, *FORTY[20:]], [40], [1]),               # and later
    ([*FORTY, 10], [40], [1]),
    ([*FORTY[:9:-1], *FORTY], [30, 40], []),                   # down, and up from further below
    ([*FORTY, *FORTY[::-1]], [40, 40], []),
    (FORTY * 3, [40] * 3, []),
    ([z for z in FORTY for _ in range(3)], [40] * 3, []),
    ([*FORTY, *FORTY[:12], *FORTY[15:]], [40], [37]),          # a gap stays one
    ([z for z in FORTY for _ in range(2)][:-1], [], [79]),     # turns, one of which is lost: nobody knows whose
])
def test_walks_come_apart_where_one_would_cut_them_by_eye(tmp_path, depths, accepted, others):
    stacks, _ = stacks_of(write_series(tmp_path / "s", depths, pixels=different))
    counts = stacks.groupby("status")["slices"].apply(sorted)
    assert counts.get("accepted", []) == sorted(accepted) and counts.get("excluded", []) == sorted(others)
    firsts = [np.reshape(affine, (4, 4))[2, 3] for affine in stacks.loc[stacks["status"] == "accepted", "affine"]]
    assert sorted(firsts) == sorted(10.0 if count == 30 else 0.0 for count in accepted)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-30, 30), min_size=1, max_size=60))
def test_every_image_of_a_walk_has_a_pass_and_passes_go_one_way(places):
    depth_mm = np.array(places, float)
    labels = dicom._passes(depth_mm)
    assert labels[0] == 0 and (np.diff(labels) >= 0).all()
    for label in np.unique(labels):
        steps = np.diff(depth_mm[labels == label])
        assert (steps > 0).all() or (steps < 0).all()


def test_blank_slices_of_gates_are_no_repeats(tmp_path):
    def beating(i):
        return np.full((4, 6), 1064, np.uint16) if i % 20 in (0, 1, 19) else different(i)

    stacks, instances = stacks_of(write_series(tmp_path / "s", [*range(20)] * 3, pixels=beating))
    assert stacks["slices"].tolist() == [20] * 3 and stacks["status"].eq("accepted").all()
    assert instances["repeats_slice"].isna().all()


def test_before_and_after_a_correction_are_no_repeats(tmp_path):
    write_series(tmp_path / "s", [*range(20)] * 2, pixels=lambda i: different(i % 20), Modality="PT",
                 CorrectedImage=lambda i: ["DECY"] if i < 20 else ["DECY", "ATTN"])
    assert stacks_of(tmp_path / "s")[0]["slices"].tolist() == [20] * 2


@pytest.mark.parametrize("began", ["095900", "100500", "150000", None])
def test_frames_of_one_pet_series_are_corrected_to_one_beginning(tmp_path, began):
    tracer = Dataset()
    tracer.RadiopharmaceuticalStartTime, tracer.RadionuclideTotalDose = "090000", 3.5e8
    tracer.RadionuclideHalfLife = 6586.2
    frames = ["102000", "100000", "101000"]
    write_series(tmp_path / "s", [*range(8)] * 3, pixels=different, Modality="PT", Units="BQML", PatientWeight=70,
                 DecayCorrection="START", CorrectedImage=["ATTN", "DECY"], SeriesTime=began, RescaleIntercept=0,
                 AcquisitionTime=lambda i: frames[i // 8],
                 RadiopharmaceuticalInformationSequence=lambda i: [tracer])
    stacks, instances = stacks_of(tmp_path / "s")
    assert stacks["slices"].tolist() == [8] * 3 and stacks["suv_refusal"].isna().all()
    instances.to_parquet(tmp_path / "instances.parquet")
    images = dict(iter(pd.read_parquet(tmp_path / "instances.parquet").groupby("stack_id")))
    factors = {dicom.open_stack(row, images[row["stack_id"]], tmp_path / "s").suv_factors[0]
               for _, row in stacks.iterrows()}
    waited = 3540 if began == "095900" else 3600
    assert list(factors) == [pytest.approx(70_000 / (3.5e8 * 2 ** (-waited / 6586.2)))]


@pytest.mark.parametrize("count, other, expected", [
    (20, {"AcquisitionNumber": lambda i: 1 + (i >= 20)}, [20, 20]),
    (7, {"ConvolutionKernel": lambda i: "B30" if i < 7 else "B70"}, [7, 7]),
    (10, {"AcquisitionNumber": lambda i: 3 if i == 19 else 1 + (i >= 10)}, [10, 9, 1])])
def test_volumes_between_each_other_are_not_one(tmp_path, count, other, expected):
    depths = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
    stacks, _ = stacks_of(write_series(tmp_path / "s", depths, pixels=different, **other), min_slices=8)
    assert sorted(stacks["slices"]) == sorted(expected)
    assert stacks["status"].eq("accepted").tolist() == (stacks["slices"] >= 8).tolist()


def test_two_enhanced_images_half_a_step_apart_are_two_stacks(single_and_enhanced):
    single, folder = single_and_enhanced
    image = pydicom.dcmread(folder / "all.dcm")
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.7.99"
    for groups in image.PerFrameFunctionalGroupsSequence:
        x, y, z = groups.PlanePositionSequence[0].ImagePositionPatient
        groups.PlanePositionSequence[0].ImagePositionPatient = [x, y, round(z + single.spacing_zyx_mm[0] / 2, 4)]
    image.save_as(folder / "between.dcm")
    stacks, instances = stacks_of(folder)
    assert stacks["slices"].tolist() == [len(single.hu_zyx)] * 2 and stacks["status"].eq("accepted").all()
    assert instances.groupby("stack_id").size().tolist() == [1, 1]


def test_slices_that_were_not_made_alike_are_remarked(tmp_path):
    write_series(tmp_path / "s", range(20), pixels=different, AcquisitionNumber=lambda i: 1 + i // 10,
                 ConvolutionKernel=lambda i: "B30" if i < 10 else "B70", SliceThickness=lambda i: 5 if i < 10 else 1)
    row = only(stacks_of(tmp_path / "s")[0])
    assert row["status"] == "accepted"
    assert row["remark"] == ("2 kernels, such as B30 and B70; 2 slice thicknesses, such as 5 and 1; "
                             "2 acquisitions, such as 1 and 2")


def test_a_rescale_that_jumps_is_remarked_in_a_ct_alone(tmp_path):
    write_series(tmp_path / "s", range(20), pixels=different, RescaleIntercept=lambda i: -24 if i == 7 else -1024)
    row = only(stacks_of(tmp_path / "s")[0])
    assert row["status"] == "accepted" and row["remark"] == "2 rescale intercepts, such as -1024 and -24"
    folder, _ = write_pet(tmp_path / "pet")
    assert only(stacks_of(folder)[0])["remark"] is None or "rescale" not in only(stacks_of(folder)[0])["remark"]


def test_a_reprojected_pet_is_a_projection(tmp_path):
    folder, _ = write_pet(tmp_path / "pet", SeriesType=["WHOLE BODY", "REPROJECTION"])
    row = only(stacks_of(folder)[0])
    assert row["reason"] == "projection" and "series type WHOLE BODY\\REPROJECTION" in row["detail"]


@pytest.mark.parametrize("value, reason", [
    ("MAXIMUM", "projection"), ("MINIMUM", "projection"), ("SUBTRACTION", "not in Hounsfield units"),
    ("STD_DEVIATION", "not in Hounsfield units"), ("NONE", None)])
def test_what_was_computed_from_images_is_told_from_them(tmp_path, value, reason):
    plain, computed = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], ["DERIVED", "PRIMARY", "VOLUME", value]
    write_series(tmp_path / "s", range(20), pixels=different, ImageType=lambda i: plain if i < 10 else computed)
    stacks, _ = stacks_of(tmp_path / "s")
    assert sorted(stacks["reason"].fillna("")) == (["", reason] if reason else [""])


@pytest.mark.parametrize("missing", [
    "SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_whole_numbers_of_32_bits_need_what_a_decoder_asks_for(tmp_path, missing):
    told = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31} | {missing: None}
    write_series(tmp_path / "s", range(6), pixels=lambda i: np.full((4, 6), 1064 + i, np.uint32), **told)
    row = only(stacks_of(tmp_path / "s")[0])
    assert row["reason"] == "unsupported syntax" and re.search(f"{missing} .* is missing", row["detail"])


def test_pixels_in_one_piece_under_a_compressed_syntax_are_a_problem(tmp_path):
    path = write_slice(tmp_path / "s" / "1.dcm", syntax=ExplicitVRLittleEndian)
    write_slice(tmp_path / "s" / "2.dcm", syntax=ExplicitVRLittleEndian)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    detail = "the pixel data is in one piece though its syntax is compressed"
    assert problem_of(tmp_path / "s", "1.dcm") == ("unreadable", detail)


@pytest.mark.parametrize("more, problem", [(2, None), (46, None), (48, "unreadable"), (480, "unreadable")])
def test_pixels_for_another_frame_are_a_problem(tmp_path, more, problem):
    image = pydicom.dcmread(write_slice(tmp_path / "s" / "2.dcm"))
    image.PixelData += bytes(more)
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.4"
    image.save_as(tmp_path / "s" / "1.dcm")
    problems = dicom.index_dicom(tmp_path / "s", workers=1)[1]
    assert problems["reason"].tolist() == ([problem] if problem else [])


def test_a_slice_moved_in_its_plane_is_uneven(tmp_path):
    row = only(stacks_of(write_series(tmp_path / "s", range(20), position=lambda i: (0, 10 * (i == 9), 5 * i)))[0])
    assert row["reason"] == "uneven spacing" and "slice 9 is 10.00 mm off" in row["detail"]


def test_many_larger_steps_are_no_gaps(tmp_path):
    depths = np.cumsum([0, 5, 5, 8, 5, 8, 5, 8, 5, 8, 5, 5])
    assert only(stacks_of(write_series(tmp_path / "s", depths))[0])["reason"] == "uneven spacing"


def test_one_slice_that_cannot_be_decoded_is_found(tmp_path):
    row = only(stacks_of(write_series(tmp_path / "s", EVEN, HighBit=lambda i: 16 if i == 3 else 15))[0])
    assert row["reason"] == "unsupported syntax"


def test_orientations_and_spaces_are_told_apart_together(tmp_path):
    upright = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "position": lambda i: (0, i, 0)}
    write_series(tmp_path / "a", range(6), FrameOfReferenceUID="1.2.9", number=lambda i: i, **upright)
    write_series(tmp_path / "b", range(6), FrameOfReferenceUID="1.2.9", number=lambda i: 10 + i)
    write_series(tmp_path / "c", range(6), FrameOfReferenceUID="1.2.10", number=lambda i: 20 + i, **upright)
    write_series(tmp_path / "d", range(6, 12), FrameOfReferenceUID="1.2.10", number=lambda i: 30 + i)
    stacks, _ = stacks_of(tmp_path)
    assert stacks["slices"].tolist() == [6] * 4 and stacks["status"].eq("accepted").all()
    assert stacks["frame_of_reference_uid"].notna().all()


def test_turns_from_head_to_feet_are_turns_too(tmp_path):
    stacks, _ = stacks_of(write_series(tmp_path / "s", sorted(EVEN * 2, reverse=True), pixels=different))
    assert stacks["slices"].tolist() == [6, 6] and stacks["status"].eq("accepted").all()


def test_a_subtraction_leaves_the_volume_of_its_kind(tmp_path):
    plain, computed = ["DERIVED", "PRIMARY", "VOLUME", "NONE"], ["DERIVED", "PRIMARY", "VOLUME", "SUBTRACTION"]
    write_series(tmp_path / "s", range(20), pixels=different, ImageType=lambda i: plain if i < 10 else computed)
    assert sorted(stacks_of(tmp_path / "s")[0]["reason"].fillna("")) == ["", "not in Hounsfield units"]


@pytest.mark.parametrize("other", [
    {"RescaleIntercept": lambda i: -24 if i == 6 else -1024},
    {"position": lambda i: (20 * (i == 6), 0, [*EVEN, 10][i])}])
def test_equal_numbers_of_another_meaning_or_place_are_no_repeats(tmp_path, other):
    folder = write_series(tmp_path / "s", [*EVEN, 10], pixels=lambda i: different(2 if i > 5 else i), **other)
    assert stacks_of(folder)[0]["dropped_duplicates"].sum() == 0


def test_a_repeat_belongs_to_its_phase_alone(tmp_path):
    folder = write_series(tmp_path / "s", [*EVEN, 10, *EVEN], pixels=lambda i: different(2 if i == 6 else i),
                          number=lambda i: i % 7 + 1, AcquisitionNumber=lambda i: 1 + (i >= 7))
    stacks, instances = stacks_of(folder)
    by_phase, again = stacks.set_index("phase"), instances[instances["slice_index"].isna()]
    assert by_phase["dropped_duplicates"].to_dict() == {1: 1, 2: 0}
    assert again["repeats_slice"].tolist() == [2] and set(again["stack_id"]) == {by_phase.loc[1, "stack_id"]}


def test_phases_are_numbered_by_their_first_image(tmp_path):
    write_series(tmp_path / "a", range(12), FrameOfReferenceUID="1.2.9", number=lambda i: 1 + 2 * i)
    write_series(tmp_path / "b", range(6), FrameOfReferenceUID="1.2.10", number=lambda i: 2 + 2 * i)
    assert stacks_of(tmp_path)[0].set_index("phase")["slices"].to_dict() == {1: 12, 2: 6}


def test_phases_are_numbered_by_acquisition_before_instance(tmp_path):
    folder = write_series(tmp_path / "s", EVEN * 2, pixels=different, number=lambda i: (i + 6) % 12 + 1,
                          AcquisitionNumber=lambda i: 1 + i // 6)
    stacks, instances = stacks_of(folder)
    first = stacks.set_index("phase").loc[1, "stack_id"]
    assert set(instances.loc[instances["stack_id"] == first, "acquisition_number"]) == {1}


def test_a_straightened_pet_has_nothing_around_it(tmp_path):
    folder, _ = write_pet(tmp_path / "pet", position=lambda i: (0, i, 5 * i))
    stacks, instances = stacks_of(folder)
    assert only(stacks)["reason"] == "tilted gantry"
    assert dicom.read_stack(instances, folder, straighten=True).suv_zyx.min() == 0


def test_factors_follow_their_slices_in_any_order_of_rows(tmp_path):
    folder, _ = write_pet(tmp_path / "pet", DecayCorrection="NONE", CorrectedImage=["ATTN"], SeriesTime="100000",
                          AcquisitionTime=lambda i: f"11{10 * i:02}00", ActualFrameDuration="180000")
    stacks, instances = stacks_of(folder)
    whole, mixed = dicom.read_stack(instances, folder).suv_zyx, instances.iloc[::-1]
    assert np.array_equal(dicom.read_stack(mixed, folder).suv_zyx, whole)
    opened = dicom.open_stack(only(stacks), mixed, folder)
    assert all(np.allclose(opened[k], plane) for k, plane in enumerate(whole))


def test_two_patients_of_one_series_uid_have_their_own_start(tmp_path):
    write_pet(tmp_path / "a", PatientID="a")
    write_pet(tmp_path / "b", PatientID="b", AcquisitionTime="130000")
    _, instances = stacks_of(tmp_path)
    begun = instances.groupby("patient_id")["first_acquisition_time"].unique().map(list).to_dict()
    assert begun == {"a": ["115525"], "b": ["130000"]}


def test_sizes_that_differ_have_no_affine(tmp_path):
    row = only(stacks_of(write_series(tmp_path / "s", EVEN, PixelSpacing=lambda i: [0.8, 0.5 + (i == 2) / 10]))[0])
    assert row["affine"] is None


def test_a_pass_ends_where_a_place_is_nearly_repeated():
    assert dicom._passes(np.array([0, 1, 2, 3, 3.004, 4, 5])).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert dicom._passes(np.array([2.0, 0, 5, 2])).tolist() == [0, 0, 1, 1]


def test_images_that_hardly_differ_in_place_are_no_volume(tmp_path):
    folder = write_series(tmp_path / "s", [7 + 0.002 * i for i in range(6)], number=1, pixels=different)
    assert only(stacks_of(folder)[0])["reason"] == "duplicate positions"
