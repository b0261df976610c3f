"""R runs as one program: parameters stacked as `[R, …]`, one forward and one backward pass for all runs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncollapse import optim
from ncollapse.optimizer_table import TABLE
from ncollapse.train.config import RunConfig
from ncollapse.train.networks.architecture import Architecture
from ncollapse.train.networks.forms import Program, built_in_program, make_program, stacked_tensors
from ncollapse.train.networks.kept_state import copy_of
from ncollapse.train.networks.models import Classifier
from ncollapse.train.networks.stacked_layers import ForwardContext
from ncollapse.train.networks.whole_module import WholeModule
from ncollapse.train.plugins import Plugins


class Stack:
    """R models of one architecture, each with its own parameters and buffers.

    Args:
        program: the forward pass; the weights of its module are not used.
        tensors: name, as in the module -> parameter or buffer `[R, …]`.
        half: whether activations are bfloat16.

    Attributes:
        params: name -> parameter that is trained, `[R, …]`.
        buffers: name -> any other tensor, `[R, …]`; frozen parameters too.
        runs: R.
        weight: the heads' weights `[R, K, d]`, without gradients.
        blocks: names of the modules whose outputs a forward pass can return.
        copies: name -> the bfloat16 copy that replaces a parameter in the forward pass.
    """

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], *, half: bool = False) -> None:
        self._program, self._half = program, half
        trained = {name for name, p in program.module.named_parameters() if p.requires_grad}
        laid = _channels_last if program.channels_last else Tensor.contiguous
        self.params = {n: laid(v.detach()).requires_grad_() for n, v in tensors.items() if n in trained}
        self.buffers = {name: value.detach() for name, value in tensors.items() if name not in trained}
        weight = program.parts.weight
        self.weight = (self.params if weight in trained else self.buffers)[weight].detach()
        self.runs, self.blocks = len(self.weight), program.parts.blocks
        self.copies: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls, models: Sequence[nn.Module], device: torch.device, program: Program | None = None, *, half: bool = False
    ) -> "Stack":
        """Stack the weights of these models, one model per run; a model may occur more than once.

        Args:
            program: the forward pass of the first of them; by default that of a model that comes with ncollapse.
        """
        if program is None:
            assert isinstance(models[0], Classifier)
            program = built_in_program(models[0])
        return cls(program, {n: value.to(device) for n, value in stacked_tensors(models).items()}, half=half)

    def __call__(
        self, samples: Tensor, *, train: bool, outputs: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute features `[R, B, d]` and logits `[R, B, K]`, in training or evaluation mode.

        Args:
            samples: `[B, …]` for all runs, or `[R, B, …]`; `[B, C, H, W]` for images.
            outputs: if given, is filled with the output of every block, `[R, B, d]`; of maps and tokens the mean.
        """
        if self.rows and outputs is None:
            assert isinstance(self._program, WholeModule)
            of_run = samples if samples.dim() == self._program.sample_dims + 1 else samples[0]
            features, logits = self._program.of_one(of_run, self._of_one, train=train)
            return features.unsqueeze(0), logits.unsqueeze(0)
        tensors = self.params | self.buffers | self.copies
        return self._program(samples, ForwardContext(self.runs, tensors, train, self._half, outputs))

    @functools.cached_property
    def rows(self) -> dict[str, nn.Parameter]:
        """The parameters of a single run that its module computes itself, in the memory of `params`; else empty.

        Gradients by them cost no copy.
        """
        itself = isinstance(self._program, WholeModule) and not self._program.channels_last
        if self.runs > 1 or self._half or not itself:
            return {}
        return {name: nn.Parameter(param.detach()[0]) for name, param in self.params.items()}

    @functools.cached_property
    def _of_one(self) -> dict[str, Tensor]:
        return {**self.rows, **{name: value[0] for name, value in self.buffers.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, `[R, …]`, without gradients."""
        return {name: value.detach() for name, value in (self.params | self.buffers).items()}

    def select(self, rows: Tensor) -> "Stack":
        """Return a stack of the runs with the indices `rows`, `[R']`."""
        return self.with_tensors({name: value[rows] for name, value in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Stack":
        """Return a stack of this architecture with other values, named as in `tensors()`."""
        return Stack(self._program, {name: tensors[name] for name in self.tensors()}, half=self._half)

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """Return the `state_dict` of one run's model, on the CPU; parameters that it shares have both their names."""
        module, tensors = self._program.module, self.tensors()
        names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
        return {
            key: tensors[names[id(value)]][run].cpu().contiguous().clone()
            for key, value in module.state_dict(keep_vars=True).items()
            if id(value) in names
        }

    def model(self, run: int) -> nn.Module:
        """Return a model of its own, on the CPU, with the tensors of one run."""
        model = copy_of(self._program.module).cpu()
        model.zero_grad()  # a single run's module holds its parameters with their gradients
        model.load_state_dict(self.state_dict(run))
        return model

    def use_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Compute in bfloat16, with these copies, parameter -> copy, of the weights of hidden layers that allow it.

        The caller renews them when parameters change.
        """
        self._half = True
        for name, param in self.params.items():
            if self._program.copied(name, param):
                self.copies[name] = copies[param].requires_grad_()
                param.grad_dtype = None  # the gradient has the dtype of the copy


def make_stack(
    models: Sequence[nn.Module], architecture: Architecture, device: torch.device, precision: str, plugins: Plugins
) -> Stack:
    """Stack models that `build` has made, in the form that suits them (`networks/forms.py`).

    Raises:
        UserError: the model has no head that can be measured.
    """
    return Stack.of(models, device, make_program(models[0], architecture, precision, plugins), half=precision == "bf16")


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
    head: Tensor | None = None
    if TABLE[runs[0].optimizer].own_stack:
        make: Callable[..., optim.Optimizer] = optim.by_name(runs[0].family)
        optimizer = make(params, **numbers, stacked=True)
        # It treats the head otherwise, where it is told which it is; a head that is frozen is no parameter.
        head = next((p for p in params if p.data_ptr() == stack.weight.data_ptr()), None)
    else:
        optimizer = optim.Stacked(params, [run.family for run in runs], **numbers)
    half = runs[0].precision == "bf16"
    if half or head is not None:
        seen = optimizer.observe(head=head, bf16=half)
        if half:
            stack.use_copies(seen.weights)
    return optimizer
