"""An engine that trains nothing: for tests of what the policy makes of measurements."""

from collections.abc import Callable, Iterator, Sequence

from ncollapse.train.config import RunConfig
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.messages import Message
from ncollapse.train.engine.throughput import DataFacts, Rate
from ncollapse.train.results.writer import PlannedStack


class FakeEngine:
    """An engine with these rates.

    Args:
        rates: of stacks from a size on; or a function of the number of workers that gives them.
        room: runs that fit into memory.
        cores, gpus: to train on.
        in_process: see `Engine`.
        share: of the processors' time that other programs leave to it.
        branches: rates of runs as branches, from a number of them on.

    Attributes:
        measured: workers, size and `quick` of each measurement.
        branches: the sizes of those of branches.
    """

    device = "fake"

    def __init__(
        self,
        rates: dict[int, float | None] | Callable[[int], dict[int, float | None]],
        *,
        room: int | None = 1000,
        cores: int = 1,
        gpus: int = 0,
        in_process: bool = True,
        share: float = 1.0,
        branches: dict[int, float | None] | None = None,
    ) -> None:
        self._rates, self._room, self._cores, self._share = rates, room, cores, share
        self.gpus, self.in_process = gpus, in_process
        self.used: list[tuple[int, int, int]] = []
        self.measured: list[tuple[int, int, bool]] = []
        self.branches: list[int] = []
        self._of_branches = branches or {1: 1e-9}

    def slots(self, per_gpu: int) -> int:
        return min(self._cores, self.gpus * per_gpu) if self.gpus else self._cores

    def threads(self, workers: int) -> int:
        return max(1, self._cores // workers)

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        self.used.append((workers, threads, per_gpu))

    def room(self, key: StackKey, facts: DataFacts) -> int | None:
        return self._room

    def measure_rate(
        self, key: StackKey, facts: DataFacts, size: int, *, branches: bool = False, quick: bool = False,
        runs: Sequence[RunConfig] = (),
    ) -> Rate | None:  # fmt: skip
        workers = self.used[-1][0]
        self.measured.append((workers, size, quick))
        rates = self._rates(workers) if callable(self._rates) else self._rates
        if branches:
            self.branches.append(size)
            rates = self._of_branches
        rate = rates[max(known for known in rates if known <= size)]
        return rate if rate is None else Rate(rate * self._share, self._share)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        raise NotImplementedError

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass
