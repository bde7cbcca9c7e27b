"""The report: self-contained, escaped, with alternative texts."""

import base64
import re

import nbformat
import pandas as pd
import pytest

from lungct import report, runs

PIXEL = base64.b64encode(b"no real picture").decode()


def notebook(tmp_path, cells):
    path = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def figure_cell(tags=()):
    out = nbformat.v4.new_output("display_data", data={"image/png": PIXEL, "text/plain": "<Figure>"})
    return nbformat.v4.new_code_cell("plot()", outputs=[out], metadata={"tags": list(tags)})


def test_tagged_figures_take_the_heading_above_them(tmp_path):
    path = notebook(tmp_path, [nbformat.v4.new_markdown_cell("# A\n## Slices in mm"), figure_cell(["report"]),
                               nbformat.v4.new_markdown_cell("## Other"), figure_cell()])
    assert report.tagged_figures(nbformat.read(path, as_version=4)) == [("Slices in mm", PIXEL)]


def test_chapter_has_alternative_texts_and_no_scripts(tmp_path):
    path = notebook(tmp_path, [nbformat.v4.new_markdown_cell('## Slices "in" mm'), figure_cell(),
                               nbformat.v4.new_code_cell("x = 1  # <script>alert(1)</script>")])
    body = report.chapter_html(path)
    assert "<script" not in body and body.count("<img") == 1
    assert 'alt="Slices &quot;in&quot; mm"' in body


def test_page_asks_nobody():
    page = report.page_html("t", "<p>x</p>")
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_hostile_text_stays_text():
    html = report.table_html(pd.DataFrame({"<b>": ["<script>alert(1)</script>"]}), "<i>")
    assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html


def test_empty_counts_are_said():
    html = report.count_table(pd.Series([], dtype=object), "reason", "Excluded stacks")
    assert html == "<p>Excluded stacks: none.</p>"


def test_findings_are_ordered_worst_first():
    finding = {"message": "m", "remedy": "r", "evidence": {}}
    audit = {"verdict": "failed", "findings": [{**finding, "name": "second", "severity": "warning"},
                                               {**finding, "name": "first", "severity": "error"}]}
    html = report.audit_html(audit)
    assert html.index("first") < html.index("second") and "<strong>failed</strong>" in html


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(runs.InputError, match=r"lacks 01_explore_dicom, .*finish it with lungct run"):
        report.build(tmp_path)


@pytest.mark.parametrize(("patients", "words"), [
    (1, "1 labelled patient is too few"), (3, "3 labelled patients are too few")])
def test_too_few_patients_are_said_in_words(patients, words):
    labels = pd.DataFrame({"patient_id": [f"p{n}" for n in range(patients)] + ["other"],
                           "role": ["train"] * patients + ["unused"]})
    assert words in report.too_few_html({"metrics": {"cpm": {"estimable": False}}}, labels)
    assert report.too_few_html({"metrics": {"cpm": {"estimable": True}}}, labels) == ""
