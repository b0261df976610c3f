"""R runs as one program: the parameters of a model stacked as `[R, …]`, one forward and backward for all."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nc import optim
from nc.train.config import RunConfig
from nc.train.layers import Batch, State, forward
from nc.train.models import Classifier


class Stack:
    """R models of one architecture, each with its own parameters and buffers.

    Args:
        module: the architecture; its own weights play no part.
        params, buffers: by name as in the module, `[R, …]`.
    """

    def __init__(self, module: Classifier, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._module = module
        self.params = {name: value.detach().requires_grad_() for name, value in params.items()}
        self.buffers = dict(buffers)

    @classmethod
    def of(cls, models: Sequence[Classifier], device: torch.device) -> "Stack":
        """A stack that starts with the weights of these models, one for each run (the same model may stand twice)."""

        def stacked(kind: str) -> dict[str, Tensor]:
            each = [dict(getattr(model, kind)()) for model in models]
            return {name: torch.stack([own[name].detach() for own in each]).to(device) for name in each[0]}

        return cls(models[0], stacked("named_parameters"), stacked("named_buffers"))

    @property
    def runs(self) -> int:
        """R."""
        return self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The heads' weights `[R, K, d]`."""
        return self.params["fc.weight"].detach()

    def __call__(self, images: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
        """Features `[R, B, d]` and logits `[R, B, K]`, in training or evaluation mode.

        Args:
            images: `[B, C, H, W]` for all runs, or `[R, B, C, H, W]`.
        """
        state = State(self.runs, self.params | self.buffers, train)
        features = forward(self._module.features, "features", Batch.of(images), state)
        return features.value, forward(self._module.fc, "fc", features, state).value

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, `[R, …]`, without gradients."""
        return {name: value.detach() for name, value in (self.params | self.buffers).items()}

    def select(self, rows: Tensor) -> "Stack":
        """A stack of some of the runs; `rows` are their indices `[R']`."""
        return self.with_tensors({name: value[rows] for name, value in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Stack":
        """A stack of this architecture with other parameters and buffers, as `tensors` gave them."""
        return Stack(self._module, {n: tensors[n] for n in self.params}, {n: tensors[n] for n in self.buffers})

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """The `state_dict` of one run's model, on the CPU."""
        return {name: value[run].cpu().clone() for name, value in self.tensors().items()}


def make_optimizer(stack: Stack, runs: Sequence[RunConfig]) -> optim.Stacked:
    """One optimizer for a stack: for each run its own rule and hyperparameters, one launch a step.

    The learning rates are one tensor `[R]`, `param_groups[0]["lr"]`: written in place, a schedule also reaches a CUDA
    graph.
    """
    device = stack.weight.device

    def each(name: str) -> Tensor:
        return torch.tensor([float(getattr(run, name)) for run in runs], dtype=torch.float64, device=device)

    momentum = each("momentum")
    return optim.Stacked(
        list(stack.params.values()),
        [run.optimizer for run in runs],
        lr=each("lr"),
        momentum=momentum,
        betas=(momentum, each("beta2")),
        eps=each("eps"),
        weight_decay=each("weight_decay"),
        coupling=each("coupling"),
    )
