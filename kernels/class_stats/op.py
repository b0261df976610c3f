"""`torch.ops.ncollapse.class_stats` and `.project`: the statistics as operators, with a kernel or the reference."""

import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.class_stats import cpu
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, project_reference


def why_no_kernel(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why statistics of this dtype use the reference on this device; None if they use a kernel."""
    if device.type == "cuda" and dtype != torch.float32:
        return f"there is no kernel for {dtype} sums on a GPU"
    return operators.why_no_kernel(device, cpu.EXTENSION)


def _class_stats(
    features: Tensor, labels: Tensor, counts: Tensor, shifts: Tensor, sums: Tensor, squares: Tensor,
    scatter: Tensor | None, axes: Tensor | None, refused: Tensor, propagate: bool,
) -> None:  # fmt: skip
    state = State(counts, shifts, sums, squares, scatter, axes, refused)
    if reason := why_no_kernel(features.device, shifts.dtype):
        operators.warn_once("gathers class statistics", reason)
        class_stats_reference(features, labels, state, propagate)
    elif features.device.type == "cpu":
        cpu.add_batch(features, labels.contiguous(), state, propagate)
    else:
        from ncollapse.kernels.class_stats import gpu

        gpu.add_batch(features, labels.contiguous(), state, propagate)


def _project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    if reason := why_no_kernel(features.device, shifts.dtype):
        operators.warn_once("gathers class statistics", reason)
        return project_reference(features, labels, shifts, axes)
    labels, shifts, axes = labels.contiguous(), shifts.contiguous(), axes.contiguous()
    if features.device.type == "cpu":
        return cpu.project(features, labels, shifts, axes)
    from ncollapse.kernels.class_stats import gpu

    return gpu.project(features, labels, shifts, axes)


class_stats_op = operators.register_operator(
    "class_stats(Tensor features, Tensor labels, Tensor(a!) counts, Tensor(b!) shifts, Tensor(c!) sums, "
    "Tensor(d!) squares, Tensor(e!)? scatter, Tensor? axes, Tensor(f!) refused, bool propagate) -> ()",
    _class_stats,
)
project_op = operators.register_operator(
    "project(Tensor features, Tensor labels, Tensor shifts, Tensor axes) -> Tensor",
    _project, lambda features, _, shifts, axes: shifts.new_empty(*features.shape[:-1], axes.shape[-2]),
)  # fmt: skip
