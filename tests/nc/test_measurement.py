"""`Measurement`: one evaluator for one model or stacked runs, in one pass or two."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ncollapse import metrics
from ncollapse.measurement import Measurement
from ncollapse.result import HEAD_METRICS
from ncollapse.stats import ClassStats

R, K, D, N = 3, 4, 9, 120


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [R, K, d], features [R, N, d], logits [R, N, K], labels [N]."""
    labels = torch.arange(N) % K
    features = torch.randn(R, N, D) + 2 * torch.eye(K, D)[labels]
    weight = torch.randn(R, K, D)
    return weight, features, features @ weight.mT, labels


def add(measurement: Measurement, features: Tensor, logits: Tensor, labels: Tensor) -> None:
    parts = zip(features.split(32, -2), logits.split(32, -2), labels.split(32), strict=True)
    for h, z, y in parts:
        measurement.add(h, z, y, {"block": 2 * h})


def test_stacked_runs_have_the_metrics_of_each_run(batch: tuple[Tensor, ...]) -> None:
    weight, features, logits, labels = batch
    stacked = Measurement(weight)
    add(stacked, features, logits, labels)
    values, blocks = stacked.finish()
    assert set(values) == set(HEAD_METRICS)
    stats = ClassStats(K, D, runs=R)
    stats.update(features, labels)
    assert values["nc4"].tolist() == metrics.nc4(features, logits, stats).tolist()
    for i in range(R):
        alone = Measurement(weight[i])
        add(alone, features[i], logits[i], labels)
        of_run, of_blocks = alone.finish()
        assert {name: float(value) for name, value in of_run.items()} == pytest.approx(
            {name: float(value[i]) for name, value in values.items()}, rel=1e-5
        )
        assert float(of_blocks["block"]["nc2"]) == pytest.approx(float(blocks["block"]["nc2"][i]), rel=1e-5)


@pytest.mark.parametrize("moment", ["full", "projected"])
def test_features_beyond_the_bound_take_a_second_pass(
    moment: Literal["full", "projected"], batch: tuple[Tensor, ...]
) -> None:
    weight, features, logits, labels = batch
    kept = Measurement(weight, keep_bytes=features[0].nbytes)
    add(kept, features, logits, labels)
    assert not kept.end_pass()
    expected, _ = kept.finish()
    bounded = Measurement(weight, keep_bytes=features[0].nbytes - 1, moment=moment)
    add(bounded, features, logits, labels)
    assert bounded.end_pass()
    add(bounded, features, logits, labels)
    values, _ = bounded.finish()
    assert bounded.samples == N
    for name, value in expected.items():
        torch.testing.assert_close(values[name].double(), value.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("runs", [None, R])
def test_the_second_moment_comes_from_the_kept_features_or_from_all_batches(kept: str, runs: int | None) -> None:
    """Of features much wider than there are classes, those that are kept give NC1 without a d × d matrix."""
    labels, dim = torch.arange(N) % K, 6 * K
    features = torch.randn(R, N, dim)[: runs or 1] + 2 * torch.eye(K, dim)[labels]
    features = features if runs else features[0]
    weight = torch.randn(R, K, dim) if runs else torch.randn(K, dim)
    logits = features @ weight.mT
    of_all = 2 * N * dim * 4  # of head and layer
    measurement = Measurement(weight, by_layer=True, keep_bytes={"all": of_all, "some": of_all // 2, "none": 0}[kept])
    add(measurement, features, logits, labels)
    assert measurement.end_pass() is (kept != "all")
    assert measurement.stats.moment == measurement.layers["block"].moment == ("projected" if kept == "all" else "full")
    add(measurement, features, logits, labels)
    values, blocks = measurement.finish()
    exact = ClassStats(K, dim, runs=runs, dtype=torch.float64)
    exact.update(features.double(), labels)
    torch.testing.assert_close(values["nc1"], metrics.nc1(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(blocks["block"]["nc1"], metrics.nc1(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(values["nc4"], metrics.nc4(features, logits, exact), rtol=0, atol=0)
    counts = measurement.agreement("block")
    assert counts is not None
    assert counts[..., 0].sum(-1).unique().tolist() == [N]


@pytest.mark.parametrize(("limit", "moves"), [(10 * K * 6 * K * K, True), (K * 6 * K * K - 1, False)])
def test_small_statistics_move_to_the_cpu_at_the_end(limit: int, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, dim = torch.arange(N) % K, 6 * K
    features, weight = torch.randn(N, dim) + 2 * torch.eye(K, dim)[labels], torch.randn(K, dim)
    monkeypatch.setattr("ncollapse.measurement._SMALL", limit)
    moved: list[str] = []
    to = ClassStats.to
    monkeypatch.setattr(ClassStats, "to", lambda self, device: (moved.append(str(device)), to(self, device))[1])
    measurement = Measurement(weight, by_layer=True)
    add(measurement, features, features @ weight.T, labels)
    measurement.finish(on_cpu=True)
    assert moved == ["cpu"] * 2 * moves
    assert measurement.agreement("block") is not None


def test_nc4_is_nan_without_the_second_pass_and_of_a_run_that_is_not_finite(batch: tuple[Tensor, ...]) -> None:
    weight, features, logits, labels = batch
    measurement = Measurement(weight, keep_bytes=0)
    add(measurement, features, logits, labels)
    values, _ = measurement.finish()
    assert values["nc4"].isnan().all()
    features = features.clone()
    features[1, 0, 0] = torch.inf
    measurement = Measurement(weight, nan_policy="propagate")
    add(measurement, features, logits, labels)
    values, _ = measurement.finish()
    assert values["nc4"].isnan().tolist() == [False, True, False]


def test_only_the_named_metrics_are_computed_and_without_logits(batch: tuple[Tensor, ...]) -> None:
    weight, features, _, labels = batch
    measurement = Measurement(weight.double(), ("nc0", "nc3"), dtype=torch.float64)
    measurement.add(features.double(), None, labels)
    values, _ = measurement.finish()
    assert set(values) == {"nc0", "nc3"}
    with pytest.raises(ValueError, match="need logits"):
        Measurement(weight).add(features, None, labels)
    with pytest.raises(ValueError, match="got nc9"):
        Measurement(weight, ("nc9",))


def test_kept_features_hold_neither_a_graph_nor_the_tensor_that_they_are_a_view_of() -> None:
    tokens = torch.randn(40, 50, D, requires_grad=True)
    labels = torch.arange(40) % K
    weight = torch.randn(K, D, requires_grad=True)
    measurement = Measurement(weight, keep_bytes=40 * D * 4)
    features = tokens[:, 0]
    measurement.add(features, features @ weight.T, labels)
    with torch.no_grad():
        tokens.fill_(math.nan)  # what was kept is a copy
    assert not measurement.end_pass()
    values, _ = measurement.finish()
    assert not any(value.requires_grad for value in values.values())
    assert not values["nc4"].isnan()


@pytest.mark.parametrize("kind", ["first token", "every second", "whole", "slice of the data"])
@pytest.mark.parametrize("fits", [True, False])
def test_the_memory_that_is_held_is_that_of_the_kept_features(kind: str, fits: bool) -> None:
    batch, batches = 64, 6
    all_data = torch.randn(batches * batch, D)
    weight, labels = torch.randn(K, D), torch.arange(batch) % K
    features_bytes = batches * batch * D * 4
    measurement = Measurement(weight, keep_bytes=features_bytes if fits else features_bytes - 1)
    measurement.add(all_data[:0], all_data[:0] @ weight.T, labels[:0])  # the sums are allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as memory:
        for i in range(batches):
            if kind == "slice of the data":
                features = all_data[i * batch : (i + 1) * batch]
            elif kind == "first token":
                features = torch.randn(batch, 50, D)[:, 0]
            else:
                features = torch.randn(batch, 2 * D)[:, ::2] if kind == "every second" else torch.randn(batch, D)
            measurement.add(features, features @ weight.T, labels)
        del features
    held = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    labels_and_predictions = 2 * batches * batch * 8
    assert held == (features_bytes + labels_and_predictions if fits else 0)
    assert measurement.end_pass() is not fits
