"""The runner on miniature chapters, and the command line on good and bad input."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from lungct import course, runs

LUNGCT = [sys.executable, "-c", "from lungct.course import main; main()"]
SIX = runs.CHAPTERS


def write_chapter(folder, number, body="", parameters="amount = 1  # how much\n"):
    """A chapter in miniature: it adds `amount` to what the chapter before it left."""
    name = SIX[number - 1]
    needs = SIX[number - 2 : number - 1] if number > 1 else ()
    cells = [
        nbformat.v4.new_markdown_cell(f"# Chapter {number}\n\n> In miniature."),
        nbformat.v4.new_code_cell(f'run_dir = "runs/x"  # where\nseed = 0  # chance\n{parameters}',
                                  metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("## The work"),
        nbformat.v4.new_code_cell(
            "from lungct import runs\n"
            f"chapter = runs.begin({name!r}, run_dir, {{'amount': amount}}, seed, needs={tuple(needs)!r})\n"
            + (f"before = runs.load_json(chapter.of({needs[0]!r}) / 'sum.json')['sum']\n" if needs
               else "before = 0\n")),
        nbformat.v4.new_code_cell(body or "pass"),
        nbformat.v4.new_code_cell("chapter.save_json({'sum': before + amount}, 'sum.json')\nchapter.finish();"),
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), folder / f"{name}.ipynb")


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Six chapters, of which this process knows the first three: each needs a kernel, and a kernel takes its time."""
    monkeypatch.setattr(runs, "CHAPTERS", SIX[:3])
    folder = tmp_path / "nbs"
    folder.mkdir()
    for number in range(1, 7):
        write_chapter(folder, number)
    return folder


def make_course(folder, run_dir, pairs=()):
    defaults = {name: course.chapter_parameters(folder / f"{name}.ipynb") for name in runs.CHAPTERS}
    return course.Course(folder, run_dir, defaults, course.read_overrides(dict(pairs), defaults))


def run(folder, run_dir, pairs=()):
    said = io.StringIO()
    course.run_course(make_course(folder, run_dir, pairs), course.Progress(said))
    return said.getvalue()


def total(run_dir):
    return runs.load_json(run_dir / runs.CHAPTERS[-1] / "sum.json")["sum"]


def test_six_chapters_run_in_order_and_then_nothing_is_left_to_do(chapters, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHAPTERS", SIX)
    first = run(chapters, tmp_path / "run")
    assert total(tmp_path / "run") == 6
    assert first.count("done in") == 6 and "The work" in first and "\x1b" not in first and "\r" not in first
    second = run(chapters, tmp_path / "run")
    assert second.count("already done") == 6 and "done in" not in second
    assert (tmp_path / "run" / "notebooks" / "06_evaluate.ipynb").is_file()


def test_a_changed_parameter_runs_again_what_depends_on_it(chapters, tmp_path):
    write_chapter(chapters, 1, parameters="amount = 1  # how much\nfirst = 5  # only here\n")
    write_chapter(chapters, 3, body="amount = amount + extra", parameters="amount = 1  # how much\nextra = 0  # more\n")
    run(chapters, tmp_path / "run")
    chapter3 = chapters / f"{runs.CHAPTERS[2]}.ipynb"
    text = chapter3.read_text().replace("{'amount': amount}", "{'amount': amount, 'extra': extra}")
    chapter3.write_text(text)
    run(chapters, tmp_path / "run")
    said = run(chapters, tmp_path / "run", [("extra", "10")])
    assert said.count("already done") == 2 and "extra is now 10, was 0" in said
    assert total(tmp_path / "run") == 13


def test_an_edited_notebook_runs_again(chapters, tmp_path):
    run(chapters, tmp_path / "run")
    write_chapter(chapters, 3, body="amount = 100")
    said = run(chapters, tmp_path / "run")
    assert said.count("already done") == 2 and "its notebook has changed" in said
    assert total(tmp_path / "run") == 102


def test_a_failed_chapter_stops_the_run_and_the_next_call_goes_on_there(chapters, tmp_path):
    write_chapter(chapters, 2, body="values = [1, 2]\nvalues[7]")
    with pytest.raises(course.ChapterFailed, match=r"02_parse_annotations failed in cell \d+: IndexError") as failure:
        run(chapters, tmp_path / "run")
    assert "values[7]" in str(failure.value) and len(str(failure.value).splitlines()) <= 6
    kept = nbformat.read(tmp_path / "run" / "notebooks" / "02_parse_annotations.ipynb", as_version=4)
    assert any(out.output_type == "error" for cell in kept.cells for out in cell.get("outputs", []))
    assert not (tmp_path / "run" / "03_build_volumes").exists()
    write_chapter(chapters, 2)
    said = run(chapters, tmp_path / "run")
    assert said.count("already done") == 1 and total(tmp_path / "run") == 3


def test_a_kernel_killed_by_the_system_is_said(chapters, tmp_path):
    write_chapter(chapters, 2, body="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(course.ChapterFailed, match=r"02_parse_annotations died in section 'The work'.*out of memory"):
        run(chapters, tmp_path / "run")
    kept = nbformat.read(tmp_path / "run" / "notebooks" / f"{SIX[1]}.ipynb", as_version=4)
    ran = [cell for cell in kept.cells if cell.cell_type == "code" and cell.metadata.papermill.get("start_time")]
    assert "os.kill" in ran[-1].source, "the notebook up to there is on the disk"
    write_chapter(chapters, 2)
    assert run(chapters, tmp_path / "run").count("already done") == 1


@pytest.mark.parametrize(("seconds", "least", "most"), [(60.0, 2, 2), (0.0, 12, 99)])
def test_a_notebook_is_written_every_few_seconds_and_at_the_end(chapters, tmp_path, monkeypatch, seconds, least, most):
    from papermill import engines

    written, write = [], engines.write_ipynb
    monkeypatch.setattr(engines, "write_ipynb", lambda nb, path: written.append(path) or write(nb, path))
    monkeypatch.setattr(course, "SAVE_SECONDS", seconds)
    name, parameters = f"{SIX[0]}.ipynb", {"run_dir": str(tmp_path / "run")}
    course.run_chapter(chapters / name, tmp_path / name, parameters, course.Progress(io.StringIO()))
    assert least <= len(written) <= most
    kept = nbformat.read(tmp_path / name, as_version=4)
    assert kept.metadata.papermill.exception is None and kept.metadata.papermill.end_time


def test_a_damaged_volume_is_one_line_like_any_bad_input(chapters, tmp_path):
    write_chapter(chapters, 1, body="from lungct.volumes import CorruptVolume\nraise CorruptVolume('x is bad: run it')")
    with pytest.raises(runs.InputError, match="^x is bad: run it$"):
        run(chapters, tmp_path / "run")


def test_bad_input_found_in_a_chapter_is_one_line_and_leaves_nothing(chapters, tmp_path):
    write_chapter(chapters, 1, parameters="amount = 1  # how much\ndicom_path = ''  # images\n")
    text = (chapters / f"{runs.CHAPTERS[0]}.ipynb").read_text()
    begin = "chapter = runs.begin"
    text = text.replace(begin, "raise runs.InputError('no DICOM here: look elsewhere')\\n" + begin)
    (chapters / f"{runs.CHAPTERS[0]}.ipynb").write_text(text)
    with pytest.raises(runs.InputError, match="no DICOM here: look elsewhere"):
        run(chapters, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_input_to_a_chapter_that_had_finished_leaves_it_finished(chapters, tmp_path):
    refuse = "if amount == 7:\n    raise runs.InputError('seven is too many: give less')"
    write_chapter(chapters, 1, body=refuse)
    run(chapters, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(runs.InputError, match="seven is too many"):
        run(chapters, tmp_path / "run", [("amount", "7")])
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert run(chapters, tmp_path / "run").count("already done") == 3


def test_sockets_of_a_killed_run_are_swept_and_those_of_a_living_one_stay(chapters, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, living = (tmp_path / f"{course.SOCKETS}{runs.host_mark()}{pid}-abc"
                    for pid in (gone.pid, os.getppid()))
    dead.mkdir()
    living.mkdir()
    runs.clear_dead(tempfile.gettempdir(), course.SOCKETS)
    assert living.is_dir() and not dead.exists()


def test_a_notebook_cut_short_by_a_kill_runs_its_chapter_again(chapters, tmp_path):
    run(chapters, tmp_path / "run")
    for content in (b"", b'{"cells": [{"cell_type": "code", "sour', b"\xff\x00"):
        (tmp_path / "run" / "notebooks" / "02_parse_annotations.ipynb").write_bytes(content)
        said = run(chapters, tmp_path / "run")
        assert said.count("already done") == 2 and "02_parse_annotations: its notebook has changed" in said


@pytest.mark.parametrize("body", [
    None, "raise OSError(28, 'No space left on device', run_dir + '/disk/part')",
    "raise RuntimeError('cannot write: [errno 28] No space left on device')"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(chapters, tmp_path, monkeypatch, capsys, body):
    from papermill.iorw import LocalHandler

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(course, "notebook_folder", lambda: chapters)
    monkeypatch.setattr(course, "print_headline", lambda _: None)
    command = ["run", "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        if body is None:
            patch.setattr(LocalHandler, "write", full)
        else:
            write_chapter(chapters, 2, body=body)
        assert course.app(command, standalone_mode=False) == 2
    place = tmp_path / "run" / "disk" if body and "part" in body else tmp_path / "run"
    last = f"lungct: no space left in {place}: free some, and give the same command again"
    assert [line for line in capsys.readouterr().err.splitlines() if line[0] not in " ["] == [last]
    write_chapter(chapters, 2)
    assert course.app(command, standalone_mode=False) in (None, 0) and total(tmp_path / "run") == 3


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError("With tag (7FE0,0010) got exception: [Errno 28] No space left on device\nTraceback ...")])
def test_a_full_disk_ends_any_command_in_one_line(tmp_path, monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr("lungct.phantom.make_cohort", full)
    assert course.app(["phantom", str(tmp_path / "out")], standalone_mode=False) == 2
    expected = f"lungct: no space left in {tmp_path / 'out'}: free some, and give the same command again\n"
    assert capsys.readouterr().err == expected


def test_a_temporary_folder_too_long_for_worker_processes_is_one_line(tmp_path, monkeypatch, capsys):
    def too_long(*_):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("lungct.phantom.make_cohort", too_long)
    assert course.app(["phantom", str(tmp_path / "out")], standalone_mode=False) == 2
    said = capsys.readouterr().err
    assert said.endswith("is too long: set TMPDIR to a shorter one\n") and len(said.splitlines()) == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOENT])
def test_an_error_of_the_system_that_names_a_file_is_one_line(tmp_path, monkeypatch, capsys, code):
    def refused(*_):
        raise OSError(code, os.strerror(code), str(tmp_path / "locked"))

    monkeypatch.setattr("lungct.phantom.make_cohort", refused)
    assert course.app(["phantom", str(tmp_path / "out")], standalone_mode=False) == 2
    words = f"lungct: {tmp_path / 'locked'} could not be used ({os.strerror(code)}): check its name and permissions\n"
    assert capsys.readouterr().err == words


def test_another_error_of_the_system_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lungct.phantom.make_cohort", broken)
    with pytest.raises(OSError, match="Input/output error"):
        course.app(["phantom", str(tmp_path / "out")], standalone_mode=False)


def test_a_temporary_folder_with_a_long_name_is_no_hindrance(chapters, tmp_path, monkeypatch):
    long = tmp_path / ("long " * 20).strip()
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    course.run_chapter(chapters / "01_explore_dicom.ipynb", tmp_path / "run" / "out.ipynb",
                       {"run_dir": str(tmp_path / "run")}, course.Progress(io.StringIO()))
    assert runs.load_manifest(tmp_path / "run", "01_explore_dicom") and not list(long.iterdir())


def test_braces_in_the_run_folder_are_no_parameters(chapters, tmp_path):
    run_dir = tmp_path / "r6{x} {} }{"
    assert run(chapters.rename(tmp_path / "nbs{seed}"), run_dir).count("done in") == 3
    assert (run_dir / "notebooks" / "03_build_volumes.ipynb").is_file()


def test_parameters_come_from_the_tagged_cell(chapters):
    expected = {"run_dir": "runs/x", "seed": 0, "amount": 1}
    assert course.chapter_parameters(chapters / "01_explore_dicom.ipynb") == expected


def test_unknown_parameter_lists_the_known_ones(chapters, tmp_path):
    with pytest.raises(runs.InputError, match="unknown parameter amuont: the chapters know amount, seed"):
        make_course(chapters, tmp_path, [("amuont", "3")])


@pytest.mark.parametrize(("given", "message"), [
    ({"override": "nonsense"}, "override names nonsense, which is no finding"),
    ({"test_fraction": "0.85"}, "validation_fraction and test_fraction are 1.05 together: nobody would train")])
def test_what_chapter_4_would_refuse_is_refused_before_anything_starts(given, message):
    known = {"04_check_labels": {"override": "", "validation_fraction": 0.2, "test_fraction": 0.2}}
    with pytest.raises(runs.InputError, match=message):
        course.read_overrides(given, known)
    assert course.read_overrides({"override": "twins-in-two-roles", "test_fraction": "0.5"}, known)


def test_what_the_runner_fills_in_is_refused_by_name_and_not_offered():
    known = {"05_train_3d_cnn": {"run_dir": "runs/x", "epochs": 25, "crashes": []}}
    with pytest.raises(runs.InputError, match="parameter crashes is not for -p: the runner fills it in"):
        course.read_overrides({"crashes": "[]"}, known)
    with pytest.raises(runs.InputError, match="the chapters know epochs$"):
        course.read_overrides({"crash": "[]"}, known)


@pytest.mark.parametrize(("text", "default", "value"), [
    ("3", 1, 3), ("3", 1.5, 3.0), ("true", False, True), ("False", True, False), ("1.5", "", "1.5")])
def test_parameter_has_the_type_of_its_default(text, default, value):
    parsed = course.parse_parameter("x", text, default)
    assert parsed == value and type(parsed) is type(default)


@pytest.mark.parametrize(("text", "default"), [("many", 1), ("1.5", 1), ("1", True), ("[1]", 0.5)])
def test_ill_typed_parameter_is_refused(text, default):
    with pytest.raises(runs.InputError, match=f"parameter x expects {type(default).__name__}"):
        course.parse_parameter("x", text, default)


def test_pairs_lacking_their_value_are_refused():
    with pytest.raises(runs.InputError, match="-p epochs lacks its value"):
        course.join_pairs(["run", "-p", "epochs"])


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise io.UnsupportedOperation


def test_progress_in_a_terminal_is_one_moving_line(chapters, monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((60, 20)))
    stream = Terminal()
    monkeypatch.setattr(stream, "fileno", lambda: 1, raising=False)
    progress = course.Progress(stream)
    progress.chapter("01_explore_dicom", nbformat.read(chapters / "01_explore_dicom.ipynb", as_version=4))
    for index in range(6):
        progress.cell(None, index)
    text = stream.getvalue()
    assert "\n" not in text and "cell 6/6" in text and "The work" in text
    assert max(len(part) for part in text.split("\r")) <= 60


def lungct(*arguments, cwd=None):
    return subprocess.run([*LUNGCT, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


LONG = "x" * 300


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "--dicom-path", "/nowhere", "--annotation-path", "/nowhere"], "--dicom-path /nowhere is not a folder"),
    (["run", "--dicom-path", "."], "--dicom-path and --annotation-path go together"),
    (["run", "-p", "epoch", "3"], "unknown parameter epoch: the chapters know"),
    (["run", "-p", "seed", "lots"], "parameter seed expects int"),
    (["run", "-p", "seed"], "-p seed lacks its value"),
    (["run", "-p"], "lacks its value: write -p NAME VALUE"),
    (["run", "-pseed"], "-p seed lacks its value"),
    (["run", "-p", "grid_size", "0"], "parameter grid_size is 0, expected a multiple of 8 from 8 to 1,024"),
    (["run", "-p", "class_e", "foo"], "parameter class_e is 'foo', expected 'keep' or 'merge' or 'set aside'"),
    (["run", "-p", "workers", "0"], "parameter workers is 0"),
    (["run", "-p", "bootstrap_samples", "0"], "parameter bootstrap_samples is 0"),
    (["run", "--scheduler", "nonsense"], "parameter scheduler is 'nonsense'"),
    (["run", "-p", "dicom_path", "/usr"], "--dicom-path and --annotation-path go together"),
    (["run", "-p", "dicom_path", "/nowhere", "-p", "annotation_path", "/usr"], "--dicom-path /nowhere is not a folder"),
    (["run", "-p", "epochs", "--run-dir", "x"], "-p epochs lacks its value: write -p NAME VALUE"),
    (["run", "-p", "epochs", "-p", "seed", "7"], "-p epochs lacks its value"),
    (["run", "-p", "--run-dir", "x"], "lungct: -p lacks its value: write -p NAME VALUE"),
    (["run", "-p", "--run-dir=x"], "lungct: -p lacks its value"),
    (["run", "-p", "real_tables", "/nowhere"], "lungct: real_tables /nowhere is not a folder"),
    (["crossval", "-p", "real_tables", "/nowhere"], "lungct: real_tables /nowhere is not a folder"),
    (["crossval", "-p", "grid_size", "96"], "lungct: parameter grid_size is not for crossval, which runs chapters"),
    (["crossval", "-p", "folds", "10"], "not for crossval, which runs chapters 5 and 6: use the option --folds"),
    (["run", "-p", "epochs={[]:1}"], "parameter epochs expects int"),
    (["predict", "~", "--model", "~/no.keras", "--out", "o"], f"--model {Path.home()}/no.keras is not a file"),
    (["download", "out", "--manifest", "~/no.tcia"], f"manifest {Path.home()}/no.tcia is not a file"),
    (["run", "-p", "crashes", "[]"], "parameter crashes is not for -p: the runner fills it in"),
    (["run", "-p", "run_dir", "x"], "parameter run_dir is not for -p: use the option --run-dir"),
    (["run", "--dicom-path", LONG, "--annotation-path", "x"], "(File name too long)"),
    (["run", "-p", "clinical_path", LONG], "(File name too long)"),
    (["run", "--run-dir", LONG], "(File name too long)"),
    (["predict", "/usr", "--model", LONG, "--out", "o"], "(File name too long)"),
    (["predict", "/usr", "--model", "/usr", "--out", "o"], "--model /usr/model.keras is not a file"),
    (["predict", "/etc/hostname", "--model", "/usr", "--out", "o"], "folder /etc/hostname is a file: give the folder"),
    (["phantom", "out", "--patients", "10000000"], "Invalid value for '--patients': "),
    (["download", "out", "--series", "-1"], "Invalid value for '--series': "),
    (["run", "-p", "clinical_path", "/nowhere.xlsx"], "clinical_path /nowhere.xlsx is not a file"),
    (["run", "-p", "locked_path", "/nowhere.txt"], "locked_path /nowhere.txt is not a file"),
    (["run", "--epochs", "3"], "No such option: --epochs"),
    (["train"], "No such command 'train'"),
    (["predict"], "Missing argument"),
    (["run", "--run-dir", "/dev/null/x"], "/dev/null is a file, not a folder"),
    (["run", "--run-dir", "/proc/x"], "could not be written"),
    (["predict", "/nowhere", "--model", "m.keras", "--out", "o"], "folder /nowhere is not a folder"),
    (["phantom", "out", "--quirks", "odd"], "unknown quirk odd: known are"),
    (["phantom", "/dev/null/x"], "/dev/null is a file, not a folder"),
    (["phantom", "/dev/null/x", "--scale-model"], "/dev/null is a file, not a folder"),
    (["phantom", "out", "--scale-model", "--fraction", "2"], "expected a fraction above 0 and at most 1, got 2.0"),
    (["phantom", "out", "--scale-model", "--patients", "9"], "leave out --patients and --quirks, and use --fraction"),
    (["phantom", "out", "--fraction", "0.5"], "--fraction is a part of the scale model: give --scale-model too"),
    (["predict", "/usr", "--model", "/etc/hostname", "--out", "/proc/x"], "--out /proc/x could not be written"),
    (["predict", "", "--model", "/etc/hostname", "--out", "x"], "the name of the folder with the series is empty"),
    (["predict", "/usr", "--model", "/etc/hostname", "--out", ""], "--out is empty: name a folder"),
    (["download", "out"], "expected one: name it with --manifest"),
])
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lungct", *arguments])
    monkeypatch.setenv("PYTHONSAFEPATH", "1")                    # as `main` does, but here it is taken back
    with pytest.raises(SystemExit) as ended:
        course.main()
    said = capfd.readouterr().err
    assert ended.value.code == 2 and message in said and len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_in_one_line_and_status_2(tmp_path):
    done = lungct("run", "-p", "epoch", "3", cwd=tmp_path)
    assert done.returncode == 2 and "unknown parameter epoch" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["05_train_3d_cnn", "05_train_3d_cnn/model.keras", "."])
@pytest.mark.parametrize("answered, status", [(1, None), (0, 2)])
def test_a_model_is_given_as_its_file_its_folder_or_its_run(tmp_path, monkeypatch, capsys, given, answered, status):
    asked = []
    told = SimpleNamespace(predict_folder=lambda folder, model, *_, **__: asked.append(model) or
                           SimpleNamespace(answered=answered))
    monkeypatch.setitem(sys.modules, "lungct.predict", told)
    model = tmp_path / "05_train_3d_cnn" / "model.keras"
    model.parent.mkdir()
    model.touch()
    command = ["predict", "/usr", "--model", str(tmp_path / given), "--out", str(tmp_path / "out")]
    assert course.app(command, standalone_mode=False) == status and asked == [model]
    assert capsys.readouterr().err == ("lungct: no stack was answered; the lines above say why\n" if status else "")


def test_a_foreign_table_beside_the_manifest_is_one_line_and_status_2(tmp_path):
    (tmp_path / "c.tcia").write_text("1.2.3\n")
    (tmp_path / "metadata.csv").write_text("patient,weight\n1,70\n")
    done = lungct("download", ".", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "metadata.csv is not the collection's table" in done.stderr


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    done = lungct("run", "--dicom-path", "empty", "--annotation-path", "empty", cwd=tmp_path)
    assert done.returncode == 2 and "is empty" in done.stderr


def test_folder_without_dicom_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "letter.txt").write_text("no DICOM in here")
    done = lungct("run", "--dicom-path", "data", "--annotation-path", "data", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "DICOM" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_help_does_not_import_tensorflow():
    code = ("import sys; sys.argv = ['lungct', '--help']\nfrom lungct.course import main\ntry: main()\n"
            "except SystemExit: pass\nassert 'tensorflow' not in sys.modules and 'keras' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("run", "phantom", "download", "predict", "doctor"))


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM, "SIGTERM to a script's background job"])
def test_interrupt_is_clean_and_the_next_run_goes_on(chapters, tmp_path, asked):
    write_chapter(chapters, 2, body="import os, pathlib, time\n"
                                    "pathlib.Path(run_dir, 'kernel').write_text(str(os.getpid()))\ntime.sleep(120)")
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
            "import test_course as t\nfrom lungct import course\n"
            f"with course.plain_errors(): t.run(Path({str(chapters)!r}), Path({str(tmp_path / 'run')!r}))\n")
    ignored = isinstance(asked, str)  # as a shell without job control starts `command &`
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True,
                             preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None)
    wait_for(tmp_path / "run" / "kernel")
    child.send_signal(signal.SIGTERM if ignored else asked)
    _, errors = child.communicate(timeout=60)
    assert_gone((tmp_path / "run" / "kernel").read_text())
    assert child.returncode != 0 and "interrupted; what is finished is kept: give the same command again" in errors
    assert runs.load_manifest(tmp_path / "run", "02_parse_annotations") is None
    write_chapter(chapters, 2)
    assert run(chapters, tmp_path / "run").count("already done") == 1


def test_a_second_run_on_a_folder_is_turned_away(chapters, tmp_path):
    folder = tmp_path / "run"
    with runs.alone(folder):
        with pytest.raises(runs.InputError, match=f"another lungct is at work in {folder}"):
            run(chapters, folder)
        assert [path.name for path in folder.iterdir()] == [runs.LOCK]
        run(chapters, tmp_path / "other")
    assert not folder.exists()
    run(chapters, folder)
    assert total(folder) == total(tmp_path / "other") and not (folder / runs.LOCK).exists()


def test_a_run_that_was_killed_leaves_no_lock(chapters, tmp_path):
    code = (f"import os, signal, sys\nfrom pathlib import Path\nfrom lungct import runs\n"
            f"with runs.alone(Path({str(tmp_path / 'run')!r})):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / "run" / runs.LOCK).exists()
    assert run(chapters, tmp_path / "run").count("done in") == len(runs.CHAPTERS)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_lock_neither_holds_a_run_nor_is_written_through(tmp_path, kind):
    target = tmp_path / "target"
    os.mkfifo(tmp_path / runs.LOCK) if kind == "pipe" else (tmp_path / runs.LOCK).symlink_to(target)
    with pytest.raises(runs.InputError, match="could not be written"), runs.alone(tmp_path):
        pass
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1


def test_programs_in_the_working_folder_are_not_run(tmp_path):
    for name in ("pyarrow", "nbformat", "defusedxml", "pandas"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run.txt')!r}, 'w')\nraise ImportError('pwned')\n")
    code = ("import sys\nsys.argv = ['lungct']\nfrom lungct import course\n"
            "try:\n    course.main()\nexcept SystemExit:\n    pass\n"
            "import subprocess\nsubprocess.run([sys.executable, '-c', 'import pandas'], check=True)\n")
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not (tmp_path / "run.txt").exists(), done.stderr


def test_the_lock_of_a_run_that_just_ended_counts_for_nobody(tmp_path):
    path = tmp_path / runs.LOCK
    with path.open("a") as old:
        path.unlink()
        path.touch()
        assert not runs._locked(old, path)
    with path.open("a") as new:
        assert runs._locked(new, path)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_second_interrupt_changes_nothing(tmp_path, second):
    code = ("import os, signal, time\nfrom lungct import course, phantom\n"
            "def slow(*_):\n    open('started', 'w').close()\n    time.sleep(60)\n"
            "phantom.make_cohort = slow\nimport sys\nsys.argv = ['lungct', 'phantom', 'out']\ncourse.main()\n")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "started")
    child.send_signal(signal.SIGINT)
    child.send_signal(second)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 130 and errors.strip() == course.INTERRUPTED.strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_another_thread_takes_ends_the_command(tmp_path, number):
    code = ("import signal, threading, time\nfrom lungct import course, phantom\n"
            "def take():\n    time.sleep(0.5)\n"
            f"    signal.pthread_kill(threading.get_ident(), signal.{number.name})\n    time.sleep(20)\n"
            "def slow(*_):\n    threading.Thread(target=take, daemon=True).start()\n    time.sleep(60)\n"
            "phantom.make_cohort = slow\nimport sys\nsys.argv = ['lungct', 'phantom', 'out']\ncourse.main()\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=40)
    assert done.returncode == 130 and done.stderr.strip() == course.INTERRUPTED.strip()


LOST = """
class Deaf:
    def __del__(self):  # Python drops what is raised in here
        signal.raise_signal(signal.SIGINT)

class Progress(course.Progress):
    def cell(self, cell=None, cell_index=0):
        super().cell(cell, cell_index)
        if self.name == runs.CHAPTERS[1] and self.cells - cell_index == 2:
            note_kernel()
            Deaf()

course.Progress, course.GRACE_SECONDS = Progress, 3
"""
STARTING = """
async def wait_for_ready(self, timeout=None):
    note_kernel()
    signal.raise_signal(signal.SIGINT)

from jupyter_client import AsyncKernelClient
AsyncKernelClient.wait_for_ready = wait_for_ready
"""


@pytest.mark.parametrize("moment", [LOST, STARTING], ids=["in a finalizer", "before the kernel is ready"])
def test_interrupt_at_a_bad_moment_ends_the_run_and_its_kernel(chapters, tmp_path, moment):
    write_chapter(chapters, 2, body="import time\ntime.sleep(40)")
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
            "import psutil, signal, test_course as t\nfrom lungct import course, runs\ndef note_kernel():\n"
            f"    Path({str(tmp_path / 'kernel')!r}).write_text(str(psutil.Process().children()[0].pid))\n{moment}\n"
            f"with course.plain_errors(): t.run(Path({str(chapters)!r}), Path({str(tmp_path / 'run')!r}))\n")
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "kernel")
    _, errors = child.communicate(timeout=30)
    assert_gone((tmp_path / "kernel").read_text())
    assert child.returncode != 0 and course.INTERRUPTED.strip() in errors and "ipc path" not in errors
    write_chapter(chapters, 2)
    assert "done in" in run(chapters, tmp_path / "run") and total(tmp_path / "run") == 3


def assert_gone(kernel, seconds=20):
    deadline = time.monotonic() + seconds
    while Path("/proc", kernel).exists():
        assert time.monotonic() < deadline, "the kernel must not live on"
        time.sleep(0.2)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.2)


def test_a_killed_run_goes_on_and_ends_like_an_undisturbed_one(chapters, tmp_path):
    kill_once = ("import os, signal, pathlib\nmarker = pathlib.Path(run_dir) / 'killed'\n"
                 "if not marker.exists():\n    marker.touch()\n    os.kill(os.getppid(), signal.SIGKILL)\n")
    write_chapter(chapters, 3, body=kill_once)
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
            f"import test_course as t\nt.run(Path({str(chapters)!r}), Path({str(tmp_path / 'killed')!r}))\n")
    first = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert first.returncode == -signal.SIGKILL
    said = run(chapters, tmp_path / "killed")
    assert said.count("already done") == 2
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "killed").touch()
    run(chapters, tmp_path / "whole")
    for name in runs.CHAPTERS:
        both = [json.loads((tmp_path / d / name / "manifest.json").read_text())["outputs"] for d in ("killed", "whole")]
        assert both[0] == both[1]
