"""How many runs train in a stack, in which form, and how many stacks side by side: the policy of every engine."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ncollapse.train.config import RunConfig
from ncollapse.train.engine.grouping import StackKey, group
from ncollapse.train.engine.options import MOST_RUNS, MOST_WORKERS
from ncollapse.train.plugins import Plugins

if TYPE_CHECKING:  # `ncollapse status` reads plans, and must not wait for torch
    from ncollapse.train.engine.messages import Engine
    from ncollapse.train.engine.throughput import DataFacts, Rate

#: Seconds of training below which a measurement costs more than it gains.
WORTH_MEASURING = 5.0
#: Seconds of training below which starting processes costs more than it gains: each takes seconds to import torch.
WORTH_PROCESSES = 12.0
#: Numbers of stacks that share a GPU: those that are tried.
PER_GPU = (1, 2, 4)
#: Numbers of runs that are tried as branches of one CUDA graph: four nearly fill a GPU (`bench/NOTES.md`).
BRANCHES = (2, 3, 4)
#: model -> runs per stack where there is too little work to measure. On a CPU linear layers gain the more the larger
#: the stack, convolutions only up to a few runs (`bench/NOTES.md`).
_USUAL = {"mlp": 32, "cnn": 4}
#: A larger stack has to be faster by this factor, since a failure costs the work of the whole stack.
_FASTER = 1.03
#: Another size than that of an earlier session has to be faster by this factor: a run's last digits depend on it.
_MUCH_FASTER = 1.2
#: Share of the processors' time below which the machine was busy while it was measured.
_BUSY = 0.85


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep is trained, and the measurements behind it.

    Attributes:
        workers, per_gpu: number of stacks that train side by side, and of those that share a GPU.
        threads: CPU threads of each worker.
        sizes: runs in a stack, at most.
        branches: the keys whose runs are branches of one CUDA graph, each a program of its own; see `Training`.
        rates: training steps per second, summed over all runs in training, on a machine without other programs; without
            the keys that were not measured.
        measured: every measurement.
        reasons: why the runs of some keys do not stack, for the user.
    """

    workers: int
    threads: int
    sizes: dict[StackKey, int] = dataclasses.field(default_factory=dict)
    rates: dict[StackKey, float] = dataclasses.field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()
    per_gpu: int = 1
    reasons: dict[StackKey, str] = dataclasses.field(default_factory=dict)
    branches: frozenset[StackKey] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """Return what the store keeps."""
        stacks = [
            {**vars(key), "size": n, "branches": key in self.branches, "steps_per_second": self.rates.get(key)}
            for key, n in self.sizes.items()
        ]
        return {
            "workers": self.workers, "threads": self.threads, "per_gpu": self.per_gpu,
            "stacks": stacks, "measured": list(self.measured),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Plan":
        """Return the plan that a store has kept, also one of another version: fields that it lacks have defaults.

        Raises:
            ValueError: it is no plan.
        """
        try:
            stacks = {StackKey.from_dict(stack): stack for stack in stored.get("stacks", ())}
            sizes = {key: stack["size"] for key, stack in stacks.items()}
            rates = {key: rate for key, stack in stacks.items() if (rate := stack.get("steps_per_second")) is not None}
            numbers = stored["workers"], stored.get("threads", 1), stored.get("per_gpu", 1)
            measured = tuple(stored.get("measured", ()))
            branches = frozenset(key for key, stack in stacks.items() if stack.get("branches"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no plan: {error!r}") from None
        if not all(type(n) is int and 0 < n <= MOST_WORKERS for n in numbers):
            raise ValueError(f"no plan: {numbers!r} processes and threads")
        if not all(type(n) is int and 0 < n <= MOST_RUNS for n in sizes.values()):
            raise ValueError("no plan: the sizes of its stacks")
        if not all(isinstance(rate, (int, float)) and 0 < rate < math.inf for rate in rates.values()):
            raise ValueError("no plan: its rates")
        workers, threads, per_gpu = numbers
        return cls(workers, threads, sizes, rates, measured, per_gpu, branches=branches)

    @property
    def others(self) -> float:
        """The share of the processors' time that other programs took while the machine was measured; 0 if little."""
        shares = [one.get("share", 1.0) for one in self.measured if one.get("steps_per_second")]
        mean = sum(shares) / len(shares) if shares else 1.0
        return 1 - mean if mean < _BUSY else 0.0

    def describe(self) -> Iterator[str]:
        """Yield a line for the user for each key, and one where the machine was busy."""
        workers = "one process" if self.workers == 1 else f"{self.workers} processes"
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        if self.per_gpu > 1:
            threads += f", {self.per_gpu} on each GPU"
        for key, size in self.sizes.items():
            why = f", since {self.reasons[key]}," if key in self.reasons else ""
            stacks = f"one run at a time{why}" if size == 1 else f"stacks of up to {size} runs"
            if size > 1 and key in self.branches:
                stacks += " as branches of one CUDA graph"
            measured = f" (measured: {self.rates[key]:,.0f} training steps/s)" if key in self.rates else ""
            graphs = [one["graph"] for one in self.measured if one.get("shape") == str(key) and one.get("graph")]
            graph = f"; a CUDA graph holds {graphs[-1]}" if graphs else ""
            yield f"{key}: {stacks} in {workers} with {threads}{measured}{graph}"
        if self.others:
            yield (
                f"The machine was busy: other programs took {100 * self.others:.0f} % of the processors' time while it "
                "was measured. The sizes and rates are those for a machine without them"
            )


@dataclasses.dataclass(frozen=True)
class StackPolicy:
    """Chooses the plan for some runs; `stack` and `workers` are what the user asks for.

    Attributes:
        facts: of each data set, by `RunConfig.data_key`.
        before: the plan of an earlier session, whose sizes stay unless others are much faster now.
        pinned: whether stacks of that session have begun: their last digits depend on the threads, which stay.
    """

    runs: Sequence[RunConfig]
    facts: "Mapping[str, DataFacts]"
    stack: int | str = "auto"
    workers: int | str = "auto"
    before: Plan | None = None
    pinned: bool = False
    plugins: Plugins = dataclasses.field(default_factory=Plugins)

    def choose(self, engine: "Engine") -> Plan:
        """Choose by measurement where that pays, and have the engine use the plan.

        The cheapest number of workers is tried first: one step of each kind of stack tells whether the work is worth
        measuring. Then stacks grow for each number of workers, in ascending order, until too little work is left to be
        worth starting more processes.
        """
        counts = self._worker_counts(engine)
        usual = self.usual(engine, self._without_sizes(engine, counts[0], counts[-1]))
        if len(self.runs) == 1 or (isinstance(self.stack, int) and len(counts) == 1):
            return usual  # nothing to choose
        sizes = usual.sizes.items()
        quick = {key: self.measure(engine, key, size, key in usual.branches, quick=True) for key, size in sizes}
        seconds = self.seconds({key: None if rate is None else rate.alone for key, rate in quick.items()})
        if seconds < WORTH_MEASURING:
            return usual
        if not engine.gpus and seconds >= WORTH_PROCESSES:
            counts = counts[-1:]  # on a CPU with much to do, one process per core is the fastest in any case
        plans: list[Plan] = []
        for count in counts:
            plans.append(self.grown(engine, self._without_sizes(engine, count, counts[-1])))
            if self.seconds(plans[-1].rates) < WORTH_PROCESSES:
                break
        best = min(plans, key=lambda plan: self.seconds(plan.rates))
        engine.use(best.workers, best.threads, best.per_gpu)
        return dataclasses.replace(best, measured=tuple(one for plan in plans for one in plan.measured))

    def _worker_counts(self, engine: "Engine") -> list[int]:
        """The numbers of workers to try, ascending."""
        if isinstance(self.workers, int):
            return [self.workers]
        if self.pinned and self.before is not None:
            return [self._pinned_workers(engine, self.before)]
        counts = {min(engine.slots(per_gpu), len(self.runs)) for per_gpu in PER_GPU}
        return sorted(counts | {1} if engine.in_process else counts)

    def _pinned_workers(self, engine: "Engine", before: Plan) -> int:
        """As many workers as this machine has room for, with the threads of an earlier session."""
        if before.workers == 1 and engine.in_process:
            return 1
        return max(1, engine.slots(before.per_gpu) // (1 if engine.gpus else before.threads))

    def keep(self, engine: "Engine") -> None:
        """Have the engine go on with the plan `before`, in as many workers as this machine has room for."""
        assert self.before is not None
        (workers,) = self._worker_counts(engine)
        engine.use(workers, self.before.threads, self.before.per_gpu)

    def _without_sizes(self, engine: "Engine", workers: int, most: int) -> Plan:
        """A plan with `workers` workers, before sizes are chosen; `most`: the largest number of workers to try."""
        if self.pinned and self.before is not None:
            return Plan(workers, self.before.threads, per_gpu=self.before.per_gpu)
        per_gpu = -(-workers // engine.gpus) if engine.gpus else 1
        return Plan(workers, engine.threads(1 if workers == 1 else most), per_gpu=per_gpu)

    def seconds(self, rates: Mapping[StackKey, float | None]) -> float:
        """Return how long all training steps take at these rates; infinite where a rate is missing."""
        total = 0.0
        for key, members in group(self.runs, StackKey.of).items():
            samples = self.facts[key.data].samples_of(key)
            steps = sum(run.epochs * run.steps_per_epoch(samples) for run in members)
            rate = rates.get(key)
            total += steps / rate if rate else math.inf
        return total

    def usual(self, engine: "Engine", plan: Plan) -> Plan:
        """Return the plan with the usual sizes for the models, or the user's, as far as they are known to fit."""
        engine.use(plan.workers, plan.threads, plan.per_gpu)
        sizes, branches = {}, set()
        for key, members in group(self.runs, StackKey.of).items():
            known = {} if self.before is None else self.before.sizes
            size = self.stack if isinstance(self.stack, int) else known.get(key, _USUAL.get(key.model, 1))
            sizes[key] = min(size, self._most(engine, key, len(members)))
            if self._branches_usually(engine, key, sizes[key]):
                branches.add(key)
        return dataclasses.replace(plan, sizes=sizes, reasons=self._reasons(), branches=frozenset(branches))

    def grown(self, engine: "Engine", plan: Plan) -> Plan:
        """Return the plan with the best measured size and form for each key: stacks grow as long as that pays."""
        engine.use(plan.workers, plan.threads, plan.per_gpu)
        sizes: dict[StackKey, int] = {}
        rates: dict[StackKey, float] = {}
        branches: set[StackKey] = set()
        measured: list[dict[str, Any]] = []
        for key, members in group(self.runs, StackKey.of).items():
            most = self._most(engine, key, -(-len(members) // plan.workers))
            (sizes[key], branched), rate = self._best(engine, plan, key, most, measured)
            if rate is not None:
                rates[key] = rate
            if branched:
                branches.add(key)
        return dataclasses.replace(
            plan, sizes=sizes, rates=rates, measured=tuple(measured), reasons=self._reasons(),
            branches=frozenset(branches),
        )  # fmt: skip

    def _best(
        self, engine: "Engine", plan: Plan, key: StackKey, most: int, measured: list[dict[str, Any]]
    ) -> tuple[tuple[int, bool], float | None]:
        """Return size and form (whether branches) of the fastest stacks of at most `most` runs, and their rate.

        Every measurement is appended to `measured`.
        """
        best, fastest = (1, False), 0.0
        tried: dict[tuple[int, bool], float | None] = {}

        def measure(size: int, branched: bool) -> float | None:
            if (size, branched) not in tried:
                rate = self.measure(engine, key, size, branched)
                tried[size, branched] = None if rate is None else rate.alone
                one = {"shape": str(key), "workers": plan.workers, "threads": plan.threads, "size": size}
                form = {"branches": True} if branched else {}
                found = {} if rate is None else {"share": round(rate.share, 3), "graph": rate.graph}
                measured.append({**one, **form, "steps_per_second": tried[size, branched], **found})
            return tried[size, branched]

        def is_better(size: int, rate: float) -> bool:
            return rate > (_FASTER if size > best[0] else 1 / _FASTER) * fastest

        if isinstance(self.stack, int):
            # Where even that does not fit by the measurement, training tries, says so and halves it.
            size = min(self.stack, most)
            best = size, self._branches_usually(engine, key, size)
            return best, measure(*best)
        for factor in (4, 2):  # first grow in large steps, then try the sizes next to the best
            for size in self._candidates(best[0], most, factor):
                if (size, False) in tried:
                    continue
                rate = measure(size, False)
                if rate is None:
                    break
                if is_better(size, rate):
                    best, fastest = (size, False), rate
                elif factor == 4:
                    break
        for size in BRANCHES if most > 1 and self._may_branch(engine, key) else ():
            rate = measure(size, True) if size <= most else None
            if rate is None or not is_better(size, rate):
                break
            best, fastest = (size, True), rate
        known = None if self.before is None else (self.before.sizes.get(key, 0), key in self.before.branches)
        if known and known != best and 0 < known[0] <= most:
            rate = measure(*known)
            if rate is not None and _MUCH_FASTER * rate >= fastest:
                best, fastest = known, rate
        return best, fastest or None

    def measure(
        self, engine: "Engine", key: StackKey, size: int, branches: bool, *, quick: bool = False
    ) -> "Rate | None":
        """Have the engine measure how fast stacks of `size` runs of a key train; see `Engine.measure_rate`."""
        runs = [run for run in self.runs if StackKey.of(run) == key][:size] if key.needs_runs else []
        return engine.measure_rate(key, self.facts[key.data], size, branches=branches, quick=quick, runs=runs)

    def _may_branch(self, engine: "Engine", key: StackKey) -> bool:
        """Whether runs of a key are tried as branches: they have convolutions, whose groups gain little on a GPU."""
        if not engine.gpus or self._why_alone(key):
            return False
        from ncollapse.train.engine.throughput import has_convolutions

        return has_convolutions(key, self.facts[key.data], self.plugins)

    def _branches_usually(self, engine: "Engine", key: StackKey, size: int) -> bool:
        """Whether stacks of a size are branches where no measurement says so: a size that the user says fixes the form.

        Up to four runs of a convolutional network are, unless it is one of which stacks are usually larger.
        """
        if size > 1 and self.before is not None and self.before.sizes.get(key, 1) > 1:
            return key in self.before.branches
        said = isinstance(self.stack, int) and 1 < size <= BRANCHES[-1] and key.model not in _USUAL
        return said and self._may_branch(engine, key)

    def _most(self, engine: "Engine", key: StackKey, runs: int) -> int:
        """The largest possible stack of `runs` runs."""
        if runs == 1 or self._why_alone(key):
            return 1
        room = engine.room(key, self.facts[key.data])
        return runs if room is None else max(1, min(runs, room))

    def _why_alone(self, key: StackKey) -> str:
        """Why runs of a key train one by one, whatever the hardware; "" where they may stack."""
        from ncollapse.train.networks.architecture import Architecture
        from ncollapse.train.networks.forms import form_of

        facts = self.facts[key.data]
        if facts.streamed:
            return "its data are not in memory"
        form = form_of(Architecture.of(key, facts), key.precision, self.plugins)
        return f"of {key.model}: {form.reason}" if form.kind == "alone" else ""

    def _reasons(self) -> dict[StackKey, str]:
        counts = group(self.runs, StackKey.of).items()
        return {key: why for key, members in counts if len(members) > 1 and (why := self._why_alone(key))}

    def _candidates(self, best: int, most: int, factor: int) -> list[int]:
        if factor == 2:
            return [size for size in (max(1, best // 2), min(2 * best, most)) if size != best]
        sizes = [1]
        while sizes[-1] < most:
            sizes.append(min(sizes[-1] * factor, most))
        return sizes
