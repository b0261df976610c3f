"""The report of runs with optimizers, losses and metrics of the user's, and of one that has failed."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from csv_files import read_csv_exactly
from ncollapse.formatting import number
from ncollapse.optimizer_table import FOREIGN_COLOURS
from ncollapse.plot.looks import about_lines, choose_looks, look_of, ordered, shown, with_variants
from ncollapse.plot.settings import described
from ncollapse.plot.style import line, marker
from ncollapse.train.config import RunConfig
from ncollapse.train.report.best import nc0_by_decay
from ncollapse.train.report.coupling import interpolations
from ncollapse.train.report.page.write import parts_of, write_report
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.terminal import print_run
from ncollapse.train.results.reader import load_runs
from planted import plant, usual

ALL = Selection(threshold=0.0)
SOAP, NADAM = "pytorch_optimizer:SOAP", "torch.optim:NAdam"
CODE = {"code": "pytorch_optimizer=3.1"}


def value(run: RunConfig, name: str, epoch: int) -> float:
    return 7.125 + run.seed if name == "margin" else usual(run, name, epoch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four optimizers, one with two options, two losses, a metric of the user's, a failed run."""
    folder = tmp_path_factory.mktemp("own")
    runs = [
        RunConfig(**settings, weight_decay=decay, loss=loss, epochs=2)
        for settings in (
            {"optimizer": "adam"},
            {"optimizer": "adam", "coupling": 0.5},
            {"optimizer": "adamw"},
            {"optimizer": NADAM},
            {"optimizer": SOAP, "optimizer_options": {"precondition_frequency": 1, "eps": 0.5}, **CODE},
            {"optimizer": SOAP, "optimizer_options": {"precondition_frequency": 10, "eps": 0.5}, **CODE},
        )
        for decay in (5e-4, 5e-2)
        for loss in ("cross_entropy", "mse")
    ]
    bad = RunConfig(optimizer=NADAM, lr=99.0, epochs=2)
    plant(folder, [*runs, bad], {"margin": "smallest margin"}, value=value, failed=[bad])
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The page, the folder that it is in, and what the terminal shows."""
    out, shown = tmp_path_factory.mktemp("page"), io.StringIO()
    text = write_report(folder, ALL, Console(file=shown, width=120), out).read_text("utf-8")
    return text, out, shown.getvalue()


def test_a_part_for_each_loss(page: tuple[str, Path, str]) -> None:
    assert re.findall(r'<h2 id="[^"]+">(.*?)</h2>', page[0]) == [
        "Findings",
        "mlp on digits",
        "mlp on digits, mse",
        "What was run",
    ]


def test_the_tables_have_every_optimizer_and_metric(page: tuple[str, Path, str], folder: Path) -> None:
    text, out, _ = page
    best = read_csv_exactly(out / "tables" / "best-mlp-digits.csv")
    variants = [f'{SOAP} {{"eps": 0.5, "precondition_frequency": {f}}}' for f in (1, 10)]
    assert best.optimizer.tolist() == ["adam", "adamw", NADAM, *variants]
    runs = load_runs(folder)
    nadam = runs[(runs.optimizer == NADAM) & (runs.loss == "cross_entropy") & (runs.status == "done")]
    assert best.nc0[2] == nadam.nc0.min()
    assert best.margin.tolist() == [7.125] * 5
    assert best.nc0_predicted.isna().all()
    assert best.settings[3].startswith("lr=0.1 β=0.9 λ=0.0005 eps=0.5 precondition_frequency=1")
    assert '<button type="button">margin</button>' in text
    assert f'data-value="7.125">{number(7.125)}' in text
    for label in ("NAdam", "SOAP precondition_frequency=1", "SOAP precondition_frequency=10"):
        assert f"</i>{label}</td>" in text
    assert (out / "figures" / "own-mlp-digits.svg").is_file()
    assert "margin: smallest margin" in text


def test_what_was_run_counts_the_failed_run(page: tuple[str, Path, str]) -> None:
    text, out, _ = page
    table = pd.read_csv(out / "tables" / "runs-by-optimizer.csv")
    assert table.loss.unique().tolist() == ["cross_entropy", "mse"]
    assert table[table.optimizer == NADAM].failed.tolist() == [1, 0]
    assert table.reached.sum() == table.runs.sum() - 1
    assert "1 of 13 runs failed: code of your own raised an error" in text
    settings = pd.read_csv(out / "tables" / "grid.csv").set_index("setting")["values"]
    assert settings.optimizer == f"adam, adamw, {NADAM}, {SOAP}"
    assert settings.loss == "cross_entropy, mse"


def test_only_what_has_a_coupling_is_compared_by_it(folder: Path) -> None:
    part = parts_of(read_results(folder), ALL)[1]
    rows = interpolations(part.runs, ALL)
    assert rows.optimizer.unique().tolist() == ["adam"]
    assert rows.loss.unique().tolist() == ["mse"]
    # All losses together: still at equal loss.
    together = interpolations(load_runs(folder), ALL)
    assert (together.groupby("group").loss.nunique() == 1).all()
    decays = nc0_by_decay(part.runs, ALL)
    assert decays[decays.optimizer == NADAM].runs.sum() == 2


def test_the_pages_lines_have_classes_and_colours_of_their_own(page: tuple[str, Path, str]) -> None:
    text = page[0]
    classes = dict(re.findall(r"td i\.(line-\d) \{ border-top: 3px (\w+ var\(--\w+\)); \}", text))
    assert list(classes) == [f"line-{i}" for i in range(5)]
    assert len(set(classes.values())) == 5
    assert [look.partition(" ")[0] for look in classes.values()] == ["solid", "dashed", "dotted", "dotted", "dotted"]
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= set(re.findall(r"--(\w+):", text))
    assert sum(name.startswith("other") for name in used) == 3


def test_the_terminal_names_them_too(page: tuple[str, Path, str], folder: Path) -> None:
    assert "NAdam" in page[2]
    assert "7.12" in page[2]
    out, run = io.StringIO(), load_runs(folder).iloc[6]
    print_run(folder, run.id, Console(file=out, width=100))
    assert re.search(r"margin +│ +7\.12 │ +7\.12", out.getvalue())


def test_each_has_a_look_of_its_own_and_labels_differ() -> None:
    names = ["torch.optim:Adam", "a:Adam", "adam", "a.py:X", "b.py:X", *(f"m:O{i}" for i in range(4))]
    found = choose_looks(names)
    assert len({look.label for look in found.values()}) == len(names)
    assert found["adam"].label == "Adam"
    assert found["torch.optim:Adam"].label == "torch.optim:Adam"
    assert len({look.colour for look in found.values() if look.foreign}) == len(FOREIGN_COLOURS)
    assert len(choose_looks(f"m:O{i}" for i in range(30))) == 30
    with shown(names):
        assert look_of("a.py:X") == found["a.py:X"]
    assert look_of("a.py:X").label == "X"
    assert ordered(["b:Z", "sgdw", "a:Y", "sgd"]) == ["sgd", "sgdw", "a:Y", "b:Z"]
    assert "dash-dotted" not in about_lines(["sgd"])
    assert "dash-dotted" in about_lines(["sgd", "a:Y"])
    nan = float("nan")
    assert line("a:Y", nan)["linestyle"] not in (line("adam", 1.0)["linestyle"], line("adam", 0.0)["linestyle"])
    assert marker("a:Y", nan, reached=True)["marker"] not in "oD"


def test_runs_that_have_all_failed(tmp_path: Path) -> None:
    bad = [RunConfig(optimizer=NADAM, seed=seed, lr=lr, epochs=2) for seed in range(2) for lr in (0.1, 0.2)]
    plant(tmp_path, bad, {"margin": "smallest margin"}, failed=bad)
    text = write_report(tmp_path, ALL, Console(quiet=True)).read_text("utf-8")
    assert "4 of 4 runs failed" in text
    assert "no run ended well" in text


def test_an_optimizer_with_many_options_is_one(folder: Path) -> None:
    runs = load_runs(folder).head(10).assign(optimizer=SOAP, coupling=float("nan"))
    runs["optimizer_options"] = [f'{{"k": {i}}}' for i in range(10)]
    assert with_variants(runs).optimizer.unique().tolist() == [SOAP]
    assert " k=3 loss=mse" in described(runs)[3]
    assert with_variants(runs.head(3)).optimizer.tolist() == [f'{SOAP} {{"k": {i}}}' for i in range(3)]


def test_long_and_similar_names_lead_to_different_files(folder: Path) -> None:
    results = read_results(folder)
    names = ["a/b.py:N", "a-b.py:N", f"{'x' * 290}.py:N", f"{'x' * 290}.py:M", "é:é", "../../x.py:N"]
    results.runs["model"] = [names[i % len(names)] for i in range(len(results.runs))]
    results.runs["loss"] = "cross_entropy"
    slugs = [part.slug for part in parts_of(results, ALL)]
    assert len({slug.lower() for slug in slugs}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,90}", slug) for slug in slugs)
