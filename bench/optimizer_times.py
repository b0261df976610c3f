"""A step of `ncollapse.optim` against torch.optim's and against the memory's bandwidth, recorded in bench/results.

python -m bench.optimizer_times --device cpu
python -m bench.optimizer_times --device cuda --minutes 4
python -m bench.optimizer_times --device cpu --no-compile --before COMMIT   # beside the optimizers of another commit

Every case first checks that all candidates compute the same; then they take turns. Nothing is asserted of time. What is
recorded of each candidate, in microseconds a step:

- `difference`: of its parameters from the baseline's after five steps, mean over mean change;
- `eager`: wall time of `step()`, called as a training loop calls it;
- `replay` (CUDA): wall time of replaying a CUDA graph of one step;
- `gpu` (CUDA): the GPU's time, ten steps in a CUDA graph;
- `speed`: the baseline's median over this one's; `share`: of the GB/s of the `yardstick`, which takes its turns too: a
  device copy on a GPU, an in-place loop over four tensors on a CPU;
- `others` (CPU): how many of the processors that our threads need everybody else on the machine kept busy. Threads that
  wait for one another then measure the others: such rounds are taken again, for a while, and where that does not help
  nothing is said of speed.

Compilation is a group of its own, in seconds; --no-compile leaves out what is compiled. A thousand tiny tensors are
never compiled: that takes minutes. Nor is what is compiled captured again.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from bench import optim_cases
from bench.before import package_of
from bench.optim_cases import TOLERANCE, Candidate, Case, Parameters, built, difference, shapes
from bench.record import Record, first_line, timing_options
from bench.timing import QUIET, Clock, Step, Yardstick, captured, compared, gpu, wall_cpu, wall_cuda

GRAPH_STEPS = 10
_BASE = ("nc", "torch fused", "torch foreach")
_ALL = (*_BASE, "flat fused", "torch compiled", "nc compiled")
_BY_HAND = ("nc", "by hand")
_TORCH_RULES = ("sgd", "adam", "adamw")


def cases(device: str) -> list[Case]:
    """The most telling first: time may run out."""
    large = {"cpu": "25M", "cuda": "100M"}[device]
    found = [Case(rule, "resnet9", _ALL) for rule in _TORCH_RULES]
    found += [Case("mixed", "24×mlp", ("nc", "24 × torch fused"))]
    found += [Case(rule, "resnet9", _BY_HAND) for rule in ("sgdw", "signum", "signumw", "lion", "adam c=0.5")]
    found += [Case(rule, large, (*_BASE, "flat fused")) for rule in ("sgd", "adam")]
    found += [Case(rule, "tiny", _BASE) for rule in _TORCH_RULES]
    found += [Case(rule, "tiny", _BASE, group_each=True) for rule in ("sgd", "adamw")]
    found += [Case(rule, "resnet9", _BASE, dtype="bf16") for rule in ("sgd", "adamw")]
    if device == "cuda":
        found += [Case(rule, large, _BASE, dtype="bf16") for rule in ("sgd", "adamw")]
        found += [Case(rule, "1B", ("nc", "torch fused")) for rule in ("sgd", "adam")]
    elif torch.get_num_threads() > 1:
        found += [Case(rule, "resnet9", (*_BASE, "flat fused"), threads=1) for rule in _TORCH_RULES]
        found += [Case(rule, "tiny", _BASE, threads=1) for rule in _TORCH_RULES]
    return found


def without_compilation(case: Case) -> Case:
    return replace(case, candidates=tuple(name for name in case.candidates if "compiled" not in name))


def checked(case: Case, parameters: Parameters, capturable: bool, result: dict[str, Any]) -> dict[str, Candidate]:
    """The candidates after some steps; raises AssertionError unless all that work have computed the same."""
    candidates, failed = built(case, parameters, capturable)
    result["failed"] |= failed
    baseline = candidates[case.candidates[1]]
    for name, candidate in candidates.items():
        apart = difference(case, candidate, baseline, parameters.start)
        result["difference"][name] = float(f"{apart:.1e}")
        assert apart <= TOLERANCE[case.dtype], f"{name} is {apart:.1e} from {case.candidates[1]}"
    return candidates


def timed(
    case: Case, bytes_moved: dict[str, int], clock: Clock, seconds: float, steps: dict[str, Step], inner: int = 1
) -> dict[str, Any]:
    """A group of timings, as it is recorded."""
    group, disturbed = compared(steps, clock, seconds, case.candidates[1], inner)
    if "yardstick" in steps and not disturbed:
        most = bytes_moved["yardstick"] / group["yardstick"]["median"]
        for name in steps:
            rate = bytes_moved[name] / group[name]["median"]
            group[name] |= {"gb_per_s": round(rate / 1e3, 1), "share": round(rate / most, 3)}
    return group


def run(case: Case, device: str, seconds: float, yardstick: Yardstick | None) -> dict[str, Any]:
    """One case: what is recorded of it."""
    parameters = Parameters(case, device)
    result: dict[str, Any] = {
        "case": str(case), "rule": case.rule, "shapes": case.shapes, "dtype": case.dtype,
        "tensors": len(parameters.shapes), "elements": parameters.elements,
        "groups": len(parameters.shapes) if case.group_each else 1, "threads": torch.get_num_threads(),
        "baseline": case.candidates[1], "failed": {}, "difference": {},
    }  # fmt: skip
    candidates = checked(case, parameters, False, result)
    result["compile_seconds"] = {n: round(c.compile_seconds, 1) for n, c in candidates.items() if c.compile_seconds}
    bytes_moved = {name: c.bytes for name, c in candidates.items()}
    clock = wall_cpu if device == "cpu" else wall_cuda
    steps: dict[str, Step] = {name: c.step for name, c in candidates.items()}
    if yardstick is not None:
        bytes_moved["yardstick"] = yardstick.bytes
        steps["yardstick"] = yardstick.step
    result["eager"] = timed(case, bytes_moved, clock, seconds, steps)
    if device == "cpu":
        return result

    del candidates, steps
    torch.cuda.empty_cache()
    try:
        result |= replayed(case, parameters, seconds / 2, yardstick, bytes_moved, result)
    except RuntimeError as error:  # what is timed stays
        result["failed"]["graphs"] = first_line(error)
    return result


def replayed(
    case: Case, parameters: Parameters, seconds: float, yardstick: Yardstick | None, bytes_moved: dict[str, int],
    result: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The same in CUDA graphs, of candidates made anew: with `capturable` torch.optim's foreach Adam is another one."""
    case = without_compilation(case)
    candidates = checked(case, parameters, True, result)
    steps: dict[str, Step] = {name: c.step for name, c in candidates.items()}
    if yardstick is not None:
        steps["yardstick"] = yardstick.step
    graphs: dict[int, dict[str, Step]] = {1: {}, GRAPH_STEPS: {}}
    for name, step in steps.items():
        try:
            for repeats, replays in graphs.items():
                replays[name] = captured(step, repeats)
        except Exception as error:
            result["failed"][f"{name}, captured"] = first_line(error)
            torch.cuda.synchronize()
    return {
        "replay": timed(case, bytes_moved, wall_cuda, seconds, graphs[1]),
        "gpu": timed(case, bytes_moved, gpu, seconds, graphs[GRAPH_STEPS], GRAPH_STEPS),
    }


def line(result: dict[str, Any]) -> str:
    """A case in a line: our median and our speed against the baseline, for each group."""
    if "refused" in result:
        return f"{result['case']:<28} refused: {result['refused']}"
    parts = []
    for group in ("eager", "replay", "gpu"):
        if ours := result.get(group, {}).get("nc"):
            speed = f"{ours['speed']:5.2f}×" if "speed" in ours else "disturbed"
            share = f" {ours['share']:.0%}" if "share" in ours else ""
            parts.append(f"{group} {ours['median']:9.1f} µs ({speed}{share})")
    return f"{result['case']:<28} {'  '.join(parts)}  against {result['baseline']}"


def yardstick_for(case: Case, device: str, made: dict[Any, Yardstick]) -> Yardstick | None:
    """What a case is held against; None where a step is not a matter of bandwidth."""
    if case.shapes not in ("resnet9", "25M", "100M", "1B"):
        return None
    key = device if device == "cuda" else (case.shapes, torch.get_num_threads())
    if key not in made:
        elements = sum(torch.Size(s).numel() for s in shapes(case.shapes))
        made[key] = Yardstick(device, elements)
    return made[key]


def main(arguments: list[str] | None = None) -> int:
    flags = {"no-compile": "time nothing that is compiled"}
    options = timing_options(__doc__, arguments, seconds=3.0, flags=flags, values={"before": "time a commit's, too"})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what is compiled is compiled anew,
        if not options.no_compile:  # and the compiler's own start not counted
            torch.compile(lambda x: x + 1)(torch.ones(2, device=options.device))
        return record_all(options)


def record_all(options: argparse.Namespace) -> int:
    """Every case that there is time for."""
    end = time.monotonic() + 60 * options.minutes
    limits = f"--seconds {options.seconds:g} --minutes {options.minutes:g}"
    command = f"python -m bench.optimizer_times --device {options.device} {limits}"
    if options.no_compile:
        command += " --no-compile"
    name = f"optim-{options.device}"
    if options.before:
        optim_cases.before = package_of(options.before).optim
        command += f" --before {options.before}"
        name += "-before-after"
    record = Record(options.out / f"{name}.json", command, options.device, options.commit)
    record.data |= {"tolerance": TOLERANCE, "cases": [], "left_out": []}
    yardsticks: dict[Any, Yardstick] = {}
    threads = torch.get_num_threads()
    results: dict[Case, dict[str, Any]] = {}
    todo = [case for case in cases(options.device) if options.only in str(case)]
    if options.no_compile:
        todo = [without_compilation(case) for case in todo]
    if options.before:  # as the baseline
        todo = [replace(case, candidates=(case.candidates[0], "before", *case.candidates[1:])) for case in todo]
    for case in todo:
        if time.monotonic() > end:
            break
        torch.set_num_threads(case.threads or threads)
        try:
            result = run(case, options.device, options.seconds, yardstick_for(case, options.device, yardsticks))
        except Exception as error:  # one case that is wrong, or does not fit the GPU, does not cost the others
            result = {"case": str(case), "refused": first_line(error)}
        finally:
            torch.set_num_threads(threads)
        if result.get("eager", {}).get("others", 0.0) > QUIET and case not in results:
            todo.append(case)  # disturbed: once more, after the others
        elif case in results and "eager" in result:  # what it compiles it has by now
            result["compile_seconds"] = results[case]["compile_seconds"]
        results[case] = result
        record.data["cases"] = list(results.values())
        record.data["left_out"] = [str(case) for case in todo if case not in results]
        record.save()
        print(line(result), flush=True)
    print(f"{options.device}: {len(results)} cases, {len(record.data['left_out'])} left out")
    return 1 if any("refused" in result for result in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
