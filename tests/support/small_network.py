"""A small network for the tests of the optimizers."""

import torch
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the network, with the same parameters every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def weights(model: nn.Module) -> Tensor:
    """Return all parameters of a model as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
