"""Collapse through the layers: NC1 and NC2 of every block's output, of each optimizer's best run."""

import pandas as pd

from ncollapse.train.report.figures import style
from ncollapse.train.report.tables.depth import BLOCK_METRICS


def metrics_over_depth(slug: str, best: pd.DataFrame, rows: pd.DataFrame) -> style.Drawing:
    """Draw NC1 and NC2 over the blocks, a line per run.

    Args:
        best: the runs, as rows of `load_runs`.
        rows: from `tables.depth.blocks_at_the_end`.
    """
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
