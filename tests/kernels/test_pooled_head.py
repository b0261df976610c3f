"""The maximum over space with a linear head: the kernels, in Triton's interpreter and on a GPU, beside float64."""

import math

import pytest
import torch
from torch import Tensor

import interpreter
from devices import cases, only
from ncollapse.kernels import operators
from ncollapse.kernels.cross_entropy.reference import cross_entropy_grad_reference
from ncollapse.kernels.pooled_head import gpu, op, pooled_head, why_no_kernel
from ncollapse.kernels.pooled_head.reference import pooled_head_reference
from pooled_head_cases import Inputs, Outcome, Shape, channels_last, check, inputs, outcome

SHAPES = [(1, 3, 16, 3, 3, 10), (2, 2, 5, 4, 3, 2), (1, 1, 1, 1, 1, 1), (3, 2, 20, 7, 2, 3)]
LARGE = [(1, 128, 512, 3, 3, 10), (1, 77, 512, 4, 4, 100), (24, 128, 32, 7, 7, 10), (2, 1000, 70, 3, 3, 17),
         (1, 5, 2048, 2, 2, 128)]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    with interpreter.quiet():
        return pooled_head(maps, weight, bias)


def exact(given: Inputs) -> Outcome:
    return outcome(pooled_head_reference, given.to(torch.float64))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one round in every loop: two pixels, two classes and sixteen samples at a time."""
    monkeypatch.setattr(gpu, "ELEMENTS", 8)
    monkeypatch.setattr(gpu, "SAMPLES", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases("shape", SHAPES, LARGE)
def test_the_kernels(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    given = inputs(shape, dtype, relu=shape[0] > 1, device=device)
    with interpreter.quiet():
        ours = outcome(kernel, given)
    check(ours, exact(given), dtype)
    assert ours.features.dtype == ours.maps.dtype == dtype
    assert ours.logits.dtype == ours.weight.dtype == ours.bias.dtype == torch.float32
    assert ours.features.is_contiguous()
    assert ours.logits.is_contiguous()
    assert ours.weight.is_contiguous()
    assert ours.maps.stride() == given.maps.stride()


@pytest.mark.usefixtures("small_tiles")
def test_tiles_that_do_not_divide_pixels_classes_and_samples(device: torch.device) -> None:
    given = inputs((2, 19, 3, 3, 3, 5), device=device)
    given = given._replace(features_grad=torch.randn(2, 19, 3, device=device))
    with interpreter.quiet():
        check(outcome(kernel, given), exact(given), torch.float32)


def test_without_a_bias_and_with_a_gradient_of_the_features(device: torch.device) -> None:
    given = inputs((2, 3, 5, 3, 3, 4), device=device)._replace(bias=None)
    for features_grad in (None, torch.randn(3, 2, 5, device=device).transpose(0, 1)):
        both = given._replace(features_grad=features_grad)
        with interpreter.quiet():
            check(outcome(kernel, both), exact(both), torch.float32)
    maps = given.maps.clone().requires_grad_()
    features, _ = kernel(maps, given.weight, None)  # of the features alone
    with interpreter.quiet():
        ours = torch.autograd.grad(features.sum(), maps)[0]
    theirs = torch.autograd.grad(pooled_head_reference(maps, given.weight, None)[0].sum(), maps)[0]
    assert torch.equal(ours, theirs)


def test_ties_share_the_gradient_evenly(device: torch.device) -> None:
    """With the bits of autograd, where all numbers are small powers of two or their sums."""
    maps = torch.zeros(2, 4, 3, 3, device=device)
    maps[0, 1] = 1.0
    maps[0, 2, 0, 0] = maps[0, 2, 2, 1] = 2.0
    maps[1, 3, 1, 1] = maps[1, 3, 0, 2] = maps[1, 3, 2, 2] = maps[1, 3, 0, 0] = 0.5
    weight = torch.tensor([[[1.0, -2.0, 4.0, 8.0], [0.5, 1.0, 1.0, -1.0]]], device=device)
    given = Inputs(channels_last(maps), weight, None, torch.tensor([[[4.0, -4.0], [8.0, -8.0]]], device=device))
    with interpreter.quiet():
        ours, theirs = outcome(kernel, given), outcome(pooled_head_reference, given)
    for name in ("features", "logits", "maps", "weight"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.maps[0, 2] != 0).sum() == 2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("at", [0, 8], ids=["in the first tile", "in the last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(device: torch.device, value: float, at: int) -> None:
    """They make those results not finite that they make so by torch's operations; no other changes."""
    given = inputs((2, 3, 4, 3, 3, 3), relu=False, device=device)
    given.maps[1, 2].view(-1)[at] = value
    given.maps[2, 7] = value  # all of a map
    with interpreter.quiet():
        ours = outcome(kernel, given)
    theirs = outcome(pooled_head_reference, given)
    assert torch.equal(ours.features.nan_to_num(7.0), theirs.features.nan_to_num(7.0))
    for name in ("features", "logits", "maps", "weight", "bias"):
        our, their = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(device: torch.device, value: float) -> None:
    given = inputs((1, 3, 4, 3, 3, 3), device=device)
    given.logits_grad[0, 1, 2] = value
    with interpreter.quiet():
        ours = outcome(kernel, given)
    theirs = outcome(pooled_head_reference, given)
    for name in ("maps", "weight", "bias"):
        assert torch.equal(getattr(ours, name).isfinite(), getattr(theirs, name).isfinite()), name
    assert ours.maps[[0, 2]].isfinite().all()


def test_a_run_has_the_bits_that_it_has_alone(device: torch.device) -> None:
    """Whatever stands beside it, and in whatever order programs run."""
    given = inputs((3, 5, 16, 3, 3, 4), torch.bfloat16, device=device)
    with interpreter.quiet():
        together = outcome(kernel, given)
        for r in range(3):
            alone = outcome(
                kernel,
                Inputs(
                    channels_last(given.maps[:, 16 * r : 16 * r + 16]), given.weight[r : r + 1].clone(),
                    given.bias[r : r + 1].clone(), given.logits_grad[r : r + 1].clone(),
                ),
            )  # fmt: skip
            for name in ("features", "logits", "weight", "bias"):
                assert torch.equal(getattr(alone, name)[0], getattr(together, name)[r]), name
            assert torch.equal(alone.maps, together.maps[:, 16 * r : 16 * r + 16])


@only("interpreter")
def test_the_order_of_programs_does_not_matter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given, order = inputs((2, 3, 20, 3, 3, 4), device=device), list[int]()
    with interpreter.quiet():
        before = outcome(kernel, given)
        interpreter.run_backwards(monkeypatch, order)
        after = outcome(kernel, given)
    assert order
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)


def test_the_row_sum_of_the_weights_gradient_is_exactly_zero_for_two_classes(device: torch.device) -> None:
    """Both classes add the same products in the same order, with opposite signs."""
    given = inputs((1, 20, 16, 3, 3, 2), torch.bfloat16, relu=False, device=device)
    labels = torch.arange(20, device=device) % 2
    logits = kernel(*given[:3])[1]
    given = given._replace(logits_grad=cross_entropy_grad_reference(logits, labels))
    with interpreter.quiet():
        ours = outcome(kernel, given)
    assert (ours.weight.sum(1) == 0).all()
    assert (ours.bias.sum(1) == 0).all()
    assert ours.weight.abs().max() > 0.1


def test_no_samples(device: torch.device) -> None:
    given = inputs((2, 0, 5, 3, 3, 4), device=device)
    ours = outcome(kernel, given)
    assert ours.logits.shape == (2, 0, 4)
    assert ours.maps.shape == (0, 10, 3, 3)
    assert not ours.weight.any()
    assert not ours.bias.any()


REFUSED = {
    "fits": None,
    "other channels": "maps (2, 9, 3, 3) are not those of weights (2, 4, 5)",
    "float64 maps": "there is no kernel for torch.float64 maps",
    "not channels-last": "the maps are empty or not channels-last",
    "no samples": "the maps are empty or not channels-last",
    "float64 weight": "weight and bias are not dense float32 beside the maps",
    "strided weight": "weight and bias are not dense float32 beside the maps",
    "float64 bias": "weight and bias are not dense float32 beside the maps",
    "many classes": "there are more than 128 classes, 2048 channels or 1024 samples",
    "many samples": "there are more than 128 classes, 2048 channels or 1024 samples",
}


def unfit(name: str) -> tuple[Tensor, Tensor, Tensor]:
    maps, weight, bias, *_ = inputs((2, 2, 5, 3, 3, 4))
    assert bias is not None
    return {
        "fits": (maps, weight, bias),
        "other channels": (channels_last(maps[:, :9]), weight, bias),
        "float64 maps": (maps.double(), weight, bias),
        "not channels-last": (maps.contiguous(), weight, bias),
        "no samples": (maps[:0], weight, bias),
        "float64 weight": (maps, weight.double(), bias),
        "strided weight": (maps, weight.mT.contiguous().mT, bias),
        "float64 bias": (maps, weight, bias.double()),
        "many classes": (maps, weight.repeat(1, 40, 1), bias.repeat(1, 40)),
        "many samples": (channels_last(maps.repeat(600, 1, 1, 1)), weight, bias),
    }[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda", 0)  # type: ignore[assignment]

    monkeypatch.setattr(operators, "why_no_kernel", lambda device: None)
    tensors = [t.as_subclass(OnDevice) for t in unfit(name)]
    assert why_no_kernel(*tensors) == REFUSED[name]
    monkeypatch.setattr(op, "ENABLED", False)
    assert why_no_kernel(*tensors) == "the kernels are turned off"


def test_the_most_channels_are_those_of_the_kernels() -> None:
    assert op._MOST_CHANNELS == gpu.MOST_CHANNELS
    assert gpu.tile(9, 10, gpu.MOST_CHANNELS) == (4, 4, 2048)
    assert gpu.tile(9, 10, 512) == (16, 16, 512)


def test_there_is_no_kernel_for_other_devices() -> None:
    given = inputs((1, 2, 3, 3, 3, 2))
    assert why_no_kernel(*given[:3]) == "there is no kernel for cpu tensors"
    on_meta = [t.to("meta") for t in given[:3] if t is not None]
    assert why_no_kernel(*on_meta) == "there is no kernel for meta tensors"


@only("interpreter")
def test_the_operators(device: torch.device) -> None:
    """torch checks the schemas, the fake tensors and the tracing."""
    given = inputs((2, 2, 5, 3, 3, 4), device=device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with interpreter.quiet():
        features, _, ties = op.forward_op(*given[:3])
        found = torch.library.opcheck(op.forward_op, given[:3], test_utils=checks)
        of_backward = (given.logits_grad, None, given.maps, given.weight, features, ties)
        found |= torch.library.opcheck(op.backward_op, of_backward, test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}
