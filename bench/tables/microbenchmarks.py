"""The record of `pytest bench/kernels`: each case, ours and the other ways beside it."""

from bench.tables.markdown import duration, percent, read, table


def on_cpu() -> str:
    """Medians and interquartile ranges; of ours the share of what moving memory alone reaches."""
    groups: dict[str, dict[str, str]] = {}
    shares: dict[str, list[str]] = {}
    for found in read("kernels-cpu.json")["benchmarks"]:
        stats = found["stats"]
        told = f"{found['name']} {duration(1e6 * stats['median'])} (± {duration(0.5e6 * stats['iqr'])})"
        groups.setdefault(found["group"], {})[found["name"]] = told
        if found["name"].startswith("nc"):
            shares.setdefault(found["group"], []).append(percent(found["extra_info"].get("share_of_copy")))
    rows = []
    for group, timed in groups.items():
        ours = [told for name, told in timed.items() if name.startswith("nc")]
        others = [told for name, told in timed.items() if not name.startswith("nc")]
        rows.append([group, ", ".join(ours), ", ".join(shares.get(group, [])), ", ".join(others)])
    return table(["case", "ours", "of a copy's GB/s", "other ways"], rows)
