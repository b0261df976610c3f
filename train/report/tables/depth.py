"""Collapse through the layers: NC1 and NC2 of every block's output at the end of each optimizer's best run."""

import pandas as pd

from ncollapse.train.report.tables.view import Column, View

#: The metrics that need no classifier, so that they exist for every block.
BLOCK_METRICS = ("nc1", "nc2")


def blocks_at_the_end(best: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run and block, and one for the input of the run's last layer, named "head".

    Args:
        best: runs, as rows of `load_runs`.
        layers: the blocks of these runs at their last evaluations.
    """
    head = best[["id", *BLOCK_METRICS]].rename(columns={"id": "run"})
    head = head.assign(position=layers.groupby("run").position.max().reindex(head.run).to_numpy() + 1, layer="head")
    columns = ["run", "position", "layer", *BLOCK_METRICS]
    rows = pd.concat([layers[columns], head[columns]])
    rows = rows[rows.run.isin(layers.run)]
    rows.insert(0, "optimizer", rows.run.map(best.set_index("id").optimizer))
    return rows.sort_values(["optimizer", "run", "position"]).reset_index(drop=True)


def blocks_view(slug: str, rows: pd.DataFrame) -> View:
    """Show the rows of `blocks_at_the_end`."""
    columns = (Column.optimizer(), Column.text("layer"), *(Column.metric(name) for name in BLOCK_METRICS))
    return View(f"layers-{slug}", "The blocks of the figure.", columns, rows)
