"""Parameters that a kernel and the reference both update, for the tests of the update kernels."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import interpreter
from ncollapse.kernels.tensors import Fingerprint
from ncollapse.kernels.update import cpu
from ncollapse.kernels.update.reference import Settings, Slot, compute_dtype, update_reference
from ncollapse.kernels.update.table import HYPERS, HyperTable, Lists, Rows, Table, Tensors, code

Launch = Callable[[Lists, Sequence[Tensor], HyperTable, Tensor | None, Tensor | None], None]
#: Dtypes of parameters and of gradients.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32-bf16-grad": (torch.float32, torch.bfloat16),
    "bf16-fp32-grad": (torch.bfloat16, torch.float32),
    "fp16-fp32-grad": (torch.float16, torch.float32),
}
_BETAS = {"sgd": (0.9, 0.3), "signum": (0.9, 0.0), "adam": (0.9, 0.999), "lion": (0.9, 0.99)}


def tensors(lists: Lists, grads: Sequence[Tensor | None]) -> Tensors:
    """The columns of the table, from lists."""
    columns = ([getattr(slot, name) for slot in lists.slots] for name in ("first", "second", "step"))
    return Tensors(lists.params, list(grads), *columns, list(lists.extras.copies))


def addresses(lists: Lists, grads: Sequence[Tensor | None]) -> Rows:
    seen = Fingerprint()
    columns = tensors(lists, grads)
    seen.renew(Tensors(*(column or [None] * len(lists.params) for column in columns)))
    return seen.addresses.reshape(len(columns), -1)


def launch_cpu(
    lists: Lists, grads: Sequence[Tensor], hypers: HyperTable, scale: Tensor | None = None, inf: Tensor | None = None
) -> None:
    table = Table(lists, grads[0].dtype, hypers, cpu.CHUNK)
    table.point(addresses(lists, grads))
    cpu.launch_update(table, scale, inf)


def launch_triton(
    lists: Lists, grads: Sequence[Tensor], hypers: HyperTable, scale: Tensor | None = None, inf: Tensor | None = None
) -> None:
    """Launch the Triton kernel, on a GPU or in the interpreter."""
    from ncollapse.kernels.update import gpu

    table = Table(lists, grads[0].dtype, hypers, gpu.CHUNK)
    table.point(addresses(lists, grads))
    with interpreter.quiet():
        gpu.launch_update(table, gpu.Scratch(table), scale, inf)


def numbers(rule: str, **changes: float) -> dict[str, float]:
    """Return hyperparameters with which every term of a rule matters."""
    beta1, beta2 = _BETAS[rule]
    start = {"lr": 0.05, "weight_decay": 0.3, "coupling": 0.4, "beta1": beta1, "beta2": beta2, "eps": 1e-8}
    return start | changes


def hyper_table(
    rules: Sequence[str], values: Sequence[dict[str, Any]], device: torch.device | str = "cpu", **flags: bool
) -> HyperTable:
    rows = torch.tensor([[v[name] for name in HYPERS] for v in values], dtype=torch.float64)
    return HyperTable(rows.to(device), [], [], [[code(rule, **flags)] for rule in rules])


def slot_for(rule: str, param: Tensor) -> Slot:
    first, second = (torch.zeros_like(param, dtype=compute_dtype(param)) for _ in range(2))
    adam = rule == "adam"
    return Slot(first, second if adam else None, torch.zeros((), device=param.device) if adam else None)


def like(tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Copy a tensor to a device, with its strides."""
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return twin.copy_(tensor)


class Twins:
    """Parameters and states on their device for a kernel, and copies on the CPU for the reference."""

    def __init__(self, rule: str, params: list[Tensor]) -> None:
        self.rule, self.device = rule, params[0].device
        self.ours = Lists(params, [slot_for(rule, p) for p in params], [0] * len(params))
        theirs = [like(p) for p in params]
        self.theirs = Lists(theirs, [slot_for(rule, p) for p in theirs], [0] * len(params))

    def step(self, launch: Launch, grads: list[Tensor], h: dict[str, Any], **flags: bool) -> None:
        launch(self.ours, grads, hyper_table([self.rule], [h], self.device, **flags), None, None)
        settings = Settings(**h, **flags)
        update_reference(self.rule, self.theirs.params, [like(g) for g in grads], self.theirs.slots, settings)

    def check(self, tolerance: float = 0.0) -> None:
        """Raise AssertionError if they differ; by default in any bit."""
        for name, ours, theirs in self.pairs():
            if theirs is None:
                assert ours is None, name
                continue
            torch.testing.assert_close(
                ours.cpu(), theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )

    def pairs(self) -> Iterator[tuple[str, Any, Any]]:
        """Names, tensors of the kernel (None if a rule lacks one) and tensors of the reference."""
        for i, (a, b) in enumerate(zip(self.ours.params, self.theirs.params, strict=True)):
            yield f"parameter {i} {tuple(a.shape)}", a, b
        for i, (s, t) in enumerate(zip(self.ours.slots, self.theirs.slots, strict=True)):
            for name in ("first", "second", "step"):
                yield f"{name} {i}", getattr(s, name), getattr(t, name)
