"""The benchmarks in their smallest setting: that they run, what they write, and that the other ways really train."""

import importlib
import itertools
import json
import math
import statistics
import subprocess
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


# ---- each benchmark, as `make bench ARGS=--quick` runs it

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


@pytest.mark.gpu
def test_the_gpu_benchmark_measures_where_there_is_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("gpu").main(["--quick", "--out", str(tmp_path)])
    if torch.cuda.is_available():
        content = json.loads((tmp_path / "gpu.json").read_text())
        assert set(content["sections"]["1 epochs"]["ratios"]) == {"write-ups / lab"}
    else:
        assert capsys.readouterr().out == "gpu: there is no CUDA device here, so nothing is measured.\n"
        assert list(tmp_path.iterdir()) == []


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS), "trainign"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "'trainign'" in done.stderr
    assert "training" in done.stderr


def test_the_time_of_a_recipe_is_that_of_all_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist: Mnist
) -> None:
    benchmark = load("time_to_accuracy")
    seconds = {"step4_augment_steplr": (1.5, 0.5), "quick": (1.0, 0.25)}  # of an epoch's training and evaluation
    monkeypatch.setattr(benchmark, "lab", lambda task: load("training").Epoch(*seconds[task.step]))

    benchmark.main(["--quick", "--steps", "quick", "--out", str(tmp_path)])

    (section,) = json.loads((tmp_path / "time_to_accuracy.json").read_text())["sections"].values()
    assert {step: figure["median"] for step, figure in section["figures"].items()} == {
        "step4_augment_steplr": 14 * 2.0,
        "quick": 3 * 1.25,
    }
    assert section["ratios"]["quick / step4_augment_steplr"]["median"] == 3 * 1.25 / (14 * 2.0)


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


# ---- what the benchmarks share


def test_few_batches_stand_for_a_whole_epoch() -> None:
    laps = load("measure").Laps()
    laps.start, laps.laps, laps.end = 100.0, [103.0, 103.5, 104.0], 104.25
    assert laps.batch == 0.5
    assert laps.seconds(3) == 4.25
    assert laps.seconds(11) == 3.0 + 10 * 0.5 + 0.25


def test_rounds_take_turns_and_begin_with_another_way_each() -> None:
    turns = itertools.count(1)
    results = load("measure").interleave(dict.fromkeys("abc", lambda: next(turns)), rounds=3)
    assert results == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_start_up_counts_once_for_several_seeds() -> None:
    study = load("study")
    assert study.Trained(wall=10.0, epochs=6.0).repeated(3) == study.Trained(wall=22.0, epochs=18.0)
