"""The scripts in experiments/: networks and recipes are the ones that were reported, and the comments are true."""

import ast
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
import torchsummary
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from mnist_lab import Experiment, Targets
from mnist_lab.augmentation import random_rotation
from mnist_lab.data import Mnist
from mnist_lab.running import rehearsal
from mnist_lab.running.summary import receptive_fields
from mnist_lab.training import loop as training

ROOT = Path(__file__).parent.parent
STEMS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
STEPS = ["step1_baseline", "step2_dropout", "step3_gap", "step4_augment_steplr"]
# Of each network: the rows of its model summary, [layer type, output shape, parameters], for a (1, 28, 28) input.
LAYERS: dict[str, list[list[Any]]] = json.loads((Path(__file__).parent / "layers.json").read_text())
Load = Callable[[str], ModuleType]


def summary_rows(net: nn.Module) -> list[list[Any]]:
    """Return what torchsummary prints of each layer: its type, output shape and parameters."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        torchsummary.summary(net, (1, 28, 28), device="cpu")
    rows = re.findall(r"^ *(\w+)-\d+ +\[-1, ([\d, ]+)\] +([\d,]+) *$", text.getvalue(), re.MULTILINE)
    return [[kind, json.loads(f"[{shape}]"), int(params.replace(",", ""))] for kind, shape, params in rows]


# ---- every script


def test_the_six_experiments_are_there() -> None:
    assert set(LAYERS) == {*STEPS, "under_20k", "four_conv"}
    assert set(LAYERS) <= set(STEMS)


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
def test_summary_prints_the_reported_rows(stem: str, load_script: Load) -> None:
    assert summary_rows(load_script(stem).Net()) == LAYERS[stem]


@pytest.mark.parametrize(
    ("stem", "num_params"),
    [
        ("step1_baseline", 10_970),
        ("step2_dropout", 6_864),
        ("step3_gap", 8_008),
        ("step4_augment_steplr", 7_852),
        ("four_conv", 593_200),
        ("under_20k", 14_320),
    ],
)
def test_number_of_parameters_is_the_reported_one(stem: str, num_params: int, load_script: Load) -> None:
    assert training.num_params(load_script(stem).Net()) == num_params
    assert sum(params for _, _, params in LAYERS[stem]) == num_params


# ---- the comments beside the layers


def test_comments_are_read() -> None:
    assert read_comment("            nn.Conv2d(1, 8, 3, bias=False),  # (8, 26, 26), 3") == ((8, 26, 26), 3)
    assert read_comment("        x = F.relu(self.linear1(x.flatten(1)))  # (50,), 28") == ((50,), 28)
    assert read_comment("    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)") is None


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

    fields = receptive_fields(script.Net())
    checked = 0
    for (line, _), (_, shape, _), field in zip(layers, rows, fields, strict=True):
        if (stated := read_comment(line)) is not None:
            assert stated == (tuple(shape), field), line
            checked += 1
    for number, value in values_in_forward(script.Net()).items():
        if (stated := read_comment(lines[number - 1])) is not None:
            assert stated == (tuple(value.shape[1:]), field_of(value)), lines[number - 1]
            checked += 1

    assert checked == sum(read_comment(line) is not None for line in lines), "some comments were not checked"
    if stem in LAYERS:
        assert checked >= sum(kind == "Conv2d" or "Pool" in kind for kind, _, _ in rows)


def values_in_forward(net: nn.Module) -> dict[int, Tensor]:
    """Return what each line `name = ...` of `forward` assigns, by line number; image i has NaN in its column i."""
    source, first = inspect.getsourcelines(type(net).forward)
    parsed = ast.parse("".join(["if True:\n", *source]))  # so that it may be indented
    assigned = {
        node.lineno + first - 2: node.targets[0].id
        for node in ast.walk(parsed)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    values: dict[int, Tensor] = {}
    line = 0

    def follow(frame: FrameType, event: str, _: object) -> Any:
        nonlocal line
        if frame.f_code is not type(net).forward.__code__:
            return None
        if line in assigned and event in ("line", "return"):  # the line before this one is through
            values[line] = frame.f_locals[assigned[line]]
        line = frame.f_lineno
        return follow

    images = torch.zeros(28, 1, 28, 28, dtype=torch.float64)
    images[torch.arange(28), :, :, torch.arange(28)] = torch.nan
    before = sys.gettrace()
    sys.settrace(follow)
    try:
        net.double().eval()(images)
    finally:
        sys.settrace(before)
    return values


def field_of(value: Tensor) -> int:
    """Return how many columns of the image the middle output depends on."""
    middle = value[..., value.shape[-1] // 2] if value.ndim == 4 else value
    return sum(bool(one.isnan().any()) for one in middle)


# ---- the recipes

COMMON_TARGETS = Targets(accuracy=99.4, params=10_000, epochs=15)
RECIPES: dict[str, dict[str, Any]] = {
    "step1_baseline": {
        "lr": 0.01,
        "epochs": 14,
        "batch_size": 128,
        "dropout": None,
        "targets": COMMON_TARGETS,
        "reported": {"best_train_accuracy": 99.75, "best_test_accuracy": 99.29},
    },
    "step2_dropout": {
        "lr": 0.01,
        "epochs": 14,
        "batch_size": 128,
        "dropout": 0.1,
        "targets": COMMON_TARGETS,
        "reported": {"best_train_accuracy": 99.02, "best_test_accuracy": 99.28},
    },
    "step3_gap": {
        "lr": 0.01,
        "epochs": 14,
        "batch_size": 128,
        "dropout": 0.007,
        "targets": COMMON_TARGETS,
        "reported": {"best_train_accuracy": 99.40, "best_test_accuracy": 99.37, "best_epoch": 14},
    },
    "step4_augment_steplr": {
        "lr": 0.1,
        "epochs": 14,
        "batch_size": 128,
        "dropout": 0.007,
        "schedule": (2, 0.6),
        "targets": COMMON_TARGETS,
        "reported": {"best_train_accuracy": 99.32, "best_test_accuracy": 99.46, "best_epoch": 11},
    },
    "four_conv": {
        "lr": 0.01,
        "epochs": 20,
        "batch_size": 512,
        "dropout": None,
        "schedule": (15, 0.1),
        "targets": Targets(),
        "reported": {
            "final_train_accuracy": 99.12,
            "final_test_accuracy": 99.24,
            "best_test_accuracy": 99.25,
            "final_test_loss": 0.0204,
        },
    },
    "under_20k": {
        "lr": 0.01,
        "epochs": 19,
        "batch_size": 128,
        "dropout": 0.1,
        "targets": Targets(accuracy=99.4, params=20_000, epochs=20),
        "reported": {
            "best_test_accuracy": 99.45,
            "best_epoch": 15,
            "final_test_accuracy": 99.43,
            "final_test_loss": 0.0172,
        },
    },
}


@pytest.mark.parametrize("stem", RECIPES)
def test_recipe_is_the_reported_one(stem: str, load_script: Load) -> None:
    experiment, recipe = load_script(stem).EXPERIMENT, RECIPES[stem]
    net = experiment.net()
    optimizer = experiment.optimizer(net.parameters())

    assert (experiment.epochs, experiment.batch_size) == (recipe["epochs"], recipe["batch_size"])
    assert experiment.targets == recipe["targets"]
    assert experiment.reported == recipe["reported"]
    assert type(optimizer) is SGD
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (recipe["lr"], 0.9)
    assert (group["weight_decay"], group["nesterov"], group["dampening"]) == (0, False, 0)
    dropouts = [layer for layer in net.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
    assert all(type(layer) is nn.Dropout for layer in dropouts)
    assert {layer.p for layer in dropouts} == ({recipe["dropout"]} - {None})
    if "schedule" not in recipe:
        assert experiment.scheduler is None
    else:
        scheduler = experiment.scheduler(optimizer)
        assert type(scheduler) is StepLR
        assert (scheduler.step_size, scheduler.gamma) == recipe["schedule"]
        assert experiment.scheduler_interval == "epoch"


@pytest.mark.parametrize("stem", RECIPES)
def test_loss_is_the_cross_entropy(stem: str, load_script: Load, small_mnist: Mnist) -> None:
    script = load_script(stem)
    net = script.Net().eval()
    images = small_mnist.train_images[:64].float() / 255
    labels = small_mnist.train_labels[:64]

    loss, output = training.loss_and_logits(net, training.normalize(images), labels, script.EXPERIMENT)

    torch.testing.assert_close(loss, nn.NLLLoss()(output.log_softmax(1), labels))
    is_log_softmax = torch.allclose(output.exp().sum(1), torch.ones(64), atol=1e-5)
    assert is_log_softmax or stem in STEPS


def test_convolutions_have_biases_in_four_conv_only(load_script: Load) -> None:
    for stem in LAYERS:
        convolutions = [layer for layer in load_script(stem).Net().modules() if isinstance(layer, nn.Conv2d)]
        assert {layer.bias is not None for layer in convolutions} == {stem == "four_conv"}


def test_four_conv_pools_before_the_activation(load_script: Load) -> None:
    net = load_script("four_conv").Net().eval()
    images = torch.rand(8, 1, 28, 28)

    x = net.conv1(images).relu()
    x = nn.functional.max_pool2d(net.conv2(x), 2).relu()
    x = net.conv3(x).relu()
    x = nn.functional.max_pool2d(net.conv4(x), 2).relu()
    expected = net.linear2(net.linear1(x.flatten(1)).relu()).log_softmax(1)

    torch.testing.assert_close(net(images), expected)


def test_steps_1_to_3_differ_in_the_network_only(load_script: Load) -> None:
    steps = [load_script(stem).EXPERIMENT for stem in STEPS[:3]]
    recipes = [{name: v for name, v in step.hyperparameters().items() if name != "dropout"} for step in steps]

    assert recipes[0] == recipes[1] == recipes[2]
    assert recipes[0]["augmentation"] == "none"
    assert recipes[0]["scheduler"] == "none"
    assert steps[0].targets == steps[1].targets == steps[2].targets


def test_step_4_adds_rotation_and_its_schedule_to_the_recipe_of_step_3(load_script: Load) -> None:
    step3, step4 = (load_script(stem).EXPERIMENT.hyperparameters() for stem in STEPS[2:])

    different = {name: value for name, value in step4.items() if step3.get(name) != value}

    assert different == {
        "lr": 0.1,
        "scheduler": "StepLR",
        "step_size": 2,
        "gamma": 0.6,
        "scheduler_interval": "epoch",
        "augmentation": "random_rotation",
        "degrees": 7.0,
    }
    assert step3.keys() <= step4.keys()


def test_step_4_rotates_its_training_images(load_script: Load, small_mnist: Mnist) -> None:
    augmentation = load_script("step4_augment_steplr").EXPERIMENT.augmentation
    images = small_mnist.train_images.float() / 255

    torch.manual_seed(0)
    augmented = augmentation(images)
    torch.manual_seed(0)
    assert torch.equal(augmented, random_rotation(images, 7))


def test_four_conv_crops_one_image_in_ten_then_rotates(load_script: Load, small_mnist: Mnist) -> None:
    experiment = load_script("four_conv").EXPERIMENT
    images = small_mnist.train_images.float() / 255
    declared = experiment.hyperparameters()

    assert {name: declared[name] for name in ("size", "p", "degrees")} == {"size": 22, "p": 0.1, "degrees": 15.0}
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
