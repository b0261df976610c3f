"""The best setting of each optimizer, and NC0 by weight decay: the paper's table.

Runs that differ only in their seed are one setting, whose value is the median over its seeds.
"""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from ncollapse.plot.settings import alike, described, in_order, tried
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.view import Cell, Column, View
from ncollapse.train.results.schema import FINISHED

#: Metrics shown with their change from initialisation.
CHANGES = ("nc0", "nc1", "nc2", "nc3", "nc3_difference", "nc4")
#: Columns of the table that say what a row stands for.
_COUNTS = (
    "note", "seeds", "seeds_finished", "settings_reached", "settings_tried", "eligible", "runs", "compared",
)  # fmt: skip


def best_settings(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return the runs of each optimizer's best setting, a row per seed that counts, optimizers in order.

    A setting reaches the training accuracy that more than half of its finished seeds reach; a seed that did not end
    well reaches none. Where no setting of an optimizer reaches the threshold, those within a point of its highest
    training accuracy count. The best setting has the smallest median of `best_by` over those of its seeds that count.
    """
    return _best(runs, selection, _judged(runs, selection))


def best_runs(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return a run of each optimizer: of its best setting, the seed in the middle by `best_by`."""
    return _middle(best_settings(runs, selection), selection)


def _best(runs: pd.DataFrame, selection: Selection, judged: pd.DataFrame) -> pd.DataFrame:
    judged = judged[judged.counts].join(runs[selection.best_by].astype(float)).dropna(subset=[selection.best_by])
    medians = judged.groupby(["optimizer", "setting"], sort=False)[selection.best_by].median()
    chosen = [setting for _, setting in medians.groupby(level="optimizer").idxmin()]
    return in_order(runs.loc[judged.index[judged.setting.isin(chosen)]])


def _middle(best: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    ordered = in_order(best.sort_values(selection.best_by, kind="stable"))
    seeds = ordered.groupby("optimizer").id
    return ordered[seeds.cumcount() == (seeds.transform("size") - 1) // 2]


def _judged(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Judge finished runs by their training accuracy and by that of their setting.

    Columns: optimizer, accuracy (negative where it did not end well), setting (a number), level (the training accuracy
    that the setting reaches, negative where most of its seeds did not end well), counts (whether the run may be part of
    its optimizer's best setting).
    """
    finished = runs[runs.status.isin(FINISHED)]
    accuracy = finished.train_accuracy.astype(float).where(finished.status == "done").fillna(-1.0)
    judged = finished[["optimizer"]].assign(accuracy=accuracy, setting=alike(finished, ["seed"]))
    levels = accuracy.groupby(judged.setting).quantile(0.5, interpolation="lower")
    judged["level"] = judged.setting.map(levels).astype(float)
    highest = judged.level.groupby(judged.optimizer).transform("max")
    least = highest.map({level: _least(level, selection) for level in highest.unique()}).astype(float)
    return judged.assign(counts=(judged.level >= least) & (accuracy >= least))


def _least(highest: float, selection: Selection) -> float:
    """Return the training accuracy that counts, where this is the highest that a setting reaches."""
    return (selection if highest >= selection.threshold else selection.lowered(highest)).threshold


def main_table(runs: pd.DataFrame, selection: Selection, own: Iterable[str] = ()) -> pd.DataFrame:
    """Return a row per optimizer: its best setting, as medians over the seeds, and how many it was chosen from.

    Columns: optimizer; nc0 … nc4, `nc0_predicted` (by theory), metrics of the user's, training and validation accuracy,
    each with `_low` and `_high`, the range over the seeds (NaN with one seed), metrics also with `_change`, the change
    from initialisation in percent; settings; note (by how much they missed the threshold, or why there are none; empty
    where they reached it); seeds (that count) of seeds_finished; settings_tried, of which settings_reached the
    threshold; runs (finished), of which eligible reached it; compared (whether the training accuracy allows a
    comparison with the other optimizers); run (the seed in the middle: the one of `best_runs`).

    Args:
        own: metrics of the user's that the runs have.
    """
    changing, judged = [*CHANGES, *own], _judged(runs, selection)
    best = _best(runs, selection, judged)
    shown = [*CHANGES, "nc0_predicted", *own, "train_accuracy", "val_accuracy"]
    values = best.assign(nc0_predicted=[_predicted(run) for _, run in best.iterrows()])[shown].astype(float)
    changes = pd.DataFrame({f"{name}_change": _changes(best, name) for name in changing}, index=best.index)
    groups = values.join(changes).groupby(best.optimizer)
    several = groups.size() > 1
    ends = [getattr(groups[shown], end)().where(several) for end in ("min", "max")]
    frame = groups.median().join([ends[0].add_suffix("_low"), ends[1].add_suffix("_high")])
    middle = _middle(best, selection)
    texts = pd.DataFrame({"settings": described(runs, ["seed"])[middle.index], "run": middle.id})
    frame = frame.join(texts.set_index(middle.optimizer)).reindex(tried(runs)).rename_axis("optimizer")
    counts = [_counts(name, runs, judged, middle, selection) for name in frame.index]
    frame = frame.reset_index().join(pd.DataFrame(counts, columns=list(_COUNTS)))
    columns = [c for name in shown for c in (name, f"{name}_low", f"{name}_high", f"{name}_change") if c in frame]
    return frame[["optimizer", *columns, "settings", *_COUNTS, "run"]]


def _counts(
    optimizer: str, runs: pd.DataFrame, judged: pd.DataFrame, middle: pd.DataFrame, selection: Selection
) -> tuple[Any, ...]:
    """Return the columns `_COUNTS` of a row of the table."""
    of_all, judged = judged, judged[judged.optimizer == optimizer]
    levels = judged.groupby("setting")["level"].first()
    eligible = len(selection.eligible(runs.loc[judged.index]))
    counts = (int((levels >= selection.threshold).sum()), len(levels), eligible, len(judged))
    chosen = judged.loc[middle.index[middle.optimizer == optimizer]]
    if chosen.empty:
        return _why_none(judged, selection), 0, 0, *counts, False
    level, setting = float(chosen.level.iloc[0]), chosen.setting.iloc[0]
    seeds = judged[judged.setting == setting]
    note = "" if level >= selection.threshold else selection.missed(level)
    compared = level >= _least(float(of_all.level.max()), selection)
    return note, int(seeds.counts.sum()), len(seeds), *counts, compared


def _why_none(judged: pd.DataFrame, selection: Selection) -> str:
    """Say why an optimizer has no best setting."""
    if judged.empty:
        return "no run has ended yet"
    if judged.counts.any():
        return f"{selection.best_by.upper()} is undefined"
    return "no run ended well" if (judged.accuracy < 0).all() else "most seeds of every setting did not end well"


def _changes(best: pd.DataFrame, name: str) -> "pd.Series[float]":
    start = best[f"{name}_start"].astype(float)
    return 100 * (best[name].astype(float) / start.where(start != 0) - 1)


def _predicted(run: "pd.Series[Any]") -> float:
    """Return NC0 at the end of a run as theory predicts it; NaN where it does not."""
    nc0 = predicted_nc0(run)
    return math.nan if nc0 is None else float(nc0[-1])


def main_view(slug: str, runs: pd.DataFrame, selection: Selection, own: Iterable[str] = ()) -> View:
    """Show `main_table`."""
    own = list(own)
    frame = main_table(runs, selection, own)
    by, several = selection.best_by.upper(), bool((frame.seeds > 1).any())
    caption = [
        f"Best: the setting with the smallest {by} of those that reached {selection.percent} training accuracy "
        "(best of: how many were tried, and how many reached it). Below each metric: its change from initialisation."
    ]
    if several:
        caption.append(
            "Runs that differ only in the seed are one setting: the median over its seeds and the range. It reached "
            "the threshold where more than half of its seeds did. Bold: the smallest, where the seeds of no other "
            "optimizer overlap its own."
        )
    elif len(frame):
        caption.append("Bold: the smallest. One seed: how much a number differs from seed to seed is not known.")
    if frame.note.str.startswith("missed").any():
        caption.append(
            f"Where no setting reached {selection.percent}, the best of those within a point of the optimizer's "
            "highest training accuracy is shown, and not compared with those that reached it."
        )
    caption.append(
        "NC0 predicted: the exact recursion of SGD and SGDW. NC3 diff.: ‖W/‖W‖ − M/‖M‖‖; its size at initialisation "
        "suggests that the paper calls this one NC3."
    )
    columns = (
        Column.optimizer(),
        Column.metric("nc0", best=True),
        Column.metric("nc0_predicted", "NC0 predicted"),
        *(Column.metric(name, best=True) for name in ("nc1", "nc2", "nc3")),
        Column.metric("nc3_difference", "NC3 diff.", best=True),
        Column.metric("nc4"),
        *(Column.metric(name, name) for name in own),
        Column.share("train_accuracy", "train acc."),
        Column.share("val_accuracy", "val. acc."),
        Column("settings", _settings, words=True),
        Column("best of", _best_of),
    )
    return View(f"best-{slug}", " ".join(caption), columns, frame)


def _settings(row: "pd.Series[Any]") -> Cell:
    return Cell(row.note) if pd.isna(row.settings) else Cell(row.settings, row.note)


def _best_of(row: "pd.Series[Any]") -> Cell:
    seeds = "one seed" if row.seeds_finished == 1 else f"{row.seeds} of {row.seeds_finished} seeds"
    if row.seeds == row.seeds_finished > 1:
        seeds = f"{row.seeds} seeds"
    reached = "all" if row.settings_reached == row.settings_tried else f"{row.settings_reached}"
    tried_settings = f"{row.settings_tried:,} setting{'' if row.settings_tried == 1 else 's'}"
    small = "\n".join([f"{reached} reached"] * bool(row.settings_tried) + [seeds] * bool(row.seeds))
    return Cell(tried_settings, small, float(row.settings_tried))


def nc0_by_decay(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return smallest and largest NC0 over its start of the eligible runs, by optimizer, weight decay and coupling."""
    eligible = selection.eligible(runs)
    keys = [eligible[name] for name in ("optimizer", "weight_decay", "coupling")]
    frame = (
        (eligible.nc0 / eligible.nc0_start).groupby(keys, dropna=False).agg(smallest="min", largest="max", runs="count")
    )
    return in_order(frame.reset_index())


def decay_view(slug: str, runs: pd.DataFrame, selection: Selection) -> View:
    """Show `nc0_by_decay`."""
    caption = f"Final NC0 as a multiple of its start, over the runs that reached {selection.percent} training accuracy."
    columns = (
        Column.optimizer(), Column.setting("weight_decay"), Column.setting("coupling"),
        Column.metric("smallest", "smallest NC0 / start"), Column.metric("largest", "largest NC0 / start"),
        Column.count("runs"),
    )  # fmt: skip
    return View(f"decay-{slug}", caption, columns, nc0_by_decay(runs, selection))
