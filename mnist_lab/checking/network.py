"""Finds what may be wrong with a network that trains: weights that are shared, not registered, or not optimized."""

import dis
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_lab.errors import LabError


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    named = dict(net.named_parameters()) | dict(net.named_buffers())
    return {name: tensor.detach().to_dense() for name, tensor in named.items()}


def computed(net: nn.Module) -> dict[Tensor, str]:
    """Return the tensors that a network's modules hold and that were computed from weights, each with its name."""
    held = [item for module in net.modules() for item in vars(module).items()]
    held += [item for _, value in held if isinstance(value, dict) for item in value.items()]
    held += [(name, one) for name, value in held if isinstance(value, list | tuple) for one in value]
    return {one: name for name, one in held if isinstance(one, Tensor) and not one.is_leaf}


def notice_unread(build: Any) -> Iterator[str]:
    """Yield a notice of the arguments that the code which builds a network never reads: of a class, its __init__."""
    is_class = isinstance(build, type)
    code = getattr(build.__init__ if is_class else build, "__code__", None)
    if code is not None and "locals" not in code.co_names:
        loads = (one.argrepr.split(", ") for one in dis.get_instructions(code) if "LOAD" in one.opname)
        names = code.co_varnames[is_class : code.co_argcount + code.co_kwonlyargcount]  # without self
        if unread := sorted({*names}.difference(*loads)):
            yield f"net: never reads {listed(unread)} of its arguments, which has no effect"


def check_own_weights(net: nn.Module, before: dict[str, Tensor], again: nn.Module) -> None:
    """Refuse a network that shares trained tensors with one built after it; before: its tensors before the training."""
    after, built = tensors_of(net), tensors_of(again)
    common = [name for name in before if name in after and name in built]
    changed = [name for name in common if not torch.equal(before[name], after[name])]
    if shared := [name for name in changed if torch.equal(after[name], built[name])]:
        raise ValueError(f"two networks share {listed(shared)}, which are trained; build all layers in its __init__")


def notice_same_start(net: nn.Module, other: nn.Module) -> Iterator[str]:
    pairs = zip(net.parameters(), other.parameters(), strict=False)  # a seed may decide how many
    if all(torch.equal(own, others) for own, others in pairs if own.requires_grad):
        yield "net: begins with the same weights whatever the seed, so the spread over seeds says less"


def unregistered(net: nn.Module, output: Tensor, images: Tensor) -> list[str]:
    """Return the shapes of the weights that an output depends on, but that the network does not register.

    output: with its graph, which may have been gone through backwards.
    images: what the network was given. A leaf of their shape is a change to them, as adversarial training makes it.
    """
    known, todo, seen, shapes = {id(parameter) for parameter in net.parameters()}, [output.grad_fn], set(), []
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)  # that gradients are accumulated in
        if leaf is not None and id(leaf) not in known and leaf.shape != images.shape:
            shapes.append(str(tuple(leaf.shape)))
    return shapes


def notice_optimized(net: nn.Module, optimizer: Optimizer, before: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a notice of the parameters that an optimizer is not given, and that are as they were in `before`."""
    if late := [name for name, _ in net.named_parameters() if name not in before]:
        raise LabError(f"net: builds {listed(late)} after its __init__, too late for the optimizer; build all there")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: id(parameter) for name, parameter in net.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trainable.items() if parameter not in held]
    now = tensors_of(net)
    if len(missing) == len(trainable):
        raise ValueError("has none of the network's parameters; give it those that it is called with")
    if missing := [name for name in missing if torch.equal(now[name], before[name])]:
        yield f"optimizer: it is not given {listed(missing)}, which are not trained, though they count as parameters"


def notice_outputs(logits: Tensor, takes_log_probabilities: bool) -> Iterator[str]:
    """Yield a notice if a network ends with softmax or sigmoid, or not with the log-probabilities of its loss."""
    is_softmax = bool((logits >= 0).all()) and sums_to_one(logits)
    if is_softmax or bool(((logits > 0) & (logits < 1)).all()):
        advice = "use log_softmax(dim=1)" if takes_log_probabilities else "leave it out, as losses take logits"
        ending = "softmax" if is_softmax else "sigmoid"
        yield f"net: seems to end with {ending}; {advice}, unless yours takes probabilities"
    elif takes_log_probabilities and not sums_to_one(logits.exp()):
        yield "loss: takes log-probabilities; use cross_entropy, or end the network with log_softmax(dim=1)"


def sums_to_one(numbers: Tensor) -> bool:
    return torch.allclose(numbers.sum(dim=1), torch.ones_like(numbers[:, 0]), atol=1e-3)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return "None (is a return missing?)" if value is None else f"a {type(value).__name__}"
