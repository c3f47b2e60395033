"""What a command line makes of a declaration, and what of it decides whether runs are alike."""

import os
import pickle
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from helpers import read_runs
from mnist_lab import cli
from mnist_lab.cli import make_job, parser
from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.tracking.store import finished_runs, open_store
from networks import example

SCRIPT = """
from functools import partial

import torch
from nets.wide import Net

from mnist_lab import Experiment, main

EXPERIMENT = Experiment(net=Net, epochs=1, batch_size=64, optimizer=partial(torch.optim.SGD, lr=0.01))
main(EXPERIMENT)
"""
NET = """
from torch import nn

from .sizes import WIDTH


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, WIDTH), nn.Linear(WIDTH, 10))
"""
Command = Callable[..., int]


def forget_nets() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").touch()
    (tmp_path / "nets" / "wide.py").write_text(NET)
    (tmp_path / "nets" / "sizes.py").write_text("WIDTH = 4\n")
    (tmp_path / "my_idea.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "my_idea.py"


@pytest.fixture
def command(script: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the script in this process, on few images, and returns its exit code."""

    def run(*flags: str) -> int:
        given = ["--tracking-uri", uri, "--device", "cpu", "--limit", "64", *flags]
        monkeypatch.setattr(sys, "argv", [str(script), *given])
        forget_nets()
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def job_of(script: Path, uri: str) -> Job:
    forget_nets()
    return Job(script=script, experiment=read_declaration(script), tracking_uri=uri, limit=64)


def test_a_module_that_changes_is_another_experiment(command: Command, script: Path, uri: str, database: Path) -> None:
    assert command() == 0
    (run,) = read_runs(database)
    store, job = open_store(uri), job_of(script, uri)
    assert set(finished_runs(store, job.params, job.tags)) == {0}
    assert run.tags["code_sha256"] == job.code_sha256

    (script.parent / "nets" / "sizes.py").write_text("WIDTH = 8\n")

    widened = job_of(script, uri)
    assert finished_runs(store, widened.params, widened.tags) == {}
    kept = {path.relative_to(run.artifacts).as_posix() for path in (run.artifacts / "source").rglob("*.py")}
    assert kept == {f"source/{name}.py" for name in ("my_idea", "nets/__init__", "nets/wide", "nets/sizes")}
    assert (run.artifacts / "source" / "nets" / "sizes.py").read_text() == "WIDTH = 4\n"


def test_a_job_is_sent_without_its_experiment_and_read_anew(script: Path, uri: str) -> None:
    job = job_of(script, uri)

    sent = pickle.loads(pickle.dumps(job))  # noqa: S301
    assert sent.experiment is None
    sent.read_experiment()

    assert sent.identity == job.identity
    (script.parent / "nets" / "sizes.py").write_text("# a remark\nWIDTH = 4\n")
    job.check_unchanged()
    (script.parent / "nets" / "sizes.py").write_text("WIDTH = 8\n")
    for check in (job.check_unchanged, pickle.loads(pickle.dumps(job)).read_experiment):  # noqa: S301
        with pytest.raises(LabError) as refusal:
            check()
        assert refusal.value.field == "script"


WITH_CALLABLES = """
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mnist_lab import Experiment, main


class Net(nn.Module):
    def __init__(self, act=F.relu, last=nn.LeakyReLU(0.2), kind=nn.GELU, scale=torch.tensor([1.0, 2.0])):
        super().__init__()
        self.act, self.linear = act, nn.Linear(784, 10)

    def forward(self, images):
        return self.act(self.linear(images.flatten(1)))


def warm_up(epoch):
    return min(1.0, (epoch + 1) / 3)


EXPERIMENT = Experiment(
    net=Net,
    epochs=3,
    batch_size=64,
    optimizer=partial(torch.optim.SGD, lr=0.01),
    scheduler=partial(LambdaLR, lr_lambda=warm_up),
)
main(EXPERIMENT)
"""


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_functions_classes_modules_and_tensors_are_declared_alike_in_every_process(
    command: Command, script: Path, uri: str, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(WITH_CALLABLES)
    pickle.loads(pickle.dumps(job_of(script, uri))).read_experiment()  # noqa: S301  as a worker does

    with monkeypatch.context() as patch:
        patch.setattr(cli.Console, "on_epoch", interrupt)
        assert command() == 130
    assert command("--resume") == 0

    (run,) = read_runs(database)
    assert run.status == "FINISHED"
    texts = {"lr_lambda": "warm_up", "act": "relu", "last": "LeakyReLU(negative_slope=0.2)", "kind": "GELU"}
    assert {name: run.params[name] for name in texts} == texts
    assert re.fullmatch(r"Tensor\(shape=\(2,\), dtype=float32, sha256=[0-9a-f]{12}\)", run.params["scale"])
    again = job_of(script, uri)
    assert set(finished_runs(open_store(uri), again.params, again.tags)) == {0}


def test_a_value_without_effect_is_tagged_and_refused_as_an_override(
    command: Command, script: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overridden = WITH_CALLABLES.replace("partial(LambdaLR, lr_lambda=warm_up)", "partial(OneCycleLR, max_lr=0.1)")
    script.write_text(overridden.replace("import LambdaLR", "import OneCycleLR"))

    assert command("--set", "lr=5") == 1
    assert capsys.readouterr().err.startswith("error: lr: 5.0 ")
    assert command() == 0

    (run,) = read_runs(database)
    assert run.tags["no_effect"] == "lr"


# ---- which interrupted run `--resume` goes on with


# Of runs that were stopped after their first epoch; the last is the newest.
INTERRUPTED = [
    {"run_id": "a", "seed": 11, "changes": {"epochs": 3}, "limit": 128},
    {"run_id": "b", "seed": 12, "changes": {"epochs": 3}, "limit": 128},
    {"run_id": "c", "seed": 11, "limit": 128},
    {"run_id": "d", "seed": 11, "changes": {"epochs": 2, "lr": 0.05}, "limit": 64, "holdout": 500},
    {"run_id": "e", "seed": 13, "changes": {"epochs": 5}, "limit": 256},
]


def test_the_flags_choose_the_interrupted_run_or_are_refused_by_name(script: Path, uri: str) -> None:

    for age, fields in enumerate(INTERRUPTED):
        one = example(**{"script": str(script), "changes": {}, **fields})  # type: ignore[arg-type]
        checkpoint.save(one, uri)
        os.utime(checkpoint.file_of(uri, one.run_id), (age, age))
    experiment = read_declaration(script)

    def choose(flags: str) -> str:
        given = [*flags.split(), "--resume", "--tracking-uri", uri]
        _, resume = make_job(experiment, script, parser(script, experiment).parse_args(given))
        assert resume is not None
        return resume.run_id

    chosen = {"--epochs 3 --limit 128 --seed 11": "a", "--seed 12": "b", "--set epochs=1": "c", "--holdout 500": "d"}
    for flags, run_id in {**chosen, "--limit 64": "d", "": "e"}.items():
        assert choose(flags) == run_id, flags
    for flags, asked in [
        ("--epochs 7 --seed 11", "seed 11, epochs 7"),
        ("--epochs 1 --seed 12", "seed 12, epochs as declared"),
    ]:
        with pytest.raises(LabError, match=f"^resume: .*{asked}.*seed 12 epochs=3 limit=128"):
            choose(flags)


class Counts:
    calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images


def test_params_are_those_declared_though_an_object_changes_in_use(script: Path, uri: str) -> None:
    counts = Counts()
    job = Job(script=script, experiment=replace(tiny.EXPERIMENT, augmentation=counts), tracking_uri=uri)
    before = dict(job.params)

    counts(torch.zeros(1, 1, 28, 28))

    assert job.params == before
