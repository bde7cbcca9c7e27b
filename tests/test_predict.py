"""Predict: coordinates, refusals, files written, and nobody's name in them."""

import errno
import json
import os
import re
import shutil
import subprocess
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import highdicom
import numpy as np
import pandas as pd
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import course, dicom, exchange, plots, predict, runs, training, volumes

GRID = {"size": 32, "spacing_mm": 12.0}


@pytest.fixture(scope="session")
def opened(phantom_dir):
    """Every accepted CT stack of the phantoms, ready to be read, and its patient."""
    root = phantom_dir / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    good = stacks[(stacks["status"] == "accepted") & (stacks["modality"] == "CT")]
    return [(row["patient_id"], dicom.open_stack(row, instances[instances["stack_id"] == row["stack_id"]], root))
            for _, row in good.iterrows()]


@pytest.fixture(scope="session")
def ranges(opened):
    """What the volumes of every second phantom are like, on the grid of chapter 3."""
    trained = sorted({patient for patient, _ in opened})[::2]
    facts = [volumes.volume_facts(volumes.to_cube(stack, volumes.Grid())[0], 6.0)
             for patient, stack in opened if patient in trained]
    return volumes.facts_range(facts)


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


SHAPE, SPACING_MM = (60, 130, 190), (5.0, 2.0, 2.0)


def shot(hu_zyx, spacing_zyx_mm=SPACING_MM):
    hu, affine = np.clip(hu_zyx, -1024, 3000).astype(np.int16), np.diag([*spacing_zyx_mm[::-1], 1.0])
    return dicom.Stack("s", hu, affine, "CT", (), 0)


def places(shape=SHAPE):
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, SPACING_MM, strict=True)]
    return np.meshgrid(*axes, indexing="ij")


def head():
    z, y, x = places((36, 110, 110))
    depth = np.sqrt((x / 75) ** 2 + (y / 95) ** 2 + (z / 85) ** 2)
    hu = np.select([depth < 0.88, depth < 0.97, depth < 1], [35, 1000, 40], -1000)
    for side in (-18, 18):
        hu[((x - side) / 14) ** 2 + ((y + 60) / 14) ** 2 + ((z + 40) / 14) ** 2 < 1] = -990      # sinuses
    return shot(hu + np.random.default_rng(0).normal(0, 60, hu.shape))


def belly(bases_mm):
    """A body with fat, spine and bowel gas, and above it the lowest `bases_mm` of both lungs."""
    z, y, x = places()
    hu = np.select([(x / 140) ** 2 + (y / 92) ** 2 < 1, (x / 165) ** 2 + (y / 115) ** 2 < 1], [50, -100], -1000)
    hu[(x / 22) ** 2 + ((y - 70) / 22) ** 2 < 1] = 400
    hu[((x - 40) / 30) ** 2 + ((y + 50) / 20) ** 2 + (z / 40) ** 2 < 1] = -990
    for side in (-70, 70):
        hu[((x - side) / 50) ** 2 + (y / 70) ** 2 + ((z - 150) / max(bases_mm, 1e-3)) ** 2 < 1] = -850
    return shot(hu + np.random.default_rng(0).normal(0, 60, hu.shape))


def scaled(opened, length=1.0, value=1.0, more_hu=0):
    stack = opened[0][1]
    affine = stack.affine * np.array([length, length, length, 1.0])
    hu = np.stack([stack[k] for k in range(len(stack))]).astype(float) * value + more_hu
    return dicom.Stack("s", hu.clip(-32768, 32767).astype(np.int16), affine, "CT", (), 0)


STRANGE = {
    "a head": lambda _: head(),
    "a belly": lambda _: belly(0),
    "a belly with the tips of the lungs": lambda _: belly(50),
    "white noise": lambda _: shot(np.random.default_rng(0).normal(0, 300, SHAPE)),
    "noise over the whole scale, on the grid": lambda _: shot(
        np.random.default_rng(0).uniform(-1024, 1500, (64, 64, 64)), (6.0, 6.0, 6.0)),
    "nothing": lambda _: shot(np.full(SHAPE, -1000)),
    "a patient of a third of the size": lambda opened: scaled(opened, length=1 / 3),
    "a patient of three times the size": lambda opened: scaled(opened, length=3),
    "values that were never rescaled": lambda opened: scaled(opened, more_hu=1024),
    "values rescaled twice": lambda opened: scaled(opened, value=2, more_hu=-1024),
}


@pytest.mark.parametrize("name", STRANGE)
def test_volumes_unlike_training_are_refused(name, opened, ranges):
    facts = volumes.volume_facts(volumes.to_cube(STRANGE[name](opened), volumes.Grid())[0], 6.0)
    words = volumes.unlike_training(facts, ranges)
    assert words, f"{name}: {facts} within {ranges}"
    assert all(re.fullmatch(r"\w+ \S+ \(trained on \S+ to \S+, answered from \S+ to \S+\)", part)
               for part in words.split("; ")), words


def test_patients_who_were_not_trained_on_are_not_refused(opened, ranges):
    held_out = sorted({patient for patient, _ in opened})[1::2]
    asked = [stack for patient, stack in opened if patient in held_out]
    facts = [volumes.volume_facts(volumes.to_cube(stack, volumes.Grid())[0], 6.0) for stack in asked]
    assert len(facts) >= 3 and [volumes.unlike_training(each, ranges) for each in facts] == [None] * len(facts)


DEFAULT_RUN = {"lung_litres": [2.6977, 6.8135], "lung_share": [0.1952, 0.3382],      # of its 62 training volumes
               "tissue_density": [0.9729, 1.0263], "roughness_hu": [15.0, 30.0]}


def test_real_chests_are_not_refused_by_ranges_of_phantoms(real_data):
    """Slabs of a few centimetres are: they hold less than a third of the lung of any chest in training."""
    root = real_data / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    good = stacks[(stacks["status"] == "accepted") & (stacks["modality"] == "CT")]
    assert len(good) >= 10
    for _, row in good.iterrows():
        stack = dicom.open_stack(row, instances[instances["stack_id"] == row["stack_id"]], root)
        facts = volumes.volume_facts(volumes.to_cube(stack, volumes.Grid())[0], 6.0)
        words = volumes.unlike_training(facts, DEFAULT_RUN)
        height_mm = len(stack) * np.linalg.norm(stack.affine[:3, 2])
        assert (words is None) == (height_mm > 150), f"{row['stack_id']}, {height_mm:.0f} mm: {words}"


def with_side_car(model, folder, **changes):
    """A copy of the model whose side-car says something else."""
    folder.mkdir()
    shutil.copy(model, folder / "model.keras")
    facts = json.loads(model.with_suffix(".json").read_text()) | changes
    facts = {name: value for name, value in facts.items() if value is not None and name != "side_car_hash"}
    facts["side_car_hash"] = runs.hash_value(facts)
    (folder / "model.json").write_text(json.dumps(facts))
    return folder / "model.keras"


def test_a_scan_unlike_training_is_refused_answered_when_asked_and_noted(patient, model, tmp_path):
    large = {"validation": {"trained_on": {"lung_litres": [50.0, 60.0]}}}
    strict = with_side_car(model, tmp_path / "m", **large)
    made = predict.predict_folder(patient, strict, tmp_path / "out", workers=1)
    cts = [stack for stack in made.stacks if stack["facts"]]
    assert cts and all(stack["refused"] == "unlike what the model was trained on" for stack in cts)
    assert all("lung_litres" in stack["detail"] and not stack["boxes"] for stack in cts) and made.remarks == []
    assert not list((tmp_path / "out").glob("stack_*"))
    again = predict.predict_folder(patient, strict, tmp_path / "out", pictures=0, dicom_files=False,
                                   even_if_unlike=True, workers=1)
    answered = [stack for stack in again.stacks if stack["boxes"]]
    assert len(answered) == len(cts) and all("lung_litres" in stack["unlike_training"] for stack in answered)
    assert "unlike training: lung_litres" in str(again)


def test_a_side_car_without_ranges_is_noted_and_one_with_odd_ranges_refused(made, model, tmp_path):
    assert any("does not tell what the training volumes were like" in remark for remark in made.remarks)
    assert "note: the side-car does not tell" in str(made)
    for odd in ({"weight": [1, 2]}, {"lung_litres": [1, 2, 3]}):
        strange = with_side_car(model, tmp_path / str(len(odd) + len(next(iter(odd)))), validation={"trained_on": odd})
        with pytest.raises(runs.InputError, match="trained_on holds"):
            predict.open_model(strange)


@pytest.mark.parametrize("changes, words", [
    ({"schema": 99}, "schema = 99"), ({"model_hash": "0"}, "model_hash = 0"), ({"stride": 4}, "stride = 4"),
    ({"windows_hu": [[0, 1]]}, "windows_hu"), ({"classes": ["A"]}, "4 subtypes apart"),
    ({"classes": None}, "lacks classes"),
    ({"classes": ["A", "=HYPERLINK(1)", "E", "G"]}, "has a class '=HYPERLINK(1)'"),
    ({"classes": ["A", "B\x1b[2J", "E", "G"]}, "has a class 'B"),
    ({"training_hash": None}, "lacks training_hash"), ({"packages": None}, "lacks packages"),
    ({"grid": {"size": 64, "spacing_mm": 12.0}}, "takes 32 voxels a side, its side-car says 64"),
    ({"grid": {"size": 32}}, "lacks grid spacing_mm")])
def test_each_field_of_the_side_car_counts(changes, words, model, patient, tmp_path):
    strange = with_side_car(model, tmp_path / "m", **changes)
    with pytest.raises(runs.InputError, match=re.escape(words)) as error:
        predict.predict_folder(patient, strange, tmp_path / "out", workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_other_versions_of_packages_are_remarked_upon(model, tmp_path):
    packages = json.loads(model.with_suffix(".json").read_text())["packages"]
    _, _, remarks = predict.open_model(with_side_car(model, tmp_path / "m", packages=packages | {"numpy": "0.1"}))
    assert remarks[0] == f"the model was made with numpy 0.1 (here {packages['numpy']})"


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


def test_fewer_than_one_box_is_the_users_to_mend(opened, patient, model, tmp_path):
    network, info, _ = predict.open_model(model)
    for ask in (lambda n: predict.predict_stack(opened[0][1], network, info, max_boxes=n),
                lambda n: predict.predict_stacks([], network, info, max_boxes=n),
                lambda n: predict.predict_folder(patient, model, tmp_path / "out", max_boxes=n, workers=1)):
        for count in (0, -1):
            with pytest.raises(runs.InputError, match=f"max_boxes is {count}, expected 1 or more"):
                ask(count)
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
    assert {"model_hash", "training_hash", "packages", "validation", "grid"} <= set(saved["model"])
    for stack in saved["stacks"]:
        assert stack["subtype"] == (max(stack["subtypes"], key=stack["subtypes"].get) if stack["subtypes"] else None)


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
    person = instances["patient_id"].iloc[0].encode()
    assert not [path.name for path in made.out.iterdir() if person in path.read_bytes() or person in path.name.encode()]
    shown = predict.predict_folder(patient, model, tmp_path, pictures=0, show_identity=True, workers=1)
    assert {stack["patient_id"] for stack in shown.stacks} == set(instances["patient_id"])
    assert not list(tmp_path.glob("*.png"))
    assert {str(pydicom.dcmread(path).PatientID) for path in tmp_path.glob("*.dcm")} == {person.decode()}


def test_seg_sr_and_mask_hold_the_boxes_of_the_table(patient, model, tmp_path):
    made = predict.predict_folder(patient, model, tmp_path, pictures=0, nifti=True, workers=1)
    answered = [stack for stack in made.stacks if stack["boxes"]]
    assert answered and not any(stack["notes"] for stack in made.stacks)
    for stack in answered:
        seg = highdicom.seg.segread(tmp_path / stack["files"]["seg"])
        report = highdicom.sr.srread(tmp_path / stack["files"]["sr"])
        labels, _ = exchange.read_nifti(tmp_path / stack["files"]["nifti"])
        assert labels.shape[0] == stack["slices"] and labels.max() == len(stack["boxes"]) == seg.number_of_segments
        first = [stack["boxes"][0][name] for name in predict.PIXELS]
        i0, i1, j0, j1, k0, k1 = first
        assert (labels[k0:k1, j0:j1, i0:i1] == 1).all() and (labels == 1).sum() == (i1 - i0) * (j1 - j0) * (k1 - k0)
        groups = report.content.get_volumetric_roi_measurement_groups()
        certain = [group.get_measurements()[0].value for group in groups]
        assert np.allclose(certain, [100 * box["score"] for box in stack["boxes"]], atol=0.01)
        assert seg.PatientID == stack["study"] and stack["files"]["seg"] == f"{stack['stack']}_seg.dcm"
    none = predict.predict_folder(patient, model, tmp_path, pictures=0, dicom_files=False, workers=1)
    assert sorted(path.name for path in none.out.iterdir()) == ["predictions.csv", "predictions.json"]


@pytest.mark.parametrize("arguments, files", [
    ([], {"csv", "json", "png", "dcm"}), (["--no-dicom", "--nifti", "--pictures", "0"], {"csv", "json", "gz"})])
def test_the_command_writes_what_its_options_say(arguments, files, patient, model, tmp_path, capsys):
    course.app(["predict", str(patient), "--model", str(model), "--out", str(tmp_path), "--boxes", "1", *arguments],
               standalone_mode=False)
    assert {path.name.rsplit(".", 1)[1] for path in tmp_path.iterdir()} == files
    assert pd.read_csv(tmp_path / "predictions.csv").groupby("stack").size().max() == 1
    told = capsys.readouterr()
    stacks = runs.load_json(tmp_path / "predictions.json")["stacks"]
    answered = sum(stack["refused"] is None for stack in stacks)
    assert told.out.startswith(f"{len(stacks)} stacks, {answered} answered; results in") and 0 < answered < len(stacks)
    assert told.err == "" and "Lung_Dx" not in told.out


def test_the_command_says_who_it_is_and_answers_all_the_same_when_asked(patient, model, tmp_path):
    odd = with_side_car(model, tmp_path / "m", validation={"trained_on": {"lung_litres": [50.0, 60.0]}})
    course.app(["predict", str(patient), "--model", str(odd), "--out", str(tmp_path / "out"), "--boxes", "1",
                "--pictures", "0", "--no-dicom", "--show-identity", "--even-if-unlike"], standalone_mode=False)
    stacks = runs.load_json(tmp_path / "out" / "predictions.json")["stacks"]
    assert {stack["patient_id"] for stack in stacks} == {patient.name}
    assert any(stack["boxes"] and stack["unlike_training"] for stack in stacks)


def test_results_of_an_earlier_call_go_and_nothing_else_does(patient, model, tmp_path):
    stale = ["stack_07_box_1.png", "stack_07_seg.dcm", "stack_07_sr.dcm", "stack_07_boxes.nii.gz", "predictions.csv"]
    kept = ["letter.txt", "stack_1.png", "stack_07_seg.dcm.bak", "my_predictions.csv"]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("stack,series,rank,score\nold\n")
    predict.predict_folder(patient, model, tmp_path, pictures=1, dicom_files=False, workers=1)
    there = {path.name for path in tmp_path.iterdir()}
    assert set(kept) <= there and not {name for name in stale if name.startswith("stack_07")} & there
    assert "old" not in (tmp_path / "predictions.csv").read_text()


def test_an_interrupted_call_leaves_the_results_of_an_earlier_one(patient, model, tmp_path, monkeypatch):
    folder = shutil.copytree(patient, tmp_path / "in")
    earlier = {"predictions.json": '{"note": "Not for clinical use."}',
               "stack_01_box_1.png": "old", "letter.txt": "old"}
    for name, text in earlier.items():
        (folder / name).write_text(text)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(predict, "_export", interrupted)
        predict.predict_folder(folder, model, folder, pictures=1, workers=1)
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name in earlier} == earlier
    assert not list(folder.glob("stack_*_box_[2-9].png"))
    alive = folder / f".lungct-{runs.own_mark()}x"            # of a call that is at work now
    alive.mkdir()
    (folder / ".lungct-file").write_text("")
    elsewhere = folder / ".lungct-0badcafe-999999999-x"    # of a call on another machine, where the number may live
    elsewhere.mkdir()
    killed = folder / f".lungct-{runs.host_mark()}999999999-x"         # of one that could not tidy up
    killed.mkdir()
    (killed / "stack_01_seg.dcm").write_text("cut off")
    done = predict.predict_folder(folder, model, folder, pictures=1, workers=1)
    assert done.out == folder and not killed.exists()
    left = {path.name for path in folder.glob(".lungct-*")}
    assert left == {alive.name, elsewhere.name, ".lungct-file"}
    assert done.unread == {"not DICOM": 1, "zero byte": 1}, "the letter, and the other file"
    assert runs.load_json(folder / "predictions.json")["stacks"] == done.stacks


@pytest.mark.parametrize(("name", "text"), [("predictions.csv", "patient,fate\n1,2\n"),
                                            ("predictions.json", '{"mine": 1}')])
def test_tables_of_others_are_not_replaced(patient, model, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(runs.InputError, match=rf"{name} was not written by lungct predict and would be lost"):
        predict.predict_folder(patient, model, tmp_path, pictures=0, workers=1)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: text}


@pytest.mark.filterwarnings("ignore:The value length")
def test_words_of_a_header_neither_steer_the_terminal_nor_tell_who_it_is(patient, model, tmp_path):
    shutil.copytree(patient, tmp_path / "in")
    for path in sorted((tmp_path / "in").rglob("*.dcm")):
        image = pydicom.dcmread(path)
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "Muster^Hans 1950\x1b[2J"]
        image.save_as(path)
    ask = {"pictures": 0, "workers": 1}
    done = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", **ask)
    said = str(done) + (tmp_path / "out" / "predictions.json").read_text()
    assert "LOCALIZER" in said and "<image_type>" in said and "Muster" not in said and "\x1b" not in said
    named = str(predict.predict_folder(tmp_path / "in", model, tmp_path / "out", show_identity=True, **ask))
    assert r"Muster^Hans 1950\x1b[2J" in named and "\x1b" not in named


def test_a_second_call_into_the_same_folder_is_turned_away(patient, model, tmp_path):
    with runs.alone(tmp_path / "out"), pytest.raises(runs.InputError, match="another lungct is at work in"):
        predict.predict_folder(patient, model, tmp_path / "out", pictures=0, workers=1)
    done = predict.predict_folder(patient, model, tmp_path / "out", pictures=0, workers=1)
    assert done.answered and not (tmp_path / "out" / runs.LOCK).exists()


def test_a_stack_whose_images_tell_no_thickness_is_answered_with_objects(patient, model, tmp_path):
    shutil.copytree(patient, tmp_path / "in")
    for path in sorted((tmp_path / "in").rglob("*.dcm")):
        image = pydicom.dcmread(path)
        image.SliceThickness = None
        image.save_as(path)
    done = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", pictures=0, workers=1)
    written = [stack for stack in done.stacks if stack["boxes"]]
    assert written and not any(stack["notes"] for stack in written)
    for stack in written:
        seg = pydicom.dcmread(tmp_path / "out" / stack["files"]["seg"])
        measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        step = np.linalg.norm(np.reshape(stack["affine"], (4, 4))[:3, 2])
        assert float(measures.SliceThickness) == pytest.approx(step, abs=1e-3)


def test_a_stack_of_which_no_object_can_be_made_is_noted_and_the_others_go_on(patient, model, tmp_path, monkeypatch):
    to_seg, tried = exchange.to_seg, []

    def fails_once(sources, found):
        tried.append(found)
        if len(tried) == 1:
            raise AttributeError("'Dataset' object has no attribute 'X'")
        return to_seg(sources, found)

    monkeypatch.setattr(exchange, "to_seg", fails_once)
    done = predict.predict_folder(patient, model, tmp_path, pictures=0, workers=1)
    notes = [note for stack in done.stacks for note in stack["notes"]]
    assert notes == ["SEG and SR not written: 'Dataset' object has no attribute 'X'"] and len(tried) > 1


def test_a_stack_says_where_its_voxels_lie_and_which_images_it_is(made, patient, model, tmp_path):
    shown = predict.predict_folder(patient, model, tmp_path, pictures=0, show_identity=True, workers=1)
    stacks, instances = dicom.build_stacks(dicom.index_dicom(patient, workers=1)[0], root=patient)
    rows = stacks.sort_values("stack_id").to_dict("records")
    for hidden, told, row in zip(made.stacks, shown.stacks, rows, strict=True):
        of_stack = instances[instances["stack_id"] == row["stack_id"]].sort_values("slice_index")
        assert told["sop_uids"] == of_stack["sop_uid"].tolist() and "sop_uids" not in hidden
        assert (hidden["phase"], hidden["rows"], hidden["columns"]) == (row["phase"], row["rows"], row["columns"])
        if row["affine"] is None:
            assert hidden["affine"] is None
        else:
            first = np.reshape(hidden["affine"], (4, 4)) @ [0, 0, 0, 1]
            assert np.allclose(first[:3], of_stack["position_mm"].iloc[0], atol=1e-3)
        if "seg" in told["files"]:
            seg = pydicom.dcmread(tmp_path / told["files"]["seg"])
            of_series = sum(other["series_uid"] == row["series_uid"] for other in rows)
            told_part = f", phase {row['phase']} of {of_series}" if of_series > 1 else ""
            assert seg.SeriesDescription == f"lungct boxes{told_part}. Not for clinical use"
    assert json.loads((tmp_path / "predictions.json").read_text())["stacks"] == shown.stacks


def test_objects_of_a_series_of_two_phases_say_which_one_they_mean(patient, model, tmp_path):
    shutil.copytree(patient, tmp_path / "in")
    stacks, instances = dicom.build_stacks(dicom.index_dicom(patient, workers=1)[0], root=patient)
    stack = stacks[(stacks["modality"] == "CT") & (stacks["status"] == "accepted")].iloc[0]
    for path in instances.loc[instances["stack_id"] == stack["stack_id"], "path"]:
        again = pydicom.dcmread(tmp_path / "in" / path)
        again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        again.InstanceNumber += int(stack["slices"])
        again.AcquisitionNumber = 2
        again.save_as(tmp_path / "in" / f"{path}-again.dcm")
    done = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", pictures=0, workers=1)
    both = [told for told in done.stacks if told["phases"] == 2]
    said = {told["phase"]: pydicom.dcmread(tmp_path / "out" / told["files"]["seg"]).SeriesDescription for told in both}
    assert said == {phase: f"lungct boxes, phase {phase} of 2. Not for clinical use" for phase in (1, 2)}


def test_results_among_the_scans_are_no_scans_the_next_time(patient, model, tmp_path):
    shutil.copytree(patient, tmp_path / "in")
    first = predict.predict_folder(tmp_path / "in", model, tmp_path / "in", pictures=1, workers=1)
    stacks = runs.load_json(tmp_path / "in" / "predictions.json")["stacks"]
    assert list((tmp_path / "in").glob("*_seg.dcm"))
    second = predict.predict_folder(tmp_path / "in", model, tmp_path / "in", pictures=1, workers=1)
    assert runs.load_json(tmp_path / "in" / "predictions.json")["stacks"] == stacks and second.unread == first.unread
    (tmp_path / "only").mkdir()
    for path in (tmp_path / "in").glob("stack_*"):
        shutil.copy(path, tmp_path / "only")
    with pytest.raises(runs.InputError, match="nothing but results of an earlier call"):
        predict.predict_folder(tmp_path / "only", model, tmp_path / "only", workers=1)
    assert list((tmp_path / "only").glob("*_seg.dcm")), "what was refused is left as it was"


def test_a_place_that_cannot_be_written_is_one_line(patient, model, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/lungct"):
        with pytest.raises(runs.InputError, match="could not be written") as error:
            predict.predict_folder(patient, model, out, workers=1)
        assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(patient, model, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    asked = ["predict", str(patient), "--model", str(model), "--out", str(tmp_path / "out"), "--pictures", "0"]
    assert course.app(asked, standalone_mode=False) == 2
    told = capsys.readouterr().err
    assert told == f"lungct: no space left in {tmp_path / 'out'}: free some, and give the same command again\n"


# odd folders ------------------------------------------------------------------------------------------------------

def test_several_patients_in_folders_with_odd_names(phantom_dir, model, tmp_path):
    root = tmp_path / "Müller, Jörg (東京)"
    for folder in sorted((phantom_dir / "Lung-PET-CT-Dx").glob("Lung_Dx-*"))[:2]:
        shutil.copytree(folder, root / f"of {folder.name}")
    made = predict.predict_folder(root, model, tmp_path / "out", pictures=1, workers=1)
    studies = {stack["study"] for stack in made.stacks}
    assert len(studies) >= 2 and len({stack["stack"] for stack in made.stacks}) == len(made.stacks)
    files = list((tmp_path / "out").iterdir())
    assert any(path.suffix == ".dcm" for path in files)
    for secret in ("Müller", "東京", "Lung_Dx"):
        assert not [path for path in files if secret in path.name or secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("shuffled", [False, True])
def test_one_image_of_all_slices_gets_the_same_boxes_and_voxels(shuffled, opened, phantom_dir, model, tmp_path):
    images = [pydicom.dcmread(phantom_dir / "Lung-PET-CT-Dx" / row["path"]) for row in opened[0][1].slices]
    (tmp_path / "in").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = LegacyConvertedEnhancedCTImage(images[::-1], "1.2.7.1", 7, "1.2.7.2", 1)
    if shuffled:
        order = np.random.default_rng(0).permutation(image.NumberOfFrames)
        image.PixelData = image.pixel_array[order].tobytes()
        image.PerFrameFunctionalGroupsSequence = [image.PerFrameFunctionalGroupsSequence[int(k)] for k in order]
    image.save_as(tmp_path / "in" / "all.dcm")
    made = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", nifti=True, pictures=0, workers=1)
    stack, = made.stacks
    network, info, _ = predict.open_model(model)
    assert stack["notes"] == [] and stack["boxes"] == predict.predict_stack(opened[0][1], network, info).boxes
    seg = highdicom.seg.segread(tmp_path / "out" / stack["files"]["seg"])
    _, affine = exchange.read_nifti(tmp_path / "out" / stack["files"]["nifti"])
    for frame in seg.PerFrameFunctionalGroupsSequence:             # each frame lies on the slice where the mask is
        segment = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        k = round(dicom.to_voxel(affine, np.array([frame.PlanePositionSequence[0].ImagePositionPatient], float))[0, 2])
        box = stack["boxes"][segment - 1]
        assert box["k0"] <= k < box["k1"]
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
        told = image.PerFrameFunctionalGroupsSequence[source.ReferencedFrameNumber - 1].PlanePositionSequence[0]
        assert np.allclose(told.ImagePositionPatient, frame.PlanePositionSequence[0].ImagePositionPatient, atol=1e-3)
    assert len(seg.PerFrameFunctionalGroupsSequence) == sum(box["k1"] - box["k0"] for box in stack["boxes"])


def test_images_that_name_no_frame_of_reference_are_answered_without_seg(opened, phantom_dir, model, tmp_path):
    (tmp_path / "in").mkdir()
    for k, row in enumerate(opened[0][1].slices):
        image = pydicom.dcmread(phantom_dir / "Lung-PET-CT-Dx" / row["path"])
        del image.FrameOfReferenceUID
        image.save_as(tmp_path / "in" / f"{k}.dcm")
    made = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", nifti=True, pictures=0, workers=1)
    stack, = made.stacks
    told = "SEG and SR not written: no SEG and SR for images that name no frame of reference: use JSON or NIfTI"
    assert stack["boxes"] and stack["notes"] == [told]
    assert list(stack["files"]) == ["nifti"] and stack["notes"][0] in str(made)


def changed_copies(opened, phantom_dir, folder, change):
    """The images of a stack in `folder`, each changed by `change(image)`."""
    folder.mkdir(parents=True)
    for k, row in enumerate(opened[0][1].slices):
        image = pydicom.dcmread(phantom_dir / "Lung-PET-CT-Dx" / row["path"])
        change(image)
        image.save_as(folder / f"{k}.dcm")


def lean(image):
    """Shift a slice by a hundredth of its height: 0.4 of the 0.5 degrees that chapter 1 allows."""
    x, y, z = image.ImagePositionPatient
    image.ImagePositionPatient = [x, y + 0.007 * z, z]


def test_axes_that_nifti_cannot_say_cost_one_stack_its_mask_and_the_others_nothing(opened, phantom_dir, model,
                                                                                  tmp_path):
    changed_copies(opened, phantom_dir, tmp_path / "in" / "leaning", lean)
    changed_copies(opened[1:], phantom_dir, tmp_path / "in" / "straight", lambda image: None)
    made = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", nifti=True, pictures=0, workers=1)
    leaning, straight = sorted(made.stacks, key=lambda stack: "nifti" in stack["files"])
    (note,) = leaning["notes"]
    assert re.match(r"NIfTI not written: the axes are not perpendicular .*, or use JSON, SEG and SR$", note)
    assert leaning["boxes"] and list(leaning["files"]) == ["seg", "sr"] and note in str(made)
    assert list(straight["files"]) == ["nifti", "seg", "sr"] and straight["notes"] == []
    assert (tmp_path / "out" / "predictions.json").is_file()


@pytest.mark.parametrize("keyword, words", [("StudyInstanceUID", "study"), ("SOPClassUID", "SOP class")])
def test_images_that_name_no_study_or_class_are_answered_without_seg(keyword, words, opened, phantom_dir, model,
                                                                     tmp_path):
    changed_copies(opened, phantom_dir, tmp_path / "in", lambda image: delattr(image, keyword))
    for show_identity in (False, True):
        stack, = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", pictures=0, workers=1,
                                        show_identity=show_identity).stacks
        told = f"SEG and SR not written: no SEG and SR for images that name no {words}: use JSON or NIfTI"
        assert stack["boxes"] and stack["notes"] == [told] and stack["files"] == {}


def test_a_patient_without_an_id_is_written_as_null_when_asked_who_it_is(opened, phantom_dir, model, tmp_path):
    changed_copies(opened, phantom_dir, tmp_path / "in", lambda image: setattr(image, "PatientID", ""))
    predict.predict_folder(tmp_path / "in", model, tmp_path / "out", pictures=0, show_identity=True, workers=1)
    stack, = runs.load_json(tmp_path / "out" / "predictions.json")["stacks"]
    image = pydicom.dcmread(tmp_path / "in" / "0.dcm")
    assert stack["patient_id"] is None and stack["study_uid"] == image.StudyInstanceUID


def test_a_tilted_gantry_is_refused_in_words(opened, phantom_dir, model, tmp_path):
    lean = np.deg2rad(12)
    (tmp_path / "in").mkdir()
    for k, row in enumerate(opened[0][1].slices):
        image = pydicom.dcmread(phantom_dir / "Lung-PET-CT-Dx" / row["path"])
        image.ImageOrientationPatient = [1, 0, 0, 0, round(np.cos(lean), 9), round(np.sin(lean), 9)]
        image.save_as(tmp_path / "in" / f"{k}.dcm")
    stack, = predict.predict_folder(tmp_path / "in", model, tmp_path / "out", workers=1).stacks
    assert stack["refused"] == "no usable volume" and stack["detail"].startswith("tilted gantry: ")


def test_a_file_that_cannot_be_read_costs_its_stack_and_is_not_named(patient, model, tmp_path, monkeypatch):
    def broken(row, slices, root):
        raise ValueError(f"file {slices['path'].iloc[0]} of {row['patient_id']} changed since it was indexed")

    monkeypatch.setattr(dicom, "open_stack", broken)
    made = predict.predict_folder(patient, model, tmp_path, workers=1)
    failed = [stack for stack in made.stacks if stack["refused"] == "cannot be read"]
    assert {stack["detail"] for stack in failed} == {"file <path> of <patient_id> changed since it was indexed"}


@pytest.mark.parametrize("relative", [False, True])
def test_the_name_of_the_folder_may_be_the_patients(tmp_path, monkeypatch, relative):
    folder = tmp_path / "Müller Hans  1950"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    folder = Path(folder.name) if relative else folder
    slices = pd.DataFrame({"path": ["p/1.dcm"], "stack_id": ["1_2ab"], "patient_id": ["1"], "series_uid": ["1.2.3"],
                           "study_uid": ["1.2"], "sop_uid": ["1.2.3.4"]})
    text = (f"{folder}/p/1.dcm: frame 11 of 1.2.3.4, series 1.2.3. in study 1.2,\n pydicom of {tmp_path / folder}: "
            "patient 1 has 1.5 mm; 1_2ab")
    told = predict._without_names(text, slices, folder, SimpleNamespace(show_identity=False))
    assert told == ("<folder>/<path>: frame 11 of <sop_uid>, series <series_uid>. in study <study_uid>, pydicom of "
                    "<folder>: patient <patient_id> has 1.5 mm; <stack_id>")
    assert "Hans" in predict._without_names(text, slices, folder, SimpleNamespace(show_identity=True))


# the library ------------------------------------------------------------------------------------------------------

def test_many_stacks_get_the_answers_they_get_alone(opened, model):
    network, info, _ = predict.open_model(model)
    stacks = [stack for _, stack in opened[:3]]
    together = list(predict.predict_stacks(iter(stacks), network, info, batch_size=2))     # the last batch is filled up
    alone = [predict.predict_stack(stack, network, info) for stack in stacks]
    assert len(together) == 3
    for one, other in zip(together, alone, strict=True):
        assert [box["rank"] for box in one.boxes] == [box["rank"] for box in other.boxes]
        assert np.allclose([box["score"] for box in one.boxes], [box["score"] for box in other.boxes], atol=1e-5)
        assert one.facts == other.facts and np.array_equal(one.ct_hu, other.ct_hu)


def test_a_stack_in_memory_and_an_opened_one_are_the_same(opened, model):
    network, info, _ = predict.open_model(model)
    stack = opened[0][1]
    read = dicom.Stack("s", np.stack([stack[k] for k in range(len(stack))]), stack.affine, "CT", (), 0)
    first, second = (predict.predict_stack(each, network, info) for each in (stack, read))
    assert first.boxes == second.boxes and first.boxes
    assert predict.picture(read, first.boxes[0], "t").axes[0].get_images()


def test_the_viewer_draws_what_its_switches_say(opened, model):
    network, info, _ = predict.open_model(model)
    answer = predict.predict_stack(opened[0][1], network, info)
    _, _, controls, picture = predict.view(answer, "t", headless=False).children
    _, boxes, heat = controls.children
    start = picture.value
    heat.value = True
    assert picture.value != start
    heat.value = False
    assert picture.value == start
    boxes.value = False
    assert picture.value != start
    empty = predict.view(SimpleNamespace(**vars(answer) | {"seen": None}), headless=True)
    assert len(empty.subfigs) == 1 and len(predict.view(answer, headless=True).subfigs) == 2
    assert isinstance(plots.browse(answer.ct_hu, (1, 1, 1), headless=True), type(empty))


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
    answered = [stack for stack in made.stacks if stack["boxes"]]
    assert len(list(tmp_path.glob("*_seg.dcm"))) == len(list(tmp_path.glob("*_sr.dcm"))) == len(answered)
    assert not [path.name for path in tmp_path.iterdir() if b"Lung_Dx-A0001" in path.read_bytes()]
    for path in tmp_path.glob("*.dcm") if shutil.which("dciodvfy") else ():
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=60)
        told = done.stdout + done.stderr
        assert not [line for line in told.splitlines() if line.startswith("Error")], told


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_batch_holds_stacks(batch_size):
    with pytest.raises(runs.InputError, match="batch_size is"):
        predict.predict_stacks([], None, {}, batch_size=batch_size)


def test_a_box_on_the_edges_of_voxels_is_the_block_of_these_voxels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = np.diag(rng.choice([0.7, 0.9, 1.1, 3.3], 3)), rng.uniform(-200, 200, 3)
        first = rng.integers(0, 40, 3)
        last = first + rng.integers(1, 20, 3)
        corners = dicom.to_mm(affine, np.array([first, last]) - 0.5).ravel()
        assert predict.to_pixels(corners, affine, (60, 60, 60)).tolist() == np.stack([first, last], 1).ravel().tolist()


def test_a_picture_is_of_a_slice_in_the_middle_with_the_box_in_its_place(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "show_slice", lambda hu, ax, spacing, **ways: shown.append((hu, spacing, ways["boxes"])))
    stack = dicom.Stack("toy", np.arange(9.0)[:, None, None] * np.ones((9, 20, 30)), np.diag([0.5, 0.8, 3.0, 1.0]),
                        "CT", (), 0)
    for k0, k1, middle in ((2, 5, 3), (8, 9, 8), (0, 1, 0)):
        box = {"rank": 1, "score": 0.5, **dict(zip(predict.PIXELS, (4, 9, 5, 7, k0, k1), strict=True))}
        predict.picture(stack, box, "toy")
        for hu, spacing_yx_mm, boxes in shown[-2:]:
            assert np.unique(hu).tolist() == [middle] and boxes == [[4, 5, 9, 7]]
            assert spacing_yx_mm.tolist() == [0.8, 0.5]
