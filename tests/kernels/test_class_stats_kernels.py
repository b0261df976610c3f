"""Both kernels of class statistics against the reference in float64: the CPU's as it runs, the GPU's in Triton's
interpreter.

There the scatter is held to less: it is made of bfloat16 halves, which the interpreter cuts off where the GPU rounds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from class_stats_cases import (
    MOMENTS,
    Add,
    Project,
    add_cpu,
    add_triton,
    batch,
    check,
    copied,
    empty,
    in_float64,
    project_cpu,
    project_triton,
    same_bits,
)
from ncollapse.kernels.class_stats import gpu
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, project_reference

KERNELS = [pytest.param("cpu", marks=pytest.mark.compiled), "triton"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernel is tested on it (tests/gpu)")
    return request.param


@pytest.fixture
def add(kernel: str) -> Add:
    return {"cpu": add_cpu, "triton": add_triton}[kernel]


def both(add: Add, state: State, *batches: tuple[Tensor, Tensor], propagate: bool = False) -> State:
    """Add the batches by a kernel; compare with float64, and return what that says."""
    expected = in_float64(state)
    for features, labels in batches:
        add(features, labels, state, propagate)
        if features.dtype == torch.float64:  # is rounded to what the sums are
            features = features.to(state.shifts.dtype)
        class_stats_reference(features, labels, expected, propagate)
        check(state, expected, scatter=5e-5 if add is add_triton else None)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("rows", "classes", "dim"), [(100, 10, 40), (70, 3, 130), (1, 2, 1), (65, 2, 1), (40, 150, 30), (130, 37, 65)]
)
def test_odd_shapes(add: Add, rows: int, classes: int, dim: int, moment: str, dtype: torch.dtype) -> None:
    both(add, empty(classes, dim, moment), *(batch(rows, classes, dim, dtype=dtype) for _ in range(2)))


@pytest.mark.compiled
@pytest.mark.parametrize("moment", MOMENTS)
def test_sums_in_float64(moment: str) -> None:
    state = empty(5, 20, moment, dtype=torch.float64)
    expected = copied(state)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features, labels = batch(600, 5, 20, dtype=dtype, noise=1e-3)
        add_cpu(features, labels, state, False)
        class_stats_reference(features, labels, expected)
    check(state, expected, 1e-13)


@pytest.mark.parametrize("moment", MOMENTS)
def test_batches_of_one_and_of_none_and_a_class_without_samples(add: Add, moment: str) -> None:
    features, labels = batch(9, 5, 12)
    labels[labels == 3] = 2
    rest = [(features[:0], labels[:0]), *zip(features.split(1), labels.split(1), strict=True)]
    expected = both(add, empty(5, 12, moment), *rest, (features[:0], labels[:0]))
    assert expected.counts.sum() == 9
    assert expected.counts[3] == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_sorted_batches(add: Add, moment: str) -> None:
    """A class is first seen batches after the others; a part of a batch has a few of many classes."""
    features, labels = batch(1500, 150, 20)
    order = labels.argsort()
    features, labels = features[order], labels[order]
    both(add, empty(150, 20, moment), *zip(features.split(700), labels.split(700), strict=True))


@pytest.mark.parametrize("moment", MOMENTS)
def test_layouts(add: Add, moment: str) -> None:
    h, y = batch(60, 4, 48)
    maps = torch.randn(60, 12, 2, 2).to(memory_format=torch.channels_last).flatten(1)
    wide = torch.empty(60, 100)
    wide[:, 3:51] = h
    for features, labels in (
        (h.T.contiguous().T, y),
        (maps, y),
        (wide[:, 3:51], y),
        (h[::2], y[::2]),
        (h[:, ::2], y),
        (h[:1].expand(60, 48), y),
        (h, y.repeat_interleave(2)[::2]),
    ):
        state = empty(4, features.shape[1], moment)
        both(add, state, (features, labels.contiguous()))


@pytest.mark.parametrize("layout", ["runs first", "samples first"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stacked_runs(add: Add, moment: str, layout: str) -> None:
    features, labels = batch(130, 6, 20, runs=3)
    features += 10 * torch.arange(3).view(3, 1, 1)
    if layout == "samples first":
        features = features.transpose(0, 1).contiguous().transpose(0, 1)
    both(add, empty(6, 20, moment, runs=3), (features[:, :60], labels[:60]), (features[:, 60:], labels[60:]))


@pytest.mark.parametrize("moment", MOMENTS)
def test_near_collapse_far_from_the_origin(add: Add, moment: str) -> None:
    """Noise of 1e-3 at an offset of 1,000: of the squares themselves float32 would keep no digit."""
    both(add, empty(5, 40, moment), *(batch(200, 5, 40, noise=1e-3, offset=1000.0) for _ in range(3)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_more_samples_than_go_into_one_product(add: Add, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last product of a call, and the last call, are not full."""
    monkeypatch.setattr(gpu, "PRODUCT", 64)
    monkeypatch.setattr(gpu, "PRODUCTS", 3)
    monkeypatch.setattr("ncollapse.kernels.class_stats.cpu._ROWS", 64)
    for runs in (None, 2):
        both(add, empty(4, 20, moment, runs=runs), batch(500, 4, 20, runs=runs), batch(100, 4, 20, runs=runs))


@pytest.mark.parametrize("moment", MOMENTS)
def test_features_that_make_more_than_one_block_of_the_scatter(add: Add, moment: str) -> None:
    both(add, empty(3, 700, moment), batch(90, 3, 700))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_batch_that_is_refused_changes_nothing_but_refused(add: Add, moment: str) -> None:
    features, labels = batch(1200, 5, 30)
    state = empty(5, 30, moment)
    both(add, state, (features, labels.clamp(max=3)))
    before = copied(state)
    bad = features.clone()
    bad[700, 7], bad[1100, 29], bad[3, 0] = float("nan"), float("inf"), -float("inf")
    for h, y, propagate in ((bad, labels, False), (features, labels - 1, False), (features, labels + 1, True)):
        add(h, y, state, propagate)
    counted = [3, int(((labels == 0) | (labels == 4)).sum()), 3]
    assert state.refused.tolist() == counted
    # Only the shift of a class of which there is still no sample may be another one.
    assert same_bits(state._replace(refused=before.refused, shifts=before.shifts), before)
    assert torch.equal(state.shifts[:4], before.shifts[:4])
    both(add, state, (features, labels))
    assert state.refused.tolist() == counted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_spoil_their_run_alone(add: Add, value: float) -> None:
    features, labels = batch(300, 4, 30, runs=2)
    features[1, 50, 7] = value
    state = empty(4, 30, "full", runs=2)
    expected = in_float64(state)
    add(features, labels, state, True)
    class_stats_reference(features, labels, expected, True)
    assert torch.equal(state.counts, expected.counts)
    assert state.refused.tolist() == [0, 0, 0]
    assert state.scatter is not None
    # In the reference all classes of the run are NaN where a value is, in a kernel perhaps that of the value alone.
    k = int(labels[50])
    for broken in (state.sums[1, k, 7], state.squares[1, k], state.scatter[1, 7, 7]):
        assert not broken.isfinite()
    whole = State._make(t if t is None or t.dim() < 2 else t[0] for t in state)
    check(whole, State._make(t if t is None or t.dim() < 2 else t[0] for t in expected), scatter=5e-5)


@pytest.fixture
def project(kernel: str) -> Project:
    return {"cpu": project_cpu, "triton": project_triton}[kernel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("many", [1, 3, 9, 40, 70])
@pytest.mark.parametrize("runs", [None, 2])
def test_projections(project: Project, runs: int | None, many: int, dtype: torch.dtype) -> None:
    features, labels = batch(130, 5, 75, runs=runs, dtype=dtype)
    lead = () if runs is None else (runs,)
    shifts, axes = torch.randn(*lead, 5, 75), torch.randn(*lead, many, 75)
    out = project(features, labels, shifts, axes)
    expected = project_reference(features, labels, shifts.double(), axes.double())
    assert out.dtype == torch.float32
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    assert project(features[..., :0, :], labels[:0], shifts, axes).shape == (*lead, 0, many)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_bits_every_time(add: Add, moment: str) -> None:
    """Whatever the number of threads."""
    batches = [batch(3000, 7, 33) for _ in range(2)] if add is add_cpu else [batch(300, 7, 33)]
    states = []
    threads = torch.get_num_threads()
    for many in (1, 2, 2):
        states.append(empty(7, 33, moment))
        try:
            torch.set_num_threads(many)
            for features, labels in batches:
                add(features, labels, states[-1], False)
        finally:
            torch.set_num_threads(threads)
    # The matrix library promises equal bits for an equal number of threads only.
    assert same_bits(states[1], states[2])
    if moment != "full":
        assert same_bits(states[0], states[1])


@pytest.mark.compiled
@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 1500),
    classes=st.integers(2, 50),
    dim=st.integers(1, 600),
    moment=st.sampled_from(MOMENTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    noise=st.sampled_from([1.0, 1e-2, 1e-4]),
    offset=st.sampled_from([0.0, 50.0, 1000.0]),
    order=st.sampled_from(["random", "sorted"]),
    size=st.sampled_from([1, 7, 64, 2000]),
    seed=st.integers(0, 999),
)
def test_any_batches(
    rows: int, classes: int, dim: int, moment: str, dtype: torch.dtype, noise: float, offset: float, order: str,
    size: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    features, labels = batch(rows if size > 7 else rows // 20, classes, dim, dtype=dtype, noise=noise, offset=offset)
    if order == "sorted":
        features, labels = features[labels.argsort()], labels.sort().values
    state = empty(classes, dim, moment)
    expected = in_float64(state)
    for h, y in zip(features.split(size), labels.split(size), strict=True):
        add_cpu(h, y, state, False)
        class_stats_reference(h, y, expected, False)
    check(state, expected, 1e-5)
    assert int(state.counts.sum()) == len(labels)
