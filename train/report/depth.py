"""Collapse through the layers: NC1 and NC2 of every block's output at the end of each optimizer's best run."""

import pandas as pd

from ncollapse.plot import style
from ncollapse.train.report.view import Column, View

#: The metrics that need no classifier, so that they exist for every block.
BLOCK_METRICS = ("nc1", "nc2")


def blocks_at_the_end(best: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run of `best` and block, and one for the input of the run's last layer, named "head"."""
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


def metrics_over_depth(slug: str, best: pd.DataFrame, rows: pd.DataFrame) -> style.Drawing:
    """Draw NC1 and NC2 of `blocks_at_the_end` over the blocks, a line per run of `best`."""
    last = int(rows.position.max())
    with style.styled():
        figure, grid = style.panels(1, 2, (7.6, 3.4))
        for axes, name in zip(grid[0], BLOCK_METRICS, strict=True):
            style.scale(axes, "y", rows[name])
            style.run_lines(axes, best, rows, "position", name, marker="o")
            axes.set_title(name.upper())
            axes.set_xlabel("block")
            axes.set_xticks(range(last + 1), [*(str(i + 1) for i in range(last)), "head"])
        style.legend_entries(grid[0, 0], zip(best.optimizer, best.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 8)
    caption = (
        "NC1 and NC2 of the output of every block, from the images to the last layer's input (head), at the end of the "
        "best run of each optimizer; maps and tokens are averaged over space."
    )
    return style.Drawing(f"layers-{slug}", caption, figure)
