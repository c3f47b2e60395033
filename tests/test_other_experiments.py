"""Experiments of other people: what can't work is refused in a sentence that names the field, what can is trained."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from forkserver import run_program
from helpers import read_runs
from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.running.record import RunResult

Train = Callable[..., RunResult]


@pytest.fixture
def train(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch, uri: str) -> Train:
    """Return a function that trains a network for two epochs of three batches, on the first 130 images."""
    few = dataclasses.replace(
        small_mnist, train_images=small_mnist.train_images[:130], train_labels=small_mnist.train_labels[:130]
    )
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: few)

    def train(net: Callable[..., object], holdout: int = 0, **fields: object) -> RunResult:
        declared = {"epochs": 2, "batch_size": 64, "optimizer": partial(SGD, lr=0.01)}
        experiment = Experiment(net=net, **(declared | fields))
        job = Job(script=Path(__file__), experiment=experiment, tracking_uri=uri, holdout=holdout)
        return runner.run(job, 0, Progress())

    return train


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def giving(change: Callable[[Tensor], object]) -> type[nn.Module]:
    """Return a network whose output is changed."""

    class Changed(Linear):
        def forward(self, images: Tensor) -> object:
            return change(super().forward(images))

    return Changed


class ThreeChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 28)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)


class BuffersOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(784, 10))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


class Frozen(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class HalfInside(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class NotANumberInEvaluation(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 if self.training else torch.nan)


class OneRowForManyImages(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:200]


class TooLarge(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(10**6, 10**6)


def raises(output: Tensor) -> Tensor:
    raise KeyError("no such\nlayer")


def recurs(output: Tensor) -> Tensor:
    return recurs(output)


REFUSED = {
    "three input channels": (ThreeChannels, "net: .*expected input.* to have 3 channels, but got 1 channels"),
    "five outputs": (giving(lambda y: y[:, :5]), r"net: gives an output of shape \(64, 5\) for 64 images"),
    "one output per image": (giving(lambda y: y[:, 0]), r"net: gives an output of shape \(64,\) for 64 images"),
    "a tuple": (giving(lambda y: (y, y)), "net: gives a tuple, not a tensor"),
    "a dict": (giving(lambda y: {"logits": y}), "net: gives a dict, not a tensor"),
    "nothing": (giving(lambda y: None), "net: gives a NoneType, not a tensor"),
    "whole numbers": (giving(lambda y: y.long()), r"net: gives torch\.int64 logits; give torch\.float32"),
    "complex numbers": (giving(lambda y: y + 0j), r"net: gives torch\.complex64 logits; give torch\.float32"),
    "bfloat16": (giving(lambda y: y.bfloat16()), r"net: gives torch\.bfloat16 logits; give torch\.float32"),
    "NaN": (giving(lambda y: y * torch.nan), "net: gives logits that are not finite"),
    "NaN in evaluation": (NotANumberInEvaluation, "net: gives logits that are not finite"),
    "fewer rows than test images": (OneRowForManyImages, r"net: gives an output of shape \(200, 10\) for 300 images"),
    "no gradient": (giving(lambda y: y.detach()), "loss: has no gradient in the network's parameters"),
    "raises": (giving(raises), r"net: 'no such\\nlayer' \(test_other_experiments\.py, line \d+\)"),
    "recursion": (giving(recurs), "net: maximum recursion depth exceeded"),
    "sys.exit": (giving(lambda y: sys.exit()), r"net: sys\.exit\(None\) was called \(test_other_.*, line \d+\)"),
    "no parameters": (partial(nn.Upsample, size=28), "net: has no parameters to train"),
    "buffers only": (BuffersOnly, "net: has no parameters to train"),
    "frozen": (Frozen, "net: has no parameters to train"),
    "lazy": (Lazy, r"net: linear\.weight has no shape before the first batch"),
    "half precision of weights only": (HalfInside, "net: .*must have the same dtype"),
    "on the meta device": (lambda: nn.Linear(784, 10, device="meta"), "net: Cannot copy out of meta tensor"),
    "larger than memory": (TooLarge, "net: needs more memory than there is: "),
    "no network": (lambda: torch.relu, r"net: gives a builtin_function_or_method, not a torch\.nn\.Module"),
}


@pytest.mark.parametrize(("net", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_network_that_cannot_work_is_refused_before_any_training(
    net: Callable[..., object], sentence: str, train: Train, database: Path
) -> None:
    with pytest.raises(LabError, match=f"^{sentence}") as refusal:
        train(net)

    assert "\n" not in str(refusal.value)
    assert read_runs(database) == []


def test_steps_that_are_too_large_are_the_optimizers(train: Train, database: Path) -> None:
    with pytest.raises(LabError, match="^optimizer: .* not finite after one step; is the learning rate too high"):
        train(Linear, optimizer=partial(SGD, lr=1e38))

    assert read_runs(database) == []


# ---- what shows in training only


def later(change: Callable[[Tensor], Tensor], calls: int) -> type[nn.Module]:
    """Return a network whose output is changed in training from the call of this number on, not in the rehearsal."""
    built: list[nn.Module] = []

    class Later(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.in_rehearsal = len(built) < 2  # it builds two
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


# Calls 1 to 3 are the first epoch's batches, and 4 is its evaluation.
IN_TRAINING = {
    "raises in the second epoch": (gives_up, 7, r"training: no more \(test_other_experiments\.py, line \d+\)"),
    "exits in the second epoch": (lambda y: sys.exit(), 7, r"training: sys\.exit\(None\) was called \(test_other_.*"),
    "NaN in the second epoch": (times_nan, 7, r"loss: .*epoch 2.*"),
    "NaN in the second evaluation": (times_nan, 8, "net: its test loss is nan in epoch 2"),
}


@pytest.mark.parametrize(("change", "calls", "sentence"), IN_TRAINING.values(), ids=IN_TRAINING)
def test_a_network_that_fails_later_ends_its_run_as_failed(
    change: Callable[[Tensor], Tensor], calls: int, sentence: str, train: Train, database: Path
) -> None:
    with pytest.raises(LabError) as refusal:
        train(later(change, calls))

    assert re.fullmatch(sentence, str(refusal.value))
    (run,) = read_runs(database)
    assert run.status == "FAILED"
    assert "final_test_accuracy" not in run.metrics


@pytest.mark.parametrize("change", [lambda y: sys.exit(), times_nan])
def test_a_network_that_fails_on_the_test_images_after_a_hold_out_ends_its_run_as_failed(
    change: Callable[[Tensor], Tensor], train: Train, database: Path
) -> None:
    with pytest.raises(LabError, match="^net: "):
        train(later(change, 7), holdout=30)  # an epoch is two batches and the evaluation of the images held out

    (run,) = read_runs(database)
    assert run.status == "FAILED"


# ---- what works


class WithoutBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5)
        self.linear = nn.Linear(576, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(nn.functional.max_pool2d(self.conv(images), 2).relu().flatten(1))


class PartlyFrozen(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(784, 784).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.first(images.flatten(1)))


class NotContiguous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 784))

    def forward(self, images: Tensor) -> Tensor:
        return (self.weight @ images.flatten(1).t()).t()


class HalfPrecision(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.half()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1).half())


class OtherByBatchSize(Linear):
    def forward(self, images: Tensor) -> Tensor:
        print("seen:", len(images))
        return super().forward(images) * (1 if len(images) % 2 else 2)


@pytest.mark.parametrize("net", [WithoutBatchNorm, PartlyFrozen, NotContiguous, HalfPrecision, OtherByBatchSize])
def test_an_unusual_network_is_trained(
    net: type[nn.Module], train: Train, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(net)

    (run,) = read_runs(database)
    assert (run.status, run.metrics["train_loss"]) == ("FINISHED", [(e.epoch, e.train_loss) for e in result.epochs])
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    assert result.epochs[1].train_loss < result.epochs[0].train_loss
    assert run.metrics["num_params"] == [(0, sum(p.numel() for p in net().parameters() if p.requires_grad))]
    assert math.isclose(run.metrics["final_test_accuracy"][0][1], result.epochs[1].eval_accuracy)


# ---- scripts, in processes of their own

SCRIPT = """
import dataclasses
import resource
import sys
from functools import partial

import psutil
import torch
from torch import nn

from mnist_lab import Experiment, main
from mnist_lab.running import run as runner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(784, WIDTH)
        self.linear = nn.Linear(WIDTH, 10)

    def forward(self, images):
        return self.linear(self.wide(images.flatten(1)))


def load_few(folder, device, load=runner.load_mnist):
    mnist = load(folder, device)
    return dataclasses.replace(mnist, test_images=mnist.test_images[:100], test_labels=mnist.test_labels[:100])


runner.load_mnist = load_few
WIDTH = 10
# more
EXPERIMENT = Experiment(net=Net, epochs=1, batch_size=64, optimizer=partial(torch.optim.SGD, lr=0.001, momentum=0.9))
if __name__ == "__main__":
    main(EXPERIMENT)
"""


def run_with(more: str, database: Path) -> subprocess.CompletedProcess[str]:
    """Run the script with more lines in it, on one batch."""
    folder = database.parent
    script = folder / "my_idea.py"
    script.write_text(SCRIPT.replace("# more", more))
    return run_program(
        script, "--limit", "64", "--device", "cpu", "--tracking-uri", f"sqlite:///{database}", cwd=folder
    )


UNUSED = """
import mlflow.pytorch  # which lets the root logger show errors only

class Net(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)
"""


def test_a_script_that_quiets_the_root_logger_gets_the_notices_of_the_lab(database: Path) -> None:
    done = run_with(UNUSED, database)

    assert done.returncode == 0, done.stderr
    assert "no gradient reaches unused.bias, unused.weight" in done.stderr


@pytest.mark.parametrize(("seeded", "said"), [("", True), ("torch.manual_seed(3)", False)])
def test_what_a_script_draws_when_it_is_read_is_said_unless_it_seeds(seeded: str, said: bool, database: Path) -> None:
    done = run_with(f"{seeded}\nFILTERS = torch.randn(8, 1, 3, 3)", database)

    assert done.returncode == 0, done.stderr
    assert ("draws from torch before main(), which the run's seed does not decide" in done.stderr) == said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("print(WIDHT)", "NameError: name 'WIDHT' is not defined"),
        ("sys.exit('not today')", "not today"),
    ],
)
def test_a_script_that_fails_before_it_declares_ends_as_any_program(more: str, said: str, database: Path) -> None:
    done = run_with(more, database)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(said)
    assert read_runs(database) == []


@pytest.mark.long
def test_fifty_million_parameters_are_trained(database: Path) -> None:
    done = run_with("WIDTH = 50_000_000 // 795", database)

    assert (done.returncode, done.stderr) == (0, "")
    assert "49,999,945 parameters" in done.stdout
    (run,) = read_runs(database)
    assert (run.status, run.metrics["num_params"]) == ("FINISHED", [(0, 49_999_945)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't limit a process's memory so")
def test_where_memory_is_short_fifty_million_parameters_are_refused(database: Path) -> None:
    imports = "torch.optim.SGD([torch.zeros(1)], lr=0.1)"  # what torch imports late is no part of the limit
    limit = "limit = psutil.Process().memory_info().vms + 350_000_000"
    set_limit = "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))"

    done = run_with(f"WIDTH = 50_000_000 // 795\n{imports}\n{limit}\n{set_limit}", database)

    assert done.returncode == 1
    assert re.fullmatch(r"error: \w+: needs more memory than there is: .*\n", done.stderr)
    assert read_runs(database) == []
