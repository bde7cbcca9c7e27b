"""The network of a finished run on phantoms of another seed, which had no part in it: a test set as large as one likes.

    python bench/strangers.py runs/phantom --patients 150 --seed 1

The default course tests on twelve patients, who leave wide intervals. This makes other phantoms, carries them through
chapters 1 to 4, and asks the run's network about all that are annotated. The tables that it has to beat are fitted on
the run's own training patients, as in chapter 6. Prints Markdown; `--append FILE` makes it the part `strangers` there.
"""

import argparse
import datetime
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from common import table, write_part

from lungct import course, evaluation, labels, runs, training, volumes

FOUND = {"sensitivity_at_1": "sensitivity at 1 false positive per scan", "cpm": "CPM",
         "sensitivity_at_threshold": "sensitivity at the threshold that the run's validation chose",
         "false_positives_at_threshold": "false positives per scan at that threshold"}


@dataclass
class Cohort:
    """What chapters 2 to 4 say of a run's patients, whose names begin with `prefix`, and its volumes when asked for."""

    run: Path
    prefix: str = ""

    def load(self, chapter: str, name: str) -> pd.DataFrame:
        found = runs.load_table(self.run / chapter / f"{name}.parquet")
        return found.assign(patient_id=self.prefix + found["patient_id"])

    @property
    def labels(self) -> pd.DataFrame:
        return self.load("04_check_labels", "labels")

    def features(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row a patient: what the tables know, and the scanner's settings."""
        cohort = self.load("03_build_volumes", "cohort")
        cohort = cohort[cohort["status"] == "accepted"]
        lesions, clinical = (self.load("02_parse_annotations", name) for name in ("lesions", "clinical"))
        return labels.tabular_features(lesions, cohort, clinical), cohort


def first_chapters(folder: Path, patients: int, seed: int) -> None:
    planned = course.plan_course(str(folder), {"phantom_patients": str(patients), "seed": str(seed)})
    for name in runs.CHAPTERS[:4]:
        executed = folder / "notebooks" / f"{name}.ipynb"
        course.run_chapter(planned.notebooks / f"{name}.ipynb", executed, planned.parameters(name), course.Progress())


def asked(model: Path, cohort: Cohort) -> tuple[pd.DataFrame, list, dict]:
    """(used and annotated stacks, what the network saw in each, the model's side-car)."""
    network, side_car = training.load_model(model)
    known = cohort.labels
    if (classes := labels.class_names(known)) != side_car["classes"]:
        raise SystemExit(f"strangers have subtypes {classes}, the network knows {side_car['classes']}: more patients")
    known = known[known["role"].isin(labels.ROLES) & (known["lesions"] > 0)].sort_values("stack_id")
    data = volumes.load_cohort(cohort.run / "03_build_volumes", known["stack_id"], pet="pet" in side_car["inputs"])
    facts = known[["stack_id", "patient_id", "target", "lesions", "role"]].reset_index(drop=True)
    seen = training.predict(network, data.ct_hu, pet_suv=data.pet_suv)
    return facts.assign(affine=data.table["affine"]), seen, side_car


def detection(model: Path, own: Cohort, strangers: Cohort) -> tuple[dict, int]:
    """Estimates of the detector on strangers, and how many lesions they have; the threshold is that of the run."""
    scored, lesions = {}, {}
    for name, cohort in (("own", own), ("strangers", strangers)):
        stacks, seen, _ = asked(model, cohort)
        stacks = stacks[stacks["role"] == "validation"] if name == "own" else stacks
        lesions[name] = cohort.load("02_parse_annotations", "lesions")
        boxes = evaluation.detection_table(stacks, [(seen[i].boxes_zyx, seen[i].scores) for i in stacks.index])
        scored[name] = evaluation.score_rules(boxes, lesions[name], stacks)["centre"]
        proposals, scans = {"network": boxes}, stacks
    metrics, _, _ = evaluation.compare_detections(proposals, lesions["strangers"], scans)
    threshold = evaluation.operating_threshold(scored["own"])
    found = {name: metrics.get(f"detection/network/{name}") for name in FOUND}
    count = int(lesions["strangers"]["stack_id"].isin(scans["stack_id"]).sum())
    return found | evaluation.at_threshold(scored["strangers"], threshold), count


def subtypes(model: Path, own: Cohort, strangers: Cohort) -> tuple[dict, list[str]]:
    """Estimates of the network and of each table on the strangers, and the names of the tables."""
    stacks, seen, side_car = asked(model, strangers)
    classes = side_car["classes"]
    probabilities = np.array([scan.probabilities for scan in seen])
    by_scan = evaluation.prediction_table(stacks, np.zeros(len(stacks)), probabilities, classes)
    ours = evaluation.patient_probabilities(by_scan[by_scan["subtype"].notna()], classes)
    truth = ours["subtype"].map({name: k for k, name in enumerate(classes)}).to_numpy(int)
    columns = [f"p_{name}" for name in classes]
    trained = own.labels
    pairs = [cohort.features() for cohort in (own, strangers)]
    features = pd.concat([features for features, _ in pairs])
    settings = evaluation.acquisition_features(pd.concat([cohort for _, cohort in pairs], ignore_index=True))

    def answered(rows, used):
        return labels.baseline_probabilities(rows, trained, used)[columns].reindex(ours["patient_id"]).to_numpy(float)

    tables = {f"tabular_{name.replace(' + ', '_')}": answered(features, list(used))
              for name, used in labels.FEATURE_SETS.items() if set(used) <= set(features)}
    tables["acquisition"] = answered(settings, list(settings))
    answers = {"network": ours[columns].to_numpy(float)} | tables
    metrics, _ = evaluation.compare_subtypes(answers, truth, classes, ours["patient_id"])
    return metrics, list(tables)


def sections(run: Path, folder: Path, patients: int, seed: int) -> str:
    own, strangers, model = Cohort(run), Cohort(folder, "S-"), run / "05_train_3d_cnn"
    found, lesions = detection(model, own, strangers)
    named, tables = subtypes(model, own, strangers)
    scans = strangers.labels.query("lesions > 0 and role in @labels.ROLES")
    what = (f"{scans['patient_id'].nunique()} of {patients} phantoms of seed {seed}, {len(scans)} scans, "
            f"{lesions} lesions; the network of {run.name}. All are phantom numbers.")
    rows = [(text, found[name]) for name, text in FOUND.items()]
    one = table("Tumours found in strangers", "what | estimate", [(text, str(value)) for text, value in rows], what)
    both = ("balanced_accuracy", "auc_macro")
    lines = [(f"network less {name.replace('_', ' ')}",
              *(str(named[f"subtype/network_minus_{name}/{metric}"]) for metric in both)) for name in tables]
    lines = [(name.replace("_", " "), *(str(named[f"subtype/{name}/{metric}"]) for metric in both))
             for name in ("network", *tables)] + lines
    two = table("Subtypes of strangers", "model | balanced accuracy | mean AUC", lines)
    return f"{datetime.date.today()}\n\n{one}\n{two}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run on phantoms")
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1, help="of the phantoms; another than the run's")
    parser.add_argument("--append", type=Path, help="Markdown file whose part `strangers` it becomes")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        first_chapters(Path(scratch), wanted.patients, wanted.seed)
        text = sections(wanted.run, Path(scratch), wanted.patients, wanted.seed)
    print(text)
    if wanted.append:
        write_part(wanted.append, "strangers", text)


if __name__ == "__main__":
    main()
