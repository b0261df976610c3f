"""Final metrics over the coupling, the share of the weight decay that is added to the gradient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ncollapse.optimizer_table import row_of
from ncollapse.plot import style
from ncollapse.plot.frames import complete, over_seeds, reached
from ncollapse.plot.looks import look_of, shown
from ncollapse.plot.settings import alike, described, in_order
from ncollapse.plot.style import GROUND, Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Figure

#: The fewest couplings that show more than the two ends.
SHARES = 3
#: What the figure shows, where it is measured.
_METRICS = ("nc0", "nc1", "nc2", "nc3", "val_accuracy")
#: Lines of one colour differ in these; with more lines than markers, only the colours tell them apart.
_MARKERS = "osD^vP"
#: Lines beyond which only their median and a band are drawn, and values of the coupling that these tell apart.
_MOST_LINES, _MOST_SHARES = 200, 21
#: Percentage points that the axis of accuracies shows at least: on a shorter one, noise would look like an effect.
_LEAST_SPAN = 2.0
_IN_A_ROW = 3


def over_coupling(runs: pd.DataFrame, metrics: Sequence[str] | None = None, *, threshold: float = 0.999) -> "Figure":
    """Draw final metrics over the coupled share of the weight decay, a panel each.

    A line joins runs that differ in the coupling only, with three couplings or more; the runs of several seeds are one
    line, their median, with a band over their range. Points are hollow where most of their runs missed the threshold.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: optimizer, coupling, `metrics`. Used
            where they are there: the other settings and seed, which tell what a line is; status, train_accuracy.
        metrics: columns of `runs`; by default NC0–NC3 and val_accuracy, those that are there.
        threshold: training accuracy below which points are hollow.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("coupling.png")`. `figure.get_label()` says
        what it shows.

    Raises:
        ValueError: a missing column, or no three runs that differ in the coupling only.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.over_coupling(load_runs("results"), ["nc0", "nc3"]).savefig("coupling.png")
    """
    runs = complete("over_coupling", runs, ("coupling", *(metrics or ())))
    names = list(metrics) if metrics else [name for name in _METRICS if name in runs and runs[name].notna().any()]
    if not names:
        raise ValueError(f"plot.over_coupling: runs has no number in any of the columns {', '.join(_METRICS)}")
    lines = coupled_lines(runs, threshold)
    if lines.empty:
        raise ValueError(
            f"plot.over_coupling: no {SHARES} of the {len(runs)} runs ended well and differ only in their coupling"
        )
    with shown(lines.optimizer):
        return draw_coupling("over_coupling", lines, names).labelled()


def coupled_lines(runs: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the runs that ended well and differ only in their coupling, in groups of three couplings or more.

    A row per run. Columns: group (a number), settings (common to the group), reached (the threshold), and those of
    `runs`; `optimizer` is the update rule, so adamw with coupling 1 counts as adam. Optimizers that are not ncollapse's
    have no coupling.
    """
    done = runs[(runs.status == "done") & runs.coupling.notna()]
    done = done.assign(optimizer=done.optimizer.map({name: row_of(name).family for name in done.optimizer.unique()}))
    done["group"], done["settings"] = alike(done, ["coupling"]), described(done, ["coupling"])
    done["reached"] = reached(done, threshold)
    done = done.drop_duplicates(["group", "coupling"])
    shares = done.groupby("group").coupling.transform("nunique")
    return in_order(done[shares >= SHARES].sort_values(["group", "coupling"]))


def medians_over_seeds(lines: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return a row for the seeds of each setting and coupling of `coupled_lines`, as `over_seeds` does.

    `group` and `settings` are those of the runs that differ in the coupling and the seed only; `reached` where more
    than half of the seeds did.
    """
    plain = lines.drop(columns=["group", "settings", "reached"])
    lines = lines.assign(group=alike(plain, ["coupling", "seed"]), settings=described(plain, ["coupling", "seed"]))
    keys = ["group", "coupling"]
    rows = over_seeds(lines.sort_values(keys), keys, names)
    share = lines.groupby(keys).reached.mean().reindex(pd.MultiIndex.from_frame(rows[keys]))
    return in_order(rows.assign(reached=share.to_numpy() > 0.5))


def draw_coupling(name: str, lines: pd.DataFrame, metrics: Sequence[str]) -> Drawing:
    """Draw metrics over the coupling: a panel per metric, a line per setting of `coupled_lines`."""
    rows = medians_over_seeds(lines, metrics).reset_index(drop=True)
    count, several = rows.group.nunique(), bool((rows.seeds > 1).any())
    too_many = count > _MOST_LINES
    groups = [] if too_many else [group for _, group in rows.groupby("group", sort=False)]
    with_markers = count <= len(_MARKERS)
    if too_many and rows.coupling.nunique() > _MOST_SHARES:
        rows = rows.assign(coupling=(rows.coupling * (_MOST_SHARES - 1)).round() / (_MOST_SHARES - 1))
    height = -(-(len(metrics) + 1) // _IN_A_ROW)  # with the legend, which has a place of its own
    with style.styled():
        figure, grid = style.panels(height, _IN_A_ROW, (9.6, 0.4 + 2.65 * height), gaps=(0.55, 0.8))
        for axes, metric in zip(grid.flat, metrics, strict=False):
            factor = style.factor_of(metric)
            style.scale(axes, "y", factor * rows[metric])
            for k, group in enumerate(groups):
                look = look_of(group.optimizer.iloc[0])
                marker = _MARKERS[k] if with_markers else ""
                line: dict[str, Any] = {"color": look.colour, "marker": marker, "alpha": 1.0 if with_markers else 0.4}
                label = f"{look.label} {group.settings.iloc[0]}" if with_markers else None
                axes.plot(group.coupling, factor * group[metric], **line, label=label)
                if several:
                    low, high = (factor * group[f"{metric}_{end}"] for end in ("low", "high"))
                    alpha = 0.15 if with_markers else 0.05
                    axes.fill_between(group.coupling, low, high, color=look.colour, alpha=alpha, linewidth=0)
                missed = group[~group.reached]
                axes.plot(missed.coupling, factor * missed[metric], marker or "o", color=look.colour, mfc=GROUND)
            if too_many:
                style.medians(axes, rows.assign(**{metric: factor * rows[metric]}), "coupling", metric, band=True)
            if metric.endswith("accuracy"):
                low, high = axes.get_ylim()
                margin = max(0.0, _LEAST_SPAN - (high - low)) / 2
                axes.set_ylim(low - margin, high + margin)
            axes.set_title(style.title_of(metric))
            axes.set_xlabel("coupled share c of the decay")
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        if not with_markers:
            style.legend_entries(grid[0, 0], [(optimizer, 1.0) for optimizer in dict.fromkeys(rows.optimizer)])
        grid[-1, -1].legend(*grid[0, 0].get_legend_handles_labels(), loc="center left")
    return Drawing(name, _caption(rows, too_many=too_many, several=several), figure)


def _caption(rows: pd.DataFrame, *, too_many: bool, several: bool) -> str:
    hollow = "" if rows.reached.all() else " Hollow: most of the point's runs missed the training-accuracy threshold."
    what = "Each line joins runs that differ only in c"
    if several:
        what = (
            "Each line joins settings that differ only in c: the median over their seeds, with a band over the range "
            "of the seeds"
        )
    if too_many:
        medians = ", medians over seeds," if several else ""
        what = (
            f"The median, and a band from the 10th to the 90th percentile, of {rows.group.nunique():,} groups of runs "
            f"that differ only in c{medians or ','} which are too many to draw"
        )
    return (
        "Final metrics over the coupled share c of the weight decay: c·λ·w is added to the gradient, (1 − c)·λ·w is "
        f"applied to the weights directly. {what}.{'' if too_many else hollow}"
    )
