"""Declarations: what is refused, how they read as hyperparameters, and how they are overridden."""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torchvision.transforms import RandomRotation

from mnist_lab import Experiment, Targets
from mnist_lab.augmentation import random_rotation
from mnist_lab.errors import LabError
from mnist_lab.experiment import quoted


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1, width: int = 4, bias: bool = False, name: str = "plain") -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.dropout(images.flatten(1)))


def crop_and_rotate(images: Tensor, size: int = 22, p: float = 0.1, degrees: float = 15.0) -> Tensor:
    return images


def declare(**changes: object) -> Experiment:
    fields: dict[str, object] = {
        "net": Net,
        "epochs": 14,
        "batch_size": 128,
        "optimizer": partial(SGD, lr=0.1, momentum=0.9),
        "scheduler": partial(StepLR, step_size=2, gamma=0.6),
        "augmentation": partial(random_rotation, degrees=7.0),
    }
    return Experiment(**(fields | changes))


# ---- fields


def test_numbers_of_numpys_are_taken_as_pythons() -> None:
    declared = declare(epochs=np.int64(3), batch_size=np.int32(50), normalize=(np.float64(0.13), np.float32(0.5)))
    declared.check()
    fields = (declared.epochs, declared.batch_size, *declared.normalize)
    assert fields == (3, 50, 0.13, 0.5)
    assert [type(one) for one in fields] == [int, int, float, float]


def test_a_misspelt_field_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        declare(batchsize=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'acuracy'"):
        Targets(acuracy=99.4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'net'"):
        Experiment(epochs=1, batch_size=1, optimizer=SGD)  # type: ignore[call-arg]


def test_a_declaration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        declare().epochs = 3  # type: ignore[misc]


def test_a_declaration_can_be_copied_and_pickled() -> None:
    experiment = declare(augmentation=crop_and_rotate, targets=Targets(accuracy=99.4))

    for twin in (copy.copy(experiment), copy.deepcopy(experiment), pickle.loads(pickle.dumps(experiment))):  # noqa: S301
        assert twin is not experiment
        assert twin.hyperparameters() == experiment.hyperparameters()
        assert twin.targets == experiment.targets


# ---- check()


def test_what_scripts_declare_passes() -> None:
    declare().check()
    declare(scheduler=None, augmentation=None).check()
    declare(optimizer=Adam, loss=nn.NLLLoss(), net=lambda: Net(), scheduler_interval="batch").check()
    declare(targets=Targets(accuracy=100, params=1, epochs=1)).check()
    declare(reported={"best_test_accuracy": 99.46, "best_epoch": 11, "final_test_loss": 0.0204}).check()


@pytest.mark.parametrize("field", ["epochs", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 14.5, True, "14", None])
def test_a_count_that_is_none_is_refused(field: str, value: object) -> None:
    with pytest.raises(LabError, match=f"^{field}: {re.escape(repr(value))} is not a whole number"):
        declare(**{field: value}).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("net", None),
        ("net", "Net"),
        ("optimizer", None),
        ("optimizer", 0.1),
        ("optimizer", SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
        ("scheduler", "StepLR"),
        ("augmentation", 7),
        ("loss", "cross_entropy"),
    ],
)
def test_a_part_that_cannot_be_called_is_refused(field: str, value: object) -> None:
    with pytest.raises(LabError, match=f"^{field}: {re.escape(quoted(value))} can't be called"):
        declare(**{field: value}).check()


def test_a_network_instead_of_its_class_is_refused() -> None:
    with pytest.raises(LabError, match=r"^net: .*class"):
        declare(net=Net()).check()


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("net", partial(Net, 0.2), "Net"),
        ("optimizer", partial(SGD, [], lr=0.1), "SGD"),
        ("scheduler", partial(StepLR, 2), "StepLR"),
        ("augmentation", partial(random_rotation, 7), "random_rotation"),
        ("loss", partial(F.cross_entropy, None), "cross_entropy"),
    ],
)
def test_positional_arguments_of_a_partial_are_refused(field: str, value: object, name: str) -> None:
    with pytest.raises(LabError, match=rf"^{field}: .*partial\({name}, \.\.\.\) by keyword"):
        declare(**{field: value}).check()


@pytest.mark.parametrize("value", ["step", "batches", None, 1])
def test_an_unknown_interval_is_refused(value: object) -> None:
    with pytest.raises(LabError, match=f"^scheduler_interval: {value!r} is neither"):
        declare(scheduler_interval=value).check()


@pytest.mark.parametrize("targets", [None, 99.4, {"accuracy": 99.4}])
def test_targets_of_another_type_are_refused(targets: object) -> None:
    with pytest.raises(LabError, match=f"^targets: {re.escape(repr(targets))} is not"):
        declare(targets=targets).check()


@pytest.mark.parametrize("value", [0, -1, 100.1, float("nan"), float("inf"), True, "99.4"])
def test_an_accuracy_that_is_no_percentage_is_refused(value: object) -> None:
    with pytest.raises(LabError, match=rf"^targets\.accuracy: {re.escape(repr(value))} is not a percentage"):
        declare(targets=Targets(accuracy=value)).check()  # type: ignore[arg-type]


def test_an_accuracy_that_is_a_fraction_is_refused() -> None:
    with pytest.raises(LabError, match=r"^targets\.accuracy: 0\.994 is in percent; write 99\.4$"):
        declare(targets=Targets(accuracy=0.994)).check()


def test_the_class_of_a_loss_is_refused() -> None:
    with pytest.raises(LabError, match=r"^loss: CrossEntropyLoss is a class; give .* CrossEntropyLoss\(\.\.\.\)"):
        declare(loss=nn.CrossEntropyLoss).check()


@pytest.mark.parametrize("limit", ["params", "epochs"])
@pytest.mark.parametrize("value", [0, -1, 15.0, True, "15"])
def test_a_target_that_is_no_count_is_refused(limit: str, value: object) -> None:
    with pytest.raises(LabError, match=rf"^targets\.{limit}: {re.escape(repr(value))} is not a whole number"):
        declare(targets=Targets(**{limit: value})).check()  # type: ignore[arg-type]


def test_reported_figures_have_known_names() -> None:
    with pytest.raises(LabError, match=r"^reported: unknown figure 'best_accuracy'; allowed are .*best_test_accuracy"):
        declare(reported={"best_accuracy": 99.46}).check()


@pytest.mark.parametrize("value", ["99.46", None, True, float("nan")])
def test_reported_figures_are_numbers(value: object) -> None:
    with pytest.raises(LabError, match=f"^reported: best_test_accuracy={re.escape(repr(value))} is not a number"):
        declare(reported={"best_test_accuracy": value}).check()


@pytest.mark.parametrize("value", [None, 99.46, ["best_test_accuracy"]])
def test_reported_is_a_dict(value: object) -> None:
    with pytest.raises(LabError, match=f"^reported: {re.escape(repr(value))} is not a dict"):
        declare(reported=value).check()


def named_factor(epoch: int) -> float:
    return 1.0


def factor_of(change: Callable[[int], float]) -> Callable[[int], float]:
    def factor(epoch: int) -> float:
        return change(epoch)

    return factor


class Transform:
    def __init__(self, change: object) -> None:
        self.change = change

    def __call__(self, images: Tensor) -> Tensor:
        return images


class NetOf(Net):
    def __init__(self, act: object = F.relu, mean: Tensor | None = None) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("scheduler", partial(LambdaLR, lr_lambda=lambda epoch: 1.0), "lr_lambda is"),
        ("scheduler", partial(LambdaLR, lr_lambda=[named_factor, lambda epoch: 1.0]), "lr_lambda holds"),
        ("scheduler", partial(LambdaLR, lr_lambda=factor_of(lambda epoch: 1.0)), "lr_lambda holds"),
        ("scheduler", lambda optimizer: StepLR(optimizer, 1), "is"),
        ("optimizer", lambda parameters: SGD(parameters, lr=0.1), "is"),
        ("loss", partial(lambda logits, labels, p: logits.mean(), p=1), "is"),
        ("augmentation", lambda images: images, "is"),
        ("augmentation", Transform([lambda images: images]), "change holds"),
        ("net", partial(NetOf, act=lambda x: x), "act is"),
        ("net", partial(NetOf, act={"first": partial(lambda x, y: x, y=1)}), "act holds"),
    ],
)
def test_a_lambda_is_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(LabError, match=rf"^{field}: {said} a lambda; name the function \(def \.\.\.\)"):
        declare(**{field: value}).check()


def test_a_named_function_passes_wherever_it_stands() -> None:
    declare(scheduler=partial(LambdaLR, lr_lambda=[named_factor]), net=partial(NetOf, act=F.gelu)).check()
    declare(scheduler=partial(LambdaLR, lr_lambda=factor_of(named_factor)), augmentation=Transform("<lambda>")).check()


# ---- hyperparameters()


def test_hyperparameters_are_flat_and_in_torchs_words() -> None:
    assert declare().hyperparameters() == {
        "batch_size": 128,
        "epochs": 14,
        "optimizer": "SGD",
        "lr": 0.1,
        "momentum": 0.9,
        "scheduler": "StepLR",
        "step_size": 2,
        "gamma": 0.6,
        "scheduler_interval": "epoch",
        "loss": "cross_entropy",
        "dropout": 0.1,
        "width": 4,
        "bias": False,
        "name": "plain",
        "augmentation": "random_rotation",
        "degrees": 7.0,
    }


def test_what_is_not_declared_is_none_or_left_out() -> None:
    flat = declare(scheduler=None, augmentation=None, net=lambda: Net()).hyperparameters()

    assert flat == {
        "batch_size": 128,
        "epochs": 14,
        "optimizer": "SGD",
        "lr": 0.1,
        "momentum": 0.9,
        "scheduler": "none",
        "loss": "cross_entropy",
        "augmentation": "none",
    }


def test_default_values_of_the_scripts_own_functions_count_as_declared() -> None:
    flat = declare(augmentation=crop_and_rotate, net=partial(Net, dropout=0.3)).hyperparameters()

    assert {name: flat[name] for name in ("augmentation", "size", "p", "degrees", "dropout")} == {
        "augmentation": "crop_and_rotate",
        "size": 22,
        "p": 0.1,
        "degrees": 15.0,
        "dropout": 0.3,
    }


def test_arguments_of_the_loss_are_declared() -> None:
    flat = declare(loss=partial(F.cross_entropy, label_smoothing=0.1)).hyperparameters()

    assert flat["loss"] == "cross_entropy"
    assert flat["label_smoothing"] == 0.1


def test_what_a_part_holds_is_declared_too() -> None:
    flat = declare(augmentation=RandomRotation(30), loss=nn.CrossEntropyLoss(label_smoothing=0.1)).hyperparameters()

    assert (flat["augmentation"], flat["degrees"]) == ("RandomRotation", [-30.0, 30.0])
    assert (flat["loss"], flat["label_smoothing"]) == ("CrossEntropyLoss", 0.1)
    assert declare(loss=nn.CrossEntropyLoss()).hyperparameters() == declare().hyperparameters() | {
        "loss": "CrossEntropyLoss"
    }


class NetWithMomentum(Net):
    def __init__(self, momentum: float = 0.5, epochs: int = 3) -> None:
        super().__init__()
        self.momentum = momentum


def test_a_name_that_two_parts_use_is_qualified_in_the_second() -> None:
    flat = declare(net=NetWithMomentum, scheduler=partial(OneCycleLR, max_lr=0.2, epochs=5)).hyperparameters()

    assert (flat["momentum"], flat["net.momentum"]) == (0.9, 0.5)
    assert (flat["epochs"], flat["scheduler.epochs"], flat["net.epochs"]) == (14, 5, 3)


class NetWithReservedNames(Net):
    def __init__(self, augmentation: bool = True, seed: int = 7, device: str = "cpu") -> None:
        super().__init__()


def test_an_argument_never_hides_a_part_or_what_the_run_itself_logs() -> None:
    flat = declare(net=NetWithReservedNames).hyperparameters()

    assert flat["augmentation"] == "random_rotation"
    assert (flat["net.augmentation"], flat["net.seed"], flat["net.device"]) == (True, 7, "cpu")
    assert "seed" not in flat
    assert "device" not in flat


# ---- override()


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("epochs", 2, 2),
        ("epochs", "2", 2),
        ("batch_size", "64", 64),
        ("lr", "0.05", 0.05),
        ("lr", "5e-2", 0.05),
        ("lr", 1, 1.0),
        ("lr", "1", 1.0),
        ("step_size", "3", 3),
        ("dropout", "0", 0.0),
        ("bias", "True", True),
        ("name", "residual", "residual"),
        ("name", "7", "7"),
        ("degrees", "-1.5", -1.5),
    ],
)
def test_a_value_is_read_in_the_declared_values_type(name: str, given: object, value: object) -> None:
    changed, overrides = declare().override({name: given})

    assert overrides == {name: value}
    assert type(overrides[name]) is type(value)
    assert changed.hyperparameters() == declare().hyperparameters() | {name: value}


def test_a_tuple_is_read_as_one() -> None:
    changed, overrides = declare(optimizer=partial(Adam, betas=(0.9, 0.999))).override({"betas": "(0.8, 0.99)"})

    assert overrides == {"betas": (0.8, 0.99)}
    assert changed.optimizer(Net().parameters()).param_groups[0]["betas"] == (0.8, 0.99)


def test_a_value_declared_as_none_takes_any() -> None:
    experiment = declare(optimizer=partial(SGD, lr=0.1, foreach=None))

    assert experiment.override({"foreach": "True"})[1] == {"foreach": True}
    assert experiment.override({"foreach": "None"})[1] == {}


def test_overrides_reach_what_is_built() -> None:
    changed, overrides = declare().override({"lr": "0.05", "momentum": 0, "dropout": 0.5, "gamma": 0.1, "degrees": 0})

    net = changed.net()
    optimizer = changed.optimizer(net.parameters())
    scheduler = changed.scheduler(optimizer)
    assert net.dropout.p == 0.5
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0.0)
    assert (scheduler.step_size, scheduler.gamma) == (2, 0.1)
    images = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(changed.augmentation(images), images, rtol=0, atol=1e-5)
    assert list(overrides) == ["lr", "momentum", "dropout", "gamma", "degrees"]


def test_a_qualified_name_changes_its_own_part_only() -> None:
    experiment = declare(net=NetWithMomentum)

    changed, overrides = experiment.override({"net.momentum": "0.7"})
    assert overrides == {"net.momentum": 0.7}
    assert changed.net().momentum == 0.7
    assert changed.optimizer.keywords["momentum"] == 0.9

    changed, _ = experiment.override({"momentum": "0.7"})
    assert changed.net().momentum == 0.5
    assert changed.optimizer.keywords["momentum"] == 0.7

    changed, _ = experiment.override({"epochs": 2, "net.epochs": 4})
    assert (changed.epochs, changed.hyperparameters()["net.epochs"]) == (2, 4)


def test_the_original_is_left_unchanged() -> None:
    experiment = declare()
    before = experiment.hyperparameters()

    experiment.override({"lr": 1, "epochs": 1, "dropout": 0.5, "step_size": 9, "degrees": 1})

    assert experiment.hyperparameters() == before
    assert experiment.optimizer.keywords == {"lr": 0.1, "momentum": 0.9}


def test_values_equal_to_the_declared_are_no_overrides() -> None:
    experiment = declare()

    changed, overrides = experiment.override({"lr": "0.10", "epochs": "14", "dropout": 0.1, "name": "plain"})

    assert overrides == {}
    assert changed.hyperparameters() == experiment.hyperparameters()


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("epochs", "2.5", "a whole number"),
        ("epochs", 2.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "two", "a whole number"),
        ("lr", "fast", "a finite number"),
        ("lr", "nan", "a finite number"),
        ("lr", float("nan"), "a finite number"),
        ("lr", "1e999", "a finite number"),
        ("lr", "1" + "0" * 400, "a finite number"),
        ("lr", "True", "a finite number"),
        ("lr", "None", "a finite number"),
        ("lr", "{[]: 1}", "a finite number"),
        ("bias", "1", "True or False"),
        ("bias", "yes", "True or False"),
        ("name", 7, "a str"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, given: object, wanted: str) -> None:
    with pytest.raises(LabError, match=f"^{name}: {re.escape(repr(given))} is not {wanted} .*the declared value is"):
        declare().override({name: given})


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "scheduler_interval", "loss", "augmentation"])
def test_a_part_itself_cannot_be_overridden(name: str) -> None:
    with pytest.raises(LabError, match=f"^{name}: can't be set from the command line; copy the script"):
        declare().override({name: "Adam"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("droput", "dropout"), ("learning_rate", None), ("optimizer.lr", None), ("scheduler.step_size", "step_size")],
)
def test_an_unknown_name_is_refused_with_what_there_is(name: str, meant: str | None) -> None:
    with pytest.raises(LabError, match=f"^{name}: not a hyperparameter") as refusal:
        declare().override({name: 1})

    assert "batch_size, epochs, lr, momentum, step_size, gamma, dropout" in str(refusal.value)
    assert meant is None or f"did you mean {meant!r}?" in str(refusal.value)


@pytest.mark.parametrize(("name", "given"), [("epochs", "٣"), ("epochs", "1_0"), ("lr", "1_0.5"), ("lr", "٣")])
def test_numbers_are_written_in_the_digits_0_to_9(name: str, given: str) -> None:
    with pytest.raises(LabError, match=f"^{name}: '{given}' is not a "):
        declare().override({name: given})


def test_what_a_part_was_made_with_cannot_be_overridden() -> None:
    with pytest.raises(LabError, match="^degrees: RandomRotation was made with it; copy the script"):
        declare(augmentation=RandomRotation(30)).override({"degrees": "[0, 1]"})


def test_functions_and_tensors_can_stand_beside_an_override() -> None:
    experiment = declare(net=partial(NetOf, act=torch.relu, mean=torch.zeros(3)))

    changed, overrides = experiment.override({"lr": "0.2", "act": torch.relu, "mean": torch.zeros(3)})

    assert overrides == {"lr": 0.2}
    assert changed.hyperparameters()["act"] is torch.relu


def test_what_an_override_gives_is_checked_like_a_declaration() -> None:
    changed, _ = declare().override({"epochs": "0"})

    with pytest.raises(LabError, match=r"^epochs: 0"):
        changed.check()
