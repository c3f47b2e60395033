"""All benchmarks, one after another, each in a process of its own.

    python benchmarks [NAME ...] [FLAGS]

NAME: training, time_to_accuracy, augmentation, study, cluster, startup, tracking, memory, run_tables, gpu or server;
all of them if none is given. FLAGS go to each of them: `--quick`, `--rounds N`, `--threads N` and `--out FOLDER` are
known to all; `python benchmarks NAME --help` shows those of one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

NAMES = (
    "training",
    "time_to_accuracy",
    "augmentation",
    "study",
    "cluster",
    "startup",
    "tracking",
    "memory",
    "run_tables",
    "gpu",
    "server",
)


def main() -> None:
    arguments = sys.argv[1:]
    names = [argument for argument in arguments if argument in NAMES]
    flags = [argument for argument in arguments if argument not in NAMES]
    if flags and not flags[0].startswith("-"):
        sys.exit(f"benchmarks: {flags[0]!r} is none of {', '.join(NAMES)}")
    if not names and {"-h", "--help"} & set(flags):
        print(__doc__)
        return
    start = time.monotonic()
    failed = [
        name
        for name in names or NAMES
        if subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *flags]).returncode != 0
    ]
    if failed:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")
    print(f"All measured in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
