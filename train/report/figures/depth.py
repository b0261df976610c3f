"""Collapse through the layers: NC1 and NC2 of every block's output, of each optimizer's best run."""

import pandas as pd

from ncollapse.train.report.figures.style import Drawing, line, lines_legend, one_legend, panels, scale, styled
from ncollapse.train.report.tables.depth import BLOCK_METRICS


def metrics_over_depth(slug: str, best: pd.DataFrame, rows: pd.DataFrame) -> Drawing:
    """Draw NC1 and NC2 over the blocks, a line per run.

    Args:
        best: the runs, as rows of `load_runs`.
        rows: from `tables.depth.blocks_at_the_end`.
    """
    last = int(rows.position.max())
    with styled():
        figure, grid = panels(1, 2, (7.6, 3.4))
        for axes, name in zip(grid[0], BLOCK_METRICS, strict=True):
            scale(axes, "y", rows[name])
            for _, run in best.iterrows():
                blocks = rows[rows.run == run["id"]].dropna(subset=[name])
                axes.plot(blocks.position, blocks[name], marker="o", **line(run.optimizer, run.coupling))
            axes.set_title(name.upper())
            axes.set_xlabel("block")
            axes.set_xticks(range(last + 1), [*(str(i + 1) for i in range(last)), "head"])
        lines_legend(grid[0, 0], zip(best.optimizer, best.coupling, strict=True))
        one_legend(figure, grid[0, 0], 8)
    caption = (
        "NC1 and NC2 of the output of every block, from the images to the last layer's input (head), at the end of the "
        "best run of each optimizer; maps and tokens are averaged over space."
    )
    return Drawing(f"layers-{slug}", caption, figure)
