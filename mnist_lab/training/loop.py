"""The training loop: torch only. `Training.epochs` yields each finished epoch and knows nothing of who listens."""

import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from mnist_lab.arguments import parameters_of, stable_text
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import MNIST_PIXELS, Experiment
from mnist_lab.training import states
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.transforms import Augmentation

EVALUATION_BATCH_SIZE = 250

# Called after each batch with the number of images seen in this epoch and the running sums, which stay on the device:
# cross-entropy times images, and correct predictions. Reading them waits for the device, so do that rarely.
OnBatch = Callable[[int, Tensor, Tensor], None]

# What an optimizer's step takes: gradients, a closure that evaluates the loss, as LBFGS does, or both, as SAM does.
Takes = Literal["gradients", "closure", "both"]


@dataclass(frozen=True)
class EpochMetrics:
    """One finished epoch. Losses are mean cross-entropies; accuracies are in percent.

    Those of training are running figures over the epoch's batches, in training mode, as the network changed.
    """

    epoch: int  # from 1
    train_loss: float
    train_correct: int
    train_images: int
    eval_loss: float
    eval_correct: int
    eval_images: int
    lr: float  # of the epoch's first batch
    epoch_seconds: float  # of training and evaluation
    evaluated_on: Literal["test", "validation"] = "test"
    other_lrs: tuple[float, ...] = ()  # of the optimizer's parameter groups after the first
    objective: float | None = None  # mean over the batches of what is minimised, where that is not the cross-entropy
    raw_correct: int | None = None  # of the network itself, where an average of its weights is evaluated

    @property
    def train_accuracy(self) -> float:
        return 100 * self.train_correct / self.train_images

    @property
    def eval_accuracy(self) -> float:
        return 100 * self.eval_correct / self.eval_images

    @property
    def raw_accuracy(self) -> float | None:
        return None if self.raw_correct is None else 100 * self.raw_correct / self.eval_images


def initial_network(
    experiment: Experiment, seed: int, device: torch.device, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    """Seed all that draws, and build the network on the device; raises TypeError if that gives none.

    memory_format: of its four-dimensional parameters, which that of the images between its layers follows.
    """
    states.seed_generators(seed)
    net = experiment.net()
    if not isinstance(net, nn.Module):
        raise TypeError(f"gives a {type(net).__name__}, not a torch.nn.Module")
    return net.to(device).to(memory_format=memory_format)


def numbers_in(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * (1 + tensor.is_complex()) for tensor in tensors)


def num_params(net: nn.Module, untrained: Collection[str] = (), before: Mapping[str, Tensor] | None = None) -> int:
    """Count the trainable parameters, each once, without those that no gradient reaches, which `untrained` names.

    before: the parameters before the training. Those that it has changed count too, whatever is frozen by now.
    """
    named, before = dict(net.named_parameters()), before or {}
    changed = {name for name in named.keys() & before if not torch.equal(named[name].to_dense(), before[name])}
    return numbers_in(p for name, p in named.items() if (p.requires_grad and name not in untrained) or name in changed)


def normalize(images: Tensor, by: tuple[float, float] = MNIST_PIXELS) -> Tensor:
    """Turn float images in [0, 1] into a network's input, by its mean and standard deviation."""
    mean, deviation = by
    return (images - mean) / deviation


class Training:
    """A network in training, on the device of `mnist`; it can be stopped after an epoch and taken up again.

    The order of the images depends on the seed and the epoch alone; what else draws was seeded by `initial_network`.
    Nothing in an epoch's batches waits for the device, unless `on_batch` does.
    """

    def __init__(
        self, net: nn.Module, experiment: Experiment, mnist: Mnist, *, seed: int, on_batch: OnBatch | None = None
    ) -> None:
        self.net, self.experiment, self.mnist, self.on_batch = net, experiment, mnist, on_batch
        self.augment = Augmentation(experiment.augmentation)
        self.optimizer = build_optimizer(experiment, net.parameters())
        self.takes = step_takes(experiment, net, self.optimizer)
        self.scheduler = build_scheduler(experiment, self.optimizer, len(mnist.train_images))
        self.average = build_average(experiment, net)
        self.minimises_cross_entropy = minimises_cross_entropy(experiment)
        self.shuffling = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.device = mnist.train_images.device
        self.loss_sum = torch.zeros((), device=self.device)  # cross-entropy times images
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.losses: list[Tensor] = []  # what is minimised, of this epoch's batches
        self.logits: Tensor | None = None  # of `result`, in the last evaluation

    @property
    def result(self) -> nn.Module:
        """Return what is evaluated and kept: the average of the weights where one is declared, else the network."""
        return self.net if self.average is None else self.average.module

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train the epochs that are left, and yield each when finished; raises LabError if the loss is not finite."""
        while self.epoch < self.experiment.epochs:
            start = time.perf_counter()
            lr, *other_lrs = (float(group["lr"]) for group in self.optimizer.param_groups)
            self._train_epoch()
            train_loss = self.loss_sum.item() / len(self.mnist.train_images)
            minimised = train_loss if self.minimises_cross_entropy else torch.stack(self.losses).mean().item()
            if not math.isfinite(minimised):
                epoch = f"epoch {self.epoch + 1} of {self.experiment.epochs}"
                raise LabError(f"loss: is {minimised} in {epoch}; is the learning rate too high?")
            if self.experiment.scheduler_interval == "epoch":
                self._step_schedule(minimised)
            evaluated_on, images, labels = evaluation_part(self.mnist)
            raw = None if self.average is None else predict(self.net, images, self.experiment.normalize)
            self.logits = predict(self.result, images, self.experiment.normalize)
            loss, correct = evaluate(self.logits, labels)
            self.epoch += 1
            if not math.isfinite(loss):
                raise LabError(f"net: its {evaluated_on} loss is {loss} in epoch {self.epoch}")
            yield EpochMetrics(
                epoch=self.epoch,
                train_loss=train_loss,
                train_correct=int(self.correct.item()),
                train_images=len(self.mnist.train_images),
                eval_loss=loss,
                eval_correct=correct,
                eval_images=len(images),
                lr=lr,
                epoch_seconds=time.perf_counter() - start,
                evaluated_on=evaluated_on,
                other_lrs=tuple(other_lrs),
                objective=None if self.minimises_cross_entropy else minimised,
                raw_correct=None if raw is None else evaluate(raw, labels)[1],
            )

    def _train_epoch(self) -> None:
        order = torch.randperm(len(self.mnist.train_images), generator=self.shuffling, device="cpu").to(self.device)
        self.loss_sum.zero_()
        self.correct.zero_()
        self.losses.clear()
        self.net.train()
        seen = 0
        for batch in torch.split(order, self.experiment.batch_size):
            self.train_batch(batch)
            if self.experiment.scheduler_interval == "batch":
                self._step_schedule()
            seen += len(batch)
            if self.on_batch is not None:
                self.on_batch(seen, self.loss_sum, self.correct)

    def train_batch(self, batch: Tensor) -> None:
        """Update the network once, by the images that the indices `batch` (N,) name."""
        images, labels = training_batch(self.mnist, batch, self.augment)
        evaluated: list[tuple[Tensor, Tensor]] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            given = normalize(images, self.experiment.normalize)  # anew: a network may change what it is given
            loss, logits = loss_and_logits(self.net, given, labels, self.experiment)
            loss.backward()  # type: ignore[no-untyped-call]
            evaluated.append((loss.detach(), logits.detach()))
            return loss

        _step(self.optimizer, closure, self.takes)
        if not evaluated:
            raise TypeError(f"the step of {type(self.optimizer).__name__} wants a closure and never calls it")
        loss, logits = evaluated[0]  # LBFGS evaluates several times
        self.losses.append(loss.float())
        if not self.minimises_cross_entropy:
            loss = F.cross_entropy(without_half(logits), labels, reduction="none").mean()
        if labels.ndim > 1:  # probabilities: the digit that an image shows most of
            labels = labels.argmax(dim=1)
        self.loss_sum += loss * len(labels)
        self.correct += (logits.argmax(dim=1) == labels).sum()
        if self.average is not None:
            self.average.update_parameters(self.net)

    def _step_schedule(self, minimised: float = math.nan) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(minimised)  # the test images are no business of the schedule's
        elif self.scheduler is not None:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the epochs to come depend on, by the names of the checkpoints that stores hold already."""
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "frozen": [name for name, p in self.net.named_parameters() if not p.requires_grad],
            "average": None if self.average is None else {"net": self.average.state_dict()},
            "declared": states.parts_state(self.experiment),
            "optimizer": {"state": states.plain(self.optimizer.state_dict())},
            "scheduler": None if self.scheduler is None else states.plain(self.scheduler.state_dict()),
            "shuffling": [self.shuffling.get_state()],
            "generators": states.generator_states(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the training that gave `state` stood; the generators that it draws from are set too."""
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        for name, parameter in self.net.named_parameters() if "frozen" in state else ():  # older ones lack it
            parameter.requires_grad_(name not in state["frozen"])
        if self.average is not None:
            self.average.load_state_dict(state["average"]["net"])
        states.load_parts_state(self.experiment, state["declared"])
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.shuffling.set_state(state["shuffling"][0])
        states.set_generator_states(state["generators"], self.device)


def evaluation_part(mnist: Mnist) -> tuple[Literal["test", "validation"], Tensor, Tensor]:
    """Return what the epochs are evaluated on: its name, images (N, 1, 28, 28) and labels (N,)."""
    if mnist.validation_images is None or mnist.validation_labels is None:
        return "test", mnist.test_images, mnist.test_labels
    return "validation", mnist.validation_images, mnist.validation_labels


def training_batch(mnist: Mnist, batch: Tensor, augment: Augmentation) -> tuple[Tensor, Tensor]:
    """Return the augmented images (N, 1, 28, 28) in [0, 1] that the indices `batch` (N,) name, and their labels."""
    return augment(mnist.train_images[batch].float() / 255, mnist.train_labels[batch])


def _step(optimizer: Optimizer, closure: Callable[[], Tensor], takes: Takes) -> None:
    """Call an optimizer's step with what it takes: gradients that the closure sets, the closure, or both."""
    if takes != "closure":
        closure()  # the gradients come first, so that the hooks of a step find them
    optimizer.step(*[closure] * (takes != "gradients"))  # type: ignore[arg-type]


def loss_and_logits(net: nn.Module, images: Tensor, labels: Tensor, experiment: Experiment) -> tuple[Tensor, Tensor]:
    """Return what is minimised, a scalar, and the logits (N, 10) of a batch, by the declared objective or loss."""
    with SparseDropout():
        if experiment.objective is not None:
            return experiment.objective(net, images, labels.clone())
        logits = without_half(net(images))
    kept = logits.clone()  # as a loss may change what it is given
    return (F.cross_entropy if experiment.loss is None else experiment.loss)(logits, labels.clone()), kept


def without_half(logits: Tensor) -> Tensor:
    """Return logits of float16 as float32: a loss of them would be rounded to 11 bits."""
    return logits.float() if getattr(logits, "dtype", None) == torch.float16 else logits


def step_takes(experiment: Experiment, net: nn.Module, optimizer: Optimizer) -> Takes:
    """Say what the step of the declared optimizer takes; the signature of a script's own can't tell, so it is tried."""
    arguments = inspect.signature(optimizer.step).parameters.values()
    requires = any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in arguments)
    likely: Takes = "closure" if requires else "gradients"
    ways: tuple[Takes, ...] = (likely, "both") if is_own(optimizer) else ()
    copies = [one.detach().clone().requires_grad_(one.requires_grad) for one in net.parameters() if ways]

    def closure() -> Tensor:
        for parameter in copies:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return torch.zeros(())

    with states.kept_generators(next(net.parameters()).device):
        for takes in ways:
            with suppress(Exception):  # each has its own way to refuse
                _step(build_optimizer(experiment, copies), closure, takes)
                return takes
    return likely


def is_own(optimizer: Optimizer) -> bool:
    """Say whether the step of an optimizer is the script's, not torch's."""
    return not type(optimizer).step.__module__.startswith("torch.")


def minimises_cross_entropy(experiment: Experiment) -> bool:
    """Say whether what is minimised is known to be the mean cross-entropy per image."""
    loss = experiment.loss
    is_usual = type(loss) is nn.CrossEntropyLoss and stable_text(loss) == "CrossEntropyLoss()"
    return experiment.objective is None and (is_usual or loss in (None, F.cross_entropy))


@torch.no_grad()  # what inference_mode leaves in a network can't be trained with
def predict(net: nn.Module, images: Tensor, normalize_by: tuple[float, float] = MNIST_PIXELS) -> Tensor:
    """Return a network's output (N, 10) for uint8 images (N, 1, 28, 28) in evaluation mode, in which it stays."""
    net.eval()
    logits = [net(normalize(batch.float() / 255, normalize_by)) for batch in torch.split(images, EVALUATION_BATCH_SIZE)]
    return without_half(torch.cat(logits) if len(logits) > 1 else logits[0])


def evaluate(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the mean cross-entropy and the number of correct predictions."""
    return F.cross_entropy(logits, labels).item(), int((logits.argmax(dim=1) == labels).sum().item())


def build_optimizer(experiment: Experiment, parameters: Iterable[Tensor]) -> Optimizer:
    """Build the declared optimizer with copies of the tensors among its arguments: a schedule changes `lr` in place."""
    keywords = experiment.optimizer.keywords if isinstance(experiment.optimizer, functools.partial) else {}
    tensors = {name: value.clone() for name, value in keywords.items() if isinstance(value, Tensor)}
    optimizer: object = experiment.optimizer(parameters, **tensors)
    if not isinstance(optimizer, Optimizer) or any("lr" not in group for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise TypeError(f"gives a {name}, which is no torch.optim.Optimizer, or has a parameter group without lr")
    return optimizer


def build_average(experiment: Experiment, net: nn.Module) -> AveragedModel | None:
    """Build the declared average of the network's weights, with its count of batches where no GPU is waited for."""
    if experiment.average is None:
        return None
    for module in net.modules():
        for name, value in vars(module).items():  # activations, and the weights of the old weight_norm, have no copies
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()
    average: object = experiment.average(net)
    if not isinstance(average, AveragedModel):
        raise TypeError(f"gives a {type(average).__name__}, not a torch.optim.swa_utils.AveragedModel")
    average.n_averaged = average.n_averaged.cpu()  # it is read for each batch
    return average


def build_scheduler(experiment: Experiment, optimizer: Optimizer, num_images: int) -> LRScheduler | None:
    """Build the declared scheduler, with the run's `epochs` and `steps_per_epoch` where it leaves them open."""
    if experiment.scheduler is None:
        return None
    steps = batches_per_epoch(experiment, num_images) if experiment.scheduler_interval == "batch" else 1
    run = {"epochs": experiment.epochs, "steps_per_epoch": steps}
    defaults = {name: parameter.default for name, parameter in parameters_of(experiment.scheduler).items()}
    if defaults.get("total_steps") is not None:  # OneCycleLR takes either these or the two
        run = {}
    left_open = {name: run[name] for name in run if defaults.get(name, 0) in (None, inspect.Parameter.empty)}
    return experiment.scheduler(optimizer, **left_open)


def batches_per_epoch(experiment: Experiment, num_images: int) -> int:
    return math.ceil(num_images / experiment.batch_size)
