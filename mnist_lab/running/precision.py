"""What float32 means on a GPU."""

from __future__ import annotations

import torch


def use_float32(device: torch.device) -> None:
    """Let convolutions and matrix products on a CUDA device compute in float32, not in TF32, which has 10 bits for 23.

    torch's own default for convolutions is TF32.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
