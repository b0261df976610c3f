"""Convolutions of maps of few pixels, in Triton's interpreter and on a GPU, against torch's in float64.

The interpreter truncates to bfloat16 where a GPU rounds, so values may differ by a unit in the last place.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bfloat16_products
import interpreter
from batch_norm_cases import poisoned
from devices import cases, only
from ncollapse.kernels.convolution import fits, gpu, op, small_convolution, small_convolution_input_grad
from ncollapse.kernels.convolution.reference import (
    small_convolution_input_grad_reference,
    small_convolution_reference,
)

FUNCTIONS = {False: small_convolution, True: small_convolution_input_grad}
REFERENCES = {False: small_convolution_reference, True: small_convolution_input_grad_reference}
#: Images, channels of the maps and of the result in tiles, height and width.
Size = tuple[int, int, int, int, int]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work for the interpreter, whose products of bfloat16 are mended."""
    bfloat16_products.decode(monkeypatch)
    if "backend" in request.fixturenames and request.getfixturevalue("backend").name == "interpreter":
        for name, size in (("IMAGES", 16), ("COLUMNS", 32), ("STEP", 32), ("ADDED_IMAGES", 8), ("ADDED_COLUMNS", 16)):
            monkeypatch.setattr(gpu, name, size)
        monkeypatch.setattr(op, "MULTIPLE", 32)


@pytest.fixture
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Programs that run at once, as if the device had so many multiprocessors; parts have one step or more."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: request.param)
    monkeypatch.setattr(gpu, "LEAST_STEPS", 1)
    gpu.steps_each.cache_clear()
    yield request.param
    gpu.steps_each.cache_clear()


def tensors(size: Size, flip: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Maps, or with `flip` a gradient of the result, and weights."""
    samples, height, width = size[0], *size[3:]
    inputs, outputs = op.MULTIPLE * size[1], op.MULTIPLE * size[2]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        return made.contiguous(memory_format=torch.channels_last)

    return random(samples, outputs if flip else inputs, height, width), random(outputs, inputs, 3, 3)


def computed(x: Tensor, weight: Tensor, flip: bool) -> Tensor:
    with interpreter.quiet(), poisoned():
        return FUNCTIONS[flip](x, weight)


def check(ours: Tensor, x: Tensor, weight: Tensor, flip: bool) -> None:
    """Within a rounding to bfloat16 of each value, and those of sums, which tensor cores truncate."""
    exact = REFERENCES[flip](x.double(), weight.double())
    assert ours.shape == exact.shape
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=1e-4 * math.sqrt(9 * x.shape[1]))


# One pixel; one row; one column; all kinds of pixels; more images than a tile; the channels of the two differ.
SMALL = [(3, 1, 1, 3, 3), (18, 2, 1, 1, 2), (1, 1, 2, 1, 1), (2, 1, 1, 4, 1), (5, 2, 1, 2, 3)]
# Few kinds, as each is compiled; the number of images is not of the kind.
LARGE = [
    (128, 4, 4, 3, 3), (44, 4, 4, 3, 3), (256, 4, 4, 3, 3), (1, 4, 4, 3, 3), (128, 4, 4, 1, 1), (130, 3, 5, 2, 3),
    (64, 1, 1, 7, 7),
]  # fmt: skip
VALUES_AND_GRADIENT = pytest.mark.parametrize("flip", [False, True], ids=["values", "gradient"])


@VALUES_AND_GRADIENT
@pytest.mark.parametrize("programs", [1, 30, 1000], indirect=True)
@cases("size", SMALL, backends=["interpreter"])
def test_shapes(device: torch.device, size: Size, programs: int, flip: bool) -> None:
    """Whole tiles; parts of which some pixels have fewer; a part for every step."""
    x, weight = tensors(size, flip, device)
    check(computed(x, weight, flip), x, weight, flip)


@VALUES_AND_GRADIENT
@cases("size", LARGE, backends=["cuda"])
def test_large_shapes(device: torch.device, size: Size, flip: bool) -> None:
    x, weight = tensors(size, flip, device)
    ours = computed(x, weight, flip)
    check(ours, x, weight, flip)
    for _ in range(20):  # a race would show some time
        assert torch.equal(computed(x, weight, flip), ours)


@VALUES_AND_GRADIENT
@pytest.mark.parametrize("programs", [30], indirect=True)
def test_a_value_that_is_not_finite_reaches_its_neighbours_alone(
    device: torch.device, flip: bool, programs: int
) -> None:
    x, weight = tensors((5, 1, 1, 4, 4), flip, device)
    x[3, 7, 0, 0], x[1, 9, 3, 3] = math.nan, math.inf
    ours = computed(x, weight, flip).cpu()
    exact = REFERENCES[flip](x.cpu().double(), weight.cpu().double())  # a transform would spread it
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert torch.equal(ours.isnan(), exact.isnan())
    assert not ours[3, :, :2, :2].isfinite().any()
    assert not ours[1, :, 2:, 2:].isfinite().any()
    assert ours.isfinite().sum() == ours.numel() - 2 * 4 * ours.shape[1]


@VALUES_AND_GRADIENT
def test_what_lies_outside_is_left_out(device: torch.device, flip: bool) -> None:
    """For maps of one pixel only the filter's middle counts."""
    x, weight = tensors((3, 1, 1, 1, 1), flip, device)
    expected = computed(x, weight, flip)
    around = torch.full_like(weight, math.nan)
    around[:, :, 1, 1] = weight[:, :, 1, 1]
    assert torch.equal(computed(x, around, flip), expected)


@only("interpreter")
@pytest.mark.parametrize("programs", [40], indirect=True)
def test_the_order_of_programs_does_not_matter(
    device: torch.device, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = tensors((2, 1, 1, 3, 3), False, device)
    expected, order = computed(x, weight, False), list[int]()
    interpreter.run_backwards(monkeypatch, order)
    assert torch.equal(computed(x, weight, False), expected)
    assert order[0] > order[1]


@VALUES_AND_GRADIENT
def test_no_image_gives_none(device: torch.device, flip: bool) -> None:
    x, weight = tensors((0, 1, 2, 3, 3), flip, device)
    assert computed(x, weight, flip).shape == (0, op.MULTIPLE * (1 if flip else 2), 3, 3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (2, 2), (3, 3), (4, 5), (7, 7)])
@pytest.mark.parametrize("programs", [1, 20, 108, 132, 10000])
def test_parts_run_at_once(height: int, width: int, programs: int) -> None:
    chunks, tiles = 8, 4
    each = gpu.steps_each(height, width, chunks, tiles, programs)
    ones = torch.ones(1, 1, height, width)
    taps = small_convolution_reference(ones, torch.ones(1, 1, 3, 3)).flatten()

    def parts(of: int) -> int:
        return tiles * int((taps * chunks / of).ceil().sum())

    whole = each >= int(taps.max()) * chunks  # there are more tiles than programs, or few steps
    assert whole or parts(each) <= programs
    assert each == gpu.LEAST_STEPS or parts(each - 1) > programs


def test_what_the_kernels_do_not_take_is_refused() -> None:
    x, weight = tensors((2, 1, 2, 3, 3), False, CPU)
    grad = x.new_zeros(2, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    assert op.why_refused(x, weight) is None
    assert op.why_refused(grad, weight, flip=True) is None
    for maps, filters, words in (
        (grad, weight, r"maps \[N, C, H, W\] and weights"),
        (x[0], weight, r"maps \[N, C, H, W\] and weights"),
        (x, weight[:, :, :1], r"maps \[N, C, H, W\] and weights"),
        (x[:, :64], weight[:, :64], "channels by multiples of 128"),
        (x.float(), weight, "bfloat16"),
        (x, weight.half(), "bfloat16"),
        (x, weight.to("meta"), "on one device"),
        (x.contiguous(), weight, "channels-last"),
        (x, weight.contiguous(), "channels-last"),
        (x.new_empty(1, 128, 1, 1).expand(2**24, -1, -1, -1), weight, "channels-last|less than"),
    ):
        with pytest.raises(ValueError, match=words):
            small_convolution(maps, filters)
    with pytest.raises(ValueError, match=r"maps \[N, C, H, W\] and weights"):
        small_convolution_input_grad(x, weight)


def test_the_kernels_are_for_few_pixels_of_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have no memory; what a real device needs for it, tests/gpu asks."""
    monkeypatch.setattr(op, "_runs_on", lambda device: True)

    def fit(size: Size, **other: object) -> bool:
        given = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1} | other
        with FakeTensorMode():
            samples, inputs, outputs, height, width = size
            x, weight = (
                torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
                for shape in ((samples, inputs, height, width), (outputs, inputs, 3, 3))
            )
            return fits(x, weight, **given)  # type: ignore[arg-type]

    usual = (128, 512, 512, 3, 3)
    assert fit(usual)
    assert fit((64, 256, 384, 1, 9))
    assert not fit((128, 512, 512, 7, 7))
    assert not fit((63, 512, 512, 3, 3))
    assert not fit((257, 512, 512, 3, 3))
    assert not fit((128, 128, 512, 3, 3))
    assert not fit((128, 320, 512, 3, 3))
    for other in ({"stride": (2, 2)}, {"padding": (0, 0)}, {"padding": "same"}, {"dilation": (2, 2)}, {"groups": 2}):
        assert not fit(usual, **other)
    x, weight = tensors((64, 2, 2, 1, 1), False, CPU)
    assert not fits(x, weight, (1, 1), (1, 1), (1, 1), 1)


def test_the_kernels_are_for_gpus_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100, an RTX 4090, a T4; an A100's numbers under ROCm; no Triton."""
    device = torch.device("cuda", 0)
    found = []
    for major, shared in ((8, 166912), (8, 101376), (7, 166912)):
        properties = SimpleNamespace(major=major, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        found.append(op._runs_on(device))
    assert found == [True, False, False]
    properties.major = 8
    assert op._runs_on(device)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert not op._runs_on(device)
    monkeypatch.setattr(op.operators, "why_no_kernel", lambda device: "Triton is not installed")
    assert not op._runs_on(device)
