"""The book: the executed notebooks as web pages. Built by `make docs`; nothing is executed here."""

import re

project = "lungct"
author = "The lungct authors"
copyright = "2026, the lungct authors; text and code under Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = []  # no formulas in the book, so no MathJax and no request to anywhere
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "ref.python"]  # BadFile is at home in two modules
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
autodoc_typehints = "description"

html_theme = "sphinx_book_theme"
html_title = "lungct"
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2}
html_static_path = []


def one_line_parameters(app, what, name, obj, options, lines) -> None:
    """`name : what it is` in one line, as the package writes it, into what napoleon takes for a name and its text."""
    for at, line in reversed(list(enumerate(lines))):
        if told := re.match(r"([\w.]+(?:, [\w.]+)*) : (.+)$", line):
            lines[at : at + 1] = [told[1], "    " + told[2]]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", one_line_parameters, priority=100)
