"""R runs as one program: the parameters of a model stacked as `[R, …]`, one forward and backward for all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nc import optim
from nc.kernels.update.reference import Hyper
from nc.train.config import RunConfig
from nc.train.models import Classifier

_OPTIMIZERS: dict[str, type[optim.SGD] | type[optim.Signum]] = {"sgd": optim.SGD, "signum": optim.Signum}


class Stack:
    """R copies of a model that share their start and their batches, each with its own parameters from there on.

    Args:
        model: the initial weights and the architecture; an ordinary module, which is not changed.
        runs: R.
        device: where the copies live.
    """

    def __init__(self, model: Classifier, runs: int, device: torch.device) -> None:
        self.runs = runs
        self._module = _FeaturesAndLogits(model).to(device)
        named = dict(self._module.named_parameters())
        self._shapes = {name: value.shape for name, value in named.items()}
        self._buffers = {
            name: value.detach().expand(runs, *value.shape).clone() for name, value in self._module.named_buffers()
        }
        #: All parameters of run r in row r, `[R, P]`: one tensor, so that an update is a few operations, not a few for
        #: each layer.
        self.flat = torch.cat([value.detach().flatten() for value in named.values()]).repeat(runs, 1).requires_grad_()

    def __call__(self, images: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
        """Features `[R, B, d]` and logits `[R, B, K]` of images `[B, C, H, W]`, in training or evaluation mode."""
        self._module.train(train)
        if self.runs == 1:
            # vmap turns convolutions into grouped ones, which are slower even where there is one group.
            state = {name: value[0] for name, value in (self.params() | self._buffers).items()}
            features, logits = functional_call(self._module, state, (images,))
            return features.unsqueeze(0), logits.unsqueeze(0)
        call = vmap(lambda params, buffers: functional_call(self._module, (params, buffers), (images,)))
        return call(self.params(), self._buffers)

    def params(self) -> dict[str, Tensor]:
        """Views of the parameters by name, `[R, …]`."""
        parts = self.flat.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {n: part.unflatten(1, shape) for (n, shape), part in zip(self._shapes.items(), parts, strict=True)}

    @property
    def weight(self) -> Tensor:
        """The heads' weights `[R, K, d]`."""
        return self.params()["model.fc.weight"].detach()

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """The `state_dict` of one run's model, on the CPU."""
        state = self.params() | self._buffers
        return {name.removeprefix("model."): value[run].detach().cpu().clone() for name, value in state.items()}


class _FeaturesAndLogits(nn.Module):
    # functional_call goes through forward, which in the models gives the logits alone.
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(images)
        return features, self.model.fc(features)


def make_optimizer(stack: Stack, runs: Sequence[RunConfig]) -> optim.SGD | optim.Signum | optim.Adam:
    """One optimizer for a stack, with each run's own hyperparameters.

    Args:
        stack: of R runs.
        runs: R runs of one optimizer family.
    """

    def each(name: str) -> Hyper:
        values = [float(getattr(run, name)) for run in runs]
        # A single run takes plain numbers: they keep the digits that a float32 tensor would not.
        return values[0] if len(values) == 1 else torch.tensor(values, dtype=torch.float64, device=stack.flat.device)

    common: dict[str, Any] = {"lr": each("lr"), "weight_decay": each("weight_decay"), "coupling": each("coupling")}
    family = runs[0].family
    if family == "adam":
        return optim.Adam([stack.flat], betas=(each("momentum"), each("beta2")), eps=each("eps"), **common)
    return _OPTIMIZERS[family]([stack.flat], momentum=each("momentum"), **common)
