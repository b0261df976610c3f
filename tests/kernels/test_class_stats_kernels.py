"""The kernels of class statistics against the reference in float64: C++, Triton in its interpreter and on a GPU.

The second moment (`scatter`) has a looser bound with Triton. It is a product of bfloat16 halves: the interpreter
truncates them where a GPU rounds (5e-5), and tensor cores keep fewer digits when they accumulate (4e-6 was seen).
"""

import subprocess
import sys

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
from devices import Backend, backend_fixture, cases, only
from ncollapse.kernels.class_stats import gpu
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, project_reference

BACKENDS = ("cpu", "interpreter", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Bounds of the relative error of the scatter; None is the bound of the other sums.
SCATTER = {"cpu": None, "interpreter": 5e-5, "cuda": 1e-5}


backend = backend_fixture(*BACKENDS)


@pytest.fixture
def add(backend: Backend) -> Add:
    return add_cpu if backend.name == "cpu" else add_triton


@pytest.fixture
def project(backend: Backend) -> Project:
    return project_cpu if backend.name == "cpu" else project_triton


class Both:
    """Adds batches with a kernel and with the float64 reference on the CPU, and compares."""

    def __init__(self, backend: Backend, add: Add) -> None:
        self.add, self.bound = add, SCATTER[backend.name]

    def __call__(self, state: State, *batches: tuple[Tensor, Tensor]) -> State:
        """Return the reference's state."""
        expected = in_float64(state)
        for features, labels in batches:
            self.add(features, labels, state, False)
            # A kernel rounds float64 features to the dtype of the sums.
            h = features.cpu().to(state.shifts.dtype) if features.dtype == torch.float64 else features.cpu()
            class_stats_reference(h, labels.cpu(), expected)
            check(state, expected, scatter=self.bound)
        return expected


def with_dtypes(
    *shapes: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> list[tuple[int, int, int, torch.dtype]]:
    return [(*shape, dtype) for shape in shapes for dtype in dtypes]


@pytest.fixture
def both(backend: Backend, add: Add) -> Both:
    return Both(backend, add)


@pytest.mark.parametrize("moment", MOMENTS)
@cases(
    "rows, classes, dim, dtype",
    [
        *with_dtypes((100, 10, 40), (70, 3, 130), (1, 2, 1), (65, 2, 1)),
        *with_dtypes((40, 150, 30), (130, 37, 65), dtypes=DTYPES[:2]),
    ],
    [
        *with_dtypes((40, 150, 30), (130, 37, 65), dtypes=DTYPES[2:]),
        *with_dtypes((1000, 37, 65), (300, 1000, 512), (5000, 20, 64), (6000, 150, 40)),
    ],
    backends=BACKENDS,
)
def test_shapes(
    both: Both, device: torch.device, rows: int, classes: int, dim: int, moment: str, dtype: torch.dtype
) -> None:
    batches = [batch(rows, classes, dim, dtype=dtype, device=device) for _ in range(2)]
    both(empty(classes, dim, moment, device=device), *batches)


@only("cpu")
@pytest.mark.parametrize("runs", [None, 2])
def test_many_classes_are_added_one_after_the_other(both: Both, add: Add, runs: int | None) -> None:
    features, labels = batch(1300, 700, 20, runs=runs)
    labels[:1100] = 5
    state = empty(700, 20, "full", runs=runs)
    both(state, (features, labels), (features[..., :30, :], labels[:30]), (features[..., 1000:, :], labels[1000:]))
    before = copied(state)
    features[..., 1200, 3] = torch.nan
    add(features, labels, state, False)
    assert state.refused.tolist() == [1, 0, 1 if runs is None else runs]
    check(state._replace(refused=before.refused), in_float64(before), 1e-6)
    add(features, labels, state, True)
    assert state.counts.sum() == before.counts.sum() + 1300
    assert state.sums[..., labels[1200], 3].isnan().all()
    threads = torch.get_num_threads()
    each = []
    for n in (1, 2):
        torch.set_num_threads(n)
        each.append(empty(700, 20, "trace", runs=runs))
        add(features.nan_to_num(), labels, each[-1], False)
    torch.set_num_threads(threads)
    same_bits(*each)


NO_MEMORY = """
import resource, torch
from ncollapse import ClassStats

torch.set_num_threads(1)
stats = ClassStats(1000, 1024, moment="trace")
features, labels = torch.randn(32_768, 1024, dtype=torch.bfloat16), torch.arange(32_768) % 1000
stats.update(features[:100], labels[:100])
before = stats.state_dict()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))  # each part of the batch needs 4 MB, all 64
try:
    stats.update(features, labels)
except MemoryError as error:
    assert "the batch is not added" in str(error)
else:
    raise AssertionError("no error")
assert all(torch.equal(value, before[name]) for name, value in stats.state_dict().items())
"""


@only("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of memory")
@pytest.mark.usefixtures("backend")
def test_no_memory_for_a_batch_is_an_error() -> None:
    subprocess.run([sys.executable, "-c", NO_MEMORY], check=True)


@only("cpu")
@pytest.mark.parametrize("moment", MOMENTS)
def test_sums_in_float64(add: Add, moment: str) -> None:
    state = empty(5, 20, moment, dtype=torch.float64)
    expected = copied(state)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features, labels = batch(600, 5, 20, dtype=dtype, noise=1e-3)
        add(features, labels, state, False)
        class_stats_reference(features, labels, expected)
    check(state, expected, 1e-13)


@pytest.mark.parametrize("moment", MOMENTS)
def test_batches_of_one_and_of_none_and_a_class_without_samples(both: Both, device: torch.device, moment: str) -> None:
    features, labels = batch(9, 5, 12, device=device)
    labels[labels == 3] = 2
    rest = [(features[:0], labels[:0]), *zip(features.split(1), labels.split(1), strict=True)]
    expected = both(empty(5, 12, moment, device=device), *rest, (features[:0], labels[:0]))
    assert expected.counts.sum() == 9
    assert expected.counts[3] == 0


@pytest.mark.parametrize("moment", MOMENTS)
@cases(
    "rows, size, dim, runs",
    [(1500, 700, 20, None)],
    [(6000, 3500, 40, None), (6000, 3500, 40, 3)],
    backends=BACKENDS,
)
def test_sorted_batches(
    both: Both, device: torch.device, rows: int, size: int, dim: int, runs: int | None, moment: str
) -> None:
    """Some classes first occur in a later batch; a part of a batch has few samples of many classes."""
    features, labels = batch(rows, 150, dim, runs=runs, device=device)
    order = labels.argsort()
    features, labels = features[..., order, :], labels[order]
    state = empty(150, dim, moment, runs=runs, device=device)
    both(state, *zip(features.split(size, -2), labels.split(size), strict=True))


@pytest.mark.parametrize("moment", MOMENTS)
@cases("rows", [60], [600], backends=BACKENDS)
def test_layouts(both: Both, device: torch.device, rows: int, moment: str) -> None:
    h, y = batch(rows, 4, 48, device=device)
    maps = torch.randn(rows, 12, 2, 2, device=device).to(memory_format=torch.channels_last).flatten(1)
    padded = torch.empty(rows, 101, device=device)
    padded[:, 3:51] = h
    for features, labels in (
        (h.T.contiguous().T, y),
        (maps, y),
        (padded[:, 3:51], y),
        (h[::2], y[::2]),
        (h[:, ::2], y),
        (h[::2, ::2], y[::2]),
        (h[:1].expand(rows, 48), y),
        (h, y.repeat_interleave(2)[::2]),
    ):
        state = empty(4, features.shape[1], moment, device=device)
        both(state, (features, labels.contiguous()))


@pytest.mark.parametrize("layout", ["runs first", "samples first"])
@pytest.mark.parametrize("moment", MOMENTS)
@cases("rows, size, classes, dim", [(130, 60, 6, 20)], [(6000, 3500, 150, 40)], backends=BACKENDS)
def test_stacked_runs(
    both: Both, device: torch.device, rows: int, size: int, classes: int, dim: int, moment: str, layout: str
) -> None:
    features, labels = batch(rows, classes, dim, runs=3, device=device)
    features += 10 * torch.arange(3, device=device).view(3, 1, 1)
    if layout == "samples first":
        features = features.transpose(0, 1).contiguous().transpose(0, 1)
    state = empty(classes, dim, moment, runs=3, device=device)
    both(state, (features[:, :size], labels[:size]), (features[:, size:], labels[size:]))


@pytest.mark.parametrize("moment", MOMENTS)
def test_near_collapse_far_from_the_origin(both: Both, device: torch.device, moment: str) -> None:
    """Noise of 1e-3 at an offset of 1,000: the squares themselves would keep no digit of it in float32."""
    batches = [batch(200, 5, 40, noise=1e-3, offset=1000.0, device=device) for _ in range(3)]
    both(empty(5, 40, moment, device=device), *batches)


@pytest.mark.parametrize("runs", [None, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_shifts_move_from_a_first_sample_that_lies_far_out(
    both: Both, device: torch.device, runs: int | None, moment: str
) -> None:
    """A batch of one sample of each class, then of many; in one class of one run the first is an outlier."""
    features, labels = batch(200, 5, 40, runs=runs, device=device)
    first = torch.tensor([int((labels == k).nonzero()[0]) for k in range(5)], device=device)
    (features[0] if runs else features)[first[2]] += 100
    rest = torch.ones(200, dtype=torch.bool, device=device).index_fill(0, first, False)
    state = empty(5, 40, moment, runs=runs, device=device)
    both(state, (features[..., first, :], labels[first]))
    before = state.shifts.clone()
    both(state, (features[..., rest, :], labels[rest]))
    moved = (state.shifts != before).any(-1)
    assert moved.nonzero().tolist() == ([[0, 2]] if runs else [[2]])
    assert (state.sums / state.counts.unsqueeze(-1)).norm(dim=-1)[moved] < 30  # of 100·√40


@pytest.mark.parametrize("runs", [None, 2])
def test_the_shift_of_a_new_class_is_the_median_of_three_samples(
    add: Add, device: torch.device, runs: int | None
) -> None:
    features, labels = batch(300, 3, 70, runs=runs, device=device)
    labels[labels == 2] = 0
    labels[100], labels[200] = 2, 2
    state = empty(3, 70, runs=runs, device=device)
    add(features, labels, state, False)
    for k in (0, 1):
        assert torch.equal(state.shifts[..., k, :], features[..., labels == k, :][..., :3, :].median(-2).values)
    assert torch.equal(state.shifts[..., 2, :], features[..., 100, :])


@only("interpreter", "cuda")
def test_more_programs_than_a_launch_can_have_are_refused(add: Add, device: torch.device) -> None:
    features, labels = batch(1, 2, 1, runs=65_536, device=device)
    state = empty(2, 1, "trace", runs=65_536, device=device)
    with pytest.raises(ValueError, match=r"65,536 stacked runs × 1 blocks .* more than the 65,535"):
        add(features, labels, state, False)
    assert state.counts.sum() == 0


@only("cpu", "interpreter")
@pytest.mark.parametrize("runs", [None, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_several_products_and_calls(both: Both, runs: int | None, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last product of a call, and the last call, have fewer samples."""
    monkeypatch.setattr(gpu, "PRODUCT", 64)
    monkeypatch.setattr(gpu, "PRODUCTS", 3)
    monkeypatch.setattr("ncollapse.kernels.class_stats.cpu._ROWS", 64)
    both(empty(4, 20, moment, runs=runs), batch(500, 4, 20, runs=runs), batch(100, 4, 20, runs=runs))


@pytest.mark.parametrize("runs", [None, 2])
@only("interpreter")
def test_products_in_pieces(both: Both, runs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the blocks of the results are fewer than the multiprocessors; 33 is no multiple of the pieces."""
    monkeypatch.setattr(gpu, "PIECE", 4)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 16)
    both(empty(3, 40, "full", runs=runs), batch(33, 3, 40, runs=runs), batch(9, 3, 40, runs=runs))


def test_a_product_has_pieces_for_all_multiprocessors() -> None:
    assert gpu.pieces(8, 512, 1024, 2048, 132) == 1  # 128 blocks
    assert gpu.pieces(8, 512, 512, 2048, 132) == 2  # 64
    assert gpu.pieces(1, 512, 1024, 1024, 132) == 4  # 16
    assert gpu.pieces(1, 512, 512, 1024, 132) == gpu.PIECES
    assert gpu.pieces(1, 512, 512, 1020, 132) == 2  # a piece has at least 256 samples
    assert gpu.pieces(1, 40, 40, 100, 132) == 1


@only("cuda")
@pytest.mark.parametrize("moment", MOMENTS)
def test_several_calls_of_the_matrix_product(both: Both, device: torch.device, moment: str) -> None:
    both(empty(4, 20, moment, device=device), batch(gpu.PRODUCT * gpu.PRODUCTS + 500, 4, 20, device=device))


@pytest.mark.parametrize("moment", MOMENTS)
def test_several_blocks_of_the_scatter(both: Both, device: torch.device, moment: str) -> None:
    both(empty(3, 700, moment, device=device), batch(90, 3, 700, device=device))


@pytest.mark.parametrize("moment", MOMENTS)
@cases("rows, dim", [(1200, 30)], [(3000, 300)], backends=BACKENDS)
def test_a_refused_batch_changes_the_count_of_refusals_alone(
    both: Both, add: Add, device: torch.device, rows: int, dim: int, moment: str
) -> None:
    features, labels = batch(rows, 5, dim, device=device)
    state = empty(5, dim, moment, device=device)
    both(state, (features, labels.clamp(max=3)))
    before = copied(state)
    bad = features.clone()
    bad[700, 7], bad[1100, -1], bad[3, 0] = float("nan"), float("inf"), -float("inf")
    for h, y, propagate in ((bad, labels, False), (features, labels - 1, False), (features, labels + 1, True)):
        add(h, y, state, propagate)
    counted = [3, int(((labels == 0) | (labels == 4)).sum()), 3]
    assert state.refused.tolist() == counted
    # Only the shift of a class without samples may change.
    assert same_bits(state._replace(refused=before.refused, shifts=before.shifts), before)
    assert torch.equal(state.shifts[:4], before.shifts[:4])
    both(state, (features, labels))
    assert state.refused.tolist() == counted


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_refused_batch_moves_no_shift_to_what_is_not_finite(
    add: Add, device: torch.device, value: float, moment: str
) -> None:
    """Of a class whose shift lies far from its samples, so that a whole batch would move it."""
    features, labels = 1 + torch.randn(440, 70, device=device) / 100, torch.zeros(440, dtype=torch.int64, device=device)
    features[:3] += 0.12
    state = empty(2, 70, moment, device=device)
    add(features[:40], labels[:40], state, False)
    before, bad = copied(state), features[40:].clone()
    bad[:3, 66] = value
    add(bad, labels[40:], state, False)
    assert state.refused.tolist() == [1, 0, 3]
    assert same_bits(state._replace(refused=before.refused), before)
    add(features[40:], labels[40:], state, False)
    assert not torch.equal(state.shifts, before.shifts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_affects_its_run_alone(add: Add, device: torch.device, value: float) -> None:
    features, labels = batch(300, 4, 30, runs=2, device=device)
    features[1, 50, 7] = value
    state = empty(4, 30, "full", runs=2, device=device)
    expected = in_float64(state)
    add(features, labels, state, True)
    class_stats_reference(features.cpu(), labels.cpu(), expected, True)
    assert torch.equal(state.counts.cpu(), expected.counts)
    assert state.refused.tolist() == [0, 0, 0]
    assert state.scatter is not None
    # In the reference all classes of the run become NaN, in a kernel perhaps only that of the value.
    k = int(labels[50])
    for broken in (state.sums[1, k, 7], state.squares[1, k], state.scatter[1, 7, 7]):
        assert not broken.isfinite()
    first = State._make(t if t is None or t.dim() < 2 else t[0] for t in state)
    check(first, State._make(t if t is None or t.dim() < 2 else t[0] for t in expected), scatter=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 9, 40, 70])
@pytest.mark.parametrize("runs", [None, 2])
@cases("rows, dim", [(130, 75)], [(1300, 600)], backends=BACKENDS)
def test_projections(
    project: Project, device: torch.device, rows: int, dim: int, runs: int | None, count: int, dtype: torch.dtype
) -> None:
    """On `count` axes."""
    features, labels = batch(rows, 5, dim, runs=runs, dtype=dtype, device=device)
    lead = () if runs is None else (runs,)
    shifts, axes = (torch.randn(*lead, n, dim, device=device) for n in (5, count))
    out = project(features, labels, shifts, axes)
    expected = project_reference(features, labels, shifts.double(), axes.double())
    assert out.dtype == torch.float32
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    assert project(features[..., :0, :], labels[:0], shifts, axes).shape == (*lead, 0, count)


@only("cpu", "interpreter")
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_bits_with_any_number_of_threads(backend: Backend, add: Add, moment: str) -> None:
    batches = [batch(3000, 7, 33) for _ in range(2)] if backend.name == "cpu" else [batch(300, 7, 33)]
    states = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        states.append(empty(7, 33, moment))
        try:
            torch.set_num_threads(threads)
            for features, labels in batches:
                add(features, labels, states[-1], False)
        finally:
            torch.set_num_threads(before)
    # The matrix library promises equal bits for an equal number of threads only.
    assert same_bits(states[1], states[2])
    if moment != "full":
        assert same_bits(states[0], states[1])


@only("cuda")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(add: Add, device: torch.device, dtype: torch.dtype, moment: str) -> None:
    features, labels = batch(20_000, 10, 512, dtype=dtype, device=device)
    states = [empty(10, 512, moment, device=device) for _ in range(4)]
    for state in states:
        add(features, labels, state, False)
    assert all(same_bits(state, states[0]) for state in states)


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
