"""R runs as one program: parameters stacked as `[R, …]`, one forward and one backward pass for all runs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse import optim
from ncollapse.train.config import RunConfig
from ncollapse.train.networks.models import Classifier, ConvBlock
from ncollapse.train.networks.stacked_layers import Batch, ForwardContext, forward
from ncollapse.train.optimizers import TABLE


class Stack:
    """R models of one architecture, each with its own parameters and buffers.

    Args:
        module: the architecture; its own weights are not used.
        params, buffers: name, as in the module -> values `[R, …]`.

    Attributes:
        runs: R.
        weight: the heads' weights `[R, K, d]`, without gradients.
        blocks: names of the modules whose outputs a forward pass can return.
        copies: name -> the bfloat16 copy that replaces a parameter in the forward pass.
    """

    def __init__(self, module: Classifier, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._module = module
        self.params = {name: _channels_last(value.detach()).requires_grad_() for name, value in params.items()}
        self.buffers = dict(buffers)
        self.weight = self.params["fc.weight"].detach()
        self.runs, self.blocks = len(self.weight), module.blocks
        norms = [f"{name}.1" for name, part in module.named_modules() if isinstance(part, ConvBlock)]
        self._counters = [self.buffers[f"{name}.num_batches_tracked"] for name in norms]
        self.copies: dict[str, Tensor] = {}

    @classmethod
    def of(cls, models: Sequence[Classifier], device: torch.device) -> "Stack":
        """Stack the weights of these models, one model per run; a model may occur more than once."""
        stacked = torch.func.stack_module_state(list(models))
        params, buffers = ({name: value.to(device) for name, value in tensors.items()} for tensors in stacked)
        return cls(models[0], params, buffers)

    def __call__(
        self, images: Tensor, *, train: bool, outputs: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute features `[R, B, d]` and logits `[R, B, K]`, in training or evaluation mode.

        Args:
            images: `[B, C, H, W]` for all runs, or `[R, B, C, H, W]`.
            outputs: if given, is filled with the output of every block, `[R, B, d]`; of maps the mean over space.
        """
        watched: Collection[str] = () if outputs is None else self.blocks
        tensors = self.params | self.buffers | self.copies
        context = ForwardContext(self.runs, tensors, train, watched, {} if outputs is None else outputs)
        if self.copies:
            images = images.to(torch.bfloat16)
        if train and self._counters:
            torch._foreach_add_(self._counters, 1)  # one launch for all
        features = forward(self._module.features, "features", Batch.of(images), context)
        return features.value, forward(self._module.fc, "fc", features, context).value

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, `[R, …]`, without gradients."""
        return {name: value.detach() for name, value in (self.params | self.buffers).items()}

    def select(self, rows: Tensor) -> "Stack":
        """Return a stack of the runs with the indices `rows`, `[R']`."""
        return self.with_tensors({name: value[rows] for name, value in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Stack":
        """Return a stack of this architecture with other values, named as in `tensors()`."""
        return Stack(self._module, {n: tensors[n] for n in self.params}, {n: tensors[n] for n in self.buffers})

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """Return the `state_dict` of one run's model, on the CPU."""
        return {name: value[run].cpu().contiguous().clone() for name, value in self.tensors().items()}

    def use_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Use these copies, parameter -> copy, in hidden layers; the caller renews them when parameters change."""
        for name, param in self.params.items():
            # Stacked gains and biases have two dimensions; they stay in float32.
            if name.startswith("features.") and name.endswith("weight") and param.dim() > 2:
                self.copies[name] = copies[param].requires_grad_()
                param.grad_dtype = None  # the gradient has the dtype of the copy


def _channels_last(value: Tensor) -> Tensor:
    """Put convolution weights `[R, O, I, h, w]` into channels-last memory, which half-precision kernels read."""
    return value.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if value.dim() == 5 else value


def make_optimizer(stack: Stack, runs: Sequence[RunConfig]) -> optim.Optimizer:
    """Make one optimizer for a stack, with each run's own rule and hyperparameters.

    The learning rates are one tensor `[R]`, `param_groups[0]["lr"]`: a schedule that writes it in place also reaches a
    CUDA graph. For runs in bfloat16 the stack gets copies of its weights, which every step of the optimizer renews.
    """
    device = stack.weight.device

    def per_run(name: str) -> Tensor:
        return torch.tensor([float(getattr(run, name)) for run in runs], dtype=torch.float64, device=device)

    params = list(stack.params.values())
    numbers: dict[str, Any] = {name: per_run(name) for name in ("lr", "momentum", "eps", "weight_decay", "coupling")}
    numbers["betas"] = numbers["momentum"], per_run("beta2")
    optimizer: optim.Optimizer
    if TABLE[runs[0].optimizer].own_stack:
        make: Callable[..., optim.Optimizer] = optim.by_name(runs[0].family)
        optimizer = make(params, **numbers, stacked=True)
    else:
        optimizer = optim.Stacked(params, [run.family for run in runs], **numbers)
    if runs[0].precision == "bf16":
        stack.use_copies(optimizer.observe(bf16=True).weights)
    return optimizer
