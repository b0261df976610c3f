"""Damaged and hostile inputs of every kind that is read from disk or typed, and what may come of each.

A trial makes one input from a source of random numbers, hands it to what reads it, and asserts: it is taken, or refused
with a `UserError`; no file outside its folder has changed; what is said to be whole has the numbers of the undamaged
one. `tests/train/test_fuzz.py` runs a few hundred, `bench/fuzz.py` as many as it is given time for.
"""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ncollapse.train import cli
from ncollapse.train.commands.check import print_check
from ncollapse.train.commands.status import print_status, read_status
from ncollapse.train.config import FIELDS, make_run
from ncollapse.train.data.sets import load
from ncollapse.train.engine.planning import device_of
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid, load_grid, plugins_beside, presets, run_settings
from ncollapse.train.plugins import with_code
from ncollapse.train.results import schema
from ncollapse.train.results.checkpoint_file import seal, unseal
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.reader import load_layers, load_metrics, load_runs, load_sessions
from ncollapse.train.results.writer import Store
from ncollapse.train.training.checkpoints import serialised
from ncollapse.train.training.loop import Training
from whole_inputs import CPU, GRID, digits, whole_checkpoint, whole_images, whole_store

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -0.0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, 1e308, 5e-324, math.nan, math.inf, "",
    "0.1", "sgd", "done", "running", "../../x", "/etc/passwd", "[/red]", "\x1b[31m", "é\u202e", "a\nb", "x" * 300, [],
    [1], [[0.1]], {}, {"a": 1}, "mine.py:Net", "mine.py:Nett", "torch.optim:NAdam", "mine.py:", ":x", "x.npz", "net",
    '{"depth": [1]}', "{", "mine.py=0; mine.py=1",
)  # fmt: skip
#: Code of the user's beside a grid.
_MINE = "class Net:\n    def __init__(self, depth=1):\n        raise SystemExit\n"
_QUIET = Console(quiet=True)


# Damage.


def damage(content: bytes, random: Random, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Change bytes in one to three places: flips, cuts, insertions, repetitions, zeros, tokens."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, size = random.randrange(len(data) + 1), random.choice((1, 2, 16, 512, 4096))
        kind = random.randrange(7 if tokens else 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = random.randbytes(min(size, 64))
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == 5 and random.random() < 0.3:
            del data[at:]
        elif kind == 6:
            data[at:at] = random.choice(tokens)
    return bytes(data)


def _snapshot(root: Path, but: Path) -> dict[str, Any]:
    """Name, size and time of every file below a folder, except for those below another one."""
    found = {}
    for path, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(path, name) != but]
        for name in files:
            status = os.lstat(Path(path, name))
            found[str(Path(path, name))] = status.st_size, status.st_mtime_ns
    return found


@contextlib.contextmanager
def _nothing_else_touched(case: Path, own: Path) -> Iterator[None]:
    for name in ("x", "outside/x", "outside/runs.sqlite"):
        (case / name).parent.mkdir(exist_ok=True)
        (case / name).write_text("kept")
    before = _snapshot(case, own)
    yield
    assert _snapshot(case, own) == before, "a file outside the folder has changed"


@contextlib.contextmanager
def _modules_forgotten() -> Iterator[None]:
    """Forget the user's modules that were imported, and the folders in which they were looked for."""
    with mock.patch.object(sys, "path", list(sys.path)):
        yield
    for name in [name for name in sys.modules if name.startswith("ncollapse_own_")]:
        del sys.modules[name]


def _said(act: Callable[[], object]) -> str:
    """Return "taken" or "refused"; anything but a UserError goes through."""
    try:
        act()
    except UserError:
        return "refused"
    return "taken"


# The kinds of trials.


def grid(random: Random, case: Path) -> str:
    """A grid file: a preset or a made-up one, damaged."""
    path = case / "g.toml"
    (case / "mine.py").write_text(damage(_MINE.encode(), random).decode("latin-1") if random.random() < 0.2 else _MINE)
    if random.random() < 0.5:
        text = damage(random.choice(_GRIDS).encode(), random, _TOKENS)
    else:
        text = _made_up(random).encode("utf-8", "surrogatepass")
    path.write_bytes(text)

    def act() -> None:
        found = load_grid(str(path), {"lr": [0.1]} if random.random() < 0.2 else None)
        assert (case / found.name).resolve().parent == case.resolve()
        assert len({run.id for run in found.runs}) == len(found.runs)
        for run in found.runs[:50]:
            assert make_run(run.as_dict(), "again") == run
            assert all(isinstance(run.lr_factor(epoch), float) for epoch in (0, run.epochs - 1))

    def one() -> None:
        make_run(with_code(run_settings(str(path), {}), plugins_beside(str(path))), "run")

    with _modules_forgotten():
        said = _said(act)
        _said(one)
    return said


_GRIDS = (
    *presets().values(),
    'name="a"\nlr=[0.1,0.2]\n[run]\nlr=0.1\n[run.sgd]\nlr=0.3\n',
    'model="mine.py:Net"\nmetrics=["mine.py:Net"]\n[model_options]\ndepth=[1,2]\n[run]\noptimizer="torch.optim:NAdam"\n',
    "\ufefflr=[1,2]\n",
    "",
)
_TOKENS = (
    b"\xef\xbb\xbf", b"\x00", b"\xff\xfe", b"[[grid]]\n", b"[run.sdg]\n", b"[" * 500, b"a." * 500, b"= true\n",
    b"= [[1]]\n", b"'../../x'", b"1" + b"0" * 5000, b"lr_drops = 300000000\n", b"inf", b"2020-01-01",
    b"name = '/abs'\n",
)  # fmt: skip


_HEADS = (
    "[[grid]]", "[run]", "[run.adam]", "[run.sdg]", "[grid.x]", "[model_options]", '[model_options."mine.py:Net"]',
    '[optimizer_options."torch.optim:NAdam"]', "[loss_options.focal]", "[grid.data_options]",
)  # fmt: skip


def _made_up(random: Random) -> str:
    names = [field.name for field in FIELDS] + ["name", "description", "grid", "run", "learning_rate"]
    names += ["metrics", "in_memory", "depth"]

    def value() -> str:
        one = random.choice(NASTY)
        return json.dumps([one] * random.randrange(3) if random.random() < 0.3 else one, ensure_ascii=False)

    lines = [f"{random.choice(names)} = {value()}" for _ in range(random.randrange(5))]
    for _ in range(random.randrange(3)):
        head = random.choice(_HEADS)
        lines += [head, *(f"{random.choice(names)} = {value()}" for _ in range(random.randrange(3)))]
    return "\n".join(lines).replace("null", "nan").replace("NaN", "nan").replace("Infinity", "inf")


def option(random: Random, case: Path) -> str:
    """A command line: options with values that are none."""
    (case / "g.toml").write_text("lr = 0.1\n")
    (case / "mine.py").write_text(_MINE)
    names = [
        "out",
        "data-dir",
        "device",
        "checkpoint-minutes",
        "engine",
        "stack",
        "workers",
        "ray-address",
        "threshold",
        "minutes",
        "stop-hopeless",
        "where",
        "shard",
        "metrics",
        "stream",
        "accept-changes",
    ]
    names += ["best-by", "nonsense", *(field.name.replace("_", "-") for field in FIELDS)]
    words = ["run"] if random.random() < 0.5 else ["sweep", random.choice(("demo", "g.toml", "../x", "\x1b[31m"))]
    for _ in range(random.randrange(1, 4)):
        words += [f"--{random.choice(names)}", str(random.choice(NASTY))]
    out = io.StringIO()
    with (
        contextlib.chdir(case), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out),
        mock.patch.object(cli, "_train", _parsed), mock.patch.object(cli, "_report"), mock.patch("signal.signal"),
        _modules_forgotten(),
    ):  # fmt: skip
        code: Any = 0
        try:
            cli.main(words)
        except SystemExit as stop:
            code = stop.code
        except _Parsed:
            pass
    assert code in (0, 1, 2), (words, out.getvalue())
    assert "\x1b" not in out.getvalue() or code == 2  # the parser of options writes its own colours
    return "refused" if code else "taken"


class _Parsed(BaseException):
    pass


def _parsed(grid: Grid, out: Any, source: Any, options: Any, console: Console) -> Path:
    device_of(source.device, options.engine)
    raise _Parsed


def store(random: Random, case: Path) -> str:
    """A results folder: bytes, rows, columns, tables, files damaged."""
    folder = case / "results"
    shutil.copytree(whole_store(), folder)
    for _ in range(random.choice((1, 1, 2))):
        _damage_store(folder, random)
    said = set()
    with _nothing_else_touched(case, folder):
        for read in (load_runs, load_metrics, load_layers, load_sessions):
            said.add(_said(lambda read=read: read(folder)))  # type: ignore[misc]
        said.add(_said(lambda: print_status(read_status(folder), _QUIET)))
    out = case / "salvaged"
    with _nothing_else_touched(case, out):
        _assert_whole_is_unchanged(folder)
        if _said(lambda: print_check(folder, out, _QUIET)) == "taken":
            for read in (load_runs, load_metrics, load_layers, load_sessions):
                read(out)
            _assert_unchanged(out, set(load_runs(out).id))
            said.add(_said(lambda: _open(out)))
    with _nothing_else_touched(case, folder):
        said.add(_said(lambda: _open(folder)))
    return "refused" if "refused" in said else "taken"


def _open(folder: Path) -> None:
    with Store(folder, GRID) as opened:
        opened.stacks(), opened.engine(), opened.finished(), opened.begun()


def _assert_whole_is_unchanged(folder: Path) -> None:
    with contextlib.suppress(UserError):
        findings = list(inspect_folder(folder))
        broken = {finding.what.removeprefix("run ").strip("'") for finding in findings if finding.problem}
        whole = {finding.what.removeprefix("run ").strip("'") for finding in findings if not finding.problem}
        if "runs.sqlite" in whole and not any(name in ("the plan", "evaluations") for name in broken):
            _assert_unchanged(folder, whole)


def _assert_unchanged(folder: Path, runs: set[str]) -> None:
    """Finished runs that are said to be whole have the numbers of the undamaged folder."""
    try:
        mine = load_metrics(folder)
        states = load_runs(folder).set_index("id").status
    except UserError:
        return
    theirs = load_metrics(whole_store())
    for run in runs & set(states.index[states.isin(schema.FINISHED)]):
        one, other = (frame[frame.run == run].reset_index(drop=True) for frame in (mine, theirs))
        assert one.equals(other), f"run {run} is said to be whole, but has other numbers"


def _damage_store(folder: Path, random: Random) -> None:
    file = folder / schema.FILE
    kind = random.randrange(10)
    if kind == 0:
        file.write_bytes(random.choice((b"", random.randbytes(5000), b"SQLite format 3\0", file.read_bytes()[:5000])))
    elif kind in (1, 2, 3):
        file.write_bytes(damage(file.read_bytes(), random))
    elif kind == 4:
        victim = random.choice([*folder.glob("checkpoints/*"), *folder.glob("weights/*")])
        victim.unlink() if random.random() < 0.2 else victim.write_bytes(damage(victim.read_bytes(), random))
    else:
        # Python cannot read every message with which SQLite refuses a damaged file.
        refusals = contextlib.suppress(sqlite3.Error, UnicodeDecodeError)
        with contextlib.closing(sqlite3.connect(file)) as connection, refusals, connection:
            connection.execute(_damaging_sql(random), (_sql_value(random),))


def _sql_value(random: Random) -> Any:
    one = random.choice(
        (*NASTY, b"\xff\xfe", b"0.5", "2-1.pt", "../../x", "../../outside/x", "{", '{"workers": 10000000}')
    )
    if isinstance(one, (list, dict)):
        return json.dumps(one)
    return str(one) if isinstance(one, int) and abs(one) >= 2**63 else one


def _damaging_sql(random: Random) -> str:
    table = random.choice(list(schema.TABLES))
    column = random.choice(list(schema.TABLES[table]))
    some = random.choice(("", "WHERE rowid = 1", "WHERE rowid = 2")) if table not in ("metrics", "layers") else ""
    if table in ("metrics", "layers") and random.random() < 0.7:
        some = f"WHERE epoch = {random.choice((0, 2, 4))}"
    update = f'UPDATE {table} SET "{column}" = ? {some}'
    others = (
        f"DELETE FROM {table} {some or 'WHERE ? IS NOT 0'}".replace("rowid =", "? IS NOT 0 AND rowid ="),
        f"DROP TABLE {table}", f'ALTER TABLE {table} DROP COLUMN "{column}"', f"ALTER TABLE {table} RENAME TO t",
        "CREATE TRIGGER t AFTER UPDATE ON runs BEGIN DELETE FROM metrics; END", "CREATE VIEW v AS SELECT 1",
        "UPDATE stacks SET checkpoint = '../../outside/x', checkpoint_epoch = 1", "PRAGMA user_version = 9",
        "INSERT INTO metrics (run, epoch) VALUES (?, 7)", "INSERT INTO stacks (id, size) VALUES (99, ?)",
    )  # fmt: skip
    return update if random.random() < 0.7 else random.choice(others)


def checkpoint(random: Random, case: Path) -> str:
    """A checkpoint: its bytes damaged, or well sealed with contents that are damaged."""
    runs, data, epoch = GRID.runs[:2], digits("digits", CPU), 1
    whole = seal(whole_checkpoint(), epoch)
    forged = random.random() < 0.4
    if forged:
        content = torch.load(io.BytesIO(whole_checkpoint()), weights_only=True)
        _forge(content, random)
        file = seal(serialised(content), epoch)
    else:
        file = damage(whole, random)

    def act() -> None:
        content = unseal(file, epoch)
        assert forged or content == whole_checkpoint(), "damaged bytes were taken"
        training = Training(runs, data, CPU, checkpoint=content)
        events = list(itertools.islice(training, 50))
        assert len(events) < 50, "the training does not end"

    return _said(act)


def _forge(content: dict[str, Any], random: Random) -> None:
    key = random.choice(list(content))
    value = content[key]
    if isinstance(value, dict) and value and random.random() < 0.7:
        inner = random.choice(list(value))
        if isinstance(value[inner], dict) and value[inner] and random.random() < 0.7:
            value, inner = value[inner], random.choice(list(value[inner]))
        tensor = value[inner]
        nasty = random.choice(NASTY)
        changed = [nasty, None]
        if isinstance(tensor, torch.Tensor):
            changed += [tensor[:1], tensor.double(), tensor.flatten(), torch.zeros(0), tensor.to(torch.int8)]
        value[inner] = random.choice(changed)
        if random.random() < 0.2:
            del value[inner]
    elif random.random() < 0.2:
        del content[key]
    else:
        content[key] = random.choice((*NASTY, [0], [0, 0], [1, 0], [0, 1, 2], 999, -5, [float("nan")] * 2, {0: 1}))


def image(random: Random, case: Path) -> str:
    """A folder of images: a file or a folder of it damaged."""
    folder = case / "images"
    shutil.copytree(whole_images(), folder)
    victim = random.choice(sorted(folder.rglob("*.png")))
    kind = random.randrange(12)
    rng = np.random.default_rng(random.randrange(2**32))
    if kind < 5:
        victim.write_bytes(damage(victim.read_bytes(), random))
    elif kind == 5:
        mode = random.choice(("L", "1", "P", "RGBA", "LA", "CMYK", "I", "F"))
        suffix = ".png" if mode in ("L", "1", "P", "RGBA", "LA") else ".tiff"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).convert(mode).save(victim.with_suffix(suffix))
    elif kind == 6:
        Image.fromarray(rng.integers(0, 65536, (8, 8), np.uint16)).save(victim)
    elif kind == 7:
        victim.unlink()
        os.symlink(random.choice(("/nonexistent", victim.name, "/etc/passwd", "..")), victim)
    elif kind == 8:
        os.symlink(random.choice((".", "..", "../..")), victim.parent / "loop")
    elif kind == 9:
        victim.unlink()
        os.mkfifo(victim)
    elif kind == 10:
        victim.parent.rename(victim.parent.with_name(random.choice(("[red]", "\x1b[31m", "é", "a b"))))
    else:
        header = b"P6 %d %d 255\n" % (random.choice((8, 70_000, 2**31)), random.choice((8, 70_000)))
        victim.with_suffix(".ppm").write_bytes(header + random.randbytes(192))

    def act() -> None:
        data = load("imagefolder", CPU, data_dir=folder, download=False)
        assert data.train_x.shape[1] == 3
        assert bool(torch.isfinite(data.train_x).all())
        assert len(data.train_y) == len(data.train_x)

    with _nothing_else_touched(case, folder):
        return _said(act)


#: Kind -> its trial, and its share of the trials.
KINDS: dict[str, tuple[Callable[[Random, Path], str], int]] = {
    "grid": (grid, 40), "option": (option, 5), "store": (store, 20), "checkpoint": (checkpoint, 20),
    "image": (image, 15),
}  # fmt: skip


def trial(kind: str, seed: int) -> str:
    """Run one trial in a folder of its own; return "taken" or "refused"."""
    with tempfile.TemporaryDirectory(prefix="case-") as case:
        return KINDS[kind][0](Random(f"{kind} {seed}"), Path(case))
