"""How many threads a run takes, and the memory that it keeps."""

import platform
import resource

import pytest
import torch

from mnist_lab.running.machine import keep_freed_memory, set_threads

PAGES = (48 << 20) // 4096  # of a block that glibc gives back by default, since it is larger than 32 MiB


def test_a_run_takes_every_core_that_it_may_use_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("mnist_lab.running.machine.available_cores", lambda: 4)
        assert set_threads(None) == torch.get_num_threads() == 4
        assert set_threads(3) == torch.get_num_threads() == 3
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert set_threads(None) == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_blocks_that_are_freed_are_not_fetched_from_the_system_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(48 << 18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults()

    assert 20 * faults() < PAGES
