"""One run from data to tracking: what it leaves, that it can be repeated, what is refused, and what fails."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient, log_metric
from torch import Tensor, nn

import tiny
from conftest import FullRun
from forkserver import run_program
from helpers import ROOT, TINY, Screen, TrackedRun, first, read_runs
from mnist_lab.cli import Console
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment, Targets
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job, choose_device
from mnist_lab.running.progress import Progress
from mnist_lab.running.run import augmented, describe, load_parts, measure
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.training.states import drawn_unseeded
from networks import Linear, declare

Load = Callable[[str], ModuleType]
Train = Callable[..., TrackedRun]


# ---- one epoch of step 1, through its script


def test_a_real_epoch_learns(full_run: FullRun) -> None:
    metrics = full_run.tracked.metrics
    ((step, accuracy),) = metrics["test_accuracy"]

    assert step == 1
    assert accuracy >= 88
    assert metrics["train_accuracy"][0][1] > 60
    assert 0 < metrics["test_loss"][0][1] < metrics["train_loss"][0][1] < 1.3
    assert metrics["lr"] == [(1, 0.01)]
    once = dict.fromkeys(("final_test_accuracy", "best_test_accuracy", "last", "best"), accuracy)
    once |= {"best_epoch": 1, "num_params": 10_970, "epochs_at_target": 0}
    assert {name: metrics[name] for name in once} == {name: [(0, value)] for name, value in once.items()}


def test_the_params_are_the_declared_hyperparameters(full_run: FullRun) -> None:
    assert full_run.tracked.name == "step1_baseline seed 3 [epochs=1 limit=5000]"
    assert full_run.tracked.status == "FINISHED"
    assert full_run.tracked.params == {
        **{"batch_size": "128", "epochs": "1", "seed": "3", "device": choose_device(None).type},
        **{"optimizer": "SGD", "lr": "0.01", "momentum": "0.9"},
        **{"scheduler": "none", "loss": "cross_entropy", "augmentation": "none"},
    }


def test_the_description_is_the_verdict_and_what_was_planned_where_the_run_is_overridden(full_run: FullRun) -> None:
    text = full_run.tracked.tags["mlflow.note.content"]
    assert re.search(r"^\| accuracy +\| at least 99.4 % +\| 9\d\.\d\d % +\| missed +\|$", text, re.MULTILINE)
    assert text.endswith(describe(full_run.script, "epochs=1 limit=5000"))


def test_the_description_of_a_run_as_declared_is_the_whole_docstring(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text('"""Mine.\n\nTarget: much.\n\nResult: little."""')
    planned = "The docstring of mine.py:\n\n**Mine**\n\n**Target:** much."
    assert describe(script) == f"{planned}\n\n**Result:** little."
    assert describe(script, "lr=1") == f"**Overridden:** `lr=1`\n\n{planned}"
    assert describe(tmp_path / "gone.py", "lr=1") == "**Overridden:** `lr=1`"


def test_the_tags_and_inputs_say_where_the_run_comes_from(full_run: FullRun, mnist: Mnist) -> None:
    tags = full_run.tracked.tags

    own = {name: value for name, value in tags.items() if not name.startswith("mlflow.")}
    assert own.pop("git_dirty") in ("true", "false")
    assert re.fullmatch("[0-9a-f]{64}", own.pop("code_sha256"))
    assert own.pop("process").startswith(f"{socket.gethostname()} ")
    environment = json.loads((full_run.tracked.artifacts / "environment.json").read_text())
    assert own == {
        **{name: environment[name] for name in ("hardware", "torch", "threads")},
        **{"step": "step1_baseline", "overrides": "epochs=1 limit=5000", "git_commit": full_run.commit},
        **{"data_sha256": mnist.sha256, "memory_format": "channels_last"},
        **{"target_accuracy": "99.4", "target_params": "10000", "target_epochs": "15"},
        **{"reported_best_train_accuracy": "99.75", "reported_best_test_accuracy": "99.29"},
        **{"verdict_accuracy": "missed", "verdict_params": "missed", "verdict_epochs": "met", "targets": "missed"},
    }
    assert inputs_of(full_run.database, full_run.tracked, mnist) == {"training": 5_000, "test": 10_000}


def inputs_of(database: Path, run: TrackedRun, mnist: Mnist) -> dict[str, int]:
    inputs = MlflowClient(f"sqlite:///{database}").get_run(run.run_id).inputs.dataset_inputs
    assert {entry.dataset.digest.rpartition("-")[0] for entry in inputs} == {mnist.sha256[:29]}
    return {entry.tags[0].value: json.loads(entry.dataset.profile)["features_shape"][0] for entry in inputs}


def test_the_kept_predictions_give_the_logged_accuracy(full_run: FullRun, mnist: Mnist) -> None:
    with np.load(full_run.tracked.artifacts / "predictions.npz", allow_pickle=False) as kept:
        truth, prediction, logits = kept["truth"], kept["prediction"], kept["logits"]

    np.testing.assert_array_equal(truth, mnist.test_labels.numpy())
    np.testing.assert_array_equal(prediction, logits.argmax(axis=1))
    correct = int((prediction == truth).sum())
    assert full_run.tracked.metrics["final_test_accuracy"] == [(0, correct / 100)]
    assert re.findall(rf"accuracy +{correct / 100:.2f} %(  lr)?", full_run.stdout) == ["  lr", "", ""]  # last and best


# ---- repeating a run


def test_two_runs_with_one_seed_are_identical_and_one_with_another_seed_is_not(
    load_script: Load, mnist: Mnist, uri: str, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short runs of step 4, which draws for everything: weights, order, dropout and rotation."""
    monkeypatch.setattr(runner, "load_mnist", lambda *_: first(mnist, 1000, 500))
    script = ROOT / "experiments" / "step4_augment_steplr.py"
    changes = {"lr": 0.05, "gamma": 0.5, "step_size": 1, "epochs": 2}
    experiment, overrides = load_script(script.stem).EXPERIMENT.override(changes)
    job = Job(script=script, experiment=experiment, overrides=overrides, tracking_uri=uri, limit=900)

    runner.run(job, 1, Progress())
    with redirect_stdout(Screen()) as screen:
        runner.run(job, 1, Console(job))
    runner.run(job, 2, Progress())

    assert re.search(r"\r.* images/s", screen.getvalue())  # the terminal was really drawn on
    run, on_terminal, other = read_runs(database)
    assert {**run.metrics, "epoch_seconds": []} == {**on_terminal.metrics, "epoch_seconds": []}
    kept = [np.load(one.artifacts / "predictions.npz")["logits"] for one in (run, on_terminal)]
    np.testing.assert_array_equal(*kept)
    assert all(run.metrics[name][0] != other.metrics[name][0] for name in ("train_loss", "test_loss"))
    assert other.name.startswith("step4_augment_steplr seed 2 [epochs=2 ")

    assert run.metrics["lr"] == [(1, 0.05), (2, 0.025)]
    assert set(run.tags["overrides"].split()) == {"lr=0.05", "gamma=0.5", "step_size=1", "epochs=2", "limit=900"}
    assert inputs_of(database, run, mnist) == {"training": 900, "test": 500}


def test_the_figure_of_an_augmentation_in_place_shows_the_images_as_they_were(small_mnist: Mnist) -> None:
    experiment = declare(augmentation=lambda images: images.mul_(0.5).add_(torch.rand(len(images), 1, 1, 1) / 2))
    before, draws = augmented(experiment, small_mnist)
    np.testing.assert_array_equal(before, small_mnist.train_images[:10, 0].numpy() / np.float32(255))
    assert not np.array_equal(draws[0], draws[1])


# ---- with a hold-out


def test_a_hold_out_judges_its_epochs_only(load_script: Load, mnist: Mnist, uri: str, database: Path) -> None:
    script = ROOT / "experiments" / "step1_baseline.py"
    experiment = dataclasses.replace(load_script(script.stem).EXPERIMENT, epochs=2)
    job = Job(script=script, experiment=experiment, tracking_uri=uri, limit=1000, holdout=500)
    runner.run(job, 0, Progress())

    (run,) = read_runs(database)
    assert (run.params["holdout"], run.tags["overrides"]) == ("500", "limit=1000")
    assert (run.artifacts / "figures" / "training.png").exists()
    assert run.metrics.keys() == {
        *("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr", "epoch_seconds"),
        *("num_params", "final_validation_accuracy", "best_validation_accuracy", "best_epoch"),
        *("final_test_accuracy", "final_test_loss", "last", "validation"),
    }
    accuracies = [accuracy for _, accuracy in run.metrics["validation_accuracy"]]
    assert [round(500 * accuracy, 6) % 100 for accuracy in accuracies] == [0, 0]  # of the images held out
    kept = np.load(run.artifacts / "predictions.npz")
    accuracy = int((kept["prediction"] == mnist.test_labels.numpy()).sum()) / 100
    once = {
        **{"final_validation_accuracy": accuracies[-1], "validation": round(accuracies[-1], 2)},
        **{"best_validation_accuracy": max(accuracies), "best_epoch": 1 + accuracies.index(max(accuracies))},
        **{"final_test_accuracy": accuracy, "last": accuracy},
    }
    assert {name: run.metrics[name] for name in once} == {name: [(0, value)] for name, value in once.items()}
    loss = nn.functional.cross_entropy(torch.from_numpy(kept["logits"]), mnist.test_labels).item()
    assert run.metrics["final_test_loss"][0][1] == pytest.approx(loss, abs=1e-5)
    assert f"| {accuracy:.2f} %" in run.tags["mlflow.note.content"]
    assert inputs_of(database, run, mnist) == {"training": 1000, "validation": 500, "test": 10_000}


# ---- before the run


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator, others in [(None, {"cuda", "cuda:0"}), (torch.device("cuda"), {"cuda:2", "mps"})]:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda here=accelerator, **_: here)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert choose_device("cpu") == torch.device("cpu")
        assert choose_device(None) == (accelerator or torch.device("cpu"))
        for name in {"tpu", "CPU", "", *others}:
            with pytest.raises(LabError, match=f"^device: '{name}' .*cpu"):
                choose_device(name)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_a_limit_keeps_the_first_training_images_and_all_others(mnist: Mnist, uri: str) -> None:
    job = Job(script=TINY, experiment=tiny.EXPERIMENT, tracking_uri=uri)
    fewer = load_parts(dataclasses.replace(job, limit=128), 0)

    assert torch.equal(fewer.train_images, mnist.train_images[:128])
    assert torch.equal(fewer.train_labels, mnist.train_labels[:128])
    assert torch.equal(fewer.test_images, mnist.test_images)
    for limit in (0, 60_001):
        with pytest.raises(LabError, match=f"^limit: {limit} .*60,000"):
            load_parts(dataclasses.replace(job, limit=limit), 0)


# ---- what is measured once


def test_the_last_epoch_is_the_headline_and_the_first_of_the_best_the_best() -> None:
    counts = [(59_000, 9_900), (59_500, 9_950), (59_700, 9_950), (59_600, 9_939)]
    epochs = [
        EpochMetrics(number, 0.1, train, 60_000, number / 100, test, 10_000, 0.01, 1.0)
        for number, (train, test) in enumerate(counts, start=1)
    ]
    targets = Targets(accuracy=99.4)
    experiment = Experiment(net=nn.Identity, epochs=4, batch_size=1, optimizer=torch.optim.SGD, targets=targets)

    assert measure(7850, epochs, experiment) == {
        **{"num_params": 7850, "epochs": 4, "best_epoch": 2, "epochs_at_target": 2, "final_test_loss": 0.04},
        **{"final_train_accuracy": pytest.approx(99.3333, abs=1e-3), "best_train_accuracy": 99.5},
        **{"final_test_accuracy": 99.39, "best_test_accuracy": 99.5},
    }
    assert "epochs_at_target" not in measure(2, epochs, dataclasses.replace(experiment, targets=Targets()))


# ---- what shows in training only


def later(change: Callable[[Tensor], Tensor], calls: int) -> type[nn.Module]:
    """Return a network whose output is changed in training from the call of this number on, not in the rehearsal."""
    built: list[nn.Module] = []

    class Later(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.in_rehearsal = len(built) < 2  # it trains no other
            built.append(self)

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            output = super().forward(images)
            return change(output) if self.calls >= calls and not self.in_rehearsal else output

    return Later


def gives_up(output: Tensor) -> Tensor:
    raise ArithmeticError("no more")


def times_nan(output: Tensor) -> Tensor:
    return output * torch.nan


# Calls 1 to 3 are the first epoch's batches, 4 and 5 its evaluation; with a hold-out it has two, and one.
IN_TRAINING = {
    "raises in the second epoch": (gives_up, 7, 0, r"training: no more \(test_runner\.py, line \d+\)"),
    "exits in the second epoch": (lambda y: sys.exit(), 7, 0, r"training: sys\.exit\(None\) was called \(test_.*"),
    "NaN in the second epoch": (times_nan, 7, 0, r"loss: .*epoch 2.*"),
    "NaN in the second evaluation": (times_nan, 9, 0, "net: its test loss is nan in epoch 2"),
    "exits on the test images": (lambda y: sys.exit(), 7, 30, r"net: sys\.exit\(None\) was called.*"),
}


@pytest.mark.parametrize(("change", "calls", "holdout", "sentence"), IN_TRAINING.values(), ids=IN_TRAINING)
def test_a_network_that_fails_later_ends_its_run_as_failed(
    change: Callable[[Tensor], Tensor], calls: int, holdout: int, sentence: str, train_run: Train, database: Path
) -> None:
    with pytest.raises(LabError) as refusal:
        train_run(declare(batch_size=64, net=later(change, calls)), "idea", limit=130 - holdout, holdout=holdout)

    assert re.fullmatch(sentence, str(refusal.value))
    (run,) = read_runs(database)
    assert run.status == "FAILED"
    assert "final_test_accuracy" not in run.metrics
    kept = [*database.parent.glob("checkpoints/*.pt")]
    assert bool(kept) == (change is not times_nan)  # with which it would end so again


def test_what_a_script_logs_by_mlflow_goes_into_the_labs_run(train_run: Train) -> None:
    def logging_objective(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images)
        mlflow.log_metric("largest_logit", logits.max().item())
        log_metric("smallest_logit", logits.min().item())
        with pytest.raises(LabError):
            mlflow.log_metrics(metrics={"x": 1, "train_loss": 2})  # of which one is the lab's
        return nn.functional.cross_entropy(logits, labels), logits

    run = train_run(declare(batch_size=64, objective=logging_objective), "idea", limit=130)

    assert len(run.metrics["largest_logit"]) == len(run.metrics["smallest_logit"]) == 6  # one a batch
    assert mlflow.active_run() is None


# ---- scripts, in processes of their own

SCRIPT = """
import resource
import sys
from functools import partial

import psutil
import torch
from torch import nn

from mnist_lab import Experiment, main


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.Linear(WIDTH, 10))


WIDTH = 10
# more
EXPERIMENT = Experiment(net=net, epochs=1, batch_size=64, optimizer=partial(torch.optim.SGD, lr=0.001, momentum=0.9))
if __name__ == "__main__":
    main(EXPERIMENT)
"""


def run_with(more: str, database: Path) -> subprocess.CompletedProcess[str]:
    folder = database.parent
    script = folder / "my_idea.py"
    script.write_text(SCRIPT.replace("# more", more))
    flags = ["--limit", "64", "--device", "cpu", "--tracking-uri", f"sqlite:///{database}"]
    return run_program(script, *flags, cwd=folder)


def test_what_a_script_draws_when_it_is_read_is_said_unless_it_seeds(database: Path) -> None:
    """MLflow lets the root logger show errors only: the lab's notices are shown all the same."""
    done = run_with("import mlflow.pytorch\nFILTERS = torch.randn(8, 1, 3, 3)", database)
    assert done.returncode == 0, done.stderr
    assert "draws from torch before main(), where the run's seed has no effect" in done.stderr

    torch.manual_seed(3)
    torch.randn(8)
    assert not drawn_unseeded()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't limit a process's memory so")
def test_where_memory_is_short_fifty_million_parameters_are_refused(database: Path) -> None:
    imports = "torch.optim.SGD([torch.zeros(1)], lr=0.1)"  # what torch imports late is no part of the limit
    limit = "limit = psutil.Process().memory_info().vms + 350_000_000"
    set_limit = "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))"

    done = run_with(f"WIDTH = 50_000_000 // 795\n{imports}\n{limit}\n{set_limit}", database)

    assert done.returncode == 1
    assert re.fullmatch(r"error: \w+: needs more memory than there is: .*\n", done.stderr)
    assert read_runs(database) == []
