"""`batch_norm_relu`, and the torch operators that it calls where there is a kernel.

`torch.ops.ncollapse.batch_norm_moments` computes mean and variance of a batch and updates the running statistics;
`.batch_norm_relu` does the rest. Autograd does not allow operators that change their arguments, so only the second has
a gradient: that of the whole, in which mean and variance are functions of x.

For maps of few pixels `.batch_norm_small` does all of the forward pass; its gradient is that of `_Small`, a function of
autograd's around it.
"""

from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The most pixels of a map, all samples together, of which one program holds all of a few channels (0: none does), and
#: what the number of channels must be a multiple of: others have no wide accesses, and the program spills registers.
SMALL_ROWS, SMALL_CHANNELS = 2048, 16
_MOST_ROWS = 2**30  # the kernels count rows in int32, with room for a tile after the last


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    train: bool, momentum: float, eps: float, pool: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """relu(batch_norm(x)), then 2 × 2 max pooling, or a residual added: `F.batch_norm`, `F.relu`, `F.max_pool2d`, `+`.

    Reads x once for mean and variance and once for the result; keeps nothing of the size of a map but x for the
    backward pass. On a CPU torch's own operations run.

    Args:
        x: `[N, C, H, W]`; on a GPU float32, bfloat16 or float16, channels-last, for the kernels.
        weight, bias: `[C]` float32.
        running_mean, running_var: `[C]` float32; in training `(1 − momentum) · running + momentum · batch` in place,
            the variance unbiased; in evaluation they normalise x.
        train: normalise with the batch's own mean and (biased) variance.
        pool: take the maximum of each 2 × 2 pixels; a last odd row or column is ignored.
        residual: added to the result; shape and dtype of x.

    Returns:
        `[N, C, H, W]`, or with `pool` `[N, C, H // 2, W // 2]`, in x's dtype. Differentiable once by x, weight, bias
        and residual; on a GPU not twice.

    Raises:
        ValueError: x does not have four dimensions, the residual is not like x, there are both a residual and `pool`,
            or (from torch) x has one value per channel in training.

    Warns:
        UserWarning: (on a GPU, once for each reason) torch's own operations run, and why.
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm_relu takes maps [N, C, H, W], not x of shape {tuple(x.shape)}")
    if residual is not None:
        if pool:
            raise ValueError("batch_norm_relu takes pool=True or a residual, not both")
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"the residual must be like x, {tuple(x.shape)} {x.dtype}, not {tuple(residual.shape)} {residual.dtype}"
            )
    # For empty maps or results, and for one value per channel, torch has its own errors.
    trivial = x.numel() <= x.shape[1] or (pool and min(x.shape[2:]) < 2)
    implementation = fused
    if x.device.type == "cpu" or trivial:
        implementation = batch_norm_relu_reference
    elif reason := why_no_kernel(x, (weight, bias, running_mean, running_var), train, residual):
        operators.warn_once("normalises maps", reason)
        implementation = batch_norm_relu_reference
    return implementation(x, weight, bias, running_mean, running_var, train, momentum, eps, pool, residual)


def why_no_kernel(x: Tensor, vectors: tuple[Tensor, ...], train: bool, residual: Tensor | None) -> str | None:
    """The reason why torch's own operations take these maps, on a device other than the CPU; None if the kernels do."""
    if reason := operators.why_no_kernel(x.device):
        return reason
    if x.dtype not in _DTYPES:
        return f"there is no batch-norm kernel for {x.dtype} maps"
    maps = (x,) if residual is None else (x, residual)
    if not all(m.is_contiguous(memory_format=torch.channels_last) for m in maps):
        return "the maps are not channels-last"
    if any(v.shape != x.shape[1:2] or v.dtype != torch.float32 or not v.is_contiguous() for v in vectors):
        return "weight, bias and running statistics are not dense [C] in float32"
    if any(t.device != x.device for t in (*vectors, *maps)):
        return "its tensors are on several devices"
    if x.numel() // x.shape[1] > _MOST_ROWS:
        return "the maps have more than 2³⁰ pixels"
    if not train and torch.is_grad_enabled() and any(t.requires_grad for t in (*maps, *vectors[:2])):
        return "the kernels have no gradient in evaluation mode"
    return None


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    train: bool, momentum: float, eps: float, pool: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `batch_norm_relu_reference`, by the kernels, without a check that the arguments fit them."""
    if train and _is_small(x, pool):
        return _Small.apply(x, weight, bias, running_mean, running_var, residual, momentum, eps)[0]
    if train:
        mean, rstd = moments_op(x.detach(), running_mean, running_var, momentum, eps)
    else:
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    return batch_norm_relu_op(x, weight, bias, mean, rstd, residual, pool)


def _is_small(x: Tensor, pool: bool) -> bool:
    """Whether one program does all of forward, and one all of backward, for a few channels of these maps."""
    return not pool and x.numel() // x.shape[1] <= SMALL_ROWS and x.shape[1] % SMALL_CHANNELS == 0


def _moments(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    from ncollapse.kernels.batch_norm import gpu

    mean, rstd = _vectors(x)
    gpu.launch_moments(x, mean, rstd, running_mean, running_var, momentum, eps)
    return mean, rstd


def _batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, pool: bool
) -> Tensor:
    from ncollapse.kernels.batch_norm import gpu

    out = _result(x, weight, bias, mean, rstd, residual, pool)
    gpu.launch_apply(x, weight, bias, mean, rstd, residual, pool, out)
    return out


def _batch_norm_relu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from ncollapse.kernels.batch_norm import gpu

    grads, grad = (torch.empty_like(x), *_vectors(x)), grad.contiguous(memory_format=torch.channels_last)
    if _is_small(x, pool):
        gpu.launch_small_backward(grad, x, weight, bias, mean, rstd, *grads)
    else:
        gpu.launch_backward(grad, x, weight, bias, mean, rstd, pool, *grads)
    return grads


def _small(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, residual: Tensor | None,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ncollapse.kernels.batch_norm import gpu

    out, mean, rstd = results = torch.empty_like(x), *_vectors(x)
    gpu.launch_small_forward(x, weight, bias, mean, rstd, running_mean, running_var, momentum, eps, residual, out)
    return results


class _Small(torch.autograd.Function):
    """`small_op` with a gradient of its first result."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return small_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, _, _, residual, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # which would fill zeros for them
        _keep(ctx, (x, weight, bias, *output[1:], residual, False), output[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        grads = _backward(ctx, grad)
        return *grads[:3], None, None, grads[5], None, None


# The fakes: results of the right shape, dtype and layout, with any content.
def _vectors(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    like = x.new_empty(x.shape[1], dtype=torch.float32)
    return like, torch.empty_like(like)


def _result(x: Tensor, *arguments: Any) -> Tensor:
    samples, channels, height, width = x.shape
    shape = (samples, channels, height // 2, width // 2) if arguments[-1] else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, residual, pool = inputs
    ctx.save_for_backward(*tensors)
    ctx.pool, ctx.has_residual = pool, residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = any(ctx.needs_input_grad[:3])
    grads = backward_op(grad, *ctx.saved_tensors, ctx.pool) if needed else (None, None, None)
    return *grads, None, None, grad if ctx.has_residual else None, None


# The kernels need channels-last maps: the compiler must pass tensors on with their strides unchanged.
_EXACT = (torch.Tag.needs_exact_strides,)
moments_op = operators.register_operator(
    "batch_norm_moments(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps) "
    "-> (Tensor, Tensor)", _moments, _vectors, _EXACT,
)  # fmt: skip
small_op = operators.register_operator(
    "batch_norm_small(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor? residual, float momentum, float eps) -> (Tensor, Tensor, Tensor)", _small,
    lambda x, *_: (torch.empty_like(x), *_vectors(x)), _EXACT,
)  # fmt: skip
batch_norm_relu_op = operators.register_operator(
    "batch_norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? residual, bool pool) "
    "-> Tensor", _batch_norm_relu, _result, _EXACT,
)  # fmt: skip
backward_op = operators.register_operator(
    "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool pool) "
    "-> (Tensor, Tensor, Tensor)", _batch_norm_relu_backward,
    lambda _, x, *__: (torch.empty_like(x), *_vectors(x)), _EXACT,
)  # fmt: skip
torch.library.register_autograd("ncollapse::batch_norm_relu", _backward, setup_context=_keep)
