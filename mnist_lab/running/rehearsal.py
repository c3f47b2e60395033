"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.running.draws import check_draws
from mnist_lab.running.schedule import check_schedule
from mnist_lab.training import loop as training
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.generators import kept_generators, seed_generators
from mnist_lab.training.loop import (
    EVALUATION_BATCH_SIZE,
    EpochMetrics,
    build_optimizer,
    evaluates_again,
    evaluation_part,
    initial_network,
    normalize,
    num_params,
    predict,
    train_step,
    training_images,
)

logger = logging.getLogger(__name__)

SEED = 0  # of a rehearsal: whether something works may depend on what is drawn
MAX_NAMES = 5  # of parameters in a notice
TRAINING = Path(training.__file__)


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found out; it depends on the declaration, the data and the device only.

    memory_format: channels_last, or torch.contiguous_format where the network or its optimizer fails with that.
    seed_decides: whether one seed always gives the same augmented images.
    without_gradient: the names of trainable parameters that the loss gives no gradient to.
    """

    memory_format: torch.memory_format
    without_gradient: list[str]
    seed_decides: bool

    def notice(self) -> None:
        """Warn of parameters that get no gradient, and of draws that the seed does not decide."""
        if not self.seed_decides:
            logger.warning(
                "the run's seed does not decide what augmentation draws: it has a generator or numbers of its own, "
                "which a resumed run does not go on with either; draw from torch, random or np.random themselves"
            )
        if self.without_gradient:
            more = (
                f" and {len(self.without_gradient) - MAX_NAMES} more" if len(self.without_gradient) > MAX_NAMES else ""
            )
            logger.warning(
                "no gradient reaches %s: counted among the parameters, but not trained; "
                "of a copy that is not to be trained, say requires_grad_(False)",
                ", ".join(self.without_gradient[:MAX_NAMES]) + more,
            )


def rehearse(experiment: Experiment, mnist: Mnist) -> Rehearsal:
    """Try the declaration on real batches before any training, and walk the schedule to its end or very far.

    All is tried as it will be trained, with the network in channels_last, which is faster. Where that fails, it is
    tried with a contiguous one: `view` after a convolution works there, and so does LBFGS.
    The random state and the data are left as they were.

    Raises:
        LabError: naming the field that is wrong and what torch, or the script's own code, said about it.
    """
    with kept_generators(mnist.train_images.device):
        with suppress(LabError):
            return _rehearse(experiment, mnist, torch.channels_last)
        return _rehearse(experiment, mnist, torch.contiguous_format)


def _rehearse(experiment: Experiment, mnist: Mnist, memory_format: torch.memory_format) -> Rehearsal:
    device, total = mnist.train_images.device, len(mnist.train_images)
    with blame("net"):
        net = initial_network(experiment, SEED, device, memory_format)
    if num_params(net) == 0:
        raise LabError("net: has no parameters to train")
    with blame("optimizer"):
        optimizer = build_optimizer(experiment, net.parameters())
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"gives a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has a parameter group without lr, which each epoch reports")
        again = evaluates_again(experiment, net)
    # Both sizes that will come up: some networks fail on a last batch of one image only.
    full = min(experiment.batch_size, total)
    last = total % experiment.batch_size or full
    for size in sorted({full, last}, reverse=True):
        _rehearse_batch(net, experiment, mnist, size)
    if experiment.augmentation is not None:
        with blame("augmentation"):
            check_draws(experiment.augmentation, mnist.train_images[0].float() / 255, total)
            seed_decides = _seed_decides(experiment, mnist, full)
    else:
        seed_decides = True
    without_gradient = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    evaluated = evaluation_part(mnist)[1]
    with blame("net"):
        _check_evaluation(net, evaluated, {len(evaluated), len(mnist.test_images)})
    with blame("optimizer"):
        _rehearse_step(net, experiment, optimizer, again, mnist, full)
        if not predict(net, evaluated[:2]).isfinite().all():
            raise ValueError("the network's logits are not finite after one step; is the learning rate too high?")
        _rehearse_step(net, experiment, optimizer, again, mnist, last)  # a second one finds what the first has left
    with blame("net"):
        few = evaluated[:EVALUATION_BATCH_SIZE]
        _check_evaluated_again(net, few, predict(net, few))
    with blame("scheduler"):
        check_schedule(experiment, net, total)
    return Rehearsal(memory_format, without_gradient, seed_decides)


def _seed_decides(experiment: Experiment, mnist: Mnist, size: int) -> bool:
    """Say whether the augmentation gives the same images again from the same seed."""
    batch = torch.arange(size, device=mnist.train_images.device)

    def drawn() -> Tensor:
        seed_generators(SEED)
        return training_images(mnist, batch, experiment)

    return torch.allclose(drawn(), drawn(), atol=1e-5)


def _rehearse_step(
    net: nn.Module, experiment: Experiment, optimizer: Optimizer, again: bool, mnist: Mnist, size: int
) -> None:
    batch = torch.arange(size, device=mnist.train_images.device)
    net.train()
    images = normalize(training_images(mnist, batch, experiment))
    train_step(net, images, mnist.train_labels[batch], experiment, optimizer, again)


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
    with blame("net"), SparseDropout():
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


def _check_evaluation(net: nn.Module, images: Tensor, totals: set[int]) -> None:
    """Try every number of images that is evaluated at once, and the two that the model is logged with.

    totals: of images in the parts that are evaluated, which may be more than there are in `images`.
    """
    sizes = {2} | {
        size for total in totals for size in (min(EVALUATION_BATCH_SIZE, total), total % EVALUATION_BATCH_SIZE)
    }
    for size in sorted(sizes - {0}):
        few = images[torch.arange(size, device=images.device) % len(images)]
        logits = predict(net, few)
        _check_logits(logits, size)
        _check_evaluated_again(net, few, logits)


def _check_evaluated_again(net: nn.Module, images: Tensor, logits: Tensor) -> None:
    """Refuse a network that gives these images other logits than before, but for what a GPU may round differently."""
    again = predict(net, images)
    if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "gives other logits when it is evaluated on the same images again; turn off in evaluation mode what draws "
            "or keeps numbers, e.g. F.dropout(x, training=self.training)"
        )


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
