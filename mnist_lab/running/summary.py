"""The model summary: torchsummary's table with one more column, the receptive field of each layer."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Collection, Iterable

import torch
import torchsummary
from tabulate import tabulate
from torch import Tensor, nn

from mnist_lab.checking.network import listed
from mnist_lab.errors import text_of
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import num_params

IMAGE_SIZE = 28
Hook = Callable[[nn.Module, object, object], None]


def summarize(net: nn.Module, untrained: Collection[str] = ()) -> str:
    """Return torchsummary's text for a (1, 28, 28) input, with each layer's receptive field in pixels.

    The totals count each parameter once; where torchsummary's own are others, a line says so. A network that
    torchsummary can't draw (layers that return tuples, no layer with weights) gets a table of its layers without
    receptive fields, and one that can't be run a line that says so. Network and random state are left as they were.

    untrained: names of parameters that no gradient reaches; they do not count as trainable.
    """
    with kept_generators(next(net.parameters()).device):  # some networks draw in evaluation mode too
        try:
            copied = copy.deepcopy(net).cpu().eval()
            for name, parameter in copied.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in untrained)
            return _draw(copied)
        except Exception as error:
            reason = f"torchsummary can't draw this network ({type(error).__name__}: {text_of(error)})"
        try:
            return f"{_layer_table(copied)}\nNo receptive fields: {reason}."
        except Exception:
            return f"No model summary: {reason}."


def _draw(net: nn.Module) -> str:
    text = io.StringIO()
    with torch.inference_mode(), contextlib.redirect_stdout(text):
        torchsummary.summary(copy.deepcopy(net), (1, IMAGE_SIZE, IMAGE_SIZE), device="cpu")  # leaves hooks if it fails
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
    """Put the true totals into torchsummary's lines; where they are others, say so in a line at the end."""
    own = dict(line.split(": ", 1) for line in lines if ": " in line)
    true = _totals(net)
    if true.items() <= own.items():
        return lines
    true["Params size (MB)"] = f"{4 * sum(p.numel() for p in net.parameters()) / 2**20:.2f}"
    parts = (own["Input size (MB)"], own["Forward/backward pass size (MB)"], true["Params size (MB)"])
    true["Estimated Total Size (MB)"] = f"{sum(map(float, parts)):.2f}"
    corrected = [f"{name}: {true[name]}" if (name := line.partition(": ")[0]) in true else line for line in lines]
    counts = f"{own['Total params']} in all and {own['Trainable params']} trainable"
    return [*corrected, f"torchsummary's own count is {counts}: it adds up the layers call by call, frozen or not."]


def _totals(net: nn.Module) -> dict[str, str]:
    total, trainable = sum(parameter.numel() for parameter in net.parameters()), num_params(net)
    return {
        "Total params": f"{total:,}",
        "Trainable params": f"{trainable:,}",
        "Non-trainable params": f"{total - trainable:,}",
    }


def _layer_table(net: nn.Module) -> str:
    """Return a table of the layers in the order of their calls, and the totals."""
    calls: list[tuple[nn.Module, str]] = []

    def note_call(module: nn.Module, inputs: object, output: object) -> None:
        calls.append((module, _shape(output)))

    _run_watched(net, torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE), dict.fromkeys(_layers(net)), note_call)
    called = {module for module, _ in calls}
    counted: set[int] = set()
    rows = []
    for number, (module, shape) in enumerate(calls, start=1):
        # A part that is never called is this layer's own, such as the projection in an attention layer.
        parts = [module, *(part for part in module.modules() if part not in called)]
        mine = {id(p): p.numel() for part in parts for p in part.parameters(recurse=False) if id(p) not in counted}
        counted |= mine.keys()
        rows.append((f"{type(module).__name__}-{number}", shape, f"{sum(mine.values()):,}"))
    headers = ("Layer (type)", "Output shape of 2 images", "Param #")
    lines = [tabulate(rows, headers, colalign=("left", "left", "right"))]
    lines += [f"{name}: {figure}" for name, figure in _totals(net).items()]
    if outside := [f"{name} ({p.numel():,})" for name, p in net.named_parameters() if id(p) not in counted]:
        lines.append(f"Params in none of these layers: {listed(outside)}")
    return "\n".join(lines)


def _shape(output: object) -> str:
    """Return the shape of a layer's output, e.g. "[2, 28, 10]", or of all in a tuple, else its type."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    return f"({', '.join(map(_shape, output))})" if isinstance(output, list | tuple) else type(output).__name__


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


@torch.inference_mode()
def _run_watched(net: nn.Module, images: Tensor, layers: Iterable[nn.Module], hook: Hook) -> None:
    """Run the network on the images and call the hook with each of these layers, its input and its output."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    net(images)
    for handle in handles:
        handle.remove()
