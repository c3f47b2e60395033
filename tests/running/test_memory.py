"""A run keeps the memory that its steps free."""

import platform
from pathlib import Path

import pytest

from forkserver import run_program
from helpers import ROOT

PAGES = (48 << 20) // 4096  # of a block that glibc gives back by default, since it is larger than 32 MiB

SCRIPT = """\
import resource, sys
import torch
sys.path.insert(0, {tests!r})
from mnist_lab import main
from tiny import EXPERIMENT

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_faults()
main(EXPERIMENT)
count_faults()
print("faults:", before, count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_blocks_that_are_freed_in_a_run_are_not_fetched_from_the_system_again(tmp_path: Path, uri: str) -> None:
    script = tmp_path / "keeps.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))

    done = run_program(script, "--limit", "256", "--tracking-uri", uri, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.splitlines()[-1].removeprefix("faults: ").split())
    assert before > 19 * PAGES > 20 * after
