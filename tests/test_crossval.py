"""Cross-validation: roles of the folds, run folders of the folds, and the merge over patients."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lungct import course, crossval, evaluation, labels, runs

PATIENTS = [f"P{i:02}" for i in range(15)]
CORNERS = evaluation.CORNERS_MM


def made_up_labels():
    """Two scans a patient; P00 and P01 share a study; the last scan of P14 is unused."""
    rows = [{"stack_id": f"{p}_{k}", "patient_id": p, "study_uid": "one" if p in PATIENTS[:2] else p, "vendor": "GE",
             "target": i % 2, "subtype": "AG"[i % 2], "lesions": 1, "role": "train", "reason": None}
            for i, p in enumerate(PATIENTS) for k in "ab"]
    rows[-1] |= {"target": -1, "role": "unused", "reason": "no lesion boxes", "lesions": 0}
    return pd.DataFrame(rows)


@pytest.fixture
def run_dir(tmp_path):
    runs.save_table(made_up_labels(), tmp_path / "04_check_labels" / "labels.parquet")
    runs.save_json({"classes": ["A", "G"]}, tmp_path / "04_check_labels" / "audit.json")
    lesions = [{"lesion_id": f"{p}_{k}", "stack_id": f"{p}_{k}", "patient_id": p} | dict.fromkeys(CORNERS[:3], 0.0)
               | dict.fromkeys(CORNERS[3:], 10.0) for p in PATIENTS for k in "ab"]
    runs.save_table(pd.DataFrame(lesions[:-1]), tmp_path / "02_parse_annotations" / "lesions.parquet")
    for name in runs.CHAPTERS[:4]:
        outputs = {path.name: runs.hash_file(path) for path in (tmp_path / name).glob("*")}
        manifest = {"schema": runs.SCHEMA_VERSION, "seed": 3, "parameters": {}, "needs": {}, "code": "",
                    "inputs": {"locked_path": {"path": "", "fingerprint": ""}}, "outputs": outputs}
        runs.save_json(manifest, tmp_path / name / runs.MANIFEST)
    return tmp_path


@pytest.mark.parametrize("name", ["02_parse_annotations/lesions.parquet", "04_check_labels/labels.parquet"])
def test_folds_are_not_made_of_damaged_tables(run_dir, name):
    crossval.make_folds(run_dir, 3)
    runs.save_table(runs.load_table(run_dir / name).iloc[:1], run_dir / name)
    chapter, file = name.split("/")
    with pytest.raises(runs.InputError, match=rf"{chapter} of run .*: its output {file} is missing or damaged; call"):
        crossval.make_folds(run_dir, 3)


def test_every_patient_tests_once_and_tied_patients_stay_together():
    tables = crossval.fold_labels(made_up_labels(), folds=5, seed=1)
    used = [table[table["target"] >= 0] for table in tables]
    tested = pd.concat([t[t["role"] == "test"].drop_duplicates("patient_id")["patient_id"] for t in used])
    assert sorted(tested) == PATIENTS
    for table in used:
        roles = table.groupby("patient_id")["role"]
        assert roles.nunique().max() == 1 and roles.first()["P00"] == roles.first()["P01"]
        assert set(table["role"]) == {"train", "validation", "test"}
        assert labels.shared_between_roles(table, "study_uid").to_numpy().sum() == 14       # all on the diagonal
    assert all(set(t.loc[t["target"] < 0, "role"]) == {"unused"} for t in tables)


def test_locked_patients_take_no_part():
    locked = ["P03", "P07"]
    for table in crossval.fold_labels(made_up_labels(), folds=3, locked=locked):
        assert set(table.loc[table["patient_id"].isin(locked), "role"]) == {"unused"}
        assert (table["role"] != "unused").sum() == 30 - 1 - 4


def test_two_folds_leave_nobody_to_train():
    with pytest.raises(runs.InputError, match="2 folds: expected 3 or more"):
        crossval.fold_labels(made_up_labels(), folds=2)
    with pytest.raises(runs.InputError, match="40 folds for 14 patient groups"):
        crossval.fold_labels(made_up_labels(), folds=40)


def test_a_fold_is_a_run_folder(run_dir):
    places = crossval.make_folds(run_dir, 3)
    assert [place.relative_to(run_dir).as_posix() for place in places] == [f"folds/{k}_of_3" for k in (1, 2, 3)]
    for place in places:
        assert (place / "02_parse_annotations").resolve() == run_dir / "02_parse_annotations"
        assert not (place / "02_parse_annotations").readlink().is_absolute()
        manifest = runs.load_manifest(place, "04_check_labels")
        stored = {name: runs.hash_file(place / "04_check_labels" / name) for name in manifest["outputs"]}
        assert manifest["outputs"] == stored and manifest["outputs_hash"] == runs.hash_value(stored)
    before = [runs.load_manifest(place, "04_check_labels")["outputs_hash"] for place in places]
    assert before == [runs.load_manifest(p, "04_check_labels")["outputs_hash"] for p in crossval.make_folds(run_dir, 3)]
    assert len(set(before)) == 3


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(runs.InputError, match=r"lacks 01_explore_dicom, .*finish it with lungct run"):
        crossval.make_folds(tmp_path, 3)
    done = CliRunner().invoke(course.app, ["crossval", "--run-dir", str(tmp_path), "--folds", "3"])
    assert done.exit_code == 2


def answer(place, rng):
    """What chapter 6 leaves in a fold, from a network that is right more often than not."""
    table = runs.load_table(place / "04_check_labels" / "labels.parquet")
    test = table[(table["role"] == "test") & (table["lesions"] > 0)]
    shift = rng.choice([0.0, 30.0], len(test), p=[0.7, 0.3])
    found = test[["stack_id", "patient_id", "role"]].assign(rank=1, score=rng.random(len(test)).round(3))
    for k, name in enumerate(CORNERS):
        found[name] = shift + (10.0 if k > 2 else 0.0)
    empty = found.assign(outcome="", lesion_id="", iou=0.0, distance_mm=0.0)
    patients = test.drop_duplicates("patient_id").sort_values("patient_id")
    p = np.clip(patients["target"] * 0.4 + rng.uniform(0, 0.6, len(patients)), 0, 1).to_numpy()
    by_model = [patients[["patient_id", "subtype"]].assign(model=name, p_A=1 - q, p_G=q)
                for name, q in (("majority", np.full(len(p), 0.4)), ("tabular", rng.permutation(p)), ("network", p))]
    metric = {"estimable": True, "value": 0.5, "low": 0, "high": 1, "n": 1, "unit": "", "reason": None}
    folder = place / "06_evaluate"
    runs.save_table(empty, folder / "detections.parquet")
    runs.save_table(found.assign(model="wrong_scans", score=0.1), folder / "controls.parquet")
    runs.save_table(pd.concat(by_model), folder / "answers.parquet")
    runs.save_json({"data": "phantoms", "counts": {"test": {"patients": len(patients)}},
                    "metrics": dict.fromkeys(crossval.FOR_EACH_FOLD, metric)}, folder / "metrics.json")
    runs.save_json({"schema": runs.SCHEMA_VERSION}, folder / runs.MANIFEST)
    return found, pd.concat(by_model), test


def test_the_merge_is_an_evaluation_over_all_patients(run_dir):
    places, rng = crossval.make_folds(run_dir, 5), np.random.default_rng(0)
    with pytest.raises(runs.InputError, match="folds 1_of_5, 2_of_5, .*have not finished"):
        crossval.merge_folds(run_dir, 5)
    found, answers, scans = (pd.concat(parts, ignore_index=True) for parts in
                             zip(*[answer(place, rng) for place in places], strict=True))
    merged = crossval.merge_folds(run_dir, 5, n=60, seed=2)
    lesions = runs.load_table(run_dir / "02_parse_annotations" / "lesions.parquet")
    expected = evaluation.score_scans(found, lesions, scans)
    value = merged["metrics"]["detection/network/sensitivity_at_1"]
    sensitivity = evaluation.sensitivity_at(evaluation.froc(expected), 1)
    assert value["n"] == 15 and value["value"] == pytest.approx(sensitivity, abs=1e-6)
    network = answers[answers["model"] == "network"].sort_values("patient_id")
    truth = (network["subtype"] == "G").to_numpy(int)
    scores = evaluation.subtype_scores(truth, network[["p_A", "p_G"]].to_numpy())
    assert merged["metrics"]["subtype/network/auc_macro"]["value"] == pytest.approx(scores["auc_macro"], abs=1e-6)
    assert merged["metrics"]["subtype/network/auc_macro"]["n"] == 15
    assert merged["metrics"]["subtype/network_minus_tabular/balanced_accuracy"]["estimable"]
    assert "detection/network_minus_wrong_scans/cpm" in merged["metrics"]
    assert sum(row["patients"] for row in merged["folds"]) == 15
    assert "15 phantom test patients" in str(merged["headline"])
    assert {"Subtype, balanced accuracy over A, G", "Subtype, mean AUC over A, G"} <= {
        line["label"] for line in merged["headline"]}
    first = (run_dir / "crossval" / "metrics.json").read_bytes()
    crossval.merge_folds(run_dir, 5, n=60, seed=2)
    assert (run_dir / "crossval" / "metrics.json").read_bytes() == first
    assert json.loads(first)["bootstrap_samples"] == 60


def test_a_fold_runs_what_is_stale_with_the_parameters_of_the_run(run_dir, monkeypatch, tmp_path):
    manifest = {"schema": runs.SCHEMA_VERSION, "seed": 7, "parameters": {"epochs": 11, "filters": "8 16"}}
    runs.save_json(manifest, run_dir / "05_train_3d_cnn" / runs.MANIFEST)
    plan = course.plan_course(str(run_dir), {"filters": "8 8"})
    place = crossval.make_folds(run_dir, 3)[0]
    chosen = course.fold_parameters(plan, place)
    train = chosen["05_train_3d_cnn"]
    assert (train["epochs"], train["filters"], train["seed"], train["run_dir"]) == (11, "8 8", 7, str(place))
    ran = []
    monkeypatch.setattr(course, "run_chapter", lambda notebook, executed, parameters, progress: ran.append(
        (notebook.stem, executed.relative_to(place).as_posix(), parameters["run_dir"])))
    assert course.run_fold(plan.notebooks, place, chosen) == "1_of_3"
    assert ran == [(name, f"notebooks/{name}.ipynb", str(place)) for name in runs.CHAPTERS[4:]]
    monkeypatch.setattr(course, "reasons_to_run", lambda *a: [])
    course.run_fold(plan.notebooks, place, chosen)
    assert len(ran) == 2, "a fold that is done is passed over"


def test_folds_run_on_a_dask_scheduler(run_dir, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(course, "reasons_to_run", lambda *a: [])
    plan, said = course.plan_course(str(run_dir), {}), []
    with distributed.LocalCluster(1, processes=False, dashboard_address=None) as cluster:
        course.run_folds(plan, crossval.make_folds(run_dir, 3), 1, cluster.scheduler_address, said.append)
    assert sorted(line.split(":")[0] for line in said) == [f"fold {k}_of_3" for k in (1, 2, 3)]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "head"])
def test_an_unreachable_scheduler_is_one_line_within_seconds(run_dir, address):
    pytest.importorskip("distributed")
    began = time.monotonic()
    done = CliRunner().invoke(course.app, ["crossval", "--run-dir", str(run_dir), "--folds", "3",
                                           "--scheduler", address])
    assert done.exit_code == 2 and time.monotonic() - began < 20
    assert f"no dask scheduler answers at '{address}'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_folds_are_dealt_by_the_seed_of_the_run(run_dir):
    def roles(tables):
        return [table.sort_values("stack_id")["role"].tolist() for table in tables]

    made = roles(runs.load_table(place / "04_check_labels" / "labels.parquet")
                 for place in crossval.make_folds(run_dir, 3))
    assert made == roles(crossval.fold_labels(made_up_labels(), 3, seed=3))       # that of the manifest
    assert made != roles(crossval.fold_labels(made_up_labels(), 3, seed=0))


def answered(run_dir):
    """Five folds in which chapter 6 has finished."""
    places, rng = crossval.make_folds(run_dir, 5), np.random.default_rng(0)
    for place in places:
        answer(place, rng)
    return places


def test_the_headline_holds_the_merged_numbers(run_dir):
    answered(run_dir)
    merged = crossval.merge_folds(run_dir, 5, n=60)
    texts = {line["label"]: line["text"] for line in merged["headline"]}
    value = merged["metrics"]["subtype/network/auc_macro"]["value"]
    assert texts["Subtype, mean AUC over A, G"].startswith(f"{value:.2f} [")
    found = merged["metrics"]["detection/network/cpm"]["value"]
    assert texts["Mean sensitivity from 1/8 to 8 false positives per scan (CPM)"].startswith(f"{found:.2f} [")


def test_a_network_that_names_no_subtype_in_one_fold_has_no_merged_subtype(run_dir):
    path = answered(run_dir)[2] / "06_evaluate" / "answers.parquet"
    table = runs.load_table(path)
    runs.save_table(table[table["model"] != "network"], path)
    merged = crossval.merge_folds(run_dir, 5, n=20)
    assert "subtype/tabular/auc_macro" in merged["metrics"] and "subtype/network/auc_macro" not in merged["metrics"]
    texts = {line["label"]: line["text"] for line in merged["headline"]}
    withheld = "not estimable: the network has no subtype head in some fold (15 phantom test patients)"
    assert texts["Subtype, mean AUC over A, G"] == withheld


def test_the_locked_patients_of_the_run_take_no_part_in_its_folds(run_dir):
    (run_dir / "locked.txt").write_text("P03\nP07\n")
    path = run_dir / "04_check_labels" / runs.MANIFEST
    manifest = runs.load_json(path)
    manifest["inputs"]["locked_path"]["path"] = str(run_dir / "locked.txt")
    runs.save_json(manifest, path)
    for place in crossval.make_folds(run_dir, 3):
        table = runs.load_table(place / "04_check_labels" / "labels.parquet")
        assert set(table.loc[table["patient_id"].isin(["P03", "P07"]), "role"]) == {"unused"}


def test_a_seed_reaches_the_intervals_of_the_merge(run_dir):
    answered(run_dir)
    first, other = (crossval.merge_folds(run_dir, 5, n=37, seed=seed)["metrics"] for seed in (0, 6))
    for name in ("detection/network/cpm", "subtype/network/auc_macro"):
        assert first[name]["value"] == other[name]["value"]
        assert (first[name]["low"], first[name]["high"]) != (other[name]["low"], other[name]["high"])
