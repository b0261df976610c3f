"""Times of sweeps, of models of the user's, of large results folders and of reports; trials of damaged input."""

from collections.abc import Callable
from typing import Any

from bench.tables.markdown import duration, read, significant, table
from ncollapse.formatting import DASH


def rate() -> str:
    """Runs a minute."""
    rows = []
    for name, case in read("sweep-cpu.json")["cases"].items():
        ways = ("plain", case["best_sequential"], "engine, alone", "engine")
        rates = [f"{case[way]['runs_per_minute_of_200_epochs']:.1f}" for way in ways]
        (stack,) = case["chosen"]["stacks"]
        speeds = [f"{case[key]:.1f} ×" for key in ("speed_against_plain", "speed_against_best_sequential")]
        rows.append([name, *rates[:-1], f"**{rates[-1]}**", str(stack["size"]), *speeds])
    titles = ["runs a minute, 200 epochs on digits", "plain", "best loop", "one at a time", "stacked", "stack"]
    return table([*titles, "against plain", "against the best loop"], rows)


def own_models() -> str:
    """A step of a model of the user's."""
    rows = []
    for name, case in read("own-cpu.json")["cases"].items():
        us = case["us_per_run_and_step"]
        pairs = [f"{us[f'own, {size}']:,.0f} / {us[f'built-in, {size}']:,.0f}" for size in (1, 4, 16)]
        rows.append([name, f"{us['plain loop']:,.0f}", f"{us['alone']:,.0f}", *pairs])
    titles = ["a step of a run, in µs", "plain loop", "by the module, run by run"]
    return table([*titles, *(f"{size}: own / built-in" for size in ("1 run", "stack of 4", "stack of 16"))], rows)


def _seconds(found: dict[str, Any] | None) -> str:
    """Seconds, and the peak of memory where it was recorded."""
    if found is None:
        return DASH
    peak = f", {significant(found['peak_gb'], 2)} GB" if "peak_gb" in found else ""
    return f"{significant(found['seconds'], 2)} s{peak}"


def large_folders() -> str:
    """What 100,000 runs cost."""
    versions = read("large-store.json")["versions"]
    (before,) = versions["before, 100,000 runs"]["rows"]
    now = [row for row in versions["now"]["rows"] if row["runs"] == 100_000]
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "record an evaluation of 32 runs": lambda row: f"{significant(row['record']['median_ms'], 2)} ms",
        "plan, from the grid's file to the first stack": lambda row: _seconds(
            row.get("plan", {"seconds": row.get("plan_seconds")})
        ),
        "`ncollapse status`": lambda row: _seconds(row["status"]),
        "`load_runs`": lambda row: _seconds(row["load_runs"]),
        "`load_metrics`": lambda row: _seconds(row.get("load_metrics")),
        "`ncollapse export`": lambda row: _seconds(row.get("export")),
        "rows of metrics": lambda row: f"{row['rows'] / 1e6:.1f} million",
        "runs.sqlite": lambda row: f"{row['store_gb']:.2f} GB",
    }
    commit = versions["before, 100,000 runs"]["machine"]["commit"]
    titles = ["a folder of 100,000 runs", *(f"{row['evaluations']} evaluations each" for row in now)]
    rows = [[name, *map(of, (*now, before))] for name, of in cells.items()]
    return table([*titles, f"{before['evaluations']} evaluations, at {commit}"], rows)


def reports() -> str:
    """What a report costs."""
    parts = ("load", "figures", "findings", "page", "explorer", "command", "browser")
    rows = [
        [f"{row['grid']}: {row['runs']:,} runs", f"{row['epochs']:,}", *(f"{row['seconds'][p]:.2f}" for p in parts),
         f"{row['page_bytes'] / 1e6:.1f} MB"]
        for row in read("report.json")["rows"]
    ]  # fmt: skip
    titles = ["a report, in s", "evaluations", *parts[:-2], "the whole command", "browser: load event", "page"]
    return table(titles, rows)


def trials() -> str:
    """Damaged inputs, and optimizer steps while memory changes: how many were tried, what was found."""
    fuzz, memory = read("fuzz.json"), read("memory-changes.json")["runs"]
    rows = [
        [f"damaged {kind}s", f"{sum(counts.values()):,}", f"{counts['refused']:,} refused, {counts['taken']:,} taken",
         str(counts.get("fault", 0)), duration(1e6 * fuzz["slowest_seconds"][kind])]
        for kind, counts in fuzz["counts"].items()
    ]  # fmt: skip
    # The script ends without a record where a step differs from torch's, or memory beside a tensor was touched.
    for kind, told in (("plain", ""), ("sanitized", ", under AddressSanitizer")):
        found = memory[kind]
        rows.append(
            [f"steps while memory changes{told}", f"{found['draws']:,}", f"{found['steps']:,} steps", "0", DASH]
        )
    return table(["what", "trials", "of them", "faults", "slowest"], rows)


def demo_seconds() -> str:
    """How long the demo takes, for the README."""
    (found,) = read("demo.json")["benchmarks"]
    stats = found["stats"]
    low, median, high = (f"{stats[name]:.0f}" for name in ("min", "median", "max"))
    return f"takes {median} s on two cores (median of {_COUNTS[stats['rounds']]}; {low} to {high} s)"


_COUNTS = {3: "three", 5: "five"}
