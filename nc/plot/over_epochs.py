"""Metrics over epochs, and one metric against another: all settings thin, the best one of each optimizer thick."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.frames import SeedLines, best_of_each, complete, plain, seed_lines
from ncollapse.plot.looks import about_lines, look_of, shown
from ncollapse.plot.style import GROUND, INK, QUIET, Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Axes, Figure

#: What `curves` draws, where it is measured.
CURVES = ("nc0", "nc1", "nc2", "nc3", "nc4", "train_loss", "train_error")
#: Pairs that `phase` draws: horizontal, vertical.
PHASES = (("nc0", "nc1"), ("nc3", "nc1"))
#: Thin lines beyond which a sample of them is drawn, and beyond which they are pixels in the SVG file too.
_MOST_LINES, _MOST_PATHS = 200, 40
#: Runs whose last values are marked, each a link of the page to its run.
_MOST_ENDS = 150
#: Share of the values that an axis shows at least.
_USUAL = 0.99
#: Drops of the learning rate beyond which they would hide the lines.
_MOST_DROPS = 10
_MANY_DROPS = 10_000
_IN_A_ROW = 3
_CUT = " Axes leave out a few values that lie far above the others."
_THIN: dict[str, Any] = {"lw": 0.6, "alpha": 0.45, "zorder": 2}
_THICK: dict[str, Any] = {"lw": 1.7, "zorder": 3}
_BAND: dict[str, Any] = {"alpha": 0.18, "linewidth": 0, "zorder": 2.5}


def curves(
    runs: pd.DataFrame, epochs: pd.DataFrame, metrics: Sequence[str] | None = None, *, threshold: float = 0.999,
    best_by: str = "nc0",
) -> "Figure":  # fmt: skip
    """Draw metrics over epochs, a panel each: a line per setting, the best of each optimizer thick.

    Runs that differ only in the seed are one line, their median; around a thick one is a band over their range. An
    axis is logarithmic where its values span decades, and a line that leaves it at the bottom goes to 0. Vertical
    lines mark the drops of the learning rate, rings the first evaluated epoch at which all training data is classified
    correctly. Of more than 200 settings a sample is drawn.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: id, optimizer. Used where they are
            there: the settings and seed, which tell what a line is; coupling; epochs and lr_drops, for the drops;
            status, train_accuracy and `best_by`, for the thick lines.
        epochs: a row per run and evaluated epoch, as `load_metrics` returns it. Needed: run, epoch, `metrics`.
        metrics: columns of `epochs`, and "train_error", which is 1 − train_accuracy. By default NC0–NC4, training loss
            and training error, those that are there.
        threshold: training accuracy that a run must reach to be the best.
        best_by: the final metric, a column of `runs`, whose smallest median over the seeds is best.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("curves.png")`. `figure.get_label()` says what
        it shows.

    Raises:
        ValueError: a missing column, no run, or epochs of none of the runs.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> runs, epochs = load_runs("results"), load_metrics("results")
        >>> plot.curves(runs[runs.optimizer == "adamw"], epochs, ["nc1", "train_loss"]).savefig("adamw.png")
    """
    runs, epochs = _checked(
        "curves", runs, epochs, ["train_accuracy" if m == "train_error" else m for m in metrics or ()]
    )
    names = list(metrics) if metrics is not None else curves_measured(epochs)
    if not names:
        raise ValueError(f"plot.curves: epochs has none of the columns {', '.join(CURVES)}; name others in metrics")
    with shown(runs.optimizer):
        return draw_curves("curves", runs, epochs, names, _chosen(runs, threshold, best_by)).labelled()


def phase(
    runs: pd.DataFrame, epochs: pd.DataFrame, pairs: Sequence[tuple[str, str]] = PHASES, *, threshold: float = 0.999,
    best_by: str = "nc0",
) -> "Figure":  # fmt: skip
    """Draw one metric against another over epochs, a panel for each pair: NC1 against NC0, and NC1 against NC3.

    A line is a setting, from its start (a ring) to its end (a disc); runs that differ only in the seed are one line,
    the median of both metrics at each epoch. Axes are logarithmic. The best setting of each optimizer is thick.

    Args:
        runs, epochs, threshold, best_by: as for `curves`.
        pairs: columns of `epochs`: horizontal, vertical.

    Returns:
        A matplotlib figure, as `curves` does.

    Raises:
        ValueError: a missing column, no run, or epochs of none of the runs.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.phase(load_runs("results"), load_metrics("results")).savefig("phase.svg")
    """
    runs, epochs = _checked("phase", runs, epochs, [name for pair in pairs for name in pair])
    with shown(runs.optimizer):
        return draw_phase("phase", runs, epochs, pairs, _chosen(runs, threshold, best_by)).labelled()


@dataclasses.dataclass(frozen=True)
class Thick:
    """Which runs are drawn thick, and what they are, as the end of a sentence."""

    runs: Collection[str]
    about: str


def _chosen(runs: pd.DataFrame, threshold: float, best_by: str) -> Thick:
    best, reached_it = best_of_each(runs, threshold, best_by)
    about = f"each optimizer's setting with the smallest final {best_by.upper()}"
    if "train_accuracy" in runs:
        about += f" of those that reached {100 * threshold:g} % training accuracy"
        if not reached_it:
            about += ", or, where none did, of those within a point of its highest"
    return Thick(best, about)


def _checked(
    figure: str, runs: pd.DataFrame, epochs: pd.DataFrame, needs: Iterable[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    epochs = plain(figure, "epochs", epochs, ("run", "epoch", *dict.fromkeys(needs)))
    runs = complete(figure, runs, ("id",))
    if not epochs.run.isin(runs["id"]).any():
        raise ValueError(f"plot.{figure}: epochs has no row whose run is the id of one of the {len(runs)} runs")
    return runs, epochs


def curves_measured(epochs: pd.DataFrame) -> list[str]:
    """Return those of `CURVES` that the epochs have."""
    there = {*epochs, *(["train_error"] if "train_accuracy" in epochs else [])}
    return [name for name in CURVES if name in there]


def draw_curves(name: str, runs: pd.DataFrame, epochs: pd.DataFrame, metrics: Sequence[str], thick: Thick) -> Drawing:
    """Draw what `curves` returns, with its caption; runs have the columns of `complete`."""
    if "train_accuracy" in epochs:
        epochs = epochs.assign(train_error=1 - epochs.train_accuracy)
    measured = list(dict.fromkeys([*metrics, *(["train_accuracy"] if "train_accuracy" in epochs else [])]))
    lines = seed_lines(runs, epochs, measured, thick.runs)
    drops, about_drops = _drops(runs)
    columns = min(len(metrics), _IN_A_ROW)
    rows = -(-len(metrics) // columns)
    with style.styled():
        size = max(4.8, 2.8 * columns), 0.6 + 2.35 * rows
        figure, grid = style.panels(rows, columns, size, gaps=(0.5, 0.5), margins=(0.55, 0.15, 0.5, 0.3))
        drawing = Drawing(name, "", figure)
        ringed = cut = False
        for axes, metric in zip(grid.flat, metrics, strict=False):
            factor = style.factor_of(metric)
            cut |= _scale(axes, "y", lines, metric, factor)
            for drop in drops:
                axes.axvline(drop, color=QUIET, lw=0.8, ls=(0, (1, 2)), zorder=1)
            _thin_lines(axes, lines, "epoch", metric, 1, factor)
            for _, setting in lines.settings[lines.settings.best].iterrows():
                ringed |= _thick_curve(axes, lines, setting, metric, factor)
            _link_ends(drawing, axes, runs, epochs, "epoch", metric, 1, factor)
            axes.set_title(style.title_of(metric))
        for place, axes in enumerate(grid.flat[: len(metrics)]):
            style.epochs_below(axes, labelled=place >= len(metrics) - columns)  # the lowest of each column
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        _legend(figure, grid[0, 0], lines, ring="all training data correct" if ringed else "", drops=bool(drops))
    about = "Metrics over epochs, measured on the training data."
    ring = " Rings: the first evaluated epoch at which all training data is classified correctly." if ringed else ""
    zero = " A line that leaves a logarithmic axis at the bottom goes to 0." if _touches_zero(lines, metrics) else ""
    drawing.caption = f"{about} {_about(lines, thick)}{about_drops}{ring}{zero}{_CUT * cut}{_about_ends(drawing)}"
    return drawing


def draw_phase(
    name: str, runs: pd.DataFrame, epochs: pd.DataFrame, pairs: Sequence[tuple[str, str]], thick: Thick
) -> Drawing:
    """Draw what `phase` returns, with its caption; runs have the columns of `complete`."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    lines = seed_lines(runs, epochs, names, thick.runs)
    with style.styled():
        size = max(4.8, 4.2 * len(pairs)), 4.3
        figure, grid = style.panels(1, len(pairs), size, gaps=(0.65, 0), margins=(0.65, 0.15, 0.5, 0.1))
        drawing, cut = Drawing(name, "", figure), False
        for axes, (x, y) in zip(grid[0], pairs, strict=True):
            factors = style.factor_of(x), style.factor_of(y)
            cut |= _scale(axes, "x", lines, x, factors[0], always=True)
            cut |= _scale(axes, "y", lines, y, factors[1], always=True)
            _thin_lines(axes, lines, x, y, *factors)
            for _, setting in lines.settings[lines.settings.best].iterrows():
                _thick_path(axes, lines.of(setting.setting), setting, x, y, factors)
            _link_ends(drawing, axes, runs, epochs, x, y, *factors)
            axes.set_xlabel(style.title_of(x))
            axes.set_ylabel(style.title_of(y))
        _legend(figure, grid[0, 0], lines, ring="start", disc="end")
    against = " and ".join(f"{style.title_of(y)} against {style.title_of(x)}" for x, y in pairs)
    drawing.caption = (
        f"{against} over epochs: towards the lower left is collapse. {_about(lines, thick)} "
        f"A ring is the start of a thick line, a disc its end. Values that are not positive cannot be drawn on these "
        f"axes.{_CUT * cut}{_about_ends(drawing)}"
    )
    return drawing


def _scale(axes: "Axes", which: str, lines: SeedLines, metric: str, factor: float = 1, *, always: bool = False) -> bool:
    """Choose scale and range of an axis; return whether it ends below a few values that lie far above the others.

    Features that are about to vanish have an NC1 of a million for an epoch: the axis would show nothing else.
    """
    values, best = (factor * frame[metric].dropna() for frame in (lines.values, lines.of_best()))
    if values.empty:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color=QUIET)
        return False
    usual = max(float(values.quantile(_USUAL)), float(best.max()) if len(best) else 0.0)
    shown_values = values[values <= usual]
    positive = shown_values[shown_values > 0]
    if always and len(positive):
        getattr(axes, f"set_{which}scale")("log")
        style.ticks(getattr(axes, f"{which}axis"), float(positive.min()), float(positive.max()))
    elif not always:
        style.scale(axes, which, shown_values)
    logarithmic = getattr(axes, f"get_{which}scale")() == "log"
    low = float((positive if logarithmic else shown_values).min())
    top = usual * 2 if logarithmic else low + 1.15 * (usual - low)
    if values.max() <= (5 * top if logarithmic else low + 2 * (top - low)) or not top > low:
        return False
    bottom = low / 2 if logarithmic else low - 0.05 * (top - low)
    getattr(axes, f"set_{which}lim")(bottom, top)
    return True


def _thin_lines(axes: "Axes", lines: SeedLines, x: str, y: str, x_factor: float, y_factor: float) -> None:
    """Draw a sample of the settings, an artist for each kind of line: their epochs with a gap between two settings."""
    sample = lines.sample(_MOST_LINES)
    gap = np.full((2, 1), np.nan)
    for (optimizer, coupled), part in sample.groupby(["optimizer", sample.coupling > 0], sort=False):
        parts = []
        for setting in part.setting:
            found = lines.of(setting)
            at = found[[x, y]].to_numpy(dtype=float).T * [[x_factor], [y_factor]]
            parts += [at[:, np.isfinite(at).all(0)], gap]
        look = style.line(str(optimizer), float(bool(coupled))) | _THIN
        axes.plot(*np.concatenate(parts, axis=1), rasterized=len(sample) > _MOST_PATHS, **look)


def _thick_curve(axes: "Axes", lines: SeedLines, setting: "pd.Series[Any]", metric: str, factor: float) -> bool:
    """Draw the median and the range of a setting, and a ring where all data is correct; return whether there is one."""
    found = lines.of(setting.setting).dropna(subset=[metric])
    look = style.line(setting.optimizer, setting.coupling)
    axes.plot(found.epoch, factor * found[metric], **look, **_THICK)
    if setting.seeds > 1:
        low, high = (factor * found[f"{metric}_{end}"] for end in ("low", "high"))
        axes.fill_between(found.epoch, low, high, color=look["color"], **_BAND)
    correct = found[found.train_accuracy >= 1] if "train_accuracy" in found else found.iloc[:0]
    at = correct.head(1)
    if at.empty or (axes.get_yscale() == "log" and not at[metric].iloc[0] > 0):
        return False
    axes.plot(at.epoch, factor * at[metric], "o", ms=6, mfc=GROUND, mec=look["color"], mew=1.5, zorder=4)
    return True


def _thick_path(
    axes: "Axes", found: pd.DataFrame, setting: "pd.Series[Any]", x: str, y: str, factors: tuple[float, float]
) -> None:
    look = style.line(setting.optimizer, setting.coupling)
    drawn = found[(found[[x, y]] > 0).all(axis=1)]
    drawn = drawn[[x, y]] * np.asarray(factors)
    axes.plot(drawn[x], drawn[y], **look, **_THICK)
    for end, face in ((drawn.head(1), GROUND), (drawn.tail(1), look["color"])):
        axes.plot(end[x], end[y], "o", ms=6, mfc=face, mec=look["color"], mew=1.5, zorder=4)


def _link_ends(
    drawing: Drawing, axes: "Axes", runs: pd.DataFrame, epochs: pd.DataFrame, x: str, y: str, x_factor: float,
    y_factor: float,
) -> None:  # fmt: skip
    """Draw the last finite value of every run as a point that the page links to it; of few runs only."""
    if len(runs) > _MOST_ENDS:
        return
    found = epochs[epochs.run.isin(runs["id"])]
    finite = np.isfinite(found[[x, y]].to_numpy(dtype=float)).all(axis=1)
    last = found[finite].sort_values("epoch").drop_duplicates("run", keep="last").set_index("run")
    ended = runs[runs["id"].isin(last.index)]
    groups = [
        (
            x_factor * last[x].reindex(part["id"]), y_factor * last[y].reindex(part["id"]), part["id"],
            {"marker": "o", "markersize": 2.6, "mew": 0, "mfc": look_of(str(name)).colour, "alpha": 0.8, "zorder": 3.5},
        )
        for name, part in ended.groupby("optimizer", sort=False)
    ]  # fmt: skip
    drawing.points(axes, groups)


def _drops(runs: pd.DataFrame) -> tuple[list[int], str]:
    """Return the epochs at which the learning rate drops, and a sentence on them; nothing where it is not known."""
    if not {"epochs", "lr_drops"} <= set(runs):
        return [], ""
    drops = runs.lr_drops
    if "lr_drop_factor" in runs:  # a drop by a factor of 1 is none
        drops = drops.where(runs.lr_drop_factor != 1, 0)
    schedules = runs[["epochs"]].assign(lr_drops=drops).dropna().drop_duplicates()
    if len(schedules) != 1:
        return [], " The drops of the learning rate are not marked: they differ between the runs." * bool(
            len(schedules)
        )
    epochs, count = (int(n) for n in schedules.iloc[0])
    # As `RunConfig` divides them; of so many that most epochs have one, none are marked.
    found = sorted({i * epochs // (count + 1) for i in range(1, min(count, _MANY_DROPS) + 1)} - {0})
    if not found or len(found) > _MOST_DROPS:
        return [], ""
    return found, " Dotted vertical lines: the learning rate drops."


def _about(lines: SeedLines, thick: Thick) -> str:
    """Say what lines are, for a caption."""
    settings = lines.settings
    drawn = len(lines.sample(_MOST_LINES))
    several = bool((settings.seeds > 1).any())
    text = "A thin line is a setting" + (": the median over the runs that differ only in the seed" if several else "")
    if drawn < len(settings):
        text += f"; {drawn:,} of {len(settings):,} are drawn, evenly chosen, and {len(settings) - drawn:,} left out"
    if settings.best.any():
        text += f". Thick: {thick.about}" + ", with a band over the range of its seeds" * several
    return f"{text}. {about_lines(settings.optimizer)}"


def _about_ends(drawing: Drawing) -> str:
    return " Small dots: the last finite value of each run." * bool(drawing.runs) + drawing.note


def _touches_zero(lines: SeedLines, metrics: Sequence[str]) -> bool:
    return any(style.spans_decades(lines.values[name]) and (lines.values[name] == 0).any() for name in metrics)


def _legend(
    figure: "Figure", axes: "Axes", lines: SeedLines, *, ring: str, disc: str = "", drops: bool = False
) -> None:
    used = lines.settings.assign(coupled=lines.settings.coupling > 0).drop_duplicates(["optimizer", "coupled"])
    style.legend_entries(axes, zip(used.optimizer, used.coupling, strict=True))
    mark: dict[str, Any] = {"ls": "", "marker": "o", "ms": 6, "mec": INK, "mew": 1.5}
    for label, face in ((ring, GROUND), (disc, INK)):
        if label:
            axes.plot([], [], label=label, mfc=face, **mark)
    if drops:
        axes.plot([], [], color=QUIET, lw=0.8, ls=(0, (1, 2)), label="learning rate drops")
    style.one_legend(figure, axes, 8)
