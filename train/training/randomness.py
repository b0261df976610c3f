"""The global generators of random numbers: what the user's code draws from them depends on the run and epoch alone."""

import dataclasses
import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor

_CPU = torch.device("cpu")


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python from these numbers, and restore them afterwards.

    Those of torch are that of the CPU and that of the device; of other devices they are left alone.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    before = _states(device)
    _seed(device, int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:12], "big"), digest)
    try:
        yield
    finally:
        _set_states(before, device)


@contextmanager
def seeded_as_by_hand(seed: int) -> Iterator[None]:
    """Seed the generators on the CPU with `seed` itself, as `torch.manual_seed` does, and restore them afterwards."""
    before = _states(_CPU)
    _seed(_CPU, seed, seed % 2**32, seed)
    try:
        yield
    finally:
        _set_states(before, _CPU)


def _seed(device: torch.device, of_torch: int, of_numpy: int, of_python: int | bytes) -> None:
    # torch.manual_seed seeds the generators of all devices.
    torch.default_generator.manual_seed(of_torch)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(of_torch)
    np.random.seed(of_numpy)
    random.seed(of_python)


def _states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of torch's generators of the CPU and of the device, and of those of NumPy and Python."""
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device, np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, ...], device: torch.device) -> None:
    of_cpu, of_device, of_numpy, of_python = states
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


@dataclasses.dataclass(frozen=True)
class Generators:
    """The global generators of one of several runs that take turns.

    Attributes:
        device: of `torch_device`.
        torch_cpu, torch_device, python: their states.
        numpy: NumPy's itself, since copying its state takes as long as a step of a small optimizer.
    """

    device: torch.device
    torch_cpu: Tensor
    torch_device: Tensor | None
    numpy: np.random.BitGenerator
    python: Any

    @staticmethod
    def of(device: torch.device, *numbers: int) -> "Generators":
        """Make generators with the states that `seeded` gives."""
        with seeded(device, *numbers):
            of_cpu, of_device, of_numpy, of_python = _states(device)
        numpy = np.random.MT19937()
        numpy.state = {"bit_generator": "MT19937", "state": {"key": of_numpy[1], "pos": of_numpy[2]}}
        return Generators(device, of_cpu, of_device, numpy, of_python)

    def take_turn(self) -> "Generators":
        """Let these be drawn from; return those that were before, with all that was drawn from them."""
        of_device = None if self.torch_device is None else torch.cuda.get_rng_state(self.device)
        of_numpy = mtrand.get_bit_generator()
        before = Generators(self.device, torch.get_rng_state(), of_device, of_numpy, random.getstate())
        torch.set_rng_state(self.torch_cpu)
        if self.torch_device is not None:
            torch.cuda.set_rng_state(self.torch_device, self.device)
        mtrand.set_bit_generator(self.numpy)
        random.setstate(self.python)
        return before


def forget_normal_number() -> None:
    """Drop the normal number that NumPy has computed ahead, as a turn of `Generators` does."""
    mtrand.set_bit_generator(mtrand.get_bit_generator())


def random_bytes(device: torch.device) -> bytes:
    """Return bytes that are others once a number was drawn."""
    of_torch, of_device, *others = _states(device)
    return pickle.dumps((of_torch.numpy(), None if of_device is None else of_device.numpy(), others))
