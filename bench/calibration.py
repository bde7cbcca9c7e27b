"""How often the audit's statistical checks cry wolf on clean cohorts, 200 of each kind. No speed is measured here."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from common import goal, publish, table, today_here
from scipy.stats import binomtest

from lungct import labels, phantom

SEEDS, MOST = 200, 5.0
COLLECTION = {"A": 251, "B": 38, "E": 5, "G": 61}  # patients in metadata.csv
SCANNED = ["manufacturer", "kernel", "slice_thickness_mm", "slices"]


def on_paper(seed: int) -> dict:
    """The default phantoms without faults: scanners, kernels and slices as planned, and not a pixel drawn."""
    plans = phantom.plan_cohort(sum(phantom.MIX.values()), seed, quirks=())
    cohort = labels.example_cohort(phantom.MIX, seed)["cohort"].drop(columns=SCANNED)
    scanned = pd.DataFrame([acquisition(plan) for plan in plans])
    return labels.example_tables(cohort.merge(scanned, on="patient_id"), np.random.default_rng(seed), seed)


def acquisition(plan: phantom.Plan) -> dict:
    """What the header of a phantom's first series will say: the same draws as when it is written."""
    rng = phantom.named_rng(plan.seed, plan.patient, "visit", 0)
    study = phantom.plan_study(plan, 0, rng)
    scan = phantom.plan_scan(plan, phantom.draw_patient(plan)[0], rng)
    header = phantom.ct_series(plan, study, scan, 2, "soft").header
    values = (plan.vendor, str(header.ConvolutionKernel), scan.thickness_mm, len(scan.z_mm))
    return {"patient_id": plan.patient_id, **dict(zip(SCANNED, values, strict=True))}


def alarms(make: Callable[[int], dict]) -> tuple[int, Counter, int]:
    """Cohorts with a false alarm, alarms by check, and patients of a cohort."""
    found = [labels.audit_false_alarms(make(seed)) for seed in range(SEEDS)]
    patients = make(0)["cohort"]["patient_id"].nunique()
    return sum(map(bool, found)), Counter(name for names in found for name in names), patients


def row(what: str, count: int, by_check: Counter, patients: int) -> list[str]:
    interval = binomtest(count, SEEDS).proportion_ci(method="wilson")
    named = ", ".join(f"{name} {n}" for name, n in by_check.items()) or "none"
    return [what, str(patients), f"{count} of {SEEDS}", f"{count / SEEDS:.1%}",
            f"{interval.low:.1%} to {interval.high:.1%}", named]


def sections(scratch: Path) -> list[str]:
    kinds = {"phantoms on paper": on_paper, "made-up tables": lambda seed: labels.example_cohort(seed=seed),
             "made-up tables, the collection's subtypes": partial(labels.example_cohort, COLLECTION)}
    found = {what: alarms(make) for what, make in kinds.items()}
    note = (f"A warning or error of {', '.join(labels.STATISTICAL)} on a cohort without a fault. The seed deals the "
            "patients, their scanners, their roles and the checks' own lots.")
    columns = "clean cohorts | patients each | with a false alarm | rate | 95 % interval | alarms by check"
    worst = max(count for count, *_ in found.values())
    return [today_here(f"{SEEDS} seeds of each kind."),
            table("False alarms of the label audit", columns, [row(what, *each) for what, each in found.items()], note),
            goal("cohorts with a false alarm, the worst kind, %", f"{MOST:.0f} or less", 100 * worst / SEEDS) + "\n"]


if __name__ == "__main__":
    publish("calibration", sections)
