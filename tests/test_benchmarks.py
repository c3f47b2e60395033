"""The benchmarks in their smallest setting: that they run, what they write, and that the other ways really train."""

import importlib
import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from forkserver import run_program
from mnist_lab.data import Mnist

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@cache
def load(name: str) -> ModuleType:
    """Import benchmarks/<name>.py, which finds its neighbours beside itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


CASES = {  # flags and ratios
    "training": (
        ["--steps", "step4_augment_steplr"],
        {"write-ups / lab", "pytorch/examples / lab", "lab / lab's floor", "lab / plain floor"},
    ),
    "time_to_accuracy": (["--steps", "quick"], {"quick / step4_augment_steplr"}),
    "startup": ([], {"step4 --help / import torch", "make compare's command / import torch, mlflow"}),
    "run_tables": (["--rounds", "3"], {"run_table: 4 runs / 2", "epoch_history: 4 runs / 2"}),
    "study": (["--seeds", "1"], {"write-ups / lab, 1 seeds", "write-ups / lab, 1 seeds: epochs alone"}),
    "tracking": ([], {"tracking / training"}),
    "memory": ([], {"peak / import torch, mlflow"}),
}
MARKS = {name: [pytest.mark.long] for name in CASES if name not in ("training", "run_tables")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in CASES])
def test_a_benchmark_writes_its_figures_and_ratios(name: str, tmp_path: Path, mnist: Mnist) -> None:
    flags, wanted = CASES[name]
    done = run_program(BENCHMARKS / f"{name}.py", "--quick", *flags, "--out", tmp_path, cwd=BENCHMARKS.parent)

    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["benchmark"] == name
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert content["settings"]["rounds"] == (3 if name == "run_tables" else 1)
    for title, section in content["sections"].items():
        assert title in done.stdout
        for label, sample in {**section["figures"], **section["ratios"]}.items():
            assert label in done.stdout
            rounds = sample["rounds"]
            assert len(rounds) == content["settings"]["rounds"]
            assert 0 < min(rounds) == sample["least"] <= sample["median"] <= sample["most"] == max(rounds) < math.inf
    assert wanted <= {ratio for section in content["sections"].values() for ratio in section["ratios"]}


# ---- the write-ups' way


def test_the_write_ups_way_really_trains(mnist: Mnist) -> None:
    measure, writeups = load("measure"), load("writeups")
    experiment = measure.load_experiment("step4_augment_steplr")
    train_loader, test_loader = writeups.loaders("step4_augment_steplr", 128, images=2560, test_images=500)
    torch.manual_seed(0)
    net, cpu = experiment.net(), torch.device("cpu")
    optimizer = experiment.optimizer(net.parameters())
    batches: list[None] = []
    with measure.silenced():
        _, before = writeups.evaluate(net, cpu, test_loader)
        losses, accuracies = writeups.train(net, cpu, train_loader, optimizer, lambda: batches.append(None))
        _, after = writeups.evaluate(net, cpu, test_loader)
    assert len(losses) == len(batches) == 20
    assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.5
    assert accuracies[-1] > accuracies[0] + 10
    assert after > before + 15


@pytest.mark.parametrize("step", ["step1_baseline", "step4_augment_steplr", "four_conv"])
def test_the_write_ups_loaders_give_the_labs_inputs(step: str, mnist: Mnist) -> None:
    from mnist_lab.training.loop import normalize

    train_loader, test_loader = load("writeups").loaders(step, 64, images=200, test_images=100)
    assert (len(train_loader.dataset), len(test_loader.dataset)) == (200, 100)
    expected = normalize(mnist.train_images[:100].float() / 255)
    drawn = torch.stack([train_loader.dataset[index][0] for index in range(100)])
    assert drawn.shape == expected.shape
    same = (drawn - expected).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert same.all() if step == "step1_baseline" else same.sum() < 70  # by few degrees, the nearest pixels stay
    assert [train_loader.dataset[index][1] for index in range(100)] == mnist.train_labels[:100].tolist()
    plain = torch.stack([test_loader.dataset[index][0] for index in range(100)])
    torch.testing.assert_close(plain, normalize(mnist.test_images[:100].float() / 255))
