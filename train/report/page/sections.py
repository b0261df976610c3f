"""The sections of the report on the runs of one model and data set. Each has its figures and tables, or says why not.

The data and columns of a section's tables are in `tables/`, its figures in `figures/`, under the section's name.
"""

import dataclasses
from collections.abc import Callable, Iterable

import pandas as pd

from ncollapse.train.formatting import percentage
from ncollapse.train.optimizers import LABELS
from ncollapse.train.report.figures.coupling import metrics_over_coupling
from ncollapse.train.report.figures.depth import metrics_over_depth
from ncollapse.train.report.figures.epochs import nc0_over_epochs, nc123_over_epochs
from ncollapse.train.report.figures.heat_map import heat_maps
from ncollapse.train.report.figures.momentum import metrics_over_momentum
from ncollapse.train.report.figures.scatter import PARTIAL, accuracy_against_collapse, metric_pairs
from ncollapse.train.report.figures.style import Drawing
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.tables.accuracy import correlations_view
from ncollapse.train.report.tables.best import best_runs, main_view
from ncollapse.train.report.tables.coupling import SHARES, interpolations, interpolations_view
from ncollapse.train.report.tables.depth import BLOCK_METRICS, blocks_at_the_end, blocks_view
from ncollapse.train.report.tables.heat_map import AXES, cells
from ncollapse.train.report.tables.momentum import at_equal_loss, momentum_view
from ncollapse.train.report.tables.partial import partial_collapse, partial_view
from ncollapse.train.report.tables.view import View
from ncollapse.train.results.schema import FINISHED

#: Rows beyond which a table is only a file, which the page links to.
LONG = 60


@dataclasses.dataclass
class Section:
    """A part of the page.

    Attributes:
        key: its name in links.
        text: what it shows, in a sentence or two.
        lacks: why a table or a figure is missing or incomplete, a sentence each.
        files: name and content of tables that are written, but are too long for the page.
    """

    key: str
    title: str
    text: str = ""
    lacks: list[str] = dataclasses.field(default_factory=list)
    tables: list[View] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    files: list[tuple[str, pd.DataFrame]] = dataclasses.field(default_factory=list)

    def add(self, view: View) -> None:
        """Add a table, or only its file if it is long."""
        if len(view.frame) <= LONG:
            self.tables.append(view)
        else:
            self.files.append((view.name, view.frame))

    def note_undefined(self, frame: pd.DataFrame, names: Iterable[str]) -> None:
        """Note which of these metrics are NaN in all rows."""
        missing = [name for name in names if len(frame) and frame[name].isna().all()]
        if missing:
            texts = ("validation accuracy" if name == "val_accuracy" else name.upper() for name in missing)
            self.lacks.append(f"Undefined (NaN) in all of these runs: {', '.join(texts)}.")


@dataclasses.dataclass(frozen=True)
class Part:
    """The runs of one model and data set, and their sections.

    Attributes:
        slug: `title` in the characters that are allowed in names of files and links.
        runs: rows of `load_runs`.
    """

    title: str
    slug: str
    runs: pd.DataFrame
    results: Results
    selection: Selection

    def sections(self) -> Iterable[Section]:
        """Return the sections in order; each is made when it is asked for."""
        makers: list[Callable[[], Section]] = [
            self.best,
            self.over_epochs,
            self.heat_maps,
            self.coupling,
            self.momentum,
            self.accuracy,
            self.partial,
        ]
        # Few sweeps measure all layers, so the others have no section that says that they did not.
        if (self.runs.layers == "all").any():
            makers.append(self.layers)
        return (make() for make in makers)

    def best(self) -> Section:
        """Return the section with the paper's table."""
        view = main_view(self.slug, self.runs, self.selection)
        section = Section("best", "Best run of each optimizer", tables=[view])
        finished = self.runs.status.isin(FINISHED)
        if not finished.all():
            section.lacks.append(f"{int((~finished).sum())} of {len(self.runs)} runs are not finished yet.")
        changed = view.frame.dropna(subset=["nc0_change"])
        for verb, names in (
            ("fell", changed.optimizer[changed.nc0_change < 0]),
            ("did not fall", changed.optimizer[changed.nc0_change >= 0]),
        ):
            if len(names):
                section.text += f"NC0 {verb} in the best run of {', '.join(LABELS[name] for name in names)}. "
        section.note_undefined(self.runs[finished], (*NC, "nc4"))
        return section

    def over_epochs(self) -> Section:
        """Return the section with the metrics over epochs."""
        section = Section("epochs", "NC0–NC3 over epochs", f"The best run of each optimizer: {self._best_text()}.")
        best = best_runs(self.runs, self.selection)
        if best.empty:
            section.lacks.append(self._none_reached())
            return section
        histories = self.results.histories(best.id)
        section.drawings.append(nc0_over_epochs(self.slug, best, histories))
        shown = _present(histories, ("nc1", "nc2", "nc3"))
        if shown:
            section.drawings.append(nc123_over_epochs(self.slug, best, histories, shown))
        section.note_undefined(histories, ("nc1", "nc2", "nc3"))
        return section

    def heat_maps(self) -> Section:
        """Return the section with the heat maps."""
        section = Section("heat", "Final metrics over weight decay, learning rate and momentum")
        ended = self.runs[self.runs.status.isin(FINISHED)]
        several = ended.groupby("optimizer")[["weight_decay", *AXES]].nunique().max() > 1
        for axis, label in AXES.items():
            if not several[axis] and not (axis == "lr" and several.weight_decay):
                if several.any():
                    section.lacks.append(f"No optimizer has finished runs with more than one {label}.")
                continue
            frame = cells(ended, axis, self.selection)
            section.files.append((f"heat-{axis}-{self.slug}", frame))
            if _present(frame, NC):
                section.drawings.append(heat_maps(self.slug, frame, axis, self.selection.percent))
        if ended.empty:
            section.lacks.append("No run has ended yet.")
        elif not several.any():
            section.lacks.append(
                "No optimizer has finished runs that differ in weight decay, learning rate or momentum."
            )
        section.note_undefined(ended[ended.status == "done"], NC)
        return section

    def coupling(self) -> Section:
        """Return the section on runs that differ only in their coupling."""
        section = Section("coupling", "From decoupled to coupled weight decay")
        runs = interpolations(self.runs, self.selection)
        shown = _present(runs, (*NC, "val_accuracy"))
        if not shown:
            section.lacks.append(
                f"No {SHARES} finished runs differ only in the coupled share of their weight decay "
                "(ncollapse sweep coupling has such runs)."
            )
            return section
        section.drawings.append(metrics_over_coupling(self.slug, runs, shown))
        section.add(interpolations_view(self.slug, runs))
        section.note_undefined(runs, (*NC, "val_accuracy"))
        return section

    def momentum(self) -> Section:
        """Return the section on runs that differ only in momentum."""
        section = Section("momentum", "Momentum at equal training loss")
        readings = at_equal_loss(self.runs, self.results, self.selection)
        shown = _present(readings, NC)
        if not shown:
            section.lacks.append(
                f"No two runs that reached {self.selection.percent} training accuracy differ only in momentum."
            )
            return section
        section.text = (
            "Does momentum help collapse beyond making training faster? This compares runs that differ only in "
            "momentum, each where it first reaches the same training loss."
        )
        below = float((readings.loss / readings.train_loss).max())
        if below > 1.1:
            section.text += (
                " Not every epoch was evaluated, so the training loss where a run is read is up to "
                f"{below:.2g} times smaller than the loss that it is compared at (--eval-every 1 makes this exact)."
            )
        section.drawings.append(metrics_over_momentum(self.slug, readings, shown))
        section.add(momentum_view(self.slug, readings))
        section.files.append((f"momentum-runs-{self.slug}", readings))
        section.note_undefined(readings, NC)
        return section

    def accuracy(self) -> Section:
        """Return the section on validation accuracy."""
        section = Section("accuracy", "Validation accuracy against collapse")
        eligible = self.selection.eligible(self.runs)
        if len(eligible) < 3:
            section.lacks.append(f"Fewer than three runs reached {self.selection.percent} training accuracy.")
            return section
        if eligible.val_accuracy.isna().all():
            section.lacks.append("The runs have no validation accuracy.")
            return section
        shown = _present(eligible.dropna(subset=["val_accuracy"]), NC)
        if shown:
            section.drawings.append(accuracy_against_collapse(self.slug, self.runs, self.selection, shown))
            section.add(correlations_view(self.slug, self.runs, self.selection))
        section.note_undefined(eligible, NC)
        return section

    def partial(self) -> Section:
        """Return the section on partial collapse."""
        section = Section("partial", "Partial collapse")
        done = self.runs[self.runs.status == "done"]
        shown = [pair for pair in PARTIAL if len(_present(done, pair)) == 2]
        if done.empty:
            section.lacks.append("No run has ended well yet.")
        if shown:
            section.drawings.append(metric_pairs(self.slug, self.runs, self.selection, shown))
        frame = partial_collapse(self.runs, self.selection)
        if frame.nc1.notna().any():
            section.add(partial_view(self.slug, frame))
        section.note_undefined(done, (*NC, "nc4"))
        return section

    def layers(self) -> Section:
        """Return the section on collapse through the layers."""
        section = Section(
            "layers", "Collapse through the layers", f"The best run of each optimizer: {self._best_text()}."
        )
        best = best_runs(self.runs[self.runs.layers == "all"], self.selection)
        blocks = self.results.last_layers(best.id)
        if blocks.empty:
            section.lacks.append(self._none_reached())
            return section
        rows = blocks_at_the_end(best, blocks)
        if _present(rows, BLOCK_METRICS):
            section.drawings.append(metrics_over_depth(self.slug, best, rows))
        section.add(blocks_view(self.slug, rows))
        section.note_undefined(rows, BLOCK_METRICS)
        return section

    def _best_text(self) -> str:
        by, threshold = self.selection.best_by.upper(), self.selection.percent
        return f"the one with the smallest {by} of those that reached {threshold} training accuracy"

    def _none_reached(self) -> str:
        highest = self.runs.train_accuracy[self.runs.status == "done"].max()
        closest = "no run has ended well yet" if pd.isna(highest) else f"the highest is {percentage(highest)}"
        return f"No run reached {self.selection.percent} training accuracy: {closest}. --threshold sets another."


def _present(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Return the columns that hold a number."""
    return [name for name in names if frame[name].notna().any()]
