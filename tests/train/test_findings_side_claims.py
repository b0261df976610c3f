"""Claims 7 to 12 on planted stores: where each is true, where it is false, and where the runs cannot tell."""

import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tyro import conf

from ncollapse.train.cli import Rerun
from ncollapse.train.commands.rerun import changed, chosen_runs
from ncollapse.train.config import RunConfig
from ncollapse.train.findings.accuracy import nc4_redundant, no_proxy
from ncollapse.train.findings.best_alignment import strongest_alignment
from ncollapse.train.findings.claim import Evidence, Finding
from ncollapse.train.findings.evidence import evidence_of
from ncollapse.train.findings.partial import partial_collapse_claim
from ncollapse.train.findings.placement import decay_placement
from ncollapse.train.findings.theory_claim import theorems
from ncollapse.train.plugins import Plugins
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.selection import Selection
from tests.support.findings_store import planted_runs, product

CLAIMS: tuple[Callable[[Evidence], Finding], ...] = (
    decay_placement, partial_collapse_claim, nc4_redundant, no_proxy, strongest_alignment,
)  # fmt: skip
Metrics = Mapping[str, float]
DECAYS = [5e-4, 5e-3, 5e-2]


def evidence(
    folder: Path, runs: list[RunConfig], metrics: Callable[[RunConfig], Metrics], **more: dict[RunConfig, str]
) -> Evidence:
    """Return the evidence of a store with these runs."""
    planted_runs(folder, {run: metrics(run) for run in runs}, **more)
    (found,) = evidence_of(read_results(folder), Selection())
    return found


def wobble(run: RunConfig) -> float:
    """Return a factor near 1 that differs between runs."""
    return 1 + 0.02 * math.sin(int(run.id, 16) % 1000)


def of_all(seeds: int = 2) -> list[RunConfig]:
    """Return runs of six optimizers: 12 settings of each."""
    return product(
        optimizer=["sgd", "sgdw", "signum", "signumw", "adam", "adamw"], lr=[0.01, 0.1], momentum=[0.5, 0.9],
        weight_decay=DECAYS, seed=list(range(seeds)),
    )  # fmt: skip


def new_runs(found: Finding, folder: Path) -> list[RunConfig]:
    """Return the runs that the command of a finding would add to its folder; it must be one that the program takes."""
    program, verb, *args = shlex.split(found.command)
    assert (program, verb) == ("ncollapse", "rerun")
    options = (conf.OmitSubcommandPrefixes, conf.OmitArgPrefixes, conf.FlagCreatePairsOff, conf.DisallowNone)
    command = tyro.cli(Rerun, args=args, config=options)
    assert command.folder == folder
    given = {name: list(values) for name, values in command.changes.items() if values is not None}
    before = chosen_runs(folder, command.where)
    known = set(chosen_runs(folder, "status=done,diverged,degenerate,hopeless"))
    return [run for run in changed(list(before), given, Plugins()) if run not in known]


# 7: where the decay stands.


def placement_matters(family: str) -> Callable[[RunConfig], Metrics]:
    """NC0, NC2 and NC3 of a family double where the decay is decoupled; those of the others change by a percent."""

    def metrics(run: RunConfig) -> Metrics:
        factor = 2.0 if run.family == family else 1.01
        values = {name: wobble(run) * 0.3 * (factor if run.coupling == 0 else 1.0) for name in ("nc0", "nc2", "nc3")}
        return values | {"nc1": 0.1}

    return metrics


def test_adam_cares_where_the_decay_stands_and_sgd_does_not(tmp_path: Path) -> None:
    found = decay_placement(evidence(tmp_path / "a", of_all(), placement_matters("adam")))
    assert (found.verdict, found.lacks, found.command) == ("holds", "", "")
    for part in found.parts:
        assert part.value < part.high < 0.1
        assert part.more["Adam: factor"] == pytest.approx(2, rel=0.03)
        assert part.n == 6  # two momenta, three decays
        assert part.more["pairs"] == 48
    assert len(found.runs) == 96  # two families, two couplings, two seeds


def test_sgd_cares_more(tmp_path: Path) -> None:
    found = decay_placement(evidence(tmp_path / "a", of_all(), placement_matters("sgd")))
    assert found.verdict == "fails"
    assert all(part.low > 1 for part in found.parts)


@pytest.mark.parametrize(
    ("runs", "missing", "added"),
    [
        (product(optimizer=["sgd", "sgdw", "adam"], lr=0.1, weight_decay=DECAYS), "Adam and AdamW", {"adamw"}),
        (product(optimizer=["sgdw", "adam", "adamw"], lr=0.1, weight_decay=DECAYS), "SGD and SGDW", {"sgd"}),
        (product(optimizer=["sgd", "sgdw"], lr=0.1, weight_decay=DECAYS), "Adam and AdamW", {"adam", "adamw"}),
        (product(optimizer=["sgd", "sgdw", "adamw"], momentum=0.0, lr=0.1), "Adam and AdamW", {"adam"}),
        (product(optimizer=["sgd", "sgdw", "adam", "adamw"], lr=0.1, weight_decay=[0.01]), "1 of 8",
         {"sgd", "sgdw", "adam", "adamw"}),
        (product(optimizer=["sgd", "sgdw", "adam", "adamw"], momentum=0.0, weight_decay=DECAYS), "0 of 8", None),
    ],
)  # fmt: skip
def test_pairs_that_lack(runs: list[RunConfig], missing: str, added: set[str] | None, tmp_path: Path) -> None:
    found = decay_placement(evidence(tmp_path / "a", runs, placement_matters("adam")))
    assert found.verdict == "not enough"
    assert missing in found.lacks
    new = new_runs(found, tmp_path / "a")
    assert new
    assert added is None or {run.optimizer for run in new} == added


def test_sgdw_at_equal_pull_is_found(tmp_path: Path) -> None:
    """SGD at momentum 0.9 and decay λ is compared with SGDW at 10 λ."""

    def metrics(run: RunConfig) -> Metrics:
        pull = run.weight_decay / (1 - run.momentum) if run.optimizer == "sgd" else run.weight_decay
        return dict.fromkeys(("nc0", "nc2", "nc3"), round(pull, 9))

    found = decay_placement(evidence(tmp_path / "a", of_all(), metrics))
    for part in found.parts:
        assert part.more["SGD at equal pull: factor"] == pytest.approx(1, rel=1e-5)
        assert part.more["SGD at equal pull: settings"] == 4  # λ = 5e-4 and 5e-3 at two learning rates


# 8: partial collapse.


def collapse_by_decay(*, aligned: bool) -> Callable[[RunConfig], Metrics]:
    """NC1 and NC2 fall with the decay; AdamW's NC0 grows, and its NC3 rises unless `aligned`."""

    def metrics(run: RunConfig) -> Metrics:
        strength = DECAYS.index(run.weight_decay) + run.momentum
        falls = wobble(run) / (1 + strength)
        grows = run.optimizer == "adamw"
        return {
            "nc1": 0.5 * falls, "nc2": falls, "nc0": 5.0 if grows else 0.1,
            "nc3": 0.4 + 0.3 * strength if grows and not aligned else falls,
        }  # fmt: skip

    return metrics


def test_partial_collapse_is_found(tmp_path: Path) -> None:
    found = partial_collapse_claim(evidence(tmp_path / "a", of_all(), collapse_by_decay(aligned=False)))
    assert found.verdict == "holds"
    assert "AdamW" in found.says
    assert "SGD" not in found.says
    (part,) = found.parts
    assert part.n == 12
    assert 0 < part.low < part.value < part.high < 1
    assert 0 < len(found.runs) < 24


def test_collapse_that_is_never_partial(tmp_path: Path) -> None:
    found = partial_collapse_claim(evidence(tmp_path / "a", of_all(), collapse_by_decay(aligned=True)))
    assert found.verdict == "fails"
    assert "none of 72 settings; NC0 grew in 12" in found.says


def test_nc0_that_never_grew_says_nothing_of_partial_collapse(tmp_path: Path) -> None:
    runs = [run for run in of_all(1) if run.coupling == 1]
    found = partial_collapse_claim(evidence(tmp_path / "a", runs, collapse_by_decay(aligned=False)))
    assert found.verdict == "not enough"
    assert "whose NC0 grew: 0 of 8" in found.lacks
    assert {run.optimizer for run in new_runs(found, tmp_path / "a")} == {"adamw"}


# 9: NC4.


def nc4_of(nc4: Callable[[float], float], spread: float = 10.0) -> Callable[[RunConfig], Metrics]:
    """NC1–NC3 spread over the runs; NC4 is a function of them."""

    def metrics(run: RunConfig) -> Metrics:
        strength = (int(run.id, 16) % 1000) / 1000
        value = 0.1 * spread**strength
        return {"nc1": value, "nc2": value, "nc3": value, "nc4": nc4(value), "train_accuracy": 0.9995}

    return metrics


def test_nc4_is_satisfied_by_all_that_fit(tmp_path: Path) -> None:
    found = nc4_redundant(evidence(tmp_path / "a", of_all(), nc4_of(lambda value: 0.001)))
    assert (found.verdict, found.lacks) == ("holds", "")
    assert found.parts[0].n == 72
    assert all(part.value == 1 and part.more["largest NC4"] == 0.001 for part in found.parts)


def test_nc4_of_weakly_collapsed_runs_is_not_small(tmp_path: Path) -> None:
    found = nc4_redundant(evidence(tmp_path / "a", of_all(), nc4_of(lambda value: 0.02 if value > 0.8 else 0.0)))
    assert found.verdict == "fails"
    assert "largest NC4 2.00 %" in found.says
    assert "the quarter with the largest NC1" in found.says


def test_the_bound_on_nc4_does_not_follow_the_threshold(tmp_path: Path) -> None:
    """Else a lower threshold, which lets more runs in, turns "fails" into "holds"."""
    planted_runs(tmp_path, {run: nc4_of(lambda value: 0.008)(run) for run in of_all()})
    verdicts = []
    for threshold in (0.99, 0.999, 0.9995):
        (found,) = evidence_of(read_results(tmp_path), Selection(threshold=threshold))
        verdicts.append(nc4_redundant(found).verdict_text)
    assert verdicts == ["holds"] * 3


def test_nc4_needs_runs_whose_collapse_differs(tmp_path: Path) -> None:
    found = nc4_redundant(evidence(tmp_path / "a", of_all(), nc4_of(lambda value: 0.0, spread=1.1)))
    assert [part.verdict for part in found.parts] == ["holds", *["not enough"] * 3]
    assert new_runs(found, tmp_path / "a")


def test_a_relaxed_threshold_is_not_about_100_percent(tmp_path: Path) -> None:
    ninety = evidence(tmp_path / "a", of_all(1), lambda run: {"train_accuracy": 0.9, "nc4": 0.0, "nc1": wobble(run)})
    found = nc4_redundant(ninety)
    assert found.verdict == "not enough"
    assert "90.00 %" in found.lacks
    assert {run.epochs for run in new_runs(found, tmp_path / "a")} == {200}


# 10: validation accuracy.


def many() -> list[RunConfig]:
    return product(
        optimizer=["sgd", "sgdw", "adam", "adamw"], lr=[0.01, 0.03, 0.1], momentum=[0.0, 0.5, 0.9],
        weight_decay=[5e-4, 1e-3, 5e-3, 1e-2, 5e-2], seed=[0, 1],
    )  # fmt: skip


def accuracy_of(slope: float) -> Callable[[RunConfig], Metrics]:
    """NC1–NC3 at random; validation accuracy at random too, less `slope` times NC1."""

    def metrics(run: RunConfig) -> Metrics:
        random = np.random.default_rng(int(run.id, 16))
        nc = 0.1 + random.random()
        return {"nc1": nc, "nc2": nc, "nc3": nc, "val_accuracy": 0.9 + 0.02 * random.random() - slope * nc}

    return metrics


def test_accuracy_that_has_nothing_to_do_with_collapse(tmp_path: Path) -> None:
    found = no_proxy(evidence(tmp_path / "a", many(), accuracy_of(0.0)))
    assert (found.verdict, found.lacks) == ("holds", "")
    assert len(found.parts) == 12
    assert all(abs(part.value) < 0.3 and part.low < part.value < part.high for part in found.parts)


def test_accuracy_that_follows_collapse(tmp_path: Path) -> None:
    found = no_proxy(evidence(tmp_path / "a", many(), accuracy_of(0.1)))
    assert found.verdict == "fails"
    assert all(part.verdict == "fails" and part.high < -0.3 for part in found.parts)
    assert found.parts[1].more["SGD"] < -0.5


def test_optimizers_that_differ_make_no_correlation_within_one(tmp_path: Path) -> None:
    """Adam has both more collapse and a higher accuracy, by chance: a correlation over all runs, not within."""

    def metrics(run: RunConfig) -> Metrics:
        base = dict(accuracy_of(0.0)(run))
        if run.family == "adam":
            base = {name: value / 10 if name != "val_accuracy" else value + 0.05 for name, value in base.items()}
        return base

    found = no_proxy(evidence(tmp_path / "a", many(), metrics))
    verdicts = {part.name: part.verdict for part in found.parts}
    assert verdicts["NC3, over all runs"] == "fails"
    assert verdicts["NC3, within an optimizer"] == "holds"
    assert verdicts["NC3, between couplings at equal settings"] == "holds"


def test_a_correlation_gets_settings_where_these_are_few(tmp_path: Path) -> None:
    """More seeds of a setting or two never make eight settings."""
    found = no_proxy(evidence(tmp_path / "a", product(optimizer=["sgd", "adam"], seed=[0, 1]), lambda run: {}))
    assert found.lacks == "settings that fit the training data and have a validation accuracy: 2 of 8"
    assert {(run.optimizer, run.seed) for run in new_runs(found, tmp_path / "a")} == {("sgd", 0), ("sgd", 1)}


def test_equal_accuracies_correlate_with_nothing(tmp_path: Path) -> None:
    found = no_proxy(evidence(tmp_path / "a", of_all(1), lambda run: {"nc1": wobble(run), "val_accuracy": 0.98}))
    assert found.verdict == "not enough"
    assert found.lacks == "runs whose validation accuracies differ"
    assert new_runs(found, tmp_path / "a")


# 11: the best NC3.


def best_of(nc3: Mapping[str, float], spread: float = 0.01) -> Callable[[RunConfig], Metrics]:
    """The best NC3 of each optimizer, at one setting; seeds differ by `spread`."""

    def metrics(run: RunConfig) -> Metrics:
        at_best = run.weight_decay == 5e-3 and run.lr == 0.1 and run.momentum == 0.9
        return {"nc3": nc3.get(run.optimizer, 0.5) + (0.0 if at_best else 0.2) + spread * run.seed}

    return metrics


def test_sgd_has_the_best_alignment(tmp_path: Path) -> None:
    found = strongest_alignment(evidence(tmp_path / "a", of_all(3), best_of({"sgd": 0.2})))
    assert (found.verdict, found.lacks) == ("holds", "")
    assert "SGD 0.21 (0.2–0.22, 3 seeds), best of 12" in found.says
    assert len(found.parts) == 5
    assert len(found.runs) == 18


def test_another_is_better(tmp_path: Path) -> None:
    found = strongest_alignment(evidence(tmp_path / "a", of_all(3), best_of({"sgd": 0.2, "signum": 0.1})))
    assert found.verdict == "fails"
    assert found.verdict_text == "fails (4 of 5 hold)"


def test_a_lead_within_the_seeds_is_open(tmp_path: Path) -> None:
    """One more or less of such seeds would turn the verdict; more of the two settings decide, not of others."""
    found = strongest_alignment(evidence(tmp_path / "a", of_all(3), best_of({"sgd": 0.2, "adam": 0.21}, 0.02)))
    assert [part.verdict for part in found.parts].count("holds") == 4
    assert found.verdict_text == "not enough"
    assert "more seeds of the best settings of SGD, Adam" in found.lacks
    new = new_runs(found, tmp_path / "a")
    assert {(run.optimizer, run.seed) for run in new} == {("sgd", 3), ("sgd", 4), ("adam", 3), ("adam", 4)}


def test_seeds_are_added_to_the_best_settings_only(tmp_path: Path) -> None:
    """Conditions are a product of lists: those of several settings hold runs of none of them, unless they are few."""
    best = {"sgd": (0.01, 0.5), "adam": (0.1, 0.9), "adamw": (0.1, 0.5)}

    def metrics(run: RunConfig) -> Metrics:
        return {"nc3": (0.2 if run.optimizer == "sgd" else 0.4) + (best[run.optimizer] != (run.lr, run.momentum))}

    runs = product(optimizer=list(best), lr=[0.01, 0.1], momentum=[0.5, 0.9], eps=[1e-8, 1e-7])
    found = strongest_alignment(evidence(tmp_path / "a", runs, metrics))
    new = new_runs(found, tmp_path / "a")
    assert new
    assert all(best[run.optimizer] == (run.lr, run.momentum) and run.eps in (1e-8, 0.0) for run in new)


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    found = strongest_alignment(evidence(tmp_path / "a", of_all(1), best_of({"sgd": 0.1})))
    assert found.verdict == "not enough"
    new = new_runs(found, tmp_path / "a")
    assert {run.seed for run in new} == {1, 2}
    assert {(run.lr, run.momentum, run.weight_decay) for run in new} == {(0.1, 0.9, 5e-3)}  # the best ones only
    assert len(new) == 12


def test_settings_with_seeds_precede_a_lucky_one(tmp_path: Path) -> None:
    """The best of many single seeds does not replace the setting whose seeds were added."""
    runs = [run for run in of_all(3) if run.seed == 0 or (run.lr, run.momentum, run.weight_decay) == (0.1, 0.9, 5e-3)]
    lucky = {"sgdw": 0.05}

    def metrics(run: RunConfig) -> Metrics:
        by_chance = run.optimizer in lucky and run.lr == 0.01
        return {"nc3": 0.05} if by_chance else best_of({"sgd": 0.2})(run)

    found = strongest_alignment(evidence(tmp_path / "a", runs, metrics))
    assert found.verdict == "holds"


def test_a_folder_without_sgd(tmp_path: Path) -> None:
    found = strongest_alignment(evidence(tmp_path / "a", product(optimizer=["adam"], seed=[0, 1, 2]), best_of({})))
    assert found.verdict == "not enough"
    assert {run.optimizer for run in new_runs(found, tmp_path / "a")} == {"sgd"}


# 12: the theorems.


def test_the_theorems_hold_in_the_model() -> None:
    found = theorems()
    assert found.verdict == "holds"
    assert [part.name for part in found.parts] == ["SGD (3.1)", "SGDW (3.2)", "SignumW (3.3)", "Signum (3.4)"]
    assert all(0 < part.value < 1e-9 for part in found.parts[:3])
    assert found.parts[2].more["end"] > 0.6 * 10 * 8**2 / 0.05**2  # the limit K(K − 2)²/λ²
    assert 0 < found.parts[3].value <= 1


# Folders that cannot tell.

NAN = float("nan")
POOR: dict[str, tuple[list[RunConfig], Callable[[RunConfig], Metrics], str]] = {
    "one run": (product(optimizer="sgd"), lambda run: {}, "done"),
    "one seed of two": (product(optimizer=["sgd", "adamw"]), lambda run: {}, "done"),
    "all diverged": (of_all(1), lambda run: {"train_accuracy": 0.1, "nc0": NAN, "nc1": NAN}, "diverged"),
    "no metric": (
        of_all(1), lambda run: dict.fromkeys(("nc0", "nc1", "nc2", "nc3", "nc4", "val_accuracy"), NAN), "done",
    ),
    "foreign": (
        product(optimizer="torch.optim:NAdam", lr=[0.01, 0.1], code="torch=2", seed=[0, 1]), lambda run: {}, "done",
    ),
    "no decay": (product(optimizer=["sgd", "sgdw", "adam", "adamw"], weight_decay=0.0), lambda run: {}, "done"),
    "own loss without validation": (
        product(optimizer=["sgd", "adam"], loss="mine.py:margin", code="mine.py=1"),
        lambda run: {"val_accuracy": NAN, "val_loss": NAN}, "done",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POOR)
def test_a_poor_folder_is_not_enough(name: str, tmp_path: Path) -> None:
    runs, metrics, status = POOR[name]
    poor = evidence(tmp_path / "a", runs, metrics, status=dict.fromkeys(runs, status))
    for claim in CLAIMS:
        found = claim(poor)
        assert found.verdict == "not enough", found
        assert found.says
        assert found.lacks
        assert found.command.startswith("ncollapse rerun ")
        assert found.as_dict()["verdict"] == "not enough"


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, NAN, math.inf, 1e-300, 1e300]), st.floats(0, 2, allow_subnormal=True)
)


@settings(max_examples=15, deadline=None, phases=[Phase.generate])  # shrinking a frame takes minutes
@given(data=st.data())
def test_no_frame_raises(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    frame = data.draw(st.sampled_from(frames(tmp_path_factory))).copy()
    rows = data.draw(st.integers(1, len(frame)))
    frame = frame.sample(rows, random_state=data.draw(st.integers(0, 9))).reset_index(drop=True)
    for name in ("nc0", "nc0_start", "nc1", "nc2", "nc3", "nc4", "val_accuracy", "train_accuracy"):
        drawn = data.draw(st.lists(NUMBERS, min_size=1, max_size=6), label=name)
        frame[name] = np.resize(np.array(drawn), rows)
    selection, note = Selection().relaxed(frame)
    results = Results(Path("results/any"), frame, {"grid": "any"}, [])
    random = Evidence("any", frame, selection.eligible(frame), note, selection, results, "any")
    for claim in CLAIMS:
        found = claim(random)
        assert found.says
        assert (found.command != "") == (found.lacks != "")
        if found.verdict == "not enough":
            assert found.lacks


_FRAMES: list[pd.DataFrame] = []


def frames(folders: pytest.TempPathFactory) -> list[pd.DataFrame]:
    """Return the runs of a store with all optimizers, and of one with many couplings; made once."""
    if not _FRAMES:
        dial = product(optimizer=["adam", "sgd"], coupling=[0.0, 0.3, 1.0], lr=[0.01, 0.1], weight_decay=[0.0, *DECAYS])
        for i, runs in enumerate((of_all(1), dial)):
            found = evidence(folders.mktemp("frames") / str(i), runs, lambda run: {})
            _FRAMES.append(found.runs)
    return _FRAMES
