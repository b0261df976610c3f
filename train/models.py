"""The networks. Each is a `Classifier`: a stack of layers that makes features, and a linear head `fc`."""

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Features and a linear head; NC0–NC4 are read off the head and its input.

    Args:
        features: maps images `[B, C, H, W]` to features `[B, d]`.
        dim: d.
        num_classes: K.
    """

    def __init__(self, features: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, K]`."""
        return self.fc(self.features(images))


def mlp(channels: int, size: int, num_classes: int) -> Classifier:
    """Pixels, two hidden layers of 64, head."""
    layers = [nn.Flatten(), nn.Linear(channels * size * size, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), 64, num_classes)


def cnn(channels: int, size: int, num_classes: int) -> Classifier:
    """Two convolutions (16 and 32 channels) with batch norm and pooling, global max pooling, head."""
    layers = [_conv(channels, 16), nn.MaxPool2d(2), _conv(16, 32), nn.MaxPool2d(2), GlobalMaxPool()]
    return Classifier(nn.Sequential(*layers), 32, num_classes)


def resnet9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """ResNet9: 6.57 M parameters for 28 × 28 grey images; `width` is that of the first convolution."""
    layers = [
        _conv(channels, width),
        _conv(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(2 * width),
        _conv(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _conv(4 * width, 8 * width),
        nn.MaxPool2d(2),
        Residual(8 * width),
        GlobalMaxPool(),
    ]
    return Classifier(nn.Sequential(*layers), 8 * width, num_classes)


def vgg9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """VGG9: eight convolutions in pairs with pooling between, 4.69 M parameters for 28 × 28 grey images."""
    layers: list[nn.Module] = []
    for factor in (1, 2, 4, 8):
        layers += [_conv(channels, factor * width), _conv(factor * width, factor * width)]
        layers += [GlobalMaxPool() if factor == 8 else nn.MaxPool2d(2)]
        channels = factor * width
    return Classifier(nn.Sequential(*layers), 8 * width, num_classes)


MODELS = {"mlp": mlp, "cnn": cnn, "resnet9": resnet9, "vgg9": vgg9}

#: The smallest images that a model's pooling leaves anything of.
MIN_SIZE = {"mlp": 1, "cnn": 4, "resnet9": 8, "vgg9": 8}


def build(name: str, channels: int, size: int, num_classes: int, seed: int) -> Classifier:
    """A model with PyTorch's default initialisation on the CPU: the same weights for the same seed on every device.

    Args:
        name: a key of `MODELS`.
        channels, size: of the images `[channels, size, size]`.
        num_classes: K.
        seed: of the initial weights; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](channels, size, num_classes)


def _conv(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, width, H, W]` to maps of the same shape."""
        return x + self.block(x)


class GlobalMaxPool(nn.Module):
    """The largest value of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to `[B, C]`."""
        return x.amax((-2, -1))
