"""The networks. Each is a `Classifier`: layers that compute features, and a linear head `fc`."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Maps images `[B, C, H, W]` to logits `[B, K]`; NC0–NC4 are measured on the head `fc` and its input.

    Args:
        features: maps images to features `[B, d]`.
        dim: d.
        num_classes: K.
        blocks: names of the modules in `features` whose outputs can be measured too; by default its children that have
            weights.
        layered: whether runs are computed layer by layer (`layer_graph.py`); else as the module itself does.
    """

    def __init__(
        self, features: nn.Module, dim: int, num_classes: int, blocks: tuple[str, ...] = (), *, layered: bool = True
    ) -> None:
        super().__init__()
        self.layered = layered
        self.features = features
        self.fc = nn.Linear(dim, num_classes)
        weighted = [name for name, child in features.named_children() if any(True for _ in child.parameters())]
        self.blocks = tuple(f"features.{name}" for name in blocks or weighted)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))


class ConvBlock(nn.Sequential):
    """A 3 × 3 convolution, batch norm, ReLU and, with `pool`, 2 × 2 max pooling, to maps of `width` channels."""

    def __init__(self, channels: int, width: int, *, pool: bool = False) -> None:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(), *[nn.MaxPool2d(2)] * pool)


class LinearBlock(nn.Sequential):
    """A linear layer and ReLU, `[B, inputs]` to `[B, outputs]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.ReLU())


class Residual(nn.Module):
    """x `[B, width, H, W]` plus two convolution blocks applied to x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(ConvBlock(width, width), ConvBlock(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class GlobalMaxPool(nn.Module):
    """The maximum of each channel over space, `[B, C, H, W]` to `[B, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((-2, -1))


def _named(network: nn.Module) -> nn.Module:
    """Name the layers of a network `network.…`, as stored weights and tables of layers have them."""
    return nn.Sequential(OrderedDict(network=network))


def mlp(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """Build an MLP: pixels, two hidden layers of `width`, head."""
    layers = [nn.Flatten(), LinearBlock(channels * size * size, width), LinearBlock(width, width)]
    return Classifier(nn.Sequential(*layers), width, num_classes)


def cnn(channels: int, size: int, num_classes: int, width: int = 16) -> Classifier:
    """Build a CNN: two `ConvBlock`s with pooling (`width` and 2·`width` channels), global max pooling, head."""
    layers = [ConvBlock(channels, width, pool=True), ConvBlock(width, 2 * width, pool=True), GlobalMaxPool()]
    return Classifier(nn.Sequential(*layers), 2 * width, num_classes)


def resnet9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """Build ResNet9: 6.57 M parameters for 28 × 28 grey images; `width` is that of the first convolution."""
    layers = [
        ConvBlock(channels, width), ConvBlock(width, 2 * width, pool=True), Residual(2 * width),
        ConvBlock(2 * width, 4 * width, pool=True), ConvBlock(4 * width, 8 * width, pool=True), Residual(8 * width),
        GlobalMaxPool(),
    ]  # fmt: skip
    return Classifier(nn.Sequential(*layers), 8 * width, num_classes)


def vgg9(channels: int, size: int, num_classes: int, width: int = 64) -> Classifier:
    """Build VGG9: eight convolutions in pairs with pooling between, 4.69 M parameters for 28 × 28 grey images."""
    layers: list[nn.Module] = []
    for factor in (1, 2, 4, 8):
        layers += [ConvBlock(channels, factor * width), ConvBlock(factor * width, factor * width, pool=factor < 8)]
        channels = factor * width
    return Classifier(nn.Sequential(*layers, GlobalMaxPool()), 8 * width, num_classes)


def vit(channels: int, size: int, num_classes: int, width: int = 192) -> Classifier:
    """Build torchvision's vision transformer: 4 × 4 patches, six layers, heads of 64, no dropout; 2.7 M parameters."""
    from torchvision.models import VisionTransformer

    heads = max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)
    network = VisionTransformer(size, patch_size=4, num_layers=6, num_heads=heads, hidden_dim=width, mlp_dim=4 * width)
    if channels != 3:  # torchvision's takes three channels
        stem = nn.Conv2d(channels, width, 4, 4)
        nn.init.trunc_normal_(stem.weight, std=(channels * 16) ** -0.5)  # as torchvision initialises it
        nn.init.zeros_(stem.bias)  # type: ignore[arg-type]
        network.conv_proj = stem
    network.heads = nn.Sequential()  # the head is `fc`
    blocks = tuple(f"network.encoder.layers.{name}" for name, _ in network.encoder.layers.named_children())
    return Classifier(_named(network), width, num_classes, blocks, layered=False)


def densenet(channels: int, size: int, num_classes: int, width: int = 12) -> Classifier:
    """Build torchvision's DenseNet-BC with 40 layers and growth rate `width`, for small images; 0.18 M parameters.

    The first convolution is that of Huang et al., arXiv 1608.06993, Section 4: 3 × 3, 2·`width` channels, no pooling.
    """
    from torchvision.models import DenseNet

    network = DenseNet(growth_rate=width, block_config=(6, 6, 6), num_init_features=2 * width, num_classes=num_classes)
    first = nn.Conv2d(channels, 2 * width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(first.weight)  # as torchvision initialises it
    network.features.conv0, network.features.pool0 = first, nn.Identity()
    dim = network.classifier.in_features
    network.classifier = nn.Identity()  # the head is `fc`
    blocks = tuple(f"network.features.{name}" for name in ("denseblock1", "denseblock2", "denseblock3"))
    return Classifier(_named(network), dim, num_classes, blocks, layered=False)


#: name -> function of (channels, size, num_classes, width) that builds the model.
MODELS: dict[str, Callable[..., Classifier]] = {f.__name__: f for f in (mlp, cnn, resnet9, vgg9, vit, densenet)}
#: The smallest image side for which pooling leaves at least one pixel.
MIN_SIZE = {"mlp": 1, "cnn": 4, "resnet9": 8, "vgg9": 8, "vit": 4, "densenet": 4}
#: The factor by which the smallest maps of a batch norm are smaller than the images, of models with a batch norm.
DOWNSAMPLING = {"cnn": 2, "resnet9": 8, "vgg9": 8, "densenet": 4}
#: The side of the images must be a multiple of this.
SIZE_MULTIPLE = {"vit": 4}


def build(name: str, channels: int, size: int, num_classes: int, seed: int, width: int | None = None) -> Classifier:
    """Build a model of `MODELS` for images `[channels, size, size]`; `width` None is the model's default.

    It is initialised on the CPU as PyTorch does by default: one seed gives the same weights on every device. The global
    random state stays as it was.
    """
    options = {} if width is None else {"width": width}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return MODELS[name](channels, size, num_classes, **options)
