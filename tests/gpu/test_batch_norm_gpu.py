"""Batch norm with ReLU on a GPU: beside torch's own operations, in CUDA graphs, without synchronisation.

tests/kernels/test_batch_norm_kernels.py compares the same kernels with float64.
"""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batch_norm_cases import DTYPES, EPS, KINDS, MOMENTUM, case, close, forward, gradient, public, run, same_bits
from gpu_training import warmed_and_captured
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference
from waiting import nothing_waits

pytestmark = pytest.mark.usefixtures("no_warning_given_yet")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_own_operations(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """In the maps' dtype, up to one rounding, where no rounding changes what is selected."""
    given = case((64, 128, 14, 14), dtype, kind, device=device)
    grad = gradient(given)
    ours, theirs = run(public, given, grad), run(batch_norm_relu_reference, given, grad)
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for name, their in vars(theirs).items():
        if their is not None:
            close(name, getattr(ours, name), their, rtol=unit, atol=unit * their.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_cuda_graph_gives_the_same_bits(device: torch.device, kind: str) -> None:
    cases = [case((64, 128, 14, 14), torch.bfloat16, kind, mean=float(k), device=device) for k in range(4)]
    grads = [gradient(given) for given in cases]
    static, grad = cases[0].copy(), grads[0].clone()
    leaves = [static.x.requires_grad_(), static.weight.requires_grad_(), static.bias.requires_grad_()]

    def step() -> tuple[Tensor, ...]:
        y = forward(public, static)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    graph, outputs = warmed_and_captured(step)
    static.running_mean.copy_(cases[0].running_mean)
    static.running_var.copy_(cases[0].running_var)
    running = cases[0].running_mean.clone(), cases[0].running_var.clone()
    for given, g in zip(cases, grads, strict=True):
        with torch.no_grad():
            for name in ("x", "weight", "bias", *(["residual"] if kind == "residual" else [])):
                getattr(static, name).copy_(getattr(given, name))
        grad.copy_(g)
        graph.replay()
        eager = run(public, replace(given, running_mean=running[0], running_var=running[1]), g)
        running = eager.running_mean, eager.running_var
        assert torch.equal(outputs[0], eager.y)
        for ours, theirs in zip(outputs[1:], (eager.x, eager.weight, eager.bias), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(static.running_mean, eager.running_mean)
        assert torch.equal(static.running_var, eager.running_var)


@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronisation(device: torch.device, kind: str) -> None:
    given = case((16, 64, 8, 8), kind=kind, device=device)
    grad = gradient(given)
    given.weight.requires_grad_()
    torch.autograd.grad(forward(public, given), given.weight, grad)  # compiles
    with nothing_waits():
        torch.autograd.grad(forward(public, given), given.weight, grad)
        with torch.no_grad():
            forward(public, replace(given, train=False))


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_compiled_function(device: torch.device, kind: str) -> None:
    """Inductor compiles one graph, with the same bits, running statistics included."""
    given = case((16, 64, 8, 8), kind=kind, device=device)
    grad = gradient(given)
    compiled = torch.compile(public, fullgraph=True)
    assert same_bits(run(compiled, given, grad), run(public, given, grad))
    with torch.no_grad():
        given = replace(given, train=False)
        # Inductor computes 1/√(variance + eps) itself.
        close("y", forward(compiled, given), forward(public, given), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("the maps are not channels-last", {"layout": torch.contiguous_format}),
        ("there is no batch-norm kernel for torch.float64 maps", {"dtype": torch.float64}),
        ("the kernels have no gradient in evaluation mode", {"train": False}),
    ],
)
def test_inputs_without_a_kernel_run_on_the_reference_with_a_warning(
    device: torch.device, reason: str, change: dict[str, Any]
) -> None:
    given = replace(case((16, 64, 9, 9), kind="pool", device=device), train=change.get("train", True))
    grad = gradient(given)
    given.x = given.x.to(change.get("dtype")).contiguous(memory_format=change.get("layout", torch.channels_last))
    if given.x.dtype == torch.float64:
        given = given.copy(torch.float64)
    with pytest.warns(UserWarning, match=f"plain PyTorch normalises maps, slowly: {reason}"):
        ours = run(public, given, grad)
    with warnings.catch_warnings():  # it warns once
        warnings.simplefilter("error")
        run(public, given, grad)
    theirs = run(batch_norm_relu_reference, given.copy(torch.float64), grad.double())
    for name in ("y", "x", "weight", "bias"):
        close(name, getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_one_value_per_channel_is_torchs_own_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(public, case((1, 4, 1, 1), device=device))
    empty = case((2, 4, 6, 6), device=device)
    empty.x = empty.x[:0]
    assert forward(public, empty).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_more_than_two_to_the_31_elements(device: torch.device, kind: str) -> None:
    """The last samples, whose offsets exceed int32, equal the same samples in a batch of their own."""
    samples, channels, size = 2**31 // (1024 * 64 * 64) + 8, 1024, 64
    if torch.cuda.mem_get_info(device)[0] < 9 * 2**30 * (2 if kind == "residual" else 1) + 2**32:
        pytest.skip("needs more memory")
    shape = samples, channels, size, size
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last).normal_()
    vectors = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
    residual = x if kind == "residual" else None
    pool = kind == "pool"
    with torch.no_grad():
        in_batch = public(x, *vectors, False, MOMENTUM, EPS, pool, residual)[-2:]
        alone = public(x[-2:], *vectors, False, MOMENTUM, EPS, pool, None if residual is None else residual[-2:])
        assert torch.equal(in_batch, alone)
        mean, var = vectors[2].clone(), vectors[3].clone()
        public(x, *vectors, True, 1.0, EPS, pool, residual)
    assert not torch.equal(vectors[2], mean)
    close("running_mean", vectors[2], torch.zeros(channels), rtol=0.0, atol=1e-2)
    close("running_var", vectors[3], torch.ones(channels), rtol=1e-2, atol=0.0)
    assert not torch.equal(vectors[3], var)
