"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError, is_script, script_line, text_of
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.running.draws import check_draws
from mnist_lab.running.network import (
    Sharing,
    check_registered,
    listed,
    notice_optimized,
    notice_own_weights,
    notice_probabilities,
    notice_same_start,
)
from mnist_lab.running.remembered import Remembered
from mnist_lab.running.schedule import check_schedule
from mnist_lab.training import loop as training
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.generators import kept_generators, seed_generators
from mnist_lab.training.loop import (
    EVALUATION_BATCH_SIZE,
    EpochMetrics,
    build_average,
    build_optimizer,
    evaluates_again,
    evaluation_part,
    initial_network,
    loss_and_logits,
    minimises_cross_entropy,
    normalize,
    num_params,
    predict,
    remembering,
    train_step,
    training_batch,
)
from mnist_lab.training.states import left_as_they_are
from mnist_lab.training.transforms import Augmentation, is_mixing, is_torchvision, parts
from mnist_lab.verdicts.targets import out_of_reach

logger = logging.getLogger(__name__)

SEED = 0  # of a rehearsal: whether something works may depend on what is drawn
OUTSIDE = 0.01  # by which an augmented pixel may lie outside [0, 1]: an interpolation may overshoot
# Transforms of torchvision that code for other programs has, and what to do here.
DONE_BY_THE_LAB = {
    "Normalize": "is the lab's own business: declare normalize=(mean, deviation) in its place",
    **dict.fromkeys(("ToTensor", "PILToTensor"), "is for other images: leave it out, they are tensors in [0, 1] here"),
}
TRAINING = Path(training.__file__)


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found out; it depends on the declaration, the data and the device only.

    memory_format: channels_last, or torch.contiguous_format where the network or its optimizer fails with that.
    seed_decides: whether one seed always gives the same augmented images.
    untrained: the names of parameters that no gradient has reached, in the rehearsal or where `watch` was asked to.
    notices: sentences about what the user may not expect.
    """

    memory_format: torch.memory_format
    untrained: set[str]
    notices: list[str]

    def watch(self, net: nn.Module) -> None:
        """Take a parameter of this network from `untrained` when a gradient reaches it after all.

        A layer that is skipped at random may have been skipped in each batch of the rehearsal.
        """
        parameters = dict(net.named_parameters())
        for name in self.untrained:
            if name in parameters:  # the seed may decide which there are
                parameters[name].register_post_accumulate_grad_hook(partial(self._reached, name))  # type: ignore[no-untyped-call]

    def _reached(self, name: str, parameter: Tensor) -> None:
        self.untrained.discard(name)

    def notice(self) -> None:
        """Warn of what the user may not expect, such as parameters that get no gradient."""
        for notice in self.notices:
            logger.warning("%s", notice)
        if self.untrained:
            logger.warning(
                "no gradient reaches %s: not trained, and not counted among the parameters",
                listed(sorted(self.untrained)),
            )


def rehearse(experiment: Experiment, mnist: Mnist) -> Rehearsal:
    """Try the declaration on real batches before any training, and walk the schedule to its end or very far.

    All is tried as it will be trained: on a CPU with the network in channels_last, which is faster there. Where that
    fails, and on other devices, it is tried with a contiguous one: `view` after a convolution works there, and LBFGS.
    The random state and the data are left as they were, and so are the numbers that loss, objective and augmentation
    keep.

    Raises:
        LabError: naming the field that is wrong and what torch, or the script's own code, said about it.
    """

    def tried(memory_format: torch.memory_format) -> Rehearsal:
        with left_as_they_are(*remembering(experiment).values()):
            return _rehearse(experiment, mnist, memory_format)

    with kept_generators(mnist.train_images.device):
        if mnist.train_images.device.type == "cpu":
            with suppress(LabError):
                return tried(torch.channels_last)
        return tried(torch.contiguous_format)


def _rehearse(experiment: Experiment, mnist: Mnist, memory_format: torch.memory_format) -> Rehearsal:
    device, total = mnist.train_images.device, len(mnist.train_images)
    with blame("net"):
        other = initial_network(experiment, SEED + 1, device, memory_format)
        numbers = torch.get_rng_state()
        net = initial_network(experiment, SEED, device, memory_format)
        seeds_itself = torch.equal(numbers, torch.get_rng_state())
        sharing = Sharing(net, other)
    if num_params(net) == 0:
        raise LabError("net: has no parameters to train")
    notices = notice_same_start(net, other, seeds_itself)
    del other
    remembered = Remembered(experiment)
    with blame("optimizer"):
        optimizer = build_optimizer(experiment, net.parameters())
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"gives a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has a parameter group without lr, which each epoch reports")
        notices += notice_optimized(net, optimizer)
        again = evaluates_again(experiment, net)
    if experiment.augmentation is not None:
        with blame("augmentation"):
            _check_transforms(experiment.augmentation)
    # Both sizes that will come up: some networks fail on a last batch of one image only.
    full = min(experiment.batch_size, total)
    last = total % experiment.batch_size or full
    for size in sorted({full, last}, reverse=True):
        own_weights = _rehearse_batch(net, experiment, mnist, size)
        if size == full:
            remembered.first_batch()
    notices += own_weights
    if experiment.augmentation is not None:
        with blame("augmentation"):
            notices += _rehearse_augmentation(experiment, experiment.augmentation, mnist, full)
    untrained = {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}
    evaluated = evaluation_part(mnist)[1]
    with blame("net"):
        _check_evaluation(net, evaluated, {len(evaluated), len(mnist.test_images)}, experiment)
        logits = predict(net, evaluated[:EVALUATION_BATCH_SIZE], experiment.normalize)
        notices += _notice_log_probabilities(experiment, logits)
        notices += notice_probabilities(logits, minimises_cross_entropy(experiment))
        notices += _notice_batches(net, evaluated[:EVALUATION_BATCH_SIZE], experiment)
    if experiment.average is not None:  # an activation that a network keeps can be copied after an evaluation only
        with blame("average"):
            notices += _rehearse_average(experiment, net, evaluated[:2])
    with blame("optimizer"):
        _rehearse_step(net, experiment, optimizer, again, mnist, full)
        if not predict(net, evaluated[:2], experiment.normalize).isfinite().all():
            raise ValueError("the network's logits are not finite after one step; is the learning rate too high?")
        _rehearse_step(net, experiment, optimizer, again, mnist, last)  # a second one finds what the first has left
    with blame("net"):
        few = evaluated[:EVALUATION_BATCH_SIZE]
        _check_evaluated_again(net, few, predict(net, few, experiment.normalize), experiment)
        sharing.check()
    with blame("scheduler"):
        notices += check_schedule(experiment, net, total)
    notices += remembered.notices()
    notices += out_of_reach(experiment.targets, num_params(net, untrained), experiment.epochs)
    return Rehearsal(memory_format, untrained, notices)


def _check_transforms(augmentation: Callable[..., object]) -> None:
    """Refuse transforms of torchvision that do what the lab does itself; raises ValueError."""
    for name in (type(transform).__name__ for _, transform in parts(augmentation) if is_torchvision(transform)):
        if name in DONE_BY_THE_LAB:
            raise ValueError(f"{name} {DONE_BY_THE_LAB[name]}")


def _rehearse_augmentation(
    experiment: Experiment, augmentation: Callable[..., object], mnist: Mnist, size: int
) -> list[str]:
    """Refuse an augmentation that draws once for a whole batch; return notices of what else it does.

    Raises:
        ValueError: if it draws so.
    """
    notices = []
    for given, transform in parts(augmentation):
        name = type(transform).__name__
        if given == "batch":
            check_draws(transform, mnist.train_images[0].float() / 255, len(mnist.train_images))
        elif given == "labels" and is_mixing(transform):
            own = "; mnist_lab.objectives.mixup draws one for each image" if name == "MixUp" else ""
            notices.append(f"augmentation: torchvision's {name} draws once for all images of a batch{own}")
        elif given == "labels":
            notices.append(
                "augmentation: takes the labels, so it may mix images, and it can't be tried out whether it draws for "
                "each image; see that it does"
            )
    batch = torch.arange(size, device=mnist.train_images.device)

    def drawn() -> Tensor:
        seed_generators(SEED)
        with left_as_they_are(experiment.augmentation):
            return training_batch(mnist, batch, Augmentation(experiment.augmentation))[0]

    first = drawn()
    start = time.perf_counter()
    again = drawn()
    seconds = math.ceil((time.perf_counter() - start) * len(mnist.train_images) / size)
    if any(given == "image" for given, _ in parts(augmentation)):
        notices.append(
            f"augmentation: torchvision's transforms draw once per call, so they are applied image by image, some "
            f"{seconds} s of an epoch; those of mnist_lab.augmentation take a batch at once"
        )
    if not torch.allclose(first, again, atol=1e-5):
        notices.append(
            "the run's seed does not decide what augmentation draws: it has a generator or numbers of its own, "
            "which a resumed run does not go on with either; draw from torch, random or np.random themselves"
        )
    low, high = first.min().item(), first.max().item()
    if low < -OUTSIDE or high > 1 + OUTSIDE:
        notices.append(
            f"augmentation gives pixels from {low:.2f} to {high:.2f}: outside [0, 1], in which the test images are"
        )
    return notices


def _rehearse_average(experiment: Experiment, net: nn.Module, images: Tensor) -> list[str]:
    """Refuse an average that is not of this network; return notices.

    Raises:
        TypeError, ValueError: if it is none, or of another network.
    """
    average = build_average(experiment, net)
    if not isinstance(average, AveragedModel):
        raise TypeError(f"gives a {type(average).__name__}, not a torch.optim.swa_utils.AveragedModel")
    own, averaged = net.state_dict(), average.module.state_dict()
    if own.keys() != averaged.keys() or not all(torch.equal(own[name], averaged[name]) for name in own):
        raise ValueError("is of another network than the one that it is given")
    average.update_parameters(net)
    average.update_parameters(net)  # the first call copies
    _check_logits(predict(average.module, images, experiment.normalize), len(images))
    if not average.use_buffers and any(True for _ in net.buffers()):
        return [
            "average: takes the network's buffers, such as the statistics of batch norm, as they are after the last "
            "batch; AveragedModel(..., use_buffers=True) averages them too"
        ]
    return []


def _rehearse_step(
    net: nn.Module, experiment: Experiment, optimizer: Optimizer, again: bool, mnist: Mnist, size: int
) -> None:
    batch = torch.arange(size, device=mnist.train_images.device)
    net.train()
    images, labels = training_batch(mnist, batch, Augmentation(experiment.augmentation))
    train_step(net, normalize(images, experiment.normalize), labels, experiment, optimizer, again)


def _rehearse_batch(net: nn.Module, experiment: Experiment, mnist: Mnist, size: int) -> list[str]:
    batch = torch.arange(size, device=mnist.train_images.device)
    with blame("augmentation"):
        images, labels = training_batch(mnist, batch, Augmentation(experiment.augmentation))
        if not isinstance(images, Tensor):
            raise TypeError(f"gives a {type(images).__name__}, not a tensor of images")
        if images.shape != (size, 1, 28, 28) or images.dtype != torch.float32:
            given = f"{images.dtype} images of shape {tuple(images.shape)}"
            raise ValueError(f"gives {given}, not torch.float32 of shape ({size}, 1, 28, 28)")
        if not images.isfinite().all():
            raise ValueError("gives pixels that are not finite")
        if not isinstance(labels, Tensor) or not _are_labels(labels, size):
            given = f"{labels.dtype} labels of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise ValueError(f"gives {given}, not digits of shape ({size},) or probabilities of shape ({size}, 10)")
    images = normalize(images, experiment.normalize)
    net.train()
    with blame("net"), SparseDropout():
        output = net(images)
        if experiment.objective is None:  # else it is the objective's business
            _check_logits(output, size)
    minimised = "loss" if experiment.objective is None else "objective"
    with blame(minimised):
        returned: object = loss_and_logits(net, images, labels, experiment)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"gives {_kind(returned)}, not a loss and the batch's logits: return loss, logits")
        loss, logits = returned
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise ValueError(f"gives {_kind(loss)} for the loss, not a single number")
        _check_logits(logits, size)
        if not loss.isfinite():
            raise ValueError(f"is {loss.item()} on the first batch")
        if not loss.requires_grad:
            raise ValueError("has no gradient in the network's parameters, so it can't train them")
    with blame("net"):
        loss.backward()  # type: ignore[no-untyped-call]
    if all(parameter.grad is None for parameter in net.parameters()):
        raise LabError(f"{minimised}: has no gradient in the network's parameters, so it can't train them")
    with blame("net"):
        check_registered(net, logits if logits.requires_grad else loss, images)
    return notice_own_weights(minimised, net, loss, images)


def _are_labels(labels: Tensor, size: int) -> bool:
    """Say whether these are digits (size,), or probabilities (size, 10)."""
    if labels.ndim == 1:
        return labels.shape == (size,) and labels.dtype == torch.int64
    return labels.shape == (size, 10) and labels.is_floating_point()


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_evaluation(net: nn.Module, images: Tensor, totals: set[int], experiment: Experiment) -> None:
    """Try every number of images that is evaluated at once, and the two that the model is logged with.

    totals: of images in the parts that are evaluated, which may be more than there are in `images`.
    """
    sizes = {2} | {
        size for total in totals for size in (min(EVALUATION_BATCH_SIZE, total), total % EVALUATION_BATCH_SIZE)
    }
    for size in sorted(sizes - {0}):
        few = images[torch.arange(size, device=images.device) % len(images)]
        logits = predict(net, few, experiment.normalize)
        _check_logits(logits, size)
        _check_evaluated_again(net, few, logits, experiment)


def _check_evaluated_again(net: nn.Module, images: Tensor, logits: Tensor, experiment: Experiment) -> None:
    """Refuse a network that gives these images other logits than before, but for what a GPU may round differently."""
    again = predict(net, images, experiment.normalize)
    if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "gives other logits when it is evaluated on the same images again; turn off in evaluation mode what draws "
            "or keeps numbers, e.g. F.dropout(x, training=self.training)"
        )


def _notice_batches(net: nn.Module, images: Tensor, experiment: Experiment) -> list[str]:
    """Return a notice if the logits of an image depend on what other images are evaluated with it."""
    few = max(1, len(images) // 3)
    alone = predict(net, images[:few], experiment.normalize)
    if torch.allclose(predict(net, images, experiment.normalize)[:few], alone, rtol=1e-2, atol=1e-2):
        return []
    return [
        f"net: gives an image other logits beside other images, so its accuracy depends on the batches of "
        f"{EVALUATION_BATCH_SIZE} that it is evaluated in; see for dim=0 where dim=1 is meant"
    ]


def _notice_log_probabilities(experiment: Experiment, logits: Tensor) -> list[str]:
    """Return a notice if a loss that takes log-probabilities is given other numbers."""
    loss = experiment.loss.func if isinstance(experiment.loss, partial) else experiment.loss
    takes = loss is F.nll_loss or isinstance(loss, nn.NLLLoss)
    if not takes or torch.allclose(logits.exp().sum(dim=1), torch.ones_like(logits[:, 0]), atol=1e-3):
        return []
    return [
        "loss: nll_loss takes log-probabilities, and the network gives others: their exponentials do not sum to 1 "
        "for each image; use cross_entropy, or end the network with log_softmax(dim=1)"
    ]


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


@contextmanager
def blame_script() -> Iterator[None]:
    """Turn what the script's own code raises while it trains into one sentence, and so a lack of memory."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        in_training = any(map(is_script, files[files.index(TRAINING) :])) if TRAINING in files else False
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
    said = text_of(error)
    if isinstance(error, SystemExit):
        said = f"sys.exit({quoted(error.code)}) was called"
    elif _lacks_memory(error):
        said = f"needs more memory than there is: {said}"
    return LabError(f"{field}: {said}{script_line(error)}")


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
