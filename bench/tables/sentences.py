"""Sentences of documents that hold numbers of records: they must occur, and benchmarks.md has no others."""

import re
from typing import Any

from bench.stats_cases import NOISE, NORM, OFFSET
from bench.tables import sweeps
from bench.tables.markdown import NEAR, read, significant

#: In benchmarks.md: names with a digit, which are no measurement.
_NAMES = re.compile(r"\b(?:H100|H200|NC[0-4]|ResNet9|VGG9|float32|float64|bfloat16|tf32)\b")
_SHOWN = (
    re.compile(r"^(`{3}).*?^\1$", re.DOTALL | re.MULTILINE),  # commands and output
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^\|.*$", re.MULTILINE),  # tables
    re.compile(r"`[^`\n]+`"),
    re.compile(r"\[[^\]]*\]\([^)]*\)"),  # links
)


def of_documents() -> dict[str, list[str]]:
    """Document -> what it must say."""
    findings = read("findings-cpu.json")
    minutes = f"{findings['seconds_of_command'] / 60:.0f} minutes on two cores"
    return {
        "README.md": [sweeps.demo_seconds(), f"{findings['runs']} runs in {minutes}"],
        "docs/benchmarks.md": [
            f"differ by less than {NEAR - 1:.0%}".replace("%", " %"),
            _machines(),
            _features(),
            _paper_runs(),
            _shares_of_peak(),
            sweeps.demo_seconds(),
            *_precision(),
        ],
        "docs/beyond_the_paper.md": [_beyond()],
        "docs/bring_your_own.md": _own_models(),
        "docs/findings.md": [minutes, _paper_factor()],
        "docs/kernels.md": _steps(),
        "docs/theory.md": _row_sum(),
    }


def _beyond() -> str:
    seconds = [preset["seconds"] for preset in read("beyond-paper-cpu.json")["presets"].values()]
    return f"{min(seconds) // 60} to {max(seconds) // 60 + 1} minutes on two cores"


def _own_models() -> list[str]:
    """How fast models of the user's train beside the built-in ones, and run by run beside a plain loop."""
    cases = read("own-cpu.json")["cases"]

    def span(names: str, *ratios: str) -> str:
        found = [case[ratio] for name, case in cases.items() if name.startswith(names) for ratio in ratios]
        return f"{min(found):.2f} to {max(found):.3g}"

    built_in = span("", *(f"built-in / own, {size}" for size in (1, 4, 16)))
    alone = [span(names, "plain loop / alone") for names in ("cnn", "mlp")]
    return [f"{built_in} times the speed of the built-in ones", f"{alone[0]} (the CNN)", f"{alone[1]} times the speed"]


def _paper_factor() -> str:
    (run,) = (run for run in read("paper-table.json")["runs"] if run["optimizer"] == "sgdw")
    return f"{run['nc0_norm'] / run['nc0_norm_start']:.4f} of its start"


def _steps() -> list[str]:
    """Steps of Adam, of large tensors on an H200 and of tiny ones on an H100."""
    large = {case["case"]: case["eager"] for case in read("optim-cuda-h200.json")["cases"]}
    tiny = {case["case"]: case["replay"] for case in read("optim-cuda-tiny.json")["cases"]}
    adam, small, half = large["adam, 100M"], tiny["adam, tiny"], large["adamw, 100M, bf16"]
    ours, theirs = adam["nc"], adam["torch fused"]
    return [
        f"{ours['median']:.0f} µs: {ours['gb_per_s']:,.0f} GB/s, {ours['share']:.0%} of".replace("%", " %"),
        f"torch's fused kernel takes {theirs['median']:.0f} µs",
        f"{half['nc']['median']:.0f} against {half['torch fused']['median']:.0f} µs",
        f"{small['nc']['median']:.0f} µs in a CUDA graph on an H100, with torch's fused kernels "
        f"{small['torch fused']['median']:.0f}",
    ]


def _row_sum() -> list[str]:
    case = read("row-sum-cpu.json")["cases"][0]
    return [
        f"{case['torch']['nc0'] / 1e6:.1f}·10⁶",
        f"step {case['torch']['first_above']}",
        f"{case['ncollapse']['nc0']:.3g}",
    ]


def _machines() -> str:
    """What the timings of a kind were made with; the table of the records has each record's own."""
    cpu = [read(name)["machine"] for name in ("optim-cpu.json", "stats-cpu.json", "sweep-cpu.json", "own-cpu.json")]
    gpu = [read(f"{name}-cuda{gpu}.json")["machine"] for name in ("optim", "stats", "cnn") for gpu in ("", "-h200")]

    def of(machines: list[dict[str, Any]], name: str) -> str:
        return " or ".join(sorted({{**machine, **machine["versions"]}[name] for machine in machines}))

    return (
        f"an {of(cpu, 'device')} with torch {of(cpu, 'torch')}, or a GPU with torch {of(gpu, 'torch')}, "
        f"Triton {of(gpu, 'triton')} and CUDA {of(gpu, 'cuda')}"
    )


def _features() -> str:
    return (
        f"{read('stats-cpu.json')['cases'][0]['case'].partition(' ×')[0]} features near collapse: class means of norm "
        f"{NORM:g}, noise of {NOISE:g} about them, all at an offset of {OFFSET:g}"
    )


def _paper_runs() -> str:
    """Of the H200 alone: the record says that other work ran beside the H100's."""
    runs = [r for r in read("paper-table.json")["runs"] if r["status"] == "done" and "H200" in r["device"]]
    runs = [run for run in runs if run.get("side_by_side", 1) == 1]  # others' seconds are of all of them together
    (epochs,), (evaluations,) = {run["epochs"] for run in runs}, {len(run["nc0_at"]) for run in runs}
    seconds = [run["seconds"] for run in runs]
    return f"{epochs} epochs with {evaluations} evaluations took {min(seconds):.0f} to {max(seconds):.0f} s on an H200"


def _shares_of_peak() -> str:
    """As `floor` of bench.cnn_times reckons it, of the record that has a profile of the H100."""
    model = read("cnn-cuda.json")["models"]["resnet9"]
    convolutions = sum(each["us"] for each in model["profile"] if "convolution" in each["operation"])
    shares = [100 * model["floor_us"] / us for us in (convolutions, model["nc"]["median"])]
    return f"the convolutions reach {shares[0]:.0f} % of an H100's peak, the whole step {shares[1]:.0f} %"


def _precision() -> list[str]:
    record = read("precision-cpu.json")
    apart = max(
        abs(row["bf16"][metric][of] / row["bf16, measured in fp32"][metric][of] - 1)
        for row in record["rows"]
        for metric in ("nc0", "nc1", "nc2", "nc3")
        for of in ("median", "least", "greatest")
    )
    return [
        f"{record['epochs']} epochs, medians of {record['seeds']} seeds",
        f"differ by at most {significant(100 * apart, 2)} %",
    ]


def flat(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def missing(text: str, sentences: list[str]) -> list[str]:
    """The sentences that a document lacks."""
    return [sentence for sentence in sentences if flat(sentence) not in flat(text)]


def unfounded(text: str, sentences: list[str]) -> list[str]:
    """Numbers in a document's prose that stand in none of its sentences, with the words about them."""
    for shown in _SHOWN:
        text = shown.sub("", text)
    text = flat(text)
    for sentence in map(flat, sentences):
        text = text.replace(sentence, "")
    text = flat(_NAMES.sub("", text))
    return [found[0].strip() for found in re.finditer(r".{0,30}\d[\d.,]*.{0,20}", text)]
