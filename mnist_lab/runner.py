"""One run: data -> network -> fit -> tracking, for one experiment and one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mnist_lab import provenance, targets
from mnist_lab.data import Mnist, find_data_dir, load_mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.summary import summarize
from mnist_lab.targets import Verdict
from mnist_lab.tracking import open_store, track
from mnist_lab.training import EpochMetrics, fit, normalize, num_params, predict, rehearse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SEED = 2**32 - 1
# What a run logs once. MLflow shows the last value of each epoch's metrics by itself; its UI slows down with many more.
LOGGED_ONCE = ("num_params", "final_test_accuracy", "best_test_accuracy", "best_epoch", "epochs_at_target")


class Progress(Protocol):
    """Who listens to a run: the console, or nobody. See `training.OnBatch` for what `on_batch` is given."""

    def on_start(self, run_name: str, device: torch.device, net: nn.Module, summary: str, num_images: int) -> None: ...
    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None: ...
    def on_epoch(self, metrics: EpochMetrics) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """A finished run: its id in MLflow, every epoch, the figures measured once, and the verdicts."""

    run_id: str
    epochs: list[EpochMetrics]
    measured: dict[str, float]
    verdicts: list[Verdict]
    overrides: Mapping[str, object]


def run(
    experiment: Experiment,
    script: Path,
    progress: Progress,
    *,
    overrides: Mapping[str, object],
    seed: int = 0,
    device: str | None = None,
    data_dir: Path | None = None,
    tracking_uri: str | None = None,
    limit: int | None = None,
) -> RunResult:
    """Train and track one run of the experiment that `script` declares.

    overrides: what differs from that declaration; `experiment` has it applied already. The run is tagged with it.
    limit: train on the first so many images only, which counts as an override too.

    Raises:
        LabError: before any training, if the declaration, an argument, the data or the tracking store is unusable.
    """
    experiment.check()
    _check_seed(seed)
    if not script.is_file():
        raise LabError(f"script: {str(script)!r} is not a file; a run is named after the script that declares it")
    where = choose_device(device)
    store = open_store(tracking_uri)
    mnist = load_mnist(data_dir, where)
    if limit is not None:
        mnist = first_images(mnist, limit)
        overrides = {**overrides, "limit": limit}
    rehearse(experiment, mnist)

    torch.manual_seed(seed)  # weights, dropout and augmentation; `fit` shuffles by a generator of its own
    net = experiment.net().to(where).to(memory_format=torch.channels_last)
    step, run_name = script.stem, f"{script.stem} seed {seed}"
    params = {**experiment.hyperparameters(), "seed": seed, "device": where.type}
    commit, environment = provenance.commit(script), provenance.environment(where)
    tags = {
        "step": step,
        "overrides": " ".join(f"{name}={value}" for name, value in overrides.items()),
        "git_commit": commit.sha,
        "git_dirty": str(commit.dirty).lower(),
        "code_sha256": provenance.code_sha256(script),
        "data_sha256": mnist.sha256,
        "hardware": environment["hardware"],
        "torch": environment["torch"],
        **{f"target_{name}": str(value) for name, value in dataclasses.asdict(experiment.targets).items() if value},
        **{f"reported_{name}": str(figure) for name, figure in experiment.reported.items()},
    }
    summary = summarize(net)
    progress.on_start(run_name, where, net, summary, len(mnist.train_images))
    with track(store, run_name, params=params, tags=tags) as tracked:
        tracked.log_data(mnist, find_data_dir(data_dir))
        tracked.log_text(summary + "\n", "model_summary.txt")
        tracked.log_file(script, "source")
        tracked.log_json(environment, "environment.json")
        if commit.dirty:
            tracked.log_text(commit.diff, "source/uncommitted.diff")
        epochs = []
        for metrics in fit(net, experiment, mnist, seed=seed, on_batch=progress.on_batch):
            epochs.append(metrics)
            tracked.log_epoch(metrics.epoch, epoch_metrics(metrics))
            progress.on_epoch(metrics)
        measured = measure(net, epochs, experiment)
        verdicts = targets.judge(
            experiment.targets,
            final_test_accuracy=measured["final_test_accuracy"],
            num_params=int(measured["num_params"]),
            epochs=len(epochs),
        )
        tracked.log_once({name: measured[name] for name in LOGGED_ONCE if name in measured})
        words = {f"verdict_{verdict.name}": verdict.word for verdict in verdicts}
        tracked.set_tags({"targets": targets.overall(verdicts), **words})
        logits = predict(net, mnist.test_images)
        tracked.log_predictions(mnist.test_labels, logits)
        tracked.log_figures(draw(experiment, mnist, epochs, logits, step=step, seed=seed, run_id=tracked.run_id))
        refusal = tracked.log_model(net, normalize(mnist.test_images[:2].float() / 255))
        if refusal is not None:
            tracked.set_tags({"model": f"state_dict.pt, as torch.export can't express the network: {refusal}"})
    return RunResult(tracked.run_id, epochs, measured, verdicts, overrides)


def epoch_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """Return what is logged of an epoch; accuracies in percent."""
    return {
        "train_loss": metrics.train_loss,
        "train_accuracy": metrics.train_accuracy,
        "test_loss": metrics.test_loss,
        "test_accuracy": metrics.test_accuracy,
        "lr": metrics.lr,
        "epoch_seconds": metrics.epoch_seconds,
    }


def measure(net: nn.Module, epochs: list[EpochMetrics], experiment: Experiment) -> dict[str, float]:
    """Return what is measured once per run. The best epoch is the first with the highest test accuracy."""
    last, best = epochs[-1], max(epochs, key=lambda epoch: epoch.test_correct)
    measured = {
        "num_params": num_params(net),
        "epochs": last.epoch,
        "final_train_accuracy": last.train_accuracy,
        "best_train_accuracy": max(epoch.train_accuracy for epoch in epochs),
        "final_test_accuracy": last.test_accuracy,
        "best_test_accuracy": best.test_accuracy,
        "best_epoch": best.epoch,
        "final_test_loss": last.test_loss,
    }
    if (accuracy := experiment.targets.accuracy) is not None:
        measured["epochs_at_target"] = sum(epoch.test_accuracy >= accuracy for epoch in epochs)
    return measured


def draw(
    experiment: Experiment, mnist: Mnist, epochs: list[EpochMetrics], logits: Tensor, **identity: object
) -> dict[str, Figure]:
    """Draw the figures that are kept with a run; `identity` is its step, seed and run_id."""
    from mnist_lab.figures import run_figures  # pandas and matplotlib take a second, which a refused run need not wait

    augmented = None
    if experiment.augmentation is not None:
        images = mnist.train_images[:10].float() / 255
        draws = torch.stack([experiment.augmentation(images) for _ in range(3)])
        augmented = images.squeeze(1).cpu().numpy(), draws.squeeze(2).cpu().numpy()
    return run_figures(
        [{**identity, "epoch": metrics.epoch, **epoch_metrics(metrics)} for metrics in epochs],
        experiment.targets.accuracy,
        mnist.test_images.squeeze(1).cpu().numpy(),
        mnist.test_labels.cpu().numpy(),
        logits.float().cpu().numpy(),
        augmented,
    )


def choose_device(name: str | None) -> torch.device:
    """Return the device named, else cuda, else mps, else cpu.

    Raises:
        LabError: if torch knows no such device or this machine has none.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device(available[0])
    if name not in available:
        raise LabError(f"device: {name!r} is not available here; available are {', '.join(available)}")
    return torch.device(name)


def first_images(mnist: Mnist, limit: int) -> Mnist:
    """Return the data with only the first `limit` training images.

    Raises:
        LabError: if there are not that many.
    """
    total = len(mnist.train_images)
    if not 1 <= limit <= total:
        raise LabError(f"limit: {limit} is not between 1 and {total:,}, the number of training images")
    return dataclasses.replace(mnist, train_images=mnist.train_images[:limit], train_labels=mnist.train_labels[:limit])


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise LabError(f"seed: {seed} is not between 0 and {MAX_SEED}")
