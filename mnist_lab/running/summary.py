"""The model summary: torchsummary's table with one more column, the receptive field of each layer."""

from __future__ import annotations

import contextlib
import copy
import io

import torch
import torchsummary
from torch import Tensor, nn

IMAGE_SIZE = 28


def summarize(net: nn.Module) -> str:
    """Return torchsummary's text for a (1, 28, 28) input, with each layer's receptive field in pixels.

    torchsummary counts reused layers twice and misses bare parameters; the count that is judged is
    `training.num_params`. The network and the random state are left as they were. A network that torchsummary
    can't draw (layers that return tuples, no layer with weights) gives one line that says so: it can still train.
    """
    try:
        return _draw(net)
    except Exception as error:
        said = " ".join(str(error).split())
        return f"No model summary: torchsummary can't draw this network ({type(error).__name__}: {said})."


def _draw(net: nn.Module) -> str:
    net = copy.deepcopy(net).cpu().eval()  # torchsummary runs the network: batch norm and dropout must not notice
    text = io.StringIO()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), contextlib.redirect_stdout(text):
        torchsummary.summary(net, (1, IMAGE_SIZE, IMAGE_SIZE), device="cpu")
    fields = iter(receptive_fields(net))
    lines = []
    rulers = 0
    for line in text.getvalue().splitlines():
        if line.startswith(("---", "===")):
            rulers += 1
            lines.append(line + line[0] * 16)
        elif rulers == 1:
            lines.append(f"{line} {'Receptive field':>17}")
        elif rulers == 2:
            size = next(fields)
            lines.append(f"{line} {f'{size}x{size}':>17}")
        else:
            lines.append(line)
    return "\n".join(lines)


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

    def note_width(module: nn.Module, inputs: object, output: Tensor) -> None:
        reached = output.isnan()  # (28, C, H, W), or (28, features) once the image is flattened
        if reached.ndim == 4:
            reached = reached[..., output.shape[-1] // 2]
        seen = reached.flatten(1).any(dim=1).nonzero()
        widths.append(int(seen.max() - seen.min()) + 1 if len(seen) else 0)

    def watch(module: nn.Module) -> None:
        if module is not net and not isinstance(module, nn.Sequential | nn.ModuleList):
            module.register_forward_hook(note_width)

    net.apply(watch)
    with torch.random.fork_rng(devices=[]):  # some networks draw in evaluation mode too: F.dropout is on by default
        net(columns)
    return widths
