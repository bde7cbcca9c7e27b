"""The report in a real browser: it renders, logs no error, and asks the network for nothing."""

import json
import shutil
import subprocess

import nbformat
import pytest

from lungct import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    text = "# A chapter\n\n![outside](https://example.invalid/x.png)\n\n<script src='https://example.invalid/x.js'></script>"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text),
                                               nbformat.v4.new_code_cell("print('done')")])
    nbformat.write(notebook, folder / "chapter.ipynb")
    headline = {"headline": [{"label": "Sensitivity", "text": "not estimable"}]}
    body = report.headline_html(headline) + report.chapter_html(folder / "chapter.ipynb")
    (folder / "index.html").write_text(report.page_html("A page", body), encoding="utf-8")
    return folder / "index.html"


def browse(page, *options):
    command = [CHROMIUM, *QUIET, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_page_renders(page):
    done = browse(page, "--dump-dom")
    assert "not estimable" in done.stdout and "A chapter" in done.stdout


def test_nothing_is_asked_of_the_network(page):
    log = page.parent / "net.json"
    browse(page, "--dump-dom", f"--log-net-log={log}", "--net-log-capture-mode=IncludeSensitive")
    text = log.read_text(errors="replace")
    assert json.loads(text)["events"], "the browser logged its requests"
    assert "example.invalid" not in text, "a chapter's outside image or script was requested"
