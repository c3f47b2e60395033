"""The training loop: torch only. `Training.epochs` yields each finished epoch and knows nothing of who listens."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training.cudagraph import Captured
from mnist_lab.training.dropout import SparseDropout

# Mean and standard deviation of the training pixels scaled to [0, 1].
MEAN, STD = 0.1307, 0.3081
EVALUATION_BATCH_SIZE = 500

# Called after each batch with the number of images seen in this epoch and the running sums, which stay on the device:
# loss times images, and correct predictions. Reading them waits for the device, so do that rarely.
OnBatch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class EpochMetrics:
    """One finished epoch, counted from 1.

    Training loss and correct are running sums over the epoch's batches, in training mode, as the network changed;
    eval loss (mean cross-entropy) and correct are those of the network at the epoch's end, on the images that
    `evaluated_on` names: the test images, or with a hold-out the validation images.
    lr is the learning rate of the epoch's first batch. epoch_seconds covers training and evaluation.
    """

    epoch: int
    train_loss: float
    train_correct: int
    train_images: int
    eval_loss: float
    eval_correct: int
    eval_images: int
    lr: float
    epoch_seconds: float
    evaluated_on: Literal["test", "validation"] = "test"

    @property
    def train_accuracy(self) -> float:
        """In percent."""
        return 100 * self.train_correct / self.train_images

    @property
    def eval_accuracy(self) -> float:
        """In percent."""
        return 100 * self.eval_correct / self.eval_images


def num_params(net: nn.Module) -> int:
    """Count the trainable parameters, each once, wherever in the network it is used."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def normalize(images: Tensor) -> Tensor:
    """Turn float images in [0, 1] into the network's input: mean 0, standard deviation 1 over the training pixels."""
    return (images - MEAN) / STD


class Training:
    """A network in training, on the device of `mnist`; it can be stopped after an epoch and taken up again.

    The order of the images depends on `seed` and the epoch alone and is the same on every device. Dropout and
    augmentation draw from torch's default generator: seed it before the network is built.
    Nothing in an epoch's batches waits for the device, unless `on_batch` does. With a hold-out, each epoch is evaluated
    on the validation images, and the test images are not read.
    """

    def __init__(
        self, net: nn.Module, experiment: Experiment, mnist: Mnist, *, seed: int, on_batch: OnBatch | None = None
    ) -> None:
        self.net, self.experiment, self.mnist, self.on_batch = net, experiment, mnist, on_batch
        self.optimizer = experiment.optimizer(net.parameters())
        self.scheduler = build_scheduler(experiment, self.optimizer, len(mnist.train_images))
        self.shuffling = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.loss_sum = torch.zeros((), device=mnist.train_images.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=mnist.train_images.device)
        batches = math.ceil(len(mnist.train_images) / experiment.batch_size)
        self.losses = torch.zeros(batches, device=mnist.train_images.device)  # of this epoch's batches
        self.batch = torch.zeros(1, dtype=torch.int64, device=mnist.train_images.device)  # how many there were so far
        self.captured = Captured(self._train_batch)

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train the epochs that are left, and yield each when it is finished."""
        total = len(self.mnist.train_images)
        evaluated_on, images, labels = evaluation_part(self.mnist)
        while self.epoch < self.experiment.epochs:
            start = time.perf_counter()
            lr = float(self.optimizer.param_groups[0]["lr"])
            order = torch.randperm(total, generator=self.shuffling).to(self.mnist.train_images.device)
            self._train_epoch(order)
            train_loss = self.loss_sum.item() / total
            if not math.isfinite(train_loss):
                raise LabError(self._where_not_finite())
            if self.scheduler is not None and self.experiment.scheduler_interval == "epoch":
                if isinstance(self.scheduler, ReduceLROnPlateau):
                    self.scheduler.step(train_loss)  # the test images are no business of the schedule's
                else:
                    self.scheduler.step()
            eval_loss, eval_correct = evaluate(predict(self.net, images), labels)
            self.epoch += 1
            yield EpochMetrics(
                epoch=self.epoch,
                train_loss=train_loss,
                train_correct=int(self.correct.item()),
                train_images=total,
                eval_loss=eval_loss,
                eval_correct=eval_correct,
                eval_images=len(images),
                lr=lr,
                epoch_seconds=time.perf_counter() - start,
                evaluated_on=evaluated_on,
            )

    def _train_epoch(self, order: Tensor) -> None:
        """Train on the images that `order` names, in that order, and sum up loss and correct predictions."""
        self.loss_sum.zero_()
        self.correct.zero_()
        self.batch.zero_()
        self.net.train()
        seen = 0
        for batch in torch.split(order, self.experiment.batch_size):
            self.captured(batch, key=self.optimizer.param_groups[0]["lr"])
            if self.scheduler is not None and self.experiment.scheduler_interval == "batch":
                self.scheduler.step()
            seen += len(batch)
            if self.on_batch is not None:
                self.on_batch(seen, self.loss_sum, self.correct)

    def _train_batch(self, batch: Tensor) -> None:
        images = normalize(training_images(self.mnist, batch, self.experiment))
        labels = self.mnist.train_labels[batch]
        loss, logits = train_step(self.net, images, labels, self.experiment, self.optimizer)
        self.losses.index_copy_(0, self.batch, loss.view(1).to(self.losses.dtype))
        self.batch += 1
        self.loss_sum += loss * len(batch)
        self.correct += (logits.argmax(dim=1) == labels).sum()

    def _where_not_finite(self) -> str:
        bad = (~self.losses.isfinite()).nonzero().flatten().tolist()
        epoch = f"in epoch {self.epoch + 1} of {self.experiment.epochs}"
        if not bad:  # each is a number, but their sum is too large for one
            return f"loss: grew beyond all bounds {epoch}; the training has diverged, e.g. by too high a learning rate"
        value, batch = self.losses[bad[0]].item(), f"batch {bad[0] + 1} of {len(self.losses)}"
        return f"loss: is {value} {epoch}, {batch}; the training has diverged, e.g. by too high a learning rate"

    def state_dict(self) -> dict[str, Any]:
        """Return all that the epochs to come depend on, as tensors and plain values; `load_state_dict` takes it."""
        device = self.mnist.train_images.device
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "shuffling": self.shuffling.get_state(),
            "default_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the training that gave `state` stood; torch's default generators are set too."""
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.shuffling.set_state(state["shuffling"])
        torch.set_rng_state(state["default_generator"])
        if state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self.mnist.train_images.device)


def fit(
    net: nn.Module, experiment: Experiment, mnist: Mnist, *, seed: int, on_batch: OnBatch | None = None
) -> Iterator[EpochMetrics]:
    """Train `net` from its first epoch to its last, and yield each finished epoch: see `Training`."""
    return Training(net, experiment, mnist, seed=seed, on_batch=on_batch).epochs()


def evaluation_part(mnist: Mnist) -> tuple[Literal["test", "validation"], Tensor, Tensor]:
    """Return what the epochs are evaluated on: its name, images (N, 1, 28, 28) and labels (N,)."""
    if mnist.validation_images is None or mnist.validation_labels is None:
        return "test", mnist.test_images, mnist.test_labels
    return "validation", mnist.validation_images, mnist.validation_labels


def training_images(mnist: Mnist, batch: Tensor, experiment: Experiment) -> Tensor:
    """Return the images (N, 1, 28, 28) that the indices `batch` (N,) name, augmented, in [0, 1]."""
    images = mnist.train_images[batch].float() / 255
    return images if experiment.augmentation is None else experiment.augmentation(images)


def train_step(
    net: nn.Module, images: Tensor, labels: Tensor, experiment: Experiment, optimizer: Optimizer
) -> tuple[Tensor, Tensor]:
    """Update the network once; return the batch's loss () and logits (N, 10), detached and still on the device.

    They are those of the network before the update, also where an optimizer such as LBFGS evaluates several times.
    """
    result: tuple[Tensor, Tensor] | None = None

    def closure() -> Tensor:
        nonlocal result
        optimizer.zero_grad()
        with SparseDropout():
            logits = net(images)
        loss = experiment.loss(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if result is None:
            result = loss.detach(), logits.detach()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert result is not None
    return result


@torch.inference_mode()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Return the network's output (N, 10) in evaluation mode for uint8 images (N, 1, 28, 28).

    Each part of the network is left in the mode it was in.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        return torch.cat([net(normalize(batch.float() / 255)) for batch in torch.split(images, EVALUATION_BATCH_SIZE)])
    finally:
        for module, training in modes:
            module.training = training


def evaluate(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the mean cross-entropy and the number of correct predictions."""
    return F.cross_entropy(logits, labels).item(), int((logits.argmax(dim=1) == labels).sum().item())


def build_scheduler(experiment: Experiment, optimizer: Optimizer, num_images: int) -> LRScheduler | None:
    """Build the declared scheduler; fill in the run's `epochs` and `steps_per_epoch` where it leaves them open."""
    if experiment.scheduler is None:
        return None
    run = {"epochs": experiment.epochs, "steps_per_epoch": scheduler_steps_per_epoch(experiment, num_images)}
    try:
        parameters = inspect.signature(experiment.scheduler).parameters
    except (TypeError, ValueError):  # a callable written in C has no signature
        parameters = {}  # type: ignore[assignment]
    # OneCycleLR takes either total_steps or these two; both default to None.
    total_steps = parameters.get("total_steps")
    if total_steps is not None and total_steps.default is not None:
        return experiment.scheduler(optimizer)
    left_open = {name: run[name] for name in run if name in parameters and parameters[name].default in (None, _EMPTY)}
    return experiment.scheduler(optimizer, **left_open)


_EMPTY = inspect.Parameter.empty


def scheduler_steps_per_epoch(experiment: Experiment, num_images: int) -> int:
    """Return how often the scheduler steps in an epoch of `num_images` images."""
    return math.ceil(num_images / experiment.batch_size) if experiment.scheduler_interval == "batch" else 1
