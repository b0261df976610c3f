"""Claims 1 to 6 on planted stores: where each is true, where it is false, and where the runs cannot tell."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from tyro import conf

from findings_store import planted_runs, product
from ncollapse import ufm
from ncollapse.optimizer_table import FAMILY
from ncollapse.train.cli import Rerun
from ncollapse.train.commands.rerun import changed, chosen_runs
from ncollapse.train.config import RunConfig
from ncollapse.train.findings.claim import Comparison, Evidence, Finding
from ncollapse.train.findings.coupled_pairs import coupled_collapse_further
from ncollapse.train.findings.evidence import evidence_of
from ncollapse.train.findings.interpolation import smooth_interpolation
from ncollapse.train.findings.lacking import part_conditions
from ncollapse.train.findings.larger_decay import larger_decay_does_not_help
from ncollapse.train.findings.momentum_pairs import more_momentum
from ncollapse.train.findings.pairs import pairs_of
from ncollapse.train.findings.recursion import exact_recursion
from ncollapse.train.findings.row_sums import row_sum_by_decay
from ncollapse.train.plugins import Plugins
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.rounding import floor_of_nc0
from ncollapse.train.report.selection import Selection

Metrics = Mapping[str, float | Sequence[float]]
CLAIMS = (
    exact_recursion, row_sum_by_decay, coupled_collapse_further, larger_decay_does_not_help, smooth_interpolation,
    more_momentum,
)  # fmt: skip
SAMPLES, STEPS = 1000, 8  # steps of an epoch
PAPER = ["sgd", "sgdw", "signum", "signumw", "adam", "adamw"]
COUPLED = ["sgd", "signum", "adam"]


def evidence(
    folder: Path, runs: list[RunConfig], metrics: Callable[[RunConfig], Metrics],
    status: Mapping[RunConfig, str] | None = None,
) -> Evidence:  # fmt: skip
    planted_runs(folder, {run: metrics(run) for run in runs}, train_samples=SAMPLES, status=status)
    (found,) = evidence_of(read_results(folder), Selection())
    return found


def part(finding: Finding, name: str) -> Comparison:
    return next(one for one in finding.parts if one.name == name)


def added(finding: Finding, folder: Path) -> list[RunConfig]:
    """Return the runs that the command of a finding trains; the program takes it."""
    program, verb, *args = shlex.split(finding.command)
    assert (program, verb) == ("ncollapse", "rerun")
    options = (conf.OmitSubcommandPrefixes, conf.OmitArgPrefixes, conf.FlagCreatePairsOff, conf.DisallowNone)
    command = tyro.cli(Rerun, args=args, config=options)
    assert command.folder == folder
    given = {name: list(values) for name, values in command.changes.items() if values is not None}
    chosen = chosen_runs(folder, command.where)
    return [run for run in changed(list(chosen), given, Plugins()) if chosen.get(run) != "done"]


# 1: the recursion.


def follows(factor: float = 1.0, beside: float = 0.0) -> Callable[[RunConfig], Metrics]:
    """NC0 at ten epochs: the recursion's, times `factor` from the second on, plus `beside`."""

    def metrics(run: RunConfig) -> Metrics:
        lrs = [run.lr * run.lr_factor(epoch) for epoch in range(run.epochs) for _ in range(STEPS)]
        decay = {"weight_decay": run.weight_decay, "coupling": run.decay_coupling}
        exact = 1.8 * ufm.row_sum_factor(lrs, momentum=run.momentum, **decay)[:: 10 * STEPS] ** 2
        return {"nc0": [1.8, *(factor * exact[1:] + beside)], "weight_norm": [4.0] * len(exact)}

    return metrics


SGD = product(optimizer=["sgd", "sgdw"], lr=[0.05, 0.2], weight_decay=[0.0, 5e-4, 5e-2], momentum=[0.5, 0.9])


def test_the_recursion_is_followed_down_to_the_floor(tmp_path: Path) -> None:
    floor = float(floor_of_nc0([100 * STEPS], [4.0])[0])
    found = exact_recursion(evidence(tmp_path / "a", SGD, follows(beside=floor / 100)))
    assert (found.verdict, found.lacks, len(found.runs)) == ("holds", "", len(SGD))
    coupled = part(found, "SGD")
    assert coupled.value < 1e-4
    assert coupled.more["epochs below the floor"] > 0
    assert coupled.more["smallest prediction there"] < 1e-14 < coupled.more["largest NC0 there"] < floor
    assert "both are zero" in found.says


@pytest.mark.parametrize(("factor", "beside"), [(1.05, 0.0), (1.0, 1e-7)])
def test_another_row_sum_fails(factor: float, beside: float, tmp_path: Path) -> None:
    found = exact_recursion(evidence(tmp_path / "a", SGD, follows(factor, beside)))
    assert part(found, "SGD").verdict == found.verdict == "fails"
    assert "both are zero" not in found.says


def test_the_recursion_needs_a_run_and_a_loss_of_its_kind(tmp_path: Path) -> None:
    found = exact_recursion(evidence(tmp_path / "a", product(optimizer=["adam"]), follows()))
    assert found.verdict == "not enough"
    assert {run.optimizer for run in added(found, tmp_path / "a")} == {"sgd", "sgdw"}
    found = exact_recursion(evidence(tmp_path / "b", product(optimizer=["sgd"], loss="mse"), follows()))
    assert (found.verdict, found.command) == ("not enough", "")
    assert "mse" in found.lacks


def test_the_floor_is_what_rounding_leaves() -> None:
    random, (K, d, T) = np.random.default_rng(0), (10, 64, 2_000)
    weight = random.standard_normal((K, d)).astype(np.float32)
    start, norms = weight.astype(np.float64).sum(axis=0), []
    for _ in range(T):  # updates whose row sum is zero
        update = 1e-3 * random.standard_normal((K, d))
        update[-1] -= update.sum(axis=0)
        weight = (weight.astype(np.float64) + update).astype(np.float32)
        norms.append(np.linalg.norm(weight))
    error = ((weight.astype(np.float64).sum(axis=0) - start) ** 2).sum()
    floor = floor_of_nc0(np.arange(1, T + 1), norms)[-1]
    assert floor / 200 < error < floor


# 2: the row sum by decay.

DECAYS = [5e-4, 5e-3, 5e-2]
ALL = product(optimizer=PAPER, lr=[0.01, 0.1], momentum=[0.7, 0.9], weight_decay=DECAYS)


def row_sums(run: RunConfig) -> Metrics:
    falls = run.coupling == 1 or FAMILY[run.optimizer] == "sgd"
    return {"nc0": 0.2 if falls else 4.0}


def test_coupled_row_sums_fall_and_decoupled_ones_grow(tmp_path: Path) -> None:
    found = row_sum_by_decay(evidence(tmp_path / "a", ALL, row_sums))
    assert (found.verdict, found.lacks) == ("holds", "")
    assert len(found.parts) == 15
    assert not any(one.name.startswith("SGDW") for one in found.parts)
    assert part(found, "AdamW, λ = 0.005").more["smallest NC0/start"] == pytest.approx(4 / 1.8)


def test_a_decoupled_row_sum_that_falls_fails(tmp_path: Path) -> None:
    def metrics(run: RunConfig) -> Metrics:
        return {"nc0": 0.7} if (run.optimizer, run.weight_decay, run.lr) == ("adamw", 5e-2, 0.1) else row_sums(run)

    found = row_sum_by_decay(evidence(tmp_path / "a", ALL, metrics))
    assert found.verdict_text == "fails (14 of 15 hold)"
    assert (part(found, "AdamW, λ = 0.05").verdict, part(found, "AdamW, λ = 0.05").value) == ("fails", 0.5)


# 3: pairs.


def nc2_nc3(coupled: float, decoupled: float, seeds: float = 0.0) -> Callable[[RunConfig], Metrics]:
    def metrics(run: RunConfig) -> Metrics:
        wobble = 1 + 0.02 * math.sin(int(run.id, 16) % 1000) + seeds * run.seed
        value = (coupled if run.coupling == 1 else decoupled) * wobble
        return {"nc2": value, "nc3": value}

    return metrics


def test_coupled_runs_are_closer_to_collapse(tmp_path: Path) -> None:
    found = coupled_collapse_further(evidence(tmp_path / "a", ALL, nc2_nc3(0.3, 0.5)))
    assert (found.verdict, found.lacks) == ("holds", "")
    one = part(found, "NC3, Adam against AdamW")
    assert (one.n, one.more["share"], one.more["pairs"]) == (12, 1.0, 12.0)
    assert one.low < one.value < one.high < 0.65
    assert one.more["p"] == pytest.approx(2 / 2**12)


@pytest.mark.parametrize("decoupled", [0.3, 0.2])
def test_coupled_runs_that_are_not_fail(decoupled: float, tmp_path: Path) -> None:
    found = coupled_collapse_further(evidence(tmp_path / "a", ALL, nc2_nc3(0.3, decoupled)))
    assert found.verdict_text == "fails"


def test_what_is_open_is_said(tmp_path: Path) -> None:
    runs = [run for run in ALL if run.optimizer != "adamw" or run.weight_decay == 5e-4]
    found = coupled_collapse_further(evidence(tmp_path / "a", runs, nc2_nc3(0.3, 0.5)))
    assert found.verdict_text == "holds (4 of 6 hold, 2 open)"
    assert found.says.startswith("median ratio coupled/decoupled: NC2 SGD 0.598 (")


def test_seeds_are_no_further_settings(tmp_path: Path) -> None:
    runs = product(optimizer=["adam", "adamw"], weight_decay=[0.0, 5e-4, 5e-3], seed=list(range(6)))
    found = coupled_collapse_further(evidence(tmp_path / "a", runs, nc2_nc3(0.3, 0.5)))
    one = part(found, "NC2, Adam against AdamW")
    assert (one.verdict, one.n, one.more["pairs"]) == ("not enough", 2, 12.0)  # without decay there is no coupling
    assert {run.optimizer for run in added(found, tmp_path / "a")} == {"adam", "adamw"}


def test_partners_that_are_missing_are_added(tmp_path: Path) -> None:
    found = coupled_collapse_further(
        evidence(tmp_path / "a", product(optimizer=["adam"], lr=[0.1, 0.2]), nc2_nc3(1, 1))
    )
    assert found.verdict == "not enough"
    assert [(run.optimizer, run.coupling, run.lr) for run in added(found, tmp_path / "a")] == [
        ("adamw", 0.0, 0.1), ("adamw", 0.0, 0.2),
    ]  # fmt: skip


def test_a_pair_differs_in_one_setting_only(tmp_path: Path) -> None:
    runs = [
        *product(optimizer=["adam", "adamw"], lr=[0.1, 0.2]), *product(optimizer=["adam"], coupling=[0.0], lr=[0.3]),
        *product(optimizer=["adam", "sgdw"], lr=[0.3], eps=[1e-8]), *product(optimizer=["adamw"], lr=[0.4]),
    ]  # fmt: skip
    pairs = pairs_of(evidence(tmp_path / "a", runs, nc2_nc3(0.3, 0.5)).runs, "coupling", 0.0, 1.0)
    assert sorted(pairs.lr) == [0.1, 0.2, 0.3]
    assert (pairs.family == "adam").all()
    assert (pairs.nc3_low > pairs.nc3_high).all()


# 4: larger decays.


def best_of(coupled: float, decoupled: float, spread: float = 0.01) -> Callable[[RunConfig], Metrics]:
    def metrics(run: RunConfig) -> Metrics:
        best = coupled if run.coupling == 1 else decoupled
        value = best * (1 + (run.weight_decay - 5e-3) ** 2) * (1 + spread * run.seed)
        return dict.fromkeys(("nc0", "nc2", "nc3"), value)

    return metrics


def decays(largest: float, seeds: int = 3) -> list[RunConfig]:
    axes = {"seed": list(range(seeds)), "lr": 0.01}
    return [
        *product(optimizer=COUPLED[1:], weight_decay=[5e-4, 5e-3], **axes),
        *product(optimizer=["signumw", "adamw"], weight_decay=[5e-3, largest], **axes),
    ]


def test_larger_decays_do_not_help(tmp_path: Path) -> None:
    found = larger_decay_does_not_help(evidence(tmp_path / "a", decays(0.5), best_of(0.2, 0.4)))
    assert (found.verdict, found.lacks) == ("holds", "")
    one = part(found, "NC3, AdamW against Adam")
    assert 1.9 < one.low <= one.value <= one.high < 2.1
    assert (one.more["of settings"], one.more["best coupled"]) == (2.0, pytest.approx(0.202))


@pytest.mark.parametrize("decoupled", [0.1, 0.201])
def test_decoupled_runs_that_reach_it_fail(decoupled: float, tmp_path: Path) -> None:
    found = larger_decay_does_not_help(evidence(tmp_path / "a", decays(0.5), best_of(0.2, decoupled)))
    assert found.verdict_text == "fails"


def test_larger_decays_must_have_been_tried(tmp_path: Path) -> None:
    found = larger_decay_does_not_help(evidence(tmp_path / "a", decays(0.02), best_of(0.2, 0.4)))
    assert found.verdict == "not enough"
    assert {(run.optimizer, run.weight_decay) for run in added(found, tmp_path / "a")} == {("signumw", 0.05)}


def test_ten_times_a_decay_is_so_in_floating_point(tmp_path: Path) -> None:
    runs = [*product(optimizer=["adam", "signum"], weight_decay=[0.06, 0.07], seed=[0, 1]),
            *product(optimizer=["adamw", "signumw"], weight_decay=[0.07, 0.7], seed=[0, 1])]  # fmt: skip

    def metrics(run: RunConfig) -> Metrics:
        factor = (1 if run.coupling == 1 else 2) * (1 + (run.weight_decay - 0.07) ** 2)
        return dict.fromkeys(("nc0", "nc2", "nc3"), 0.2 * factor)

    found = larger_decay_does_not_help(evidence(tmp_path / "a", runs, metrics))
    assert (found.verdict, found.lacks) == ("holds", "")


def test_seeds_of_other_optimizers_do_not_help(tmp_path: Path) -> None:
    runs = [*decays(0.5, seeds=1), *product(optimizer=["sgd"], seed=[1, 2, 3])]
    found = larger_decay_does_not_help(evidence(tmp_path / "a", runs, best_of(0.2, 0.22)))
    assert found.verdict == "not enough"
    assert {run.optimizer for run in added(found, tmp_path / "a")} == {"signum", "signumw"}


def test_one_seed_cannot_tell_alike_settings_apart(tmp_path: Path) -> None:
    found = larger_decay_does_not_help(evidence(tmp_path / "a", decays(0.5, seeds=1), best_of(0.2, 0.22)))
    assert found.verdict == "not enough"
    assert {run.seed for run in added(found, tmp_path / "a")} == {1, 2}


# 5: from decoupled to coupled.

SHARES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
DIAL = product(optimizer=["adam"], lr=[0.01, 0.1], coupling=SHARES, seed=[0, 1])


def along(fall: Callable[[float], float], accuracy: float = 0.98) -> Callable[[RunConfig], Metrics]:
    def metrics(run: RunConfig) -> Metrics:
        share = run.decay_coupling
        return {**dict.fromkeys(("nc0", "nc2", "nc3"), fall(share)), "val_accuracy": accuracy if share > 0.5 else 0.98}

    return metrics


def test_metrics_fall_smoothly(tmp_path: Path) -> None:
    found = smooth_interpolation(evidence(tmp_path / "a", DIAL, along(lambda share: math.exp(-share))))
    assert (found.verdict, found.lacks) == ("holds", "")
    one = part(found, "NC3, Adam")
    assert (one.value, one.n, one.more["lines"]) == (-1.0, 2, 4.0)
    assert one.more["largest step"] == pytest.approx(0.2)
    assert part(found, "accuracy, Adam").value == 0


@pytest.mark.parametrize(
    ("fall", "accuracy", "failing"),
    [
        (lambda share: 1 + share, 0.98, 3),
        (lambda share: 0.5 if share > 0.3 else 1 - share / 10, 0.98, 3),
        (lambda share: math.exp(-share), 0.9, 1),
    ],
    ids=["rises", "jumps", "accuracy"],
)
def test_metrics_that_do_not_fall_smoothly_fail(
    fall: Callable[[float], float], accuracy: float, failing: int, tmp_path: Path
) -> None:
    found = smooth_interpolation(evidence(tmp_path / "a", DIAL, along(fall, accuracy)))
    assert [one.verdict for one in found.parts].count("fails") == failing


def test_the_axis_is_added_to_a_setting_that_fits(tmp_path: Path) -> None:
    found = smooth_interpolation(evidence(tmp_path / "a", ALL, row_sums))
    assert found.verdict == "not enough"
    runs = added(found, tmp_path / "a")
    assert len({run.coupling for run in runs}) >= 5
    assert len({(run.lr, run.momentum, run.weight_decay) for run in runs}) == 1


def test_a_setting_whose_axis_does_not_fit_is_not_tried_again(tmp_path: Path) -> None:
    """Its runs are there: the command would train nothing."""

    def metrics(run: RunConfig) -> Metrics:
        return {"train_accuracy": 0.9 if run.coupling in SHARES[1:-1] else 1.0}

    for name, lrs in (("a", [0.01]), ("b", [0.01, 0.1])):
        runs = [*product(optimizer=["adam"], lr=0.01, coupling=SHARES), *product(optimizer=["adam"], lr=lrs)]
        found = smooth_interpolation(evidence(tmp_path / name, list(dict.fromkeys(runs)), metrics))
        assert found.verdict == "not enough"
        new = added(found, tmp_path / name)
        assert new
        assert all(run.lr != 0.01 for run in new)


# 6: momentum.

MOMENTA = product(optimizer=["sgd", "adam", "signum"], lr=[0.01, 0.1, 0.3], weight_decay=DECAYS, momentum=[0.7, 0.9],
                  eval_every=1, epochs=10)  # fmt: skip


def over_epochs(higher: float, faster: float = 2.0) -> Callable[[RunConfig], Metrics]:
    """Losses that halve in an epoch, or in half of one; metrics follow the loss, times `higher` at momentum 0.9."""

    def metrics(run: RunConfig) -> Metrics:
        rate, factor = (faster, higher) if run.momentum == 0.9 else (1.0, 1.0)
        losses = [2.0 ** (-rate * epoch) for epoch in range(11)]
        found = {name: [loss * factor for loss in losses] for name in ("nc0", "nc1", "nc2", "nc3")}
        return {**found, "train_loss": losses}

    return metrics


def test_more_momentum_is_closer_to_collapse(tmp_path: Path) -> None:
    found = more_momentum(evidence(tmp_path / "a", MOMENTA, over_epochs(0.6)))
    assert (found.verdict, found.lacks) == ("holds", "")
    one = part(found, "NC1, Adam")
    assert (one.value, one.n) == (pytest.approx(0.6), 9)


def test_momentum_that_only_trains_faster_fails(tmp_path: Path) -> None:
    found = more_momentum(evidence(tmp_path / "a", MOMENTA, over_epochs(1.0)))
    assert found.verdict_text == "fails"


def test_losses_that_are_not_equal_are_left_out(tmp_path: Path) -> None:
    found = more_momentum(evidence(tmp_path / "a", MOMENTA, over_epochs(0.6, faster=1.7)))
    assert found.verdict == "not enough"
    assert "27 pairs are left out" in found.lacks


# What is missing.


def test_commands_stay_in_their_part(tmp_path: Path) -> None:
    """Whatever the parts differ in, the border and options that are none included."""
    runs = [
        *product(optimizer=["adam"], pad=[0, 2]), *product(optimizer=["adam"], pad=[0, 2], loss="mse"),
        *product(optimizer=["adam"], data="mine.py:few", data_options=["", '{"n": 3}'], code="mine.py=1"),
    ]  # fmt: skip
    planted_runs(tmp_path / "a", {run: {} for run in runs})
    parts = evidence_of(read_results(tmp_path / "a"), Selection())
    assert len(parts) == len(runs)
    for one in parts:
        where = part_conditions(one)
        assert [run.id for run in chosen_runs(tmp_path / "a", where)] == list(one.runs.id), where


@pytest.mark.parametrize("claim", [coupled_collapse_further, larger_decay_does_not_help, more_momentum])
def test_commands_lead_to_a_verdict(claim: Callable[[Evidence], Finding], tmp_path: Path) -> None:
    """From two runs of Adam, evaluated rarely: each command adds something, until no comparison is open."""

    def metrics(run: RunConfig) -> Metrics:
        value = (0.3 if run.decay_coupling else 0.4) * (1.2 if run.momentum == 0.7 else 1.0) * run.lr**-0.1
        return dict.fromkeys(("nc0", "nc1", "nc2", "nc3"), value)

    runs = product(optimizer=["adam"], lr=[1e-3, 3e-3], momentum=[0.9], eval_every=[10])
    for i in range(9):
        finding = claim(evidence(tmp_path / str(i), runs, metrics))
        if not finding.command:
            break
        new = [run for run in added(finding, tmp_path / str(i)) if run not in runs]
        assert new, finding.command
        runs += new
    assert finding.verdict_text == "holds"


# Bad input.


@pytest.mark.parametrize("status", ["done", "diverged"])
@pytest.mark.parametrize(
    "runs", [ALL[:1], ALL, product(optimizer=["torch.optim:NAdam"])], ids=["one", "all", "foreign"]
)
def test_runs_that_cannot_tell_are_not_enough(runs: list[RunConfig], status: str, tmp_path: Path) -> None:
    def metrics(run: RunConfig) -> Metrics:
        return {} if status == "done" else dict.fromkeys(("nc0", "nc1", "nc2", "nc3", "train_loss"), math.nan)

    found = evidence(tmp_path / "a", runs, metrics, dict.fromkeys(runs, status))
    for claim in CLAIMS if len(runs) == 1 or status != "done" else ():
        finding = claim(found)
        if finding.number > 1 or status != "done" or runs[0].optimizer != "sgd":
            assert finding.verdict == "not enough", finding.number
            assert finding.lacks
            assert added(finding, tmp_path / "a"), finding.command


NUMBERS = st.one_of(st.floats(1e-12, 1e6), st.sampled_from([0.0, math.nan, math.inf, 1.0]))


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = [*ALL, *DIAL, *product(optimizer=["adam"], seed=[0, 1, 2], eval_every=[1, 2]), *SGD[:3]]
    runs += product(optimizer=["torch.optim:NAdam"], model_options="", weight_decay=DECAYS)
    return read_results(planted_runs(tmp_path_factory.mktemp("any"), {run: {} for run in dict.fromkeys(runs)}))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_no_frame_raises(frame: Results, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, len(frame.runs)))
    runs = frame.runs.sample(rows, random_state=data.draw(st.integers(0, 9))).reset_index(drop=True)
    for name in ("nc0", "nc0_start", "nc1", "nc2", "nc3", "val_accuracy", "train_accuracy"):
        drawn = data.draw(st.lists(NUMBERS, min_size=1, max_size=6), label=name)
        runs[name] = np.resize(np.array(drawn), rows)
    results = Results(frame.folder, runs, {"grid": "any"}, [])
    for one in evidence_of(results, Selection()):
        for claim in CLAIMS:
            finding = claim(one)
            assert finding.lacks or finding.verdict != "not enough"
