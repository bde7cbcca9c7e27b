"""Speed against peers, one command: `make bench`. Interleaved repeats, medians, written to bench/results.md.

A peer that is not installed is named in the table. Without LUNGCT_REAL_DATA, a generated series is measured.
"""

import datetime
import importlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = 5
RESULTS = Path(__file__).with_name("results.md")


def the_series(scratch: Path) -> tuple[Path, str]:
    """Folder of the series to measure, and what it is: the largest real one, or a phantom's."""
    real = os.environ.get("LUNGCT_REAL_DATA", "")
    if real:
        folders = {p.parent for p in Path(real, "Lung-PET-CT-Dx").rglob("*.dcm")}
        return max(sorted(folders), key=lambda f: len(list(f.iterdir()))), "largest series of LUNGCT_REAL_DATA"
    from lungct import phantom

    root = Path(phantom.make_cohort(scratch / "cohort", patients=1, seed=0, quirks=()))
    folders = {p.parent for p in root.rglob("*.dcm")}
    return max(sorted(folders), key=lambda f: len(list(f.iterdir()))), "a phantom's series"


def index_jobs(folder: Path) -> dict[str, Callable[[], object] | None]:
    def ours():
        from lungct import dicom

        return dicom.index_dicom(folder, workers=1)

    def pydicom_headers():
        import pydicom

        return [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted(folder.glob("*.dcm"))]

    def read_bytes():
        return sum(len(p.read_bytes()[:8192]) for p in sorted(folder.glob("*.dcm")))

    return {"lungct index_dicom": ours, "pydicom stop_before_pixels": pydicom_headers,
            "open and read (limit)": read_bytes}


def read_jobs(folder: Path) -> dict[str, Callable[[], object] | None]:
    from lungct import dicom

    instances, _ = dicom.index_dicom(folder, workers=1)
    _, instances = dicom.build_stacks(instances)
    first = instances[instances["stack_id"] == instances["stack_id"].dropna().iloc[0]]
    names = [str(folder / p) for p in first.sort_values("slice_index")["path"]]

    def simpleitk():
        sitk = importlib.import_module("SimpleITK")
        return sitk.GetArrayFromImage(sitk.ReadImage(names))

    def pydicom_pixels():
        import pydicom

        return [pydicom.dcmread(name).pixel_array for name in names]

    def monai_reader():
        return importlib.import_module("monai.data").ITKReader().read(names)

    return {"lungct read_stack": lambda: dicom.read_stack(first, folder),
            "SimpleITK ReadImage": simpleitk if installed("SimpleITK") else None,
            "pydicom pixel_array": pydicom_pixels,
            "MONAI ITKReader": monai_reader if installed("monai") and installed("itk") else None,
            "read bytes (limit)": lambda: [Path(name).read_bytes() for name in names]}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def measure(jobs: dict) -> dict[str, float | None]:
    """Median seconds of each job; jobs run in turn, so that a drifting machine touches all alike."""
    seconds = {name: [] for name, job in jobs.items() if job}
    for repeat in range(REPEATS + 1):
        for name in seconds:
            began = time.perf_counter()
            jobs[name]()
            if repeat:  # the first round warms caches and imports
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[name]) if job else None for name, job in jobs.items()}


def table(title: str, medians: dict[str, float | None], files: int) -> str:
    ours = next(iter(medians.values()))
    rows = [f"| {name} | {value * 1000:.1f} | {files / value:,.0f} | {value / ours:.2f} |" if value else
            f"| {name} | not installed | | |" for name, value in medians.items()]
    return "\n".join([f"## {title}", "", "| what | ms | files/s | times ours |", "|---|---|---|---|", *rows, ""])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, what = the_series(Path(scratch))
        files = len(list(folder.glob("*.dcm")))
        parts = [table("Index headers, one process", measure(index_jobs(folder)), files),
                 table("Read one stack to HU", measure(read_jobs(folder)), files)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = (f"# Benchmark results\n\n{datetime.date.today()}; {machine}; {what}, {files} files, warm page cache; "
            f"medians of {REPEATS} interleaved repeats. Ratios carry over to other machines, absolute times do not.\n")
    RESULTS.write_text("\n".join([head, *parts]), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
