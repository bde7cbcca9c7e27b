"""Chapter 5: targets, losses, augmentation, the loop, checkpoints, the model file, at sizes that train in seconds."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates, minimum_filter, rotate
from scipy.special import sph_harm_y
from sklearn.linear_model import LogisticRegression

from lungct import labels, runs, training, volumes
from lungct.training import Examples, Settings

SIZE = 16


def toys(n=4, size=SIZE, targets=(0, 1), seed=0):
    """Volumes with one bright block each; its size says which subtype it is."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(-800, 30, (n, size, size, size))
    boxes = []
    for i in range(n):
        low = rng.integers(1, size // 2, 3)
        high = low + (3 if targets[i % len(targets)] == 0 else 6)
        hu[i, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 40
        boxes.append(np.array([[*low, *high]], "float32"))
    names = np.array([f"p{i}" for i in range(n)])
    return Examples(hu.astype("int16"), boxes, np.array([targets[i % len(targets)] for i in range(n)]), names, names)


def walled(examples):
    """The same volumes with tissue in front and behind, as lung has."""
    hu = examples.ct_hu.copy()
    hu[:, :, [0, -1]] = 0
    return replace(examples, ct_hu=hu)


def glowing(examples, without=()):
    """The same volumes with a PET in which the boxes shine; none for the rows `without`."""
    suv = np.full(examples.ct_hu.shape, 0.5, "float32")
    for volume, ((z0, y0, x0, z1, y1, x1),) in zip(suv, examples.boxes_zyx, strict=True):
        volume[int(z0) : int(z1), int(y0) : int(y1), int(x0) : int(x1)] = 8
    suv[list(without)] = np.nan
    return replace(examples, pet_suv=suv)


def network(classes=("A", "G"), size=SIZE, seed=0, filters=(8,), **options):
    training.reproducible(seed)
    return training.build_network(size, classes, filters, **options)


def at_once(parts):
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fill_head(network):
    """Weights for the subtype and figures of the evidence, which a network that was not trained lacks."""
    rng = np.random.default_rng(0)
    for name in ("subtype", "evidence_scale"):
        layer = network.get_layer(name)
        layer.set_weights([rng.uniform(0.1, 1, values.shape) for values in layer.get_weights()])


def quick(**changes):
    return Settings(**({"epochs": 3, "batch_size": 2, "patience": 3} | changes))


# ---- examples


def test_gather_takes_annotated_volumes_of_the_role_in_the_order_of_the_cohort():
    table = pd.DataFrame({"stack_id": ["s3", "s1", "s2", "s4"]})
    boxes = [np.full((i, 6), i) for i in range(4)]
    cohort = SimpleNamespace(table=table, ct_hu=np.arange(4).reshape(4, 1, 1, 1), boxes_zyx=boxes,
                             pet_suv=None)
    labels = pd.DataFrame({"stack_id": ["s1", "s2", "s3", "s4"], "patient_id": ["a", "b", "c", "d"],
                           "target": [0, 1, 1, 0], "lesions": [1, 0, 2, 1],
                           "role": ["train", "train", "train", "test"]})
    got = training.gather(cohort, labels, "train")
    assert got.stack_id.tolist() == ["s3", "s1"]  # s2 has no boxes: unlabelled, not negative
    assert got.patient_id.tolist() == ["c", "a"] and got.target.tolist() == [1, 0]
    assert got.ct_hu.ravel().tolist() == [0, 1] and [len(b) for b in got.boxes_zyx] == [0, 1]
    nobody = training.gather(cohort, labels, "validation")
    assert len(nobody) == 0 and nobody.target.dtype == int and got.pet_suv is None
    cohort.pet_suv = 10.0 * cohort.ct_hu
    assert training.gather(cohort, labels, "train").pet_suv.ravel().tolist() == [0, 10]


def test_unused_volumes_teach_nothing_and_two_reconstructions_are_one_patient():
    roles = ["train", "unused", "train", "train", "validation"]
    labels = pd.DataFrame({"stack_id": list("abcde"), "patient_id": list("pppqr"), "target": [0, -1, 0, 1, 0],
                           "lesions": [1, 1, 1, 1, 1], "role": roles})
    cohort = SimpleNamespace(table=labels[["stack_id"]], ct_hu=np.zeros((5, 1, 1, 1)), boxes_zyx=[np.ones((1, 6))] * 5,
                             pet_suv=None)
    train = training.gather(cohort, labels, "train")
    assert train.stack_id.tolist() == ["a", "c", "d"]  # b is annotated, but chapter 4 set it aside
    draws = training.sample_patients(train, 1000, np.random.default_rng(0), balance=0)
    assert (train.patient_id[draws] == "p").sum() == 500  # two volumes of p weigh as much as the one of q
    assert set(train.stack_id[draws]) == {"a", "c", "d"}
    assert training._one_each(train).stack_id.tolist() == ["a", "d"]  # and p is validated once


def test_plain_arrays_become_examples_and_a_history():
    own = training.make_examples(toys(4).ct_hu, [b.tolist() for b in toys(4).boxes_zyx])
    assert own.target.tolist() == [-1] * 4 and len(set(own.patient_id)) == 4
    history = training.fit(network([]), own, settings=quick(epochs=2))
    assert history.epoch.tolist() == [1, 2] and np.isfinite(history.to_numpy()).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"ct_hu": np.zeros((2, 4, 4, 5))}, r"ct_hu has shape \(2, 4, 4, 5\), expected \(n, s, s, s\)"),
    ({"boxes_zyx": [[]]}, "boxes_zyx has 1 entries for 2 volumes"), ({"target": [0]}, "target has 1 entries"),
    ({"boxes_zyx": [[], [3, 1, 1, 2, 2, 2]]}, "a box of volume_1 is no z0 y0 x0 z1 y1 x1 in voxel edges from 0 to 4"),
    ({"boxes_zyx": [[[0, 0, 0, 2, 2, 5]], []]}, "a box of volume_0 is no"),
    ({"boxes_zyx": [[], [1, 1, 2, 2]]}, "a box of volume_1 is no z0 y0 x0 z1 y1 x1"),
    ({"pet_suv": np.zeros((1, 4, 4, 4))}, "they must be on one grid"),
    ({"ct_hu": np.full((2, 4, 4, 4), "air")}, "ct_hu holds <U3, expected numbers in HU"),
    ({"ct_hu": np.full((2, 4, 4, 4), np.nan)}, "ct_hu holds NaN or infinity"),
    ({"target": [0, 1.9]}, r"target holds 1\.9, expected whole numbers: the index of a subtype, or -1 for none"),
    ({"target": [0, -2]}, "target holds -2"), ({"target": [np.nan, np.inf]}, "target holds nan"),
    ({"target": ["A", "G"]}, "target holds 'A'"), ({"target": [[0], [1]]}, r"target is \[\[0\]")])
def test_arrays_that_do_not_fit_are_named(changes, message):
    with pytest.raises(runs.InputError, match=message):
        training.make_examples(**({"ct_hu": np.zeros((2, 4, 4, 4)), "boxes_zyx": [[], []]} | changes))


def test_whole_numbers_are_targets_however_they_are_stored():
    for target in ([0.0, -1.0], np.array([0, -1], object), np.array([0, -1], "int8"), pd.Series([0, -1])):
        own = training.make_examples(np.zeros((2, 4, 4, 4), "int16"), [[], []], target)
        assert own.target.tolist() == [0, -1] and own.target.dtype == int


def test_a_cohort_that_is_not_in_memory_is_refused():
    on_disk = volumes.Entries(lambda i: None, "ct_hu", 1)
    cohort = SimpleNamespace(table=pd.DataFrame({"stack_id": ["s"]}), ct_hu=on_disk, boxes_zyx=[[]], pet_suv=None)
    known = pd.DataFrame({"stack_id": ["s"], "patient_id": ["a"], "target": [0], "lesions": [1], "role": ["train"]})
    with pytest.raises(runs.InputError, match="the cohort is not in memory: .*in_memory=True"):
        training.gather(cohort, known, "train")


def test_fewer_patients_lie_within_more_and_keep_the_subtypes():
    names = np.repeat([f"p{i:02d}" for i in range(20)], 2)
    target = np.repeat([0] * 15 + [1] * 5, 2)
    many = Examples(np.zeros((40, 1, 1, 1)), [np.zeros((0, 6))] * 40, target, names, names)
    few, more = (training.some_patients(many, count, seed=3) for count in (4, 8))
    assert len(few) == 8 and len(more) == 16 and set(few.patient_id) < set(more.patient_id)
    assert [(e.target == 1).sum() // 2 for e in (few, more)] == [1, 2]
    assert set(training.some_patients(many, 8, seed=4).patient_id) != set(more.patient_id)


def test_normalise_maps_each_window_to_the_unit_interval():
    got = np.asarray(training.normalise(np.array([-3024, -1000, -160, 40, 240, 400, 3000])))
    assert got.shape == (7, 2) and got.dtype == np.float32
    assert np.allclose(got[:, 0], [0, 0, 0.6, 1040 / 1400, 1240 / 1400, 1, 1])
    assert np.allclose(got[:, 1], [0, 0, 0, 0.5, 1, 1, 1])


# ---- PET


@pytest.mark.parametrize("kind", ["int16", "float32"])
def test_arrays_and_tensors_are_normalised_alike(kind):
    hu = np.random.default_rng(0).integers(-2000, 3000, (2, 8, 8, 8)).astype(kind)
    seen = training.normalise(hu)
    assert isinstance(seen, np.ndarray) and seen.dtype == np.float32
    assert np.allclose(seen, training.normalise(training.ops.convert_to_tensor(hu)), atol=1e-6)


def test_pet_has_two_channels_and_absence_is_not_zero_uptake():
    got = np.asarray(training.normalise(np.full(4, -1000), np.array([5, 99, 0, np.nan])))
    assert got[:, 2:].tolist() == [[0.5, 1], [1, 1], [0, 1], [0, 0]] and not got[:, :2].any()
    net, few = network(pet=True), glowing(toys(2), without=[1])
    shown, withheld = training.predict(net, few.ct_hu, pet_suv=few.pet_suv), training.predict(net, few.ct_hu)
    assert np.array_equal(shown[1].heat, withheld[1].heat) and not np.array_equal(shown[0].heat, withheld[0].heat)
    cold = training.predict(net, few.ct_hu, pet_suv=np.zeros_like(few.pet_suv))
    assert not np.array_equal(cold[1].heat, withheld[1].heat)


def test_a_network_for_ct_does_not_look_at_the_pet():
    net, few = network(), glowing(toys(2))
    one, two = training.predict(net, few.ct_hu)[0], training.predict(net, few.ct_hu, pet_suv=few.pet_suv)[0]
    assert np.array_equal(one.heat, two.heat) and not training.takes_pet(net)
    assert training.examples_hash(few) != training.examples_hash(toys(2))


def test_pet_moves_with_the_voxels_and_is_not_disturbed():
    few = glowing(toys(4), without=[2])
    plain = training.augment(few.ct_hu, few.boxes_zyx, np.random.default_rng(5))
    hu, _, suv = training.augment(few.ct_hu, few.boxes_zyx, np.random.default_rng(5), pet_suv=few.pet_suv)
    assert np.array_equal(np.asarray(plain[0]), np.asarray(hu))  # CT is what it is without PET, to the last bit
    assert np.isnan(np.asarray(suv)[2]).all()
    like_hu = np.where(np.isnan(few.pet_suv), 0, few.pet_suv) * 100 - 1000
    calm = dict.fromkeys(("gain", "offset_hu", "noise_hu"), 0)
    asked, _ = training.augment(like_hu, few.boxes_zyx, np.random.default_rng(5), **calm)
    known = ~np.isnan(np.asarray(suv))
    inside = known & (np.asarray(asked) > -960)  # away from the edge, where the unknown weighs nothing
    assert np.allclose(np.asarray(suv)[inside], (np.asarray(asked)[inside] + 1000) / 100, atol=0.3)
    assert inside.sum() > 1000 and np.nanmax(np.asarray(suv)) <= 8.001


def test_a_guest_brings_its_uptake_along():
    train = walled(glowing(toys(4, targets=(0,)), without=[3]))
    got = training._with_guests(train, range(4), np.random.default_rng(1), share=1.0)  # 0 puts one into a corner
    for row in range(3):
        z, y, x = ((got.boxes_zyx[row][1, :3] + got.boxes_zyx[row][1, 3:]) / 2).astype(int)
        assert got.pet_suv[row, z, y, x] > 4
    assert np.isnan(got.pet_suv[3]).all() and len(got.boxes_zyx[3]) == 2
    dark = walled(glowing(toys(4, targets=(0,)), without=[1, 2, 3]))
    lonely = training._with_guests(dark, [0], np.random.default_rng(0), share=1.0)
    assert len(lonely.boxes_zyx[0]) == 1  # nobody with a PET to give


def test_pet_is_withheld_from_some_volumes():
    seen = np.asarray(training._withhold(np.ones((400, 1, 1, 2), "float32"), np.random.default_rng(0), 0.25))
    assert 0.18 < np.isnan(seen).all(axis=(1, 2, 3)).mean() < 0.32
    assert (np.isnan(seen).any(axis=3) == np.isnan(seen).all(axis=3)).all()


def test_a_lesion_that_only_the_pet_shows_is_learned_and_survives_the_file(tmp_path):
    few = toys(4)
    few.ct_hu[:] = -800
    few, net = glowing(few), network(filters=(16, 32), pet=True)
    history = training.fit(net, few, few, Settings(epochs=60, batch_size=4, learning_rate=0.01, augmented=False))
    assert history.val_found.max() == 1
    facts = saved(net, tmp_path) and json.loads((tmp_path / "model.json").read_text())
    assert facts["inputs"] == ["ct", "pet"]
    loaded, _ = training.load_model(tmp_path)
    one, two = (training.predict(model, few.ct_hu, pet_suv=few.pet_suv)[0] for model in (net, loaded))
    assert np.array_equal(one.heat, two.heat)
    (tmp_path / "model.json").write_text(json.dumps(facts | {"inputs": ["ct"]}))
    with pytest.raises(runs.InputError, match=r"has 4 input channels, its side-car names the inputs \['ct'\]"):
        training.load_model(tmp_path)


def give_up_after(epoch):
    def report(row):
        if row["epoch"] == epoch:
            raise RuntimeError("stopped")
    return report


# ---- targets and decoding


@st.composite
def separate_boxes(draw):
    """Up to three boxes, each in an octant of its own of a 32-voxel grid, so that none hides another."""
    octants = draw(st.lists(st.tuples(*[st.sampled_from([0, 16])] * 3), min_size=1, max_size=3, unique=True))
    number = st.floats(0, 1, width=32)
    boxes = []
    for corner in octants:
        extent = np.array([2 + 8 * draw(number) for _ in range(3)])
        low = np.array(corner) + 1 + np.array([draw(number) for _ in range(3)]) * (14 - extent)
        boxes.append([*low, *(low + extent)])
    return np.array(boxes, "float32")


@settings(max_examples=40, deadline=None)
@given(separate_boxes())
def test_encode_and_decode_are_inverse(boxes):
    heat, box = training.encode_targets(boxes, 32)
    (found, scores), = training.decode_detections(heat[None], box[None, ..., :6])
    full = found[scores == 1]
    assert len(full) == len(boxes)
    for one in boxes:
        assert np.abs(full - one).max(axis=1).min() < 1e-3


@settings(max_examples=40, deadline=None)
@given(separate_boxes())
def test_heat_is_a_bell_around_each_centre_and_nothing_where_float32_could_not_tell(boxes):
    heat, box = training.encode_targets(boxes, 32)
    low, high = boxes[:, :3] / 2, boxes[:, 3:] / 2
    peak, wide = np.floor((low + high) / 2), np.maximum((high - low) / 5, 0.8)
    steps = [(np.arange(16) - peak[:, [axis]]) / wide[:, [axis]] for axis in range(3)]
    squares = sum(np.square(step).reshape(len(boxes), *np.roll((1, 1, 16), axis + 1))
                  for axis, step in enumerate(steps))
    bells = np.exp(-squares / 2)
    assert np.allclose(heat[..., 0], bells.max(axis=0), rtol=1e-5, atol=2**-25)
    assert np.array_equal(box[..., 6] > 0, bells.max(axis=0) > 0.1)


def test_no_boxes_give_an_empty_map_and_no_detections():
    heat, box = training.encode_targets(np.zeros((0, 6)), 16)
    assert heat.shape == (8, 8, 8, 1) and box.shape == (8, 8, 8, 7) and not heat.any() and not box.any()
    (found, scores), = training.decode_detections(heat[None], box[None, ..., :6])
    assert found.shape == (0, 6) and scores.shape == (0,)


def test_decode_sorts_by_score_and_keeps_at_most_top():
    heat, box = np.zeros((1, 8, 8, 8, 1), "float32"), np.zeros((1, 8, 8, 8, 6), "float32")
    for i, score in enumerate((0.3, 0.9, 0.6)):
        heat[0, 1 + 3 * i % 8, 4, 2 * i, 0] = score
    (_, scores), = training.decode_detections(heat, box)
    assert np.allclose(scores, [0.9, 0.6, 0.3])
    (_, scores), = training.decode_detections(heat, box, top=2)
    assert np.allclose(scores, [0.9, 0.6])
    (_, scores), = training.decode_detections(heat, box, min_score=0.7)
    assert np.allclose(scores, [0.9])
    (found, scores), = training.decode_detections(heat, box, top=0)
    assert found.shape == (0, 6) and scores.shape == (0,)


def test_boxes_never_leave_the_grid():
    heat, box = np.zeros((1, 8, 8, 8, 1), "float32"), np.zeros((1, 8, 8, 8, 6), "float32")
    heat[0, 0, 7, 4], box[0, 0, 7, 4] = 1, [-3, 3, 0, 9, 9, -9]
    (found, _), = training.decode_detections(heat, box)
    assert (found >= 0).all() and (found <= 16).all()


def told_boxes(size, told):
    """Heat and box maps of (size)^3 cells, from {cell: (heat, low edges, high edges in voxels)}."""
    heat, box = np.zeros((1, size, size, size, 1), "float32"), np.zeros((1, size, size, size, 6), "float32")
    for cell, (score, low, high) in told.items():
        low, high = np.array(low) / training.STRIDE, np.array(high) / training.STRIDE
        heat[0, *cell], box[0, *cell] = score, [*((low + high) / 2 - np.array(cell) - 0.5), *np.log(high - low)]
    return heat, box


def test_cells_around_a_peak_vote_by_their_heat():
    told = {(5, 5, 5): (0.8, (6, 6, 6), (16, 16, 16)), (5, 5, 6): (0.4, (6, 6, 8), (16, 16, 18)),
            (7, 5, 5): (0.2, (7, 6, 6), (17, 16, 16)), (5, 8, 5): (0.3, (6, 7, 6), (16, 17, 16))}  # three cells away
    (found, scores), = training.decode_detections(*told_boxes(12, told))
    pull = np.array([0.2 * 1 / 1.4, 0, 0.4 * 2 / 1.4])
    assert np.allclose(found, [[*(6 + pull), *(16 + pull)]], atol=1e-4) and np.allclose(scores, 0.8)


def test_the_box_of_another_lesion_and_one_without_volume_do_not_vote():
    first, second = ((2, 2, 2), (8, 8, 8)), ((2, 2, 8), (8, 8, 14))
    told = {(2, 2, 3): (0.9, *first), (2, 2, 5): (0.7, *second), (3, 2, 3): (0.5, (2, 2, 2), (8, 8, 2.01))}
    (found, scores), = training.decode_detections(*told_boxes(8, told))
    assert np.allclose(found, [np.concatenate(first), np.concatenate(second)], atol=1e-4)
    assert np.allclose(scores, [0.9, 0.7])
    outside = {(1, 1, 1): (0.9, (-9, -9, -9), (-5, -5, -5))}     # cut at the border: nothing is left of it
    (found, _), = training.decode_detections(*told_boxes(8, outside))
    assert np.array_equal(found, np.zeros((1, 6)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=6, max_size=6), min_size=1, max_size=5))
def test_overlap_with_several_boxes_is_that_with_each(rows):
    low, high = np.minimum(*np.hsplit(np.array(rows), 2)), np.maximum(*np.hsplit(np.array(rows), 2))
    boxes = np.hstack([low, high])
    cells = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), axis=-1)
    inside = [((box[:3] <= cells) & (cells < box[3:])).all(axis=-1) for box in boxes]
    together = [(inside[0] & one).sum() / max(1, (inside[0] | one).sum()) for one in inside]
    assert np.allclose(training.box_iou(boxes[0], boxes), together)
    assert np.allclose([training.box_iou(boxes[0], box) for box in boxes], together)


@pytest.mark.parametrize(("other", "expected"), [
    ([0, 0, 0, 2, 2, 2], 1.0), ([1, 0, 0, 3, 2, 2], 4 / 12), ([2, 0, 0, 4, 2, 2], 0.0), ([5, 5, 5, 5, 5, 5], 0.0)])
def test_box_iou_by_hand(other, expected):
    assert training.box_iou([0, 0, 0, 2, 2, 2], other) == pytest.approx(expected)


# ---- losses


def test_heat_loss_by_hand():
    true = np.array([[1, 0.5, 0, 0], [0, 0, 0, 0]], "float32").reshape(2, 4, 1, 1, 1)
    guess = np.array([[0.8, 0.4, 0.3, 0.1]] * 2, "float32").reshape(2, 4, 1, 1, 1)
    one = -(0.2**2 * np.log(0.8) + 0.5**4 * 0.4**2 * np.log(0.6) + 0.3**2 * np.log(0.7) + 0.1**2 * np.log(0.9))
    none = -sum(p**2 * np.log(1 - p) for p in (0.8, 0.4, 0.3, 0.1))
    assert np.allclose(training.heat_loss(true, guess), [one, none], rtol=1e-5)


def test_heat_loss_stays_finite_at_zero_and_one():
    true = np.array([1, 0], "float32").reshape(1, 2, 1, 1, 1)
    assert np.isfinite(np.asarray(training.heat_loss(true, 1 - true))).all()


def test_box_loss_counts_only_weighted_cells():
    true = np.zeros((2, 2, 1, 1, 7), "float32")
    true[0, 0, 0, 0] = [1, 2, 3, 0, 0, 0, 0.5]
    true[0, 1, 0, 0, 6] = 1.0
    guess = np.zeros((2, 2, 1, 1, 6), "float32")
    guess[0, 1] = 0.3
    expected = (0.5 * 6 + 1.0 * 6 * 0.3) / (6 * 1.5)
    assert np.allclose(training.box_loss(true, guess), [expected, 0])  # the second volume has no box


def test_subtypes_are_smoothed_and_absent_ones_are_silent():
    rows = training.encode_subtypes(np.array([1, -1]), 2, smoothing=0.2)
    assert np.allclose(rows, [[0.1, 0.9], [0, 0]])
    guess = np.array([[0.25, 0.75], [0.5, 0.5]], "float32")
    assert np.allclose(training.subtype_loss(rows, guess), [-(0.1 * np.log(0.25) + 0.9 * np.log(0.75)), 0])


# ---- augmentation


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_boxes_follow_the_voxels(seed):
    hu = np.full((2, 32, 32, 32), -1000, "int16")
    hu[:, 11:17, 13:21, 9:15] = 1000
    moved, boxes = training.augment(hu, [np.array([[11, 13, 9, 17, 21, 15]])] * 2, np.random.default_rng(seed),
                                    turn=0, cut=0, noise_hu=0, offset_hu=0)
    for volume, box in zip(np.asarray(moved) + 1000, boxes, strict=True):
        for axis in range(3):
            weight = volume.sum(axis=tuple({0, 1, 2} - {axis}))
            middle = np.average(np.arange(32) + 0.5, weights=weight)
            spread = np.sqrt(12 * np.average((np.arange(32) + 0.5 - middle) ** 2, weights=weight))
            assert middle == pytest.approx(box[0, [axis, axis + 3]].mean(), abs=0.25)  # a sharp block, linearly sampled
            assert spread == pytest.approx(box[0, axis + 3] - box[0, axis], rel=0.15)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([10, 45, 180]))
def test_the_box_of_a_turned_ellipsoid_is_its_box(seed, turn):
    centre, half = np.array([15, 18.5, 13]), np.array([4, 7, 3.5])
    at = np.indices((32, 32, 32)) + 0.5
    inside = ((at - centre[:, None, None, None]) / half[:, None, None, None]) ** 2
    hu = np.where(inside.sum(axis=0) <= 1, 1000, -1000).astype("int16")
    moved, boxes = training.augment(hu[None], [np.array([[*(centre - half), *(centre + half)]])],
                                    np.random.default_rng(seed), shift=0.05, bend=0, turn=turn, cut=0, noise_hu=0,
                                    offset_hu=0)
    air_free = np.asarray(moved)[0] + 1000
    for axis in range(3):
        weight = air_free.sum(axis=tuple({0, 1, 2} - {axis}))
        middle = np.average(np.arange(32) + 0.5, weights=weight)
        reach = np.sqrt(5 * np.average((np.arange(32) + 0.5 - middle) ** 2, weights=weight))   # of a full ellipsoid
        assert middle == pytest.approx(boxes[0][0, [axis, axis + 3]].mean(), abs=0.2)
        assert 2 * reach == pytest.approx(boxes[0][0, axis + 3] - boxes[0][0, axis], rel=0.1)


def test_a_turn_is_that_of_scipy_and_the_same_on_every_device():
    volume = np.random.default_rng(0).normal(1000, 200, (12, 12, 12)).astype("float32")
    still = np.tile(np.arange(13.0), (3, 1))
    for degrees in (0, 7, -31, 90):
        move = training._move(still, np.radians(degrees))
        got, = training._resample(volume[None], [move])
        tensor = training._resample(training.ops.convert_to_tensor(volume[None]), [move])
        wanted = rotate(volume, -degrees, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
        assert np.allclose(got, wanted, atol=0.01) and np.allclose(tensor[0], got, atol=0.01)


@pytest.mark.parametrize("layout", ["F", "transposed"])
def test_volumes_in_any_layout_are_moved_alike(layout):
    hu = np.random.default_rng(0).integers(-1000, 400, (2, 16, 16, 16)).astype(np.int16)
    turned = hu.transpose(0, 3, 2, 1)
    other = np.asfortranarray(hu) if layout == "F" else np.ascontiguousarray(turned).transpose(0, 3, 2, 1)
    plain, odd = (training.augment(each, [np.zeros((0, 6))] * 2, np.random.default_rng(1))[0] for each in (hu, other))
    assert np.array_equal(plain, odd)


def test_augmentation_without_change_is_the_identity_up_to_the_mirror():
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 8, 8)).astype("int16")
    boxes = [np.array([[1, 2, 1, 3, 4, 4]], "float32")] * 6
    none = dict.fromkeys(("shift", "scale", "bend", "turn", "cut", "gain", "offset_hu", "noise_hu"), 0)
    moved, got = training.augment(hu, boxes, np.random.default_rng(1), **none)
    sides = [bool(box[0, 2] != 1) for box in got]
    assert set(sides) == {True, False}
    for volume, old, box, mirrored in zip(np.asarray(moved), hu, got, sides, strict=True):
        assert np.allclose(volume, old[..., ::-1] if mirrored else old, atol=1e-2)
        assert box.tolist() == [[1, 2, 4, 3, 4, 7] if mirrored else [1, 2, 1, 3, 4, 4]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_cut_scan_keeps_its_lesions_and_is_air_elsewhere(seed):
    few = glowing(toys(8))
    bright = replace(few, ct_hu=few.ct_hu.clip(-900))
    still = dict.fromkeys(("shift", "scale", "bend", "turn", "gain", "offset_hu", "noise_hu"), 0)
    for share in (0, 0.5, 1):
        hu, boxes, suv = training.augment(bright.ct_hu, bright.boxes_zyx, np.random.default_rng(seed), **still,
                                          cut=share, pet_suv=bright.pet_suv)
        scanned = (np.asarray(hu) > -950).all(axis=(2, 3))                     # (n, z)
        assert (np.isnan(suv).all(axis=(2, 3)) == ~scanned).all()              # what was not scanned has no uptake
        assert ((np.asarray(hu) == -1000).all(axis=(2, 3)) == ~scanned).all()
        for row, box in zip(scanned, boxes, strict=True):
            assert row[int(box[0, 0]) : int(box[0, 3])].all() and len(box) == 1
            assert np.count_nonzero(np.diff(row.astype(int))) == 2 - row[0] - row[-1]      # one piece
        assert share or scanned.all()
        assert share < 1 or not scanned.all()
    nothing = training.augment(bright.ct_hu, [np.zeros((0, 6))] * 8, np.random.default_rng(seed), **still, cut=1)[0]
    assert (np.asarray(nothing)[:, SIZE // 2] > -950).all()


def test_margins_are_air_and_lost_boxes_are_dropped():
    still, shifted = np.arange(9.0), np.arange(9.0) - 3
    matrix, = training.axis_matrices(shifted[None])
    assert np.array_equal(matrix @ [5, 6, 7, 8, 9, 9, 9, 9], [0, 0, 0, 5, 6, 7, 8, 9])
    cut = training.move_boxes([[0, 0, 2, 4, 4, 7], [0, 0, 0, 2, 2, 4]], np.stack([still, still, shifted]))
    assert cut.tolist() == [[0, 0, 5, 4, 4, 8], [0, 0, 3, 2, 2, 7]]
    gone = training.move_boxes([[0, 0, 5, 4, 4, 7]], np.stack([still, still, shifted]))
    assert gone.shape == (0, 6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_movements_never_fold_the_grid(seed):
    steps = np.diff(training.draw_edges(3, 64, np.random.default_rng(seed), 0.1, 0.15, 0.03), axis=-1)
    assert ((steps > 0.3).all(axis=-1) | (steps < -0.3).all(axis=-1)).all()


def test_transplant_brings_the_lesion_and_leaves_the_rest():
    host, donor = np.full((24, 24, 24), -850, "int16"), np.full((24, 24, 24), -850, "int16")
    donor[4:12, 4:12, 4:12] = 50
    own = np.array([[1, 1, 1, 3, 3, 3]], "float32")
    lesion = np.array([4, 4, 4, 12, 12, 12])
    changed, boxes = training.transplant(host, own, donor, lesion, np.array([16.0, 16, 16]), 0.5)
    assert boxes.tolist() == [[1, 1, 1, 3, 3, 3], [14, 14, 14, 18, 18, 18]]
    assert (changed[15:17, 15:17, 15:17] == 50).all() and (host == -850).all()
    changed[14:18, 14:18, 14:18] = -850
    assert (changed == -850).all()
    _, cut = training.transplant(host, own[:0], donor, lesion, np.array([23.5, 12, 0.5]), 1.0)
    assert cut.tolist() == [[19.5, 8, 0, 24, 16, 4.5]]


def test_a_transplanted_patch_has_the_same_bits_with_one_and_two_blas_threads():
    code = ("import hashlib, numpy as np\nfrom lungct import training\nrng = np.random.default_rng(0)\n"
            "at = [np.sort(rng.uniform(0, 64, count)) for count in (30, 28, 26)]\n"
            "patch = training._sample(rng.normal(size=(64, 64, 64)), at)\n"
            "print(hashlib.sha256(np.ascontiguousarray(patch).tobytes()).hexdigest())")
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "OPENBLAS_NUM_THREADS": threads}).stdout for threads in ("1", "2")}
    assert len(said) == 1


def test_guests_are_of_the_same_subtype_and_from_the_training_patients():
    train = walled(toys(4))
    train.ct_hu[:] = np.where(train.ct_hu > 0, 40 + 10 * np.arange(4)[:, None, None, None], train.ct_hu)
    before = training.examples_hash(train)
    got = training._with_guests(train, range(4), np.random.default_rng(0), share=1.0)
    assert training.examples_hash(train) == before                              # guests move into copies
    assert [len(b) for b in got.boxes_zyx] == [2] * 4 and got.target.tolist() == train.target.tolist()
    for row in range(4):
        others = {40 + 10 * other for other in range(4) if train.target[other] != train.target[row]}
        assert not others & set(got.ct_hu[row].ravel().tolist())
    alone = replace(train, target=np.array([-1, *train.target[1:]]))
    same = training._with_guests(alone, [0], np.random.default_rng(0), share=1.0)
    assert np.array_equal(same.ct_hu, train.ct_hu[:1])  # no donor of its kind
    twice = replace(train, patient_id=np.array(["p0", "p1", "p0", "p1"]))       # 0 and 2 share a patient and a subtype
    own = training._with_guests(twice, range(4), np.random.default_rng(0), share=1.0)
    assert np.array_equal(own.ct_hu, twice.ct_hu)                               # a patient gives nothing to itself
    calm = training._with_guests(train, range(4), np.random.default_rng(0), share=0.0)
    assert np.array_equal(calm.ct_hu, train.ct_hu)


def in_a_body(depth, size=36):
    """Air, in it a body, in that a block of lung so many voxels deep with a lump; behind the body a flat table."""
    volume = np.full((size,) * 3, -1000, "int16")
    volume[:, 2:18, 2:22] = 40
    volume[6:18, 4 : 4 + depth, 4:20] = -800
    volume[10:12, :, 8:10] = 40
    volume[:, 18:20] = -800                                    # foam, and the plate that holds it
    volume[:, 20] = 100
    return volume


def test_a_guest_is_put_into_lung_and_not_into_skin_or_table():
    rng, volume = np.random.default_rng(0), in_a_body(depth=12)
    lung = np.zeros(volume.shape, bool)
    lung[6:18, 4:16, 4:20] = True
    allowed = {tuple(place) for place in np.argwhere(lung & (volume == -800)).tolist()}
    got = [tuple(training._in_lung(volume, rng).tolist()) for _ in range(30_000)]
    count = np.unique(got, axis=0, return_counts=True)[1]
    assert set(got) == allowed and count.max() < 4 * len(got) / len(allowed)      # all of them, none of them preferred
    assert training._in_lung(np.full((8, 8, 8), 40, "int16"), rng) is None
    assert training._in_lung(in_a_body(depth=2), rng) is None                # a slit
    assert training._in_lung(in_a_body(depth=3), rng) is not None            # above a twelfth of the grid
    assert training._in_lung(volume[:, :16], rng) is None                    # the scan ends in the lung


def test_a_guest_is_not_put_where_air_is_near():
    volume = in_a_body(depth=12)
    volume[11:13, 9:11, 13:15] = -1000                         # a windpipe
    near = minimum_filter(volume, 5) <= -950
    got = np.array([training._in_lung(volume, np.random.default_rng(i)) for i in range(500)])
    assert not near[tuple(got.T)].any()


# ---- sampling


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 1000))
def test_every_patient_is_drawn_once_however_many_volumes_it_has(volumes, seed):
    names = np.repeat([f"p{i}" for i in range(len(volumes))], volumes)
    examples = Examples(np.zeros((len(names), 1, 1, 1)), [None] * len(names), np.zeros(len(names), int), names, names)
    rows = training.sample_patients(examples, len(volumes), np.random.default_rng(seed), balance=0)
    assert sorted(names[rows]) == sorted(set(names))


def test_balance_tilts_towards_rare_subtypes():
    names = np.array([f"p{i}" for i in range(10)])
    target = np.array([0] * 9 + [1])
    examples = Examples(np.zeros((10, 1, 1, 1)), [None] * 10, target, names, names)
    shares = [(training.sample_patients(examples, 4000, np.random.default_rng(0), b) == 9).mean() for b in (0, 0.5, 1)]
    assert shares == pytest.approx([0.1, 0.25, 0.5], abs=0.002)


# ---- network


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("mixed_bfloat16", 2**-6)])
@pytest.mark.parametrize("size", [1, 5e-4])                     # of the weights; small ones are of the size of epsilon
def test_the_normalisation_is_that_of_keras(precision, tolerance, size):
    ops, rng = training.ops, np.random.default_rng(0)
    features = rng.normal(3, 5, (2, 6, 5, 4, 8)).astype("float32")
    layer = training.NormedConv3D(16, 3, strides=2, padding="same", dtype=precision)
    layer.build(features.shape)
    kernel, bias = size * rng.normal(0.3, 1, layer.kernel.shape), size * rng.normal(0, 50, 16)
    layer.set_weights([kernel, bias])
    plain = training.layers.Conv3D(16, 3, strides=2, padding="same")
    plain.build(features.shape)
    plain.set_weights([kernel, bias])
    wanted = ops.convert_to_numpy(training.layers.LayerNormalization(center=False, scale=False)(plain(features)))
    got = ops.convert_to_numpy(ops.cast(layer(features), "float32"))
    room = np.maximum(tolerance, 2 * off_by_itself(layer, features)) * (1 + abs(wanted))
    assert (abs(got - wanted) <= room).all() and got.std() > 0.5


def off_by_itself(layer, features):
    """Error of the backend's own convolution in the layer's precision, over the deviation of the filters."""
    ops, kernel = training.ops, layer.kernel - training.ops.mean(layer.kernel, axis=-1, keepdims=True)
    values, exact = (ops.convert_to_numpy(ops.cast(layer.convolution_op(ops.cast(features, dtype),
                                                                        ops.cast(kernel, dtype)), "float32"))
                     for dtype in (layer.compute_dtype, "float32"))
    return abs(values - exact).max(axis=-1, keepdims=True) / exact.std(axis=-1, keepdims=True)


def test_half_precision_divides_in_full_precision():
    ops, rng = training.ops, np.random.default_rng(0)
    layer = training.NormedConv3D(16, 1, dtype="mixed_bfloat16")
    features, kernel = rng.normal(3, 5, (2, 3, 4, 5, 16)), np.eye(16).reshape(1, 1, 1, 16, 16)
    features = ops.cast(features.astype("float32"), layer.compute_dtype)
    layer.build(features.shape)
    layer.set_weights([kernel, np.zeros(16)])
    convolved = layer.convolution_op(features, ops.cast(kernel - 1 / 16, layer.compute_dtype))
    got, rows = (ops.convert_to_numpy(ops.cast(x, "float32")).astype(float) for x in (layer(features), convolved))
    wanted = rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + 1e-3)
    assert np.allclose(got, wanted, rtol=2**-8, atol=1e-5) and got.std() > 0.5


@pytest.mark.parametrize("size", [1, 0.03])                      # in the small rows the 1e-3 under the root counts
def test_the_gradient_written_out_is_the_one_of_small_differences(size):
    ops, rng = training.ops, np.random.default_rng(1)
    rows, step = size * rng.normal(size=(5, 16)), 1e-2 * size * rng.normal(size=(5, 16))
    weight = ops.convert_to_tensor(rng.normal(size=(5, 16)).astype("float32"))

    def loss(values):
        return ops.sum(training._unit(ops.convert_to_tensor(values)) * weight)

    slope = gradient_of(loss, rows.astype("float32"))
    ends = [float(loss((rows + way * step).astype("float32"))) for way in (1, -1)]
    assert (slope * step).sum() == pytest.approx((ends[0] - ends[1]) / 2, rel=2e-3)


def gradient_of(function, values):
    """Gradient of a number by an array, on whichever backend runs."""
    backend = training.keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        with tensorflow.GradientTape() as tape:
            tape.watch(values := tensorflow.constant(values))
            number = function(values)
        return tape.gradient(number, values).numpy()
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(function)(values))
    import torch

    values = torch.tensor(values, requires_grad=True)
    function(values).backward()
    return values.grad.numpy()


def test_standardised_rows_follow_the_training_and_not_their_batch():
    rng = np.random.default_rng(0)
    rows = rng.normal((8, -1, 0), (0.05, 3, 0), (400, 4, 3)).astype("float32")
    layer = training.Standardise()
    for four in rows:
        layer(four, training=True)
    seen = training.ops.convert_to_numpy(layer(rows[-100:].reshape(-1, 3)))
    assert abs(seen.mean(axis=0)).max() < 0.4 and np.allclose(seen[:, :2].std(axis=0), 1, atol=0.2)
    assert not seen[:, 2].any()                              # a feature that never changes says nothing
    alone = training.ops.convert_to_numpy(layer(rows[-1, :1], training=True))
    mean, variance = map(training.ops.convert_to_numpy, (layer.mean, layer.variance))
    before = (rows[-1, :1] - mean) / np.sqrt(variance + 1e-4)
    assert np.allclose(alone, before, atol=1e-4)                               # a batch of one is not all zeros
    assert abs(training.ops.convert_to_numpy(layer(np.full((1, 3), 1e6, "float32")))).max() == 5


def test_a_running_deviation_is_right_from_the_second_batch_on():
    layer, rows = training.Standardise(), np.random.default_rng(1).normal(5, 0.05, (50, 4, 500)).astype("float32")
    for count, four in enumerate(rows, 1):
        layer(four, training=True)
        seen = rows[:count].reshape(-1, 500)                 # as long as all batches count alike
        assert np.allclose(layer.mean, seen.mean(axis=0), atol=1e-4)
        if count > 1:                                        # with a first mean of 0 it would begin at 25
            assert 0.95 * 0.05**2 < float(np.mean(layer.variance)) < 1.35 * 0.05**2
    assert float(np.mean(layer.variance)) == pytest.approx(0.05**2, rel=0.05)


def test_the_subtype_teaches_its_own_layer_alone():
    examples, after = toys(4), []
    for target in ([0, 1, 0, 1], [0, 0, 1, 1]):
        net = network()
        training.fit(net, replace(examples, target=np.array(target)), None, quick(epochs=2, balance=0, transplants=0))
        after.append({weight.path: training.ops.convert_to_numpy(weight) for weight in net.weights})
    differ = {path for path in after[0] if not np.array_equal(after[0][path], after[1][path])}
    assert differ == {"subtype/kernel", "subtype/bias"}


# ---- what the volume holds around the surest box


def shells_of(box, volume, cells=8, size=16):
    """`Shells` for one volume whose surest box, (6,) in voxels, lies around the centre of its cell."""
    heat, told = np.full((1, cells, cells, cells, 1), 0.1, "float32"), np.zeros((1, cells, cells, cells, 6), "float32")
    centre, extent = (box[:3] + box[3:]) / 2 * cells / size, (box[3:] - box[:3]) * cells / size
    cell = np.floor(centre).astype(int)
    heat[(0, *cell)] = 0.8
    told[(0, *cell)] = [*(centre - cell - 0.5), *np.log(extent)]
    rows = training.Shells()([heat, told, volume[None].astype("float32")])
    return training.ops.convert_to_numpy(rows)[0].reshape(2 + training.WAVES, training.SHELLS, -1)


def harmonics(directions_zyx, degree):
    """Real spherical harmonics of one degree at (3, v) directions: (v, 2 * degree + 1)."""
    z, y, x = directions_zyx / np.linalg.norm(directions_zyx, axis=0)
    values = [sph_harm_y(degree, order, np.arccos(z.clip(-1, 1)), np.arctan2(y, x)) for order in range(degree + 1)]
    return np.stack([v.real for v in values] + [v.imag for v in values[1:]], axis=1)


def shells_by_scipy(box, volume):
    """Mean and deviation of each shell, and what least squares on harmonics of 1 to 4 waves explain of the latter."""
    n = training.POINTS
    points = ((np.arange(n) + 0.5) / n * 2 - 1) * 1.5
    unit = np.stack(np.meshgrid(points, points, points, indexing="ij")).reshape(3, -1)
    at = (box[:3] + box[3:])[:, None] / 2 + unit * (box[3:] - box[:3])[:, None] / 2 - 0.5
    values = np.stack([map_coordinates(volume[..., c].astype(float), at, order=1, mode="nearest")
                       for c in range(volume.shape[-1])], axis=1)
    shell, parts = np.floor(np.linalg.norm(unit, axis=0) * 4), []
    for k in range(6):
        here, functions, explained = values[shell == k], np.ones((np.count_nonzero(shell == k), 1)), []
        for degree in range(1, 5):
            functions = np.hstack([functions, harmonics(unit[:, shell == k], degree)])
            fitted = functions @ np.linalg.lstsq(functions, here)[0]
            explained.append(fitted.var(axis=0))
        parts.append([here.mean(axis=0), here.std(axis=0), *np.sqrt(np.diff(explained, axis=0, prepend=0).clip(0))])
    return np.array(parts).swapaxes(0, 1)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_shells_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(0, 16, 3), rng.uniform(0.5, 9, 3)              # some reach far out of the volume
    box, volume = np.concatenate([centre - half, centre + half]), rng.random((16, 16, 16, 2))
    got, wanted = shells_of(box, volume), shells_by_scipy(box, volume)
    assert np.allclose(got[:2], wanted[:2], atol=1e-4)
    assert np.allclose(got[2:], wanted[2:], atol=1e-3)                         # roots of small sums


def test_shells_of_a_batch_are_those_of_its_volumes():
    rng = np.random.default_rng(0)
    heat, volumes = rng.random((3, 4, 4, 4, 1), "float32"), rng.random((3, 8, 8, 8, 4), "float32")
    box, of = rng.normal(0, 0.5, (3, 4, 4, 4, 6)).astype("float32"), training.Shells()
    rows = training.ops.convert_to_numpy(of([heat, box, volumes]))
    alone = [training.ops.convert_to_numpy(of([heat[i:i + 1], box[i:i + 1], volumes[i:i + 1]])) for i in range(3)]
    channel = training.ops.convert_to_numpy(of([heat, box, volumes[..., 2:3]]))
    assert np.allclose(rows, np.concatenate(alone), atol=1e-5) and np.allclose(rows[:, 2::4], channel, atol=1e-5)
    assert rows.std(axis=0).all()


@given(st.integers(1, training.WAVES), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_waves_are_counted_whichever_way_they_are_turned(degree, seed):
    rng, size = np.random.default_rng(seed), 32
    places = np.stack(np.meshgrid(*[np.arange(size) + 0.5 - size / 2] * 3, indexing="ij")).reshape(3, -1)
    weights = rng.normal(size=2 * degree + 1)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    box, seen = np.repeat([4.0, 28.0], 3), []
    for directions in (places, turn @ places):
        volume = (harmonics(directions, degree) @ weights).reshape(size, size, size, 1)
        _, spread, *waves = shells_of(box, volume, size=size)[:, 2:, 0]       # too few voxels further in
        seen.append(np.array(waves))
        assert np.allclose(waves[degree - 1], spread, rtol=0.05)
        assert max(np.delete(waves, degree - 1, axis=0).max(axis=0) / spread) < 0.2
    assert np.allclose(seen[0][degree - 1], seen[1][degree - 1], rtol=0.05)


def test_shells_do_not_depend_on_the_grid_or_the_size_of_a_lesion():
    def ball(size, radius):
        away = np.sqrt(sum((axis - size / 2) ** 2 for axis in np.ix_(*[np.arange(size) + 0.5] * 3)))
        depth = (radius - away) / radius * 8
        volume = np.clip(depth + 0.5, 0, 1) * np.clip(4.5 - depth, 0, 1)       # hollow
        box = np.repeat([size / 2 - radius, size / 2 + radius], 3)
        return shells_of(box, volume[..., None], size=size)[0, :, 0]

    one = ball(32, 8)
    assert one[0] < 0.05 and one[2] > 0.9 and one[5] < 0.05                    # a cavity, its wall, and air around
    assert np.allclose(one, ball(64, 16), atol=0.1) and np.allclose(one, ball(64, 24), atol=0.1)


def test_shells_of_an_even_volume_do_not_spread():
    spread = shells_of(np.array([2, 3, 4, 9, 12, 15]), np.full((16, 16, 16, 2), 0.743))[1:]
    assert spread.max() < 1e-5


@pytest.mark.parametrize("precision", training.PRECISIONS)
@pytest.mark.parametrize("pet", [False, True])
def test_the_evidence_is_a_row_of_float32(precision, pet):
    net = network(size=8, precision=precision, pet=pet)
    evidence = training.keras.Model(net.input, net.get_layer("evidence").output)(np.zeros((2, *net.input.shape[1:])))
    channels = net.input.shape[-1]
    assert evidence.shape == (2, 8 + 6 + (2 + training.WAVES) * training.SHELLS * channels)
    assert training.ops.convert_to_numpy(evidence).dtype == np.float32


def test_shells_of_a_head_gone_wild_are_numbers():
    wild = np.array([1e30, -1e30, 5, 1e6, -1e6, 80], "float32") * np.ones((1, 8, 8, 8, 1), "float32")
    rows = training.Shells()([np.zeros((1, 8, 8, 8, 1), "float32"), wild, np.ones((1, 16, 16, 16, 2), "float32")])
    assert np.isfinite(training.ops.convert_to_numpy(rows)).all()


@pytest.fixture(scope="module")
def told_by_the_inside():
    """Lesions of one size, every second one hollow, and a network that was trained to tell."""
    examples = toys(16, targets=(0, 0))
    hollow = np.arange(16) % 2
    for hu, box, empty in zip(examples.ct_hu, examples.boxes_zyx, hollow, strict=True):
        low = box[0, :3].astype(int)
        hu[tuple(slice(a, a + 6) for a in low)] = 40
        if empty:
            hu[tuple(slice(a + 2, a + 4) for a in low)] = -900
        box[0, 3:] = box[0, :3] + 6
    examples, net = replace(examples, target=hollow), network()
    training.fit(net, examples, None, quick(epochs=12, learning_rate=0.01, augmented=False))
    return examples, net


def test_a_hollow_lesion_is_told_from_a_solid_one(told_by_the_inside):
    examples, net = told_by_the_inside
    told = np.array([answer.probabilities.argmax() for answer in training.predict(net, examples.ct_hu)])
    assert (told == examples.target).mean() > 0.9


def test_what_the_subtype_is_read_off_has_one_scale(told_by_the_inside):
    examples, net = told_by_the_inside
    inside = training.keras.Model(net.input, net.get_layer("evidence_scale").output)
    rows = training.ops.convert_to_numpy(inside(training.normalise(examples.ct_hu)))
    assert abs(rows).max() <= 5 and 0.2 < np.median(rows.std(axis=0)) < 3


def test_the_refit_is_the_regression_of_scikit_learn():
    rng = np.random.default_rng(0)
    rows, target, weight = rng.normal(size=(200, 5)), rng.integers(0, 3, 200), rng.uniform(0, 2, 200)
    rows[:, 0] += target
    for shrink in (0.01, 0.4):
        got = training._regression(rows, np.eye(3)[target] * weight[:, None], shrink)
        known = LogisticRegression(C=1 / (2 * shrink * 200), tol=1e-8, max_iter=5000).fit(rows, target, weight)
        assert np.allclose(got[:-1], known.coef_.T, atol=2e-3)
        assert np.allclose(got[-1] - got[-1].mean(), known.intercept_ - known.intercept_.mean(), atol=2e-3)


def test_the_refit_touches_the_subtype_layer_and_its_scale_alone():
    examples, net, settings = toys(12), network(classes=("A", "B", "G")), quick(epochs=3)
    training.fit(net, examples, None, settings)
    before = {weight.path: training.ops.convert_to_numpy(weight) for weight in net.weights}
    train_loss = training._validate(training._trainer(net, settings), examples, settings)
    for name in ("kernel", "bias"):
        weight = getattr(net.get_layer("subtype"), name)
        weight.assign(weight * 0)
    spoilt = training._validate(training._trainer(net, settings), examples, settings)
    training.refit_subtypes(net, examples, settings)
    after = {weight.path: training.ops.convert_to_numpy(weight) for weight in net.weights}
    assert all(np.array_equal(before[path], after[path]) for path in before)   # it ends where `fit` had ended
    assert train_loss["val_subtype_loss"] < 0.9 * spoilt["val_subtype_loss"]
    answers = training.predict(net, examples.ct_hu)
    assert max(answer.probabilities[2] for answer in answers) < 0.2            # nobody has G here


def test_half_of_the_refit_sees_tumours_at_their_own_size_and_place():
    examples, net = toys(8), network()
    own = {stack: training.normalise(hu[None])[0] for stack, hu in zip(examples.stack_id, examples.ct_hu, strict=True)}
    for augmented, share in ((True, 0.5), (False, 1.0)):
        drawn = training._refit_draws(net, examples, quick(augmented=augmented), None)
        as_it_is = [np.array_equal(seen, own[stack]) for stacks, inputs, _ in drawn
                    for stack, seen in zip(stacks, inputs, strict=True)]
        assert np.mean(as_it_is) == share


def test_the_refit_sees_patients_without_their_pet():
    shining, net = glowing(toys(8)), network(pet=True)
    for augmented in (True, False):
        asked = quick(augmented=augmented, pet_dropout=0.5)
        known = np.concatenate([inputs[..., 3].max(axis=(1, 2, 3)) for _, inputs, _ in
                                training._refit_draws(net, shining, asked, None)])
        assert 0.2 < known.mean() < 0.8 and set(known) == {0, 1}


def test_every_subtype_weighs_alike_however_often_it_is_drawn():
    names = np.array([f"p{i}" for i in range(30)])
    target = np.array([0] * 20 + [2] * 4 + [-1] * 6)
    many = Examples(np.zeros((30, 2, 2, 2), "int16"), [np.zeros((0, 6))] * 30, target, names, names)
    for balance in (0, 0.25, 1):
        rng = np.random.default_rng(0)
        drawn = np.concatenate([training.sample_patients(many, 60, rng, balance) for _ in range(200)])
        drawn = target[drawn][target[drawn] >= 0]
        weights = training.subtype_weights(many, 3, balance)
        total = [weights[drawn[drawn == k]].sum() for k in range(3)]
        assert total[1] == 0 and total[0] == pytest.approx(total[2], rel=0.05)
        assert weights[drawn].mean() == pytest.approx(1, rel=0.02)
    assert not training.subtype_weights(many.take(range(24, 30)), 3, 0.25).any()


def test_network_outputs_and_limits():
    net = network(("A", "B", "G"))
    out = net.predict_on_batch(training.normalise(toys(2).ct_hu))
    assert out["heat"].shape == (2, 8, 8, 8, 1) and out["box"].shape == (2, 8, 8, 8, 6)
    assert out["subtype"].shape == (2, 3)
    assert np.median(out["heat"]) < 0.05 and np.allclose(out["subtype"].sum(axis=1), 1, atol=1e-5)
    assert set(network(["A"]).output) == {"heat", "box"}  # nothing to tell apart
    with pytest.raises(runs.InputError, match="grid size 20 is not a positive multiple of 8"):
        training.build_network(20, "AG", (8, 8, 8))
    with pytest.raises(runs.InputError, match=r"filters \(12, 16\): expected multiples of 8"):
        training.build_network(16, "AG", (12, 16))
    for size, filters, words in [(16, (), "filters is empty"), (0, (8,), "grid size 0 is not a positive"),
                                 (16.0, (8,), "grid size 16.0 is not a positive"), (16, (8.0,), "filters")]:
        with pytest.raises(runs.InputError, match=words):
            training.build_network(size, "AG", filters)


def test_costs_by_hand():
    table = training.layer_costs(training.predecessor_cnn(16, "ABG")).set_index("layer")
    assert table.loc["block0", "parameters"] == 27 * 2 * 32 + 32
    assert table.loc["block1", "multiply_adds_m"] == 27 * 32 * 64 * 8**3 / 1e6
    assert table.loc["dense", "parameters"] == 2**3 * 128 * 512 + 512


def test_one_volume_does_not_change_another_in_its_batch():
    net, batch = network(), toys(2)
    together = training.predict(net, batch.ct_hu, batch_size=2)[0]
    alone = training.predict(net, batch.ct_hu[:1], batch_size=2)[0]
    assert np.allclose(together.heat, alone.heat, atol=1e-6)


# ---- memory


def parts(size=32, filters=(8, 16), batch_size=4, **options):
    return training.memory_estimate(network(size=size, filters=filters, **options), quick(batch_size=batch_size))


def test_memory_grows_with_batch_filters_grid_and_inputs():
    base = parts()
    assert base["weights twice, gradients, moments"] == 5 * 4 * network(size=32, filters=(8, 16)).count_params()
    for more in (parts(batch_size=5), parts(filters=(16, 32)), parts(size=64), parts(pet=True)):
        assert more.sum() > base.sum()
    fixed = ["weights twice, gradients, moments", "backend"]
    assert (parts(batch_size=8).drop(fixed) == 2 * base.drop(fixed)).all()
    held = training.memory_estimate(network(), quick(), toys(4))["cohort"]
    assert held == 4 * SIZE**3 * 2
    assert training.memory_estimate(network(), quick(), glowing(toys(4)))["cohort"] == 3 * held


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_training as t
def told(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])
def train(size, filters):
    net, few = t.network(size=size, filters=filters), t.toys(4, size)
    before = told("VmRSS:")
    t.training.fit(net, few, settings=t.quick(epochs=1, batch_size=4))
    return t.training.memory_estimate(net, t.quick(batch_size=4)).sum() / (told("VmHWM:") - before)
train(16, (8,))  # what TensorFlow itself takes when it starts is not a step's
print(train(48, (16, 32)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_is_what_a_step_really_takes():
    child = subprocess.run([sys.executable, "-c", MEASURE, os.path.dirname(__file__)], capture_output=True, text=True)
    assert 0.7 < float(child.stdout.split()[-1]) < 1.4, child.stderr[-2000:]


def test_what_does_not_fit_names_what_to_lower(monkeypatch):
    net = network()
    each = training.memory_estimate(net, quick(batch_size=1))
    fixed = each["weights twice, gradients, moments"] + each["backend"]
    monkeypatch.setattr(training, "free_memory", lambda: int(fixed + 2.5 * (each.sum() - fixed)))
    with pytest.raises(runs.InputError, match=r"batch_size 3 needs about 0.\d+ GB .* lower batch_size to 2$"):
        training.fit(net, toys(4), settings=quick(batch_size=3))
    training.check_memory(net, quick(batch_size=2))  # what it advises does fit
    monkeypatch.setattr(training, "free_memory", lambda: 1000)
    with pytest.raises(runs.InputError, match="lower filters, or grid_size of chapter 3"):
        training.check_memory(net, quick(batch_size=1))
    monkeypatch.setattr(training, "free_memory", lambda: None)
    training.check_memory(net, quick(batch_size=10**9))  # nobody knows, so nobody is stopped


def test_a_device_that_runs_out_of_memory_names_what_to_lower(monkeypatch):
    class ResourceExhaustedError(Exception):
        pass

    for error in (ResourceExhaustedError("OOM when allocating"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        def fail(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr(training.keras.Model, "train_on_batch", fail)
        with pytest.raises(runs.InputError, match="memory at batch_size 2: lower batch_size, filters, or grid_size"):
            training.fit(network(), toys(4), settings=quick())
    with pytest.raises(KeyError), training._memory_in_words(quick()):
        raise KeyError("something else is not renamed")


# ---- the input


@pytest.mark.skipif(training.keras.backend.backend() != "tensorflow", reason="TensorFlow alone traces")
def test_a_step_is_traced_once(monkeypatch):
    calls, few, net = [], toys(4), network()
    monkeypatch.setitem(training.LOSSES, "heat", lambda *pair: calls.append(1) or training.heat_loss(*pair))
    trainer = training._trainer(net, quick())
    before, weights = len(calls), net.get_weights()
    for _, *batch in training._batches(trainer, few, quick(), 1):
        trainer.train_on_batch(*batch)
    assert len(calls) == before + 1
    assert not all(np.array_equal(a, b) for a, b in zip(weights, net.get_weights(), strict=True))


@pytest.mark.parametrize(("epochs", "steps"), [(130, 34), (2, 7), (1, 1)])
def test_the_rates_are_those_of_a_cosine_with_a_warm_start(epochs, steps):
    whole, warm = epochs * steps, max(1, epochs * steps // 10)
    other = training.keras.optimizers.schedules.CosineDecay(
        0.03 / 20, max(1, whole - warm), alpha=0.01, warmup_target=0.03, warmup_steps=warm)
    rates = training.learning_rates(Settings(learning_rate=0.03, epochs=epochs), whole)
    some = [*range(0, whole, 97), whole - 1]
    assert len(rates) == whole and np.allclose(rates[some], [float(other(step)) for step in some], rtol=1e-4)


def test_each_step_has_its_own_rate(monkeypatch):
    met, settings, step = [], quick(epochs=3, batch_size=2), training.keras.Model.train_on_batch

    def watch(trainer, *given, **more):
        met.append(float(trainer.optimizer.learning_rate))
        return step(trainer, *given, **more)

    monkeypatch.setattr(training.keras.Model, "train_on_batch", watch)
    training.fit(network(), toys(4), settings=settings)
    training._trainer(network(), quick(learning_rate=1))                      # a whole number is one, too
    assert np.allclose(met, training.learning_rates(settings, 6)) and len(set(met)) == 6


def test_no_two_generators_of_an_epoch_are_one(monkeypatch):
    first, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *given: first.append(real(*given).random()) or real(*given))
    list(training._batches(network(), toys(8), quick(batch_size=2), 3))
    assert len(first) > 4 and len(set(first)) == len(first)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (2, 4, 3, 2), (0, 4, 4, 4)])
def test_arrays_of_any_dimension_are_windowed(shape):
    hu = np.random.default_rng(0).integers(-2000, 2000, shape).astype("int16")
    wanted = np.stack([((hu - low) / (high - low)).clip(0, 1) for low, high in training.WINDOWS_HU], axis=-1)
    got = training.normalise(np.asarray(hu))
    assert got.dtype == np.float32 and got.shape == wanted.shape and np.allclose(got, wanted, atol=1e-6)


def test_the_next_batch_is_made_while_the_device_works():
    second = threading.Event()

    def made():
        yield 1
        second.set()
        yield 2

    feed = training._ahead(made())
    assert next(feed) == 1 and second.wait(5)  # it was made although nobody has asked for it yet
    assert list(feed) == [2] and list(training._ahead(iter([]))) == []


def test_an_error_while_a_batch_is_made_reaches_the_caller():
    def made():
        yield 1
        raise ValueError("bad volume")

    with pytest.raises(ValueError, match="bad volume"):
        list(training._ahead(made()))


def shown(net, few, settings, epoch):
    return [(*stacks, np.asarray(inputs).sum(dtype=float))
            for stacks, inputs, _ in training._stream(net, few, settings, epoch)]


@pytest.mark.parametrize("echoes", [1, 2, 3])
def test_each_batch_is_used_as_often_as_asked_with_others_in_between(echoes):
    used = [*islice(training._order(echoes), 90)]
    whole = range(90 // echoes - echoes * training.ECHO_AFTER)   # the last ones are still to come back
    assert [used.count(number) for number in whole] == [echoes] * len(whole)
    apart = [np.diff(np.flatnonzero(np.array(used) == number)) for number in whole]
    assert all((gaps >= training.ECHO_AFTER).all() for gaps in apart)


@pytest.mark.parametrize("echoes", [1, 2, 3])
def test_batches_after_an_interruption_are_those_of_an_undisturbed_training(echoes):
    net, few, settings = network(), walled(toys(4)), quick(epochs=14, batch_size=2, echoes=echoes)
    whole, steps = shown(net, few, settings, 1), settings.steps(few)
    assert len(whole) == 14 * steps == 28 and len(set(whole)) >= 28 / echoes > len(set(whole)) - 9
    for epoch in (2, 5, 8, 14):
        assert shown(net, few, settings, epoch) == whole[(epoch - 1) * steps:]


def test_a_batch_is_made_once_however_often_it_is_used(monkeypatch):
    made, one = [], training._batch
    monkeypatch.setattr(training, "_batch", lambda *given: made.append(1) or one(*given))
    used = shown(network(), toys(4), quick(epochs=20, batch_size=2, echoes=2), 1)
    assert len(used) == 40 and len(made) == len(set(used)) == 22


def test_volumes_held_on_the_device_give_the_same_batches(monkeypatch):
    few, net = walled(glowing(toys(4, targets=(0,)), without=[1])), network(pet=True)
    held, guests, add = training.ops.convert_to_tensor(few.ct_hu), [], training.transplant
    monkeypatch.setattr(training, "transplant", lambda *given: guests.append(1) or add(*given))
    for one, two in zip(*(training._batches(net, few, quick(), 1, h) for h in (None, held)), strict=True):
        assert one[0].tolist() == two[0].tolist()
        assert np.array_equal(np.asarray(one[1]), np.asarray(two[1]))
        assert all(np.array_equal(one[2][name], two[2][name]) for name in one[2])
    assert guests                                              # volumes with one are sent anew


def test_volumes_go_to_the_gpu_only_where_they_fit(monkeypatch):
    net, few = network(), toys(4)
    need = int(training.memory_estimate(net, quick(), few).sum())
    assert training._hold(net, quick(), few) is None or training._has_gpu()  # on a CPU they are where they should be
    monkeypatch.setattr(training, "_has_gpu", lambda: True)
    for free, held in ((2 * need, True), (need, False), (None, False)):
        monkeypatch.setattr(training, "free_memory", lambda free=free: free)
        assert (training._hold(net, quick(), few) is not None) == held


def test_a_gpu_draws_its_own_noise_and_repeats_it(monkeypatch):
    monkeypatch.setattr(training, "_has_gpu", lambda: True)
    hu = np.zeros((2, 12, 12, 12), "int16")
    strong = dict.fromkeys(("shift", "scale", "bend", "turn", "cut", "gain", "offset_hu"), 0) | {"noise_hu": 100}
    nothing = [np.zeros((0, 6))] * 2
    one, two, other = (np.asarray(training.augment(hu, nothing, np.random.default_rng(seed), **strong)[0])
                       for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert abs(one[0] - one[1]).max() > 1                                      # each volume its own


def test_noise_has_the_asked_strength_and_every_volume_its_own():
    grain = training._grain((40, 40, 40), np.random.default_rng(0))
    assert abs(grain.mean()) < 0.02 and abs(grain.std() - 1) < 0.02
    hu = np.zeros((40, 24, 24, 24), "int16")  # in a smaller volume two may begin at the same grain
    calm = dict.fromkeys(("shift", "scale", "bend", "turn", "cut", "gain", "offset_hu"), 0)
    noisy = training.augment(hu, [np.zeros((0, 6))] * 40, np.random.default_rng(0), **calm, noise_hu=100)[0]
    spread = noisy.std(axis=(1, 2, 3))
    assert spread.max() <= 103 and 30 < spread.mean() < 70                     # drawn from 0 to 100
    assert abs(np.corrcoef(noisy.reshape(40, -1))[~np.eye(40, dtype=bool)]).max() < 0.3


@pytest.mark.parametrize(("backend", "module"), [
    ("torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 1, mem_get_info=lambda: (7, 9)))),
    ("jax", SimpleNamespace(local_devices=lambda: [SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 9, "bytes_in_use": 2})]))])
def test_a_gpu_tells_its_own_free_memory(monkeypatch, backend, module):
    monkeypatch.setattr(training.keras.backend, "backend", lambda: backend)
    monkeypatch.setattr(training.keras.distribution, "list_devices", lambda: ["cuda:0"])
    monkeypatch.setitem(sys.modules, backend, module)
    assert training.free_memory() == 7


def test_memory_is_bounded_by_the_groups_and_the_shell_of_a_process(tmp_path, monkeypatch):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("4:memory:/job/step\n3:cpuset:/\n0::/user/run\n")
    for place, limit, held, stat in (("memory/job", "9000", "5000", "cache 7\ntotal_inactive_file 1500\n"),
                                     ("memory/job/step", str(2**63 - 4096), "100", ""), ("memory", "8000", "7000", "")):
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, text in (("limit_in_bytes", limit), ("usage_in_bytes", held), ("stat", stat)):
            (root / place / f"memory.{name}").write_text(text)
    for place, limit in (("user/run", "max"), ("user", "600"), (".", "50000")):
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, text in (("max", limit), ("current", "500"), ("stat", "inactive_file 20\n")):
            (root / place / f"memory.{name}").write_text(text)
    found = sorted(training._left_by_groups(proc, root))
    assert found[:-1] == [120, 1000, 5500, 49520] and found[-1] > 2**62
    assert list(training._left_by_groups(tmp_path / "none", root)) == []
    free = training.free_memory()
    monkeypatch.setattr(training, "_left_by_groups", lambda: iter([10**6]))
    assert free > 10**6 == training.free_memory()
    monkeypatch.setattr(training, "_left_by_groups", lambda: iter([-5]))
    assert training.free_memory() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_memory_is_bounded_by_ulimit():
    resource = pytest.importorskip("resource")
    assert list(training._left_by_shell()) == [] or resource.getrlimit(resource.RLIMIT_AS)[0] > 0
    code = ("import resource, psutil\nfrom lungct import training\n"
            "training.free_memory()\nown = psutil.Process().memory_info().vms\n"
            "resource.setrlimit(resource.RLIMIT_AS, (own + 10**9, own + 10**9))\n"
            "print(training.free_memory(), own + 10**9 - psutil.Process().memory_info().vms)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, left_after = map(int, done.stdout.split())
    assert 0 < left_after <= left <= 1e9  # threads of the frameworks may still be starting, and each takes its share


def test_input_cost_leaves_the_network_alone():
    net = network()
    before = net.get_weights()
    cost = training.input_cost(net, toys(4), quick(), rounds=2, steps=2)
    assert all(cost[name] > 0 for name in ("making", "bare", "loop")) and cost["low"] < cost["input"] < cost["high"]
    assert cost["input"] < 1
    assert all(np.array_equal(a, b) for a, b in zip(before, net.get_weights(), strict=True))


def test_what_the_loop_takes_beyond_its_neighbours_is_input(monkeypatch):
    """A machine that becomes slower from round to round: the loop takes a tenth more than the bare steps around it."""
    bare = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    loop = iter([1.5 / 0.9, 2.5 / 0.92, 3.5 / 0.88, 4.5 / 0.91, 5.5 / 0.89, 100.0])
    calls = iter([0.1] * 5 + [next(kind) for _ in range(6) for kind in (bare, loop)])
    monkeypatch.setattr(training, "_seconds_each", lambda batches, use: next(calls))
    cost = training.input_cost(network(), toys(4), quick(), rounds=5, steps=2)
    assert cost["input"] == pytest.approx(0.1) and 0.07 < cost["low"] < 0.09 and 0.11 < cost["high"] < 0.13


def test_one_round_has_no_interval():
    with pytest.raises(runs.InputError, match="rounds is 1, expected 2 or more"):
        training.input_cost(network(), toys(4), quick(), rounds=1, steps=2)


def test_the_interval_of_the_input_is_students():
    shares = np.array([0.02, -0.05, 0.11, 0.04])
    cost = training._input_share(1 / (1 - shares), [1.0] * 5)
    reach = 3.182446 * shares.std(ddof=1) / 2              # the table's t of 3 degrees of freedom, 0.975
    assert cost["input"] == pytest.approx(0.03)
    assert (cost["low"], cost["high"]) == pytest.approx((0.03 - reach, 0.03 + reach), rel=1e-6)


# ---- what a training leaves alone, and goes on from


def test_only_checkpoints_are_cleared_from_a_folder(tmp_path):
    own = ["patient_0001-00001.npz", "20261130data-final.npz", "abcdefabcdef-0001x.npz",
           ".patient_0001-00001.npz.x.part"]
    for name in own:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "0123456789ab-00001.npz").write_bytes(b"of another training")
    training.fit(network(), toys(4), settings=quick(), folder=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert set(own) <= left and "0123456789ab-00001.npz" not in left


def test_the_same_call_after_ctrl_c_goes_on_from_its_checkpoint(tmp_path):
    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    few, epochs, wanted = toys(4), [], quick(epochs=4)
    whole = network()
    undisturbed = training.fit(whole, few, settings=wanted)
    net = network()
    start = net.get_weights()
    with pytest.raises(KeyboardInterrupt):
        training.fit(net, few, settings=wanted, folder=tmp_path, report=stop)
    assert all(np.array_equal(a, b) for a, b in zip(start, net.get_weights(), strict=True))
    history = training.fit(net, few, settings=wanted, folder=tmp_path, report=lambda row: epochs.append(row["epoch"]))
    assert epochs == [3, 4]
    pd.testing.assert_frame_equal(history, undisturbed, check_exact=True)
    assert all(np.array_equal(a, b) for a, b in zip(whole.get_weights(), net.get_weights(), strict=True))


def test_a_training_that_finds_those_of_others_says_that_they_go(tmp_path, caplog):
    training.fit(network(), toys(4), settings=quick(), folder=tmp_path)
    assert not caplog.messages
    training.fit(network(), toys(4), settings=quick(seed=1), folder=tmp_path)
    assert any("holds checkpoints of another training" in message for message in caplog.messages)


def test_damaged_checkpoints_of_this_training_are_not_those_of_another(tmp_path, caplog):
    training.fit(network(), toys(4), settings=quick(), folder=tmp_path)
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(b"damaged")
    training.fit(network(), toys(4), settings=quick(), folder=tmp_path)
    assert any("damaged" in message for message in caplog.messages)
    assert not any("another training" in message for message in caplog.messages)


def test_validation_takes_the_losses_of_all_volumes_whatever_the_batch():
    examples, net = replace(toys(5), target=np.array([0, 1, -1, 0, 1])), network()
    examples.boxes_zyx[3] = np.zeros((0, 6), "float32")
    rows = [training._validate(net, examples, quick(batch_size=size)) for size in (1, 2, 5)]
    answers = at_once(each for _, each in training._answers(net, examples.ct_hu, 5))
    wanted = training._targets(net, examples.boxes_zyx, examples.target, quick())
    losses = {name: np.asarray(training.LOSSES[name](wanted[name], answers[name])) for name in wanted}
    for row in rows:
        assert row["val_heat_loss"] == pytest.approx(losses["heat"].mean(), rel=1e-4)
        assert row["val_box_loss"] == pytest.approx(losses["box"].mean(), rel=1e-4)
        assert row["val_subtype_loss"] == pytest.approx(losses["subtype"][[0, 1, 3, 4]].mean(), rel=1e-4)
        assert row["val_found"] == rows[0]["val_found"]


def test_too_little_memory_for_validation_is_one_line(monkeypatch):
    def full(*anything):
        raise MemoryError("no room")

    monkeypatch.setattr(training, "_targets", full)
    with pytest.raises(runs.InputError, match="ran out of memory at batch_size 2"):
        training._validate(network(), toys(2), quick())


@pytest.mark.parametrize(("call", "words"), [
    (lambda net: training.fit(net, toys(2), quick()), "validation is a Settings, expected Examples"),
    (lambda net: training.fit(net, (1, 2)), "train is a tuple, expected Examples: make_examples builds them"),
    (lambda net: training.fit(net, toys(2), settings={"epochs": 2}), "settings is a dict, expected Settings"),
    (lambda net: training.fit(net, replace(toys(2), boxes_zyx=[[[2, 2, 2, 5, 5, 99]]] * 2)), "a box of p0 is no"),
    (lambda net: training.make_examples(toys(2).ct_hu, [[]] * 2, pet_suv=[toys(1).ct_hu[0], None]), "suv is no array"),
    (lambda net: training.fit(keras_model(stride=4), toys(2)), r"output heat has shape \(4, 4, 4, 1\), expected \(8, "),
    (lambda net: training.fit(keras_model(named=False), toys(2)), "the network has no outputs by name"),
])
def test_what_fit_cannot_use_is_told(call, words):
    with pytest.raises(runs.InputError, match=words):
        call(network())


def keras_model(stride=2, named=True):
    volume = training.keras.Input((SIZE, SIZE, SIZE, len(training.WINDOWS_HU)))
    heat, box = (training.layers.Conv3D(c, stride, stride)(volume) for c in (1, 6))
    return training.keras.Model(volume, {"heat": heat, "box": box} if named else heat)


def test_examples_that_were_built_by_hand_are_read_like_made_ones():
    few = toys(4)
    by_hand = replace(few, ct_hu=few.ct_hu.tolist(), target=few.target.tolist(), patient_id=np.arange(4))
    nets = network(), network()
    histories = [training.fit(net, examples, None, quick()) for net, examples in zip(nets, (few, by_hand), strict=True)]
    pd.testing.assert_frame_equal(*histories)


@pytest.mark.parametrize("spoil", [lambda hu: hu.astype("int32") + 1024, lambda hu: (hu + 1000) / 2000.0])
def test_numbers_that_are_no_hu_are_told(caplog, spoil):
    few = toys(2)
    training.predict(network(), few.ct_hu)
    assert not caplog.messages
    training.predict(network(), spoil(few.ct_hu))
    training.fit(network(), replace(few, ct_hu=spoil(few.ct_hu)), None, quick(epochs=1))
    assert sum("no voxel of ct_hu is below -200: expected HU" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("name", ["box", "subtype"])
def test_no_answer_that_is_no_number(name):
    net = network()
    bias = net.get_layer(name).weights[-1]
    bias.assign(bias * np.nan)
    with pytest.raises(runs.InputError, match="its weights are damaged"):
        training.predict(net, toys(1).ct_hu)


def test_a_spacing_of_many_digits_fits_the_model_it_was_saved_with(tmp_path):
    training.save_model(network(), tmp_path, classes="AG", spacing_mm=10 / 3, training_hash="x", settings=quick(),
                        validation={})
    assert training.load_model(tmp_path, spacing_mm=10 / 3)[1]["grid"]["spacing_mm"] == 3.333333
    with pytest.raises(runs.InputError, match="spacing_mm"):
        training.load_model(tmp_path, spacing_mm=3.3334)


def test_another_state_of_the_dropout_is_another_training():
    few, net = toys(4), network()
    before, start = training._key(net, few, None, quick()), net.get_weights()
    training.fit(net, few, settings=quick())
    net.set_weights(start)                                 # leaves the generators where they are
    assert training._key(net, few, None, quick()) != before == training._key(network(), few, None, quick())


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_epoch(tmp_path):
    (tmp_path / "file").write_text("")
    epochs = []
    with pytest.raises(runs.InputError, match="cannot keep checkpoints"):
        training.fit(network(), toys(4), settings=quick(), folder=tmp_path / "file", report=epochs.append)
    assert not epochs


# ---- what would be learned or told in silence


def test_validation_without_subtypes_judges_nobody():
    net = training.predecessor_cnn(SIZE, "AG")
    unnamed = replace(toys(2), target=np.full(2, -1), patient_id=np.array(["x", "y"]))
    history = training.fit(net, toys(4), unnamed, quick(epochs=14, patience=2))
    assert len(history) == 14 and training.best_epoch(history.to_dict("records")) == 14
    assert not [name for name in history if name.startswith("val_")]


def test_validation_rows_leave_out_what_nobody_has():
    net, few = network(), toys(4)
    without = replace(few, boxes_zyx=[np.zeros((0, 6), "float32")] * 4, target=np.full(4, -1))
    row, full = (training._validate(net, examples, quick()) for examples in (without, few))
    assert not {"val_subtype_loss", "val_box_loss", "val_found"} & set(row) and row["val_heat_loss"] >= 0
    assert {"val_subtype_loss", "val_found"} <= set(full)


@pytest.mark.parametrize(("changes", "words"), [
    ({"target": [0, 1, 1, 1], "patient_id": ["a", "a", "b", "c"]}, "patient a has the subtypes 0 and 1"),
    ({"boxes_zyx": [[[2, 3], [8, 9], [10, 12]]] * 4}, "is no z0 y0 x0 z1 y1 x1"),
    ({"boxes_zyx": None}, "boxes_zyx cannot be read"), ({"boxes_zyx": [[["a"] * 6]] * 4}, "boxes_zyx cannot be read"),
    ({"boxes_zyx": [[[1, 2, 3, 4, 5, 6], [1]]] * 4}, "boxes_zyx cannot be read"),
    ({"target": 0}, "target is 0, expected a list"),
])
def test_examples_that_contradict_themselves_are_named(changes, words):
    few = toys(4)
    given = {"boxes_zyx": few.boxes_zyx, "target": few.target} | changes
    with pytest.raises(runs.InputError, match=words):
        training.make_examples(few.ct_hu, **given)


def test_a_patient_may_have_volumes_without_a_subtype():
    few = toys(4)
    made = training.make_examples(few.ct_hu, few.boxes_zyx, [0, -1, 1, 1], ["a", "a ", "b", "b"])
    assert made.patient_id.tolist() == ["a", "a", "b", "b"]
    assert training.make_examples(few.ct_hu[:1], few.boxes_zyx[:1], patient_id=np.array([b"P1"])).patient_id[0] == "P1"


def test_a_detector_is_not_trained_without_boxes():
    few = toys(4)
    bare = replace(few, boxes_zyx=[np.zeros((0, 6), "float32")] * 4)
    with pytest.raises(runs.InputError, match="no training volume has a box"):
        training.fit(network(), bare, settings=quick())
    training.fit(training.predecessor_cnn(SIZE, "AG"), bare, settings=quick())


def test_numbered_patients_are_nobody_who_trains_and_validates(caplog):
    few = toys(4)
    numbered = training.make_examples(few.ct_hu, few.boxes_zyx, few.target)
    training.fit(network(), numbered, numbered, quick())
    assert not any("train and validate" in message for message in caplog.messages)
    training.fit(network(), few, few, quick())
    assert any("4 patients train and validate" in message for message in caplog.messages)


def test_a_network_that_cannot_answer_says_so():
    net, few = network(), toys(2)
    with pytest.raises(runs.InputError, match="no output heat"):
        training.predict(training.predecessor_cnn(SIZE, "AG"), few.ct_hu)
    net.set_weights([np.full_like(weight, np.nan) for weight in net.get_weights()])
    with pytest.raises(runs.InputError, match="its weights are damaged"):
        training.predict(net, few.ct_hu)


def test_a_donor_whose_pet_is_partly_unknown_is_so_in_its_lesion_alone():
    host, donor = np.ones((16, 16, 16), "float32"), np.full((16, 16, 16), 4, "float32")
    donor[:8] = np.nan
    changed, _ = training.transplant(host, [], donor, np.array([4, 4, 4, 12, 12, 12]), np.array([8, 8, 8.0]), 1.0)
    assert np.isnan(changed[6, 8, 8]) and changed[10, 8, 8] > 2      # unknown in the lesion where it was, and not cold
    assert (changed[:4] == 1).all() and changed[5, 5, 5] == 1        # and known around it


@pytest.mark.parametrize("seed", [3, np.int64(3)])
def test_a_seed_may_be_a_number_of_numpy(seed):
    assert len(training.fit(network(), toys(4), settings=quick(seed=seed))) == quick().epochs


@pytest.mark.parametrize(("name", "value"), [("image_data_format", "channels_first"), ("floatx", "float64")])
def test_a_keras_that_is_configured_otherwise_is_one_line(name, value, monkeypatch):
    monkeypatch.setattr(training.keras.config, name, lambda: value)
    with pytest.raises(runs.InputError, match=f"{name} {value} .*keras.json"):
        network()


def test_without_a_standard_error_the_module_can_be_imported():
    done = subprocess.run(f"exec {sys.executable} -c 'import lungct.training; print(1)' 2>&-", shell=True,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "1\n"


def test_a_side_car_keeps_its_hash_and_an_older_model_its_file(tmp_path):
    net, facts = network(), {"classes": "AG", "spacing_mm": 6.0, "training_hash": "x", "settings": quick()}
    training.save_model(net, tmp_path, validation={1: np.float32(0.5), 2: np.int64(4), 10: 0.3}, **facts)
    assert training.load_model(tmp_path)[1]["validation"] == {"1": 0.5, "2": 4, "10": 0.3}
    before = (tmp_path / "model.keras").read_bytes()
    with pytest.raises(runs.InputError, match="validation holds NaN"):
        training.save_model(network(filters=(16,)), tmp_path, validation={"loss": float("nan")}, **facts)
    assert (tmp_path / "model.keras").read_bytes() == before and training.load_model(tmp_path)


@pytest.mark.parametrize("changes", [{"inputs": None}, {"classes": 3}])
def test_a_side_car_with_odd_lists_is_one_line(changes, tmp_path):
    training.save_model(network(), tmp_path, classes="AG", spacing_mm=6.0, training_hash="x", settings=quick(),
                        validation={})
    facts = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(facts | changes))
    with pytest.raises(runs.InputError, match=f"lacks a list of {next(iter(changes))}"):
        training.load_model(tmp_path)


# ---- TensorBoard


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    log = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    log.Reload()
    return {tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in log.Tensors(tag)]
            for tag in log.Tags()["tensors"]}


def test_tensorboard_log_goes_on_without_doubled_or_missing_steps(tmp_path):
    few, log = glowing(toys(4), without=[1]), tmp_path / "log"
    whole = training.fit(network(pet=True), few, few, quick())
    with pytest.raises(RuntimeError):
        training.fit(network(pet=True), few, few, quick(), tmp_path / "states", give_up_after(2), log)
    newest = max((tmp_path / "states").glob("*.npz"))
    newest.unlink()  # so that epoch 2, which is in the log, is run again
    history = training.fit(network(pet=True), few, few, quick(), tmp_path / "states", log_dir=log)
    pd.testing.assert_frame_equal(whole, history, check_exact=True)
    told = scalars(log)
    assert set(told) == {f"training/{n}" for n in ("loss", "heat_loss", "box_loss", "subtype_loss")} | {
        f"validation/{n}" for n in ("loss", "heat_loss", "box_loss", "subtype_loss", "found")}
    assert [step for step, _ in told["training/loss"]] == [1, 2, 3]
    assert np.allclose([value for _, value in told["validation/loss"]], history.val_loss)


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    training._board(tmp_path, [{"epoch": 1, "loss": 2.0}])({"epoch": 2, "loss": 1.0})
    assert caplog.text.count("the package tensorboard is not installed") == 1 and not list(tmp_path.iterdir())


# ---- the loop


def test_overfits_a_handful_of_volumes():
    net, few = network(filters=(16, 32)), toys(4)
    lessons = Settings(epochs=120, batch_size=4, learning_rate=0.01, augmented=False, patience=120)
    history = training.fit(net, few, few, lessons)
    assert history.loss.iloc[-1] < history.loss.iloc[0] / 5
    assert history.val_found.iloc[-1] == 1
    seen = at_once(answers for _, answers in training._answers(net, few.ct_hu, 4))      # without their mirror images
    assert seen["subtype"].argmax(axis=1).tolist() == few.target.tolist()
    found = [boxes[0] for boxes, _ in training.decode_detections(seen["heat"], seen["box"])]
    assert np.mean([training.box_iou(box, truth[0]) for box, truth in zip(found, few.boxes_zyx, strict=True)]) > 0.75


def test_no_training_volume_is_an_input_error():
    with pytest.raises(runs.InputError, match="no training volume"):
        training.fit(network(), toys(4).take([]))


def test_empty_validation_keeps_the_last_weights():
    net = network()
    history = training.fit(net, toys(4), toys(4).take([]), quick(patience=1))
    assert len(history) == 3 and not [c for c in history if c.startswith("val_")]
    assert training.best_epoch(history.to_dict("records")) == 3


def test_one_class_trains_the_detector_alone():
    few = toys(4, targets=(0,))
    history = training.fit(network(["A"]), few, few, quick())
    losses = ["loss", "heat_loss", "box_loss"]
    assert list(history) == ["epoch", *losses, *(f"val_{name}" for name in losses), "val_found"]


def test_volumes_without_subtype_and_without_boxes_train():
    few = toys(4, targets=(-1, 0))
    few.boxes_zyx[1] = np.zeros((0, 6), "float32")
    history = training.fit(network(), few, few.take([0]), quick())
    assert np.isfinite(history.to_numpy()).all()


def history_of(losses):
    return [{"epoch": epoch, "val_loss": loss} for epoch, loss in enumerate(losses, 1)]


def test_early_stopping_reads_the_history():
    rows = history_of([*np.linspace(3, 1, 12), *np.linspace(1.5, 2, 5), 3])
    assert training.best_epoch(rows) == 16
    assert training._stalled(rows, 2) and not training._stalled(rows, 3)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_the_best_epoch_ends_the_ten_with_the_lowest_mean(losses):
    best = training.best_epoch(history_of(losses))
    if len(losses) <= 10:
        assert best == len(losses)
        return
    means = pd.Series(losses).rolling(10).mean()
    assert best >= 10 and means[best - 1] == pytest.approx(means.min())
    assert all(training.best_epoch(history_of(losses[:n])) <= n for n in range(1, len(losses)))


def test_one_lucky_epoch_is_not_the_best():
    falling = np.linspace(3, 1.2, 30)
    assert training.best_epoch(history_of([0.5, *falling])) == 31
    assert training.best_epoch(history_of([*falling[:15], 0.9, *falling[15:]])) == 31


def test_the_epoch_of_a_detector_is_judged_by_its_detection():
    falling = np.linspace(3, 1, 30)
    rows = [{"epoch": i, "val_loss": 9, "val_heat_loss": loss, "val_box_loss": loss / 2,
             "val_subtype_loss": 9 - 3 * loss}
            for i, loss in enumerate([*falling, *falling[::-1]], 1)]
    summed = [row | {"val_loss": row["val_heat_loss"] + row["val_box_loss"] + row["val_subtype_loss"]} for row in rows]
    assert training.best_epoch(rows) == training.best_epoch(summed) == 35
    assert training.best_epoch([{"epoch": row["epoch"], "val_loss": row["val_loss"]} for row in summed]) != 35
    assert training.best_epoch([{"epoch": row["epoch"], "val_loss": row["val_heat_loss"]} for row in rows]) == 35


def test_best_weights_are_kept(monkeypatch):
    losses, few, states = iter([3.0, 1.0, 2.0, 2.5, 2.0]), toys(4), {}
    monkeypatch.setattr(training, "LOOK_BACK", 1)
    monkeypatch.setattr(training, "_validate", lambda *_: {"val_loss": next(losses)})
    net = network(classes=())                               # the subtype layer is fitted anew at the end
    training.fit(net, few, few, quick(epochs=5), report=lambda row: states.update({row["epoch"]: net.get_weights()}))
    same = {epoch for epoch, weights in states.items() if all(map(np.array_equal, net.get_weights(), weights))}
    assert same == {2} and len(states) == 5


def test_nan_names_the_volumes_of_the_batch():
    net = network()
    weights = net.get_weights()
    net.set_weights([np.full_like(w, np.nan) for w in weights])
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 1, step 0.*p[0-3], p[0-3].*learning_rate"):
        training.fit(net, toys(4), settings=quick())


def test_the_predecessor_trains():
    training.reproducible(0)
    history = training.fit(training.predecessor_cnn(SIZE, "AG"), toys(4), toys(4), quick(epochs=1))
    assert list(history) == ["epoch", "loss", "val_loss", "val_subtype_loss"]


# ---- checkpoints

CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_training as t
def unplug(row):
    if row["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
few, watched = t.walled(t.toys(4)), t.toys(2, seed=9)
t.training.fit(t.network(filters=(8, 16)), few, watched, t.quick(epochs=4), sys.argv[1], unplug)
"""


@pytest.mark.slow
def test_killed_and_called_again_ends_with_the_same_bits(tmp_path):
    here = os.path.dirname(__file__)
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path, here], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert len(list(tmp_path.glob("*.npz"))) == 2

    def finish(folder, seen):
        net = network(filters=(8, 16))
        report = lambda row: seen.append(row["epoch"])  # noqa: E731
        return net, training.fit(net, walled(toys(4)), toys(2, seed=9), quick(epochs=4), folder, report)

    resumed, late = finish(tmp_path, after := [])
    whole, history = finish(None, every := [])
    assert after == [3, 4] and every == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(late, history, check_exact=True)
    assert all(np.array_equal(a, b) for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True))
    assert saved(resumed, tmp_path / "a") == saved(whole, tmp_path / "b")


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    few, seen = toys(4), []
    whole = training.fit(network(), few, settings=quick(), folder=tmp_path)
    newest = max(tmp_path.glob("*.npz"))
    newest.write_bytes(newest.read_bytes()[:5000])
    again = training.fit(network(), few, settings=quick(), folder=tmp_path,
                         report=lambda row: seen.append(row["epoch"]))
    assert seen == [3] and "cannot be read" in caplog.text
    pd.testing.assert_frame_equal(whole, again, check_exact=True)


def test_checkpoints_of_other_settings_are_not_taken_up(tmp_path):
    few, seen = toys(4), []
    training.fit(network(), few, settings=quick(epochs=1), folder=tmp_path)
    (tmp_path / "notes.npz").write_text("not ours")
    training.fit(network(), few, settings=quick(epochs=1, learning_rate=0.001), folder=tmp_path,
                 report=lambda row: seen.append(row["epoch"]))
    assert seen == [1] and (tmp_path / "notes.npz").exists()
    assert len(list(tmp_path.glob("*-00001.npz"))) == 1  # the other training's state was cleared away


# ---- the model file


def saved(net, folder, **changes):
    facts = {"classes": ["A", "G"], "spacing_mm": 6.0, "training_hash": "x", "settings": quick(), "validation": {}}
    training.save_model(net, folder, **(facts | changes))
    return (folder / "model.keras").read_bytes(), (folder / "model.json").read_bytes()


def test_same_seed_same_bytes(tmp_path):
    files = []
    for name in "ab":
        net = network()
        training.fit(net, toys(4), settings=quick(epochs=1))
        files.append(saved(net, tmp_path / name))
    assert files[0] == files[1]
    other = network(seed=1)
    assert saved(other, tmp_path / "c")[0] != files[0][0]


def test_no_address_of_this_process_is_in_the_file(tmp_path):
    old = training.predecessor_cnn(SIZE, ["A", "G"])               # its layers share one object: the default precision
    saved(old, tmp_path, classes=["A", "G"])
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        numbers = re.findall(r'"shared_object_id": (\d+)', archive.read("config.json").decode())
    assert numbers and set(numbers) == {"1"}
    hu = training.normalise(toys(1).ct_hu)
    back = training._load_safely(tmp_path / "model.keras")
    assert np.array_equal(*(model.predict_on_batch(hu)["subtype"] for model in (old, back)))


def test_saved_and_loaded_predicts_the_same(tmp_path):
    net = network()
    fill_head(net)
    saved(net, tmp_path)
    loaded, facts = training.load_model(tmp_path, size=SIZE, spacing_mm=6.0)
    assert facts["classes"] == ["A", "G"] and facts["grid"] == {"size": SIZE, "spacing_mm": 6.0}
    one, two = (training.predict(model, toys(1).ct_hu)[0] for model in (net, loaded))
    assert np.array_equal(one.heat, two.heat) and np.array_equal(one.probabilities, two.probabilities)
    assert abs(one.probabilities[0] - 0.5) > 0.01
    for met in (4, 3):                              # after which TensorFlow compiles it for batches of any length
        training.predict(net, toys(met).ct_hu)
    one = training.predict(net, toys(1).ct_hu)[0]
    assert np.array_equal(one.heat, two.heat) and np.allclose(one.probabilities, two.probabilities, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.keras"]
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_what_does_not_belong_together_is_refused(tmp_path):
    saved(network(), tmp_path)
    with pytest.raises(runs.InputError, match=r"spacing_mm = 6.0, expected 4.0"):
        training.load_model(tmp_path, spacing_mm=4.0)
    with pytest.raises(runs.InputError, match=r"size = 16, expected 64"):
        training.load_model(tmp_path / "model.keras", size=64)
    facts = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(facts | {"windows_hu": [[-1000, 1000]]}))
    with pytest.raises(runs.InputError, match="windows_hu"):
        training.load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(facts | {"model_hash": "0"}))
    with pytest.raises(runs.InputError, match="model_hash = 0"):
        training.load_model(tmp_path)
    few, bare = facts | {"classes": ["A"]}, {name: fact for name, fact in facts.items() if name != "grid"}
    for text, message in [("{", "cannot be read .JSONDecodeError"), ("[]", "lacks schema, model_hash"),
                          (json.dumps(few), "tells 2 subtypes apart, its side-car names .'A'."),
                          (json.dumps(facts | {"classes": facts["classes"][::-1]}), "its hash does not fit"),
                          (json.dumps(facts | {"validation": {"val_loss": 0.0}}), "its hash does not fit"),
                          (json.dumps(bare), "lacks grid size, grid spacing_mm")]:
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(runs.InputError, match=message):
            training.load_model(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(runs.InputError, match="side-car .*model.json is missing: a model needs it beside itself"):
        training.load_model(tmp_path)
    with pytest.raises(runs.InputError, match="does not exist: train one with chapter 5"):
        training.load_model(tmp_path / "nowhere" / "model.keras")


def test_a_mirror_image_is_seen_as_the_mirror_image():
    examples = toys(3)
    net = network()
    training.fit(net, examples, None, quick(epochs=2))
    with_pet = glowing(examples, without=[1])
    two = network(pet=True)
    for trained, pet in ((net, None), (two, with_pet.pet_suv)):
        plain = at_once(training._both_ways(trained, examples.ct_hu, 2, pet))
        backwards = examples.ct_hu[..., ::-1], 2, None if pet is None else pet[..., ::-1]
        turned = at_once(training._both_ways(trained, *backwards))
        once = at_once(answers for _, answers in training._answers(trained, examples.ct_hu, 2, pet))
        assert np.allclose(plain["heat"], turned["heat"][:, :, :, ::-1], atol=1e-5)
        assert np.allclose(plain["box"], turned["box"][:, :, :, ::-1] * [1, 1, -1, 1, 1, 1], atol=1e-5)
        assert np.allclose(plain["subtype"], turned["subtype"], atol=1e-5)
        assert not np.allclose(plain["heat"], once["heat"], atol=1e-5)


def test_predict_refuses_another_grid_and_takes_nothing():
    words = r"volumes have shape \(8, 8, 8\), the network takes \(16, 16, 16\)"
    with pytest.raises(runs.InputError, match=words):
        training.predict(network(), np.zeros((1, 8, 8, 8), "int16"))
    assert training.predict(network(), np.zeros((0, SIZE, SIZE, SIZE), "int16")) == []
    words = r"pet_suv has shape \(1, 16, 16, 8\), ct_hu \(1, 16, 16, 16\): they must be on one grid"
    for net in (network(), network(pet=True)):
        with pytest.raises(runs.InputError, match=words):
            training.predict(net, toys(1).ct_hu, pet_suv=np.zeros((1, SIZE, SIZE, 8), "float32"))
    bare = training.predict(network(["A"]), toys(1).ct_hu)[0]
    assert bare.probabilities.shape == (0,)


@pytest.mark.parametrize(("changes", "message"), [
    ({"epochs": 0}, "epochs is 0"), ({"batch_size": -1}, "batch_size is -1"), ({"learning_rate": 0.0}, "learning_rate"),
    ({"patience": 0}, "patience is 0"), ({"balance": 1.5}, "balance is 1.5, expected 0 to 1"),
    ({"epochs": 1.5}, "epochs is 1.5, expected a whole number above zero"), ({"echoes": 1.5}, "echoes is 1.5"),
    ({"batch_size": "4"}, "batch_size is '4'"), ({"learning_rate": np.inf}, "learning_rate is inf"),
    ({"learning_rate": np.nan}, "learning_rate is nan"), ({"clip_norm": 0}, "clip_norm is 0"),
    ({"weight_decay": -1}, "weight_decay is -1, expected zero or more"), ({"subtype_weight": np.inf}, "subtype_weight"),
    ({"transplants": 5}, "transplants is 5, expected 0 to 1"), ({"pet_dropout": -1}, "pet_dropout is -1"),
    ({"smoothing": 3}, "smoothing is 3"), ({"seed": -1}, "seed is -1"), ({"seed": 0.5}, "seed is 0.5"),
    ({"epochs": True}, "epochs is True"), ({"learning_rate": True}, "learning_rate is True"),
    ({"augmented": 1}, "augmented is 1, expected True or False")])
def test_settings_out_of_range_are_the_users_to_mend(changes, message):
    with pytest.raises(runs.InputError, match=message):
        Settings(**changes)


def test_settings_of_every_numeric_kind_are_taken():
    for changes in [{"epochs": np.int64(2)}, {"learning_rate": 1}, {"balance": np.float32(0.5)}, {"smoothing": 0},
                    {"transplants": 1}, {"weight_decay": 0}, {"subtype_weight": 0}, {"seed": 2**32 - 1}]:
        Settings(**changes)


@pytest.mark.parametrize(("train", "validation", "message"), [
    (toys(2, size=8), None, r"volumes have shape \(8, 8, 8\), the network takes \(16, 16, 16\)"),
    (toys(2), toys(2, size=8), r"volumes have shape \(8, 8, 8\)"),
    (toys(2, targets=(0, 5)), None, "target of p1 is 5, expected -1 for none, or .* one of the network's 2 subtypes"),
    (toys(2, targets=(0, -2)), None, "target holds -2"), (toys(2), toys(2, targets=(0, 2)), "target of p1 is 2"),
    (replace(toys(2), pet_suv=np.zeros((1, 8, 8, 8))), None, "they must be on one grid")])
def test_examples_that_do_not_fit_the_network_are_refused_before_training(train, validation, message):
    with pytest.raises(runs.InputError, match=message):
        training.fit(network(), train, validation, quick())


def test_a_network_without_subtypes_takes_any():
    assert len(training.fit(network([]), toys(2, targets=(0, 5)), settings=quick(epochs=1))) == 1


@pytest.mark.parametrize("module", [training, labels])
def test_parameters_are_described_one_a_line(module):
    for name in module.__all__:
        function = getattr(module, name)
        _, found, section = (inspect.getdoc(function) or "").partition("Parameters\n----------\n")
        if found and inspect.isfunction(function):
            lines = section.split("\n\n")[0].splitlines()
            names = ", ".join(line.partition(" : ")[0] for line in lines if line[0] != " ")
            assert names.replace("*", "").split(", ") == list(inspect.signature(function).parameters), name
            assert not any(re.search(r"\. +\w+ : ", line) for line in lines), name


@pytest.mark.parametrize("text", ["", "abc", "16, 32", "1.5", "-8"])
def test_filters_that_are_no_numbers_are_the_users_to_mend(text):
    with pytest.raises(runs.InputError, match="expected whole numbers with blanks between"):
        training.parse_filters(text)
    assert training.parse_filters(" 8  16 ") == (8, 16)


def test_unknown_precision_lists_the_known():
    with pytest.raises(runs.InputError, match="precision 'foo': expected one of float32, mixed_bfloat16"):
        training.build_network(SIZE, "AG", (8,), precision="foo")


# ---- what callers hand over


def test_examples_are_taken_by_position_or_by_mask():
    some = toys(4)
    mask = np.array([False, True, False, True])
    assert list(some.take(mask).stack_id) == list(some.take([1, 3]).stack_id) == list(some.stack_id[[1, 3]])
    assert list(some.take(pd.Series(mask)).stack_id) == list(some.stack_id[[1, 3]]) and len(some.take([])) == 0
    for odd in (mask[:2], [0.9, 1.9], ["a"]):
        with pytest.raises(training.runs.InputError, match="expected positions, or a mask of 4"):
            some.take(odd)


@pytest.mark.parametrize("names", ["abcd", 5, ["a", None, "c", "d"], ["a", float("nan"), "c", "d"]])
def test_patients_without_a_name_are_no_patient_called_none(names):
    some = toys(4)
    with pytest.raises(training.runs.InputError, match="patient_id is a single name or lacks some"):
        training.make_examples(some.ct_hu, some.boxes_zyx, patient_id=names)


def test_a_volume_that_holds_no_numbers_is_not_predicted():
    net, volumes = network(), toys(3).ct_hu.astype("float32")
    assert len(training.predict(net, volumes)) == 3
    for value in (np.nan, np.inf):
        volumes[1, 0, 0, 0] = value
        with pytest.raises(training.runs.InputError, match="NaN or infinity in volume 1, expected HU"):
            training.predict(net, volumes)
    with pytest.raises(training.runs.InputError, match="ct_hu is a list"):
        training.predict(net, [1])
    with pytest.raises(training.runs.InputError, match="batch_size is 0"):
        training.predict(net, toys(3).ct_hu, batch_size=0)


def test_a_role_that_nobody_knows_is_not_an_empty_role():
    cohort = SimpleNamespace(ct_hu=np.zeros((1, 2, 2, 2), np.int16))
    labels = pd.DataFrame({"stack_id": ["a", "a"], "role": "train", "lesions": 1})
    with pytest.raises(training.runs.InputError, match="role 'val': expected one of train, validation, test"):
        training.gather(cohort, labels, "val")
    with pytest.raises(training.runs.InputError, match="labels hold a stack twice"):
        training.gather(cohort, labels, "train")


def test_patients_who_train_and_validate_are_named(caplog):
    training.fit(network(), toys(2), toys(2), quick(epochs=1))
    assert "2 patients train and validate" in caplog.text


@pytest.mark.parametrize("name", ["augmented", "jit_compile"])
def test_a_switch_that_is_a_word_is_refused(name):
    with pytest.raises(training.runs.InputError, match=f"{name} is 'False', expected True or False"):
        training.Settings(**{name: "False"})


def test_a_model_is_not_saved_with_names_that_it_does_not_tell_apart(tmp_path):
    rest = {"spacing_mm": np.float32(2.1), "training_hash": "x", "settings": quick(), "validation": {}}
    net = network()
    with pytest.raises(training.runs.InputError, match="classes names 5"):
        training.save_model(net, tmp_path, classes=list("ABCDE"), **rest)
    training.save_model(net, tmp_path, classes=list("AG"), **rest)
    assert training.load_model(tmp_path, spacing_mm=2.1)[1]["grid"]["spacing_mm"] == 2.1


def test_settings_are_the_same_whatever_kind_of_number_they_were():
    plain = training.Settings(epochs=2, clip_norm=1.0, seed=3)
    odd = training.Settings(epochs=np.int64(2), clip_norm=1, seed=np.int32(3))
    assert repr(odd) == repr(plain) and odd == plain


@pytest.mark.parametrize("names", [["adeno (invasive)", "G"], ["A", "A"], ["A", "G" * 33]])
def test_a_model_is_not_saved_with_names_that_loading_refuses(tmp_path, names):
    network = training.build_network(16, names, (8, 16))
    with pytest.raises(runs.InputError, match="classes has"):
        training.save_model(network, tmp_path, classes=names, spacing_mm=6.0, settings=training.Settings(),
                            training_hash="", validation={})
    assert not list(tmp_path.iterdir())
