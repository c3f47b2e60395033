"""Reads what a script declares without training it, for the worker processes of a study or a search."""

from __future__ import annotations

import multiprocessing
import runpy
from pathlib import Path

from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment

WORKER = "mnist_lab worker"  # the name of a study's worker processes
_reading = False


class _MainCalled(BaseException):
    """Ends a script at its call of `main`. Not an Exception, so that no `except` of the script's own keeps it."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment


def read(script: Path) -> Experiment:
    """Return the experiment that `script` gives to `main`, by running the script up to there.

    Raises:
        LabError: if the script comes to its end without calling `main`.
    """
    global _reading
    _reading = True
    try:
        runpy.run_path(str(script), run_name="__main__")
    except _MainCalled as declared:
        return declared.experiment
    finally:
        _reading = False
    raise LabError(f"script: {script} came to its end without calling main(EXPERIMENT)")


def only_read(experiment: Experiment) -> bool:
    """Say whether `main` is called in a worker and so must train nothing; where `read` waits for it, end the script.

    multiprocessing imports the script in each worker first, which calls `main` where the script does not guard that by
    `if __name__ == "__main__"`.
    """
    if _reading:
        raise _MainCalled(experiment)
    return multiprocessing.current_process().name.startswith(WORKER)
