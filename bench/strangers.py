"""The network of a finished run on phantoms of another seed, which had no part in it: a test set as large as one likes.

    python bench/strangers.py runs/phantom --patients 150 --seed 1

The default course tests on twelve patients, who leave wide intervals. This makes other phantoms, carries them through
chapters 1 to 4 with the run's parameters, and asks the run's network about all that are used and annotated. The tables
that it has to beat are fitted on the run's own training patients, as in chapter 6. Prints Markdown, which becomes the
part `strangers` of a file given with `--append`.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from common import table, today_here, write_part

from lungct import course, evaluation, labels, runs, training, volumes

FOUND = {"sensitivity_at_1": "sensitivity at 1 false positive per scan", "cpm": "CPM",
         "sensitivity_at_threshold": "sensitivity at the threshold that the run's validation chose",
         "false_positives_at_threshold": "false positives per scan at that threshold"}
SAME = ("min_slices", "max_gap", "min_overlap", "grid_size", "grid_spacing_mm", "class_e")  # as in the run


@dataclass
class Cohort:
    """The tables of a run, whose patients get names that begin with `prefix`."""

    run: Path
    prefix: str = ""

    def load(self, chapter: str, name: str) -> pd.DataFrame:
        found = runs.load_table(self.run / chapter / f"{name}.parquet")
        return found.assign(patient_id=self.prefix + found["patient_id"])

    @property
    def labels(self) -> pd.DataFrame:
        return self.load("04_check_labels", "labels")

    @property
    def lesions(self) -> pd.DataFrame:
        return self.load("02_parse_annotations", "lesions")

    @property
    def accepted(self) -> pd.DataFrame:
        cohort = self.load("03_build_volumes", "cohort")
        return cohort[cohort["status"] == "accepted"]

    def features(self) -> pd.DataFrame:
        """One row a patient: what the tables know."""
        return labels.tabular_features(self.lesions, self.accepted, self.load("02_parse_annotations", "clinical"))


@dataclass
class Asked:
    """Annotated stacks of a cohort, and what the network saw in each."""

    cohort: Cohort
    stacks: pd.DataFrame
    seen: list

    def detections(self) -> pd.DataFrame:
        return evaluation.detection_table(self.stacks, [(scan.boxes_zyx, scan.scores) for scan in self.seen])


def check(run: Path, seed: int) -> None:
    """Find out at once what would be found out after minutes."""
    runs.check_finished(run, runs.CHAPTERS[:5])
    first = runs.load_manifest(run, runs.CHAPTERS[0])
    if first["inputs"]["dicom_path"]["path"]:
        raise runs.InputError(f"{run} is no run on phantoms: strangers would be of another kind")
    if first["seed"] == seed:
        raise runs.InputError(f"{run} has seed {seed} itself, its phantoms would be no strangers: give another --seed")


def first_chapters(run: Path, folder: Path, patients: int, seed: int) -> None:
    """Chapters 1 to 4 on phantoms of another seed, with the run's parameters."""
    used = {}
    for name in runs.CHAPTERS[:4]:
        used |= runs.load_manifest(run, name)["parameters"]
    wanted = {name: str(used[name]) for name in SAME} | {"phantom_patients": str(patients), "seed": str(seed)}
    planned = course.plan_course(str(folder), wanted)
    for name in runs.CHAPTERS[:4]:
        executed = folder / "notebooks" / f"{name}.ipynb"
        course.run_chapter(planned.notebooks / f"{name}.ipynb", executed, planned.parameters(name), course.Progress())


def ask(model: tuple, cohort: Cohort, roles: tuple[str, ...]) -> Asked:
    network, side_car = model
    known = cohort.labels
    known = known[known["role"].isin(roles) & (known["lesions"] > 0)].sort_values("stack_id")
    data = volumes.load_cohort(cohort.run / "03_build_volumes", known["stack_id"], pet="pet" in side_car["inputs"])
    stacks = known[["stack_id", "patient_id", "target", "lesions", "role"]].reset_index(drop=True)
    return Asked(cohort, stacks.assign(affine=data.table["affine"]),
                 training.predict(network, data.ct_hu, pet_suv=data.pet_suv))


def detection(validation: Asked, strangers: Asked) -> dict:
    """Estimates of the detector on strangers; the threshold is the one that the run's validation patients choose."""
    lesions = strangers.cohort.lesions
    metrics, _, scored = evaluation.compare_detections({"network": strangers.detections()}, lesions, strangers.stacks)
    chosen = evaluation.score_scans(validation.detections(), validation.cohort.lesions, validation.stacks)
    found = {name: metrics.get(f"detection/network/{name}") for name in FOUND}
    return found | evaluation.at_threshold(scored["network"]["centre"], evaluation.operating_threshold(chosen))


def subtypes(classes: list[str], own: Cohort, strangers: Asked) -> tuple[dict, list[str], str]:
    """Estimates of the network and of each table on strangers, the names of the tables, and the classes averaged."""
    probabilities = np.array([scan.probabilities for scan in strangers.seen])
    by_scan = evaluation.prediction_table(strangers.stacks, np.zeros(len(probabilities)), probabilities, classes)
    ours = evaluation.patient_probabilities(by_scan[by_scan["subtype"].notna()], classes)
    truth = ours["subtype"].map({name: k for k, name in enumerate(classes)}).to_numpy(int)
    columns, trained = [f"p_{name}" for name in classes], own.labels
    features = pd.concat([own.features(), strangers.cohort.features()])
    settings = evaluation.acquisition_features(own.accepted)
    theirs = evaluation.acquisition_features(strangers.cohort.accepted).reindex(columns=settings.columns, fill_value=0)

    def answered(rows, used):
        return labels.baseline_probabilities(rows, trained, used)[columns].reindex(ours["patient_id"]).to_numpy(float)

    tables = {f"tabular_{name.replace(' + ', '_')}": answered(features, list(used))
              for name, used in labels.FEATURE_SETS.items() if set(used) <= set(features)}
    tables["acquisition"] = answered(pd.concat([settings, theirs]), list(settings))
    answers = {"network": ours[columns].to_numpy(float)} | tables
    metrics, _ = evaluation.compare_subtypes(answers, truth, classes, ours["patient_id"])
    averaged = ", ".join(classes[k] for k in evaluation.averaged_classes(truth, len(classes)))
    return metrics, list(tables), averaged


def subtype_table(classes: list[str], own: Cohort, strangers: Asked) -> str:
    named, tables, averaged = subtypes(classes, own, strangers)
    spoken = {name: name.replace("_", " ") for name in ("network", *tables)}
    spoken |= {f"network_minus_{name}": f"network less {spoken[name]}" for name in tables}
    rows = [(title, *(str(named[f"subtype/{name}/{metric}"]) for metric in ("balanced_accuracy", "auc_macro")))
            for name, title in spoken.items()]
    return table("Subtypes of strangers", "model | balanced accuracy | mean AUC", rows,
                 f"Means over {averaged}. Tables are fitted on the training patients of that run.")


def sections(run: Path, folder: Path, model: tuple, seed: int) -> str:
    own, others, classes = Cohort(run), Cohort(folder, "S-"), model[1]["classes"]
    strangers = ask(model, others, labels.ROLES)
    found, stacks = detection(ask(model, own, ("validation",)), strangers), strangers.stacks
    what = (f"{stacks['patient_id'].nunique()} phantoms of seed {seed}, {len(stacks)} scans, {stacks['lesions'].sum()} "
            f"lesions; the network of the run `{run.name}`. All are phantom numbers.")
    rows = [(text, str(found[name])) for name, text in FOUND.items()]
    known = classes == labels.class_names(others.labels)
    named = subtype_table(classes, own, strangers) if known else "No subtypes: the network tells others apart.\n"
    return "\n".join([today_here(what), table("Tumours found in strangers", "what | estimate", rows), named])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run on phantoms")
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1, help="of the phantoms; another than the run's")
    parser.add_argument("--append", type=Path, help="Markdown file whose part `strangers` it becomes")
    wanted = parser.parse_args()
    with course.plain_errors(str(wanted.run)), tempfile.TemporaryDirectory() as scratch:
        run = wanted.run.absolute()
        check(run, wanted.seed)
        model = training.load_model(run / "05_train_3d_cnn")
        first_chapters(run, Path(scratch), wanted.patients, wanted.seed)
        text = sections(run, Path(scratch), model, wanted.seed)
    print(text)
    if wanted.append:
        write_part(wanted.append, "strangers", text)


if __name__ == "__main__":
    main()
