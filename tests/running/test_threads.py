"""How many threads a run takes, beside real other processes."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from mnist_lab.running.threads import Load, Threads, free_cores


class Given(Load):
    """A load of the test's choosing."""

    def __init__(self, *others: float) -> None:
        self.given = iter(others)

    def others(self) -> float:
        return next(self.given)


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("others", "cores", "free"),
    [(0.0, 2, 2), (0.4, 2, 2), (0.6, 2, 1), (1.0, 2, 1), (2.0, 2, 1), (9.0, 2, 1), (0.0, 1, 1), (1.7, 8, 6)],
)
def test_a_core_that_is_more_than_half_busy_is_left_alone(others: float, cores: int, free: int) -> None:
    assert free_cores(others, cores) == free


def test_the_load_of_another_process_is_seen_and_ones_own_is_not() -> None:
    load = Load()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    quiet = load.others()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            time.sleep(0.5)
            load.others()
            time.sleep(1.5)
            loud = load.others()
        finally:
            busy.kill()
    cores = torch.multiprocessing.cpu_count()
    # On a machine that is busy anyway the other process gets its share of what there is.
    assert loud > quiet + 0.5 or loud > cores - 1


def test_threads_are_lowered_once_others_need_a_core_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lab.running.threads.available_cores", lambda: 4)
    threads = Threads(None, Given(0.0, 0.2, 1.9, 0.0))
    assert torch.get_num_threads() == threads.number == 4
    assert not threads.adapt()
    assert threads.adapt()
    assert torch.get_num_threads() == threads.number == 2
    assert not threads.adapt()
    assert torch.get_num_threads() == 2


def test_a_number_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(3, Given(9.0))
    assert torch.get_num_threads() == 3
    assert not threads.adapt()
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = Threads(None, Given(9.0))
    assert threads.number == 2
    assert not threads.adapt()
