"""The cells of heat maps: final metrics over weight decay and one other setting, as medians over seeds."""

import numpy as np
import pandas as pd

from ncollapse.plot.frames import by_seed, ended, over_seeds, reached
from ncollapse.plot.settings import in_order

#: Setting on the vertical axis -> its name in texts.
AXES = {"lr": "learning rate", "momentum": "momentum β"}
#: The metrics that maps show.
SHOWN = ("nc0", "nc1", "nc2", "nc3")
#: Values of a setting that a map tells apart, and rows of all maps together; neighbouring values share a row beyond.
_MOST_VALUES, _MOST_ROWS = 25, 150


def cells_of(runs: pd.DataFrame, axis: str, threshold: float) -> pd.DataFrame:
    """Return final metrics over weight decay and the setting `axis`: a row per optimizer and cell with a finished run.

    A setting is its runs that differ only in the seed. It reached the threshold where more than half of its finished
    seeds did, and its value is the median over those; the value of a cell is the smallest of its settings. Where none
    reached it, it is the smallest of all settings, a median over the seeds that ended well.

    Returns:
        Columns: optimizer, weight_decay, `axis`; done, reached, missed (numbers of runs); settings, settings_reached;
        seeds (of a setting, at most); NC0–NC3 where they are measured, each with its range over the seeds as NAME_low
        and NAME_high.
    """
    runs = ended(runs)
    done = runs.status == "done"
    counts = runs.assign(done=done, reached=reached(runs, threshold), setting=by_seed(runs))
    counts["missed"] = ~counts.reached
    keys = ["optimizer", "weight_decay", axis]
    per_setting = counts.groupby([*keys, "setting"])
    settings = per_setting.reached.mean().gt(0.5).rename("settings_reached").to_frame()
    settings["settings"], settings["seeds"] = 1, per_setting.size()
    totals = {"settings": "sum", "settings_reached": "sum", "seeds": "max"}
    frame = counts.groupby(keys)[["done", "reached", "missed"]].sum().join(settings.groupby(keys).agg(totals))
    passed = settings.settings_reached.groupby("setting").first()
    best = _smallest(counts[counts.reached & counts.setting.map(passed)], keys)
    others = _smallest(counts[done], keys)
    for name in best:
        frame[name] = (
            best[name].reindex(frame.index).where(frame.settings_reached > 0, others[name].reindex(frame.index))
        )
    return in_order(frame.reset_index())


def _smallest(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the smallest median over seeds of each metric, with the range over the seeds of that setting."""
    names = [name for name in SHOWN if name in runs]
    settings = over_seeds(runs, [*keys, "setting"], names).reset_index(drop=True)
    found: dict[str, pd.Series[float]] = {}
    for name in names:
        ranked = settings.dropna(subset=[name]).sort_values(name, kind="stable")
        chosen = ranked.drop_duplicates(keys).set_index(keys)
        found |= {column: chosen[column] for column in (name, f"{name}_low", f"{name}_high")}
    return pd.DataFrame(found)


def binned(runs: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, str]:
    """Return the runs with so few weight decays and values of `axis` as maps can show, and a sentence that says so.

    Neighbouring values of an optimizer share the smallest of them; the sentence is empty where all values are few.
    """
    most = {"weight_decay": _MOST_VALUES, axis: max(4, min(_MOST_VALUES, _MOST_ROWS // runs.optimizer.nunique()))}
    largest = 0
    runs = runs.copy()
    for _, group in runs.groupby("optimizer"):
        for name, count in most.items():
            values = np.sort(group[name].unique())
            if len(values) > count:
                firsts = np.arange(len(values)) * count // len(values)  # of each value, its bin
                starts = np.searchsorted(firsts, np.arange(count))
                shared = values[starts][firsts]
                runs.loc[group.index, name] = shared[np.searchsorted(values, group[name])]
                largest = max(largest, int(np.bincount(firsts).max()))
    if not largest:
        return runs, ""
    return runs, (
        f" There are too many values to tell apart: up to {largest} neighbouring ones share a row or a column, which "
        "is labelled with the smallest."
    )
