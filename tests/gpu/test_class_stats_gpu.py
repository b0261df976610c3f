"""Class statistics on the GPU: against the reference in float64, in CUDA graphs, without waiting."""

import math

import pytest
import torch
from torch import Tensor

from class_stats_cases import (
    MOMENTS,
    add_triton,
    batch,
    check,
    copied,
    empty,
    in_float64,
    project_triton,
    same_bits,
)
from ncollapse import ClassStats, measure
from ncollapse.kernels.class_stats import gpu
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, project_reference
from ncollapse.metrics import nc1
from waiting import nothing_waits

pytestmark = pytest.mark.filterwarnings("ignore", "error:plain PyTorch")


def both(state: State, *batches: tuple[Tensor, Tensor]) -> None:
    """Add the batches by the kernels; compare with float64 on the CPU."""
    expected = in_float64(state)
    for features, labels in batches:
        add_triton(features, labels, state)
        class_stats_reference(features.cpu().to(state.shifts.dtype), labels.cpu(), expected)
        # Second moments are sums of products of matrix units, which keep fewer digits (seen: 4e-6).
        check(state, expected, scatter=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("rows", "classes", "dim"),
    [
        (100, 10, 40),
        (70, 3, 130),
        (1, 2, 1),
        (65, 2, 1),
        (40, 150, 30),
        (1000, 37, 65),
        (300, 1000, 512),
        (5000, 20, 64),
    ],
)
def test_odd_shapes(device: torch.device, rows: int, classes: int, dim: int, moment: str, dtype: torch.dtype) -> None:
    both(
        empty(classes, dim, moment, device=device),
        *(batch(rows, classes, dim, dtype=dtype, device=device) for _ in range(2)),
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_layouts(device: torch.device, moment: str) -> None:
    h, y = batch(600, 4, 48, device=device)
    maps = torch.randn(600, 12, 2, 2, device=device).to(memory_format=torch.channels_last).flatten(1)
    wide = torch.empty(600, 101, device=device)
    wide[:, 3:51] = h
    for features in (h.T.contiguous().T, maps, wide[:, 3:51], h[:1].expand(600, 48)):
        both(empty(4, 48, moment, device=device), (features, y))
    both(empty(4, 24, moment, device=device), (h[::2, ::2], y[::2].contiguous()))
    both(empty(4, 48, moment, device=device), (h[:0], y[:0]), *zip(h[:9].split(1), y[:9].split(1), strict=True))


@pytest.mark.parametrize("order", ["random", "sorted"])
@pytest.mark.parametrize("runs", [None, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stacked_runs_and_sorted_batches(device: torch.device, moment: str, runs: int | None, order: str) -> None:
    features, labels = batch(6000, 150, 40, runs=runs, device=device)
    if order == "sorted":
        features, labels = features[..., labels.argsort(), :], labels.sort().values
    state = empty(150, 40, moment, runs=runs, device=device)
    both(state, *zip(features.split(3500, -2), labels.split(3500), strict=True))


@pytest.mark.parametrize("moment", MOMENTS)
def test_more_samples_than_go_into_one_call(device: torch.device, moment: str) -> None:
    both(empty(4, 20, moment, device=device), batch(gpu.PRODUCT * gpu.PRODUCTS + 500, 4, 20, device=device))


@pytest.mark.parametrize("many", [1, 9, 40, 70])
def test_projections(device: torch.device, many: int) -> None:
    features, labels = batch(1300, 5, 600, runs=2, device=device)
    shifts, axes = torch.randn(2, 5, 600).to(device), torch.randn(2, many, 600).to(device)
    out = project_triton(features, labels, shifts, axes).cpu()
    expected = project_reference(features.cpu(), labels.cpu(), shifts.double().cpu(), axes.double().cpu())
    assert (out - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_batch_that_is_refused_changes_nothing_but_refused(device: torch.device, moment: str) -> None:
    features, labels = batch(3000, 5, 300, device=device)
    state = empty(5, 300, moment, device=device)
    both(state, (features, labels))
    before = copied(state)
    bad = features.clone()
    bad[700, 7], bad[2100, 299], bad[3, 0] = math.nan, math.inf, -math.inf
    for h, y, propagate in ((bad, labels, False), (features, labels - 1, False), (features, labels + 1, True)):
        add_triton(h, y, state, propagate)
    wrong = int(((labels == 0) | (labels == 4)).sum())
    assert state.refused.tolist() == [3, wrong, 3]
    assert same_bits(state._replace(refused=before.refused), before)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(device: torch.device, dtype: torch.dtype, moment: str) -> None:
    features, labels = batch(20_000, 10, 512, dtype=dtype, device=device)
    states = [empty(10, 512, moment, device=device) for _ in range(4)]
    for state in states:
        add_triton(features, labels, state)
    assert all(same_bits(state, states[0]) for state in states)


@pytest.mark.parametrize(("noise", "offset", "bound"), [(1e-4, 50.0, 1e-5), (1e-4, 1e3, 1e-3), (1e-2, 1e3, 1e-5)])
def test_nc1_near_collapse(device: torch.device, noise: float, offset: float, bound: float) -> None:
    """60,000 × 512 features, class means of norm 10 at the offset, against float64 on the GPU."""
    g = torch.Generator(device).manual_seed(0)
    labels = torch.arange(60_000, device=device) % 10
    means = torch.randn(10, 512, generator=g, device=device, dtype=torch.float64)
    means = offset + 10 * means / means.norm(dim=1, keepdim=True)
    h = (means[labels] + noise * torch.randn(60_000, 512, generator=g, device=device, dtype=torch.float64)).float()
    residuals = h.double().view(6000, 10, 512)
    exact_means = residuals.mean(0)
    residuals = (residuals - exact_means).view(-1, 512)
    m = exact_means - exact_means.mean(0)
    truth = torch.trace(residuals.mT @ residuals / 60_000 @ torch.linalg.pinv(m.mT @ m / 10, rtol=1e-10)) / 10
    for size in (60_000, 1000):
        full, first = (ClassStats(10, 512, moment=moment, device=device) for moment in ("full", "trace"))
        for stats in (full, first):
            for part in zip(h.split(size), labels.split(size), strict=True):
                stats.update(*part)
        second = first.projected()
        for part in zip(h.split(size), labels.split(size), strict=True):
            second.update(*part)
        for stats in (full, second):
            assert nc1(stats).item() == pytest.approx(truth.item(), rel=bound)


@pytest.mark.parametrize("moment", MOMENTS)
def test_nobody_waits_until_a_number_is_asked_for(device: torch.device, moment: str) -> None:
    h, y = batch(500, 7, 64, device=device)
    axes = torch.randn(6, 64, device=device) if moment == "projected" else None
    stats = ClassStats(7, 64, moment=moment, axes=axes, device=device, name="fc")  # type: ignore[arg-type]
    stats.update(h, y)  # compiles
    bad = h.clone()
    bad[3, 5] = math.nan
    with nothing_waits():
        stats.update(h, y)
        stats.update(bad, y)
        stats.update(h.bfloat16(), y.int())
    with pytest.raises(ValueError, match=r"'fc'.*the batch was refused, for 1 values"):
        _ = stats.means
    assert int(stats.counts.sum()) == 1500


@pytest.mark.parametrize("moment", ["full", "trace"])
def test_in_a_cuda_graph(device: torch.device, moment: str) -> None:
    batches = [batch(300, 7, 64, device=device) for _ in range(4)]
    stats, eager = (ClassStats(7, 64, moment=moment, device=device) for _ in range(2))  # type: ignore[arg-type]
    h, y = (t.clone() for t in batches[0])
    stats.update(h, y)
    stats.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats.update(h, y)
    for features, labels in batches:
        h.copy_(features)
        y.copy_(labels)
        graph.replay()
        eager.update(features, labels)
    ours, theirs = stats.state_dict(), eager.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_in_a_compiled_function(device: torch.device) -> None:
    stats, eager = (ClassStats(7, 64, device=device) for _ in range(2))
    weight = torch.randn(64, 32, device=device)

    @torch.compile(fullgraph=True)
    def step(x: Tensor, y: Tensor) -> None:
        stats.update(torch.relu(x @ weight.T), y)

    for _ in range(3):
        x, y = torch.randn(100, 32, device=device), torch.randint(7, (100,), device=device)
        step(x, y)
        eager.update(torch.relu(x @ weight.T), y)
    torch.testing.assert_close(stats.within_cov(), eager.within_cov(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*without a C")  # of the CPU
def test_measure_and_moving_to_the_cpu(device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    x, y = torch.randn(500, 12), torch.randint(4, (500,))
    here = measure(model, (x.to(device), y.to(device)), head="2", layers=("0",)).as_dict()
    there = measure(model.cpu(), (x, y), head="2", layers=("0",)).as_dict()
    assert here.keys() == there.keys()
    for name, value in there.items():
        assert here[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    stats = ClassStats(4, 12, device=device)
    stats.update(x.to(device), y.to(device))
    stats.to("cpu").update(x, y)
    assert int(stats.counts.sum()) == 1000
    assert stats.within_cov().device.type == "cpu"
