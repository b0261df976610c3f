"""Batch norm with ReLU on the GPU: against torch's operations in float64 and there, in CUDA graphs, without waiting."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batch_norm_cases import (
    DTYPES,
    EPS,
    KINDS,
    MOMENTUM,
    Case,
    Result,
    case,
    channels_last,
    check,
    close,
    forward,
    gradient,
    poisoned,
    run,
    same_bits,
)
from ncollapse.kernels import operators
from ncollapse.kernels.batch_norm import batch_norm_relu
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference
from waiting import nothing_waits

# Of ResNet9 and of stacks of runs; odd ones; few and many pixels, more parts than fit; a number of channels that is no
# multiple of anything.
SHAPES = [
    (128, 64, 28, 28), (128, 512, 3, 3), (32, 24 * 128, 7, 7), (300, 1, 33, 31), (7, 3, 61, 59), (2, 100, 3, 3),
    (1, 64, 1, 2), (2, 1000, 2, 2), (64, 96, 15, 13),
]  # fmt: skip


def public(*arguments: Any) -> Tensor:
    """`batch_norm_relu`; a warning that it falls back is an error."""
    x, weight, bias, mean, var, train, momentum, eps, pool, residual = arguments
    return batch_norm_relu(
        x, weight, bias, mean, var, train=train, momentum=momentum, eps=eps, pool=pool, residual=residual
    )


@pytest.fixture(autouse=True)
def _each_warning_anew() -> None:
    operators._warned.clear()


def both(given: Case, grad: Tensor) -> tuple[Result, Result]:
    """By the kernels, and by the reference in float64."""
    with poisoned():
        ours = run(public, given, grad)
    return ours, check(ours, given, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "kind"), [(s, k) for s in SHAPES for k in KINDS if k != "pool" or min(s[2:]) > 1], ids=str
)
def test_shapes(device: torch.device, shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    given = case(shape, dtype, kind, device=device)
    both(given, gradient(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torchs_own_operations_there(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """In the maps' dtype: the same but for single roundings, where these decide nothing."""
    given = case((64, 128, 14, 14), dtype, kind, device=device)
    grad = gradient(given)
    ours, theirs = run(public, given, grad), run(batch_norm_relu_reference, given, grad)
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for name, their in vars(theirs).items():
        if their is not None:
            close(name, getattr(ours, name), their, rtol=unit, atol=unit * their.abs().max().item())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_finite_spoils_its_channel_alone(device: torch.device, kind: str, value: float) -> None:
    given = case((16, 70, 9, 9), kind=kind, device=device)
    grad = gradient(given)
    given.x[11, 65, 4, 5] = value
    ours = run(public, given, grad)
    theirs = check(ours, given, grad, torch.arange(70, device=device) != 65)
    for result in (ours, theirs):
        assert result.y[:, 65].isnan().all()
        assert result.x[:, 65].isnan().all()
    close("bias", ours.bias, theirs.bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_in_a_pooling_window(device: torch.device, dtype: torch.dtype) -> None:
    given = case((16, 70, 9, 8), dtype, "pool", device=device)
    given.x = channels_last(torch.randint(3, given.x.shape, device=device).to(dtype))
    both(given, gradient(given))


def test_the_variance_keeps_its_digits_far_from_zero(device: torch.device) -> None:
    given = case((128, 64, 28, 28), mean=1e3, std=1e-2, device=device)
    given.running_var.zero_()
    forward(public, given)
    exact = given.x.double().var((0, 2, 3))
    close("variance", given.running_var / MOMENTUM, exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    given = replace(case((32, 100, 9, 8), dtype, kind, device=device), train=False)
    for channel, pixel in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # of a window
        given.x[0, channel, pixel[0], pixel[1]] = math.nan
    given.x[0, 4, 1, 1] = math.inf
    theirs = forward(batch_norm_relu_reference, given.copy(torch.float64))
    before = given.copy()
    with poisoned():
        ours = forward(public, given)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().sum() == 4
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    close("y", ours, theirs, rtol=2 * unit, atol=8 * unit)
    assert torch.equal(given.running_mean, before.running_mean)
    assert torch.equal(given.running_var, before.running_var)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    given = case((128, 128, 14, 14), dtype, kind, device=device)
    grad = gradient(given)
    first = run(public, given, grad)
    assert all(same_bits(run(public, given, grad), first) for _ in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_cuda_graph_gives_the_same_bits(device: torch.device, kind: str) -> None:
    cases = [case((64, 128, 14, 14), torch.bfloat16, kind, mean=float(k), device=device) for k in range(4)]
    grads = [gradient(of) for of in cases]
    static, grad = cases[0].copy(), grads[0].clone()
    leaves = [static.x.requires_grad_(), static.weight.requires_grad_(), static.bias.requires_grad_()]

    def step() -> tuple[Tensor, ...]:
        y = forward(public, static)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    static.running_mean.copy_(cases[0].running_mean)
    static.running_var.copy_(cases[0].running_var)
    running = cases[0].running_mean.clone(), cases[0].running_var.clone()
    for of, g in zip(cases, grads, strict=True):
        with torch.no_grad():
            for name in ("x", "weight", "bias", *(["residual"] if kind == "residual" else [])):
                getattr(static, name).copy_(getattr(of, name))
        grad.copy_(g)
        graph.replay()
        eager = run(public, replace(of, running_mean=running[0], running_var=running[1]), g)
        running = eager.running_mean, eager.running_var
        assert torch.equal(outputs[0], eager.y)
        for ours, theirs in zip(outputs[1:], (eager.x, eager.weight, eager.bias), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(static.running_mean, eager.running_mean)
        assert torch.equal(static.running_var, eager.running_var)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_for_the_gpu(device: torch.device, kind: str) -> None:
    given = case((16, 64, 8, 8), kind=kind, device=device)
    grad = gradient(given)
    given.weight.requires_grad_()
    torch.autograd.grad(forward(public, given), given.weight, grad)  # compiles
    with nothing_waits():
        torch.autograd.grad(forward(public, given), given.weight, grad)
        with torch.no_grad():
            forward(public, replace(given, train=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_compiled_function(device: torch.device, kind: str) -> None:
    """Of Inductor: one graph, the same bits, running statistics too."""
    given = case((16, 64, 8, 8), kind=kind, device=device)
    grad = gradient(given)
    compiled = torch.compile(public, fullgraph=True)
    assert same_bits(run(compiled, given, grad), run(public, given, grad))
    with torch.no_grad():
        given = replace(given, train=False)
        # 1/√(variance + eps) is Inductor's own there.
        close("y", forward(compiled, given), forward(public, given), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("the maps are not channels-last", {"layout": torch.contiguous_format}),
        ("there is no batch-norm kernel for torch.float64 maps", {"dtype": torch.float64}),
        ("the kernels have no gradient in evaluation mode", {"train": False}),
    ],
)
def test_what_the_kernels_do_not_take_is_right_too_and_warned_of(
    device: torch.device, said: str, change: dict[str, Any]
) -> None:
    given = replace(case((16, 64, 9, 9), kind="pool", device=device), train=change.get("train", True))
    grad = gradient(given)
    given.x = given.x.to(change.get("dtype")).contiguous(memory_format=change.get("layout", torch.channels_last))
    if given.x.dtype == torch.float64:
        given = given.copy(torch.float64)
    with pytest.warns(UserWarning, match=f"plain PyTorch normalises maps, slowly: {said}"):
        ours = run(public, given, grad)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        run(public, given, grad)
    theirs = run(batch_norm_relu_reference, given.copy(torch.float64), grad.double())
    for name in ("y", "x", "weight", "bias"):
        close(name, getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_torch_says_what_is_wrong_with_one_value_a_channel(device: torch.device) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(public, case((1, 4, 1, 1), device=device))
    empty = case((2, 4, 6, 6), device=device)
    empty.x = empty.x[:0]
    assert forward(public, empty).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_more_than_two_to_the_31_elements(device: torch.device, kind: str) -> None:
    """Of which the last samples, beyond what int32 can address, are worked out as they are alone."""
    samples, channels, size = 2**31 // (1024 * 64 * 64) + 8, 1024, 64
    if torch.cuda.mem_get_info(device)[0] < 9 * 2**30 * (2 if kind == "residual" else 1) + 2**32:
        pytest.skip("needs more memory")
    shape = samples, channels, size, size
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last).normal_()
    vectors = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
    residual = x if kind == "residual" else None
    pool = kind == "pool"
    with torch.no_grad():
        whole = public(x, *vectors, False, MOMENTUM, EPS, pool, residual)[-2:]
        alone = public(x[-2:], *vectors, False, MOMENTUM, EPS, pool, None if residual is None else residual[-2:])
        assert torch.equal(whole, alone)
        mean, var = vectors[2].clone(), vectors[3].clone()
        public(x, *vectors, True, 1.0, EPS, pool, residual)
    assert not torch.equal(vectors[2], mean)
    close("running_mean", vectors[2], torch.zeros(channels), rtol=0.0, atol=1e-2)
    close("running_var", vectors[3], torch.ones(channels), rtol=1e-2, atol=0.0)
    assert not torch.equal(vectors[3], var)
