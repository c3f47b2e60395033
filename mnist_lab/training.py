"""The training loop: torch only. `fit` yields one EpochMetrics per finished epoch and knows nothing of who listens."""

from __future__ import annotations

import inspect
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.data import Mnist
from mnist_lab.dropout import SparseDropout
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment

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
    test loss (mean cross-entropy) and correct are those of the network at the epoch's end.
    lr is the learning rate of the epoch's first batch. epoch_seconds covers training and evaluation.
    """

    epoch: int
    train_loss: float
    train_correct: int
    train_images: int
    test_loss: float
    test_correct: int
    test_images: int
    lr: float
    epoch_seconds: float

    @property
    def train_accuracy(self) -> float:
        """In percent."""
        return 100 * self.train_correct / self.train_images

    @property
    def test_accuracy(self) -> float:
        """In percent."""
        return 100 * self.test_correct / self.test_images


def num_params(net: nn.Module) -> int:
    """Count the trainable parameters, each once, wherever in the network it is used."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def normalize(images: Tensor) -> Tensor:
    """Turn float images in [0, 1] into the network's input: mean 0, standard deviation 1 over the training pixels."""
    return (images - MEAN) / STD


def fit(
    net: nn.Module, experiment: Experiment, mnist: Mnist, *, seed: int, on_batch: OnBatch | None = None
) -> Iterator[EpochMetrics]:
    """Train `net` in place, on the device of `mnist`, and yield each finished epoch.

    The order of the images depends on `seed` and the epoch alone and is the same on every device. Dropout and
    augmentation draw from torch's default generator: seed it before the network is built.
    Nothing in an epoch's batches waits for the device, unless `on_batch` does.
    """
    total = len(mnist.train_images)
    optimizer = experiment.optimizer(net.parameters())
    scheduler = build_scheduler(experiment, optimizer, total)
    shuffling = torch.Generator().manual_seed(seed)
    for epoch in range(1, experiment.epochs + 1):
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        order = torch.randperm(total, generator=shuffling).to(mnist.train_images.device)
        loss_sum, correct = train_epoch(net, experiment, mnist, order, optimizer, scheduler, on_batch)
        train_loss = loss_sum.item() / total
        if scheduler is not None and experiment.scheduler_interval == "epoch":
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(train_loss)  # the test images are no business of the schedule's
            else:
                scheduler.step()
        test_loss, test_correct = evaluate(predict(net, mnist.test_images), mnist.test_labels)
        yield EpochMetrics(
            epoch=epoch,
            train_loss=train_loss,
            train_correct=int(correct.item()),
            train_images=total,
            test_loss=test_loss,
            test_correct=test_correct,
            test_images=len(mnist.test_images),
            lr=lr,
            epoch_seconds=time.perf_counter() - start,
        )


def train_epoch(
    net: nn.Module,
    experiment: Experiment,
    mnist: Mnist,
    order: Tensor,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    on_batch: OnBatch | None = None,
) -> tuple[Tensor, Tensor]:
    """Train on the images `order` names, in that order; return the sums of loss and of correct predictions."""
    device = mnist.train_images.device
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    net.train()
    for batch in torch.split(order, experiment.batch_size):
        images, labels = normalize(training_images(mnist, batch, experiment)), mnist.train_labels[batch]
        loss, logits = train_step(net, images, labels, experiment, optimizer)
        if scheduler is not None and experiment.scheduler_interval == "batch":
            scheduler.step()
        loss_sum += loss * len(batch)
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(batch)
        if on_batch is not None:
            on_batch(seen, loss_sum, correct)
    return loss_sum, correct


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
    """Return the network's output (N, 10) in evaluation mode for uint8 images (N, 1, 28, 28)."""
    net.eval()
    return torch.cat([net(normalize(batch.float() / 255)) for batch in torch.split(images, EVALUATION_BATCH_SIZE)])


def evaluate(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the mean cross-entropy and the number of correct predictions."""
    return F.cross_entropy(logits, labels).item(), int((logits.argmax(dim=1) == labels).sum().item())


def build_scheduler(experiment: Experiment, optimizer: Optimizer, num_images: int) -> LRScheduler | None:
    """Build the declared scheduler; fill in the run's `epochs` and `steps_per_epoch` where it leaves them open."""
    if experiment.scheduler is None:
        return None
    run = {"epochs": experiment.epochs, "steps_per_epoch": _scheduler_steps_per_epoch(experiment, num_images)}
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


def _scheduler_steps_per_epoch(experiment: Experiment, num_images: int) -> int:
    return math.ceil(num_images / experiment.batch_size) if experiment.scheduler_interval == "batch" else 1


def rehearse(experiment: Experiment, mnist: Mnist) -> None:
    """Try the declaration on real batches before any training, and walk the schedule to its end.

    The network, the random state and the data are left as they were.

    Raises:
        LabError: naming the field that is wrong and what torch, or the script's own code, said about it.
    """
    device, total = mnist.train_images.device, len(mnist.train_images)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        with _blame("net"):
            net = experiment.net()
            if not isinstance(net, nn.Module):
                raise TypeError(f"gives a {type(net).__name__}, not a torch.nn.Module")
            net.to(device)
        if num_params(net) == 0:
            raise LabError("net: has no parameters to train")
        with _blame("optimizer"):
            optimizer = experiment.optimizer(net.parameters())
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"gives a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        # Both sizes that will come up: some networks fail on a last batch of one image only.
        for size in sorted({min(experiment.batch_size, total), total % experiment.batch_size} - {0}, reverse=True):
            _rehearse_step(net, experiment, mnist, optimizer, size)
        with _blame("net"):
            _check_logits(predict(net, mnist.test_images[:2]), 2)
        with _blame("scheduler"):
            _walk_schedule(experiment, net, total)


def _rehearse_step(net: nn.Module, experiment: Experiment, mnist: Mnist, optimizer: Optimizer, size: int) -> None:
    batch = torch.arange(size, device=mnist.train_images.device)
    with _blame("augmentation"):
        images = training_images(mnist, batch, experiment)
        if not isinstance(images, Tensor):
            raise TypeError(f"gives a {type(images).__name__}, not a tensor of images")
        if images.shape != (size, 1, 28, 28) or images.dtype != torch.float32:
            given = f"{images.dtype} images of shape {tuple(images.shape)}"
            raise ValueError(f"gives {given}, not torch.float32 of shape ({size}, 1, 28, 28)")
        if not images.isfinite().all():
            raise ValueError("gives pixels that are not finite")
    images = normalize(images)
    labels = mnist.train_labels[batch]
    net.train()
    with _blame("net"):
        _check_logits(logits := net(images), size)
    with _blame("loss"):
        loss = experiment.loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise ValueError("does not give a single number")
        if not loss.isfinite():
            raise ValueError(f"is {loss.item()} on the first batch")
        if not loss.requires_grad:
            raise ValueError("has no gradient in the network's parameters, so it can't train them")
    with _blame("net"):
        loss.backward()  # type: ignore[no-untyped-call]
    with _blame("optimizer"):
        train_step(net, images, labels, experiment, optimizer)


def _check_logits(logits: object, size: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"gives a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != (size, 10):
        raise ValueError(
            f"gives an output of shape {tuple(logits.shape)} for {size} images, not ({size}, 10): one logit per digit"
        )
    if not logits.isfinite().all():
        raise ValueError("gives logits that are not finite on the first batch")


def _walk_schedule(experiment: Experiment, net: nn.Module, total: int) -> None:
    """Step a scheduler of its own through the whole run: OneCycleLR, for one, fails only past its last step."""
    optimizer = experiment.optimizer(net.parameters())
    scheduler = build_scheduler(experiment, optimizer, total)
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"gives a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler")
    if isinstance(scheduler, ReduceLROnPlateau):
        if experiment.scheduler_interval == "batch":
            raise ValueError("ReduceLROnPlateau needs scheduler_interval='epoch': it follows the epoch's training loss")
        return
    optimizer.zero_grad()
    optimizer.step(lambda: 0.0)  # a schedule warns where its optimizer has not taken a step before it
    for _ in range(experiment.epochs * _scheduler_steps_per_epoch(experiment, total)):
        scheduler.step()
        lr = float(optimizer.param_groups[0]["lr"])
        if not math.isfinite(lr):
            raise ValueError(f"the learning rate becomes {lr}")


@contextmanager
def _blame(field: str) -> Iterator[None]:
    """Turn whatever the declared code raises into one sentence that names the field and the line in the script."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_script(Path(f.filename))]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        said = " ".join(str(error).split()) or type(error).__name__
        raise LabError(f"{field}: {said}{where}") from error


def _is_script(file: Path) -> bool:
    lab, standard_library = Path(__file__).parent, Path(inspect.__file__).parent
    if file.is_relative_to(lab) or file.is_relative_to(standard_library):
        return False
    return "site-packages" not in file.parts and file.suffix == ".py" and file.exists()
