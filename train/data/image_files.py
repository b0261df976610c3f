"""Read a folder of images, one folder a class: what is damaged, too large, or no image at all is named."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ncollapse.train.data.arrays import eight_bits
from ncollapse.train.errors import UserError
from ncollapse.train.limits import available_memory

#: Pixels of an image, far beyond what a network here takes.
_MOST_PIXELS = 4096 * 4096
#: Bytes per value while a data set is read: as it is stored, in float32, and normalised.
_BYTES = 9


def read_images(folder: Path) -> tuple[list[Tensor], list[int], tuple[str, ...]]:
    """Return the images `[3, H, W]` uint8 below `folder/CLASS`, in the order of their paths, labels, and class names.

    Grey images of 16 bits are scaled to 8; all others are converted as Pillow does.

    Raises:
        UserError: no classes, a class without images, a loop of symbolic links, a file that is no image, truncated or
            too large, images that do not fit in memory; the message names the file.
    """
    import torchvision

    _check_links(folder)
    try:
        found = torchvision.datasets.ImageFolder(str(folder))
    except OSError as error:  # no class folders, a class without images
        raise UserError(f"imagefolder {folder}: {error}") from None
    # Pillow releases the GIL while it decodes, so threads suffice.
    with ThreadPoolExecutor() as pool:
        first = _read(Path(found.samples[0][0]))
        needed, free = len(found) * first.nbytes * _BYTES, available_memory()
        if needed > free:
            raise UserError(
                f"imagefolder {folder}: {len(found):,} images of {'×'.join(map(str, first.shape[-2:]))} take "
                f"{needed / 2**30:.1f} GiB, of {free / 2**30:.1f} that are free: give smaller or fewer images"
            )
        images = [first, *pool.map(lambda sample: _read(Path(sample[0])), found.samples[1:])]
    return images, found.targets, tuple(found.classes)


def _check_links(folder: Path) -> None:
    """Raise UserError for a folder that lies within itself by a symbolic link: walking it would not end."""
    for path, folders, _ in os.walk(folder, followlinks=True):
        above = {os.path.realpath(parent) for parent in (Path(path), *Path(path).parents)}
        for name in folders:
            inner = os.path.join(path, name)
            if os.path.islink(inner) and os.path.realpath(inner) in above:
                raise UserError(f"imagefolder: {inner} is a symbolic link to a folder that it lies in; remove it")


def _read(path: Path) -> Tensor:
    from PIL import Image

    if path.exists() and not path.is_file():
        raise UserError(f"imagefolder: {path} is not a file")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise UserError(f"imagefolder: {path} has {width}×{height} pixels, more than {_MOST_PIXELS:,}")
            if image.mode.startswith("I") or image.mode == "F":
                pixels = np.repeat(eight_bits(np.asarray(image), f"imagefolder: {path}")[:, :, None], 3, axis=2)
            else:
                pixels = np.array(image.convert("RGB"))
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"imagefolder: there is no memory for {path}") from None
    except Exception as error:  # the decoders raise whatever they run into
        raise UserError(f"imagefolder: {path} cannot be read: {str(error) or type(error).__name__}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
