"""The runs and epochs that a figure is drawn from: what is missing is named or filled in, seeds are grouped."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.optimizer_table import row_of
from ncollapse.plot.looks import with_variants
from ncollapse.plot.settings import alike, in_order

#: Below the highest training accuracy of an optimizer, where none of its settings reaches the threshold.
_SLACK = 0.01
_UNFINISHED = ("pending", "running")


def complete(figure: str, runs: pd.DataFrame, needs: Sequence[str] = ()) -> pd.DataFrame:
    """Return runs, sorted by optimizer, with the columns that every figure reads: id, optimizer, coupling, status.

    By default a run is named as the index names it, has the coupling of its optimizer, and ended well.

    Args:
        figure: the function that is asked for it, for errors.
        needs: columns that must be there, beside `optimizer`.

    Raises:
        ValueError: a missing column, no run, or an id that several have.
    """
    names = runs.index.map(str)
    runs = plain(figure, "runs", runs, ("optimizer", *needs))
    if runs.empty:
        raise ValueError(f"plot.{figure}: there is no run to draw")
    if nameless := int(runs.optimizer.isna().sum()):
        raise ValueError(f"plot.{figure}: {nameless:,} of {len(runs):,} runs have no optimizer")
    runs = runs.assign(optimizer=runs.optimizer.astype(str))
    usual = runs.optimizer.map({name: row_of(str(name)).coupling for name in runs.optimizer.unique()}).astype(float)
    runs = runs.assign(
        id=runs.get("id", names),
        coupling=runs.coupling.astype(float) if "coupling" in runs else usual,
        status=runs.status if "status" in runs else "done",
    )
    if runs["id"].duplicated().any():
        twice = runs["id"][runs["id"].duplicated()].iloc[0]
        raise ValueError(f"plot.{figure}: several runs have the id {twice!r}; give each its own, or drop the column")
    return in_order(with_variants(runs) if "optimizer_options" in runs else runs)


def plain(figure: str, name: str, frame: pd.DataFrame, needs: Sequence[str]) -> pd.DataFrame:
    """Return a frame of the user's with an index from 0, names that are text, and columns of NumPy's kinds.

    Categories become their values, numbers that may be missing float64, and what cannot be compared, such as lists,
    its text.

    Args:
        name: of the frame, for errors.
        needs: columns that must be there.

    Raises:
        ValueError: a missing column, or one that is there twice.
    """
    frame = frame.rename(columns=str).reset_index(drop=True)
    require(figure, name, frame, needs)
    if frame.columns.has_duplicates:
        twice = ", ".join(dict.fromkeys(frame.columns[frame.columns.duplicated()]))
        raise ValueError(f"plot.{figure}: {name} has several columns {twice}")
    kept = [isinstance(kind, np.dtype) and kind.kind != "O" for kind in frame.dtypes]
    changed = {str(name): _plain(frame[name]) for name, keep in zip(frame, kept, strict=True) if not keep}
    return frame.assign(**changed)


def _plain(values: "pd.Series[Any]") -> "pd.Series[Any]":
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind in ("integer", "floating", "mixed-integer-float", "decimal") or (kind == "empty" and values.isna().all()):
        whole = kind == "integer" and not values.isna().any()
        numbers = values.to_numpy(dtype=np.int64 if whole else np.float64, na_value=np.nan)
        return pd.Series(numbers, values.index)
    if values.dtype == object and kind == "mixed":
        try:
            values.nunique()
        except TypeError:
            return values.map(str)
    return values


def require(figure: str, name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a frame has these columns.

    Raises:
        ValueError: it lacks some, which the message names.
    """
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(
            f"plot.{figure}: {name} has no column {', '.join(missing)}; it has {', '.join(map(str, frame))}"
        )


def reached(runs: pd.DataFrame, threshold: float) -> "pd.Series[bool]":
    """Return which runs ended well with at least this training accuracy; all that ended well where it is not known."""
    done = runs.status == "done"
    return done & (runs.train_accuracy >= threshold) if "train_accuracy" in runs else done


def ended(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that have ended, well or not."""
    return runs[~runs.status.isin(_UNFINISHED)]


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
    if not frame.duplicated(list(keys)).any():
        return frame.assign(seeds=1, **{f"{name}_{end}": frame[name] for name in names for end in ("low", "high")})
    groups = frame.groupby(list(keys), sort=False, dropna=False)
    rows = frame.drop_duplicates(list(keys)).copy()
    for how, suffix in (("median", ""), ("min", "_low"), ("max", "_high")):
        values = groups[list(names)].agg(how).to_numpy()
        rows[[f"{name}{suffix}" for name in names]] = values
    return rows.assign(seeds=groups.size().to_numpy())


def best_of_each(runs: pd.DataFrame, threshold: float, best_by: str) -> tuple[list[str], bool]:
    """Return the ids of the runs of each optimizer's best setting, and whether all of them reached the threshold.

    A setting reaches the training accuracy that more than half of its seeds reach. Of those that reach the threshold,
    the best one has the smallest median of the final metric `best_by`; where none of an optimizer does, those within a
    point of its highest training accuracy count.
    """
    runs = ended(runs)
    if best_by not in runs:
        return [], True
    value = runs[best_by].astype(float).replace([np.inf, -np.inf], np.nan)
    accuracy = runs.train_accuracy.astype(float) if "train_accuracy" in runs else pd.Series(1.0, runs.index)
    accuracy = accuracy.where(runs.status == "done").fillna(-1.0)
    setting = by_seed(runs)
    level = setting.map(accuracy.groupby(setting).quantile(0.5, interpolation="lower"))
    highest = level.groupby(runs.optimizer).transform("max")
    least = (highest - _SLACK).clip(lower=0).where(highest < threshold, threshold)
    counts = (level >= least) & (accuracy >= least) & value.notna()
    medians = value[counts].groupby([runs.optimizer[counts], setting[counts]]).median()
    chosen = [number for _, number in medians.groupby(level=0).idxmin()]
    best = counts & setting.isin(chosen)
    return list(runs["id"][best]), bool((level[best] >= threshold).all())


@dataclasses.dataclass(frozen=True)
class SeedLines:
    """Metrics over epochs, a line per setting."""

    settings: pd.DataFrame
    """A row per setting, in the order of the table of optimizers: setting, the columns of its first run, seeds, best
    (whether it is the best of its optimizer)."""
    values: pd.DataFrame
    """A row per setting and epoch, as `over_seeds` returns it."""

    def of(self, setting: int) -> pd.DataFrame:
        """Return the epochs of a setting."""
        first, last = np.searchsorted(self.values.setting, (setting, setting + 1))
        return self.values.iloc[first:last]

    def of_best(self) -> pd.DataFrame:
        """Return the epochs of the best settings."""
        return self.values[self.values.setting.isin(self.settings.setting[self.settings.best])]

    def sample(self, most: int) -> pd.DataFrame:
        """Return at most so many settings, evenly spread over all, and the best ones beside them."""
        if len(self.settings) <= most:
            return self.settings
        chosen = np.zeros(len(self.settings), dtype=bool)
        chosen[np.linspace(0, len(self.settings) - 1, most).round().astype(int)] = True
        return self.settings[chosen | self.settings.best]


def seed_lines(runs: pd.DataFrame, epochs: pd.DataFrame, names: Sequence[str], best: Collection[str]) -> SeedLines:
    """Group the runs that have epochs by their settings.

    Args:
        runs: as `complete` returns them.
        epochs: rows of `run`, `epoch` and the metrics `names`.
        best: ids of the runs of the best settings.
    """
    runs = runs.assign(setting=by_seed(runs))
    runs = runs[runs["id"].isin(epochs.run)]
    own = epochs[epochs.run.isin(runs["id"])]
    setting = own.run.astype(object).map(runs.set_index(runs["id"].astype(object)).setting)
    own = own.assign(setting=setting.astype(int)).sort_values(["setting", "epoch"], kind="stable")
    settings = in_order(runs.drop_duplicates("setting"))
    settings = settings.assign(
        seeds=settings.setting.map(runs.groupby("setting").size()),
        best=settings.setting.isin(runs.setting[runs["id"].isin(set(best))]),
    )
    return SeedLines(settings, over_seeds(own, ["setting", "epoch"], names))
