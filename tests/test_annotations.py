"""Chapter 2: hostile XML, one outcome for every file, boxes joined into lesions, the clinical table."""

import io
import json
import os
import re
import time
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import openpyxl
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from lungct import annotations as an
from lungct import dicom, plots, runs
from lungct.annotations import Outcome, XmlProblem

CT, CAPTURE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
SQUARE = (10, 20, 40, 60)
VALID = an.format_annotation([("A", SQUARE)])


# ---------------------------------------------------------------- reading one file

edge = st.integers(0, 4000)
corners = st.tuples(edge, edge, edge, edge).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12).filter(
    lambda w: "\ufffe" not in w and "\uffff" not in w)


@settings(deadline=None)
@given(st.lists(st.tuples(words, corners), min_size=1, max_size=5), st.integers(1, 5000), st.integers(1, 5000))
def test_what_is_written_is_read_back(objects, width, height):
    found = an.parse_annotation(an.format_annotation(objects, width, height).encode())
    assert [(f["label"], (f["xmin"], f["ymin"], f["xmax"], f["ymax"])) for f in found] == \
        [(label.strip(), box) for label, box in objects]
    assert {(f["image_width"], f["image_height"]) for f in found} == {(width, height)}


BOMB = ('<!DOCTYPE a [<!ENTITY e0 "ha">'
        + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12)) + "]><annotation>&e11;</annotation>")
QUADRATIC = '<!DOCTYPE a [<!ENTITY x "' + "y" * 100_000 + '">]><annotation>' + "&x;" * 100_000 + "</annotation>"
OBJECT = VALID[VALID.index("<object>"):VALID.index("</annotation>")]
HOSTILE = {
    "entity bomb": (BOMB, XmlProblem.FORBIDDEN),
    "quadratic blow-up": (QUADRATIC, XmlProblem.FORBIDDEN),
    "external entity": ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + VALID.replace(">A<", ">&x;<"),
                        XmlProblem.FORBIDDEN),
    "external document type": ('<!DOCTYPE a SYSTEM "http://example.org/a.dtd">' + VALID, XmlProblem.FORBIDDEN),
    "undeclared entity": (VALID.replace(">A<", ">&x;<"), XmlProblem.NOT_XML),
    "cut off": (VALID[:-20], XmlProblem.NOT_XML),
    "empty": ("", XmlProblem.NOT_XML),
    "binary": (b"\x00\x01\xff\xfe" * 50, XmlProblem.NOT_XML),
    "unknown encoding": ('<?xml version="1.0" encoding="klingon"?>' + VALID, XmlProblem.NOT_XML),
    "encoding that expat cannot read": ('<?xml version="1.0" encoding="utf-7"?>' + VALID, XmlProblem.NOT_XML),
    "wrong root": ("<html></html>", XmlProblem.WRONG_ROOT),
    "no object": ("<annotation></annotation>", XmlProblem.NO_OBJECT),
    "objects too deep": (f"<annotation><more>{OBJECT}</more></annotation>", XmlProblem.NO_OBJECT),
    "no name": (VALID.replace("<name>A</name>", ""), XmlProblem.TAG_COUNT),
    "two names": (VALID.replace("<name>A</name>", "<name>A</name><name>G</name>"), XmlProblem.TAG_COUNT),
    "no box": (re.sub("<bndbox>.*</bndbox>", "", VALID), XmlProblem.TAG_COUNT),
    "no corner": (VALID.replace("<ymax>60</ymax>", ""), XmlProblem.TAG_COUNT),
    "width missing": (VALID.replace("<width>512</width>", ""), XmlProblem.TAG_COUNT),
    "text": (VALID.replace(">60<", ">sixty<"), XmlProblem.NOT_WHOLE),
    "nothing": (VALID.replace(">60<", "><"), XmlProblem.NOT_WHOLE),
    "NaN": (VALID.replace(">60<", ">NaN<"), XmlProblem.NOT_WHOLE),
    "infinite": (VALID.replace(">60<", ">inf<"), XmlProblem.NOT_WHOLE),
    "float": (VALID.replace(">60<", ">60.0<"), XmlProblem.NOT_WHOLE),
    "exponent": (VALID.replace(">60<", ">6e1<"), XmlProblem.NOT_WHOLE),
    "underscore": (VALID.replace(">60<", ">6_0<"), XmlProblem.NOT_WHOLE),
    "digits of another script": (VALID.replace(">60<", ">\u0666\u0660<"), XmlProblem.NOT_WHOLE),
    "more than an integer holds": (VALID.replace(">60<", ">" + "9" * 5000 + "<"), XmlProblem.NOT_WHOLE),
    "negative": (VALID.replace(">10<", ">-10<"), XmlProblem.NEGATIVE),
    "swapped in x": (VALID.replace(">40<", ">9<"), XmlProblem.SWAPPED),
    "swapped in y": (VALID.replace(">60<", ">19<"), XmlProblem.SWAPPED),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_refused_with_its_reason_and_quickly(name):
    text, reason = HOSTILE[name]
    started = time.monotonic()
    with pytest.raises(dicom.BadFile) as caught:
        an.parse_annotation(text if isinstance(text, bytes) else text.encode())
    assert caught.value.problem is reason
    assert caught.value.detail and len(caught.value.detail) < 300
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("text", [
    VALID.encode("utf-16"), b"\xef\xbb\xbf" + VALID.encode(), '<?xml version="1.0" encoding="utf-8"?>' + VALID,
    VALID.replace("<annotation>", '<annotation verified="no">\n  <source>Unknow<database>Unknown</database></source>'),
    VALID.replace(">60<", "> 60\n<"), VALID.replace("<object>", "<!-- a note --><object>"),
])
def test_harmless_variants_are_read(text):
    assert an.parse_annotation(text)[0]["ymax"] == 60


def test_an_annotation_may_leave_out_the_image_size():
    found = an.parse_annotation(re.sub("<size>.*</size>", "", VALID))
    assert found[0]["image_width"] is None and found[0]["xmin"] == 10


def test_nesting_as_deep_as_a_file_may_be_does_not_exhaust_the_stack():
    deep = b"<annotation>" + b"<a>" * 130_000 + b"</a>" * 130_000 + b"</annotation>"
    with pytest.raises(dicom.BadFile, match="no <object>"):
        an.parse_annotation(deep)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_gives_boxes_or_a_reason_never_another_error(data):
    text = bytearray(VALID.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at:at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=4))
        text = text or bytearray(b" ")
    try:
        for box in an.parse_annotation(bytes(text)):
            assert 0 <= box["xmin"] <= box["xmax"] and 0 <= box["ymin"] <= box["ymax"]
    except dicom.BadFile as error:
        assert error.problem in XmlProblem


@pytest.mark.parametrize(("label", "subtype"), [
    ("A", "A"), ("a", "A"), ("b", "B"), ("g", "G"), (" G\n", "G"), ("e", "E"),
    ("Q", None), ("A0192", None), ("", None), ("AB", None)])
def test_labels_are_folded_and_unknown_ones_stay_unknown(label, subtype):
    assert an.subtype_of(label) == subtype


def test_folders_and_patients():
    assert an.patient_of("A0001") == an.patient_of("Lung_Dx-A0001") == "Lung_Dx-A0001"
    assert an.patient_of("P001", {"P001"}) == "P001" and an.patient_of("P002", {"P001"}) == "Lung_Dx-P002"
    assert an.patient_of("A0001", {"Lung_Dx-A0001"}) == "Lung_Dx-A0001"
    assert an.patient_subtype("Lung_Dx-B0019") == "B"
    assert an.patient_subtype("Lung_Dx-Q0019") is None and an.patient_subtype("B0019") is None


# ---------------------------------------------------------------- reading a folder

@pytest.fixture
def folder(tmp_path):
    """A small annotation folder: two patients, one file with two boxes, one that is broken."""
    root = tmp_path / "Annotation"
    texts = {"A0001/1.1.xml": an.format_annotation([("a", SQUARE), ("A", (1, 2, 3, 4))]), "A0001/1.2.xml": VALID,
             "A0001/notes.txt": "no annotation", "G0002/2.1.XML": an.format_annotation([("G", SQUARE)]),
             "G0002/2.2.xml": VALID[:50]}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_all_objects_of_all_files_and_one_row_for_the_broken_one(folder):
    boxes, problems = an.read_annotations(folder)
    assert boxes["file"].tolist() == ["A0001/1.1.xml", "A0001/1.1.xml", "A0001/1.2.xml", "G0002/2.1.XML"]
    assert boxes["object_index"].tolist() == [0, 1, 0, 0]
    assert boxes["label"].tolist() == ["a", "A", "A", "G"] and boxes["subtype"].tolist() == ["A", "A", "A", "G"]
    assert boxes["patient_id"].unique().tolist() == ["Lung_Dx-A0001", "Lung_Dx-G0002"]
    assert boxes["sop_uid"].tolist() == ["1.1", "1.1", "1.2", "2.1"]
    assert problems[["file", "reason"]].to_numpy().tolist() == [["G0002/2.2.xml", XmlProblem.NOT_XML.value]]


def test_one_file_and_one_patient_give_the_same_rows(folder):
    everything, _ = an.read_annotations(folder)
    one, problems = an.read_annotations(folder / "A0001" / "1.1.xml")
    pd.testing.assert_frame_equal(one, everything.iloc[:2])
    assert problems.empty
    patient, _ = an.read_annotations(folder / "A0001")
    pd.testing.assert_frame_equal(patient, everything.iloc[:3])


def test_a_relative_path_works_too(folder, monkeypatch):
    monkeypatch.chdir(folder / "A0001")
    assert an.read_annotations("1.2.xml")[0]["patient_id"].tolist() == ["Lung_Dx-A0001"]


def test_a_folder_without_xml_is_named(folder):
    (folder / "A0058").mkdir()
    _, problems = an.read_annotations(folder)
    empty = problems[problems["reason"] == XmlProblem.NO_XML.value]
    assert empty["file"].tolist() == ["A0058"] and empty["sop_uid"].isna().all()


def test_odd_files_cost_themselves_only(folder):
    (folder / "A0001" / "huge.xml").write_bytes(b"<annotation>" + b" " * an.MAX_BYTES + b"</annotation>")
    (folder / "A0001" / "gone.xml").symlink_to(folder / "nowhere.xml")
    os.mkfifo(folder / "A0001" / "pipe.xml")
    (folder / "A0001" / "folder.xml").mkdir()
    boxes, problems = an.read_annotations(folder)
    assert len(boxes) == 4
    reasons = problems.set_index("file")["reason"]
    assert reasons["A0001/huge.xml"] == XmlProblem.TOO_LARGE.value
    assert reasons["A0001/gone.xml"] == reasons["A0001/pipe.xml"] == XmlProblem.UNREADABLE.value
    assert reasons["A0001/folder.xml"] == XmlProblem.NO_XML.value


def test_a_name_that_is_no_text_can_still_be_saved(folder, tmp_path):
    (Path(os.fsdecode(os.fsencode(folder / "A0001") + b"/1.\xff.xml"))).write_text(VALID)
    boxes, _ = an.read_annotations(folder)
    assert "A0001/1.\\xff.xml" in boxes["file"].tolist()
    boxes.to_parquet(tmp_path / "boxes.parquet")


def test_a_path_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(runs.InputError, match=r"annotation path .*nowhere does not exist: expected"):
        an.read_annotations(tmp_path / "nowhere")


def test_empty_tables_keep_columns_and_types(tmp_path):
    (tmp_path / "Annotation").mkdir()
    boxes, problems = an.read_annotations(tmp_path / "Annotation")
    assert boxes.dtypes.astype(str).to_dict() == an.BOX_COLUMNS
    assert problems["reason"].tolist() == [XmlProblem.NO_XML.value]
    boxes.to_parquet(tmp_path / "boxes.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "boxes.parquet"), boxes)


# ---------------------------------------------------------------- the ledger

def images(*rows):
    """rows: (patient, uid, sop class, stack, slice)"""
    types = dict.fromkeys(["patient_id", "sop_uid", "sop_class_uid", "stack_id"], "str") | {"slice_index": "Int64"}
    frame = pd.DataFrame(rows, columns=list(types)).astype(types)
    size = {"rows": pd.Series(512, frame.index, "Int64"), "columns": pd.Series(400, frame.index, "Int64")}
    return frame.assign(modality="CT", frames=pd.Series(pd.NA, frame.index, "Int64"), **size)


INSTANCES = images(
    ("Lung_Dx-A0001", "1.1", CT, "s1", 0), ("Lung_Dx-A0001", "1.2", CT, "s1", 1),
    ("Lung_Dx-A0001", "1.3", CAPTURE, None, None), ("Lung_Dx-A0001", "1.4", CT, "s2", 0),
    ("Lung_Dx-A0001", "1.5", CT, None, None), ("Lung_Dx-A0001", "1.6", CT, "s1", None),
    ("Lung_Dx-G0002", "2.1", CT, "s3", 0), ("Lung_Dx-A0001", "1.7", CT, "s4", None),
    ("Lung_Dx-A0001", "1.8", CT, "s2", None), ("Lung_Dx-A0001", "1.9", CT, "s1", 2))
INSTANCES.loc[7:, "frames"] = [30, 30, 1]
STACKS = pd.DataFrame(
    [("s1", "Lung_Dx-A0001", "accepted", None), ("s2", "Lung_Dx-A0001", "excluded", "too few slices"),
     ("s3", "Lung_Dx-G0002", "accepted", None), ("s4", "Lung_Dx-A0001", "accepted", None)],
    columns=["stack_id", "patient_id", "status", "reason"]).astype("str").assign(modality="CT")


def box_rows(*files):
    """files: (folder, uid, [(label, box), ...]) with an image size of 400 x 512"""
    rows = [{"file": f"{folder}/{uid}.xml", "folder": folder, "patient_id": an.patient_of(folder), "sop_uid": uid,
             "object_index": i, "label": label, "subtype": an.subtype_of(label),
             "image_width": 400, "image_height": 512, **dict(zip(an.EDGES, box, strict=True))}
            for folder, uid, objects in files for i, (label, box) in enumerate(objects)]
    return an._table(rows, an.BOX_COLUMNS)


NO_PROBLEMS = an._table([], an.PROBLEM_COLUMNS)


def outcomes(*files, problems=NO_PROBLEMS, instances=INSTANCES):
    ledger = an.reconcile(instances, STACKS, box_rows(*files), problems)
    assert an.count_outcomes(ledger).sum() == len(ledger) == len({f[:2] for f in files}) + len(problems)
    return dict(zip(ledger["file"], ledger["outcome"], strict=True))


def one(folder, uid, label="A", box=SQUARE):
    return (folder, uid, [(label, box)])


ONE_OF_EACH = [
    (one("A0001", "1.1"), Outcome.MATCHED),
    (one("A0001", "1.2", "a"), Outcome.MATCHED),
    (one("A0001", "1.3"), Outcome.SECONDARY_CAPTURE),
    (one("A0001", "1.4"), Outcome.EXCLUDED_STACK),
    (one("A0001", "1.5"), Outcome.EXCLUDED_STACK),
    (one("A0001", "1.6"), Outcome.NO_SLICE),
    (one("A0001", "1.7"), Outcome.SEVERAL_FRAMES),
    (one("A0001", "1.7", "Q"), Outcome.SEVERAL_FRAMES),
    (one("A0001", "1.8"), Outcome.EXCLUDED_STACK),
    (one("A0001", "1.9"), Outcome.MATCHED),
    (one("A0001", "9.9"), Outcome.UNKNOWN_UID),
    (one("A0067", "9.9"), Outcome.NO_IMAGES),
    (one("A0001", "2.1"), Outcome.OTHER_PATIENT),
    (one("A0067", "2.1"), Outcome.OTHER_PATIENT),
    (one("A0001", "1.1", "Q"), Outcome.UNKNOWN_LABEL),
    (one("A0001", "1.1", "A0192"), Outcome.UNKNOWN_LABEL),
    (one("A0001", "1.1", "g"), Outcome.OTHER_SUBTYPE),
    (one("A0001", "1.1", "A", (5, 5, 5, 9)), Outcome.NO_AREA),
    (one("A0001", "1.1", "A", (5, 5, 401, 9)), Outcome.OUTSIDE_IMAGE),
    (one("A0001", "1.1", "A", (5, 5, 9, 513)), Outcome.OUTSIDE_IMAGE),
    (one("A0001", "1.1", "A", (0, 0, 400, 512)), Outcome.MATCHED),
]


@pytest.mark.parametrize(("file", "outcome"), ONE_OF_EACH)
def test_each_outcome(file, outcome):
    assert outcomes(file) == {f"{file[0]}/{file[1]}.xml": outcome.value}


def test_an_unreadable_file_is_in_the_ledger_with_its_reason(folder):
    boxes, problems = an.read_annotations(folder)
    ledger = an.reconcile(INSTANCES, STACKS, boxes, problems).set_index("file")
    assert ledger.loc["G0002/2.2.xml", "outcome"] == Outcome.UNPARSEABLE.value
    assert ledger.loc["G0002/2.2.xml", "detail"].startswith("not well-formed XML: ")
    assert ledger.loc["G0002/2.2.xml", "objects"] == 0 and ledger.loc["A0001/1.1.xml", "objects"] == 2


def test_an_image_size_that_disagrees_is_named():
    boxes = box_rows(one("A0001", "1.1")).assign(image_width=512)
    ledger = an.reconcile(INSTANCES, STACKS, boxes, NO_PROBLEMS)
    assert ledger["outcome"].tolist() == [Outcome.OTHER_SIZE.value]
    assert ledger["detail"].tolist() == ["boxes [[10, 20, 40, 60]] drawn on 512 x 512, image 400 x 512"]
    boxes = boxes.assign(image_width=None, image_height=None).astype(an.BOX_COLUMNS)
    assert an.reconcile(INSTANCES, STACKS, boxes, NO_PROBLEMS)["outcome"].tolist() == [Outcome.MATCHED.value]


def test_an_image_of_several_frames_says_how_many():
    ledger = an.reconcile(INSTANCES, STACKS, box_rows(one("A0001", "1.7")), NO_PROBLEMS)
    detail = "30 frames in one image, and the annotation does not tell which one it is about"
    assert ledger["detail"].tolist() == [detail]
    places = [list(Outcome).index(o) for o in (Outcome.EXCLUDED_STACK, Outcome.SEVERAL_FRAMES, Outcome.UNKNOWN_LABEL)]
    assert places == sorted(places)


OWN = INSTANCES.assign(patient_id=INSTANCES["patient_id"].str.removeprefix("Lung_Dx-").str.replace("A0001", "P001"))
OWN_STACKS = STACKS.assign(patient_id=STACKS["patient_id"].str.removeprefix("Lung_Dx-").str.replace("A0001", "P001"))


def test_a_patient_of_ones_own_needs_no_prefix(tmp_path):
    """Images of P001 and a folder P001 belong together; so does a folder of the collection beside them."""
    for name in ("P001/1.1", "P001/1.2", "G0002/2.1", "Q999/1.1", "P001/broken"):
        path = tmp_path / "Annotation" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        letter = "G" if name[0] == "G" else "A"
        text = an.format_annotation([(letter, SQUARE)], 400, 512)
        path.write_text(text[:50] if "broken" in name else text)
    mixed = pd.concat([OWN[OWN["patient_id"] == "P001"], INSTANCES[INSTANCES["stack_id"] == "s3"]], ignore_index=True)
    boxes, problems = an.read_annotations(tmp_path / "Annotation")
    ledger = an.reconcile(mixed, STACKS, boxes, problems)
    assert dict(zip(ledger["file"], zip(ledger["outcome"], ledger["patient_id"], strict=True), strict=True)) == {
        "P001/1.1.xml": ("matched", "P001"), "P001/1.2.xml": ("matched", "P001"),
        "G0002/2.1.xml": ("matched", "Lung_Dx-G0002"), "P001/broken.xml": ("unparseable", "P001"),
        "Q999/1.1.xml": ("duplicate annotation", "Lung_Dx-Q999")}
    placed = an.place_boxes(boxes, ledger)
    assert placed.dtypes.astype(str).to_dict() == an.BOX_COLUMNS
    assert dict(zip(placed["folder"], placed["patient_id"], strict=True)) == {
        "P001": "P001", "G0002": "Lung_Dx-G0002", "Q999": "Lung_Dx-Q999"}
    assert an.name_patients(problems, mixed)["patient_id"].tolist() == ["P001"]
    rules = an.compare_rules(mixed, ledger)
    assert rules.set_index(["rule", "place"]).loc[("folder and UID", "CT"), "files"] == 3


def test_the_remedy_for_folders_is_one_that_helps():
    """What the message asks for, a folder named like the patient, gives a match."""
    ledger = an.reconcile(OWN, OWN_STACKS, box_rows(one("elsewhere", "9.9")), NO_PROBLEMS)
    with pytest.raises(runs.InputError, match="folders named like G0002, P001 that hold"):
        an.require_match(ledger, OWN_STACKS, "here")
    for folder, uid, letter in (("P001", "1.1", "A"), ("G0002", "2.1", "G")):
        ledger = an.reconcile(OWN, OWN_STACKS, box_rows(one(folder, uid, letter)), NO_PROBLEMS)
        an.require_match(ledger, OWN_STACKS, "here")


def test_an_image_annotated_in_two_folders_counts_where_its_patient_is():
    found = outcomes(one("A0001", "1.1"), one("G0002", "1.1", "G"))
    assert found == {"A0001/1.1.xml": "matched", "G0002/1.1.xml": Outcome.DUPLICATE.value}


def test_two_spellings_of_one_folder_do_not_count_a_slice_twice():
    found = outcomes(one("A0001", "1.1"), one("Lung_Dx-A0001", "1.1"))
    assert found == {"A0001/1.1.xml": "matched", "Lung_Dx-A0001/1.1.xml": Outcome.DUPLICATE.value}


def test_a_name_shared_by_two_folders_without_the_image_is_mentioned():
    ledger = an.reconcile(INSTANCES, STACKS, box_rows(one("A0067", "7.7"), one("A0068", "7.7")), NO_PROBLEMS)
    assert ledger["detail"].tolist() == ["also annotated in A0068", "also annotated in A0067"]


def test_a_file_is_used_whole_or_not_at_all():
    assert outcomes(("A0001", "1.1", [("A", SQUARE), ("Q", SQUARE)])) == {"A0001/1.1.xml": Outcome.UNKNOWN_LABEL.value}


def test_precedence_location_before_content_and_content_in_order():
    bad = ("Q", (5, 5, 5, 9))
    assert outcomes(("A0001", "1.3", [bad]))["A0001/1.3.xml"] == Outcome.SECONDARY_CAPTURE.value
    assert outcomes(("A0001", "1.1", [bad]))["A0001/1.1.xml"] == Outcome.UNKNOWN_LABEL.value
    assert outcomes(("A0001", "1.1", [("G", (5, 5, 5, 999))]))["A0001/1.1.xml"] == Outcome.OTHER_SUBTYPE.value
    assert outcomes(("A0001", "1.1", [("A", (5, 5, 5, 999))]))["A0001/1.1.xml"] == Outcome.NO_AREA.value


def test_an_image_stored_twice_counts_as_its_copy_in_use():
    twice = pd.concat([images(("Lung_Dx-A0001", "1.1", CT, None, None)), INSTANCES], ignore_index=True)
    assert outcomes(one("A0001", "1.1"), instances=twice)["A0001/1.1.xml"] == "matched"


def test_a_class_that_only_starts_like_secondary_capture_is_none():
    other = images(("Lung_Dx-A0001", "1.1", CAPTURE + "7.1", "s1", 0),
                   ("Lung_Dx-A0001", "1.2", CAPTURE + ".2", "s1", 1))
    found = outcomes(one("A0001", "1.1"), one("A0001", "1.2"), instances=other)
    assert list(found.values()) == ["matched", Outcome.SECONDARY_CAPTURE.value]


def test_the_ledger_of_nothing_has_its_columns():
    nothing = an.reconcile(INSTANCES.iloc[:0], STACKS.iloc[:0], box_rows(), NO_PROBLEMS)
    assert nothing.dtypes.astype(str).to_dict() == an.LEDGER_COLUMNS
    assert an.count_outcomes(nothing).sum() == 0 and len(an.count_outcomes(nothing)) == len(Outcome)
    without_images = an.reconcile(INSTANCES.iloc[:0], STACKS.iloc[:0], box_rows(one("A0001", "1.1")), NO_PROBLEMS)
    assert without_images["outcome"].tolist() == [Outcome.NO_IMAGES.value]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["A0001", "G0002", "A0067"]),
                          st.sampled_from(["1.1", "1.2", "1.3", "1.4", "2.1", "9.9"]),
                          st.sampled_from("AagQ"), corners),
                unique_by=lambda f: f[:2], max_size=12), st.randoms())
def test_every_file_has_one_outcome_whatever_the_order_of_the_rows(files, random):
    boxes = box_rows(*[(folder, uid, [(label, box)]) for folder, uid, label, box in files])
    order = list(range(len(boxes)))
    random.shuffle(order)
    ledger = an.reconcile(INSTANCES, STACKS, boxes, NO_PROBLEMS)
    pd.testing.assert_frame_equal(ledger, an.reconcile(INSTANCES, STACKS, boxes.iloc[order], NO_PROBLEMS))
    assert ledger["file"].is_unique and set(ledger["file"]) == set(boxes["file"])
    assert set(ledger["outcome"]) <= {outcome.value for outcome in Outcome}
    usable = ledger[ledger["outcome"] == "matched"]
    assert usable["stack_id"].isin(["s1", "s3"]).all() and usable["slice_index"].notna().all()
    assert not usable.duplicated(["patient_id", "sop_uid"]).any()


def rule_totals(ledger, instances=INSTANCES):
    found = an.compare_rules(instances, ledger)
    assert (found.groupby("rule")["files"].sum() == len(ledger)).all()
    return {rule: dict(zip(part["place"], part["files"], strict=True)) for rule, part in found.groupby("rule")}


def test_the_two_published_rules_differ_by_borrowers_and_by_the_unparseable_file(folder):
    boxes = box_rows(one("A0001", "1.1"), one("A0001", "1.3"), one("G0002", "1.2", "G"), one("G0002", "1.3", "G"),
                     one("A0067", "2.1"), one("A0067", "7.7"), one("A0001", "9.9"))
    broken = an._table([{"file": "A0001/1.4.xml", "folder": "A0001", "patient_id": "Lung_Dx-A0001", "sop_uid": "1.4",
                         "reason": XmlProblem.NOT_XML.value, "detail": "cut off"}], an.PROBLEM_COLUMNS)
    totals = rule_totals(an.reconcile(INSTANCES, STACKS, boxes, broken))
    # G0002/1.2 and G0002/1.3 borrow from A0001, A0067/2.1 from G0002; A0001/1.4 lies on CT and cannot be parsed
    assert totals["folder and UID"] == {"CT": 2, "secondary capture": 1, "patient without images": 2, "nothing": 3}
    assert totals["UID alone"] == {"CT": 3, "secondary capture": 2, "nothing": 2, "unparseable": 1}


def test_rules_on_pet_on_other_images_and_on_nothing():
    instances = INSTANCES.assign(modality=["CT", "PT", "CT", "MR", *["CT"] * 6])
    boxes = box_rows(one("A0001", "1.1"), one("A0001", "1.2"), one("A0001", "1.3"), one("A0001", "1.4"))
    totals = rule_totals(an.reconcile(instances, STACKS, boxes, NO_PROBLEMS), instances)
    assert totals["UID alone"] == totals["folder and UID"] == {
        "CT": 1, "PET": 1, "secondary capture": 1, "another image": 1}
    assert rule_totals(an.reconcile(INSTANCES, STACKS, box_rows(), NO_PROBLEMS)) == {}


def test_every_outcome_but_unparseable_is_reached_by_some_file_here():
    reached = {outcome for _, outcome in ONE_OF_EACH}
    assert reached == set(Outcome) - {Outcome.UNPARSEABLE, Outcome.DUPLICATE, Outcome.OTHER_SIZE}  # tests of their own


def test_no_match_at_all_is_one_line_with_the_folders_expected(folder):
    boxes, problems = an.read_annotations(folder / "G0002")
    ledger = an.reconcile(INSTANCES, STACKS, boxes.assign(sop_uid="8.8"), problems)
    with pytest.raises(runs.InputError, match=r"no matching annotation in here \(1 unparseable, 1 unknown UID\): "
                                              r"expected folders named like A0001, G0002 that hold"):
        an.require_match(ledger, STACKS, "here")
    an.require_match(an.reconcile(INSTANCES, STACKS, box_rows(one("A0001", "1.1")), NO_PROBLEMS), STACKS, "here")


def test_images_without_a_usable_ct_are_named_as_what_they_are(folder):
    ledger = an.reconcile(INSTANCES, STACKS, *an.read_annotations(folder))
    pet = STACKS.assign(modality="PT")
    with pytest.raises(runs.InputError, match=r"no accepted CT volume among the 4 stacks of chapter 1 "
                                              r"\(3 accepted PT, 1 too few slices\)"):
        an.require_match(ledger[ledger["outcome"] != "matched"], pet, "here")


def test_linked_patient_folders_are_followed_and_loops_end(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    for patient in folder.iterdir():
        (tmp_path / "linked" / patient.name).symlink_to(patient)
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked")
    linked, direct = an.read_annotations(tmp_path / "linked")[0], an.read_annotations(folder)[0]
    pd.testing.assert_frame_equal(linked, direct)


def test_an_empty_annotation_path_means_phantoms_only_after_phantoms(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name, asked in (("a", ""), ("b", str(own))):
        runs.begin("01_explore_dicom", tmp_path / name, {}, 0, inputs={"dicom_path": asked}).finish()
    assert an.annotation_folder("", tmp_path / "a") == tmp_path / "a" / "phantom" / "Annotation"
    with pytest.raises(runs.InputError, match="no annotation_path given, but chapter 1 read .*own: name the folder"):
        an.annotation_folder("", tmp_path / "b")
    assert an.annotation_folder(str(own), tmp_path / "b") == own


# ---------------------------------------------------------------- lesions

def rotation(a, b, c):
    (ca, sa), (cb, sb), (cc, sc) = ((np.cos(t), np.sin(t)) for t in (a, b, c))
    return (np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]]) @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
            @ np.array([[1, 0, 0], [0, cc, -sc], [0, sc, cc]]))


def affine_of(angles=(0, 0, 0), spacing=(0.7, 0.7, 5.0), origin=(-170.0, -150.0, -800.0)):
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(*angles) * np.array(spacing)
    matrix[:3, 3] = origin
    return matrix


def stack_table(*rows):
    """rows: (stack_id, series_uid, frame, affine)"""
    return pd.DataFrame([{"stack_id": s, "series_uid": series, "study_uid": "study", "patient_id": "Lung_Dx-A0001",
                          "frame_of_reference_uid": frame, "affine": affine.ravel().tolist(),
                          "rows": 512, "columns": 512, "slices": 60} for s, series, frame, affine in rows])


def placed(*rows, stack_id="s1", subtype="A"):
    """rows: (slice, xmin, ymin, xmax, ymax)"""
    return an._table([{"file": f"A0001/{stack_id}.{i}.xml", "patient_id": "Lung_Dx-A0001", "object_index": 0,
                       "subtype": subtype, "label": subtype, "stack_id": stack_id, "slice_index": k,
                       **dict(zip(an.EDGES, box, strict=True))} for i, (k, *box) in enumerate(rows)], an.BOX_COLUMNS)


STACK = stack_table(("s1", "series", "frame", affine_of()), ("s2", "other", "frame", affine_of()))
place, extent = st.integers(0, 60), st.integers(1, 40)
box_on_slice = st.tuples(st.integers(0, 12), place, place, extent, extent).map(
    lambda b: (b[0], b[1], b[2], b[1] + b[3], b[2] + b[4]))


@settings(max_examples=40, deadline=None)
@given(st.lists(box_on_slice, min_size=1, max_size=14), st.integers(0, 3), st.randoms())
def test_lesions_cover_their_boxes_have_thickness_and_ignore_the_order_of_rows(rows, max_gap, random):
    boxes = placed(*rows)
    lesions, named = an.join_lesions(boxes, STACK, max_gap)
    assert (lesions["k1"] > lesions["k0"]).all() and (lesions["i1"] > lesions["i0"]).all()
    assert lesions["boxes"].sum() == len(boxes) and named["lesion_id"].notna().all()
    hull = named.merge(lesions, on="lesion_id")
    assert ((hull["k0"] <= hull["slice_index"]) & (hull["slice_index"] < hull["k1"])).all()
    for low, high, small, large in (("xmin", "xmax", "i0", "i1"), ("ymin", "ymax", "j0", "j1")):
        assert (hull[small] <= hull[low]).all() and (hull[high] <= hull[large]).all()
    order = list(range(len(boxes)))
    random.shuffle(order)
    again, renamed = an.join_lesions(boxes.iloc[order], STACK, max_gap)
    pd.testing.assert_frame_equal(lesions, again)
    pd.testing.assert_frame_equal(named, renamed.sort_index())


@settings(max_examples=60, deadline=None)
@given(st.lists(box_on_slice, min_size=1, max_size=14), st.integers(0, 3))
def test_a_wider_gap_never_splits_a_lesion(rows, max_gap):
    rows = np.array(rows)
    narrow = an.link_boxes(rows[:, 0], rows[:, 1:], max_gap)
    wide = an.link_boxes(rows[:, 0], rows[:, 1:], max_gap + 1)
    assert pd.Series(wide).groupby(narrow).nunique().max() == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(box_on_slice, min_size=1, max_size=12), st.integers(0, 2), st.sampled_from([0.25, 0.5, 1.0]))
def test_joining_is_what_a_pencil_would_do(rows, max_gap, min_overlap):
    def same(a, b):
        wide = max(0, min(a[3], b[3]) - max(a[1], b[1])) * max(0, min(a[4], b[4]) - max(a[2], b[2]))
        smaller = min((box[3] - box[1]) * (box[4] - box[2]) for box in (a, b))
        return abs(a[0] - b[0]) <= max_gap + 1 and wide / smaller >= min_overlap

    group = list(range(len(rows)))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[:i]):
            if same(a, b):
                group = [group[j] if g == group[i] else g for g in group]
    found = an.link_boxes([row[0] for row in rows], [row[1:] for row in rows], max_gap, min_overlap)
    pairs = {(i, j) for i in range(len(rows)) for j in range(i) if group[i] == group[j]}
    assert pairs == {(i, j) for i in range(len(rows)) for j in range(i) if found[i] == found[j]}


def test_gaps_are_bridged_up_to_the_limit_and_counted():
    rows = [(5, 10, 10, 30, 30), (6, 10, 10, 30, 30), (8, 12, 12, 28, 28)]
    lesions, _ = an.join_lesions(placed(*rows), STACK, max_gap=1)
    assert lesions[["k0", "k1", "boxes", "bridged_slices"]].to_numpy().tolist() == [[5, 9, 3, 1]]
    lesions, _ = an.join_lesions(placed(*rows), STACK, max_gap=0)
    assert lesions[["k0", "k1", "boxes", "bridged_slices"]].to_numpy().tolist() == [[5, 7, 2, 0], [8, 9, 1, 0]]


def test_a_lesion_on_one_slice_is_one_slice_thick():
    lesions, _ = an.join_lesions(placed((7, 10, 10, 30, 30)), STACK)
    lesion = lesions.iloc[0]
    assert (lesion["k0"], lesion["k1"]) == (7, 8)
    assert lesion["z1_mm"] - lesion["z0_mm"] == pytest.approx(5.0)
    assert (lesion["x0_mm"], lesion["z0_mm"]) == (pytest.approx(-170 + 0.7 * 9.5), pytest.approx(-800 + 5 * 6.5))


def test_two_lesions_side_by_side_stay_apart():
    lesions, named = an.join_lesions(placed(*[(k, x, 10, x + 20, 30) for k in range(4) for x in (10, 60)]), STACK)
    assert lesions["boxes"].tolist() == [4, 4] and named["lesion_id"].tolist() == ["s1_0", "s1_1"] * 4


def test_stacks_and_subtypes_are_never_joined():
    boxes = pd.concat([placed((5, 10, 10, 30, 30)), placed((6, 10, 10, 30, 30), stack_id="s2"),
                       placed((6, 10, 10, 30, 30), subtype="G")], ignore_index=True)
    assert len(an.join_lesions(boxes, STACK)[0]) == 3


def test_boxes_without_a_stack_take_no_part():
    homeless = placed((6, 10, 10, 30, 30)).assign(stack_id=None)
    boxes = pd.concat([placed((5, 10, 10, 30, 30)), homeless], ignore_index=True)
    lesions, named = an.join_lesions(boxes.astype(an.BOX_COLUMNS), STACK)
    assert lesions["boxes"].tolist() == [1] and named["lesion_id"].isna().tolist() == [False, True]


def test_rows_that_share_a_name_are_still_two_rows():
    rows = [placed((5, 10, 10, 30, 30)), placed((15, 50, 50, 70, 70)), placed((25, 10, 10, 30, 30))]
    boxes = pd.concat([part.set_axis([7] * len(part)) for part in rows]).astype(an.BOX_COLUMNS)
    lesions, named = an.join_lesions(boxes, STACK)
    apart, _ = an.join_lesions(boxes.reset_index(drop=True), STACK)
    pd.testing.assert_frame_equal(lesions, apart)
    assert named.index.tolist() == [7, 7, 7] and named["lesion_id"].nunique() == 3


def test_no_box_gives_empty_tables_with_all_columns():
    lesions, boxes = an.join_lesions(placed(), STACK)
    assert lesions.dtypes.astype(str).to_dict() == an.LESION_COLUMNS
    assert boxes.dtypes.astype(str).to_dict() == an.BOX_COLUMNS
    assert an.pair_lesions(lesions, STACK).dtypes.astype(str).to_dict() == an.PAIR_COLUMNS
    assert an.describe_lesions(lesions, STACK).empty


@pytest.mark.parametrize(("gap", "overlap"), [(-1, 0.5), (1, 0.0), (1, 1.5)])
def test_a_rule_that_makes_no_sense_is_refused(gap, overlap):
    with pytest.raises(ValueError, match=f"expected max_gap >= 0 and 0 < min_overlap <= 1, got {gap} and {overlap}"):
        an.link_boxes([1], [(0, 0, 1, 1)], gap, overlap)


angle = st.floats(-0.7, 0.7)


@settings(max_examples=30, deadline=None)
@given(st.tuples(angle, angle, angle), st.tuples(*[st.floats(0.3, 10)] * 3), box_on_slice)
def test_voxels_to_mm_and_back_on_oblique_stacks(angles, spacing, row):
    affine = affine_of(angles, spacing)
    lesions, _ = an.join_lesions(placed(row), stack_table(("s1", "series", "frame", affine)))
    lesion = lesions.iloc[0]
    corners = an.box_corners(*lesion[["i0", "j0", "k0", "i1", "j1", "k1"]])
    corners_mm = dicom.to_mm(affine, corners)
    back = dicom.to_voxel(affine, corners_mm)
    np.testing.assert_allclose(back, corners, atol=1e-8)
    k, i0, j0, i1, j1 = row
    np.testing.assert_allclose(back.min(axis=0) + 0.5, (i0, j0, k), atol=1e-8)
    np.testing.assert_allclose(back.max(axis=0) + 0.5, (i1, j1, k + 1), atol=1e-8)
    hull = lesion[an.CORNERS_MM].to_numpy(float)
    assert (corners_mm >= hull[:3] - 1e-9).all() and (corners_mm <= hull[3:] + 1e-9).all()


# ---------------------------------------------------------------- two readings

def test_the_same_lesion_in_two_stacks_is_linked_across_different_grids():
    shifted = affine_of(spacing=(1.4, 1.4, 2.5))
    stacks = stack_table(("s1", "x", "frame", affine_of()), ("s2", "y", "frame", shifted))
    # edge e of the coarse grid is at -170 + 1.4 (e - 0.5) mm, of the fine one at -170 + 0.7 (e - 0.5) mm
    boxes = pd.concat([placed((4, 40, 40, 80, 80), (5, 40, 40, 80, 80), (20, 200, 200, 240, 240)),
                       placed(*[(k, 20, 20, 40, 40) for k in (8, 9, 10, 11)], stack_id="s2")], ignore_index=True)
    lesions, _ = an.join_lesions(boxes, stacks)
    pairs = an.pair_lesions(lesions, stacks)
    assert pairs[["lesion_a", "lesion_b", "kind"]].to_numpy().tolist() == [["s1_0", "s2_0", "reconstruction"]]
    assert 0.7 < pairs["iou"].iloc[0] < 1 and pairs["volume_ratio"].iloc[0] == pytest.approx(1)
    assert pairs["centre_distance_mm"].iloc[0] < 2


@settings(max_examples=30, deadline=None)
@given(st.tuples(angle, angle, angle), st.tuples(st.integers(5, 40), st.integers(5, 40), st.integers(2, 9)))
def test_one_lesion_on_two_oblique_grids_is_one_pair_of_full_agreement(angles, extent):
    # the second grid has twice the spacing in plane, half along z, and starts at the same corner of the same voxel
    wide, high, deep = extent
    fine = affine_of(angles, (0.7, 0.7, 5.0))
    coarse = fine.copy()
    coarse[:3, :3] *= np.array([2, 2, 0.5])
    coarse[:3, 3] = dicom.to_mm(fine, np.array([0.5, 0.5, -0.25]))
    stacks = stack_table(("s1", "x", "frame", fine), ("s2", "y", "frame", coarse))
    boxes = pd.concat([placed(*[(4 + k, 20, 40, 20 + 2 * wide, 40 + 2 * high) for k in range(deep)]),
                       placed(*[(8 + k, 10, 20, 10 + wide, 20 + high) for k in range(2 * deep)], stack_id="s2")],
                      ignore_index=True)
    pairs = an.pair_lesions(an.join_lesions(boxes, stacks)[0], stacks)
    assert pairs["kind"].tolist() == ["reconstruction"]
    assert pairs["iou"].iloc[0] == pytest.approx(1)
    assert pairs["centre_distance_mm"].iloc[0] == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 8)] * 3, *[st.integers(1, 6)] * 3), min_size=2, max_size=2))
def test_iou_is_that_of_counted_voxels(cubes):
    grid = [np.zeros((14, 14, 14), bool) for _ in cubes]
    for room, (x, y, z, a, b, c) in zip(grid, cubes, strict=True):
        room[x:x + a, y:y + b, z:z + c] = True
    corners = [(x, y, z, x + a, y + b, z + c) for x, y, z, a, b, c in cubes]
    counted = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    assert an.iou_3d(corners[:1], corners[1:])[0, 0] == pytest.approx(counted)


def test_only_one_study_and_one_frame_of_reference_are_compared():
    boxes = pd.concat([placed((5, 10, 10, 30, 30), stack_id=s) for s in ("s1", "s2", "s3", "s4")], ignore_index=True)
    stacks = stack_table(*[(s, "x", frame, affine_of()) for s, frame in
                           (("s1", "f"), ("s2", "f"), ("s3", "g"), ("s4", None))])
    pairs = an.pair_lesions(an.join_lesions(boxes, stacks)[0], stacks)
    assert pairs[["lesion_a", "lesion_b", "kind"]].to_numpy().tolist() == [["s1_0", "s2_0", "phase"]]
    assert pairs["iou"].tolist() == [pytest.approx(1.0)]


def acquired(**stacks):
    """Instances of stacks: name=(acquisition numbers, times)"""
    rows = [(name, number, when, "20090507") for name, (numbers, times) in stacks.items()
            for number, when in zip(numbers, times, strict=True)]
    frame = pd.DataFrame(rows, columns=["stack_id", "acquisition_number", "acquisition_time", "study_date"])
    return frame.astype({"acquisition_number": "Int64", "acquisition_time": "str"})


@pytest.mark.parametrize("a, b, across, within", [
    (([1, 1], ["101500", "101500"]), ([2, 2], ["101530", "101530"]), "phase", "phase"),
    (([3, 3], ["101500", "101500"]), ([3, 3], ["101500", "101500"]), "reconstruction", "phase"),
    (([1, 1], ["101500", "101500"]), ([1, 1], ["101530", "101530.5"]), "phase", "phase"),
    (([1, 2], ["101500", "101510"]), ([1, 2], ["101500.5", "101509"]), "reconstruction", "phase"),  # step and shoot
    (([None], ["190047"]), ([None], ["190047"]), "reconstruction", "phase"),
    (([1], [None]), ([2], [None]), "phase", "phase"), (([None], [None]), ([None], [None]), "reconstruction", "phase")])
def test_pairs_of_two_acquisitions_are_phases_whatever_series_they_are_in(a, b, across, within):
    boxes = pd.concat([placed((5, 10, 10, 30, 30), stack_id=s) for s in ("s1", "s2")], ignore_index=True)
    for series, expected in (("xy", across), ("xx", within)):
        stacks = stack_table(("s1", series[0], "f", affine_of()), ("s2", series[1], "f", affine_of()))
        lesions = an.join_lesions(boxes, stacks)[0]
        assert an.pair_lesions(lesions, stacks, acquired(s1=a, s2=b))["kind"].tolist() == [expected]
        same = an.pair_lesions(lesions, stacks, acquired(s1=a, s2=b).iloc[::-1])
        assert same["kind"].tolist() == [expected]


def test_two_kernels_of_one_acquisition_in_one_series_are_reconstructions():
    boxes = pd.concat([placed((5, 10, 10, 30, 30), stack_id=s) for s in ("s1", "s2")], ignore_index=True)
    stacks = stack_table(("s1", "x", "f", affine_of()), ("s2", "x", "f", affine_of())).assign(kernel=["B30f", "B70f"])
    pairs = an.pair_lesions(an.join_lesions(boxes, stacks)[0], stacks, acquired(s1=([1], ["1"]), s2=([1], ["1"])))
    assert pairs["kind"].tolist() == ["reconstruction"]


def test_iou_by_hand():
    cube = (0, 0, 0, 2, 2, 2)
    iou = an.iou_3d([cube], [cube, (1, 0, 0, 3, 2, 2), (2, 0, 0, 4, 2, 2)])
    assert iou.tolist() == [[1.0, pytest.approx(1 / 3), 0.0]]


def test_size_and_place_by_hand():
    lesions, _ = an.join_lesions(placed((29, 246, 246, 266, 286), (30, 246, 246, 266, 286)), STACK)
    found = an.describe_lesions(lesions, STACK).iloc[0]
    assert found["extent_mm"] == pytest.approx(28) and found["height_mm"] == pytest.approx(10)
    assert found["aside_mm"] == pytest.approx(0) and found["level"] == pytest.approx(0.5)


# ---------------------------------------------------------------- the clinical table

HEADERS = ["No.", "NewPatientID", "Sex", "Age", "weight (kg)", "T-Stage", "N-Stage", "\uff2d-Stage",
           "Histopathological grading", "Smoking History"]


def spreadsheet(path, *rows, headers=HEADERS):
    book = openpyxl.Workbook()
    for row in (headers, *rows):
        book.active.append(row)
    book.save(path)
    return path


def test_the_clinical_table_is_cleaned_and_what_is_not_understood_is_noted(tmp_path):
    path = spreadsheet(tmp_path / "c.xlsx", [1, "A0002", "F", None, 60.5, 3, 0, 3, " G3", 0],
                       [2, "A0001", "M", 58, 65, "2b", 3, "1b", "G2-G3", 1],
                       [3, "A0003", "f", "old", None, "is", "9", 0, None, None])
    found = an.read_clinical(path)
    assert found.dtypes.astype(str).to_dict() == an.CLINICAL_COLUMNS
    assert found["patient_id"].tolist() == ["Lung_Dx-A0001", "Lung_Dx-A0002", "Lung_Dx-A0003"]
    first, second, third = found.to_dict("records")
    assert (first["t"], first["n"], first["m"], first["grade"], first["smoking"]) == ("2b", "3", "1b", "G2-3", 1)
    assert (second["t"], second["grade"], second["weight_kg"]) == ("3", "G3", 60.5)
    assert pd.isna(second["m"]) and pd.isna(second["age_years"]) and second["notes"] == "m '3' is no known value"
    assert third["sex"] == "F" and pd.isna(third["smoking"])
    assert third["notes"] == "age_years 'old' is no known value; n '9' is no known value"


def test_the_clinical_table_knows_patients_by_their_own_names(tmp_path):
    row = ["M", 58, 65, "2b", 3, "1b", "G2", 1]
    path = spreadsheet(tmp_path / "c.xlsx", [1, "P001", *row], [2, "A0001", *row])
    assert an.read_clinical(path, {"P001", "Lung_Dx-A0001"})["patient_id"].tolist() == ["Lung_Dx-A0001", "P001"]


@pytest.mark.parametrize(("spelled", "grade"), [
    ("G1-2", "G1-2"), ("G1-G2", "G1-2"), (" G1", "G1"), ("g3", "G3"), ("\uff27\uff12", "G2")])
def test_spellings_of_grade(spelled, grade):
    assert an._clean("grade", spelled) == (grade, "")


def test_a_patient_listed_twice_is_kept_once_and_noted(tmp_path):
    row = [1, "A0001", "M", 58, 65, "2b", 3, "1b", "G2", 1]
    found = an.read_clinical(spreadsheet(tmp_path / "c.xlsx", row, [2, "A0001", "F", *row[3:]]))
    assert found["sex"].tolist() == ["M"] and "listed more than once" in found["notes"].iloc[0]


def test_a_file_that_is_no_clinical_table_is_one_line(tmp_path):
    text = tmp_path / "c.xlsx"
    text.write_text("age,sex")
    with pytest.raises(runs.InputError, match="cannot be read as .xlsx"):
        an.read_clinical(text)
    with pytest.raises(runs.InputError, match="has no column age, smoking history"):
        lacking = [header for header in HEADERS if header not in ("Age", "Smoking History")]
        an.read_clinical(spreadsheet(tmp_path / "d.xlsx", headers=lacking))
    with pytest.raises(runs.InputError, match="nowhere.xlsx"):
        an.read_clinical(tmp_path / "nowhere.xlsx")


@pytest.mark.parametrize("corner", ["A1048576", "XFD1", "GS2"])
def test_a_clinical_table_with_a_cell_in_a_far_corner_is_one_line(tmp_path, corner):
    book = openpyxl.Workbook()
    book.active["A1"], book.active[corner] = "NewPatientID", 1
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(runs.InputError, match=r"t\.xlsx cannot be read .* more than 20,000 rows or 200 columns"):
        an.read_clinical(tmp_path / "t.xlsx")


def test_a_clinical_table_that_unpacks_to_much_is_one_line(tmp_path, monkeypatch):
    openpyxl.Workbook().save(tmp_path / "t.xlsx")
    monkeypatch.setattr(an, "MOST_SHEET_BYTES", 1000)
    with pytest.raises(runs.InputError, match=r"t\.xlsx cannot be read .* allowed are 1,000"):
        an.read_clinical(tmp_path / "t.xlsx")


def test_the_clinical_table_is_found_in_the_folder_or_beside_it(tmp_path):
    folder = tmp_path / "Annotation"
    folder.mkdir()
    assert an.find_clinical(folder) is None
    beside = spreadsheet(tmp_path / "statistics-clinical-2020.xlsx")
    assert an.find_clinical(folder) == beside
    assert an.find_clinical(folder) != spreadsheet(folder / "other.xlsx")


def test_conflicts_between_table_and_headers():
    same = {"sex": "M", "age_years": 60.0, "weight_kg": 70.0, "notes": ""}
    clinical = an._table([{"patient_id": patient, **same} for patient in "abcd"], an.CLINICAL_COLUMNS)
    headers = pd.DataFrame([("a", "M", 61, 70.9), ("b", "F", 60, None), ("c", None, 50, 80.0), ("c", "M", 60, 75.0),
                            ("e", "F", 1, 1.0)], columns=["patient_id", "sex", "age_years", "weight_kg"])
    found = an.clinical_conflicts(clinical, headers.astype({"age_years": "Int64"}))
    assert found.to_numpy().tolist() == [["b", "sex", "M", "F"], ["c", "weight_kg", "70", "75, 80"]]
    assert an.clinical_conflicts(clinical.iloc[:0], headers).empty


# ---------------------------------------------------------------- phantoms, where the truth is known

@pytest.fixture(scope="module")
def phantom_tables(phantom_dir):
    instances, _ = dicom.index_dicom(phantom_dir / "Lung-PET-CT-Dx", workers=1)
    stacks, instances = dicom.build_stacks(instances)
    boxes, problems = an.read_annotations(phantom_dir / "Annotation")
    ledger = an.reconcile(instances, stacks, boxes, problems)
    lesions, boxes = an.join_lesions(an.place_boxes(boxes, ledger), stacks)
    return instances, stacks, boxes, problems, ledger, lesions


def test_every_phantom_file_is_accounted_for(phantom_tables, phantom_dir):
    _, stacks, boxes, _, ledger, _ = phantom_tables
    root = phantom_dir / "Annotation"
    on_disk = {path.relative_to(root).as_posix() for path in root.rglob("*.xml")}
    assert set(ledger["file"]) == on_disk and ledger["file"].is_unique
    assert an.count_outcomes(ledger).sum() == len(on_disk)
    accepted = stacks.loc[stacks["status"] == "accepted", "stack_id"]
    assert set(boxes["stack_id"].dropna()) <= set(accepted)


QUIRK_OF = {Outcome.UNPARSEABLE: "malformed_xml", Outcome.NO_IMAGES: "annotation_without_images",
            Outcome.UNKNOWN_UID: "unmatched_xml", Outcome.DUPLICATE: "xml_in_two_folders",
            Outcome.UNKNOWN_LABEL: "unknown_label_id|unknown_label_q", Outcome.OTHER_SUBTYPE: "label_against_patient",
            Outcome.NO_AREA: "zero_area_box", Outcome.OUTSIDE_IMAGE: "box_outside_image"}


@pytest.mark.parametrize("outcome", QUIRK_OF)
def test_a_quirk_put_in_comes_out_as_its_outcome(phantom_tables, phantom_dir, outcome):
    quirks = pd.read_parquet(phantom_dir / "truth" / "quirks.parquet")
    files = quirks.loc[quirks["quirk"].isin(QUIRK_OF[outcome].split("|")) & quirks["file"].str.endswith(".xml"), "file"]
    ledger = phantom_tables[4].set_index("file")
    put_in = {file.removeprefix("Annotation/") for file in files}
    assert put_in and set(ledger.index[ledger["outcome"] == outcome.value]) <= put_in
    # a file may lie where an earlier question already ends its way, on an excluded stack for instance
    order = [each.value for each in Outcome]
    assert ledger.loc[sorted(put_in), "outcome"].map(order.index).max() <= order.index(outcome.value)


def test_joined_lesions_are_the_true_ones(phantom_tables, phantom_dir):
    _, stacks, _, _, _, lesions = phantom_tables
    truth = pd.read_parquet(phantom_dir / "truth" / "lesions.parquet")
    known = lesions.merge(stacks[["stack_id", "series_uid"]], on="stack_id")
    assert len(known)
    for _, found in known.groupby("stack_id"):
        true = truth[truth["series_uid"] == found["series_uid"].iloc[0]]
        assert len(found) == len(true[true["phase"] == true["phase"].min()])
        assert an.iou_3d(found[an.CORNERS_MM], true[an.CORNERS_MM]).max(axis=1).min() > 0.2


# ---------------------------------------------------------------- the real annotations

def test_the_real_annotations_agree_with_a_recount_by_regular_expression(real_data):
    boxes, problems = an.read_annotations(real_data / "Annotation")
    texts = {path: path.read_text() for path in (real_data / "Annotation").rglob("*.xml")}
    assert boxes["file"].nunique() + problems["sop_uid"].notna().sum() == len(texts)
    names = [name for text in texts.values() for name in re.findall(r"<name>\s*(.*?)\s*</name>", text)]
    assert boxes["label"].value_counts().to_dict() == pd.Series(names).value_counts().to_dict()
    for tag in an.EDGES:
        numbers = [int(n) for text in texts.values() for n in re.findall(rf"<{tag}>(\d+)</{tag}>", text)]
        assert sorted(boxes[tag]) == sorted(numbers)
    assert set(boxes["folder"]) == {path.parent.name for path in texts}


def test_real_folders_share_names_and_a_folder_lends_none_of_its_images(real_data):
    boxes, problems = an.read_annotations(real_data / "Annotation")
    shared = boxes.groupby("sop_uid")["folder"].agg(set)
    shared = shared[shared.map(len) > 1]
    assert len(shared) and all(folders == {"A0003", "A0004"} for folders in shared)
    uid = shared.index[0]
    instances = images(("Lung_Dx-A0003", uid, CT, "s1", 0)).assign(rows=512, columns=512)
    ledger = an.reconcile(instances, STACKS, boxes, problems).set_index("file")
    assert ledger.loc[f"A0003/{uid}.xml", "outcome"] == "matched"
    assert ledger.loc[f"A0004/{uid}.xml", "outcome"] == Outcome.DUPLICATE.value
    assert (ledger["outcome"] == "matched").sum() == 1


def test_the_real_clinical_table(real_data):
    clinical = an.read_clinical(an.find_clinical(real_data / "Annotation"))
    assert len(clinical) == 355 and clinical["patient_id"].is_unique
    assert set(clinical["grade"].dropna()) == {"G1", "G1-2", "G2", "G2-3", "G3"}
    assert clinical["grade"].notna().sum() == 145
    assert clinical["m"].isna().sum() == 3 and clinical["notes"].str.startswith("m ").sum() == 3
    assert clinical["age_years"].notna().sum() == 354 and clinical["weight_kg"].notna().sum() == 351
    assert clinical["sex"].value_counts().to_dict() == {"M": 190, "F": 165}


def test_the_real_clinical_table_cell_by_cell(real_data):
    path = an.find_clinical(real_data / "Annotation")
    header, *rows = openpyxl.load_workbook(path, read_only=True).active.iter_rows(values_only=True)
    clinical = an.read_clinical(path).set_index("patient_id")
    assert "\uff2d-Stage" in header
    for row in (dict(zip(header, row, strict=True)) for row in rows):
        mine = clinical.loc[f"Lung_Dx-{row['NewPatientID']}"]
        for name, column in (("Sex", "sex"), ("Age", "age_years"), ("weight (kg)", "weight_kg"),
                             ("Smoking History", "smoking"), ("T-Stage", "t"), ("N-Stage", "n")):
            kept = None if pd.isna(mine[column]) else mine[column]
            given = row[name] if column not in ("t", "n") else str(row[name])
            assert kept == given, (row["NewPatientID"], name)
        grade = row["Histopathological grading"]
        assert pd.isna(mine["grade"]) == (grade is None) and (grade is None or grade.strip()[:2] == mine["grade"][:2])


def test_the_real_ledger_is_the_one_that_the_chapter_explains(real_data):
    instances, _ = dicom.index_dicom(real_data / "Lung-PET-CT-Dx", workers=1)
    stacks, instances = dicom.build_stacks(instances, root=real_data / "Lung-PET-CT-Dx")
    ledger = an.reconcile(instances, stacks, *an.read_annotations(real_data / "Annotation"))
    found = ledger.groupby(["folder", "outcome"]).size().to_dict()
    assert found == {
        ("A0001", "matched"): 20, ("A0003", "unknown UID"): 5, ("A0004", "patient without images"): 14,
        ("A0005", "patient without images"): 2, ("A0006", "matched"): 10, ("A0006", "unknown UID"): 7,
        ("A0007", "patient without images"): 6, ("B0019", "patient without images"): 31,
        ("B0020", "patient without images"): 21, ("E0003", "matched"): 79, ("G0001", "patient without images"): 10}
    per_stack = ledger[ledger["outcome"] == "matched"].groupby(["folder", "stack_id"]).size()
    assert {folder: sorted(part) for folder, part in per_stack.groupby("folder")} == {
        "A0001": [9, 11], "A0006": [5, 5], "E0003": [19, 20, 20, 20]}


def test_the_real_pairs_are_phases_unless_they_share_an_acquisition(real_data):
    """E0003: three acquisitions in one series, the third once more in another series with another kernel."""
    instances, _ = dicom.index_dicom(real_data / "Lung-PET-CT-Dx", workers=1)
    stacks, instances = dicom.build_stacks(instances, root=real_data / "Lung-PET-CT-Dx")
    boxes, problems = an.read_annotations(real_data / "Annotation")
    ledger = an.reconcile(instances, stacks, boxes, problems)
    lesions, _ = an.join_lesions(an.place_boxes(boxes, ledger), stacks)
    pairs = an.pair_lesions(lesions, stacks, instances)
    number = instances.groupby("stack_id")["acquisition_number"].first()
    of = lesions.set_index("lesion_id")["stack_id"].map(number)
    for pair in pairs.itertuples():
        same = pd.isna(of[pair.lesion_a]) or of[pair.lesion_a] == of[pair.lesion_b]
        assert pair.kind == ("reconstruction" if same else "phase")
    kinds = pairs[pairs["patient_id"] == "Lung_Dx-E0003"]["kind"].value_counts().to_dict()
    assert kinds.get("reconstruction") == 1 and kinds.get("phase") == 5
    assert set(pairs[pairs["patient_id"] != "Lung_Dx-E0003"]["kind"]) == {"reconstruction"}


# ---------------------------------------------------------------- what the chapter draws

def chapter_cells(*ids):
    """Source of cells of the notebook."""
    nbs = Path(__file__).resolve().parents[1] / "nbs"
    cells = json.loads((nbs / "02_parse_annotations.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for wanted in ids for cell in cells if cell["id"] == wanted]


def slice_at(folder, number, position, **changes):
    """A CT slice of 8 x 8 pixels of patient P001."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CT, changes.pop("uid", f"1.2.3.{number}")
    image.PatientID, image.StudyInstanceUID, image.SeriesInstanceUID = "P001", "1.2.1", changes.pop("series", "1.2.2")
    image.Modality, image.InstanceNumber = "CT", number
    image.ImagePositionPatient, image.ImageOrientationPatient = [float(x) for x in position], [1, 0, 0, 0, 1, 0]
    image.PixelSpacing, image.Rows, image.Columns, image.SamplesPerPixel = [1, 1], 8, 8, 1
    image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    image.PixelData = np.full((8, 8), number, np.uint16).tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in changes.items():
        setattr(image, keyword, value)
    folder.mkdir(parents=True, exist_ok=True)
    image.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return folder / f"{number:03}.dcm"


def world_of(root, files):
    """The names that cells of the chapter see, for images below a folder and annotations (uid, box)."""
    instances, _ = dicom.index_dicom(root, workers=1)
    stacks, instances = dicom.build_stacks(instances, 4, root)
    boxes = box_rows(*[("P001", uid, [("A", box)]) for uid, box in files]).assign(image_width=8, image_height=8)
    ledger = an.reconcile(instances, stacks, boxes.astype(an.BOX_COLUMNS), NO_PROBLEMS)
    boxes = an.place_boxes(boxes, ledger)
    lesions, boxes = an.join_lesions(boxes, stacks)
    return vars(an) | {"instances": instances, "stacks": stacks, "boxes": boxes, "ledger": ledger, "lesions": lesions,
                       "dicom_root": root, "plt": plt, "plots": plots, "dicom": dicom, "seed": 0}


@pytest.fixture
def no_window(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


def test_the_gallery_draws_a_middle_frame_and_says_what_it_cannot_draw(tmp_path, no_window):
    for k in range(3):
        slice_at(tmp_path / "short", k, (0, 0, k), series="1.2.4", uid=f"1.2.4.{k}")
    path = slice_at(tmp_path / "frames", 1, (0, 0, 0), uid="1.2.5.1", series="1.2.5", NumberOfFrames=5,
                    PixelData=np.repeat(np.arange(5, dtype=np.uint16), 64).tobytes())
    world = world_of(tmp_path, [("1.2.4.1", (1, 1, 5, 5)), ("1.2.5.1", (1, 1, 5, 5))])
    sources = chapter_cells("2dd7e1dc", "d880f8b6")
    exec(sources[0], world)
    frames = world["instances"].set_index("sop_uid").loc["1.2.5.1"]
    assert (world["picture_of"](frames) == 2).all()
    short = world["ledger"].set_index("sop_uid").loc["1.2.4.1"].to_dict() | {"sop_uid": "1.2.4.1"}
    ax = plt.subplots()[1]
    world["draw_odd"](short, ax)
    assert len(ax.images) == 1 and not ax.texts
    world["instances"] = world["instances"].assign(transfer_syntax_uid="1.2.840.10008.1.2.4.100")     # a film
    ax = plt.subplots()[1]
    world["draw_odd"](short, ax)
    assert not ax.images and "is not known to pydicom" in ax.texts[0].get_text().replace("\n", " ")
    path.unlink()
    exec(sources[1], world)


def test_the_contact_sheet_reads_what_was_accepted_and_leaves_a_tile_empty_where_it_cannot(tmp_path, no_window, capsys):
    for k in range(10):                                    # two neighbours alone would look like a leaning stack
        slice_at(tmp_path / "a", k, (0.02 * (k % 2), 0, k))
    world = world_of(tmp_path, [("1.2.3.5", (1, 1, 5, 5)), ("1.2.3.6", (1, 1, 5, 5))])
    assert world["stacks"]["status"].tolist() == ["accepted"] and len(world["lesions"]) == 1
    sources = chapter_cells("146bfd32", "1661493e")
    exec(sources[0], world)
    tile, box = world["tile_or_empty"](world["lesions"].iloc[0].to_dict())
    assert (tile == 6 - 1024).all() and np.diff(box).tolist()[0] == 0
    (tmp_path / "a" / "006.dcm").unlink()
    tile, _ = world["tile_or_empty"](world["lesions"].iloc[0].to_dict())
    assert np.isnan(tile).all() and "has an empty tile" in (said := capsys.readouterr().out) and "006.dcm" in said
    exec(sources[1], world)


def test_figures_of_lesions_pass_over_a_stack_that_cannot_be_read(tmp_path, no_window, capsys):
    for series in ("1.2.4", "1.2.5"):
        for k in range(10):
            slice_at(tmp_path / series, k, (0, 0, k), series=series, uid=f"{series}.{k}", FrameOfReferenceUID="1.2.9")
    world = world_of(tmp_path, [(f"{series}.{k}", (1, 1, 5, 5)) for series in ("1.2.4", "1.2.5") for k in (4, 5)])
    assert len(world["lesions"]) == 2
    sources = chapter_cells("596d0a99", "1b3d575d", "f6e11885", "1f354816", "21ef35c8", "39a3975c")
    world["display"] = print
    for source in sources:
        exec(source, world)
    assert world["pairs"]["kind"].tolist() == ["reconstruction"] and "skipped" not in capsys.readouterr().out
    shown = world["shown"]["stack_id"]
    path = world["instances"].set_index("stack_id")["path"].loc[shown].iloc[3]
    (tmp_path / path).unlink()
    for source in sources:
        exec(source, world)
    assert world["shown"]["stack_id"] != shown and "skipped 1 that cannot be read" in capsys.readouterr().out
    for path in tmp_path.rglob("*.dcm"):
        path.unlink()
    for source in sources:
        exec(source, world)
    assert world["example"] is None and world["found"] is None


@pytest.mark.parametrize("link", ["A0000", "Zxxxx", "B7", "m", "0"])
def test_a_folder_keeps_its_own_name_whatever_links_to_it(tmp_path, link):
    (tmp_path / "A0001").mkdir()
    (tmp_path / "A0001" / "1.2.3.1.xml").write_text(an.format_annotation([("A", (1, 2, 3, 4))]))
    (tmp_path / link).symlink_to(tmp_path / "A0001")
    boxes, problems = an.read_annotations(tmp_path)
    assert boxes["folder"].tolist() == ["A0001"]
    assert problems[["folder", "reason"]].to_numpy().tolist() == [[link, "folder already read"]]


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "A0009").mkdir()
    problems = an.read_annotations(tmp_path / "A0009")[1]
    assert problems[["file", "folder", "patient_id"]].to_numpy().tolist() == [["A0009", "A0009", "Lung_Dx-A0009"]]


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, text in members.items():
            packed.writestr(name.replace("__", "/").replace("_", "."), text)
    return stream.getvalue()


@pytest.mark.parametrize("content", [
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),          # what Excel writes with a password
    zipped(xl__workbook_bin="x"), zipped(content_xml="<a/>"), b"", b"PK\x03\x04" + bytes(50)])
def test_a_clinical_table_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "t.xlsx").write_bytes(content)
    with pytest.raises(runs.InputError, match="cannot be read as .xlsx"):
        an.read_clinical(tmp_path / "t.xlsx")


def test_a_damaged_sheet_is_one_line(tmp_path):
    pd.DataFrame({name: ["1"] for name in an.CLINICAL_HEADERS}).to_excel(tmp_path / "whole.xlsx", index=False)
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "cut.xlsx", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[: 200 if "sheet1" in name else None])
    with pytest.raises(runs.InputError, match="cannot be read as .xlsx"):
        an.read_clinical(tmp_path / "cut.xlsx")


def test_two_columns_that_mean_one_field_are_refused(tmp_path):
    sheet = pd.DataFrame({name: ["1"] for name in an.CLINICAL_HEADERS}).assign(**{"\uff2d-Stage": ["0"]})
    sheet.to_excel(tmp_path / "t.xlsx", index=False)
    with pytest.raises(runs.InputError, match="two columns that mean m: remove one"):
        an.read_clinical(tmp_path / "t.xlsx")


# ---------------------------------------------------------------- repeats of a slice

def test_what_is_drawn_on_an_equal_repeat_counts_for_the_slice_it_repeats():
    """Image 1.6 has a stack and no index: chapter 1 dropped it, for it was 1.2 again."""
    placed = INSTANCES.assign(repeats_slice=(INSTANCES["sop_uid"] == "1.6").map({True: 1.0}))
    boxes = box_rows(one("A0001", "1.6"), one("A0001", "1.1"))
    ledger = an.reconcile(placed, STACKS, boxes, NO_PROBLEMS).set_index("sop_uid")
    assert ledger.loc["1.6", ["outcome", "stack_id", "slice_index"]].tolist() == ["matched", "s1", 1]
    assert ledger.loc["1.6", "detail"] == "its image is an equal repeat of slice 1, and was dropped"
    assert ledger.loc["1.1", "detail"] == ""
    found = an.place_boxes(boxes, ledger.reset_index()).set_index("sop_uid")
    assert found["slice_index"].to_dict() == {"1.6": 1, "1.1": 0}


def test_a_repeat_in_an_excluded_stack_is_excluded():
    placed = INSTANCES.assign(repeats_slice=(INSTANCES["sop_uid"] == "1.8").map({True: 0.0}), frames=1)
    assert outcomes(one("A0001", "1.8"), instances=placed) == {"A0001/1.8.xml": Outcome.EXCLUDED_STACK.value}


def test_a_dropped_image_that_repeats_nothing_is_no_slice():
    assert outcomes(one("A0001", "1.6")) == {"A0001/1.6.xml": Outcome.NO_SLICE.value}


# ---------------------------------------------------------------- what a careless change would have turned round

TWO_STACKS = pd.DataFrame({"stack_id": ["s1", "s2"], "series_uid": ["x", "y"], "frame_of_reference_uid": "f"})


def drawn(*rows):
    """(lesion, stack, study, corners) of one patient each"""
    return pd.DataFrame([{"lesion_id": lesion, "stack_id": stack, "study_uid": study, "patient_id": "P", "subtype": "A",
                          **dict(zip(an.CORNERS_MM, corners, strict=True))} for lesion, stack, study, corners in rows])


def test_pairs_are_of_one_study_and_each_others_best():
    here, aside = (0, 0, 0, 9, 9, 9), (5, 0, 0, 14, 9, 9)
    assert an.pair_lesions(drawn(("a", "s1", "u", here), ("b", "s2", "v", here)), TWO_STACKS).empty
    pairs = an.pair_lesions(drawn(("a", "s1", "u", here), ("c", "s1", "u", aside), ("b", "s2", "u", here)), TWO_STACKS)
    assert pairs["lesion_a"].tolist() == ["a"]


def test_pairs_are_of_one_patient_and_of_one_known_frame():
    lesions = drawn(("a", "s1", "u", (0, 0, 0, 10, 10, 10)), ("b", "s2", "u", (2, 0, 0, 12, 10, 10)))
    pairs = an.pair_lesions(lesions, TWO_STACKS)
    assert np.isclose(pairs["iou"].item(), 8 / 12) and pairs["centre_distance_mm"].item() == 2
    assert an.pair_lesions(lesions.assign(patient_id=["P", "Q"]), TWO_STACKS).empty
    assert an.pair_lesions(lesions, TWO_STACKS.assign(frame_of_reference_uid=None)).empty
    assert an.pair_lesions(lesions, TWO_STACKS.assign(frame_of_reference_uid=["1", "2"])).empty


def test_of_two_lesions_on_one_stack_the_better_partner_is_the_pair():
    lesions = drawn(("p", "s1", "u", (0, 0, 0, 10, 10, 10)), ("q", "s1", "u", (4, 0, 0, 14, 10, 10)),
                    ("r", "s2", "u", (4, 0, 0, 14, 10, 10)))
    pairs = an.pair_lesions(lesions, TWO_STACKS)
    assert pairs[["lesion_a", "lesion_b"]].to_numpy().tolist() == [["q", "r"]]


def test_a_volume_ratio_is_of_the_smaller_to_the_larger():
    whole, half = ("a", "s1", "u", (0, 0, 0, 9, 9, 8)), ("b", "s2", "u", (0, 0, 0, 9, 9, 4))
    pairs = an.pair_lesions(drawn(whole, half), TWO_STACKS)
    assert pairs["volume_ratio"].tolist() == [0.5]


def test_a_place_in_a_stack_that_is_neither_square_nor_centred():
    stacks = pd.DataFrame({"stack_id": ["s1"], "affine": [np.diag([1.0, 1, 2, 1]).ravel().tolist()], "rows": [10],
                           "columns": [40], "slices": [10]})
    row = an.describe_lesions(drawn(("a", "s1", "u", (29.5, 0, 13, 31.5, 2, 15))), stacks).iloc[0]
    assert row[["aside_mm", "level"]].tolist() == [pytest.approx(11), pytest.approx(0.75)]


def test_phases_are_apart_whichever_was_first():
    def stack(**told):
        return pd.Series({"began": "", "ended": "", "acquisition": np.nan, "series_uid": "x", "kernel": "k"} | told)

    late, early = stack(began="5", ended="6"), stack(began="1", ended="2", series_uid="y")
    assert an._kind(late, early) == an._kind(early, late) == "phase"


def test_a_stack_began_on_a_day_and_is_of_one_acquisition_or_of_none():
    dated = pd.DataFrame({"stack_id": ["s1"], "acquisition_date": ["20200101"], "study_date": [None],
                          "acquisition_time": ["1200"]})
    assert an._acquired(TWO_STACKS, dated)["began"][0] == "202001011200"
    two = pd.DataFrame({"stack_id": ["s1"] * 2, "acquisition_number": [1, 2], "acquisition_time": ["1", "2"]})
    assert np.isnan(an._acquired(TWO_STACKS, two)["acquisition"][0])


def test_two_frames_are_several():
    ledger = an.reconcile(INSTANCES.assign(frames=[30 if uid == "1.8" else 2 if uid == "1.7" else 1
                                                   for uid in INSTANCES["sop_uid"]]),
                          STACKS, box_rows(one("A0001", "1.7")), NO_PROBLEMS)
    assert ledger["outcome"].tolist() == [Outcome.SEVERAL_FRAMES.value]


def test_the_finest_stages_are_kept():
    assert an._clean("m", "1c") == ("1c", "") and an._clean("t", "1mi") == ("1mi", "")


def test_a_good_file_beside_a_broken_one_counts():
    broken = an._table([{"file": "A0001/1.1.xml", "folder": "A0001", "patient_id": "Lung_Dx-A0001", "sop_uid": "1.1",
                         "reason": "not well-formed XML", "detail": "x"}], an.PROBLEM_COLUMNS)
    assert outcomes(one("Lung_Dx-A0001", "1.1"), problems=broken) == {
        "A0001/1.1.xml": "unparseable", "Lung_Dx-A0001/1.1.xml": "matched"}
