"""Speed against peers, one command: `make bench`. Interleaved repeats, medians, written to bench/results.md.

A peer that is not installed is named in the table. Without LUNGCT_REAL_DATA, a generated series is measured.
"""

import datetime
import importlib
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPEATS = 5
TREE_FILES, FOREST_FILES = 10_000, 100_000
ONE, TWO = "lungct index_dicom, one process", "lungct index_dicom, two processes"
SPECIFIC = "pydicom specific_tags, one process"
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


def the_tree(scratch: Path, files: int) -> tuple[Path, str]:
    """A tree of so many files with the headers of real or phantom series, each with an identifier of its own.

    A folder of 200 files repeats one series' headers; the pixels are holes in the file, which no header reader visits.
    """
    real = os.environ.get("LUNGCT_REAL_DATA", "")
    source, what = Path(real, "Lung-PET-CT-Dx"), "headers of LUNGCT_REAL_DATA"
    if not real:
        from lungct import phantom

        source, what = Path(phantom.make_cohort(scratch / "heads", patients=2, seed=0)), "headers of phantoms"
    series = {}
    for path in sorted(source.rglob("*.dcm")):
        series.setdefault(path.parent, []).append(path)
    tree, number = scratch / "tree", 0
    for paths in itertools.cycle(series.values()):
        heads = [_head(path) for path in paths]
        (tree / f"{number:05}").mkdir(parents=True)
        for head, uid, size in itertools.islice(itertools.cycle(heads), min(200, files - number)):
            own = uid[:-6] + b"%06d" % number
            with open(tree / f"{number - number % 200:05}" / f"{number:05}.dcm", "wb") as stream:
                stream.write(head.replace(uid, own))
                stream.truncate(size)
            number += 1
        if number == files:
            return tree, f"{files:,} files, {what}"


def _head(path: Path) -> tuple[bytes, bytes, int]:
    from lungct import headers

    row = headers.read_header(path)
    return path.read_bytes()[: row["pixel_offset"]], row["sop_uid"].encode(), row["file_bytes"]


def index_jobs(tree: Path) -> dict[str, Callable[[], object] | None]:
    """Ours walks the tree and builds the table; the peers get the names and read the headers, nothing more."""
    import pydicom

    from lungct import dicom, headers

    names = [str(tree / path) for path in dicom.list_files(tree)[0]]
    wanted, cache = sorted(headers._PLAIN_TAGS), tree.parent / "cache.parquet"

    def dicomsdl():
        sdl = importlib.import_module("dicomsdl")
        return [sdl.open(name, load_until=0x7FDFFFFF) for name in names]

    def gdcm():
        module = importlib.import_module("gdcm")
        scanner = module.Scanner()
        for tag in wanted:
            scanner.AddTag(module.Tag(tag >> 16, tag & 0xFFFF))
        return scanner.Scan(names)

    def simpleitk():
        reader = importlib.import_module("SimpleITK").ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        for name in names:
            reader.SetFileName(name)
            reader.ReadImageInformation()

    return {
        ONE: lambda: dicom.index_dicom(tree, workers=1),
        "lungct index_dicom, cache, nothing changed": lambda: dicom.index_dicom(tree, workers=1, cache=cache),
        SPECIFIC: lambda: [pydicom.dcmread(n, stop_before_pixels=True, specific_tags=wanted) for n in names],
        "pydicom stop_before_pixels": lambda: [pydicom.dcmread(n, stop_before_pixels=True) for n in names],
        "dicomsdl": dicomsdl if installed("dicomsdl") else None,
        "gdcm Scanner": gdcm if installed("gdcm") else None,
        "SimpleITK ReadImageInformation": simpleitk if installed("SimpleITK") else None,
        "open and read 8 KB (limit)": lambda: [headers._read_start(name, 8192) for name in names]}


def forest_jobs(forest: Path) -> dict[str, Callable[[], object]]:
    """One process against two, where there is enough to read that starting a process pays."""
    from lungct import dicom

    return {ONE: lambda: dicom.index_dicom(forest, workers=1), TWO: lambda: dicom.index_dicom(forest, workers=2)}


def index_goals(tree: dict[str, float | None], forest: dict[str, float | None]) -> str:
    return (f"One process is {tree[SPECIFIC] / tree[ONE]:.1f} times as fast as pydicom with specific_tags "
            f"(goal: 15); two processes are {forest[ONE] / forest[TWO]:.2f} times as fast as one (goal: 1.5).\n")


def thin_series(scratch: Path, slices: int = 300) -> Path:
    """A chest of `slices` thin slices of 512 x 512, 157 MB at 300: a phantom's headers and pixels, placed anew."""
    import pydicom

    from lungct import phantom

    root = Path(phantom.make_cohort(scratch / "thin", patients=1, seed=0, quirks=(), matrix=512))
    sources = [pydicom.dcmread(path) for path in sorted(root.rglob("*.dcm"))]
    folder = scratch / "thin series"
    folder.mkdir()
    for k in range(slices):
        image = sources[k * len(sources) // slices]
        image.ImagePositionPatient = [*sources[0].ImagePositionPatient[:2], float(k)]
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"2.25.{10**9 + k}"
        image.InstanceNumber, image.SliceLocation, image.SliceThickness = k + 1, float(k), 1
        image.save_as(folder / f"{k:04}.dcm")
    return folder


def read_jobs(folder: Path) -> dict[str, Callable[[], object] | None]:
    """Ways to read one stack into an array of HU; None for a peer that is not installed."""
    from lungct import dicom

    instances, _ = dicom.index_dicom(folder, workers=1)
    _, instances = dicom.build_stacks(instances)
    first = instances[instances["stack_id"] == instances["stack_id"].dropna().iloc[0]]
    names = [str(folder / p) for p in first.sort_values("slice_index")["path"]]

    def ours_from_the_folder():
        _, found = dicom.build_stacks(dicom.index_dicom(folder, workers=1)[0], root=folder)
        return dicom.read_stack(found[found["stack_id"] == first["stack_id"].iloc[0]], folder)

    return {"lungct read_stack": lambda: dicom.read_stack(first, folder),
            "read bytes (limit)": lambda: sum(len(Path(name).read_bytes()) for name in names),
            "lungct index, sort and read": ours_from_the_folder} | peer_readers(folder, names)


def peer_readers(folder: Path, names: list[str]) -> dict[str, Callable[[], object] | None]:
    def module(name):
        return importlib.import_module(name)

    def simpleitk(files=None):
        sitk = module("SimpleITK")
        files = files or sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        return sitk.GetArrayFromImage(sitk.ReadImage(files))

    def stack(one):
        return np.stack([one(name) for name in names])

    def by_gdcm(name):
        reader = module("gdcm").ImageReader()
        reader.SetFileName(name)
        assert reader.Read()
        image = reader.GetImage()
        shape = image.GetDimension(1), image.GetDimension(0)
        return np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), np.int16).reshape(shape)

    def to_nifti():
        with tempfile.TemporaryDirectory() as out:
            converter = module("dicom2nifti")
            return converter.dicom_series_to_nifti(str(folder), str(Path(out, "x.nii")), reorient_nifti=False)

    def by_monai(reader):
        return lambda: module("monai.transforms").LoadImage(reader=reader, image_only=True)(str(folder))

    jobs = {
        "SimpleITK, names known": ("SimpleITK", lambda: simpleitk(names)),
        "SimpleITK, own series search": ("SimpleITK", simpleitk),
        "pydicom pixel_array": ("pydicom", lambda: stack(lambda name: module("pydicom").dcmread(name).pixel_array)),
        "dicomsdl pixelData": ("dicomsdl", lambda: stack(lambda name: module("dicomsdl").open(name).pixelData())),
        "gdcm ImageReader": ("gdcm", lambda: stack(by_gdcm)),
        "TorchIO ScalarImage": ("torchio", lambda: module("torchio").ScalarImage(folder).data),
        "dicom2nifti": ("dicom2nifti", to_nifti),
        "MONAI ITKReader": ("monai itk", by_monai("ITKReader")),
        "MONAI PydicomReader": ("monai", by_monai("PydicomReader")),
    }
    return {name: job if all(map(installed, needs.split())) else None for name, (needs, job) in jobs.items()}


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
        tree, tree_what = the_tree(Path(scratch), TREE_FILES)
        forest, forest_what = the_tree(Path(scratch, "forest"), FOREST_FILES)
        medians, many = measure(index_jobs(tree)), measure(forest_jobs(forest))
        thin = thin_series(Path(scratch))
        thin_files = len(list(thin.glob("*.dcm")))
        parts = [table(f"Index headers ({tree_what})", medians, TREE_FILES),
                 table(f"Index headers ({forest_what})", many, FOREST_FILES), index_goals(medians, many),
                 table(f"Read one stack to HU, {thin_files} x 512 x 512", measure(read_jobs(thin)), thin_files)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = (f"# Benchmark results\n\n{datetime.date.today()}; {machine}; {what}, {files} files, warm page cache; "
            f"medians of {REPEATS} interleaved repeats. Ratios carry over to other machines, absolute times do not.\n")
    RESULTS.write_text("\n".join([head, *parts]), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
