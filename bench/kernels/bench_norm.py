"""Batch norm with ReLU, and pooling or a residual, forward and backward. On a CPU ncollapse has no kernel for it."""

import functools
from collections.abc import Callable

import pytest

from bench.batch_norm_times import BASELINE, COMPILED, RESNET9, TOLERANCE, Case, Maps, candidates, differences
from bench.kernels.conftest import DEVICE


def cases(device: str, *, everything: bool) -> list[tuple[Case, tuple[str, ...]]]:
    names = ("nc", BASELINE, *([COMPILED] if everything else []))
    samples, dtype = (128, "bf16") if device == "cuda" else (16, "fp32")
    layers = RESNET9 if everything else [RESNET9[i] for i in (0, 1, 3, 6)]
    return [(Case(samples, channels, size, kind, dtype), names) for channels, size, kind in layers]


def marks(name: str) -> list[pytest.MarkDecorator]:
    absent = name == "nc" and DEVICE == "cpu"
    return [pytest.mark.skip(reason="no batch-norm kernel on a CPU: nc runs torch's operations")] if absent else []


def test_batch_norm(case: Case, name: str, prepared: Callable[[Case], Maps], timed: Callable[..., None]) -> None:
    maps, way = prepared(case), candidates(compiled=name == COMPILED)[name]
    apart = differences(maps, {name: way}, TOLERANCE[case.dtype])[name]
    timed(f"batch norm {case}", name, lambda: maps.step(way), maps.step_bytes, difference=apart)


Prepared = functools.partial(Maps, device=DEVICE)
