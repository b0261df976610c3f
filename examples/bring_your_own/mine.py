"""A model, a data set, an optimizer, a loss and a metric of one's own; grid.toml and notebook.py train with them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ncollapse import ClassStats
from ncollapse.train import Data


class WideNet(nn.Sequential):
    """A ResNet of `depth` blocks with batch norm; NC0–NC4 are measured at its last layer."""

    def __init__(self, channels: int, num_classes: int, depth: int = 2, width: int = 16) -> None:
        blocks = (Block(width) for _ in range(depth))
        stem = nn.Conv2d(channels, width, 3, padding=1)
        super().__init__(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def few_digits(classes: int = 5) -> Data:
    """The first classes of scikit-learn's digits; bytes, which are standardised."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = images.to(torch.uint8).view(-1, 8, 8)[labels < classes]
    y = labels[labels < classes]
    return Data(x[::2], y[::2], x[1::2], y[1::2])


class NormalizedSGD(torch.optim.Optimizer):
    """Steps of the same length for every tensor, with decoupled weight decay."""

    def __init__(self, params: object, lr: float = 0.01, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(p.grad / p.grad.norm().clamp(min=1e-12), alpha=group["lr"])


def hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """The multi-class hinge loss of each sample."""
    return nn.functional.multi_margin_loss(logits, labels, margin=margin, reduction="none")


def smallest_distance(weight: Tensor, statistics: ClassStats) -> Tensor:
    """The smallest distance between two class means."""
    return torch.pdist(statistics.means).min()
