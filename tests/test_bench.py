"""The benchmark of the accelerator runs where nothing but keras, numpy and a backend is installed."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
BARE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pandas", "scipy", "pyarrow", "sklearn", "pydicom"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
whole = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("pandas", "scipy") else whole(name, package)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_steps_are_measured_without_tables(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--sizes", "16", "--batch", "2", "--steps", "2",
               "--precisions", "float32", "--append", str(page)]
    quiet = os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=quiet, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text()
    assert text.startswith("# Results\n") and "## Training steps: CPU, Keras" in text
    size, precision, jit, rate, *_ = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert (size, precision, jit) == ("16^3", "float32", "False") and float(rate) > 0
