"""Objectives: what training minimises where that needs the network or the images. Each is meant to be read and copied.

An objective maps the network, a batch of normalised images (N, 1, 28, 28) and labels, (N,) or probabilities (N, 10), to
the loss, a scalar, and the logits (N, 10), which the training accuracy is counted by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta


def mixup(net: nn.Module, images: Tensor, labels: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Train on mixtures of two images each, and on their labels in the same shares.

    Each image is mixed with another by a share of its own, drawn from Beta(alpha, alpha), the larger share being its
    own. Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, https://arxiv.org/abs/1710.09412
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha!r} is not above 0")
    shares = Beta(images.new_full((), alpha), images.new_full((), alpha), validate_args=False).sample((len(images),))
    shares = torch.maximum(shares, 1 - shares)  # (N,)
    partners = torch.randperm(len(images), device=images.device)
    logits = net(torch.lerp(images[partners], images, shares.view(-1, 1, 1, 1)))
    own = F.cross_entropy(logits, labels, reduction="none")
    others = F.cross_entropy(logits, labels[partners], reduction="none")
    return torch.lerp(others, own, shares).mean(), logits


def distillation(
    net: nn.Module, images: Tensor, labels: Tensor, *, teacher: nn.Module, temperature: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Train with `weight` to match a teacher's output, and with the rest to match the labels.

    Both networks' logits are divided by the temperature; the teacher's part of the loss is multiplied by its square,
    which keeps the size of its gradients. Hinton et al., Distilling the Knowledge in a Neural Network, 2015,
    https://arxiv.org/abs/1503.02531

    teacher: declared as text, e.g. "runs:/<id>/model"; see `Experiment`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} is not above 0")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight!r} is not between 0 and 1")
    logits = net(images)
    with torch.no_grad():
        taught = F.log_softmax(teacher(images) / temperature, dim=1)
    divergence = F.kl_div(F.log_softmax(logits / temperature, dim=1), taught, reduction="batchmean", log_target=True)
    return weight * temperature**2 * divergence + (1 - weight) * F.cross_entropy(logits, labels), logits
