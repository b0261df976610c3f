"""How the last layer comes to collapse: geometry over epochs of a run with coupled and one with decoupled decay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.plot.collapse_panels import MOST_EPOCHS, geometry
from ncollapse.plot.looks import look_of
from ncollapse.plot.settings import described
from ncollapse.plot.style import Drawing
from ncollapse.plot.three_classes import CENTRE, CLASS_COLOURS, TRIANGLE, evenly, extent
from ncollapse.snapshot import Snapshot

#: Run -> epoch -> snapshot, as `load_geometry` returns them.
SnapshotsOfRuns = Mapping[str, Mapping[int, Snapshot]]

#: Those that are shown where both are there: the paper's extremes.
_EXTREMES = ("sgd", "adamw")
#: Optimizers in the figure of the ends, at most.
_MOST_ENDS = 10
#: Steps of the slider, at most.
_STEPS = 5
#: Side of a picture in its own units; length and half the width of the head of an arrow.
_SIDE, _HEAD, _WIDE = 300, 13.0, 4.5


@dataclass(frozen=True)
class _Shown:
    """An optimizer's best run: label and settings as text, and its usable snapshots by epoch, at least one."""

    optimizer: str
    coupling: float
    label: str
    settings: str
    snapshots: dict[int, Snapshot]

    @property
    def last(self) -> Snapshot:
        return self.snapshots[max(self.snapshots)]


def collapse_drawings(slug: str, best: pd.DataFrame, snapshots: SnapshotsOfRuns) -> list[Drawing]:
    """Draw `geometry` of one run with coupled and one with decoupled decay over epochs, and of all runs at their end.

    Args:
        slug: of the runs' part of the report; the end of the drawings' names.
        best: a row an optimizer, as `best_runs` returns them.
        snapshots: of these runs. Of those that have both, SGD and AdamW are drawn, else the first optimizer with
            coupled and the first with decoupled decay, else the first two; the ends are drawn where there are more.
            There is no drawing without a snapshot.
    """
    drawings = []
    runs = _usable(best, snapshots, lambda snapshot: True)
    for place, run in enumerate(_compared(runs), 1):
        epochs = [str(epoch) for epoch in evenly(sorted(run.snapshots), MOST_EPOCHS)]
        at = f"epochs {', '.join(epochs[:-1])} and {epochs[-1]}" if epochs[1:] else f"epoch {epochs[0]}"
        caption = f"{run.label}, {run.settings}, at {at}. {_about(run.last)}"
        drawings.append(Drawing(f"geometry-{place}-{slug}", caption, geometry(run.snapshots)))
    if len(runs) > len(drawings):
        ends: dict[str, Snapshot] = {}
        for run in runs[:_MOST_ENDS]:
            # Labels that are cut may be the same.
            ends[run.optimizer if run.label in ends else run.label] = run.last
        more = f" The first {_MOST_ENDS} of {len(runs)} optimizers are shown." if len(runs) > _MOST_ENDS else ""
        caption = f"The end of the best run of each optimizer.{more} {_about(runs[0].last)}"
        drawings.append(Drawing(f"geometry-ends-{slug}", caption, geometry(ends)))
    return drawings


def _about(snapshot: Snapshot) -> str:
    """Say what the panels of `geometry` show."""
    k = len(snapshot.means)
    kept = f" Of {snapshot.classes:,} classes the first {k} are shown." if k < snapshot.classes else ""
    return (
        "Cosines of the centred class means, cosines of the rows of W, W Mᵀ over its largest absolute entry, singular "
        "values of W, and three classes in the plane of their means. Below each matrix: mean and standard deviation "
        f"off its diagonal; a simplex has −{1 / (snapshot.classes - 1):.2f} ± 0 there. A singular value is filled by "
        "the squared cosine of its direction with 1: collapse needs the filled one, which is what NC0 measures, to "
        f"vanish.{kept}"
    )


def simplex_slider(slug: str, best: pd.DataFrame, snapshots: SnapshotsOfRuns) -> str:
    """Return HTML that shows three classes in the plane of their means, and a slider over up to five epochs.

    The runs are chosen as by `collapse_drawings`, of those with snapshots of three classes; it is empty without any.
    Without `SLIDER_SCRIPT`, which the page has once, it shows the last epoch; on paper it shows all of them.
    """
    import jinja2

    runs = _compared(_usable(best, snapshots, lambda snapshot: bool(snapshot.three)))
    if not runs:
        return ""
    epochs = evenly(sorted({epoch for run in runs for epoch in run.snapshots}), _STEPS)
    # A run that ended early, or has no snapshot yet, shows the one that is nearest in time.
    moments = [[_at(run.snapshots, epoch) for epoch in epochs] for run in runs]
    half = extent([run.snapshots[epoch] for run, steps in zip(runs, moments, strict=True) for epoch in steps])
    shown = [
        (run.label, run.settings, [_picture(epoch, run.snapshots[epoch], half) for epoch in steps])
        for run, steps in zip(runs, moments, strict=True)
    ]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_FRAGMENT)
    triangle = _closed(_placed(TRIANGLE, half))
    return template.render(slug=slug, epochs=epochs, runs=shown, side=_SIDE, triangle=triangle, style=_STYLE)


def _usable(best: pd.DataFrame, snapshots: SnapshotsOfRuns, usable: Callable[[Snapshot], bool]) -> list[_Shown]:
    """Return the runs that have usable snapshots, in their order."""
    found = []
    for (_, run), settings in zip(best.iterrows(), described(best), strict=True):
        kept = {epoch: snapshot for epoch, snapshot in snapshots.get(run["id"], {}).items() if usable(snapshot)}
        if kept:
            found.append(_Shown(run.optimizer, run.coupling, look_of(run.optimizer).label, settings, kept))
    return found


def _compared(runs: list[_Shown]) -> list[_Shown]:
    """Return the runs that are shown over epochs, at most two."""
    extremes = [run for name in _EXTREMES for run in runs if run.optimizer == name]
    decays = [run for run in runs if run.coupling > 0][:1] + [run for run in runs if run.coupling == 0][:1]
    return next((pair for pair in (extremes, decays) if len(pair) == 2), runs[:2])


def _at(of_run: Mapping[int, Snapshot], epoch: int) -> int:
    """Return the last epoch with a snapshot up to this one, or the first one after it."""
    return max((known for known in of_run if known <= epoch), default=min(of_run))


def _placed(points: Any, half: float) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return points of the plane in the units of a picture, whose y axis points down."""
    return (np.asarray(points) - CENTRE) / half * (_SIDE / 2) * (1, -1) + _SIDE / 2


def _picture(epoch: int, snapshot: Snapshot, half: float) -> dict[str, Any]:
    """Return what the template draws of a snapshot, class by class."""
    classes = []
    for k, colour, samples, corner, row, outward in zip(
        snapshot.three, CLASS_COLOURS, snapshot.samples, snapshot.corners, snapshot.rows, TRIANGLE, strict=True
    ):
        points = _placed(samples[np.isfinite(samples).all(-1)], half)
        arrow = _arrow(_placed([(0, 0), row], half)) if np.isfinite(row).all() else ""
        classes.append(
            {
                "name": k, "colour": colour, "arrow": arrow, "mean": _numbers(_placed(corner, half)),
                "samples": "".join(f"M{x} {y}h0" for x, y in map(_numbers, points)),
                "label": _numbers(_placed(CENTRE + 0.9 * half * outward, half)),
            }
        )  # fmt: skip
    return {"epoch": epoch, "classes": classes}


def _numbers(point: Any) -> list[str]:
    return [f"{value:.1f}" for value in point]


def _closed(points: Any) -> str:
    return "M" + "L".join(" ".join(_numbers(point)) for point in points) + "Z"


def _arrow(ends: "np.ndarray[Any, np.dtype[np.float64]]") -> str:
    """Return the path of a line and of the head at its end; of a short arrow the head is smaller."""
    begin, end = ends
    length = float(np.hypot(*(end - begin)))
    if length == 0:
        return ""
    along = (end - begin) / length
    size = min(1.0, length / (2 * _HEAD))
    neck, side = end - size * _HEAD * along, size * _WIDE * np.array([-along[1], along[0]])
    line = f"M{' '.join(_numbers(begin))}L{' '.join(_numbers(neck))}"
    return line + _closed([neck + side, end, neck - side])


_STYLE = """
.simplex .pair { display: flex; gap: 1rem; flex-wrap: nowrap; }
.simplex .pair > div { flex: 1 1 0; min-width: 0; max-width: 26rem; }
.simplex .run { margin: 0 0 .3rem; font-size: .88rem; line-height: 1.35; color: var(--quiet); overflow-wrap: anywhere; }
.simplex .run b { color: var(--ink); font-size: 1rem; display: block; }
.simplex svg { display: none; width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.simplex svg.shown { display: block; }
.simplex text { font-size: 15px; fill: var(--ink); }
.simplex .control { display: flex; align-items: center; gap: .8rem; margin: .6rem 0; max-width: 53rem; }
.simplex .control[hidden] { display: none; }
.simplex input { flex: 1 1 auto; min-width: 0; height: 2rem; accent-color: var(--accent); }
.simplex output { min-width: 6.5rem; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { .simplex .pair { gap: .5rem; } .simplex text { font-size: 22px; } }
@media print {
  .simplex .control { display: none; }
  .simplex .pair { display: block; }
  .simplex .pair > div { max-width: none; margin-bottom: .6rem; break-inside: avoid; }
  .simplex .frames { display: flex; gap: 1%; }
  .simplex .frames > svg { display: block; flex: 0 1 19%; min-width: 0; border-radius: 0; }
  .simplex text { font-size: 26px; }
}
"""  # noqa: E501

_FRAGMENT = """<figure class="simplex" id="simplex-{{ slug }}">
<style>{{ style | safe }}</style>
{% if epochs | length > 1 %}<div class="control" hidden>
<label for="epoch-{{ slug }}">Epoch</label>
<input id="epoch-{{ slug }}" type="range" min="0" max="{{ epochs | length - 1 }}" step="1" value="{{ epochs | length - 1 }}" data-epochs="{{ epochs | join(' ') }}" aria-describedby="about-simplex-{{ slug }}">
<output for="epoch-{{ slug }}" aria-live="off">epoch {{ epochs[-1] }}</output>
</div>{% endif %}
<div class="pair">
{% for label, settings, pictures in runs %}<div>
<p class="run"><b>{{ label }}</b> {{ settings }}</p>
<div class="frames">
{% for picture in pictures %}<svg viewBox="0 0 {{ side }} {{ side }}"{% if loop.last %} class="shown"{% endif %} role="img" aria-label="{{ label }}, epoch {{ picture.epoch }}: samples, means and rows of W of classes {{ picture.classes | map(attribute='name') | join(', ') }}">
<path d="{{ triangle }}" fill="none" stroke="var(--quiet)"/>
{% for class in picture.classes %}<g stroke="var(--{{ class.colour }})" fill="var(--{{ class.colour }})"><path d="{{ class.samples }}" stroke-width="5" stroke-linecap="round" opacity=".65"/><path d="{{ class.arrow }}" stroke-width="2.2"/></g>
{% endfor %}
{% for class in picture.classes %}<circle cx="{{ class.mean[0] }}" cy="{{ class.mean[1] }}" r="7" fill="var(--{{ class.colour }})" stroke="var(--ink)" stroke-width="1.4"/><text x="{{ class.label[0] }}" y="{{ class.label[1] }}" text-anchor="middle" dominant-baseline="central">{{ class.name }}</text>
{% endfor %}
<text x="8" y="{{ side - 9 }}">epoch {{ picture.epoch }}</text>
</svg>{% endfor %}
</div>
</div>{% endfor %}
</div>
<figcaption id="about-simplex-{{ slug }}">Three classes in the plane of their means, as Papyan, Han and Donoho (2020)
draw them. Small points: samples; discs: class means; arrows: rows of W, over their mean length; triangle: the simplex.
At collapse the samples, the mean and the arrow of a class meet at its corner. All pictures have the same scale; samples
beyond the frame are not shown. Of each optimizer: its best run.</figcaption>
</figure>
"""  # noqa: E501

#: Moves the slider of every `simplex_slider` on the page.
SLIDER_SCRIPT = """
for (const figure of document.querySelectorAll(".simplex")) {
  const slider = figure.querySelector("input");
  if (!slider) continue;
  const epochs = slider.dataset.epochs.split(" ");
  const show = () => {
    const step = Number(slider.value);
    const text = `epoch ${epochs[step]}`;
    figure.querySelector("output").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const frames of figure.querySelectorAll(".frames")) {
      [...frames.children].forEach((picture, place) => picture.classList.toggle("shown", place === step));
    }
  };
  slider.addEventListener("input", show);
  slider.parentElement.hidden = false;
  show();
}
"""
