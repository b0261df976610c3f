"""The policy of stack sizes, over an engine whose rates, room and counts are given."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fake_engine import FakeEngine
from ncollapse.optimizer_table import TABLE
from ncollapse.train.config import RunConfig
from ncollapse.train.engine import stack_size
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.stack_size import Plan, StackPolicy
from ncollapse.train.engine.throughput import DataFacts, Rate
from ncollapse.train.plugins import Plugins

DIGITS = DataFacts((1, 8, 8), 10, 1437, "")
MLP = StackKey("mlp", "digits", None, 128)
Rates = dict[int, float | None]


def policy_for(runs: int, epochs: int = 200, **options: int | str) -> StackPolicy:
    return StackPolicy([RunConfig(lr=0.1 + i, epochs=epochs) for i in range(runs)], {"digits": DIGITS}, **options)


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_size, "WORTH_MEASURING", 5.0)


@pytest.mark.parametrize(
    ("rates", "runs", "size"),
    [
        ({1: 100, 4: 300, 16: 900, 64: 950}, 200, 64),
        ({1: 100, 4: 300, 16: 900, 64: 910}, 200, 16),  # hardly faster: a smaller stack loses less
        ({1: 100, 2: 90, 4: 80}, 200, 1),  # stacking does not pay
        ({1: 100, 4: 200, 8: 300, 16: 290}, 200, 8),  # found between the large steps
        ({1: 100, 4: 300, 16: 900, 32: 1200, 64: None}, 200, 32),  # no room for more
        ({1: None}, 200, 1),
        ({1: 100, 4: 300, 8: 900}, 10, 10),
    ],
)
def test_the_size_is_chosen_by_measurement(rates: Rates, runs: int, size: int) -> None:
    plan = policy_for(runs).grown(FakeEngine(rates), Plan(1, 1))
    assert plan.sizes == {MLP: size}
    assert len({one["size"] for one in plan.measured}) == len(plan.measured)


def test_what_the_user_says_is_done() -> None:
    policy = policy_for(50, stack=7)
    assert policy.grown(FakeEngine({1: 10}), Plan(2, 1)).sizes == {MLP: 7}
    assert policy.usual(FakeEngine({1: 10}), Plan(1, 1)).sizes == {MLP: 7}
    assert policy.usual(FakeEngine({1: 10}, room=5), Plan(1, 1)).sizes == {MLP: 5}  # no room for more
    assert policy.usual(FakeEngine({1: 10}, room=None), Plan(1, 1)).sizes == {MLP: 7}


@pytest.mark.parametrize(
    ("options", "runs", "engine"),
    [
        ({}, 1, FakeEngine({1: 1e-9}, cores=8)),
        ({"stack": 4, "workers": 2}, 8, FakeEngine({1: 1e-9}, cores=8)),
        ({"stack": 4}, 8, FakeEngine({1: 1e-9}, cores=8, in_process=False)),
    ],
    ids=["one run", "all said", "stack said, one count"],
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    options: dict[str, int], runs: int, engine: FakeEngine
) -> None:
    plan = policy_for(runs, **options).choose(engine)
    assert engine.measured == []
    assert plan.sizes == {MLP: options.get("stack", 1)}
    assert engine.used == [(plan.workers, plan.threads, plan.per_gpu)]
    assert plan.workers == options.get("workers", min(runs, 8))


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize(
    ("seconds", "workers"),
    [(4.0, [1]), (8.0, [1]), (13.0, [4])],
    ids=["not worth measuring", "not worth processes", "much to do"],
)
def test_on_a_cpu_the_amount_of_work_decides(seconds: float, workers: list[int]) -> None:
    policy = policy_for(8)
    steps = policy.seconds({MLP: 1.0})
    engine = FakeEngine({1: steps / seconds}, cores=4)
    plan = policy.choose(engine)
    assert plan.workers == workers[-1]
    assert {count for count, _, quick in engine.measured if quick} == {1}
    assert list(dict.fromkeys(c for c, _, quick in engine.measured if not quick)) == ([] if seconds < 5 else workers)
    assert engine.used[-1] == (plan.workers, 4 if plan.workers == 1 else 1, 1)


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize("in_process", [True, False])
def test_packings_of_gpus_are_measured(in_process: bool) -> None:
    """On two GPUs, with cores for four workers: one, two or four workers, of which two on a GPU are the fastest."""

    def rates(workers: int) -> Rates:
        return {1: 0.1 * workers}

    engine = FakeEngine(rates, cores=4, gpus=2, in_process=in_process)
    plan = policy_for(8, stack=2).choose(engine)
    assert (plan.workers, plan.threads, plan.per_gpu) == engine.used[-1] == (4, 1, 2)
    assert list(dict.fromkeys(one["workers"] for one in plan.measured)) == ([1, 2, 4] if in_process else [2, 4])
    assert plan.rates == {MLP: pytest.approx(0.4)}


@pytest.mark.usefixtures("thresholds")
def test_what_does_not_fit_is_measured_all_the_same() -> None:
    plan = policy_for(8).choose(FakeEngine({1: None}, in_process=False))
    assert plan.sizes == {MLP: 1}
    assert plan.rates == {}


def test_work_without_a_rate_never_ends() -> None:
    assert policy_for(2, epochs=3).seconds({MLP: 2.0}) == 2 * 3 * 12 / 2
    assert policy_for(2).seconds({MLP: None}) == policy_for(2).seconds({}) == math.inf


def test_plans_are_told_in_a_line_for_each_key() -> None:
    plan = Plan(2, 1, {MLP: 36}, {MLP: 9064.2})
    assert list(plan.describe()) == [
        "mlp on digits, batches of 128: stacks of up to 36 runs in 2 processes with one thread "
        "(measured: 9,064 training steps/s)"
    ]
    assert next(Plan(4, 1, {MLP: 1}, per_gpu=2).describe()).endswith("in 4 processes with one thread, 2 on each GPU")
    measured = ({"shape": str(MLP), "graph": "forward and backward pass: NAdam cannot be captured"},)
    assert next(Plan(1, 1, {MLP: 1}, measured=measured).describe()).endswith(
        "; a CUDA graph holds forward and backward pass: NAdam cannot be captured"
    )


def test_a_stored_plan_is_read() -> None:
    other = dataclasses.replace(MLP, own_family=next(row.family for row in TABLE.values() if row.own_stack), limit=9)
    plan = Plan(2, 1, {MLP: 36, other: 1}, {MLP: 9064.2}, ({"size": 36},), 2)
    assert Plan.from_dict(plan.as_dict()) == plan


@pytest.mark.parametrize("change", [lambda stored: stored, lambda stored: {"racks": 2, **stored}])
def test_a_plan_of_format_3_is_read(change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    stored = {
        "engine": "local",
        "stack": "auto",
        "workers": 2,
        "threads": 1,
        "measured": [],
        "stacks": [
            {"model": "mlp", "data": "digits", "limit": 200, "batch_size": 128, "muon": flag, "size": size}
            for flag, size in ((False, 4), (True, 2))
        ],
    }
    plan = Plan.from_dict(change(stored))
    assert (plan.workers, plan.threads, plan.per_gpu, plan.rates) == (2, 1, 1, {})
    assert {str(key).removeprefix("mlp on digits, "): size for key, size in plan.sizes.items()} == {
        "batches of 128, first 200 samples": 4,
        "batches of 128, first 200 samples, muon": 2,
    }
    assert plan.sizes[StackKey.of(RunConfig(optimizer="muonw", limit=200))] == 2


@pytest.mark.usefixtures("thresholds")
def test_other_programs_change_no_size_and_are_said() -> None:
    """On a machine that others take half of, from the second measurement on, the plan is that of a free one."""

    class Disturbed(FakeEngine):
        def measure_rate(self, *args: Any, **options: Any) -> Rate | None:
            self._share = 1.0 if len(self.measured) < 2 else 0.4
            return super().measure_rate(*args, **options)

    rates: Rates = {1: 100, 4: 300, 16: 900}
    free = policy_for(100, epochs=10_000).choose(FakeEngine(rates))
    busy = policy_for(100, epochs=10_000).choose(Disturbed(rates))
    assert busy.sizes == free.sizes == {MLP: 16}
    assert busy.rates == pytest.approx(free.rates)
    assert not any("busy" in line for line in free.describe())
    *_, last = Plan.from_dict(busy.as_dict()).describe()
    assert last.startswith("The machine was busy: other programs took ")


@pytest.mark.usefixtures("thresholds")
def test_an_earlier_plan_stays_unless_another_is_much_faster() -> None:
    rates: Rates = {1: 100, 4: 300, 16: 330}
    policy = policy_for(100, epochs=10_000)

    def again(before: int, rates: Rates) -> Plan:
        return dataclasses.replace(policy, before=Plan(1, 1, {MLP: before})).choose(FakeEngine(rates))

    assert policy.choose(FakeEngine(rates)).sizes == {MLP: 16}
    assert again(4, rates).sizes == {MLP: 4}
    assert again(3, rates).sizes == {MLP: 16}  # three times as fast
    assert again(24, {1: 100, 4: 300, 16: 900, 24: 890}).sizes == {MLP: 24}
    quick = dataclasses.replace(policy_for(100, epochs=1), before=Plan(1, 1, {MLP: 24}))
    assert quick.choose(FakeEngine({1: 1e6})).sizes == {MLP: 24}  # not worth measuring


@pytest.mark.parametrize(
    ("before", "engine", "used"),
    [
        (Plan(2, 1), FakeEngine({1: 1.0}, cores=8), (8, 1, 1)),
        (Plan(8, 1), FakeEngine({1: 1.0}, cores=2), (2, 1, 1)),
        (Plan(2, 4), FakeEngine({1: 1.0}, cores=2), (1, 4, 1)),
        (Plan(1, 2), FakeEngine({1: 1.0}, cores=8), (1, 2, 1)),
        (Plan(2, 4, per_gpu=2), FakeEngine({1: 1.0}, cores=32, gpus=4), (8, 4, 2)),
    ],
)
def test_a_sweep_that_goes_on_has_as_many_processes_as_this_machine_wants(
    before: Plan, engine: FakeEngine, used: tuple[int, int, int]
) -> None:
    """The threads stay, since the last digits of what has begun depend on them."""
    dataclasses.replace(policy_for(100), before=before, pinned=True).keep(engine)
    assert engine.used == [used]
    plan = dataclasses.replace(policy_for(100), before=before, pinned=True).choose(engine)
    assert (plan.workers, plan.threads, plan.per_gpu) == used
    dataclasses.replace(policy_for(100, workers=3), before=before, pinned=True).keep(engine)
    assert engine.used[-1] == (3, *used[1:])


def dropping(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))


@pytest.mark.parametrize("streamed", [False, True])
def test_runs_that_gain_nothing_from_stacks_are_planned_one_by_one(streamed: bool) -> None:
    """Those of a model that draws random numbers, and those of data that is not in memory."""
    plugins = Plugins(given={"model": {"mine": dropping}})
    model = {} if streamed else {"model": "mine", "code": plugins.code_of({"model": "mine"})}
    runs = [RunConfig(seed=seed, **model) for seed in range(4)]  # type: ignore[arg-type]
    facts = {"digits": dataclasses.replace(DIGITS, streamed=streamed)}
    engine, key = FakeEngine({1: 10.0}), StackKey.of(runs[0])
    policy = StackPolicy(runs, facts, plugins=plugins)
    assert policy.grown(engine, Plan(1, 1)).sizes == {key: 1}
    plan = policy.usual(engine, Plan(1, 1))
    assert plan.sizes == {key: 1}
    why = "its data are not in memory" if streamed else "of mine: it draws random numbers in training"
    assert f"one run at a time, since {why}, in one process" in next(plan.describe())
    assert dataclasses.replace(policy, stack=4).usual(engine, Plan(1, 1)).sizes == {key: 1}


def test_optimizers_that_are_not_ours_are_measured_with_the_settings_of_runs() -> None:
    foreign = [RunConfig(optimizer="torch.optim:NAdam", lr=0.1 + i) for i in range(5)]
    given: list[tuple[int, list[RunConfig]]] = []

    class Noting(FakeEngine):
        def measure_rate(self, *args: Any, **options: Any) -> Rate | None:
            given.append((args[2], options["runs"]))
            return super().measure_rate(*args, **options)

    policy = StackPolicy([RunConfig(), *foreign], {"digits": DIGITS})
    sizes = policy.grown(Noting({1: 100, 4: 300}), Plan(1, 1)).sizes
    assert sizes == {MLP: 1, StackKey.of(foreign[0]): 4}
    assert [(size, runs) for size, runs in given if runs] == [(n, foreign[:n]) for n in (1, 4, 5, 2)]


def test_runs_share_a_stack_only_with_the_same_model_data_and_loss() -> None:
    base = {"model": "mine.py:Net", "data": "mine.py:load"}
    others: list[dict[str, Any]] = [
        {}, {"model_options": '{"depth": 3}'}, {"head": "out"}, {"data_options": '{"fold": 1}'}, {"loss": "mse"},
        {"loss": "focal"}, {"loss": "focal", "loss_options": '{"gamma": 1}'}, {"label_smoothing": 0.1},
        {"optimizer": "torch.optim:NAdam"},
    ]  # fmt: skip
    keys = [StackKey.of(RunConfig(**{**base, **other})) for other in others]
    assert len(set(keys)) == len(others)
    assert len({str(key) for key in keys}) == len(others) - 1  # a name of the head needs no words
    assert StackKey.of(RunConfig(optimizer="torch.optim:RAdam", **base)) == keys[-1]  # type: ignore[arg-type]
    assert [key.needs_runs for key in keys] == [False] * 8 + [True]
    assert all(StackKey.from_dict(vars(key)) == key for key in keys)


def test_a_key_that_was_stored_before_runs_could_name_code_is_read() -> None:
    stored = {"model": "cnn", "data": "digits", "limit": None, "batch_size": 64, "own_family": None}
    assert StackKey.from_dict(stored) == StackKey.of(RunConfig(model="cnn", batch_size=64))


RESNET = RunConfig(model="resnet9")
#: Training steps a second of ResNet9 on an H200: grouped, and as branches of one graph (bench/NOTES.md).
GROUPED: Rates = {1: 996, 2: 790, 4: 872}
BRANCHED: Rates = {2: 1305, 3: 1439, 4: 1484}


def policy_of(model: str, runs: int, **options: Any) -> tuple[StackPolicy, StackKey]:
    members = [RunConfig(model=model, lr=0.1 + i) for i in range(runs)]
    facts = {"digits": dataclasses.replace(DIGITS, input_shape=(1, 16, 16))}
    return StackPolicy(members, facts, **options), StackKey.of(members[0])


@pytest.mark.parametrize(
    ("model", "runs", "room", "branched", "size", "measured"),
    [
        ("resnet9", 9, 9, BRANCHED, 4, [2, 3, 4]),
        ("resnet9", 9, 3, BRANCHED, 3, [2, 3]),  # no room for more
        ("resnet9", 2, 9, BRANCHED, 2, [2]),
        ("resnet9", 9, 9, {2: 1305, 3: 1439, 4: 1450}, 3, [2, 3, 4]),  # hardly faster: a smaller stack loses less
        ("resnet9", 9, 9, {2: 1305, 3: None}, 2, [2, 3]),
        ("resnet9", 9, 9, {2: 1000}, 1, [2]),
        ("resnet9", 1, 9, BRANCHED, 1, []),
        ("mlp", 9, 9, BRANCHED, 1, []),  # of which stacks always gain more
    ],
)
def test_branches_are_measured_beside_stacks_of_convolutional_networks(
    model: str, runs: int, room: int, branched: Rates, size: int, measured: list[int]
) -> None:
    policy, key = policy_of(model, runs)
    engine = FakeEngine(GROUPED, gpus=1, room=room, branches=branched)
    plan = policy.grown(engine, Plan(1, 1))
    assert (plan.sizes, plan.branches) == ({key: size}, {key} if size > 1 else frozenset())
    assert engine.branches == measured
    assert [one["size"] for one in plan.measured if one.get("branches")] == measured
    assert Plan.from_dict(plan.as_dict()).branches == plan.branches
    if size > 1:
        assert f": stacks of up to {size} runs as branches of one CUDA graph in one process" in next(plan.describe())
        assert plan.rates == {key: branched[size]}


def test_small_networks_that_gain_more_in_one_program_are_no_branches() -> None:
    policy, key = policy_of("cnn", 24)
    plan = policy.grown(FakeEngine({1: 1000, 4: 4000, 16: 14_000}, gpus=1, branches=BRANCHED), Plan(1, 1))
    assert (plan.sizes, plan.branches) == ({key: 16}, frozenset())


def test_there_are_no_branches_without_a_gpu_or_of_models_that_draw() -> None:
    policy, key = policy_of("resnet9", 9)
    engine = FakeEngine(GROUPED, branches=BRANCHED)
    assert policy.grown(engine, Plan(1, 1)).sizes == {key: 1}
    plugins = Plugins(given={"model": {"mine": dropping}})
    runs = [RunConfig(seed=seed, model="mine", code=plugins.code_of({"model": "mine"})) for seed in range(4)]
    drawing = StackPolicy(runs, {"digits": DIGITS}, plugins=plugins)
    on_gpu = FakeEngine(GROUPED, gpus=1, branches=BRANCHED)
    assert set(drawing.grown(on_gpu, Plan(1, 1)).sizes.values()) == {1}
    assert engine.branches == on_gpu.branches == []


@pytest.mark.parametrize(("stack", "is_branched"), [(2, True), (4, True), (5, False)])
def test_a_size_that_the_user_says_fixes_the_form(stack: int, is_branched: bool) -> None:
    """The clock does not decide, since the last digits depend on it."""
    policy, key = policy_of("resnet9", 9, stack=stack)
    engine = FakeEngine(GROUPED, gpus=1)  # on which branches are slow
    plan = policy.grown(engine, Plan(1, 1))
    assert (plan.sizes, plan.branches) == ({key: stack}, {key} if is_branched else frozenset())
    assert [one["size"] for one in plan.measured] == [stack]


@pytest.mark.parametrize(
    ("model", "gpus", "is_branched"),
    [("resnet9", 1, True), ("resnet9", 0, False), ("cnn", 1, False), ("mlp", 1, False)],
)
def test_where_nothing_is_measured_large_networks_are_branches(model: str, gpus: int, is_branched: bool) -> None:
    policy, key = policy_of(model, 9, stack=2, workers=1)
    engine = FakeEngine(GROUPED, gpus=gpus)
    plan = policy.choose(engine)
    assert engine.measured == []
    assert (plan.sizes, plan.branches) == ({key: 2}, {key} if is_branched else frozenset())
    assert policy_of(model, 9)[0].usual(engine, Plan(1, 1)).branches == frozenset()
    one_by_one, together = (dataclasses.replace(policy, before=Plan(1, 1, {key: size})) for size in (1, 2))
    assert one_by_one.choose(engine).branches == plan.branches
    assert together.choose(engine).branches == frozenset()  # as they were


def test_the_form_of_an_earlier_session_stays_unless_another_is_much_faster() -> None:
    policy, key = policy_of("resnet9", 9)

    def again(size: int, branches: bool, stack: int | str = "auto", faster: float = 1.0) -> tuple[int, bool]:
        before = Plan(1, 1, {key: size}, branches=frozenset({key} if branches else ()))
        engine = FakeEngine(GROUPED, gpus=1, branches={n: (rate or 0) * faster for n, rate in BRANCHED.items()})
        plan = dataclasses.replace(policy, before=before, stack=stack).grown(engine, Plan(1, 1))
        return plan.sizes[key], key in plan.branches

    assert again(2, True) == (2, True)  # 4 are 1.14 times as fast
    assert again(2, False) == (4, True)
    assert again(1, False) == (4, True)
    assert again(2, False, stack=2) == (2, False)
    assert again(1, False, stack=2) == (2, True)
    assert again(4, False, faster=0.6) == (4, False)
