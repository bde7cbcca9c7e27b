"""The most memory that one process takes to make a cube of a long series, ours and the peers', each in a fresh one."""

import json
import resource
import subprocess
import sys
from pathlib import Path

from common import goal, installed, publish, table, timed, today_here
from peers import PEERS, SIZE, SPACING_MM, Source
from series import build, tables, thin_series

SLICES, LIMIT_S = 852, 180
IMPORTS, OURS = "lungct, imports alone", "lungct, from the folder to the store"


def peak_mb() -> float:
    """Largest resident set of this process. Linux lets ru_maxrss begin with that of the parent, VmHWM with nothing."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024 ** (2 if sys.platform == "darwin" else 1)


def work(what: str, source: Source, out: Path) -> None:
    """The work of one process, which nothing else is done in."""
    from lungct import dicom, volumes  # noqa: F401 - for all alike: peers that average by area need them

    if what == OURS:
        build(Path(source.folder), *tables(Path(source.folder)), out)
    elif what != IMPORTS:
        PEERS[what][1](source, out / "cube.npy")


def in_fresh_process(what: str, source: Source, out: Path) -> tuple[str, str]:
    """(MB, seconds) of `work`, or why there are none."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, __file__, what, json.dumps(vars(source)), str(out)]
    try:
        done = subprocess.run(command, check=True, timeout=LIMIT_S, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return "", f"stopped after {LIMIT_S}"
    except subprocess.CalledProcessError as error:
        return "", f"died, exit code {error.returncode}"
    most, seconds = done.stdout.split()[-2:]
    return most, seconds


def sections(scratch: Path) -> list[str]:
    from lungct import volumes

    folder = thin_series(scratch, SLICES)
    stack = tables(folder)[1].iloc[0]
    middle = [float(v) for v in stack.affine[3:12:4]]
    middle[2] += SLICES / 2
    source = Source(str(folder), list(stack.affine), volumes.Grid(SIZE, SPACING_MM).affine(middle).ravel().tolist())
    found = {name: in_fresh_process(name, source, scratch / "out") for name in (IMPORTS, OURS)}
    for name, (needs, _) in PEERS.items():
        found[name] = in_fresh_process(name, source, scratch / "out") if installed(needs) else ("", "not installed")
    note = (f"Largest resident set of a fresh process, once each; {folder_mb(folder):.0f} MB of files, which the page "
            "cache holds and no figure counts. All import lungct.dicom and lungct.volumes.")
    most, rows = found[OURS][0], [(name, *pair) for name, pair in found.items()]
    return [today_here(f"{SLICES} slices of 512 x 512, a phantom's."),
            table(f"Peak memory of one worker on an {SLICES}-slice stack", "what | MB | s", rows, note),
            goal("peak memory of lungct, MB", "400 or less", float(most) if most else None, "{:.0f}") + "\n"]


def folder_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


if __name__ == "__main__":
    if sys.argv[1:]:
        spent = timed(lambda: work(sys.argv[1], Source(**json.loads(sys.argv[2])), Path(sys.argv[3])))
        print(f"{peak_mb():.0f} {spent:.1f}")
    else:
        publish("memory", sections)
