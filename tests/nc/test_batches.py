"""What a loader may yield, and which labels are classes."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ncollapse import NCResult, measure
from ncollapse.progress import tracked

N, K = 60, 3
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % K


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, K)
        self.samples = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        self.samples += len(x)
        return self.fc(x * scale)


class AnyKeywords(Net):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        assert all(isinstance(value, Tensor) for value in more.values())
        return super().forward(x)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return X[i].numpy(), int(Y[i])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([{"x": X[i], "label": int(Y[i])} for i in range(N)])


def parts(*tensors: Any) -> list[tuple[Any, ...]]:
    """Batches of 7, as tuples."""
    return [tuple(t[i : i + 7] for t in tensors) for i in range(0, N, 7)]


INDEX = torch.arange(N)
LOADERS: dict[str, Any] = {
    "tensors": (X, Y),
    "tensors in a list": [X, Y],
    "arrays": (X.double().numpy(), Y.numpy()),
    "batches of arrays": parts(X.numpy(), Y.numpy().astype(np.uint16)),
    "lists of labels": [(x, y.tolist()) for x, y in parts(X, Y)],
    "triples": parts(X, Y, INDEX),
    "quadruples": parts(X, Y, torch.rand(N), INDEX),
    "labels": [{"x": x, "labels": y} for x, y in parts(X, Y)],
    "label": [{"x": x, "label": y} for x, y in parts(X, Y)],
    "a mapping of arrays": [{"x": x.double().numpy(), "label": y.numpy()} for x, y in parts(X, Y)],
    "extra keys": [{"x": x, "label": y, "idx": i, "text": ["a"]} for x, y, i in parts(X, Y, INDEX)],
    "another name": [{"image": x, "label": y, "text": ["a"]} for x, y in parts(X, Y)],
    "nested": [((x, {"unused": None}["unused"] or torch.ones(())), y) for x, y in parts(X, Y)],
    "data set": Pairs(),
    "tensor data set": TensorDataset(X, Y, INDEX),
    "stream": Stream(),
    "samples": list(zip(X, Y, strict=True)),
    "samples of integers": list(zip(X, Y.tolist(), strict=True)),
    "loader": DataLoader(TensorDataset(X, Y), 7),
}


def check(result: NCResult, expected: NCResult) -> None:
    assert result.as_dict() == pytest.approx(expected.as_dict(), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("kind", LOADERS)
def test_kinds_of_loaders(kind: str) -> None:
    model = Net()
    expected = measure(model, (X, Y))
    model.samples = 0
    check(measure(model, LOADERS[kind], batch_size=7), expected)
    assert model.samples == N


LABELS: dict[str, Tensor] = {
    **{str(t).removeprefix("torch."): Y.to(t) for t in (torch.uint8, torch.int8, torch.int16, torch.int32)},
    "uint16": Y.to(torch.uint16),
    "column": Y[:, None],
    "one-hot": nn.functional.one_hot(Y),
    "one-hot floats": nn.functional.one_hot(Y).float(),
    "one-hot booleans": nn.functional.one_hot(Y).bool(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_kinds_of_labels(kind: str) -> None:
    model = Net()
    check(measure(model, (X, LABELS[kind]), batch_size=7), measure(model, (X, Y)))


def test_models_that_take_any_keyword() -> None:
    model = AnyKeywords()
    check(measure(model, LOADERS["extra keys"]), measure(model, (X, Y)))


def test_ignored_labels_are_left_out_with_their_features() -> None:
    model = Net()
    ignored = Y.clone()
    ignored[::4] = -100
    keep = ignored >= 0
    expected = measure(model, (X[keep], Y[keep]), layers=("fc",))
    check(measure(model, (X, ignored), layers=("fc",), batch_size=7), expected)
    check(measure(model, (X, ignored.masked_fill(~keep, 9)), layers=("fc",), ignore_index=9), expected)
    with pytest.raises(ValueError, match="for 15 labels outside"):
        measure(model, (X, ignored), ignore_index=None)


def test_an_adapter_of_batches() -> None:
    model = Net()
    check(
        measure(model, [{"i": x, "t": y} for x, y in parts(X, Y)], batch=lambda b: (b["i"], b["t"])),
        measure(model, (X, Y)),
    )
    check(measure(model, (X, Y), batch=lambda b: (b[0] / 2, b[1])), measure(model, (X / 2, Y)))


def test_what_is_no_label_of_one_class_is_refused_in_words() -> None:
    model = Net()
    mixed = 0.9 * nn.functional.one_hot(Y) + 0.1 / K
    several = nn.functional.one_hot(Y)
    several[:, 0] = 1
    for labels, message in (
        (mixed, "the labels are soft, and neural collapse needs the one class of each sample"),
        (several, "the labels are several classes for a sample"),
        (Y[:, None].expand(N, 5), r"one-hot \[B, K\] with K = 3; got \(60, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, (X, labels))
    for wrong in (Y.float(), Y.bool()):
        with pytest.raises(TypeError, match="labels must be integers"):
            measure(model, (X, wrong))


def test_a_batch_without_labels_is_refused_in_words() -> None:
    model = Net()
    for loader, message in (
        ([(X, X[:, 0], Y)], r"gave a tuple of torch.float32 \(60, 6\), torch.float32 \(60,\), torch.int64 \(60,\)"),
        ([{"x": X, "target": Y}], "gave a mapping with 'x', 'target'. For others give `batch`"),
        ([{"x": X, "label": Y, "labels": Y}], "gave a mapping with 'x', 'label', 'labels'"),
        ([{"a": X, "b": X, "labels": Y}], "a batch has 'a', 'b', the model takes x, scale; give `batch`"),
        (X, "gave a Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, loader)


def test_a_progress_bar_is_shown_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    measure(Net(), (X, Y), batch_size=7)
    measure(Net(), (X, Y), batch_size=7, progress=False)
    assert shown.getvalue() == ""
    measure(Net(), (X, Y), batch_size=7, progress=True)
    assert "measure" in shown.getvalue()
    assert "9/9" in shown.getvalue()


@pytest.mark.parametrize(("patience", "shows"), [(0.0, True), (float("inf"), False)])
def test_a_progress_bar_nobody_asked_for(patience: float, shows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("ncollapse.progress._PATIENCE", patience)
    monkeypatch.setattr("ncollapse.progress.time.monotonic", iter(range(10)).__next__)
    assert list(tracked("abc", None, None)) == ["a", "b", "c"]
    assert bool(shown.getvalue()) is shows
