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
PARTS = ("start", "ingest", "build", "memory", "store", "train", "calibration")
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


def processor() -> str:
    """Its kind and the width of its registers, on which the speed of training depends, as far as they are known."""
    told = Path("/proc/cpuinfo")
    text = told.read_text(encoding="utf-8") if told.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    wide = next((wide for flag, wide in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag} " in text), "")
    return ", ".join(filter(None, (platform.machine(), name and name[1].strip(), wide)))


def today_here(what: str) -> str:
    """The first line of a part: the day, the machine, and what was measured."""
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{datetime.date.today()}; {machine}; {what}\n"


def publish(part: str, sections: Callable[[Path], list[str]]) -> None:
    """Measure one part and put its sections in the place of its old ones; all else in the results stays as it was."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = "\n".join(sections(Path(scratch)))
    write_part(RESULTS, part, fresh)
    print(fresh)


def write_part(path: Path, part: str, fresh: str) -> None:
    """Put `fresh` below the mark of its part, in the place of what was there up to the next mark, or at the end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else TITLE
    old = re.search(rf"^<!-- {part} -->$.*?(?=^<!-- [\w-]+ -->$|\Z)", text, re.DOTALL | re.MULTILINE)
    before, after = (text[:old.start()], text[old.end():]) if old else (text, "")
    blocks = [block.strip() for block in (before, f"<!-- {part} -->\n\n{fresh.strip()}", after)]
    path.write_text("\n\n".join(filter(None, blocks)) + "\n", encoding="utf-8")
