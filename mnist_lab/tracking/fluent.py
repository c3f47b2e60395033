"""What a script logs by MLflow's own functions: into the lab's run while it trains, and nowhere while it is tried."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlflow

CALLS = [name for name in dir(mlflow) if name.startswith(("log_", "set_tag")) or name == "start_run"]
RUN, STORE = "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"  # of the run that MLflow goes on with where none is active


@contextmanager
def silenced() -> Iterator[set[str]]:
    """Let these functions do nothing; yield the set of the names by which they are called."""
    called: set[str] = set()

    def silent(name: str) -> Any:
        def ignore(*_: object, **__: object) -> Any:
            called.add(f"mlflow.{name}")
            return nullcontext()  # start_run is a context

        return ignore

    before = {name: getattr(mlflow, name) for name in CALLS}
    try:
        for name in CALLS:
            setattr(mlflow, name, silent(name))
        yield called
    finally:
        for name, function in before.items():
            setattr(mlflow, name, function)


@contextmanager
def adopted(uri: str, run_id: str) -> Iterator[None]:
    """Let what a script logs go into this run, unless a run of its own is active or it has chosen another store."""
    before = {name: os.environ.get(name) for name in (RUN, STORE)}
    os.environ[STORE] = uri
    if mlflow.get_tracking_uri() == uri:
        os.environ[RUN] = run_id
    try:
        yield
    finally:
        active = mlflow.active_run()
        if active is not None and active.info.run_id == run_id:
            mlflow.end_run()  # the lab says how it has ended
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def notices(called: set[str]) -> Iterator[str]:
    """Yield notices of what a script logs elsewhere, given the functions that it called while it was tried."""
    if (active := mlflow.active_run()) is not None:
        yield (
            f"mlflow: the script has begun run {active.info.run_id}, in {active.info.artifact_uri}, and what it logs "
            "goes there; call mlflow.end_run() before main(), and mlflow.log_metric and the like log into the lab's run"
        )
    elif "mlflow.start_run" in called:
        yield (
            "mlflow: the script calls mlflow.start_run, which begins runs beside the lab's; leave it out: "
            "mlflow.log_metric and the like log into the lab's run"
        )
