"""`measure` and `NCCallback` on ordinary modules."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncollapse import ClassStats, NCCallback, measure, metrics
from ncollapse.result import LayerResult, NCResult
from ncollapse.samples import Selected

Pair = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A convolution, whose maps are [B, 5, 4, 4], and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, padding=1)
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(80, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)))


@pytest.fixture
def data() -> Pair:
    return torch.randn(200, 1, 4, 4), torch.arange(200) % 4


def forward_by_hand(model: Net, data: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, features and logits in eval mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        maps = model.stem(data[0])
        features = model.body(maps)
        logits = model.fc(features)
    for m, mode in modes.items():
        m.training = mode
    return maps, features, logits


def stats_of(features: Tensor, labels: Tensor) -> ClassStats:
    stats = ClassStats(4, features.shape[1])
    stats.update(features, labels)
    return stats


def numbers(result: NCResult) -> dict[str, float]:
    return {name: value for name, value in result.as_dict().items() if name != "degenerate"}


def test_measures_in_eval_mode_and_restores_it(data: Pair) -> None:
    model = Net()
    model.body[4].eval()
    running = model.body[2].running_mean.clone()
    result = measure(model, data)
    assert [model.training, model.fc.training, model.body[4].training] == [True, True, False]
    assert torch.equal(model.body[2].running_mean, running)
    _, features, logits = forward_by_hand(model, data)
    stats = stats_of(features, data[1])
    assert result.nc0 == metrics.nc0(model.fc.weight).item()
    assert result.nc1 == pytest.approx(metrics.nc1(stats).item())
    assert result.nc1_cdnv == pytest.approx(metrics.nc1(stats, kind="cdnv").item())
    assert result.nc2_weight == metrics.nc2(model.fc.weight).item()
    assert result.nc3_difference == pytest.approx(metrics.nc3(model.fc.weight, stats, kind="difference").item())
    assert result.nc4 == metrics.nc4(features, logits, stats).item() > 0
    assert result.train_accuracy == (logits.argmax(1) == data[1]).double().mean().item()
    assert result.degenerate is False
    torch.testing.assert_close(result.means, stats.means)


def test_layers_are_pooled_and_captured_before_in_place_operations(data: Pair) -> None:
    model = Net()
    # The batch norm's output is changed in place by the ReLU that follows.
    result = measure(model, data, layers=("stem", "body.2"), batch_size=64)
    maps, _, _ = forward_by_hand(model, data)
    model.eval()
    normed = model.body[:3](maps)
    for name, features in (("stem", maps.mean((2, 3))), ("body.2", normed)):
        stats = stats_of(features.detach(), data[1])
        assert isinstance(result.layers[name], LayerResult)
        assert result.layers[name].nc1 == pytest.approx(metrics.nc1(stats).item(), rel=1e-5)
        assert result.as_dict()[f"{name}.nc2"] == pytest.approx(metrics.nc2(stats).item(), rel=1e-5)
    values = {name: getattr(result, name) for name in (f.name for f in dataclasses.fields(NCResult))}
    head_names = {name for name, value in values.items() if isinstance(value, float | bool)}
    assert head_names >= {"nc0", "nc1", "nc4", "degenerate"}
    of_layer = dataclasses.asdict(result.layers["stem"])
    assert result.as_dict().keys() == head_names | {
        f"{name}.{key}" for name in result.layers for key, value in of_layer.items() if isinstance(value, float)
    }


def test_pool_makes_features_of_other_outputs(data: Pair) -> None:
    model = Net()
    corner = measure(model, data, layers=("stem",), pool=lambda maps: maps[:, :, 0, 0]).layers["stem"]
    maps, _, _ = forward_by_hand(model, data)
    assert corner.nc1 == pytest.approx(metrics.nc1(stats_of(maps[:, :, 0, 0], data[1])).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"features must be \[B, d\]; of stem they are \(200, 5, 16\): give `pool`"):
        measure(model, data, layers=("stem",), pool=lambda maps: maps.flatten(2))


class Counting(nn.Module):
    """Count the samples of all forward passes; accept keyword arguments, positional arguments, pairs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.samples = model, 0

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        self.samples += len(x)
        return self.model(x * scale)


@pytest.mark.parametrize("kind", ["pair", "loader", "mapping", "arguments", "iterator", "compiled"])
def test_every_kind_of_loader_and_model(kind: str, data: Pair) -> None:
    model = Counting(Net())
    expected = numbers(measure(model, data, head="model.fc"))
    batches = DataLoader(TensorDataset(*data), 33)
    loader: Any = {
        "pair": data,
        "loader": batches,
        "mapping": [{"x": x, "scale": 1.0, "labels": y} for x, y in batches],
        "arguments": [((x, torch.ones(())), y) for x, y in batches],
        "iterator": iter(batches),
        "compiled": data,
    }[kind]
    model.samples = 0
    used = torch.compile(model, backend="eager") if kind == "compiled" else model
    result = measure(used, loader, head="model.fc", batch_size=50)
    assert numbers(result) == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert model.samples == 200


def test_nc4_is_exact_in_one_pass_or_two_and_approximate_with_earlier_means(data: Pair) -> None:
    model = Counting(Net())
    kept = measure(model, data, head="model.fc")
    assert model.samples == 200
    again = measure(model, data, head="model.fc", keep_bytes=100)
    assert model.samples == 600
    assert again.nc4 == kept.nc4
    near = measure(model, data, head="model.fc", keep_bytes=0, previous=again)
    assert model.samples == 800
    assert near.nc4 == kept.nc4
    moved = dataclasses.replace(again, means=again.means.flip(0))
    assert measure(model, data, head="model.fc", previous=moved).nc4 != kept.nc4
    with pytest.warns(UserWarning, match="NC4 is unknown"):
        unknown = measure(model, iter([data]), head="model.fc", keep_bytes=100)
    assert math.isnan(unknown.nc4)
    assert unknown.nc1 == kept.nc1


class Static(nn.Module):
    """Writes its features into the same memory for each batch, as a CUDA graph does."""

    def __init__(self, model: Net, size: int) -> None:
        super().__init__()
        self.model, self.features = model, torch.empty(size, 12)

    def forward(self, x: Tensor) -> Tensor:
        self.features.copy_(self.model.body(self.model.stem(x)))
        return self.model.fc(self.features)


@pytest.mark.parametrize("moment", ["full", "projected"])
def test_features_and_labels_may_be_overwritten_by_the_next_batch(data: Pair, moment: Any) -> None:
    model, labels = Net(), torch.empty(50, dtype=torch.int64)
    expected = measure(model, data, head="fc", moment=moment, batch_size=50)

    def loader() -> Iterator[Pair]:
        for x, y in zip(data[0].split(50), data[1].split(50), strict=True):
            yield x, labels.copy_(y)

    class Loader:
        def __iter__(self) -> Iterator[Pair]:
            return loader()

    found = measure(Static(model, 50), Loader(), head="model.fc", moment=moment)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6, nan_ok=True)


def test_a_batch_that_comes_late_has_its_own_samples(data: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU must tell whether labels are to be ignored: the next batch runs meanwhile."""
    model, labels = Counting(Net()), data[1].clone()
    labels[[3, 60, 61, 199]] = -100
    expected = numbers(measure(model, (data[0], labels), head="model.fc", layers=("model.stem",), batch_size=30))
    begin, ran = Selected.__init__, list[int]()

    def late(self: Selected, *args: Any) -> None:
        begin(self, *args)
        self.waits = True

    samples = Selected.samples
    monkeypatch.setattr(Selected, "__init__", late)
    monkeypatch.setattr(Selected, "samples", lambda self: (ran.append(model.samples), samples(self))[1])
    model.samples = 0
    ours = numbers(measure(model, (data[0], labels), head="model.fc", layers=("model.stem",), batch_size=30))
    assert ours == pytest.approx(expected, nan_ok=True)
    assert ran == [60, 90, 120, 150, 180, 200, 200]


@pytest.mark.parametrize(
    ("several", "passes"),
    [({}, 1), ({"keep_bytes": 0}, 2), ({"further": False}, 2), ({"layers": (), "further": False}, 1)],
    ids=["all kept", "nothing kept", "head kept", "head alone"],
)
def test_projected_takes_a_second_pass_for_what_is_not_kept_and_agrees(
    several: dict[str, Any], passes: int, data: Pair
) -> None:
    model = Counting(Net())
    options: dict[str, Any] = {"head": "model.fc", "layers": ("model.stem",)} | several
    result = measure(model, data, moment="projected", **options)
    assert model.samples == 200 * passes
    for earlier, ours in (
        (None, result), (result, measure(model, data, moment="projected", previous=result, **options)),
    ):  # fmt: skip
        expected = measure(model, data, previous=earlier, **(options | {"keep_bytes": 2**30}))
        assert numbers(ours) == pytest.approx(numbers(expected), rel=1e-4, nan_ok=True)
    with pytest.raises(ValueError, match="an iterator allows one"):
        measure(model, iter([data]), moment="projected", head="model.fc")


def test_a_model_that_is_nan_is_an_error_or_nan(data: Pair) -> None:
    model = Net()
    model.stem.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="ClassStats of 'fc': the batch was refused, for 2400 values that are NaN"):
        measure(model, data)
    result = measure(model, data, nan_policy="propagate")
    assert all(math.isnan(value) for value in (result.nc1, result.nc2, result.nc3, result.nc4))
    assert result.nc0 == metrics.nc0(model.fc.weight).item()


def test_vanished_means_and_missing_classes_are_warned_of_once_per_layer(data: Pair) -> None:
    model = Net()
    model.stem.weight.data.zero_()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        result = measure(model, data, layers=("stem",))
    text = ": the class means have vanished or are all the same: NC1–NC3 are undefined (NaN)"
    assert sorted(str(w.message) for w in warned) == [f"fc{text}", f"stem{text}"]
    assert math.isnan(result.layers["stem"].nc1)
    assert result.degenerate is True
    keep = data[1] != 2
    with pytest.warns(UserWarning, match="fc: no samples of class 2: left out"):
        missing = measure(Net(), (data[0][keep], data[1][keep]))
    assert missing.means[2].isnan().all()
    assert not math.isnan(missing.nc4)


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


def test_errors_say_what_to_do_and_restore_the_model(data: Pair) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"no module 'head'.*linear layers: body.1, fc"):
        measure(model, data, head="head")
    with pytest.raises(ValueError, match=r"no module 'sten'; near matches: stem"):
        measure(model, data, layers=("sten",))
    with pytest.raises(TypeError, match="the head 'stem', a Conv2d, is not linear"):
        measure(model, data, head="stem")
    for empty in ([], (data[0][:0], data[1][:0])):
        with pytest.raises(ValueError, match="gave no samples"):
            measure(model, empty)
    with pytest.raises(ValueError, match="200 inputs and 100 labels"):
        measure(model, (data[0], data[1][:100]))
    with pytest.raises(ValueError, match="ClassStats of 'fc': the batch was refused, for 50 labels outside"):
        measure(model, (data[0], data[1] + 1))
    with pytest.raises(TypeError, match="labels must be integers"):
        measure(model, (data[0], data[1].float()))
    with pytest.raises(ValueError, match=r"a batch must be a pair \(inputs, labels\).*gave a Tensor"):
        measure(model, [data[0]])
    with pytest.raises(ValueError, match=r"previous has means \(4, 12\); the head 'body.1'"):
        measure(model, data, head="body.1", previous=measure(model, data))
    with pytest.raises(ValueError, match="the head 'fc' ran 2 times"):
        measure(Twice(), data)
    with pytest.raises(ValueError, match="at least two classes; got 1"):
        measure(model, (data[0][::4], data[1][::4]))
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks


def test_a_callback_measures_at_regular_intervals(data: Pair) -> None:
    model = Net()
    callback = NCCallback(model, data, every=3, layers=("stem",))
    due = [callback() for _ in range(7)]
    assert [result is not None for result in due] == [True, False, False, True, False, False, True]
    assert [call for call, _ in callback.history] == [0, 3, 6]
    assert numbers(callback.history[1][1]) == pytest.approx(
        numbers(measure(model, data, layers=("stem",))), nan_ok=True
    )
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        NCCallback(model, data, every=0)

    def once() -> Iterator[Pair]:
        yield data

    with pytest.raises(ValueError, match="an iterator can be read only once"):
        NCCallback(model, once())
