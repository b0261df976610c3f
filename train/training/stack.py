"""R runs as one program: the parameters of a model stacked as `[R, …]`, one forward and backward for all."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse import optim
from ncollapse.train.config import RunConfig
from ncollapse.train.networks.models import Classifier, ConvBlock
from ncollapse.train.networks.precision import compute_dtype
from ncollapse.train.networks.stacked_layers import Batch, State, forward
from ncollapse.train.optimizers import TABLE


class Stack:
    """R models of one architecture, each with its own parameters and buffers.

    Args:
        module: the architecture; its own weights play no part.
        params, buffers: by name as in the module, `[R, …]`.

    Attributes:
        copies: by name, what stands for a parameter in the forward pass: its bfloat16 copy.
    """

    def __init__(self, module: Classifier, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._module = module
        self.params = {name: _laid_out(value.detach()).requires_grad_() for name, value in params.items()}
        self.buffers = dict(buffers)
        blocks = [name for name, part in module.named_modules() if isinstance(part, ConvBlock)]
        self._counters = [self.buffers[f"{name}.1.num_batches_tracked"] for name in blocks]
        self.copies: dict[str, Tensor] = {}

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

    @property
    def blocks(self) -> tuple[str, ...]:
        """The modules whose outputs `seen` takes."""
        return self._module.blocks

    def __call__(self, images: Tensor, *, train: bool, seen: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Features `[R, B, d]` and logits `[R, B, K]`, in training or evaluation mode.

        Args:
            images: `[B, C, H, W]` for all runs, or `[R, B, C, H, W]`.
            seen: takes the output of every block, `[R, B, d]`; of maps the mean over space.
        """
        watched: Collection[str] = () if seen is None else self.blocks
        tensors = self.params | self.buffers | self.copies
        state = State(self.runs, tensors, train, watched, {} if seen is None else seen)
        if self.copies:
            images = images.to(torch.bfloat16)
        if train and self._counters:
            torch._foreach_add_(self._counters, 1)  # in one launch
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
        return {name: value[run].cpu().contiguous().clone() for name, value in self.tensors().items()}

    def use_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Have convolutions and hidden products use these, by parameter; they must follow every change of it."""
        for name, param in self.params.items():
            # A gain or a bias of R runs has two dimensions.
            if name.startswith("features.") and name.endswith("weight") and param.dim() > 2:
                self.copies[name] = copies[param].requires_grad_()
                param.grad_dtype = None  # its gradient comes from the copy


def _laid_out(value: Tensor) -> Tensor:
    """Weights of convolutions `[R, O, I, h, w]` channels-last, as the kernels of half precision read them."""
    return value.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if value.dim() == 5 else value


Optimizer = optim.Stacked | optim.Muon


def make_optimizer(stack: Stack, runs: Sequence[RunConfig]) -> Optimizer:
    """One optimizer for a stack: for each run its own rule and hyperparameters.

    The learning rates are one tensor `[R]`, `param_groups[0]["lr"]`: written in place, a schedule also reaches a CUDA
    graph. Where the runs compute in bfloat16, the stack does from now on with copies that every step renews.
    """
    device = stack.weight.device

    def each(name: str) -> Tensor:
        return torch.tensor([float(getattr(run, name)) for run in runs], dtype=torch.float64, device=device)

    params, momentum = list(stack.params.values()), each("momentum")
    numbers: dict[str, Any] = {name: each(name) for name in ("lr", "eps", "weight_decay", "coupling")}
    betas = (momentum, each("beta2"))
    optimizer: Optimizer
    if TABLE[runs[0].optimizer].own_stack:
        optimizer = optim.Muon(params, momentum=momentum, betas=betas, **numbers, stacked=True)
    else:
        optimizer = optim.Stacked(params, [run.family for run in runs], momentum=momentum, betas=betas, **numbers)
    if compute_dtype(runs[0].precision) is not None:
        stack.use_copies(optimizer.observe(bf16=True).weights)
    return optimizer
