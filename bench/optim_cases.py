"""What the optimizer benchmark compares: parameter lists, rules, and the ways to take a step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.peers import PEERS, make_peer
from bench.record import first_line
from ncollapse import optim
from ncollapse.train.networks import models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: How far ours may be from the baseline after some steps: mean difference over mean change. torch.optim keeps the state
#: of bfloat16 parameters in bfloat16, ours in float32, so that the two are not the same there.
TOLERANCE = {"fp32": 3e-5, "bf16": 1e-2}
CHECKED_STEPS = 5
RUNS = 24  # stacked
#: `ncollapse.optim` of another commit, of the candidate "before".
before: Any = None


def _shapes(name: str) -> list[tuple[int, ...]]:
    if name in ("resnet9", "mlp"):
        return [tuple(p.shape) for p in models.build(name, 1, 28, 10, 0).parameters()]
    lists: dict[str, list[tuple[int, ...]]] = {
        "tiny": [(i % 64 + 1,) for i in range(1000)],
        "25M": [(2048, 2048)] * 6,
        "100M": [(2048, 2048)] * 24,
        "1B": [(4096, 4096)] * 60,
    }
    return lists[name]


def shapes(name: str) -> list[tuple[int, ...]]:
    """The shapes of a parameter list: of a model, of a thousand tiny tensors, of large ones; "24×…" is stacked."""
    return [(RUNS, *s) for s in _shapes(name.partition("×")[2])] if "×" in name else _shapes(name)


@dataclass(frozen=True)
class Rule:
    """One update rule: our class, torch's if it has one, and the numbers for both."""

    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer] | None
    numbers: dict[str, Any]


_DECAY = {"weight_decay": 5e-4}
RULES = {
    "sgd": Rule(optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9} | _DECAY),
    "adam": Rule(optim.Adam, torch.optim.Adam, {"lr": 1e-3} | _DECAY),
    "adamw": Rule(optim.AdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
    "sgdw": Rule(optim.SGDW, None, {"lr": 1e-2, "momentum": 0.9} | _DECAY),
    "signum": Rule(optim.Signum, None, {"lr": 1e-3, "momentum": 0.9} | _DECAY),
    "signumw": Rule(optim.SignumW, None, {"lr": 1e-3, "momentum": 0.9} | _DECAY),
    "lion": Rule(optim.Lion, None, {"lr": 1e-3, "betas": (0.9, 0.99)} | _DECAY),
    "adam c=0.5": Rule(optim.Adam, None, {"lr": 1e-3, "coupling": 0.5} | _DECAY),
}
#: The rules of the stacked runs: those that torch.optim has, so that there is something to compare with.
STACKED = [("sgd", "adam", "adamw")[r % 3] for r in range(RUNS)]


@dataclass(frozen=True)
class Case:
    """What is timed against what. The first candidate is ours, the second the baseline."""

    rule: str  # a key of RULES, or "mixed"
    shapes: str
    candidates: tuple[str, ...]
    dtype: str = "fp32"
    group_each: bool = False  # a param group for every parameter
    threads: int = 0  # of the CPU; 0: all

    def __str__(self) -> str:
        extra = [self.dtype if self.dtype != "fp32" else "", "a group each" if self.group_each else ""]
        extra.append(f"{self.threads} thread" if self.threads else "")
        return ", ".join([self.rule, self.shapes, *filter(None, extra)])


class Parameters:
    """Start values and gradients of a case. All gradients are parts of one buffer, for those who want them flat."""

    def __init__(self, case: Case, device: str) -> None:
        self.device, self.dtype, self.shapes = device, DTYPES[case.dtype], shapes(case.shapes)
        sizes = [torch.Size(s).numel() for s in self.shapes]
        # Each at a multiple of 256 bytes, as an allocator would place it.
        places = [-(-n // 128) * 128 for n in sizes]
        self.total = sum(places)
        self.flat_grad = torch.zeros(self.total, device=device, dtype=self.dtype)
        self.grads = self.split(self.flat_grad)
        self._seed = 0
        self.start = [self._normal(torch.empty_like(g)).mul_(0.1) for g in self.grads]
        self.elements = sum(sizes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat buffer as tensors of the case's shapes."""
        place, parts = 0, []
        for shape in self.shapes:
            n = torch.Size(shape).numel()
            parts.append(flat[place : place + n].view(shape))
            place += -(-n // 128) * 128
        return parts

    def _normal(self, tensor: Tensor) -> Tensor:
        self._seed += 1
        return tensor.normal_(generator=torch.Generator(self.device).manual_seed(self._seed))

    def new_grads(self) -> None:
        for grad in self.grads:
            self._normal(grad)

    def fresh(self) -> list[Tensor]:
        """Parameters at the start, with the gradients."""
        params = [s.clone().requires_grad_() for s in self.start]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params


class Candidate:
    """One way to take a step.

    Attributes:
        params: what it trains, in the case's shapes.
        step: takes a step.
        bytes: that a step must read and write at the least, given the states that this one keeps.
        compile_seconds: what the first step took, if it compiled.
    """

    def __init__(self, name: str, case: Case, parameters: Parameters, capturable: bool) -> None:
        self.params, self.compile_seconds, self._compiled = parameters.fresh(), 0.0, name.endswith("compiled")
        self._optimizers, self.step = self._build(name, case, parameters, capturable)
        if self._compiled:
            torch._dynamo.reset()
            self.step = torch.compile(self.step, dynamic=False)

    def first_step(self) -> None:
        start = time.perf_counter()
        self.step()
        if self._compiled:
            self.compile_seconds = time.perf_counter() - start

    @property
    def bytes(self) -> int:
        total = sum(2 * p.nbytes + p.nbytes for p in self.params)
        states = [t for o in self._optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
        return total + sum(2 * t.nbytes for t in states if t.dim())

    def _build(
        self, name: str, case: Case, parameters: Parameters, capturable: bool
    ) -> tuple[list[Any], Callable[[], Any]]:
        def groups(params: list[Tensor]) -> Any:
            return [{"params": [p]} for p in params] if case.group_each else params

        def theirs(rule: str, params: Any, **how: bool) -> torch.optim.Optimizer:
            cls = RULES[rule].theirs
            assert cls is not None
            if capturable and cls is not torch.optim.SGD:
                how["capturable"] = True
            return cls(params, **(RULES[rule].numbers | how))

        if case.rule == "mixed":
            return self._stacked(name, parameters, theirs)
        if name == "before":
            optimizer = getattr(before, RULES[case.rule].ours.__name__)(groups(self.params), **RULES[case.rule].numbers)
        elif name.startswith("nc"):
            optimizer = RULES[case.rule].ours(groups(self.params), **RULES[case.rule].numbers)
        elif name == "by hand":
            by_hand = ByHand(RULES[case.rule], self.params)
            return [by_hand], by_hand.step
        elif name == "flat fused":
            flat = torch.zeros_like(parameters.flat_grad)
            for part, param in zip(parameters.split(flat), self.params, strict=True):
                part.copy_(param.detach())
            self.params = parameters.split(flat)
            flat.requires_grad_().grad = parameters.flat_grad
            optimizer = theirs(case.rule, [flat], fused=True)
        elif name in PEERS:
            optimizer = make_peer(name, case.rule, RULES[case.rule].numbers)(groups(self.params))
        else:
            how = {"fused": True} if "fused" in name else {"foreach": True}
            optimizer = theirs(case.rule, groups(self.params), **how)
        return [optimizer], lambda: optimizer.step()

    def _stacked(self, name: str, parameters: Parameters, theirs: Any) -> tuple[list[Any], Callable[[], Any]]:
        each = [RULES[rule].numbers for rule in STACKED]
        if name in ("nc", "before"):
            vectors: dict[str, Any] = {
                n: torch.tensor([h[n] for h in each], device=parameters.device) for n in ("lr", "weight_decay")
            }
            optimizer = (before if name == "before" else optim).Stacked(self.params, STACKED, momentum=0.9, **vectors)
            return [optimizer], optimizer.step
        runs: list[list[Tensor]] = []
        for r in range(RUNS):
            runs.append([p.detach()[r].clone().requires_grad_() for p in self.params])
            for p, g in zip(runs[r], parameters.grads, strict=True):
                p.grad = g[r]
        self.params = [part for run in runs for part in run]
        optimizers = [theirs(rule, run, fused=True) for rule, run in zip(STACKED, runs, strict=True)]

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        return optimizers, step


class ByHand:
    """What one writes today for a rule that torch.optim does not have: a call for each operation on all tensors."""

    def __init__(self, rule: Rule, params: list[Tensor]) -> None:
        ours: Any = rule.ours(params, **rule.numbers)
        self._rule, self._h, self._params = ours.rule.name, ours.param_groups[0], params
        self._first = [torch.zeros_like(p) for p in params]
        self._second = [torch.zeros_like(p) for p in params] if self._rule == "adam" else []
        self._t = 0
        names = [("exp_avg", self._first), ("exp_avg_sq", self._second)]
        self.state = {p: {n: s[i] for n, s in names if s} for i, p in enumerate(params)}

    @torch.no_grad()
    def step(self) -> None:
        params, first, second, h = self._params, self._first, self._second, self._h
        lr, decay, coupling = h["lr"], h["weight_decay"], h["coupling"]
        beta1, beta2 = h["betas"] if "betas" in h else (h["momentum"], 0.0)
        grads: Any = [p.grad for p in params]
        if coupling:
            grads = torch._foreach_add(grads, params, alpha=coupling * decay)
        if coupling < 1:
            torch._foreach_mul_(params, 1 - lr * (1 - coupling) * decay)
        if self._rule == "adam":
            self._t += 1
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, (1 - beta2**self._t) ** 0.5)
            torch._foreach_add_(roots, h["eps"])
            torch._foreach_addcdiv_(params, first, roots, -lr / (1 - beta1**self._t))
            return
        if self._rule == "lion":
            directions: Any = torch._foreach_mul(first, beta1)
            torch._foreach_add_(directions, grads, alpha=1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_lerp_(first, grads, 1 - beta2)
        else:
            torch._foreach_mul_(first, beta1)
            torch._foreach_add_(first, grads)
            directions = torch._foreach_sign(first) if self._rule == "signum" else first
        torch._foreach_add_(params, directions, alpha=-lr)


def built(case: Case, parameters: Parameters, capturable: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates that work, after some steps on the same gradients, and why the others do not.

    Raises:
        RuntimeError: ours or the baseline does not work.
    """
    candidates: dict[str, Candidate] = {}
    failed: dict[str, str] = {}
    for name in case.candidates:
        try:
            candidates[name] = Candidate(name, case, parameters, capturable)
        except Exception as error:  # a candidate that this version of PyTorch does not have: the others go on
            failed[name] = first_line(error)
    for k in range(CHECKED_STEPS):
        parameters.new_grads()
        for name, candidate in list(candidates.items()):
            try:
                candidate.first_step() if k == 0 else candidate.step()
            except Exception as error:
                failed[name] = first_line(error)
                del candidates[name]
    for name in case.candidates[:2]:
        if name in failed:
            raise RuntimeError(f"{name}: {failed[name]}")
    return candidates, failed


def difference(case: Case, a: Candidate, b: Candidate, start: list[Tensor]) -> float:
    """Mean difference of two candidates' parameters over the mean change of the second's."""
    apart, change = 0.0, 0.0
    for x, y, s in zip(_in_shape(case, a), _in_shape(case, b), start, strict=True):
        apart += (x - y).abs().sum(dtype=torch.float64).item()
        change += (y - s).abs().sum(dtype=torch.float64).item()
    return apart / change


def _in_shape(case: Case, candidate: Candidate) -> Iterator[Tensor]:
    params = [p.detach() for p in candidate.params]
    stacked = case.rule == "mixed" and len(params) > len(shapes(case.shapes))
    n = len(params) // RUNS
    return iter([torch.stack(params[i::n]) for i in range(n)] if stacked else params)
