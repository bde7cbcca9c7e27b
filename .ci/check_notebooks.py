"""Check that the notebooks are in good order: form, size, outputs, and outputs that belong to the present code."""

import ast
import base64
import hashlib
import re
import statistics
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
MAX_CELL_LINES, MAX_LINE, MAX_MEDIAN = 30, 120, 12
MAX_NOTEBOOK, MAX_FIGURE = 1_500_000, 150_000
CLOSING = ("## Limits", "## Summary", "## Exercises")
MACHINE_PATHS = re.compile(r"/work/|/tmp/|/home/|/root/")


def notebooks() -> list[Path]:
    return sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def module_of(notebook) -> str | None:
    found = re.search(r"^#\| default_exp (\w+)", "\n".join(c.source for c in code_cells(notebook)), re.M)
    return found.group(1) if found else None


def imported(notebook) -> set[str]:
    """Names of lungct modules that a notebook's code imports."""
    names = set()
    for line in "\n".join(c.source for c in code_cells(notebook)).splitlines():
        if found := re.match(r"\s*from lungct import (.+)", line):
            names |= {part.split(" as ")[0].strip(" ()") for part in found.group(1).split(",")}
        elif found := re.match(r"\s*(?:from|import) lungct\.(\w+)", line):
            names.add(found.group(1))
    return names


def code_stamps() -> dict[Path, str]:
    """For each notebook a hash of the code its outputs depend on: its own, and that of what it imports.

    A chapter also depends on the chapters before it, whose artifacts it reads.
    """
    loaded = {path: nbformat.read(path, as_version=4) for path in notebooks()}
    homes = {module_of(notebook): path for path, notebook in loaded.items() if module_of(notebook)}
    chapters = [path for path in loaded if re.match(r"\d\d_", path.name)]

    def reach(path: Path, seen: set[Path]) -> set[Path]:
        if path not in seen:
            seen.add(path)
            earlier = chapters[: chapters.index(path)] if path in chapters else []
            for other in [homes[name] for name in imported(loaded[path]) if name in homes] + earlier:
                reach(other, seen)
        return seen

    def stamp(path: Path) -> str:
        texts = [cell.source for other in sorted(reach(path, set())) for cell in code_cells(loaded[other])]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    return {path: stamp(path) for path in loaded}


def problems_of(path: Path, stamp: str) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    found = form(path, notebook) + outputs(notebook)
    if path.stat().st_size > MAX_NOTEBOOK:
        found.append(f"{path.stat().st_size / 1e6:.1f} MB, allowed {MAX_NOTEBOOK / 1e6} MB")
    if notebook.metadata.get("lungct", {}).get("code") != stamp:
        found.append("its outputs belong to other code: make notebooks")
    return found


def form(path: Path, notebook) -> list[str]:
    found, first = [], notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# .+\n+> .+", first.source):
        found.append("the first cell is not a title with a blurb ('# Title', '> blurb')")
    if notebook.metadata.get("kernelspec", {}).get("language") != "python":
        found.append("kernelspec.language is not python: papermill would refuse it")
    sizes = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    if sizes and max(sizes) > MAX_CELL_LINES:
        found.append(f"a code cell has {max(sizes)} lines, allowed {MAX_CELL_LINES}")
    seen = [len(re.findall(r"^(?!\s*$|#\|)", cell.source, re.M)) for cell in code_cells(notebook)]
    if seen and statistics.median(seen) > MAX_MEDIAN:
        found.append(f"the median code cell has {statistics.median(seen)} lines, allowed {MAX_MEDIAN}")
    wide = [line for cell in code_cells(notebook) for line in cell.source.splitlines() if len(line) > MAX_LINE]
    if wide:
        found.append(f"{len(wide)} code lines wider than {MAX_LINE}, first: {wide[0][:60]}")
    words = len(prose(notebook).split())
    if words < 2 * sum(sizes):
        found.append(f"{words} words of prose for {sum(sizes)} lines of code, expected twice as many words as lines")
    if path.name != "index.ipynb":
        found += [f"no section {name!r}" for name in CLOSING if name not in prose(notebook)]
    return found + (parameters(notebook) if re.match(r"\d\d_", path.name) else [])


def parameters(notebook) -> list[str]:
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged parameters, expected one"]
    found = []
    for statement in ast.parse(cells[0].source).body:
        line = cells[0].source.splitlines()[statement.lineno - 1]
        try:
            ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            found.append(f"parameter line is no literal: {line}")
        if "#" not in line:
            found.append(f"parameter line lacks its comment: {line}")
    return found


def outputs(notebook) -> list[str]:
    found = []
    results = [out for cell in code_cells(notebook) for out in cell.outputs]
    if not results:
        found.append("committed without any output")
    if any(out.output_type == "error" for out in results):
        found.append("an error is among the outputs")
    if any(out.get("name") == "stderr" for out in results):
        found.append("warnings or progress are among the outputs (stderr)")
    figures = [out["data"]["image/png"] for out in results if "image/png" in out.get("data", {})]
    large = [len(base64.b64decode(figure)) for figure in figures]
    if large and max(large) > MAX_FIGURE:
        found.append(f"a figure has {max(large) / 1000:.0f} KB, allowed {MAX_FIGURE / 1000:.0f} KB")
    texts = "\n".join(str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", "")) for out in results)
    if MACHINE_PATHS.search(texts):
        found.append(f"an output names a path of one machine: {MACHINE_PATHS.search(texts).group()}...")
    return found


def main() -> int:
    stamps = code_stamps()
    rows = [f"{path.relative_to(ROOT)}: {text}" for path in stamps for text in problems_of(path, stamps[path])]
    print("\n".join(rows) or f"{len(stamps)} notebooks in good order")
    return 1 if rows or not stamps else 0


if __name__ == "__main__":
    sys.exit(main())
