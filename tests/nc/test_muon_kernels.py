"""Muon with the kernels of Newton–Schulz, in Triton's interpreter: as with the reference in bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bfloat16_products
from muon_cases import close, give_gradients, parameters
from ncollapse import optim
from ncollapse.kernels.newton_schulz import gpu
from ncollapse.kernels.newton_schulz.gpu import Matrices
from ncollapse.optim import muon

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels on it")
# Wide, tall, a convolution, a vector, and the head, which is in full precision.
SHAPES = [(5, 9), (9, 5), (4, 3, 2, 2), (5,), (3, 8)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernels take what is in bfloat16; the number of matrices of each parameter that they were made for."""
    made: list[int] = []
    bfloat16_products.decode(monkeypatch)
    real = Matrices.__init__

    def counted(self: Any, shapes: Any, device: torch.device) -> None:
        made.extend(runs for runs, _, _ in shapes)
        real(self, shapes, device)

    monkeypatch.setattr(Matrices, "__init__", counted)
    monkeypatch.setattr(muon, "_has_kernel", lambda param, dtype, shape: dtype == torch.bfloat16)
    return made


def make(layout: Any, runs: tuple[int, ...]) -> tuple[list[nn.Parameter], optim.Muon]:
    params = [nn.Parameter(layout(p.detach())) for p in parameters(SHAPES, torch.float32, runs)]
    numbers: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.3, "coupling": 0.5, "momentum": 0.9}
    if runs:
        numbers = {n: torch.linspace(v, v / 2, *runs, dtype=torch.float64) for n, v in numbers.items()}
    groups = [
        {"params": params[:2], "ns_precision": "bfloat16"},
        {"params": params[2:4], "ns_precision": "bfloat16", "nesterov": False},
        {"params": params[4:], "ns_precision": "full"},
    ]
    # Two steps of Newton–Schulz, since the interpreter is slow.
    return params, optim.Muon(groups, stacked=bool(runs), ns_steps=2, **numbers)


def channels_last(p: torch.Tensor) -> torch.Tensor:
    return p.movedim(-3, -1).contiguous().movedim(-1, -3) if p.dim() > 3 else p.clone()


@pytest.mark.parametrize("runs", [(), (2,)], ids=["alone", "stacked"])
def test_steps_are_the_references(kernels: list[int], monkeypatch: pytest.MonkeyPatch, runs: tuple[int, ...]) -> None:
    monkeypatch.setattr(gpu, "momentum_reference", None)  # gradients in the parameters' layout need it not
    params, ours = make(channels_last, runs)
    twins, reference = make(channels_last, runs)
    for seed in range(4):
        for ps in (params, twins):
            give_gradients(ps, seed)
            for p in ps:
                p.grad = torch.empty_like(p).copy_(p.grad)
            if seed == 2:
                ps[1].grad = None
        before = params[1].detach().clone()
        ours.step()
        assert (seed == 2) == torch.equal(before, params[1])
        with monkeypatch.context() as context:
            context.setattr(muon, "_has_kernel", lambda *_: False)
            reference.step()
        # Three digits of directions of 0.2·√max(A, B) ≈ 0.6, of size 0.02, in each step.
        close(params[:3], twins[:3], (seed + 1) * 0.02 * 0.6 * 0.03)
        close(params[3:], twins[3:], 1e-6)
        for p, q in zip(params[:3], twins[:3], strict=True):
            close(ours.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"], 1e-3)
    assert kernels == [*(runs or (1,))] * 3  # made once


def test_memory_is_made_once(kernels: list[int]) -> None:
    params, optimizer = make(lambda p: p.clone(), ())
    addresses: set[Any] = set()
    for seed in range(5):
        give_gradients(params, seed)
        if seed == 2:
            optimizer.observe(norms=True)
        if seed == 3:
            optimizer.param_groups[0]["maximize"] = True
        optimizer.step()
        stepper: Any = optimizer._stepper
        addresses |= {x.data_ptr() for members in stepper._members if isinstance(members.matrices, Matrices)
                      for x in members.matrices._x}  # fmt: skip
    assert kernels == [1, 1, 1]
    assert len(addresses) == 2


def test_a_graph_keeps_what_the_kernels_read_and_write(kernels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the optimizer prepares for other matrices, or is gone."""
    params, optimizer = make(lambda p: p.clone(), ())
    give_gradients(params, 0)
    optimizer.step()
    kept: list[Tensor] = []
    monkeypatch.setattr(muon, "capturing", lambda params: True)
    monkeypatch.setattr(muon, "keep_for_graph", lambda tensors, otherwise: kept.extend(tensors))
    optimizer.step()
    stepper: Any = optimizer._stepper
    read, held = set(), {t.untyped_storage().data_ptr() for t in kept}
    for members in stepper._members:
        for value in vars(members.matrices).values():
            tensors = value if isinstance(value, list) else [value]
            read |= {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
    assert read <= held
    assert {d.data_ptr() for d in stepper._directions.values()} <= held


def test_the_padding_counts_among_the_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets in the padded memory are int32."""
    monkeypatch.setattr(muon, "_is_fast", lambda param: True)
    monkeypatch.setattr(muon, "why_no_kernel", lambda device: None)
    monkeypatch.setattr(muon, "_is_fenced", lambda device: True)
    param, half = torch.empty(0), torch.bfloat16
    assert muon._has_kernel(param, half, (1, 512, 4608))
    assert muon._has_kernel(param, half, (1, 2, 2**23))
    assert not muon._has_kernel(param, half, (1, 2, 2**23 + 1))
    assert not muon._has_kernel(param, half, (1, 2**28, 3))
    assert not muon._has_kernel(param, half, (1, muon.MOST_SIDE + 1, muon.MOST_SIDE + 1))
    assert not muon._has_kernel(param, torch.float32, (1, 512, 4608))


@pytest.mark.parametrize(
    ("version", "capability", "fenced"),
    [
        ("3.6.0", (8, 0), True), ("3.6.0", (9, 0), False), ("3.7.0", (10, 0), False), ("3.7.1", (9, 0), True),
        ("3.7.1+git1a2b3c", (9, 0), True), ("3.10.0", (12, 0), True), ("4.0", (9, 0), True),
    ],
)  # fmt: skip
def test_hopper_asks_for_a_triton_with_fences(
    version: str, capability: tuple[int, int], fenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert muon._is_fenced(torch.device("cuda", 0)) == fenced
