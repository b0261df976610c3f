"""Times and accuracy of class statistics, and of `measure`."""

from typing import Any

from bench.tables.markdown import device, duration, percent, read, significant, table
from ncollapse.formatting import DASH, short_number

WAYS = {
    "nc full": "`ClassStats`, one pass",
    "nc projected": "`ClassStats`, two passes, no d × d matrix",
    "nc trace": '`ClassStats(moment="trace")`: all but this NC1',
    "two passes": "plain PyTorch: means, then covariance, `pinv`",
    "one pass": "plain PyTorch: E[xxᵀ] − μμᵀ, `pinv`",
    "per sample": "a loop over samples, scaled from 600",
    "read": "reading the features, and no more",
}
GPUS = ("stats-cuda.json", "stats-cuda-h200.json")


def case_title(case: str) -> str:
    """What a case has that the first has not."""
    _, dim, classes, dtype, how = case.replace(" × ", ", ").split(", ", 4)
    told = [classes] if classes != "K = 10" else []
    told += ["bfloat16"] if dtype == "bf16" else []
    told += [how] if how != "in memory" else []
    told += [f"d = {dim}"] if dim != "512" or not told else []
    return ", ".join(told)


def error(value: float | None) -> str:
    """A relative error: its size where it is small, else with its sign."""
    if value is None:
        return ""
    if abs(value) < 1:
        return short_number(abs(value), 1)
    return significant(value, 2).replace("-", "−")


def on_cpu() -> str:
    """From features to NC1."""
    cases = read("stats-cpu.json")["cases"]
    titles = ["from features to NC1", "relative error, d = 512", *(case_title(case["case"]) for case in cases)]
    rows = [
        [told, error(cases[0]["error"].get(name)), *(duration(case["all"][name]["median"]) for case in cases)]
        for name, told in WAYS.items()
    ]
    return table(titles, rows)


def on_gpu() -> str:
    """The same on GPUs, with the features in memory and in batches."""
    found = [(record, case) for record in map(read, GPUS) for case in record["cases"]]
    titles = ["from features to NC1", "relative error, H100"]
    titles += [f"{device(record)}, {case['case'].split(', ', 3)[-1]}" for record, case in found]
    rows = []
    for name, told in WAYS.items():
        if all(name in case["all"] for _, case in found):
            times = [duration(case["all"][name]["median"]) for _, case in found]
            rows.append([told, error(found[0][1]["error"].get(name)), *times])
    return table(titles, rows)


def adding() -> str:
    """Adding the features to the statistics alone, on GPUs by their own clocks."""
    rows = []
    for record in map(read, GPUS):
        for case in record["cases"]:
            added = case["update"]
            full, trace = added["nc full"], added["nc trace"]
            rows.append(
                [
                    f"{device(record)}, {case['case'].split(', ', 3)[-1]}",
                    f"{duration(full['median'])}, {significant(full['tflop_per_s'])} TFLOP/s",
                    f"{duration(added['product']['median'])}, {significant(added['product']['tflop_per_s'])} TFLOP/s",
                    f"{duration(trace['median'])}, {percent(trace['share'])}",
                    f"{duration(added['read']['median'])}, {percent(added['read']['share'])}",
                ]
            )
    titles = ["adding 60,000 × 512, K = 10, float32", "everything", "as large a product of bfloat16 matrices"]
    return table([*titles, "traces alone, of a copy's GB/s", "`features.sum()`, of a copy's GB/s"], rows)


def whole() -> str:
    """`measure` of ResNet9 beside its forward passes."""
    rows = []
    for name in ("stats-cpu.json", *GPUS):
        record = read(name)
        found: dict[str, Any] = record["measure"]
        cells = [device(record), f"{found['images']:,}", duration(found["forward"]["median"])]
        for way in ("measure", "measure, projected"):
            cells.append(f"{duration(found[way]['median'])}, {100 * found[way]['over_forward']:+.1f} %")
        rows.append(cells)
    return table(["`measure` of ResNet9", "images", "forward passes alone", "`measure`", '`moment="projected"`'], rows)


def accuracy() -> str:
    """What NC1 loses by the arithmetic of its second moment."""
    record = read("moment-accuracy.json")
    rows = record["rows"]

    def at(first_sample: float) -> dict[str, float]:
        (found,) = (r for r in rows if (r["noise"], r["offset"], r["first_sample"]) == (1e-3, 50.0, first_sample))
        return dict(found["median"])

    told = {
        "fp32": "float32, about the class's first sample",
        "tf32": "tf32, rounded",
        "tf32 cut off": "tf32, cut off",
        "tf32 × 2, no low·low": "two tf32 parts, without the product of the low ones",
        "bf16": "bfloat16",
        "bf16 × 2, no low·low": "two bfloat16 parts, without the product of the low ones",
        "bf16 × 2": "two bfloat16 parts: **what a GPU does here**",
        "one shift": "float32, about one sample of all classes",
        "E[xxᵀ] − μμᵀ": "float32, E[xxᵀ] − μμᵀ",
    }
    cells = [
        [words, *(short_number(found[name], 2) for found in (at(1.0), at(30.0))),
         short_number(max(row["median"][name] for row in rows), 2)]
        for name, words in told.items()
    ]  # fmt: skip
    titles = ["products of", "relative error of NC1", "first samples 30 times as far out", f"the worst of {len(rows)}"]
    return table(titles, cells)


def row_sum() -> str:
    """NC0 under sign descent with torch's cross-entropy and with ours, beside theory's bound."""
    rows = []
    for case in read("row-sum-cpu.json")["cases"]:
        cells = [str(case["K"]), f"{case['decay']:g}", case["dtype"], f"{case['steps']:,}"]
        for loss in ("torch", "ncollapse"):
            above = case[loss]["first_above"]
            cells += [significant(case[loss]["nc0"]), DASH if above is None else f"{above}"]
        rows.append([*cells, significant(case["ncollapse"]["bound"])])
    titles = ["K", "λ", "dtype", "steps", "NC0 with torch's loss", "above the bound from step", "NC0 with ours"]
    return table([*titles, "above the bound from step", "the bound"], rows)
