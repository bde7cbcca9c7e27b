"""COCO, detection lists, instance maps and NIfTI: what goes out comes back, what is odd is refused in words."""

import gzip
import json
import re
import shutil
import struct
import subprocess
import warnings
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lungct import annotations as an
from lungct import dicom, runs, volumes
from lungct import exchange as ex
from lungct.runs import InputError

KEYS = ["sop_uid", "patient_id", "stack_id", "slice_index", "subtype", "lesion_id", *an.EDGES]


def slices(count=4, rows=512, columns=400):
    return pd.DataFrame({"path": [f"p/1-{k}.dcm" for k in range(count)], "sop_uid": [f"1.{k}" for k in range(count)],
                         "patient_id": "Lung_Dx-A0001", "stack_id": "s1", "slice_index": range(count),
                         "rows": rows, "columns": columns})


def boxes_of(*rows):
    """rows: (slice, subtype, xmin, ymin, xmax, ymax)"""
    return pd.DataFrame([{"sop_uid": f"1.{k}", "patient_id": "Lung_Dx-A0001", "stack_id": "s1", "slice_index": k,
                          "subtype": subtype, "lesion_id": f"s1_{n}", **dict(zip(an.EDGES, box, strict=True))}
                         for n, (k, subtype, *box) in enumerate(rows)])


def through_json(document):
    return json.loads(json.dumps(document, allow_nan=False))


# ---------------------------------------------------------------- COCO

box = st.tuples(st.integers(0, 3), st.sampled_from("ABEG"), st.integers(0, 300), st.integers(0, 400),
                st.integers(1, 100), st.integers(1, 112)).map(lambda b: (*b[:4], b[2] + b[4], b[3] + b[5]))


@settings(max_examples=50, deadline=None)
@given(st.lists(box, min_size=1, max_size=8))
def test_boxes_through_coco_and_back(rows):
    boxes = boxes_of(*rows)
    document = through_json(ex.to_coco(boxes, slices()))
    assert ex.check_coco(document) == []
    back, images = ex.from_coco(document)
    order = ["slice_index", *an.EDGES, "lesion_id"]
    pd.testing.assert_frame_equal(back[KEYS].sort_values(order, ignore_index=True),
                                  boxes[KEYS].sort_values(order, ignore_index=True), check_dtype=False)
    assert set(images["sop_uid"]) == set(boxes["sop_uid"])


def test_coco_by_hand():
    document = ex.to_coco(boxes_of((2, "G", 10, 20, 30, 60)), slices())
    assert document["images"] == [{"id": 1, "file_name": "p/1-2.dcm", "width": 400, "height": 512, "sop_uid": "1.2",
                                   "patient_id": "Lung_Dx-A0001", "stack_id": "s1", "slice_index": 2}]
    assert document["annotations"] == [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [10, 20, 20, 40], "area": 800,
                                        "iscrowd": 0, "lesion_id": "s1_0"}]
    assert [row["id"] for row in document["categories"]] == [1, 2, 3, 4]


def test_fractions_of_pixels_survive_coco():
    """Boxes that came from another tool's COCO may have them."""
    boxes = boxes_of((2, "G", 10.5, 20.0, 30.75, 60.0))
    (told,) = through_json(ex.to_coco(boxes, slices()))["annotations"]
    assert told["bbox"] == [10.5, 20, 20.25, 40] and told["area"] == 810
    back, _ = ex.from_coco(ex.to_coco(boxes, slices()))
    assert back[an.EDGES].to_numpy().tolist() == [[10.5, 20, 30.75, 60]]


def test_pycocotools_reads_it(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    (tmp_path / "boxes.json").write_text(json.dumps(ex.to_coco(boxes_of((0, "A", 1, 2, 5, 9), (1, "B", 1, 2, 3, 4)),
                                                               slices())))
    found = coco.COCO(tmp_path / "boxes.json")
    assert len(found.getImgIds()) == 2 and found.getAnnIds(catIds=[1]) == [1]
    assert found.annToMask(found.loadAnns(1)[0] | {"segmentation": [[1, 2, 5, 2, 5, 9, 1, 9]]}).sum() == 4 * 7


def test_an_image_without_a_box_is_listed_only_when_called_negative():
    boxes, images = boxes_of((1, "A", 1, 2, 5, 9)), slices()
    assert len(ex.to_coco(boxes, images)["images"]) == 1
    document = ex.to_coco(boxes, images, negatives=images)
    assert len(document["images"]) == 4 and len(document["annotations"]) == 1
    assert document["annotations"][0]["image_id"] == 2


def test_boxes_without_a_stack_stay_at_home_and_boxes_without_an_image_are_an_error():
    boxes = boxes_of((1, "A", 1, 2, 5, 9), (2, "A", 1, 2, 5, 9))
    assert len(ex.to_coco(boxes.assign(stack_id=[None, "s1"]), slices())["annotations"]) == 1
    with pytest.raises(InputError, match="1 boxes lie on images that the table of instances does not hold"):
        ex.to_coco(boxes, slices(2))


def test_the_same_uid_of_two_patients_is_two_images():
    other = boxes_of((1, "A", 3, 3, 5, 9)).assign(patient_id="Lung_Dx-A0002")
    boxes = pd.concat([boxes_of((1, "A", 1, 2, 5, 9)), other])
    images = pd.concat([slices(), slices().assign(patient_id="Lung_Dx-A0002")])
    document = ex.to_coco(boxes, images)
    assert [row["image_id"] for row in document["annotations"]] == [1, 2]


def coco(**changes):
    return through_json(ex.to_coco(boxes_of((0, "A", 1, 2, 5, 9), (1, "B", 1, 2, 3, 4)), slices())) | changes


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda d: d.pop("images"), "images is not a list of objects"),
    (lambda d: d["annotations"].append(3), "annotations is not a list of objects"),
    (lambda d: d["annotations"][0].pop("bbox"), r"annotations\[0\] lacks bbox"),
    (lambda d: d["images"][1].update(id=1), "images repeats the id 1"),
    (lambda d: d["annotations"][1].update(image_id=7), "annotation 2 names image 7, which is not listed"),
    (lambda d: d["annotations"][1].update(category_id=9), "annotation 2 names category 9, which is not listed"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "expected four numbers"),
    (lambda d: d["annotations"][0].update(bbox="1234"), "expected four numbers"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, True, 4]), "expected four numbers"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, float("inf"), 4]), "expected four numbers"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]), "is not inside its image of 400 x 512 pixels"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 4]), "is not inside its image"),
    (lambda d: d["annotations"][0].update(bbox=[399, 2, 2, 4]), "is not inside its image"),
    (lambda d: d["annotations"][0].update(bbox=[0, 0, 10**400, 4]), "expected four numbers"),
    (lambda d: d["annotations"][0].update(bbox=b"1234"), "expected four numbers"),
    (lambda d: d["annotations"][0].update(image_id=[1]), r"annotation 1 names image \[1\], which is not listed"),
    (lambda d: d["annotations"][0].update(category_id={}), r"annotation 1 names category {}, which is not listed"),
    (lambda d: d["images"][1].update(id=[1]), r"images\[1\]: id is \[1\], expected a number or a text"),
    (lambda d: d["images"][1].update(id=True), r"images\[1\]: id is True, expected a number or a text"),
    (lambda d: d["images"][1].update(id=1.0), "images repeats the id 1"),
    (lambda d: d["categories"][0].update(id=None), r"categories\[0\]: id is None, expected a number or a text"),
    (lambda d: d["annotations"][0].update(id=float("nan")), r"annotations\[0\]: id is nan, expected a number"),
    (lambda d: d["images"][0].update(width="10"), r"images\[0\]: width x height is 10 x 512, expected two num"),
    (lambda d: d["images"][0].update(height=0), r"images\[0\]: width x height is 400 x 0, expected two num"),
    (lambda d: d["images"][0].update(height=None), r"width x height is 400 x None, expected two numbers above 0"),
])
def test_a_foreign_document_is_refused_with_what_is_wrong(spoil, words):
    document = coco()
    spoil(document)
    with pytest.raises(InputError, match=words):
        ex.from_coco(document)


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                        lambda inner: (st.lists(inner, max_size=4)
                                       | st.dictionaries(st.text(max_size=3), inner, max_size=2)), max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_stands_in_a_document_is_read_or_refused_in_words(data):
    document = coco()
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(["images", "categories", "annotations"]))
        row = data.draw(st.sampled_from(document[name]))
        row[data.draw(st.sampled_from(sorted(row)))] = data.draw(anything)
    if complaints := ex.check_coco(document):
        assert all(isinstance(complaint, str) for complaint in complaints)
        with pytest.raises(InputError, match="no usable COCO document"):
            ex.from_coco(document)
    else:
        boxes, images = ex.from_coco(document)
        assert len(boxes) == 2 and len(images) == 2


@given(anything)
def test_anything_is_checked_in_words(document):
    assert all(isinstance(complaint, str) for complaint in ex.check_coco(document))


def test_numbers_and_texts_may_both_be_ids():
    document = coco()
    document["images"][0]["id"] = document["annotations"][0]["image_id"] = "first"
    boxes, _ = ex.from_coco(document)
    assert boxes["sop_uid"].tolist() == ["1.0", "1.1"]


def test_boxes_of_a_category_that_is_no_subtype_are_refused_by_every_writer():
    document = coco()
    document["categories"][0]["name"] = "nodule"
    boxes, _ = ex.from_coco(document)
    words = "1 of 2 rows have a subtype that is not one of A, B, E, G, such as none:"
    with pytest.raises(InputError, match=words):
        ex.to_coco(boxes, slices())
    spoilt = lesions(subtype=["A", "nodule", "B"])
    with pytest.raises(InputError, match="1 of 3 rows have a subtype that is not one of A, B, E, G, such as nodule"):
        ex.to_detection_list(spoilt)
    with pytest.raises(InputError, match="such as none: name it"):
        ex.to_instances(voxel_lesions((0, 4, 0, 4, 0, 2)).assign(subtype=np.nan), (5, 10, 10))


def test_a_text_is_no_document():
    assert ex.check_coco([]) == ["expected an object with images, categories, annotations, got list"]


def test_a_foreign_document_without_our_fields_is_read():
    document = {"images": [{"id": "x", "file_name": "1.png", "width": 10, "height": 10}],
                "categories": [{"id": 0, "name": "g"}, {"id": 5, "name": "nodule"}],
                "annotations": [{"id": 1, "image_id": "x", "category_id": 0, "bbox": [0.5, 1.0, 2.25, 3]},
                                {"id": 2, "image_id": "x", "category_id": 5, "bbox": [0, 0, 10, 10]}]}
    boxes, images = ex.from_coco(document)
    assert boxes["subtype"].fillna("none").tolist() == ["G", "none"] and boxes["label"].tolist() == ["g", "nodule"]
    assert boxes.loc[0, an.EDGES].tolist() == [0.5, 1.0, 2.75, 4.0]
    assert images[["path", "columns", "rows"]].to_numpy().tolist() == [["1.png", 10, 10]]
    empty = document | {"annotations": []}
    assert ex.from_coco(empty)[0].empty


# ---------------------------------------------------------------- the detection list

corner, size = st.floats(-900, 900), st.floats(0.1, 200)
brick = st.tuples(corner, corner, corner, size, size, size).map(
    lambda b: (*b[:3], b[0] + b[3], b[1] + b[4], b[2] + b[5]))


@settings(max_examples=60, deadline=None)
@given(st.lists(brick, min_size=1, max_size=5), st.sampled_from(ex.BOX_MODES), st.sampled_from(sorted(ex.WORLDS)))
def test_lesions_through_the_list_and_back(bricks, mode, world):
    lesions = pd.DataFrame(bricks, columns=an.CORNERS_MM).assign(
        stack_id="s1", subtype="E", lesion_id=[f"s1_{k}" for k in range(len(bricks))])
    back = ex.from_detection_list(through_json(ex.to_detection_list(lesions, mode=mode, world=world)))
    np.testing.assert_allclose(back[an.CORNERS_MM], lesions[an.CORNERS_MM], atol=1e-9)
    assert (back["subtype"] == "E").all() and (back["label"] == 2).all()


def lesions(**changes):
    return pd.DataFrame({"lesion_id": ["s1_0", "s1_1", "s2_0"], "stack_id": ["s1", "s1", "s2"],
                         "subtype": ["A", "G", "B"], "x0_mm": [0., 50, 0],
                         "y0_mm": [0., 0, 0], "z0_mm": [-10., -10, 0], "x1_mm": [10., 60, 8],
                         "y1_mm": [20., 10, 8], "z1_mm": [-5., -5, 8]} | changes)


def test_the_list_by_hand():
    document = ex.to_detection_list(lesions(), {"s1": "training", "s2": "validation"}, file_name="x/{stack_id}.nii.gz")
    assert document["training"] == [{"image": "x/s1.nii.gz", "label": [0, 3],
                                     "box": [[5, 10, -7.5, 10, 20, 5], [55, 5, -7.5, 10, 10, 5]]}]
    assert document["validation"][0]["label"] == [1]
    assert document["box_mode"] == "cccwhd" and document["world"] == "LPS mm"
    assert ex.from_detection_list(document)["role"].tolist() == ["training", "training", "validation"]


def test_ras_turns_x_and_y_and_keeps_low_before_high():
    found = ex.corners_to_mode([[10, 20, 30, 11, 22, 33]], "xyzxyz", "RAS")
    assert found.tolist() == [[-11, -22, 30, -10, -20, 33]]
    assert ex.corners_from_mode(found, "xyzxyz", "RAS").tolist() == [[10, 20, 30, 11, 22, 33]]


@pytest.mark.parametrize(("change", "words"), [
    ({"mode": "xxyyzz"}, "expected a box mode of cccwhd, xyzxyz and a world of LPS, RAS, got 'xxyyzz' and 'LPS'"),
    ({"world": "scanner"}, "got 'cccwhd' and 'scanner'"),
    ({"roles": {"s1": "training"}}, "stack s2 has lesions and the role None"),
])
def test_a_request_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        ex.to_detection_list(lesions(), **change)


def test_a_lesion_without_extent_is_refused():
    with pytest.raises(InputError, match="a lesion has no extent in mm"):
        ex.to_detection_list(lesions(x1_mm=[10., np.nan, 8]))
    with pytest.raises(InputError, match="a lesion has no extent in mm"):
        ex.to_detection_list(lesions(z1_mm=[-10., -5, 8]))


ITEM = {"image": "a.nii.gz", "box": [[0, 0, 0, 4, 4, 4]], "label": [0]}


@pytest.mark.parametrize(("document", "asked", "words"), [
    ([], {}, "expected an object with lists of images, got list"),
    ({"training": [ITEM]}, {}, "the file does not say the mode of its boxes"),
    ({"training": [ITEM]}, {"mode": "cccwhd"}, "the file does not say the world of its boxes"),
    ({"box_mode": "xyzxyz", "training": [ITEM]}, {"mode": "cccwhd", "world": "LPS"}, "asked to read boxes in mode ccc"),
    ({"training": [{"image": "a"}]}, {"mode": "cccwhd", "world": "LPS"}, "an entry lacks image, box or label"),
    ({"training": [ITEM | {"label": [0, 1]}]}, {"mode": "cccwhd", "world": "LPS"}, "as many labels as boxes"),
    ({"training": [ITEM | {"box": [[0, 0, 0, 4, 4]]}]}, {"mode": "cccwhd", "world": "LPS"}, "six finite numbers a box"),
    ({"training": [ITEM | {"box": [[0, 0, 0, 4, -4, 4]]}]}, {"mode": "cccwhd", "world": "LPS"}, "a box has no size"),
    ({"training": [ITEM | {"box": [[5, 0, 0, 4, 4, 4]]}]}, {"mode": "xyzxyz", "world": "LPS"}, "was it written"),
    ({"training": [ITEM | {"label": 0}]}, {"mode": "cccwhd", "world": "LPS"}, "a.nii.gz: expected as many labels"),
    ({"training": [ITEM | {"label": "0"}]}, {"mode": "cccwhd", "world": "LPS"}, "a.nii.gz: expected as many labels"),
    ({"training": [ITEM | {"box": 4}]}, {"mode": "cccwhd", "world": "LPS"}, "a.nii.gz: expected as many labels"),
    ({"training": [ITEM | {"box": None}]}, {"mode": "cccwhd", "world": "LPS"}, "a.nii.gz: expected as many labels"),
    ({"training": [ITEM], "labels": ["A"]}, {"mode": "cccwhd", "world": "LPS"}, "labels is no object: .'A'."),
    ({"training": [ITEM], "box_mode": ["x"], "world": "LPS"}, {}, "expected a box mode of cccwhd"),
])
def test_a_foreign_list_is_refused_in_words(document, asked, words):
    with pytest.raises(InputError, match=words):
        ex.from_detection_list(document, **asked)


def test_an_empty_list_and_an_image_without_boxes_give_an_empty_table():
    assert ex.from_detection_list({"training": []}, "cccwhd", "LPS").columns.tolist() == ex.LESION_FIELDS
    assert ex.from_detection_list({"training": [ITEM | {"box": [], "label": []}]}, "cccwhd", "LPS").empty


def test_monai_itself_means_the_same_by_its_modes():
    box_utils = pytest.importorskip("monai.data.box_utils")
    corners = np.array([[-160.0, -140, -770, -146, -119, -760]])
    for mode in ex.BOX_MODES:
        ours = ex.corners_to_mode(corners, mode)
        assert np.allclose(box_utils.convert_box_mode(ours, src_mode=mode, dst_mode="xyzxyz"), corners)


# ---------------------------------------------------------------- instance maps

VOXELS = ["i0", "i1", "j0", "j1", "k0", "k1"]


def voxel_lesions(*rows):
    return pd.DataFrame([dict(zip(VOXELS, row, strict=True)) | {"lesion_id": f"s1_{n}", "subtype": "AG"[n % 2]}
                         for n, row in enumerate(rows)])


def test_instances_there_and_back():
    lesions = voxel_lesions((2, 5, 1, 4, 0, 2), (6, 9, 6, 9, 3, 4))
    found, document = ex.to_instances(lesions, (5, 10, 12))
    assert found.dtype == np.uint8 and document == {"instances": {"1": 0, "2": 3}}
    assert (found == 1).sum() == 3 * 3 * 2 and (found == 2).sum() == 9 and found[3, 6, 8] == 2
    back = ex.from_instances(found, through_json(document))
    assert back[VOXELS].to_numpy().tolist() == lesions[VOXELS].to_numpy().tolist()
    assert back["subtype"].tolist() == ["A", "G"]


def test_a_small_lesion_on_a_large_one_survives_and_a_changed_box_is_refused():
    inside = voxel_lesions((4, 6, 4, 6, 1, 2), (0, 10, 0, 10, 0, 4))
    assert (ex.to_instances(inside, (5, 10, 10))[0] == 1).sum() == 4
    cutting = voxel_lesions((0, 4, 0, 4, 0, 4), (3, 7, 0, 4, 0, 4))
    with pytest.raises(InputError, match="one of their boxes would change"):
        ex.to_instances(cutting, (5, 10, 10))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="reaches outside an array of shape"):
        ex.to_instances(voxel_lesions((0, 4, 0, 4, 0, 6)), (5, 10, 10))
    found, document = ex.to_instances(voxel_lesions((0, 4, 0, 4, 0, 2)), (5, 10, 10))
    with pytest.raises(InputError, match=r"the map holds instances \[1\], its JSON names \[1, 2\]"):
        ex.from_instances(found, {"instances": document["instances"] | {"2": 0}})


# ---------------------------------------------------------------- NIfTI


def affine_of(directions, spacing_xyz, origin):
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions) * np.asarray(spacing_xyz, float)
    affine[:3, 3] = origin
    return affine


@st.composite
def grids(draw):
    """(shape, affine) of any direction, left-handed ones included, no longer than half a metre along an axis."""
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-180, 180)] * 3)), degrees=True).as_matrix()
    turn[:, 2] *= draw(st.sampled_from([1, -1]))
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    return shape, affine_of(turn, spacing, draw(st.tuples(*[st.floats(-500, 500)] * 3)))


def corners_mm(affine, shape_zyx):
    last = np.array(shape_zyx[::-1]) - 1
    return dicom.to_mm(affine, np.array(list(np.ndindex(2, 2, 2))) * last)


def simpleitk_affine(image):
    directions = np.reshape(image.GetDirection(), (3, 3))
    return affine_of(directions, image.GetSpacing(), image.GetOrigin())


def noise(shape, dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


NIFTI_MM = 1e-4  # NIfTI keeps its matrix in 32 bits: within half a metre that is a ten-thousandth of a millimetre


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grid=grids())
def test_any_grid_comes_back_from_nifti_and_is_where_other_readers_see_it(tmp_path, grid):
    shape, affine = grid
    values = noise(shape)
    path = ex.write_nifti(values, affine, tmp_path / "x.nii.gz")
    back, place = ex.read_nifti(path)
    assert np.array_equal(back, values) and back.dtype == values.dtype
    np.testing.assert_allclose(corners_mm(place, shape), corners_mm(affine, shape), atol=NIFTI_MM, rtol=0)
    theirs = nib.load(path)
    assert np.array_equal(np.asarray(theirs.dataobj), values.transpose(2, 1, 0))
    ras = corners_mm(theirs.affine, shape) * [-1, -1, 1]
    np.testing.assert_allclose(ras, corners_mm(affine, shape), atol=NIFTI_MM, rtol=0)
    itk = sitk.ReadImage(str(path))
    assert np.array_equal(sitk.GetArrayFromImage(itk), values)
    np.testing.assert_allclose(corners_mm(simpleitk_affine(itk), shape), corners_mm(affine, shape), atol=2e-4, rtol=0)


@pytest.mark.parametrize("turn", [0, 0.05, 0.3, 20])
def test_a_large_scan_is_where_simpleitk_sees_it(tmp_path, turn):
    """Close to the usual position the quaternion is coarse: readers must find the matrix."""
    shape, directions = (100, 512, 512), Rotation.from_euler("zx", [turn, turn / 2], degrees=True).as_matrix()
    affine = affine_of(directions, (0.9, 0.9, 4.0), (-230, -210, -400))
    path = ex.write_nifti(np.zeros(shape, np.uint8), affine, tmp_path / "x.nii.gz")
    itk = simpleitk_affine(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(corners_mm(itk, shape), corners_mm(affine, shape), atol=NIFTI_MM, rtol=0)
    np.testing.assert_allclose(corners_mm(ex.read_nifti(path)[1], shape), corners_mm(affine, shape), atol=NIFTI_MM)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [*ex.NIFTI_TYPES, "bool"])
def test_numbers_are_stored_as_they_are(tmp_path, dtype, suffix):
    values = (noise((3, 4, 5)) > 99).astype(bool) if dtype == "bool" else noise((3, 4, 5), dtype)
    path = ex.write_nifti(values, np.eye(4), tmp_path / f"x{suffix}")
    header = gzip.decompress(path.read_bytes())[:352] if suffix == ".nii.gz" else path.read_bytes()[:352]
    assert struct.unpack("<2f", header[112:120]) == (1.0, 0.0)                     # scl_slope, scl_inter
    assert struct.unpack("<2h", header[252:256]) == (1, 1) and header[123] == 2    # qform, sform: scanner; mm
    back, affine = ex.read_nifti(path)
    assert back.dtype == (np.uint8 if dtype == "bool" else np.dtype(dtype)) and np.array_equal(back, values)
    assert np.array_equal(affine, np.eye(4))


def test_the_same_array_gives_the_same_bytes_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    first = ex.write_nifti(noise((3, 4, 5)), np.eye(4), tmp_path / "first.nii.gz").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert ex.write_nifti(noise((3, 4, 5)), np.eye(4), tmp_path / "second.nii.gz").read_bytes() == first
    assert first[4:8] == b"\0" * 4                                                 # the hour it was packed

    def broken(self, stream):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", broken)
    for path in (tmp_path / "first.nii.gz", tmp_path / "third.nii"):
        with pytest.raises(OSError, match="disk full"):
            ex.write_nifti(noise((3, 4, 5), seed=1), np.eye(4), path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.nii.gz", "second.nii.gz"]
    assert (tmp_path / "first.nii.gz").read_bytes() == first


LEANING = affine_of(np.eye(3), (1, 1, 5), (0, 0, 0)) + np.array([[0] * 4, [0, 0, 0.04, 0], [0] * 4, [0] * 4])


@pytest.mark.parametrize(("values", "affine", "name", "words"), [
    (noise((3, 4)), np.eye(4), "x.nii", r"expected an array \(z, y, x\) of .*, got int16 of shape \(3, 4\)"),
    (noise((3, 4, 5), np.int64), np.eye(4), "x.nii", "got int64 of shape"),
    (noise((3, 0, 5)), np.eye(4), "x.nii", r"shape \(3, 0, 5\)"),
    (noise((3, 4, 5)), np.eye(3), "x.nii", "expected a 4x4 affine"),
    (noise((3, 4, 5)), np.diag([1, 1, 0, 1]), "x.nii", "that can be inverted"),
    (noise((3, 4, 5)), np.diag([1, np.nan, 1, 1]), "x.nii", "that can be inverted"),
    (noise((60, 4, 5)), LEANING, "x.nii", r"corners would move 1\.\d\d mm.*straighten=True"),
    (noise((3, 4, 5)), np.eye(4), "x.nrrd", r"x.nrrd ends neither in .nii nor in .nii.gz"),
])
def test_what_nifti_cannot_say_is_not_written(tmp_path, values, affine, name, words):
    with pytest.raises(InputError, match=words):
        ex.write_nifti(values, affine, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_leaning_stack_is_not_where_simpleitk_would_see_it(tmp_path):
    """Why leaning stacks are refused: the quaternion drops the lean, and SimpleITK then takes the quaternion."""
    image = nib.Nifti1Image(np.zeros((5, 4, 60), np.int16), ex.flip_world(LEANING))
    image.set_sform(ex.flip_world(LEANING), 1)
    image.set_qform(ex.flip_world(LEANING), 1)
    nib.save(image, tmp_path / "x.nii")
    off = corners_mm(simpleitk_affine(sitk.ReadImage(str(tmp_path / "x.nii"))), (60, 4, 5)) - corners_mm(
        LEANING, (60, 4, 5))
    assert abs(off).max() > 1


def theirs(tmp_path, values_xyz=None, affine=None, codes=(1, 1), kind=nib.Nifti1Image, name="theirs.nii.gz", **header):
    values_xyz, affine = noise((5, 4, 3)) if values_xyz is None else values_xyz, np.eye(4) if affine is None else affine
    image = kind(values_xyz, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    for field, value in header.items():
        image.header[field] = value
    nib.save(image, tmp_path / name)
    return tmp_path / name


def test_scale_and_offset_are_honoured(tmp_path):
    values, _ = ex.read_nifti(patched(tmp_path, 112, struct.pack("<2f", 2.0, -1024.5)))
    assert np.array_equal(values.T, 2 * noise((5, 4, 3)) - 1024.5)


def patched(folder, offset, data):
    """A plain file of 5 x 4 x 3 voxels whose header says something else from one byte on."""
    path = theirs(folder, name="theirs.nii")
    whole = bytearray(path.read_bytes())
    whole[offset:offset + len(data)] = data
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
def test_kinds_of_nifti_and_byte_orders_are_read(tmp_path, kind):
    name = "x.img" if kind is nib.Nifti1Pair else "x.nii"
    assert np.array_equal(ex.read_nifti(theirs(tmp_path, kind=kind, name=name))[0].T, noise((5, 4, 3)))
    big = nib.Nifti1Image(noise((5, 4, 3)), np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    values, _ = ex.read_nifti(tmp_path / "big.nii")
    assert values.dtype.isnative and values.flags.c_contiguous and np.array_equal(values.T, noise((5, 4, 3)))


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 1), (4, 0)])
def test_either_form_states_the_place_in_whatever_unit(tmp_path, codes):
    affine = affine_of(np.diag([-1, 1, 1]), (0.002, 0.002, 0.005), (0.1, -0.2, 0.3))
    _, place = ex.read_nifti(theirs(tmp_path, affine=affine, codes=codes, xyzt_units=1))
    np.testing.assert_allclose(place, np.diag([-1000, -1000, 1000, 1]) @ affine, atol=NIFTI_MM)


def test_one_volume_with_a_fourth_axis_of_one_is_one_volume(tmp_path):
    assert ex.read_nifti(theirs(tmp_path, noise((5, 4, 3, 1))))[0].shape == (3, 4, 5)


COLOURS = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: theirs(p, codes=(0, 0)), r"theirs.nii.gz does not state where its voxels are \(sform and qform"),
    (lambda p: theirs(p, noise((5, 4, 3, 2))), r"theirs.nii.gz: expected one volume of numbers, got .*\(5, 4, 3, 2\)"),
    (lambda p: theirs(p, noise((5, 4))), r"expected one volume of numbers"),
    (lambda p: theirs(p, COLOURS), r"theirs.nii.gz: expected one volume of numbers"),
    (lambda p: theirs(p, noise((5, 4, 3), np.complex64)), "expected one volume of numbers, got complex64"),
    (lambda p: theirs(p, qoffset_x=7.5), r"states two places, up to 7.5 mm apart"),
    (lambda p: patched(p, 312, struct.pack("<4f", 0, 0, 0, 1)), "theirs.nii has an affine that cannot be inverted"),
    (lambda p: patched(p, 312, struct.pack("<4f", 0, 0, np.nan, 1)), "an affine that cannot be inverted"),
    (lambda p: patched(p, 268, struct.pack("<f", np.nan)), "states two places, up to nan mm apart"),
    (lambda p: theirs(p, xyzt_units=7), "theirs.nii.gz cannot be read as NIfTI"),
    (lambda p: another_format(p), "x.mgz cannot be read as NIfTI: it is MGHImage"),
    (lambda p: p / "nowhere.nii", "nowhere.nii cannot be read as NIfTI"),
    (lambda p: spoilt(p, lambda data: b"no image at all"), "theirs.nii.gz cannot be read as NIfTI"),
    (lambda p: spoilt(p, lambda data: b""), "cannot be read as NIfTI"),
    (lambda p: spoilt(p, lambda data: data[:-30]), "cannot be read as NIfTI"),
    (lambda p: spoilt(p, lambda data: data[:-8] + b"0123" + data[-4:]), "cannot be read as NIfTI: CRC check failed"),
    (lambda p: spoilt(p, lambda data: gzip.compress(gzip.decompress(data)[:-30])), "cannot be read as NIfTI"),
])
def test_a_doubtful_nifti_is_refused_in_one_line(tmp_path, make, words):
    with pytest.raises(InputError, match=words) as caught:
        ex.read_nifti(make(tmp_path))
    assert "\n" not in str(caught.value)


def another_format(folder):
    nib.save(nib.MGHImage(noise((5, 4, 3), np.uint8), np.eye(4)), folder / "x.mgz")
    return folder / "x.mgz"


def spoilt(folder, how):
    path = theirs(folder)
    path.write_bytes(how(path.read_bytes()))
    return path


# ---------------------------------------------------------------- masks of other tools


def toy_stack(affine, shape=(6, 5, 4)):
    return dicom.Stack("toy", noise(shape), affine, "CT", (), 0)


OBLIQUE = affine_of(Rotation.from_euler("zyx", [15, -8, 5], degrees=True).as_matrix(), (0.7, 0.8, 5), (-160, -140, 40))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_mask_saved_with_its_axes_in_another_order_or_direction_comes_back_exactly(tmp_path, order):
    drawn = noise((6, 5, 4), np.uint8)
    for signs in product((1, -1), repeat=3):
        path = ex.write_nifti(drawn, OBLIQUE, tmp_path / "x.nii")
        image = nib.load(path, mmap=False).as_reoriented(np.column_stack([order, signs]))
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
        assert np.array_equal(ex.read_mask(path, toy_stack(OBLIQUE)), drawn)


@pytest.mark.parametrize("wanted", ["LPS", "RAS", "PIR", "SLA"])
def test_a_mask_that_simpleitk_turned_and_saved_comes_back(tmp_path, wanted):
    drawn, path = noise((6, 5, 4), np.uint8), tmp_path / "x.nii.gz"
    image = sitk.ReadImage(str(ex.write_nifti(drawn, OBLIQUE, path)))
    sitk.WriteImage(sitk.DICOMOrient(image, wanted), str(path))
    assert np.array_equal(ex.read_mask(path, toy_stack(OBLIQUE)), drawn)
    floats = sitk.Cast(sitk.DICOMOrient(image, wanted), sitk.sitkFloat64)
    sitk.WriteImage(floats, str(path))
    assert ex.read_mask(path, toy_stack(OBLIQUE)).dtype == np.uint8


def changed(affine, **changes):
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ changes.get("shift", (0, 0, 0))
    affine[:3, :3] = Rotation.from_euler("z", changes.get("turn", 0), degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, :3] *= changes.get("stretch", 1)
    return affine


@pytest.mark.parametrize(("shape", "affine", "words"), [
    ((6, 5, 5), OBLIQUE, "x.nii is not on the grid it should be on: it has 5 x 5 x 6 voxels, expected 4 x 5 x 6"),
    ((6, 5, 4), changed(OBLIQUE, stretch=1.1), r"its voxels are 0.77 x 0.88 x 5.5 mm, expected 0.7 x 0.8 x 5"),
    ((6, 5, 4), changed(OBLIQUE, shift=(0, 0, 0.5)), r"it lies elsewhere: its corners are up to 2.50 mm from ours"),
    ((6, 5, 4), changed(OBLIQUE, shift=(-1, 0, 0)), r"it lies elsewhere: its corners are up to 0.70 mm from ours"),
    ((6, 5, 4), changed(OBLIQUE, turn=10), r"it lies elsewhere"),
    ((6, 5, 4), changed(OBLIQUE, turn=50), r"expected"),
])
def test_a_mask_on_another_grid_is_refused_with_the_reason(tmp_path, shape, affine, words):
    path = ex.write_nifti(noise(shape, np.uint8), affine, tmp_path / "x.nii")
    with pytest.raises(InputError, match=words):
        ex.read_mask(path, toy_stack(OBLIQUE))


def test_what_a_tool_rounds_is_forgiven_and_many_numbers_fit(tmp_path):
    drawn = noise((6, 5, 4), np.uint16) * 300
    path = ex.write_nifti(drawn, changed(OBLIQUE, shift=(0.03, 0, -0.03)), tmp_path / "x.nii")
    found = ex.read_mask(path, toy_stack(OBLIQUE))
    assert found.dtype == np.uint16 and np.array_equal(found, drawn)


@pytest.mark.parametrize("kind", ["list", "array"])
def test_a_mask_needs_something_with_a_grid(tmp_path, kind):
    path = ex.write_nifti(noise((6, 5, 4), np.uint8), OBLIQUE, tmp_path / "x.nii")
    other = noise((6, 5, 4)) if kind == "array" else []
    with pytest.raises(InputError, match="expected a stack of dicom.read_stack or a stored volume, got (ndarray|list)"):
        ex.read_mask(path, other)
    with pytest.raises(InputError, match="expected a stack of dicom.read_stack, got (ndarray|list)"):
        ex.write_stack(other, tmp_path / "y.nii")


@pytest.mark.parametrize("value", [-1, 0.5, 70000, np.nan, np.inf])
def test_a_mask_holds_whole_numbers(tmp_path, value):
    drawn = np.zeros((6, 5, 4), np.float32)
    drawn[1, 2, 3] = value
    with pytest.raises(InputError, match="x.nii is no mask: 1 voxels are no whole number from 0 to 65535, such as"):
        ex.read_mask(ex.write_nifti(drawn, OBLIQUE, tmp_path / "x.nii"), toy_stack(OBLIQUE))


# ---------------------------------------------------------------- scans, and the folder for nnU-Net


def scan_by_simpleitk(stack, instances, root):
    """The same slices, read from DICOM by SimpleITK."""
    paths = dict(zip(instances["sop_uid"], instances["path"], strict=True))
    return sitk.ReadImage([str(root / paths[uid]) for uid in stack.sop_uids])


def assert_same_place_as_dicom(stack, instances, root, folder):
    itk = sitk.ReadImage(str(ex.write_stack(stack, folder / "scan.nii")))
    direct = scan_by_simpleitk(stack, instances, root)
    assert itk.GetSize() == direct.GetSize()
    shape = stack.values_zyx.shape
    np.testing.assert_allclose(corners_mm(simpleitk_affine(itk), shape), corners_mm(stack.affine, shape), atol=NIFTI_MM)
    # SimpleITK takes the step between slices from the first two: over a whole scan that rounds more
    np.testing.assert_allclose(corners_mm(simpleitk_affine(itk), shape), corners_mm(simpleitk_affine(direct), shape),
                               atol=0.01)
    found = sitk.GetArrayFromImage(itk)
    assert found.dtype == stack.values_zyx.dtype and np.array_equal(found, stack.values_zyx)
    return found, sitk.GetArrayFromImage(direct)


@pytest.fixture(scope="module")
def phantom_tables(phantom_dir):
    root = phantom_dir / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    return root, stacks, instances


def test_phantom_scans_lie_where_simpleitk_sees_their_dicom(phantom_tables, tmp_path):
    root, stacks, instances = phantom_tables
    seen = []
    for row in stacks[stacks["status"] == "accepted"].itertuples():
        mine = instances[instances["stack_id"] == row.stack_id]
        stack = dicom.read_stack(mine, root)
        found, direct = assert_same_place_as_dicom(stack, mine, root, tmp_path)
        assert row.modality == "PT" or np.array_equal(found, np.maximum(direct, dicom.AIR_HU))
        seen.append(row.modality)
    assert seen.count("CT") > 8 and "PT" in seen


@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_a_stack_on_disk_is_written_as_the_stack_in_memory_and_takes_its_mask(phantom_tables, tmp_path, modality):
    root, stacks, instances = phantom_tables
    usable = (stacks["status"] == "accepted") & (stacks["modality"] == modality) & stacks["suv_refusal"].isna()
    row = stacks[usable].iloc[0]
    mine = instances[instances["stack_id"] == row["stack_id"]]
    whole, opened = dicom.read_stack(mine, root), dicom.open_stack(row, mine, root)
    first, second = ex.write_stack(whole, tmp_path / "a.nii"), ex.write_stack(opened, tmp_path / "b.nii")
    assert first.read_bytes() == second.read_bytes()
    drawn = ex.write_nifti(noise(opened.shape, np.uint8), opened.affine, tmp_path / "mask.nii")
    assert np.array_equal(ex.read_mask(drawn, opened), noise(opened.shape, np.uint8))


@pytest.mark.parametrize("patient", ["A0001", "E0003"])
def test_real_scans_lie_where_simpleitk_sees_their_dicom(real_data, tmp_path, patient):
    root = real_data / "Lung-PET-CT-Dx" / f"Lung_Dx-{patient}"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    for stack_id in stacks["stack_id"][stacks["status"] == "accepted"][:2]:
        mine = instances[instances["stack_id"] == stack_id]
        stack = dicom.read_stack(mine, root)
        found, direct = assert_same_place_as_dicom(stack, mine, root, tmp_path)
        measured = direct > -1024                          # below: padding, which SimpleITK rescales and we call air
        assert measured.mean() > 0.5 and np.array_equal(found[measured], direct[measured])
        mask = (found > 300).astype(np.uint8)
        path = ex.write_nifti(mask, stack.affine, tmp_path / "mask.nii.gz")
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "RAS"), str(path))
        assert np.array_equal(ex.read_mask(path, stack), mask)


@pytest.fixture(scope="module")
def store(phantom_dir, phantom_tables, tmp_path_factory):
    """A finished chapter 3 of the phantoms; the first patient's lesions are taken away."""
    root, stacks, instances = phantom_tables
    boxes, problems = an.read_annotations(phantom_dir / "Annotation")
    boxes = an.place_boxes(boxes, an.reconcile(instances, stacks, boxes, problems))
    lesions, boxes = an.join_lesions(boxes, stacks)
    lesions = lesions[lesions["patient_id"] != lesions["patient_id"].min()]
    folder = tmp_path_factory.mktemp("store")
    table = volumes.build_cohort(root, instances, stacks, lesions, boxes, folder, volumes.Grid(32, 12.0), workers=1)
    runs.save_table(table, folder / "cohort.parquet")
    return folder, table


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_volume_is_written_with_its_mask_and_its_pet(store, tmp_path):
    folder, table = store
    row = table[table["has_pet"].fillna(False)].iloc[0]
    volume = volumes.load_volume(folder / row.file)
    paths = ex.write_volume(volume, tmp_path)
    assert [path.name for path in paths.values()] == [f"{row.stack_id}_{key}.nii.gz" for key in ("ct", "mask", "pet")]
    for key, values in (("ct", volume.ct_hu), ("mask", volume.mask), ("pet", volume.pet_suv)):
        back, affine = ex.read_nifti(paths[key])
        assert back.dtype == values.dtype and np.array_equal(back, values, equal_nan=key == "pet")
        np.testing.assert_allclose(affine, volume.affine, atol=NIFTI_MM)
    assert np.array_equal(ex.read_mask(paths["mask"], volume), volume.mask)
    plain = replace(volume, pet_suv=None)
    assert list(ex.write_volume(plain, tmp_path / "named", "case")) == ["ct", "mask"]
    assert files_of(tmp_path / "named") == ["case_ct.nii.gz", "case_mask.nii.gz"]


def test_the_folder_is_one_that_nnunet_knows(store, tmp_path):
    folder, table = store
    out = tmp_path / "Dataset123_Phantoms"
    counts = ex.export_nifti(folder, out)
    table = table[table["status"] == "accepted"]
    labelled = table[table["mask_voxels"] > 0]
    assert counts == {"imagesTr": len(labelled), "imagesTs": (table["lesions"] == 0).sum()}
    assert counts["imagesTs"] > 0 and sum(counts.values()) == len(table)
    dataset = runs.load_json(out / "dataset.json")
    assert dataset["channel_names"] == {"0": "CT"} and dataset["labels"] == {"background": 0, "tumour": 1}
    assert dataset["file_ending"] == ".nii.gz" and dataset["numTraining"] == len(labelled)
    names = [f"imagesTr/{case}_0000.nii.gz" for case in labelled.stack_id]
    names += [f"labelsTr/{case}.nii.gz" for case in labelled.stack_id]
    names += [f"imagesTs/{case}_0000.nii.gz" for case in table.stack_id[table.lesions == 0]]
    assert files_of(out) == sorted([*names, "dataset.json", "splits_final.json"])
    listed = [name for item in dataset["training"] + dataset["test"] for name in [*item["image"], item.get("label")]]
    assert sorted(filter(None, listed)) == sorted(names)
    for row in labelled.itertuples():
        image, label = (sitk.ReadImage(str(out / name)) for name in
                        (f"imagesTr/{row.stack_id}_0000.nii.gz", f"labelsTr/{row.stack_id}.nii.gz"))
        assert (image.GetOrigin(), image.GetSpacing(), image.GetDirection(), image.GetSize()) == (
            label.GetOrigin(), label.GetSpacing(), label.GetDirection(), label.GetSize())
        values, volume = sitk.GetArrayFromImage(label), volumes.load_volume(folder / row.file)
        assert set(np.unique(values)) == {0, 1} and np.array_equal(values > 0, volume.mask > 0)
        assert np.array_equal(sitk.GetArrayFromImage(image), volume.ct_hu)
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    assert ex.export_nifti(folder, out) == counts and {n: (out / n).read_bytes() for n in files_of(out)} == before


def test_folds_keep_patients_together(store, tmp_path):
    folder, table = store
    ex.export_nifti(folder, tmp_path)
    folds = json.loads((tmp_path / "splits_final.json").read_text())
    owner = dict(zip(table.stack_id, table.patient_id, strict=True))
    cases = sorted(table.stack_id[table["mask_voxels"].fillna(0) > 0])
    assert sorted(case for fold in folds for case in fold["val"]) == cases and len(folds) == 5
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == cases
        assert not {owner[case] for case in fold["train"]} & {owner[case] for case in fold["val"]}
    assert ex.nnunet_folds([("a", "A"), ("b", "A")]) == []


def test_with_pet_every_case_has_both_channels(store, tmp_path):
    folder, table = store
    counts = ex.export_nifti(folder, tmp_path, channels=("CT", "PET"), unlabelled="leave out")
    accepted = table[table["status"] == "accepted"]
    with_pet = accepted[accepted["has_pet"].astype(bool)]
    assert counts["imagesTr"] == (with_pet["mask_voxels"] > 0).sum() > 0 and counts["imagesTs"] == 0
    assert counts["left out: no PET"] == len(accepted) - len(with_pet)
    assert runs.load_json(tmp_path / "dataset.json")["channel_names"] == {"0": "CT", "1": "PET"}
    for case in with_pet.stack_id[with_pet["mask_voxels"] > 0]:
        pet, _ = ex.read_nifti(tmp_path / "imagesTr" / f"{case}_0001.nii.gz")
        stored = volumes.load_volume(folder / f"volumes/{case}.npz").pet_suv
        assert np.array_equal(pet, np.nan_to_num(stored)) and pet.max() > 0    # what is not known is 0 there


def test_what_has_no_usable_label_is_counted_and_never_called_empty(store, tmp_path):
    folder, table = store
    changed, case = table.copy(), table.stack_id[table["mask_voxels"].fillna(0) > 0].iloc[0]
    changed.loc[changed.stack_id == case, "mask_voxels"] = 0                       # its lesions lie outside the cube
    runs.save_table(changed.assign(file=[str(folder / name) for name in table.file.fillna("")]),
                    tmp_path / "cohort.parquet")
    counts = ex.export_nifti(tmp_path, tmp_path / "out", unlabelled="leave out")
    assert counts["left out: lesions outside the cube"] == 1 and counts["imagesTs"] == 0
    assert counts["left out: unlabelled"] == ((table["lesions"] == 0) & (table["status"] == "accepted")).sum()
    assert not [name for name in files_of(tmp_path / "out") if case in name]


def test_strangers_unknown_stacks_and_odd_requests_are_refused(store, tmp_path):
    folder, table = store
    some = table.stack_id[table["mask_voxels"].fillna(0) > 0].tolist()
    assert ex.export_nifti(folder, tmp_path, stack_ids=some[:2]) == {"imagesTr": 2, "imagesTs": 0}
    with pytest.raises(InputError, match=f"holds 2 images of another export, such as imagesTr/{some[0]}_0000.nii.gz"):
        ex.export_nifti(folder, tmp_path, stack_ids=some[1:])
    with pytest.raises(InputError, match="1 of 2 stacks have no volume, such as nobody"):
        ex.export_nifti(folder, tmp_path, stack_ids=["nobody", some[0]])
    with pytest.raises(InputError, match="expected channels CT, or CT and PET"):
        ex.export_nifti(folder, tmp_path, channels=("PET",))
    with pytest.raises(InputError, match="got .*'labelsTr'"):
        ex.export_nifti(folder, tmp_path, unlabelled="labelsTr")
    with pytest.raises(InputError, match="cohort.parquet does not exist"):
        ex.export_nifti(tmp_path / "nowhere", tmp_path)


def test_monai_finds_image_and_label_where_we_put_them(store, tmp_path):
    data = pytest.importorskip("monai.data")
    transforms = pytest.importorskip("monai.transforms")
    folder, _ = store
    counts = ex.export_nifti(folder, tmp_path)
    training = data.load_decathlon_datalist(tmp_path / "dataset.json", data_list_key="training")
    assert len(training) == counts["imagesTr"]
    assert len(data.load_decathlon_datalist(tmp_path / "dataset.json", data_list_key="test")) == counts["imagesTs"]
    loaded = transforms.LoadImaged(["image", "label"], image_only=False)(training[0])
    volume = volumes.load_volume(folder / f"volumes/{Path(training[0]['label']).name.removesuffix('.nii.gz')}.npz")
    assert np.array_equal(np.asarray(loaded["image"]).squeeze().T, volume.ct_hu)
    assert np.array_equal(np.asarray(loaded["label"]).T > 0, volume.mask > 0)
    np.testing.assert_allclose(ex.flip_world(np.asarray(loaded["label"].affine)), volume.affine, atol=NIFTI_MM)


# ---------------------------------------------------------------- DICOM SEG and SR

FOUND = ex.Findings(np.array([[20, 30, 25, 32, 2, 6], [24, 46, 30, 36, 4, 7]]), [0.91, 0.4], "0f", {"A": 0.7, "G": 0.3})
DCIODVFY = shutil.which("dciodvfy")


@pytest.fixture(scope="session")
def ct(phantom_dir):
    """Root of the phantoms, and the rows of one accepted CT stack."""
    root = phantom_dir / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    stack_id = stacks[(stacks.modality == "CT") & (stacks.status == "accepted")].stack_id.iloc[0]
    return root, instances[instances.stack_id == stack_id]


@pytest.fixture(scope="session")
def objects(ct, tmp_path_factory):
    """Sources, and a SEG and an SR written and read back by highdicom: of nobody, and of the patient."""
    root, slices = ct
    made = {}
    for name, patient in (("nobody", None), ("patient", ex.patient_module(root / slices.path.iloc[0]))):
        folder, sources = tmp_path_factory.mktemp(name), ex.source_headers(slices, patient)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # the phantoms' names have one part, which pydicom finds odd
            seg = ex.to_seg(sources, FOUND)
            ex.to_sr(sources, seg, FOUND).save_as(folder / "sr.dcm")
        seg.save_as(folder / "seg.dcm")
        made[name] = folder, sources, highdicom.seg.segread(folder / "seg.dcm"), highdicom.sr.srread(folder / "sr.dcm")
    return made


def test_segments_are_the_blocks_on_the_source_images(ct, objects):
    _, slices = ct
    uids = slices.sort_values("slice_index").sop_uid.tolist()
    _, _, seg, _ = objects["nobody"]
    frames = seg.get_pixels_by_source_instance(uids[2:7], assert_missing_frames_are_empty=True)
    for segment, (i0, i1, j0, j1, k0, k1) in enumerate(FOUND.blocks):
        expected = np.zeros(frames.shape[:3], bool)
        expected[k0 - 2:k1 - 2, j0:j1, i0:i1] = True
        assert np.array_equal(frames[..., segment] > 0, expected)
    assert seg.FrameOfReferenceUID == slices.frame_of_reference_uid.iloc[0]


def test_segments_lie_where_simpleitk_has_the_source(ct, objects):
    """Each frame's position, as SimpleITK reads that of the image it names."""
    root, slices = ct
    _, _, seg, _ = objects["nobody"]
    paths = dict(zip(slices.sop_uid, slices.path, strict=True))
    assert len(seg.PerFrameFunctionalGroupsSequence) == 4 + 3
    for frame in seg.PerFrameFunctionalGroupsSequence:
        uid = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        image = sitk.ReadImage(str(root / paths[uid]))
        assert np.allclose(frame.PlanePositionSequence[0].ImagePositionPatient, image.GetOrigin(), atol=1e-3)
    spacing = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    assert np.allclose(spacing, image.GetSpacing()[1::-1], atol=1e-4)


def test_report_follows_template_1500_and_points_at_the_segments(ct, objects):
    _, _, seg, report = objects["nobody"]
    assert isinstance(report.content, highdicom.sr.MeasurementReport)
    assert report.content[0].ContentTemplateSequence[0].TemplateIdentifier == "1500"
    groups = report.content.get_volumetric_roi_measurement_groups()
    for rank, (group, score) in enumerate(zip(groups, FOUND.scores, strict=True), 1):
        certainty, = group.get_measurements()
        assert (certainty.name.value, certainty.name.scheme_designator) == ("111012", "DCM")
        assert certainty.value == pytest.approx(100 * score) and certainty.unit.value == "%"
        image = group.referenced_segment[0]
        assert (image.referenced_sop_instance_uid, image.referenced_segment_numbers) == (seg.SOPInstanceUID, [rank])
        assert group.tracking_uid == seg.get_segment_description(rank).tracking_uid
    scan, = report.content.get_image_measurement_groups() or [None]
    shares = {m.name.meaning: m.value for m in scan.get_measurements()}
    assert shares == {"Share given to adenocarcinoma": 0.7, "Share given to squamous cell carcinoma": 0.3}


def test_every_uid_that_is_named_is_one_of_the_source_or_the_segmentation(ct, objects):
    _, slices = ct
    _, _, seg, report = objects["nobody"]
    named = {str(item.ReferencedSOPInstanceUID) for dataset in (seg, report) for item in nested(dataset)
             if "ReferencedSOPInstanceUID" in item}
    assert seg.SOPInstanceUID in named and len(named) == 1 + 5
    assert named - {seg.SOPInstanceUID} <= set(slices.sop_uid)
    series = {str(item.SeriesInstanceUID) for dataset in (seg, report) for item in nested(dataset)
              if "SeriesInstanceUID" in item} - {seg.SeriesInstanceUID, report.SeriesInstanceUID}
    assert series == {slices.series_uid.iloc[0]}
    assert seg.StudyInstanceUID == report.StudyInstanceUID == slices.study_uid.iloc[0]


def nested(dataset):
    """A dataset and all items of its sequences, at any depth."""
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from nested(item)


def test_nobody_is_named_unless_told_and_then_as_in_the_source(ct, objects):
    root, slices = ct
    source = pydicom.dcmread(root / slices.path.iloc[0])
    personal = [str(source.get(name, "")) for name in ("PatientID", "PatientName", "StudyDate", "AccessionNumber")]
    assert personal[0]
    folder, _, seg, report = objects["nobody"]
    raw = (folder / "seg.dcm").read_bytes() + (folder / "sr.dcm").read_bytes()
    assert not [value for value in personal if value and value.encode() in raw]
    assert seg.PatientID == report.PatientID == ex.pseudonym(slices.study_uid.iloc[0]) and seg.StudyDate in ("", None)
    for name in ex.PATIENT:
        assert {str(dataset.get(name) or "") for dataset in objects["patient"][2:]} == {str(source.get(name) or "")}
    assert objects["patient"][2].SOPInstanceUID != seg.SOPInstanceUID     # two contents, two UIDs


def test_the_same_findings_have_the_same_uids_and_others_have_not(ct, objects):
    _, sources, seg, report = objects["nobody"]
    again = ex.to_seg(sources, replace(FOUND))
    assert (again.SOPInstanceUID, again.SeriesInstanceUID) == (seg.SOPInstanceUID, seg.SeriesInstanceUID)
    assert ex.to_sr(sources, again, FOUND).SOPInstanceUID == report.SOPInstanceUID
    for change in ({"scores": [0.9, 0.4]}, {"model": "10"}, {"blocks": FOUND.blocks + 1}):
        assert ex.to_seg(sources, replace(FOUND, **change)).SOPInstanceUID != seg.SOPInstanceUID
    assert all(len(uid) <= 64 and re.fullmatch(r"[0-9.]+", uid) for uid in (seg.SOPInstanceUID, report.SOPInstanceUID))


@pytest.mark.parametrize("name, value, kept", [
    ("PatientBirthDate", "1950", False), ("PatientSex", "Male", False), ("StudyTime", "12:30:00", False),
    ("AccessionNumber", ["A1", "A2"], False), ("StudyID", "1\\2", False), ("AccessionNumber", "1" * 17, False),
    ("PatientName", ["O'Brien", "x"], False), ("PatientName", "Y" * 65, False),
    ("PatientName", "Yama^T=山田^太郎", True),
    ("ReferringPhysicianName", "a\tb", False), ("IssuerOfPatientID", "HOSP_B", True), ("AccessionNumber", "AC-1", True),
    ("StudyDescription", "Thorax nativ", True), ("StudyDescription", "x" * 65, False),
    ("StudyDate", "20070404", True), ("StudyTime", "123000.5", True), ("PatientName", "Müller^Jörg", True)])
def test_what_a_source_says_wrongly_is_left_empty(name, value, kept, ct, tmp_path):
    root, slices = ct
    source = pydicom.dcmread(root / slices.path.iloc[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.SpecificCharacterSet = "ISO_IR 192" if "山" in str(value) else "ISO_IR 100"
        setattr(source, name, value)
        source.save_as(tmp_path / "odd.dcm")
        told = ex.patient_module(tmp_path / "odd.dcm")
        made = ex.to_seg(ex.source_headers(slices, told), FOUND)
        made.save_as(tmp_path / "seg.dcm")
    assert told[name] == (value if kept else "") and told["PatientID"] == source.PatientID
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").get(name) or "") == told[name]


@pytest.mark.parametrize("value", [["P1", "P2"], "1" * 65, "P\t1"])
def test_objects_are_not_filed_under_a_patient_id_that_is_none(value, ct, tmp_path):
    source = pydicom.dcmread(ct[0] / ct[1].path.iloc[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.PatientID = value
        source.save_as(tmp_path / "odd.dcm")
        with pytest.raises(InputError, match="the patient ID of the images is not one that DICOM allows"):
            ex.patient_module(tmp_path / "odd.dcm")


def test_an_object_with_another_patient_or_study_has_another_uid(ct):
    root, slices = ct
    told, made = ex.patient_module(root / slices.path.iloc[0]), []
    for change in ({}, {"PatientName": "Schmidt^Eva"}, {"AccessionNumber": "ACC-2"}, {"IssuerOfPatientID": "H"}):
        sources = ex.source_headers(slices, told | change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seg = ex.to_seg(sources, FOUND)
            report = ex.to_sr(sources, seg, FOUND)
        made.append({seg.SOPInstanceUID, seg.SeriesInstanceUID, report.SOPInstanceUID, report.SeriesInstanceUID})
    assert len(set().union(*made)) == 4 * len(made)


@pytest.mark.parametrize("told", [np.nan, 0.0])
def test_a_thickness_that_is_not_told_is_the_step_between_slices(ct, told):
    _, slices = ct
    depths = np.array(slices.sort_values("slice_index")["position_mm"].tolist())[:, 2]
    headers = ex.source_headers(slices.assign(slice_thickness_mm=told))
    assert np.allclose([float(header.SliceThickness) for header in headers], abs(np.diff(depths)).mean())
    kept = ex.source_headers(slices.assign(slice_thickness_mm=2.25))
    assert {float(header.SliceThickness) for header in kept} == {2.25}


def test_a_list_without_boxes_beside_one_with_boxes_is_passed_over():
    document = {"training": [ITEM], "test": [{"image": "b.nii.gz"}], "name": "x"}
    assert ex.from_detection_list(document, "cccwhd", "LPS")["role"].tolist() == ["training"]


def test_images_that_cannot_be_pointed_at_are_refused(ct):
    _, slices = ct
    with pytest.raises(InputError, match="several images that hold several slices each"):
        ex.source_headers(slices.assign(frames=3))
    with pytest.raises(InputError, match="no frame of reference"):
        ex.source_headers(slices.assign(frame_of_reference_uid=None))
    with pytest.raises(InputError, match="no study"):
        ex.source_headers(slices.assign(study_uid=np.nan))
    with pytest.raises(InputError, match="whose study is no valid UID"):
        ex.source_headers(slices.assign(study_uid="1.02.a"))


@pytest.mark.skipif(not DCIODVFY, reason="dciodvfy is not installed (Debian: dicom3tools)")
@pytest.mark.parametrize("who", ["nobody", "patient"])
@pytest.mark.parametrize("name", ["seg", "sr"])
def test_dciodvfy_finds_no_error(objects, who, name):
    done = subprocess.run([DCIODVFY, objects[who][0] / f"{name}.dcm"], capture_output=True, text=True, timeout=60)
    told = done.stdout + done.stderr
    assert {"seg": "Segmentation", "sr": "EnhancedSR"}[name] in told
    assert not [line for line in told.splitlines() if line.startswith("Error")], told


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 7)] * 3, *[st.integers(1, 4)] * 3), max_size=4))
def test_labels_give_each_voxel_to_the_best_block(places):
    blocks = [(x, x + i, y, y + j, z, z + k) for x, y, z, i, j, k in places]
    labels = ex.blocks_to_labels(np.array(blocks, int).reshape(-1, 6), (12, 12, 12))
    for z, y, x in np.random.default_rng(0).integers(0, 12, (40, 3)):
        holding = [rank for rank, (i0, i1, j0, j1, k0, k1) in enumerate(blocks, 1)
                   if i0 <= x < i1 and j0 <= y < j1 and k0 <= z < k1]
        assert labels[z, y, x] == min(holding, default=0)


# ---------------------------------------------------------------- what does not fit is said

def test_images_without_a_slice_index_can_be_negatives():
    images = slices().assign(slice_index=pd.array([None, 1, 2, 3][: len(slices())], "Int64"))
    document = through_json(ex.to_coco(boxes_of((1, "A", 1, 2, 5, 9)), images, negatives=images))
    assert ex.check_coco(document) == [] and None in [row["slice_index"] for row in document["images"]]


def test_instances_are_those_of_one_stack():
    with pytest.raises(ex.InputError, match="lesions of 2 stacks, expected those of one"):
        ex.to_instances(lesions_of_two_stacks(), (8, 8, 8))


def lesions_of_two_stacks():
    spans = {"i0": [0, 2], "i1": [1, 3], "j0": [0, 2], "j1": [1, 3], "k0": [0, 2], "k1": [1, 3]}
    corners = dict(zip(ex.CORNERS_MM, np.array([[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]], float).T, strict=True))
    names = {"stack_id": ["a", "b"], "lesion_id": ["a_1", "b_1"], "subtype": ["A", "G"]}
    return pd.DataFrame(names | spans | corners)


@pytest.mark.parametrize("ways, told", [
    ({"file_name": "image.nii.gz"}, "expected a name with {stack_id} in it"),
    ({"file_name": "{patient_id}.nii.gz"}, "expected a name with {stack_id} in it"),
    ({"file_name": "{stack_id}_{}.nii.gz"}, "expected a name with {stack_id} in it"),
    ({"roles": {"a": "labels", "b": "training"}}, "the role 'labels'"),
    ({"roles": {"a": float("nan"), "b": "training"}}, "the role nan"), ({"roles": {"a": "training"}}, "the role None")])
def test_detection_lists_with_odd_names_are_refused(ways, told):
    with pytest.raises(ex.InputError, match=re.escape(told)):
        ex.to_detection_list(lesions_of_two_stacks(), **ways)


@pytest.mark.parametrize("document, told", [
    ({"inst": {}}, 'expected an object {"instances"'), ([], "expected an object"),
    ({"instances": {"-1": 0}}, "instance '-1'"), ({"instances": {"1": "A"}}, "the label 'A'"),
    ({"instances": {"1": 9}}, "the label 9")])
def test_instance_documents_that_name_nothing_are_refused(document, told):
    with pytest.raises(ex.InputError, match=re.escape(told)):
        ex.from_instances(np.ones((2, 2, 2), np.uint8), document)


@pytest.mark.parametrize("labels, label", [({"0": "A"}, 0), ({"0": "A"}, 0.0), ({"A": 0}, 0), ({"A": 0.0}, 0)])
def test_labels_of_a_detection_list_in_either_direction(labels, label):
    document = {"box_mode": "xyzxyz", "world": "LPS mm", "labels": labels,
                "training": [{"image": "a.nii.gz", "box": [[0, 0, 0, 1, 1, 1]], "label": [label]}]}
    assert ex.from_detection_list(through_json(document))["subtype"].tolist() == ["A"]


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 1e400, None, "B"])
def test_a_label_that_no_number_or_no_name_stands_for_is_no_subtype(label):
    document = {"box_mode": "xyzxyz", "world": "LPS mm", "labels": {"A": 0, "G": float("nan")},
                "training": [{"image": "a.nii.gz", "box": [[0, 0, 0, 1, 1, 1]], "label": [label]}]}
    assert ex.from_detection_list(document)["subtype"].isin(["G"] if label != label else [None]).all()


@pytest.mark.parametrize(("blocks", "scores", "message"), [
    ([[5, 2, 0, 4, 0, 2]], [0.5], "a block is not"), ([[-1, 2, 0, 4, 0, 2]], [0.5], "a block is not"),
    ([[0, 2.5, 0, 4, 0, 2]], [0.5], "a block is not"), ([[0, 2, 0, 4, 0, 2]], [50], "scores are"),
    ([[0, 2, 0, 4, 0, 2]], [0.5, 0.4], "scores are"), ([[0, 2, 0, 4, 0, 2]], [np.nan], "scores are")])
def test_findings_that_cannot_be_are_refused(blocks, scores, message):
    with pytest.raises(runs.InputError, match=message):
        ex.Findings(blocks, scores, "model")
    assert ex.Findings([[0.0, 2.0, 0, 4, 0, 2]], [1], "model").blocks.dtype.kind == "i"


def test_more_blocks_than_a_byte_can_number_are_refused():
    with pytest.raises(runs.InputError, match="300 blocks"):
        ex.blocks_to_labels(np.tile([0, 1, 0, 1, 0, 1], (300, 1)), (4, 4, 4))


def test_the_uid_of_findings_does_not_depend_on_how_they_are_written():
    def uid(subtypes):
        return ex.Findings([[0, 1, 0, 1, 0, 1]], [0.5], "model", subtypes).uid("seg")

    assert uid({"A": 0.5, "G": 0.5}) == uid({"G": np.float32(0.5), "A": np.float64(0.5)}) != uid({"A": 1.0})


@pytest.mark.parametrize("number", [255, 256])
def test_a_mask_of_many_numbers_keeps_the_last(tmp_path, number):
    drawn = np.zeros((6, 5, 4), np.uint16)
    drawn[1, 2, 3] = number
    found = ex.read_mask(ex.write_nifti(drawn, OBLIQUE, tmp_path / "x.nii"), toy_stack(OBLIQUE))
    assert found[1, 2, 3] == number and found.dtype == (np.uint8 if number < 256 else np.uint16)


def test_a_part_of_the_lesions_in_any_order_keeps_its_boxes():
    part = lesions().iloc[[2, 1]]
    back = ex.from_detection_list(ex.to_detection_list(part)).sort_values("x0_mm")
    assert back[an.CORNERS_MM].to_numpy().tolist() == part[an.CORNERS_MM].to_numpy().tolist()
    assert back["subtype"].tolist() == ["B", "G"]


def test_instances_may_be_named_in_any_order():
    found, document = ex.to_instances(voxel_lesions((2, 5, 1, 4, 0, 2), (6, 9, 6, 9, 3, 4)), (5, 10, 12))
    turned = {"instances": dict(reversed(document["instances"].items()))}
    pd.testing.assert_frame_equal(ex.from_instances(found, turned), ex.from_instances(found, document))


@pytest.mark.parametrize(("unit", "mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_metres_and_micrometres_become_millimetres(tmp_path, unit, mm):
    affine = affine_of(np.diag([-1, 1, 1]), (0.5, 0.5, 2), (10, -20, 30)) @ np.diag([1 / mm, 1 / mm, 1 / mm, 1])
    affine[:3, 3] = np.array([10, -20, 30]) / mm
    _, place = ex.read_nifti(theirs(tmp_path, affine=affine, xyzt_units=unit))
    np.testing.assert_allclose(np.linalg.norm(place[:3, :3], axis=0), [0.5, 0.5, 2], atol=NIFTI_MM)
    np.testing.assert_allclose(place[:3, 3], [-10, 20, 30], atol=NIFTI_MM)


def test_sources_follow_the_slices_whatever_the_order_of_the_rows(ct):
    _, slices = ct
    wanted = [header.SOPInstanceUID for header in ex.source_headers(slices)]
    assert wanted == slices.sort_values("slice_index")["sop_uid"].tolist()
    assert [header.SOPInstanceUID for header in ex.source_headers(slices[::-1])] == wanted


def test_the_step_between_slices_is_told_for_frames_in_any_order(ct):
    _, slices = ct
    places = slices.sort_values("slice_index")["position_mm"].tolist()
    step = abs(places[1][2] - places[0][2])
    whole = slices.iloc[[0]].assign(frames=len(places), slice_thickness_mm=np.nan)
    whole["frame_positions_mm"] = [[*places[1::2], *places[::2]]]
    header, = ex.source_headers(whole)
    measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == pytest.approx(step, abs=1e-3)


def test_what_was_not_built_is_not_exported(store, tmp_path):
    folder, table = store
    case = table.stack_id[table["mask_voxels"].fillna(0) > 0].iloc[0]
    changed = table.assign(file=[str(folder / name) for name in table.file.fillna("")])
    changed.loc[changed.stack_id == case, "status"] = "excluded"
    runs.save_table(changed, tmp_path / "cohort.parquet")
    counts = ex.export_nifti(tmp_path, tmp_path / "out")
    assert sum(counts.values()) == (changed["status"] == "accepted").sum()
    assert not list((tmp_path / "out").rglob(f"{case}*"))
    with pytest.raises(runs.InputError, match=f"1 of 1 stacks have no volume, such as {case}"):
        ex.export_nifti(tmp_path, tmp_path / "again", stack_ids=[case])


def test_an_image_without_boxes_in_a_list_with_boxes_is_refused():
    document = {"training": [ITEM], "validation": [ITEM, {"image": "b.nii.gz"}]}
    with pytest.raises(runs.InputError, match="an entry lacks image, box or label"):
        ex.from_detection_list(document, "cccwhd", "LPS")


@pytest.mark.parametrize(("mode", "box"), [("cccwhd", [5, 5, 5, 10, 0, 10]), ("xyzxyz", [0, 5, 0, 10, 5, 10])])
def test_a_box_without_extent_in_a_list_is_refused(mode, box):
    with pytest.raises(runs.InputError, match=f"a box has no size in mode {mode}"):
        ex.from_detection_list({"training": [{"image": "a", "box": [box], "label": [0]}]}, mode, "LPS")


def test_the_step_between_coronal_slices_is_along_their_normal(ct):
    slices = ct[1].sort_values("slice_index").head(5).assign(slice_thickness_mm=np.nan)
    slices["orientation"] = [[1.0, 0, 0, 0, 0, -1]] * 5
    slices["position_mm"] = [[0.0, 4.0 * k, 0] for k in range(5)]
    assert {float(header.SliceThickness) for header in ex.source_headers(slices)} == {4.0}
