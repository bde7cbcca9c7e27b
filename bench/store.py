"""Random batches from stored cubes, ours and other formats; what they weigh; how long a large store takes to open."""

import importlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import formats
import numpy as np
from common import installed, measure, publish, table, today_here
from formats import BATCH, BATCHES, COHORT, NEEDS, OPENERS, ROUNDS, TFRECORD, WRITERS
from series import build, short_series

ENTRIES, FINE = 1_295, 128  # stacks of the whole collection, at the finest grid one would keep on disk


def take(read: formats.Reader, draws: np.ndarray) -> None:
    """Read batches as arrays of their own; a reader that gives futures is asked for a whole batch before any wait."""
    for draw in draws:
        cubes = [read(int(i)) for i in draw]
        batch = np.stack([cube.result() if hasattr(cube, "result") else cube for cube in cubes])
        assert batch.shape == (BATCH, *formats.SHAPE) and batch.dtype == np.int16


def write_all(cubes: np.ndarray, scratch: Path) -> dict[str, tuple[Path, float]]:
    """Folder and seconds of each format; those that are not installed are left out."""
    written = {}
    for number, (name, write) in enumerate(WRITERS.items()):
        if installed(NEEDS.get(name, "")):
            out = scratch / f"format {number}"
            out.mkdir()
            began = time.perf_counter()
            written[name] = out, write(cubes, out) or time.perf_counter() - began  # or what it says of itself
    return written


def read_all(folder: Path, written: dict[str, tuple[Path, float]]) -> dict[str, float | None]:
    """Samples a second of each way."""
    rng = np.random.default_rng(0)
    draws = np.stack([rng.choice(COHORT, BATCH, replace=False) for _ in range(BATCHES)])
    readers = formats.our_readers(folder)
    for name, (of, opened) in OPENERS.items():
        readers[name] = opened(written[of][0]) if installed(NEEDS.get(name, "")) else None
    jobs = {name: read and (lambda read=read: take(read, draws)) for name, read in readers.items()}
    seconds = measure(jobs, ROUNDS)
    rounds = formats.in_tensorflow("read", written[TFRECORD][0]) if TFRECORD in written else []
    records = statistics.median(map(float, rounds)) if rounds else None
    return {name: s and BATCH * BATCHES / s for name, s in (seconds | {TFRECORD: records}).items()}


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def batch_table(folder: Path, written: dict, speeds: dict[str, float | None]) -> str:
    stored = {name: (f"{megabytes(out):.1f}", f"{seconds:.2f}") for name, (out, seconds) in written.items()}
    ours = f"{megabytes(folder / 'volumes'):.1f}", "part of the build"
    rows = []
    for name, speed in speeds.items():
        of = OPENERS.get(name, (name,))[0]
        size = ours if name.startswith("lungct") else stored.get(of, ("", ""))
        rows.append((name, f"{speed:,.0f}" if speed else "not installed", *size))
    note = (f"{COHORT} cubes of CT in int16, batches of {BATCH} drawn at random and copied into one array, "
            f"{BATCH * BATCHES} samples, warm page cache, medians of {ROUNDS} interleaved repeats. lungct's entries "
            "hold the mask, boxes and affine as well; load_volume reads and hashes them all. tf.data, in a process of "
            f"its own, reads the file in order and draws from a buffer of {COHORT} samples, the whole cohort; it, "
            "tensorstore and zarr use threads, the others none.")
    return table("Store: random batches of 64^3 CT", "what | samples/s | MB on disk | s to write", rows, note)


def large_store(series, scratch: Path) -> Path:
    """A store of as many entries as the collection has, of which each is a link to one and the same."""
    import pandas as pd

    from lungct import runs, volumes

    folder = scratch / "large"
    grid = volumes.Grid(FINE, 64 * 6.0 / FINE)
    row = build(series.root, series.instances, series.stacks[:1], folder, grid=grid)
    (first,) = formats.in_order(folder)
    names = [f"P{i:04}" for i in range(ENTRIES)]
    for name in names:
        os.link(first, folder / "volumes" / f"{name}.npz")
    first.unlink()
    many = pd.concat([row] * ENTRIES).assign(stack_id=names, file=[f"volumes/{name}.npz" for name in names])
    runs.save_table(many, folder / "cohort.parquet")
    return folder


def empty_peers(scratch: Path) -> tuple[Path, Path]:
    """One sparse npy of as many cubes, and a folder of as many links to an npy; the same in Zarr where it is there."""
    one, many, shape = scratch / "all.npy", scratch / "npy", (ENTRIES, *(FINE,) * 3)
    np.lib.format.open_memmap(one, "w+", np.int16, shape)
    many.mkdir()
    np.save(many / "0000.npy", np.zeros(shape[1:], np.int16))
    for i in range(1, ENTRIES):
        os.link(many / "0000.npy", many / f"{i:04}.npy")
    if installed("zarr"):
        options = {"shape": shape, "chunks": (1, *shape[1:]), "dtype": np.int16}
        importlib.import_module("zarr").create_array(store=str(scratch / "all.zarr"), **options)
    return one, many


def open_jobs(folder: Path, scratch: Path) -> dict[str, Callable[[], object] | None]:
    from lungct import runs

    one, many = empty_peers(scratch)

    def table_alone():
        return runs.load_table(folder / "cohort.parquet")

    def headers():
        for file in table_alone().file:
            with np.load(folder / file) as archive:
                archive["meta"]

    return {"lungct, table alone": table_alone,
            "lungct, table and header of each entry": headers,
            formats.ONE_NPY: lambda: np.load(one, mmap_mode="r"),
            formats.MANY_NPY + ", memory-mapped": lambda: [np.load(path, mmap_mode="r") for path in many.iterdir()],
            "Zarr 3": (lambda: formats.open_zarr(scratch)) if installed("zarr") else None,
            "tensorstore": (lambda: formats.open_tensorstore(scratch)) if installed("zarr tensorstore") else None}


def open_table(medians: dict[str, float | None]) -> str:
    rows = [(name, f"{value * 1000:.1f}" if value else "not installed") for name, value in medians.items()]
    note = ("To load cubes on demand. Nothing but headers is read: the entries are links to one file, the arrays of "
            "the others are empty. The table of lungct alone says of each entry where it lies and what it is.")
    return table(f"Open {ENTRIES:,} entries at {FINE}^3", "what | ms", rows, note)


def sections(scratch: Path) -> list[str]:
    from lungct import runs, volumes

    series, folder = short_series(scratch), scratch / "store"
    runs.save_table(build(series.root, *series.times(COHORT), folder), folder / "cohort.parquet")
    written = write_all(volumes.load_cohort(folder).ct_hu, scratch)
    speeds = read_all(folder, written)
    opened = measure(open_jobs(large_store(series, scratch), scratch))
    return [today_here(f"cubes of {series.what}."), batch_table(folder, written, speeds), open_table(opened)]


if __name__ == "__main__":
    publish("store", sections)
