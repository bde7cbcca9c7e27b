"""Speed against peers, one command: `make bench`. Each part in a process of its own, written to bench/results.md.

A peer that is not installed is named in the table. Without LUNGCT_REAL_DATA, generated series are measured.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from common import PARTS


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure lungct and its peers; write bench/results.md.")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone; may be repeated")
    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ  # processes share the cores, not threads
    for part in parser.parse_args().only or PARTS:
        script = Path(__file__).with_name(f"{part}.py")
        subprocess.run([sys.executable, str(script)], check=True, env=environment)


if __name__ == "__main__":
    main()
