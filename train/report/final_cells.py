"""Heat maps of the final metrics over weight decay and learning rate or momentum, and the table of their cells."""

import pandas as pd

from ncollapse.plot.heat_cells import AXES, binned, cells_of
from ncollapse.plot.heat_panels import draw_heat_map
from ncollapse.plot.style import Drawing
from ncollapse.train.report.selection import Selection

__all__ = ["AXES", "binned", "cells", "heat_maps"]


def cells(runs: pd.DataFrame, axis: str, selection: Selection) -> pd.DataFrame:
    """Return final metrics over weight decay and the setting `axis`, as `cells_of` does."""
    return cells_of(runs, axis, selection.threshold)


def heat_maps(slug: str, frame: pd.DataFrame, axis: str, threshold: str, note: str = "") -> Drawing:
    """Draw `cells`; `note` is the sentence of `binned`, for the caption."""
    seeds = ", with their range over the seeds" if (frame.seeds > 1).any() else ""
    about = f"{note} All values{seeds}: tables/heat-{axis}-{slug}.csv."
    return draw_heat_map(f"heat-{axis}-{slug}", frame, axis, threshold, about)
