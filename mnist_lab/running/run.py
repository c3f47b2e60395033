"""One run: data -> network -> training -> tracking, for one experiment and one seed."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from mnist_lab.arguments import defaults
from mnist_lab.checking.rehearsal import Rehearsal, blame_script, rehearse
from mnist_lab.data import Mnist, hold_out, hold_out_fold, load_mnist
from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.running.job import Job
from mnist_lab.running.machine import keep_freed_memory, set_threads, without_collections
from mnist_lab.running.progress import Progress, Pruned, RunResult
from mnist_lab.running.record import Record
from mnist_lab.tracking.models import find_teacher, load_teacher
from mnist_lab.tracking.run import adopted
from mnist_lab.tracking.store import Store, open_store
from mnist_lab.training.loop import Training, initial_network
from mnist_lab.training.states import own_parts

MAX_SHOWN = 40  # characters of a value in a refusal: a digest has 64

logger = logging.getLogger(__name__)


def run(
    job: Job, seed: int, progress: Progress, *, parent_run_id: str | None = None, resume: Checkpoint | None = None
) -> RunResult:
    """Train and track one run.

    parent_run_id: the study's run that this one belongs to. resume: continue this run of the same job and seed.

    Raises LabError: before any training, if the declaration, an argument, the data or the tracking store is unusable;
    later, if the training diverges, the script's own code fails, or memory or disk do not suffice.
    """
    logger.info("Opening the tracking store")
    with without_collections():
        store = open_store(job.tracking_uri)
    job = with_teacher(job, store, None if resume is None else resume.identity)
    experiment, mnist, rehearsal = tried(job, store, seed)
    if parent_run_id is None:  # else the study has said it
        rehearsal.notice(job.overrides)
    if resume is not None:
        _check_same(job, resume)
    if job.device.type == "cpu":
        keep_freed_memory()
        set_threads(job.threads if resume is None else resume.threads)  # a run goes on with as many as before
    net = initial_network(experiment, seed, job.device, rehearsal.memory_format)
    rehearsal.watch(net)
    training = Training(net, own_parts(experiment), mnist, seed=seed, on_batch=progress.on_batch)
    record = Record(job, seed, store, progress, mnist, rehearsal, training)
    if resume is not None:
        restore(training, resume)
    with record.begin(parent_run_id, resume) as run_id, adopted(store.uri, run_id):
        logger.info("Training, epoch by epoch")
        try:
            for metrics in blame_script(training.epochs()):
                record.log_epoch(metrics)
        except Pruned:
            result = record.prune()
        except LabError as error:
            if error.field in ("loss", "net"):  # it diverged, and would again
                checkpoint.remove_alike(store.uri, job.identity, seed)
            raise
        else:
            result = record.finish()
    checkpoint.remove_alike(store.uri, job.identity, seed)
    return result


@without_collections()
def tried(job: Job, store: Store, seed: int = 0) -> tuple[Experiment, Mnist, Rehearsal]:
    """Return what is trained, with its teacher, and on what, and what comes of trying it on a few batches; LabError."""
    torch.backends.cudnn.allow_tf32 = False  # else convolutions on a GPU compute with 10 bits of float32's 23
    torch.backends.cuda.matmul.allow_tf32 = False
    experiment = job.experiment
    if job.teacher is not None and experiment.objective is not None:
        net = load_teacher(store, job.teacher, job.device, experiment.normalize)
        experiment = replace(experiment, objective=partial(experiment.objective, teacher=net))
    logger.info("Reading MNIST")
    mnist = load_parts(job, seed)
    logger.info("Trying the declaration on a few batches")
    return experiment, mnist, rehearse(experiment, mnist)


def load_parts(job: Job, seed: int) -> Mnist:
    """Load MNIST onto the job's device, hold out images for validation, and keep the first `limit` others.

    A trial of a search and a fold get no test images, so that nothing can read them.
    """
    mnist = load_mnist(job.data_dir, job.device)
    if job.folds:
        mnist = hold_out_fold(mnist, seed, job.folds)
    if job.holdout:
        mnist = hold_out(mnist, job.holdout)
    if job.search is not None:
        mnist = replace(mnist, test_images=mnist.train_images[:0], test_labels=mnist.train_labels[:0])
    limit, total = job.limit, len(mnist.train_images)
    if limit is not None and not 1 <= limit <= total:
        raise LabError(f"limit: {limit} is not between 1 and {total:,}, the number of training images")
    return replace(mnist, train_images=mnist.train_images[:limit], train_labels=mnist.train_labels[:limit])


def with_teacher(job: Job, store: Store, interrupted: Mapping[str, str] | None = None) -> Job:
    """Return the job with the teacher that its objective learns from, if one, found once for all of a study's seeds.

    interrupted: the identity of a run that goes on, and keeps the teacher it began with though there is a newer one.
    Raises LabError if the teacher is not there, or can't be one.
    """
    declared = None if job.experiment.objective is None else defaults(job.experiment.objective).get("teacher")
    if not isinstance(declared, str) or job.teacher is not None:
        return job
    if job.folds:
        seen = f"the teacher {declared!r} has seen the images that each fold holds out"
        raise LabError(f"folds: {seen}; --holdout judges what learns from one on held-out images")
    if interrupted and "teacher_run_id" in interrupted and ":/" not in declared:
        declared = f"runs:/{interrupted['teacher_run_id']}/model"
    return replace(job, teacher=find_teacher(store, declared, job.holdout))


def _check_same(job: Job, resume: Checkpoint) -> None:
    for name in sorted({*job.identity, *resume.identity}):
        now, then = job.identity.get(name, "none"), resume.identity.get(name, "none")
        if now != then:
            changed = f"{name} was {then[:MAX_SHOWN]} in run {resume.run_id} and is {now[:MAX_SHOWN]} now"
            advice = "train it anew, or go on with another run: --resume RUN_ID"
            raise LabError(f"resume: {changed}, as the script, its settings or the lab have changed; {advice}")
    if job.device.type != "cpu":
        logger.warning("resume: %s rounds sums in any order, so the run need not end as it would have", job.device)


def restore(training: Training, resume: Checkpoint) -> None:
    try:
        training.load_state_dict(resume.training)
    except Exception as error:  # torch has many ways to refuse a state
        reason = f"{type(error).__name__}: {one_line(error)[:150]}; train it anew"
        raise LabError(f"resume: the checkpoint of run {resume.run_id} does not fit: {reason}") from error
