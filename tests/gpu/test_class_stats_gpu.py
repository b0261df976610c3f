"""Class statistics on a GPU: accuracy at full size, CUDA graphs, no synchronisation, moves between devices.

tests/kernels/test_class_stats_kernels.py compares the same kernels with float64.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from class_stats_cases import MOMENTS, batch
from ncollapse import ClassStats, measure
from ncollapse.metrics import nc1
from waiting import nothing_waits


@pytest.mark.parametrize(("noise", "offset", "bound"), [(1e-4, 50.0, 1e-5), (1e-4, 1e3, 1e-3), (1e-2, 1e3, 1e-5)])
def test_nc1_near_collapse(device: torch.device, noise: float, offset: float, bound: float) -> None:
    """60,000 × 512 features around class means of norm 10, shifted by `offset`, against float64 on the GPU."""
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
def test_no_synchronisation_until_a_number_is_read(device: torch.device, moment: str) -> None:
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


def test_no_batch_waits_for_the_gpu(device: torch.device) -> None:
    """A measurement waits as often with six batches as with three, with labels on the GPU too."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    x, y = torch.randn(600, 12, device=device), torch.randint(4, (600,), device=device)

    def waits(batches: int, **options: Any) -> int:
        size = 600 // batches
        loader = list(zip(x.split(size), y.split(size), strict=True))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                measure(model, loader, head="2", layers=("0",), **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    for options in ({}, {"moment": "projected"}):
        measure(model, (x, y), head="2", layers=("0",), **options)  # compiles
        assert waits(6, **options) == waits(3, **options) > 0


def test_a_batch_that_comes_late_may_be_overwritten(device: torch.device) -> None:
    """By a model that writes its features into the same memory, as a CUDA graph does."""
    features, head = torch.empty(100, 12, device=device), torch.nn.Linear(12, 4)

    class Static(torch.nn.Module):
        def __init__(self, static: bool) -> None:
            super().__init__()
            self.head, self.static = head, static

        def forward(self, x: Tensor) -> Tensor:
            return self.head(features.copy_(x) if self.static else x.clone())

    x, y = torch.randn(600, 12, device=device), torch.randint(4, (600,), device=device)
    y[::7] = -100
    batches = list(zip(x.split(100), y.split(100), strict=True))
    found, expected = (measure(Static(static).to(device), batches, head="head").as_dict() for static in (True, False))
    assert found == pytest.approx(expected, nan_ok=True)


def test_measure_and_moving_to_the_cpu(device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    x, y = torch.randn(500, 12), torch.randint(4, (500,))
    on_gpu = measure(model, (x.to(device), y.to(device)), head="2", layers=("0",)).as_dict()
    on_cpu = measure(model.cpu(), (x, y), head="2", layers=("0",)).as_dict()
    assert on_gpu.keys() == on_cpu.keys()
    for name, value in on_cpu.items():
        assert on_gpu[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    stats = ClassStats(4, 12, device=device)
    stats.update(x.to(device), y.to(device))
    stats.to("cpu").update(x, y)
    assert int(stats.counts.sum()) == 1000
    assert stats.within_cov().device.type == "cpu"
