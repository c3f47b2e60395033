"""The scripts in experiments/: networks and recipes are the ones that were reported, and the comments are true."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mnist_lab import Experiment, Targets
from mnist_lab.augmentation import random_rotation
from mnist_lab.checking import rehearsal
from mnist_lab.data import Mnist
from mnist_lab.running.summary import summarize
from mnist_lab.training import loop as training

ROOT = Path(__file__).parent.parent
STEMS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
STEPS = ["step1_baseline", "step2_dropout", "step3_gap", "step4_augment_steplr"]
# Of each network: the rows of its model summary, [layer type, output shape, parameters], for a (1, 28, 28) input.
LAYERS: dict[str, list[list[Any]]] = json.loads((Path(__file__).parent / "layers.json").read_text())
Load = Callable[[str], ModuleType]


def summary_rows(net: nn.Module) -> list[list[Any]]:
    """Return what the summary says of each layer: its type, output shape and parameters."""
    rows = re.findall(r"^(\w+)-\d+ +\[([\d, ]+)\] +([\d,]+) ", summarize(net), re.MULTILINE)
    return [[kind, json.loads(f"[{shape}]"), int(params.replace(",", ""))] for kind, shape, params in rows]


# ---- every script


@pytest.mark.parametrize("stem", STEMS)
def test_docstring_has_the_four_headings(stem: str, load_script: Load) -> None:
    docstring = load_script(stem).__doc__ or ""
    title, *parts = re.split(r"\n\n(Target|Change|Result|Analysis): ", docstring)

    assert title.strip()
    assert parts[::2] == ["Target", "Change", "Result", "Analysis"]
    assert all(text.strip() for text in parts[1::2])


@pytest.mark.parametrize("stem", STEMS)
def test_script_declares_a_network_and_an_experiment(stem: str, load_script: Load) -> None:
    script = load_script(stem)

    assert isinstance(script.EXPERIMENT, Experiment)
    net = script.EXPERIMENT.net()
    assert isinstance(net, nn.Module)
    if type(net).__module__ != script.__name__:  # an ablation that keeps the network of its step
        assert type(net).__module__ in STEMS
        assert not hasattr(script, "Net")


@pytest.mark.parametrize("stem", STEMS)
def test_declaration_passes_its_checks_and_its_rehearsal(stem: str, load_script: Load, mnist: Mnist) -> None:
    experiment = load_script(stem).EXPERIMENT
    experiment.check()
    if "teacher" in getattr(experiment.objective, "keywords", {}):  # which a run finds in its store
        teacher = load_script(experiment.objective.keywords["teacher"]).EXPERIMENT.net()
        experiment = replace(experiment, objective=partial(experiment.objective, teacher=teacher))

    notices = rehearsal.rehearse(experiment, mnist).notices
    assert not [notice for notice in notices if notice.startswith(("scheduler", "net", "loss", "optimizer", "mlflow"))]


def test_importing_a_script_trains_and_logs_nothing(tmp_path: Path) -> None:
    program = """
import runpy, sys, torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

def refuse(*_):
    raise AssertionError("an optimizer took a step")

register_optimizer_step_pre_hook(refuse)
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="imported")
print(sorted({"mlflow", "mnist_lab.running.run", "mnist_lab.tracking.run"} & sys.modules.keys()))
"""
    paths = [str(ROOT / "experiments" / f"{stem}.py") for stem in STEMS]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MNIST_LAB_DATA": f"{tmp_path}/data",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


# ---- the networks


@pytest.mark.parametrize("stem", LAYERS)
def test_layers_and_parameters_are_the_reported_ones(stem: str, load_script: Load) -> None:
    net = load_script(stem).Net()
    reported = {"step1_baseline": 10_970, "step2_dropout": 6_864, "step3_gap": 8_008, "step4_augment_steplr": 7_852}
    reported |= {"four_conv": 593_200, "under_20k": 14_320}

    assert summary_rows(net) == LAYERS[stem]
    assert training.num_params(net) == sum(params for _, _, params in LAYERS[stem]) == reported[stem]
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert {layer.bias is not None for layer in convolutions} == {stem == "four_conv"}


# ---- the comments beside the layers


def read_comment(line: str) -> tuple[tuple[int, ...], int] | None:
    """Return the output shape and the receptive field that a line's comment states, if it states any."""
    stated = re.search(r"# (\([\d, ]+\)), (\d+)\s*$", line)
    return (ast.literal_eval(stated[1]), int(stated[2])) if stated else None


@pytest.mark.parametrize("stem", STEMS)
def test_comments_state_the_shape_and_the_receptive_field(stem: str, load_script: Load) -> None:
    script = load_script(stem)
    if not hasattr(script, "Net"):
        pytest.skip("its network is that of its step")
    lines = Path(script.__file__ or "").read_text().splitlines()
    layers = [(line, kind) for line in lines for kind in re.findall(r"\bnn\.(\w+)\(", line) if kind != "Sequential"]
    layers = [(line, kind) for line, kind in layers if not line.startswith("class ")]
    rows = LAYERS.get(stem) or summary_rows(script.Net())
    if stem not in LAYERS and [kind for _, kind in layers] != [kind for kind, _, _ in rows]:
        pytest.skip("its layers are not written one a line, in the order of the summary")
    assert [kind for _, kind in layers] == [kind for kind, _, _ in rows]

    fields = map(int, re.findall(r" (\d+)x\1$", summarize(script.Net()), re.MULTILINE))
    checked = 0
    for (line, _), (_, shape, _), field in zip(layers, rows, fields, strict=True):
        if (stated := read_comment(line)) is not None:
            assert stated == (tuple(shape), field), line
            checked += 1

    assert stem == "four_conv" or checked == sum(read_comment(line) is not None for line in lines)


# ---- the recipes

STEP = {
    "lr": 0.01,
    "momentum": 0.9,
    "epochs": 14,
    "batch_size": 128,
    "optimizer": "SGD",
    "scheduler": "none",
    "loss": "cross_entropy",
    "augmentation": "none",
}
TARGETS = Targets(accuracy=99.4, params=10_000, epochs=15)
TURNED = {"augmentation": "random_rotation", "degrees": 7.0}
STEP_LR = {"scheduler": "StepLR", "scheduler_interval": "epoch"}
CROPPED = {"augmentation": "crop_and_rotate", "size": 22, "p": 0.1, "degrees": 15.0}
# By script: its hyperparameters, the dropout of its layers, its targets, and the figures that were reported.
RECIPES: dict[str, tuple[dict[str, Any], float | None, Targets, dict[str, Any]]] = {
    "step1_baseline": (STEP, None, TARGETS, {"best_train_accuracy": 99.75, "best_test_accuracy": 99.29}),
    "step2_dropout": (STEP, 0.1, TARGETS, {"best_train_accuracy": 99.02, "best_test_accuracy": 99.28}),
    "step3_gap": (
        STEP,
        0.007,
        TARGETS,
        {"best_train_accuracy": 99.40, "best_test_accuracy": 99.37, "best_epoch": 14},
    ),
    "step4_augment_steplr": (
        STEP | TURNED | STEP_LR | {"lr": 0.1, "step_size": 2, "gamma": 0.6},
        0.007,
        TARGETS,
        {"best_train_accuracy": 99.32, "best_test_accuracy": 99.46, "best_epoch": 11},
    ),
    "four_conv": (
        STEP | CROPPED | STEP_LR | {"epochs": 20, "batch_size": 512, "step_size": 15, "gamma": 0.1},
        None,
        Targets(),
        {
            "final_train_accuracy": 99.12,
            "final_test_accuracy": 99.24,
            "best_test_accuracy": 99.25,
            "final_test_loss": 0.0204,
        },
    ),
    "under_20k": (
        STEP | {"epochs": 19},
        0.1,
        Targets(accuracy=99.4, params=20_000, epochs=20),
        {"best_test_accuracy": 99.45, "best_epoch": 15, "final_test_accuracy": 99.43, "final_test_loss": 0.0172},
    ),
}


@pytest.mark.parametrize("stem", RECIPES)
def test_recipe_is_the_reported_one(stem: str, load_script: Load) -> None:
    experiment = load_script(stem).EXPERIMENT
    declared, dropout, targets, reported = RECIPES[stem]
    layers = [layer for layer in experiment.net().modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]

    hyperparameters = {name: value for name, value in experiment.hyperparameters().items() if name != "dropout"}
    assert hyperparameters == declared
    assert {(type(layer), layer.p) for layer in layers} == ({(nn.Dropout, dropout)} if dropout else set())
    assert (experiment.targets, experiment.reported) == (targets, reported)


def test_four_conv_crops_one_image_in_ten_then_rotates(load_script: Load, small_mnist: Mnist) -> None:
    experiment = load_script("four_conv").EXPERIMENT
    images = small_mnist.train_images.float() / 255

    torch.manual_seed(0)
    changed = experiment.override({"degrees": 0})[0].augmentation(images)
    is_cropped = ((changed - images).abs() > 1e-4).flatten(1).any(dim=1)
    assert 0.05 < is_cropped.float().mean() < 0.15
    cropped = nn.functional.interpolate(images[is_cropped][..., 3:-3, 3:-3], (28, 28), mode="bilinear")
    torch.testing.assert_close(changed[is_cropped], cropped, rtol=0, atol=1e-4)
    torch.manual_seed(0)
    rotated = experiment.override({"p": 0})[0].augmentation(images)
    torch.manual_seed(0)
    torch.rand(len(images))  # what the crop draws first
    torch.testing.assert_close(rotated, random_rotation(images, 15))
