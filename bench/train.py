"""Training steps on this processor: chapter 5 in Keras against plain torch and MONAI; fit against bare steps.

Each contender lives in a process of its own and makes its steps when it is told to, so that all are measured in turn.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import goal, installed, publish, table, today_here

CLASSES, FILTERS, ROUNDS = ("A", "B", "E", "G"), (16, 32, 64), 5
SIZES = {64: (8, 5), 128: (2, 2)}  # volumes a batch, and steps a round
KERAS, TORCH = "lungct, Keras on TensorFlow", "the same network in plain torch, channels last"
SAME, FLOAT, HALF = "chapter 5", "float32", "bfloat16"
CONTENDERS = {  # what it is called: which network, the precision, what must be installed
    (KERAS, FLOAT): (SAME, ""), (KERAS, HALF): (SAME, ""),
    (TORCH, FLOAT): (SAME, "torch"), (TORCH, HALF): (SAME, "torch"),
    ("MONAI UNet", FLOAT): ("another: UNet 16-32-64", "torch monai"),
    ("MONAI DenseNet121", FLOAT): ("another: DenseNet121", "torch monai")}
TIMES, WHOLE, SHARE, INPUT_ROUNDS = 1.5, 90.0, 5.0, 60


def example_batch(size: int, count: int) -> dict[str, np.ndarray]:
    """Noise with one lesion a volume as the network sees it (n, s, s, s, 2), and its targets."""
    from lungct import training

    few = examples(size, count)
    heat, box = map(np.stack, zip(*(training.encode_targets(boxes, size) for boxes in few.boxes_zyx), strict=True))
    return {"seen": training.normalise(few.ct_hu), "heat": heat, "box": box,
            "subtype": training.encode_subtypes(few.target, len(CLASSES))}


def examples(size: int, count: int):
    from lungct import training

    rng = np.random.default_rng(0)
    ct_hu = rng.normal(-600, 300, (count, size, size, size)).clip(-1000, 400).astype("int16")
    low = rng.uniform(0, size / 2, (count, 1, 3))
    names = np.array([f"p{i:03}" for i in range(count)])
    boxes = list(np.concatenate([low, low + size / 8], axis=2).astype("float32"))
    return training.Examples(ct_hu, boxes, rng.integers(0, len(CLASSES), count), names, names)


def keras_step(batch: dict, half: bool, held: bool = False) -> Callable[[], float]:
    """One bare `train_on_batch` of chapter 5's network; `held`: the batch is made tensors once, not at each step."""
    from lungct import training

    keras = training.keras  # imported there, with the settings that training has
    batch = {name: keras.ops.convert_to_tensor(values) for name, values in batch.items()} if held else batch
    training.reproducible(0)
    network = training.build_network(batch["seen"].shape[1], CLASSES, FILTERS,
                                     precision="mixed_bfloat16" if half else "float32")
    trainer = keras.Model(network.input, network.output)
    trainer.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.01, clipnorm=1.0), dict(training.LOSSES),
                    jit_compile=False)
    wanted = {name: batch[name] for name in training.LOSSES}
    return lambda: trainer.train_on_batch(batch["seen"], wanted, return_dict=True)["loss"]


def torch_step(name: str, batch: dict, half: bool) -> Callable[[], float]:
    import torch_network as t

    if name == TORCH:
        return t.stepper(t.Network(len(CLASSES), FILTERS), batch, t.loss, half)
    return t.stepper(t.monai_network(name.split()[-1], len(CLASSES)), batch, t.monai_loss, half)


def work(name: str, precision: str, file: str) -> None:
    """A contender's process: warm up, then answer each line of standard input, a number of steps, with seconds."""
    with np.load(file, allow_pickle=False) as stored:
        batch = dict(stored)
    half = precision == HALF
    step = keras_step(batch, half, held=True) if name == KERAS else torch_step(name, batch, half)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        values = [step() for _ in range(int(line))]
        assert np.isfinite(values).all(), f"loss {values[-1]}"
        print(time.perf_counter() - began, flush=True)


@dataclass
class Contender:
    """A process that makes training steps; None once it has died."""

    process: subprocess.Popen | None

    @classmethod
    def start(cls, name: str, precision: str, file: Path) -> "Contender":
        command = [sys.executable, __file__, name, precision, str(file)]
        return cls(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    text=True))

    def answer(self, ask: str = "") -> str:
        """What it says to a line, or "" when it has died."""
        try:
            self.process.stdin.write(ask)
            self.process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def speeds(size: int, batch: int, steps: int, scratch: Path, rounds: int = ROUNDS) -> dict:
    """Samples a second of each contender, median of the rounds; None: not installed, 0: died."""
    file = scratch / f"batch-{size}.npz"
    np.savez(file, **example_batch(size, batch))
    running, found = {}, dict.fromkeys(CONTENDERS)
    for who, (_, needs) in CONTENDERS.items():
        if installed(needs):
            running[who] = Contender.start(*who, file)
            found[who] = [] if running[who].answer() == "ready" else None  # one after the other: they would disturb
    for _ in range(rounds):
        for who, contender in running.items():
            if said := contender.answer(f"{steps}\n"):
                found[who].append(batch * steps / float(said))
    for contender in running.values():
        contender.end()
    return {who: (statistics.median(found[who]) if found[who] else 0) if who in running else None
            for who in CONTENDERS}


def fit_against_steps(size: int, batch: int, epochs: int = 6, patients: int = 32) -> tuple[float, float]:
    """Speed of `fit` over that of bare steps, and the share of its time that `fit` spends outside steps, both in %.

    Between the epochs of fit as many bare steps are made on one and the same batch, and timed by themselves.
    """
    from lungct import training

    keras = training.keras
    step, inside = keras_step(example_batch(size, batch), half=False), [0.0]
    one_step = keras.Model.train_on_batch

    def timed_step(model, *values, **options):
        began = time.perf_counter()
        logs = one_step(model, *values, **options)
        inside[0] += time.perf_counter() - began
        return logs

    rows, since = [], [time.perf_counter()]
    settings, cohort = training.Settings(epochs=epochs, batch_size=batch), examples(size, patients)

    def between(row: dict) -> None:
        whole, own, began = time.perf_counter() - since[0], inside[0], time.perf_counter()
        for _ in range(settings.steps(cohort)):
            step()
        rows.append((whole, own, time.perf_counter() - began))
        inside[0], since[0] = 0.0, time.perf_counter()

    keras.Model.train_on_batch = timed_step
    try:
        network = training.build_network(size, CLASSES, FILTERS)
        training.fit(network, cohort, settings=settings, report=between)
    finally:
        keras.Model.train_on_batch = one_step
    whole, own, bare = np.median(rows[1:], axis=0)  # the first epoch compiles
    return 100 * bare / whole, 100 * (1 - own / whole)


def input_share(size: int, batch: int, patients: int = 34) -> dict[str, float]:
    """What chapter 5 measures of its loop, in more rounds."""
    from lungct import training

    training.reproducible(0)
    network = training.build_network(size, CLASSES, FILTERS)
    return training.input_cost(network, examples(size, patients), training.Settings(batch_size=batch), INPUT_ROUNDS)


def step_table(size: int, batch: int, found: dict) -> str:
    base = found[TORCH, FLOAT]
    rows = []
    for (name, precision), speed in found.items():
        said = f"{speed:.1f}" if speed else "not installed" if speed is None else "died"
        rows.append((name, CONTENDERS[name, precision][0], precision, said,
                     f"{speed / base:.2f}" if speed and base else ""))
    note = (f"Batch {batch} of noise that lies in memory as the framework's tensors, forward, backward and AdamW with "
            f"clipping; medians of {ROUNDS} interleaved rounds, each framework with its own threads. {HALF} is Keras' "
            "mixed_bfloat16 and torch's autocast. MONAI's networks are other networks, with a cross-entropy alone: "
            "they say what such a step costs, not which framework is faster.")
    columns = "what | network | precision | samples/s | times torch float32"
    return table(f"Training step at {size}^3", columns, rows, note)


def goals(found: dict[int, dict], kept: float, outside: float, cost: dict[str, float]) -> str:
    lines = []
    for size, speed in found.items():
        for precision in (FLOAT, HALF):
            base = speed[TORCH, precision]
            times = speed[KERAS, precision] / base if base else None
            what = f"step at {size}^3 in {precision}, times plain torch"
            lines.append(goal(what, f"{TIMES} or more", times, "{:.2f}"))
    lines.append(goal("fit at 64^3 against bare train_on_batch, %", f"{WHOLE:.0f} or more", kept))
    lines.append(goal("share of fit outside its steps (drawing, augmentation, targets; no checkpoints), %",
                      f"below {SHARE:.0f}", outside))
    lines.append(goal(f"input's share of a step of the loop at 64^3, batch 4, mean of {INPUT_ROUNDS} rounds, %",
                      f"below {SHARE:.0f}", 100 * cost["input"]) +
                 f", 95 % interval {100 * cost['low']:.1f} to {100 * cost['high']:.1f}")
    note = "On a CPU the thread that makes batches slows the steps, too; so fit loses more than it spends outside them."
    return "\n".join([*lines, "", note]) + "\n"


def sections(scratch: Path) -> list[str]:
    idle = os.getloadavg()[0]  # before anything of ours runs; above about 0.5, somebody else is at work
    kept, outside = fit_against_steps(64, 8)
    cost = input_share(64, 4)
    found = {size: speeds(size, *rest, scratch) for size, rest in SIZES.items()}
    tables = [step_table(size, SIZES[size][0], speed) for size, speed in found.items()]
    return [today_here(f"network of chapter 5, filters {FILTERS}; load before the start {idle:.1f}."), *tables,
            goals(found, kept, outside, cost)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
    else:
        publish("train", sections)
