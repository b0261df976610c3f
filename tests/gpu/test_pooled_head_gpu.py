"""The maximum over space with a linear head on a GPU: launches, CUDA graphs, exact products, training.

tests/kernels/test_pooled_head.py compares the same kernels with float64.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_training import warmed_and_captured
from ncollapse.kernels.pooled_head import op, pooled_head, why_no_kernel
from ncollapse.kernels.pooled_head.reference import pooled_head_reference
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.training.loop import Training
from pooled_head_cases import check, inputs, outcome
from waiting import nothing_waits

RESNET9 = (1, 128, 512, 3, 3, 10)


def leaves_of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_one_launch_forward_and_one_backward(device: torch.device) -> None:
    maps, weight, bias, grad, _ = inputs(RESNET9, torch.bfloat16, device=device)
    leaves = leaves_of((maps, weight, bias))  # type: ignore[arg-type]

    def tail() -> None:
        torch.autograd.grad(pooled_head(*leaves)[1], leaves, grad)

    tail()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        tail()
        torch.cuda.synchronize()
    launched = Counter(e.name for e in profiler.events() if e.device_type == DeviceType.CUDA and "kernel" in e.name)
    assert launched == {"pooled_head_forward_kernel": 1, "pooled_head_backward_kernel": 1}


@pytest.mark.parametrize("runs", [1, 3])
def test_a_replayed_cuda_graph_gives_the_same_bits(runs: int, device: torch.device) -> None:
    shape = (runs, *RESNET9[1:])
    static = inputs(shape, torch.bfloat16, device=device)
    leaves = leaves_of(static[:3])  # type: ignore[arg-type]

    def step() -> tuple[Tensor, ...]:
        features, logits = pooled_head(*leaves)
        return features.detach(), logits.detach(), *torch.autograd.grad(logits, leaves, static.logits_grad)

    graph, results = warmed_and_captured(step)
    for _ in range(3):
        given = inputs(shape, torch.bfloat16, device=device)
        with torch.no_grad():
            for leaf, value in zip(leaves, given[:3], strict=True):
                leaf.copy_(value)  # type: ignore[arg-type]
            static.logits_grad.copy_(given.logits_grad)
        graph.replay()
        for ours, theirs in zip(results, outcome(pooled_head, given), strict=True):
            assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_no_synchronisation(device: torch.device) -> None:
    given = inputs(RESNET9, torch.bfloat16, device=device)
    outcome(pooled_head, given)  # compiles
    with nothing_waits():
        assert why_no_kernel(*given[:3]) is None
        outcome(pooled_head, given)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_are_exact_whatever_the_precision(precision: str, device: torch.device) -> None:
    given = inputs(RESNET9, relu=False, device=device)
    exact = outcome(pooled_head_reference, given.to(torch.float64))
    with arithmetic(precision):
        check(outcome(pooled_head, given), exact, torch.float32)


def test_the_features_are_torchs(device: torch.device) -> None:
    """Also those of NaN, and of two zeros of different signs."""
    given = inputs(RESNET9, torch.bfloat16, device=device)
    given.maps[3, 7, 1, 1] = float("nan")
    given.maps[5, 9] = -0.0
    given.maps[5, 9, 2, 2] = 0.0
    ours, theirs = outcome(pooled_head, given), outcome(pooled_head_reference, given)
    torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.maps.isnan(), theirs.maps.isnan())


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_takes_the_kernels_and_learns_the_same(
    precision: str, runs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(260, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    y = (x.flatten(1).sum(1) > 0).long()
    data = Dataset(x[:256], y[:256], x[256:], y[256:], ("0", "1"), "")
    configs = [
        RunConfig(model="cnn", precision=precision, seed=seed, lr=0.01, epochs=3, eval_every=3)  # type: ignore[arg-type]
        for seed in range(runs)
    ]
    taken: list[bool] = []
    launch = op.forward_op

    def counted(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        taken.append(True)
        return launch(*tensors)

    def trained() -> list[dict[str, Tensor]]:
        training = Training(configs, data, device)
        for _ in training:
            pass
        return [training.stack.state_dict(i) for i in range(runs)]

    monkeypatch.setattr(op, "forward_op", counted)
    ours = trained()
    assert taken
    taken.clear()
    monkeypatch.setattr(op, "ENABLED", False)
    theirs = trained()
    assert not taken
    bound = 2e-2 if precision == "bf16" else 1e-3
    for our, their in zip(ours, theirs, strict=True):
        for name, value in their.items():
            torch.testing.assert_close(our[name], value, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
