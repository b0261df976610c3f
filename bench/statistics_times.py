"""Class statistics and NC1 against other ways to them, recorded in bench/results.

python -m bench.statistics_times --device cpu
python -m bench.statistics_times --device cuda --minutes 3

Candidates take turns; nothing is asserted of time. Of each case of features near collapse is recorded, in microseconds:

- `all`: from the features to the number, with its relative error against float64 (`error`), and its speed against the
  two passes; `per sample` is timed on some samples and scaled (`scaled_from`); `read` is the features once, and nothing
  else;
- `update`: adding the batches alone, with GB/s of features; on a GPU in a CUDA graph by its own clock, beside a device
  copy (`share`) and a product of bfloat16 matrices of as many operations as the second moment needs (`product`), and
  with each of `OFF` turned off: what it gains is the difference;
- `number`: NC1 from gathered statistics alone, and the pseudo-inverse of Σ_B that it does without.

`measure`: a whole `ncollapse.measure` of ResNet9 against the forward passes over the same images alone.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.record import Record, first_line, timing_options
from bench.stats_cases import BASELINE, LOOPED, SAME, WAYS, Case, Features, gathered
from bench.timing import Step, Yardstick, captured, compared, gpu, wall_cpu, wall_cuda
from ncollapse import ClassStats, measure
from ncollapse.metrics import nc1
from ncollapse.train.networks import models

#: What is not measured yet, in the launchers of the kernels: moments, name of a switch, and its value when it is off.
OFF = ((("full", "trace"), "STAGES", 1), (("full",), "PIECES", 1))
#: Images, and in a batch, of the measurement of a whole network.
IMAGES = {"cpu": (512, 256), "cuda": (60_000, 1000)}


def cases(device: str) -> list[Case]:
    """The most telling first: time may run out."""
    found = [Case(60_000, 512), Case(60_000, 512, batch=1024), Case(60_000, 2048), Case(60_000, 512, classes=100)]
    found += [Case(60_000, 512, dtype="bf16"), Case(60_000, 512, classes=1000, batch=1024)]
    return [*found, Case(500_000, 512), Case(500_000, 512, dtype="bf16")] if device == "cuda" else found


def run(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """One case: what is recorded of it."""
    data, clock = Features(case, device), wall_cpu if device == "cpu" else wall_cuda
    ways = {name: way for name, way in WAYS.items() if name != "per sample" or device == "cpu"}
    result: dict[str, Any] = {
        "case": str(case), "truth": data.truth,
        "error": {name: float(f"{float(ways[name](data)) / data.truth - 1:.1e}") for name in SAME},
    }  # fmt: skip
    steps: dict[str, Step] = {name: lambda way=way: way(data) for name, way in ways.items()}
    result["all"], _ = compared(steps, clock, seconds, BASELINE)
    if "per sample" in steps:
        looped, scale = result["all"]["per sample"], case.samples / LOOPED
        for name in ("median", "quartile_1", "quartile_3", "best"):
            looped[name] = round(looped[name] * scale, 1)
        if "speed" in looped:
            looped["speed"] = round(looped["speed"] / scale, 5)
        looped["scaled_from"] = LOOPED
    result["update"] = updates(case, data, device, seconds / 2)
    stats = gathered(data, "full")
    means = stats.centred_means()
    result["number"], _ = compared(
        {"nc1": lambda: nc1(stats), "pinv": lambda: torch.linalg.pinv((means.T @ means).float())},
        clock, seconds / 4, "pinv",
    )  # fmt: skip
    return result


def updates(case: Case, data: Features, device: str, seconds: float) -> dict[str, Any]:
    """Adding the batches to statistics that have their shifts."""
    kept = {moment: gathered(data, moment) for moment in ("full", "trace")}
    steps: dict[str, Step] = {}
    for moment, stats in kept.items():

        def step(stats: ClassStats = stats) -> None:
            for h, y in data.batches:
                stats.update(h, y)

        steps[f"nc {moment}"] = step
    steps["read"] = lambda: WAYS["read"](data)
    size = sum(h.nbytes for h, _ in data.batches)
    if device == "cpu":
        group, _ = compared(steps, wall_cpu, seconds, None)
    else:
        copy = Yardstick("cuda", 0)
        # (H + L)ᵀ(H + L) is three products of d × d by samples.
        half = torch.randn(3 * case.samples, case.dim, device=device).bfloat16()
        steps |= {"copy": copy.step, "product": lambda: half.T @ half}
        graphs = {name: captured(s) for name, s in steps.items()}
        graphs |= {f"{name}, no {switch.lower()}": graph for name, switch, graph in turned_off(steps)}
        group, _ = compared(graphs, gpu, seconds, None)
        rate = copy.bytes / group["copy"]["median"]
        for name in ("nc full", "nc trace", "read"):
            group[name]["share"] = round(size / group[name]["median"] / rate, 3)
        for name in ("nc full", "product"):
            operations = 2 * 3 * case.samples * case.dim**2
            group[name]["tflop_per_s"] = round(operations / group[name]["median"] / 1e6, 1)
    for name in ("nc full", "nc trace", "read"):
        group[name]["gb_per_s"] = round(size / group[name]["median"] / 1e3, 1)
    return group


def turned_off(steps: dict[str, Step]) -> Iterator[tuple[str, str, Step]]:
    """Graphs of the updates that are captured with one switch of `OFF` turned off: name, switch, graph."""
    from ncollapse.kernels.class_stats import gpu as launchers

    for moments, switch, off in OFF:
        on = getattr(launchers, switch)
        setattr(launchers, switch, off)
        try:
            for name in (f"nc {moment}" for moment in moments):
                yield name, switch, captured(steps[name])
        finally:
            setattr(launchers, switch, on)


def whole_network(device: str, seconds: float) -> dict[str, Any]:
    """What `measure` costs beside the forward passes that it needs."""
    images, size = IMAGES[device]
    model = models.build("resnet9", 1, 28, 10, 0).to(device).eval()
    x = torch.randn(images, 1, 28, 28, device=device)
    y = torch.arange(images, device=device) % 10
    parts = list(zip(x.split(size), y.split(size), strict=True))
    head = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]

    @torch.no_grad()
    def forward() -> None:
        for h, _ in parts:
            model(h)

    steps: dict[str, Step] = {
        "forward": forward,
        "measure": lambda: measure(model, parts, head=head),
        "measure, projected": lambda: measure(model, parts, head=head, moment="projected"),
        "measure, two passes": lambda: measure(model, parts, head=head, moment="projected", keep_bytes=0),
    }
    group, _ = compared(steps, wall_cpu if device == "cpu" else wall_cuda, seconds, None)
    for name in ("measure", "measure, projected", "measure, two passes"):
        group[name]["over_forward"] = round(group[name]["median"] / group["forward"]["median"] - 1, 4)
    return {"images": images, "batch": size} | group


def line(result: dict[str, Any]) -> str:
    """A case in a line."""
    if "refused" in result:
        return f"{result['case']}: refused: {result['refused']}"
    parts = [
        f"{name} {row['median'] / 1e3:.1f} ms" + (f" ({row['speed']:.2f}×)" if "speed" in row else "")
        for name, row in result["all"].items()
        if isinstance(row, dict)
    ]
    return f"{result['case']}: {', '.join(parts)}; error {result['error']}"


def main(arguments: list[str] | None = None) -> int:
    options = timing_options(__doc__, arguments, seconds=8.0)
    end = time.monotonic() + 60 * options.minutes
    command = (
        f"python -m bench.statistics_times --device {options.device} --seconds {options.seconds:g} "
        f"--minutes {options.minutes:g}"
    )
    record = Record(options.out / f"stats-{options.device}.json", command, options.device, options.commit)
    record.data |= {"threads": torch.get_num_threads(), "baseline": BASELINE, "cases": [], "left_out": []}
    if options.only in "measure":
        try:
            record.data["measure"] = whole_network(options.device, options.seconds)
            over = record.data["measure"]["measure"]["over_forward"]
            print(f"measure of ResNet9 over its forward passes: {over:+.1%}", flush=True)
        except Exception as error:  # it does not cost the others either
            record.data["measure"] = {"refused": first_line(error)}
    record.save()
    todo = [case for case in cases(options.device) if options.only in str(case)]
    for n, case in enumerate(todo):
        if time.monotonic() > end:
            record.data["left_out"] = [str(c) for c in todo[n:]]
            break
        try:
            result = run(case, options.device, options.seconds)
        except Exception as error:  # one case does not cost the others
            result = {"case": str(case), "refused": first_line(error)}
        record.data["cases"].append(result)
        record.save()
        print(line(result), flush=True)
    record.save()
    return 1 if any("refused" in result for result in (*record.data["cases"], record.data.get("measure", {}))) else 0


if __name__ == "__main__":
    raise SystemExit(main())
