"""The whole course through the command line: tiny phantoms, a kill in chapter 3, single chapters, real series."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lungct import runs

LUNGCT = [sys.executable, "-c", "from lungct.course import main; main()"]
SMALL = ["-p", "phantom_patients", "10", "-p", "epochs", "2", "-p", "filters", "8 16 16", "-p", "grid_size", "32",
         "-p", "grid_spacing_mm", "12", "-p", "bootstrap_samples", "100",
         "-p", "pet", "True", "-p", "predecessor_epochs", "1"]  # off, and five, in `make run`
CURVE = ["-p", "learning_curve_epochs", "1"]  # a picture, no file: three more trainings that nothing else needs
COLUMNS = {
    "01_explore_dicom/instances.parquet": "path patient_id study_uid series_uid sop_uid modality",
    "01_explore_dicom/stacks.parquet": "stack_id series_uid patient_id modality slices spacing_mm status reason",
    "01_explore_dicom/problems.parquet": "path reason",
    "02_parse_annotations/boxes.parquet": "file patient_id sop_uid label subtype xmin ymin xmax ymax",
    "02_parse_annotations/ledger.parquet": "file patient_id sop_uid outcome stack_id",
    "02_parse_annotations/lesions.parquet": "lesion_id stack_id patient_id subtype x0_mm y0_mm z0_mm x1_mm y1_mm z1_mm",
    "02_parse_annotations/problems.parquet": "file reason",
    "03_build_volumes/cohort.parquet": "stack_id patient_id file status",
    "04_check_labels/labels.parquet": "stack_id patient_id target role",
    "06_evaluate/predictions.parquet": "stack_id patient_id role score",
}
FILES = ["04_check_labels/audit.json", "05_train_3d_cnn/model.keras", "05_train_3d_cnn/history.csv",
         "06_evaluate/metrics.json", "06_evaluate/model_card.md", "report/index.html"]


def lungct(*arguments, cwd=None, seconds=600):
    return subprocess.run([*LUNGCT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=seconds)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The whole course on phantoms, killed in chapter 3 and called again."""
    run_dir = tmp_path_factory.mktemp("course") / "small"
    command = [*LUNGCT, "run", "--run-dir", str(run_dir), *SMALL, *CURVE]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list((run_dir / "03_build_volumes" / "volumes").glob("*.npz"))) < 3:
        assert child.poll() is None and time.monotonic() < deadline, "chapter 3 did not begin to write volumes"
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert runs.load_manifest(run_dir, "03_build_volumes") is None
    done = lungct("run", "--run-dir", run_dir, *SMALL, *CURVE)
    assert done.returncode == 0, done.stderr
    return run_dir, done


@pytest.fixture(scope="module")
def real_run(real_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("course") / "real"
    done = lungct("run", "--dicom-path", real_data / "Lung-PET-CT-Dx", "--annotation-path", real_data / "Annotation",
                  "--run-dir", run_dir, "-p", "epochs", "3")
    assert done.returncode == 0, done.stderr
    return run_dir, done


def check_contracts(run_dir):
    for name, columns in COLUMNS.items():
        assert set(columns.split()) <= set(pd.read_parquet(run_dir / name).columns), name
    for name in FILES:
        assert (run_dir / name).stat().st_size > 0, name
    for name in runs.CHAPTERS:
        manifest = runs.load_json(run_dir / name / "manifest.json")
        assert {"schema", "parameters", "inputs", "seed", "packages", "seconds", "outputs"} <= set(manifest)
        assert (run_dir / "notebooks" / f"{name}.ipynb").is_file()


def outputs(run_dir):
    return {name: runs.load_manifest(run_dir, name)["outputs"] for name in runs.CHAPTERS}


def test_the_course_on_phantoms_keeps_its_contracts(small_run):
    run_dir, done = small_run
    check_contracts(run_dir)
    assert f"Report: {run_dir / 'report' / 'index.html'}" in done.stdout
    assert "hantom" in done.stdout, "headline numbers from phantoms say so"
    assert "\x1b" not in done.stderr + done.stdout and "\r" not in done.stderr
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr


def test_every_annotation_file_has_one_outcome_and_every_image_is_accounted_for(small_run):
    run_dir, _ = small_run
    xml = sorted(p.relative_to(run_dir / "phantom" / "Annotation").as_posix()
                 for p in (run_dir / "phantom" / "Annotation").rglob("*.xml"))
    ledger = pd.read_parquet(run_dir / "02_parse_annotations" / "ledger.parquet")
    assert sorted(ledger["file"]) == xml and ledger["outcome"].notna().all()
    files = [p for p in (run_dir / "phantom" / "Lung-PET-CT-Dx").rglob("*") if p.is_file()]
    read = pd.read_parquet(run_dir / "01_explore_dicom" / "instances.parquet")
    problems = pd.read_parquet(run_dir / "01_explore_dicom" / "problems.parquet")
    assert len(read) + len(problems) == len(files)


def test_no_patient_has_two_roles(small_run):
    labels = pd.read_parquet(small_run[0] / "04_check_labels" / "labels.parquet")
    used = labels[labels["role"] != "unused"]
    assert used.groupby("patient_id")["role"].nunique().max() == 1
    assert set(used["role"]) == {"train", "validation", "test"}


def test_a_second_call_has_nothing_to_do(small_run):
    done = lungct("run", "--run-dir", small_run[0], *SMALL, *CURVE)
    assert done.returncode == 0 and done.stderr.count("already done") == 6


def test_the_report_is_self_contained(small_run):
    page = (small_run[0] / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'<(?:img|script|link|iframe)[^>]+(?:src|href)="(?!data:)', page)
    assert "<script" not in page and "say nothing about patients" in page and "Not for clinical use" in page
    images = re.findall(r"<img[^>]*>", page)
    assert images and all(re.search(r'alt="[^"]+"', image) for image in images)
    assert "Every file below the images was read as an image." in page
    assert "annotation files or folders had a problem" in page and "CT stacks was built." in page
    metrics = runs.load_json(small_run[0] / "06_evaluate" / "metrics.json")["metrics"]
    assert "subtype/predecessor/balanced_accuracy" in metrics and ">predecessor<" in page


def test_a_run_killed_in_chapter_3_goes_on_there(small_run):
    """That it ends like an undisturbed one is seen below, where chapter 3 has nothing to go on from."""
    assert small_run[1].stderr.count("already done") == 2


@pytest.mark.parametrize("name", runs.CHAPTERS)
def test_each_chapter_runs_alone_under_papermill(small_run, tmp_path, name):
    run_dir = tmp_path / "copy"
    shutil.copytree(small_run[0], run_dir)
    before, given = outputs(run_dir)[name], runs.load_manifest(run_dir, name)["parameters"]
    if name == "03_build_volumes":
        shutil.rmtree(run_dir / name)
    root = Path(runs.__file__).resolve().parents[1]
    known = dict(zip(SMALL[1::3], SMALL[2::3], strict=True))
    wanted = [word for key in given if key in known for word in ("-p", key, known[key])]
    command = [sys.executable, "-m", "papermill", root / "nbs" / f"{name}.ipynb", tmp_path / "out.ipynb",
               "--no-progress-bar", "--no-request-save-on-cell-execute",  # a save at each cell takes longer than most
               "-p", "run_dir", run_dir, *wanted]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert outputs(run_dir)[name] == before, "the same chapter on the same inputs leaves the same bytes"


def test_predict_on_a_series_of_the_phantoms(small_run, tmp_path):
    run_dir, _ = small_run
    stacks = pd.read_parquet(run_dir / "01_explore_dicom" / "stacks.parquet")
    instances = pd.read_parquet(run_dir / "01_explore_dicom" / "instances.parquet")
    chosen = stacks[(stacks["status"] == "accepted") & (stacks["modality"] == "CT")]["stack_id"].iloc[0]
    path = instances[instances["stack_id"] == chosen]["path"].iloc[0]
    series = (run_dir / "phantom" / "Lung-PET-CT-Dx" / path).parent
    model = run_dir / "05_train_3d_cnn" / "model.keras"
    done = lungct("predict", series, "--model", model, "--out", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    written = {p.suffix for p in (tmp_path / "found").rglob("*") if p.is_file()}
    assert {".json", ".csv"} <= written
    text = "\n".join(p.read_text() for p in (tmp_path / "found").rglob("*.json"))
    assert "Lung_Dx-" not in text, "patient IDs stay hidden unless asked for"


def test_annotations_that_match_nothing_are_refused(small_run, tmp_path):
    folder = tmp_path / "xml" / "A0001"
    folder.mkdir(parents=True)
    (folder / "1.2.3.xml").write_text("<annotation><object><name>A</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
                                      "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
    dicom = tmp_path / "dicom"
    for patient in sorted((small_run[0] / "phantom" / "Lung-PET-CT-Dx").glob("Lung_Dx-*"))[:2]:
        shutil.copytree(patient, dicom / patient.name)
    done = lungct("run", "--dicom-path", dicom, "--annotation-path", tmp_path / "xml", "--run-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lungct: ") and "annotation" in last.lower()
    assert not (tmp_path / "run" / "02_parse_annotations").exists()


def test_real_series_go_through_all_chapters(real_run):
    run_dir, done = real_run
    check_contracts(run_dir)
    assert "not estimable" in done.stdout
    assert "too few to learn from" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    metrics = json.loads((run_dir / "06_evaluate" / "metrics.json").read_text())["metrics"]
    for name, metric in metrics.items():
        assert metric["estimable"] is False or metric["n"] >= 5, f"{name} from {metric['n']} patients"
        assert metric["estimable"] or (metric["value"] is None and metric["reason"])


def test_real_phases_are_apart_and_fragments_are_told(real_run):
    stacks = pd.read_parquet(real_run[0] / "01_explore_dicom" / "stacks.parquet")
    phases = stacks[(stacks["patient_id"] == "Lung_Dx-E0003")].groupby("series_uid").size()
    assert phases.max() == 3
    fragments = stacks[(stacks["patient_id"] == "Lung_Dx-A0003") & (stacks["slices"] < 8)]
    assert len(fragments) == 3 and set(fragments["status"]) == {"excluded"} and fragments["reason"].notna().all()


def test_real_labels_keep_their_letter(real_run):
    lesions = pd.read_parquet(real_run[0] / "02_parse_annotations" / "lesions.parquet")
    letters = lesions["patient_id"].str.extract(r"Lung_Dx-([A-Z])")[0]
    assert len(lesions) and (letters == lesions["subtype"]).all()
