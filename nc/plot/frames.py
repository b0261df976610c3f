"""The runs and epochs that a figure is drawn from: what is missing is named or filled in, seeds are grouped."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ncollapse.optimizer_table import row_of
from ncollapse.plot.looks import with_variants
from ncollapse.plot.settings import alike, in_order


def complete(figure: str, runs: pd.DataFrame, needs: Sequence[str] = ()) -> pd.DataFrame:
    """Return runs with the columns that every figure reads: id, optimizer, coupling, status; the given ones stay.

    By default a run is named as the index names it, has the coupling of its optimizer, and ended well.

    Args:
        figure: the function that is asked for it, for errors.
        needs: columns that must be there, beside `optimizer`.

    Raises:
        ValueError: a missing column, no run, or an id that several have.
    """
    require(figure, "runs", runs, ("optimizer", *needs))
    if runs.empty:
        raise ValueError(f"plot.{figure}: there is no run to draw")
    usual = runs.optimizer.map({name: row_of(str(name)).coupling for name in runs.optimizer.unique()}).astype(float)
    runs = runs.assign(
        id=runs["id"] if "id" in runs else runs.index.astype(str),
        coupling=runs.coupling.astype(float) if "coupling" in runs else usual,
        status=runs.status if "status" in runs else "done",
    )
    if runs["id"].duplicated().any():
        twice = runs["id"][runs["id"].duplicated()].iloc[0]
        raise ValueError(f"plot.{figure}: several runs have the id {twice!r}; give each its own, or drop the column")
    return with_variants(runs) if "optimizer_options" in runs else runs


def require(figure: str, name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a frame has these columns.

    Raises:
        ValueError: it lacks some, which the message names.
    """
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"plot.{figure}: {name} has no column {', '.join(missing)}; it has {', '.join(frame)}")


def reached(runs: pd.DataFrame, threshold: float) -> "pd.Series[bool]":
    """Return which runs ended well with at least this training accuracy; all that ended well where it is not known."""
    done = runs.status == "done"
    return done & (runs.train_accuracy >= threshold) if "train_accuracy" in runs else done


def by_seed(runs: pd.DataFrame) -> "pd.Series[int]":
    """Number the settings from 0: runs that differ only in the seed share one.

    Without a column `seed` each run has its own. So have runs with equal settings and seeds: they differ in something
    that the columns do not tell.
    """
    if "seed" not in runs:
        return pd.Series(np.arange(len(runs)), runs.index)
    setting = alike(runs, ["seed"])
    again = runs.groupby([setting, runs.seed], dropna=False).cumcount()
    return runs.groupby([setting, again], sort=False).ngroup()


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """Return a row for each value of `keys`, in the order of the first of them: medians over seeds and their range.

    Columns: those of `frame`, with the median of each of `names` and otherwise the value of the first row; NAME_low
    and NAME_high, the smallest and the largest; seeds, the number of rows. What is not finite does not count.
    """
    frame = frame.assign(**{name: frame[name].astype(float).replace([np.inf, -np.inf], np.nan) for name in names})
    groups = frame.groupby(list(keys), sort=False, dropna=False)
    rows = frame.drop_duplicates(list(keys)).copy()
    for how, suffix in (("median", ""), ("min", "_low"), ("max", "_high")):
        values = groups[list(names)].agg(how).to_numpy()
        rows[[f"{name}{suffix}" for name in names]] = values
    return rows.assign(seeds=groups.size().to_numpy())


@dataclasses.dataclass(frozen=True)
class SeedLines:
    """Metrics over epochs, a line per setting."""

    settings: pd.DataFrame
    """A row per setting, in the order of the table of optimizers: setting, the columns of its first run, seeds, reached
    (whether one of its seeds did), best (of its optimizer)."""
    values: pd.DataFrame
    """A row per setting and epoch, as `over_seeds` returns it."""

    def of(self, setting: int) -> pd.DataFrame:
        """Return the epochs of a setting."""
        first, last = np.searchsorted(self.values.setting, (setting, setting + 1))
        return self.values.iloc[first:last]

    def sample(self, most: int) -> pd.DataFrame:
        """Return at most so many settings, evenly spread over all, and the best ones among them."""
        if len(self.settings) <= most:
            return self.settings
        at = np.linspace(0, len(self.settings) - 1, most).round().astype(int)
        chosen = np.zeros(len(self.settings), dtype=bool)
        chosen[at] = True
        return self.settings[chosen | self.settings.best]


def seed_lines(
    runs: pd.DataFrame, epochs: pd.DataFrame, names: Sequence[str], *, threshold: float, best_by: str
) -> SeedLines:
    """Group runs by their settings, and choose the best setting of each optimizer.

    That is the one with the smallest final `best_by`, the median over its seeds that reached the threshold.

    Args:
        runs: as `complete` returns them.
        epochs: rows of `run`, `epoch` and the metrics `names`.
    """
    runs = runs.assign(setting=by_seed(runs), reached=reached(runs, threshold))
    own = epochs[epochs.run.isin(runs["id"])]
    setting = own.run.astype(object).map(runs.set_index(runs["id"].astype(object)).setting)
    own = own.assign(setting=setting.astype(int)).sort_values(["setting", "epoch"], kind="stable")
    values = over_seeds(own, ["setting", "epoch"], names)
    settings = in_order(runs.drop_duplicates("setting").drop(columns="reached"))
    by_setting = runs.groupby("setting")
    settings = settings.assign(
        seeds=settings.setting.map(by_setting.size()), reached=settings.setting.map(by_setting.reached.any())
    )
    final = runs[runs.reached & np.isfinite(runs[best_by])] if best_by in runs else runs.iloc[:0]
    best = settings.setting.map(final.groupby("setting")[best_by].median() if len(final) else {}).astype(float)
    winners = best.dropna().groupby(settings.optimizer).idxmin()
    settings = settings.assign(best=settings.index.isin(winners), final=best)
    return SeedLines(in_order(settings.sort_values("final", kind="stable")), values)
