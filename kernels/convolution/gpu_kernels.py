"""The Triton kernels of convolutions of maps of few pixels; `gpu` launches them and says why they are as they are.

A tile is one pixel of IMAGES samples, and COLUMNS channels of the result, so that a tap (one of the nine pairs of a
row and a column of the filter) lies inside the map for all of a tile or for none. What lies outside costs nothing.
Tiles differ in their number of taps, 4, 6 or 9 in a 3 × 3 map; so the steps of a tile, STEP channels of one tap each,
are cut into parts of about equal length, and those are summed in their order.

In memory maps are `[N, H, W, C]`, weights `[O, 3, 3, C]` (both channels-last), bfloat16. Parts are
`[parts, N, H, W, C]` float32, of which a pixel of few taps has fewer.
"""

import triton
import triton.language as tl


@triton.jit
def _taps(pixel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of the taps inside the map: the first row and column, the columns, and the number of taps."""
    row, column = pixel // WIDTH, pixel % WIDTH
    top, left = tl.maximum(1 - row, 0), tl.maximum(1 - column, 0)
    down, across = tl.minimum(HEIGHT + 1 - row, 3) - top, tl.minimum(WIDTH + 1 - column, 3) - left
    return top, left, across, down * across


@triton.jit(do_not_specialize=["images", "steps_each", "most_parts"])
def convolution_kernel(
    x_ptr, weight_ptr, out_ptr, images, steps_each, most_parts,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, FLIP: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one part of one tile.

    Args:
        x_ptr: `[N, H, W, INPUTS]` bfloat16; with FLIP the gradient of the result.
        weight_ptr: `[OUTPUTS, 3, 3, INPUTS]` bfloat16; with FLIP `[INPUTS, 3, 3, OUTPUTS]`, and the filter is turned by
            180°: the result is the gradient of the maps.
        out_ptr: float32 parts, or with `most_parts` = 1 the result, `[N, H, W, OUTPUTS]` bfloat16.
        steps_each: the most steps of a part.
    """
    # 1. Find the tile, and the part's steps.
    chunks: tl.constexpr = INPUTS // STEP
    blocks: tl.constexpr = OUTPUTS // COLUMNS
    program = tl.program_id(0)
    part, program = program % most_parts, program // most_parts
    column, program = program % blocks * COLUMNS + tl.arange(0, COLUMNS), program // blocks
    pixel, image = program % (HEIGHT * WIDTH), program // (HEIGHT * WIDTH) * IMAGES + tl.arange(0, IMAGES)
    top, left, across, taps = _taps(pixel, HEIGHT, WIDTH)
    parts = tl.cdiv(taps * chunks, steps_each)
    if part >= parts:
        return
    length = tl.cdiv(taps * chunks, parts)
    # 2. Multiply. Where there is no image, the last one is read, so that no load needs a mask.
    k = tl.arange(0, STEP)
    x_row = tl.minimum(image, images - 1) * (HEIGHT * WIDTH * INPUTS)
    total = tl.zeros((IMAGES, COLUMNS), tl.float32)
    for step in tl.range(part * length, tl.minimum((part + 1) * length, taps * chunks), num_stages=STAGES):
        tap, channel = step // chunks, step % chunks * STEP
        r, s = top + tap // across, left + tap % across
        neighbour = pixel + (r - 1) * WIDTH + s - 1
        x = tl.load(x_ptr + x_row[:, None] + (neighbour * INPUTS + channel + k)[None, :])
        if FLIP:
            at = (channel + k)[:, None] * (9 * OUTPUTS) + ((8 - 3 * r - s) * OUTPUTS + column)[None, :]
            total = tl.dot(x, tl.load(weight_ptr + at), total)
        else:
            at = column[:, None] * (9 * INPUTS) + ((3 * r + s) * INPUTS + channel + k)[None, :]
            total = tl.dot(x, tl.trans(tl.load(weight_ptr + at)), total)
    # 3. Store the part.
    place = (part.to(tl.int64) * images + image) * (HEIGHT * WIDTH) + pixel
    at = place[:, None] * OUTPUTS + column[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(image < images)[:, None])


@triton.jit(do_not_specialize=["images", "steps_each"])
def add_parts_kernel(
    parts_ptr, out_ptr, images, steps_each,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr, PARTS: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of `convolution_kernel` in their order: a program does one pixel of some images and channels.

    Args:
        parts_ptr: `[PARTS, N, H, W, OUTPUTS]` float32; of a pixel with fewer parts the rest is not read.
        out_ptr: `[N, H, W, OUTPUTS]` bfloat16, written.
        steps_each: as for `convolution_kernel`; CHUNKS is its number of steps for a tap.
    """
    blocks: tl.constexpr = OUTPUTS // COLUMNS
    program = tl.program_id(0)
    column, program = program % blocks * COLUMNS + tl.arange(0, COLUMNS), program // blocks
    pixel, image = program % (HEIGHT * WIDTH), program // (HEIGHT * WIDTH) * IMAGES + tl.arange(0, IMAGES)
    _, _, _, taps = _taps(pixel, HEIGHT, WIDTH)
    parts = tl.cdiv(taps * CHUNKS, steps_each)
    at = ((image * (HEIGHT * WIDTH) + pixel) * OUTPUTS)[:, None] + column[None, :]
    size, inside = images.to(tl.int64) * (HEIGHT * WIDTH * OUTPUTS), (image < images)[:, None]
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        there = (image < tl.where(parts > part, images, 0))[:, None]
        total += tl.load(parts_ptr + part * size + at, mask=there, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
