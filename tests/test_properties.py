"""Whatever is typed or declared: it works, or one sentence names what is wrong with it.

Hypothesis makes the inputs, from a fixed seed. It takes some of the constants in the code that is loaded among them.
"""

import contextlib
import copy
import dataclasses
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel

from helpers import first, read_value
from mnist_lab import Experiment, Targets
from mnist_lab.augmentation import random_rotation
from mnist_lab.checking import rehearsal, schedule
from mnist_lab.cli import main
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import quoted
from mnist_lab.objectives import mixup
from mnist_lab.running import run as runner
from mnist_lab.running import study
from mnist_lab.training.loop import Training

FEW, MANY = 25, 2_000
HOW_MANY = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
settings.register_profile(
    "lab", max_examples=FEW, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("lab")


@pytest.fixture
def tiny_mnist(mnist: Mnist) -> Mnist:
    return first(mnist, 130, 60)


@pytest.fixture(autouse=True)
def _short_schedules_and_settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(schedule, "MAX_SCHEDULE_STEPS", 100)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- what people may give for a value

SURROGATES = "\udce9"  # how Python shows a byte that is no UTF-8 in an argument
text = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\0", "a\nb", "\x1b[31m", SURROGATES, "١", "x" * 5000, "∞", "-"]
)
whole = st.integers(-3, 300) | st.integers() | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 10**400])
number_text = whole.map(str) | st.floats().map(repr) | st.sampled_from(["1e999", "1_0", "0x10", "9" * 5000, "True"])
literal = st.sampled_from(["None", "(1, 2)", "(" * 3000, "b'x'", "'", "{[]: 1}"])


# ---- command lines


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1, bias: bool = False, name: str = "plain", scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 10, bias=bias))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * self.scale


EXPERIMENT = Experiment(
    net=Net,
    epochs=2,
    batch_size=64,
    optimizer=partial(SGD, lr=0.01, momentum=0.9, foreach=None),
    scheduler=partial(StepLR, step_size=2, gamma=0.6),
    augmentation=partial(random_rotation, degrees=7.0),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
)
# The flags that a sentence may be about, by how it begins; every other one is about a hyperparameter, thus --set.
ABOUT = {name: (f"--{name}",) for name in ("device", "limit", "holdout", "resume", "workers")} | {
    **{"seed": ("--seed", "--seeds"), "epochs": ("--epochs", "--set"), "batch_size": ("--batch-size", "--set")},
    **{"tracking store": ("--tracking-uri",), "data_dir": ("--data-dir",)},
}
FLAGS = ["--epochs", "--batch-size", "--seed", "--seeds", "--workers", "--threads", "--limit", "--holdout", "--device"]
GOOD = ["--epochs=3", "--batch-size=64", "--seed=7", "--threads=2", "--limit=65", "--set=lr=0.1", "--set=name=a b"]


def command_lines(places: list[str]) -> st.SearchStrategy[list[str]]:
    value = number_text | text | literal
    names = st.sampled_from([*EXPERIMENT.hyperparameters()]) | text
    setting = st.builds("--set={}={}".format, names, value)
    odd = st.one_of(
        st.builds("{}={}".format, st.sampled_from(FLAGS), value),
        setting,
        st.builds("--tracking-uri={}".format, st.sampled_from(places)),
        st.sampled_from(["--resume", "--resume=../../x", "--help", "--se=1", "--data-dir=\0", "-x", "--set"]) | text,
    )
    mixed = st.lists(st.sampled_from(GOOD), max_size=2).flatmap(
        lambda good: st.lists(odd, max_size=2).map(lambda more: [*good, *more])
    )
    # Alone, too: argparse itself refuses most of the other flags.
    return st.one_of(mixed, setting.map(lambda one: [one]))


class Begun(BaseException):
    """All checks are passed, and the training begins."""


def outcome_of(arguments: list[str]) -> str:
    """Return "begun", "help" or "usage", or the sentence with which the command line is refused."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main(EXPERIMENT, arguments)
    except Begun:
        return "begun"
    except SystemExit as end:
        if end.code == 1:
            _, error, sentence = stderr.getvalue().rstrip("\n").rpartition("error: ")
            assert error
            return sentence
        if end.code == 0:
            assert stdout.getvalue().startswith("usage: my_idea.py")
            return "help"
        if end.code != 2:
            raise
        said = stderr.getvalue().partition("my_idea.py: error: ")[2]
        assert re.match("argument --|unrecognized arguments: |ambiguous option: ", said), stderr.getvalue()
        return "usage"
    return "finished"


@HOW_MANY
def test_any_command_line_trains_or_is_refused_by_the_name_of_its_flag(
    examples: int, tiny_mnist: Mnist, uri: str, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*arguments: object, **more: object) -> None:
        raise Begun

    load = runner.load_mnist
    monkeypatch.setattr(runner, "load_mnist", lambda *given: tiny_mnist if given[0] is None else load(*given))
    monkeypatch.setattr(runner, "Record", begin)
    monkeypatch.setattr(study, "track", begin)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my_idea.py")])
    (tmp_path / "my_idea.py").write_text("from mnist_lab import Experiment, main\n\nmain(Experiment(...))\n")
    (tmp_path / "notes.txt").write_text("my notes\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    places = [f"sqlite:///{tmp_path}/notes.txt", f"sqlite:///{tmp_path}", "foo://x", "http://127.0.0.1:9"]
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(command_lines(places))
    def holds(arguments: list[str]) -> None:
        outcome = outcome_of(["--tracking-uri", uri, *arguments])
        torch.set_num_threads(1)
        if outcome in ("begun", "help", "usage"):
            outcomes[outcome] += 1
        else:
            outcomes["sentence"] += 1
            assert outcome.isprintable(), outcome
            names = [argument.removeprefix("--set=").partition("=")[0].strip() for argument in arguments]
            of_a_setting = outcome.startswith(tuple(f"{way}: " for name in names for way in (name, quoted(name))))
            flags = [] if of_a_setting else [flags for start, flags in ABOUT.items() if outcome.startswith(start)]
            about = flags[0] if flags else ("--set",)
            assert any(argument.startswith(about) for argument in arguments), outcome
            if about == ("--set",) and not re.match("--set|net|optimizer|scheduler|augmentation|loss", outcome):
                assert of_a_setting, outcome
        assert read_value(database, "SELECT COUNT(*) FROM runs") == 0

    holds()

    assert sum(outcomes.values()) >= examples
    assert min(outcomes[kind] for kind in ("begun", "usage", "sentence")) >= examples / 20


# ---- declarations


class Awkward:
    """A value that can't even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def raises(*arguments: object) -> Tensor:
    raise KeyError("of no use")


def fewer(images: Tensor) -> Tensor:
    return images[1:]


anything = st.one_of(
    whole,
    st.floats(),
    text,
    st.none() | st.booleans() | st.binary(max_size=4) | st.complex_numbers(),
    st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    st.sampled_from([object, len, nn.Module, torch.zeros(3, 3), np.array(["epoch", "batch"]), np.int64(3), ...]),
    st.builds(Awkward),  # not among the above: Hypothesis would show it with them
    st.sampled_from([raises, partial(raises, 1), partial(Net, 0.5), Net, lambda *given: None, print, sys.exit, iter]),
)
huge = st.sampled_from([2**63, 10**30, 10**5000])
numbers = st.floats() | st.integers(-2, 300) | text
RIGHT: dict[str, Any] = {
    "net": Net,
    "epochs": 3,
    "batch_size": 50,
    "optimizer": partial(SGD, lr=0.01),
    "scheduler": partial(ExponentialLR, gamma=0.9),
    "augmentation": partial(random_rotation, degrees=7.0),
    "average": partial(AveragedModel, use_buffers=True),
    "targets": Targets(accuracy=99.4),
}
ODD: dict[str, st.SearchStrategy[Any]] = {
    "net": st.builds(partial, st.just(Net), dropout=numbers)
    | st.builds(partial, st.just(Net), scale=st.floats())
    | st.builds(partial, st.just(Net), width=numbers)
    | st.sampled_from([str, raises]),
    "epochs": whole | huge,
    "batch_size": whole | huge,
    "optimizer": st.builds(partial, st.just(SGD), lr=numbers, momentum=numbers)
    | st.builds(partial, st.just(Adam), lr=numbers, betas=st.tuples(numbers, numbers) | numbers),
    "scheduler": st.builds(partial, st.just(StepLR), step_size=numbers, gamma=numbers)
    | st.builds(partial, st.just(OneCycleLR), max_lr=numbers, total_steps=st.integers(-1, 40))
    | st.builds(partial, st.just(ExponentialLR), gamma=numbers),
    "scheduler_interval": text,
    "augmentation": st.builds(partial, st.just(random_rotation), degrees=numbers)
    | st.sampled_from([fewer, torch.Tensor.long, torch.mean, raises, lambda x: x]),
    "loss": st.sampled_from([torch.add, raises, lambda y, t: y.sum()]),
    "objective": st.builds(partial, st.just(mixup), alpha=numbers) | st.sampled_from([torch.add, raises, mixup]),
    "average": st.sampled_from([nn.Module, str, raises, copy.deepcopy]),
    "normalize": st.tuples(numbers, numbers) | st.tuples(st.floats(-2, 2), st.floats(0.1, 2)),
    "targets": st.builds(Targets, accuracy=anything, params=anything, epochs=anything),
    "reported": st.dictionaries(st.sampled_from(["best_epoch", "best"]), anything, max_size=2),
}


@st.composite
def declarations(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """Return fields, and the names of those that may be wrong."""
    odd = set(draw(st.lists(st.sampled_from(list(ODD)), min_size=0, max_size=2)))
    if "objective" in odd:
        odd -= {"loss"}
    return RIGHT | {name: draw(ODD[name] if draw(st.integers(0, 3)) else anything) for name in sorted(odd)}, odd


@HOW_MANY
def test_any_declaration_trains_or_is_refused_by_the_name_of_its_field(examples: int, tiny_mnist: Mnist) -> None:
    few = first(tiny_mnist, 8, 60)
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(declarations())
    def holds(declared: tuple[dict[str, Any], set[str]]) -> None:
        fields, odd = declared
        try:
            experiment = Experiment(**fields)
            experiment.check()
            experiment.hyperparameters()
            rehearsal.rehearse(experiment, tiny_mnist)
        except LabError as refusal:
            sentence = str(refusal)
            assert sentence.isprintable()
            field = re.match(r"(\w+)", sentence)
            assert field
            # What a part gives is seen by the next one: odd images or logits may be too much for it.
            seen_by = {"net": {"normalize"}, "loss": {"net"}, "objective": {"net"}, "average": {"net", "normalize"}}
            seen_by["optimizer"] = {"net", "augmentation", "loss", "objective", "normalize"}
            seen_by["scheduler"] = {"optimizer"}
            assert odd & ({field[1]} | seen_by.get(field[1], set())), sentence
            outcomes["sentence"] += 1
            return
        outcomes["accepted"] += 1
        try:
            (metrics,) = Training(experiment.net(), dataclasses.replace(experiment, epochs=1), few, seed=0).epochs()
        except LabError as diverged:
            if diverged.field != "loss":
                raise
        else:
            assert metrics.train_images == 8

    holds()

    assert sum(outcomes.values()) >= examples
    assert min(outcomes.values()) >= examples / 20
