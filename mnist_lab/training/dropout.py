"""Dropout that draws where the zeros fall, not one number per element: the same distribution, sooner on a CPU."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Above this probability there are so many zeros that one draw per element is as fast.
MAX_P = 0.25


class SparseDropout(TorchFunctionMode):
    """Within this context, `F.dropout` (and so `nn.Dropout`) on CPU tensors finds its zeros by the gaps between them.

    The gaps between the zeros of independent draws are geometrically distributed, so drawing the gaps gives the same
    masks with the same probabilities from p times as many random numbers of torch's default generator.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout and _runs_once_as_written():
            func = _dropout
        return func(*args, **(kwargs or {}))


def _runs_once_as_written() -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False  # torch.compile and torch.func rewrite what is called, with torch's own functions
    # torch.utils.checkpoint calls a part again, backwards, where no context holds, and both calls must draw the same
    # zeros. It makes the first without gradients, or saves tensors in its own way.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None and torch.is_grad_enabled()


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and not inplace and 0 < p <= MAX_P and input.device.type == "cpu" and input.numel():
        return _DropoutByGaps.apply(input, p)  # type: ignore[no-any-return]
    return F.dropout(input, p, training, inplace)


def draw_zeros(total: int, p: float) -> Tensor:
    """Return the indices, in rising order, that `total` independent draws with probability p choose: int64 (K,).

    A gap is geometric: floor(E / -log(1 - p)) + 1 for an exponential E of rate 1 (inversion; Devroye, Non-Uniform
    Random Variate Generation, 1986, chapter X.2).
    """
    rate = -math.log1p(-p)
    at_once = int(total * p + 6 * math.sqrt(total * p) + 10)  # more than enough but once in a billion times
    parts: list[Tensor] = []
    last = -1.0
    while last < total:
        gaps = torch.empty(at_once, device="cpu").exponential_(rate).floor_().add_(1)
        parts.append(gaps.cumsum(0, dtype=torch.float64).add_(last))  # float64 counts exactly up to 2^53
        last = parts[-1][-1].item()
    drawn = parts[0] if len(parts) == 1 else torch.cat(parts)
    return drawn[: int(torch.searchsorted(drawn, float(total)))].long()


class _DropoutByGaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        ctx.scale = 1 / (1 - p)
        ctx.zeros = draw_zeros(input.numel(), p)
        return _scale_and_zero(input, ctx.scale, ctx.zeros)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scale_and_zero(grad, ctx.scale, ctx.zeros), None


def _scale_and_zero(images: Tensor, scale: float, zeros: Tensor) -> Tensor:
    """Return the scaled tensor with zeros at these places, which are counted as channels_last stores images.

    So one seed drops the same ones of images (N, C, H, W), whatever their layout is, which stays.
    """
    if not images.is_contiguous():
        images = images.contiguous(memory_format=torch.channels_last if images.ndim == 4 else torch.contiguous_format)
    scaled = torch.mul(images, scale)
    by_place = scaled.permute(0, 2, 3, 1) if images.ndim == 4 else scaled  # images: (N, H, W, C)
    if by_place.is_contiguous():
        by_place.view(-1).index_fill_(0, zeros, 0.0)
    else:
        by_place[torch.unravel_index(zeros, by_place.shape)] = 0.0
    return scaled
