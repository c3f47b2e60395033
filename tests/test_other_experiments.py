"""Experiments of other people: what can't work is refused in a sentence that names the field, what can is trained."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import log_metric
from torch import Tensor, nn

from forkserver import run_program
from helpers import first, read_runs
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, RunResult
from mnist_lab.training.states import drawn_unseeded
from networks import Linear, declare

Train = Callable[..., RunResult]


@pytest.fixture
def train(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch, uri: str) -> Train:
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: first(small_mnist, 130, 300))

    def train(holdout: int = 0, **fields: object) -> RunResult:
        experiment = declare(batch_size=64, **fields)
        job = Job(script=Path(__file__), experiment=experiment, tracking_uri=uri, holdout=holdout)
        return runner.run(job, 0, Progress())

    return train


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


# Calls 1 to 3 are the first epoch's batches, and 4 is its evaluation; with a hold-out, an epoch has two batches.
IN_TRAINING = {
    "raises in the second epoch": (gives_up, 7, 0, r"training: no more \(test_other_experiments\.py, line \d+\)"),
    "exits in the second epoch": (lambda y: sys.exit(), 7, 0, r"training: sys\.exit\(None\) was called \(test_.*"),
    "NaN in the second epoch": (times_nan, 7, 0, r"loss: .*epoch 2.*"),
    "NaN in the second evaluation": (times_nan, 8, 0, "net: its test loss is nan in epoch 2"),
    "exits on the test images": (lambda y: sys.exit(), 7, 30, r"net: sys\.exit\(None\) was called.*"),
}


@pytest.mark.parametrize(("change", "calls", "holdout", "sentence"), IN_TRAINING.values(), ids=IN_TRAINING)
def test_a_network_that_fails_later_ends_its_run_as_failed(
    change: Callable[[Tensor], Tensor], calls: int, holdout: int, sentence: str, train: Train, database: Path
) -> None:
    with pytest.raises(LabError) as refusal:
        train(net=later(change, calls), holdout=holdout)

    assert re.fullmatch(sentence, str(refusal.value))
    (run,) = read_runs(database)
    assert run.status == "FAILED"
    assert "final_test_accuracy" not in run.metrics


# ---- what works


def test_what_a_script_logs_by_mlflow_goes_into_the_labs_run(train: Train, database: Path) -> None:
    def logging_objective(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images)
        mlflow.log_metric("largest_logit", logits.max().item())
        log_metric("smallest_logit", logits.min().item())
        return nn.functional.cross_entropy(logits, labels), logits

    train(objective=logging_objective)

    (run,) = read_runs(database)
    assert run.status == "FINISHED"
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
    return run_program(
        script, "--limit", "64", "--device", "cpu", "--tracking-uri", f"sqlite:///{database}", cwd=folder
    )


def test_what_a_script_draws_when_it_is_read_is_said_unless_it_seeds(database: Path) -> None:
    """MLflow lets the root logger show errors only: the lab's notices are shown all the same."""
    done = run_with("import mlflow.pytorch\nFILTERS = torch.randn(8, 1, 3, 3)", database)
    assert done.returncode == 0, done.stderr
    assert "draws from torch before main(), which the run's seed does not decide" in done.stderr

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
