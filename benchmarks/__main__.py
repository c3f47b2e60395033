"""All benchmarks, one after another, each in a process of its own.

    python benchmarks [NAME ...] [FLAGS]

All of them are run if none is named. FLAGS go to each of them: `--quick`, `--rounds N`, `--threads N` and
`--out FOLDER` are known to all; `python benchmarks NAME --help` shows those of one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - {"__main__", "measure", "writeups"})


def main() -> None:
    arguments = sys.argv[1:]
    names = [argument for argument in arguments if argument in NAMES]
    flags = [argument for argument in arguments if argument not in NAMES]
    if flags and not flags[0].startswith("-"):
        sys.exit(f"benchmarks: {flags[0]!r} is none of {', '.join(NAMES)}")
    if not names and {"-h", "--help"} & set(flags):
        print(f"{__doc__}\nNAME: {', '.join(NAMES)}")
        return
    ended = {name: subprocess.run([sys.executable, FOLDER / f"{name}.py", *flags]) for name in names or NAMES}
    if failed := [name for name, done in ended.items() if done.returncode != 0]:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
