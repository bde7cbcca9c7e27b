"""The files that install the project agree with each other, and an import costs little."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): Version(number) for name, number in (line.split("==") for line in LINES)}


def requirements():
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(t for extra in extras.values() for t in extra)]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement):
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} is in pyproject.toml but not in constraints.txt"
    assert requirement.specifier.contains(PINS[name])


@pytest.mark.parametrize("path", sorted((ROOT / "lungct").glob("*.py")), ids=lambda path: path.stem)
def test_no_module_defines_a_function_or_class_twice(path):
    """Two cells of a notebook may be far apart, and the later one silently wins."""
    named = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [name for name, count in Counter(named).items() if count > 1]


def test_constraints_hold_versions_only():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in LINES)


def test_the_extras_are_there():
    assert set(PROJECT["optional-dependencies"]) == {"dev", "codecs", "docs", "bench", "gpu", "jax", "tensorboard"}
    assert set(PROJECT["optional-dependencies"]["codecs"]) <= set(PROJECT["optional-dependencies"]["dev"])
    assert not any("libjpeg-libjpeg" in text for text in PROJECT["optional-dependencies"]["codecs"])  # GPL
    assert PROJECT["optional-dependencies"]["gpu"] == ["tensorflow[and-cuda]"]


def test_conda_installs_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1])
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert "--constraint constraints.txt --editable '.[dev]'" in (ROOT / "Makefile").read_text()


def test_settings_and_package_agree_on_version_and_python():
    settings = (ROOT / "settings.ini").read_text()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "lungct" / "__init__.py").read_text()).group(1)
    assert f"version = {version}\n" in settings
    assert f">={re.search(r'min_python = (.+)', settings).group(1)}" in PROJECT["requires-python"]


def test_installed_packages_are_those_of_the_constraints():
    code = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = {canonicalize_name(name): Version(number) for name, number in (line.split("==") for line in listed)}
    wanted = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert {name: found.get(name) for name in wanted} == {name: PINS[name] for name in wanted}


def test_every_pin_supports_each_python_that_the_project_names():
    """Debian 12 brings 3.11.2: a pin that asks for 3.11.5 would stop the first command of the README there."""
    offered = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert "3.11" in offered
    for found in distributions():
        asked, name = found.metadata.get("Requires-Python"), canonicalize_name(found.metadata["Name"])
        if asked and PINS.get(name) == Version(found.version):
            refused = [python for python in offered if not SpecifierSet(asked).contains(f"{python}.0")]
            assert not refused, f"{name} {found.version} does not run on Python {refused}"


@pytest.mark.parametrize("module", ["lungct", "dicom", "annotations", "volumes", "labels", "headers", "pixels", "suv",
                                    "phantom", "plots", "runs", "course", "report", "doctor", "download", "exchange",
                                    "scale_model", "workers", "loops"])
def test_import_does_not_load_what_is_slow_to_load(module):
    name = "lungct" if module == "lungct" else f"lungct.{module}"
    slow = {"tensorflow", "keras", "torch", "jax"} | (set() if module == "loops" else {"numba"})
    code = f"import {name}, sys; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_library_never_imports_nbdev_or_prints():
    for path in (ROOT / "lungct").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore|execnb)", text, re.M), path.name
        assert not re.search(r"import \*", text), path.name
        if path.name != "course.py":  # the command line speaks to a person
            assert not re.search(r"^\s*print\(", text, re.M), path.name


def test_no_host_of_a_registry_is_named():
    command = ["git", "ls-files"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    hosts = re.compile(r"(pypi|pythonhosted|npmjs|deb\.debian)\.(org|com)")
    for name in filter(None, tracked):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            assert not hosts.search(path.read_text(encoding="utf-8", errors="ignore")), name


def test_the_book_has_every_notebook_and_every_module(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs" / "stage.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    monkeypatch.setattr(stage, "STAGING", tmp_path / "staging")
    stage.stage()
    notebooks = {str(path.relative_to(ROOT / "nbs").with_suffix("")) for path in (ROOT / "nbs").rglob("*.ipynb")
                 if ".ipynb_checkpoints" not in path.parts}
    assert set(re.findall(r"^(?:\d\d_|appendix/)\w+$", stage.TOC, re.M)) == notebooks - {"index"}
    modules = {path.stem for path in (ROOT / "lungct").glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert {path.stem for path in (tmp_path / "staging" / "reference").glob("*.md")} == modules
    assert (tmp_path / "staging" / "docs" / "larger_run.md").is_file()
    before = "[a](../docs/b.md) [c](#Some-Head) [d](../nbs/01.ipynb#X-Y) [e](https://e.org/A#B) ![p](p.png)"
    after = "[a](docs/b.md) [c](#some-head) [d](../01.ipynb#x-y) [e](https://e.org/A#B) ![p](p.png)"
    assert stage.linked(before) == after


def test_the_collection_is_cited_by_one_doi():
    pages = [path for pattern in ("*.md", "data/*.md", "docs/*.md", "nbs/**/*.ipynb", "lungct/*.py")
             for path in ROOT.glob(pattern)]
    cited = [found for path in pages for found in re.findall(r"10\.7937/[\w.-]*\w", path.read_text(encoding="utf-8"))]
    assert len(cited) > 10 and set(cited) == {"10.7937/TCIA.2020.NNC2-0461"}
