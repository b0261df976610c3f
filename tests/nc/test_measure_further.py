"""What `measure` gives beyond NC0–NC4: against a reference in float64; test and out-of-distribution data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncollapse import NCCallback, measure, metrics, plot
from ncollapse.measurement import Measurement
from ncollapse.result import NCResult
from ncollapse.stats import ClassStats

K, N = 4, 120
Pair = tuple[Tensor, Tensor]


def data_of(seed: int, n: int = N) -> Pair:
    torch.manual_seed(seed)
    labels = torch.randint(K, (n,))
    return torch.randn(n, 6) + 2 * torch.eye(K, 6)[labels], labels


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, K))


def by_hand(model: nn.Sequential, data: Pair, train: Pair) -> dict[str, Any]:
    """Numbers on nearest means of head ("") and layer "0", in float64."""
    found: dict[str, Any] = {}
    exact = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, K)).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        predicted = exact(data[0].double()).argmax(1)
        for name, part in (("", exact[:2]), ("0", exact[:1])):
            of_train, h = part(train[0].double()), part(data[0].double())
            means = torch.stack([of_train[train[1] == k].mean(0) for k in range(K)])
            nearest = torch.cdist(h, means).argmin(1)
            own, differ = (nearest == data[1]).double(), (nearest != predicted).double()
            found[name] = {
                "nearest_mean_accuracy": own.mean().item(),
                "nearest_mean_accuracy_per_class": [own[data[1] == k].mean().item() for k in range(K)],
                "nc4_per_class": [differ[data[1] == k].mean().item() for k in range(K)],
            }
            if not name:
                found["nc4"] = differ.mean().item()
    return found


def check_nearest(result: NCResult, expected: dict[str, Any]) -> None:
    for of, name in ((result, ""), (result.layers["0"], "0")):
        for key, value in expected[name].items():
            assert getattr(of, key) == pytest.approx(value, abs=1e-12), (name, key)
    assert result.nc4 == pytest.approx(expected["nc4"], abs=1e-12)


@pytest.mark.parametrize("how", ["kept", "head kept alone", "nothing kept", "projected"])
def test_nearest_means_of_head_and_layers_by_class_of_training_and_test_data(how: str, model: nn.Sequential) -> None:
    train, test = data_of(2), data_of(3, 70)
    options: dict[str, Any] = {
        "kept": {}, "head kept alone": {"keep_bytes": N * 10 * 4}, "nothing kept": {"keep_bytes": 0},
        "projected": {"moment": "projected"},
    }[how]  # fmt: skip
    result = measure(model, train, test=test, layers=("0",), batch_size=32, **options)
    check_nearest(result, by_hand(model, train, train))
    assert result.test is not None
    check_nearest(result.test, by_hand(model, test, train))
    alone = measure(model, test, layers=("0",), **options)
    assert result.test.nc1 == pytest.approx(alone.nc1, rel=1e-5)
    assert result.test.layers["0"].nc2 == pytest.approx(alone.layers["0"].nc2, rel=1e-5)
    assert result.test.train_accuracy == alone.train_accuracy
    assert result.test.head == result.head == "2"
    assert result.as_dict()["test.0.nc1"] == result.test.layers["0"].nc1


def test_the_numbers_and_matrices_are_those_of_the_metrics(model: nn.Sequential) -> None:
    train = data_of(2)
    result = measure(model, train, layers=("0",))
    with torch.no_grad():
        features = model[:2](train[0])
    stats = ClassStats(K, 10)
    stats.update(features, train[1])
    weight, bias = model[2].weight, model[2].bias
    expected = {
        "nc1_trace_ratio_balanced": metrics.nc1(stats, kind="trace_ratio", within="class"),
        "gnc2": metrics.gnc2(stats), "gnc2_energy": metrics.gnc2(stats, kind="mean"),
        "gnc2_weight": metrics.gnc2(weight), "gnc2_weight_energy": metrics.gnc2(weight, kind="mean"),
        "effective_rank": metrics.effective_rank(stats), "effective_rank_weight": metrics.effective_rank(weight),
        "mean_rank": metrics.mean_rank(stats), "unc3": metrics.unc3(weight, stats),
        "global_logits": metrics.global_logits(weight, bias, stats),
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value.item(), rel=1e-6, nan_ok=True), name
    assert result.layers["0"].mean_rank == K - 1
    for name, matrix in metrics.matrices(weight.detach(), stats).items():
        torch.testing.assert_close(result.matrices[name], matrix)
    torch.testing.assert_close(
        result.matrices["singular_values"], torch.linalg.svdvals(weight.detach().double()), rtol=1e-7, atol=0
    )
    assert not result.matrices["means"].requires_grad
    plot.geometry(result, features, train[1], weight)


def test_it_may_be_left_out(model: nn.Sequential) -> None:
    train = data_of(2)
    result, plain = measure(model, train, layers=("0",)), measure(model, train, layers=("0",), further=False)
    assert {name: result.as_dict()[name] for name in plain.as_dict()} == plain.as_dict()
    assert plain.gnc2 is plain.layers["0"].nearest_mean_accuracy is None
    assert not plain.matrices
    assert "gnc2" in result.as_dict()
    earlier = measure(model, train, layers=("0",), previous=result)
    check_nearest(result, by_hand(model, train, train))
    assert earlier.nearest_mean_accuracy == result.nearest_mean_accuracy
    assert earlier.layers["0"].nearest_mean_accuracy is None  # a result has no means of its layers


def test_out_of_distribution_data(model: nn.Sequential) -> None:
    train, x = data_of(2), torch.randn(50, 6) + 1
    exact = model[:2].double()
    with torch.no_grad():
        means = torch.stack([exact(train[0].double())[train[1] == k].mean(0) for k in range(K)])
        mean = exact(x.double()).mean(0)
    model.float()
    expected = torch.nn.functional.cosine_similarity(means, mean.unsqueeze(0)).abs().mean().item()
    labels = torch.arange(50) + 7  # of classes that the model does not know
    for ood in (
        x, x.numpy(), (x, labels), [x[:20], x[20:]], [x[:20], x[20:30], x[30:]],
        DataLoader(TensorDataset(x, labels), 8), TensorDataset(x),
        (x, torch.rand(50, 9)), [{"input": x, "text": "a"}], [{"input": x, "label": labels}],
    ):  # fmt: skip
        assert measure(model, train, ood=ood, batch_size=16).nc5 == pytest.approx(expected, rel=1e-5)
    assert measure(model, train).nc5 is None
    two = nn.Sequential(nn.Linear(6, K), nn.ReLU(), nn.Linear(K, K))
    several = measure(two, train, head=["0", "2"], ood=x, test=train)
    alone = measure(two, train, ood=x)
    assert several["2"].nc5 == alone.nc5 != several["0"].nc5
    assert several["0"].test is not None


def test_errors_say_in_which_data(model: nn.Sequential) -> None:
    train = data_of(2)
    with pytest.raises(ValueError, match="no samples of out-of-distribution data"):
        measure(model, train, ood=train[0][:0])
    with pytest.raises(ValueError, match="no samples of test data"):
        measure(model, train, test=(train[0][:0], train[1][:0]))
    with pytest.raises(ValueError, match="'2, test data': the batch was refused, for 120 labels outside"):
        measure(model, train, test=(train[0], train[1] + 9))
    with pytest.warns(UserWarning, match="2, test data: no samples of class 3"):
        measure(model, train, test=(train[0][train[1] < 3], train[1][train[1] < 3]))
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        NCCallback(model, train, test=iter([train]))
    with pytest.raises(ValueError, match="an iterator allows one"):
        measure(model, train, test=iter([train]), moment="projected")
    once = measure(model, iter([train]), test=iter([train]), ood=iter([train]))
    assert once.test is not None
    assert once.test.nc4 == once.nc4
    assert not math.isnan(once.nc4)


def test_float64_features_are_summed_in_float64() -> None:
    exact = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, K)).double()
    labels = torch.arange(N) % K
    x = torch.eye(K, 6).double()[labels] + 1e-10 * torch.randn(N, 6, dtype=torch.float64)
    result = measure(exact, (x, labels), layers=("0",))
    h = exact[0](x).detach()
    means = torch.stack([h[labels == k].mean(0) for k in range(K)])
    within = (h - means[labels]).square().sum(1).mean()
    between = (means - means.mean(0)).square().sum(1).mean()
    assert result.nc1_trace_ratio == pytest.approx((within / between).item(), rel=1e-4)
    assert result.layers["0"].nc1_trace_ratio == pytest.approx(result.nc1_trace_ratio, rel=1e-4)
    coarse = measure(exact, (x, labels), dtype=torch.float32)
    assert coarse.degenerate or coarse.nc1_trace_ratio != result.nc1_trace_ratio


def test_a_run_that_is_not_finite_has_no_nearest_mean() -> None:
    labels = torch.arange(20) % K
    features, weight = torch.randn(2, 20, 6), torch.randn(2, K, 6)
    features[1, 0, 0] = torch.inf
    measurement = Measurement(weight, nan_policy="propagate", by_layer=True)
    measurement.add(features, features @ weight.mT, labels, {"block": features})
    measurement.finish()
    for layer in (None, "block"):
        counts = measurement.agreement(layer)
        assert counts is not None
        assert counts[..., 0].tolist() == [[5] * K, [0] * K]
