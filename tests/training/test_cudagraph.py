"""Batches launched as CUDA graphs: the same training, or a refusal. Emulated on the CPU; some on a device."""

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import Small, declare, first, train
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnist_lab.augmentation import random_rotation
from mnist_lab.data import Mnist, load_mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import mixup
from mnist_lab.training import cudagraph, dropout

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def tensors_in(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Tape(TorchDispatchMode):
    """Notes torch's operations with the tensors that they got and gave; a replay does them again on the same memory."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[Tensor, bool]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().removeprefix("aten::").split(".")[0] in self.READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        outputs = [(tensor, tensor.untyped_storage()._cdata not in given) for tensor in tensors_in(results)]
        self.operations.append((func, args, kwargs or {}, outputs))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            for (tensor, is_new), again in zip(outputs, tensors_in(func(*args, **kwargs)), strict=True):
                if is_new:
                    tensor.detach().copy_(again)


def record(device: torch.device, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], Any]:
    """Stand in for `cudagraph.record`; what the work changes meanwhile is put back by the caller, as on a device."""
    with Tape() as tape:
        outputs = work()
    return tape.replay, outputs


experiment = partial(
    declare,
    net=Small,
    epochs=3,
    batch_size=32,
    scheduler=partial(StepLR, step_size=1, gamma=0.5),
    augmentation=partial(random_rotation, degrees=7.0),
)


@pytest.fixture
def few(small_mnist: Mnist) -> Mnist:
    return first(small_mnist, 75)  # two full batches and a short one


@pytest.fixture(autouse=True)
def _as_on_a_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "MAX_P", -1.0)  # dropout is torch's own there
    if "on_cuda" not in request.fixturenames:
        monkeypatch.setattr(cudagraph, "record", record)


class PartlyTrained(Small):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.layers[0].weight.requires_grad_(False)


class Unfreezes(StepLR):
    """Lets the first layer be trained from the second epoch on."""

    def step(self, epoch: int | None = None) -> None:
        super().step()
        self.optimizer.param_groups[0]["params"][0].requires_grad_(self.last_epoch > 0)


SAME: dict[str, dict[str, Any]] = {
    "a step's parts": {},
    "a schedule per batch": {"scheduler": partial(OneCycleLR, max_lr=0.1), "scheduler_interval": "batch"},
    "an average": {"average": partial(AveragedModel, use_buffers=True)},
    "an objective": {"objective": partial(mixup, alpha=0.3)},
    "a layer that is trained later": {"net": PartlyTrained, "scheduler": partial(Unfreezes, step_size=1)},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_graphs_train_as_single_launches_do(changes: dict[str, Any], few: Mnist) -> None:
    plain, expected = train(experiment(**changes), few)
    graphed, epochs = train(experiment(**changes), few, cuda_graph=True)

    assert epochs == expected
    for name, value in plain.result.state_dict().items():
        assert torch.equal(value, graphed.result.state_dict()[name]), name


class Multiplies(Small):
    """Multiplies its logits in training by what a function of it and the images gives."""

    def __init__(self, factor: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + self.factor(self, images) if self.training else 1)


def counted(net: Multiplies, images: Tensor) -> float:
    net.calls += 1
    return 0.1 * net.calls


def another_buffer(net: Multiplies, images: Tensor) -> Tensor:
    net.mean = 0.9 * net.mean + 1
    return net.mean


def looked_at(net: Multiplies, images: Tensor) -> float:
    return 1.0 if images.mean() > 0 else 0.0


REFUSED: dict[str, Callable[[Multiplies, Tensor], Any]] = {
    "Python's random": lambda net, images: random.random(),
    "a count": counted,
    "another buffer": another_buffer,
    "a value that is read": looked_at,
}


@pytest.mark.parametrize("factor", REFUSED.values(), ids=REFUSED)
def test_what_a_graph_would_freeze_is_refused(factor: Any, few: Mnist) -> None:
    with pytest.raises(LabError, match=r"^cuda-graph: "):
        train(experiment(net=partial(Multiplies, factor)), few, cuda_graph=True)


def test_an_optimizer_that_evaluates_by_itself_is_refused(few: Mnist) -> None:
    with pytest.raises(LabError, match=r"^cuda-graph: LBFGS"):
        train(experiment(optimizer=LBFGS, scheduler=None), few, cuda_graph=True)


# ---- on a device


@pytest.fixture
def on_cuda() -> Mnist:
    return first(load_mnist(device="cuda"), 3000)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("stem", ["step4_augment_steplr", "four_conv"])
def test_a_script_trains_by_graphs_on_cuda(stem: str, load_script: Callable[[str], ModuleType], on_cuda: Mnist) -> None:
    declared = dataclasses.replace(load_script(stem).EXPERIMENT, epochs=2)
    _, expected = train(declared, on_cuda)
    _, epochs = train(declared, on_cuda, cuda_graph=True)

    for epoch, one in zip(epochs, expected, strict=True):
        assert epoch.train_loss == pytest.approx(one.train_loss, rel=1e-2)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("factor", REFUSED.values(), ids=REFUSED)
def test_what_a_graph_would_freeze_is_refused_on_cuda(factor: Any, on_cuda: Mnist) -> None:
    with pytest.raises(LabError, match=r"^cuda-graph: "):
        train(experiment(net=partial(Multiplies, factor)), on_cuda, cuda_graph=True)
