"""Memory that changes behind an optimizer's back: every address is looked at in the step that uses it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memory_changes
from ncollapse import optim
from ncollapse.kernels import tensors
from ncollapse.kernels.update.launch import Update

LIBRARIES = (optim, torch.optim)


@pytest.fixture(params=["compiled", "python"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the C++ extension looks at tensors, or Python."""
    if request.param == "python":
        monkeypatch.setattr(tensors, "_compiled", None)
        monkeypatch.setattr(tensors, "_bumps", False)
    elif tensors._compiled is None:
        pytest.skip("needs the compiled extension")
    return str(request.param)


@pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters")
def test_any_change_of_memory(look: str) -> None:
    """`bench/memory_changes.py` has run thousands of draws, under AddressSanitizer too."""
    happened = memory_changes.check_many(0, 40 if look == "compiled" else 10)
    assert happened["steps"] > 40


def step(optimizer: torch.optim.Optimizer, *grads: Tensor | None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None
        param.grad = grad
    optimizer.step()


def test_a_parameter_cut_in_place_writes_nothing_beside_it(look: str) -> None:
    arena = torch.zeros(2000)
    w = nn.Parameter(torch.ones(1000))
    optimizer = optim.SGD([w], lr=0.1)
    step(optimizer, torch.ones(1000))
    w.grad = None
    w.data = arena[:500]
    step(optimizer, torch.ones(500))
    assert torch.equal(arena, torch.cat([torch.full((500,), -0.1), torch.zeros(1500)]))


@pytest.mark.parametrize("what", ["state", "gradient"])
def test_another_shape_is_refused_before_anything_changes(what: str, look: str) -> None:
    w, v = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([v, w], lr=0.1, momentum=0.9)
    step(optimizer, torch.ones(3), torch.ones(10))
    if what == "state":
        w.grad = None
    w.data = torch.ones(20)
    if what == "state":
        w.grad = torch.ones(20)
    before = v.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a parameter has shape \(20,\), its .* \(10,\)"):
            optimizer.step()
    assert torch.equal(v, before)


def test_a_storage_that_was_given_back_is_refused(look: str) -> None:
    w = nn.Parameter(torch.ones(10))
    optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    step(optimizer, torch.ones(10))
    buffer = optimizer.state[w]["momentum_buffer"]
    for lost in (buffer, w):
        lost.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="was resized to 0 bytes, it needs 40"):
            optimizer.step()
        lost.untyped_storage().resize_(40)
        lost.data.fill_(1.0)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((10,), 1 - 0.1 * 1.9))


def share_states(optimizer: torch.optim.Optimizer) -> None:
    """As A3C's SharedAdam does."""
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


def move_states(optimizer: torch.optim.Optimizer) -> None:
    """The usual helper of offloaders."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.to("cpu", copy=True)


def restart_moments(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = torch.zeros_like(value)


@pytest.mark.parametrize("change", [share_states, move_states, restart_moments])
@pytest.mark.parametrize("size", [3, 200_000])
def test_states_may_move(change: Callable[[torch.optim.Optimizer], None], size: int, look: str) -> None:
    results = []
    for library in LIBRARIES:
        w = nn.Parameter(torch.zeros(size))
        optimizer = library.Adam([w], lr=0.1)
        step(optimizer, torch.ones(size))
        change(optimizer)
        for scale in (1.0, -3.0, 2.0):
            step(optimizer, torch.full((size,), scale))
        results.append({"parameter": w.detach(), **optimizer.state[w]})
    torch.testing.assert_close(*results)


class SharedAdam(optim.Adam):
    """A3C's optimizer: all processes step the same parameters, with the same states."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
                p.share_memory_()
        share_states(self)


def worker(optimizer: SharedAdam, w: nn.Parameter) -> None:
    for _ in range(3):
        step(optimizer, torch.ones(1000))


def test_processes_that_share_parameters_and_states() -> None:
    w = nn.Parameter(torch.zeros(1000))
    optimizer = SharedAdam([w], lr=0.1)
    torch.multiprocessing.spawn(_in_child, (optimizer, w), nprocs=1)
    step(optimizer, torch.ones(1000))
    assert optimizer.state[w]["step"] == 4
    torch.testing.assert_close(w.detach(), torch.full((1000,), -0.4))


def _in_child(_: int, optimizer: SharedAdam, w: nn.Parameter) -> None:
    torch.set_num_threads(1)
    # A pickled optimizer has its own parameters; those of shared memory are the same numbers.
    worker(optimizer, optimizer.param_groups[0]["params"][0])


def test_a_rate_may_move(look: str) -> None:
    w, lr = nn.Parameter(torch.zeros(3)), torch.tensor(0.1)
    optimizer = optim.SGD([w], lr=lr)
    step(optimizer, torch.ones(3))
    lr.data = torch.tensor(0.5)
    step(optimizer, torch.ones(3))
    torch.testing.assert_close(w.detach(), torch.full((3,), -0.6))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Signum", "Lion", "Muon"])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(name: str, kind: str, look: str) -> None:
    """A memory estimator's steps make the states, and nothing else."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        model = nn.Linear(5, 3)
        optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p in model.parameters():
            assert all(t.shape in (p.shape, ()) for t in optimizer.state[p].values())


def test_fake_tensors_of_another_device() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Linear(5, 3, device="cuda")
        optimizer = optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].device.type == "cuda"


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_parameters_of_the_same_memory_are_updated_one_after_the_other(name: str, look: str) -> None:
    results = []
    for library in LIBRARIES:
        base = torch.zeros(300_000)
        params = [nn.Parameter(base.view(-1)), nn.Parameter(torch.zeros(5)), nn.Parameter(base.view(-1)[1000:])]
        optimizer = getattr(library, name)(params, lr=1.0, weight_decay=0.1)
        for _ in range(3):
            step(optimizer, *(torch.ones_like(p) for p in params))
        results.append([base, params[1].detach()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_of_one_count_of_steps() -> None:
    results = []
    for library in LIBRARIES:
        params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        optimizer = library.Adam(params, lr=0.1)
        step(optimizer, *(torch.ones(2) for _ in params))
        for p in params:
            optimizer.state[p]["step"] = optimizer.state[params[0]]["step"]
        for scale in (-2.0, 5.0):
            step(optimizer, *(torch.full((2,), scale) for _ in params))
        results.append([*(p.detach() for p in params), optimizer.state[params[0]]["step"]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters")
def test_a_gradient_with_a_lazy_minus_sign(look: str) -> None:
    """Autograd keeps it for parameters of one element, as a phase in a complex product."""
    results = []
    for library in LIBRARIES:
        w = nn.Parameter(torch.ones(1))
        optimizer = library.SGD([w], lr=0.1)
        for i in range(4):
            z = torch.complex(torch.zeros(1), w)
            ((z if i % 2 else z.conj()) * (1 + 2j)).imag.sum().backward()
            assert w.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        results.append(w.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Muon"])
def test_gradients_that_come_and_go_need_no_new_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, plan = [0], Update._plan

    def counted(*args: Any) -> None:
        plans[0] += 1
        plan(*args)

    monkeypatch.setattr(Update, "_plan", counted)
    results = []
    for library in LIBRARIES:
        params = [nn.Parameter(torch.full((3, 2), float(i))) for i in range(6)]
        settings = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(library, name)(params, lr=0.1, **settings)
        for i in range(6):
            if i == 2:
                plans[0] = 0
            step(optimizer, *(torch.randn_like(p) * 0 + j if (i + j) % 2 else None for j, p in enumerate(params)))
        results.append(params)
        assert plans[0] == 0
    for ours, theirs in zip(*results, strict=True):
        # torch's Muon computes in bfloat16, and scales its update in another way.
        assert name == "Muon" or torch.allclose(ours, theirs)
    step(optimizer := optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), None)
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters")
@pytest.mark.parametrize("back", [False, True])
def test_a_parameter_that_changes_while_its_gradient_is_missing(back: bool, look: str) -> None:
    """What was known of its last gradient says nothing of the next one."""
    results = []
    for library in LIBRARIES:
        w, v = nn.Parameter(torch.arange(15.0).view(3, 5)), nn.Parameter(torch.ones(2))
        optimizer = library.SGD([w, v], lr=0.1)
        grad = torch.arange(15.0).view(3, 5) + 1
        if library is optim:
            w.grad_dtype = None
            w.grad = grad.bfloat16() if back else grad.clone()  # ours takes both
            optimizer.step()
        else:
            step(optimizer, grad, None)
        step(optimizer, None, torch.ones(2))
        w.data = w.data.T.contiguous().T
        step(optimizer, None, torch.ones(2))
        if back:
            w.data = w.data.contiguous()
            step(optimizer, None, torch.ones(2))
        step(optimizer, grad.clone(), torch.ones(2))
        results.append([w.detach(), v.detach()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_parameter_whose_state_was_taken_away_gets_none_before_its_next_gradient() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([a, b])
    step(optimizer, torch.ones(2), torch.ones(2))
    del optimizer.state[a]
    step(optimizer, None, torch.ones(2))
    assert a not in optimizer.state
    step(optimizer, torch.ones(2), torch.ones(2))
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (1, 3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "torch.compile"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "Muon"])
def test_a_step_between_a_forward_and_its_backward_pass(name: str, compiled: bool, look: str) -> None:
    """The usual mistake in a GAN's loop: autograd refuses it, as it does with torch.optim."""
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = getattr(optim, name)(critic.parameters(), lr=0.5)
    take = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    x = torch.randn(5, 3, requires_grad=True)
    for _ in range(2):
        score = critic(x)
        score.mean().backward(retain_graph=True)
        take()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(score.mean(), x)


def test_a_state_that_autograd_has_saved() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    step(optimizer, torch.ones(2))
    penalty = (w.detach().requires_grad_() * optimizer.state[w]["momentum_buffer"]).sum()
    step(optimizer, torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_parameters_made_in_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        w = torch.ones(2)
        optimizer = optim.SGD([w], lr=0.1)
        w.grad = torch.ones(2)
        optimizer.step()
    torch.testing.assert_close(w.clone(), torch.full((2,), 0.9))


def test_threads_that_step_the_same_optimizer() -> None:
    w = nn.Parameter(torch.zeros(1000))
    optimizer = optim.SGD([w], lr=1.0)
    step(optimizer, torch.ones(1000))

    def work() -> None:
        for _ in range(100):
            w.grad = torch.ones(1000)
            optimizer.step()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(w, torch.full((1000,), -401.0))


def test_python_sees_what_the_extension_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    if tensors._compiled is None:
        pytest.skip("needs the compiled extension")
    arena = torch.arange(60.0)
    column = [
        torch.ones(()), torch.ones(0, 3), nn.Parameter(torch.ones(2, 3)), arena[7:13].view(2, 3), arena[::2],
        torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.complex64), torch.ones(3, device="meta"),
        torch.ones(2, 2).to_sparse(), None, 3.0, (torch.zeros(1) + 1j).conj().imag, torch.ones(1, 1, 1, 1),
    ]  # fmt: skip
    shrunk = torch.ones(9)
    shrunk.untyped_storage().resize_(8)
    column.append(shrunk)
    seen = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(tensors, "_compiled", None)
        fingerprint = tensors.Fingerprint()
        assert fingerprint.look((column,)) == tensors.CHANGED
        fingerprint.renew((column,))
        assert fingerprint.look((column,)) == 0
        foreign = [kind == tensors.FOREIGN for kind in fingerprint.kinds[0]]
        moved = [*column[:2], column[2].detach().clone(), *column[3:]]
        other = [*column[:2], torch.ones(3, 2), *column[3:]]
        answers = fingerprint.addresses.tolist(), fingerprint.look((moved,)), fingerprint.look((other,))
        seen.append((foreign, fingerprint.look((column[:-1],)), *answers))
    assert seen[0] == seen[1]
    assert [i for i, is_foreign in enumerate(seen[0][0]) if is_foreign] == [7, 8, 10, 11, 13]
    assert seen[0][3:] == (1, tensors.CHANGED)


def test_a_copy_of_an_optimizer_has_memory_of_its_own() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([w], lr=0.1)
    step(optimizer, torch.ones(3))
    twin = copy.deepcopy(optimizer)
    (v,) = twin.param_groups[0]["params"]
    step(twin, torch.ones(3))
    assert torch.equal(w, torch.full((3,), 0.9))
    assert not torch.equal(v, w)
