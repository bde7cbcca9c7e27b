"""The series that are measured: real ones where LUNGCT_REAL_DATA names a folder, else generated ones."""

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

SLICES = 30, 64  # stacks of so many slices are built into cubes: most of the collection
PHANTOMS = 3


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


@dataclass(frozen=True)
class Series:
    """Folders of one stack each under `root`, and the tables of them."""

    root: Path
    what: str
    instances: object
    stacks: object

    def names(self, stack_id: str) -> list[str]:
        """Files of a stack along z."""
        rows = self.instances[self.instances.stack_id == stack_id].sort_values("slice_index")
        return [str(self.root / path) for path in rows.path]

    def times(self, count: int) -> tuple:
        """Tables (instances, stacks) of so many stacks: the same files again, of other patients and series."""
        import pandas as pd

        files, rows, stacks = dict(tuple(self.instances.groupby("stack_id"))), [], []
        for n in range(count):
            stack = self.stacks.iloc[n % len(self.stacks)]
            own = {"stack_id": f"P{n:04}_00000000", "patient_id": f"P{n:04}", "series_uid": f"2.25.{10**9 + n}"}
            rows.append(files[stack.stack_id].assign(**own))
            stacks.append(stack.to_frame().T.assign(**own))
        types = self.stacks.dtypes.to_dict()
        return pd.concat(rows, ignore_index=True), pd.concat(stacks, ignore_index=True).astype(types)


def short_series(scratch: Path) -> Series:
    """The accepted CT stacks of usual length, copied so that each has a folder of its own, as peers want it."""
    real = os.environ.get("LUNGCT_REAL_DATA", "")
    source, what = Path(real, "Lung-PET-CT-Dx"), "series of LUNGCT_REAL_DATA"
    if not real:
        from lungct import phantom

        source, what = Path(phantom.make_cohort(scratch / "cohort", PHANTOMS, quirks=(), matrix=512)), "phantoms"
    instances, stacks = tables(source)
    stacks = stacks[(stacks.modality == "CT") & (stacks.status == "accepted") & stacks.slices.between(*SLICES)]
    found = Series(source, "", instances, stacks)
    for stack_id in stacks.stack_id:
        folder = scratch / "series" / stack_id
        folder.mkdir(parents=True)
        for k, name in enumerate(found.names(stack_id)):
            shutil.copy(name, folder / f"{k:04}.dcm")
    slices = f"{stacks.slices.min()} to {stacks.slices.max()} slices of 512 x 512"
    return Series(scratch / "series", f"{len(stacks)} {what}, {slices}", *tables(scratch / "series"))


def tables(root: Path) -> tuple:
    """(instances, stacks) of a folder, as chapter 1 makes them."""
    from lungct import dicom

    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    return instances, stacks


def build(root: Path, instances, stacks, out: Path, workers: int = 1, grid=None):
    """The cohort table of a store made anew in `out`, without lesions."""
    import pandas as pd

    from lungct import annotations, volumes

    lesions, boxes = (pd.DataFrame(columns=list(c)) for c in (annotations.LESION_COLUMNS, annotations.BOX_COLUMNS))
    return volumes.build_cohort(root, instances, stacks, lesions, boxes, out, grid or volumes.Grid(), workers=workers)
