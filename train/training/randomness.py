"""The global generators of random numbers: what the user's code draws from them depends on the run and epoch alone."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python from these numbers, and restore them afterwards."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    before = torch_states(device), np.random.get_state(), random.getstate()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(digest)
    try:
        yield
    finally:
        set_torch_states(before[0], device)
        np.random.set_state(before[1])
        random.setstate(before[2])


def torch_states(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators of the CPU and of the device."""
    return torch.get_rng_state(), *((torch.cuda.get_rng_state(device),) if device.type == "cuda" else ())


def set_torch_states(states: tuple[Tensor, ...], device: torch.device) -> None:
    """Set the states that `torch_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
