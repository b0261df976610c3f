"""Runs held against each other, as DataFrames: by coupling, by momentum, by accuracy, and by which metrics collapse."""

import pandas as pd

from ncollapse.train.report.read import Results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.settings import alike, described, family
from ncollapse.train.report.tables.main import in_order, tried

#: The four that the paper's figures show.
NC = ("nc0", "nc1", "nc2", "nc3")
#: Coupled shares that it takes to see more than the two ends.
SHARES = 3


def interpolations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Runs that ended well and differ in their coupled share alone, with three shares or more; a row per run.

    Columns: group (a number), settings (what they share), reached (the threshold), and those of `runs`. An update rule
    counts as one whatever its name: adamw with coupling 1 is adam.
    """
    done = runs[runs.status == "done"]
    done = done.assign(optimizer=family(done.optimizer))
    done["group"] = alike(done, but=("coupling",))
    done["settings"] = described(done, but=("coupling",))
    done["reached"] = done.id.isin(selection.eligible(done).id)
    done = done.drop_duplicates(["group", "coupling"])
    shares = done.groupby("group").coupling.transform("nunique")
    return in_order(done[shares >= SHARES].sort_values(["group", "coupling"]))


def at_equal_loss(runs: pd.DataFrame, results: Results, selection: Selection) -> pd.DataFrame:
    """Runs that reached the threshold and differ in their momentum alone, each where it reaches the loss of its group.

    That loss is the lowest that all of the group reach; a run is read at its first evaluated epoch that is not above.
    Columns: group (a number), optimizer, coupling, settings (what they share), momentum, loss (of the group), epoch,
    train_loss and NC0–NC3 there, run.
    """
    eligible = selection.eligible(runs)
    eligible = eligible.assign(
        group=alike(eligible, but=("momentum",)), settings=described(eligible, but=("momentum",))
    )
    eligible = eligible[eligible.groupby("group").momentum.transform("nunique") > 1]
    lowest = eligible.id.map(results.lowest_loss(eligible.id)).astype(float)
    eligible = eligible.assign(loss=lowest.groupby(eligible.group).transform("max"))
    there = results.first_at(dict(zip(eligible.id, eligible.loss, strict=True)))
    columns = ["id", "group", "optimizer", "coupling", "settings", "momentum", "loss"]
    frame = eligible[columns].merge(there[["run", "epoch", "train_loss", *NC]], left_on="id", right_on="run")
    return in_order(frame.drop(columns="id").sort_values(["group", "momentum"]))


def momentum_steps(readings: pd.DataFrame) -> pd.DataFrame:
    """What more momentum does at equal loss: a row per optimizer and step from one momentum to the next.

    Columns: optimizer, lower, higher, pairs, and for NC0–NC3 the median of the metric at the higher momentum over that
    at the lower one.
    """
    ordered = readings.sort_values(["group", "momentum"])
    before = ordered.groupby("group")[["momentum", *NC]].shift()
    steps = ordered[["optimizer"]].assign(lower=before.momentum, higher=ordered.momentum)
    for name in NC:
        steps[name] = ordered[name] / before[name]
    groups = steps.dropna(subset=["lower"]).groupby(["optimizer", "lower", "higher"])
    return in_order(groups[list(NC)].median().assign(pairs=groups.size()).reset_index())


def rank_correlations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Spearman's rank correlation of validation accuracy with each metric, over the runs that reached the threshold.

    A row per metric and optimizer, the optimizer "all" first. Columns: optimizer, metric, correlation (NaN where either
    does not vary), runs.
    """
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
    rows = []
    for optimizer in ("all", *tried(eligible)):
        own = eligible if optimizer == "all" else eligible[eligible.optimizer == optimizer]
        for name in NC:
            both = own[[name, "val_accuracy"]].dropna().rank()
            varies = (both.nunique() > 1).all()
            rows.append((optimizer, name, both[name].corr(both.val_accuracy) if varies else float("nan"), len(both)))
    return pd.DataFrame(rows, columns=["optimizer", "metric", "correlation", "runs"])


def partial_collapse(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """How far NC1 and NC2 go without NC0 and NC3; a row per optimizer, over the runs that reached the threshold.

    Columns: optimizer, runs, good (runs whose NC1 and NC2 are both in the better half of all runs), partial (those of
    them whose NC0 did not fall or whose NC3 is in the worse half), and of the run with the smallest NC1 its id,
    settings, NC1, NC2, NC0 over its start, NC3.
    """
    eligible = selection.eligible(runs)
    settings = described(runs).set_axis(runs.id)
    middle = eligible[list(NC)].median()
    good = (eligible.nc1 <= middle.nc1) & (eligible.nc2 <= middle.nc2)
    fails = (eligible.nc0 >= eligible.nc0_start) | (eligible.nc3 > middle.nc3)
    rows = []
    for optimizer in tried(eligible):
        own = eligible[eligible.optimizer == optimizer]
        row = {
            "optimizer": optimizer,
            "runs": len(own),
            "good": int(good[own.index].sum()),
            "partial": int((good & fails)[own.index].sum()),
        }
        if own.nc1.notna().any():
            run = own.iloc[own.nc1.argmin()]
            row |= {"run": run["id"], "settings": settings[run["id"]], "nc1": run.nc1, "nc2": run.nc2}
            row |= {"nc0_over_start": run.nc0 / run.nc0_start, "nc3": run.nc3}
        rows.append(row)
    columns = ["optimizer", "runs", "good", "partial", "nc1", "nc2", "nc0_over_start", "nc3", "settings", "run"]
    return pd.DataFrame(rows, columns=columns)


def cells(runs: pd.DataFrame, axis: str, selection: Selection) -> pd.DataFrame:
    """Final metrics over weight decay and another setting: a row per optimizer and cell with a finished run.

    Of each metric the smallest value of the cell's runs that reached the threshold; where none did, of all that ended
    well. Columns: optimizer, weight_decay, `axis`, done, reached, missed (counts), NC0–NC3.
    """
    runs = runs[runs.status.isin(("done", "diverged", "degenerate"))]
    done = runs.status == "done"
    reached = runs.id.isin(selection.eligible(runs).id)
    keys = ["optimizer", "weight_decay", axis]
    groups = runs.assign(done=done, reached=reached, missed=~reached).groupby(keys)
    frame = groups[["done", "reached", "missed"]].sum()
    best = runs[reached].groupby(keys)[list(NC)].min()
    others = runs[done].groupby(keys)[list(NC)].min()
    frame[list(NC)] = best.reindex(frame.index).where(frame.reached > 0, others.reindex(frame.index))
    return in_order(frame.reset_index())
