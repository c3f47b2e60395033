"""Several seeds trained as one program: their parameters are stacked in a new first dimension, for a GPU.

A network of some thousand parameters leaves a GPU idle: the time goes into launching its many small operations.
Stacked, one launch serves all seeds. Each seed keeps its own initial weights, order of images, dropout and batch
statistics, as if it had been trained alone; without dropout and augmentation the result is the same within rounding.
Dropout and augmentation draw from one generator for all seeds, so there the numbers are others than those of a seed
that is trained alone, from the same distribution.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training.cudagraph import Captured
from mnist_lab.training.loop import (
    EpochMetrics,
    build_scheduler,
    evaluate,
    evaluation_part,
    normalize,
    predict,
    training_images,
)

# Their update of one weight depends on that weight alone, so stacked parameters are updated as separate ones are.
ELEMENTWISE_OPTIMIZERS = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop)


def fit_stacked(
    nets: Sequence[nn.Module], experiment: Experiment, mnist: Mnist, seeds: Sequence[int]
) -> Iterator[list[EpochMetrics]]:
    """Train the networks of several seeds at once, in place, and yield each finished epoch's metrics in their order.

    nets: each as it is built after `torch.manual_seed(seed)`.
    epoch_seconds is the time that all seeds took together. A seed whose loss is not finite has that loss in its metrics
    and does not disturb the others.

    Raises:
        LabError: if the optimizer or the scheduler would mix the seeds.
    """
    params, buffers = stack_module_state(list(nets))
    optimizer = experiment.optimizer(list(params.values()))
    total = len(mnist.train_images)
    scheduler = build_scheduler(experiment, optimizer, total)
    if refusal := _mixes(optimizer, scheduler):
        raise LabError(refusal)
    step = _stacked_step(nets[0], experiment)
    device = mnist.train_images.device
    loss_sum = torch.zeros(len(seeds), device=device)
    correct = torch.zeros(len(seeds), dtype=torch.int64, device=device)

    def train(batch: Tensor) -> None:  # (S, B)
        images, labels = _stacked_batch(mnist, batch, experiment)
        gradients, losses, logits = step(params, buffers, images, labels)
        for name, parameter in params.items():
            parameter.grad = gradients[name]
        optimizer.step()
        loss_sum.add_(losses * batch.shape[1])
        correct.add_((logits.argmax(dim=2) == labels).sum(dim=1))

    captured = Captured(train)
    evaluated_on, eval_images, eval_labels = evaluation_part(mnist)
    shuffling = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # dropout and augmentation of all seeds
    for epoch in range(1, experiment.epochs + 1):
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        order = torch.stack([torch.randperm(total, generator=generator) for generator in shuffling])
        loss_sum.zero_()
        correct.zero_()
        for batch in torch.split(order.to(device), experiment.batch_size, dim=1):
            captured(batch, key=optimizer.param_groups[0]["lr"])
            if scheduler is not None and experiment.scheduler_interval == "batch":
                scheduler.step()
        if scheduler is not None and experiment.scheduler_interval == "epoch":
            scheduler.step()
        _write_back(nets, params, buffers)
        evaluated = [evaluate(predict(net, eval_images), eval_labels) for net in nets]
        seconds = time.perf_counter() - start
        yield [
            EpochMetrics(
                epoch=epoch,
                train_loss=loss_sum[index].item() / total,
                train_correct=int(correct[index].item()),
                train_images=total,
                eval_loss=eval_loss,
                eval_correct=eval_correct,
                eval_images=len(eval_images),
                lr=lr,
                epoch_seconds=seconds,
                evaluated_on=evaluated_on,
            )
            for index, (eval_loss, eval_correct) in enumerate(evaluated)
        ]


def can_stack(experiment: Experiment, num_images: int) -> bool:
    """Say whether the experiment's seeds can be trained together."""
    optimizer = experiment.optimizer(experiment.net().parameters())
    return _mixes(optimizer, build_scheduler(experiment, optimizer, num_images)) is None


def _mixes(optimizer: Optimizer, scheduler: LRScheduler | None) -> str | None:
    """Return the sentence that says why stacked seeds would influence one another, or None."""
    if type(optimizer) not in ELEMENTWISE_OPTIMIZERS:  # a subclass may do as it likes
        allowed = ", ".join(kind.__name__ for kind in ELEMENTWISE_OPTIMIZERS)
        return f"optimizer: {type(optimizer).__name__} can't train seeds together; {allowed} can"
    if isinstance(scheduler, ReduceLROnPlateau):
        return "scheduler: ReduceLROnPlateau follows one run's loss, so it can't train seeds together"
    return None


def _stacked_batch(mnist: Mnist, batch: Tensor, experiment: Experiment) -> tuple[Tensor, Tensor]:
    """Return images (S, B, 1, 28, 28) and labels (S, B); each image is augmented by a draw of its own."""
    images = normalize(training_images(mnist, batch.flatten(), experiment))
    return images.view(*batch.shape, *images.shape[1:]), mnist.train_labels[batch]


def _stacked_step(net: nn.Module, experiment: Experiment):  # type: ignore[no-untyped-def]
    """Return what maps stacked parameters, buffers and batches to gradients, losses (S,) and logits (S, B, 10)."""
    skeleton = copy.deepcopy(net).to("meta").train()

    def loss_of_one(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = functional_call(skeleton, (params, buffers), (images,))  # batch norm updates its buffers in place
        return experiment.loss(logits, labels), logits

    gradient_of_one = grad_and_value(loss_of_one, has_aux=True)

    def one(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        gradients, (loss, logits) = gradient_of_one(params, buffers, images, labels)
        return gradients, loss, logits

    stacked = vmap(one, randomness="different")

    def step(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        detached = {name: parameter.detach() for name, parameter in params.items()}
        return stacked(detached, buffers, images, labels)

    return step


@torch.no_grad()
def _write_back(nets: Sequence[nn.Module], params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Copy each seed's slice into its network."""
    for index, net in enumerate(nets):
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for name, stacked in {**params, **buffers}.items():
            own[name].copy_(stacked[index])
