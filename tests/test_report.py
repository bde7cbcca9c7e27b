"""The report: self-contained, escaped, with alternative texts."""

import base64
import json
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


def test_a_figure_may_say_more_than_its_heading(tmp_path):
    cell = figure_cell(["report"])
    cell.source = "# figure: one slice\nplot()"
    path = notebook(tmp_path, [nbformat.v4.new_markdown_cell("## Slices"), cell])
    figures = report.tagged_figures(nbformat.read(path, as_version=4))
    assert figures == [("Slices: one slice", PIXEL)] and 'alt="Slices: one slice"' in report.figures_html(figures)


def test_chapter_has_alternative_texts_and_no_scripts(tmp_path):
    path = notebook(tmp_path, [nbformat.v4.new_markdown_cell('## Slices "in" mm'), figure_cell(),
                               nbformat.v4.new_code_cell("x = 1  # <script>alert(1)</script>")])
    body = report.chapter_html(path)
    assert "<script" not in body and body.count("<img") == 1
    assert 'alt="Slices &quot;in&quot; mm"' in body


def test_a_chapter_keeps_to_its_place_on_the_page(tmp_path):
    """Its headings stand below those of the page, its tables bring no style along, its images say what they show."""
    frame = pd.DataFrame({"mm": [1.0]}, index=["row"])
    outputs = [nbformat.v4.new_output("display_data", {"text/html": frame.style.to_html() + frame._repr_html_()})]
    shows = figure_cell()
    shows.source = "# figure: one slice\nplot()"
    cells = [nbformat.v4.new_markdown_cell("# A chapter\n## Slices"), nbformat.v4.new_code_cell("#| default_exp a"),
             nbformat.v4.new_code_cell("#| export\nx = 1", outputs=outputs), shows]
    body = report.chapter_html(notebook(tmp_path, cells))
    assert re.findall(r"<(h\d)", body) == ["h3", "h4"] and report._title(body) == "A chapter"
    assert "<style" not in body and "border=" not in body and "#|" not in body and body.count("<pre") == 2
    assert '<th scope="col">mm</th>' in body and '<th scope="row">row</th>' in body and 'alt="one slice"' in body


def test_a_difference_is_told_by_the_names_of_the_figures():
    assert report._in_words("network_minus_tabular_position_size") == "network minus table: position + size"
    assert report._in_words("network_calibrated") == "network calibrated"
    assert report.estimate_text(estimate(-0.001)) == "0.00 [0.10, 0.90]"
    words = report.words_html()
    assert "adenocarcinoma" in words and "<dt>AUC</dt>" in words and "<dt>wrong scans</dt>" in words


def test_page_asks_nobody():
    page = report.page_html("t", "<p>x</p>")
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_hostile_text_stays_text():
    html = report.table_html(pd.DataFrame({"<b>": ["<script>alert(1)</script>"]}), "<i>")
    assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html


def test_empty_counts_are_said():
    html = report.count_table(pd.Series([], dtype=object), "reason", "Excluded stacks", "No stack was <excluded>.")
    assert html == "<p>No stack was &lt;excluded&gt;.</p>"


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


def estimate(value, reason=None):
    return {"estimable": reason is None, "value": value, "low": 0.1, "high": 0.9, "n": 12, "unit": "", "reason": reason}


def test_models_stand_side_by_side_and_missing_numbers_say_so():
    metrics = {"subtype/majority/auc": estimate(0.5), "subtype/tabular_size_age/auc": estimate(0.7),
               "subtype/shuffled_labels/auc": estimate(None, "too few"), "subtype/network/auc": estimate(0.8),
               "other/network/auc": estimate(0.3)}
    html = report.compare_html(metrics, "subtype", {"auc": "AUC", "brier": "Brier score"}, "All")
    order = [html.index(word) for word in (">network<", ">table: size + age<", ">majority<", ">shuffled labels<")]
    assert order == sorted(order) and "0.80 [0.10, 0.90]" in html and "Brier" not in html and "0.30" not in html
    assert html.count("not estimable") == 1 and report.compare_html({}, "subtype", {"auc": "AUC"}, "All") == ""
    assert "1 of 5 numbers are withheld" in report.reasons_html(metrics) and "too few" in report.reasons_html(metrics)


def test_the_headline_sets_the_patients_apart():
    html = report.headline_html({"headline": [
        {"label": "<CPM>", "text": "0.81 [0.56, 0.99] (12 phantom test patients)"},
        {"label": "AUC", "text": "not estimable: at least 10 patients needed"}]})
    assert "<dd>0.81 [0.56, 0.99]<small> (12 phantom test patients)</small></dd>" in html
    assert "&lt;CPM&gt;" in html and "<dd>not estimable: at least 10 patients needed<small></small></dd>" in html


def test_errors_are_listed_with_what_can_be_checked():
    errors = pd.DataFrame({"error": ["missed"] * 3 + ["false alarm"], "patient_id": "P", "stack_id": list("abcd"),
                           "size_mm": 12.5, "slice_thickness_mm": 5.0, "place": "left upper",
                           "score": [0.1, None, 0.3, 0.4], "reason": "<b>near</b>"})
    html = report.errors_html(errors, first=2)
    assert html.count("<tr>") == 1 + 2 + 1 and "in all: 3 missed lesions, 1 false alarm<" in html
    assert "nan" not in html and "<b>" not in html and "left upper" in html
    assert report.errors_html(errors.iloc[:0]) == "<p>No errors.</p>"


def test_groups_keep_facts_beside_what_cannot_be_estimated():
    row = {"by": "sex", "group": "women", "patients": 4, "counted": 8, "right": 7, "estimate": estimate(None, "few")}
    html = report.groups_html([row], "lesions", "Found")
    assert "women" in html and ">7</td>" in html and "not estimable" in html and report.groups_html([], "x", "y") == ""


def test_the_model_card_becomes_a_page_and_stays_text():
    table = "| a | b |\n|---|---|\n| <script>x</script> | 2 |\n"
    body = report.card_html(f"# Model card\n\n**Not for clinical use.**\n\n{table}")
    assert "<h1>Model card" in body and "<strong>Not for clinical use.</strong>" in body
    assert "<script" not in body and '<th scope="col">' in body and 'role="group"' in body
    assert "<h3>Model card" in report.card_html("# Model card", down=2)
    assert '<td class="number">0.5 [0.1, 0.9] mm</td>' in report.card_html("|a|b|\n|---|---|\n|x|0.5 [0.1, 0.9] mm|\n")


def test_nothing_from_outside_stays_in_a_chapter(tmp_path):
    text = ("![away](https://example.invalid/a.png)\n\n"
            "<iframe src='https://example.invalid'></iframe><link href='x.css'>")
    body = report.chapter_html(notebook(tmp_path, [nbformat.v4.new_markdown_cell(text), figure_cell()]))
    assert "example.invalid" not in body and "<link" not in body and body.count("<img") == 1


def test_sections_are_linked_and_empty_ones_left_out():
    html = report.sections_html({"Where it fails": "<p>x</p>", "Nothing": "", "May I believe it?": "<p>y</p>"})
    assert re.findall(r'href="#([^"]+)"', html) == re.findall(r'h2 id="([^"]+)"', html) == [
        "where-it-fails", "may-i-believe-it"]


def test_cross_validation_has_a_page(tmp_path):
    merged = {"headline": [{"label": "CPM", "text": "0.8 (15 phantom test patients)"}], "data": "phantoms",
              "metrics": {"subtype/network/auc_macro": estimate(0.8)},
              "folds": [{"fold": 1, "patients": 3, "subtype/network/auc_macro": None},
                        {"fold": 2, "patients": 4, "subtype/network/auc_macro": 0.75}]}
    runs.save_json(merged, tmp_path / "crossval" / "metrics.json")
    page = report.build_crossval(tmp_path).read_text(encoding="utf-8")
    assert "in 2 folds" in page and "say nothing about patients" in page and "0.80 [0.10, 0.90]" in page
    assert page.count("not estimable") == 1 and ">0.75</td>" in page and "subtype: auc macro" in page


def test_printed_text_and_comments_in_code_are_left_as_they_are(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Head\n\n```bash\n# a comment\nls\n```"),
             nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text='<div id="q">')])]
    cells[1].metadata["tags"] = ["report"]
    cells[1].outputs.append(nbformat.v4.new_output("display_data", {"image/png": "AA=="}))
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = report.chapter_html(tmp_path / "n.ipynb")
    assert "&lt;div id=&quot;q&quot;&gt;" in page or '&lt;div id="q"&gt;' in page
    assert ' id="Head"' not in page and ' id="n-Head"' in page
    assert report.tagged_figures(notebook) == [("Head", "AA==")]


def test_links_of_a_chapter_lead_somewhere_on_the_page_or_are_none(tmp_path):
    text = "# Head\n\n[up](#Head) [other](04_check_labels.ipynb) [gone](#nowhere) [far](https://example.org/x)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), tmp_path / "n.ipynb")
    page = report.chapter_html(tmp_path / "n.ipynb")
    assert sorted(set(re.findall(r'href="([^"]+)"', page))) == ["#n-Head", "https://example.org/x"]
    assert all(word in page for word in ("up", "other", "gone", "far"))


def test_where_images_lie_is_nobodys_business(tmp_path):
    images = tmp_path / "ward 7" / "Muster & Hans"
    images.mkdir(parents=True)
    run = tmp_path / "run"
    (run / "01_explore_dicom").mkdir(parents=True)
    told = {"inputs": {"dicom_path": {"path": str(images), "fingerprint": "x"}}, "schema": runs.SCHEMA_VERSION}
    (run / "01_explore_dicom" / "manifest.json").write_text(json.dumps(told))
    cell = nbformat.v4.new_code_cell(f"dicom_path = {str(images)!r}", outputs=[nbformat.v4.new_output(
        "stream", text=f"read {images}/1.dcm for {run}\n")])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "01.ipynb")
    page = report._chapter(run, tmp_path / "01.ipynb")
    assert "Muster" not in page and "ward" not in page and page.count("&lt;dicom_path&gt;") == 2 and "for run" in page
