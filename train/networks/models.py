"""The networks. Each is a `Classifier`: a stack of layers that makes features, and a linear head `fc`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Features and a linear head; NC0–NC4 are read off the head and its input.

    Args:
        features: maps images `[B, C, H, W]` to features `[B, d]`.
        dim: d.
        num_classes: K.
        blocks: names of the modules in `features` between whose outputs collapse can be followed; by default its
            children that have weights.
    """

    def __init__(self, features: nn.Module, dim: int, num_classes: int, blocks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(dim, num_classes)
        own = [name for name, child in features.named_children() if any(True for _ in child.parameters())]
        self.blocks = tuple(f"features.{name}" for name in blocks or own)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, K]`."""
        return self.fc(self.features(images))


class ConvBlock(nn.Sequential):
    """A 3 × 3 convolution, batch norm, ReLU, and with `pool` a 2 × 2 max pooling.

    Maps `[B, channels, H, W]` to `[B, width, H, W]`, or half of H and W.
    """

    def __init__(self, channels: int, width: int, *, pool: bool = False) -> None:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(), *[nn.MaxPool2d(2)] * pool)


class LinearBlock(nn.Sequential):
    """A linear layer and ReLU: `[B, inputs]` to `[B, outputs]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.ReLU())


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(ConvBlock(width, width), ConvBlock(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, width, H, W]` to maps of the same shape."""
        return x + self.block(x)


class GlobalMaxPool(nn.Module):
    """The largest value of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to `[B, C]`."""
        return x.amax((-2, -1))


class Alone(nn.Module):
    """A network of any layers, which trains without others beside it: its layers have no form for many runs.

    Args:
        network: maps images `[B, C, H, W]` to features `[B, d]`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to features `[B, d]`."""
        return self.network(images)


def mlp(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """Pixels, two hidden layers of `width`, head."""
    layers = [nn.Flatten(), LinearBlock(channels * size * size, width), LinearBlock(width, width)]
    return Classifier(nn.Sequential(*layers), width, num_classes)


def cnn(channels: int, size: int, num_classes: int, width: int = 16) -> Classifier:
    """Two convolutions (`width` and 2·`width` channels) with batch norm and pooling, global max pooling, head."""
    layers = [ConvBlock(channels, width, pool=True), ConvBlock(width, 2 * width, pool=True), GlobalMaxPool()]
    return Classifier(nn.Sequential(*layers), 2 * width, num_classes)


def resnet9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """ResNet9: 6.57 M parameters for 28 × 28 grey images; `width` is that of the first convolution."""
    layers = [
        ConvBlock(channels, width),
        ConvBlock(width, 2 * width, pool=True),
        Residual(2 * width),
        ConvBlock(2 * width, 4 * width, pool=True),
        ConvBlock(4 * width, 8 * width, pool=True),
        Residual(8 * width),
        GlobalMaxPool(),
    ]
    return Classifier(nn.Sequential(*layers), 8 * width, num_classes)


def vgg9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """VGG9: eight convolutions in pairs with pooling between, 4.69 M parameters for 28 × 28 grey images."""
    layers: list[nn.Module] = []
    for factor in (1, 2, 4, 8):
        layers += [
            ConvBlock(channels, factor * width),
            ConvBlock(factor * width, factor * width, pool=factor < 8),
        ]
        channels = factor * width
    return Classifier(nn.Sequential(*layers, GlobalMaxPool()), 8 * width, num_classes)


def vit(channels: int, size: int, num_classes: int, width: int = 192) -> Classifier:
    """A small vision transformer of torchvision's: patches of 4 × 4, six layers, heads of 64; 2.7 M parameters.

    Without dropout. `width` is that of the tokens.
    """
    from torchvision.models import VisionTransformer

    heads = max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)
    network = VisionTransformer(size, patch_size=4, num_layers=6, num_heads=heads, hidden_dim=width, mlp_dim=4 * width)
    if channels != 3:  # torchvision's takes three
        stem = nn.Conv2d(channels, width, 4, 4)
        nn.init.trunc_normal_(stem.weight, std=(channels * 16) ** -0.5)  # as torchvision's own
        nn.init.zeros_(stem.bias)  # type: ignore[arg-type]
        network.conv_proj = stem
    network.heads = nn.Sequential()  # the head is `fc`
    blocks = tuple(f"network.encoder.layers.{name}" for name, _ in network.encoder.layers.named_children())
    return Classifier(Alone(network), width, num_classes, blocks)


def densenet(channels: int, size: int, num_classes: int, width: int = 12) -> Classifier:
    """DenseNet-BC of 40 layers with growth rate `width`, torchvision's, its first convolution that of small images.

    Huang et al., arXiv 1608.06993, Section 4: 3 × 3 without pooling, 2·`width` channels; 0.18 M parameters.
    """
    from torchvision.models import DenseNet

    network = DenseNet(growth_rate=width, block_config=(6, 6, 6), num_init_features=2 * width, num_classes=num_classes)
    first = nn.Conv2d(channels, 2 * width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(first.weight)  # as torchvision's own
    network.features.conv0, network.features.pool0 = first, nn.Identity()
    dim = network.classifier.in_features
    network.classifier = nn.Identity()  # the head is `fc`
    blocks = tuple(f"network.features.{name}" for name in ("denseblock1", "denseblock2", "denseblock3"))
    return Classifier(Alone(network), dim, num_classes, blocks)


Make = Callable[..., Classifier]
MODELS: dict[str, Make] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet9": resnet9,
    "vgg9": vgg9,
    "vit": vit,
    "densenet": densenet,
}

#: The smallest images that a model's pooling leaves anything of.
MIN_SIZE = {"mlp": 1, "cnn": 4, "resnet9": 8, "vgg9": 8, "vit": 4, "densenet": 4}
#: By how much the smallest maps that a batch norm sees are smaller than the images; models without one are left out.
SHRINKS = {"cnn": 2, "resnet9": 8, "vgg9": 8, "densenet": 4}
#: What the side of the images must be a multiple of.
MULTIPLE = {"vit": 4}


def build(name: str, channels: int, size: int, num_classes: int, seed: int, width: int | None = None) -> Classifier:
    """A model with PyTorch's default initialisation on the CPU: the same weights for the same seed on every device.

    Args:
        name: a key of `MODELS`.
        channels, size: of the images `[channels, size, size]`.
        num_classes: K.
        seed: of the initial weights; the global random state is left as it was.
        width: see the model; None for its own.
    """
    given = {} if width is None else {"width": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](channels, size, num_classes, **given)
