"""Tries a declaration before any training, so that what is wrong with it is said by the name of the field."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_lab.arguments import attributes, stable_text
from mnist_lab.checking import network, schedule
from mnist_lab.checking.augmentation import UNSEEDED, check_augmentation
from mnist_lab.checking.network import kind, listed
from mnist_lab.data import TRAINING_IMAGES, Mnist
from mnist_lab.errors import LabError, counted, one_line, script_line, text_of
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.tracking import run as tracking
from mnist_lab.training import loop
from mnist_lab.training.loop import Training, loss_and_logits, num_params, predict
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
    params: range  # how many of the network's parameters a run may count: a layer may be skipped at random, or frozen

    def notice(self, overrides: Mapping[str, object]) -> None:
        """Warn of what the user may not expect; raises LabError if one of the overrides has no effect."""
        for notice in self.notices:
            logger.warning("%s", notice)
        for name, sentence in self.no_effect.items():
            if name in overrides:
                raise LabError(sentence)
            logger.warning("%s", sentence)


class Trial:
    """A declaration that is tried: each check raises what a field is blamed for, and has notices."""

    def __init__(self, declared: Experiment, mnist: Mnist, memory_format: torch.memory_format) -> None:
        self.declared, self.mnist, self.memory_format = declared, mnist, memory_format
        self.experiment = own_parts(declared)  # to be changed
        self.device, self.total = mnist.train_images.device, len(mnist.train_images)
        self.batch_size = min(declared.batch_size, self.total)
        self.minimised = "loss" if declared.objective is None else "objective"
        self.net = nn.Module()  # until it is built
        self.evaluating = 0  # images
        self.notices: list[str] = []
        self.say = self.notices.append

    def rehearse(self) -> Rehearsal:
        checks = (
            ("net", self.check_building),
            ("augmentation", self.check_augmentation),
            (self.minimised, self.check_gradients),
            ("net", self.check_evaluation),
            ("average", self.check_average),  # after an evaluation, when an activation that is kept can be copied
            ("scheduler", self.check_scheduler),
            ("optimizer", self.check_steps),
            ("optimizer", self.check_rate),
            ("net", self.check_trained),
            ("net", self.check_resume),
        )
        with tracking.silenced() as called, warnings.catch_warnings(action="ignore"):
            for blamed, check in checks:
                with blame(blamed, self):
                    check()
        params = num_params(self.net, self.untrained)
        self.notices += out_of_reach(self.experiment.targets, params, self.experiment.epochs)
        self.notices += tracking.notices(called)
        if self.untrained:
            names = listed(sorted(self.untrained))
            self.say(f"no gradient reaches {names}: not trained, and not counted as parameters")
        may_count = range(params, loop.numbers_in(self.net.parameters()) + 1)
        return Rehearsal(self.memory_format, self.untrained, self.no_effect, self.notices, may_count)

    # ---- the checks, in the order in which they are made

    def check_building(self) -> None:
        other = self.other = self.network(SEED + 1)
        self.net = self.network(SEED)
        if num_params(self.net) == 0:
            raise ValueError("has no parameters to train; build its layers in __init__, lists in nn.ModuleList")
        self.trainable = {name for name, parameter in self.net.named_parameters() if parameter.requires_grad}
        self.before = {name: tensor.clone() for name, tensor in network.tensors_of(self.net).items()}
        self.computed = network.computed(self.net)
        self.notices += network.notice_same_start(self.net, other)
        self.notices += network.notice_unread(getattr(self.experiment.net, "func", self.experiment.net))
        self.notices += schedule.notice_batch_norm(self.experiment, self.net, self.total)
        with blame("optimizer", self):
            loop.build_optimizer(self.experiment, other.parameters())

    def check_augmentation(self) -> None:
        self.images, self.labels, notices = check_augmentation(self.experiment, self.mnist, self.batch_size)
        self.notices += notices

    def check_gradients(self) -> None:
        """Try the forward and the backward pass of a batch, and look through the graph between them."""
        net, images = self.net, loop.normalize(self.images, self.experiment.normalize)
        net.train()
        trains = net.training  # a network's own `train` may leave it in evaluation mode
        if self.experiment.objective is None:  # what it makes of the network's output is its own business
            with blame("net", self):
                _check_logits(net(images), len(images))
        loss, logits = _checked_loss(loss_and_logits(net, images, self.labels, self.experiment), len(images))
        declared = getattr(self.experiment.loss, "func", self.experiment.loss)  # of a partial
        self.is_nll = declared is F.nll_loss or isinstance(declared, nn.NLLLoss)
        if declared is not None and self.labels.ndim == 1:
            self.is_nll |= bool(F.nll_loss(logits.float(), self.labels.long()).isclose(loss.float()))
        if any(p.grad is not None and p.grad.to_dense().any() for p in net.parameters()):
            self.say(f"{self.minimised}: calls backward() by itself, which adds to the gradients that the lab computes")
        if trains and not net.training:
            self.say(f"{self.minimised}: leaves the network in evaluation mode; call net.train() at its end")
        if len(images) == 10 and self.labels.ndim == 1 and self.experiment.loss is not None:
            self.experiment.loss(logits.detach().repeat(2, 1), self.labels.repeat(2))  # (10,) may spread over (10, 10)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        parameters = dict(net.named_parameters())
        if all(parameter.grad is None for parameter in parameters.values()):
            raise ValueError("has no gradient in the network's parameters, so it can't train them")
        trainable = self.trainable | {name for name, parameter in parameters.items() if parameter.requires_grad}
        self.untrained = {name for name in parameters if parameters[name].grad is None and name in trainable}
        if shapes := network.unregistered(net, logits, images):
            advice = "keep layers in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter"
            raise LabError(f"net: does not register weights that it uses, of shape {listed(shapes)}; {advice}")
        if shapes := network.unregistered(net, loss, images):
            weights = f"weights of its own, of shape {listed(shapes)}, which are not trained"
            self.say(f"{self.minimised}: has {weights}; make them parameters of the network")

    def check_evaluation(self) -> None:
        """Try every number of images that is evaluated at once: one, and the two that the model is logged with, too."""
        parts = loop.evaluation_part(self.mnist)[1], self.mnist.test_images
        sizes = {1, 2} | {len(batch) for part in parts for batch in torch.split(part, loop.EVALUATION_BATCH_SIZE)} - {0}
        for size in sorted(sizes):
            logits = self.logits(self.evaluated(size))
        if names := [name for one, name in network.computed(self.net).items() if one in self.computed]:
            raise ValueError(f"computes {listed(names)} from its weights in __init__, once; do it in forward")
        self.notices += network.notice_outputs(logits, self.is_nll)

    def check_average(self) -> None:
        if (average := loop.build_average(self.experiment, self.net)) is None:
            return
        average.update_parameters(self.net)
        average.update_parameters(self.net)  # the first call copies
        self.logits(self.evaluated(2), average.module)
        means = {name: one for name, one in self.net.named_buffers() if "running_mean" in name}
        if not average.use_buffers and any(not one.equal(self.before.get(name, one)) for name, one in means.items()):
            self.say("average: takes batch norm's last statistics; AveragedModel(..., use_buffers=True) averages them")
        self.notices += schedule.notice_slow_average(self.experiment, self.total)

    def check_scheduler(self) -> None:
        """Judge a schedule's unit by a run on all training images: a quick look with few says nothing about it."""
        held_out = self.mnist.validation_images
        walk = schedule.Walk(self.experiment, self.other, self.total)
        total = TRAINING_IMAGES - (0 if held_out is None else len(held_out))
        try:
            whole = walk if total <= self.total else schedule.Walk(self.experiment, self.other, total)
            self.notices += schedule.notice_unit(whole)
        except Exception as error:  # with few images it may be looked at
            self.say(f"scheduler: a run on all {total:,} images will fail: {one_line(error)}")
        self.no_effect = schedule.without_effect(walk)

    def check_steps(self) -> None:
        """Train both batch sizes that will come up: some networks fail on a last batch of one image only."""
        self.training = Training(self.net, self.experiment, self.mnist, seed=SEED)
        torch.manual_seed(unlikely := 2**33 + 1)
        for size in (self.batch_size, self.total % self.batch_size or self.batch_size):
            self.net.train()
            self.training.train_batch(torch.arange(size, device=self.device))
            self.untrained -= {name for name, p in self.net.named_parameters() if p.grad is not None}
            if not predict(self.net, self.evaluated(FEW), self.experiment.normalize).isfinite().all():
                raise ValueError("the network's logits are not finite after one step; is the learning rate too high?")
        if torch.initial_seed() != unlikely:
            self.say("training: the script calls torch.manual_seed, so the run's seed does not decide what is drawn")
        self.notices += network.notice_optimized(self.net, self.training.optimizer, self.before)

    def check_rate(self) -> None:
        """Try a step at a learning rate of 0 where the script has written it: it may step optimizers of its own."""
        if not loop.is_own(self.training.optimizer):
            return
        at_rest = self.anew()
        before = [parameter.detach().clone() for parameter in at_rest.net.parameters()]
        for group in at_rest.optimizer.param_groups:
            group["lr"] = 0 * group["lr"]
        at_rest.train_batch(torch.arange(min(FEW, self.batch_size), device=self.device))
        if not _alike(at_rest.net.parameters(), before):
            self.no_effect = {}
            rate = "what is logged and scheduled as lr is not the rate that it uses"
            self.say(f"optimizer: moves the weights at lr 0: {rate}")

    def check_trained(self) -> None:
        images, half = self.evaluated(FEW + FEW // 2), FEW // 2
        logits, again = self.logits(images[:FEW]), self.logits(images[:FEW])
        if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5, equal_nan=True):  # a GPU may round differently
            raise ValueError("gives other logits when evaluated again; does F.dropout lack training=self.training?")
        beside = self.logits(torch.cat((images[FEW:], images[half:FEW])))  # the last ones: an LSTM has seen others then
        if not torch.allclose(beside[half:], logits[half:], rtol=1e-4, atol=1e-5):
            self.say("net: gives an image other logits beside other images; look for dim=0 where dim=1 is meant")
        network.check_own_weights(self.net, self.before, self.network(SEED))

    def check_resume(self) -> None:
        """Resume the training, as after an epoch, and name what changes in it but is not in its state."""
        used = self.training
        _train(used)
        now, rates = network.tensors_of(self.net), [group.get("lr") for group in used.optimizer.param_groups]
        if any(rates) and all(torch.equal(now[name], self.before[name]) for name in self.trainable & now.keys()):
            steps = 2 + (MANY_STEPS if loop.is_own(used.optimizer) else 1)
            self.say(f"optimizer: its first {steps} steps have moved no weight")
        # A network may change in an evaluation too, or keep its activations.
        if not predict(self.net, self.evaluated(2), self.experiment.normalize).isfinite().all():
            raise LabError("optimizer: its first steps make the logits infinite; is the learning rate too high?")
        state: dict[str, Any] = {name: _kept(name, value) for name, value in used.state_dict().items()}
        resumed = self.anew()
        try:
            resumed.load_state_dict(state)
            begun_anew = {one[:2] for one in _attributes(used) - _attributes(resumed)}
            for one in (used, resumed):  # what is made anew from what is kept is alike then
                set_generator_states(state["generators"], self.device)
                _train(one)
                self.logits(self.evaluated(2), one.net)
        except Exception as error:  # a network that changes its layers in training
            self.evaluating = 0
            self.say(f"resume: an interrupted run could not be resumed: {one_line(error)}")
            return
        lost = sorted(begun_anew & {one[:2] for one in _attributes(used) - _attributes(resumed)})
        for part, names in groupby(lost, key=itemgetter(0)):
            changed = f"{listed([name for _, name in names])} from batch to batch, which `--resume` does not restore"
            self.say(f"{part}: changes {changed}; keep it in a buffer, or write state_dict and load_state_dict")
        same = _alike(used.result.parameters(), resumed.result.parameters())
        # On a GPU sums are rounded otherwise each time, and an optimizer may make much of it.
        if not (lost or same or self.device.type != "cpu" or UNSEEDED in self.notices):
            hidden = "it changes what no state_dict holds, such as a generator of its own"
            self.say(f"resume: a resumed run would differ from one without interruption: {hidden}")

    # ---- what the checks are made of

    def network(self, seed: int, experiment: Experiment | None = None) -> nn.Module:
        return loop.initial_network(experiment or self.experiment, seed, self.device, self.memory_format)

    def anew(self) -> Training:
        own = own_parts(self.declared)
        return Training(self.network(SEED, own), own, self.mnist, seed=SEED)

    def evaluated(self, size: int) -> Tensor:
        """Return so many of the images that the epochs are evaluated on, some twice where there are too few."""
        images = loop.evaluation_part(self.mnist)[1]
        return images[torch.arange(size, device=images.device) % len(images)]

    def logits(self, images: Tensor, net: nn.Module | None = None) -> Tensor:
        """Return the logits of images in evaluation mode; raises ValueError if they are none."""
        self.evaluating = len(images)
        logits = predict(self.net if net is None else net, images, self.experiment.normalize)
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
                return Trial(experiment, mnist, torch.channels_last).rehearse()
        return Trial(experiment, mnist, torch.contiguous_format).rehearse()


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
    return loss, logits


def _train(one: Training) -> None:
    """Train a batch, or with an optimizer of the script's own many small ones."""
    own = loop.is_own(one.optimizer)
    size = min(one.experiment.batch_size, len(one.mnist.train_images), *[FEW] * own)
    one.net.train()
    for _ in range(MANY_STEPS if own else 1):
        one.train_batch(torch.arange(size, device=one.device))


def _alike(weights: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Compare weights, but for rounding: a step may move them and bring them back, and GPUs add in any order."""
    pairs = ((one.to_dense(), other.to_dense()) for one, other in zip(weights, others, strict=False))
    return all(torch.allclose(*both, rtol=1e-4, atol=1e-6, equal_nan=True) for both in pairs)


def _attributes(one: Training) -> set[tuple[str, str, str]]:
    """Return the attributes of what is trained, and of modules in it, as part, name and text; but for activations."""
    found = set()
    parts = {part: getattr(one.experiment, part) for part in PARTS} | {"net": one.net, "optimizer": one.optimizer}
    for part, owner in [(part, owner) for part, declared in parts.items() for owner in objects_in(declared)]:
        modules: dict[str, object] = dict(owner.named_modules()) if isinstance(owner, nn.Module) else {"": owner}
        for place, module in modules.items():
            if hasattr(module, "_orig_mod"):  # what torch.compile puts around a network
                continue
            for name, value in attributes(module).items():
                of_torch = isinstance(module, Optimizer) and (name in OF_OPTIMIZERS or name.startswith("_"))
                if not (of_torch or isinstance(value, nn.Module)) and getattr(value, "is_leaf", True):
                    held = value.state_dict() if isinstance(value, Optimizer) else value
                    found.add((part, f"{place}.{name}".removeprefix("."), stable_text(held)))
    return found


def _kept(part: str, state: Any, odd: str = "") -> Any:
    """Return a part's state as a checkpoint gives it back, which is read without running any code."""
    content = io.BytesIO()
    try:
        torch.save(state, content)
        content.seek(0)
        return torch.load(content, weights_only=True)
    except Exception as error:
        within: Any = enumerate(state) if isinstance(state, list) else state.items() if isinstance(state, dict) else ()
        for name, value in within:
            _kept(part, value, f"{name}, {kind(value)}")
        blamed = {"declared": "a loss, objective or augmentation"}.get(part, part)
        wanted = f"numbers, texts and tensors, which a checkpoint keeps, not {odd or kind(state)}"
        advice = "write state_dict and load_state_dict"
        raise LabError(f"{blamed}: its state_dict() must hold {wanted}; {advice}") from error


# ---- who is to blame


def blame_script(epochs: Iterable[loop.EpochMetrics]) -> Iterator[loop.EpochMetrics]:
    """Yield the epochs; turn what the script's code raises meanwhile, and a lack of memory, into one sentence."""
    with blame("training"):
        yield from epochs


@contextmanager
def blame(blamed: str, trial: Trial | None = None) -> Iterator[None]:
    """Turn whatever the declared code raises into one sentence that names the field and the line in the script.

    blamed: a field; or "training", where an error that went through no line of the script is a bug and keeps its
        traceback. trial: its declared parts are called within; the innermost one that an error went through is blamed.
    """
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error.__cause__, StopIteration):  # of which a generator makes a RuntimeError
            error = error.__cause__
        where, message, line = "", text_of(error), script_line(error)
        if isinstance(error, SystemExit):
            message = f"sys.exit({quoted(error.code)}) was called"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
            message = f"needs more memory than there is: {message}"
        elif blamed == "training" and not line:
            raise
        if trial is not None:
            field, layer = _innermost(trial, error)
            blamed = field or blamed
            if isinstance(error, ArithmeticError) and not line:  # "integer modulo by zero"
                message += f", in {stable_text(getattr(trial.experiment, blamed))}"
            where = f"evaluated on {counted(trial.evaluating, 'image')}: " if trial.evaluating else ""
            where += layer if blamed in ("net", trial.minimised) else ""
        raise LabError(f"{blamed}: {where}{message}{line}") from error


def _innermost(trial: Trial, error: BaseException) -> tuple[str, str]:
    """Return the field of the innermost part that an error went through, and the layer with what reached it."""
    names = {id(module): name for name, module in trial.net.named_modules()}
    field = layer = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner: Any = frame.f_locals.get("self")
        if frame.f_code is Augmentation.__call__.__code__:
            field = "augmentation"
        elif frame.f_code is loss_and_logits.__code__:
            field, logits = trial.minimised, frame.f_locals.get("logits")
            if isinstance(logits, Tensor):
                labels = frame.f_locals["labels"]
                layer = f"is given logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
        elif frame.f_code is Tensor.backward.__code__ or owner is trial.net:
            field, layer = "net", ""
        elif frame.f_code is nn.Module._call_impl.__code__ and id(owner) in names:
            given = [str(tuple(one.shape)) for one in frame.f_locals["args"] if isinstance(one, Tensor)]
            shown = type(owner).__name__ if [*owner.children()] else repr(owner)
            layer = f"{names[id(owner)]}, {shown}, is given {', '.join(given)}: " if given else layer
    return field, layer
