"""What the parts of the benchmark share: timing in turn, tables, goals, and the file of results."""

import datetime
import importlib.util
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPEATS = 5
PARTS = ("ingest", "build", "memory", "store", "train", "calibration")
RESULTS = Path(__file__).with_name("results.md")
TITLE = "# Benchmark results\n"


def installed(modules: str) -> bool:
    """Whether all the modules, separated by spaces, can be imported."""
    return all(importlib.util.find_spec(module) for module in modules.split())


def measure(jobs: dict, repeats: int = REPEATS, warm: dict | None = None) -> dict[str, float | None]:
    """Median seconds of each job; jobs run in turn, so that a drifting machine touches all alike.

    The first round warms caches and imports and does not count; `warm` names less work for it where a job is slow.
    """
    seconds = {name: [] for name, job in jobs.items() if job}
    for repeat in range(repeats + 1):
        for name in seconds:
            job = jobs[name] if repeat else (warm or jobs).get(name, jobs[name])
            spent = timed(job)
            if repeat:
                seconds[name].append(spent)
    return {name: statistics.median(seconds[name]) if job else None for name, job in jobs.items()}


def timed(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def table(title: str, columns: str, rows: Sequence[Sequence[str] | str], note: str = "") -> str:
    """A section with one Markdown table; `columns` is its first line without the outer bars."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    words = [note, ""] if note else []
    width = columns.count("|") + 1
    return "\n".join([f"## {title}", "", *words, f"| {columns} |", "|" + "---|" * width, *lines, ""])


def goal(what: str, wanted: str, reached: float | None, form: str = "{:.1f}") -> str:
    """One line of a list: what was to be reached, and what was."""
    return f"- {what}: goal {wanted}, reached {'nothing to compare with' if reached is None else form.format(reached)}"


def ratio(other: float | None, ours: float) -> float | None:
    return other / ours if other else None


def today_here(what: str) -> str:
    """The first line of a part: the day, the machine, and what was measured."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{datetime.date.today()}; {machine}; {what}\n"


def publish(part: str, sections: Callable[[Path], list[str]]) -> None:
    """Measure one part and put its sections in the place of its old ones; the other parts stay as they were."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = "\n".join(sections(Path(scratch)))
    parts = read_parts(RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "") | {part: fresh}
    body = [f"<!-- {name} -->\n\n{parts[name].strip()}\n" for name in PARTS if name in parts]
    RESULTS.write_text("\n".join([TITLE, *body]), encoding="utf-8")
    print(fresh)


def read_parts(text: str) -> dict[str, str]:
    """The parts of a file of results. What stands before the first mark was once the whole file: the ingest part."""
    first, *rest = re.split(r"^<!-- (\w+) -->$", text.removeprefix(TITLE), flags=re.MULTILINE)
    found = dict(zip(rest[::2], rest[1::2], strict=True))
    return ({"ingest": first} if first.strip() else {}) | found
