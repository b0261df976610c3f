"""Convolutions of images with few channels as matrix products, against `F.conv2d`."""

import pytest
import torch
from torch.nn import functional as F

from ncollapse.train.networks.stacked_layers import convolve, is_small_filter


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (3, 3, 7, 9), (1, 2, 1, 1), (0, 1, 8, 8)], ids=str)
@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((2, 3), (0, 2)), ((1, 1), (0, 0))], ids=str)
def test_matches_conv2d(shape: tuple[int, ...], kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    if shape[2] + 2 * padding[0] < kernel[0]:
        pytest.skip("an image smaller than a filter")
    images = torch.randn(shape, dtype=torch.float64)
    ours, theirs = (torch.randn(12, shape[1], *kernel, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours)
    maps, expected = convolve(images, ours, padding), F.conv2d(images, theirs, padding=padding)
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    maps.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """The output is channels-last for every layout of images and filters."""
    images = torch.randn(4, 3, 6, 6).to(dtype)
    weight = torch.randn(8, 3, 3, 3).to(dtype)
    expected = convolve(images, weight, (1, 1))
    assert expected.dtype == dtype
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (images, weight)]
    assert torch.equal(convolve(*last, (1, 1)), expected)


def test_small_filters() -> None:
    assert is_small_filter(torch.empty(64, 1, 3, 3))
    assert is_small_filter(torch.empty(64, 3, 3, 3))
    assert not is_small_filter(torch.empty(64, 64, 3, 3))
