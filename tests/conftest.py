"""Fixtures shared by all tests: real series when they are at hand, and a tiny generated cohort."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("lungct", deadline=None)       # a busy machine is no fault
hypothesis.settings.load_profile("lungct")
REAL = os.environ.get("LUNGCT_REAL_DATA", "")
LONGEST = [f"test_{name}.py" for name in ("end_to_end", "training", "course", "labels", "survival", "dicom", "predict")]


def pytest_configure(config):
    # one place for thread limits: two test processes with default BLAS threads are slower than one
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lungct import runs  # imports NumPy, which asks for the limit

    runs.fast_convolutions()  # as in lungct.training, where a test imports keras first
    # as a script's background job they would ignore Ctrl-C, and so would the runs that tests interrupt
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    # a file stays in one process; the longest files first, or one process works alone at the end
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter):
    if not REAL:
        terminalreporter.write_line("Left out: tests on real series, because LUNGCT_REAL_DATA names no folder.")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `Lung-PET-CT-Dx/` and `Annotation/` of the real collection; the test is skipped without it."""
    if not REAL:
        pytest.skip("real series left out: LUNGCT_REAL_DATA names no folder")
    folder = Path(REAL).resolve()
    assert (folder / "Lung-PET-CT-Dx").is_dir(), f"LUNGCT_REAL_DATA={REAL} holds no folder Lung-PET-CT-Dx"
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """A cohort of eight small phantoms with every quirk switched on; read only."""
    from lungct import phantom

    return Path(phantom.make_cohort(tmp_path_factory.mktemp("phantom") / "cohort", patients=8, seed=7, matrix=64))
