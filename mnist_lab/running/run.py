"""One run: data -> network -> fit -> tracking, for one experiment and one seed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mnist_lab.data import Mnist, find_data_dir, hold_out, load_mnist, parse_files
from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint, provenance, teaching
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.running.job import Job, check_seed
from mnist_lab.running.memory import keep_freed_memory
from mnist_lab.running.precision import use_float32
from mnist_lab.running.rehearsal import Rehearsal, blame, blame_script, rehearse, without_exits
from mnist_lab.running.schedule import report_without_effect, without_effect
from mnist_lab.running.sources import place
from mnist_lab.running.summary import summarize
from mnist_lab.running.threads import Load, crowded, set_threads
from mnist_lab.story import read_story
from mnist_lab.tracking.delivery import sync
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import Store, close_abandoned, open_store
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import (
    EpochMetrics,
    Training,
    evaluate,
    initial_network,
    normalize,
    num_params,
    predict,
    remembering,
)
from mnist_lab.training.states import left_as_they_are
from mnist_lab.training.transforms import Augmentation
from mnist_lab.verdicts import targets
from mnist_lab.verdicts.measures import HELD_OUT, protocol, short_figures
from mnist_lab.verdicts.targets import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

DESCRIPTION = "mlflow.note.content"  # the tag whose text MLflow's UI shows as the run's description


class Progress(Protocol):
    """Who listens to a run: the console, or nobody. See `training.OnBatch` for what `on_batch` is given."""

    def on_start(self, run_name: str, device: torch.device, num_params: int, summary: str, num_images: int) -> None: ...
    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None: ...
    def on_epoch(self, metrics: EpochMetrics) -> None: ...


class Pruned(Exception):
    """Raised by who listens to a trial's run, to end it after the epoch: it is not worth more of them."""


@dataclass(frozen=True)
class RunResult:
    """A finished run: its id in MLflow, every epoch, the figures measured once, and the verdicts.

    A trial of a search has no verdicts, and no figures of the test images; one that was pruned has no figures at all.
    """

    run_id: str
    epochs: list[EpochMetrics]
    measured: dict[str, float]
    verdicts: list[Verdict]


@blame_script()
def run(
    job: Job,
    seed: int,
    progress: Progress,
    *,
    parent_run_id: str | None = None,
    resume: Checkpoint | None = None,
    files: Mapping[str, bytes] | None = None,
) -> RunResult:
    """Train and track one run.

    parent_run_id: the study's run that this one belongs to.
    resume: continue this run, in the same MLflow run; the job and the seed are those of that run.
    files: MNIST's, where they were sent to this machine; else they are found as the job says.

    Raises:
        LabError: before any training, if the declaration, an argument, the data or the tracking store is unusable;
            later, if the training diverges, the script's own code fails, or memory or disk do not suffice.
    """
    check_seed(seed)
    load = Load()
    logger.info("Opening the tracking store")
    store = open_store(job.tracking_uri)
    sync(store.uri)
    close_abandoned(store)
    job = teaching.find(job, store, None if resume is None else resume.identity)
    job.check_unchanged()
    experiment = teaching.load(job, store)
    use_float32(job.device)
    logger.info("Reading MNIST")
    mnist = load_parts(job, files=files)
    logger.info("Trying the declaration on a few batches")
    rehearsal = rehearse(experiment, mnist)
    if parent_run_id is None:  # else the study has said it
        rehearsal.notice()
        report_without_effect(job.experiment, job.overrides, len(mnist.train_images))
    if resume is not None:
        _check_same(job.identity, resume)
        if job.device.type != "cpu":
            said = "resume: %s rounds sums in any order, so the run need not end as it would have without interruption"
            logger.warning(said, job.device)
    if job.device.type == "cpu":
        keep_freed_memory()
        threads = set_threads(job.threads if resume is None else resume.threads)
        if crowded(threads, others := load.others()):
            said = "other processes use %.1f cores: beside them one thread is faster than %d (--threads 1)"
            logger.warning(said, others, threads)

    net = initial_network(experiment, seed, job.device, rehearsal.memory_format)
    rehearsal.watch(net)
    training = Training(net, experiment, mnist, seed=seed, on_batch=progress.on_batch)

    def train(run_id: str) -> Iterator[EpochMetrics]:
        epochs = [] if resume is None else list(resume.epochs)
        for metrics in without_exits(training.epochs()):
            check_eval_loss(metrics)
            epochs.append(metrics)
            # First here, then in MLflow: what is missing there is logged when the run goes on.
            checkpoint.save(
                Checkpoint(
                    run_id=run_id,
                    script=str(job.script),
                    seed=seed,
                    changes=dict(job.overrides),
                    limit=job.limit,
                    holdout=job.holdout,
                    identity=job.identity,
                    threads=torch.get_num_threads(),
                    epochs=epochs,
                    training=training.state_dict(),
                ),
                store.uri,
            )
            yield metrics

    with left_as_they_are(*remembering(experiment).values()):  # another seed may follow in this process
        if resume is not None:
            restore(training, resume)
        result = record(
            job,
            seed,
            train,
            training.result,
            mnist,
            store,
            progress,
            rehearsal=rehearsal,
            graph_tags=lambda: training.captured.tags,
            parent_run_id=parent_run_id,
            resume=resume,
        )
    checkpoint.remove_alike(store.uri, job.identity, seed)
    return result


def check_eval_loss(metrics: EpochMetrics) -> None:
    """Refuse to go on with a network whose evaluation gives no number; raises LabError."""
    if not math.isfinite(metrics.eval_loss):
        raise LabError(f"net: its {metrics.evaluated_on} loss is {metrics.eval_loss} in epoch {metrics.epoch}")


def _check_same(identity: Mapping[str, str], resume: Checkpoint) -> None:
    """Refuse to go on with a run whose declaration or code is another one now."""
    for name in sorted({*identity, *resume.identity}):
        now, then = identity.get(name, "none"), resume.identity.get(name, "none")
        if now == then:
            continue
        changed = f"{name} is {now} now and was {then} in run {resume.run_id}"
        if name == "code_sha256":
            changed = f"the script or the lab's code has changed since run {resume.run_id} began"
        raise LabError(f"resume: {changed}; train it anew")


def restore(training: Training, resume: Checkpoint) -> None:
    """Let the training go on from the checkpoint; raises LabError if that holds something else than its state."""
    try:
        training.load_state_dict(resume.training)
    except Exception as error:  # torch has many ways to refuse a state
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        message = f"resume: the checkpoint of run {resume.run_id} does not fit: {reason}; train it anew"
        raise LabError(message) from error


def record(
    job: Job,
    seed: int,
    train: Callable[[str], Iterable[EpochMetrics]],
    net: nn.Module,
    mnist: Mnist,
    store: Store,
    progress: Progress,
    *,
    rehearsal: Rehearsal,
    graph_tags: Callable[[], Mapping[str, str]],
    parent_run_id: str | None,
    resume: Checkpoint | None = None,
) -> RunResult:
    """Track one run: its epochs as they come, and the network at the end.

    train: given the run's id in MLflow, trains `net` and returns the epochs that are left.
    rehearsal: what it found out about the network.
    graph_tags: says of the training's graphs what `Captured.tags` does.
    The other arguments are those of `run`.
    """
    where = mnist.train_images.device
    experiment, run_name = job.experiment, run_name_of(job, f"seed {seed}")
    job.check_unchanged()
    environment = provenance.environment(where)
    no_effect = " ".join(without_effect(experiment, len(mnist.train_images)))
    tags = {
        **job.tags,
        **job.commit.tags,
        "data_sha256": mnist.sha256,
        **{name: environment[name] for name in ("hardware", "torch", "threads")},
        "memory_format": "channels_last" if rehearsal.memory_format == torch.channels_last else "contiguous",
        **({"no_effect": no_effect} if no_effect else {}),
        DESCRIPTION: describe(job.script, job.tags["overrides"]),
        **target_tags(experiment),
        **{f"reported_{name}": str(figure) for name, figure in experiment.reported.items()},
    }
    with kept_generators(where):  # the layers may draw
        summary = summarize(net, rehearsal.untrained)
    progress.on_start(run_name, where, num_params(net, rehearsal.untrained), summary, len(mnist.train_images))
    with track(
        store,
        run_name,
        params={**job.params, "seed": seed},
        tags=tags,
        parent_run_id=parent_run_id,
        resume_run_id=None if resume is None else resume.run_id,
    ) as tracked:
        epochs = [] if resume is None else list(resume.epochs)
        logger.info("Logging where the run comes from")
        if resume is None:
            tracked.log_data(mnist, find_data_dir(job.data_dir))
            tracked.log_text(summary + "\n", "model_summary.txt")
            for name, file in job.sources.items():  # `nets.blocks` goes to `source/nets`
                tracked.log_file(file, str(Path("source") / place(name, file).parent))
            tracked.log_json(environment, "environment.json")
            if job.commit.diff:
                tracked.log_text(job.commit.diff, "source/uncommitted.diff")
        else:
            tracked.log_missing({metrics.epoch: epoch_metrics(metrics) for metrics in epochs})
        logger.info("Training, epoch by epoch")
        try:
            for metrics in train(tracked.run_id):
                epochs.append(metrics)
                tracked.log_epoch(metrics.epoch, epoch_metrics(metrics))
                progress.on_epoch(metrics)
        except Pruned:
            tracked.set_tags({**graph_tags(), "pruned": f"after epoch {len(epochs)} of {experiment.epochs}"})
            return RunResult(tracked.run_id, epochs, {}, [])
        if job.search is not None:
            measured = measure(num_params(net, rehearsal.untrained), epochs, experiment)
            tracked.log_once(logged_once(measured, HELD_OUT.once))
            tracked.set_tags(graph_tags())
            return RunResult(tracked.run_id, epochs, measured, [])
        logger.info("Evaluating the trained network")
        logits = final_logits(net, mnist, experiment)
        measured = measure(num_params(net, rehearsal.untrained), epochs, experiment)
        if job.holdout:
            loss, correct = evaluate(logits, mnist.test_labels)
            measured |= {"final_test_loss": loss, "final_test_accuracy": 100 * correct / len(logits)}
        verdicts = targets.judge(
            experiment.targets,
            accuracies=[measured["final_test_accuracy"]],
            num_params=int(measured["num_params"]),
            epochs=len(epochs),
        )
        tracked.log_once(logged_once(measured, protocol(job.holdout).once))
        described = {DESCRIPTION: describe(job.script, job.tags["overrides"], verdicts)}
        tracked.set_tags({**graph_tags(), **verdict_tags(verdicts), **described})
        logger.info("Logging predictions, figures and the model")
        tracked.log_predictions(mnist.test_labels, logits)
        tracked.log_figures(draw(experiment, mnist, epochs, logits, step=job.step, seed=seed, run_id=tracked.run_id))
        example = normalize(mnist.test_images[:2].float() / 255, experiment.normalize)
        refusal = tracked.log_model(job.step, net, example, experiment.normalize)
        if refusal is not None:
            tracked.set_tags({"model": f"state_dict.pt, as torch.export can't express the network: {refusal}"})
    return RunResult(tracked.run_id, epochs, measured, verdicts)


def final_logits(net: nn.Module, mnist: Mnist, experiment: Experiment) -> Tensor:
    """Return the trained network's logits (10000, 10) of the test images; raises LabError if they are not finite."""
    with blame("net"):
        logits = predict(net, mnist.test_images, experiment.normalize)
        if not logits.isfinite().all():
            raise ValueError("gives logits of the test images that are not finite, after the last epoch")
    return logits


def load_parts(job: Job, device: torch.device | None = None, files: Mapping[str, bytes] | None = None) -> Mnist:
    """Load MNIST onto the device (the job's), hold out images for validation, and keep the first `limit` others.

    A trial of a search gets no test images, so that nothing can read them.
    """
    device = device or job.device
    mnist = load_mnist(job.data_dir, device) if files is None else parse_files(files, device)
    if job.holdout:
        mnist = hold_out(mnist, job.holdout)
    if job.search is not None:
        mnist = dataclasses.replace(mnist, test_images=mnist.train_images[:0], test_labels=mnist.train_labels[:0])
    return mnist if job.limit is None else first_images(mnist, job.limit)


def run_name_of(job: Job, seeds: str) -> str:
    """Name a run in MLflow, e.g. "step3_gap seed 0 [epochs=1 limit=1000]": what is overridden shows."""
    overrides = job.tags["overrides"]
    return f"{job.step} {seeds}" + (f" [{overrides}]" if overrides else "")


def target_tags(experiment: Experiment) -> dict[str, str]:
    """Return the stated targets as tags: `target_accuracy` and so on."""
    return {f"target_{name}": str(value) for name, value in dataclasses.asdict(experiment.targets).items() if value}


def verdict_tags(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return the verdicts as tags: `targets`, and `verdict_accuracy` and so on."""
    return {"targets": targets.overall(verdicts), **{f"verdict_{verdict.name}": verdict.word for verdict in verdicts}}


def describe(script: Path, overrides: str = "", verdicts: Sequence[Verdict] = (), more: str = "") -> str:
    """Return what MLflow's UI shows as a run's description, in Markdown: verdicts, and the script's docstring.

    Of an overridden run only what was planned is told: the Result in the docstring is not its own.
    more: stands between the two.
    """
    rows = targets.rows(verdicts)
    parts = [tabulate(rows, targets.HEADERS, tablefmt="github", disable_numparse=True)] if rows else []
    parts += [more, f"**Overridden:** `{overrides}`" if overrides else ""]
    with suppress(LabError):  # a script that was moved while it ran
        story = read_story(script)
        told = story.markdown("Target", "Change") if overrides else story.markdown()
        parts += [f"The docstring of {script.name}:", told] if told else []
    return "\n\n".join(part for part in parts if part)


def logged_once(measured: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the figures of these names, and the accuracies among all of them under their short names too."""
    return {name: measured[name] for name in names if name in measured} | short_figures(measured)


def epoch_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """Return what is logged of an epoch; accuracies in percent."""
    return {
        "train_loss": metrics.train_loss,
        "train_accuracy": metrics.train_accuracy,
        f"{metrics.evaluated_on}_loss": metrics.eval_loss,
        f"{metrics.evaluated_on}_accuracy": metrics.eval_accuracy,
        "lr": metrics.lr,
        **{f"lr_{group}": lr for group, lr in enumerate(metrics.other_lrs, 1)},
        "epoch_seconds": metrics.epoch_seconds,
        **({} if metrics.objective is None else {"objective": metrics.objective}),
        **({} if metrics.raw_accuracy is None else {f"raw_{metrics.evaluated_on}_accuracy": metrics.raw_accuracy}),
    }


def measure(num_params: int, epochs: list[EpochMetrics], experiment: Experiment) -> dict[str, float]:
    """Return what the epochs say once per run. The best epoch is the first with the highest accuracy.

    Names say what the epochs were evaluated on: `final_test_accuracy`, or with a hold-out `final_validation_accuracy`.
    """
    last, best = epochs[-1], max(epochs, key=lambda epoch: epoch.eval_correct)
    part = last.evaluated_on
    measured = {
        "num_params": num_params,
        "epochs": last.epoch,
        "final_train_accuracy": last.train_accuracy,
        "best_train_accuracy": max(epoch.train_accuracy for epoch in epochs),
        f"final_{part}_accuracy": last.eval_accuracy,
        f"best_{part}_accuracy": best.eval_accuracy,
        "best_epoch": best.epoch,
        f"final_{part}_loss": last.eval_loss,
    }
    if (accuracy := experiment.targets.accuracy) is not None:
        measured["epochs_at_target"] = sum(epoch.eval_accuracy >= accuracy for epoch in epochs)
    return measured


def draw(
    experiment: Experiment, mnist: Mnist, epochs: list[EpochMetrics], logits: Tensor, **identity: object
) -> dict[str, Figure]:
    """Draw the figures that are kept with a run; `identity` is its step, seed and run_id."""
    from mnist_lab.figures import run_figures  # pandas and matplotlib take a second, which a refused run need not wait

    augmented = None
    if experiment.augmentation is not None:
        augment = Augmentation(experiment.augmentation)
        images, labels = mnist.train_images[:10].float() / 255, mnist.train_labels[:10]
        draws = torch.stack([augment(images.clone(), labels.clone())[0] for _ in range(3)])
        augmented = images.squeeze(1).cpu().numpy(), draws.squeeze(2).cpu().numpy()
    return run_figures(
        [{**identity, "epoch": metrics.epoch, **epoch_metrics(metrics)} for metrics in epochs],
        experiment.targets.accuracy,
        mnist.test_images.squeeze(1).cpu().numpy(),
        mnist.test_labels.cpu().numpy(),
        logits.float().cpu().numpy(),
        augmented,
    )


def first_images(mnist: Mnist, limit: int) -> Mnist:
    """Return the data with only the first `limit` training images; raises LabError if there are not that many."""
    total = len(mnist.train_images)
    if not 1 <= limit <= total:
        raise LabError(f"limit: {limit} is not between 1 and {total:,}, the number of training images")
    return dataclasses.replace(mnist, train_images=mnist.train_images[:limit], train_labels=mnist.train_labels[:limit])
