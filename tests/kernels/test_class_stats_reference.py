"""The reference of class statistics against its definition, sample by sample in NumPy; merging and moving shifts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from class_stats_cases import MOMENTS, batch, check, copied, empty, in_float64, same_bits
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, moved, project_reference
from ncollapse.moments import merge, within


def defined(state: State, features: Tensor, labels: Tensor) -> State:
    """Return the statistics of samples about the shifts of a state, sample by sample in float64; no stacked runs."""
    counts, shifts, sums, squares, scatter, axes, refused = (
        None if t is None else t.numpy().copy() for t in in_float64(state)
    )
    for total in (counts, sums, squares, scatter):
        if total is not None:
            total[...] = 0
    for h, y in zip(features.double().numpy(), labels.tolist(), strict=True):
        z = h - shifts[y]
        counts[y] += 1
        sums[y] += z
        squares[y] += z @ z
        if scatter is not None:
            p = z if axes is None else axes @ z
            scatter += np.outer(p, p)
    return State._make(
        None if t is None else torch.from_numpy(t) for t in (counts, shifts, sums, squares, scatter, axes, refused)
    )


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 60),
    classes=st.integers(2, 20),
    dim=st.integers(1, 30),
    moment=st.sampled_from(MOMENTS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_it_equals_its_definition(
    rows: int, classes: int, dim: int, moment: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    double = dtype == torch.float64
    state = empty(classes, dim, moment, dtype=torch.float64 if double else torch.float32)
    features, labels = batch(2 * rows, classes, dim, dtype=dtype)
    for h, y in zip(features.split(max(rows, 1)), labels.split(max(rows, 1)), strict=True):
        class_stats_reference(h, y, state)
    check(state, defined(state, features, labels), 1e-13 if double else 1e-5)


@pytest.mark.parametrize("moment", MOMENTS)
def test_each_stacked_run_equals_a_run_alone(moment: str) -> None:
    features, labels = batch(50, 4, 6, runs=3)
    features[1] = float("nan")
    state = empty(4, 6, moment, runs=3)
    class_stats_reference(features, labels, state, propagate=True)
    for run in range(3):
        alone = empty(4, 6, moment)
        if state.axes is not None:
            alone = alone._replace(axes=state.axes[run])
        class_stats_reference(features[run], labels, alone, propagate=True)
        of_run = (t if t is None or n in ("counts", "refused") else t[run] for n, t in state._asdict().items())
        check(State._make(of_run), in_float64(alone), 1e-6)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_refused_batch_changes_the_count_of_refusals_alone(moment: str) -> None:
    features, labels = batch(40, 5, 3)
    state = empty(5, 3, moment)
    class_stats_reference(features[:20], labels[:20].clamp(max=3), state)
    before = copied(state)
    bad = features.clone()
    bad[7], bad[9, 1] = float("inf"), float("nan")
    class_stats_reference(bad, labels, state)
    class_stats_reference(features, labels - 1, state, propagate=True)
    wrong = int((labels == 0).sum())
    assert state.refused.tolist() == [2, wrong, 4]
    assert same_bits(state._replace(refused=before.refused), before)
    class_stats_reference(bad, labels, state, propagate=True)
    assert state.refused.tolist() == [2, wrong, 4]
    assert state.squares.isnan().any()


def test_projections() -> None:
    features, labels = batch(30, 4, 7, runs=2, dtype=torch.float16)
    shifts, axes = torch.randn(2, 4, 7), torch.randn(2, 3, 7)
    out = project_reference(features, labels, shifts, axes)
    expected = torch.einsum("rmd,rbd->rbm", axes.double(), features.double() - shifts.double()[:, labels])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def state_of(features: Tensor, labels: Tensor, moment: str, runs: int | None = None) -> State:
    state = empty(6, features.shape[-1], moment, runs=runs, dtype=torch.float64)
    class_stats_reference(features, labels, state)
    return state


@pytest.mark.parametrize("runs", [None, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_moving_shifts_and_merging_change_rounding_alone(moment: str, runs: int | None) -> None:
    features, labels = batch(90, 6, 5, runs=runs, dtype=torch.float64, offset=50.0)
    labels[30:60].clamp_(max=3)  # this part lacks classes
    labels[labels == 5] = 4  # all parts lack this class
    together = state_of(features, labels, moment, runs)
    parts = [state_of(h, y, moment, runs) for h, y in zip(features.split(30, -2), labels.split(30), strict=True)]
    for order in ((0, 1, 2), (1, 2, 0)):
        merged = empty(6, 5, moment, runs=runs, dtype=torch.float64)
        for i in order:
            merge(merged, parts[i])
        # Sums about different shifts are compared after a move to the same ones.
        of_both = [moved(s, together.shifts) for s in (merged, together)]
        assert torch.equal(of_both[0].counts, together.counts)
        for name in ("sums", "squares", "scatter"):
            ours, theirs, start = (getattr(s, name) for s in (*of_both, together))
            if start is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-9)
                torch.testing.assert_close(theirs, start, rtol=1e-11, atol=1e-9)


def test_the_covariance_needs_half_of_the_scatter() -> None:
    features, labels = batch(200, 6, 5, dtype=torch.float64)
    full, axes = state_of(features, labels, "full"), state_of(features, labels, "projected")
    assert full.scatter is not None
    assert axes.axes is not None
    full.scatter.copy_(full.scatter.tril() + torch.full((5, 5), 77.0).triu(1))
    residuals = features.clone()
    for k in range(6):
        residuals[labels == k] -= residuals[labels == k].mean(0)
    expected = residuals.T @ residuals / 200
    torch.testing.assert_close(within(full, None), expected, rtol=1e-10, atol=1e-10)
    directions = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(within(full, directions), directions @ expected @ directions.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(within(axes, None), axes.axes @ expected @ axes.axes.T, rtol=1e-10, atol=1e-10)
