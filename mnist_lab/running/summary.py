"""The model summary: torchsummary's table with one more column, the receptive field of each layer."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torchsummary
from tabulate import tabulate
from torch import Tensor, nn

from mnist_lab.errors import text_of
from mnist_lab.running.network import listed
from mnist_lab.training.loop import num_params

IMAGE_SIZE = 28
Hook = Callable[[nn.Module, object, object], None]


def summarize(net: nn.Module, untrained: Collection[str] = ()) -> str:
    """Return torchsummary's text for a (1, 28, 28) input, with each layer's receptive field in pixels.

    The totals count each parameter once. torchsummary counts weights and biases layer by layer, call by call; where
    that gives another total, a line says so and why. A network that torchsummary can't draw (layers that return tuples,
    no layer with weights) gets a table of its layers without receptive fields; one that can't be run gets a line that
    says so. The network and the random state are left as they were.

    untrained: names of parameters that no gradient reaches; they do not count as trainable.
    """
    try:
        net = copy.deepcopy(net)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in untrained)
        return _draw(net)
    except Exception as error:
        reason = f"torchsummary can't draw this network ({type(error).__name__}: {text_of(error)})"
    try:
        return f"{_layer_table(net)}\nNo receptive fields: {reason}."
    except Exception:
        return f"No model summary: {reason}."


def _draw(net: nn.Module) -> str:
    net = copy.deepcopy(net).cpu().eval()  # torchsummary runs the network: batch norm and dropout must not notice
    text = io.StringIO()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), contextlib.redirect_stdout(text):
        torchsummary.summary(net, (1, IMAGE_SIZE, IMAGE_SIZE), device="cpu")
    sizes = [f"{size}x{size}" for size in receptive_fields(net)]
    lines = text.getvalue().splitlines()
    rulers = [number for number, line in enumerate(lines) if line.startswith(("---", "==="))]
    for number in rulers:
        lines[number] += lines[number][0] * 16
    first, end = rulers[1] + 1, rulers[2]
    if end - first > len(sizes):  # reading a parametrized weight calls a layer
        raise ValueError("it lists more layers than the network calls")
    for number, text_beside in [(1, "Receptive field"), *zip(range(first, end), sizes, strict=False)]:
        lines[number] += f" {text_beside:>17}"
    return "\n".join(_with_true_totals(lines, net))


def _with_true_totals(lines: list[str], net: nn.Module) -> list[str]:
    """Put the true totals into torchsummary's lines; where they are others, say why in a line at the end."""
    said = dict(line.split(": ", 1) for line in lines if ": " in line)
    true = _totals(net)
    if all(said[name] == figure for name, figure in true.items()):
        return lines
    true["Params size (MB)"] = f"{4 * sum(p.numel() for p in net.parameters()) / 2**20:.2f}"
    parts = (said["Input size (MB)"], said["Forward/backward pass size (MB)"], true["Params size (MB)"])
    true["Estimated Total Size (MB)"] = f"{sum(map(float, parts)):.2f}"
    corrected = [f"{name}: {true[name]}" if (name := line.partition(": ")[0]) in true else line for line in lines]
    own = f"{said['Total params']} in all and {said['Trainable params']} trainable"
    return [*corrected, f"torchsummary's own count is {own}: it {_why(net)}."]


def _totals(net: nn.Module) -> dict[str, str]:
    total, trainable = sum(parameter.numel() for parameter in net.parameters()), num_params(net)
    return {
        "Total params": f"{total:,}",
        "Trainable params": f"{trainable:,}",
        "Non-trainable params": f"{total - trainable:,}",
    }


def _why(net: nn.Module) -> str:
    """Say in which parameters torchsummary's count, by the weight and bias of each call of a layer, goes wrong."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    modules = {module: name for name, module in net.named_modules()}
    times: Counter[str] = Counter()
    foreign: dict[str, None] = {}

    def count(module: nn.Module, inputs: object, output: object) -> None:
        for kind in ("weight", "bias"):
            value = getattr(module, kind, None)
            if id(value) in names:
                times[names[id(value)]] += 1
            elif isinstance(value, Tensor):
                foreign[f"{modules[module]}.{kind}"] = None

    _run_watched(net, torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE), _layers(net), count)
    reasons = [
        f"counts {listed([name for name in times if times[name] == n])} {n} times"
        for n in sorted({*times.values()} - {1})
    ]
    if foreign:
        reasons.append(f"counts {listed(list(foreign))}, not a parameter,")
    if left_out := [name for name in names.values() if name not in times]:
        reasons.append(f"leaves out {listed(left_out)}")
    return " and ".join(reasons) or "takes each layer as its weight is, trainable or not"


def _layer_table(net: nn.Module) -> str:
    """Return a table of the layers in the order of their calls, and the totals."""
    net = copy.deepcopy(net).cpu().eval()
    calls: list[tuple[nn.Module, str]] = []
    _run_watched(
        net,
        torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE),
        dict.fromkeys(_layers(net)),
        lambda module, inputs, output: calls.append((module, _shape(output))),
    )
    called = {module for module, _ in calls}
    counted: set[int] = set()
    rows = []
    for number, (module, shape) in enumerate(calls, start=1):
        # A part that is never called is this layer's own, such as the projection in an attention layer.
        parts = [module, *(part for part in module.modules() if part not in called)]
        mine = {id(p): p.numel() for part in parts for p in part.parameters(recurse=False) if id(p) not in counted}
        counted |= mine.keys()
        rows.append((f"{type(module).__name__}-{number}", shape, f"{sum(mine.values()):,}"))
    lines = [
        tabulate(rows, ("Layer (type)", "Output shape of 2 images", "Param #"), colalign=("left", "left", "right"))
    ]
    lines += [f"{name}: {figure}" for name, figure in _totals(net).items()]
    if outside := [f"{name} ({p.numel():,})" for name, p in net.named_parameters() if id(p) not in counted]:
        lines.append(f"Params in none of these layers: {listed(outside)}")
    return "\n".join(lines)


def _shape(output: object) -> str:
    """Return the shape of a layer's output, e.g. "[2, 28, 10]", or of all in it, e.g. "([2, 28, 10], [1, 2, 10])"."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if isinstance(output, Mapping):
        return f"{{{', '.join(f'{key}: {_shape(value)}' for key, value in output.items())}}}"
    if isinstance(output, list | tuple):
        return f"({', '.join(map(_shape, output))})"
    return "None" if output is None else type(output).__name__


@torch.inference_mode()
def receptive_fields(net: nn.Module) -> list[int]:
    """Return, for each layer in torchsummary's order, the width in pixels of what one of its outputs can see.

    Measured, not computed from kernel sizes, so that functional pooling, residual paths and linear layers count:
    image i of 28 has NaN in its column i, and NaN spreads to everything that depends on it. The output looked at
    is the one in the middle, and its field reaches from the first column to the last that it depends on: the gaps of
    a dilated convolution count. A field wider than the image is given as 28.
    """
    net = copy.deepcopy(net).cpu().double().eval()  # double: plain kernels, where no tile of neighbours shares a NaN
    columns = torch.zeros(IMAGE_SIZE, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    columns[torch.arange(IMAGE_SIZE), :, :, torch.arange(IMAGE_SIZE)] = torch.nan
    widths: list[int] = []

    def note_width(module: nn.Module, inputs: object, output: object) -> None:
        assert isinstance(output, Tensor)
        reached = output.isnan()  # (28, C, H, W), or (28, features) once the image is flattened
        if reached.ndim == 4:
            reached = reached[..., output.shape[-1] // 2]
        seen = reached.flatten(1).any(dim=1).nonzero()
        widths.append(int(seen.max() - seen.min()) + 1 if len(seen) else 0)

    _run_watched(net, columns, _layers(net), note_width)
    return widths


def _layers(net: nn.Module) -> list[nn.Module]:
    """Return what torchsummary takes for layers, as often as it does: a module with two parents is there twice."""
    layers: list[nn.Module] = []
    net.apply(layers.append)
    return [part for part in layers if part is not net and not isinstance(part, nn.Sequential | nn.ModuleList)]


def _run_watched(net: nn.Module, images: Tensor, layers: Iterable[nn.Module], hook: Hook) -> None:
    """Run the network on the images and call the hook with each of these layers, its input and its output."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    # Some networks draw random numbers in evaluation mode too: F.dropout is on by default.
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        net(images)
    for handle in handles:
        handle.remove()
