"""Random transforms: float images (N, 1, H, W) in [0, 1] in and out, with a draw of its own for each image."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def random_rotation(images: Tensor, degrees: float) -> Tensor:
    """Rotate each image about its centre by its own angle, drawn uniformly from [-degrees, degrees]."""
    _check_range(degrees=degrees)
    return rotate(images, torch.empty(len(images), device=images.device).uniform_(-degrees, degrees))


def random_affine(images: Tensor, degrees: float, shift: float, scale: float) -> Tensor:
    """Rotate, scale and shift each image about its centre, uniformly within +-degrees, 1 +- scale, +-shift pixels."""
    _check_range(degrees=degrees, shift=shift)
    if not 0 <= scale < 1:
        raise ValueError(f"scale={scale!r} is not at least 0 and below 1")
    draws = torch.empty(4, len(images), device=images.device).uniform_(-1, 1)
    return affine(images, draws[0] * degrees, 1 + draws[1] * scale, draws[2:] * shift)


def _check_range(**ranges: float) -> None:
    for name, value in ranges.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} is not a finite number of 0 or more")


def random_center_crop(images: Tensor, size: int, p: float) -> Tensor:
    """With probability p, drawn for each image, cut out the central (size, size) and scale it up to the whole.

    The same as torchvision's `functional.center_crop` and `functional.resize` (bilinear) on each image.
    """
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size={size!r} is not between 1 and {min(height, width)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p={p!r} is not between 0 and 1")
    top, left = round((height - size) / 2), round((width - size) / 2)
    crops = images[..., top : top + size, left : left + size]
    scaled = F.interpolate(crops, size=(height, width), mode="bilinear", align_corners=False)
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < p, scaled, images)


def affine(images: Tensor, angles: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """Rotate square images (N, C, S, S) counter-clockwise, scale them, and shift them right and down.

    The same as torchvision's `functional.affine(image, -angle, shift, scale, shear=0, InterpolationMode.BILINEAR)`.
    angles, scales: (N,), in degrees, and as factors. shifts: (2, N), in pixels: to the right, and down.
    """
    size = images.shape[-1]
    assert images.shape[-2] == size, "rotation by a shared grid needs square images"
    across, down = (shifts * (2 / size)).view(2, -1, 1, 1)
    factors, radians = scales.view(-1, 1, 1), (angles * (math.pi / 180)).view(-1, 1, 1)
    # Pixel centres in grid_sample's coordinates (align_corners=False): -1 and 1 are the image's outer edges.
    centres = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)
    x, y = (centres.view(1, 1, size) - across) / factors, (centres.view(1, size, 1) - down) / factors
    cos, sin = radians.cos(), radians.sin()
    # The inverse rotation, with y pointing down.
    grid = torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1)  # (N, S, S, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate square images (N, C, S, S) counter-clockwise by angles (N,) in degrees: bilinear, filled with 0."""
    return affine(images, angles, torch.ones_like(angles), angles.new_zeros(2, len(angles)))


def image_by_image(images: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a transform to each image (1, H, W) alone, so that it draws for each: far slower than a batch at once."""
    return torch.stack([transform(image) for image in images])
