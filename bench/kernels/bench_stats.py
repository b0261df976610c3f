"""NC1 of features `[N, d]` of K classes: N × d × K × moment, beside what one writes in plain PyTorch."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.kernels.conftest import DEVICE
from bench.stats_cases import BASELINE, SAME, WAYS, Case, Features

#: Relative, of NC1 near collapse; ours from float64. What plain PyTorch loses there is recorded as `error`.
_EXACT = 1e-4
#: Relative, of features that are easy to sum (a tenth of the class means' norm about them, around zero); all ways.
_SAME = {"fp32": 1e-3, "bf16": 2e-2}
_FEW = 2000
_READS = {"nc full": 1, "nc projected": 2, "nc trace": 1, "read": 1}


def cases(device: str, *, everything: bool) -> list[tuple[Case, tuple[str, ...]]]:
    names = ("nc full", "nc projected", "nc trace", BASELINE, "read")
    if everything:
        sizes = (10_000, 60_000, *([500_000] if device == "cuda" else []))
        dims, classes = (512, 2048), (10, 100)
        found = [Case(n, d, k, dtype=t) for n in sizes for d in dims for k in classes for t in ("fp32", "bf16")]
        return [(case, (*names, "one pass")) for case in found]
    found = [Case(10_000, 128), Case(10_000, 512), Case(10_000, 512, classes=100), Case(10_000, 512, dtype="bf16")]
    return [(case, names) for case in found]


def marks(name: str) -> list[pytest.MarkDecorator]:
    return []


class Prepared:
    """Features near collapse, to be timed on, and few that are easy to sum, for the check."""

    def __init__(self, case: Case) -> None:
        self.data = Features(case, DEVICE)
        self.easy = Features(replace(case, samples=_FEW), DEVICE, noise=1.0, offset=0.0)


def test_nc1(case: Case, name: str, prepared: Callable[[Case], Prepared], timed: Callable[..., None]) -> None:
    made, way = prepared(case), WAYS[name]
    data = made.data
    errors = {}
    if name in SAME:
        apart = abs(float(way(made.easy)) / made.easy.truth - 1)
        assert apart <= _SAME[case.dtype], f"{name} is {apart:.1e} from float64 on features that are easy to sum"
        errors["error"] = float(f"{float(way(data)) / data.truth - 1:.1e}")
        assert not name.startswith("nc") or abs(errors["error"]) <= _EXACT, f"{name} is {errors['error']} from float64"
    read = sum(h.nbytes for h, _ in data.batches)
    moved = _READS[name] * read if name in _READS else None
    timed(f"{case}: NC1", name, lambda: way(data), moved, **errors)
