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
    layers = [_conv(channels, 16), nn.MaxPool2d(2), _conv(16, 32), nn.MaxPool2d(2), _GlobalMaxPool()]
    return Classifier(nn.Sequential(*layers), 32, num_classes)


def resnet9(channels: int, size: int, num_classes: int) -> Classifier:
    """ResNet9: 6.57 M parameters for 28 × 28 grey images."""
    layers = [
        _conv(channels, 64),
        _conv(64, 128),
        nn.MaxPool2d(2),
        _Residual(128),
        _conv(128, 256),
        nn.MaxPool2d(2),
        _conv(256, 512),
        nn.MaxPool2d(2),
        _Residual(512),
        _GlobalMaxPool(),
    ]
    return Classifier(nn.Sequential(*layers), 512, num_classes)


def vgg9(channels: int, size: int, num_classes: int) -> Classifier:
    """VGG9: eight convolutions in pairs with pooling between, 4.69 M parameters for 28 × 28 grey images."""
    layers: list[nn.Module] = []
    for width in (64, 128, 256, 512):
        layers += [_conv(channels, width), _conv(width, width)]
        layers += [_GlobalMaxPool() if width == 512 else nn.MaxPool2d(2)]
        channels = width
    return Classifier(nn.Sequential(*layers), 512, num_classes)


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


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class _GlobalMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((-2, -1))
