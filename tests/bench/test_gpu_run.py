"""The scripts of a GPU run, without one: their command lines, their seconds, what is left of a step that is killed."""

import argparse
import gzip
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_table, step_times
from bench.record import Record
from ncollapse.train.grid import load_grid

ROOT = Path(__file__).parents[2]
OPTIONS = argparse.Namespace(device="cuda", quick=False, commit="abc", data_dir=ROOT)
SCRIPTS = [step for step in gpu.STEPS if "pytest" not in step.command]


class ParsedError(Exception):
    """The arguments were understood; nothing else is to happen."""


@pytest.mark.parametrize("step", SCRIPTS, ids=lambda step: step.name)
def test_every_script_understands_its_command_line(
    step: gpu.Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, *given: Any) -> None:
        options = parse(self, *given)
        assert (options.out, options.device, options.commit) == (tmp_path, "cuda", "abc")
        assert 0.05 < options.minutes < step.seconds / 60
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    option, name, *arguments = gpu.arguments_of(step, OPTIONS, tmp_path)
    assert option == "-m"
    with pytest.raises(ParsedError):
        importlib.import_module(name).main(arguments)


def test_a_trial_on_a_cpu_asks_for_the_help_of_what_needs_a_gpu(tmp_path: Path) -> None:
    trial = argparse.Namespace(**vars(OPTIONS) | {"device": "cpu"})
    (step,) = (step for step in gpu.STEPS if not step.on_cpu)
    assert gpu.arguments_of(step, trial, tmp_path)[-1] == "--help"


def test_tests_that_are_named_exist() -> None:
    named = [word for step in gpu.STEPS for word in step.command.split() if word.startswith("tests/")]
    assert [name for name in (*gpu.FIRST_TESTS, *named) if not (ROOT / name).exists()] == []


def test_the_steps_fit_in_nine_minutes() -> None:
    assert sum(step.seconds for step in gpu.STEPS if not step.asked) <= 540


def test_steps_by_name_and_from_a_step_on() -> None:
    parser = argparse.ArgumentParser()

    def names(steps: str = "", start: str = "") -> list[str]:
        return [step.name for step in gpu.chosen(argparse.Namespace(steps=steps, start=start), parser)]

    everything = names()
    assert "table" not in everything
    assert names("table, cnn") == ["cnn", "table"]
    assert names(start="sweep") == everything[everything.index("sweep") :]
    with pytest.raises(SystemExit):
        names("nothing of that name")


@pytest.mark.parametrize("name", step_times.CANDIDATES)
def test_what_a_candidate_changes_is_otherwise_set(name: str) -> None:
    settings = step_times.CANDIDATES[name].settings
    before = [getattr(importlib.import_module(module), constant) for module, constant, _ in settings]
    assert all(value != other for value, (_, _, other) in zip(before, settings, strict=True))
    with step_times.changed(settings):
        for module, constant, value in settings:
            assert getattr(importlib.import_module(module), constant) == value


def test_a_step_whose_time_is_up_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = tmp_path / "log", time.monotonic
    # Time is up as soon as the child of the step says so.
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 100.0 if log.exists() and "child" in log.read_text() else 0.0)
    child = "print('child', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert gpu.run(["-c", program], 50, log, stdin=idle.stdout) is None
        idle.kill()
    monkeypatch.setattr(gpu.time, "monotonic", clock)
    assert log.read_text() == "child\n"


def test_a_run_is_packed_after_each_step_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str], seconds: float, log: Path, *others: Any, **where: Any) -> int | None:
        log.write_text("printed\n")
        if "--out" in arguments:
            record = Record(Path(arguments[arguments.index("--out") + 1]) / "one.json", "command", "cpu")
            record.save()
        return None if "bench.cnn_times" in arguments else 0

    monkeypatch.setattr(gpu, "run", run)
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--steps", "muon,cnn"]) == 0
    assert gpu.main([*arguments, "--from", "sweep"]) == 0
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        names = archive.getnames()
        report = json.load(archive.extractfile("records/gpu.json"))  # type: ignore[arg-type]
    assert {f"records/{name}/one.json" for name in ("muon", "cnn", "sweep")} <= set(names)
    assert [report[name]["exit"] for name in ("muon", "cnn", "sweep", "races")] == [0, None, 0, 0]
    assert report["races"]["output"] == ["printed"]


def test_outcomes_are_written_as_they_come_the_named_files_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text("import pytest\n@pytest.mark.parametrize('n', [1, 2])\n"
                                                  "def test(n):\n    assert n != 2, 'two'\n")  # fmt: skip
    reports = tmp_path / "reports" / "tests.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-c", "/dev/null",
        f"--rootdir={tmp_path}", "--reports", str(reports), "--first", "test_b.py", str(tmp_path),
    ]  # fmt: skip
    # Within a worker of pytest-xdist the plugin would be one of it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False)
    found = [json.loads(line) for line in reports.read_text().splitlines()]
    assert [(one["test"], one["outcome"]) for one in found] == [
        ("test_b.py::test[1]", "passed"), ("test_b.py::test[2]", "failed"),
        ("test_a.py::test[1]", "passed"), ("test_a.py::test[2]", "failed"),
    ]  # fmt: skip
    first, *failed = gpu.outcomes(reports)
    assert first == "tests: 2 passed, 2 failed"
    assert all("AssertionError" in line for line in failed)


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    path.write_text('{"test": "a", "outcome": "passed", "seconds": 1.0}\n{"test": "b", "outc')
    assert gpu.outcomes(path) == ["tests: 1 passed"]


def test_sources_are_laid_out_as_they_are_installed(tmp_path: Path) -> None:
    gpu.lay_out(tmp_path)
    code = "import ncollapse.optim, ncollapse.train.cli, bench.gpu; print(ncollapse.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "ncollapse" / "__init__.py"), done.stderr


def test_compressed_data_are_unpacked_elsewhere(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    assert gpu_table.unpacked(tmp_path / "data", tmp_path / "new") == tmp_path / "data"
    (raw / "images.gz").write_bytes(gzip.compress(b"pixels"))
    assert gpu_table.unpacked(tmp_path / "data", tmp_path / "new") == tmp_path / "new"
    assert (tmp_path / "new" / "FashionMNIST" / "raw" / "images").read_bytes() == b"pixels"


def test_joined_records_keep_runs_that_are_done(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    rows = [{"id": "a", "status": "done"}, {"id": "b", "status": "running"}]
    old.write_text(json.dumps({"runs": rows}))
    found = [{"id": "a", "status": "running"}, {"id": "b", "status": "done"}, {"id": "c", "status": "done"}]
    new.write_text(json.dumps({"machine": {"device": "H200", "commit": "abc"}, "runs": found}))
    gpu_table.join(new, old)
    told = {"device": "H200", "commit": "abc"}
    assert json.loads(old.read_text())["runs"] == [rows[0], found[1] | told, found[2] | told]


def test_the_missing_rows_are_a_grid_of_three_runs() -> None:
    runs = load_grid(str(ROOT / "bench" / "missing_rows.toml")).runs
    assert {(run.optimizer, run.lr, run.pad) for run in runs} == {
        ("adam", 1e-3, 0), ("adamw", 1e-3, 0), ("signumw", 1e-4, 0)
    }  # fmt: skip
