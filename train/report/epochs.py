"""Metrics over epochs: of each optimizer's best run, NC0 with its exact prediction; and of all runs."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.plot.over_epochs import PHASES, Thick, curves_measured, draw_curves, draw_phase
from ncollapse.plot.run_panels import draw_panels, draw_row_sum
from ncollapse.plot.style import Drawing
from ncollapse.train.report.best import best_settings
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import OwnMetrics

#: Panels of the figure of metrics of the user's, at most.
_MOST_PANELS = 12


def nc0_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame) -> Drawing:
    """Draw NC0 over epochs, a line per run of `best`, with the exact prediction for SGD and SGDW as circles."""
    found = {run["id"]: predicted_nc0(run) for _, run in best.iterrows()}
    known = {run: prediction for run, prediction in found.items() if prediction is not None}
    return draw_row_sum(f"nc0-{slug}", best, histories, known)


def nc123_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """Draw the metrics in `names`, of NC1, NC2 and NC3, over epochs: a panel per metric, a line per run."""
    about = (
        "NC1 = tr(Σ_W Σ_B⁺)/K, the scatter within classes relative to that between them; NC2 and NC3, the distances "
        "of the class means M and of the product W·Mᵀ from a simplex; over epochs of the same runs."
    )
    return draw_panels(f"nc123-{slug}", best, histories, names, about)


def own_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame, own: OwnMetrics) -> Drawing:
    """Draw metrics of the user's, of which `histories` has values, over epochs: a panel per metric, a line per run."""
    names = list(own)[:_MOST_PANELS]
    more = f" {len(own) - len(names)} more are in the tables." if len(own) > len(names) else ""
    about = "; ".join(name if own[name] in ("", name) else f"{name}: {own[name]}" for name in names)
    text = f"Metrics of your own over epochs of the same runs: {about}.{more}"
    return draw_panels(f"own-{slug}", best, histories, names, text)


def metrics_over_epochs(slug: str, runs: pd.DataFrame, histories: pd.DataFrame, selection: Selection) -> Drawing:
    """Draw NC0–NC4, training loss and training error over epochs, of all these runs: `ncollapse.plot.curves`."""
    names = curves_measured(histories)
    return draw_curves(f"curves-{slug}", runs, histories, names, _thick(runs, selection))


def phase_portrait(
    slug: str, runs: pd.DataFrame, histories: pd.DataFrame, selection: Selection | None = None
) -> Drawing:
    """Draw NC1 against NC0 and against NC3 over epochs, of all these runs: `ncollapse.plot.phase`."""
    return draw_phase(f"phase-{slug}", runs, histories, PHASES, _thick(runs, selection or Selection()))


def _thick(runs: pd.DataFrame, selection: Selection) -> Thick:
    return Thick(best_settings(runs, selection).id, "the best setting of each optimizer")
