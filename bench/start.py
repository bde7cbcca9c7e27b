"""How long one waits before anything happens: imports, calls of the command, and the index of the whole collection.

For the collection stands its scale model: 251,135 files with its counts and quirks on tiny images, 1.1 GB of disk.
"""

import json
import subprocess
import sys
from pathlib import Path

from common import REPEATS, goal, measure, publish, table, timed, today_here
from memory import peak_mb

CALLS = {"import lungct": ["-c", "import lungct"], "python, doing nothing": ["-c", "pass"]} | {
    f"lungct {words}": ["-m", "lungct", *words.split()] for words in (
        "--version", "--help", "run --help", "run -p epochs nonsense", "predict nowhere --model nowhere",
        "phantom --help", "crossval --help", "download --help")}
HEAVY = ("tensorflow", "keras", "torch", "jax")
FIRST, AGAIN = "first call", "second call, nothing changed"


def call(arguments: list[str]):
    return lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  check=False)


def heavy_modules(arguments: list[str]) -> str:
    """Which of the slow packages a call imports."""
    told = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False)
    seen = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines() if line.startswith("import time:")}
    return ", ".join(name for name in HEAVY if name in seen) or "none"


def work(root: str, cache: str) -> None:
    """The work of one process: the index of a tree, with a cache."""
    from lungct import dicom

    instances, problems = dicom.index_dicom(root, workers=2, cache=cache)
    print(json.dumps({"images": len(instances), "problems": len(problems)}))


def in_fresh_process(root: Path, cache: Path) -> dict:
    command = [sys.executable, __file__, str(root), str(cache)]
    counts, costs = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(counts) | json.loads(costs)


def sections(scratch: Path) -> list[str]:
    seconds = measure({name: call(arguments) for name, arguments in CALLS.items()})
    rows = [(name, f"{spent:.2f}", heavy_modules(CALLS[name])) for name, spent in seconds.items()]
    model = scratch / "model"
    made = timed(lambda: subprocess.run([sys.executable, "-m", "lungct", "phantom", str(model), "--scale-model"],
                                        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    found = {name: in_fresh_process(model / "Lung-PET-CT-Dx", scratch / "cache.parquet") for name in (FIRST, AGAIN)}
    index = [(name, f"{one['images']:,}", str(one["problems"]), f"{one['s']:.1f}", f"{one['mb']:.0f}")
             for name, one in found.items()]
    note = ("Two processes; each call in a fresh one, once, warm page cache; MB is the largest resident set of the one "
            f"that asks. The model was made in {made:.0f} s.")
    return [today_here(f"medians of {REPEATS} calls."),
            table("Calls that do not train", "what | s | slow packages it imports", rows),
            table("Index of the scale model", "what | images | problems | s | MB", index, note),
            "\n".join([goal("slowest call, s", "1 or less", max(seconds.values()), "{:.2f}"),
                       goal("index of the scale model, memory in MB", "below 2,000", found[FIRST]["mb"], "{:.0f}"),
                       goal("index of the scale model, second call, s", "below 5", found[AGAIN]["s"])]) + "\n"]


if __name__ == "__main__":
    if sys.argv[1:]:
        spent = timed(lambda: work(*sys.argv[1:]))
        print(json.dumps({"s": spent, "mb": peak_mb()}))
    else:
        publish("start", sections)
