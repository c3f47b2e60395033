"""One run, and what it leaves in MLflow, from its first tag to its model (docs/metrics.md lists it)."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_lab.arguments import defaults
from mnist_lab.checking.network import tensors_of
from mnist_lab.checking.rehearsal import Rehearsal, blame, blame_script, rehearse
from mnist_lab.data import Mnist, find_data_dir, hold_out, hold_out_fold, load_mnist
from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import Experiment, Targets
from mnist_lab.measures import short_figures
from mnist_lab.running import checkpoint, identity
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.running.job import Job
from mnist_lab.running.machine import keep_freed_memory, set_threads, without_collections
from mnist_lab.running.progress import Progress, Pruned
from mnist_lab.running.summary import summarize
from mnist_lab.story import read_story
from mnist_lab.tracking.models import find_teacher, load_teacher
from mnist_lab.tracking.run import TrackedRun, adopted, track
from mnist_lab.tracking.store import FinishedRun, Store, open_store
from mnist_lab.training import loop
from mnist_lab.training.loop import EpochMetrics, Training
from mnist_lab.training.states import own_parts
from mnist_lab.training.transforms import Augmentation
from mnist_lab.verdicts import targets
from mnist_lab.verdicts.targets import Verdict

logger = logging.getLogger(__name__)

DESCRIPTION = "mlflow.note.content"  # the tag whose text MLflow's UI shows as the run's description


def run(
    job: Job, seed: int, progress: Progress, *, parent_run_id: str | None = None, resume: Checkpoint | None = None
) -> FinishedRun:
    """Train and track one run; a trial that is pruned has no metrics that are measured once.

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
    if job.device.type == "cpu":
        keep_freed_memory()
        set_threads(job.threads if resume is None else resume.threads)  # a run goes on with as many as before
    experiment = own_parts(experiment)
    net = loop.initial_network(experiment, seed, job.device, rehearsal.memory_format)
    training = Training(net, experiment, mnist, seed=seed, on_batch=progress.on_batch)
    record = Record(job, seed, store, progress, mnist, rehearsal, training)
    if resume is not None:
        restore(training, resume, job)
    with record.begin(parent_run_id, resume) as run_id, adopted(store.uri, run_id):
        logger.info("Training, epoch by epoch")
        try:
            for metrics in blame_script(training.epochs()):
                record.log_epoch(metrics)
        except Pruned:
            record.tracked.set_tags({"pruned": f"after epoch {training.epoch} of {experiment.epochs}"})
            result = FinishedRun(run_id, seed, {})
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
    """Load MNIST onto the job's device, hold out images for validation, and keep the first `limit` others."""
    mnist = load_mnist(job.data_dir, job.device)
    if job.folds:
        mnist = hold_out_fold(mnist, seed, job.folds)
    if job.holdout:
        mnist = hold_out(mnist, job.holdout)
    if job.search is not None:  # a trial gets no test images, as a fold, so that nothing can read them
        mnist = replace(mnist, test_images=mnist.train_images[:0], test_labels=mnist.train_labels[:0])
    limit, total = job.limit, len(mnist.train_images)
    if limit is not None and not 1 <= limit <= total:
        raise LabError(f"limit: {limit} is not between 1 and {total:,}, the number of training images")
    return replace(mnist, train_images=mnist.train_images[:limit], train_labels=mnist.train_labels[:limit])


def with_teacher(job: Job, store: Store, interrupted: Mapping[str, str] | None = None) -> Job:
    """Return the job with the teacher that its objective learns from, if one, found once for all of a study's seeds.

    interrupted: the identity of a run that goes on, and keeps its teacher. LabError if that is not there, or is none.
    """
    declared = None if job.experiment.objective is None else defaults(job.experiment.objective).get("teacher")
    if not isinstance(declared, str) or job.teacher is not None:
        return job
    if job.folds:
        seen = f"the teacher {declared!r} has seen the images that each fold holds out"
        raise LabError(f"folds: {seen}; judge a network with a teacher by --holdout")
    if interrupted and "teacher_run_id" in interrupted and ":/" not in declared:
        declared = f"runs:/{interrupted['teacher_run_id']}/model"
    return replace(job, teacher=find_teacher(store, declared, job.holdout))


def restore(training: Training, resume: Checkpoint, job: Job) -> None:
    """Go on where a run was interrupted; raises LabError if it is of another job, or its state does not fit."""
    for name in sorted({*job.identity, *resume.identity}):
        now, then = job.identity.get(name, "none"), resume.identity.get(name, "none")
        if now != then:
            changed = f"{name} was {then[:40]} in run {resume.run_id} and is {now[:40]} now"
            advice = "train it anew, or go on with another run: --resume RUN_ID"
            raise LabError(f"resume: {changed}, as the script, its settings or the lab have changed; {advice}")
    if job.device.type != "cpu":
        logger.warning("resume: %s sums in no fixed order, so the run may differ from an uninterrupted one", job.device)
    try:
        training.load_state_dict(resume.training)
    except Exception as error:  # torch has many ways to refuse a state
        reason = f"{type(error).__name__}: {one_line(error)[:150]}; train it anew"
        raise LabError(f"resume: the checkpoint of run {resume.run_id} does not fit: {reason}") from error


@dataclass
class Record:
    job: Job
    seed: int
    store: Store
    progress: Progress
    mnist: Mnist
    rehearsal: Rehearsal
    training: Training
    epochs: list[EpochMetrics] = field(default_factory=list)
    tracked: TrackedRun = field(init=False)

    def __post_init__(self) -> None:
        self.before = {name: tensor.clone() for name, tensor in tensors_of(self.training.net).items()}

    @property
    def num_params(self) -> int:
        """Count what was trained: a network may freeze layers on its way."""
        return loop.num_params(self.training.net, self.rehearsal.untrained, self.before)

    @contextmanager
    def begin(self, parent_run_id: str | None, resume: Checkpoint | None) -> Iterator[str]:
        """Open the run in MLflow and log its settings, or reopen the one of `resume`; give its id."""
        job, device, no_effect = self.job, self.mnist.train_images.device, " ".join(self.rehearsal.no_effect)
        job.check_unchanged()
        name, environment = run_name_of(job, f"{job.protocol.unit} {self.seed}"), identity.environment(device)
        summary = summarize(self.training.net, self.rehearsal.untrained)
        self.epochs = [] if resume is None else [*resume.epochs]
        self.progress.on_run(name, self.num_params, summary, len(self.mnist.train_images), len(self.epochs))
        tags = {
            **job.tags,
            **job.commit_tags,
            "data_sha256": self.mnist.sha256,
            **{name: environment[name] for name in ("hardware", "torch", "threads")},
            "memory_format": str(self.rehearsal.memory_format).removeprefix("torch.").removesuffix("_format"),
            **({"no_effect": no_effect} if no_effect else {}),
            DESCRIPTION: describe(job.script, job.tags["overrides"]),
            **target_tags(job.targets),
            **{f"reported_{name}": str(figure) for name, figure in job.experiment.reported.items()},
        }
        params, resumed = {**job.params, "seed": self.seed}, None if resume is None else resume.run_id
        run = track(self.store, name, params=params, tags=tags, parent_run_id=parent_run_id, resume_run_id=resumed)
        with run as self.tracked:
            logger.info("Logging where the run comes from")
            if resume is None:
                self.tracked.log_data(self.mnist, find_data_dir(job.data_dir))
                self.tracked.log_text(summary + "\n", "model_summary.txt")
                for module, file in job.sources.items():  # `nets.blocks` goes to `source/nets`
                    self.tracked.log_file(file, str(Path("source") / identity.place(module, file).parent))
                self.tracked.log_text(json.dumps(environment, indent=2) + "\n", "environment.json")
            else:
                self.tracked.log_missing({metrics.epoch: epoch_metrics(metrics) for metrics in self.epochs})
            yield self.tracked.run_id

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """Keep what the run needs to go on, then log the epoch: what MLflow lacks is logged when the run goes on."""
        self.epochs.append(metrics)
        self.store.check_in_place()
        saved = Checkpoint(
            run_id=self.tracked.run_id,
            script=str(self.job.script),
            seed=self.seed,
            changes=dict(self.job.overrides),
            limit=self.job.limit,
            holdout=self.job.holdout,
            identity=self.job.identity,
            threads=torch.get_num_threads(),
            epochs=self.epochs,
            training=self.training.state_dict(),
        )
        checkpoint.save(saved, self.store.uri)
        self.tracked.log_missing({metrics.epoch: epoch_metrics(metrics)})
        self.progress.on_epoch(self.seed, metrics)

    def finish(self) -> FinishedRun:
        """Judge the trained network, if there are test images, and say so; then log what takes longer."""
        job, mnist, tracked, tested = self.job, self.mnist, self.tracked, len(self.mnist.test_images) > 0
        logger.info("Evaluating the trained network")
        measured = measure(self.num_params, self.epochs, job.experiment)
        _, images, labels = loop.evaluation_part(mnist)
        logits = self.training.logits  # none of a run that was taken up after its last epoch
        if job.holdout and tested:
            images, labels, logits = mnist.test_images, mnist.test_labels, None
        with blame("net"):
            if logits is None:
                logits = loop.predict(self.training.result, images, job.experiment.normalize)
            if not logits.isfinite().all():
                raise ValueError("gives logits that are not finite, after the last epoch")
        if job.holdout and tested:
            loss, correct = loop.evaluate(logits, labels)
            measured |= {"final_test_loss": loss, "final_test_accuracy": 100 * correct / len(logits)}
        once = {name: measured[name] for name in job.protocol.once if name in measured}
        tracked.log_once(once | short_figures(measured))
        if tested:
            self._judge(measured, logits)
        elif job.folds:
            tracked.log_predictions(labels, logits, mnist.validation_numbers)
        return FinishedRun(tracked.run_id, self.seed, measured)

    def _judge(self, measured: Mapping[str, float], logits: Tensor) -> None:
        job, mnist, tracked = self.job, self.mnist, self.tracked
        accuracies, count = [measured["final_test_accuracy"]], int(measured["num_params"])
        verdicts = targets.judge(job.targets, accuracies=accuracies, num_params=count, epochs=len(self.epochs))
        tracked.set_tags({**verdict_tags(verdicts), DESCRIPTION: describe(job.script, job.tags["overrides"], verdicts)})
        self.progress.on_verdict(measured, verdicts)
        logger.info("Logging predictions, figures and the model")
        tracked.log_predictions(mnist.test_labels, logits)
        tracked.log_figures(self.draw(logits))
        example = loop.normalize(mnist.test_images[:2].float() / 255, job.experiment.normalize)
        refusal = tracked.log_model(job.step, self.training.result, example, job.experiment.normalize)
        if refusal is not None:
            tracked.set_tags({"model": f"state_dict.pt, as torch.export can't express the network: {refusal}"})

    def draw(self, logits: Tensor) -> dict[str, Any]:  # matplotlib figures
        import pandas as pd  # it and matplotlib take a second, which a refused run need not wait

        from mnist_lab import figures

        experiment, mnist = self.job.experiment, self.mnist
        name = {"step": self.job.step, "seed": self.seed, "run_id": self.tracked.run_id}
        history = pd.DataFrame([{**name, "epoch": metrics.epoch, **epoch_metrics(metrics)} for metrics in self.epochs])
        images, truth = mnist.test_images.squeeze(1).cpu().numpy(), mnist.test_labels.cpu().numpy()
        confidence, prediction = (values.numpy() for values in logits.cpu().double().softmax(1).max(1))
        drawn = {
            "training": figures.plot_training(history, experiment.targets.accuracy),
            "learning_rate": figures.plot_learning_rate(history),
            "confusion": figures.plot_confusion(truth, prediction),
            "mistakes": figures.plot_mistakes(images, truth, prediction, confidence),
        }
        if experiment.augmentation is not None:
            drawn["augmentation"] = figures.plot_augmentation(*augmented(experiment, mnist))
        return drawn


def run_name_of(job: Job, seeds: str) -> str:
    """Name a run in MLflow, e.g. "step3_gap seed 0 [epochs=1 limit=1000]": what is overridden shows."""
    overrides = job.tags["overrides"]
    return f"{job.step} {seeds}" + (f" [{overrides}]" if overrides else "")


def target_tags(stated: Targets) -> dict[str, str]:
    return {f"target_{name}": str(value) for name, value in asdict(stated).items() if value}


def verdict_tags(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {"targets": targets.overall(verdicts), **{f"verdict_{verdict.name}": verdict.word for verdict in verdicts}}


def describe(script: Path, overrides: str = "", verdicts: Sequence[Verdict] = (), more: str = "") -> str:
    """Return a run's description in Markdown: verdicts, `more`, and the script's docstring.

    An overridden run has only the docstring's Target and Change: the Result is not its own.
    """
    parts = [targets.verdict_table(verdicts, "github"), more, f"**Overridden:** `{overrides}`" if overrides else ""]
    with suppress(LabError):  # a script that was moved while it ran
        story = read_story(script)
        sections = story.markdown("Target", "Change") if overrides else story.markdown()
        parts += [f"The docstring of {script.name}:", sections] if sections else []
    return "\n\n".join(part for part in parts if part)


def epoch_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """Return what is logged of an epoch; accuracies in percent."""
    part = metrics.evaluated_on
    logged = {
        "train_loss": metrics.train_loss,
        "train_accuracy": metrics.train_accuracy,
        f"{part}_loss": metrics.eval_loss,
        f"{part}_accuracy": metrics.eval_accuracy,
        **{f"lr_{group}" if group else "lr": lr for group, lr in enumerate((metrics.lr, *metrics.other_lrs))},
        "epoch_seconds": metrics.epoch_seconds,
        "objective": metrics.objective,
        f"raw_{part}_accuracy": metrics.raw_accuracy,
    }
    return {name: value for name, value in logged.items() if value is not None}


def measure(num_params: int, epochs: list[EpochMetrics], experiment: Experiment) -> dict[str, float]:
    """Return what the epochs say once per run. The best epoch is the first with the highest accuracy."""
    last, best = epochs[-1], max(epochs, key=lambda epoch: epoch.eval_correct)
    part = last.evaluated_on
    measured: dict[str, float | None] = {
        "num_params": num_params,
        "epochs": last.epoch,
        "final_train_accuracy": last.train_accuracy,
        "best_train_accuracy": max(epoch.train_accuracy for epoch in epochs),
        f"final_{part}_accuracy": last.eval_accuracy,
        f"best_{part}_accuracy": best.eval_accuracy,
        "best_epoch": best.epoch,
        f"final_{part}_loss": last.eval_loss,
        f"raw_{part}_accuracy": last.raw_accuracy,
    }
    if (accuracy := experiment.targets.accuracy) is not None:
        measured["epochs_at_target"] = sum(epoch.eval_accuracy >= accuracy for epoch in epochs)
    return {name: value for name, value in measured.items() if value is not None}


def augmented(experiment: Experiment, mnist: Mnist) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ten training images, (10, 28, 28), and three draws of their augmentation, (3, 10, 28, 28)."""
    augment = Augmentation(own_parts(experiment).augmentation)
    images, labels = mnist.train_images[:10].float() / 255, mnist.train_labels[:10]
    draws = torch.stack([augment(images.clone(), labels.clone())[0] for _ in range(3)])
    return images.squeeze(1).cpu().numpy(), draws.squeeze(2).cpu().numpy()
