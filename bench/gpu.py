"""Training steps on this machine's accelerator, with whichever backend Keras finds: python bench/gpu.py

Needs keras, numpy and one backend (KERAS_BACKEND=tensorflow, jax or torch), nothing else. Prints a Markdown section;
--append FILE puts it into a file, as its part `gpu`. Network and loss are those of chapter 5; batches come from the
host's memory.
"""

import argparse
import datetime
import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
from common import write_part

ROOT = Path(__file__).resolve().parents[1]
CLASSES, FILTERS = ("A", "B", "E", "G"), (16, 32, 64)
# dense peak in TFLOP/s of the matrix units by the makers' data sheets: bfloat16 or float16, and float32 as TensorFloat
PEAKS = {"H200": (989, 495), "H100": (989, 495), "A100": (312, 156), "L40": (181, 91), "L4": (121, 60), "T4": (65, 8),
         "V100": (125, 16), "4090": (165, 83), "3090": (71, 36)}


def chapter_5():
    """The module of chapter 5. It also makes tables, which nothing here asks for: stand-ins take the tables' place."""
    import keras  # noqa: F401 - before the stand-ins: a backend asks whether there is a pandas, and shall hear the truth

    missing = [name for name in ("pandas", "scipy") if importlib.util.find_spec(name) is None]
    stand_ins = {module: MagicMock() for name in missing for module in (name, f"{name}.ndimage")}
    sys.path.insert(0, str(ROOT))
    sys.modules |= stand_ins
    from lungct import training

    for module in stand_ins:
        del sys.modules[module]
    return training


def device_name(backend: str) -> str:
    """Name of the first accelerator, or "CPU"."""
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    if backend == "jax":
        import jax

        first = jax.devices()[0]
        return first.device_kind if first.platform != "cpu" else "CPU"
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0]).get("device_name", "GPU") if found else "CPU"


def examples(size: int, batch: int, targets) -> tuple[np.ndarray, dict]:
    """A batch of noise with one lesion in each volume, and what the network is asked for."""
    rng = np.random.default_rng(0)
    ct_hu = rng.normal(-600, 300, (batch, size, size, size)).astype(np.float32)
    boxes = [np.array([[a, a, a, a + size / 8, a + size / 8, a + size / 8]]) for a in rng.uniform(0, size / 2, batch)]
    return ct_hu, targets(boxes, rng.integers(0, len(CLASSES), batch))


def seconds_a_step(training, size: int, batch: int, precision: str, jit: bool, steps: int) -> float:
    """Median seconds of one `train_on_batch`, after the steps that compile and warm up."""
    training.reproducible(0, exact=not jit)  # with deterministic operations TensorFlow would leave XLA off, unasked
    network = training.build_network(size, CLASSES, FILTERS, precision=precision)
    trainer = training._trainer(network, training.Settings(batch_size=batch))
    trainer.compile(trainer.optimizer, trainer.loss, loss_weights=training._weights(network, training.Settings()),
                    jit_compile=jit)
    if trainer.jit_compile is not jit:
        raise RuntimeError(f"Keras turned jit_compile={jit} into {trainer.jit_compile}")
    ct_hu, wanted = examples(size, batch, lambda boxes, target: training._targets(network, boxes, target,
                                                                                 training.Settings()))
    seen, spent = training.normalise(ct_hu), []
    for step in range(steps + 3):
        began = time.perf_counter()
        trainer.train_on_batch(seen, wanted, return_dict=True)  # the loss comes back as a number: the device is done
        if step >= 3:
            spent.append(time.perf_counter() - began)
    return float(np.median(spent))


def flop_a_volume(training, size: int) -> float:
    """Floating-point operations of one volume in one training step: forward, and twice that backward."""
    sizes = [(layer, layer.output.shape) for layer in training.build_network(size, CLASSES, FILTERS).layers
             if layer.weights and len(layer.output.shape) == 5]
    convolutions = [(layer.count_params(), np.prod(shape[1:4])) for layer, shape in sizes if hasattr(layer, "kernel")]
    return float(sum(6 * parameters * places for parameters, places in convolutions))


def share_of_peak(rate: float, device: str, precision: str) -> str:
    words = re.split(r"[^A-Za-z0-9]+", device)              # an L40S is no L40
    found = [peaks for name, peaks in PEAKS.items() if name in words]
    if not found:
        return "peak unknown"
    return f"{100 * rate / (found[0][precision == 'float32'] * 1e12):.1f} %"


def rows(training, device: str, wanted: argparse.Namespace) -> list[str]:
    lines, ways = [], (False, True) if wanted.jit else (False,)
    if training.keras.backend.backend() == "jax":           # lungct has no other way with JAX
        ways = (True,)
    for size in wanted.sizes:
        work = flop_a_volume(training, size)
        for precision in wanted.precisions:
            for jit in ways:
                try:
                    seconds = seconds_a_step(training, size, wanted.batch, precision, jit, wanted.steps)
                except Exception as error:  # Conv3D fails on some pairs of driver and cuDNN: say how
                    lines.append(f"| {size}^3 | {precision} | {jit} | {type(error).__name__}: {str(error)[:80]} | | |")
                    continue
                rate = wanted.batch / seconds
                lines.append(f"| {size}^3 | {precision} | {jit} | {rate:,.1f} | {rate * work / 1e12:.2f} | "
                             f"{share_of_peak(rate * work, device, precision)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed; three more come first")
    parser.add_argument("--precisions", nargs="+", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--jit", action="store_true", help="also with jit_compile=True (XLA, or torch.compile)")
    parser.add_argument("--append", type=Path, help="Markdown file whose part `gpu` it becomes")
    wanted = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    training = chapter_5()
    import keras

    backend = keras.backend.backend()
    device = device_name(backend)
    text = "\n".join([
        f"## Training steps: {device}, Keras {keras.__version__} on {backend}, {datetime.date.today()}", "",
        f"Batch {wanted.batch}, filters {FILTERS}, median of {wanted.steps} steps; TFLOP/s counts the convolutions, "
        "three times forward. Batches come from the host's memory.", "",
        "| volume | precision | jit | volumes/s | TFLOP/s | share of peak |", "|---|---|---|---|---|---|",
        *rows(training, device, wanted), ""])
    print(text)
    if wanted.append:
        write_part(wanted.append, "gpu", text)


if __name__ == "__main__":
    main()
