"""The doctor: facts, trials in separate processes, and advice."""

import sys

from lungct import doctor


def test_facts_name_versions_and_room():
    facts = doctor.machine_facts()
    assert facts["numpy"][0].isdigit() and "GiB free of" in facts["memory"] and "GiB free of" in facts["disk here"]


def test_facts_name_the_backend_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    facts = doctor.machine_facts()
    assert facts["backend"] == "jax (KERAS_BACKEND)" and "jax" in facts and "torch" not in facts


def test_a_training_step_works_in_its_own_process():
    trial = doctor.try_step(False, "float32")
    assert trial.ok and "loss" in trial.detail
    assert str(trial).startswith("XLA off  float32")


def test_a_killed_child_is_a_result_not_an_error():
    trial = doctor.try_step(True, "float32", [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 11)"])
    assert not trial.ok and trial.detail.startswith("killed by signal 11")


def test_a_failing_child_shows_its_last_line():
    trial = doctor.try_step(True, "float32", [sys.executable, "-c", "raise RuntimeError('No algorithm worked!')"])
    assert not trial.ok and trial.detail == "exit status 1: RuntimeError: No algorithm worked!"


def test_what_tensorflow_says_is_found_above_its_lists_of_kernels():
    said = ("  File x, line 3\ntensorflow.errors_impl.InvalidArgumentError: No OpKernel was registered to support Op "
            "'MaxPool3D'\nRegistered kernels:\n  device='CPU'; T in [DT_FLOAT]\n\n\t [[a/MaxPool3D]] [Op:x]\n")
    assert doctor._reason(said) == "InvalidArgumentError: No OpKernel was registered to support Op 'MaxPool3D'"
    graph = ("a.b.UnknownError: Graph execution error:\nNode: 'conv3d'\nNo algorithm worked! Out of memory\n"
             "\t [[{{node conv3d}}]]\n")
    assert doctor._reason(graph) == "No algorithm worked! Out of memory"


def test_a_hanging_child_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "STEP_SECONDS", 0.5)
    trial = doctor.try_step(True, "float32", [sys.executable, "-c", "import time; time.sleep(30)"])
    assert not trial.ok and trial.detail == "no answer within 0.5 s"


def test_exit_status_follows_plain_training(monkeypatch):
    said = []
    monkeypatch.setattr(doctor, "try_step", lambda xla, precision: doctor.Trial(xla, precision, not xla, "detail"))
    assert doctor.examine(said.append, [(False, "float32"), (True, "float32")]) == 0
    assert "Leave these alone: float32 with XLA." in said[-1]
    assert doctor.examine(said.append, [(True, "float32")]) == 1
    assert "Not even float32" in said[-1]
