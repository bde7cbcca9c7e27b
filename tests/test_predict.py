"""Predict: coordinates, refusals, files written, and nobody's name in them."""

import json
import shutil
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import dicom, predict, runs, training

GRID = {"size": 32, "spacing_mm": 12.0}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """An untrained network with a subtype head, saved as chapter 5 saves it: its boxes have a form and no meaning."""
    folder = tmp_path_factory.mktemp("model")
    training.reproducible(0)
    network = training.build_network(GRID["size"], ["A", "B", "E", "G"], (8, 16))
    heat = network.get_layer("heat")
    heat.set_weights([heat.get_weights()[0] * 0.5, np.zeros(1)])        # scores around one half: there are boxes
    box = network.get_layer("box")                                      # and so large that they reach into the scan
    box.set_weights([box.get_weights()[0] * 0.1, np.array([0, 0, 0, 2.5, 2.5, 2.5])])
    training.save_model(network, folder, classes=list("ABEG"), spacing_mm=GRID["spacing_mm"],
                        training_hash="none", settings=training.Settings(), validation={})
    return folder / "model.keras"


@pytest.fixture(scope="session")
def patient(phantom_dir):
    """Folder of one phantom patient that has an accepted CT and, if there is such a patient, a PET."""
    folders = sorted((phantom_dir / "Lung-PET-CT-Dx").glob("Lung_Dx-*"))
    with_pet = []
    for folder in folders:
        stacks, _ = dicom.build_stacks(dicom.index_dicom(folder, workers=1)[0], root=folder)
        ct = ((stacks["modality"] == "CT") & (stacks["status"] == "accepted")).any()
        if ct and (stacks["modality"] == "PT").any():
            return folder
        with_pet += [folder] if ct else []
    return with_pet[0]


@pytest.fixture(scope="session")
def made(patient, model, tmp_path_factory):
    return predict.predict_folder(patient, model, tmp_path_factory.mktemp("out"), workers=1)


# coordinates ------------------------------------------------------------------------------------------------------

def rotation(axis, angle):
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_blocks_contain_their_boxes_on_oblique_stacks(seed):
    rng = np.random.default_rng(seed)
    turn = rotation(0, rng.uniform(-0.5, 0.5)) @ rotation(2, rng.uniform(-0.5, 0.5))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(rng.uniform(0.5, 5, 3)) @ np.diag(rng.choice([-1, 1], 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    middle = dicom.to_mm(affine, np.array([[100, 100, 100]]))[0]
    box = np.r_[middle - rng.uniform(1, 15, 3), middle + rng.uniform(1, 15, 3)]
    i0, i1, j0, j1, k0, k1 = predict.to_pixels(box, affine, (200, 200, 200))
    corners = np.array(list(product(*zip(box[:3], box[3:], strict=True))))
    edges = dicom.to_voxel(affine, corners) + 0.5
    assert (edges >= np.array([i0, j0, k0]) - 1e-5).all() and (edges <= np.array([i1, j1, k1]) + 1e-5).all()
    assert (edges.min(0) - [i0, j0, k0] < 1).all() and ([i1, j1, k1] - edges.max(0) < 1).all()    # and no voxel more


def test_a_block_is_cut_to_the_scan_and_none_outside():
    affine = np.diag([0.5, 0.5, -5.0, 1.0])
    assert predict.to_pixels([-5, -5, -5, 5, 5, 5], affine, (20, 64, 64)).tolist() == [0, 11, 0, 11, 0, 2]
    assert predict.to_pixels([-50, 0, 0, -40, 5, 5], affine, (20, 64, 64)) is None


# refusals ---------------------------------------------------------------------------------------------------------

def row(**changes):
    return pd.Series({"modality": "CT", "status": "accepted", "reason": None, "detail": None} | changes)


def test_refusals_name_their_reason():
    assert predict.refusal(row()) is None
    assert predict.refusal(row(modality="PT")) == (predict.Refusal.NOT_CT, "modality PT")
    excluded = row(status="excluded", reason="gap", detail="two slices missing")
    assert predict.refusal(excluded) == (predict.Refusal.EXCLUDED, "gap: two slices missing")


def test_every_stack_is_answered_or_refused(made, patient):
    stacks, _ = dicom.build_stacks(dicom.index_dicom(patient, workers=1)[0], root=patient)
    assert len(made.stacks) == len(stacks)
    usable = (stacks["modality"] == "CT") & (stacks["status"] == "accepted")
    assert sum(stack["refused"] is None for stack in made.stacks) == usable.sum()
    for stack in made.stacks:
        assert (stack["refused"] is None) != bool(stack["detail"])
        if stack["modality"] == "PT":
            assert stack["refused"] == predict.Refusal.NOT_CT.value


def test_a_missing_or_empty_folder_is_the_users_to_mend(model, tmp_path):
    with pytest.raises(runs.InputError, match="does not exist"):
        predict.predict_folder(tmp_path / "absent", model, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(runs.InputError, match="empty"):
        predict.predict_folder(tmp_path / "empty", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_its_side_car_is_an_error(model, patient, tmp_path):
    (tmp_path / "model.keras").write_bytes(model.read_bytes())
    facts = json.loads(model.with_suffix(".json").read_text()) | {"model_hash": "another"}
    (tmp_path / "model.json").write_text(json.dumps(facts))
    with pytest.raises(runs.InputError, match=r"model_hash = another"):
        predict.predict_folder(patient, tmp_path / "model.keras", tmp_path / "out", workers=1)
    with pytest.raises(runs.InputError, match="does not exist"):
        predict.predict_folder(patient, tmp_path / "absent.keras", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


# what is written --------------------------------------------------------------------------------------------------

def test_json_and_csv_say_the_same(made):
    saved = runs.load_json(made.out / "predictions.json")
    table = pd.read_csv(made.out / "predictions.csv")
    boxes = [box for stack in saved["stacks"] for box in stack["boxes"]]
    assert len(boxes) == len(table) > 0
    for name in ("score", *predict.CORNERS_MM, *predict.PIXELS):
        assert np.allclose(table[name], [box[name] for box in boxes])
    assert saved["note"] == "Not for clinical use." and saved["model"]["classes"] == ["A", "B", "E", "G"]


def test_boxes_are_ranked_in_mm_and_inside_the_source(made):
    for stack in made.stacks:
        scores = [box["score"] for box in stack["boxes"]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 5
        assert [box["rank"] for box in stack["boxes"]] == list(range(1, len(scores) + 1))
        for box in stack["boxes"]:
            assert box["i0"] < box["i1"] and box["j0"] < box["j1"] and 0 <= box["k0"] < box["k1"] <= stack["slices"]
        if stack["refused"] is None:
            assert np.isclose(sum(stack["subtypes"].values()), 1, atol=1e-4)


def test_mm_and_pixels_agree(made, patient):
    stacks, _ = dicom.build_stacks(dicom.index_dicom(patient, workers=1)[0], root=patient)
    order = stacks.sort_values("stack_id").reset_index(drop=True)
    for result, (_, source) in zip(made.stacks, order.iterrows(), strict=True):
        for box in result["boxes"]:
            shape = (source["slices"], source["rows"], source["columns"])
            block = predict.to_pixels([box[n] for n in predict.CORNERS_MM], np.reshape(source["affine"], (4, 4)), shape)
            assert np.abs(block - [box[n] for n in predict.PIXELS]).max() <= 1      # mm are rounded to hundredths


def test_pictures_are_written_for_the_best_boxes(made):
    named = [box["picture"] for stack in made.stacks for box in stack["boxes"] if "picture" in box]
    assert named and all((made.out / name).read_bytes()[:4] == b"\x89PNG" for name in named)
    assert sorted(named) == sorted(path.name for path in made.out.glob("*.png"))
    assert not list(made.out.glob(".*"))                                           # no temporary file stays behind


def test_identity_stays_behind_unless_asked_for(made, patient, model, tmp_path):
    instances, _ = dicom.index_dicom(patient, workers=1)
    hidden = {*instances["patient_id"], *instances["study_uid"], *instances["series_uid"], *instances["sop_uid"]}
    text = (made.out / "predictions.json").read_text() + (made.out / "predictions.csv").read_text() + str(made)
    assert not [name for name in hidden if name in text]
    shown = predict.predict_folder(patient, model, tmp_path, pictures=0, show_identity=True, workers=1)
    assert {stack["patient_id"] for stack in shown.stacks} == set(instances["patient_id"])
    assert not list(tmp_path.glob("*.png"))


def test_files_that_could_not_be_used_are_counted_and_their_names_hidden(patient, model, tmp_path):
    shutil.copytree(patient, tmp_path / "in")
    whole = sorted((tmp_path / "in").rglob("*.dcm"))[0]
    (tmp_path / "in" / "Lung_Dx-A9999.dcm").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "in" / "letter.txt").write_text("dear colleague")
    made = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", pictures=0, workers=1)
    saved = runs.load_json(tmp_path / "out" / "predictions.json")["files_not_used"]
    assert {"reason": "truncated", "files": 1} in saved and {"reason": "not DICOM", "files": 1} in saved
    assert "1 file not used: truncated" in str(made) and "A9999" not in str(saved) + str(made)


def test_the_same_call_writes_the_same_bytes(made, patient, model, tmp_path):
    predict.predict_folder(patient, model, tmp_path, pictures=0, workers=1)
    again = (tmp_path / "predictions.csv").read_bytes()
    assert again == (made.out / "predictions.csv").read_bytes()


def test_real_series(real_data, model, tmp_path):
    """A0001 of the collection: two reconstructions, both answered, in the frame of the patient."""
    made = predict.predict_folder(real_data / "Lung-PET-CT-Dx" / "Lung_Dx-A0001", model, tmp_path, pictures=1)
    assert [stack["refused"] for stack in made.stacks] == [None, None]
    assert "A0001" not in (tmp_path / "predictions.json").read_text()
    assert len(list(tmp_path.glob("*.png"))) == sum(bool(stack["boxes"]) for stack in made.stacks)
