"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from mnist_lab.arguments import attributes, stable_text
from mnist_lab.checking import network, schedule
from mnist_lab.checking.augmentation import UNSEEDED, check_augmentation
from mnist_lab.checking.network import kind, listed
from mnist_lab.data import TRAINING_IMAGES, Mnist
from mnist_lab.errors import LabError, counted, one_line, script_line, text_of
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.tracking import run as tracking
from mnist_lab.training import loop as training
from mnist_lab.training.loop import EVALUATION_BATCH_SIZE, EpochMetrics, normalize
from mnist_lab.training.states import PARTS, kept_generators, objects_in, own_parts, set_generator_states
from mnist_lab.training.transforms import Augmentation
from mnist_lab.verdicts.targets import out_of_reach

logger = logging.getLogger(__name__)

SEED = 0  # of a rehearsal: whether something works may depend on what is drawn
FEW = 100  # images, where any will do
MANY_STEPS = 11  # of a script's own optimizer: Lookahead brings its slow weights in at each fifth or tenth
OF_OPTIMIZERS = ("state", "param_groups", "defaults")  # attributes that their state_dict holds, or that do not change


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found out; it depends on the declaration, the data and the device only."""

    memory_format: torch.memory_format
    untrained: set[str]  # the parameters that no gradient has reached
    no_effect: Mapping[str, str]  # the hyperparameters that change nothing in this run, each with a sentence
    notices: list[str]  # of what the user may not expect

    def watch(self, net: nn.Module) -> None:
        """Take a parameter from `untrained` when a gradient reaches it after all: a layer may be skipped at random."""
        parameters = dict(net.named_parameters())
        for name in self.untrained:
            if name in parameters:  # the seed may decide which there are
                reached = partial(lambda name, _: self.untrained.discard(name), name)
                parameters[name].register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]

    def notice(self, overrides: Mapping[str, object]) -> None:
        """Warn of what the user may not expect; raises LabError if one of the overrides has no effect."""
        for notice in self.notices:
            logger.warning("%s", notice)
        if self.untrained:
            names = listed(sorted(self.untrained))
            logger.warning("no gradient reaches %s: not trained, and not counted among the parameters", names)
        for name, sentence in self.no_effect.items():
            if name in overrides:
                raise LabError(sentence)
            logger.warning("%s", sentence)


@dataclass
class Trial:
    """A declaration that is tried: what its checks make for the ones after them, and what they find out."""

    declared: Experiment
    experiment: Experiment  # with parts of its own, to be changed
    mnist: Mnist
    memory_format: torch.memory_format
    net: nn.Module = field(init=False)
    before: dict[str, Tensor] = field(init=False)  # what the network began with
    trainable: set[str] = field(init=False)  # the parameters that it is built to train
    training: training.Training = field(init=False)
    images: Tensor = field(init=False)  # of the first batch, augmented, in [0, 1]
    labels: Tensor = field(init=False)
    evaluating: int = 0  # images
    unseeded: bool = False  # whether the augmentation draws from elsewhere than the generators that a run seeds
    untrained: set[str] = field(default_factory=set)
    no_effect: dict[str, str] = field(default_factory=dict)

    @property
    def minimised(self) -> str:
        return "loss" if self.experiment.objective is None else "objective"

    @property
    def batch_size(self) -> int:
        return min(self.experiment.batch_size, len(self.mnist.train_images))

    def network(self, seed: int) -> nn.Module:
        return training.initial_network(self.experiment, seed, self.mnist.train_images.device, self.memory_format)

    def evaluated(self, size: int) -> Tensor:
        """Return so many of the images that the epochs are evaluated on, some twice where there are too few."""
        images = training.evaluation_part(self.mnist)[1]
        return images[torch.arange(size, device=images.device) % len(images)]

    def logits(self, images: Tensor, net: nn.Module | None = None) -> Tensor:
        """Return the logits of images in evaluation mode; raises ValueError if they are none."""
        self.evaluating = len(images)
        logits = training.predict(self.net if net is None else net, images, self.experiment.normalize)
        _check_logits(logits, len(images))
        self.evaluating = 0
        return logits


def rehearse(experiment: Experiment, mnist: Mnist) -> Rehearsal:
    """Try the declaration on real batches before any training, and walk the schedule to its end or very far.

    All is tried as it will be trained: on a CPU with the network in channels_last, which is faster there. Where that
    fails, and on other devices, it is contiguous: `view` after a convolution works there, and LBFGS.
    The random state and all that is given are left as they were. Raises LabError with the field that is wrong.
    """
    with kept_generators(mnist.train_images.device):
        if mnist.train_images.device.type == "cpu":
            with suppress(LabError):
                return _rehearse(experiment, mnist, torch.channels_last)
        return _rehearse(experiment, mnist, torch.contiguous_format)


def _rehearse(declared: Experiment, mnist: Mnist, memory_format: torch.memory_format) -> Rehearsal:
    trial = Trial(declared, own_parts(declared), mnist, memory_format)
    notices: list[str] = []
    with tracking.silenced() as called:
        for blamed, check in CHECKS:
            with blame(trial.minimised if blamed == "loss" else blamed, trial):
                notices += check(trial)
    return Rehearsal(memory_format, trial.untrained, trial.no_effect, [*notices, *tracking.notices(called)])


# ---- the checks, in the order in which they are made: each yields notices, and raises what the field is blamed for


def _check_building(trial: Trial) -> Iterator[str]:
    other = trial.network(SEED + 1)
    trial.net = trial.network(SEED)
    if training.num_params(trial.net) == 0:
        raise ValueError("has no parameters to train; build its layers in __init__")
    trial.trainable = {name for name, parameter in trial.net.named_parameters() if parameter.requires_grad}
    trial.before = {name: tensor.clone() for name, tensor in network.tensors_of(trial.net).items()}
    yield from network.notice_same_start(trial.net, other)
    yield from schedule.notice_batch_norm(trial.experiment, trial.net, len(trial.mnist.train_images))


def _check_optimizer(trial: Trial) -> Iterable[str]:
    optimizer = training.build_optimizer(trial.experiment, trial.net.parameters())
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"gives a {name}, not a torch.optim.Optimizer")
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"{name} has a parameter group without lr, which each epoch reports")
    return ()


def _check_augmentation(trial: Trial) -> list[str]:
    trial.images, trial.labels, notices = check_augmentation(trial.experiment, trial.mnist, trial.batch_size)
    trial.unseeded = UNSEEDED in notices
    return notices


def _check_gradients(trial: Trial) -> Iterator[str]:
    """Try the forward and the backward pass of a batch, and look through the graph between them."""
    net, images = trial.net, normalize(trial.images, trial.experiment.normalize)
    net.train()
    if trial.experiment.objective is None:  # what it makes of the network's output is its own business
        with blame("net", trial):
            _check_logits(net(images), len(images))
    returned: object = training.loss_and_logits(net, images, trial.labels, trial.experiment)
    loss, logits = _checked_loss(returned, len(images))
    if len(images) == 10 and trial.labels.ndim == 1 and trial.experiment.loss is not None:
        trial.experiment.loss(logits.detach().repeat(2, 1), trial.labels.repeat(2))  # (10,) may spread over (10, 10)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = dict(net.named_parameters())
    trainable = trial.trainable | {name for name, parameter in parameters.items() if parameter.requires_grad}
    trial.untrained = {name for name, parameter in parameters.items() if parameter.grad is None and name in trainable}
    if all(parameter.grad is None for parameter in parameters.values()):
        raise ValueError("has no gradient in the network's parameters, so it can't train them")
    if shapes := network.unregistered(net, logits, images):
        where = "keep layers in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter"
        raise LabError(f"net: would not train weights that it does not register, of shape {listed(shapes)}; {where}")
    if shapes := network.unregistered(net, loss, images):
        advice = "the optimizer is given the network's only; make them parameters of the network"
        yield f"{trial.minimised}: has weights of its own, of shape {listed(shapes)}, which are not trained: {advice}"


def _check_evaluation(trial: Trial) -> Iterator[str]:
    """Try every number of images that is evaluated at once: one, and the two that the model is logged with, too."""
    totals = {len(training.evaluation_part(trial.mnist)[1]), len(trial.mnist.test_images)}
    sizes = {1, 2, *(min(EVALUATION_BATCH_SIZE, total) for total in totals)}
    sizes |= {total % EVALUATION_BATCH_SIZE for total in totals}
    for size in sorted(sizes - {0}):
        logits = trial.logits(trial.evaluated(size))
    few = trial.evaluated(size)[-min(FEW, max(1, size // 3)) :]  # the last ones: an LSTM may have seen those before
    if not torch.allclose(trial.logits(few), logits[-len(few) :], rtol=1e-2, atol=1e-2):
        yield "net: gives an image other logits beside other images; see for dim=0 where dim=1 is meant"
    loss = trial.experiment.loss
    function = loss.func if isinstance(loss, partial) else loss
    yield from network.notice_outputs(logits, function is F.nll_loss or isinstance(function, nn.NLLLoss))


def _check_average(trial: Trial) -> Iterator[str]:
    if trial.experiment.average is None:
        return
    average = training.build_average(trial.experiment, trial.net)
    if not isinstance(average, AveragedModel):
        raise TypeError(f"gives a {type(average).__name__}, not a torch.optim.swa_utils.AveragedModel")
    average.update_parameters(trial.net)
    average.update_parameters(trial.net)  # the first call copies
    trial.logits(trial.evaluated(2), average.module)
    if not average.use_buffers and any(True for _ in trial.net.buffers()):
        yield "average: takes the last batch norm statistics; AveragedModel(..., use_buffers=True) averages them"
    yield from schedule.notice_slow_average(trial.experiment, len(trial.mnist.train_images))


def _check_steps(trial: Trial) -> Iterable[str]:
    """Train both batch sizes that will come up: some networks fail on a last batch of one image only."""
    last = len(trial.mnist.train_images) % trial.experiment.batch_size or trial.batch_size
    trial.training = training.Training(trial.net, trial.experiment, trial.mnist, seed=SEED)
    for size in (trial.batch_size, last):
        trial.net.train()
        trial.training.train_batch(torch.arange(size, device=trial.mnist.train_images.device))
        trial.untrained -= {name for name, p in trial.net.named_parameters() if p.grad is not None}
        if not training.predict(trial.net, trial.evaluated(FEW), trial.experiment.normalize).isfinite().all():
            raise ValueError("the network's logits are not finite after one step; is the learning rate too high?")
    return ()


def _check_rate(trial: Trial) -> Iterator[str]:
    """Try a step at a learning rate of 0 where the script has written it, and may step optimizers of its own in it."""
    yield from network.notice_optimized(trial.net, trial.training.optimizer, trial.before)
    if not training.is_own(type(trial.training.optimizer)):
        return
    net = trial.network(SEED)
    before = [parameter.detach().clone() for parameter in net.parameters()]  # of a network that may draw unseeded
    at_rest = training.Training(net, own_parts(trial.declared), trial.mnist, seed=SEED)
    for group in at_rest.optimizer.param_groups:
        group["lr"] = 0 * group["lr"]
    at_rest.train_batch(torch.arange(min(FEW, trial.batch_size), device=trial.mnist.train_images.device))
    if not _same_weights(net, before):
        trial.no_effect = {}
        yield "optimizer: moves the weights at lr 0: what is logged and scheduled as lr is not the rate that it uses"


def _same_weights(net: nn.Module, others: Iterable[Tensor]) -> bool:
    """Compare weights, but for rounding: a step may move them and bring them back, and GPUs add in any order."""
    pairs = zip(net.parameters(), others, strict=True)
    dense = ((one.to_dense(), other.to_dense()) for one, other in pairs)
    return all(torch.allclose(*both, rtol=1e-4, atol=1e-6, equal_nan=True) for both in dense)


def _check_trained(trial: Trial) -> Iterable[str]:
    images = trial.evaluated(FEW)
    logits, again = trial.logits(images), trial.logits(images)
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5, equal_nan=True):  # a GPU may round differently
        raise ValueError("gives other logits when it is evaluated again; is it F.dropout(x, training=self.training)?")
    network.check_own_weights(trial.net, trial.before, trial.network(SEED))
    return ()


def _check_resume(trial: Trial) -> Iterator[str]:
    """Take the training up anew, as after an epoch, and name what changes in it without being in its state."""
    used, device = trial.training, trial.mnist.train_images.device
    _train(used)
    trial.logits(trial.evaluated(2))  # a network may change in an evaluation too, or keep its activations
    state: dict[str, Any] = {name: _kept(name, value) for name, value in used.state_dict().items()}
    resumed = training.Training(trial.network(SEED), own_parts(trial.declared), trial.mnist, seed=SEED)
    lost: set[tuple[str, str]] = set()
    otherwise = ""
    try:
        resumed.load_state_dict(state)
        lost = _differing(used, resumed)
        for one in (used, resumed):
            set_generator_states(state["generators"], device)
            _train(one)
            trial.logits(trial.evaluated(2), one.net)
        lost &= _differing(used, resumed)  # else it is made anew from what is kept
        # On a GPU sums are rounded otherwise each time, and an optimizer may make much of it.
        if device.type == "cpu" and not (trial.unseeded or _same_weights(used.net, resumed.net.parameters())):
            otherwise = "would go on otherwise: it changes what no state_dict holds, as a generator of the script's own"
    except Exception as error:  # a network that changes its layers in training
        otherwise, trial.evaluating = f"can't be gone on with: {one_line(error)}", 0
    advice = "keep it in a buffer, or write state_dict and load_state_dict"
    for part in sorted({part for part, _ in lost}):
        names = listed(sorted(name for of_part, name in lost if of_part == part))
        yield f"{part}: changes {names} from batch to batch, which `--resume` begins anew; {advice}"
    if otherwise and not lost:
        yield f"resume: a run that is taken up again {otherwise}"


def _train(one: training.Training) -> None:
    """Train a batch, or with an optimizer of the script's own many small ones."""
    is_own = training.is_own(type(one.optimizer))
    size = min(one.experiment.batch_size, len(one.mnist.train_images), *[FEW] * is_own)
    one.net.train()
    for _ in range(MANY_STEPS if is_own else 1):
        one.train_batch(torch.arange(size, device=one.device))


def _differing(used: training.Training, anew: training.Training) -> set[tuple[str, str]]:
    """Return the attributes that two trainings have different values of: each with the part that it belongs to."""
    pairs = {part: (getattr(used.experiment, part), getattr(anew.experiment, part)) for part in PARTS}
    pairs |= {"net": (used.net, anew.net), "optimizer": (used.optimizer, anew.optimizer)}
    differing = set()
    for part, (one, other) in pairs.items():
        values, others = _attributes(one), _attributes(other)
        differing |= {(part, name) for name in values if values[name] != others.get(name)}
    return differing


def _kept(part: str, state: object) -> object:
    """Return a part's state as a checkpoint gives it back, which is read without running any code."""
    try:
        return _read_back(state)
    except Exception as error:
        part = {"declared": "a loss, objective or augmentation"}.get(part, part)
        items = state.items() if isinstance(state, dict) else ()
        odd = [f"{name}, {kind(value)}" for name, value in items if not _is_kept(value)]
        message = f"{part}: its state_dict() must hold numbers, texts and tensors, which a checkpoint keeps"
        message += f", not {listed(odd)}; write state_dict and load_state_dict" if odd else ""
        raise LabError(message) from error


def _read_back(state: object) -> object:
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def _is_kept(value: object) -> bool:
    with suppress(Exception):
        _read_back(value)
        return True
    return False


def _check_scheduler(trial: Trial) -> Iterator[str]:
    """Judge a schedule's unit by all images that may be trained on: a quick look with few says nothing of it."""
    used, held_out = len(trial.mnist.train_images), trial.mnist.validation_images
    whole = walk = schedule.Walk(trial.experiment, trial.net, used)
    if used < (total := TRAINING_IMAGES - (0 if held_out is None else len(held_out))):
        with suppress(Exception):  # what could not be trained on all of them may still be looked at
            whole = schedule.Walk(trial.experiment, trial.net, total)
    yield from schedule.notice_unit(whole)
    trial.no_effect = schedule.without_effect(walk)


def _check_targets(trial: Trial) -> Iterator[str]:
    params = training.num_params(trial.net, trial.untrained)
    yield from out_of_reach(trial.experiment.targets, params, trial.experiment.epochs)


Check = Callable[[Trial], Iterable[str]]
CHECKS: tuple[tuple[str, Check], ...] = (  # "loss" stands for the objective where one is declared
    ("net", _check_building),
    ("optimizer", _check_optimizer),
    ("augmentation", _check_augmentation),
    ("loss", _check_gradients),
    ("net", _check_evaluation),
    ("average", _check_average),  # after an evaluation: an activation that a network keeps can be copied then only
    ("scheduler", _check_scheduler),
    ("optimizer", _check_steps),
    ("optimizer", _check_rate),
    ("net", _check_trained),
    ("net", _check_resume),
    ("targets", _check_targets),
)


# ---- what the checks are made of


def _check_logits(logits: object, size: int) -> None:
    kinds = (torch.float32, torch.float64, torch.float16)
    if not isinstance(logits, Tensor) or logits.dtype not in kinds or logits.shape != (size, 10):
        several = "; an objective may take more of them in training" if isinstance(logits, tuple | list | dict) else ""
        raise ValueError(f"gives {kind(logits)}, not torch.float32 logits of shape ({size}, 10){several}")
    if not logits.isfinite().all():
        raise ValueError("gives logits that are not finite on the first batch")


def _checked_loss(returned: object, size: int) -> tuple[Tensor, Tensor]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"gives {kind(returned)}, not a loss and the batch's logits: return loss, logits")
    loss, logits = returned
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise ValueError(f"gives {kind(loss)} for the loss, not a single number")
    _check_logits(logits, size)
    if not loss.isfinite():
        raise ValueError(f"is {loss.item()} on the first batch")
    if not loss.requires_grad:
        raise ValueError("has no gradient in the network's parameters, so it can't train them")
    return loss, logits


def _attributes(part: object) -> dict[str, str]:
    """Return the attributes of a part's objects, and of modules in them, as text; but for activations."""
    found = {}
    for one in objects_in(part):
        modules: dict[str, object] = dict(one.named_modules()) if isinstance(one, nn.Module) else {"": one}
        for place, module in modules.items():
            if hasattr(module, "_orig_mod"):  # what torch.compile puts around a network
                continue
            for name, value in attributes(module).items():
                of_torch = isinstance(module, Optimizer) and (name in OF_OPTIMIZERS or name.startswith("_"))
                if not (of_torch or isinstance(value, nn.Module)) and getattr(value, "is_leaf", True):
                    held = value.state_dict() if isinstance(value, Optimizer) else value
                    found[f"{place}.{name}".removeprefix(".")] = stable_text(held)
    return found


# ---- who is to blame


def blame_script(epochs: Iterable[EpochMetrics]) -> Iterator[EpochMetrics]:
    """Yield the epochs; turn what the script's code raises meanwhile, and a lack of memory, into one sentence."""
    try:
        yield from epochs
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) or script_line(error) or _lacks_memory(error):
            raise _refusal("training", error) from error
        raise


@contextmanager
def blame(blamed: str, trial: Trial | None = None) -> Iterator[None]:
    """Turn whatever the declared code raises into one sentence that names the field and the line in the script.

    trial: whose own parts may be called within: the innermost one that an error went through is blamed.
    """
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        if trial is None or not hasattr(trial, "net"):
            raise _refusal(blamed, error) from error
        innermost = _innermost(trial, error) or blamed
        where = f"evaluated on {counted(trial.evaluating, 'image')}: " if trial.evaluating else ""
        where += network.failing_layer(error, trial.net) if innermost == "net" else ""
        raise _refusal(innermost, error, where) from error


def _innermost(trial: Trial, error: BaseException) -> str:
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is Augmentation.__call__.__code__:
            found = "augmentation"
        elif frame.f_code is training.loss_and_logits.__code__:
            found = trial.minimised
        elif frame.f_code is Tensor.backward.__code__ or frame.f_locals.get("self") is trial.net:
            found = "net"
    return found


def _refusal(blamed: str, error: BaseException, where: str = "") -> LabError:
    message = text_of(error)
    if isinstance(error, SystemExit):
        message = f"sys.exit({quoted(error.code)}) was called"
    elif _lacks_memory(error):
        message = f"needs more memory than there is: {message}"
    return LabError(f"{blamed}: {where}{message}{script_line(error)}")


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
