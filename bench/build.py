"""From a folder of files to stored cubes, against peers; what the cubes are worth; and two processes against one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import REPEATS, goal, installed, measure, publish, ratio, table, timed, today_here
from peers import AIR_HU, DEFAULT, EARLIER, LAZY, PEERS, TORCHIO, Source, area, save
from series import Series, build, short_series, tables

SLOW = (DEFAULT, TORCHIO, EARLIER)  # one repeat is enough to see how slow
OURS, TABLES = "lungct, from the folder to the store", "lungct, from the tables to the store"
AS_PEERS = "lungct, header to voxels to grid and no more, as the peers"
LIMIT = "read bytes (limit)"
STACKS, ROUNDS = 256, 3
ONE, TWO, FIRST = "one process", "two processes", "two processes, first call, which starts them"


def new_folder(scratch: Path) -> Path:
    """Somewhere empty, so that nothing is found there and kept."""
    return Path(tempfile.mkdtemp(dir=scratch))


def read_bytes(names: list[str], buffer: memoryview) -> None:
    for name in names:
        with open(name, "rb", buffering=0) as stream:
            stream.readinto(buffer)


def our_jobs(series: Series, scratch: Path) -> dict[str, Callable[[], object]]:
    names = [name for stack_id in series.stacks.stack_id for name in series.names(stack_id)]
    buffer = memoryview(bytearray(max(map(os.path.getsize, names))))
    return {OURS: lambda: build(series.root, *tables(series.root), new_folder(scratch)),
            TABLES: lambda: build(series.root, series.instances, series.stacks, new_folder(scratch)),
            LIMIT: lambda: read_bytes(names, buffer)}


def by_lungct(source: Source, out: Path) -> None:
    """What the peers do, by the parts that the store is built with."""
    from lungct import dicom, headers, pixels

    files = [(name, (facts := os.stat(name)).st_size, facts.st_mtime_ns) for name in source.names]
    table = headers.read_headers("", files).select(["sop_uid", *pixels.COLUMNS[:-1]])
    slices = sorted(table.to_pylist(), key=lambda header: header["path"])
    opened = dicom.OpenStack("", np.reshape(source.affine, (4, 4)), "CT", None, tuple(slices), "")
    save(area(opened, source), out)


def sources(series: Series, cohort) -> list[Source]:
    """What the peers get: the files along z, and the cube that lungct chose."""
    affines = dict(zip(series.stacks.stack_id, series.stacks.affine, strict=True))
    return [Source(str(Path(series.names(row.stack_id)[0]).parent), list(affines[row.stack_id]), list(row.affine))
            for row in cohort.itertuples()]


def measure_folders(series: Series, wanted: list[Source], scratch: Path) -> dict[str, float | None]:
    """Median seconds of each way through all series; slow ways run once, after one series to warm up."""
    def job(through, those):
        return lambda: [through(source, scratch / "cube.npy") for source in those]

    peers = {AS_PEERS: job(by_lungct, wanted)}
    peers |= {name: job(through, wanted) if installed(needs) else None for name, (needs, through) in PEERS.items()}
    warm = {name: job(PEERS[name][1], wanted[:1]) for name in SLOW}
    fast = {name: peer for name, peer in peers.items() if name not in SLOW}
    return (measure(our_jobs(series, scratch) | fast) |
            measure({name: peers[name] for name in SLOW}, repeats=1, warm=warm))


def folder_table(series: Series, medians: dict[str, float | None]) -> str:
    count, ours = len(series.stacks), medians[OURS]
    rows = [(name, f"{value / count * 1000:.1f}", f"{value / ours:.2f}") if value else (name, "not installed", "")
            for name, value in medians.items()]
    note = (f"{series.what}; medians of {REPEATS} interleaved repeats; of the last three rows one repeat. lungct works "
            "in one process, sorts the folder into stacks, finds the lungs, and waits until the disk has each entry "
            "(fsync); one row leaves all that out. Peers are given the files in order, and those that average by area "
            "are given the place of the cube, too; they keep the threads that they start by themselves.")
    return table("Folder to stored 64^3", "what | ms a series | times ours", rows, note)


def folder_goals(medians: dict[str, float | None]) -> list[str]:
    """The goals twice: for the path that the peers go, and for the whole build."""
    def goals(name, what):
        ours = medians[name]
        return [goal(f"MONAI default, in times of {what}", "200 or more", ratio(medians[DEFAULT], ours)),
                goal(f"MONAI lazy, in times of {what}", "15 or more", ratio(medians[LAZY], ours)),
                goal(f"{what}, in times of reading the bytes", "3 or less", ours / medians[LIMIT])]

    return goals(AS_PEERS, "what the peers do") + goals(OURS, "the whole build")


def exact_means(hu_zyx: np.ndarray, affine: np.ndarray, target: np.ndarray, size: int) -> np.ndarray:
    """Area means in float64 on a cube along the scan's axes: one dense matrix of overlaps in mm for each axis."""
    weights = []
    for axis, count in enumerate(hu_zyx.shape[::-1]):
        step, origin = affine[axis, axis], affine[axis, 3]
        ends = origin + step * (np.arange(count)[:, None] + [-0.5, 0.5])
        side = target[axis, axis]
        cells = target[axis, 3] + side * (np.arange(size)[:, None] + [-0.5, 0.5])
        low, high = np.maximum.outer(cells[:, 0], ends.min(axis=1)), np.minimum.outer(cells[:, 1], ends.max(axis=1))
        weights.append(np.clip(high - low, 0, None) / side)
    along_x, along_y, along_z = weights
    means = np.einsum("kyx,Xx->kyX", hu_zyx - AIR_HU, along_x, optimize=True)
    means = np.einsum("kyX,Yy->kYX", means, along_y, optimize=True)
    return np.einsum("kYX,Zk->ZYX", means, along_z, optimize=True) + AIR_HU


def errors_hu(series: Series, cohort, out: Path) -> list[tuple[str, float, float]]:
    """(stack, RMS, largest error) of each stored cube whose axes are the scan's and coarser than it."""
    from lungct import dicom, volumes

    found = []
    for row in cohort.itertuples():
        stack = dicom.read_stack(series.instances[series.instances.stack_id == row.stack_id], series.root)
        target, turn = np.reshape(row.affine, (4, 4)), stack.affine[:3, :3]
        if not np.allclose(turn, np.diag(np.diag(turn))) or max(stack.spacing_zyx_mm) > row.grid_spacing_mm:
            continue
        stored = volumes.load_volume(out / row.file).ct_hu
        error = stored - exact_means(stack.hu_zyx.astype(np.float64), stack.affine, target, row.grid_size)
        found.append((row.stack_id, float(np.sqrt(np.mean(error ** 2))), float(abs(error).max())))
    return found


def quality(series: Series, cohort, out: Path) -> list[str]:
    errors = errors_hu(series, cohort, out)
    rms, largest = [error[1] for error in errors], [error[2] for error in errors]
    rows = [("RMS", f"{np.mean(rms):.3f}", f"{max(rms):.3f}"), ("largest", f"{np.mean(largest):.2f}",
                                                               f"{max(largest):.2f}")] if errors else []
    note = (f"Stored cubes of {len(errors)} of {len(cohort)} series (those along the axes of the body) against area "
            "means from dense matrices in float64. Rounding to whole HU alone gives an RMS of 0.29.")
    return [table("Error of the stored cubes, HU", "error | mean of the series | worst series", rows, note),
            goal("RMS error of the worst series, HU", "1 or less", max(rms, default=None), "{:.3f}") + "\n"]


def two_processes(series: Series, scratch: Path) -> list[str]:
    instances, stacks = series.times(STACKS)

    def job(workers):
        return lambda: build(series.root, instances, stacks, new_folder(scratch), workers)

    first = timed(job(2))
    medians = measure({ONE: job(1), TWO: job(2)}, ROUNDS, warm={ONE: lambda: None, TWO: lambda: None})
    rows = [(name, f"{value:.2f}", f"{value / STACKS * 1000:.1f}", f"{medians[ONE] / value:.2f}")
            for name, value in (medians | {FIRST: first}).items()]
    note = (f"lungct build_cohort from the tables, {STACKS} stacks: those above under other names. Medians of {ROUNDS} "
            f"interleaved repeats; {FIRST.split(',')[1].strip()} once.")
    return [table("Two processes", "what | s | ms a series | times one process", rows, note),
            goal("two processes are so many times as fast as one", "1.6 or more", medians[ONE] / medians[TWO],
                 "{:.2f}") + "\n"]


def sections(scratch: Path) -> list[str]:
    series, out = short_series(scratch), scratch / "store"
    shared = two_processes(series, scratch)
    cohort = build(series.root, series.instances, series.stacks, out)
    medians = measure_folders(series, sources(series, cohort), scratch)
    return [today_here(f"{series.what}, warm page cache."), folder_table(series, medians),
            "\n".join([*folder_goals(medians), ""]), *quality(series, cohort, out), *shared]


if __name__ == "__main__":
    publish("build", sections)
