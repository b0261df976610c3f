"""Times of optimizer steps: on a CPU, on GPUs, compiled, before and after a rewrite."""

from typing import Any

from bench.tables.markdown import device, fastest_bold, median, percent, read, table, times
from ncollapse.formatting import DASH
from ncollapse.optimizer_table import row_of

#: Column -> candidates of a record, of which a case has one at most.
COLUMNS = {
    "ncollapse.optim": ("nc",),
    "torch fused": ("torch fused", "24 × torch fused"),
    "torch foreach": ("torch foreach",),
    "by hand": ("by hand",),
}
SHAPES = {
    "resnet9": "ResNet9",
    "tiny": "1,000 tiny tensors",
    "25M": "25 M elements",
    "100M": "100 M elements",
    "24×mlp": "24 stacked MLPs",
}
CUDA = ("optim-cuda.json", "optim-cuda-tiny.json")
Case = dict[str, Any]


def case_name(case: Case) -> str:
    """A case in words."""
    rule = case["rule"]
    if rule == "mixed":
        told = "three rules"
    elif rule.endswith(" c=0.5"):
        told = f"{row_of(rule.removesuffix(' c=0.5')).label} with coupling 0.5"
    else:
        told = row_of(rule).label
    shapes = "1,000 param groups" if case["groups"] > 1 else SHAPES[case["shapes"]]
    notes = ["bfloat16"] if case["dtype"] == "bf16" else []
    notes += ["1 thread"] if case["case"].endswith("1 thread") else []
    return ", ".join([told, shapes, *notes])


def others(timings: dict[str, Any]) -> dict[str, float]:
    """Medians of the ways beside ours; none where other programs disturbed the rounds."""
    if "speed" not in timings["nc"] and len(timings) > 1:
        return {}
    found = {name: median(timings, *candidates) for name, candidates in COLUMNS.items() if candidates != ("nc",)}
    return {name: value for name, value in found.items() if value is not None}


def ratio(timings: dict[str, Any]) -> float | None:
    """How many times as fast ours is as the fastest of the other ways."""
    found = others(timings)
    return min(found.values()) / timings["nc"]["median"] if found else None


def on_cpu() -> str:
    """A step in milliseconds."""
    rows = []
    for case in read("optim-cpu.json")["cases"]:
        timings = case["eager"]
        cells = fastest_bold([median(timings, *names) for names in COLUMNS.values()], lambda us: f"{us / 1e3:.2f}")
        spread = " to ".join(f"{timings['nc'][name] / 1e3:.2f}" for name in ("quartile_1", "quartile_3"))
        share = percent(timings["nc"].get("share"))
        rows.append([case_name(case), *cells, times(ratio(timings)), spread, share])
    titles = ["times as fast as the next", "quartiles of ours", "of the loop's GB/s"]
    return table(["a step, in ms", *COLUMNS, *titles], rows)


def compiled() -> str:
    """What is compiled, and what one flat tensor would take, beside the step as it is called."""
    names = {
        "ours": "nc",
        "ours, compiled": "nc compiled",
        "torch, compiled": "torch compiled",
        "torch fused, one flat tensor": "flat fused",
    }
    rows = []
    for case in read("optim-cpu.json")["cases"]:
        if case["compile_seconds"]:
            found = [f"{case['eager'][name]['median'] / 1e3:.2f}" for name in names.values()]
            seconds = [f"{case['compile_seconds'][name]:.1f} s" for name in ("nc compiled", "torch compiled")]
            rows.append([case_name(case), *found, " / ".join(seconds)])
    return table(["a step, in ms", *names, "to compile: ours / torch's"], rows)


def rewritten() -> str:
    """The steps that a rewrite made faster or slower, and the range of the others."""
    rows, same = [], []
    for case in read("optim-cpu-before-after.json")["cases"]:
        timings = case["eager"]
        speed = timings["before"]["median"] / timings["nc"]["median"]
        if max(speed, 1 / speed) > 1.1:
            cells = [f"{timings[name]['median'] / 1e3:.2f}" for name in ("before", "nc", "torch fused")]
            rows.append([case_name(case), *cells, times(speed)])
        else:
            same.append(speed)
    rest = [f"the {len(same)} other cases", DASH, DASH, DASH, f"{times(min(same))} to {times(max(same))}"]
    return table(["a step, in ms", "before", "after", "torch fused", "after is times as fast"], [*rows, rest])


def on_gpu(*records: str) -> str:
    """A step in microseconds, replayed as a CUDA graph and called from Python."""
    cases = [case for name in records for case in read(name)["cases"]]
    columns = {
        title: names
        for title, names in COLUMNS.items()
        if any(name in case["eager"] for case in cases for name in names)
    }
    rows = []
    for case in cases:
        replays, calls = (
            fastest_bold([median(case[how], *names) for names in columns.values()], lambda us: f"{us:,.0f}")
            for how in ("replay", "eager")
        )
        cells = [a if a == DASH else f"{a} ({b})" for a, b in zip(replays, calls, strict=True)]
        speeds = f"{times(ratio(case['replay']))} ({times(ratio(case['eager']))})"
        # The copy called from Python: replayed as a graph the same copy takes longer.
        moved, copied = case["replay"]["nc"].get("gb_per_s"), case["eager"].get("yardstick", {}).get("gb_per_s")
        share = percent(moved / copied if moved and copied else None)
        rows.append([case_name(case), *cells, speeds, share])
    where = device(read(records[0]))
    titles = [f"a step on an {where}, in µs", *columns, "times as fast as the next", "of a copy's GB/s"]
    return table(titles, rows)
