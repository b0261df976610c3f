"""Pictures of runs: what is drawn is what the frames hold, seeds are one line, and few columns are enough."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ncollapse import plot
from ncollapse.plot.frames import best_of_each, by_seed, complete
from ncollapse.plot.heat_cells import cells_of
from ncollapse.train.config import RunConfig

METRICS = ("nc0", "nc1", "nc2", "nc3", "nc4", "train_loss", "train_accuracy")


def planted(*settings: dict[str, Any], seeds: int = 1, epochs: int = 9) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and their epochs: metric `nc1` of setting k and seed s at epoch e is (k + 1)·(1 + s/10)·2^−e, and so on."""
    runs, rows = [], []
    for k, given in enumerate(settings):
        for seed in range(seeds):
            known = {
                "optimizer": "sgd",
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "epochs": epochs,
                "lr_drops": 2,
            }
            name = f"run{k}-{seed}"
            at = np.arange(epochs + 1)
            values = (k + 1) * (1 + seed / 10) * 2.0**-at
            history = pd.DataFrame({"run": name, "epoch": at} | dict.fromkeys(METRICS, values))
            history["train_accuracy"] = np.minimum(1.0, 0.5 + 0.1 * at)  # 1 from epoch 5
            rows.append(history)
            end = history.iloc[-1]
            runs.append(
                known | {"id": name, "seed": seed, "status": "done", "val_accuracy": 0.9 - k / 100}
                | {metric: end[metric] for metric in METRICS} | given
            )  # fmt: skip
    return pd.DataFrame(runs), pd.concat(rows, ignore_index=True)


def saved(figure: Figure) -> Figure:
    """Return the figure, which can be saved and says what it shows."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=30)
    assert file.getvalue().startswith(b"\x89PNG")
    assert len(str(figure.get_label())) > 50
    return figure


def drawn(figure: Figure, title: str, width: float) -> list[np.ndarray[Any, Any]]:
    """Return the points of the lines of a width in the panel of a title, without gaps."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    points = [np.asarray(line.get_xydata()) for line in axes.lines if line.get_linewidth() == width]
    return [found[np.isfinite(found).all(1)] for found in points if len(found)]


def test_seeds_are_one_line_and_the_best_one_is_thick_with_a_band() -> None:
    runs, epochs = planted({}, {"lr": 0.2}, seeds=3)
    figure = saved(plot.curves(runs, epochs, ["nc1", "train_error"]))
    (thin,) = drawn(figure, "NC1", 0.6)
    (thick,) = drawn(figure, "NC1", 1.7)
    middle = 1.1 * 2.0 ** -np.arange(10)
    np.testing.assert_allclose(thick, np.stack([np.arange(10), middle], 1))
    np.testing.assert_allclose(thin[:, 1], [*middle, *(2 * middle)])
    (band,) = [part for part in figure.axes[0].collections if len(part.get_paths())]
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((2.0**-9, 1.2))
    assert figure.axes[0].get_yscale() == "log"
    assert "the median over the runs that differ only in the seed" in figure.get_label()
    (error,) = drawn(figure, "training error, %", 1.7)
    np.testing.assert_allclose(error[:3, 1], [50, 40, 30])


def test_drops_and_the_first_epoch_without_an_error_are_marked() -> None:
    runs, epochs = planted({}, epochs=10)
    axes = saved(plot.curves(runs, epochs, ["nc3"])).axes[0]
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 0.8 and len(line.get_xdata())]
    assert dotted == [3, 6]  # ⌊10/3⌋ and ⌊20/3⌋
    rings = [line.get_xydata() for line in axes.lines if line.get_marker() == "o" and line.get_markersize() == 6]
    np.testing.assert_allclose(next(ring for ring in rings if len(ring)), [[5, 2.0**-5]])
    other = plot.curves(pd.concat([runs, runs.assign(id="b", epochs=20)]), epochs, ["nc3"])
    assert "they differ between the runs" in other.get_label()
    few = plot.curves(runs[["id", "optimizer"]], epochs[["run", "epoch", "nc3"]])
    assert "learning rate drops" not in few.get_label()


@pytest.mark.parametrize("drops", [2, 5, 20])
def test_drops_are_where_the_trainer_drops(drops: int) -> None:
    config = RunConfig(epochs=4, lr_drops=drops)
    runs, epochs = planted({}, {"lr": 0.2}, epochs=4)
    runs = runs.assign(lr_drops=drops, lr_drop_factor=0.1)
    axes = plot.curves(runs, epochs, ["nc3"]).axes[0]
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 0.8 and len(line.get_xdata())]
    assert dotted == [epoch for epoch in range(1, 4) if config.lr_factor(epoch) < config.lr_factor(epoch - 1)]
    constant = plot.curves(runs.assign(lr_drop_factor=[0.1, 1.0]), epochs, ["nc3"])
    assert "they differ between the runs" in constant.get_label()


def test_of_many_settings_a_sample_is_drawn_and_it_is_said() -> None:
    runs, epochs = planted(*({"lr": 1.0 + i} for i in range(230)), epochs=2)
    figure = saved(plot.curves(runs, epochs, ["nc1"]))
    (thin,) = drawn(figure, "NC1", 0.6)
    assert len(thin) == 200 * 3
    assert "200 of 230 are drawn, evenly chosen, and 30 left out" in figure.get_label()
    assert "Small dots" not in figure.get_label()


def test_a_few_huge_values_do_not_stretch_an_axis() -> None:
    runs, epochs = planted(*({"lr": 1.0 + i} for i in range(20)))
    epochs.loc[105, "nc1"] = 1e9
    figure = plot.curves(runs, epochs, ["nc1", "nc2"])
    assert figure.axes[0].get_ylim()[1] < 100
    assert "leave out a few values that lie far above" in figure.get_label()
    assert "leave out" not in plot.curves(runs, epochs, ["nc2"]).get_label()


def test_a_phase_portrait_goes_from_start_to_end() -> None:
    runs, epochs = planted({}, {"optimizer": "adamw", "coupling": 0.0}, seeds=3)
    epochs["nc0"] = epochs.nc1**2
    figure = saved(plot.phase(runs, epochs))
    for axes, x in zip(figure.axes, ("NC0", "NC3"), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (x, "NC1")
        assert axes.get_xscale() == axes.get_yscale() == "log"
        marks = [line.get_xydata()[0] for line in axes.lines if line.get_markersize() == 6 and len(line.get_xydata())]
        ends = epochs[epochs.run.isin(["run0-1", "run1-1"]) & epochs.epoch.isin([0, 9])]
        np.testing.assert_allclose(marks, ends[[x.lower(), "nc1"]])
    assert [line.get_linestyle() for line in figure.axes[0].lines if line.get_linewidth() == 1.7] != ["-", "-"]


def test_a_cell_is_the_median_over_the_seeds_that_reached_the_threshold() -> None:
    runs, _ = planted({}, {"momentum": 0.5}, {"weight_decay": 0.1}, seeds=3)
    runs.loc[runs["id"] == "run0-0", "train_accuracy"] = 0.2  # one of three missed it
    runs.loc[runs["id"].isin(["run1-0", "run1-1"]), "train_accuracy"] = 0.2  # two of three: the setting missed it
    runs.loc[runs["id"] == "run1-2", "nc1"] = 1e-9
    runs.loc[runs.weight_decay == 0.1, "train_accuracy"] = 0.2
    cells = cells_of(complete("heat_map", runs), "lr", 0.9).set_index("weight_decay")
    seeds = 2.0**-9 * np.array([1.1, 1.2])
    np.testing.assert_allclose(cells.loc[5e-4, ["nc1", "nc1_low", "nc1_high"]].astype(float), [seeds.mean(), *seeds])
    counts = ["done", "reached", "missed", "settings", "settings_reached", "seeds"]
    assert cells.loc[5e-4, counts].tolist() == [6, 3, 3, 2, 1, 3]
    assert cells.nc1[0.1] == pytest.approx(3 * 1.1 * 2.0**-9)
    figure = saved(plot.heat_map(runs, threshold=0.9))
    assert "the median over the seeds" in figure.get_label()
    hatched = [part for part in figure.axes[1].collections if part.get_hatch()]
    assert sum(part.get_array().count() for part in hatched) == 1
    # The number of the hatched cell stands on the cell's colour, the other one on the cell itself.
    numbers = {text.get_text(): text.get_bbox_patch() for text in figure.axes[1].texts}
    assert numbers["6.45e-3"] is not None
    assert numbers["2.25e-3"] is None


@pytest.mark.parametrize(("optimizers", "numbered"), [(2, True), (10, False)])
def test_numbers_are_readable_or_left_out(optimizers: int, numbered: bool) -> None:
    names = ("sgd", "sgdw", "adam", "adamw", "signum", "signumw", "lion", "lionw", "muon", "muonw")[:optimizers]
    runs, _ = planted(*({"optimizer": name, "lr": lr} for name in names for lr in (0.1, 0.2)))
    figure = saved(plot.heat_map(runs))
    texts = [text for text in figure.axes[0].texts if "e-" in text.get_text() and text.get_va() == "center"]
    assert bool(texts) is numbered
    assert ("Numbers are left out" in figure.get_label()) is not numbered
    # At the 608 pixels that the page gives a figure at least, all text has 8 pixels.
    pixels = [608 * text.get_fontsize() / (72 * figure.get_figwidth()) for axes in figure.axes for text in axes.texts]
    assert min(pixels) >= (8 if numbered else 7)


def test_the_lines_over_coupling_and_momentum_are_medians_over_seeds() -> None:
    shares = [{"optimizer": "adam", "coupling": share} for share in (0.0, 0.5, 1.0)]
    runs, _ = planted(*shares, seeds=3)
    figure = saved(plot.over_coupling(runs, ["nc0"]))
    (line,) = drawn(figure, "NC0", 1.8)
    np.testing.assert_allclose(line, [[0, 1.1 * 2.0**-9], [0.5, 2.2 * 2.0**-9], [1, 3.3 * 2.0**-9]])
    assert "band over the range of the seeds" in figure.get_label()
    runs, epochs = planted({"momentum": 0.5}, {"momentum": 0.9}, seeds=3)
    figure = saved(plot.over_momentum(runs, epochs))
    (line,) = drawn(figure, "NC1", 1.3)
    # Both reach 2(1 + s/10)/2⁹: the first at epoch 8 of 9, the second at its end, where their values are equal.
    np.testing.assert_allclose(line, [[0, 2.2 * 2.0**-9], [1, 2.2 * 2.0**-9]])


def test_seeds_are_joined_with_their_median() -> None:
    runs, _ = planted({}, {"lr": 0.2}, seeds=3)
    figure = saved(plot.validation_accuracy(runs, ["nc1"]))
    (joined,) = drawn(figure, "", 0.7)
    np.testing.assert_allclose(sorted(joined[::2, 0]), sorted(runs.nc1))
    assert set(joined[1::2, 0]) == {1.1 * 2.0**-9, 2.2 * 2.0**-9}
    assert "differ only in the seed" in figure.get_label()
    assert "differ only in the seed" not in plot.metric_pairs(runs.drop(columns="seed")).get_label()


def test_the_best_setting_needs_most_of_its_seeds() -> None:
    runs, _ = planted({}, {"lr": 0.2}, {"optimizer": "adam"}, seeds=3)
    runs["train_accuracy"] = [1, 0.5, 0.5, 1, 1, 0.5, 0.9, 0.9, 0.9]
    runs = complete("curves", runs)
    assert best_of_each(runs, 0.99, "nc1") == (["run1-0", "run1-1", "run2-0", "run2-1", "run2-2"], False)
    assert best_of_each(runs.assign(status="diverged"), 0.99, "nc1") == ([], True)
    assert best_of_each(runs, 0.99, "not there") == ([], True)


def test_runs_that_the_columns_do_not_tell_apart_are_not_seeds_of_each_other() -> None:
    runs = pd.DataFrame({"optimizer": ["sgd"] * 4, "seed": [0, 1, 0, 1], "nc1": [1.0, 2.0, 3.0, 4.0]})
    assert list(by_seed(runs)) == [0, 0, 1, 1]
    assert list(by_seed(runs.drop(columns="seed"))) == [0, 1, 2, 3]
    assert list(by_seed(runs.assign(lr=[1, 1, 2, 2]))) == [0, 0, 1, 1]


#: Figure -> how it is drawn from runs, epochs and layers.
EVERY: dict[str, Callable[..., Figure]] = {
    "curves": plot.curves,
    "phase": plot.phase,
    "row_sum": plot.row_sum,
    "heat_map": lambda runs, epochs: plot.heat_map(runs),
    "over_depth": lambda runs, epochs: plot.over_depth(runs, epochs.assign(position=0, layer="fc")),
    "validation_accuracy": lambda runs, epochs: plot.validation_accuracy(runs),
    "metric_pairs": lambda runs, epochs: plot.metric_pairs(runs),
    "over_coupling": lambda runs, epochs: plot.over_coupling(runs),
    "over_momentum": plot.over_momentum,
}


@pytest.mark.parametrize("name", EVERY)
def test_runs_of_a_few_columns_and_optimizers_of_the_users(name: str) -> None:
    runs, epochs = planted({"optimizer": "mine.py:Shampoo"}, {"optimizer": "torch.optim:RAdam", "momentum": 0.5})
    runs = runs[["id", "optimizer", "lr", "momentum", "weight_decay", "val_accuracy", "nc0", "nc1"]]
    runs = pd.concat([runs, runs.assign(id=[f"{run}+" for run in runs["id"]], momentum=0.7)])
    if name == "over_coupling":  # their coupling is not known
        with pytest.raises(ValueError, match="no column coupling; it has id, optimizer"):
            plot.over_coupling(runs)
        return
    epochs = pd.concat([epochs, epochs.assign(run=epochs.run + "+")])
    figure = saved(EVERY[name](runs, epochs))
    if name in ("curves", "row_sum", "over_depth"):
        labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        assert {"Shampoo", "RAdam"} <= labels


@pytest.mark.parametrize("name", ["curves", "phase", "row_sum", "heat_map", "over_depth", "metric_pairs"])
@pytest.mark.parametrize("diverged", [False, True])
def test_one_run_and_one_that_diverged(name: str, diverged: bool) -> None:
    runs, epochs = planted({})
    if diverged:
        runs.loc[:, list(METRICS)] = epochs.loc[:, list(METRICS)] = np.nan
        runs["status"] = "diverged"
    if diverged and name == "metric_pairs":
        with pytest.raises(ValueError, match="none of the 1 runs ended well"):
            EVERY[name](runs, epochs)
        return
    figure = saved(EVERY[name](runs, epochs))
    if name == "curves":
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert ("no finite value" in texts) is diverged


@pytest.mark.parametrize("name", EVERY)
def test_what_is_missing_is_named(name: str) -> None:
    runs, epochs = planted({}, {"momentum": 0.5})
    with pytest.raises(ValueError, match=f"plot.{name}: runs has no column optimizer; it has"):
        EVERY[name](runs.drop(columns="optimizer").assign(coupling=1.0), epochs)
    with pytest.raises(ValueError, match=rf"plot.{name}: there is no run"):
        EVERY[name](runs[:0].assign(coupling=1.0), epochs)
    with pytest.raises(ValueError, match=rf"plot.{name}: several runs have the id 'a'"):
        EVERY[name](runs.assign(coupling=1.0, id="a"), epochs)


def test_what_cannot_be_drawn_is_refused() -> None:
    runs, epochs = planted({}, {"lr": 0.2})
    for draw, words in (
        (lambda: plot.curves(runs, epochs.drop(columns="run")), "epochs has no column run; it has epoch"),
        (lambda: plot.curves(runs, epochs, ["nc9"]), "epochs has no column nc9"),
        (lambda: plot.curves(runs, epochs.assign(run="?")), "no row whose run is the id of one of the 2 runs"),
        (lambda: plot.curves(runs, epochs[["run", "epoch"]]), "has none of the columns nc0, nc1"),
        (lambda: plot.heat_map(runs, "epochs"), "axis must be one of lr, momentum; got 'epochs'"),
        (lambda: plot.heat_map(runs.drop(columns="lr")), "no column lr"),
        (lambda: plot.heat_map(runs.assign(status="running")), "none of the 2 runs has ended"),
        (lambda: plot.heat_map(runs[["optimizer", "lr", "weight_decay"]]), "none of the columns nc0"),
        (lambda: plot.over_coupling(runs.assign(coupling=1.0)), "no 3 of the 2 runs"),
        (lambda: plot.over_momentum(runs, epochs), "no two of the 2 runs"),
        (lambda: plot.validation_accuracy(runs.assign(val_accuracy=np.nan)), "with a val_accuracy"),
        (lambda: plot.row_sum(runs, epochs, {"run0-0": np.ones(3)}), "the prediction of run0-0 has 3 values"),
        (lambda: plot.row_sum(pd.concat([runs.assign(id=str(i)) for i in range(11)]), epochs), "several runs have"),
        (lambda: plot.over_depth(runs, epochs), "layers has no column position"),
    ):
        with pytest.raises(ValueError, match=words):
            draw()


def test_the_package_waits_for_its_libraries() -> None:
    heavy = "{'matplotlib', 'pandas', 'torch'}"
    code = f"import sys; from ncollapse import plot; plot.__all__; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "set()"
    assert all(callable(getattr(plot, name)) for name in plot.__all__)
    with pytest.raises(AttributeError, match="no attribute 'curve'"):
        plot.curve  # type: ignore[attr-defined]  # noqa: B018


def _objects(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in another order, all of one index; objects, None where nothing is, lists, and a column named 7."""
    objects = frame.astype(object).where(frame.notna(), None)
    objects = objects.assign(tags=[["a"]] * len(frame), x=1).rename(columns={"x": 7})
    return objects.set_index(pd.Index([0] * len(frame))).sample(frac=1, random_state=0)


def _categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories, also such as no row has, and an index of two levels."""
    more = pd.concat([frame, frame.assign(**{name: 77 for name in ("lr", "momentum") if name in frame})])
    found = more.astype("category").iloc[: len(frame)]
    return found.set_index(pd.MultiIndex.from_product([["a"], range(len(frame))]))


def _shown(figure: Figure) -> list[tuple[str, list[tuple[float, ...]]]]:
    """Return of each panel the points of its lines and the colours of its cells, whatever their order."""
    found = []
    for axes in figure.axes:
        parts = [np.asarray(line.get_xydata(), dtype=float) for line in axes.lines]
        cells = [part.get_array() for part in axes.collections]
        parts += [np.asarray(values, dtype=float).reshape(-1, 1) for values in cells if values is not None]
        points = [tuple(point) for part in parts for point in part.round(6).tolist() if np.isfinite(point).all()]
        found.append((axes.get_title(loc="left"), sorted(points)))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_frames_of_any_kind_give_the_same_figure(name: str) -> None:
    couplings = [{"optimizer": "adam", "coupling": c, "lr": 0.1} for c in (0.0, 0.5, 1.0)]
    runs, epochs = planted(*couplings, {"coupling": 1.0, "momentum": 0.5}, {"coupling": 1.0}, seeds=2)
    expected = _shown(EVERY[name](runs, epochs))
    for kind in (_objects, _categories, pd.DataFrame.convert_dtypes):
        assert _shown(EVERY[name](kind(runs), kind(epochs))) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda runs: runs.assign(optimizer=["sgd", None]), "1 of 2 runs have no optimizer"),
        (lambda runs: pd.concat([runs, runs[["nc1"]]], axis=1), "runs has several columns nc1"),
        (lambda runs: runs.assign(lr=np.nan), "none of the 2 runs has ended with a weight decay and a value of lr"),
    ],
)
def test_frames_that_cannot_be_drawn(changed: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    runs, _ = planted({}, {"lr": 0.2})
    with pytest.raises(ValueError, match=message):
        plot.heat_map(changed(runs))


def test_predictions_are_numbers_of_any_kind() -> None:
    predictions: Any = {"run0-0": [4, 3, 2, 1]}
    lines = plot.row_sum(*planted({}, epochs=3), predictions).axes[0].lines
    (circles,) = [line for line in lines if line.get_marker() == "o" and len(line.get_xdata())]
    np.testing.assert_array_equal(circles.get_ydata(), [4, 3, 2, 1])


@pytest.mark.parametrize("name", ["curves", "row_sum"])
def test_epochs_are_whole_numbers(name: str) -> None:
    figure = EVERY[name](*planted({}, epochs=1))
    assert all(float(tick).is_integer() for axes in figure.axes if axes.axison for tick in axes.get_xticks())
