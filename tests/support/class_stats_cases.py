"""Batches of features and states of class statistics, for the tests of their kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

import interpreter
from ncollapse.kernels.class_stats import cpu
from ncollapse.kernels.class_stats.reference import State, moved

#: Adds features and labels to a state in place; the last argument is `propagate`.
Add = Callable[[Tensor, Tensor, State, bool], None]
Project = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
add_cpu: Add = cpu.add_batch
project_cpu: Project = cpu.project
MOMENTS = ("full", "projected", "trace")


def empty(
    classes: int,
    dim: int,
    moment: str = "full",
    *,
    runs: int | None = None,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> State:
    """Return statistics of no samples; "projected" has at most `count` orthonormal axes, the same for each `dim`."""
    axes = None
    if moment == "projected":
        lead = () if runs is None else (runs,)
        g = torch.Generator().manual_seed(dim)
        axes = torch.linalg.qr(torch.randn(*lead, dim, min(count, dim), generator=g)).Q.mT
    scatter = moment != "trace"
    return State.empty(classes, dim, runs=runs, scatter=scatter, axes=axes, dtype=dtype, device=device)


def batch(
    rows: int,
    classes: int,
    dim: int,
    *,
    runs: int | None = None,
    dtype: torch.dtype = torch.float32,
    noise: float = 1.0,
    offset: float = 20.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return features `[B, d]` or `[R, B, d]` and labels `[B]`; class means are normal around `offset`."""
    lead = () if runs is None else (runs,)
    labels = torch.randint(classes, (rows,))
    means = offset + torch.randn(classes, dim, generator=torch.Generator().manual_seed(classes * dim)).double()
    features = means[labels] + noise * torch.randn(*lead, rows, dim, dtype=torch.float64)
    return features.to(device, dtype), labels.to(device)


def add_triton(features: Tensor, labels: Tensor, state: State, propagate: bool = False) -> None:
    """Add by the Triton kernels, on a GPU or in the interpreter."""
    from ncollapse.kernels.class_stats import gpu

    with interpreter.quiet():
        gpu.add_batch(features, labels, state, propagate)


def project_triton(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """Project by the Triton kernel, on a GPU or in the interpreter."""
    from ncollapse.kernels.class_stats import gpu

    with interpreter.quiet():
        return gpu.project(features, labels, shifts, axes)


def in_float64(state: State) -> State:
    """Copy a state to the CPU in float64."""
    return State._make(
        None if t is None else t.cpu().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True) for t in state
    )


def copied(state: State) -> State:
    return State._make(None if t is None else t.clone() for t in state)


def check(state: State, expected: State, tolerance: float = 3e-6, scatter: float | None = None) -> None:
    """Raise AssertionError unless integers are equal, and sums about the same shifts within a relative bound.

    Args:
        tolerance: bound of ‖difference‖ / ‖expected‖ for each tensor.
        scatter: the bound for the scatter, of which the lower triangle is compared; `tolerance` by default.
    """
    # Shifts that have moved differ by rounding.
    torch.testing.assert_close(state.shifts.cpu().double(), expected.shifts, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name, ours, theirs in zip(State._fields, moved(in_float64(state), expected.shifts), expected, strict=True):
        if theirs is None:
            assert ours is None, name
            continue
        if name == "scatter":
            ours, theirs = ours.tril(), theirs.tril()
        if name in ("counts", "shifts", "axes", "refused"):
            assert torch.equal(ours.nan_to_num(7.5), theirs.nan_to_num(7.5)), f"{name}: {ours} is not {theirs}"
            continue
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
        bound = scatter if name == "scatter" and scatter is not None else tolerance
        error, size = ((t.nan_to_num(0, 0, 0)).norm() for t in (ours - theirs, theirs))
        assert error <= bound * size + 1e-30, f"{name}: relative error {error / size:.1e}"


def same_bits(a: State, b: State) -> bool:
    """Whether two states have the same bits."""
    pairs = zip(a, b, strict=True)
    return all(s is t or (s is not None and t is not None and torch.equal(s, t)) for s, t in pairs)
