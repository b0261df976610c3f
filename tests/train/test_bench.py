"""`ncollapse bench` with tiny sizes: its words follow from its numbers, and kernels that are wrong are not timed."""

import functools
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from ncollapse import optim
from ncollapse.train.commands import bench
from ncollapse.train.commands.bench import outcome
from ncollapse.train.errors import UserError

CPU = torch.device("cpu")
SHAPES = [(3,), (2, 4)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contest of each kind, five rounds of one step."""
    for name, value in (("_SAMPLES", 200), ("_DIM", 16), ("_BATCH", 8), ("_TURN", 0.0)):
        monkeypatch.setattr(bench, name, value)
    made = [
        *(functools.partial(bench.update_contest, name, "tiny", SHAPES, CPU) for name in ("SGD", "AdamW", "SignumW")),
        functools.partial(bench.statistics_contest, CPU),
        *(functools.partial(bench.training_contest, model, 2, CPU) for model in ("mlp", "cnn")),
    ]
    monkeypatch.setattr(bench, "all_contests", lambda device: made)


@pytest.mark.usefixtures("tiny")
def test_every_contest_is_held_and_recorded() -> None:
    record = json.loads(bench.bench_json("cpu", 1e-9))
    assert [one["subject"] for one in record["contests"]] == [
        "SGD, tiny", "AdamW, tiny", "SignumW, tiny", "NC1 of 200 × 16 features",
        "Training step of 2 MLPs, stacked", "Training step of 2 CNNs, stacked",
    ]  # fmt: skip
    others = [[ratio["other"] for ratio in one["ratios"]] for one in record["contests"]]
    assert others == [["torch's fused", "torch's foreach"]] * 2 + [["plain PyTorch"]] * 2 + [["one by one"]] * 2
    assert all(one["microseconds"] > 0 for one in record["contests"])
    assert all(0 < r["low"] <= r["median"] <= r["high"] for one in record["contests"] for r in one["ratios"])
    assert record["machine"]["versions"]["torch"]


@pytest.mark.usefixtures("tiny")
def test_what_is_printed_names_every_contest(capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_bench("cpu", 1e-9, Console())
    said = capsys.readouterr().out
    assert said.count("; ours ") == 6
    assert "Falls back" in said
    assert "batch norm, cross-entropy: their kernels are for GPUs → torch's own operations" in said


ROUNDS = [{"ours": 1e-4, "torch's fused": t * 1e-4, "torch's foreach": 2 * t * 1e-4} for t in (5.2, 5.4, 5.6)]


@pytest.mark.parametrize(
    ("factor", "verdict", "words"),
    [
        (1.0, "fast", "AdamW: 5.4 times torch's fused, 11 times torch's foreach; ours 100 µs"),
        (0.2, "equal", "AdamW: as fast as torch's fused, 2.2 times torch's foreach; ours 100 µs"),
        (0.1, "slow", "AdamW: 0.54 times torch's fused, as fast as torch's foreach; ours 100 µs"),
    ],
)
def test_words_follow_from_the_rounds(factor: float, verdict: str, words: str) -> None:
    rounds = [{name: t * (1 if name == "ours" else factor) for name, t in one.items()} for one in ROUNDS]
    found = outcome("AdamW", rounds)
    assert (found.verdict, found.words) == (verdict, words)


def test_a_ratio_that_varies_is_said_with_its_range() -> None:
    found = outcome("SGD", [{"ours": 2e-3, "torch's fused": 2e-3 * t} for t in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert found.words == "SGD: 3.0 times torch's fused (2.0 to 4.0); ours 2 ms"
    assert list(bench.lines([found], CPU))[-1].startswith("Ratios with a range varied")


def test_rounds_that_disagree_on_the_faster_one_call_both_equal() -> None:
    found = outcome("SGD", [{"ours": 2e-3, "torch's fused": 2e-3 * t} for t in (0.5, 0.6, 0.7, 1.1, 1.2)])
    assert found.verdict == "equal"
    assert found.words == "SGD: as fast as torch's fused (0.60 to 1.1); ours 2 ms"


def test_the_slowest_verdict_comes_last() -> None:
    slow = outcome("SGD", [{"ours": 2.0, "torch's fused": 1.0}] * 5)
    fast = outcome("AdamW", [{"ours": 1.0, "torch's fused": 2.0}] * 5)
    said = list(bench.lines([slow, fast], CPU))[1:5]
    assert said == ["Fast here", f"  {fast.words}", "Slower here than PyTorch", f"  {slow.words}"]


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(optim.SGD):
        def __init__(self, params: Any, **numbers: Any) -> None:
            super().__init__(params, **(numbers | {"lr": 2 * numbers["lr"]}))

    monkeypatch.setattr(optim, "SGD", Wrong)
    with pytest.raises(UserError, match=r"SGD, tiny: ncollapse and torch's fused differ by 1\.0e\+00"):
        bench.update_contest("SGD", "tiny", SHAPES, CPU)


def test_nan_does_not_agree() -> None:
    with pytest.raises(UserError, match="differ by nan"):
        bench._agree("NC1", "plain PyTorch", float("nan"), "nc1")


def test_missing_kernels_are_named_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.update, "why_no_kernel", lambda device: "built without a compiler")
    assert "optimizers: built without a compiler → plain PyTorch" in bench.falls_back(CPU)
    monkeypatch.undo()
    monkeypatch.setattr(bench.operators, "uses_threads", lambda extension: False)
    assert "class statistics: built without OpenMP → one thread" in bench.falls_back(CPU)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_must_be_positive(seconds: float) -> None:
    with pytest.raises(UserError, match="--seconds must be positive"):
        bench.bench_json("cpu", seconds)
