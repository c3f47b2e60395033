"""The model summary: each layer with its output, parameters and receptive field."""

import copy
from collections.abc import Collection

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mnist_lab.checking.network import listed
from mnist_lab.errors import text_of
from mnist_lab.training.loop import num_params, numbers_in
from mnist_lab.training.states import kept_generators

IMAGE_SIZE = 28
HEADERS = ("Layer (type)", "Output shape", "Param #", "Receptive field")
Calls = list[tuple[nn.Module, str, int | None]]  # each a layer, the shape of its output, and its receptive field


def summarize(net: nn.Module, untrained: Collection[str] = ()) -> str:
    """Return a table of the layers in the order of their calls, and the parameters, each of which counts once.

    A network that fails on the images that measure receptive fields has none in its table. Network and random state
    are left as they were.
    untrained: names of parameters that no gradient reaches; they do not count as trainable.
    """
    # Number i has NaN in its column i, for NaN spreads to all that depends on it. In double precision kernels are
    # plain: no tile of neighbours shares a NaN.
    marked = torch.zeros(IMAGE_SIZE, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    marked[torch.arange(IMAGE_SIZE), :, :, torch.arange(IMAGE_SIZE)] = torch.nan
    said = ""
    with kept_generators(next(net.parameters()).device):  # some networks draw in evaluation mode too
        plain = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
        for images in (marked, plain):
            try:
                copied = copy.deepcopy(net).to("cpu", images.dtype)
                copied.eval()  # which a script's own may return nothing from
                for name, parameter in copied.named_parameters():
                    parameter.requires_grad_(parameter.requires_grad and name not in untrained)
                return _table(copied, _calls(copied, images))
            except Exception as error:
                said = f"No model summary: {type(error).__name__}: {text_of(error)}."
    return said


@torch.no_grad()
def _calls(net: nn.Module, images: Tensor) -> Calls:
    calls: Calls = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if module is not net and not isinstance(module, nn.Sequential | nn.ModuleList):
            calls.append((module, _shape(output), _field(output)))

    with register_module_forward_hook(note):
        net(images)
    return calls


def _field(output: object) -> int | None:
    """Return the field of the output in the middle, from its first column to its last; at most 28 pixels."""
    if not isinstance(output, Tensor) or len(output) != IMAGE_SIZE:
        return None
    reached = output.isnan()  # (28, C, H, W), or (28, features) once the image is flattened
    if reached.ndim == 4:
        reached = reached[..., output.shape[-1] // 2]
    seen = reached.flatten(1).any(dim=1).nonzero()
    return int(seen.max() - seen.min()) + 1 if len(seen) else 0


def _table(net: nn.Module, calls: Calls) -> str:
    called = {module for module, _, _ in calls}
    counted: set[int] = set()
    rows = []
    for number, (module, shape, field) in enumerate(calls, start=1):
        # A part that is never called is this layer's own, such as the projection in an attention layer.
        parts = [module, *(part for part in module.modules() if part not in called)]
        mine = {id(p): p.numel() for part in parts for p in part.parameters(recurse=False) if id(p) not in counted}
        counted |= mine.keys()
        size = "-" if field is None else f"{field}x{field}"
        rows.append((f"{type(module).__name__}-{number}", shape, f"{sum(mine.values()):,}", size))
    total, trainable = numbers_in(net.parameters()), num_params(net)
    lines = [
        tabulate(rows, HEADERS, colalign=("left", "left", "right", "right")) if rows else "No layers.",
        f"Total params: {total:,}",
        f"Trainable params: {trainable:,}",
        f"Non-trainable params: {total - trainable:,}",
    ]
    if others := [f"{name} ({p.numel():,})" for name, p in net.named_parameters() if id(p) not in counted]:
        lines.append(f"{listed(others)}: in none of these layers.")
    return "\n".join(lines)


def _shape(output: object) -> str:
    """Return the shape of a layer's output for an image, e.g. "[10, 28, 28]", or of all in a tuple, else its type."""
    if isinstance(output, Tensor):
        return str(list(output.shape[1:]))
    return f"({', '.join(map(_shape, output))})" if isinstance(output, list | tuple) else type(output).__name__
