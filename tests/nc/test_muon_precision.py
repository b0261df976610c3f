"""Muon in bfloat16: which matrices, torch.optim.Muon's arithmetic, and what the head's law needs."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from muon_cases import close, give_gradients, parameters, take
from ncollapse import optim
from ncollapse.kernels.newton_schulz.reference import ReferenceMatrices
from ncollapse.optim import muon


@pytest.mark.parametrize("scale", ["match_rms_adamw", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bfloat16_is_torchs_arithmetic(scale: Any, dtype: torch.dtype) -> None:
    """Up to the order of sums, which differs between a batch of matrices and one."""
    settings = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.8, "adjust_lr_fn": scale}
    shapes = [(4, 7), (7, 4), (6, 6), (4, 7), (32, 48)]
    params, twins = parameters(shapes, dtype), parameters(shapes, dtype)
    ours = take(optim.Muon(params, ns_precision="bfloat16", **settings), params, range(3))
    theirs = take(torch.optim.Muon(twins, **settings), twins, range(3))
    exact = parameters(shapes, dtype)
    full = take(optim.Muon(exact, ns_precision="full", **settings), exact, range(3))
    for a, b, c in zip(ours, theirs, full, strict=True):
        if dtype == torch.float32:
            assert (a - b).norm() < 0.2 * (c - b).norm()
        # Torch's states of bfloat16 parameters are bfloat16, ours float32.
        close(a.float(), b.float(), 1e-3 if dtype == torch.float32 else 6e-2)


def test_which_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (9, 0))
    old = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 1))
    gpu, cpu = (
        SimpleNamespace(dtype=torch.float32, is_cuda=cuda, device=torch.device("cuda", 0)) for cuda in (True, False)
    )
    double, half = (
        SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda", 0))
        for dtype in (torch.float64, torch.bfloat16)
    )
    chosen: Any = muon._precision
    assert chosen(gpu, "auto", is_head=False) == chosen(half, "auto", is_head=False) == torch.bfloat16
    assert chosen(gpu, "auto", is_head=True) == chosen(gpu, "full", is_head=False) == torch.float32
    assert chosen(cpu, "auto", is_head=False) == chosen(half, "full", is_head=False) == torch.float32
    assert chosen(old, "auto", is_head=False) == torch.float32
    assert chosen(double, "auto", is_head=False) == torch.float64
    assert {chosen(p, "bfloat16", is_head=True) for p in (gpu, cpu, double)} == {torch.bfloat16}


def test_which_matrix_is_the_head() -> None:
    layers = nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3), "fc": nn.Linear(4, 3), "hidden": nn.Linear(3, 3)})
    last = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})
    opt = optim.Muon([{"params": layers.parameters()}, {"params": last.parameters()}])
    stepper: Any = opt._stepper
    assert stepper._head(opt) is layers["hidden"].weight  # convolutions and vectors aside, the last
    opt.observe(head=layers["fc"].weight)
    assert stepper._head(opt) is layers["fc"].weight
    stack = [nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 3))]
    stacked = optim.Muon(stack, stacked=True)
    assert stacked._stepper._head(stacked) is stack[0]  # type: ignore[attr-defined]
    assert stepper._head(optim.Muon(last.parameters())) is layers["fc"].weight
    convolutions = optim.Muon(last.parameters())
    assert convolutions._stepper._head(convolutions) is None  # type: ignore[attr-defined]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as for parameters on a GPU."""
    monkeypatch.setattr(
        muon, "_precision", lambda p, setting, is_head: torch.float32 if is_head else torch.bfloat16
    )  # fmt: skip


def test_the_head_is_orthogonalised_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head equals that of the full precision bit for bit; the others do not, until all are told to be in full."""
    as_on_a_gpu(monkeypatch)
    shapes, settings = [(6, 8), (5, 6), (4, 3, 2, 2)], {"lr": 0.02, "weight_decay": 0.1}

    def after(head: int | None, **more: Any) -> Any:
        params = parameters(shapes, torch.float32)
        opt = optim.Muon(params, **settings, **more)
        if head is not None:
            opt.observe(head=params[head])
        give_gradients(params, 0)
        opt.step()
        return params

    chosen, observed = after(None), after(0)
    monkeypatch.undo()
    full = after(None, ns_precision="full")
    assert [torch.equal(p, q) for p, q in zip(chosen, full, strict=True)] == [False, True, False]
    assert [torch.equal(p, q) for p, q in zip(observed, full, strict=True)] == [True, False, False]
    assert all(map(torch.equal, after(None), full))  # "auto" on a CPU


def test_the_law_of_the_row_sum_holds_with_hidden_matrices_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    distances = []
    for setting in (None, "bfloat16"):
        if setting is not None:
            monkeypatch.undo()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        x, y = torch.randn(32, 8), torch.arange(32) % 5
        opt = optim.Muon(model.parameters(), lr=0.02, weight_decay=0.5, ns_precision=setting or "auto")
        start = model[2].weight.detach().double().sum(0)
        for _ in range(60):
            logits = model(x)
            gradient = logits.detach().softmax(1).scatter_(1, y[:, None], 0)
            gradient.scatter_(1, y[:, None], -gradient.sum(1, keepdim=True))
            opt.zero_grad()
            logits.backward(gradient / 32)
            opt.step()
        expected = (1 - 0.02 * 0.5) ** 60 * start
        distances.append(float((model[2].weight.detach().double().sum(0) - expected).norm() / start.norm()))
    assert distances[0] < 1e-4
    assert distances[1] > 1e-2


def test_settings_of_newton_schulz_may_be_written_between_steps() -> None:
    params, settings = parameters(dtype=torch.float32), {"lr": 0.02}
    optimizer = optim.Muon(params, **settings)
    take(optimizer, params, range(1))
    for seed, written in enumerate(
        ({"ns_steps": 2}, {"ns_coefficients": (2.0, -1.5, 0.5)}, {"ns_precision": "bfloat16"}), 1
    ):
        before = [nn.Parameter(p.detach().clone()) for p in params]
        others = [nn.Parameter(p.detach().clone()) for p in params]
        unchanged, made = (optim.Muon(ps, **s) for ps, s in ((before, settings), (others, settings | written)))
        for each in (unchanged, made):
            saved = copy.deepcopy(optimizer.state_dict()["state"])
            each.load_state_dict({"state": saved, "param_groups": each.state_dict()["param_groups"]})
        settings |= written
        optimizer.param_groups[0].update(written)
        ends = [
            take(o, ps, range(seed, seed + 1)) for o, ps in ((optimizer, params), (made, others), (unchanged, before))
        ]
        assert all(map(torch.equal, ends[0], ends[1]))
        assert not torch.equal(ends[0][0], ends[2][0])
    with pytest.raises(ValueError, match="ns_precision must be one of auto, full, bfloat16; got 'half'"):
        optimizer.param_groups[0]["ns_precision"] = "half"


def test_stacks_of_the_same_shape_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are equal once the tall ones are transposed, convolutions, runs and param groups included."""
    batches: list[tuple[int, ...]] = []
    real = ReferenceMatrices.orthogonalise

    def seen(self: Any, *arguments: Any) -> None:
        batches.extend(tuple(x.shape) for x in self._whole.values())
        real(self, *arguments)

    monkeypatch.setattr(ReferenceMatrices, "orthogonalise", seen)
    stack = parameters([(4, 12), (12, 4), (4, 3, 2, 2), (4, 11)], torch.float32, runs=(3,))
    opt = optim.Muon([{"params": stack[:2]}, {"params": stack[2:], "lr": 0.5}], stacked=True)
    take(opt, stack, range(1))
    assert batches == [(9, 4, 12), (3, 4, 11)]
