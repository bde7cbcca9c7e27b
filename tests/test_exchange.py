"""COCO, MONAI's detection list and instance maps: what goes out comes back, what is odd is refused in words."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import annotations as an
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
])
def test_a_foreign_document_is_refused_with_what_is_wrong(spoil, words):
    document = coco()
    spoil(document)
    with pytest.raises(InputError, match=words):
        ex.from_coco(document)


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
    ({"roles": {"s1": "training"}}, "stack s2 has lesions and no role"),
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
