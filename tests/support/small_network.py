"""The network that the tests of the optimizers train."""

import torch
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Always the same one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def weights(model: nn.Module) -> Tensor:
    """All of a model's parameters, in a row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
