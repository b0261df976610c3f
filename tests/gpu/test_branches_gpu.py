"""Runs as branches of one CUDA graph: the bits of the runs alone, optimizers side by side, measured rates, memory."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_training import OPTIMIZERS, Network, batches
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.throughput import DataFacts, measure_rate
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training

ALL = "forward pass, backward pass and update"


class Scaled(nn.Module):
    """A parameter that no layer holds: a run's module computes it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head, self.scale = nn.Linear(64, 16), nn.Linear(16, num_classes), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.hidden(x.flatten(1)) * self.scale).relu())


PLUGINS = Plugins(given={"model": {"scaled": Scaled}})


def data_on(device: torch.device) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 8, 8, generator=generator)
    y = (x.flatten(1).sum(1) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long()
    parts = [part.to(device) for part in (x[:260], y[:260], x[260:], y[260:])]
    return Dataset(*parts, tuple("0123"), "")  # type: ignore[arg-type]


def runs_of(*each: dict[str, Any], **shared: Any) -> list[RunConfig]:
    """Return runs, of six epochs unless others are said, with batches of 128, 128 and 4."""
    given = {"epochs": 6, "eval_every": 3, **shared}
    code = {"code": PLUGINS.code_of({"model": "scaled"})} if shared["model"] == "scaled" else {}
    return [RunConfig(**given | code | one) for one in each]


def trained(
    runs: list[RunConfig], device: torch.device, *, branches: bool = False, checkpoint: bytes | None = None
) -> tuple[Training, list[Evaluation]]:
    training = Training(
        runs, data_on(device), device, plugins=PLUGINS, branches=branches, checkpoint=checkpoint, keep_weights=True
    )
    return training, [event for event in training if isinstance(event, Evaluation)]


def values_of(evaluations: list[Evaluation], i: int) -> list[tuple[int, dict[str, float]]]:
    return [
        (event.epoch, {name: column[event.rows.index(i)] for name, column in event.values.items()})
        for event in evaluations
        if i in event.rows
    ]


CASES = {
    "resnet9, bfloat16": runs_of(
        {"optimizer": "sgdw"}, {"optimizer": "adamw", "lr": 1e-3}, {"seed": 1}, {"optimizer": "signum", "lr": 1e-3},
        model="resnet9", width=16, precision="bf16", lr=0.02,
    ),
    "vgg9, tf32": runs_of({}, {"lr": 0.05}, model="vgg9", width=16, precision="tf32", lr=0.02),
    "cnn, augmented, Muon": runs_of(
        {}, {"seed": 3}, model="cnn", optimizer="muonw", augment="flip-crop", lr=1e-3, layers="all"
    ),
    "updates of torch's in the graph": runs_of(
        {}, {"lr": 3e-3}, model="resnet9", width=16, precision="bf16", optimizer="torch.optim:AdamW", lr=1e-3
    ),
    "updates after the graph": runs_of({}, {"lr": 3e-3}, model="cnn", optimizer="torch.optim:Adagrad", lr=1e-3),
    "a model of the user's": runs_of({}, {"optimizer": "adam", "seed": 2}, model="scaled", lr=3e-3),
}  # fmt: skip


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
def test_a_branch_has_the_bits_of_the_run_alone(runs: list[RunConfig], device: torch.device) -> None:
    training, together = trained(runs, device, branches=True)
    assert len(training._step._streams) == len(runs)
    assert len(training._step._replays) == 2
    for i, run in enumerate(runs):
        alone, evaluations = trained([run], device)
        assert training._step.captured == alone._step.captured
        # As text: NaN equals NaN there.
        assert repr(values_of(together, i)) == repr(values_of(evaluations, 0)), run.describe()
        state = training._step.lanes[i].stack.state_dict(0)
        for name, theirs in alone.stack.state_dict(0).items():
            assert torch.equal(state[name], theirs), name


def test_the_others_go_on_when_a_run_ends(device: torch.device) -> None:
    """The graph is captured again, with fewer branches."""
    runs = runs_of({"epochs": 3}, {}, {"seed": 1}, model="resnet9", width=16, precision="bf16", lr=0.02, epochs=9)
    training, together = trained(runs, device, branches=True)
    assert [lane.stack.runs for lane in training._step.lanes] == [1, 1]
    assert len(training._step._replays) == 2
    for i, run in enumerate(runs):
        alone, evaluations = trained([run], device)
        (_, expected), (_, found) = values_of(evaluations, 0)[-1], values_of(together, i)[-1]
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
        if run.epochs == 9:
            state = training._step.lanes[i - 1].stack.state_dict(0)
            for name, theirs in alone.stack.state_dict(0).items():
                torch.testing.assert_close(state[name], theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("branches", [True, False])
def test_a_checkpoint_goes_over_to_the_other_form(branches: bool, device: torch.device) -> None:
    runs = runs_of({}, {"optimizer": "adamw", "lr": 1e-3}, model="cnn", lr=0.01)
    training, kept = Training(runs, data_on(device), device, branches=branches), b""
    for event in training:
        if isinstance(event, Evaluation):
            last = event
        elif event == 3:
            kept = training.checkpoint()
    _, resumed = trained(runs, device, branches=not branches, checkpoint=kept)
    assert resumed[-1].values["train_loss"] == pytest.approx(last.values["train_loss"], rel=0.05)


def test_steps_of_four_optimizers_are_branches_of_one_graph(device: torch.device) -> None:
    """Their tables, counters and partial norms are their own; a schedule reaches each."""
    branched, plain = [], []
    for make in OPTIMIZERS.values():
        torch.manual_seed(0)
        for kept in (branched, plain):
            torch.manual_seed(1)
            model = Network().to(device)
            # Large enough that the updates run at the same time.
            extra = nn.Parameter(torch.randn(2**21, device=device))
            model.register_parameter("extra", extra)
            optimizer = make(model.parameters(), lr=0.02)
            kept.append((model, optimizer, optimizer.observe(head=model.fc.weight, norms=True, bf16=True)))
    x, data = torch.randn(16, 20).to(device), batches(device, 6)
    streams = [torch.cuda.Stream() for _ in branched]

    def step(model: Network, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        params = list(model.parameters())
        loss = (model(batch) - 1).square().mean() + (model.extra * model.extra).sum()
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad
        optimizer.step()

    def side_by_side() -> None:
        main = torch.cuda.current_stream()
        for (model, optimizer, _), stream in zip(branched, streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                step(model, optimizer, x)
        for stream in streams:
            main.wait_stream(stream)

    for _ in range(3):
        side_by_side()
        for model, optimizer, _ in plain:
            step(model, optimizer, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side_by_side()
    for n, batch in enumerate(data):
        x.copy_(batch)
        for _, optimizer, _ in (*branched, *plain):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + n)
        graph.replay()
        for model, optimizer, _ in plain:
            step(model, optimizer, batch)
    torch.cuda.synchronize()
    for (a, first, seen), (b, second, expected) in zip(branched, plain, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)
            assert first.state[p].keys() == second.state[q].keys()
            assert all(torch.equal(first.state[p][name], second.state[q][name]) for name in first.state[p])
            assert torch.equal(seen.weights[p], expected.weights[q])
        assert torch.equal(seen.grad_norm, expected.grad_norm)
        assert torch.equal(seen.update_norm, expected.update_norm)
        assert torch.equal(seen.nc0, expected.nc0)


def test_branches_are_measured(device: torch.device) -> None:
    run = RunConfig(model="resnet9", width=16, precision="bf16")
    facts = DataFacts((1, 8, 8), 4, 260, "")
    for size in (2, 3):
        rate = measure_rate(StackKey.of(run), facts, size, device, branches=True)
        assert rate is not None
        assert rate.graph == ALL
        assert rate.steps > 0


def test_the_memory_of_branches_is_given_back(device: torch.device) -> None:
    def used() -> int:
        trained(runs_of({}, {"seed": 1}, model="resnet9", width=16, precision="bf16", lr=0.02), device, branches=True)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)

    used()  # workspaces of libraries stay
    assert abs(used() - used()) < 2**20
