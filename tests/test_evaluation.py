"""Chapter 6: metrics against hand-computed cases, an independent brute-force implementation, and scikit-learn."""

import inspect
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score, roc_auc_score

from lungct import evaluation as ev
from lungct import labels, runs

PATIENTS = [f"P{i:02}" for i in range(12)]


def boxes(rows):
    """Cubes of side 10 mm at given x: (stack_id, x, score)."""
    table = pd.DataFrame(rows, columns=["stack_id", "x0_mm", "score"])
    table = table.astype({"stack_id": "str", "x0_mm": float, "score": float})
    table = table.assign(y0_mm=0.0, z0_mm=0.0, x1_mm=table["x0_mm"] + 10, y1_mm=10.0, z1_mm=10.0)
    return table.assign(lesion_id=[f"L{i}" for i in range(len(table))])


def scans(*pairs):
    return pd.DataFrame(pairs, columns=["stack_id", "patient_id"])


# matching ---------------------------------------------------------------------------------------------------------

def test_iou_by_hand():
    cube, shifted = [0, 0, 0, 2, 2, 2], [1, 0, 0, 3, 2, 2]
    assert np.allclose(ev.iou_3d([cube, shifted], [cube]), [[1], [1 / 3]])
    assert ev.iou_3d([[0] * 6], [[0] * 6]).item() == 0        # no volume: no overlap, and no division by zero
    assert ev.iou_3d(np.zeros((0, 6)), [cube]).shape == (0, 1)


def test_centre_rule_includes_lower_edge_only():
    lesion = [[0, 0, 0, 10, 10, 10]]
    for x, expected in ((0.0, 0), (10.0, ev.FALSE_POSITIVE)):
        found = ev.match_detections([[x - 1, 4, 4, x + 1, 6, 6]], [1.0], lesion)
        assert found.tolist() == [expected]


def test_each_lesion_is_found_once_and_the_best_score_is_served_first():
    lesion = [[0, 0, 0, 10, 10, 10]]
    box = [1, 1, 1, 9, 9, 9]
    assert ev.match_detections([box, box, box], [0.1, 0.9, 0.5], lesion).tolist() == [ev.REPEAT, 0, ev.REPEAT]


def test_a_detection_between_two_lesions_takes_the_free_one():
    lesions = [[0, 0, 0, 10, 10, 10], [2, 0, 0, 12, 10, 10]]
    near_first, near_both = [3, 3, 3, 5, 7, 7], [4, 3, 3, 6, 7, 7]
    assert ev.match_detections([near_first, near_both], [0.9, 0.8], lesions).tolist() == [0, 1]


def test_no_lesions_and_no_detections():
    assert ev.match_detections(np.zeros((0, 6)), [], [[0, 0, 0, 1, 1, 1]]).tolist() == []
    assert ev.match_detections([[0, 0, 0, 1, 1, 1]], [0.5], np.zeros((0, 6))).tolist() == [ev.FALSE_POSITIVE]
    assert ev.match_detections([[0, 0, 0, 1, 1, 1]], [0.5], np.zeros((0, 6)), 0.1).tolist() == [ev.FALSE_POSITIVE]


# FROC and average precision ---------------------------------------------------------------------------------------

@pytest.fixture
def hand():
    found = boxes([("one", 1, 0.9), ("two", 90, 0.8), ("two", 2, 0.7), ("one", 3, 0.6), ("one", 90, 0.4),
                   ("one", 50, 0.4)])
    truth = boxes([("one", 0, 1), ("one", 50, 1), ("two", 0, 1)])
    return ev.score_scans(found.drop(columns="lesion_id"), truth, scans(("one", "P1"), ("two", "P2")))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda found, truth: (found, truth.assign(x0_mm=truth["x1_mm"], x1_mm=truth["x0_mm"])), "a lesion in stack one"),
    (lambda found, truth: (found, truth.assign(z1_mm=truth["z0_mm"])), "a lesion in stack one"),
    (lambda found, truth: (found, truth.assign(y1_mm=[np.nan, 10])), "a lesion in stack one"),
    (lambda found, truth: (found.assign(x0_mm=found["x1_mm"], x1_mm=found["x0_mm"]), truth),
     "a detection in stack one"),
])
def test_what_is_no_box_is_refused_and_not_counted_as_missed(spoil, message):
    found, truth = spoil(boxes([("one", 1, 0.9)]).drop(columns="lesion_id"), boxes([("one", 0, 1), ("two", 0, 1)]))
    with pytest.raises(runs.InputError, match=message):
        ev.score_scans(found, truth, scans(("one", "P1"), ("two", "P2")))


def test_values_beyond_their_bounds_are_refused():
    mm, names = np.arange(12.0) + 1, [f"p{i}" for i in range(12)]

    def mean(weights):
        return weights @ mm / weights.sum()

    with pytest.raises(runs.InputError, match="beyond the bounds"):
        ev.bootstrap_interval(mean, names, unit="mm")
    free = ev.bootstrap_interval(mean, names, unit="mm", bounds=None)
    assert free.low > 4 and free.high < 9


def test_froc_by_hand(hand):
    false, found, threshold = ev.froc(hand)
    assert np.allclose(false, [0, 0, 0.5, 0.5, 0.5, 1])
    assert np.allclose(found, [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert threshold[0] == np.inf and np.allclose(threshold[1:], [0.9, 0.8, 0.7, 0.6, 0.4])
    assert np.allclose(ev.sensitivity_at((false, found, threshold), [0.49, 0.5, 8]), [1 / 3, 2 / 3, 1])
    assert np.isclose(ev.detection_scores({"centre": hand, "iou_0.1": hand, "iou_0.5": hand})["cpm"], 16 / 21)


def test_average_precision_by_hand(hand):
    assert np.isclose(ev.average_precision(hand), (1 + 2 / 3 + 1 / 2) / 3)


def test_a_scan_without_detections_still_counts(hand):
    truth = boxes([("one", 0, 1), ("two", 0, 1)])
    found = boxes([("one", 1, 0.9)]).drop(columns="lesion_id")
    scored = ev.score_scans(found, truth, scans(("one", "P1"), ("two", "P2")))
    assert scored.scans.tolist() == [1, 1] and ev.sensitivity_at(ev.froc(scored), 8) == 0.5


def test_detections_of_other_scans_are_left_out():
    scored = ev.score_scans(boxes([("elsewhere", 1, 0.9)]).drop(columns="lesion_id"), boxes([("one", 0, 1)]),
                            scans(("one", "P1")))
    assert len(scored.table) == 0 and ev.average_precision(scored) == 0


def test_nothing_at_all_is_undefined_and_does_not_crash():
    nothing = ev.score_scans(boxes([]).drop(columns="lesion_id"), boxes([]), scans())
    scores = ev.detection_scores(dict.fromkeys(ev.RULES, nothing))
    assert all(np.isnan(value) for value in scores.values())
    estimates, table = ev.estimate_all(lambda w: ev.detection_scores(dict.fromkeys(ev.RULES, nothing), w), [], n=10)
    assert set(estimates) == set(scores) and not any(e.estimable for e in estimates.values()) and table.empty


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf, None])
def test_a_score_that_is_no_number_is_refused(score):
    truth, stacks = boxes([("one", 0, 1)]), scans(("one", "P1"), ("two", "P2"))
    found = boxes([("one", 1, 0.9), ("two", 1, score), ("elsewhere", 1, np.nan)]).drop(columns="lesion_id")
    with pytest.raises(runs.InputError, match="^a score or a corner is not finite in stack two: .*$"):
        ev.score_scans(found, truth, stacks)
    assert ev.score_scans(found, truth, stacks.iloc[:1]).hit.tolist() == [True]  # the others do not count
    many = boxes([(f"s{i}", 1, np.nan) for i in range(7)]).drop(columns="lesion_id")
    with pytest.raises(runs.InputError, match="stack s0, s1, s2, s3, s4 and 2 more: "):
        ev.score_scans(many, truth, scans(*((f"s{i}", "P") for i in range(7))))


def test_a_scan_is_counted_once():
    truth, found = boxes([("one", 0, 1)]), boxes([("one", 1, 0.9)]).drop(columns="lesion_id")
    with pytest.raises(runs.InputError, match="^scans has stack one more than once: drop_duplicates"):
        ev.score_scans(found, truth, scans(("one", "P1"), ("one", "P1"), ("two", "P2")))


@pytest.mark.parametrize("wanted", [-1, [1, -0.5], np.nan])
def test_no_threshold_has_fewer_than_no_false_positives(hand, wanted):
    with pytest.raises(runs.InputError, match="^false positives per scan of .*: give 0 or more$"):
        ev.sensitivity_at(ev.froc(hand), wanted)
    assert ev.sensitivity_at(ev.froc(hand), 0) == 1 / 3


def brute_force(found, truth, stacks, min_iou, threshold):
    """Hits and false positives at one threshold, matched anew with plain loops: an implementation of its own."""
    hits = false = repeats = 0
    for stack in stacks["stack_id"]:
        lesions = truth[truth["stack_id"] == stack][ev.CORNERS_MM].to_numpy().tolist()
        mine = found[(found["stack_id"] == stack) & (found["score"] >= threshold)]
        taken = set()
        for box in mine.sort_values("score", ascending=False, kind="stable")[ev.CORNERS_MM].to_numpy().tolist():
            good = []
            for j, lesion in enumerate(lesions):
                if min_iou is None:
                    centre = [(box[a] + box[a + 3]) / 2 for a in range(3)]
                    ok = all(lesion[a] <= centre[a] < lesion[a + 3] for a in range(3))
                    value = -sum((centre[a] - (lesion[a] + lesion[a + 3]) / 2) ** 2 for a in range(3)) ** 0.5
                else:
                    shared = side = other = 1.0
                    for a in range(3):
                        shared *= max(0.0, min(box[a + 3], lesion[a + 3]) - max(box[a], lesion[a]))
                        side *= box[a + 3] - box[a]
                        other *= lesion[a + 3] - lesion[a]
                    value = shared / (side + other - shared)
                    ok = value >= min_iou
                if ok:
                    good.append((value, -j))
            free = [g for g in good if g[1] not in taken]
            if free:
                taken.add(max(free)[1])
                hits += 1
            elif good:
                repeats += 1
            else:
                false += 1
    return hits, false, repeats


@st.composite
def cohorts(draw):
    stacks = scans(*[(f"s{i}", f"p{i // 2}") for i in range(draw(st.integers(1, 5)))])
    names = st.sampled_from(stacks["stack_id"].tolist())
    place = st.integers(0, 60)
    score = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    found = boxes(draw(st.lists(st.tuples(names, place, score), max_size=14)))
    truth = boxes(draw(st.lists(st.tuples(names, place, st.just(1.0)), min_size=1, max_size=6)))
    return found.drop(columns="lesion_id"), truth, stacks, draw(st.sampled_from([None, 0.1, 0.5]))


@settings(max_examples=80, deadline=None)
@given(cohorts())
def test_froc_and_precision_agree_with_brute_force(cohort):
    found, truth, stacks, min_iou = cohort
    scored = ev.score_scans(found, truth, stacks, min_iou)
    false, sensitivity, threshold = ev.froc(scored)
    area, before = 0.0, 0
    for f, s, t in zip(false, sensitivity, threshold, strict=True):
        hits, wrong, repeats = brute_force(found, truth, stacks, min_iou, t)
        assert np.isclose(f, wrong / len(stacks)) and np.isclose(s, hits / len(truth))
        if hits > before:
            area += (hits - before) / len(truth) * hits / (hits + wrong + repeats)
        before = hits
    assert np.isclose(ev.average_precision(scored), area)


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.integers(0, 10**6))
def test_weights_are_copies_of_patients(cohort, seed):
    """A resample by weights gives what a cohort with really copied patients gives."""
    found, truth, stacks, min_iou = cohort
    scored = ev.score_scans(found, truth, stacks, min_iou)
    weights = np.random.default_rng(seed).integers(0, 3, len(scored.patients))
    copies = [(p, c) for p, w in zip(scored.patients, weights, strict=True) for c in range(w)]
    if not copies:
        return

    def copy(table):
        owner = table["stack_id"].map(stacks.set_index("stack_id")["patient_id"])
        parts = [table[owner == p].assign(stack_id=lambda t, c=c: t["stack_id"] + f"_{c}") for p, c in copies]
        return pd.concat(parts, ignore_index=True)

    many = pd.concat([stacks[stacks["patient_id"] == p].assign(stack_id=lambda t, c=c: t["stack_id"] + f"_{c}",
                                                               patient_id=f"{p}_{c}") for p, c in copies])
    copied = ev.score_scans(copy(found), copy(truth), many, min_iou)
    by_weight, by_copy = ev.sensitivity_at(ev.froc(scored, weights)), ev.sensitivity_at(ev.froc(copied))
    assert np.allclose(by_weight, by_copy, equal_nan=True)
    assert np.isclose(ev.average_precision(scored, weights), ev.average_precision(copied), equal_nan=True)


# intervals --------------------------------------------------------------------------------------------------------

def test_resamples_are_copies_of_patients():
    draws = ev.resamples(PATIENTS, n=500, seed=3)
    assert draws.shape == (501, 12) and (draws.sum(axis=1) == 12).all() and (draws[0] == 1).all()
    assert np.array_equal(draws, ev.resamples(PATIENTS, n=500, seed=3))
    assert not np.array_equal(draws, ev.resamples(PATIENTS, n=500, seed=4))
    with pytest.raises(ValueError, match="each named once: got 3 names, 2 different"):
        ev.resamples(["A", "A", "B"])


def test_the_interval_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=200)
    made = ev.bootstrap_interval(lambda w: w @ values / w.sum(), [f"P{i}" for i in range(200)], n=4000, bounds=None)
    error = values.std() / 200**0.5
    assert np.isclose(made.value, values.mean(), atol=1e-6)
    assert np.isclose(made.high - made.low, 2 * 1.96 * error, rtol=0.05)


def test_coverage_of_a_share():
    """95 % intervals hold the truth about 95 % of the time (percentile intervals a little less at 40 patients)."""
    rng, inside = np.random.default_rng(0), 0
    for seed in range(200):
        right = rng.random(40) < 0.7
        made = ev.bootstrap_interval(lambda w, r=right: w @ r / w.sum(), [f"P{i}" for i in range(40)], n=300, seed=seed)
        inside += made.low <= 0.7 <= made.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_collapsed_interval_gets_the_exact_bound():
    perfect = ev.bootstrap_interval(lambda w: 1.0, PATIENTS)
    assert np.isclose(perfect.low, 0.025 ** (1 / 12), atol=1e-6) and perfect.high == 1
    none = ev.bootstrap_interval(lambda w: 0.0, PATIENTS)
    assert none.low == 0 and np.isclose(none.high, 1 - 0.025 ** (1 / 12), atol=1e-6)
    no_difference = ev.bootstrap_interval(lambda w: 0.0, PATIENTS, bounds=(-1, 1))
    assert no_difference.low < 0 < no_difference.high
    always = ev.bootstrap_interval(lambda w: 0.25, PATIENTS)            # it happened to be so: twelve patients long
    assert always.low < 0.25 < always.high
    constant = ev.bootstrap_interval(lambda w: 0.25, PATIENTS, bounds=None)        # it must be so
    assert (constant.low, constant.high) == (0.25, 0.25)


def test_a_result_a_hair_short_of_perfect_is_no_surer_than_a_perfect_one():
    perfect = ev.bootstrap_interval(lambda w: 1.0, PATIENTS)
    for share in (0.01, 0.2):
        good = ev.bootstrap_interval(lambda w, share=share: 1 - share * w[0] / w.sum(), PATIENTS)
        bad = ev.bootstrap_interval(lambda w, share=share: share * w[0] / w.sum(), PATIENTS)
        assert good.high == 1 and good.low <= perfect.low and good.value < 1
        assert bad.low == 0 and bad.high >= 1 - perfect.low - 1e-6 and bad.value > 0
    narrow = ev.bootstrap_interval(lambda w: 0.5 + 0.01 * w[0] / w.sum(), PATIENTS)
    assert narrow.high - narrow.low < 0.05                              # what reaches no bound is left as it is


def test_too_few_patients_give_no_number():
    made = ev.bootstrap_interval(lambda w: 1.0, PATIENTS[:9])
    assert (made.value, made.low, made.high, made.estimable) == (None, None, None, False)
    assert made.n == 9 and str(made) == "not estimable (at least 10 patients needed)"


def test_undefined_resamples_give_no_number():
    rare = np.arange(12) == 0                                     # absent from about a third of the resamples
    made = ev.bootstrap_interval(lambda w: 1.0 if w @ rare else np.nan, PATIENTS)
    assert not made.estimable and "of the resamples" in made.reason
    assert ev.bootstrap_interval(lambda w: np.nan, PATIENTS).reason == "undefined on these patients"


def test_nothing_drawn_or_nobody_asked_is_not_estimable():
    assert ev.summarise([0.5], 12).reason == ev.summarise([], 12).reason == "no resamples"
    assert ev.summarise([0.5, 0.4, 0.6], 0).reason == ev.summarise([0.5, 0.4, 0.6], 0, None).reason == "no patients"
    assert ev.bootstrap_interval(lambda w: 0.5, PATIENTS, n=0).reason == "no resamples"
    assert ev.chance_range(np.repeat([0, 1], 6), np.full((12, 2), 0.5), n=0).reason == "no resamples"
    assert ev.perfect_margin(0) == 1 and ev.perfect_margin(1) == 0.975


def test_a_paired_difference_is_sharper_than_two_intervals():
    hard = np.random.default_rng(2).random(40)
    first, second = hard < 0.8, hard < 0.65
    table = ev.resampled(lambda w: {"a": w @ first / w.sum(), "b": w @ second / w.sum()}, [f"P{i}" for i in range(40)])
    a, b = (ev.summarise(table[name].to_numpy(), 40) for name in "ab")
    paired = ev.summarise((table["a"] - table["b"]).to_numpy(), 40, (-1, 1))
    assert b.high > a.low and paired.low > 0


# grids, controls, groups ------------------------------------------------------------------------------------------

def test_detection_table_sorts_and_has_types_even_when_empty():
    stacks = scans(("s", "p")).assign(role="test", affine=[np.eye(4).ravel().tolist()])
    two = ev.detection_table(stacks, [(np.array([[0, 0, 0, 1, 1, 1], [2, 2, 2, 4, 4, 4]]), np.array([0.2, 0.8]))])
    assert two["score"].tolist() == [0.8, 0.2] and two["rank"].tolist() == [1, 2]
    assert two["x1_mm"].tolist() == [3.5, 0.5]
    none = ev.detection_table(stacks, [(np.zeros((0, 6)), np.zeros(0))])
    assert len(none) == 0 and none.dtypes.to_dict() == two.dtypes.to_dict()


def test_wrong_scans_never_gives_a_patient_his_own():
    stacks = scans(("a1", "A"), ("a2", "A"), ("b1", "B"), ("c1", "C"), ("c2", "C"))
    donors = ev.wrong_scans(stacks)
    owner = stacks.set_index("stack_id")["patient_id"]
    assert all(owner[donor] != owner[stack] for stack, donor in donors.items())
    assert ev.wrong_scans(scans(("a1", "A"))).isna().all()


def test_position_prior():
    train = np.array([[0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 4], [9, 9, 9, 12, 12, 12.0]])
    found, share = ev.position_prior(train, groups=2)
    assert np.allclose(found[0], [0, 0, 0, 2, 2, 3]) and np.allclose(share, [2 / 3, 1 / 3])
    assert ev.position_prior(np.zeros((0, 6)))[0].shape == (0, 6)
    assert len(ev.position_prior(np.ones((5, 6)))[0]) == 1            # identical boxes are one group


def test_threshold_comes_from_validation(hand):
    assert ev.operating_threshold(hand, 0.4) == 0.9 and ev.operating_threshold(hand, 1) == 0.4
    nothing = ev.score_scans(boxes([]).drop(columns="lesion_id"), boxes([]), scans())
    assert ev.operating_threshold(nothing) is None


def test_shares_by_group_count_even_where_they_cannot_estimate(hand):
    lesions = boxes([("one", 0, 1), ("one", 50, 1), ("two", 0, 1)]).assign(patient_id=["P1", "P1", "P2"])
    found = ev.lesions_found(hand, lesions, threshold=0.5)
    assert found.tolist() == [True, False, True]
    table = ev.share_by(found, lesions["patient_id"], pd.Series(["left", None, "left"], index=[7, 8, 9]))
    facts = table[["group", "patients", "counted", "right"]].to_numpy().tolist()
    assert facts == [["left", 2, 2, 2], ["unknown", 1, 1, 0]]           # what has no group stays counted
    assert not any(e.estimable for e in table["estimate"])


def test_shares_by_group_have_patient_intervals():
    patients = np.repeat(PATIENTS, 2)
    right = np.repeat(np.arange(12) < 9, 2)
    table = ev.share_by(right, patients, pd.Categorical(["z"] * 24, ["z", "a"]), n=400)
    by_patient = ev.bootstrap_interval(lambda w: w @ right[::2] / w.sum(), PATIENTS, 400)
    assert table["estimate"].tolist() == [by_patient]                    # two copies of a patient are no evidence


def test_scan_groups_say_what_the_headers_say():
    cohort = pd.DataFrame({"stack_id": ["a", "b", "c"], "manufacturer": ["GE MEDICAL SYSTEMS", "Siemens", None],
                           "slice_thickness_mm": [2.0, 2.5, np.nan], "sex": ["F", "M", None]})
    groups = ev.scan_groups(cohort).astype("object").fillna("?")
    assert groups.loc["a"].tolist() == ["GE", "up to 2 mm", "women"]
    assert groups.loc["b"].tolist() == ["SIEMENS", "2 to 4 mm", "men"]
    assert groups.loc["c"].tolist() == ["UNKNOWN", "?", "?"]
    assert ev.scan_groups(cohort[["stack_id"]]).isna().to_numpy()[:, 1:].all()


# subtypes ---------------------------------------------------------------------------------------------------------

def test_patients_are_means_of_their_stacks():
    rows = pd.DataFrame({"patient_id": ["P", "P", "Q", "R"], "subtype": ["A", "A", "G", None],
                         "p_A": [0.9, 0.5, 0.2, 0.5], "p_G": [0.1, 0.5, 0.8, 0.5]})
    table = ev.patient_probabilities(rows, ["A", "G"])
    assert table["patient_id"].tolist() == ["P", "Q"] and np.allclose(table["p_A"], [0.7, 0.2])
    with pytest.raises(ValueError, match="several for P"):
        ev.patient_probabilities(rows.assign(subtype=["A", "G", "G", None]), ["A", "G"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_subtype_scores_agree_with_scikit_learn_on_copied_patients(seed, classes):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(0, classes, 10)]
    probability = rng.dirichlet(np.ones(classes), len(truth))
    weights = rng.integers(1, 4, len(truth))
    rows = np.repeat(np.arange(len(truth)), weights)
    made = ev.subtype_scores(truth, probability, weights)
    called = probability.argmax(1)
    assert np.isclose(made["balanced_accuracy"], balanced_accuracy_score(truth[rows], called[rows]))
    auc = [roc_auc_score(truth == k, probability[:, k], sample_weight=weights) for k in range(classes)]
    assert np.isclose(made["auc_macro"], np.mean(auc))
    squared = ((probability - np.eye(classes)[truth]) ** 2).sum(1)
    assert np.isclose(made["brier"], np.average(squared, weights=weights))
    for k in range(classes):
        inside, said = truth[rows] == k, called[rows] == k
        assert np.isclose(made[f"sensitivity_{k}"], recall_score(inside, said))
        assert np.isclose(made[f"specificity_{k}"], recall_score(~inside, ~said))


def subtype_table(counts, seed=0):
    truth = np.repeat(np.arange(len(counts)), counts)
    probability = np.random.default_rng(seed).dirichlet(np.ones(len(counts)), len(truth))
    names = [f"P{i}" for i in range(len(truth))]
    averaged = ev.averaged_classes(truth, len(counts))
    values = ev.resampled(lambda w: ev.subtype_scores(truth, probability, w, averaged), names, 50, strata=truth)
    return truth, values


def test_a_rare_class_stays_out_of_the_means_only():
    truth, values = subtype_table([6, 5, 1])
    assert ev.averaged_classes(truth, 3) == [0, 1]
    made = ev.subtype_estimates(values, truth, ["A", "G", "E"])
    assert made["balanced_accuracy"].estimable and made["auc_macro"].estimable and not made["auc_E"].estimable
    assert made["brier"].n == 12
    called = np.eye(3)[[0] * 6 + [1] * 5 + [0]]
    assert ev.subtype_scores(truth, called, averaged=[0, 1])["balanced_accuracy"] == 1
    assert ev.subtype_scores(truth, called)["balanced_accuracy"] == pytest.approx(2 / 3)


def test_strata_keep_their_size():
    draws = ev.resamples(PATIENTS, n=200, strata=[0] * 9 + [1] * 3)
    assert (draws[:, :9].sum(axis=1) == 9).all() and (draws[:, 9:].sum(axis=1) == 3).all()
    assert ev.resamples([], n=5).shape == (6, 0)


def test_rules_for_subtypes():
    truth, values = subtype_table([8, 4])
    made = ev.subtype_estimates(values, truth, ["A", "G"])
    assert made["auc_A"].reason == "8 in the class, 4 outside, at least 5 patients each needed"
    assert made["balanced_accuracy"].estimable and made["brier"].estimable and made["balanced_accuracy"].n == 12
    assert made["sensitivity_A"].estimable and not made["specificity_A"].estimable      # 8 inside, 4 outside
    assert not made["sensitivity_G"].estimable and made["specificity_G"].estimable
    truth, values = subtype_table([10, 2])
    assert ev.subtype_estimates(values, truth, ["A", "G"])["balanced_accuracy"].reason == (
        "two classes with at least 3 patients needed, A has 10, G has 2")
    truth, values = subtype_table([3, 1])
    made = ev.subtype_estimates(values, truth, ["A", "G"])
    assert {e.reason for e in made.values()} == {"at least 10 patients needed"}


def test_no_patients_no_subtype_numbers():
    values = ev.resampled(lambda w: ev.subtype_scores(np.zeros(0, int), np.zeros((0, 2)), w), [], 10)
    made = ev.subtype_estimates(values, np.zeros(0, int), ["A", "G"])
    each = {f"{name}_{c}" for name in ("auc", "sensitivity", "specificity") for c in "AG"}
    assert set(made) == {"balanced_accuracy", "brier", "auc_macro", *each}
    assert not any(e.estimable for e in made.values())


@pytest.mark.parametrize("stray", [-1, 2])
def test_a_patient_without_a_subtype_is_not_of_the_last_class(stray):
    truth, told = np.r_[np.repeat([0, 1], 6), stray], np.full((13, 2), 0.5)
    names, values = [f"P{i}" for i in range(13)], pd.DataFrame({"brier": [0.5] * 3})
    for refuses in (lambda: ev.subtype_scores(truth, told), lambda: ev.averaged_classes(truth, 2),
                    lambda: ev.subtype_estimates(values, truth, ["A", "G"]), lambda: ev.chance_range(truth, told, 5),
                    lambda: ev.compare_subtypes({"network": told}, truth, ["A", "G"], names, 5),
                    lambda: ev.fit_temperature(truth, told), lambda: ev.calibration_table(truth, told, names, n=5)):
        with pytest.raises(runs.InputError, match=f"^truth holds {stray}, .* 0 to 1: leave .* out, keep = truth >= 0$"):
            refuses()


def test_chance_is_chance():
    truth = np.repeat([0, 1, 2, 3], 5)
    made = ev.chance_range(truth, np.eye(4)[truth], n=150)           # a perfect network, with the labels dealt out anew
    assert abs(made.value - 0.25) < 0.03 and made.low < 0.25 < made.high < 0.7
    assert not ev.chance_range(truth[:4], np.eye(4)[truth[:4]]).estimable


# calibration and baselines ----------------------------------------------------------------------------------------

class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose answers are its inputs, for scikit-learn."""

    def __init__(self, classes_=None):
        self.classes_ = classes_

    def fit(self, X, y):
        return self

    def predict(self, X):
        return X.argmax(1)

    def decision_function(self, X):
        return X

    def predict_proba(self, X):
        return softmax(X, axis=1)


@pytest.mark.parametrize("seed", range(2))
def test_temperature_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(3), rng.integers(0, 3, 60)]
    logits = rng.normal(0, 3, (63, 3)) + 2 * np.eye(3)[truth]
    theirs = CalibratedClassifierCV(FrozenEstimator(Given(np.arange(3))), method="temperature").fit(logits, truth)
    ours = ev.fit_temperature(truth, softmax(logits, axis=1))
    beta = theirs.calibrated_classifiers_[0].calibrators[0].beta_
    assert np.isclose(ours, 1 / beta, rtol=0.02)
    made = ev.with_temperature(softmax(logits, axis=1), ours)
    assert np.allclose(made, theirs.predict_proba(logits), atol=0.01)
    assert np.array_equal(made.argmax(1), logits.argmax(1)) and np.allclose(made.sum(1), 1)


def test_few_validation_patients_give_no_temperature():
    assert ev.fit_temperature(np.zeros(9, int), np.full((9, 2), 0.5)) is None


def test_a_temperature_without_a_best_one_is_none():
    told = np.tile([0.6, 0.4], (10, 1))
    assert ev.fit_temperature(np.zeros(10, int), told) is None                   # all right: the sharper the better
    assert ev.fit_temperature(np.ones(10, int), np.tile([1.0, 0.0], (10, 1))) is None        # all wrong and certain
    assert ev.fit_temperature(np.zeros(10, int), np.ones((10, 1))) is None                   # one class
    assert ev.fit_temperature(np.array([0] * 8 + [1] * 2), told) == pytest.approx(np.log(1.5) / np.log(4), rel=0.01)


def test_calibration_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    probability, truth = rng.dirichlet(np.ones(3), 80), rng.integers(0, 3, 80)
    table = ev.calibration_table(truth, probability, [f"P{i}" for i in range(80)], n=50)
    observed, predicted = calibration_curve(np.eye(3)[truth].ravel(), probability.ravel(), n_bins=5,
                                            strategy="quantile")
    assert np.allclose(table["predicted"], predicted)
    assert np.allclose([e.value for e in table["observed"]], observed, atol=1e-6)
    few = ev.calibration_table(truth[:9], probability[:9], [f"P{i}" for i in range(9)], n=50)
    assert len(few) and not any(e.estimable for e in few["observed"])
    assert ev.calibration_table(np.zeros(0, int), np.zeros((0, 3)), []).empty


def confounded_cohort(patients=40):
    """Two scans a patient; the scanner tells the subtype, the tumour's place does not."""
    rng = np.random.default_rng(0)
    target = np.arange(patients) % 2
    rows = pd.DataFrame({"patient_id": [f"P{i:02}" for i in range(patients)], "target": target,
                         "subtype": np.array(["A", "G"])[target],
                         "role": np.where(np.arange(patients) < 24, "train", "test"),
                         "manufacturer": np.where(target, "GE", "SIEMENS"), "kernel": "x", "slices": 30,
                         "slice_thickness_mm": 1 + 4.0 * target, "has_pet": pd.array([True, pd.NA] * (patients // 2))})
    cohort = pd.concat([rows.assign(stack_id=rows["patient_id"] + f"_{k}") for k in "ab"], ignore_index=True)
    features = pd.DataFrame({"subtype": rows["subtype"].to_numpy(), "size": rng.normal(size=patients)},
                            index=rows["patient_id"])
    return cohort, features


def test_acquisition_alone_is_found_out_when_it_tells_the_subtype():
    cohort, _ = confounded_cohort()
    settings_of = ev.acquisition_features(cohort)
    assert len(settings_of) == 40 and "subtype" not in settings_of and "target" not in settings_of
    made = labels.baseline_probabilities(settings_of, cohort, list(settings_of))
    test = cohort[cohort["role"] == "test"].drop_duplicates("patient_id")
    assert (made.loc[test["patient_id"], "p_G"].to_numpy() > 0.5).tolist() == (test["subtype"] == "G").tolist()


def test_a_model_trained_on_shuffled_labels_knows_nothing():
    cohort, features = confounded_cohort()
    features["size"] = features["subtype"].map({"A": 0.0, "G": 1.0})           # a feature that tells all
    honest = labels.baseline_probabilities(features, cohort, ["size"])
    answers = ev.shuffled_training(features, cohort, ["size"], lots=30)
    test = cohort[cohort["role"] == "test"].drop_duplicates("patient_id")
    truth = test["target"].to_numpy()

    def score(table):
        return ev.subtype_scores(truth, table.loc[test["patient_id"], ["p_A", "p_G"]].to_numpy())["balanced_accuracy"]

    assert score(honest) == 1
    assert abs(np.mean([score(table) for table in answers]) - 0.5) < 0.25
    assert len({score(table) for table in answers}) > 1 and cohort["role"].eq("train").any()


@pytest.mark.parametrize(("sizes", "least", "most"), [([5, 3, 3], 0.35, 0.9), ([5, 3, 3], 0.9, 0.99),
                                                      ([3, 3, 3, 3], 0.3, 0.99), ([20, 10, 6], 0.9, 0.99)])
def test_recall_draws_hold_the_truth_with_few_patients_in_a_class(sizes, least, most):
    rng, truth, held, better = np.random.default_rng(1), np.repeat(range(len(sizes)), sizes), [], []
    for _ in range(400):
        recall = rng.uniform(least, most, len(sizes))
        one, two = (ev.recall_draws(rng.random(len(truth)) < recall[truth], truth, range(len(sizes)), 400)
                    for _ in range(2))
        low, high = np.percentile(one[1:, 0], 2.5), np.percentile(one[1:, 1], 97.5)
        held.append(low <= recall.mean() <= high)
        better.append(np.percentile((one[:, 0] - two[:, 1])[1:], 2.5) > 0)
    assert 0.91 < np.mean(held) < 0.99 and np.mean(better) < 0.045  # by copies of patients: 0.83, and 0.08


def test_recall_draws_of_one_class_end_where_clopper_and_pearson_do():
    draws = ev.recall_draws([True] * 6 + [False] * 2, np.zeros(8, int), [0], n=20_000)
    exact = stats.binomtest(6, 8).proportion_ci(method="exact")
    for values, beta in zip(draws[1:].T, (stats.beta(6, 3), stats.beta(7, 2)), strict=True):
        assert stats.kstest(values, beta.cdf).statistic < 0.015
    assert (draws[0] == 0.75).all() and np.percentile(draws[1:, 0], 2.5) == pytest.approx(exact.low, abs=0.01)
    assert np.percentile(draws[1:, 1], 97.5) == pytest.approx(exact.high, abs=0.01)
    assert np.isnan(ev.recall_draws([True], np.zeros(1, int), [], n=5)).all()


def test_a_difference_of_balanced_accuracies_is_open_to_both_sides():
    rng, truth = np.random.default_rng(0), np.repeat([0, 1, 2], [5, 3, 3])
    answers = {name: rng.dirichlet([1, 1, 1], 11) for name in ("network", "tabular_size")}
    answers["network"] = np.eye(3)[truth] * 0.8 + 0.2 / 3
    made, _ = ev.compare_subtypes(answers, truth, list("ABG"), [f"p{i}" for i in range(11)], 400)
    ours, minus = (made[f"subtype/{name}/balanced_accuracy"] for name in ("network", "network_minus_tabular_size"))
    assert ours.value == ours.high == 1 and 0.6 < ours.low < 0.95
    assert minus.low < minus.value < minus.high < 1


def test_patients_without_a_lesion_make_nobody_surer():
    table = scans(*((f"s{i}", f"P{i:03}") for i in range(100)))
    truth = pd.DataFrame([cube(name, 0, 0.9, name) for name in table["stack_id"][:12]])
    scored = ev.score_scans(truth.drop(columns="lesion_id"), truth, table)
    found = ev.at_threshold(scored, 0.5, n=50)["sensitivity_at_threshold"]
    assert (found.n, found.low) == (12, pytest.approx(1 - ev.perfect_margin(12), abs=1e-6))
    made, _, _ = ev.compare_detections({"network": truth.drop(columns="lesion_id")}, truth, table, 50)
    assert made["detection/network/cpm"].n == 12
    few = ev.score_scans(truth.drop(columns="lesion_id"), truth[:5], table)
    both = ev.at_threshold(few, 0.5, n=50)
    assert not both["sensitivity_at_threshold"].estimable and both["false_positives_at_threshold"].estimable


def test_one_false_positive_is_no_surer_than_none():
    table = scans(*((f"s{i}", f"P{i:02}") for i in range(20)))
    truth = pd.DataFrame([cube(name, 0, 0.9, name) for name in table["stack_id"]])
    boxes, rates = truth.drop(columns="lesion_id"), []
    for more in (0, 1, 2):
        elsewhere = dict.fromkeys(ev.CORNERS_MM[:3], 500.0) | dict.fromkeys(ev.CORNERS_MM[3:], 510.0)
        false = boxes[:more].assign(**elsewhere)
        scored = ev.score_scans(pd.concat([boxes, false]), truth, table)
        rates.append(ev.at_threshold(scored, 0.5, n=200)["false_positives_at_threshold"])
    assert [rate.value for rate in rates] == [0, 0.05, 0.1]
    assert rates[0].high < rates[1].high < rates[2].high and rates[1].high >= 5.572 / 20 - 1e-3     # exact, of one


def test_a_loss_that_a_reader_takes_for_none_is_no_surer_than_none():
    losses = np.r_[2e-6, np.linspace(2e-6, 3e-6, 200)]
    assert ev.summarise(losses, 12, (0.0, 2.0)).high == pytest.approx(ev.perfect_margin(12), abs=1e-5)
    assert ev.summarise(np.r_[0.02, np.linspace(0.01, 0.03, 200)], 12).high < 0.04


def test_a_corner_that_is_no_number_is_refused():
    table = scans(("s", "p"))
    box = pd.DataFrame([cube("s", 0, 0.9)])
    with pytest.raises(runs.InputError, match="a score or a corner is not finite in stack s"):
        ev.score_scans(box.drop(columns="lesion_id").assign(x1_mm=np.nan), box, table)


@pytest.mark.parametrize(("inside", "outside"), [(5, 7), (3, 9), (20, 20)])
def test_a_perfect_auc_leaves_a_margin(inside, outside):
    auc, rng = 1 - ev.auc_margin(inside, outside), np.random.default_rng(0)
    assert ev.auc_margin(inside, outside) == ev.auc_margin(outside, inside)
    waits, odds = rng.exponential(size=(100_000, inside + outside)), auc / (1 - auc)
    longer = (waits[:, :inside] * odds).min(axis=1) > waits[:, inside:].max(axis=1)
    shorter = (waits[:, :inside] / odds).max(axis=1) < waits[:, inside:].min(axis=1)
    assert max(longer.mean(), shorter.mean()) == pytest.approx(0.025, abs=0.002)


def test_one_quantity_has_one_interval():
    truth = np.repeat([0, 1], 6)
    made, _ = ev.compare_subtypes({"network": np.eye(2)[truth] * 0.8 + 0.1, "majority": np.full((12, 2), 0.5)}, truth,
                                  ["A", "G"], [f"P{i}" for i in range(12)], n=100)
    mean, one = made["subtype/network/auc_macro"], made["subtype/network/auc_A"]
    assert (mean.value, mean.low, mean.high) == (one.value, one.low, one.high) == (1, one.low, 1)
    difference = made["subtype/network_minus_majority/auc_macro"]
    assert difference.value == difference.high == 0.5 and difference.low == pytest.approx(mean.low - 0.5)
    recall = made["subtype/network/balanced_accuracy"]
    assert recall.value == recall.high == 1 and 0.6 < recall.low < 0.8


def test_the_mean_recall_counts_the_patients_of_its_classes():
    truth = np.repeat([0, 1, 2, 3], [3, 3, 2, 2])
    right = np.eye(4)[np.where(truth < 2, truth, 0)]
    made, _ = ev.compare_subtypes({"network": right}, truth, list("ABEG"), [f"P{i}" for i in range(10)], n=200)
    recall = made["subtype/network/balanced_accuracy"]
    assert recall.value == 1 and recall.n == 6 and recall.low < 0.65  # six of six: 0.54 by the exact bound


@pytest.mark.filterwarnings("ignore:A single label")
def test_one_class_has_no_brier_score():
    made, _ = ev.compare_subtypes({"network": np.ones((12, 1))}, np.zeros(12, int), ["A"],
                                  [f"P{i}" for i in range(12)], n=20)
    assert "one class only" in made["subtype/network/brier"].reason
    assert ev.subtype_scores(np.zeros(12, int), np.ones((12, 1)))["brier"] == 0


def test_what_a_threshold_costs_is_measured_on_the_test_patients():
    truth = boxes([(f"s{i}", 0, 1) for i in range(12)])
    found = boxes([(f"s{i}", 1, 0.9) for i in range(9)] + [(f"s{i}", 90, 0.8) for i in range(12)] +
                  [(f"s{i}", 60, 0.7) for i in range(6)] + [("s11", 1, 0.1)]).drop(columns="lesion_id")
    scored = ev.score_scans(found, truth, scans(*((f"s{i}", f"P{i:02d}") for i in range(12))))
    for threshold, false in ((0.85, 0.0), (0.8, 1.0), (0.7, 1.5)):
        made = ev.at_threshold(scored, threshold, n=100)
        assert made["sensitivity_at_threshold"].value == 0.75 and made["false_positives_at_threshold"].value == false
    assert made["false_positives_at_threshold"].low < 1.5 < made["false_positives_at_threshold"].high
    assert "no threshold" in ev.at_threshold(scored, None)["sensitivity_at_threshold"].reason


def test_models_are_compared_on_the_same_resamples():
    truth = np.repeat([0, 1], 8)
    right, wrong = np.eye(2)[truth], np.eye(2)[1 - truth]
    answers = {"network": right, "tabular": wrong, "network_calibrated": right, "majority": np.full((16, 2), 0.5)}
    made, drawn = ev.compare_subtypes(answers, truth, ["A", "G"], [f"P{i}" for i in range(16)], n=50)
    difference = made["subtype/network_minus_tabular/balanced_accuracy"]
    assert difference.value == 1 and "subtype/network_minus_network_calibrated/auc_macro" not in made
    assert str(made["subtype/majority/balanced_accuracy"]) == "0.50 [0.50, 0.50]"
    alone, _ = ev.compare_subtypes({"tabular": wrong}, truth, ["A", "G"], [f"P{i}" for i in range(16)], n=50)
    assert not any("minus" in name for name in alone) and set(drawn) == set(answers)


# errors -----------------------------------------------------------------------------------------------------------

def test_each_missed_lesion_has_a_reason_that_can_be_measured():
    truth = boxes([("one", 0, 1), ("one", 100, 1), ("one", 200, 1), ("two", 0, 1), ("three", 0, 1)])
    truth.loc[2, "x1_mm"] = 240.0
    found = boxes([("one", 1, 0.2), ("one", 108, 0.9), ("one", 150, 0.8), ("two", 40, 0.9), ("three", 90, 0.1)])
    scored = ev.score_scans(found.drop(columns="lesion_id"), truth,
                            scans(("one", "P1"), ("two", "P2"), ("three", "P3")))
    missed = ev.missed_lesions(scored, truth, threshold=0.5).set_index("lesion_id")
    assert missed.index[0] == "L2" and missed.loc["L2", "size_mm"] == 40            # the largest first
    assert missed.loc["L0", "reason"] == "its best box scores 0.200, below the threshold 0.500"
    assert missed.loc["L1", "reason"] == "a box overlaps it (IoU 0.11) but is centred elsewhere"
    assert missed.loc["L2", "reason"] == "nearest box above the threshold is 45 mm away"
    assert missed.loc["L3", "reason"] == "nearest box above the threshold is 35 mm away"
    assert missed.loc["L4", "reason"] == "no box above the threshold in this scan"
    assert ev.missed_lesions(scored, truth.iloc[:0], 0.5).empty
    unshown = ev.missed_lesions(scored, truth, threshold=None).set_index("lesion_id")["reason"]
    assert len(unshown) == 5 and unshown["L0"] == "its best box scores 0.200, and there is no threshold"
    assert unshown["L4"] == "none of the boxes is its own, and there is no threshold"
    assert ev.false_alarms(scored, truth, threshold=None).empty


def test_each_false_alarm_says_how_far_it_is_from_a_lesion():
    truth = boxes([("one", 0, 1)])
    found = boxes([("one", 2, 0.9), ("one", 30, 0.7), ("two", 0, 0.8), ("two", 0, 0.1)]).drop(columns="lesion_id")
    scored = ev.score_scans(found, truth, scans(("one", "P1"), ("two", "P2")))
    alarms = ev.false_alarms(scored, truth, threshold=0.5)
    assert alarms[["score", "reason"]].to_numpy().tolist() == [
        [0.8, "no lesion annotated here"], [0.7, "centre 25 mm from the nearest lesion"]]


def test_place_is_the_patients_left_and_right():
    corners = [[-60, 0, 90, -40, 10, 110], [40, 0, -110, 60, 10, -90], [40, 0, -10, 60, 10, 10]]
    assert ev.place_in_chest(corners, [0, 0, 0]) == ["right upper", "left lower", "left middle"]
    assert ev.place_in_chest(np.zeros((0, 6)), np.zeros((0, 3))) == []


# the artifact -----------------------------------------------------------------------------------------------------

def made_up_cohort(seed=0):
    """Twelve patients with two scans each: lesions, and boxes that find most of them."""
    rng = np.random.default_rng(seed)
    stacks = scans(*[(f"{p}_{k}", p) for p in PATIENTS for k in range(2)])
    truth = boxes([(stack, 20.0 * k, 1.0) for stack in stacks["stack_id"] for k in range(2)])
    places = [(stack, rng.uniform(0, 60), rng.random()) for stack in stacks["stack_id"] for _ in range(5)]
    found = boxes(places)
    return found.drop(columns="lesion_id"), truth, stacks


def metrics_bytes(found, truth, stacks, path):
    scored = ev.score_rules(found, truth, stacks)
    estimates, _ = ev.estimate_all(lambda w: ev.detection_scores(scored, w), scored["centre"].patients, 50, seed=0)
    runs.save_json({"metrics": ev.as_plain(estimates)}, path)
    return path.read_bytes()


def test_the_same_inputs_in_any_order_give_the_same_bytes(tmp_path):
    found, truth, stacks = made_up_cohort()
    first = metrics_bytes(found, truth, stacks, tmp_path / "a.json")
    assert metrics_bytes(found, truth, stacks, tmp_path / "b.json") == first
    mixed = (table.sample(frac=1, random_state=1) for table in (found, truth, stacks))
    assert metrics_bytes(*mixed, tmp_path / "c.json") == first
    assert metrics_bytes(*made_up_cohort(1), tmp_path / "d.json") != first


def test_the_artifact_holds_numbers_or_reasons_never_both(tmp_path):
    few = ev.not_estimable("at least 10 patients needed", 4)
    runs.save_json(ev.as_plain({"some": few, "table": pd.DataFrame({"e": [few]})}), tmp_path / "x.json")
    saved = runs.load_json(tmp_path / "x.json")
    assert saved["some"] == saved["table"][0]["e"] == {
        "value": None, "low": None, "high": None, "n": 4, "estimable": False, "unit": "",
        "reason": "at least 10 patients needed"}


def test_a_withheld_model_withholds_the_difference():
    number, few = ev.Estimate(0.5, 0.4, 0.6, 12, True, None), ev.not_estimable("too few", 3)
    table = pd.DataFrame({"m": [0.5, 0.6, 0.4]})
    assert not ev.paired_difference(table, table, "m", number, few).estimable
    none = ev.paired_difference(table, table, "m", number, number)
    assert none.value == 0 and none.low < 0 < none.high


def test_localisation_counts_pairs_as_often_as_their_patient():
    pairs = pd.DataFrame({"patient_id": ["P", "P", "Q"], "iou": [0.4, 0.6, 1.0], "distance_mm": [5.0, 3.0, 1.0]})
    assert ev.localisation(pairs, ["P", "Q"]) == pytest.approx(
        {"mean_iou": 2 / 3, "iou_at_least_0.5": 2 / 3, "median_distance_mm": 3})
    assert ev.localisation(pairs, ["P", "Q"], np.array([1, 3]))["median_distance_mm"] == 1
    assert np.isnan(ev.localisation(pairs, ["P", "Q"], np.array([0, 0]))["mean_iou"])
    few = ev.localisation_estimates(pairs, ["P", "Q", "R"])
    assert not any(e.estimable for e in few.values()) and few["mean_iou"].n == 2
    many = pd.concat([pairs.assign(patient_id=name) for name in PATIENTS])
    made = ev.localisation_estimates(many, PATIENTS, n=50)
    assert made["median_distance_mm"].unit == "mm" and made["median_distance_mm"].high == 3


def random_cohort(seed):
    """Boxes of any shape in three dimensions, some near lesions, with tied scores."""
    rng = np.random.default_rng(seed)
    stacks = scans(*[(f"s{i}", f"p{i // 2}") for i in range(int(rng.integers(2, 9)))])
    low, side = rng.uniform(0, 80, (12, 3)), rng.uniform(4, 40, (12, 3))
    truth = pd.DataFrame(np.hstack([low, low + side]), columns=ev.CORNERS_MM)
    truth = truth.assign(stack_id=rng.choice(stacks["stack_id"], 12), lesion_id=[f"L{i}" for i in range(12)])
    near = truth.iloc[rng.integers(0, 12, 40)][ev.CORNERS_MM].to_numpy() + rng.normal(0, 6, (40, 6))
    near[:, 3:] = np.maximum(near[:, 3:], near[:, :3] + 1)
    found = pd.DataFrame(near, columns=ev.CORNERS_MM)
    return found.assign(stack_id=rng.choice(stacks["stack_id"], 40), score=rng.integers(1, 30, 40) / 30), truth, stacks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_iou", [None, 0.1, 0.5])
def test_random_boxes_agree_with_brute_force_and_scikit_learn(seed, min_iou):
    found, truth, stacks = random_cohort(seed)
    scored = ev.score_scans(found, truth, stacks, min_iou)
    for false, sensitivity, threshold in zip(*ev.froc(scored), strict=True):
        hits, wrong, _ = brute_force(found, truth, stacks, min_iou, threshold)
        assert np.isclose(false, wrong / len(stacks)) and np.isclose(sensitivity, hits / len(truth))
    # the seven points of LUNA16 from the plain definition: the best sensitivity that any threshold affords
    thresholds = [np.inf, *sorted(set(found["score"]))]
    counts = [brute_force(found, truth, stacks, min_iou, t)[:2] for t in thresholds]
    cpm = np.mean([max(hits for hits, wrong in counts if wrong / len(stacks) <= limit) / len(truth)
                   for limit in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)])
    assert np.isclose(ev.sensitivity_at(ev.froc(scored)).mean(), cpm)
    # scikit-learn knows nothing of lesions that nobody found: they are the share that is left of the area
    listed = [hit for hit, _ in sorted(zip(scored.hit, -scored.score, strict=True), key=lambda pair: pair[1])]
    if any(listed):
        area = average_precision_score(scored.hit, scored.score) * sum(listed) / len(truth)
        assert np.isclose(ev.average_precision(scored), area)


def test_prediction_table_keeps_unknown_subtypes_empty():
    stacks = scans(("a", "P"), ("b", "Q")).assign(role=["test", "unused"], target=[1, -1])
    table = ev.prediction_table(stacks, [0.5, 0.25], np.array([[0.25, 0.75], [0.5, 0.5]]), ["A", "G"])
    assert table["subtype"].iloc[0] == "G" and pd.isna(table["subtype"].iloc[1])
    assert list(table) == ["stack_id", "patient_id", "role", "subtype", "score", "p_A", "p_G"]
    assert table["p_G"].tolist() == [0.75, 0.5]


def test_model_card_says_what_it_must():
    few = ev.not_estimable("at least 10 patients needed", 1)
    side_car = {"grid": {"size": 64, "spacing_mm": 6.0}, "classes": [], "model_hash": "m", "training_hash": "t",
                "inputs": ["ct"]}
    counts = pd.DataFrame({"patients": [1], "scans": [2], "lesions": [3]}, index=["test"])
    card = ev.model_card([{"label": "L", "text": "T"}], {"some/metric": few}, side_car, counts, phantoms=True)
    for words in ("Not for clinical use", "generated phantoms, not patients", "| test | 1 | 2 | 3 |", "- **L**: T",
                  "| some/metric | not estimable (at least 10 patients needed) | 1 |", "64 x 64 x 64 voxels of 6.0 mm"):
        assert words in card
    assert "phantom" not in ev.model_card([], {}, side_car, counts, phantoms=False)
    both = ev.model_card([], {}, side_car | {"inputs": ["ct", "pet"]}, counts, phantoms=False)
    assert "SUV" in both and "SUV" not in card


@pytest.mark.parametrize("name", [name for name in ev.__all__ if inspect.isfunction(getattr(ev, name))])
def test_docstrings_name_every_argument(name):
    function = getattr(ev, name)
    told = re.search(r"Parameters\n-+\n(.*?)(\n\n[A-Z]|$)", inspect.getdoc(function), re.S)
    named = re.findall(r"^(\w[\w, ]*) : \S", told.group(1), re.M) if told else []
    assert ", ".join(named).split(", ") == list(inspect.signature(function).parameters)
    assert re.search(r"\n\nReturns\n-------\n\S", inspect.getdoc(function))
    assert ("raise " in inspect.getsource(function)) <= ("\n\nRaises\n------\n" in inspect.getdoc(function))


# pictures and sentences -------------------------------------------------------------------------------------------

def test_occlusion_lights_up_what_the_score_needs():
    volume = np.zeros((16, 16, 16), "float32")
    seen = ev.occlusion_map(lambda v: v[:, 4:8, 8:12, 8:12].mean(axis=(1, 2, 3)), volume, z=6, cube=4, stride=4)
    assert np.unravel_index(np.nanargmax(seen), seen.shape) == (8, 8) and seen[0, 0] == 0


def test_occlusion_of_two_heads_is_two_maps():
    volume = np.random.default_rng(0).normal(size=(8, 8, 8)).astype("float32")

    def heads(v):
        return np.stack([v[:, :, 0:4].mean(axis=(1, 2, 3)), v.mean(axis=(1, 2, 3))], axis=1)

    both = ev.occlusion_map(heads, volume, z=4, cube=4, stride=4)
    alone = ev.occlusion_map(lambda v: heads(v)[:, 0], volume, z=4, cube=4, stride=4)
    assert both.shape == (2, 8, 8) and np.allclose(both[0], alone)


def sentence(low, high, phantoms=True):
    one = ev.Estimate(0.5, low, high, 12, True, None)
    names = ("detection/network/sensitivity_at_1", "detection/network/cpm", "subtype/network/auc_macro",
             "subtype/network/balanced_accuracy", "subtype/network_minus_tabular_size/balanced_accuracy")
    sure = {"subtype/network_minus_tabular_position/balanced_accuracy": ev.Estimate(0.6, 0.5, 0.7, 12, True, None)}
    items = ev.headline(dict.fromkeys(names, one) | sure, patients=12, phantoms=phantoms)
    return {item["label"]: item["text"] for item in items}


def test_headline_says_phantoms_and_who_wins():
    assert all("12 phantom test patients" in text for text in sentence(0.1, 0.9).values())
    assert not any("phantom" in text for text in sentence(0.1, 0.9, phantoms=False).values())
    label = "Network against tabular baselines"
    assert sentence(0.1, 0.9)[label].startswith("the network beats each of 2 tables, that of size by the least: ")
    assert sentence(-0.1, 0.9)[label].startswith("not shown to beat the table of size:")
    assert sentence(-0.5, -0.1)[label].startswith("worse than the table of size:")


def test_each_line_of_the_headline_counts_its_own_patients():
    many, few = (ev.Estimate(0.5, 0.4, 0.6, n, True, None) for n in (12, 11))
    told = {"detection/network/cpm": many, "subtype/network/balanced_accuracy": few,
            "subtype/network/auc_macro": ev.not_estimable("too few", 3)}
    texts = {line["label"]: line["text"] for line in ev.headline(told, patients=12, phantoms=False, mean_of="A, B")}
    assert len(texts) == 4 and texts["Subtype, balanced accuracy over A, B"] == "0.50 [0.40, 0.60] (11 test patients)"
    assert texts["Subtype, mean AUC over A, B"] == "not estimable: too few (12 test patients)"
    assert texts["Network against tabular baselines"].startswith("not estimable: no tabular baseline")


# ---------------------------------------------------------------- what callers hand over

def test_lesions_numbered_in_each_scan_are_told_apart():
    scans = pd.DataFrame({"stack_id": list("abc"), "patient_id": list("PQR")})
    corners = dict(zip(ev.CORNERS_MM, (0.0, 0.0, 0.0, 10.0, 10.0, 10.0), strict=True))
    lesions = pd.DataFrame([{"stack_id": s, "lesion_id": 1, **corners} for s in "abc"])
    scored = ev.score_scans(pd.DataFrame([{"stack_id": "b", "score": 0.9, **corners}]), lesions, scans)
    assert ev.lesions_found(scored, lesions, 0.5).tolist() == [False, True, False]
    assert len(ev.missed_lesions(scored, lesions, 0.5)) == 2
    assert not ev.lesions_found(scored, lesions, None).any()


def shares(n=20, classes=3):
    return np.random.default_rng(0).dirichlet(np.ones(classes), n)


@pytest.mark.parametrize("change", [lambda p: p * np.where(np.arange(20) == 3, np.nan, 1)[:, None], lambda p: p - 1,
                                    lambda p: p[:5], lambda p: p[0]])
@pytest.mark.parametrize("ask", [
    lambda p, y: ev.fit_temperature(y, p), lambda p, y: ev.chance_range(y, p, 20),
    lambda p, y: ev.calibration_table(y, p, [str(k) for k in range(20)], n=20),
    lambda p, y: ev.compare_subtypes({"network": p}, y, list("ABG"), [str(k) for k in range(20)], 20)])
def test_answers_that_are_no_probabilities_are_refused(change, ask):
    with pytest.raises(runs.InputError, match="probabilities (hold|have)"):
        ask(change(shares()), np.arange(20) % 3)


@pytest.mark.parametrize("kind", [float, "Int64", list, np.int8])
def test_truth_of_any_kind_of_whole_numbers(kind):
    y, names = np.arange(20) % 3, [str(k) for k in range(20)]
    given = y.tolist() if kind is list else pd.Series(y).astype(kind)
    answers = {"network": pd.DataFrame(shares())}
    one, other = (ev.compare_subtypes(answers, t, list("ABG"), names, 50)[0] for t in (y, given))
    assert one == other
    with pytest.raises(runs.InputError, match="truth holds 0.5"):
        ev.subtype_scores(np.where(y == 1, 0.5, y), shares())


def test_a_network_that_has_collapsed_is_not_certain():
    same, names = np.tile([0.5, 0.3, 0.2], (20, 1)), [str(k) for k in range(20)]
    metrics, _ = ev.compare_subtypes({"majority": same, "network": same}, np.arange(20) % 3, list("ABG"), names, 200)
    told = {name: metrics[f"subtype/{name}/balanced_accuracy"] for name in ("majority", "network")}
    assert told["majority"].low == told["majority"].high and told["network"].low < told["network"].high


@pytest.mark.parametrize("false, low, high", [(0, 0.0, 3.689 / 12), (1, 6.2006 / 12, 20.9616 / 12)])
def test_a_rate_on_which_all_patients_agree_is_not_certain(false, low, high):
    """Exact intervals of a Poisson count of 0 and of 12 (Garwood 1936): 0 to 3.689, 6.2006 to 20.9616."""
    scans = pd.DataFrame({"stack_id": [f"s{k}" for k in range(12)], "patient_id": [f"P{k}" for k in range(12)]})
    corners, far = ((a, 0.0, 0.0, a + 10.0, 10.0, 10.0) for a in (0.0, 90.0))
    lesions = pd.DataFrame([{"stack_id": s, "lesion_id": s, **dict(zip(ev.CORNERS_MM, corners, strict=True))}
                            for s in scans.stack_id])
    boxes = lesions.drop(columns="lesion_id").assign(score=0.9)
    wrong = boxes.assign(**dict(zip(ev.CORNERS_MM, far, strict=True)))
    scored = ev.score_scans(pd.concat([boxes] + [wrong] * false), lesions, scans)
    rate = ev.at_threshold(scored, 0.5, 100)["false_positives_at_threshold"]
    assert (rate.value, rate.low, rate.high) == (false, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_draws_and_shares_ask_for_one_entry_each():
    names = [str(k) for k in range(10)]
    for strata in ([0] * 5, [0.0] * 9 + [np.nan]):
        with pytest.raises(ValueError, match="strata"):
            ev.resamples(names, 5, strata=strata)
    right = pd.Series([True] * 10)
    for odd in ((right[:9], names, names), (right, names, names[:9]), (right.astype("boolean").mask(right.index == 1),
                names, names), (right, [None, *names[1:]], names)):
        with pytest.raises(ValueError, match="expected one of each"):
            ev.share_by(odd[0], pd.Series(odd[1]), pd.Series(odd[2]))
    groups = pd.Series(pd.Categorical(["a", None] * 5, ["a", "unknown"]))
    assert ev.share_by(right, pd.Series(names), groups, 10)["group"].tolist() == ["a", "unknown"]


def test_odd_small_things_of_evaluation_are_refused():
    with pytest.raises(runs.InputError, match="temperature is 0"):
        ev.with_temperature(shares(), 0)
    with pytest.raises(ValueError):
        ev.match_detections(np.zeros((2, 6)), [0.5], np.zeros((1, 6)))
    scans = pd.DataFrame({"stack_id": ["a"], "patient_id": [None]})
    empty = pd.DataFrame(columns=["stack_id", "score", "lesion_id", *ev.CORNERS_MM])
    with pytest.raises(runs.InputError, match="no patient_id"):
        ev.score_scans(empty, empty, scans)


# what a careless change would have turned round ------------------------------------------------------------------

def cube(stack_id, x, score=1.0, lesion_id="L", side=10.0):
    corners = {"x0_mm": x, "y0_mm": 0.0, "z0_mm": 0.0, "x1_mm": x + side, "y1_mm": 10.0, "z1_mm": 10.0}
    return {"stack_id": stack_id, "score": score, "lesion_id": lesion_id, **corners}


def matched(found, truth, min_iou=None):
    found, truth = pd.DataFrame(found), pd.DataFrame(truth)
    names = sorted({*found["stack_id"], *truth["stack_id"]})
    return ev.score_scans(found.drop(columns="lesion_id"), truth, scans(*zip(names, names, strict=True)), min_iou)


def perfect(first, second):
    """Two classes of so many patients, all called right, but not with certainty."""
    truth = np.repeat([0, 1], [first, second])
    return np.eye(2)[truth] * 0.8 + 0.1, truth, [f"{i:02}" for i in range(first + second)]


def test_an_overlap_of_just_the_least_counts():
    assert ev.match_detections([[0, 0, 0, 10, 10, 5.0]], [1.0], [[0, 0, 0, 10, 10, 10.0]], 0.5).tolist() == [0]
    table = pd.DataFrame({"patient_id": ["P"], "iou": [0.5], "distance_mm": [1.0]})
    assert ev.localisation(table, ["P"])["iou_at_least_0.5"] == 1


def test_a_box_is_measured_against_the_lesion_it_hit_and_a_miss_against_the_nearest():
    missed = matched([cube("a", 9)], [cube("a", 0, lesion_id="p"), cube("a", 50, lesion_id="q")]).table
    assert missed["iou"].tolist() == [pytest.approx(1 / 19)]
    hit = matched([cube("a", 0)], [cube("a", 4, lesion_id="p", side=2), cube("a", 5.5, lesion_id="q")]).table
    assert hit["lesion_id"].tolist() == ["p"] and hit["iou"].tolist() == [pytest.approx(0.2)]
    assert matched([cube("a", 3)], [cube("a", 0)]).table["distance_mm"].tolist() == [3.0]


def test_each_rule_has_its_own_average_precision():
    rules = {name: matched([cube("a", 4)], [cube("a", 0)], least) for name, least in ev.RULES.items()}
    scores = ev.detection_scores(rules)                    # 6 of 14 overlap: enough for one rule and not for the other
    assert (scores["ap_iou_0.1"], scores["ap_iou_0.5"]) == (1, 0)


def test_a_rate_is_counted_on_scans_and_not_on_patients():
    table = scans(*((f"s{i}", f"P{i // 2}") for i in range(24)))
    truth = pd.DataFrame([cube(name, 0, 0.9, name) for name in table["stack_id"]])
    scored = ev.score_scans(truth.drop(columns="lesion_id"), truth, table)
    rate = ev.at_threshold(scored, 0.5, n=50)["false_positives_at_threshold"]
    assert rate.high == pytest.approx(3.689 / 24, abs=1e-4)


def test_an_interval_that_reaches_one_keeps_its_low_end():
    assert ev.summarise(np.r_[0.7, np.linspace(0.2, 1, 200), [1.0] * 7], 12).low < 0.3


def test_just_enough_patients_are_enough():
    assert ev.bootstrap_interval(lambda w: 1.0, [str(i) for i in range(ev.MIN_PATIENTS)], n=20).estimable
    answers, truth, names = perfect(ev.MIN_PER_CLASS, 7)
    made, _ = ev.compare_subtypes({"network": answers}, truth, list("AB"), names, 20)
    assert made["subtype/network/auc_A"].estimable and made["subtype/network/sensitivity_A"].estimable


def test_a_class_is_as_sure_as_its_own_patients_allow():
    answers, truth, names = perfect(6, 20)
    made, _ = ev.compare_subtypes({"network": answers}, truth, list("AB"), names, 50)
    assert made["subtype/network/sensitivity_A"].low == pytest.approx(0.025 ** (1 / 6), abs=1e-6)


def test_resamples_keep_the_number_of_patients_of_each_class():
    truth, names = np.repeat([0, 1], [9, 5]), [str(i) for i in range(14)]
    answers = np.random.default_rng(0).dirichlet([1, 1], 14)
    _, drawn = ev.compare_subtypes({"network": answers}, truth, list("AB"), names, 300)
    fifths = drawn["network"]["sensitivity_1"] * 5
    assert drawn["network"]["auc_macro"].notna().all() and np.allclose(fifths, fifths.round())


def test_a_brier_score_may_reach_two():
    truth = np.repeat([0, 1], 6)
    wrong = np.eye(2)[1 - truth]
    wrong[0] = [0.05, 0.95]
    made, _ = ev.compare_subtypes({"network": wrong}, truth, list("AB"), [str(i) for i in range(12)], 200)
    brier = made["subtype/network/brier"]
    assert brier.value > 1.75 and brier.low < 1.75 and brier.high == 2


def test_classes_of_too_few_patients_are_in_no_mean():
    few = np.r_[np.repeat([0, 1], 6), 2]
    assert ev.chance_range(few, np.full((13, 3), [0.5, 0.3, 0.2]), 50).value == 0.5
    both = ev.auc_margin(6, 6) + ev.auc_margin(5, 7)
    assert ev._margin("auc_macro", np.array([6, 5, 1])) == pytest.approx(both / 2)


def test_subtypes_go_to_their_rows_whatever_the_index():
    columns = {"stack_id": ["a", "b"], "patient_id": ["P", "Q"], "role": "test", "target": [0, 1]}
    table = ev.prediction_table(pd.DataFrame(columns, index=[1, 0]), [0.5, 0.5], np.full((2, 2), 0.5), list("AG"))
    assert table["subtype"].tolist() == ["A", "G"]


def test_a_calibration_table_counts_patients_once():
    table = ev.calibration_table(np.arange(12) % 2, np.full((12, 2), 0.5), [str(i) for i in range(12)], n=20)
    assert table["patients"].tolist() == [12]


def test_an_occlusion_map_lies_as_the_volume_does():
    volume = np.zeros((8, 8, 8), "float32")
    corner = ev.occlusion_map(lambda v: v[:, :, 0:4, 4:8].mean(axis=(1, 2, 3)), volume, z=4, cube=4, stride=4)
    assert np.unravel_index(np.nanargmax(corner), corner.shape) == (0, 4)
    even = ev.occlusion_map(lambda v: (-v).max((1, 2, 3)), volume, z=4, cube=4, stride=2)
    assert np.allclose(even, even[0, 0])                   # however many cubes cover a voxel
    above = ev.occlusion_map(lambda v: -v[:, 6].mean((1, 2)), np.zeros((16, 8, 8), "float32"), z=8, cube=4, stride=4)
    assert (above != 0).all()                              # the cube is centred on the slice


def test_reasons_of_errors_name_the_nearest_and_the_longer_side():
    truth = [cube("a", 100, lesion_id="p"), cube("a", 0, lesion_id="q")]
    false = ev.false_alarms(matched([cube("a", 30, 0.9)], truth), pd.DataFrame(truth), 0.5)
    assert false["reason"].tolist() == ["centre 25 mm from the nearest lesion"]
    truth = [cube("a", 0, lesion_id="p") | {"y1_mm": 40.0}]
    missed = ev.missed_lesions(matched([cube("a", 95, 0.9), cube("a", 20, 0.1)], truth), pd.DataFrame(truth), 0.5)
    assert missed["size_mm"].tolist() == [40] and re.search("9[0-9] mm away", missed["reason"].iloc[0])


def test_a_size_on_a_border_belongs_to_the_smaller_group():
    lesions = pd.DataFrame([cube("a", 0, side=side) for side in (30, 31, 50, 51)])
    assert ev.size_groups(lesions).tolist() == ["up to 30 mm", "30 to 50 mm", "30 to 50 mm", "over 50 mm"]


def test_wrong_scans_are_in_the_order_of_the_table_and_go_round_all_scans():
    one = pd.DataFrame({"stack_id": ["b1", "a1", "a2"], "patient_id": list("BAA")})
    assert ev.wrong_scans(one).index.tolist() == ["b1", "a1", "a2"]
    two = pd.DataFrame({"stack_id": ["a1", "a2", "b1", "b2"], "patient_id": list("AABB")})
    assert ev.wrong_scans(two).tolist() == ["b1", "b2", "a1", "a2"]


def test_acquisition_is_a_median_and_rare_words_are_one():
    rare = pd.DataFrame({"stack_id": list("abcdef"), "patient_id": list("PQRSTU"), "kernel": ["x"] * 4 + ["y", "z"]})
    assert list(ev.acquisition_features(rare)) == ["kernel_RARE", "kernel_X"]
    three = pd.DataFrame({"stack_id": list("abc"), "patient_id": "P", "slices": [10, 40, 50]})
    assert ev.acquisition_features(three)["slices"].tolist() == [40]


def test_seeds_reach_the_draws():
    def mean(weights):
        return {"a": float((np.ones(12) if weights is None else weights) @ np.arange(12.0) / 144)}

    assert not ev.estimate_all(mean, PATIENTS, 50, 1)[1].equals(ev.estimate_all(mean, PATIENTS, 50, 2)[1])
    groups = pd.Series(["g"] * 12)
    one, other = (ev.share_by(np.arange(12) % 3 > 0, pd.Series(PATIENTS), groups, 50, seed)["estimate"][0]
                  for seed in (0, 5))
    assert one != other


# ---------------------------------------------------------------- what the numbers rest on

def test_a_box_that_touches_nothing_hits_nothing():
    scored = ev.score_scans(boxes([("one", 50, 0.9)]).drop(columns="lesion_id"), boxes([("one", 0, 1)]),
                            scans(("one", "P1")), min_iou=0)
    assert scored.table["outcome"].tolist() == ["false positive"]


def test_a_patient_with_two_lesions_is_one_patient(hand):
    assert hand.lesions.tolist() == [2, 1] and hand.with_lesion == 2


def test_a_hit_of_just_the_threshold_counts(hand):
    assert hand.found_at(0.9).tolist() == [True, *[False] * 5] and not hand.found_at(0.91).any()


def test_the_distance_of_a_hit_is_between_the_centres():
    scored = matched([cube("a", 2, side=4)], [cube("a", 0, side=10, lesion_id="p")])
    assert scored.table["outcome"].tolist() == ["hit"]
    assert scored.table["distance_mm"].tolist() == [1.0]  # their corners are 2 mm apart


def test_equal_scores_lie_in_one_order():
    found = boxes([("two", 0, 0.5), ("one", 0, 0.5)]).drop(columns="lesion_id")
    for rows in (found, found[::-1]):
        scored = ev.score_scans(rows, boxes([]), scans(("one", "P1"), ("two", "P2")))
        assert scored.table["stack_id"].tolist() == ["one", "two"]


def test_ends_come_from_the_resamples_and_may_lack_one_in_twenty():
    made = ev.summarise([0.5, 0.4, 0.45], 12, None)
    assert (made.low, made.high) == (pytest.approx(np.percentile([0.4, 0.45], 2.5)), 0.5)
    assert ev.summarise([0.5] + [0.4, 0.6] * 47 + [0.5] + [np.nan] * 5, 12).estimable
    assert not ev.summarise([0.5] + [0.4, 0.6] * 47 + [np.nan] * 6, 12).estimable


@pytest.mark.parametrize(("behind", "enough"), [(9, False), (10, True)])
def test_shares_are_withheld_by_the_patients_behind_them(behind, enough):
    made, drawn = ev.estimate_all(lambda w: {"share": 0.5}, PATIENTS, 20, behind=behind)
    assert made["share"].estimable == enough == bool(len(drawn))
    table = scans(*((f"s{i}", patient) for i, patient in enumerate(PATIENTS)))
    truth = pd.DataFrame([cube(name, 0, 0.9, name) for name in table["stack_id"][:behind]])
    scored = ev.score_scans(truth.drop(columns="lesion_id"), truth, table)
    assert ev.at_threshold(scored, 0.5, n=20)["sensitivity_at_threshold"].estimable == enough


def test_the_ends_of_a_difference_are_the_farthest_apart():
    ours, theirs = ev.Estimate(0.6, 0.5, 0.7, 12, True, None), ev.Estimate(0.4, 0.3, 0.5, 12, True, None)
    mine = pd.DataFrame({"m": [0.6] * 4, "m_upper": [0.7] * 4})
    other = pd.DataFrame({"m": [0.3] * 4, "m_upper": [0.4] * 4})
    made = ev.paired_difference(mine, other, "m", ours, theirs, margin=0.0)
    assert (made.low, made.high) == pytest.approx((0.6 - 0.4, 0.7 - 0.3))


def test_patients_probabilities_sum_to_one():
    rows = pd.DataFrame({"patient_id": ["P"], "subtype": ["A"], "p_A": [0.333333], "p_G": [0.333333],
                         "p_E": [0.333333]})
    table = ev.patient_probabilities(rows, ["A", "G", "E"])
    assert table[["p_A", "p_G", "p_E"]].to_numpy().sum() == pytest.approx(1, abs=1e-12)


def test_a_subtype_that_is_no_class_is_left_out():
    rows = pd.DataFrame({"patient_id": ["P", "Q"], "subtype": ["A", "E"], "p_A": [0.6, 0.5], "p_G": [0.4, 0.5]})
    assert ev.patient_probabilities(rows, ["A", "G"])["patient_id"].tolist() == ["P"]


def test_a_range_of_chance_is_the_middle_of_its_deals():
    truth, called = np.repeat([0, 1], 50), np.random.default_rng(0).integers(0, 2, 100)
    made = ev.chance_range(truth, np.eye(2)[called], n=400, seed=3)
    rng = np.random.default_rng(3)
    dealt = [balanced_accuracy_score(rng.permutation(truth), called) for _ in range(400)]
    assert (made.low, made.high) == pytest.approx(np.percentile(dealt, [2.5, 97.5]), abs=1e-6)


def test_shuffled_labels_are_those_of_the_training_patients(monkeypatch):
    cohort, features = confounded_cohort()
    cohort.loc[cohort["role"] != "train", "target"] = 0                        # what others have is dealt to nobody
    dealt = []
    monkeypatch.setattr(labels, "baseline_probabilities", lambda table, given, columns: dealt.append(given.copy()))
    ev.shuffled_training(features, cohort, ["size"], lots=5)

    def of_training(table):
        return table[table["role"] == "train"].drop_duplicates("patient_id")["target"]

    assert all(sorted(of_training(table)) == sorted(of_training(cohort)) for table in dealt)
    assert any(of_training(table).tolist() != of_training(cohort).tolist() for table in dealt)


def test_only_a_sure_box_excuses_a_missed_lesion_by_overlap():
    truth = [cube("a", 0, lesion_id="p")]
    missed = ev.missed_lesions(matched([cube("a", 6, 0.1), cube("a", 8, 0.9)], truth), pd.DataFrame(truth), 0.5)
    assert missed["reason"].tolist() == ["a box overlaps it (IoU 0.11) but is centred elsewhere"]
    assert missed["score"].tolist() == [0.9]


def test_a_repeat_is_no_false_alarm():
    truth = [cube("a", 0, lesion_id="p")]
    scored = matched([cube("a", 0, 0.9), cube("a", 1, 0.8)], truth)
    assert scored.table["outcome"].tolist() == ["hit", "repeat"]
    assert ev.false_alarms(scored, pd.DataFrame(truth), 0.5).empty


def test_the_verdict_hangs_on_the_worst_table():
    def said(**ends):
        minus = {f"subtype/network_minus_tabular_{name}/balanced_accuracy":
                 ev.Estimate(value, low, high, 12, True, None) for name, (value, low, high) in ends.items()}
        return ev.headline(minus, patients=12, phantoms=False)[-1]["text"]

    assert said(wide=(-0.3, -0.9, 0.3), sure=(-0.2, -0.3, -0.1)).startswith("worse than the table of sure:")
    assert said(wide=(0.4, -0.1, 0.9), near=(0.2, 0.1, 0.3)).startswith("not shown to beat the table of wide:")


def test_words_of_the_scanner_are_those_of_the_first_stack_whatever_the_order():
    words = {"stack_id": ["a1", "a2", "b1", "b2", "c1", "c2"], "patient_id": list("AABBCC"), "kernel": list("xyxyxy")}
    cohort = pd.DataFrame(words)
    assert list(ev.acquisition_features(cohort)) == ["kernel_X"]
    pd.testing.assert_frame_equal(ev.acquisition_features(cohort[::-1]), ev.acquisition_features(cohort))


def test_nobody_is_worse_than_a_constant_by_more_than_all_of_it():
    ours, theirs = ev.Estimate(0.0, 0.0, 0.2, 12, True, None), ev.Estimate(0.5, 0.5, 0.5, 12, True, None)
    wrong, constant = pd.DataFrame({"m": [0.0] * 20}), pd.DataFrame({"m": [0.5] * 20})
    made = ev.paired_difference(wrong, constant, "m", ours, theirs)
    assert (made.value, made.low) == (-0.5, -0.5) and made.high == pytest.approx(-0.5 + ev.perfect_margin(12), abs=1e-6)


def test_calibration_agrees_with_scikit_learn_where_probabilities_repeat():
    said = np.tile([0.2, 0.5, 0.8], 8)
    probability, truth = np.stack([said, 1 - said], axis=1), np.arange(24) % 2
    table = ev.calibration_table(truth, probability, [f"P{i:02}" for i in range(24)], bins=2, n=20)
    observed, predicted = calibration_curve(np.eye(2)[truth].ravel(), probability.ravel(), n_bins=2,
                                            strategy="quantile")
    assert np.allclose(table["predicted"], predicted)
    assert np.allclose([estimate.value for estimate in table["observed"]], observed, atol=1e-6)


def test_the_gap_to_a_box_is_the_straight_way_to_its_nearest_corner():
    box, other = [[2, 2, 2, 4, 4, 4]], [[6, 7, 0, 20, 20, 20], [0, 0, 0, 3, 3, 3], [0, 0, 0, 9, 9, 9]]
    assert ev.box_gaps(box, other).tolist() == [[5, 0, 0]]               # 3 along x and 4 along y


@pytest.mark.parametrize(("z", "place"), [(41, "left upper"), (40, "left middle"), (-40, "left middle"),
                                          (-41, "left lower")])
def test_what_is_near_the_centre_is_in_the_middle(z, place):
    assert ev.place_in_chest([[1, 0, z - 5, 3, 2, z + 5]], np.zeros(3)) == [place]


def test_a_seed_reaches_the_draws_of_balanced_accuracy():
    truth = np.arange(24) % 2
    p = np.stack([1 - (truth + np.arange(24) % 3) / 4, (truth + np.arange(24) % 3) / 4], axis=1)
    names = [f"P{i:02}" for i in range(24)]
    drawn = [ev.compare_subtypes({"network": p}, truth, ["A", "G"], names, 20, seed)[1]["network"]
             for seed in (0, 0, 5)]
    assert drawn[0].equals(drawn[1]) and drawn[0]["auc_macro"].tolist() != drawn[2]["auc_macro"].tolist()
    assert drawn[0]["balanced_accuracy"].tolist() != drawn[2]["balanced_accuracy"].tolist()
