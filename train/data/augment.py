"""Augmentation on the device: flips and crops that are drawn for an epoch at once, and are one gather in each step.

What is drawn comes from the run's own generator on the CPU, so that a run sees the same images on every device, in any
company, and after a resume.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Pixels of the border that is added before a crop, mirrored at the edge.
PAD = 4


def draw(augment: str, samples: int, generator: torch.Generator) -> Tensor | None:
    """For each sample of an epoch the crop's row and column, from 0 to 2·`PAD`, and whether it is flipped, `[N, 3]`.

    None, and nothing drawn, without augmentation.
    """
    if augment == "none":
        return None
    views = torch.zeros(samples, 3, dtype=torch.int64)
    if "crop" in augment:
        views[:, :2] = torch.randint(2 * PAD + 1, (samples, 2), generator=generator)
    if "flip" in augment:
        views[:, 2] = torch.randint(2, (samples,), generator=generator)
    return views


def padded(images: Tensor, augment: str) -> Tensor:
    """The images `[N, C, H, W]` that `take` cuts from."""
    return F.pad(images, (PAD,) * 4, mode="reflect") if "crop" in augment else images


def take(images: Tensor, index: Tensor, views: Tensor | None, size: int) -> Tensor:
    """The images of a batch as they are seen in this epoch.

    Args:
        images: `[N, C, H, W]`, with views as `padded` gave them.
        index: `[B]` or `[R, B]`.
        views: a row of what `draw` gave for each of them, `[B, 3]` or `[R, B, 3]`; None: as they are.
        size: height and width of what is taken.

    Returns:
        `[B, C, size, size]` or `[R, B, C, size, size]`, channels-last in memory where there are views.
    """
    if views is None:
        return images[index]
    row, column, flip = views.unbind(-1)
    along = torch.arange(size, device=images.device)
    rows = row[..., None] + along
    columns = column[..., None] + torch.where(flip[..., None] == 1, size - 1 - along, along)
    # [N, H, W, C] first: what is gathered lies together in memory.
    taken = images.permute(0, 2, 3, 1)[index[..., None, None], rows[..., :, None], columns[..., None, :]]
    return taken.movedim(-1, -3)
