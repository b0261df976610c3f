"""The sections of the report on the runs of one model, data set and loss. Each has figures and tables, or says why not.

What a section computes, its tables' columns and its figures stand in one file, for instance `report/final_cells.py`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import pandas as pd

from ncollapse.plot.looks import look_of
from ncollapse.plot.style import Drawing
from ncollapse.train.report import collapse, coupling, depth, epochs, final_cells, momentum, scatter
from ncollapse.train.report.best import best_runs, best_settings, main_view
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import View
from ncollapse.train.results.schema import FINISHED

#: Rows beyond which a table is only a file, which the page links to.
LONG = 60
#: Runs beyond which the figures of all runs read the epochs of some only: a row takes 0.2 kB.
_MOST_HISTORIES = 4_000


@dataclasses.dataclass
class Section:
    """A part of the page; `key` is its name in links."""

    key: str
    title: str
    text: str = ""
    lacks: list[str] = dataclasses.field(default_factory=list)
    """Why a table or a figure is missing or incomplete, a sentence each."""
    tables: list[View] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    fragments: list[str] = dataclasses.field(default_factory=list)
    """Elements of the page, in HTML, that are neither a table nor a figure."""
    files: list[tuple[str, pd.DataFrame]] = dataclasses.field(default_factory=list)
    """Name and content of tables that are written, but are too long for the page."""

    def add(self, view: View) -> None:
        """Add a table, or only its file if it is long."""
        if len(view.frame) <= LONG:
            self.tables.append(view)
        else:
            self.files.append((view.name, view.frame))

    def without(self, reason: str) -> "Section":
        """Note why something is missing, and return the section."""
        self.lacks.append(reason)
        return self

    def note_undefined(self, frame: pd.DataFrame, names: Iterable[str]) -> "Section":
        """Note which of these metrics are NaN in all rows, and return the section."""
        missing = [name for name in names if len(frame) and frame[name].isna().all()]
        texts = ("validation accuracy" if name == "val_accuracy" else name.upper() for name in missing)
        return self.without(f"Undefined (NaN) in all of these runs: {', '.join(texts)}.") if missing else self


@dataclasses.dataclass(frozen=True)
class Part:
    """The runs of one model, data set and loss, and their sections.

    `selection` is what was asked for. The sections use `shown`, which some of the runs pass, and `note` says so once.
    """

    title: str
    slug: str
    """The title in the characters that are allowed in names of files and links."""
    runs: pd.DataFrame
    results: Results
    selection: Selection

    @functools.cached_property
    def shown(self) -> Selection:
        """The selection that the sections use: a lower threshold where no run reached that of `selection`."""
        return self.selection.relaxed(self.runs)[0]

    @functools.cached_property
    def best(self) -> View:
        """The table of the best settings, for the terminal and the page."""
        return main_view(self.slug, self.runs, self.selection, self.results.metrics)

    @property
    def note(self) -> str:
        """What has to be said where the threshold is lower than it was asked for; else empty."""
        _, missed = self.selection.relaxed(self.runs)
        return missed and (
            f"Training accuracy {missed}. No run reached the threshold: below, those that reached "
            f"{self.shown.percent} count instead (--threshold sets another)."
        )

    def sections(self) -> Iterator[Section]:
        """Yield the sections in order; each is made when it is asked for."""
        yield self._best()
        yield self._geometry()
        yield self._over_epochs()
        yield self._every_run()
        yield self._heat_maps()
        yield self._coupling()
        yield self._momentum()
        yield self._accuracy()
        yield self._partial()
        # Few sweeps measure all layers, so the others have no section that says that they did not.
        if (self.runs.layers == "all").any():
            yield self._layers()

    def _best(self) -> Section:
        view = self.best
        section = Section("best", "Best setting of each optimizer", tables=[view])
        finished = self.runs.status.isin(FINISHED)
        if not finished.all():
            section.without(f"{int((~finished).sum())} of {len(self.runs)} runs are not finished yet.")
        if failed := int((self.runs.status == "failed").sum()):
            section.without(
                f"{failed} of {len(self.runs)} runs failed: code of your own raised an error, whose traceback is in "
                "failures/ in the results folder. They do not count."
            )
        change = view.frame.set_index("optimizer").nc0_change
        for verb, names in (("fell", change.index[change < 0]), ("did not fall", change.index[change >= 0])):
            if len(names):
                section.text += (
                    f"NC0 {verb} in the best setting of {', '.join(look_of(name).label for name in names)}. "
                )
        return section.note_undefined(self.runs[finished], (*NC, "nc4"))

    def _geometry(self) -> Section:
        section = Section("geometry", "Geometry of the last layer", self._best_text("as in the table above"))
        best = best_runs(self.runs, self.selection)
        if best.empty:
            return section.without(self._none())
        snapshots = self.results.snapshots(best.id)
        if not snapshots:
            return section.without(
                "The results folder holds no geometry of these runs: a version of ncollapse recorded them that did not "
                "keep it. Runs that are trained from now on have it; the command at the end of this page, with another "
                "folder as --out, trains these again."
            )
        if missing := [look_of(run.optimizer).label for _, run in best.iterrows() if not snapshots.get(run.id)]:
            section.without(f"The results folder holds no geometry of the best run of {', '.join(missing)}.")
        section.fragments.append(collapse.simplex_slider(self.slug, best, snapshots))
        section.drawings += collapse.collapse_drawings(self.slug, best, snapshots)
        return section

    def _over_epochs(self) -> Section:
        section = Section("epochs", "NC0–NC3 over epochs", self._best_text("as in the table above"))
        best = best_runs(self.runs, self.selection)
        if best.empty:
            return section.without(self._none())
        histories = self.results.histories(best.id)
        section.drawings.append(epochs.nc0_over_epochs(self.slug, best, histories))
        if shown := _present(histories, ("nc1", "nc2", "nc3")):
            section.drawings.append(epochs.nc123_over_epochs(self.slug, best, histories, shown))
        if own := _present(histories, self.results.metrics):
            measured = {name: self.results.metrics[name] for name in own}
            section.drawings.append(epochs.own_over_epochs(self.slug, best, histories, measured))
        return section.note_undefined(histories, ("nc1", "nc2", "nc3"))

    def _every_run(self) -> Section:
        section = Section("curves", "Every run over epochs")
        ended = self.runs[self.runs.status.isin(FINISHED)]
        if len(ended) > _MOST_HISTORIES:
            every = -(-len(ended) // _MOST_HISTORIES)
            kept = ended.index[::every].union(best_settings(self.runs, self.selection).index)
            section.without(
                f"Of {len(ended):,} runs, every {every}th and the best are read for these figures: {len(kept):,}."
            )
            ended = ended.loc[kept]
        histories = self.results.histories(ended.id)
        if histories.empty or not _present(histories, ("nc0", "nc1", "nc2", "nc3", "nc4", "train_loss")):
            return section.without("No run has ended yet." if ended.empty else "The runs have no evaluated epochs.")
        section.drawings.append(epochs.metrics_over_epochs(self.slug, ended, histories, self.shown))
        if len(_present(histories, ("nc0", "nc1"))) == 2:
            section.drawings.append(epochs.phase_portrait(self.slug, ended, histories, self.shown))
        return section

    def _heat_maps(self) -> Section:
        section = Section("heat", "Final metrics over weight decay, learning rate and momentum")
        ended = self.runs[self.runs.status.isin(FINISHED)]
        several = ended.groupby("optimizer")[["weight_decay", *final_cells.AXES]].nunique().max() > 1
        for axis, label in final_cells.AXES.items():
            if several[axis] or (axis == "lr" and several.weight_decay):
                frame = final_cells.cells(ended, axis, self.shown)
                section.files.append((f"heat-{axis}-{self.slug}", frame))
                runs, note = final_cells.binned(ended, axis)
                shown = final_cells.cells(runs, axis, self.shown) if note else frame
                if _present(shown, NC):
                    section.drawings.append(final_cells.heat_maps(self.slug, shown, axis, self.shown.percent, note))
            elif several.any():
                section.without(f"No optimizer has finished runs with more than one {label}.")
        if ended.empty:
            section.without("No run has ended yet.")
        elif not several.any():
            section.without("No optimizer has finished runs that differ in weight decay, learning rate or momentum.")
        return section.note_undefined(ended[ended.status == "done"], NC)

    def _coupling(self) -> Section:
        section = Section("coupling", "From decoupled to coupled weight decay")
        runs = coupling.interpolations(self.runs, self.shown)
        shown = _present(runs, (*NC, "val_accuracy"))
        if not shown:
            return section.without(
                f"No {coupling.SHARES} finished runs differ only in the coupled share of their weight decay "
                "(ncollapse sweep coupling has such runs)."
            )
        section.drawings.append(coupling.metrics_over_coupling(self.slug, runs, shown))
        section.add(coupling.interpolations_view(self.slug, runs))
        return section.note_undefined(runs, (*NC, "val_accuracy"))

    def _momentum(self) -> Section:
        section = Section("momentum", "Momentum at equal training loss")
        readings = momentum.at_equal_loss(self.runs, self.results, self.shown)
        shown = _present(readings, NC)
        if not shown:
            return section.without(
                f"No two runs that reached {self.shown.percent} training accuracy differ only in momentum."
            )
        section.text = (
            "Does momentum help collapse beyond making training faster? This compares runs that differ only in "
            "momentum, each where it first reaches the same training loss."
        )
        below = float((readings.loss / readings.train_loss).max())
        if below > 1.1:
            section.text += (
                " A run is read at the first evaluated epoch that has this loss, where its own is up to "
                f"{below:.2g} times smaller (--eval-every 1 brings both as close as epochs are)."
            )
        section.drawings.append(momentum.metrics_over_momentum(self.slug, readings, shown))
        section.add(momentum.momentum_view(self.slug, readings))
        section.files.append((f"momentum-runs-{self.slug}", readings))
        return section.note_undefined(readings, NC)

    def _accuracy(self) -> Section:
        section = Section("accuracy", "Validation accuracy against collapse")
        eligible = self.shown.eligible(self.runs)
        if len(eligible) < 3:
            return section.without(f"Fewer than three runs reached {self.shown.percent} training accuracy.")
        if eligible.val_accuracy.isna().all():
            return section.without("The runs have no validation accuracy.")
        if shown := _present(eligible.dropna(subset=["val_accuracy"]), NC):
            section.drawings.append(scatter.accuracy_against_collapse(self.slug, self.runs, self.shown, shown))
            section.add(scatter.correlations_view(self.slug, self.runs, self.shown))
        return section.note_undefined(eligible, NC)

    def _partial(self) -> Section:
        section = Section("partial", "Partial collapse")
        done = self.runs[self.runs.status == "done"]
        if done.empty:
            section.without("No run has ended well yet.")
        if shown := [pair for pair in scatter.PARTIAL if len(_present(done, pair)) == 2]:
            section.drawings.append(scatter.metric_pairs(self.slug, self.runs, self.shown, shown))
        frame = scatter.partial_collapse(self.runs, self.shown)
        if frame.nc1.notna().any():
            section.add(scatter.partial_view(self.slug, frame))
        return section.note_undefined(done, (*NC, "nc4"))

    def _layers(self) -> Section:
        section = Section("layers", "Collapse through the layers", self._best_text("whose layers were measured"))
        best = best_runs(self.runs[self.runs.layers == "all"], self.selection)
        blocks = self.results.last_layers(best.id)
        if blocks.empty:
            return section.without(self._none())
        rows = depth.blocks_at_the_end(best, blocks)
        if _present(rows, depth.BLOCK_METRICS):
            section.drawings.append(depth.metrics_over_depth(self.slug, best, rows))
        section.add(depth.blocks_view(self.slug, rows))
        return section.note_undefined(rows, depth.BLOCK_METRICS)

    def _best_text(self, which: str) -> str:
        seeds = "; of several seeds, the one in the middle" if self.runs.seed.nunique() > 1 else ""
        return f"The best run of each optimizer {which}{seeds}."

    def _none(self) -> str:
        if not (self.runs.status == "done").any():
            return "No run has ended well yet."
        return (
            f"{self.selection.best_by.upper()}, by which the best run is chosen, is undefined in the runs that count."
        )


def _present(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Return the columns that hold a number."""
    return [name for name in names if frame[name].notna().any()]
