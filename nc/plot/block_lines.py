"""Collapse through the layers: NC1 and NC2 of every block's output at the end of a run."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.frames import by_seed, complete, over_seeds, plain
from ncollapse.plot.looks import about_lines, shown
from ncollapse.plot.settings import in_order
from ncollapse.plot.style import Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Figure

#: The metrics that need no classifier, so that they exist for every block.
BLOCK_METRICS = ("nc1", "nc2")
#: Lines beyond which they are thin and without marks.
_MANY_LINES = 20


def over_depth(runs: pd.DataFrame, layers: pd.DataFrame) -> "Figure":
    """Draw NC1 and NC2 over the blocks of a network, from the images to the last layer's input, at the end of runs.

    A line is a run, or the median of the runs that differ only in the seed, with a band over their range.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: id, optimizer. Used where they are
            there: nc1 and nc2, of the last layer's input; coupling; the settings and seed.
        layers: a row per run, evaluated epoch and block, as `load_layers` returns it. Needed: run, position, nc1, nc2;
            epoch, where there are several.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("depth.png")`. `figure.get_label()` says what
        it shows.

    Raises:
        ValueError: a missing column, no run, or layers of none of the runs.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.over_depth(load_runs("results"), load_layers("results")).savefig("depth.png")
    """
    layers = plain("over_depth", "layers", layers, ("run", "position", *BLOCK_METRICS))
    runs = complete("over_depth", runs, ("id",))
    layers = layers[layers.run.isin(runs["id"])]
    if layers.empty:
        raise ValueError(f"plot.over_depth: layers has no row whose run is the id of one of the {len(runs)} runs")
    with shown(runs.optimizer):
        return draw_depth("over_depth", runs, blocks_at_the_end(runs, layers)).labelled()


def blocks_at_the_end(runs: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run and block at its last epoch, and one for the input of the last layer, named "head"."""
    if "epoch" in layers:
        layers = layers[layers.epoch == layers.groupby("run").epoch.transform("max")]
    if "layer" not in layers:
        layers = layers.assign(layer=layers.position.astype(str))
    columns = ["run", "position", "layer", *BLOCK_METRICS]
    rows = [layers[columns]]
    if set(BLOCK_METRICS) <= set(runs):
        head = runs[["id", *BLOCK_METRICS]].rename(columns={"id": "run"})
        last = layers.groupby("run").position.max().reindex(head.run).to_numpy()
        rows.append(head.assign(position=last + 1, layer="head")[columns])
    frame = pd.concat(rows)
    frame = frame[frame.run.isin(layers.run)]
    frame.insert(0, "optimizer", frame.run.map(runs.set_index("id").optimizer))
    return frame.sort_values(["optimizer", "run", "position"]).reset_index(drop=True)


def draw_depth(name: str, runs: pd.DataFrame, rows: pd.DataFrame) -> Drawing:
    """Draw the rows of `blocks_at_the_end`, a line per setting."""
    known = runs.assign(setting=by_seed(runs)).set_index("id")
    rows = rows.assign(setting=rows.run.map(known.setting), coupling=rows.run.map(known.coupling).astype(float))
    lines = in_order(over_seeds(rows.sort_values(["setting", "position"]), ["setting", "position"], BLOCK_METRICS))
    several = bool((lines.seeds > 1).any())
    last, with_head = int(rows.position.max()), bool((rows.layer == "head").any())
    many = lines.setting.nunique() > _MANY_LINES
    look = {"lw": 0.7, "alpha": 0.4} if many else {"marker": "o"}
    with style.styled():
        figure, grid = style.panels(1, 2, (7.6, 3.4))
        for axes, metric in zip(grid[0], BLOCK_METRICS, strict=True):
            style.scale(axes, "y", lines[metric])
            for _, line in lines.groupby("setting", sort=False):
                kind = style.line(line.optimizer.iloc[0], line.coupling.iloc[0])
                drawn = line.dropna(subset=[metric])
                axes.plot(drawn.position, drawn[metric], **kind, **look)
                if several and not many:
                    low, high = drawn[f"{metric}_low"], drawn[f"{metric}_high"]
                    axes.fill_between(drawn.position, low, high, color=kind["color"], alpha=0.15, linewidth=0)
            axes.set_title(metric.upper())
            axes.set_xlabel("block")
            labels = [str(i + 1) for i in range(last + 1)]
            if with_head:
                labels[-1] = "head"
            every = int(np.ceil((last + 1) / 16))
            at = sorted({*range(0, last, every), last})
            axes.set_xticks(at, [labels[i] for i in at])
        used = lines.assign(coupled=lines.coupling > 0).drop_duplicates(["optimizer", "coupled"])
        style.legend_entries(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 8)
    seeds = " A line is the median over the runs that differ only in the seed, the band their range." * several
    caption = (
        "NC1 and NC2 of the output of every block, from the images to the last layer's input (head), at the end of the "
        f"runs; maps and tokens are averaged over space.{seeds} {about_lines(lines.optimizer)}"
    )
    return Drawing(name, caption, figure)
