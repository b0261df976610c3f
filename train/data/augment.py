"""Augmentation on the device: flips and crops, drawn once per epoch and applied in each step as one gather.

They are drawn by the run's own generator on the CPU, so that a run sees the same images on every device, in every
stack, and after a resume.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncollapse.train.errors import UserError

#: Width in pixels of the mirrored border that is added before a crop.
PAD = 4


def draw_views(augment: str, samples: int, generator: torch.Generator) -> Tensor | None:
    """Draw the crop's row and column, each from 0 to 2·`PAD`, and a flip (0 or 1) for each sample, `[N, 3]` int64.

    If `augment` is "none", return None and leave the generator as it is.
    """
    if augment == "none":
        return None
    views = torch.zeros(samples, 3, dtype=torch.int64, device="cpu")
    if "crop" in augment:
        views[:, :2] = torch.randint(2 * PAD + 1, (samples, 2), generator=generator, device="cpu")
    if "flip" in augment:
        views[:, 2] = torch.randint(2, (samples,), generator=generator, device="cpu")
    return views


def pad_images(images: Tensor, augment: str) -> Tensor:
    """Add the border that crops need to images `[N, C, H, W]`; without crops return them unchanged.

    Raises:
        UserError: augmentation of other samples, such as vectors or tokens.
    """
    if augment != "none" and (images.dim() != 4 or not images.is_floating_point()):
        raise UserError(
            f"augment {augment} needs images [C, H, W]; samples are {list(images.shape[1:])} of {images.dtype}"
        )
    return F.pad(images, (PAD,) * 4, mode="reflect") if "crop" in augment else images


def gather_images(images: Tensor, index: Tensor, views: Tensor | None, size: int) -> Tensor:
    """Gather the images of a batch, cropped and flipped; without views, samples of any shape.

    Args:
        images: `[N, C, H, W]`; with views, the result of `pad_images`.
        index: of the samples, `[B]` or `[R, B]`.
        views: row, column and flip of each sample, `[B, 3]` or `[R, B, 3]`; None: no augmentation.
        size: height H of the result.

    Returns:
        `[B, C, H, W]` or `[R, B, C, H, W]`, channels-last in memory if there are views.
    """
    if views is None:
        return images[index]
    row, column, flip = views.unbind(-1)
    width = images.shape[-1] - (images.shape[-2] - size)  # the border is as wide on all sides
    offsets = torch.arange(width, device=images.device)
    rows = row[..., None] + torch.arange(size, device=images.device)
    columns = column[..., None] + torch.where(flip[..., None] == 1, width - 1 - offsets, offsets)
    # As [N, H, W, C] the channels of a gathered pixel are adjacent in memory.
    gathered = images.permute(0, 2, 3, 1)[index[..., None, None], rows[..., :, None], columns[..., None, :]]
    return gathered.movedim(-1, -3)
