"""From files to tables and from files to HU, against peers that read headers or stacks. `make bench` runs it."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import REPEATS, installed, measure, publish, table, today_here
from series import the_tree, thin_series

TREE_FILES, FOREST_FILES = 10_000, 100_000
ONE, TWO = "lungct index_dicom, one process", "lungct index_dicom, two processes"
SPECIFIC = "pydicom specific_tags, one process"


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
    return {name: job if installed(needs) else None for name, (needs, job) in jobs.items()}


def speeds(title: str, medians: dict[str, float | None], files: int) -> str:
    ours = next(iter(medians.values()))
    rows = [(name, f"{value * 1000:.1f}", f"{files / value:,.0f}", f"{value / ours:.2f}") if value else
            (name, "not installed", "", "") for name, value in medians.items()]
    return table(title, "what | ms | files/s | times ours", rows)


def sections(scratch: Path) -> list[str]:
    tree, tree_what = the_tree(scratch, TREE_FILES)
    forest, forest_what = the_tree(scratch / "forest", FOREST_FILES)
    medians, many = measure(index_jobs(tree)), measure(forest_jobs(forest))
    thin = thin_series(scratch)
    thin_files = len(list(thin.glob("*.dcm")))
    head = (f"warm page cache; medians of {REPEATS} interleaved repeats. Ratios carry over to other machines, absolute "
            "times do not. The stack that is read has the pixels of a phantom.")
    return [today_here(head), speeds(f"Index headers ({tree_what})", medians, TREE_FILES),
            speeds(f"Index headers ({forest_what})", many, FOREST_FILES), index_goals(medians, many),
            speeds(f"Read one stack to HU, {thin_files} x 512 x 512", measure(read_jobs(thin)), thin_files)]


if __name__ == "__main__":
    publish("ingest", sections)
