"""The committed notebooks are in good order, and their outputs belong to the code as it is."""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

import check_notebooks  # noqa: E402

STAMPS = check_notebooks.code_stamps()


@pytest.mark.parametrize("path", STAMPS, ids=lambda path: path.stem)
def test_notebook_is_in_good_order(path):
    assert check_notebooks.problems_of(path, STAMPS[path]) == []


def make(tmp_path, *cells, **metadata):
    path = tmp_path / "01_example.ipynb"
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, **metadata}
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells), metadata=spec), path)
    return path


def test_the_checker_finds_faults(tmp_path):
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    error = nbformat.v4.new_output("error", ename="E", evalue="v", traceback=[])
    warning = nbformat.v4.new_output("stream", name="stderr", text="/home/someone/x.py: warning")
    path = make(tmp_path, text("no title"), code("x = 1\n" * 31, outputs=[error]), code("y = f(2)",
                outputs=[warning], metadata={"tags": ["parameters"]}), lungct={"code": "old"})
    found = "\n".join(check_notebooks.problems_of(path, "new"))
    for fault in ("title with a blurb", "31 lines", "words of prose", "## Limits", "no literal", "lacks its comment",
                  "an error is among", "stderr", "path of one machine", "make notebooks"):
        assert fault in found


def test_stamps_follow_the_code_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(check_notebooks, "NBS", tmp_path)
    code = nbformat.v4.new_code_cell

    def write(name, *sources):
        cells = [code(source, id=f"c{number}") for number, source in enumerate(sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")

    write("01_a", "#| default_exp a", "x = 1")
    write("02_b", "#| default_exp b", "from lungct import tool")
    write("tool", "#| default_exp tool", "y = 1")
    write("apart", "#| default_exp apart", "z = 1")
    before = {path.stem: stamp for path, stamp in check_notebooks.code_stamps().items()}
    write("tool", "#| default_exp tool", "y = 2")
    after = {path.stem: stamp for path, stamp in check_notebooks.code_stamps().items()}
    assert {name for name in before if before[name] != after[name]} == {"tool", "02_b"}
    write("01_a", "#| default_exp a", "x = 2")
    last = {path.stem: stamp for path, stamp in check_notebooks.code_stamps().items()}
    assert {name for name in after if after[name] != last[name]} == {"01_a", "02_b"}
