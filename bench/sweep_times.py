"""Runs a minute of the sweep engine, beside the loops that a user would write.

python -m bench.sweep_times --device cpu       records bench/results/sweep-cpu.json
python -m bench.sweep_times --device cuda      ResNet9 and the CNN on images of Fashion-MNIST's size; sweep-cuda.json

"plain" is one run after the other with torch.optim and a DataLoader, "sequential" the best that one run after the other
can be: data in memory (on the GPU), torch's fused optimizers, on a CPU the better of both memory formats and of one and
all threads. "engine" is ours with the stacks and processes that it chose by itself, "engine, alone" with one run at a
time in each process. All train the same runs (SGD, Adam and AdamW) on the same batches, and are first shown to end at
the same weights. Evaluations take part in ours alone: one at the start, one at the end.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench import timing
from bench.record import Record, first_line, timing_options
from ncollapse import metrics
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine.grouping import StackKey, make_stacks
from ncollapse.train.engine.messages import Engine, Failed, WorkerSettings
from ncollapse.train.engine.stack_size import StackPolicy
from ncollapse.train.engine.this_machine import ThisMachine
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.networks.models import build
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.writer import PlannedStack

OPTIMIZERS = ("sgd", "adam", "adamw")
#: Runs that the loops train one after the other; what more of them take is a matter of multiplication.
ALONE = 3


def runs_of(model: str, count: int, epochs: int) -> list[RunConfig]:
    """Runs with three optimizers in turn and as many learning rates as it takes."""
    return [
        RunConfig(
            model=model,  # type: ignore[arg-type]
            optimizer=OPTIMIZERS[i % 3],  # type: ignore[arg-type]
            lr=(0.05 if i % 3 == 0 else 1e-3) * 0.99 ** (i // 3),
            epochs=epochs,
            eval_every=epochs,
            lr_drops=0,
        )
        for i in range(count)
    ]


def images(name: str, device: torch.device, *, samples: int = 0) -> Dataset:
    """Digits; or so many random images of Fashion-MNIST's size, on which speed does not depend."""
    if not samples:
        return load("digits", device, data_dir=None, download=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 28, 28, generator=generator).to(device)
    y = (torch.arange(samples) % 10).to(device)
    return Dataset(x, y, x[:1000], y[:1000], tuple("0123456789"), "random")


def optimizer_of(run: RunConfig, params: Any, fused: bool) -> torch.optim.Optimizer:
    """torch.optim's class for a run."""
    options: dict[str, Any] = {"lr": run.lr, "weight_decay": run.weight_decay, "fused": fused or None}
    if run.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=run.momentum, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[run.optimizer](params, **options)


def plain(runs: list[RunConfig], data: Dataset, device: torch.device) -> list[torch.nn.Module]:
    """What most people write: a DataLoader, torch.optim."""
    models = []
    for run in runs:
        model = build(run.model, data.channels, data.size, 10, run.seed).to(device)
        optimizer = optimizer_of(run, model.parameters(), fused=False)
        loader = DataLoader(TensorDataset(data.train_x.cpu(), data.train_y.cpu()), run.batch_size, shuffle=True)
        for _ in range(run.epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()
        models.append(model)
    return models


def sequential(
    runs: list[RunConfig], data: Dataset, device: torch.device, channels_last: bool = False
) -> list[torch.nn.Module]:
    """Data in memory, fused optimizers, the engine's order of samples."""
    models = []
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for run in runs:
        model = build(run.model, data.channels, data.size, 10, run.seed).to(device, memory_format=memory_format)
        optimizer = optimizer_of(run, model.parameters(), fused=True)
        train_x = data.train_x.contiguous(memory_format=memory_format)
        order = torch.Generator().manual_seed(run.seed)
        for _ in range(run.epochs):
            for batch in torch.randperm(len(train_x), generator=order).to(device).split(run.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(train_x[batch]), data.train_y[batch]).backward()
                optimizer.step()
        models.append(model)
    return models


def engine_run(
    engine: Engine, stacks: list[list[RunConfig]], branches: frozenset[StackKey] = frozenset()
) -> dict[str, dict[str, float]]:
    """Train stacks on an engine that has been started; run -> its last metrics.

    Args:
        branches: the keys whose stacks are branches of a graph.
    """
    planned = iter(
        [PlannedStack(n, tuple(runs), branches=StackKey.of(runs[0]) in branches) for n, runs in enumerate(stacks)]
    )
    found: dict[str, dict[str, float]] = {}
    for stack, message in engine.run(lambda: next(planned, None)):
        if isinstance(message, Evaluation):
            for place, i in enumerate(message.rows):
                found[stack.runs[i].id] = {name: each[place] for name, each in message.values.items()}
        elif isinstance(message, Failed):
            raise RuntimeError(f"the engine failed: {message}")
    return found


def scaled(step: timing.Step, factor: float, threads: int) -> timing.Step:
    """A step that stands for `factor` times its work, with so many threads."""

    def scaled_step() -> None:
        torch.set_num_threads(threads)
        step()

    scaled_step.factor = factor  # type: ignore[attr-defined]
    return scaled_step


def clock(step: timing.Step, steps: int) -> float:
    """Wall seconds for so many steps, times what they stand for."""
    measure = timing.wall_cuda if torch.cuda.is_available() else timing.wall_cpu
    return measure(step, steps) * getattr(step, "factor", 1.0)


def case(
    model: str, count: int, epochs: int, device: torch.device, samples: int, seconds: float,
    record: dict[str, Any], save: Callable[[], None],
) -> None:  # fmt: skip
    """Time the candidates on `count` runs; fill the record of a case, and save it as it grows."""
    load_data = functools.partial(images, samples=samples)
    data = load_data("digits", device)
    runs, threads = runs_of(model, count, epochs), torch.get_num_threads()
    facts = {"digits": DataFacts.of(data)}
    began = time.perf_counter()
    engine = ThisMachine(device, WorkerSettings(load_data, math.inf, keep_weights=False))
    try:
        plan = StackPolicy(_much(runs), facts).choose(engine)
        chosen = time.perf_counter() - began
        record |= {
            "runs": count, "epochs": epochs, "chosen": plan.as_dict(), "seconds_to_choose_and_start": round(chosen, 2)
        }  # fmt: skip
        save()
        stacks = make_stacks(runs, plan.sizes.__getitem__, plan.workers)
        check(engine_run(engine, stacks, plan.branches), runs[:ALONE], data, device)
        few, part = runs[:ALONE], count / ALONE
        steps: dict[str, timing.Step] = {
            "engine": scaled(lambda: engine_run(engine, stacks, plan.branches), 1, threads),
            "engine, alone": scaled(lambda: engine_run(engine, [[r] for r in runs[: 2 * ALONE]]), part / 2, threads),
            "plain": scaled(lambda: plain(few, data, device), part, threads),
        }
        for last, count_threads in itertools.product(
            (False, True), {1, threads} if device.type == "cpu" else {threads}
        ):
            name = f"sequential{', channels last' if last else ''}, {count_threads} threads"
            steps[name] = scaled(functools.partial(sequential, few, data, device, last), part, count_threads)

        def so_far(timings: dict[str, timing.Timing]) -> None:
            record.update(compared(timings, count, epochs))
            save()

        # No rounds are taken again for what others do: the engine's own processes would count among those.
        timing.interleaved(steps, clock, seconds, so_far=so_far)
    finally:
        engine.close()
        torch.set_num_threads(threads)


def compared(timings: dict[str, timing.Timing], count: int, epochs: int) -> dict[str, Any]:
    """The timings as they are recorded, with the engine's speed against the others'."""
    best = min((name for name in timings if name.startswith("sequential")), key=lambda name: timings[name].median)
    per_run = {name: timing.median / 1e6 / count * 200 / epochs for name, timing in timings.items()}
    group: dict[str, Any] = {
        "best_sequential": best,
        "speed_against_plain": round(per_run["plain"] / per_run["engine"], 2),
        "speed_against_best_sequential": round(per_run[best] / per_run["engine"], 2),
    }
    for name, one in timings.items():
        group[name] = {**one.record(), "runs_per_minute_of_200_epochs": round(60 / per_run[name], 2)}
    return group


def _much(runs: list[RunConfig]) -> list[RunConfig]:
    """The same runs with so many epochs that measuring is worth it, as in a real sweep."""
    return [dataclasses.replace(run, epochs=10_000) for run in runs]


def check(found: dict[str, dict[str, float]], runs: list[RunConfig], data: Dataset, device: torch.device) -> None:
    """Raise unless the engine's runs ended where the loop's do, within the rounding of some steps."""
    for run, model in zip(runs, sequential(runs, data, device), strict=True):
        nc0 = metrics.nc0(model.fc.weight.detach()).item()  # type: ignore[union-attr, operator, arg-type]
        if not math.isclose(found[run.id]["nc0"], nc0, rel_tol=1e-2):
            raise AssertionError(f"{run.describe()}: NC0 {found[run.id]['nc0']} by the engine, {nc0} by the loop")


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[float, dict[str, Any], Callable[[], None]], None]]]:
    """Name and measurement of each case, the most telling first."""
    grid: list[tuple[str, int, int, int]]
    if device.type == "cpu":
        # So many epochs that starts and evaluations are no more frequent than in a run of 200 with one every ten.
        grid = [(m, n, e, 0) for n in (96, 24, 6) for m, e in (("mlp", 20), ("cnn", 10))]
    else:
        grid = [(m, n, 1, 12_800) for n in (24, 6, 96) for m in ("cnn", "resnet9") if not (m == "resnet9" and n > 24)]
    for model, count, epochs, samples in grid:
        yield (
            f"{model}, {count} runs",
            functools.partial(case, model, count, epochs, device, samples),
        )


def main(arguments: list[str] | None = None) -> int:
    options = timing_options(__doc__, arguments, seconds=20.0)
    device = torch.device(options.device)
    record = Record(
        options.out / f"sweep-{options.device}.json",
        f"python -m bench.sweep_times --device {options.device}",
        options.device,
        options.commit,
    )
    end = time.monotonic() + 60 * options.minutes
    record.data["cases"] = {}
    for name, measured in cases(device):
        if options.only not in name or time.monotonic() > end:
            continue
        group = record.data["cases"][name] = {}
        try:
            measured(options.seconds, group, record.save)
        except Exception as error:  # one case does not cost the others
            group["refused"] = first_line(error)
            record.save()
            print(f"{name}: refused: {group['refused']}", file=sys.stderr, flush=True)
            continue
        print(
            f"{name}: {group['engine']['runs_per_minute_of_200_epochs']} runs/min; "
            f"{group['speed_against_plain']} × plain, {group['speed_against_best_sequential']} × the best sequential "
            f"({group['best_sequential']}); stacks of {group['chosen']['stacks'][0]['size']}",
            file=sys.stderr,
            flush=True,
        )
    return 1 if any("refused" in group for group in record.data["cases"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
