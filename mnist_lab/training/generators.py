"""The generators that a run draws from unless its script makes its own: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed Python's `random`, numpy's global generator, and torch's on every device; seed: from 0 to 2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global one is what others draw from
    torch.manual_seed(seed)


def drawn_unseeded() -> bool:
    """Say whether numbers were drawn from torch's generator before anything seeded it.

    torch begins with a seed of 64 random bits; a smaller one is taken for somebody's own.
    """
    seed = torch.initial_seed()
    if seed < 2**32:
        return False
    return not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of these generators, as tensors and plain values; of torch's, the CPU's and the device's."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.tensor(keys.tolist(), device="cpu"), *rest),  # type: ignore[union-attr]
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to what `generator_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn within this context."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)
