"""The benchmarks of training: on an accelerator with next to nothing installed, and on this processor against peers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_training import fill_head

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
BARE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pandas", "scipy", "pyarrow", "sklearn", "pydicom", "psutil"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
whole = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("pandas", "scipy") else whole(name, package)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])  # as for any script
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_steps_are_measured_without_tables(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- gpu -->\n\n## Older\n\n<!-- mine -->\n\nkept\n")
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--sizes", "16", "--batch", "2", "--steps", "2",
               "--precisions", "float32", "--append", str(page)]
    quiet = os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=quiet, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text()
    assert text.startswith("# Results\n\n<!-- gpu -->\n\n## Training steps: CPU, Keras") and "Older" not in text
    assert text.endswith("\n\n<!-- mine -->\n\nkept\n")
    size, precision, jit, rate, *_ = [cell.strip() for cell in text.splitlines()[-5].strip("|").split("|")]
    assert (size, precision, jit) == ("16^3", "float32", "False") and float(rate) > 0


sys.path.insert(0, str(SCRIPT.parent))
TORCH = importlib.util.find_spec("torch") is not None


def test_a_part_takes_the_place_of_its_old_self_and_all_else_stays(tmp_path, monkeypatch):
    import common

    results = tmp_path / "results.md"
    monkeypatch.setattr(common, "RESULTS", results)
    common.publish("store", lambda _: ["## Store\n"])
    common.publish("train", lambda _: ["## Train\n", "- a goal\n"])
    common.write_part(results, "gpu", "## Steps\n")
    results.write_text(results.read_text() + "\n<!-- by-hand -->\n\n## Notes\n")
    before = results.read_text()
    assert before == ("# Benchmark results\n\n<!-- store -->\n\n## Store\n\n<!-- train -->\n\n## Train\n\n- a goal\n\n"
                      "<!-- gpu -->\n\n## Steps\n\n<!-- by-hand -->\n\n## Notes\n")
    common.publish("train", lambda _: ["## Train\n", r"- \1 goal" + "\n"])
    common.write_part(results, "gpu", "## Other steps\n")
    assert results.read_text() == before.replace("a goal", r"\1 goal").replace("## Steps", "## Other steps")


def test_the_results_are_in_the_form_that_publish_gives_them(tmp_path):
    import common

    page = tmp_path / "results.md"
    page.write_bytes(common.RESULTS.read_bytes())
    old = page.read_text().split("<!-- store -->\n")[1].split("<!-- train -->")[0]
    common.write_part(page, "store", old)
    assert page.read_text() == common.RESULTS.read_text()


@pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.skipif(
    importlib.util.find_spec(name) is None, reason=f"no {name}")) for name in ("jax", "torch")])
def test_training_steps_are_measured_on_another_backend(backend):
    quiet = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), "--sizes", "16", "--batch", "2", "--steps", "2", "--precisions", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"on {backend}" in done.stdout
    assert float(done.stdout.splitlines()[-2].split("|")[4]) > 0, done.stdout


@pytest.mark.skipif(not TORCH, reason="no torch: pip install -e '.[bench]'")
def test_the_network_in_plain_torch_is_that_of_chapter_5():
    import torch
    import torch_network
    import train

    from lungct import training

    training.reproducible(0)
    batch = train.example_batch(16, 2)
    ours = training.build_network(16, train.CLASSES, (8, 16), dropout=0)
    theirs = torch_network.Network(len(train.CLASSES), (8, 16), dropout=0, at_end=True)
    fill_head(ours)
    assert sum(map(np.size, ours.trainable_weights)) == sum(values.numel() for values in theirs.parameters())
    take_over(ours, theirs)
    volumes, wanted = torch_network.tensors(batch)
    expected = ours.predict_on_batch(batch["seen"])
    with torch.no_grad():
        got = theirs.eval()(volumes)
        loss = torch_network.loss(got, wanted).item()
    for name, values in expected.items():
        moved = got[name].permute(0, 2, 3, 4, 1) if got[name].ndim == 5 else got[name]
        assert np.allclose(values, moved.numpy(), atol=1e-4), name
    terms = [np.asarray(training.LOSSES[name](batch[name], expected[name])) for name in training.LOSSES]
    assert loss == pytest.approx(np.sum(terms, axis=0).mean(), rel=1e-4)


def take_over(ours, theirs):
    """Give the torch network the weights of the Keras network, layer by layer in the order of their names."""
    levels = len(theirs.downs)
    names = {f"down{i}": block for i, block in enumerate(theirs.downs)}
    names |= {f"level{i}": block for i, block in enumerate(theirs.levels, 1)}
    names |= {f"up{levels - 2 - i}": block for i, block in enumerate(theirs.ups)} | {"bottom": theirs.bottom}
    pairs = {name: block.conv for name, block in names.items()}
    pairs |= {f"up{levels - 2 - i}_mix": mix for i, mix in enumerate(theirs.mixes)}
    pairs |= {name: getattr(theirs, name) for name in ("heat", "box", "subtype")}
    for name, module in pairs.items():
        kernel, bias = map(np.asarray, ours.get_layer(name).get_weights())
        module.weight.data.copy_(torch_from(np.moveaxis(kernel, (-1, -2), (0, 1))).reshape(module.weight.shape))
        module.bias.data.copy_(torch_from(bias))
    for name, values in zip(("mean", "variance"), ours.get_layer("evidence_scale").get_weights(), strict=False):
        getattr(theirs.scale, name).copy_(torch_from(values))


def torch_from(values):
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


@pytest.mark.slow
def test_contenders_are_timed_in_turn_and_a_missing_one_is_named(tmp_path, monkeypatch):
    import train

    ours = train.TORCH if TORCH else train.KERAS  # one of them, for a process that starts costs seconds
    monkeypatch.setattr(train, "CONTENDERS", {
        (ours, "float32"): (train.SAME, ""), ("MONAI none", "float32"): ("", ""),  # it dies: there is no such network
        ("MONAI UNet", "float32"): ("another", "no_such_package")})
    found = train.speeds(16, 2, 1, tmp_path, rounds=2)
    assert found[ours, "float32"] > 0
    assert found["MONAI none", "float32"] == 0 and found["MONAI UNet", "float32"] is None
    monkeypatch.setitem(train.CONTENDERS, (train.TORCH, "float32"), (train.SAME, ""))
    text = train.step_table(16, 2, found | {(train.TORCH, "float32"): found[ours, "float32"]})
    assert "| MONAI UNet | another | float32 | not installed |" in text
    assert "| MONAI none |  | float32 | died |" in text


@pytest.mark.skipif(not TORCH, reason="without torch, the test above has it among the contenders")
def test_the_bare_step_of_keras_learns():
    import train

    # not smaller: on maps of 2^3, oneDNN's bfloat16 gradient of a kernel reads memory that nobody wrote
    step = train.keras_step(train.example_batch(32, 2), half=True)
    first = step()
    assert min(step() for _ in range(5)) < first


def test_goals_name_what_was_reached():
    import train

    speeds = dict.fromkeys(train.CONTENDERS, 30.0) | {(train.TORCH, "float32"): 10.0}
    text = train.goals({64: speeds}, 93.4, 3.2, {"input": 0.021, "low": 0.004, "high": 0.038})
    assert "step at 64^3 in float32, times plain torch: goal 1.5 or more, reached 3.00" in text
    assert "in bfloat16, times plain torch: goal 1.5 or more, reached 1.00" in text
    assert "goal 90 or more, reached 93.4" in text and "goal below 5, reached 3.2" in text
    assert "goal below 5, reached 2.1, 95 % interval 0.4 to 3.8" in text


def test_strangers_are_refused_where_they_would_be_none(tmp_path, monkeypatch):
    import strangers

    from lungct import runs

    with pytest.raises(runs.InputError, match="01_explore_dicom"):
        strangers.check(tmp_path, 1)
    facts = {"seed": 1, "inputs": {"dicom_path": {"path": ""}}}
    monkeypatch.setattr(strangers.runs, "check_finished", lambda *_: None)
    monkeypatch.setattr(strangers.runs, "load_manifest", lambda *_: facts)
    strangers.check(tmp_path, 2)
    with pytest.raises(runs.InputError, match="has seed 1 itself"):
        strangers.check(tmp_path, 1)
    facts["inputs"]["dicom_path"]["path"] = "/data"
    with pytest.raises(runs.InputError, match="no run on phantoms"):
        strangers.check(tmp_path, 2)
