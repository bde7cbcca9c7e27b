"""Chapter 4: targets, patient splits, the audit's findings one by one, and the tabular baselines."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import labels as lab
from lungct import runs

SHARES = (0.6, 0.2, 0.2)


@pytest.fixture(scope="module")
def clean():
    return lab.example_cohort()


def found(tables, severity="error"):
    return {f.name for f in lab.audit(**tables) if f.severity == severity}


def cohort_of(subtypes, volumes=1, **columns):
    """Tables of one annotated stack (or more) a patient; `subtypes` maps patient to letter."""
    rows = [{"stack_id": f"{p}_{k}", "patient_id": p, "study_uid": f"s{p}", "lesions": 1, "lesions_outside": 0,
             "reason": None, **columns} for p in subtypes for k in range(volumes)]
    cohort = pd.DataFrame(rows, columns=["stack_id", "patient_id", "study_uid", "lesions", "lesions_outside", "reason",
                                         *columns])
    lesions = cohort[["stack_id", "patient_id"]].assign(subtype=cohort["patient_id"].map(subtypes), boxes=3)
    return cohort, lesions


# ---------------------------------------------------------------- targets


def test_subtype_is_the_vote_of_the_boxes():
    votes = pd.DataFrame({"patient_id": ["P", "P", "T", "T", "Q"], "subtype": ["A", "G", "B", "E", None],
                          "boxes": [9, 1, 2, 2, 5]})
    result = lab.vote_subtypes(votes)
    assert result.loc["P", "subtype"] == "A" and result.loc["P", "share"] == pytest.approx(0.9)
    assert pd.isna(result.loc["T", "subtype"])
    assert "Q" not in result.index


def test_each_reason_for_leaving_a_volume_out():
    cohort, lesions = cohort_of(dict.fromkeys(["built", "failed", "bare", "out", "unknown", "tied"], "A"))
    cohort = cohort.set_index("patient_id", drop=False)
    cohort.loc["failed", "reason"] = "could not be built"
    cohort.loc["bare", "lesions"] = 0
    cohort.loc["out", "lesions_outside"] = 1
    lesions.loc[lesions["patient_id"] == "unknown", "subtype"] = None
    lesions = pd.concat([lesions, pd.DataFrame({"patient_id": ["tied"], "subtype": ["G"], "boxes": [3]})])
    table = lab.make_labels(cohort.reset_index(drop=True), lesions).set_index("patient_id")
    expected = {"failed": lab.Unused.NOT_BUILT, "bare": lab.Unused.UNLABELLED, "out": lab.Unused.OUTSIDE,
                "unknown": lab.Unused.NO_SUBTYPE, "tied": lab.Unused.TIED}
    assert table["reason"].dropna().to_dict() == {k: v.value for k, v in expected.items()}
    assert table.loc["built", "role"] == "unassigned" and table.loc["built", "weight"] == 1
    assert (table.drop(index="built")[["role", "target", "weight"]] == ["unused", -1, 0.0]).all(axis=None)


def test_a_stack_that_was_not_built_has_null_counts():
    cohort, lesions = cohort_of({"P": "A", "Q": "B"})
    cohort = cohort.astype({"lesions": "Int64", "lesions_outside": "Int64", "reason": "str"})
    cohort.loc[0, ["lesions", "lesions_outside", "reason"]] = [pd.NA, pd.NA, "could not be built"]
    table = lab.make_labels(cohort, lesions)
    assert table["reason"].tolist()[0] == "volume was not built" and table["lesions"].tolist() == [0, 1]


@pytest.mark.parametrize(("policy", "classes", "targets", "used"), [
    ("keep", ["A", "E", "G"], [0, 1, 2], 3), ("merge", ["A", "G"], [0, 0, 1], 3),
    ("set aside", ["A", "G"], [0, -1, 1], 2)])
def test_policies_for_class_e(policy, classes, targets, used):
    table = lab.make_labels(*cohort_of({"P1": "A", "P2": "E", "P3": "G"}), class_e=policy)
    assert lab.class_names(table) == classes
    assert table["target"].tolist() == targets
    assert table["subtype"].tolist() == ["A", "E", "G"]  # what was annotated stays visible under every policy
    assert table["reason"].isna().sum() == used


def test_unknown_policy_names_the_choices():
    with pytest.raises(runs.InputError, match='class_e is \'drop\': expected "keep", "merge" or "set aside"'):
        lab.make_labels(*cohort_of({"P": "A"}), class_e="drop")


def test_many_reconstructions_weigh_as_one_patient():
    table = lab.make_labels(*cohort_of({"P": "A", "Q": "B"}, volumes=4))
    assert table.groupby("patient_id")["weight"].sum().tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- split


@st.composite
def cohorts(draw):
    sizes = draw(st.tuples(*[st.integers(0, 14)] * 4))
    names = draw(st.lists(st.integers(0, 10**6), min_size=sum(sizes), max_size=sum(sizes), unique=True))
    letters = [letter for letter, n in zip("ABEG", sizes, strict=True) for _ in range(n)]
    subtypes = {f"P{n}": letter for n, letter in zip(names, letters, strict=True)}
    return cohort_of(subtypes, volumes=draw(st.integers(1, 3)))


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.integers(0, 5))
def test_every_patient_has_exactly_one_role_whatever_the_order(tables, seed):
    table = lab.make_labels(*tables)
    split = lab.split_patients(table, SHARES, seed)
    roles = split.groupby("patient_id")["role"].agg(["nunique", "first"])
    assert (roles["nunique"] == 1).all() and roles["first"].isin(lab.ROLES).all()
    shared = lab.shared_between_roles(split).to_numpy()
    assert (shared == np.diag(np.diag(shared))).all()
    again = lab.split_patients(table.sample(frac=1, random_state=seed), SHARES, seed).sort_index()
    pd.testing.assert_frame_equal(split, again)


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.integers(0, 10**6), st.sampled_from("ABEG"))
def test_a_newcomer_moves_at_most_two_of_his_own_subtype(tables, number, letter):
    cohort, lesions = tables
    more = [pd.concat(pair) for pair in zip((cohort, lesions), cohort_of({f"new{number}": letter}), strict=True)]
    before, after = (lab.split_patients(lab.make_labels(*t)).drop_duplicates("patient_id").set_index("patient_id")
                     for t in ((cohort, lesions), more))
    joint = before.join(after["role"].rename("role_after"))
    moved = joint[joint["role"] != joint["role_after"]]
    assert len(moved) <= 2 and (moved["subtype"] == letter).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 500), st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8)))
def test_role_counts_add_up_and_grow_by_single_steps(n, parts):
    shares = [p / sum(parts) for p in parts]
    now, then = lab.role_counts(n, shares), lab.role_counts(n + 1, shares)
    assert sum(now) == n and min(now) >= 0
    assert all(count == 0 for count, share in zip(now, shares, strict=True) if share == 0)
    if n >= 3:
        assert all(count >= 1 for count, share in zip(now, shares, strict=True) if share > 0)
    assert set(np.diff([np.cumsum(now), np.cumsum(then)], axis=0).ravel()) <= {0, 1}


def test_tied_patients_share_a_role_through_any_link():
    cohort, lesions = cohort_of({f"P{i:02}": "AG"[i % 2] for i in range(30)})
    cohort["frame_of_reference_uid"] = [f"f{i // 3}" for i in range(30)]  # three neighbours lie on one table
    split = lab.split_patients(lab.make_labels(cohort, lesions))
    assert (split.groupby("frame_of_reference_uid")["role"].nunique() == 1).all()
    assert set(split["role"]) == set(lab.ROLES)


def test_empty_and_missing_links_tie_nobody():
    table = pd.DataFrame({"patient_id": ["P", "Q", "R", "S"], "study_uid": ["", "", None, None]})
    assert lab.patient_groups(table).tolist() == ["P", "Q", "R", "S"]


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.6, 0.6, -0.2), (0, 0.5, 0.5), (0.6, 0.2, 0.1)])
def test_shares_that_are_no_shares(shares):
    with pytest.raises(runs.InputError, match="expected three shares that sum to 1"):
        lab.split_patients(lab.make_labels(*cohort_of({"P": "A"})), shares)


def test_a_role_that_does_not_exist_is_refused(clean):
    patient = clean["labels"]["patient_id"].iloc[0]
    for name in (patient, "nobody here"):
        with pytest.raises(runs.InputError, match=f"fixed gives {name} the role 'foo', expected train, valid"):
            lab.split_patients(clean["labels"], fixed={name: "foo"})


def test_another_seed_gives_another_split(clean):
    roles = [lab.split_patients(clean["labels"], seed=s)["role"].tolist() for s in (0, 1)]
    assert roles[0] != roles[1]


def test_vendors_are_spread_over_the_roles_better_than_by_lot():
    cohort, lesions = cohort_of({f"P{i:03}": "AAABG"[i % 5] for i in range(100)})
    rng = np.random.default_rng(0)
    spread, by_lot = [], []
    for seed in range(30):
        cohort["manufacturer"] = rng.choice(["GE MEDICAL SYSTEMS", "Siemens", "Philips"], len(cohort))
        table = lab.make_labels(cohort, lesions)
        for kept, label in ((spread, table), (by_lot, table.drop(columns="vendor"))):
            split = lab.split_patients(label, SHARES, seed)
            kept.append(stats_of_vendors(table["vendor"], split["role"]))
            assert split.groupby("subtype")["role"].value_counts().loc["A"][list(lab.ROLES)].tolist() == [36, 12, 12]
    assert np.mean(spread) < 0.6 * np.mean(by_lot)


def stats_of_vendors(vendor, role):
    # mean distance between the patients of a vendor in a role and their share
    counts = pd.crosstab(vendor, role)[list(lab.ROLES)].to_numpy()
    return np.abs(counts - counts.sum(axis=1, keepdims=True) * SHARES).mean()


def test_vendor_is_the_first_word_in_capitals():
    names = pd.Series(["GE MEDICAL SYSTEMS", " Siemens Healthineers", None, ""])
    assert lab.vendor_names(names).tolist() == ["GE", "SIEMENS", "UNKNOWN", "UNKNOWN"]


# ---------------------------------------------------------------- frozen roles


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.sets(st.integers(0, 10**6), max_size=20), st.sampled_from("ABEG"), st.integers(0, 5))
def test_nobody_whose_role_is_frozen_ever_moves(tables, numbers, letter, seed):
    before = lab.split_patients(lab.make_labels(*tables), SHARES, seed)
    frozen = dict(zip(before["patient_id"], before["role"], strict=True))
    more = [pd.concat(pair) for pair in
            zip(tables, cohort_of({f"new{number}": letter for number in numbers}), strict=True)]
    after = lab.split_patients(lab.make_labels(*more), SHARES, seed, frozen)
    roles = dict(zip(after["patient_id"], after["role"], strict=True))
    assert frozen.items() <= roles.items()
    counts = after[after["subtype"] == letter].drop_duplicates("patient_id")["role"].value_counts()
    wanted = lab.role_counts(counts.sum(), SHARES)
    assert np.abs(counts.reindex(lab.ROLES, fill_value=0) - wanted).max() <= 1  # shares are kept, to one patient


def frozen_forty(path, locked=()):
    cohort, lesions = cohort_of({f"P{i:02}": "AG"[i % 2] for i in range(40)})
    table = lab.make_labels(cohort, lesions)
    split = lab.split_patients(table, SHARES, 0, lab.read_registry(path, SHARES, 0, locked))
    lab.freeze_roles(path, split, SHARES, 0, locked)
    return split


def test_a_registry_is_written_once_and_grows(tmp_path):
    path = tmp_path / "roles.json"
    split = frozen_forty(path)
    written = path.stat()
    roles = dict(zip(split["patient_id"], split["role"], strict=True))
    assert lab.read_registry(path, SHARES, 0) == roles
    again = frozen_forty(path)
    pd.testing.assert_frame_equal(split, again)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    newcomers = split.head(2).assign(patient_id=["Q1", "Q2"], role=["test", "train"])
    moved = pd.concat([newcomers, split.assign(role="test")])  # what is frozen wins over what is handed in
    lab.freeze_roles(path, moved, SHARES, 0)
    assert lab.read_registry(path, SHARES, 0) == roles | {"Q1": "test", "Q2": "train"}


def edited(path):
    path.write_text(path.read_text().replace('": "train"', '": "test"', 1))


def cut_off(path):
    path.write_text(path.read_text()[:100])


def a_list(path):
    path.write_text(json.dumps(["P01"]))


@pytest.mark.parametrize("damage", [edited, cut_off, a_list])
def test_a_registry_that_was_touched_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "roles.json"
    frozen_forty(path)
    damage(path)
    with pytest.raises(runs.InputError, match="roles.json is not what was frozen.*put back a copy, or name") as no:
        lab.read_registry(path, SHARES, 0)
    assert "\n" not in str(no.value)


def frozen_as(path, roles):
    content = {**lab._dealt_with(SHARES, 0, ()), **roles}
    runs.save_json(content | {"hash": runs.hash_value(content)}, path)


def test_a_registry_with_a_role_that_does_not_exist_is_refused(tmp_path):
    frozen_as(tmp_path / "roles.json", {"roles": {"P01": "foo"}})
    with pytest.raises(runs.InputError, match="roles.json gives P01 the role 'foo', expected train, validation"):
        lab.read_registry(tmp_path / "roles.json", SHARES, 0)


@pytest.mark.parametrize(("fractions", "seed", "locked", "message"), [
    (SHARES, 1, (), "frozen with seed 0, this run has 1: give back the old value, or name another registry"),
    ((0.7, 0.1, 0.2), 0, (), r"frozen with fractions \[0.6, 0.2, 0.2\], this run has \[0.7, 0.1, 0.2\]"),
    (SHARES, 0, ("P03",), r"frozen with locked test set \(its hash\) \w+, this run has \w+")])
def test_a_registry_of_another_split_is_refused(tmp_path, fractions, seed, locked, message):
    frozen_forty(tmp_path / "roles.json")
    with pytest.raises(runs.InputError, match=message):
        lab.read_registry(tmp_path / "roles.json", fractions, seed, locked)


def test_locked_patients_always_test_and_fill_the_share_first(tmp_path):
    (tmp_path / "locked.txt").write_text("P04\n# agreed upon in spring\n P02 # late\nP00\n\nP04\n")
    locked = lab.read_locked(tmp_path / "locked.txt")
    assert locked == ["P00", "P02", "P04"]
    split = frozen_forty(tmp_path / "roles.json", locked).set_index("patient_id")
    assert (split.loc[locked, "role"] == "test").all()
    assert split[split["subtype"] == "A"]["role"].value_counts()[list(lab.ROLES)].tolist() == [12, 4, 4]
    with pytest.raises(runs.InputError, match="locked test set"):
        lab.read_registry(tmp_path / "roles.json", SHARES, 0, locked[:2])  # one patient was taken off
    (tmp_path / "empty.txt").write_text("# nobody\n")
    with pytest.raises(runs.InputError, match="names no patient: write one a line"):
        lab.read_locked(tmp_path / "empty.txt")
    with pytest.raises(runs.InputError, match=r"locked_path .*absent.txt cannot be read \(FileNotFoundError\)"):
        lab.read_locked(tmp_path / "absent.txt")


def test_a_tie_found_late_moves_nobody_and_is_an_error():
    cohort, lesions = cohort_of({f"P{i:02}": "AG"[i % 2] for i in range(40)})
    before = lab.split_patients(lab.make_labels(cohort, lesions)).set_index("patient_id")["role"]
    a, b = before.index[before == "train"][0], before.index[before == "test"][0]
    cohort["frame_of_reference_uid"] = cohort["patient_id"].replace({a: "shared", b: "shared"})
    more = [pd.concat(pair) for pair in zip((cohort, lesions), cohort_of({"new": "A"}), strict=True)]
    more[0].loc[more[0]["patient_id"] == "new", "frame_of_reference_uid"] = before.index[before == "validation"][0]
    after = lab.split_patients(lab.make_labels(*more), fixed=before.to_dict())
    roles = after.set_index("patient_id")["role"]
    assert (roles[before.index] == before).all()
    assert roles["new"] == "validation"  # a newcomer joins the patient it is tied to
    (severity, _, evidence, remedy), = lab.CHECKS["tied-across-roles"][0](lab.Material(after, more[0]))
    assert severity == "error" and a in evidence and b in evidence and "another registry" in remedy


# ---------------------------------------------------------------- folds


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.integers(2, 6), st.integers(0, 5))
def test_folds_keep_groups_together_and_classes_apart(tables, folds, seed):
    table = lab.make_labels(*tables)
    table["frame_of_reference_uid"] = table["patient_id"].str[-1] + table["subtype"]  # ties within a subtype
    groups = lab.patient_groups(table)
    if groups.nunique() < folds:
        with pytest.raises(runs.InputError, match=f"{folds} folds for"):
            lab.patient_folds(table, folds)
        return
    dealt = lab.patient_folds(table, folds, repeats=3, seed=seed)
    assert dealt.shape == (table["patient_id"].nunique(), 3) and set(dealt.stack()) == set(range(folds))
    assert (dealt.groupby(groups).nunique() == 1).all(axis=None)
    letter = table.groupby("patient_id")["subtype"].first().groupby(groups).first()
    for repeat in dealt:
        counts = pd.crosstab(dealt[repeat].groupby(groups).first(), letter)
        assert (counts.max() - counts.min()).max() <= 1  # groups of a class differ by one between folds
    shuffled = lab.patient_folds(table.sample(frac=1, random_state=0), folds, repeats=3, seed=seed)
    pd.testing.assert_frame_equal(dealt, shuffled)


def test_repeats_deal_anew_and_tied_patients_are_never_asked_about_each_other():
    frame = tabular()
    tied = {name: f"P{int(name[1:]) // 6 * 6 + int(name[1:]) % 3}" for name in frame.index}  # pairs of one subtype
    dealt = lab._folds_of(frame, pd.Series(tied), 5, 4, 0)
    assert (dealt.groupby(pd.Series(tied)).nunique() == 1).all(axis=None)
    assert all((dealt[0] != dealt[r]).any() for r in (1, 2, 3))
    scores = lab.baseline_scores(frame, 5, repeats=4, groups=tied).set_index("baseline")
    assert scores.loc["size", "low"] < scores.loc["size", "auc"] < scores.loc["size", "high"]


# ---------------------------------------------------------------- the audit, finding by finding


def test_the_clean_cohort_passes(clean):
    findings = lab.audit(**clean)
    assert {(f.name, f.severity) for f in findings} == {
        ("too-few-patients", "warning"), ("class-balance", "info"), ("labels-in-reading-order", "info")}
    assert lab.verdict(findings) == "passed with warnings"
    lab.stop_on_errors(findings)


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_clean_cohorts_have_no_errors(seed):
    assert not found(lab.example_cohort(seed=seed))


def first_with(labels, role):
    return labels.index[labels["role"] == role][0]


def constant(t):
    t["labels"]["target"] = t["labels"]["target"].clip(upper=0)


def missing(t):
    t["labels"].loc[first_with(t["labels"], "train"), "target"] = -1


def absent_class(t):
    rows = (t["labels"]["subtype"] == "B") & (t["labels"]["role"] == "test")
    t["labels"].loc[rows, "role"] = "train"


def reading_order(t):
    part = pd.factorize(t["labels"]["patient_id"])[0]
    used = t["labels"]["target"] >= 0
    t["labels"].loc[used, "role"] = np.array(lab.ROLES)[np.digitize(part, [26, 35])][used]


def cap(t):
    late = ~t["labels"]["patient_id"].isin(t["labels"]["patient_id"].unique()[:12])
    t["labels"].loc[late, ["role", "target", "reason"]] = ["unused", -1, "over the limit"]


def two_roles(t):
    used = t["labels"][t["labels"]["role"] == "train"]
    t["labels"].loc[used.index[used.duplicated("patient_id")][0], "role"] = "test"


def share(column):
    def fault(t):
        a, b = (first_with(t["labels"], role) for role in ("train", "test"))
        t["labels"].loc[a, column] = t["labels"].loc[b, column]
    return fault


def twins(t):
    a, b = (t["labels"].loc[first_with(t["labels"], role), "stack_id"] for role in ("train", "test"))
    table = t["voxels"].set_index("stack_id")["coarse_hu"]
    table[b] = (np.array(table[a]) + 5).tolist()
    t["voxels"]["coarse_hu"] = table.to_numpy()


def empty_mask(t):
    t["voxels"]["mask_voxels"] = 0


def beside(t):
    t["voxels"].loc[3, "face_gap"] = 3.0


def without_voxels(t):
    t["voxels"].loc[3, "face_gap"] = np.inf


def folder(t):
    t["labels"]["subtype"] = t["labels"]["subtype"].replace({"G": "A"})


def letters(t):
    t["boxes"]["label"] = t["boxes"]["label"].str.lower()
    t["boxes"]["subtype"] = None


def last_box(t):
    t["boxes"] = t["boxes"].drop_duplicates("file", keep="last")


def fewer_lesions(t):
    t["lesions"] = t["lesions"].iloc[1:]


def lost_volume(t):
    t["labels"] = t["labels"].drop(index=first_with(t["labels"], "train"))


def doubled_volume(t):
    t["labels"] = pd.concat([t["labels"], t["labels"].iloc[:1]], ignore_index=True)


def negative(t):
    bare = t["labels"]["lesions"] == 0
    t["labels"].loc[bare, ["role", "target"]] = ["train", 0]


def scanner(t):
    t["cohort"]["slice_thickness_mm"] = t["cohort"]["patient_id"].str[8].map({"A": 5.0, "B": 1.0, "E": 3.0, "G": 2.0})
    t["cohort"]["kernel"] = t["cohort"]["patient_id"].str[8]


def tie_through_unused(t):
    # the volume that ties two patients is one that nobody annotated
    bare = t["labels"].index[t["labels"]["role"] == "unused"][0]
    mine = t["labels"].loc[t["labels"]["patient_id"] == t["labels"].loc[bare, "patient_id"], "role"].iloc[0]
    other = t["labels"].index[~t["labels"]["role"].isin([mine, "unused"])][0]
    t["labels"].loc[bare, "frame_of_reference_uid"] = t["labels"].loc[other, "frame_of_reference_uid"]


def unlocked(t):
    t["labels"].loc[t["labels"]["patient_id"] == t["locked"][0], "role"] = "train"


def fitted_on_test(t):
    t["fitted_on"] = [*t["fitted_on"], t["locked"][0]]


def learned_coins(t):
    t["shuffled"] = lab.coin_scores(np.eye(20).repeat(2, 0), np.arange(20).repeat(2), np.arange(40) % 2 == 0)


def raw_numbers(t):
    t["cohort"][["hu_min", "hu_mean"]] = [0.0, 624.0]


def scaled(t):
    t["cohort"].loc[4, ["hu_min", "hu_mean", "hu_max"]] = [0.0, 0.3, 1.0]


def overflown(t):
    t["cohort"].loc[4, "hu_max"] = 32767.0


def padding(t):
    t["cohort"].loc[4, "hu_min"] = -3024.0


def nan_table(t):
    t["cohort"].loc[4, "hu_mean"] = np.nan


def nan_voxels(t):
    t["voxels"].loc[4, "finite"] = False


FAULTS = [("constant-label", constant), ("missing-label", missing), ("class-missing-from-role", absent_class),
          ("reading-order", reading_order), ("reading-order", cap), ("patient-in-two-roles", two_roles),
          ("study-in-two-roles", share("study_uid")), ("scan-in-two-roles", share("frame_of_reference_uid")),
          ("duplicate-in-two-roles", share("voxel_hash")), ("twins-in-two-roles", twins), ("empty-mask", empty_mask),
          ("mask-and-boxes-disagree", beside), ("mask-and-boxes-disagree", without_voxels),
          ("label-against-folder", folder),
          ("letters-lost", letters), ("boxes-lost", last_box), ("lesions-lost", fewer_lesions),
          ("volumes-lost", lost_volume), ("volumes-lost", doubled_volume), ("unlabelled-as-negative", negative),
          ("tied-across-roles", tie_through_unused),
          ("locked-test", unlocked), ("statistics-from-test", fitted_on_test),
          ("shuffled-labels-learned", learned_coins), ("acquisition-predicts-label", scanner),
          ("outside-hu-range", raw_numbers), ("outside-hu-range", padding),
          ("outside-hu-range", scaled), ("outside-hu-range", overflown),
          ("not-a-number", nan_table), ("not-a-number", nan_voxels)]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{n}-{f.__name__}" for n, f in FAULTS])
def test_a_faulty_cohort_is_stopped(clean, name, fault):
    tables = {key: value.copy() if isinstance(value, pd.DataFrame) else value for key, value in clean.items()}
    fault(tables)
    findings = lab.audit(**tables)
    assert name in {f.name for f in findings if f.severity == "error"}
    assert all(f.message and f.evidence and f.remedy for f in findings)
    with pytest.raises(lab.AuditFailed, match=name):
        lab.stop_on_errors(findings)


def test_warnings_that_do_not_stop(clean):
    stray_letter = pd.concat([clean["lesions"], clean["lesions"].iloc[:1].assign(subtype="G", boxes=1, lesion_id="x")])
    cut = clean["cohort"].assign(lesions_cut=1)
    assert "letters-within-a-patient" in found(clean | {"lesions": stray_letter}, "warning")
    assert "lesions-outside-grid" in found(clean | {"cohort": cut}, "warning")
    tied = clean["labels"].assign(study_uid=clean["labels"]["study_uid"].replace("1.A0002", "1.A0001"))
    assert "patients-tied-together" in found(clean | {"labels": tied}, "warning")


def test_every_check_has_a_cohort_that_makes_it_speak():
    # the others only warn or inform; each has a test of its own in this section
    gentle = {"letters-within-a-patient", "lesions-outside-grid", "patients-tied-together", "class-balance",
              "too-few-patients", "labels-in-reading-order"}
    assert {name for name, _ in FAULTS} | gentle == set(lab.CHECKS) and not gentle & {name for name, _ in FAULTS}


def test_enough_patients_for_the_promised_width(clean):
    tests = clean["labels"][clean["labels"]["role"] == "test"]["patient_id"].nunique()
    width = float(lab.interval_width(tests))
    said = next(f for f in lab.audit(**clean, promised_width=width - 0.01) if f.name == "too-few-patients")
    assert said.severity == "warning" and f"a 95 % interval is about {width:.2f} wide" in said.message
    assert "too-few-patients" not in found(clean | {"promised_width": width + 0.01}, "warning")


def test_labels_in_blocks_are_said_and_mixed_ones_are_not(clean):
    assert "labels-in-reading-order" in found(clean, "info")
    mixed = lab.split_patients(lab.make_labels(*cohort_of({f"P{i:02}": "AG"[i % 2] for i in range(40)})))
    assert not list(lab.CHECKS["labels-in-reading-order"][0](lab.Material(mixed, clean["cohort"])))


def test_a_locked_patient_without_a_volume_is_a_warning(clean):
    assert "locked-test" in found(clean | {"locked": ["Lung_Dx-X0001"]}, "warning")


def test_coins_are_told_only_of_patients_that_were_seen():
    rng = np.random.default_rng(0)
    patients, pictures = np.arange(40).repeat(5), rng.normal(size=(40, 8)).repeat(5, 0) + rng.normal(size=(200, 8)) / 50
    by_patient = lab.coin_scores(pictures, patients, patients < 30, repeats=200)
    by_slice = lab.coin_scores(pictures, patients, np.arange(200) % 5 > 0, repeats=200)
    assert np.mean(by_slice) == 1 and abs(np.mean(by_patient) - 0.5) < 0.04
    assert lab.coin_scores(pictures, patients, patients < 0) == []


def test_class_balance_that_no_draw_explains():
    tables = lab.example_cohort({"A": 60, "B": 60})
    patients = tables["labels"]["patient_id"].unique()
    rank = tables["labels"]["patient_id"].map({p: i for i, p in enumerate(patients)})
    # most A train and most B test, with some of each everywhere
    mostly = np.where((tables["labels"]["subtype"] == "A") ^ (rank % 10 == 0), "train", "test")
    tables["labels"]["role"] = np.where(tables["labels"]["target"] >= 0, mostly, "unused")
    assert "class-balance" in found(tables, "warning")


def test_a_class_too_small_for_every_role_only_warns():
    tables = lab.example_cohort({"A": 12, "E": 1, "G": 12})
    assert "class-missing-from-role" in found(tables, "warning") - found(tables)


def test_checks_without_their_table_are_named(clean):
    bare = lab.audit(clean["labels"], clean["cohort"])
    said = next(f for f in bare if f.name == "not-checked")
    assert said.severity == "info" and "empty-mask (needs voxels)" in said.evidence


def test_override_has_to_name_the_finding(clean):
    findings = lab.audit(**(clean | {"labels": clean["labels"].assign(target=clean["labels"]["target"].clip(upper=0))}))
    assert lab.verdict(findings) == "failed"
    with pytest.raises(lab.AuditFailed, match='override="constant-label"'):
        lab.stop_on_errors(findings)
    assert lab.verdict(findings, "constant-label") == "passed with warnings"
    assert lab.audit_report(findings, clean["labels"], " constant-label ")["overridden"] == ["constant-label"]
    with pytest.raises(runs.InputError, match="override names everything, which is no finding: expected some of"):
        lab.verdict(findings, "everything")


def test_the_report_is_json_and_counts_patients(clean, tmp_path):
    report = lab.audit_report(lab.audit(**clean), clean["labels"])
    runs.save_json(report, tmp_path / "audit.json")
    back = runs.load_json(tmp_path / "audit.json")
    assert back["classes"] == ["A", "B", "E", "G"] and back["verdict"] == "passed with warnings"
    counts = back["counts"]["patients_by_role"]
    assert sum(sum(n.values()) for n in counts.values()) == back["counts"]["labelled_patients"] == 44
    assert back["locked_test"] == {"patients": 0, "hash": runs.hash_value([])}
    locked = lab.audit_report([], clean["labels"], locked=["P2", "P1"])["locked_test"]
    assert locked == {"patients": 2, "hash": runs.hash_value(["P1", "P2"])}
    assert {tuple(sorted(f)) for f in back["findings"]} == {("evidence", "message", "name", "remedy", "severity")}


@pytest.mark.slow
def test_the_acquisition_test_is_calibrated():
    p = np.array([acquisition_by_lot(seed) for seed in range(200)])
    assert (p <= 0.05).mean() <= 0.10 and 0.40 <= (p <= 0.5).mean() <= 0.60


def acquisition_by_lot(seed):
    rng = np.random.default_rng(1000 + seed)
    table = pd.DataFrame({"target": rng.permutation(np.repeat([0, 1, 2], (25, 10, 6)))})
    table["manufacturer"] = rng.choice(["GE", "Philips", "SIEMENS"], len(table))
    table["slice_thickness_mm"] = rng.choice([1.0, 5.0, np.nan], len(table))
    return lab.acquisition_test(table, permutations=99, seed=seed)[1]


@pytest.mark.slow
def test_clean_cohorts_raise_statistical_alarms_rarely():
    alarms = [lab.audit_false_alarms(lab.example_cohort(seed=s)) for s in range(100)]
    assert np.mean([bool(names) for names in alarms]) <= 0.05, alarms


# ---------------------------------------------------------------- voxels


def boxed(shape=(12, 12, 12)):
    mask = np.zeros(shape, np.uint8)
    mask[4:8, 3:6, 2:9] = 1
    hu = np.random.default_rng(0).normal(-500, 200, shape).astype("int16")
    return SimpleNamespace(ct_hu=hu, mask=mask, boxes_zyx=np.array([[4, 3, 2, 8, 6, 9]], "float32"))


def test_a_right_mask_reaches_all_faces():
    facts = lab.inspect_volume(boxed())
    assert facts["mask_voxels"] == 4 * 3 * 7 and facts["face_gap"] == 0 and facts["finite"]


def test_a_mask_drawn_slice_by_slice_need_not_fill_the_hull():
    volume = boxed()
    volume.mask[4:6, 5, 2:5] = 0
    assert lab.inspect_volume(volume)["face_gap"] == 0


def test_a_lesion_without_voxels_and_one_hidden_by_another():
    volume = boxed()
    volume.boxes_zyx = np.vstack([volume.boxes_zyx, [[0, 0, 0, 2, 2, 2]]])
    assert lab.inspect_volume(volume)["face_gap"] == np.inf
    volume.boxes_zyx[1] = [5, 4, 3, 6, 5, 4]  # inside the first: its voxels may carry the other number
    assert lab.inspect_volume(volume)["face_gap"] == 0


def test_a_locked_test_set_is_no_cut_in_the_reading_order():
    """Its patients, of another hospital, stand together in every list; nobody dealt them their role."""
    ours, theirs = (lab.example_cohort(seed=seed) for seed in (1, 2))
    names = {"patient_id": "Z" + theirs["labels"]["patient_id"], "stack_id": "Z" + theirs["labels"]["stack_id"]}
    tested = theirs["labels"]["role"].replace(["train", "validation"], "test")
    labels = pd.concat([ours["labels"], theirs["labels"].assign(role=tested, **names)], ignore_index=True)
    locked = labels.loc[labels["patient_id"].str.startswith("Z") & (labels["role"] == "test"), "patient_id"].unique()
    checks = {"only": ["reading-order", "class-balance"]}
    given = lab.audit(labels, ours["cohort"], locked=locked.tolist(), **checks)
    assert [f.severity for f in given] == ["info"]
    assert lab.audit(labels, ours["cohort"], **checks)[0].name == "reading-order"     # as if they had been dealt


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.floats(0, 4), st.floats(0.2, 5))
def test_a_box_edge_inside_a_voxel_is_tolerated(size, start, length):
    end = min(start + length, size)
    mask = np.zeros((size,) * 3, np.uint8)
    inside = slice(int(start), max(int(np.ceil(end)), int(start) + 1))
    mask[inside, inside, inside] = 1
    facts = lab.inspect_volume(SimpleNamespace(ct_hu=mask, mask=mask, boxes_zyx=[[start] * 3 + [end] * 3]))
    assert facts["face_gap"] <= lab.FACE_VOXELS


def test_a_box_that_one_slice_of_many_is_wider_than_is_right():
    volume = boxed()
    volume.mask[7], volume.mask[:, :, 8] = 0, 0      # drawn on the last millimetres only: less than half a voxel
    volume.boxes_zyx = volume.boxes_zyx + np.array([-0.4, 0, 0, 0, 0, 0.3], "float32")
    assert lab.inspect_volume(volume)["face_gap"] < lab.FACE_VOXELS


def test_a_mask_that_is_a_sliver_of_its_box_is_noticed():
    volume = boxed()
    volume.mask[:, :, 5:] = 0                              # three of seven voxels
    assert lab.inspect_volume(volume)["face_gap"] == 4


@pytest.mark.parametrize("fill", ["corners", "an eighth"])
def test_a_mask_that_is_next_to_nothing_of_its_box_is_noticed(fill):
    mask = np.zeros((32,) * 3, np.uint8)
    if fill == "corners":
        mask[2, 2, 2] = mask[21, 21, 21] = 1
    else:
        mask[2:12, 2:12, 2:12] = 1
    volume = SimpleNamespace(ct_hu=mask, mask=mask, boxes_zyx=[[2.0] * 3 + [22.0] * 3])
    assert lab.inspect_volume(volume)["face_gap"] > lab.FACE_VOXELS


def test_masks_beside_boxes_that_meet_are_noticed():
    mask = np.zeros((40,) * 3, np.uint8)
    mask[2:10, 2:10, 2:10], mask[10:19, 10:19, 10:19] = 1, 2
    boxes = [[2.0] * 3 + [11.0] * 3, [10.0] * 3 + [19.0] * 3]
    right = SimpleNamespace(ct_hu=mask, mask=mask, boxes_zyx=boxes)
    assert lab.inspect_volume(right)["face_gap"] <= lab.FACE_VOXELS
    wrong = SimpleNamespace(ct_hu=mask, mask=np.roll(mask, 15, axis=0), boxes_zyx=boxes)
    assert lab.inspect_volume(wrong)["face_gap"] > lab.FACE_VOXELS


def test_no_lesion_of_the_collection_is_beside_its_box(real_data):
    """All boxes of the collection, as if all its slices were as thin as those of its PET/CT."""
    from lungct import annotations, volumes

    drawn = pd.read_csv(real_data / "ct_boxes.csv", dtype={"subtype": "str"})
    names = drawn["path"].str.extract(r"^(.*)/(\d+)-(\d+)\.dcm$")       # series, acquisition, image
    drawn = drawn.assign(slice_index=names[2].astype(int))
    affine, worst = np.diag([0.75, 0.75, 1.0, 1.0]), {}
    stacks = pd.DataFrame({"stack_id": ["s"], "patient_id": ["p"], "study_uid": ["u"], "affine": [affine.ravel()]})
    for (series, _), group in drawn.groupby([names[0], names[1]]):
        told = {"file": group["sop_uid"], "object_index": range(len(group)), "stack_id": "s", "label": group["subtype"]}
        boxes = group.assign(**told).reindex(columns=list(annotations.BOX_COLUMNS)).astype(annotations.BOX_COLUMNS)
        lesions, boxes = annotations.join_lesions(boxes, stacks)
        middle = lesions[annotations.CORNERS_MM].to_numpy().reshape(-1, 2, 3).mean(axis=(0, 1))
        placed = volumes.place_lesions(lesions, boxes, affine, volumes.Grid().affine(middle), 64)
        worst[series] = max(worst.get(series, 0), lab._face_gap(placed["mask"], placed["boxes_zyx"]))
    print(f"{len(worst)} series: at most {max(worst.values()):.2f} voxels beside the box")
    assert len(worst) > 300 and max(worst.values()) <= lab.FACE_VOXELS


def test_swapped_axes_are_noticed():
    volume = boxed()
    volume.mask = volume.mask.transpose(2, 1, 0)
    facts = lab.inspect_volume(volume)
    assert facts["face_gap"] == 2  # z from 2 instead of 4


def test_nan_in_ct_or_pet_is_noticed_and_voxels_are_hashed_without_names():
    plain, broken = boxed(), boxed()
    broken.pet_suv = np.full((2, 2, 2), np.nan)
    assert not lab.inspect_volume(broken)["finite"]
    broken.pet_suv[0] = 3                                  # the rest of the cube is not covered by the PET
    assert lab.inspect_volume(broken)["finite"]
    broken.pet_suv[0, 0, 0] = np.inf
    assert not lab.inspect_volume(broken)["finite"]
    broken.ct_hu, broken.pet_suv = np.where(plain.ct_hu == plain.ct_hu.flat[0], np.nan, plain.ct_hu), None
    assert not lab.inspect_volume(broken)["finite"]
    broken = boxed()
    broken.pet_suv = np.full((2, 2, 2), 3.0)
    assert lab.inspect_volume(plain)["voxel_hash"] == lab.inspect_volume(broken)["voxel_hash"] != ""
    plain.ct_hu = np.full((12, 12, 12), -1024)
    assert lab.inspect_volume(plain)["voxel_hash"] == ""  # an empty cube ties nobody


def test_coarse_difference_is_relative_to_the_height_above_air():
    def block(hu, rows):
        cube = np.full((16, 16, 16), -1024.0)
        cube[:rows] = hu
        return SimpleNamespace(ct_hu=cube, mask=np.zeros((16, 16, 16)), boxes_zyx=np.zeros((0, 6)))

    volumes = {"a": block(-24, 16), "b": block(76, 16), "thin": block(-24, 1), "thin too": block(76, 1),
               "air": block(-1024, 16)}
    difference = lab.coarse_differences(lab.inspect_volumes(list(volumes), volumes.get))
    expected = 100 / np.sqrt((1000**2 + 1100**2) / 2)
    assert difference[0, 1] == pytest.approx(expected) and difference[2, 3] == pytest.approx(expected)
    assert difference[0, 0] == 0 and difference[4, 4] == np.inf  # two empty cubes are nobody's twins


# ---------------------------------------------------------------- small cohorts


@pytest.mark.parametrize("patients", ["", "A0001", "A0001 G0001", "A0001 A0002 A0003 E0003"])
def test_small_cohorts_go_through(patients):
    subtypes = {f"Lung_Dx-{p}": p[0] for p in patients.split()}
    facts = lab.example_cohort({"A": 2})["cohort"].iloc[0][["hu_min", "hu_mean", "hu_max", "lesions_cut", "affine",
                                                           "grid_size", "manufacturer", "kernel", "slices"]]
    cohort, lesions = cohort_of(subtypes, **facts)
    split = lab.split_patients(lab.make_labels(cohort, lesions))
    findings = lab.audit(split, cohort, lesions=lesions)
    assert lab.verdict(findings) == ("passed with warnings" if subtypes else "failed")
    assert lab.audit_report(findings, split)["counts"]["labelled_patients"] == len(subtypes)
    corners = dict.fromkeys(("x0_mm", "y0_mm", "z0_mm"), 0.0) | dict.fromkeys(("x1_mm", "y1_mm", "z1_mm"), 20.0)
    features = lab.tabular_features(lesions.assign(**corners), cohort)
    scores = lab.baseline_scores(features)
    assert scores["auc"].isna().all() and scores["reason"].str.startswith("not estimable").all()
    assert len(lab.baseline_probabilities(features, split)) == len(subtypes)


def test_four_patients_are_split_train_validation_test():
    table = lab.make_labels(*cohort_of({"A1": "A", "A2": "A", "A3": "A", "E3": "E"}))
    roles = lab.split_patients(table).set_index("patient_id")["role"]
    assert sorted(roles[["A1", "A2", "A3"]]) == ["test", "train", "validation"] and roles["E3"] == "train"


def test_empty_tables_keep_their_types(tmp_path):
    table = lab.split_patients(lab.make_labels(*cohort_of({})))
    full = lab.split_patients(lab.make_labels(*cohort_of({"P": "A"})))
    kinds = ["subtype", "target", "lesions", "role", "weight", "reason"]
    assert table[kinds].dtypes.to_dict() == full[kinds].dtypes.to_dict()
    runs.save_table(table, tmp_path / "labels.parquet")
    assert len(runs.load_table(tmp_path / "labels.parquet")) == 0


# ---------------------------------------------------------------- numbers and baselines


def test_macro_auc_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    scores = rng.dirichlet(np.ones(3), 60).round(1)  # rounded, so that there are ties
    expected = np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(3)])
    assert lab.macro_auc(np.eye(3)[y], scores) == pytest.approx(expected)


def test_fold_auc_is_the_mean_of_scikit_learns_weighted_by_pairs():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    y, fold, scores = rng.integers(0, 3, 90), rng.integers(0, 4, 90), rng.dirichlet(np.ones(3), 90).round(1)
    counts = np.stack([np.ones(90, int), rng.integers(0, 4, 90)])

    def by_hand(c, weights):
        areas, pairs = [], []
        for f in range(4):
            here = np.flatnonzero(fold == f).repeat(weights[fold == f])
            areas.append(roc_auc_score(y[here] == c, scores[here, c]))
            pairs.append((y[here] == c).sum() * (y[here] != c).sum())
        return np.average(areas, weights=pairs)

    wanted = [np.mean([by_hand(c, weights) for c in range(3)]) for weights in counts]
    assert lab.fold_auc(np.eye(3)[y], scores, fold, counts) == pytest.approx(wanted)
    assert lab.fold_auc(np.eye(3)[y], scores, np.zeros(90)) == pytest.approx(lab.macro_auc(np.eye(3)[y], scores))


def test_interval_width_is_wilsons():
    # Wilson's interval for 8 of 10, as in Agresti and Coull (1998): 0.490 to 0.943
    assert float(lab.interval_width(10, 0.8)) == pytest.approx(0.943 - 0.490, abs=1e-3)
    assert float(lab.interval_width(0)) == 1
    need = lab.patients_needed(0.2)
    assert lab.interval_width(need) <= 0.2 < lab.interval_width(need - 1)
    many = lab.patients_needed(0.004)  # beyond a hundred thousand
    assert many > 100_000 and lab.interval_width(many) <= 0.004 < lab.interval_width(many - 1)
    assert lab.patients_needed(1.0) == 1
    for width in (0.0, -1.0, float("nan")):
        with pytest.raises(runs.InputError, match="promised_width is .*more than 0"):
            lab.patients_needed(width)


def tabular(n=90, seed=0, effect=3.0):
    rng = np.random.default_rng(seed)
    letters = np.array(["A", "B", "G"])[np.arange(n) % 3]
    frame = pd.DataFrame({"subtype": letters, "lateral": rng.normal(size=n), "posterior": rng.normal(size=n),
                          "superior": rng.normal(size=n), "log_size": rng.normal(size=n) + effect * (letters == "G")},
                         index=[f"P{i}" for i in range(n)])
    frame.loc["P4", "posterior"] = np.nan
    return frame


def test_baselines_see_what_is_there_and_nothing_else():
    with_signal = lab.baseline_scores(tabular()).set_index("baseline")
    assert with_signal.loc["majority", "auc"] == 0.5
    assert with_signal.loc["majority", "balanced_accuracy"] == pytest.approx(1 / 3)
    assert with_signal.loc["size", "auc"] > 0.7 and with_signal.loc["size", "low"] > 0.5
    row = lab.baseline_scores(tabular(effect=0.0)).set_index("baseline").loc["position + size"]
    assert row["low"] < 0.55 and row["low"] < row["auc"] < row["high"]


def test_rare_classes_are_left_out_of_the_folds_by_name():
    frame = tabular()
    frame.iloc[:2, 0] = "E"
    assert lab.baseline_scores(frame)["classes"].unique().tolist() == ["ABG"]


def test_a_class_of_fewer_groups_than_folds_is_left_out():
    frame = tabular()
    tied = dict.fromkeys(frame.index[frame["subtype"] == "A"], "P0")
    assert lab.baseline_scores(frame, groups=tied)["classes"].unique().tolist() == ["BG"]


def test_baseline_for_the_test_patients_learns_from_training_alone(clean):
    lesions = clean["lesions"].assign(x0_mm=0.0, y0_mm=0.0, z0_mm=0.0, x1_mm=np.arange(len(clean["lesions"])) + 10.0,
                                      y1_mm=20.0, z1_mm=20.0)
    features = lab.tabular_features(lesions, clean["cohort"])
    chances = lab.baseline_probabilities(features, clean["labels"])
    assert list(chances.columns) == ["p_A", "p_B", "p_E", "p_G"] and np.allclose(chances.sum(axis=1), 1)
    assert sorted(chances.attrs["fitted_on"]) == sorted(clean["fitted_on"])
    test = clean["labels"].loc[clean["labels"]["role"] == "test", "patient_id"].unique()
    changed = features.copy()
    changed.loc[test[0], "log_size"] = 99.0
    again = lab.baseline_probabilities(changed, clean["labels"])
    pd.testing.assert_frame_equal(chances.drop(index=test[0]), again.drop(index=test[0]))


def test_a_stack_that_was_not_built_does_not_stop_the_chapter(clean):
    from lungct import volumes

    cohort, broken = clean["cohort"].copy(), clean["lesions"]["stack_id"].iloc[0]
    row = volumes._excluded({"stack_id": broken}, volumes.BuildProblem.FAILED, "truncated")
    at = cohort["stack_id"] == broken
    cohort.loc[at, "reason"] = row["reason"]
    for name in ("affine", "grid_size", "hu_min", "hu_mean", "hu_max", "lesions", "lesions_cut", "lesions_outside"):
        cohort[name] = cohort[name].where(~at, None)
    lesions = clean["lesions"].assign(**dict.fromkeys(("x0_mm", "y0_mm", "z0_mm"), 0.0),
                                      **dict.fromkeys(("x1_mm", "y1_mm", "z1_mm"), 20.0))
    labels = lab.split_patients(lab.make_labels(cohort, lesions))
    features = lab.tabular_features(lesions, cohort)
    others = lesions.loc[lesions["stack_id"] != broken, "patient_id"].unique()
    assert set(features.index) == set(others) and features["lateral"].notna().all()
    assert lab.verdict(lab.audit(labels, cohort, lesions=lesions)) != "failed"


def test_a_scan_of_nobody_is_a_patient_of_its_own(clean):
    nobody = clean["cohort"].iloc[[0, 0]].assign(stack_id=["x1", "x2"], patient_id=None, lesions=0,
                                                 **{link: ["x1", "x2"] for link in lab.LINKS})
    cohort = pd.concat([clean["cohort"], nobody], ignore_index=True).astype({"patient_id": "str"})
    labels = lab.split_patients(lab.make_labels(cohort, clean["lesions"]))
    theirs = labels[labels["stack_id"].isin(["x1", "x2"])]
    assert theirs["patient_id"].tolist() == ["unknown, x1", "unknown, x2"] and theirs["role"].eq("unused").all()
    assert lab.verdict(lab.audit(labels, cohort, lesions=clean["lesions"])) != "failed"


def test_tied_patients_are_one_in_the_acquisition_test():
    """Scanners by lot, but each person is there under two names, with one scanner and one subtype: no finding."""
    alarms = 0
    for seed in range(30):
        tables, rng = lab.example_cohort({"A": 20, "G": 20}, seed), np.random.default_rng(seed)
        person = tables["labels"]["patient_id"].str[-2:].astype(int) // 2
        tables["cohort"]["frame_of_reference_uid"] = ""
        labels = tables["labels"].assign(frame_of_reference_uid=tables["labels"]["subtype"] + person.astype(str))
        people = dict(zip(labels["stack_id"], labels["frame_of_reference_uid"], strict=True))
        of_person = tables["cohort"]["stack_id"].map(people)

        def by_lot(draw, of_person=of_person):
            return of_person.map({name: draw() for name in of_person.unique()})

        cohort = tables["cohort"].assign(
            manufacturer=by_lot(lambda rng=rng: rng.choice(["GE", "SIEMENS", "PHILIPS"])), slices=60, has_pet=False,
            kernel=by_lot(lambda rng=rng: rng.choice(list("abcdefgh"))),
            slice_thickness_mm=by_lot(lambda rng=rng: rng.uniform(1, 5)))
        alarms += "acquisition-predicts-label" in {f.name for f in lab.audit(labels, cohort)}
    assert alarms <= 2


def test_clinical_features_keep_gaps_as_gaps():
    frame = pd.DataFrame({"patient_id": ["P", "Q"], "sex": ["M", None], "age_years": [60.0, None],
                          "smoking": [1.0, None]})
    lesions = pd.DataFrame({"stack_id": ["s"], "patient_id": ["P"], "subtype": ["A"], "boxes": [1],
                            "x0_mm": [0.0], "x1_mm": [9.0], "y0_mm": [0.0], "y1_mm": [4.0],
                            "z0_mm": [0.0], "z1_mm": [4.0]})
    cohort = pd.DataFrame({"stack_id": ["s"], "affine": [np.eye(4).ravel()], "grid_size": [3]})
    row = lab.tabular_features(lesions, cohort, frame).loc["P"]
    assert row[["age_years", "male", "smoking"]].tolist() == [60.0, 1.0, 1.0]
    assert row["lateral"] == pytest.approx(3.5) and np.exp(row["log_size"]) == pytest.approx(9)
    assert lab._clinical_features(frame).loc["Q"].isna().all()


def test_the_bar_of_the_collection(real_data):
    features = lab.collection_features(real_data)
    features = features[features["subtype"].isin(["A", "G"])]
    scores = lab.baseline_scores(features, repeats=3).set_index("baseline")
    assert len(features) == 310
    assert scores.loc["size", "auc"] == pytest.approx(0.75, abs=0.01)
    full = scores.loc["position + size + clinical"]
    print(f"A against G, 310 patients: AUC {full['auc']:.3f} ({full['low']:.3f} to {full['high']:.3f})")
    assert 0.82 <= full["auc"] <= 0.84 and full["low"] < 0.83 < full["high"]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def one_subtype(tmp_path_factory):
    """Phantoms of which only those with an adenocarcinoma have images."""
    from lungct import phantom

    folder = phantom.make_cohort(tmp_path_factory.mktemp("one") / "cohort", patients=16, seed=3, quirks=(), matrix=64)
    for patient in (folder / "Lung-PET-CT-Dx").glob("Lung_Dx-[!A]*"):
        shutil.rmtree(patient)
    return folder


@pytest.mark.slow
def test_lungct_run_stops_at_an_error_in_one_line_unless_it_is_named(one_subtype, tmp_path, monkeypatch):
    from lungct import course

    given = {"dicom_path": str(one_subtype / "Lung-PET-CT-Dx"), "annotation_path": str(one_subtype / "Annotation"),
             "grid_size": "32", "grid_spacing_mm": "12"}
    pairs = [word for name, value in given.items() for word in ("-p", name, value)]
    command = [sys.executable, "-c", "from lungct.course import main; main()", "run", "--run-dir", str(tmp_path)]
    done = subprocess.run([*command, *pairs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lungct: the label audit found errors (constant-label: all ")
    assert last.endswith('accept them by name with override="constant-label"') and "Traceback" not in done.stderr
    assert runs.load_json(tmp_path / "04_check_labels" / "audit.json")["verdict"] == "failed"
    assert not (tmp_path / "05_train_3d_cnn").exists() and not (tmp_path / "roles.json").exists()

    monkeypatch.setattr(runs, "CHAPTERS", runs.CHAPTERS[:4])  # training is not what is tested here
    course.run_course(course.plan_course(str(tmp_path), given | {"override": "constant-label"}), course.Progress())
    report = runs.load_json(tmp_path / "04_check_labels" / "audit.json")
    assert report["verdict"] == "passed with warnings" and report["overridden"] == ["constant-label"]
    labels = runs.load_table(tmp_path / "04_check_labels" / "labels.parquet")
    used = labels[labels["role"] != "unused"]
    roles = dict(zip(used["patient_id"], used["role"], strict=True))  # real images: frozen without being asked
    assert roles == runs.load_json(tmp_path / "roles.json")["roles"]


def test_headers_without_any_manufacturer_are_called_unknown():
    for silent in (pd.Series([None, None], dtype="str"), pd.Series([np.nan, ""], dtype=object)):
        assert lab.vendor_names(silent).tolist() == ["UNKNOWN", "UNKNOWN"]
    assert lab.vendor_names(pd.Series(["GE MEDICAL", None])).tolist() == ["GE", "UNKNOWN"]


# ---------------------------------------------------------------- what callers hand over

def test_names_of_a_part_of_the_classes_are_not_shifted():
    labels = lab.example_cohort()["labels"]
    assert lab.class_names(labels) == sorted(labels.loc[labels.target >= 0, "subtype"].unique())
    with pytest.raises(runs.InputError, match="is this a part of a table"):
        lab.class_names(labels[labels["target"] != 1])


def test_features_that_know_nobody_are_refused():
    labels = lab.split_patients(lab.example_cohort()["labels"])
    names = labels["patient_id"].unique()
    features = pd.DataFrame({"log_size": np.arange(len(names), dtype=float)}, index=pd.Index(names, name="patient_id"))
    assert np.allclose(lab.baseline_probabilities(features, labels, ["log_size"]).sum(axis=1), 1, atol=1e-6)
    with pytest.raises(runs.InputError, match="index them by patient_id"):
        lab.baseline_probabilities(features.reset_index(), labels, ["log_size"])


def test_a_mask_of_numbers_is_no_mask():
    pictures, trains = np.random.default_rng(0).normal(size=(20, 5)), np.arange(20) < 12
    assert len(lab.coin_scores(pictures, [str(k) for k in range(20)], trains)) == 20
    with pytest.raises(runs.InputError, match="expected True or False for each picture"):
        lab.coin_scores(pictures, [str(k) for k in range(20)], trains.astype(int))


def test_one_locked_patient_is_a_list_of_one():
    assert lab.read_registry("", (0.6, 0.2, 0.2), 0, ["Lung_Dx-A0001"]) == {"Lung_Dx-A0001": "test"}
    with pytest.raises(runs.InputError, match="locked is the text 'Lung_Dx-A0001'"):
        lab.read_registry("", (0.6, 0.2, 0.2), 0, "Lung_Dx-A0001")


def test_a_split_does_not_depend_on_the_index_and_takes_roles_as_a_series():
    labels = lab.example_cohort()["labels"]
    odd = labels.set_axis(np.arange(len(labels)) % 7)
    one, other = lab.split_patients(labels), lab.split_patients(odd)
    assert other["role"].tolist() == one["role"].tolist() and other.index.equals(odd.index)
    assert lab.patient_folds(odd).equals(lab.patient_folds(labels))
    fixed = one.drop_duplicates("patient_id").set_index("patient_id")["role"]
    assert lab.split_patients(labels, seed=5, fixed=fixed[fixed != "unused"])["role"].tolist() == one["role"].tolist()


@pytest.mark.parametrize("names", [lambda n: np.arange(len(n)), lambda n: n.where(n.index > 0)])
def test_patients_whose_names_are_no_text_are_refused(names):
    labels = lab.example_cohort()["labels"].sort_values("target", ascending=False, ignore_index=True)
    odd = labels.assign(patient_id=names(labels["patient_id"]))
    for ask in (lab.split_patients, lab.patient_folds):
        with pytest.raises(runs.InputError, match="no text"):
            ask(odd)


def test_a_clinical_table_with_a_patient_twice_is_refused():
    tables = lab.example_cohort()
    clinical = pd.DataFrame({"patient_id": ["A", "A"], "sex": ["male", "F "], "smoking": [1, 0], "age_years": [60, 61]})
    with pytest.raises(runs.InputError, match="has a patient twice"):
        lab.tabular_features(tables["lesions"], tables["cohort"], clinical)
    assert lab._clinical_features(clinical)["male"].tolist() == [1.0, 0.0]


# ---------------------------------------------------------------- what a careless change would have turned round


def found_by(name, tables=None, **changes):
    """Findings of one check on the clean example, of which some tables are changed."""
    tables = tables or lab.example_cohort()
    return lab.audit(**(tables | {key: change(tables[key].copy()) for key, change in changes.items()}), only=[name])


def test_statistics_from_validation_are_found():
    tables = lab.example_cohort()
    table = tables["labels"]
    validates = table.loc[table["role"] == "validation", "patient_id"].iloc[0]
    assert found_by("statistics-from-test", tables | {"fitted_on": [validates]})
    trains = table.loc[table["role"] == "train", "patient_id"].iloc[0]
    assert not found_by("statistics-from-test", tables | {"fitted_on": [trains]})


def test_a_locked_patient_who_validates_is_found():
    tables = lab.example_cohort()
    assert not found_by("locked-test", tables)
    tables["labels"].loc[tables["labels"]["patient_id"] == tables["locked"][0], "role"] = "validation"
    assert found_by("locked-test", tables)


def test_a_volume_with_a_lesion_outside_and_one_inside_is_used():
    cohort = pd.DataFrame({"stack_id": ["s"], "patient_id": ["P"], "lesions": [2], "lesions_outside": [1],
                           "reason": [None]})
    lesions = pd.DataFrame({"patient_id": ["P"], "subtype": ["A"], "boxes": [1]})
    assert lab.make_labels(cohort, lesions)["role"].tolist() == ["unassigned"]


def test_features_are_of_the_largest_lesion_along_the_right_axes():
    lesions = pd.DataFrame({"stack_id": "s", "patient_id": "P", "subtype": "A", "boxes": 1,
                            "x0_mm": [0.0, 0], "x1_mm": [9.0, 4], "y0_mm": [2.0, 0], "y1_mm": [6.0, 4],
                            "z0_mm": [10.0, 0], "z1_mm": [14.0, 4]})
    cohort = pd.DataFrame({"stack_id": ["s"], "affine": [np.eye(4).ravel()], "grid_size": [3]})
    row = lab.tabular_features(lesions, cohort).loc["P"]
    assert row[["lateral", "posterior", "superior"]].tolist() == pytest.approx([3.5, 3, 11])
    assert np.exp(row["log_size"]) == pytest.approx(9)


def test_what_was_lost_on_the_way_is_found():
    def without(cohort):
        cohort.loc[cohort.index[cohort["lesions"] > 0][0], "lesions"] = 0
        return cohort

    assert found_by("lesions-lost", cohort=without) and not found_by("lesions-lost")
    assert found_by("volumes-lost", cohort=lambda cohort: cohort.iloc[1:]) and not found_by("volumes-lost")
    assert found_by("lesions-outside-grid", cohort=lambda cohort: cohort.assign(lesions_outside=1))


def test_a_lesion_outside_the_grid_needs_no_mask():
    def outside(cohort):
        cohort.loc[cohort.index[0], "lesions_outside"] = cohort.loc[cohort.index[0], "lesions"]
        return cohort

    def unpainted(voxels):
        voxels.loc[voxels.index[0], "mask_voxels"] = 0
        return voxels

    assert not found_by("empty-mask", cohort=outside, voxels=unpainted) and found_by("empty-mask", voxels=unpainted)


def test_acquisition_that_tells_a_little_is_a_warning(monkeypatch):
    for auc, severity in ((0.7, "warning"), (0.9, "error")):
        monkeypatch.setattr(lab, "acquisition_test", lambda *_, auc=auc, **__: (auc, 0.001))
        assert [finding.severity for finding in found_by("acquisition-predicts-label")] == [severity]


def test_a_weight_that_is_no_number_is_found():
    def spoilt(table):
        table.loc[table.index[table["role"] == "train"][0], "weight"] = np.nan
        return table

    assert found_by("not-a-number", labels=spoilt) and not found_by("not-a-number")


def test_both_of_two_tied_patients_are_counted():
    def tied(table):
        table.loc[table["patient_id"] == "Lung_Dx-A0002", "study_uid"] = "1.A0001"
        return table

    assert found_by("patients-tied-together", labels=tied)[0].message.startswith("2 patients")
    assert lab.shared_between_roles(pd.DataFrame({"k": ["", ""], "role": ["train", "test"]}), "k").to_numpy().sum() == 0


def test_the_promised_interval_is_that_of_the_test_patients():
    table = lab.example_cohort()["labels"]
    count = table.loc[table["role"] == "test", "patient_id"].nunique()
    report = lab.audit_report([], table)
    assert report["expected_interval_width"] == round(float(lab.interval_width(count)), 3)


@pytest.mark.parametrize("seed", [3.0, np.float64(3), np.int32(3)])
def test_a_seed_is_a_number_and_not_how_it_is_written(clean, seed):
    wanted = lab.split_patients(clean["labels"], (0.6, 0.2, 0.2), seed=3)["role"]
    assert lab.split_patients(clean["labels"], (0.6, 0.2, 0.2), seed=seed)["role"].tolist() == wanted.tolist()
    for odd in (3.5, "3"):
        with pytest.raises(runs.InputError, match="expected a whole number"):
            lab.split_patients(clean["labels"], (0.6, 0.2, 0.2), seed=odd)


def test_roles_may_be_a_category(clean):
    labels = clean["labels"].assign(role=pd.Categorical(["unused"] * len(clean["labels"])))
    assert set(lab.split_patients(labels, (0.6, 0.2, 0.2), seed=0)["role"]) >= set(lab.ROLES)


def test_folds_are_put_into_the_order_of_the_features():
    rng = np.random.default_rng(0)
    names = [f"P{i:02}" for i in range(24)]
    features = pd.DataFrame({"subtype": ["A", "G"] * 12, "x": rng.normal(size=24)}, index=names)
    fold = pd.Series(np.arange(24) // 6, index=names)
    wanted = lab.out_of_fold(features, ["x"], fold)
    assert np.array_equal(lab.out_of_fold(features, ["x"], fold.iloc[::-1]), wanted)
    assert np.array_equal(lab.out_of_fold(features, ["x"], fold.to_numpy()), wanted)


# ---------------------------------------------------------------- at the borders of the rules

def test_a_group_is_named_after_its_first_patient():
    table = pd.DataFrame({"patient_id": ["B", "A", "C"], "study_uid": ["1", "1", "2"]})
    assert lab.patient_groups(table).to_dict() == {"A": "A", "B": "A", "C": "C"}


@pytest.mark.parametrize(("n", "wanted"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (8, [5, 1, 2]),
                                           (13, [8, 2, 3]), (100, [60, 20, 20])])
def test_shares_are_rounded_and_the_second_patient_tests(n, wanted):
    assert lab.role_counts(n, SHARES) == wanted


def test_newcomers_go_only_where_somebody_is_missing():
    train, validation, test = lab._still_short([0, 10, 0], 5, SHARES)   # validation holds more than its share
    assert train + test == 5 and validation == 0 and min(train, test) > 0
    assert lab._still_short([6, 2, 2], 10, SHARES) == [6, 2, 2]


def test_a_locked_patient_tests_whatever_was_frozen(tmp_path):
    path = tmp_path / "roles.json"
    runs.save_json(content := lab._dealt_with(SHARES, 0, ["P1"]) | {"roles": {"P1": "train", "P2": "train"}}, path)
    runs.save_json({**content, "hash": runs.hash_value(content)}, path)
    assert lab.read_registry(path, SHARES, 0, ["P1"]) == {"P1": "test", "P2": "train"}


def test_the_vendors_of_a_class_are_spread_over_the_folds():
    cohort, lesions = cohort_of({f"P{i:02}": "A" for i in range(20)})
    cohort["manufacturer"] = ["GE", "SIEMENS", "SIEMENS", "SIEMENS"] * 5
    table = lab.make_labels(cohort, lesions)
    for seed in range(5):
        dealt = lab.patient_folds(table, 5, seed=seed)[0]
        assert dealt[table.loc[table["vendor"] == "GE", "patient_id"]].value_counts().tolist() == [1] * 5


def test_coins_are_thrown_only_where_some_train_and_some_do_not():
    pictures = np.arange(8.0)[:, None]
    for trains in (np.ones(8, bool), np.zeros(8, bool)):
        assert lab.coin_scores(pictures, list("abcdefgh"), trains) == []
    assert len(lab.coin_scores(pictures, list("abcdefgh"), np.arange(8) < 4, repeats=3)) == 3


@pytest.mark.parametrize(("gap", "wrong"), [(1.0, False), (1.5, True)])
def test_a_mask_may_miss_a_face_by_one_voxel(clean, gap, wrong):
    voxels = clean["voxels"].assign(face_gap=gap)
    assert ("mask-and-boxes-disagree" in found(clean | {"voxels": voxels})) == wrong


@pytest.mark.parametrize(("patients", "severity"), [(4, "warning"), (5, "error")])
def test_one_label_for_five_patients_is_an_error(patients, severity):
    cohort, lesions = cohort_of({f"P{i}": "A" for i in range(patients)})
    table = lab.split_patients(lab.make_labels(cohort, lesions))
    told = {f.name: f.severity for f in lab.audit(table, cohort, only=["constant-label"])}
    assert told == {"constant-label": severity}


def test_a_letter_with_a_blank_beside_it_is_a_letter(clean):
    boxes = clean["boxes"].assign(label=" g ", subtype=None)
    assert "letters-lost" in found(clean | {"boxes": boxes})


@pytest.mark.parametrize(("files", "severity"), [(1, "warning"), (2, "error")])
def test_boxes_lost_in_more_than_one_file_in_a_hundred_are_an_error(clean, files, severity):
    gone = clean["ledger"]["file"].unique()[:files]                     # of 195
    boxes = clean["boxes"][~clean["boxes"]["file"].isin(gone)]
    assert "boxes-lost" in found(clean | {"boxes": boxes}, severity)


def test_there_are_as_many_groups_as_folds():
    table = lab.make_labels(*cohort_of(dict.fromkeys(["P", "Q", "R"], "A"), volumes=2))      # six rows, three patients
    assert sorted(lab.patient_folds(table, 3)[0]) == [0, 1, 2]
    with pytest.raises(runs.InputError, match="4 folds for 3 patient groups"):
        lab.patient_folds(table, 4)


def test_a_list_of_locked_patients_may_begin_with_the_mark_of_an_editor(tmp_path):
    (tmp_path / "locked.txt").write_text("P1\nP2  # both\n", encoding="utf-8-sig")
    assert lab.read_locked(tmp_path / "locked.txt") == ["P1", "P2"]


def test_coarse_volumes_are_means_of_blocks():
    cube = np.full((16, 16, 16), -1000.0)
    cube[:2, :2, 2:4] = 200
    volume = SimpleNamespace(ct_hu=cube, mask=np.zeros((16, 16, 16)), boxes_zyx=np.zeros((0, 6)))
    coarse = np.reshape(lab.inspect_volume(volume)["coarse_hu"], (8, 8, 8))
    assert coarse[0, 0, 1] == 200 and (coarse == -1000).sum() == 8**3 - 1


def test_features_of_the_collection_by_hand(tmp_path, monkeypatch):
    pd.DataFrame({"patient": "P", "path": ["P/one/1-05.dcm", "P/one/1-15.dcm"], "subtype": "A", "xmin": [100, 300],
                  "ymin": [200, 200], "xmax": [140, 310], "ymax": [210, 300]}).to_csv(tmp_path / "ct_boxes.csv")
    pd.DataFrame({"File Location": [r".\Lung-PET-CT-Dx\P\one", r".\Lung-PET-CT-Dx\P\two"],
                  "Number of Images": [20, 7]}).to_csv(tmp_path / "metadata.csv")
    with pytest.raises(runs.InputError, match="no clinical table in"):
        lab.collection_features(tmp_path)
    told = pd.DataFrame({"patient_id": ["P"], "sex": ["F"], "age_years": [60], "smoking": [1]})
    monkeypatch.setattr(lab, "find_clinical", lambda folder: "x")
    monkeypatch.setattr(lab, "read_clinical", lambda path: told)
    row = lab.collection_features(tmp_path).loc["P"]
    assert row[["lateral", "posterior", "superior"]].tolist() == pytest.approx([(136 + 49) / 2, -(51 + 6) / 2, 0.5])
    assert np.exp(row["log_size"]) == pytest.approx(np.sqrt(10 * 100))         # the largest box
    assert row[["subtype", "male", "age_years", "smoking"]].tolist() == ["A", 0, 60, 1]


def test_a_class_of_just_as_many_patients_as_folds_is_kept():
    frame = tabular()
    frame.iloc[:5, 0] = "E"
    assert set(lab.baseline_scores(frame)["classes"]) == {"ABEG"}


def test_the_majority_is_right_in_one_class_only():
    frame = tabular()
    frame = frame[(frame["subtype"] != "B") & ((frame["subtype"] == "G") | (np.arange(90) % 2 == 0))]
    row = lab.baseline_scores(frame).set_index("baseline").loc["majority"]     # 15 A and 30 G
    assert row["accuracy"] == pytest.approx(2 / 3) and row["balanced_accuracy"] == 0.5


def test_another_share_needs_another_number_of_patients():
    need = lab.patients_needed(0.1, share=0.5)
    assert lab.interval_width(need, 0.5) <= 0.1 < lab.interval_width(need - 1, 0.5)


def test_a_volume_of_one_value_is_outside_the_range(clean):
    cohort = clean["cohort"].copy()
    cohort.loc[cohort["stack_id"] == clean["labels"].query("role == 'train'")["stack_id"].iloc[0],
               ["hu_min", "hu_mean", "hu_max"]] = -800.0
    assert "outside-hu-range" in found(clean | {"cohort": cohort})


def test_features_are_medians_over_the_volumes_of_a_patient():
    lesions = pd.DataFrame({"stack_id": list("abc"), "patient_id": "P", "subtype": "A", "boxes": 1, "x0_mm": 0.0,
                            "x1_mm": [4.0, 6, 40], "y0_mm": 0.0, "y1_mm": 4.0, "z0_mm": 0.0, "z1_mm": 4.0})
    cohort = pd.DataFrame({"stack_id": list("abc"), "affine": [np.eye(4).ravel()] * 3, "grid_size": 3})
    row = lab.tabular_features(lesions, cohort).loc["P"]
    assert row["lateral"] == 2 and np.exp(row["log_size"]) == pytest.approx(6)


def test_the_interval_of_an_auc_holds_the_middle_of_its_draws():
    rng = np.random.default_rng(4)
    label, fold = np.repeat([0, 1], 20), np.arange(40) % 4
    scores = np.stack([1 - (p := rng.uniform(0, 0.7, 40) + 0.3 * label), p], axis=1)
    _, low, high = lab.bootstrap_auc(np.eye(2)[label], scores[None], fold[None], resamples=300, seed=7)
    lots = np.random.default_rng(7)
    drawn = np.concatenate([lots.choice(np.flatnonzero(label == c), (300, 20)) for c in (0, 1)], axis=1)
    counts = np.stack([np.bincount(row, minlength=40) for row in drawn])
    values = lab.fold_auc(np.eye(2)[label], scores, fold, counts)
    assert (low, high) == pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_a_volume_that_is_not_used_takes_no_weight_from_the_others():
    cohort, lesions = cohort_of({"P": "A"}, volumes=3)
    cohort.loc[0, "reason"] = "could not be built"
    assert sorted(lab.make_labels(cohort, lesions)["weight"]) == [0, 0.5, 0.5]


def test_lots_that_tell_as_much_as_the_labels_count_against_them():
    table = pd.DataFrame({"target": [0] * 5 + [1] * 5, "kernel": ["x"] * 5 + ["y"] * 5})
    auc, p = lab.acquisition_test(table)
    assert auc == 1 and 2 / 500 < p < 10 / 500             # 2 of 252 ways to deal five and five tell as much
