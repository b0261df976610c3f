"""`ncollapse bench`: what is fast on this machine, and what falls back, in words.

The candidates of a contest compute the same, which is checked first; then they take turns, and the ratio of two is the
median of its rounds': what else the machine does slows both. The scripts of the repository's `bench/` time many more.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from ncollapse import ClassStats, optim
from ncollapse.kernels import operators
from ncollapse.kernels.class_stats import cpu as class_stats_cpu
from ncollapse.kernels.class_stats import op as class_stats
from ncollapse.kernels.update import cpu as update_cpu
from ncollapse.kernels.update import launch as update
from ncollapse.metrics import nc1
from ncollapse.optimizer_table import TABLE
from ncollapse.train.config import make_run
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.engine.planning import device_of
from ncollapse.train.errors import UserError
from ncollapse.train.formatting import plain
from ncollapse.train.networks.models import build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.provenance import describe_machine, device_name
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.step import Step
from ncollapse.train.training.updates import make_updates

Take = Callable[[], Any]
Verdict = Literal["fast", "equal", "slow"]

#: Seconds that a turn should last: far above what the clock and waiting for a GPU cost.
_TURN = 0.01
_LEAST_ROUNDS = 5
#: Ratios nearer to one are called equal.
_EQUAL = 1.1
#: Quartiles further apart, as a ratio, are said to be noise.
_NOISY = 1.5
#: How far candidates may be from each other: updates as mean difference over mean change, NC1 and the change of a
#: network's weights relative.
_TOLERANCE = {"update": 3e-5, "nc1": 1e-3, "training": 1e-3}
#: The paper's rule that torch lacks, with decoupled decay: sign descent with momentum.
_SIGN_DESCENT = next(
    row.label
    for row in TABLE.values()
    if row.in_paper and row.coupling == 0 and row.family not in map(str.lower, dir(torch.optim))
)
_SAMPLES, _DIM, _CLASSES, _BATCH = 10_000, 512, 10, 128


@dataclasses.dataclass(frozen=True)
class Contest:
    """Candidates that compute the same: ours first, the others by the words that follow "times"."""

    subject: str
    candidates: dict[str, Take]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as another ours is: quartiles and median over the rounds."""

    other: str
    low: float
    median: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Equal where it is near to one, or where rounds disagree on which of the two is faster."""
        if self.median >= _EQUAL and self.low > 1:
            return "fast"
        return "slow" if self.median <= 1 / _EQUAL and self.high < 1 else "equal"

    @property
    def words(self) -> str:
        noise = f" ({_number(self.low)} to {_number(self.high)})" if self.high > _NOISY * self.low else ""
        times = "as fast as" if self.verdict == "equal" else f"{_number(self.median)} times"
        return f"{times} {self.other}{noise}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a contest gave; `microseconds` is ours, the median."""

    subject: str
    microseconds: float
    ratios: tuple[Ratio, ...]

    @property
    def verdict(self) -> Verdict:
        """Fast where ours is faster than all the others, slow where one of them is faster."""
        found = {ratio.verdict for ratio in self.ratios}
        return "slow" if "slow" in found else "equal" if "equal" in found else "fast"

    @property
    def words(self) -> str:
        return f"{self.subject}: {', '.join(ratio.words for ratio in self.ratios)}; ours {_duration(self.microseconds)}"


def outcomes(device: torch.device, seconds: float, contests: list[Callable[[], Contest]]) -> Iterator[Outcome]:
    """Hold contests, each for its share of the seconds, five rounds at the least.

    Raises:
        UserError: candidates that do not compute the same.
    """
    for made in contests:
        with arithmetic("fp32"):
            contest = made()
            yield outcome(contest.subject, rounds_of(contest.candidates, device, seconds / len(contests)))


def rounds_of(candidates: dict[str, Take], device: torch.device, seconds: float) -> list[dict[str, float]]:
    """Seconds a step of each candidate, in each round."""

    def turn(take: Take, steps: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            take()
        _wait(device)
        return (time.perf_counter() - start) / steps

    end = time.perf_counter() + seconds
    for take in candidates.values():  # libraries choose kernels, CUDA graphs are captured
        turn(take, 5)
    steps = {name: max(1, math.ceil(_TURN / turn(take, 2))) for name, take in candidates.items()}
    rounds: list[dict[str, float]] = []
    while len(rounds) < _LEAST_ROUNDS or time.perf_counter() < end:
        rounds.append({name: turn(take, steps[name]) for name, take in candidates.items()})
    return rounds


def outcome(subject: str, rounds: list[dict[str, float]]) -> Outcome:
    """What rounds say, of which each has the seconds of every candidate, ours first."""
    ours, *others = rounds[0]
    ratios = []
    for other in others:
        each = [one[other] / one[ours] for one in rounds]
        ratios.append(Ratio(other, *statistics.quantiles(each, n=4, method="inclusive")))
    return Outcome(subject, statistics.median(one[ours] for one in rounds) * 1e6, tuple(ratios))


def all_contests(device: torch.device) -> list[Callable[[], Contest]]:
    """Functions, since each needs memory only while it is held."""
    lists: dict[str, list[tuple[int, ...]]] = {
        "1,000 tiny tensors": [(i % 64 + 1,) for i in range(1000)],
        "ResNet9's parameters": [tuple(p.shape) for p in build("resnet9", 1, 28, 10, 0).parameters()],
    }
    updates = [
        functools.partial(update_contest, name, said, shapes, device)
        for said, shapes in lists.items()
        for name in ("SGD", "AdamW", _SIGN_DESCENT)
    ]
    training = [functools.partial(training_contest, model, runs, device) for model, runs in (("mlp", 24), ("cnn", 8))]
    return [*updates, functools.partial(statistics_contest, device), *training]


def update_contest(name: str, said: str, shapes: list[tuple[int, ...]], device: torch.device) -> Contest:
    """An optimizer's step beside torch's; beside plain PyTorch where torch has no such optimizer."""
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, device=device, generator=generator) / 10 for shape in shapes]
    grads = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    numbers: dict[str, Any] = {"lr": 1e-3, "weight_decay": 5e-4}
    if name != "AdamW":
        numbers["momentum"] = 0.9

    def fresh() -> list[Tensor]:
        params = [value.clone().requires_grad_() for value in start]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return params

    lists = {"ours": fresh()}
    takes: dict[str, Take] = {"ours": getattr(optim, name)(lists["ours"], **numbers).step}
    if name == _SIGN_DESCENT:
        lists["plain PyTorch"] = fresh()
        takes["plain PyTorch"] = _sign_descent(lists["plain PyTorch"], **numbers)
    else:
        for how in ("fused", "foreach"):
            lists[f"torch's {how}"] = fresh()
            takes[f"torch's {how}"] = getattr(torch.optim, name)(lists[f"torch's {how}"], **numbers, **{how: True}).step
    for _ in range(3):
        for take in takes.values():
            take()
    subject = f"{name}, {said}"
    ours = torch.cat([p.detach().flatten() for p in lists["ours"]]).double()
    began = torch.cat([p.flatten() for p in start]).double()
    for other, params in lists.items():
        theirs = torch.cat([p.detach().flatten() for p in params]).double()
        _agree(subject, other, float((ours - theirs).abs().sum() / (theirs - began).abs().sum()), "update")
    return Contest(subject, takes)


def _sign_descent(params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> Take:
    """Sign descent with momentum and decoupled decay: one call on all tensors for each operation."""
    grads: Any = [p.grad for p in params]
    buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, torch._foreach_sign(buffers), alpha=-lr)

    return step


def statistics_contest(device: torch.device) -> Contest:
    """NC1 from features `[N, d]`: one pass over them, beside means and then covariances in plain PyTorch."""
    generator = torch.Generator(device).manual_seed(0)
    y = torch.arange(_SAMPLES, device=device) % _CLASSES
    means = torch.randn(_CLASSES, _DIM, device=device, generator=generator)
    h = means[y] + torch.randn(_SAMPLES, _DIM, device=device, generator=generator)

    def ours() -> Tensor:
        stats = ClassStats(_CLASSES, _DIM, device=device)
        stats.update(h, y)
        return nc1(stats)

    def by_hand() -> Tensor:
        counts = y.bincount(minlength=_CLASSES).unsqueeze(1)
        found = torch.zeros(_CLASSES, _DIM, device=device).index_add_(0, y, h) / counts
        within, between = h - found[y], found - found.mean(0)
        inverse = torch.linalg.pinv(between.T @ between / _CLASSES)
        return torch.trace(within.T @ within / len(h) @ inverse) / _CLASSES

    subject = f"NC1 of {_SAMPLES:,} × {_DIM} features"
    _agree(subject, "plain PyTorch", abs(float(ours()) / float(by_hand()) - 1), "nc1")
    return Contest(subject, {"ours": ours, "plain PyTorch": by_hand})


def training_contest(model: str, runs: int, device: torch.device) -> Contest:
    """A training step of so many runs, stacked beside one run after the other; images of the digits' size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1, 8, 8, generator=generator).to(device)
    y = torch.arange(len(x), device=device) % _CLASSES
    data = Dataset(x, y, x[:0], y[:0], tuple(map(str, range(_CLASSES))), "random")
    batch = torch.randperm(len(x), generator=generator)[:_BATCH].to(device)
    made = [build(model, 1, 8, _CLASSES, seed) for seed in range(runs)]
    settings = [make_run({"model": model, "lr": 0.01, "seed": seed}, "bench") for seed in range(runs)]

    def step_of(rows: slice) -> tuple[Step, Stack]:
        stack = Stack.of(made[rows], device)
        return Step([Lane(stack, make_updates(stack, settings[rows], Plugins()), TrainingSamples(data))]), stack

    together, stack = step_of(slice(None))
    alone = [step_of(slice(r, r + 1)) for r in range(runs)]
    together(batch)
    for step, _ in alone:
        step(batch)
    subject = f"Training step of {runs} {model.upper()}s, stacked"
    apart = 0.0
    for r, (_, one) in enumerate(alone):
        start = dict(made[r].named_parameters())
        ours, theirs = (_change(state, start) for state in (stack.state_dict(r), one.state_dict(0)))
        apart = max(apart, float((ours - theirs).norm() / theirs.norm()))
    _agree(subject, "one by one", apart, "training")

    def one_by_one() -> None:
        for step, _ in alone:
            step(batch)

    return Contest(subject, {"ours": lambda: together(batch), "one by one": one_by_one})


def _change(state: dict[str, Tensor], start: dict[str, torch.nn.Parameter]) -> Tensor:
    return torch.cat([(state[name].cpu() - value.detach()).flatten().double() for name, value in start.items()])


def _agree(subject: str, other: str, apart: float, kind: str) -> None:
    if not apart <= _TOLERANCE[kind]:
        raise UserError(
            f"{subject}: ncollapse and {other} differ by {apart:.1e}, more than rounding does "
            f"({_TOLERANCE[kind]:.0e}); nothing more is timed. Please report this with the output of `ncollapse doctor`"
        )


def falls_back(device: torch.device) -> list[str]:
    """What plain PyTorch does here, or what is missing, and why."""
    found = [] if torch.cuda.is_available() else ["no GPU that torch can use: everything runs on the processor"]
    parts = (
        ("optimizers", update.why_no_kernel, update_cpu.EXTENSION),
        ("class statistics", class_stats.why_no_kernel, class_stats_cpu.EXTENSION),
    )
    for part, why_not, extension in parts:
        if reason := why_not(device):
            found.append(f"{part}: {reason} → plain PyTorch")
        elif device.type == "cpu" and not operators.uses_threads(extension):
            found.append(f"{part}: built without OpenMP → one thread")
    if device.type == "cpu":
        found.append("batch norm, cross-entropy: their kernels are for GPUs → torch's own operations")
    elif reason := operators.why_no_kernel(device):
        found.append(f"batch norm, cross-entropy: {reason} → torch's own operations")
    return found


def _checked(device: str | None, seconds: float) -> torch.device:
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds must be positive; got {seconds:g}")
    return device_of(device, "local")


def print_bench(device: str | None, seconds: float, console: Console) -> None:
    """Time everything on a device, by default a GPU where there is one, and say what is fast and what falls back.

    Args:
        seconds: for the timing alone; each contest takes five rounds at the least.

    Raises:
        UserError: no such device; seconds that are not positive; kernels that compute something else than PyTorch.
    """
    on = _checked(device, seconds)
    found = []
    with console.status("timing, in turns …"):
        for one in outcomes(on, seconds, all_contests(on)):
            found.append(one)
    for line in lines(found, on):
        console.print(plain(line), soft_wrap=True)


def lines(found: list[Outcome], device: torch.device) -> Iterator[str]:
    """What is printed."""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    yield f"{device_name(str(device))}{threads}, torch {torch.__version__}"
    headings: dict[Verdict, str] = {
        "fast": "Fast here",
        "equal": "As fast as PyTorch",
        "slow": "Slower here than PyTorch",
    }
    for verdict, heading in headings.items():
        said = [one.words for one in found if one.verdict == verdict]
        yield from [heading, *(f"  {words}" for words in said)] if said else []
    if missing := falls_back(device):
        yield from ["Falls back", *(f"  {words}" for words in missing)]
    if any(ratio.high > _NOISY * ratio.low for one in found for ratio in one.ratios):
        yield "Ratios with a range varied that much between rounds, as on a machine that others use."


def bench_json(device: str | None, seconds: float) -> str:
    """The same as JSON: machine, contests with medians and quartiles, what falls back.

    Raises:
        UserError: as `print_bench`.
    """
    on = _checked(device, seconds)
    found = [
        dataclasses.asdict(one) | {"verdict": one.verdict, "words": one.words}
        for one in outcomes(on, seconds, all_contests(on))
    ]
    machine = describe_machine(device_name(str(on)))
    return json.dumps({"machine": machine, "contests": found, "falls_back": falls_back(on)}, indent=1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} µs"
