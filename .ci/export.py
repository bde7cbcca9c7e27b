"""Export the notebooks into lungct/; with --check, fail when lungct/ was not what the notebooks say."""

import os
import sys
from pathlib import Path

from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parents[1]
KEPT = {"__init__.py", "__main__.py"}  # written by hand: the version, and `python -m lungct`


def modules() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (ROOT / "lungct").glob("*.py")}


def export() -> None:
    # a renamed notebook would leave its old module behind, so generated files go first
    for name in modules().keys() - KEPT:
        (ROOT / "lungct" / name).unlink()
    os.chdir(ROOT)
    nbdev_export()


if __name__ == "__main__":
    check = "--check" in sys.argv
    del sys.argv[1:]  # nbdev's commands read the command line themselves
    before = modules()
    export()
    after = modules()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if check and changed:
        sys.exit(f"lungct/ was not what the notebooks export: {', '.join(changed)}; commit the export")
    print(f"{len(after) - len(KEPT)} files exported, {len(changed)} changed")
