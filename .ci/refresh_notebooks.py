"""Execute every notebook on the default phantoms and keep the outputs in nbs/ (make notebooks)."""

import base64
import io
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
from check_notebooks import MAX_FIGURE, NBS, ROOT, code_stamps, notebooks
from nbdev.clean import clean_nb
from PIL import Image, ImageColor

from lungct import course, plots

RUN = ROOT / "runs" / "notebooks"
LARGE_FIGURE = 60_000  # bytes; beyond it a figure is reduced to a palette


def execute_all() -> dict[Path, Path]:
    """Executed copy of each notebook: the chapters from a fresh run of the course, the others one by one."""
    shutil.rmtree(RUN, ignore_errors=True)
    subprocess.run([Path(sys.executable).parent / "lungct", "run", "--run-dir", RUN], cwd=ROOT, check=True)
    executed = {}
    for path in notebooks():
        chapter = RUN / "notebooks" / path.name
        if chapter.is_file() and path.parent == NBS:
            executed[path] = chapter
        else:
            executed[path] = RUN / "notebooks" / "appendix" / path.name
            takes_run = '"parameters"' in path.read_text(encoding="utf-8")
            course.run_chapter(path, executed[path], {"run_dir": str(RUN)} if takes_run else {}, course.Progress())
    return executed


def keep(source: Path, executed: Path, stamp: str) -> None:
    """Take the outputs of `executed` over into `source`, cleaned so that a second refresh makes no noise."""
    notebook, ran = nbformat.read(source, as_version=4), nbformat.read(executed, as_version=4)
    if course.code_of(executed) != course.code_of(source):
        sys.exit(f"{source} was edited while it ran: make notebooks again")
    results = {cell.id: cell.outputs for cell in ran.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [shrink(out) for out in results[cell.id]]
    clean_nb(notebook, allowed_metadata_keys=["lungct"], allowed_cell_metadata_keys=["tags"])
    notebook.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook.metadata["lungct"] = {"code": stamp}
    nbformat.write(notebook, source)


def shrink(output):
    """The output with a large figure reduced to 256 colours, and without the state of widgets."""
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    image = data.get("image/png")
    if image and len(raw := base64.b64decode(image)) > LARGE_FIGURE:
        data["image/png"] = base64.b64encode(reduced(raw)).decode()
    return output


def reduced(raw: bytes) -> bytes:
    """A PNG image in 256 colours, those of boxes and lines among them, though they are rare."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    named = ("#fff", plots.BOX_COLOUR, plots.FOUND_COLOUR, *plots.LINE_COLOURS)
    marks = [ImageColor.getrgb(colour) for colour in named]
    common = np.array(image.quantize(256 - len(marks)).getpalette()[: 3 * (256 - len(marks))]).reshape(-1, 3)
    palette = np.concatenate([common, marks]).astype(np.int64)
    seen, place = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
    nearest = np.square(seen[:, None] - palette).sum(axis=2).argmin(axis=1).astype(np.uint8)
    few = Image.fromarray(nearest[place.ravel()].reshape(image.size[::-1]), "P")
    few.putpalette(palette.astype(np.uint8).ravel().tolist())
    packed = as_png(few)
    return packed if len(packed) <= MAX_FIGURE else as_png(image.quantize(method=Image.Quantize.MAXCOVERAGE))


def as_png(image: Image.Image) -> bytes:
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    copies, stamps = execute_all(), code_stamps()
    for source, executed in copies.items():
        keep(source, executed, stamps[source])
    print(f"{len(copies)} notebooks refreshed")
