"""Runs that differ only in their coupling, the share of the weight decay that is added to the gradient."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.optimizer_table import FAMILY
from ncollapse.plot import style
from ncollapse.plot.looks import look_of
from ncollapse.plot.settings import alike, described, in_order
from ncollapse.plot.style import GROUND, Drawing
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View

#: The fewest couplings that show more than the two ends.
SHARES = 3
#: Lines of one colour differ in these; with more lines than markers, only the colours tell them apart.
_MARKERS = "osD^vP"
#: Lines beyond which only their median and a band are drawn, and values of the coupling that these tell apart.
_MOST_LINES, _MOST_SHARES = 200, 21
#: Percentage points that the axis of accuracies shows at least: on a shorter one, noise would look like an effect.
_LEAST_SPAN = 2.0


def interpolations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return the runs that ended well and differ only in their coupling, in groups of three couplings or more.

    A row per run. Columns: group (a number), settings (common to the group), reached (the threshold), and those of
    `runs`; `optimizer` is the update rule, so adamw with coupling 1 counts as adam. Optimizers that are not ncollapse's
    have no coupling.
    """
    done = runs[(runs.status == "done") & runs.coupling.notna()]
    done = done.assign(optimizer=done.optimizer.map(FAMILY))
    done["group"], done["settings"] = alike(done, ["coupling"]), described(done, ["coupling"])
    done["reached"] = done.id.isin(selection.eligible(done).id)
    done = done.drop_duplicates(["group", "coupling"])
    shares = done.groupby("group").coupling.transform("nunique")
    return in_order(done[shares >= SHARES].sort_values(["group", "coupling"]))


def interpolations_view(slug: str, runs: pd.DataFrame) -> View:
    """Show the rows of `interpolations`."""
    columns = (
        Column.optimizer(), Column.text("settings"), Column.setting("coupling"),
        *(Column.metric(name) for name in NC), Column.share("val_accuracy", "val. acc."),
    )  # fmt: skip
    kept = ["optimizer", "settings", "coupling", *NC, "train_accuracy", "val_accuracy", "reached", "id"]
    return View(f"coupling-{slug}", "The runs of the figure.", columns, runs[kept])


def metrics_over_coupling(slug: str, runs: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """Draw final metrics, five at most, over the coupling: a panel per metric, a line per group of `interpolations`."""
    lines = runs.group.nunique()
    too_many = lines > _MOST_LINES
    groups = [] if too_many else [group for _, group in runs.groupby("group")]
    with_markers = lines <= len(_MARKERS)
    if too_many and runs.coupling.nunique() > _MOST_SHARES:
        runs = runs.assign(coupling=(runs.coupling * (_MOST_SHARES - 1)).round() / (_MOST_SHARES - 1))
    with style.styled():
        figure, grid = style.panels(2, 3, (9.6, 5.7), gaps=(0.55, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            values = 100 * runs[name] if name == "val_accuracy" else runs[name]
            style.scale(axes, "y", values)
            for k, group in enumerate(groups):
                look_of_rule = look_of(group.optimizer.iloc[0])
                colour, marker = look_of_rule.colour, _MARKERS[k] if with_markers else ""
                label = f"{look_of_rule.label} {group.settings.iloc[0]}" if with_markers else None
                look = {"color": colour, "marker": marker, "alpha": 1.0 if with_markers else 0.4}
                axes.plot(group.coupling, values[group.index], **look, label=label)
                missed = group[~group.reached]
                axes.plot(missed.coupling, values[missed.index], marker or "o", color=colour, mfc=GROUND)
            if too_many:
                style.medians(axes, runs.assign(**{name: values}), "coupling", name, band=True)
            if name == "val_accuracy":
                low, high = axes.get_ylim()
                margin = max(0.0, _LEAST_SPAN - (high - low)) / 2
                axes.set_ylim(low - margin, high + margin)
            axes.set_title("validation accuracy, %" if name == "val_accuracy" else name.upper())
            axes.set_xlabel("coupled share c of the decay")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        if not with_markers:
            style.legend_entries(grid[0, 0], [(name, 1.0) for name in dict.fromkeys(runs.optimizer)])
        grid[1, 2].legend(*grid[0, 0].get_legend_handles_labels(), loc="center left")
    hollow = "" if runs.reached.all() else " Hollow: the run missed the training-accuracy threshold."
    what = "Each line joins runs that differ only in c"
    if too_many:
        what = (
            f"The median, and a band from the 10th to the 90th percentile, of {lines:,} groups of runs that differ "
            "only in c, which are too many to draw"
        )
    caption = (
        "Final metrics over the coupled share c of the weight decay: c·λ·w is added to the gradient, (1 − c)·λ·w is "
        f"applied to the weights directly. {what}.{'' if too_many else hollow}"
    )
    return Drawing(f"coupling-{slug}", caption, figure)
