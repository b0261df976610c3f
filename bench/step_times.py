"""What each piece of a CNN's training step brings: ResNet9 and VGG9, a step with and without it, and several runs.

python -m bench.step_times --device cuda      records bench/results/steps-cuda.json

"nc" is the trainer's step in bfloat16, batches of 128, SGD, one run: on a GPU a replayed CUDA graph. Every other
candidate takes turns with "nc" alone, and is recorded at once:

- "2 runs", "3 runs", "4 runs": branches of one graph (`us_a_run` is what a run takes);
- "muon", "adam": that optimizer in place of SGD;
- the others: "nc" with one setting changed (`SWITCHES`): what is not faster as it is set is to be deleted.

`difference` is that of the first run's weights from those of "nc" after six steps, relative to what the steps change: 0
where the bits must be equal. `kernels` is a profile of the replayed graph: microseconds a step of each kernel; beside
one another they add up to more than the step. DIR/steps-MODEL.trace.json.gz shows them on their streams.
"""

import contextlib
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import batch_norm_times, timing
from bench.cnn_times import BATCH, Case, batches
from bench.record import Record, first_line, timing_options
from ncollapse.train.config import RunConfig
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.step import Step
from ncollapse.train.training.updates import make_updates

MODELS = ("resnet9", "vgg9")
#: A module, a constant in it, and a value that it is not set to.
Setting = tuple[str, str, Any]
_NORM, _NORM_OP = "ncollapse.kernels.batch_norm.gpu", "ncollapse.kernels.batch_norm.op"
_TAIL, _SMALL = "ncollapse.kernels.pooled_head.op", "ncollapse.kernels.convolution.op"
_TABLE = "ncollapse.kernels.update.table"
_NO_SIDE = ("ncollapse.train.networks.side_stream", "BESIDE", False)
#: Candidate -> what it changes, the most telling first.
SWITCHES: dict[str, tuple[Setting, ...]] = {
    "no side branch": (_NO_SIDE,),
    "torch's tail": ((_TAIL, "ENABLED", False),),
    "update's table in the graph": ((_TABLE, "FILLED_ONCE", False),),
    "small convolutions' gradients ours": ((_SMALL, "GRADIENTS", True),),
    "small convolutions ours": ((_SMALL, "GRADIENTS", True), (_SMALL, "VALUES", True)),
} | {
    name.removeprefix("nc, "): tuple((_NORM_OP if key == "SMALL_ROWS" else _NORM, key, v) for key, v in values.items())
    for name, values in batch_norm_times.SWITCHES.items()
}  # fmt: skip
_SET_UP = 6  # steps: three of the trainer's own, a capture, replays
_PROFILED = 3


@dataclass(frozen=True)
class Candidate:
    """Runs as branches, their optimizer, and what is changed."""

    runs: int = 1
    optimizer: str = "sgd"
    settings: tuple[Setting, ...] = ()


CANDIDATES: dict[str, Candidate] = {
    **{f"{runs} runs": Candidate(runs) for runs in (2, 3, 4)},
    **{name: Candidate(settings=settings) for name, settings in SWITCHES.items()},
    "muon": Candidate(optimizer="muon"),
    "2 runs, no side branch": Candidate(2, settings=(_NO_SIDE,)),
    "adam": Candidate(optimizer="adam"),
}


@contextlib.contextmanager
def changed(settings: tuple[Setting, ...]) -> Iterator[None]:
    """Within it these constants are so; a graph that is captured there stays so."""
    with contextlib.ExitStack() as stack:
        for module, name, value in settings:
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, value))
        yield


def weights(stack: Stack) -> Tensor:
    """A run's parameters as one float64 vector."""
    return torch.cat([param.detach().double().flatten() for param in stack.params.values()])


def stepping(case: Case, candidate: Candidate) -> tuple[timing.Step, Tensor, Tensor]:
    """Steps of a candidate, the first of which are taken; a run's weights before them and after."""
    run = RunConfig(model=case.model, precision="bf16", optimizer=candidate.optimizer, lr=1e-3)  # type: ignore[arg-type]
    samples, lanes, on_gpu = TrainingSamples(case.data), list[Lane](), case.device.type == "cuda"
    source = batches(len(case.data.train_y), case.device)
    around = contextlib.nullcontext if on_gpu else lambda: changed(candidate.settings)  # a graph stays as captured

    def one() -> None:
        with arithmetic("bf16"), around():
            step(next(source))

    with changed(candidate.settings):
        for _ in range(candidate.runs):
            stack = Stack.of([case.built()], case.device)
            lanes.append(Lane(stack, make_updates(stack, [run], Plugins()), samples))
        start, step = weights(lanes[0].stack), Step(lanes)
        for _ in range(_SET_UP):
            one()
    if on_gpu and step.captured != "forward pass, backward pass and update":
        raise RuntimeError(f"a CUDA graph holds {step.captured}")
    return one, start, weights(lanes[0].stack)


def kernels(step: timing.Step, on_gpu: bool, trace: Path) -> list[dict[str, Any]]:
    """Microseconds of each kernel in a step, the dearest first; the last steps as a trace for a browser."""
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(_PROFILED):
            step()
        (torch.cuda.synchronize if on_gpu else torch.cpu.synchronize)()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    taken = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [
        {"kernel": each.key[:120], "us": round(getattr(each, taken) / _PROFILED, 2), "calls": each.count / _PROFILED}
        for each in profiler.key_averages()
        if getattr(each, taken) > 0
    ]
    return sorted(found, key=lambda each: -each["us"])[:60]


def measured(
    case: Case, record: dict[str, Any], seconds: float, end: float, trace: Path, save: Callable[[], None]
) -> None:
    """Fill the record of a model, and save it after each candidate.

    Args:
        end: no candidate is begun after that time.
    """
    on_gpu = case.device.type == "cuda"
    clock = timing.wall_cuda if on_gpu else timing.wall_cpu
    ours, start, after = stepping(case, Candidate())
    timings, _ = timing.interleaved({"nc": ours}, clock, seconds)
    record["nc"] = timings["nc"].record() | {"images_per_second": round(BATCH * 1e6 / timings["nc"].median)}
    save()
    for name, candidate in CANDIDATES.items():
        if time.monotonic() > end:
            record.setdefault("left_out", []).append(name)
            continue
        gc.collect()  # the graph of the candidate before, which must not be freed during a capture
        try:
            step, _, others = stepping(case, candidate)
            apart = float((others - after).norm() / (after - start).norm())
            if math.isnan(apart):
                raise FloatingPointError("weights are NaN after six steps")
            timings, _ = timing.interleaved({"nc": ours, name: step}, clock, seconds)
        except Exception as error:  # a candidate that does not run is recorded, the others are timed
            record.setdefault("failed", {})[name] = first_line(error)
            save()
            continue
        us = timings[name].median / candidate.runs
        record[name] = timings[name].record() | {
            "us_a_run": round(us, 1), "nc": round(timings["nc"].median, 1), "more": round(us - timings["nc"].median, 1),
            "difference": float(f"{apart:.1e}"),
        }  # fmt: skip
        save()
        del step
    record["kernels"] = kernels(ours, on_gpu, trace)
    save()


def lines(model: str, record: dict[str, Any]) -> Iterator[str]:
    """A model's record as a table."""
    if "nc" in record:
        yield f"{model:8} {'nc':32} {record['nc']['median']:8.1f} µs a step"
    for name in CANDIDATES:
        if name in record:
            one = record[name]
            times = f"{one['us_a_run']:8.1f} µs a run, {one['more']:+8.1f}"
            yield f"{model:8} {name:32} {times}; {one['difference']:.0e} apart"
    for name, why in record.get("failed", {}).items():
        yield f"{model:8} {name:32} failed: {why}"
    if record.get("left_out"):
        yield f"{model:8} left out: {', '.join(record['left_out'])}"


def main(arguments: list[str] | None = None) -> int:
    options = timing_options(__doc__, arguments, seconds=2.0)
    device = torch.device(options.device)
    # On a CPU to see that it works: a sixteenth of the width, few images.
    width, samples = (64, 60_000) if device.type == "cuda" else (4, 1280)
    limits = f"--seconds {options.seconds:g} --minutes {options.minutes:g}"
    command = f"python -m bench.step_times --device {options.device} {limits}"
    record = Record(options.out / f"steps-{options.device}.json", command, options.device, options.commit)
    record.data |= {"batch": BATCH, "width": width, "models": {}}
    end, failed = time.monotonic() + 60 * options.minutes, False
    models = [model for model in MODELS if options.only in model]
    for left, model in zip(range(len(models), 0, -1), models, strict=True):
        last = time.monotonic() + (end - time.monotonic()) / left  # each that is left has its share of the time
        one = record.data["models"].setdefault(model, {})
        trace = options.out / f"steps-{model}.trace.json.gz"
        try:
            measured(Case(model, width, samples, device), one, options.seconds, last, trace, record.save)
        except Exception as error:  # one model does not cost the other
            one.setdefault("failed", {})["nc"] = first_line(error)
            record.save()
        print("\n".join(lines(model, one)), flush=True)
        failed |= "failed" in one
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
