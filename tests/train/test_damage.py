"""Damaged results folders and grids: refused in one sentence; `ncollapse check` names what."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import whole_inputs
from ncollapse.train import cli
from ncollapse.train.commands.status import read_status
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.errors import CheckpointError, DamageError, NoResultsError, UserError
from ncollapse.train.grid import load_grid, run_settings
from ncollapse.train.report.page.write import write_report
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.checkpoint_file import read_checkpoint, seal
from ncollapse.train.results.reader import load_meta, load_metrics, load_runs
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import ASIDE, Store
from sweep_results import assert_same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stacks of two runs: one has ended, one is at its checkpoint of an epoch; with weights."""
    return Path(shutil.copytree(whole_inputs.whole_store(), tmp_path / "results"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = Path(shutil.copytree(whole_inputs.whole_store(), tmp_path_factory.mktemp("finished") / "results"))
    go_on(out)
    return out


def go_on(folder: Path) -> int:
    options = Options(workers=1, checkpoint_minutes=0, save_weights=True)
    return sweep(whole_inputs.GRID, folder, whole_inputs.digits, whole_inputs.CPU, options, Console(quiet=True))


def alter(folder: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


def checked(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[str, int]:
    code = 0
    try:
        cli.main(["check", *map(str, args)])
    except SystemExit as stop:
        code = int(str(stop.code))
    captured = capsys.readouterr()
    return captured.out + captured.err, code


def test_a_whole_folder_is_said_to_be_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(capsys, folder) == (f"Whole: {FILE}, 4 run(s), 1 checkpoint(s), 2 file(s) of weights\n", 0)


@pytest.mark.parametrize("left", ["checkpoints", "weights"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_lost_database_beside_files_of_runs_is_no_new_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], left: str, gone: bool
) -> None:
    for other in {"checkpoints", "weights"} - {left}:
        shutil.rmtree(folder / other)
    before = sorted((folder / left).iterdir())
    (folder / FILE).unlink()
    if not gone:
        (folder / FILE).touch()
    for act in (lambda: go_on(folder), lambda: load_runs(folder), lambda: read_status(folder)):
        with pytest.raises(DamageError, match=f"missing or empty, but {left}/ hold files of runs"):
            act()
    assert sorted((folder / left).iterdir()) == before
    text, code = checked(capsys, folder)
    assert (code, "missing or empty" in text) == (1, True)


def test_an_empty_folder_is_new(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    with pytest.raises(NoResultsError):
        load_runs(tmp_path)
    assert go_on(tmp_path) == 4


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("UPDATE stacks SET checkpoint = '../../outside.pt' WHERE checkpoint IS NOT NULL", "'../../out"),
        ("UPDATE stacks SET checkpoint_epoch = 999 WHERE checkpoint IS NOT NULL", "of epoch 999"),
        ("UPDATE runs SET status = 'great' WHERE position = 1", "has the status 'great'"),
        ("UPDATE runs SET stack = 77 WHERE position = 1", "in the stack 77, which does not exist"),
        ("DROP TABLE layers", "it has no table layers"),
        ("CREATE TRIGGER t AFTER UPDATE ON runs BEGIN DELETE FROM metrics; END", "which no ncollapse has put there"),
    ],
)  # fmt: skip
def test_what_no_sweep_has_written_is_refused_everywhere(folder: Path, sql: str, message: str) -> None:
    outside = folder.parent / "outside.pt"
    outside.write_text("kept")
    alter(folder, sql)
    for act in (lambda: go_on(folder), lambda: load_runs(folder), lambda: read_status(folder)):
        with pytest.raises(DamageError, match=message) as error:
            act()
        assert "`ncollapse check" in str(error.value)
    assert outside.read_text() == "kept"


@pytest.mark.parametrize(
    ("sql", "act", "message"),
    [
        ("UPDATE meta SET value = '{' WHERE key = 'engine'", read_status, "no plan"),
        ("UPDATE meta SET value = '{}' WHERE key = 'engine'", go_on, "no plan: KeyError"),
        ("UPDATE meta SET value = replace(value, '\"workers\": 1', '\"workers\": 99999')", go_on, "no plan: .99999"),
        ("DELETE FROM meta WHERE key = 'grid'", load_meta, "the grid's name"),
        ("UPDATE sessions SET provenance = '[[['", read_status, "no readable provenance"),
        ("UPDATE sessions SET started = 'now'", read_status, "no readable start"),
        ("UPDATE stacks SET updated = 'x'", read_status, "the time of a stack's progress"),
        ("UPDATE stacks SET epoch = 'x'", read_status, "the progress of a stack is no number"),
        ("UPDATE runs SET epochs = 5.5 WHERE position = 0", load_runs, "epochs is not an integer everywhere"),
        ("UPDATE runs SET lr = -1", load_runs, "holds runs with lr = -1.0: input should be greater than 0"),
        ("UPDATE runs SET optimizer = 'adamax' WHERE position = 0", load_runs, "unknown optimizer 'adamax'"),
        ("UPDATE runs SET model = 'mine' WHERE position = 0", load_runs, "unknown model 'mine'"),
        ("UPDATE runs SET optimizer = 'a:B' WHERE position = 0", load_runs, "coupling = 1 of a:B"),
        ("UPDATE runs SET coupling = NULL WHERE position = 0", load_runs, "coupling = nan of sgd"),
        ("UPDATE runs SET head = 'fc'", load_runs, "head goes with a model of your own"),
        ("UPDATE metrics SET nc1 = 'x' WHERE epoch = 0", load_metrics, "is damaged: "),
        ("UPDATE metrics SET nc1 = x'ff' WHERE epoch = 0", load_metrics, "is damaged: "),
    ],
)
def test_broken_contents_are_one_sentence(folder: Path, sql: str, act: Callable[[Path], Any], message: str) -> None:
    alter(folder, sql)
    with pytest.raises(UserError, match=message) as error:
        act(folder)
    assert "\n" not in str(error.value)


def test_a_changed_number_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The database's own check does not see it: every page is whole."""
    done = load_runs(folder).query("status == 'done'").id.iloc[0]
    alter(folder, f"UPDATE metrics SET nc1 = nc1 * (1 + 1e-15) WHERE run = '{done}' AND epoch = 2")
    text, code = checked(capsys, folder)
    assert code == 1
    assert f"Damaged: run '{done}': its numbers have changed since they were measured" in text
    assert text.count("Damaged") == 1
    assert "1 things in" in text


def test_what_can_be_read_is_salvaged_and_continued(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = load_runs(folder).query("status == 'done'").id.tolist()
    alter(
        folder,
        f"DELETE FROM metrics WHERE run = '{done[0]}' AND epoch = 2",
        "UPDATE sessions SET provenance = 'x'",
        "UPDATE stacks SET checkpoint = 'x' WHERE checkpoint IS NULL",
    )
    out = folder.parent / "salvaged"
    text, code = checked(capsys, folder, "--salvage", out)
    assert code == 0
    assert "1 finished runs, 3 to be trained, 1 weights, 1 checkpoints; 0 runs are lost" in text
    assert f"Damaged: run '{done[0]}': it is done, but evaluations are missing" in text
    assert checked(capsys, out)[1] == 0
    assert go_on(out) == 3
    assert_same(finished, out)
    assert checked(capsys, folder, "--salvage", out)[1] == 1  # never over something that exists


def test_a_damaged_page_costs_no_more_than_its_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / FILE).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - 4096)
        file.write(bytes(4096))
    text, code = checked(capsys, folder, "--salvage", folder.parent / "salvaged")
    assert code == 0
    assert f"Damaged: {FILE}: " in text
    assert len(load_runs(folder.parent / "salvaged")) == 4


@pytest.mark.parametrize("how", ["flipped", "cut", "of another epoch", "without its line", "gone"])
def test_a_checkpoint_that_cannot_be_used_is_kept_aside_and_said(
    folder: Path, finished: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (folder / "checkpoints").glob("*.pt")
    epoch, content = int(path.stem.partition("-")[2]), path.read_bytes()
    inner = read_checkpoint(path, epoch)
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    new = {
        "flipped": bytes(damaged), "cut": content[:-1], "of another epoch": seal(inner, epoch + 1),
        "without its line": b"x" + content,
    }  # fmt: skip
    path.unlink() if how == "gone" else path.write_bytes(new[how])
    text, code = checked(capsys, folder)
    assert (code, f"Damaged: checkpoints/{path.name}: " in text) == (1, True)
    assert go_on(folder) == 2
    assert_same(finished, folder)
    aside = folder / "checkpoints" / ASIDE / path.name
    assert aside.is_file() == (how != "gone")
    if how != "gone":
        assert aside.read_bytes() == new[how]
        with pytest.raises(CheckpointError):
            read_checkpoint(aside, epoch)


def test_only_the_stores_own_files_are_tidied(folder: Path) -> None:
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "9-9.pt").write_text("left by a kill")
    with Store(folder, whole_inputs.GRID):
        pass
    assert (folder / "checkpoints" / "notes.txt").exists()
    assert not (folder / "checkpoints" / "9-9.pt").exists()


@pytest.mark.parametrize("name", [".lock", "checkpoints", "weights"])
def test_a_folder_does_not_lead_elsewhere_by_links(folder: Path, name: str) -> None:
    path, elsewhere = folder / name, folder.parent / "elsewhere"
    path.rename(elsewhere) if path.exists() else elsewhere.touch()
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        Store(folder, whole_inputs.GRID)


def test_a_report_is_written_into_its_own_folder(finished: Path, tmp_path: Path, quiet: Console) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "results"))
    (tmp_path / "outside").write_text("kept")
    (folder / "report.html").symlink_to(tmp_path / "outside")
    write_report(folder, Selection(threshold=0), quiet)
    assert (tmp_path / "outside").read_text() == "kept"
    assert not (folder / "report.html").is_symlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = true", "lr = True: input should be a valid number"),
        ("lr = '0.1'", "lr = '0.1': input should be a valid number"),
        ("epochs = 5.0", "epochs = 5.0: input should be a valid integer"),
        ("lr = [[0.1]]", r"lr = \[0.1\]: one value is meant here, not a list"),
        ("momentum = nan", "finite number"),
        ("lr_drops = 300000000", "less than or equal to 1000"),
        ("limit = 9223372036854775808", "less than or equal to 2147483647"),
        ("seed = 9223372036854775808", "less than 9223372036854775808"),
        ("width = 18446744073709551616", "less than or equal to 16384"),
        ("lr = [" + "0.1," * 500 + "]\nseed = [" + "1," * 500 + "]", "more than 200,000 runs"),
        ("lr = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("lr = 1" + "0" * 5000, "not valid TOML: Exceeds the limit"),
        ("#" * 300_000, "more than 262,144 bytes"),
        ("name = ''", "cannot be the name of a results folder"),
        ("name = '../../x'", "cannot be the name of a results folder"),
        ("name = '/abs'", "cannot be the name of a results folder"),
        ('name = "\\u001b[31m"', "cannot be the name of a results folder"),
        ("name = ['a']", "cannot be the name of a results folder"),
        ("description = 5", "must be text"),
        ("run = 5", r"it must be a table, begun with \[run\]"),
        ("[run.sdg]\nlr = 3.0", r"\[run\]: unknown optimizer 'sdg', did you mean 'sgd'\?"),
        ("[run.adam]\nlr = -1", r"\[run.adam\]: lr = -1"),
        ("[run]\nlr = [0.1]", r"\[run\]: lr = \[0.1\]: one value is meant here"),
        ("[[grid]]\n[[grid.grid]]\nlr = 1", r"\[\[grid\]\] 1: unknown key 'grid'"),
    ],
)
def test_a_grid_is_not_believed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "g.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_grid(str(path))


def test_a_grid_may_begin_with_a_byte_order_mark_and_is_text_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_bytes(b"\xef\xbb\xbflr = 0.2\r\nweight_decay = -0.0\r\n[run]\r\nlr = 0.3\r\n")
    (run,) = load_grid(str(path)).runs
    assert (run.lr, str(run.weight_decay)) == (0.2, "0.0")
    assert run_settings(str(path), {})["lr"] == 0.3
    path.write_bytes("lr = 0.1".encode("utf-16"))
    with pytest.raises(UserError, match="a grid is text in UTF-8, this is not"):
        load_grid(str(path))
    for source in (str(tmp_path), "/dev/zero", "x" * 5000, ""):
        with pytest.raises(UserError, match="neither a file nor a preset"):
            load_grid(source)
