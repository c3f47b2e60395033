"""What one run leaves in MLflow, from its first tag to its model (docs/metrics.md lists it)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate
from torch import Tensor

from mnist_lab.checking.rehearsal import Rehearsal, blame
from mnist_lab.data import Mnist, find_data_dir
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment, Targets
from mnist_lab.running import identity
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.running.identity import place
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, RunResult
from mnist_lab.running.summary import summarize
from mnist_lab.story import read_story
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import Store
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import EpochMetrics, Training, evaluate, evaluation_part, normalize, num_params, predict
from mnist_lab.training.states import own_parts
from mnist_lab.training.transforms import Augmentation
from mnist_lab.verdicts import targets
from mnist_lab.verdicts.measures import short_figures
from mnist_lab.verdicts.targets import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

DESCRIPTION = "mlflow.note.content"  # the tag whose text MLflow's UI shows as the run's description


@dataclass
class Record:
    """A run as it is written: begun or taken up, an epoch at a time, and judged at the end."""

    job: Job
    seed: int
    mnist: Mnist
    rehearsal: Rehearsal
    training: Training
    epochs: list[EpochMetrics] = field(default_factory=list)
    tracked: TrackedRun = field(init=False)

    @property
    def num_params(self) -> int:
        return num_params(self.training.result, self.rehearsal.untrained)

    @contextmanager
    def begin(
        self, store: Store, progress: Progress, parent_run_id: str | None, resume: Checkpoint | None
    ) -> Iterator[str]:
        """Open the run in MLflow and log what it is, or take up the one of `resume`; give its id."""
        job, device = self.job, self.mnist.train_images.device
        job.check_unchanged()
        name, environment = run_name_of(job, f"{job.unit} {self.seed}"), identity.environment(device)
        with kept_generators(device):  # the layers may draw
            summary = summarize(self.training.result, self.rehearsal.untrained)
        progress.on_run(name, device, self.num_params, summary, len(self.mnist.train_images))
        with track(
            store,
            name,
            params={**job.params, "seed": self.seed},
            tags=self._tags(environment),
            parent_run_id=parent_run_id,
            resume_run_id=None if resume is None else resume.run_id,
        ) as self.tracked:
            logger.info("Logging where the run comes from")
            if resume is None:
                self._log_origin(summary, environment)
            else:
                self.epochs = list(resume.epochs)
                self.tracked.log_missing({metrics.epoch: epoch_metrics(metrics) for metrics in self.epochs})
            yield self.tracked.run_id

    def _tags(self, environment: Mapping[str, str]) -> dict[str, str]:
        job, experiment = self.job, self.job.experiment
        no_effect = " ".join(self.rehearsal.no_effect)
        is_channels_last = self.rehearsal.memory_format == torch.channels_last
        return {
            **job.tags,
            **job.commit_tags,
            "data_sha256": self.mnist.sha256,
            **{name: environment[name] for name in ("hardware", "torch", "threads")},
            "memory_format": "channels_last" if is_channels_last else "contiguous",
            **({"no_effect": no_effect} if no_effect else {}),
            DESCRIPTION: describe(job.script, job.tags["overrides"]),
            **target_tags(job.targets),
            **{f"reported_{name}": str(figure) for name, figure in experiment.reported.items()},
        }

    def _log_origin(self, summary: str, environment: Mapping[str, str]) -> None:
        job = self.job
        self.tracked.log_data(self.mnist, find_data_dir(job.data_dir))
        self.tracked.log_text(summary + "\n", "model_summary.txt")
        for name, file in job.sources.items():  # `nets.blocks` goes to `source/nets`
            self.tracked.log_file(file, str(Path("source") / place(name, file).parent))
        self.tracked.log_json(environment, "environment.json")

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """Log the newest of `epochs`."""
        self.tracked.log_epoch(metrics.epoch, epoch_metrics(metrics))

    def prune(self) -> RunResult:
        """End a trial's run early."""
        pruned = f"after epoch {len(self.epochs)} of {self.job.experiment.epochs}"
        self.tracked.set_tags({"pruned": pruned})
        return RunResult(self.tracked.run_id, self.epochs, {}, [])

    def finish(self, progress: Progress) -> RunResult:
        """Judge the trained network, say so, then write what takes longer: predictions, figures and the model.

        A trial of a search and a fold are not given the test images, so they have no verdict.
        """
        tracked, job = self.tracked, self.job
        measured = measure(self.num_params, self.epochs, job.experiment)
        if not len(self.mnist.test_images):
            tracked.log_once(logged_once(measured, job.protocol.once))
            if job.folds:
                self._log_fold()
            return RunResult(tracked.run_id, self.epochs, measured, [])
        logger.info("Evaluating the trained network")
        logits = self._test_logits()
        if job.holdout:
            loss, correct = evaluate(logits, self.mnist.test_labels)
            measured |= {"final_test_loss": loss, "final_test_accuracy": 100 * correct / len(logits)}
        verdicts = targets.judge(
            job.experiment.targets,
            accuracies=[measured["final_test_accuracy"]],
            num_params=int(measured["num_params"]),
            epochs=len(self.epochs),
        )
        tracked.log_once(logged_once(measured, job.protocol.once))
        description = describe(job.script, job.tags["overrides"], verdicts)
        tracked.set_tags({**verdict_tags(verdicts), DESCRIPTION: description})
        result = RunResult(tracked.run_id, self.epochs, measured, verdicts)
        progress.on_verdict(result)
        self._log_network(logits)
        return result

    def _test_logits(self) -> Tensor:
        """Return the trained network's logits (10000, 10) of the test images; LabError if they are not finite."""
        logits = self.training.logits
        with blame("net"):
            if logits is None or self.job.holdout:  # what the last epoch was evaluated on is something else
                logits = predict(self.training.result, self.mnist.test_images, self.job.experiment.normalize)
            if not logits.isfinite().all():
                raise ValueError("gives logits of the test images that are not finite, after the last epoch")
        return logits

    def _log_fold(self) -> None:
        """Log what the network says of each image of its fold, under the image's number among the 60,000."""
        logits, (_, images, labels) = self.training.logits, evaluation_part(self.mnist)
        if logits is None:  # of a run that was taken up after its last epoch
            logits = predict(self.training.result, images, self.job.experiment.normalize)
        self.tracked.log_predictions(labels, logits, self.mnist.validation_numbers)

    def _log_network(self, logits: Tensor) -> None:
        logger.info("Logging predictions, figures and the model")
        tracked, mnist, experiment = self.tracked, self.mnist, self.job.experiment
        tracked.log_predictions(mnist.test_labels, logits)
        identity = {"step": self.job.step, "seed": self.seed, "run_id": tracked.run_id}
        tracked.log_figures(draw(experiment, mnist, self.epochs, logits, **identity))
        example = normalize(mnist.test_images[:2].float() / 255, experiment.normalize)
        refusal = tracked.log_model(self.job.step, self.training.result, example, experiment.normalize)
        if refusal is not None:
            tracked.set_tags({"model": f"state_dict.pt, as torch.export can't express the network: {refusal}"})


# ---- names, tags and words


def run_name_of(job: Job, seeds: str) -> str:
    """Name a run in MLflow, e.g. "step3_gap seed 0 [epochs=1 limit=1000]": what is overridden shows."""
    overrides = job.tags["overrides"]
    return f"{job.step} {seeds}" + (f" [{overrides}]" if overrides else "")


def target_tags(stated: Targets) -> dict[str, str]:
    """Return the stated targets as tags: `target_accuracy` and so on."""
    return {f"target_{name}": str(value) for name, value in dataclasses.asdict(stated).items() if value}


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


# ---- figures, as numbers and as pictures


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
    if last.raw_accuracy is not None:
        measured[f"raw_{part}_accuracy"] = last.raw_accuracy
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
        augment = Augmentation(own_parts(experiment).augmentation)
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
