"""`torch.ops.ncollapse.class_stats` and `.project`: the statistics as operators, on whatever there is for a device."""

import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.class_stats import cpu
from ncollapse.kernels.class_stats.reference import State, class_stats_reference, project_reference

# Defined with Library, not custom_op, whose Python wrapper takes longer than a small batch does.
_library = torch.library.Library("ncollapse", "FRAGMENT")
_library.define(
    "class_stats(Tensor features, Tensor labels, Tensor(a!) counts, Tensor(b!) shifts, Tensor(c!) sums, "
    "Tensor(d!) squares, Tensor(e!)? scatter, Tensor? axes, Tensor(f!) refused, bool propagate) -> ()"
)
_library.define("project(Tensor features, Tensor labels, Tensor shifts, Tensor axes) -> Tensor")


def why_no_kernel(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why statistics of this dtype fall back to the reference on this device; None if they don't."""
    if device.type == "cuda" and dtype != torch.float32:
        return f"there is no kernel for {dtype} sums on a GPU"
    return operators.why_no_kernel(device, "ncollapse.kernels.class_stats._cpu")


def _class_stats(
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    shifts: Tensor,
    sums: Tensor,
    squares: Tensor,
    scatter: Tensor | None,
    axes: Tensor | None,
    refused: Tensor,
    propagate: bool,
) -> None:
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


_library.impl("class_stats", _class_stats, "CompositeExplicitAutograd")
_library.impl("project", _project, "CompositeExplicitAutograd")


@torch.library.register_fake("ncollapse::class_stats")
def _(*_: object) -> None:
    """Nothing comes out, and nothing changes its shape."""


@torch.library.register_fake("ncollapse::project")
def _fake_project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    return shifts.new_empty(*features.shape[:-1], axes.shape[-2])


class_stats_op = torch.ops.ncollapse.class_stats.default
project_op = torch.ops.ncollapse.project.default
