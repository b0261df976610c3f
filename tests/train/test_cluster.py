"""The Ray engine: the results of the local engine, also when a node is lost, and errors that say what to do."""

import dataclasses
import io
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ncollapse.train import sweep as sweep_from_python
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine import ray_connect, stack_size
from ncollapse.train.engine.messages import WorkerSettings
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.planning import device_of
from ncollapse.train.engine.ray_cluster import Cluster
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.engine.stack_size import Plan, StackPolicy
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.reader import load_runs
from ncollapse.train.results.writer import PlannedStack, Store
from sweep_results import assert_same

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of processes on this machine: a head that trains nothing, and nodes with one core each."""
    pytest.importorskip("ray")
    from ray import cluster_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # else Ray ends these workers for the memory of other tests
        patch.setenv("RAY_health_check_period_ms", "1000")  # a lost node is detected after 3 s instead of 15
        patch.setenv("RAY_health_check_failure_threshold", "3")
        nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield nodes
        finally:
            nodes.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> Any:
    """Two nodes that train."""
    while len(nodes.worker_nodes) < 2:
        nodes.add_node(num_cpus=1)
    return nodes


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # They would stay in the environment, and nodes that start later need more retries.
    monkeypatch.setattr(ray_connect, "_RETRY_LIMITS", {})


@pytest.fixture(scope="module")
def grid() -> Grid:
    """Enough for four stacks of three runs, which train for some seconds each."""
    runs = [
        RunConfig(optimizer=optimizer, lr=2e-3, weight_decay=decay, epochs=60, eval_every=6)
        for optimizer in ("sgdw", "signum", "adam")
        for decay in (0.0, 5e-4, 5e-3, 5e-2)
    ]
    return Grid("cluster", tuple(runs), "")


@pytest.fixture(scope="module")
def trained_here(grid: Grid, digits: Dataset, quiet: Console, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    sweep(grid, folder, lambda name, device: digits, CPU, Options(stack=3, workers=1), quiet)
    return folder


def on(cluster: Any, **options: Any) -> Options:
    return Options(engine="ray", ray_address=cluster.address, stack=3, **options)


def settings(data: Dataset) -> WorkerSettings:
    return WorkerSettings(lambda name, device: data, 60.0, keep_weights=False)


def test_a_cluster_gives_the_results_of_one_process(
    cluster: Any, grid: Grid, trained_here: Path, digits: Dataset, quiet: Console, tmp_path: Path
) -> None:
    assert sweep(grid, tmp_path, lambda name, device: digits, CPU, on(cluster), quiet) == 12
    assert_same(trained_here, tmp_path, but="stack")


def test_code_of_the_users_trains_on_a_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, with data that are read in each process, and a metric that was given in Python."""
    for file in (Path(__file__).parents[2] / "examples" / "bring_your_own").glob("*.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "folder.py").write_text(
        "from torchvision.datasets import FakeData\n"
        "from torchvision.transforms import ToTensor\n"
        "def load():\n    return FakeData(40, (1, 8, 8), 4, ToTensor()), FakeData(20, (1, 8, 8), 4, ToTensor())\n"
    )
    grid = tmp_path / "own.toml"
    grid.write_text(
        'model = "mine.py:WideNet"\noptimizer = ["adamw", "mine.py:NormalizedSGD"]\nepochs = 1\n'
        '[[grid]]\ndata = "mine.py:few_digits"\nloss = "mine.py:hinge"\n'
    )
    found, streamed = [], []
    for engine in ({"engine": "ray", "ray_address": cluster.address}, {"workers": 1}):
        options: Any = {"device": "cpu", "progress": False, "metrics": {"largest": lambda w, s: w.max()}, **engine}
        name = engine.get("engine", "here")
        found.append(sweep_from_python(grid, tmp_path / name, **options))
        grid_of_folder = {"model": "cnn", "data": "folder.py:load", "in_memory": False, "epochs": 1}
        monkeypatch.chdir(tmp_path)
        streamed.append(sweep_from_python(grid_of_folder, tmp_path / f"{name}-streamed", **options))
    for ray, here in (found, streamed):
        assert set(ray.status) == {"done"}
        for column in ("nc0", "nc3", "train_loss", "largest"):
            assert ray[column].tolist() == pytest.approx(here[column].tolist(), rel=1e-3)


def test_a_lost_node_costs_only_its_stack(
    cluster: Any, grid: Grid, trained_here: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is killed while both nodes are in the middle of a stack."""
    real, killed = Store.save_checkpoint, []
    flying: set[int] = set()

    def kill_a_node(self: Store, stack: Any, epoch: int, content: bytes) -> None:
        real(self, stack, epoch, content)
        if epoch == 2:
            flying.add(stack.id)
        elif epoch == 50:
            flying.discard(stack.id)
        if not killed and len(flying) == 2:
            killed.append(next(iter(cluster.worker_nodes)))
            cluster.remove_node(killed[0], allow_graceful=False)

    monkeypatch.setattr(Store, "save_checkpoint", kill_a_node)
    output = io.StringIO()
    console = Console(file=output, width=500)
    sweep(grid, tmp_path, lambda name, device: digits, CPU, on(cluster, checkpoint_minutes=0), console)
    assert killed
    assert output.getvalue().count("was lost: Task failed because the node it was running on is dead") == 1
    assert_same(trained_here, tmp_path, but="stack")


def test_a_node_that_joins_is_used(cluster: Any, digits: Dataset) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    stacks = iter([PlannedStack(i, (RunConfig(epochs=100_000, seed=i),)) for i in range(2)])
    trainer = Cluster(cluster.address, CPU, settings(digits))
    try:
        heard = set()
        for stack, _ in trainer.run(lambda: next(stacks, None)):
            if not heard:
                cluster.add_node(num_cpus=1)
            heard.add(stack.id)
            if len(heard) == 2:  # one core each: the second can train only on the new node
                break
    finally:
        trainer.close()


@pytest.fixture
def gpu_node(nodes: Any) -> Iterator[None]:
    """A node with two cores and a GPU that exists for Ray alone."""
    node = nodes.add_node(num_cpus=2, num_gpus=1)
    yield
    nodes.remove_node(node)


def test_stacks_share_a_gpu(nodes: Any, gpu_node: None, digits: Dataset) -> None:
    stacks = iter([PlannedStack(i, (RunConfig(epochs=100_000, seed=i),)) for i in range(2)])
    trainer = Cluster(nodes.address, torch.device("cuda"), settings(digits))
    trainer.use(2, 1, per_gpu=2)
    trainer._device = CPU  # Ray counts the GPU, nothing computes on it
    try:
        assert "1 GPUs" in trainer.device
        heard = set()
        for stack, _ in trainer.run(lambda: next(stacks, None)):
            heard.add(stack.id)
            if len(heard) == 2:
                break
    finally:
        trainer.close()


def test_the_machine_of_the_command_needs_no_gpu() -> None:
    assert device_of("cuda:0", "ray") == torch.device("cuda:0")


def test_how_many_share_a_gpu_is_measured(
    nodes: Any, gpu_node: None, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_size, "WORTH_MEASURING", 0.0)
    runs = [RunConfig(epochs=100_000, seed=seed) for seed in range(4)]
    trainer = Cluster(nodes.address, torch.device("cuda"), settings(digits))
    trainer._device = CPU
    try:
        plan = StackPolicy(runs, {"digits": DataFacts.of(digits)}, stack=2).choose(trainer)
    finally:
        trainer.close()
    rates = {one["workers"]: one["steps_per_second"] for one in plan.measured}
    assert set(rates) == {1, 2}  # four do not fit beside two cores
    assert plan.per_gpu == plan.workers == max(rates, key=rates.__getitem__)
    assert list(plan.sizes.values()) == [2]
    assert Plan.from_dict(plan.as_dict()) == plan


def test_a_bug_in_a_task_is_shown(cluster: Any, grid: Grid, digits: Dataset, quiet: Console, tmp_path: Path) -> None:
    broken = dataclasses.replace(digits, val_y=digits.val_y[:5])
    with pytest.raises(UserError, match=r"did not foresee: .*RuntimeError"):
        sweep(grid, tmp_path, lambda name, device: broken, CPU, on(cluster), quiet)
    assert set(load_runs(tmp_path).status) <= {"running", "pending"}


def test_a_cluster_without_the_device_is_refused(cluster: Any, digits: Dataset) -> None:
    with pytest.raises(UserError, match="has no GPU to train on: give another --device, or start nodes"):
        Cluster(cluster.address, torch.device("cuda"), settings(digits))


@pytest.mark.parametrize("given", ["--ray-address", "RAY_ADDRESS"])
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-machine.invalid:6379", "6379", "ray://head:10001"])
def test_an_address_that_does_not_answer_is_said_soon(
    address: str, given: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as unused:  # bound, not listening: no other process gets the port
        unused.bind(("127.0.0.1", 0))
        address = address.format(port=unused.getsockname()[1])
        if given == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        begun = time.monotonic()
        with pytest.raises(
            UserError, match=rf"(no connection to a Ray cluster at|is HOST:PORT, as in .*got) {address}"
        ):
            Cluster(address if given == "--ray-address" else None, CPU, settings(digits))
        assert time.monotonic() - begun < 15


def test_without_ray_the_extra_is_named(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray .*: pip install 'ncollapse\[ray\]'"):
        Cluster(None, CPU, settings(digits))


def test_a_lost_head_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connect, "_LOST_SECONDS", 0.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        head = ray_connect.ClusterHead(f"127.0.0.1:{listening.getsockname()[1]}")
        head.check()
    for _ in range(2):
        with pytest.raises(UserError, match=r"the head of the Ray cluster at 127.0.0.1:\d+ does not answer any more"):
            head.check()
    assert head.lost
    head.close()


def test_a_process_that_waits_for_a_lost_head_ends_with_words() -> None:
    """Ray's own code, in which it may wait, heeds no signal."""
    code = (
        "import threading; from ncollapse.train.engine import ray_connect as r\n"
        "r._END_SECONDS = r._WATCH_SECONDS = 0.01\n"
        "r._refusal = lambda address: 'refused'; r.ClusterHead('head:1'); threading.Event().wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ncollapse: the head of the Ray cluster at head:1 does not answer any more (refused)")


@pytest.mark.parametrize(("mode", "text"), [("token", "it requires a token"), ("disabled", "everyone who reaches it")])
def test_who_can_reach_a_private_cluster_is_said(
    mode: str, text: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    started: list[object] = []

    def start(address: str, **options: object) -> None:
        started.append(address)
        monkeypatch.setenv("RAY_AUTH_MODE", mode)  # as Ray does

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray_connect, "_running_here", lambda: "127.0.0.1:1")  # one that was killed
    monkeypatch.setattr(ray_connect, "_refusal", lambda address: "refused")
    _, note = ray_connect.connect(None)
    assert text in note
    assert started == ["local"]
