"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training import loop as training
from mnist_lab.training.loop import (
    EVALUATION_BATCH_SIZE,
    EpochMetrics,
    build_scheduler,
    evaluation_part,
    normalize,
    num_params,
    predict,
    scheduler_steps_per_epoch,
    train_step,
    training_images,
)

TRAINING = Path(training.__file__)
MAX_SCHEDULE_STEPS = 200_000  # that are walked: a second or two
MAX_LR = torch.finfo(torch.float32).max  # torch refuses to multiply a float32 parameter by more


def rehearse(experiment: Experiment, mnist: Mnist) -> None:
    """Try the declaration on real batches before any training, and walk the schedule to its end or very far.

    The network, the random state and the data are left as they were.

    Raises:
        LabError: naming the field that is wrong and what torch, or the script's own code, said about it.
    """
    device, total = mnist.train_images.device, len(mnist.train_images)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        with blame("net"):
            net = experiment.net()
            if not isinstance(net, nn.Module):
                raise TypeError(f"gives a {type(net).__name__}, not a torch.nn.Module")
            net.to(device)
            for name, parameter in net.named_parameters():
                if isinstance(parameter, nn.UninitializedParameter):
                    raise TypeError(f"{name} has no shape before the first batch; give sizes in place of lazy layers")
        if num_params(net) == 0:
            raise LabError("net: has no parameters to train")
        with blame("optimizer"):
            optimizer = experiment.optimizer(net.parameters())
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"gives a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        # Both sizes that will come up: some networks fail on a last batch of one image only.
        for size in sorted({min(experiment.batch_size, total), total % experiment.batch_size} - {0}, reverse=True):
            _rehearse_batch(net, experiment, mnist, size)
        with blame("net"):
            _check_evaluation(net, evaluation_part(mnist)[1])
        first = torch.arange(min(experiment.batch_size, total), device=device)
        images = normalize(training_images(mnist, first, experiment))
        with blame("optimizer"):
            train_step(net, images, mnist.train_labels[first], experiment, optimizer)
            if not predict(net, evaluation_part(mnist)[1][:2]).isfinite().all():
                raise ValueError("the network's logits are not finite after one step; is the learning rate too high?")
        with blame("scheduler"):
            _walk_schedule(experiment, net, total)


def _rehearse_batch(net: nn.Module, experiment: Experiment, mnist: Mnist, size: int) -> None:
    batch = torch.arange(size, device=mnist.train_images.device)
    with blame("augmentation"):
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
    with blame("net"):
        _check_logits(logits := net(images), size)
    with blame("loss"):
        loss = experiment.loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise ValueError("does not give a single number")
        if not loss.isfinite():
            raise ValueError(f"is {loss.item()} on the first batch")
        if not loss.requires_grad:
            raise ValueError("has no gradient in the network's parameters, so it can't train them")
    with blame("net"):
        loss.backward()  # type: ignore[no-untyped-call]


def _check_evaluation(net: nn.Module, images: Tensor) -> None:
    """Try every number of images that is evaluated at once, and the two that the model is logged with."""
    for size in sorted({2, min(EVALUATION_BATCH_SIZE, len(images)), len(images) % EVALUATION_BATCH_SIZE} - {0}):
        _check_logits(predict(net, images[:size]), size)


def _check_logits(logits: object, size: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"gives a {type(logits).__name__}, not a tensor of logits")
    if logits.dtype not in (torch.float32, torch.float64, torch.float16):
        raise TypeError(f"gives {logits.dtype} logits; give torch.float32, e.g. by .float() on the output")
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
    _check_lr(optimizer)  # building a schedule sets the rate of the first step
    optimizer.step(lambda: 0.0)  # a schedule warns where its optimizer has not taken a step before it
    for _ in range(min(MAX_SCHEDULE_STEPS, experiment.epochs * scheduler_steps_per_epoch(experiment, total))):
        scheduler.step()
        _check_lr(optimizer)


def _check_lr(optimizer: Optimizer) -> None:
    for lr in (float(group["lr"]) for group in optimizer.param_groups):
        if not abs(lr) <= MAX_LR:
            raise ValueError(f"the learning rate becomes {lr}, which is no float32 number")


@contextmanager
def blame_script() -> Iterator[None]:
    """Turn what the script's own code raises while it trains into one sentence, and so a lack of memory."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        in_training = any(map(_is_script, files[files.index(TRAINING) :])) if TRAINING in files else False
        if in_training or _lacks_memory(error):
            raise _refusal("training", error) from error
        raise


def without_exits(epochs: Iterable[EpochMetrics]) -> Iterator[EpochMetrics]:
    """Yield the epochs; a script that calls `sys.exit` meanwhile has not finished its run by that."""
    try:
        yield from epochs
    except SystemExit as end:
        raise _refusal("training", end) from end


@contextmanager
def blame(field: str) -> Iterator[None]:
    """Turn whatever the declared code raises into one sentence that names the field and the line in the script."""
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        raise _refusal(field, error) from error


def _refusal(field: str, error: BaseException) -> LabError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_script(Path(f.filename))]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SystemExit):
        said = f"sys.exit({error.code!r}) was called"
    elif _lacks_memory(error):
        said = f"needs more memory than there is: {said}"
    return LabError(f"{field}: {said}{where}")


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_script(file: Path) -> bool:
    lab, standard_library = Path(__file__).parents[1], Path(inspect.__file__).parent
    if file.is_relative_to(lab) or file.is_relative_to(standard_library):
        return False
    return "site-packages" not in file.parts and file.suffix == ".py" and file.exists()
