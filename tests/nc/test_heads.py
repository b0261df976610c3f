"""The head is found by what it computes: features and weight are those that are multiplied."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ncollapse import Head, NCResult, measure
from ncollapse.heads import LinearHead
from plain_metrics import plain_metrics

N, D, K = 90, 12, 3


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    labels = torch.arange(N) % K
    return torch.randn(N, 6) + 2 * torch.eye(K, 6)[labels], labels


def agree(result: NCResult, features: Tensor, weight: Tensor, logits: Tensor, labels: Tensor) -> None:
    expected = plain_metrics(features, weight, logits, labels)
    assert {name: getattr(result, name) for name in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)


class Net(nn.Module):
    """A body and any head of the given kind."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class Cosine(nn.Linear):
    """Features and weight normalised, times a scale."""

    def forward(self, x: Tensor) -> Tensor:
        return 7 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Standardised(nn.Linear):
    """A weight without mean, and a bias after the product, which has W on the left."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.effective() @ x.mT).mT + self.bias

    def effective(self) -> Tensor:
        return self.weight - self.weight.mean(1, keepdim=True)


class CosineBySums(nn.Module):
    """No product of matrices; no linear layer by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D))

    def forward(self, x: Tensor) -> Tensor:
        return F.cosine_similarity(x[:, None], self.weight[None], dim=-1) / 0.1


class Transposed(nn.Module):
    """The weight is [d, K], as in GPT-2's Conv1D, and d = K here would not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, K))
        self.bias = nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


Rows = Callable[[Any, Tensor], Tensor]
HEADS: dict[str, tuple[Callable[[], nn.Module], Rows, Callable[[Any], Tensor]]] = {
    "linear": (lambda: nn.Linear(D, K), lambda m, h: h, lambda m: m.weight),
    "cosine": (
        lambda: Cosine(D, K, bias=False), lambda m, h: F.normalize(h), lambda m: 7 * F.normalize(m.weight, dim=-1)
    ),
    "standardised": (lambda: Standardised(D, K), lambda m, h: h, lambda m: m.effective()),
    "cosine by sums": (CosineBySums, lambda m, h: F.normalize(h), lambda m: 10 * F.normalize(m.weight)),
    "transposed": (Transposed, lambda m, h: h, lambda m: m.weight.T),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(D, K)), lambda m, h: h, lambda m: m.weight),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(D, K)), lambda m, h: h, lambda m: m.weight),
    "lazy": (lambda: nn.LazyLinear(K), lambda m, h: h, lambda m: m.weight),
    "sequence": (
        lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, K)), lambda m, h: m[0](h), lambda m: m[1].weight
    ),
    "wrapped": (
        lambda: nn.Sequential(nn.Identity(), torch.compile(nn.Linear(D, K), backend="eager")),
        lambda m, h: h, lambda m: m[1].weight,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("given", ["named", "left out"])
def test_effective_features_and_weight(kind: str, given: str, data: tuple[Tensor, Tensor]) -> None:
    make, features_of, weight_of = HEADS[kind]
    model = Net(make()).eval()
    x, labels = data
    with torch.no_grad():
        h, logits = model.body(x), model(x)
        result = measure(model, data, batch_size=32, **({"head": "head"} if given == "named" else {}))
        agree(result, features_of(model.head, h), weight_of(model.head), logits, labels)
        call = LinearHead(model.head, "head")((h,), {}, logits) if kind not in ("sequence", "wrapped") else None
        if call is not None:  # the bias goes with them
            assert call.bias is not None
            torch.testing.assert_close(call.features @ call.weight.T + call.bias, logits, rtol=1e-4, atol=1e-5)
    assert result.head == {"sequence": "head.1", "wrapped": "head.1"}.get(kind, "head")


@pytest.mark.parametrize("size", [1, 31, N - 1])
def test_batches_of_one_sample(size: int, data: tuple[Tensor, Tensor]) -> None:
    model = Net(Cosine(D, K, bias=False))
    expected = measure(model, data).as_dict()
    assert measure(model, data, batch_size=size).as_dict() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_rounding_and_large_biases_hide_nothing(data: tuple[Tensor, Tensor]) -> None:
    class Shifted(Cosine):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e3

    model = Net(Shifted(D, K, bias=False))
    nc0 = 49 * F.normalize(model.head.weight.detach(), dim=-1).sum(0).square().sum()
    assert measure(model, data).nc0 == pytest.approx(float(nc0), rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="is not linear"):  # the sum with 1,000 has no digit of the product
            measure(model, data)
        assert measure(Net(Cosine(D, K, bias=False)), data).nc1 > 0
        assert measure(Net(nn.Linear(D, K)), data).head == "head"
    half = Net(nn.Linear(D, K)).bfloat16()
    assert measure(half, (data[0].bfloat16(), data[1])).nc0 == half.head.weight.double().sum(0).square().sum().item()
    exact = Net(nn.Linear(D, K)).double()
    with torch.no_grad():
        h = exact.body(data[0].double())
        expected = plain_metrics(h, exact.head.weight, exact.head(h), data[1])
    assert measure(exact, (data[0].double(), data[1])).nc1 == pytest.approx(expected["nc1"], rel=1e-10)
    assert measure(exact, (data[0].double().numpy(), data[1])).nc1 == pytest.approx(expected["nc1"], rel=1e-10)


def test_one_logit_is_refused_in_words(data: tuple[Tensor, Tensor]) -> None:
    model, x, labels = Net(nn.Linear(D, 1)), data[0], data[1] % 2
    with pytest.raises(ValueError, match=r"the head has one output.*one of the logits \(0, z\)"):
        measure(model, (x, labels.float()))
    w = model.head.weight
    two = Head("body", torch.cat([torch.zeros_like(w), w]), lambda z: F.pad(z, (1, 0)))
    assert (
        measure(model, (x, labels), head=two).train_accuracy == (model(x)[:, 0] > 0).eq(labels).double().mean().item()
    )


def test_what_is_not_linear_is_refused_and_described_by_a_head(data: tuple[Tensor, Tensor]) -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(K, D))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": -torch.cdist(x, self.centres)}

    class Bare(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -torch.cdist(x, self.weight)

    x, labels = data
    with pytest.raises(TypeError, match=r"the head 'head', a Bare, is not linear.*head=ncollapse.Head\(features="):
        measure(Net(Bare(D, K)), data)
    model = Net(Distances()).eval()
    with pytest.raises(TypeError, match="must take a tensor and return one"):
        measure(model, data, head="head")
    centres = model.head.centres
    described = Head("body", lambda: 2 * centres, lambda output: output["scores"], name="distances")
    by_module = Head(model.body, 2 * centres)
    for head in (described, by_module):
        result = measure(model, data, head=head, batch_size=40)
        with torch.no_grad():
            agree(result, model.body(x), 2 * centres, model(x)["scores"], labels)
    assert (described.name, by_module.name) == ("distances", "head")
    for wrong, message in (
        (Head("bod", centres), "no module 'bod'; near matches: body"),
        (Head("body", centres[0]), r"must be \[K, d\]; it is \(12,\)"),
        (Head("body", centres[:, 1:]), r"features \(90, 12\).*weight \(3, 11\)"),
        (Head("body", centres[1:]), r"0 tensors \[B, K\]"),
        (Head(lambda output: output, centres), "gives a dict, not a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, data, head=wrong)


class Places(nn.Module):
    """A 1 × 1 convolution before or after pooling, or the ReLU of SqueezeNet between them."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.stem, self.conv, self.order = nn.Conv2d(1, D, 3), nn.Conv2d(D, K, 1), order

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        if self.order == "after":
            return self.conv(maps.mean((2, 3), keepdim=True)).flatten(1)
        logits = self.conv(maps)
        if self.order == "largest":
            return logits.amax((2, 3))
        return (logits.relu_() if self.order == "relu" else logits).mean((2, 3))


@pytest.mark.parametrize("order", ["before", "after", "relu"])
def test_a_pointwise_convolution_before_and_after_pooling(order: str) -> None:
    model, x, labels = Places(order).eval(), torch.randn(N, 1, 6, 6), torch.arange(N) % K
    result = measure(model, (x, labels))
    with torch.no_grad():
        maps = model.stem(x)
        agree(result, maps.mean((2, 3)), model.conv.weight.flatten(1), model(x), labels)
    assert result.head == "conv"
    corner = measure(model, (x, labels), pool=lambda maps: maps[..., 0, 0] if maps.dim() == 4 else maps)
    if order != "after":
        assert corner.nc1 != pytest.approx(result.nc1)


def test_other_pooling_than_the_mean_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="not those of the mean over places"):
        measure(Places("largest"), (torch.randn(N, 1, 6, 6), torch.arange(N) % K))


def test_every_place_of_a_segmentation_is_a_sample() -> None:
    model = nn.Sequential(nn.Conv2d(1, D, 3, padding=1), nn.Conv2d(D, K, 1)).eval()
    x, labels = torch.randn(5, 1, 6, 6), torch.randint(0, K, (5, 6, 6))
    labels[0, 0] = 255
    used = labels != 255
    with torch.no_grad():
        features, logits = model[0](x).movedim(1, -1)[used], model(x).movedim(1, -1)[used]
    result = measure(
        model, (x, labels), ignore_index=255, layers=("0",), pool=lambda maps: maps.movedim(1, -1).flatten(0, -2)
    )
    agree(result, features, model[1].weight.flatten(1), logits, labels[used])
    assert result.layers["0"].nc1 == result.nc1
    with pytest.raises(ValueError, match=r"each of \(6, 6\) tokens or places, and the features of 0 are \(5, 12\)"):
        measure(model, (x, labels), ignore_index=255, layers=("0",))


class Tokens(nn.Module):
    """A head that runs over all tokens, as in decoders for classification; the model returns one of them, or more."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.body, self.score, self.use = nn.Linear(6, D), nn.Linear(D, K, bias=False), use

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Any:
        logits = self.score(self.body(tokens).relu())
        if self.use == "last":
            last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
            logits = logits[torch.arange(len(logits)), last]
        elif self.use == "mean":
            logits = logits.mean(1)
        elif self.use == "mean of words":
            shown = attention_mask.unsqueeze(-1).float()
            logits = (logits * shown).sum(1) / shown.sum(1)
        elif self.use == "largest":
            logits = logits.amax(1)
        return {"loss": None, "logits": logits}


def sentences(labels: Tensor) -> dict[str, Tensor]:
    lengths = torch.arange(len(labels)) % 4 + 2
    return {"tokens": torch.randn(len(labels), 5, 6), "attention_mask": (torch.arange(5) < lengths[:, None]).long()}


@pytest.mark.parametrize("use", ["last", "mean", "mean of words"])
def test_the_tokens_whose_logits_the_model_returns(use: str) -> None:
    model, labels = Tokens(use).eval(), torch.arange(N) % K
    batch = sentences(labels)
    shown = batch["attention_mask"]
    with torch.no_grad():
        h, logits = model.body(batch["tokens"]).relu(), model(**batch)["logits"]
    features = {
        "last": h[torch.arange(N), shown.sum(1) - 1],
        "mean": h.mean(1),
        "mean of words": (h * shown[..., None]).sum(1) / shown.sum(1, keepdim=True),
    }[use]
    loader = [{**batch, "labels": labels}]
    agree(measure(model, loader), features, model.score.weight, logits, labels)
    pool: Any = {"last": "last", "mean": lambda h: h.mean(1), "mean of words": "mean"}[use]
    result = measure(model, loader, pool=pool, layers=("body",))
    agree(result, features, model.score.weight, logits, labels)
    assert result.layers["body"].nc1 > 0


def test_tokens_that_cannot_be_told_need_a_pool_or_a_label_each() -> None:
    model, labels = Tokens("largest").eval(), torch.arange(N) % K
    batch = sentences(labels)
    with pytest.raises(ValueError, match=r"ran over \(5,\) tokens.*give `pool`: 'mean', 'first', 'last' or a function"):
        measure(model, [{**batch, "labels": labels}])
    with pytest.raises(ValueError, match="pool is a function, 'mean', 'first' or 'last', not 'middle'"):
        measure(model, [{**batch, "labels": labels}], pool="middle")  # type: ignore[call-overload]
    of_tokens = torch.randint(0, K, (N, 5))
    of_tokens[:, 0] = -100
    model = Tokens("all").eval()
    result = measure(model, [{**batch, "labels": of_tokens}], layers=("body",))
    used = (batch["attention_mask"] > 0) & (of_tokens >= 0)
    with torch.no_grad():
        h = model.body(batch["tokens"]).relu()[used]
        agree(result, h, model.score.weight, model.score(h), of_tokens[used])


class TwoHeads(nn.Module):
    """The head that is registered first runs last, and each has labels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.body = nn.Linear(D, K), nn.Linear(D, 2), nn.Linear(6, D)
        self.passes = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += 1
        h = self.body(x)
        return self.coarse(h), self.fine(h)


def test_several_heads_by_name(data: tuple[Tensor, Tensor]) -> None:
    model = TwoHeads().eval()
    x, labels = data
    by_name = {"fine": labels, "coarse": labels % 2}
    results = measure(model, [(x, by_name)], head=["fine", "coarse"])
    with torch.no_grad():
        h = model.body(x)
        for name, head in (("fine", model.fine), ("coarse", model.coarse)):
            agree(results[name], h, head.weight, head(h), by_name[name])
    again = measure(
        model,
        [(x, by_name)],
        head={"a": model.fine},
        previous={"a": results["fine"]},
        batch=lambda b: (b[0], {"a": b[1]["fine"]}),
    )
    assert again["a"].nc4 == results["fine"].nc4
    with pytest.raises(ValueError, match="different names; got fine, fine"):
        measure(model, data, head=["fine", model.fine])
    with pytest.raises(ValueError, match="of several heads each"):
        measure(model, data, head=[])
    model.passes = 0
    assert measure(model, data).head == "fine"
    assert model.passes == 2  # the layer that is registered last was not the head
    assert measure(model, data, head=model.fine).nc1 == results["fine"].nc1


class Averaged(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        coarse, fine = super().forward(x)
        return (fine + 3 * F.pad(coarse, (0, 1))) / 2


def test_a_model_that_returns_something_else_than_its_last_linear_layer(data: tuple[Tensor, Tensor]) -> None:
    with pytest.warns(UserWarning, match="not those of its last linear layer 'fine'"):
        measure(Averaged(), data)
    bare = Net(nn.Identity())
    bare.head = nn.Unflatten(1, (4, 3))
    with pytest.raises(ValueError, match=r"last linear layer that ran is 'body.0', with 12 outputs.*\(90, 4, 3\)"):
        measure(bare, data)
    with pytest.raises(ValueError, match="the model has no linear layer"):
        measure(nn.Sequential(nn.Flatten()), data)
    for scale in (lambda z: z.log_softmax(1), lambda z: z.softmax(1), lambda z: (z / 3).half()):
        model = Net(nn.Linear(D, K))
        model.register_forward_hook(lambda _, __, z, scale=scale: scale(z))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert measure(model, data).head == "head"


def test_compiled_and_wrapped_models(data: tuple[Tensor, Tensor]) -> None:
    expected = measure(Net(nn.Linear(D, K)), data)

    def same(model: nn.Module, head: str | None = None) -> None:
        for _ in range(2):  # a second call of compiled code once ran without hooks
            with torch.no_grad():
                model(data[0])
            result = measure(model, data, head=head)
            assert result.as_dict() == pytest.approx(expected.as_dict(), rel=1e-6, nan_ok=True)
            assert result.head == "head"

    plain = Net(nn.Linear(D, K))
    expected = measure(plain, data)
    state = plain.state_dict()

    def fresh() -> Net:
        model = Net(nn.Linear(D, K))
        model.load_state_dict(state)
        return model

    in_place = fresh()
    in_place.compile(backend="eager")
    same(in_place)
    part = fresh()
    part.body.compile(backend="eager")
    part.head = torch.compile(part.head, backend="eager")  # type: ignore[assignment]
    same(part)
    same(part, "head")
    forward = fresh()
    forward.forward = torch.compile(forward.forward, backend="eager")  # type: ignore[method-assign]
    same(forward)
    same(torch.compile(nn.DataParallel(fresh()), backend="eager"), "module.head")  # type: ignore[arg-type]
    same(torch.fx.symbolic_trace(fresh()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_models_without_layers_are_refused(data: tuple[Tensor, Tensor]) -> None:
    model = Net(nn.Linear(D, K))
    for functions in (torch.jit.trace(model, data[0]), torch.export.export(model, data[:1]).module()):
        with pytest.raises(ValueError, match="an exported, scripted or traced model has functions for layers"):
            measure(functions, data)
