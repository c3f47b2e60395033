"""Gives an objective the teacher that it names."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping

from mnist_lab.experiment import Experiment
from mnist_lab.running.job import Job
from mnist_lab.tracking.store import Store
from mnist_lab.tracking.teacher import find_teacher, load_teacher


def find(job: Job, store: Store, interrupted: Mapping[str, str] | None = None) -> Job:
    """Return the job with the teacher that its objective names, found once for all of a study's seeds.

    interrupted: the identity of a run that goes on; it keeps the teacher it began with, though a script that the
        objective names has a newer run by now.

    Raises LabError if the teacher is not there, or can't be one.
    """
    declared = _declared_teacher(job.experiment)
    if declared is None or job.teacher is not None:
        return job
    if interrupted and "teacher_run_id" in interrupted and ":/" not in declared:
        declared = f"runs:/{interrupted['teacher_run_id']}/model"
    return job.replaced(teacher=find_teacher(store, declared, job.holdout))


def load(job: Job, store: Store) -> Experiment:
    """Return the job's experiment; an objective that names a teacher is given the network, on the job's device."""
    if job.teacher is None:
        return job.experiment
    assert job.experiment.objective is not None
    net = load_teacher(store, job.teacher, job.device, job.experiment.normalize)
    return dataclasses.replace(job.experiment, objective=functools.partial(job.experiment.objective, teacher=net))


def _declared_teacher(experiment: Experiment) -> str | None:
    if experiment.objective is None:
        return None
    try:
        teacher = inspect.signature(experiment.objective).parameters.get("teacher")
    except (TypeError, ValueError):  # a callable written in C has no signature
        return None
    return teacher.default if teacher is not None and isinstance(teacher.default, str) else None
