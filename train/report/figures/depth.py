"""Figure of collapse through the layers: NC1 and NC2 of every block's output, of each optimizer's best run."""

import pandas as pd

from ncollapse.train.report.figures.style import Drawing, line, lines_legend, one_legend, panels, scale, styled

NAMES = ("nc1", "nc2")


def at_the_end(best: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """A row per run and block at the run's last evaluation, and one for the head's input, with the run's optimizer."""
    head = best[["id", *NAMES]].rename(columns={"id": "run"})
    head = head.assign(position=layers.groupby("run").position.max().reindex(head.run).to_numpy() + 1, layer="head")
    rows = pd.concat([layers[["run", "position", "layer", *NAMES]], head[["run", "position", "layer", *NAMES]]])
    rows = rows[rows.run.isin(layers.run)]
    rows.insert(0, "optimizer", rows.run.map(best.set_index("id").optimizer))
    return rows.sort_values(["optimizer", "run", "position"]).reset_index(drop=True)


def through_the_layers(slug: str, best: pd.DataFrame, rows: pd.DataFrame) -> Drawing:
    """NC1 and NC2 by block; `rows` are those of `at_the_end`."""
    last = int(rows.position.max())
    with styled():
        figure, grid = panels(1, 2, (7.6, 3.4))
        for axes, name in zip(grid[0], NAMES, strict=True):
            scale(axes, "y", rows[name])
            for _, run in best.iterrows():
                own = rows[rows.run == run["id"]].dropna(subset=[name])
                axes.plot(own.position, own[name], marker="o", **line(run.optimizer, run.coupling))
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
