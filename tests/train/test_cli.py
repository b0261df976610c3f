"""The command line as a user sees it: options, messages, exit codes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ncollapse.train import cli
from ncollapse.train.results.reader import load_runs

GRID = 'optimizer = ["sgdw", "adamw"]\nlr = 0.01\nepochs = 2\nlimit = 200\n'


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NCOLLAPSE_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "grid.toml").write_text(GRID)


def fails(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    assert stop.value.code == code
    captured = capsys.readouterr()
    return re.sub(r"[│\s]+", " ", captured.err + captured.out)


def test_run_trains_prints_and_stores(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--optimizer", "sgdw", "--epochs", "2", "--limit", "200", "--weight-decay", "0.01"]
    cli.main(command)
    out = capsys.readouterr().out
    assert "Trained 1 of 1 runs" in out
    assert "nc0 predicted" in out
    (folder,) = Path("results").iterdir()
    assert re.fullmatch(r"mlp-digits-sgdw-[0-9a-f]{12}", folder.name)
    assert load_runs(folder).weight_decay[0] == 0.01
    cli.main(command)
    assert "All 1 runs in" in capsys.readouterr().out


def test_sweep_reads_a_grid_and_options_replace_its_axes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["sweep", "grid.toml", "--lr", "0.1", "0.02", "--seed", "3", "--threshold", "0"])
    out = capsys.readouterr().out
    assert "Trained 4 of 4 runs" in out
    assert "mlp on digits" in out
    runs = load_runs(Path("results/grid"))
    assert sorted(set(runs.lr)) == [0.02, 0.1]
    assert set(runs.seed) == {3}
    assert Path("results/grid/report.html").stat().st_size > 10_000
    cli.main(["report", "results/grid", "--best-by", "nc3", "--threshold", "0"])
    assert "smallest NC3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--lr", "-1"], "run: lr = -1.0: input should be greater than 0"),
        (["run", "--data", "fashion-mnist"], "--data-dir or NCOLLAPSE_DATA, or fetch it with --download"),
        (["run", "--device", "cuda:99"], "--device cuda:99: "),
        (["run", "--device", "toaster"], "--device toaster: "),
        (["run", "--device", "meta"], "--device meta: runs train on cpu or cuda"),
        (["sweep", "grid.toml", "--workers", "1000000"], "--workers must be at least 1 and at most 1,024"),
        (["sweep", "grid.toml", "--stack", "1000000"], "--stack must be at least 1 and at most 100,000"),
        (["sweep", "grid.toml", "--checkpoint-minutes", "inf"], "--checkpoint-minutes must be at least 0, at most"),
        (["check", "nowhere"], "no results in nowhere"),
        (["run", "--preset", "demo"], "it has no [run]; presets that do: paper"),
        (["run", "--preset", "paper", "--lr", "-1"], "run: lr = -1.0: input should be greater than 0"),
        (["sweep", "nothing.toml"], "neither a file nor a preset"),
        (["run", "--optimizer", "sdg"], "run: unknown optimizer 'sdg', did you mean 'sgd'?; of your own: FILE.py:NAME"),
        (["sweep", "demo", "--model", "alexnet"], "unknown model 'alexnet'; the models are mlp, cnn, resnet9"),
        (["sweep", "grid.toml", "--weight-decay", "-3"], "grid.toml: weight_decay = -3.0"),
        (["run", "--model", "resnet18"], "unknown model 'resnet18'; the models are mlp"),
        (["run", "--model", "rnn"], "unknown model 'rnn'; the models are mlp"),
        (["run", "--optimizer", "AdamW"], "unknown optimizer 'AdamW', did you mean 'adamw'?"),
        (["report", "nowhere"], "no results in nowhere"),
        (["status", "nowhere"], "no results in nowhere"),
        (["export", "nowhere"], "no results in nowhere"),
        (["sweep", "grid.toml", "--threshold", "2"], "--threshold must lie in [0, 1]"),
        (["sweep", "grid.toml", "--stack", "0"], "--stack must be at least 1"),
        (["sweep", "grid.toml", "--minutes", "0"], "--minutes must be above 0"),
        (["sweep", "grid.toml", "--stop-hopeless", "1"], "--stop-hopeless is a share of a run's epochs, in (0, 1)"),
        (["sweep", "grid.toml", "--shard", "3/2"], "--shard '3/2': give I/N with I from 1 to N"),
        (["sweep", "grid.toml", "--where", "lr>1"], "--where 'lr>1': none of the 2 runs of grid"),
        (["rerun", "nowhere", "--where", "status=diverged"], "no results in nowhere"),
        (["merge", "nowhere", "elsewhere", "--out", "new"], "no results in nowhere"),
        (["merge", "nowhere", "--out", "new"], "merge needs two different results folders"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    text = fails(capsys, 1, *args)
    assert message in text
    assert "Traceback" not in text
    assert text.startswith("ncollapse: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--precision", "fp8"], "invalid choice 'fp8'"),
        (["run", "--learning-rate", "1"], "--learning-rate"),
        (["export", "results", "--format", "xlsx"], "invalid choice 'xlsx'"),
        (["status"], "DIR"),
        (["dmeo"], "ncollapse: unknown command 'dmeo', did you mean 'demo'?"),
        (["train"], "ncollapse: unknown command 'train'; the commands are demo, run, sweep,"),
        (["--lr", "1", "run"], "options stand after the command: ncollapse COMMAND --lr"),
        (["completion", "tcsh"], "invalid choice 'tcsh'"),
        ([], "demo"),
    ],
)
def test_bad_arguments_are_exit_code_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert message in fails(capsys, 2, *args)


def test_options_that_look_alike_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, 2, "sweep", "demo", "--wieght-decay", "1")
    assert re.findall(r"--[a-z]+(?:-[a-z]+)*", text) == ["--wieght-decay", "--weight-decay", "--help"]
    assert "Perhaps" not in fails(capsys, 2, "run", "--foo")


def test_an_interrupt_is_exit_code_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ncollapse.train.engine import this_machine

    def interrupt(*args: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(this_machine, "train_stack", interrupt)
    text = fails(capsys, 130, "sweep", "grid.toml")
    assert "0 of 2 runs are finished and kept in results/grid; the same command continues from there" in text


def test_diverged_runs_are_exit_code_4_and_are_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "grid.toml", "--optimizer", "sgd", "--lr", "1e30", "0.01", "--device", "cpu"]
    text = fails(capsys, 4, *command)
    assert "all 2 runs have ended, but 1 diverged (their loss was NaN or inf)" in text
    assert "ncollapse rerun results/grid --where status=diverged --lr …" in text
    assert "nothing to train" in fails(capsys, 4, *command)
    cli.main(["rerun", "results/grid", "--where", "status=diverged", "--lr", "0.02", "0.03", "--device", "cpu"])
    runs = load_runs(Path("results/grid"))
    assert runs.lr.tolist() == [1e30, 0.01, 0.02, 0.03]
    assert runs.status.tolist() == ["diverged", "done", "done", "done"]
    assert "1 diverged" in fails(capsys, 4, "rerun", "results/grid", "--where", "status=diverged", "--device", "cpu")
    assert load_runs(Path("results/grid")).session.tolist()[0] == 3
    assert "none of the 4 runs" in fails(capsys, 1, "rerun", "results/grid", "--where", "status=hopeless")


def test_shards_are_trained_apart_and_merged(capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("1", "2"):
        cli.main(["sweep", "grid.toml", "--shard", f"{number}/2", "--device", "cpu"])
    cli.main(["sweep", "grid.toml", "--device", "cpu", "--stack", "1"])
    shards = [f"results/grid-shard-{number}-of-2" for number in (1, 2)]
    cli.main(["merge", *shards, "--out", "results/merged"])
    assert "results/merged: 2 runs, 2 of them finished; 0 were in several" in " ".join(capsys.readouterr().out.split())
    cli.main(["merge", "results/merged", "results/grid", "--out", "results/all"])
    assert "2 runs, 2 of them finished; 2 were in several folders" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_tells_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["sweep", "grid.toml", "--dry-run", "--save-weights", "--device", "cpu", "--workers", "1"])
    out = capsys.readouterr().out
    assert (
        "grid: 2 runs; results/grid holds no runs yet. 0 of the grid's are finished there, 2 are to be trained" in out
    )
    assert "2 runs in 1 stacks; about " in out
    assert re.search(r"The store grows by about \d+ kB\nThe weights take about \d+ kB", out)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]
    cli.main(["sweep", "grid.toml", "--where", "optimizer=adamw", "--device", "cpu"])
    before = (tmp_path / "results/grid/runs.sqlite").read_bytes()
    cli.main(["sweep", "grid.toml", "--dry-run", "--device", "cpu", "--workers", "1"])
    assert (
        "holds 1 runs. 1 of the grid's are finished there, 1 are to be trained, 1 of them new"
        in capsys.readouterr().out
    )
    assert (tmp_path / "results/grid/runs.sqlite").read_bytes() == before


def test_a_report_of_a_folder_that_is_left_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["run", "--epochs", "1", "--limit", "100", "--out", "results/one", "--device", "cpu"])
    before = sorted(path.name for path in Path("results/one").iterdir())
    cli.main(["report", "results/one", "--out", "elsewhere/report", "--threshold", "0"])
    assert sorted(path.name for path in Path("results/one").iterdir()) == before
    assert (tmp_path / "elsewhere/report/report.html").stat().st_size > 10_000


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As in `ncollapse --help | head`."""
    command = [sys.executable, "-m", "ncollapse.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate()
    assert (process.returncode, said) == (141, "")


def test_a_reader_that_has_gone_while_a_table_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor"])
    assert stop.value.code == 141


def test_an_unforeseen_error_is_one_line_and_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bug(*args: object) -> object:
        raise ZeroDivisionError("a [bug]\x1b[31m")

    monkeypatch.setattr(cli, "load_grid", bug)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = fails(capsys, 3, "sweep", "grid.toml")
    assert text.startswith(
        "ncollapse: an error that ncollapse did not foresee: ZeroDivisionError: a [bug]\\x1b[31m. Its"
    )
    (log,) = tmp_path.glob("ncollapse-*.log")
    assert str(log) in text
    assert "in bug" in log.read_text()


@pytest.mark.parametrize("name", ["out[/b]", "out[red]x", "out\x1b[31m"])
def test_paths_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], name: str) -> None:
    cli.main(["sweep", "grid.toml", "--device", "cpu", "--out", name])
    cli.main(["status", name])
    shown = capsys.readouterr().out
    assert name.replace("\x1b", "\\x1b") in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_ends_with_two_commands_that_are_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert not stop.value.code
    text, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    lines = examples.splitlines()
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(re.search(r"ncollapse [^>)]+(?=$| >|\))", line)[0])  # type: ignore[index]
        assert words[1] == command
        assert isinstance(cli.parse(words[1:]), cli.COMMANDS[command])
    ragged = [line for line in [*text.splitlines(), *lines] if len(line) > 80 or re.fullmatch("│ *│", line)]
    assert ragged == []


def test_the_overview_shows_every_command_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert re.findall(r"^│ (\w+)", text, re.M) == list(cli.COMMANDS)
    assert "--version" in text
    assert max(map(len, text.splitlines())) == 80


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {}
    for shell in ("bash", "zsh", "fish"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["completion", shell])
        assert not stop.value.code
        scripts[shell] = capsys.readouterr().out
    assert scripts["zsh"].startswith("#compdef ncollapse\n")
    assert "complete --no-files --command $_prog_basename" in scripts["fish"]

    def completed(*words: str) -> set[str]:
        line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _tyro_ncollapse"
        script = f"{scripts['bash']}\n{line}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    assert completed("ncollapse", "re") == {"report", "rerun"}
    assert completed("ncollapse", "sweep", "demo", "--weight") == {"--weight-decay"}
    assert completed("ncollapse", "run", "--precision", "b") == {"bf16"}


def test_options_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """The options of every command are frozen: scripts of users depend on them."""
    settings = [
        *("--model", "--data", "--optimizer", "--lr", "--momentum", "--weight-decay", "--coupling", "--beta2", "--eps"),
        *("--epochs", "--batch-size", "--lr-drops", "--lr-drop-factor", "--seed", "--limit", "--eval-every"),
        *("--width", "--precision", "--augment", "--layers", "--loss", "--label-smoothing", "--head", "--pad"),
        *("--model-options", "--data-options", "--optimizer-options", "--loss-options"),
    ]
    place = ["--out", "--data-dir", "--download", "--device", "--stream"]
    keeping = [
        *("--save-weights", "--tensorboard", "--checkpoint-minutes", "--minutes", "--metrics", "--accept-changes"),
    ]
    engine = ["--engine", "--stack", "--workers", "--ray-address", "--stop-hopeless"]
    source = place[1:]
    choice = ["--threshold", "--best-by"]
    for command, options in {
        "run": [*place, *keeping, *settings, "--preset"],
        "sweep": [*place, *keeping, *engine, *choice, *settings, "--where", "--shard", "--dry-run"],
        "rerun": [*source, *keeping, *engine, *choice, *settings, "--where", "--code-dir"],
        "merge": ["--out", "--keep-first"],
        "demo": [*place, *keeping, *engine, *choice],
        "status": ["--watch", "--json"],
        "report": [*choice, "--out"],
        "export": ["--format", "--out"],
        "check": ["--salvage"],
        "doctor": ["--data-dir"],
        "bench": ["--device", "--seconds", "--json"],
    }.items():
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert set(re.findall(r"^[│ ] {1,2}(?:-h, )?(--[a-z][a-z0-9-]+)", text, re.M)) == {"--help", *options}, command
        assert "(default: None)" not in text


def test_doctor_shows_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for what in ("torch", "Triton", "GPU", "processor", "data fashion-mnist", "missing"):
        assert what in out


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(capsys: pytest.CaptureFixture[str], option: str) -> None:
    cli.main([option])
    assert re.fullmatch(r"ncollapse \d+\.\d+\.\d+\n", capsys.readouterr().out)
