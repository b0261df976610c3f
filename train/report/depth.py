"""Collapse through the layers: NC1 and NC2 of every block's output at the end of each optimizer's best run."""

import pandas as pd

from ncollapse.plot.block_lines import BLOCK_METRICS, blocks_at_the_end, draw_depth
from ncollapse.plot.style import Drawing
from ncollapse.train.report.view import Column, View

__all__ = ["BLOCK_METRICS", "blocks_at_the_end", "blocks_view", "metrics_over_depth"]


def blocks_view(slug: str, rows: pd.DataFrame) -> View:
    """Show the rows of `blocks_at_the_end`."""
    columns = (Column.optimizer(), Column.text("layer"), *(Column.metric(name) for name in BLOCK_METRICS))
    return View(f"layers-{slug}", "The blocks of the figure.", columns, rows)


def metrics_over_depth(slug: str, best: pd.DataFrame, rows: pd.DataFrame) -> Drawing:
    """Draw NC1 and NC2 of `blocks_at_the_end` over the blocks, a line per run of `best`."""
    return draw_depth(f"layers-{slug}", best, rows)
