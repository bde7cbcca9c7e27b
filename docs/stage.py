"""Copy the executed notebooks into docs/_staging as a reader wants them: without directives and hidden cells."""

import re
import shutil
from pathlib import Path

import nbformat

from lungct.report import _said, _without_directives

DOCS = Path(__file__).resolve().parent
NBS, PACKAGE, STAGING = DOCS.parent / "nbs", DOCS.parent / "lungct", DOCS / "_staging"
LINK = re.compile(r"\]\(([^()#\s]*)(#[^()\s]*)?\)")

TOC = """```{toctree}
:hidden:
:caption: Course
01_explore_dicom
02_parse_annotations
03_build_volumes
04_check_labels
05_train_3d_cnn
06_evaluate
```

```{toctree}
:hidden:
:caption: Appendix
appendix/headers
appendix/phantom
appendix/scale_model
appendix/plots
appendix/pixels
appendix/loops
appendix/suv
appendix/runs
appendix/workers
appendix/course
appendix/crossval
appendix/report
appendix/exchange
appendix/predict
appendix/doctor
appendix/download
```

```{toctree}
:hidden:
:caption: More
docs/larger_run
```

```{toctree}
:hidden:
:caption: Reference
:glob:
reference/*
```
"""
REFERENCE = """# lungct.{name}

```{{eval-rst}}
.. automodule:: lungct.{name}
   :members:
```
"""


def linked(text: str) -> str:
    """Links between notebooks, and between them and docs, as they hold in the book: its headings are in lower case."""
    def moved(link):
        place, heading = link[1], link[2] or ""
        if re.match(r"[a-z]+:", place):
            return link[0]
        return f"]({place.replace('../docs/', 'docs/').replace('../nbs/', '../')}{heading.lower()})"

    return LINK.sub(moved, text)


def readable(notebook):
    """The notebook without nbdev's directives, without cells that hold nothing else, and without hidden ones."""
    kept = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if re.match(r"#\|\s*hide", cell.source):
                continue
            cell.source = _without_directives(cell.source).strip("\n")
            if not cell.source and not cell.outputs:
                continue
            if shows := _said(cell):
                cell.metadata["mystnb"] = {"image": {"alt": shows}}
        else:
            cell.source = linked(cell.source)
        kept.append(cell)
    notebook.cells = kept
    return notebook


def stage() -> int:
    """Fill docs/_staging anew; returns the number of notebooks."""
    shutil.rmtree(STAGING, ignore_errors=True)
    sources = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    for source in sources:
        target = STAGING / source.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        notebook = readable(nbformat.read(source, as_version=4))
        if source.name == "index.ipynb":
            notebook.cells.append(nbformat.v4.new_markdown_cell(TOC, id="toc"))
        nbformat.write(notebook, target)
    (STAGING / "reference").mkdir()
    for module in PACKAGE.glob("[a-z]*.py"):
        (STAGING / "reference" / f"{module.stem}.md").write_text(REFERENCE.format(name=module.stem), encoding="utf-8")
    (STAGING / "docs").mkdir()
    for page in DOCS.glob("*.md"):
        (STAGING / "docs" / page.name).write_text(linked(page.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in DOCS.glob("*.png"):
        shutil.copy(picture, STAGING / "docs")
    shutil.copy(DOCS / "conf.py", STAGING / "conf.py")
    return len(sources)


if __name__ == "__main__":
    print(f"{stage()} notebooks staged")
