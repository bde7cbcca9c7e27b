"""Training that is killed, that kills its process, or that finds damaged checkpoints on the disk."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
import test_training as toys
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import course, runs, training

HERE = str(Path(__file__).parent)


def write_notebook(path, parameters, body):
    code, spec = nbformat.v4.new_code_cell, {"name": "python3", "display_name": "python3", "language": "python"}
    heading = nbformat.v4.new_markdown_cell("## Training")
    cells = [code(parameters, metadata={"tags": ["parameters"]}), heading, code(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


def run_on(notebook, tmp_path, **parameters):
    said = io.StringIO()
    known = course.chapter_parameters(notebook)
    course.run_on(notebook, tmp_path / "executed" / notebook.name, known | parameters, course.Progress(said))
    return said.getvalue()


# ---- a process that dies

TRAINING = f"""
import json, os, signal, sys
sys.path.insert(0, {HERE!r})
import test_training as t
from lungct import training
folder = training.Path(run_dir)
before, seen = training.augment, []

def augment(*batch, **options):
    if len(crashes) < 2 and list(folder.glob("*-00001.npz")):   # in the middle of epoch 2
        os.kill(os.getpid(), signal.SIGSEGV)
    return before(*batch, **options)

training.augment = augment
now, changes = training.retreat(precision, jit_compile, len(crashes))
training.reproducible(0)
network = training.build_network(16, "AG", (8,), precision=now)
chosen = t.quick(epochs=2, **changes)
training.fit(network, t.toys(4), None, chosen, folder, lambda row: seen.append(row["epoch"]))
t.saved(network, folder, settings=chosen, crashes=crashes)
print("epochs", seen)
"""


@pytest.mark.slow
def test_a_training_that_segfaults_twice_ends_without_xla_and_in_float32(tmp_path):
    parameters = 'run_dir = ""\nprecision = "mixed_bfloat16"\njit_compile = True\ncrashes = []\n'
    (tmp_path / "run").mkdir()
    notebook = write_notebook(tmp_path / "05_train_3d_cnn.ipynb", parameters, TRAINING)
    said = run_on(notebook, tmp_path, run_dir=str(tmp_path / "run")).splitlines()
    restarts = [line for line in said if "goes on in a fresh process from its last checkpoint" in line]
    assert len(restarts) == 2 and restarts[0].endswith("with XLA off (restart 1 of 2)")
    assert restarts[1].endswith("with XLA off and precision float32 (restart 2 of 2)")
    facts = runs.load_json(tmp_path / "run" / "model.json")
    assert facts["precision"] == "float32" and facts["settings"]["jit_compile"] is False
    assert facts["settings"]["stands_for"] == "mixed_bfloat16 with XLA"
    assert facts["crashes"] == ["05_train_3d_cnn died in section 'Training'",
                                "05_train_3d_cnn died in section 'Training', with XLA off"]
    executed = nbformat.read(tmp_path / "executed" / notebook.name, as_version=4)
    assert "epochs [2]" in str(executed.cells[-1].outputs), "epoch 1 is not trained a second time"


def test_three_deaths_of_different_kinds_are_enough(tmp_path):
    body = ("import os, signal\nif not crashes:\n    raise RuntimeError('No algorithm worked! Error messages: ...')\n"
            "os.kill(os.getpid(), signal.SIGABRT if len(crashes) == 1 else signal.SIGKILL)")
    notebook = write_notebook(tmp_path / "05_train_3d_cnn.ipynb", "crashes = []\n", body)
    with pytest.raises(course.ChapterFailed, match=r"died 3 times, so it is not started again: .*lungct doctor") as end:
        run_on(notebook, tmp_path)
    lines = str(end.value).splitlines()
    assert not isinstance(end.value, course.DeviceDied) and len(lines) == 5
    assert "RuntimeError: No algorithm worked!" in lines[1]
    assert lines[2].endswith("died in section 'Training', with XLA off")
    assert lines[3].endswith("died in section 'Training', with XLA off and precision float32")


@pytest.mark.parametrize(("parameters", "error"), [("other = 1\n", "No algorithm worked!"), ("crashes = []\n", "odd")])
def test_other_chapters_and_other_errors_are_not_tried_again(tmp_path, parameters, error):
    notebook = write_notebook(tmp_path / "05_x.ipynb", parameters, f"raise RuntimeError({error!r})")
    with pytest.raises(course.ChapterFailed, match="05_x failed in cell") as end:
        run_on(notebook, tmp_path)
    assert isinstance(end.value, course.DeviceDied) == (error != "odd")


def test_chapter_5_takes_up_what_the_runner_hands_over():
    notebook = course.notebook_folder() / "05_train_3d_cnn.ipynb"
    known = course.chapter_parameters(notebook)
    assert known["crashes"] == [] and known["jit_compile"] is False and known["devices"] == 1
    code = "\n".join(course.code_of(notebook))
    assert "retreat(precision, jit_compile, len(crashes))" in code and "crashes=crashes)" in code
    recorded = re.search(r"parameters = \{.+?\}", code, re.S).group()
    assert "crashes" not in recorded, "or the manifest would ask for another run after each crash"
    assert {"jit_compile", "devices"} <= set(re.findall(r'"(\w+)"', recorded))


def test_xla_stays_off_on_a_processor_and_says_so(caplog):
    asked = training.Settings(jit_compile=True)
    training._check_devices(asked)
    assert caplog.text.count("jit_compile stays off: on a CPU") == 1
    assert not training._compiled(asked) and not training._trainer(toys.network(), asked).jit_compile


# ---- whose checkpoint it is


def key(precision="float32", **changes):
    training.reproducible(0)
    network = training.build_network(16, "AG", (8,), precision=precision)
    return training._key(network, toys.toys(2), None, toys.quick(**changes))


def test_a_retreat_shares_its_checkpoints_and_another_wish_does_not():
    asked = key("mixed_bfloat16", jit_compile=True)
    for crashes in (1, 2):
        precision, changes = training.retreat("mixed_bfloat16", True, crashes)
        assert key(precision, **changes) == asked
    others = [key(), key("mixed_bfloat16"), key(jit_compile=True), key("mixed_float16", jit_compile=True),
              key("float32", jit_compile=True, learning_rate=0.1),
              key("float32", stands_for="mixed_bfloat16 with XLA", learning_rate=0.1)]
    assert len({asked, *others}) == len(others) + 1


def test_moments_of_half_precision_go_on_in_float32(tmp_path):
    trainers = []
    for precision in ("mixed_float16", "float32"):
        training.reproducible(0)
        trainers.append(training._trainer(training.build_network(16, "AG", (8,), precision=precision), toys.quick()))
    half, whole = trainers
    assert isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)
    for at, variable in enumerate(half.optimizer.inner_optimizer.variables):
        variable.assign(np.full(variable.shape, at + 2))
    training._save_state(tmp_path, "a" * 12, half, [], [{"epoch": 1}])
    assert training._load_state(tmp_path, "a" * 12, whole) == ([{"epoch": 1}], [])
    moments = [np.unique(np.asarray(variable)).tolist() for variable in whole.optimizer.variables]
    assert moments == [[at + 2] for at in range(len(moments))]
    half.optimizer.dynamic_scale.assign(7.0)
    training._save_state(tmp_path, "a" * 12, half, [], [{"epoch": 1}])
    half.optimizer.dynamic_scale.assign(1.0)
    training._load_state(tmp_path, "a" * 12, half)
    assert float(half.optimizer.dynamic_scale.numpy()) == 7.0


def test_what_was_asked_for_plainly_is_tried_again_as_it_was():
    assert [training.retreat("float32", False, n)[0] for n in range(3)] == ["float32"] * 3
    assert {key(**training.retreat("float32", False, n)[1]) for n in range(3)} == {key()}


# ---- the disk


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Two states of a training, its key, and its trainer."""
    folder, network, history = tmp_path_factory.mktemp("states"), toys.network(), []
    trainer = training._trainer(network, toys.quick())
    for epoch in (1, 2):
        history.append({"epoch": epoch, "loss": 1 / epoch})
        training._save_state(folder, "c0ffee" * 2, trainer, network.get_weights(), history)
    return folder, "c0ffee" * 2, trainer


def flip(content, at, bit=0):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


@pytest.mark.parametrize("damage", [
    lambda c: c[: len(c) // 2], lambda c: b"", lambda c: bytes(len(c)), lambda c: c[:-1], lambda c: c + b"\0",
    lambda c: flip(c, len(c) // 2), lambda c: flip(c, len(c) - 3), lambda c: flip(c, 30)],
    ids=["half", "empty", "zeros", "one byte short", "one byte more", "in an array", "in the checksum", "in a name"])
def test_damage_costs_one_epoch(states, tmp_path, damage, caplog):
    folder, name, trainer = states
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / f"{name}-00002.npz"
    assert len(training._load_state(tmp_path, name, trainer)[0]) == 2
    newest.write_bytes(damage(newest.read_bytes()))
    history, _ = training._load_state(tmp_path, name, trainer)
    assert [row["epoch"] for row in history] == [1] and "00002.npz cannot be read" in caplog.text
    (tmp_path / f"{name}-00001.npz").write_bytes(b"")
    assert training._load_state(tmp_path, name, trainer) is None


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(states, tmp_path_factory, place, bit):
    folder, name, _ = states
    content = (folder / f"{name}-00002.npz").read_bytes()
    odd = tmp_path_factory.getbasetemp() / "odd.npz"
    odd.write_bytes(flip(content, int(place * len(content)), bit))
    assert training._read_state(odd) is None
    odd.write_bytes(content)
    assert training._read_state(odd)["history"].dtype == np.uint8


CHILD = f"""
import os, signal, sys
sys.path.insert(0, {HERE!r})
import test_training as t
whole, states = t.training._checksum, []

def cut(state):
    states.append(state)
    if len(states) == 2:   # the second state lies half written under its temporary name
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(state)

t.training._checksum = cut
t.training.fit(t.network(), t.toys(4), t.toys(2, seed=9), t.quick(epochs=2), sys.argv[1])
"""


@pytest.mark.slow
def test_killed_while_it_writes_a_state_it_ends_with_the_same_bits(tmp_path):
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".part", ".npz"]
    ends = []
    for folder in (tmp_path, None):
        network, seen = toys.network(), []
        history = training.fit(network, toys.toys(4), toys.toys(2, seed=9), toys.quick(epochs=2), folder, seen.append)
        ends.append((history, network.get_weights(), [row["epoch"] for row in seen]))
    (late, resumed, after), (history, whole, _) = ends
    assert after == [2]
    pd.testing.assert_frame_equal(late, history, check_exact=True)
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert sorted(path.name[12:] for path in tmp_path.iterdir()) == ["-00001.npz", "-00002.npz"]


# ---- numbers that are none, and programs that come as data


def test_a_validation_loss_that_is_no_number_stops_before_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_epoch", lambda *_, **__: {"loss": 1.0})
    monkeypatch.setattr(training, "_validate", lambda *_, **__: {"val_loss": float("nan")})
    with pytest.raises(FloatingPointError, match="validation loss is nan after epoch 1"):
        training.fit(toys.network(), toys.toys(2), toys.toys(2), toys.quick(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_program_in_it_is_refused(tmp_path):
    volume = keras.Input((16, 16, 16, 2))
    heat = keras.layers.Lambda(lambda x: x[..., :1], output_shape=(16, 16, 16, 1))(volume)
    toys.saved(keras.Model(volume, {"heat": heat}), tmp_path, classes=[])
    with pytest.raises(runs.InputError, match=r"model\.keras holds a program \(a Lambda layer\), which is not run"):
        training.load_model(tmp_path)


def test_nothing_is_unpickled():
    for path in Path(runs.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|joblib|dill|shelve)\b", text, re.M), path.name
        assert not re.search(r"allow_pickle\s*=\s*True|safe_mode\s*=\s*False|read_pickle|enable_unsafe", text)
        assert all("allow_pickle=False" in line for line in text.splitlines() if re.search(r"\bnp\.load\(", line))


@pytest.mark.parametrize("stored", [np.array([{"a": 1}], dtype=object)])
def test_a_pickle_in_a_checkpoint_is_not_opened(tmp_path, stored):
    np.savez(state := io.BytesIO(), model_0=stored, history=np.frombuffer(json.dumps([]).encode(), "uint8"))
    (tmp_path / "a.npz").write_bytes(state.getvalue() + training._checksum(state.getvalue()))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        training._read_state(tmp_path / "a.npz")
