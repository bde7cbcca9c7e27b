"""Run folders: atomic writes, manifests, and the question whether a chapter must run again."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lungct import runs


def finished(run_dir, name="01_explore_dicom", parameters=None, seed=0, needs=(), inputs=None, value=1):
    chapter = runs.begin(name, run_dir, parameters or {}, seed, inputs=inputs, needs=needs)
    chapter.save_table(pd.DataFrame({"value": [value]}), "table.parquet")
    chapter.finish()
    return chapter


def test_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), runs.atomic(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with runs.atomic(tmp_path / "a.txt") as part:
            part.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_atomic_files_leave_the_umask_alone(tmp_path, monkeypatch):
    def forbidden(mask):
        raise AssertionError("the umask belongs to all threads")

    monkeypatch.setattr(os, "umask", forbidden)
    with runs.atomic(tmp_path / "a.txt") as part:
        part.write_text("x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_warnings_are_back_when_the_last_thread_is_out():
    before = list(warnings.filters)
    first_in, first_out = threading.Event(), threading.Event()

    def long():
        with runs.without_warnings():
            first_in.set()
            first_out.wait(10)
            warnings.warn("not seen", stacklevel=1)

    thread = threading.Thread(target=long)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thread.start()
        first_in.wait(10)
        with runs.without_warnings():
            warnings.warn("nor this", stacklevel=1)
        first_out.set()
        thread.join()
        warnings.warn("seen", stacklevel=1)
    assert [str(one.message) for one in seen] == ["seen"]
    assert warnings.filters == before


def test_atomic_flushes_through_a_handle_that_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: os.write(handle, b"flushed"))    # Windows asks for that
    with runs.atomic(tmp_path / "a.txt") as part:
        part.write_text("written!")
    assert (tmp_path / "a.txt").read_text() == "flushed!"


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = ("import sys, time\nfrom lungct import runs\n"
            "with runs.atomic(sys.argv[1]) as part:\n"
            "    part.write_text('half'); print('writing', flush=True); time.sleep(60)\n")
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == b"writing"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert target.read_text() == "old"


def test_relative_paths_start_at_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "appendix").mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path / "nbs" / "appendix")
    assert runs.project_path("runs/x") == tmp_path / "runs" / "x"
    monkeypatch.chdir("/")
    assert str(runs.project_path("runs/x")) == "/runs/x"


def test_finished_chapter_is_not_stale(tmp_path):
    finished(tmp_path, parameters={"a": 1})
    assert runs.stale(tmp_path, "01_explore_dicom", {"a": 1, "seed": 0, "workers": 7}) == []


@pytest.mark.parametrize(("asked", "expected"), [
    ({"a": 2}, "a is now 2, was 1"), ({"seed": 3}, "seed is now 3, was 0")])
def test_changed_parameter_is_told(tmp_path, asked, expected):
    finished(tmp_path, parameters={"a": 1})
    assert runs.stale(tmp_path, "01_explore_dicom", asked) == [expected]


@pytest.mark.parametrize(("name", "reasons"), [
    ("04_check_labels", []), ("05_train_3d_cnn", ["the backend is now jax, was torch"])])
def test_another_backend_trains_anew(tmp_path, monkeypatch, name, reasons):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    chapter = finished(tmp_path, name)
    assert runs.stale(tmp_path, name, {}) == []
    assert "torch" in runs.load_json(chapter.folder / runs.MANIFEST)["packages"]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert runs.stale(tmp_path, name, {}) == reasons


def test_unfinished_chapter_is_stale(tmp_path):
    runs.begin("01_explore_dicom", tmp_path, {}, 0).save_json({}, "x.json")
    assert runs.stale(tmp_path, "01_explore_dicom", {}) == ["it has not finished yet"]


def test_begin_removes_the_manifest_first(tmp_path):
    finished(tmp_path)
    runs.begin("01_explore_dicom", tmp_path, {}, 0)
    assert runs.load_manifest(tmp_path, "01_explore_dicom") is None


def test_damaged_output_is_told(tmp_path):
    chapter = finished(tmp_path)
    (chapter.folder / "table.parquet").write_bytes(b"damaged")
    assert runs.stale(tmp_path, "01_explore_dicom", {}) == ["its output table.parquet is missing or damaged"]


def test_changed_earlier_chapter_makes_the_later_one_stale(tmp_path):
    finished(tmp_path)
    finished(tmp_path, "02_parse_annotations", needs=("01_explore_dicom",))
    assert runs.stale(tmp_path, "02_parse_annotations", {}) == []
    finished(tmp_path, value=2)
    assert runs.stale(tmp_path, "02_parse_annotations", {}) == ["01_explore_dicom has changed"]


def test_same_result_again_leaves_the_later_chapter_good(tmp_path):
    finished(tmp_path)
    finished(tmp_path, "02_parse_annotations", needs=("01_explore_dicom",))
    finished(tmp_path)
    assert runs.stale(tmp_path, "02_parse_annotations", {}) == []


def test_changed_input_folder_is_told(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.dcm").write_bytes(b"1")
    finished(tmp_path / "run", inputs={"dicom_path": str(data)})
    assert runs.stale(tmp_path / "run", "01_explore_dicom", {"dicom_path": str(data)}) == []
    (data / "b.dcm").write_bytes(b"2")
    (reason,) = runs.stale(tmp_path / "run", "01_explore_dicom", {"dicom_path": str(data)})
    assert "dicom_path" in reason and "differs" in reason


def test_moved_input_folder_is_still_good(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.dcm").write_bytes(b"1")
    finished(tmp_path / "run", inputs={"dicom_path": str(data)})
    moved = data.rename(tmp_path / "moved")
    assert runs.stale(tmp_path / "run", "01_explore_dicom", {"dicom_path": str(moved)}) == []


def test_phantoms_and_a_path_are_different_inputs(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.dcm").write_bytes(b"1")
    finished(tmp_path / "run", inputs={"dicom_path": ""})
    (reason,) = runs.stale(tmp_path / "run", "01_explore_dicom", {"dicom_path": str(data)})
    assert "differs" in reason


def test_missing_earlier_chapter_writes_nothing(tmp_path):
    with pytest.raises(runs.InputError, match="02_parse_annotations needs 01_explore_dicom.*run it first"):
        runs.begin("02_parse_annotations", tmp_path / "run", {}, 0, needs=("01_explore_dicom",))
    assert not (tmp_path / "run").exists()


def test_missing_input_writes_nothing(tmp_path):
    with pytest.raises(runs.InputError, match="does not exist"):
        runs.begin("01_explore_dicom", tmp_path / "run", {}, 0, inputs={"dicom_path": str(tmp_path / "nowhere")})
    assert not (tmp_path / "run").exists()


def test_negative_seed_writes_nothing(tmp_path):
    with pytest.raises(runs.InputError, match="seed is -1, expected a whole number from 0 to 4,294,967,295"):
        runs.begin("01_explore_dicom", tmp_path / "run", {}, -1)
    assert not (tmp_path / "run").exists()


def test_unknown_chapter_lists_the_known_ones(tmp_path):
    with pytest.raises(runs.InputError, match="unknown chapter '07'.*01_explore_dicom"):
        runs.begin("07", tmp_path, {}, 0)


def test_input_path_is_what_the_chapter_was_given(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    finished(tmp_path / "real", inputs={"dicom_path": str(data)})
    finished(tmp_path / "phantoms", inputs={"dicom_path": ""})
    assert runs.input_path(tmp_path / "real", "01_explore_dicom", "dicom_path") == data
    expected = tmp_path / "phantoms" / "phantom" / "Lung-PET-CT-Dx"
    assert runs.input_path(tmp_path / "phantoms", "01_explore_dicom", "dicom_path") == expected


def test_json_is_deterministic_and_refuses_nan(tmp_path):
    a = runs.save_json({"b": 1, "a": [1.5, None]}, tmp_path / "a.json").read_bytes()
    b = runs.save_json({"a": [1.5, None], "b": 1}, tmp_path / "b.json").read_bytes()
    assert a == b
    with pytest.raises(ValueError, match="JSON"):
        runs.save_json({"x": float("nan")}, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_missing_and_broken_json_name_the_file(tmp_path):
    with pytest.raises(runs.InputError, match="nowhere.json does not exist"):
        runs.load_json(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(runs.InputError, match="broken.json is not valid JSON"):
        runs.load_json(tmp_path / "broken.json")


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"\xff\xfe", b"{"])
def test_a_manifest_that_is_none_counts_as_not_finished(tmp_path, content):
    (finished(tmp_path).folder / runs.MANIFEST).write_bytes(content)
    assert runs.load_manifest(tmp_path, "01_explore_dicom") is None
    assert runs.stale(tmp_path, "01_explore_dicom", {}) == ["it has not finished yet"]


def test_json_that_is_no_text_names_the_file(tmp_path):
    (tmp_path / "broken.json").write_bytes(b"\xff\xfe")
    with pytest.raises(runs.InputError, match="broken.json is not valid JSON"):
        runs.load_json(tmp_path / "broken.json")


@pytest.mark.parametrize("spoil", [lambda whole: b"damaged", lambda whole: b"", lambda whole: whole[:-40],
                                   lambda whole: b"PAR1" + bytes(len(whole) - 12) + whole[-8:]])
def test_a_damaged_table_is_refused_by_name(tmp_path, spoil):
    path = runs.save_table(pd.DataFrame({"value": range(100)}), tmp_path / "t.parquet")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(runs.InputError, match=r"t.parquet cannot be read \(.*\): remove it and run its ") as caught:
        runs.load_table(path)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_linked_folders_and_survives_a_loop(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.dcm").write_bytes(b"1")
    (data / "link").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    (data / "dangling").symlink_to(tmp_path / "nowhere")
    before = runs.fingerprint(data)
    assert runs.fingerprint(data) == before
    (elsewhere / "a.dcm").write_bytes(b"22")
    assert runs.fingerprint(data) != before


def test_fingerprint_follows_linked_files_and_survives_links_that_lead_nowhere(tmp_path):
    data, store = tmp_path / "data", tmp_path / "store"
    data.mkdir()
    store.write_bytes(b"1")
    (data / "a.dcm").symlink_to(store)
    (data / "itself").symlink_to(data / "itself")
    (data / "dangling").symlink_to(tmp_path / "fetched later")
    before = runs.fingerprint(data)
    assert runs.fingerprint(data) == before
    store.write_bytes(b"22")
    changed = runs.fingerprint(data)
    assert changed != before
    (tmp_path / "fetched later").write_bytes(b"3")
    assert runs.fingerprint(data) != changed


def test_fingerprint_notes_a_locked_folder(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    open_folder = runs.fingerprint(tmp_path)
    monkeypatch.setattr(os, "scandir", guarded)
    assert runs.fingerprint(tmp_path) != open_folder


@pytest.mark.parametrize(("name", "value", "message"), [
    ("grid_size", 0, "grid_size is 0, expected a multiple of 8"), ("balance", float("nan"), "balance is nan"),
    ("precision", "float8", "expected 'float32' or 'mixed_bfloat16'"),
    ("filters", "8,16", "filters is '8,16', expected words, each a multiple of 8"),
    ("filters", "8 12", "filters is '8 12'"),
    ("scheduler", "host:8786", "scheduler is 'host:8786'")])
def test_a_value_that_makes_no_sense_is_refused_and_the_finished_chapter_stays(tmp_path, name, value, message):
    finished(tmp_path)
    with pytest.raises(runs.InputError, match=message):
        runs.begin("01_explore_dicom", tmp_path, {name: value}, 0)
    assert runs.load_manifest(tmp_path, "01_explore_dicom") is not None


@pytest.mark.parametrize(("name", "value", "message"), [
    ("epochs", "abc", "parameter epochs is 'abc', expected a whole number from 1 to 1,000,000"),
    ("epochs", 1.5, "parameter epochs is 1.5, expected a whole number from 1 to 1,000,000"),
    ("epochs", None, "epochs is None"), ("epochs", True, "epochs is True"), ("epochs", [3], r"epochs is \[3\]"),
    ("grid_size", 64.0, "grid_size is 64.0, expected a multiple of 8"), ("grid_size", [64], "grid_size is"),
    ("learning_rate", "0.1", "learning_rate is '0.1', expected 1e-09 to 10.0"), ("balance", True, "balance is True"),
    ("class_e", 1, "class_e is 1, expected 'keep'"), ("filters", 3, "filters is 3, expected words")])
def test_a_value_of_another_type_is_refused_in_words(name, value, message):
    with pytest.raises(runs.InputError, match=message):
        runs.check_parameters({name: value})


def test_numbers_of_numpy_and_whole_numbers_for_fractions_pass():
    runs.check_parameters({"epochs": np.int64(3), "grid_size": np.int32(64), "learning_rate": np.float32(0.1),
                           "balance": 1})


def test_every_parameter_of_a_chapter_that_is_no_path_has_its_rule_and_passes_it():
    from lungct import course

    for name in runs.CHAPTERS:
        defaults = course.chapter_parameters(course.notebook_folder() / f"{name}.ipynb")
        runs.check_parameters(defaults)
        free = {"real_tables", "override", "augmented", "registry", "crashes"}
        free |= {key for key in defaults if key.endswith(("_path", "_dir"))}
        assert set(defaults) - free <= set(runs.ALLOWED)


def test_a_notebook_shows_an_input_error_as_one_line():
    from IPython.core.interactiveshell import InteractiveShell

    from lungct.runs import InputError

    shell, shown = InteractiveShell(), []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    shell.user_ns["InputError"] = InputError
    shell.run_cell("raise InputError('folder x is empty: choose another')")
    assert shown == ["InputError: folder x is empty: choose another"]


@pytest.mark.parametrize("said, left", [(None, "1"), ("0", "0")])
def test_fast_convolutions_are_asked_for_unless_the_environment_says_otherwise(monkeypatch, said, left):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if said is not None:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", said)
    runs.fast_convolutions()
    assert os.environ.pop("TF_ENABLE_ONEDNN_OPTS") == left


@pytest.mark.parametrize("value, fits", [(True, True), (False, True), ("False", False), (1, False), ("True", False)])
def test_a_switch_is_true_or_false(value, fits):
    if fits:
        runs.check_parameters({"pet": value})
    else:
        with pytest.raises(runs.InputError, match=f"parameter pet is {value!r}, expected True or False"):
            runs.check_parameters({"pet": value})


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "roles.json").write_text("{}")
    link = tmp_path / "roles.json"
    link.symlink_to(tmp_path / "store" / "roles.json")
    runs.save_json({"a": 1}, link)
    assert link.is_symlink() and runs.load_json(tmp_path / "store" / "roles.json") == {"a": 1}
    with pytest.raises(runs.InputError, match="cannot be read \\(Is a directory\\)"):
        runs.load_json(tmp_path)


def test_a_chapter_was_made_by_the_code_that_it_began_with(tmp_path, monkeypatch):
    chapter = runs.begin("01_explore_dicom", tmp_path, {}, 0)
    then = runs.code_hash()
    monkeypatch.setattr(runs, "code_hash", lambda: "of a newer version")
    chapter.finish()
    assert runs.load_manifest(tmp_path, "01_explore_dicom")["code"] == then
    assert runs.stale(tmp_path, "01_explore_dicom", {}) == ["the code of lungct has changed"]
