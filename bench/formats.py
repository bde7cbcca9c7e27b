"""Formats that cubes are stored in: how each is written, and how one cube is read back by its number."""

import importlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import timed

COHORT, BATCH, BATCHES, ROUNDS = 64, 8, 50, 2
SHAPE = (64, 64, 64)
OURS, PLAIN = "lungct entries, load_volume with its hash check", "lungct entries, np.load of the CT alone"
MAPPED, MEMORY = "lungct entries, CT mapped at its place in the file", "lungct load_cohort, then in memory"
ONE_NPY, MANY_NPY = "one npy of the cohort, memory-mapped", "one npy a series"
ZARR, ZARR_SMALL = "Zarr 3, a chunk a sample, not compressed", "Zarr 3, a chunk a sample, default compression"
TENSORSTORE, TENSORSTORE_SMALL = "tensorstore on that Zarr", "tensorstore on that Zarr, default compression"
TFRECORD = "TFRecord through tf.data, shuffled"
NEEDS = {ZARR: "zarr", ZARR_SMALL: "zarr", TENSORSTORE: "zarr tensorstore", TENSORSTORE_SMALL: "zarr tensorstore",
         TFRECORD: "tensorflow"}
Reader = Callable[[int], np.ndarray]  # one cube by its number


def member_offset(path: Path, name: str = "ct_hu.npy") -> int:
    """Where the numbers of an array begin in an entry, which is not compressed."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
        start = archive.getinfo(name).header_offset
        stream.seek(start)
        local = stream.read(30)
        stream.seek(start + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"))
        if np.lib.format.read_magic(stream) == (1, 0):
            np.lib.format.read_array_header_1_0(stream)
        else:
            np.lib.format.read_array_header_2_0(stream)
        return stream.tell()


def in_order(folder: Path) -> list[Path]:
    return sorted((folder / "volumes").glob("*.npz"))


def our_readers(folder: Path) -> dict[str, Reader]:
    from lungct import volumes

    paths, cohort = in_order(folder), volumes.load_cohort(folder)
    offsets = [member_offset(path) for path in paths]
    return {OURS: lambda i: volumes.load_volume(paths[i]).ct_hu, PLAIN: lambda i: np.load(paths[i])["ct_hu"],
            MAPPED: lambda i: np.memmap(paths[i], np.int16, "r", offsets[i], SHAPE), MEMORY: lambda i: cohort.ct_hu[i]}


def write_npy(cubes: np.ndarray, out: Path) -> None:
    np.save(out / "all.npy", cubes)


def write_many(cubes: np.ndarray, out: Path) -> None:
    for i, cube in enumerate(cubes):
        np.save(out / f"{i:04}.npy", cube)


def write_zarr(cubes: np.ndarray, out: Path, compressors=None) -> None:
    options = {"shape": cubes.shape, "chunks": (1, *SHAPE), "dtype": cubes.dtype, "compressors": compressors}
    importlib.import_module("zarr").create_array(store=str(out / "all.zarr"), **options)[:] = cubes


def write_zarr_small(cubes: np.ndarray, out: Path) -> None:
    write_zarr(cubes, out, "auto")


def write_tfrecord(cubes: np.ndarray, out: Path) -> float:
    """Bytes without an Example around them, the fastest there is; the seconds without the import of TensorFlow."""
    np.save(out / "all.npy", cubes)
    (seconds,) = in_tensorflow("write", out)
    (out / "all.npy").unlink()
    return float(seconds)


def open_many(out: Path) -> Reader:
    names = [out / f"{i:04}.npy" for i in range(COHORT)]
    return lambda i: np.load(names[i])


def open_npy(out: Path) -> Reader:
    return np.load(out / "all.npy", mmap_mode="r").__getitem__


def open_zarr(out: Path) -> Reader:
    return importlib.import_module("zarr").open_array(str(out / "all.zarr"), mode="r").__getitem__


def open_tensorstore(out: Path) -> Reader:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(out / "all.zarr")}}
    array = importlib.import_module("tensorstore").open(spec).result()
    return lambda i: array[i].read()


WRITERS = {ONE_NPY: write_npy, MANY_NPY: write_many, ZARR: write_zarr, ZARR_SMALL: write_zarr_small,
           TFRECORD: write_tfrecord}
OPENERS = {ONE_NPY: (ONE_NPY, open_npy), MANY_NPY: (MANY_NPY, open_many), ZARR: (ZARR, open_zarr),
           ZARR_SMALL: (ZARR_SMALL, open_zarr), TENSORSTORE: (ZARR, open_tensorstore),
           TENSORSTORE_SMALL: (ZARR_SMALL, open_tensorstore)}


def in_tensorflow(task: str, out: Path) -> list[str]:
    """Words printed by this script in a process of its own, so that TensorFlow stays out of this one."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, task, str(out)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout.split()


def with_tensorflow(task: str, out: Path) -> list[float]:
    """Write the records, which takes [s], or read the batches, which takes [s of each round]."""
    import tensorflow as tf

    if task == "write":
        cubes, began = np.load(out / "all.npy"), time.perf_counter()
        with tf.io.TFRecordWriter(str(out / "all.tfrecord")) as writer:
            for cube in cubes:
                writer.write(cube.tobytes())
        return [time.perf_counter() - began]
    records = tf.data.TFRecordDataset(str(out / "all.tfrecord")).repeat().shuffle(COHORT, seed=0)
    cubes = records.map(lambda text: tf.reshape(tf.io.decode_raw(text, tf.int16), SHAPE), tf.data.AUTOTUNE)
    batches = iter(cubes.batch(BATCH).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())
    return [timed(lambda: [next(batches) for _ in range(BATCHES)]) for _ in range(ROUNDS + 1)][1:]


if __name__ == "__main__":
    print(*with_tensorflow(sys.argv[1], Path(sys.argv[2])))
