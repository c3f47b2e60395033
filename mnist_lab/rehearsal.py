"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training import (
    build_scheduler,
    evaluation_part,
    normalize,
    num_params,
    predict,
    scheduler_steps_per_epoch,
    train_step,
    training_images,
)


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
            _check_logits(predict(net, evaluation_part(mnist)[1][:2]), 2)
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
    for _ in range(experiment.epochs * scheduler_steps_per_epoch(experiment, total)):
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
