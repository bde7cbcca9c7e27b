"""The report in a real browser: quiet, self-contained, readable in the light, in the dark, on a phone and on paper."""

import base64
import io
import json
import os
import shutil
import subprocess

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest

from lungct import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
SCHEMES = {"light": 255, "dark": 0}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def picture():
    part = io.BytesIO()
    matplotlib.image.imsave(part, np.random.default_rng(0).random((60, 180)), cmap="gray", format="png")
    return base64.b64encode(part.getvalue()).decode()


def estimate(value, unit=""):
    return {"estimable": value is not None, "value": value, "low": 0.25, "high": 1.0, "n": 12, "unit": unit,
            "reason": None if value is not None else "at least 10 patients needed"}


def chapter(folder):
    """A notebook with what makes pages wide, and with what would load from outside."""
    text = ("# A chapter\n\n![outside](https://example.invalid/x.png)\n\n"
            "<script src='https://example.invalid/x.js'></script>\n\n"
            + "| a_rather_long_name " * 12 + "|\n" + "|---" * 12 + "|\n" + "| 1 " * 12 + "|\n")
    wide = pd.DataFrame(np.zeros((2, 30)), columns=[f"a_rather_long_name_{k}" for k in range(30)]).to_html()
    outputs = [nbformat.v4.new_output("display_data", data={"text/html": wide, "text/plain": "table"}),
               nbformat.v4.new_output("display_data", data={"image/png": picture(), "text/plain": "figure"}),
               nbformat.v4.new_output("stream", text="x" * 400)]
    cells = [nbformat.v4.new_markdown_cell(text),
             nbformat.v4.new_code_cell(f"print('{'long ' * 60}')", outputs=outputs, metadata={"tags": ["report"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "chapter.ipynb")
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    notebook = chapter(folder)
    metrics = {f"subtype/{model}/{name}": estimate(value) for model, value in (("network", 0.8), ("tabular", None))
               for name in report.SUBTYPE}
    label = "Mean sensitivity from 1/8 to 8 false positives per scan (CPM)"
    headline = {"headline": [{"label": label, "text": "0.80 [0.25, 1.00] (12 phantom test patients)"}] * 5}
    rows = [{"by": "size", "group": "up to 30 mm", "patients": 12, "counted": 20, "right": 15,
             "estimate": estimate(0.75)}]
    audit = {"verdict": "passed with warnings", "findings": [
        {"name": "acquisition-predicts-label", "severity": "warning", "message": "m " * 60, "remedy": "r " * 40}]}
    table = "| metric | estimate |\n|---|---|\n| " + "detection/network/x" * 6 + " | 1 |\n"
    card = report.card_html(f"# Model card\n\n{table}")
    body = report.headline_html(headline) + report.sections_html({
        "Believed?": report.audit_html(audit),
        "Compared": report.compare_html(metrics, "subtype", report.SUBTYPE, "All"),
        "Where it fails": report.groups_html(rows, "lesions", "Found"),
        "Figures": report.figures_html(report.tagged_figures(notebook)), "Model card": report.folded("The card", card),
        "Chapters": report.folded("A chapter", report.chapter_html(folder / "chapter.ipynb"))})
    return report.save_page(folder / "index.html", "A page", body)


class Browser:
    """Chromium spoken to through a pair of pipes, in the protocol of its developer tools."""

    def __init__(self, profile):
        read, self.to = os.pipe()
        self.back, write = os.pipe()
        command = [CHROMIUM, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        redirect = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-"]
        self.process = subprocess.Popen([*redirect, *command], pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.rest, self.number, self.events, self.session = b"", 0, [], None
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{name}.enable")

    def message(self):
        parts = [self.rest]
        while b"\0" not in parts[-1]:          # a message may hold a whole picture
            parts.append(os.read(self.back, 1 << 20))
            assert parts[-1], "the browser is gone"
        text, _, self.rest = b"".join(parts).partition(b"\0")
        return json.loads(text)

    def ask(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page, width=1200, scheme="light"):
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())
        self.run("for (const d of document.querySelectorAll('details')) d.open = true")

    def run(self, script):
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self):
        """Grey values (rows, columns) from 0 to 255."""
        data = base64.b64decode(self.ask("Page.captureScreenshot")["data"])
        return 255 * matplotlib.image.imread(io.BytesIO(data))[..., :3].mean(-1)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_no_error_and_no_request_but_for_the_page_itself(browser, page):
    browser.open(page)
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    said = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
    logged = [e["params"]["entry"] for e in browser.events if e.get("method") == "Log.entryAdded"]
    blocked = [entry for entry in logged if "example.invalid" not in entry["text"]]
    assert not said and not blocked, (said, blocked)


def test_every_picture_has_alternative_text_and_every_heading_cell_its_scope(browser, page):
    browser.open(page)
    assert browser.run("document.images.length") >= 2
    assert browser.run("[...document.images].filter(i => i.src.startsWith('data:') && !i.alt.trim()).length") == 0
    assert browser.run("[...document.images].filter(i => i.src.startsWith('data:') && !i.naturalWidth).length") == 0
    ours = "[...document.querySelectorAll('.wide th')]"
    assert browser.run(f"{ours}.length") > 5 and browser.run(f"{ours}.filter(t => !t.scope).length") == 0
    links = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href')))"
    assert browser.run("document.querySelectorAll('nav a').length") == 6 and browser.run(f"{links}.length") == 0


@pytest.mark.parametrize("width", [375, 320, 1200])
def test_nothing_reaches_over_the_edge_of_the_screen(browser, page, width):
    browser.open(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.body.scrollWidth") <= width


CONTRAST = """(() => {
  const parse = c => c.match(/[0-9.]+/g).map(Number);
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const back = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255]; };
  const texts = [...document.querySelectorAll('main *')].filter(
    e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const ratio = e => { const [a, b] = [light(parse(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); };
  return texts.map(e => [ratio(e), e.tagName + '.' + e.className]).sort((x, y) => x[0] - y[0]);
})()"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_has_contrast_enough(browser, page, scheme):
    browser.open(page, scheme=scheme)
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 40 and ratios[0][0] >= 4.5, ratios[:3]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [375, 1200])
def test_the_headline_is_there_to_be_seen(browser, page, scheme, width):
    browser.open(page, width=width, scheme=scheme)
    seen = browser.screenshot()
    assert seen.shape == (800, width) and len(np.unique(seen.round())) > 10, "the page is not blank"
    assert abs(seen[2, 2] - SCHEMES[scheme]) < 40, "the margin has the colour of the scheme"
    box = browser.run("(r => [r.top, r.bottom, r.left, r.right])(document.querySelector('dd').getBoundingClientRect())")
    top, bottom, left, right = map(round, box)
    number = seen[top:bottom, left:right] / 255
    ground, ink = np.median(number), number.flat[np.abs(number - np.median(number)).argmax()]
    high, low = sorted((ground**2.2, ink**2.2), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5, "the first number stands out from its card"
    assert 0.02 < np.mean(np.abs(number - ground) > 0.3) < 0.5, "letters are some of its pixels, not all"
    cards = browser.run("document.querySelectorAll('.headline div').length")
    assert cards == 5 and bottom < 800, "the headline is on the first screen"


def test_it_prints_on_white_and_folds_the_chapters_away(browser, page):
    browser.open(page, scheme="dark")
    pdf = base64.b64decode(browser.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 4
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('details')).display") == "none"
    browser.ask("Emulation.setEmulatedMedia", media="", features=[])
