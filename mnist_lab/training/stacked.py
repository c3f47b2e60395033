"""Several seeds trained as one program: their parameters are stacked in a new first dimension, for a GPU.

A network of some thousand parameters leaves a GPU idle: the time goes into launching its many small operations.
Stacked, one launch serves all seeds. Each seed keeps its own initial weights, order of images, dropout and batch
statistics, as if it had been trained alone; without dropout and augmentation the result is the same within rounding.
Dropout and augmentation draw from one generator for all seeds, so there the numbers are others than those of a seed
that is trained alone, from the same distribution.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.overrides import TorchFunctionMode

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError, text_of
from mnist_lab.experiment import Experiment
from mnist_lab.training.generators import kept_generators, seed_generators
from mnist_lab.training.loop import (
    EpochMetrics,
    Loop,
    build_optimizer,
    build_scheduler,
    fit,
    initial_network,
    remembering,
)
from mnist_lab.training.states import left_as_they_are
from mnist_lab.training.transforms import takes_labels

TRIED, TRIED_BATCH = 70, 32  # images, which make two full batches and a short one
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# Their update of one weight depends on that weight alone, so stacked parameters are updated as separate ones are.
ELEMENTWISE_OPTIMIZERS = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop)


def fit_stacked(
    nets: Sequence[nn.Module], experiment: Experiment, mnist: Mnist, seeds: Sequence[int]
) -> Iterator[list[EpochMetrics]]:
    """Train the networks of several seeds at once, in place, and yield each finished epoch's metrics in their order.

    nets: each as `initial_network` builds it.
    epoch_seconds is the time that all seeds took together. A seed whose loss is not finite has that loss in its metrics
    and does not disturb the others.

    Raises:
        LabError: if the seeds would not be trained as each is alone, or if no seed has a finite loss.
    """
    return StackedTraining(nets, experiment, mnist, seeds).epochs_of_seeds()


class StackedTraining(Loop):
    """The networks of several seeds in training; `nets` are up to date after each epoch."""

    def __init__(self, nets: Sequence[nn.Module], experiment: Experiment, mnist: Mnist, seeds: Sequence[int]) -> None:
        self.params, self.buffers = stack_module_state(list(nets))
        parameters = list(self.params.values())
        if refusal := _why_not(experiment, nets[0], parameters, len(mnist.train_images)):
            raise LabError(refusal)
        buffers = list(self.buffers.values())
        super().__init__(nets, parameters, experiment, mnist, seeds, (len(seeds),), buffers=buffers)
        self.trained = [name for name, parameter in nets[0].named_parameters() if parameter.requires_grad]
        self.stacked_gradients = _stacked_gradients(nets[0], experiment)
        seed_generators(seeds[0])  # dropout and augmentation of all seeds; each image is augmented by a draw of its own

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradients, losses, logits = self.stacked_gradients(self.params, self.buffers, images, labels)
        for name in self.trained:
            self.params[name].grad = gradients[name]
        return losses, logits

    @torch.no_grad()
    def update_nets(self) -> None:
        for index, net in enumerate(self.nets):
            own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
            for name, stacked in {**self.params, **self.buffers}.items():
                own[name].copy_(stacked[index])


def why_not_stacked(experiment: Experiment, mnist: Mnist) -> str | None:
    """Return why the experiment's seeds can't be trained together, in a sentence, or None."""
    net = experiment.net()
    parameters, _ = stack_module_state([net, net])
    refusal = _why_not(experiment, net, list(parameters.values()), len(mnist.train_images))
    return refusal or _why_not_alike(experiment, mnist)


def _why_not_alike(experiment: Experiment, mnist: Mnist) -> str | None:
    """Train two seeds for some batches, stacked and alone, in float64; return why they do not agree, or None.

    Without dropout and augmentation, whose numbers stacked seeds draw otherwise.
    """
    few = dataclasses.replace(mnist, train_images=mnist.train_images[:TRIED], train_labels=mnist.train_labels[:TRIED])
    few = dataclasses.replace(few, test_images=few.test_images[:2], test_labels=few.test_labels[:2])
    few = dataclasses.replace(few, validation_images=None, validation_labels=None)
    tried = dataclasses.replace(experiment, epochs=1, batch_size=TRIED_BATCH, augmentation=None)

    def nets() -> list[nn.Module]:
        return [_Double(initial_network(experiment, seed, mnist.train_images.device)) for seed in (0, 1)]

    try:
        with kept_generators(mnist.train_images.device), _NoDropout():
            stacked, alone = nets(), nets()
            with left_as_they_are(*remembering(tried).values()):
                list(fit_stacked(stacked, tried, few, (0, 1)))
            for seed, net in enumerate(alone):
                with left_as_they_are(*remembering(tried).values()):
                    list(fit(net, tried, few, seed=seed))
    except Exception as error:  # vmap has many ways to say that it can't express a network
        return text_of(error)[:200]
    for one, other in zip(stacked, alone, strict=True):
        for name, value in one.state_dict().items():
            if not torch.allclose(value, other.state_dict()[name], rtol=1e-8, atol=1e-10):
                return f"{name.removeprefix('net.')} would be trained otherwise than alone"
    return None


class _Double(nn.Module):
    """A network in float64."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double())  # type: ignore[no-any-return]


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in DROPOUTS else func(*args, **(kwargs or {}))


def _why_not(experiment: Experiment, net: nn.Module, stacked: Sequence[Tensor], num_images: int) -> str | None:
    """Return the sentence that says why stacked seeds would not be trained as each is alone, or None.

    net, stacked: one seed's network, and the stacked parameters in the order of its own.
    """
    if experiment.objective is not None:
        return "objective: it is given one network, so it can't train seeds together"
    if experiment.average is not None:
        return "average: it is of one network's weights, so it can't train seeds together"
    if experiment.augmentation is not None and takes_labels(experiment.augmentation):
        return "augmentation: it mixes images of different seeds, so it can't train seeds together"
    alone, optimizer = build_optimizer(experiment, net.parameters()), build_optimizer(experiment, stacked)
    if type(optimizer) not in ELEMENTWISE_OPTIMIZERS:  # a subclass may do as it likes
        allowed = ", ".join(kind.__name__ for kind in ELEMENTWISE_OPTIMIZERS)
        return f"optimizer: {type(optimizer).__name__} can't train seeds together; {allowed} can"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "optimizer: a hook on its step would see all seeds at once, so it can't train seeds together"
    if _groups(optimizer, stacked) != _groups(alone, net.parameters()):
        return "optimizer: its groups depend on the parameters' shapes, so it can't train seeds together"
    if isinstance(build_scheduler(experiment, optimizer, num_images), ReduceLROnPlateau):
        return "scheduler: ReduceLROnPlateau follows one run's loss, so it can't train seeds together"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters()):
        return "net: a hook on a parameter's gradient is not called when seeds are trained together"
    if any(module._backward_hooks or module._backward_pre_hooks for module in net.modules()):
        return "net: a backward hook is not called when seeds are trained together"
    return None


def _groups(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[dict[str, object]]:
    """Return what each parameter group holds, with the parameters by their place in `parameters`."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    return [
        {
            **{name: value.tolist() if isinstance(value, Tensor) else value for name, value in group.items()},
            "params": [places[id(parameter)] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def _stacked_gradients(net: nn.Module, experiment: Experiment):  # type: ignore[no-untyped-def]
    """Return what maps stacked parameters, buffers and batches to gradients, losses (S,) and logits (S, B, 10)."""
    skeleton = copy.deepcopy(net).to("meta").train()
    loss = experiment.loss or F.cross_entropy

    def loss_of_one(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = functional_call(skeleton, (params, buffers), (images,))  # batch norm updates its buffers in place
        return loss(logits, labels), logits

    gradient_of_one = grad_and_value(loss_of_one, has_aux=True)

    def one(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        gradients, (loss, logits) = gradient_of_one(params, buffers, images, labels)
        return gradients, loss, logits

    stacked = vmap(one, randomness="different")

    def of_all(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        detached = {name: parameter.detach() for name, parameter in params.items()}
        return stacked(detached, buffers, images, labels)

    return of_all
