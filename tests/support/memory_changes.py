"""Steps of an optimizer while other code changes the memory of its tensors, beside torch.optim's on tensors of its own.

`check(seed)` draws a model, an optimizer and what happens between steps. Every draw must end with torch's numbers, or
with an error of both; and memory beside the tensors must stay as it was. `bench/memory_changes.py` runs many.
"""

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncollapse import optim

SHAPES = [(), (0,), (1,), (7,), (3, 5), (16, 16), (2, 3, 4, 2), (5000,)]
GUARD, FILL = 64, 12345.0
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01}),
]


class DifferenceError(AssertionError):
    """Ours did something else than torch.optim."""


class Twins:
    """The same parameters twice: those of our optimizer, whose memory is played with, and those of torch's."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dtype = rng.choice([torch.float32, torch.float32, torch.float64])
        self.shares = False  # two parameters have the same memory
        self.arenas: list[tuple[Tensor, int, int]] = []
        name, settings = rng.choice(SETTINGS)
        ours, theirs = dict(settings), dict(settings)
        if rng.random() < 0.2:
            ours["lr"], theirs["lr"] = torch.tensor(settings["lr"], dtype=torch.float64), torch.tensor(settings["lr"])
        start = [self.random(rng.choice(SHAPES)) for _ in range(rng.randint(1, 6))]
        self.ours, self.theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
        cut = rng.randint(0, len(start))
        self.optimizers = []
        for library, params, kwargs in ((optim, self.ours, ours), (torch.optim, self.theirs, theirs)):
            groups = [{"params": params[:cut]}, {"params": params[cut:], "weight_decay": 0.02}]
            self.optimizers.append(getattr(library, name)([g for g in groups if g["params"]], **kwargs))

    def random(self, shape: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, generator=generator, dtype=self.dtype)

    def new_grads(self) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            if self.rng.random() < 0.25:
                p.grad = q.grad = None
            elif self.rng.random() < 0.8 or p.grad is None or q.grad is None:
                p.grad, q.grad = None, None
                grad = self.random(p.shape)
                q.grad = grad.clone()
                p.grad = self.laid_out(grad)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values, in some layout."""
        kind = self.rng.randrange(4)
        if kind == 0 and t.dim() >= 2:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1:
            return self.in_arena(t)
        if kind == 2 and t.dim():
            wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
            wide[..., ::2] = t
            return wide[..., ::2]
        return t.clone()

    def in_arena(self, t: Tensor) -> Tensor:
        """The same values between guard zones that nobody may touch."""
        arena = torch.full((t.numel() + 2 * GUARD + 1,), FILL, dtype=t.dtype)
        start = GUARD + self.rng.randrange(2)
        arena[start : start + t.numel()] = t.reshape(-1)
        self.arenas.append((arena, start, t.numel()))
        return arena[start : start + t.numel()].view(t.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of our optimizer that a table points to."""
        for p in self.ours:
            yield "parameter", p
            if p.grad is not None:
                yield "gradient", p.grad
            for name, value in self.optimizers[0].state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield name, value
        for group in self.optimizers[0].param_groups:
            if isinstance(group["lr"], Tensor):
                yield "lr", group["lr"]

    def step(self) -> bool:
        """Take a step with both; whether both raised."""
        errors = []
        for optimizer in self.optimizers:
            try:
                optimizer.step()
                errors.append(None)
            except (RuntimeError, ValueError) as error:
                errors.append(error)
        if (errors[0] is None) != (errors[1] is None):
            raise DifferenceError(f"ours: {errors[0]!r}; torch's: {errors[1]!r}")
        return errors[0] is not None

    def compare(self) -> None:
        for arena, start, count in self.arenas:
            if not ((arena[:start] == FILL).all() and (arena[start + count :] == FILL).all()):
                raise DifferenceError("memory beside a tensor was written")
        ours, theirs = self.optimizers
        for p, q in zip(self.ours, self.theirs, strict=True):
            pairs = {"parameter": (p, q)}
            pairs |= {n: (ours.state[p].get(n), v) for n, v in theirs.state.get(q, {}).items() if isinstance(v, Tensor)}
            for name, (a, b) in pairs.items():
                a = a if a is None else torch.as_tensor(a)  # a count may be a number until the next step
                if a is None or a.shape != b.shape:
                    raise DifferenceError(f"{name}: {a} where torch has {b}")
                if not torch.allclose(a.detach().to(b.dtype), b.detach(), rtol=1e-4, atol=1e-5, equal_nan=True):
                    raise DifferenceError(f"{name}: {a} where torch has {b}")


# What happens between two steps. Most change the memory of one of our tensors and keep its values.


def new_data(t: Twins, tensor: Tensor) -> None:
    tensor.data = t.laid_out(tensor.data)


def set_to(t: Twins, tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.set_(t.laid_out(tensor.detach()))


def shared(t: Twins, tensor: Tensor) -> None:
    tensor.share_memory_()


def swapped(t: Twins, tensor: Tensor) -> None:
    other = t.laid_out(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other)
        other.grad, tensor.grad = tensor.grad, None
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError:  # somebody holds a weak reference to it
        if isinstance(tensor, nn.Parameter):
            tensor.grad = other.grad


def moved_storage(t: Twins, tensor: Tensor) -> None:
    """As FSDP does: the storage is given back, and filled again later."""
    values, storage = tensor.detach().clone(), tensor.untyped_storage()
    size = storage.nbytes()
    # torch itself crashes where shared memory is resized; and an arena holds more than the tensor.
    if not storage.is_shared() and tensor.storage_offset() == 0:
        storage.resize_(0)
        storage.resize_(size + t.rng.choice([0, 8, 4096]))
        tensor.data.copy_(values)


def moved_by_the_user(t: Twins, tensor: Tensor) -> None:
    """The usual helper that moves an optimizer's state."""
    for state in t.optimizers[0].state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.data = value.data.to("cpu", copy=True)


def cut_smaller(t: Twins, tensor: Tensor) -> None:
    """Pruning: fewer rows, in the parameter and, perhaps, in its states."""
    with_states = t.rng.random() < 0.7
    i = t.rng.randrange(len(t.ours))
    for params, optimizer in zip((t.ours, t.theirs), t.optimizers, strict=True):
        p = params[i]
        if p.dim() == 0 or len(p) < 3:
            return
        p.grad = None
        p.data = t.in_arena(p.data[:-1]) if params is t.ours else p.data[:-1].clone()
        if with_states:
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.dim():
                    value.data = value.data[:-1]


def grown(t: Twins, tensor: Tensor) -> None:
    i = t.rng.randrange(len(t.ours))
    for params, optimizer in zip((t.ours, t.theirs), t.optimizers, strict=True):
        p = params[i]
        if p.dim() == 0 or len(p) == 1:  # torch would broadcast the state of one element
            return
        p.grad = None
        p.data = torch.cat([p.data, p.data[:1] * 0 + 1]) if len(p) else torch.ones(2, *p.shape[1:], dtype=p.dtype)
        optimizer.state.pop(p, None)


def tied(t: Twins, tensor: Tensor) -> None:
    """Two parameters of the same memory."""
    i, j = t.rng.randrange(len(t.ours)), t.rng.randrange(len(t.ours))
    for params in (t.ours, t.theirs):
        if params[i].shape == params[j].shape:
            params[j].data = params[i].data
            t.shares = True


def untied(t: Twins, tensor: Tensor) -> None:
    for params in (t.ours, t.theirs):
        for p in params:
            p.data = p.data.clone()
    t.shares = False


def reloaded(t: Twins, tensor: Tensor) -> None:
    states = [(p, v) for p, s in t.optimizers[0].state.items() for v in s.values() if isinstance(v, Tensor) and v.dim()]
    if any(p.shape != v.shape for p, v in states):
        return  # ours refuses the dict of a parameter that was made smaller without its states
    for optimizer in t.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def state_taken_away(t: Twins, tensor: Tensor) -> None:
    i = t.rng.randrange(len(t.ours))
    for params, optimizer in zip((t.ours, t.theirs), t.optimizers, strict=True):
        optimizer.state.pop(params[i], None)


def own_entry(t: Twins, tensor: Tensor) -> None:
    p = t.rng.choice(t.ours)
    t.optimizers[0].state[p]["ema"] = p.detach().clone()


def state_replaced(t: Twins, tensor: Tensor) -> None:
    for state in t.optimizers[0].state.values():
        for name, value in list(state.items()):
            if isinstance(value, Tensor):
                state[name] = value.item() if name == "step" else t.laid_out(value)


def rewritten(t: Twins, tensor: Tensor) -> None:
    """Another model moves into the memory: values change, addresses do not."""
    i, factor = t.rng.randrange(len(t.ours)), t.rng.choice([0.5, -1.0])
    for params in (t.ours, t.theirs):
        params[i].data.mul_(factor)


def another_rate(t: Twins, tensor: Tensor) -> None:
    for optimizer in t.optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.05)
            else:
                group["lr"] = 0.05


EVENTS: list[Callable[[Twins, Tensor], None]] = [
    new_data, set_to, shared, swapped, moved_storage, moved_by_the_user, cut_smaller, grown, tied, untied, reloaded,
    state_taken_away, own_entry, state_replaced, rewritten, another_rate,
]  # fmt: skip


def check(seed: int) -> Counter[str]:
    """One draw: up to eight steps with up to three events before each; returns what happened."""
    rng, happened = random.Random(seed), Counter[str]()
    twins = Twins(rng)
    for _ in range(rng.randint(3, 8)):
        twins.new_grads()
        for _ in range(rng.randint(0, 3)):
            _, tensor = rng.choice(list(twins.tensors()))
            event = rng.choice(EVENTS)
            if twins.shares and event in (new_data, set_to, swapped):
                continue  # ours would no longer share what torch's share
            event(twins, tensor)
            happened[event.__name__] += 1
        if twins.step():
            happened["both raised"] += 1
            return happened  # torch has updated some parameters before it raised
        happened["steps"] += 1
        twins.compare()
    return happened


def check_many(first: int, draws: int) -> Counter[str]:
    """The draws of so many seeds; AssertionError names the seed that failed."""
    happened = Counter[str]()
    for seed in range(first, first + draws):
        try:
            happened += check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return happened
