"""Claim 4: even with much larger decay, decoupled decay does not reach what coupled decay reaches."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from ncollapse.formatting import number
from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.coupled_pairs import decoupled, said_by_metric
from ncollapse.train.findings.evidence import of_paper
from ncollapse.train.findings.lacking import lack, more_settings
from ncollapse.train.findings.statistics import Floats, grouped, interval, medians, resampled_medians
from ncollapse.train.results.schema import FINISHED

_METRICS = ("nc0", "nc2", "nc3")
#: Decoupled decays must have been tried up to this multiple of that of the best coupled setting.
_LARGER = 10
#: The fewest settings of each form, for a best of them to mean something.
_FEWEST = 2
#: Ratio within which one seed cannot tell the best settings apart.
_ALIKE = 1.25
#: The paper's optimizers other than SGD, in their coupled form.
_COUPLED = tuple(name for name in PAPER_OPTIMIZERS if row_of(name).coupling and row_of(name).family != "sgd")


def larger_decay_does_not_help(evidence: Evidence) -> Finding:
    """Compare the best of all decoupled settings with the best of all coupled settings."""
    fit, tried = of_paper(evidence.fit), of_paper(evidence.runs[evidence.runs.status.isin(FINISHED)])
    fit, tried = fit[fit.weight_decay > 0], tried[tried.weight_decay > 0]
    parts: list[Comparison] = []
    behind: list[str] = []
    lacking: list[tuple[str, str]] = []
    for name in _COUPLED:
        row, other = row_of(name), row_of(decoupled(name))
        coupled, mine = (fit[(fit.family == row.family) & (fit.coupling == c)] for c in (1, 0))
        behind += [*coupled.id, *mine.id]
        decays = tried.weight_decay[(tried.family == row.family) & (tried.coupling == 0)]
        needed, of_family = 0.0, []
        for metric in _METRICS:
            title = f"{metric.upper()}, {other.label} against {row.label}"
            part, decay = _comparison(title, coupled, mine, decays, metric)
            of_family.append(part)
            needed = max(needed, decay)
        parts += of_family
        few = [
            one.label
            for one, runs in ((row, coupled), (other, mine))
            if runs.dropna(subset=list(_METRICS)).setting.nunique() < _FEWEST
        ]
        if few:
            what = f"{_FEWEST} settings of {' and of '.join(few)} with decay that fit the training data"
            lacking.append(more_settings(evidence, what, [row.name, other.name]))
        elif not _tried(decays, needed):
            what = f"{other.label} with a decay of {number(needed)}, {_LARGER} × that of the best {row.label}"
            where = f"optimizer={other.name} weight_decay={float(mine.weight_decay.max())!r}"
            lacking.append(lack(evidence, what, where, {"weight_decay": [float(number(needed))]}))
        elif any(part.verdict == "not enough" for part in of_family):
            what = (
                f"a second seed of {row.label} and {other.label}: without one, ratios within {_ALIKE:g} decide nothing"
            )
            where = f"optimizer={row.name},{other.name} weight_decay>0"
            lacking.append(lack(evidence, what, where, waits=evidence.runs.seed.nunique() > 1))
    forms, of_coupled = (
        " and ".join(row_of(name).label for name in names) for names in (map(decoupled, _COUPLED), _COUPLED)
    )
    return Finding(
        4, f"Even with much larger decay, {forms} do not reach what {of_coupled} reach.",
        "Ratio of the best setting under decoupled decay to the best under coupled decay, of all settings with decay "
        f"that fit the training data ({evidence.selection.percent}; a setting is the median of its seeds); decoupled "
        f"decays up to {_LARGER} × that of the best coupled setting or more were tried, {_FEWEST} settings of each "
        "form fit. Holds: above 1, its 95 % interval over seeds too; fails otherwise. With one seed, ratios between "
        f"{number(1 / _ALIKE)} and {_ALIKE:g} decide nothing.",
        said_by_metric(parts, "best decoupled/best coupled"), tuple(parts), tuple(behind),
        *(lacking[0] if lacking else ("", "")),
    )  # fmt: skip


class _Best(NamedTuple):
    """The best of several settings: its value, the median over seeds, its decay, and the same of resampled seeds."""

    value: float
    decay: float
    settings: int
    resampled: Floats  # [B]; empty with one seed


def _best(runs: pd.DataFrame, metric: str, seed: int) -> _Best | None:
    runs = runs[np.isfinite(runs[metric])]
    if not len(runs):
        return None
    table = grouped(runs[metric], runs.setting)
    middle = medians(table)
    decays = runs.groupby("setting").weight_decay.first().to_numpy()  # in the order of `grouped`
    resampled = np.empty(0)
    if table.shape[1] > 1:
        resampled = resampled_medians(
            runs[metric], runs.setting, lambda values: values.min(axis=-1), seed=seed, redraw_groups=False
        )
    place = int(middle.argmin())
    return _Best(float(middle[place]), float(decays[place]), len(middle), resampled)


def _tried(decays: "pd.Series[float]", needed: float) -> bool:
    return bool(decays.max() >= needed * (1 - 1e-9))  # 10 × 0.07 is not 0.7 in floating point


def _comparison(
    name: str, coupled: pd.DataFrame, mine: pd.DataFrame, decays: "pd.Series[float]", metric: str
) -> tuple[Comparison, float]:
    """Compare the best settings, and return the decay that decoupled runs must have been tried with."""
    best, theirs = (_best(runs, metric, seed) for seed, runs in enumerate((mine, coupled)))
    if best is None or theirs is None:
        return Comparison(name, "ratio of the best", math.nan, "not enough", 0, "settings"), 0.0
    needed = _LARGER * theirs.decay
    low, high = math.nan, math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(np.divide(best.value, theirs.value))
        if len(best.resampled) and len(theirs.resampled):
            low, high = interval(best.resampled / theirs.resampled)
    verdict: Verdict = "fails"
    few = min(best.settings, theirs.settings) < _FEWEST
    if (
        not _tried(decays, needed)
        or few
        or not math.isfinite(value)
        or (math.isnan(low) and 1 / _ALIKE <= value <= _ALIKE)
    ):
        verdict = "not enough"
    elif value > 1 and not low <= 1:
        verdict = "holds"
    more = {
        "best decoupled": best.value, "of settings": float(best.settings), "its decay": best.decay,
        "best coupled": theirs.value, "of coupled settings": float(theirs.settings), "its coupled decay": theirs.decay,
        "largest decoupled decay tried": float(decays.max()),
        "largest decoupled decay that fits": float(mine.weight_decay.max()),
    }  # fmt: skip
    return Comparison(name, "ratio of the best", value, verdict, best.settings, "settings", low, high, more), needed
