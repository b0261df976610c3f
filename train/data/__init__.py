"""Data sets, as tensors on the device or streamed, and their augmentation."""
