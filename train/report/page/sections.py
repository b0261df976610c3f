"""The sections of the report on the runs of one model and data set: each has what there is, or says what is lacking."""

import dataclasses
from collections.abc import Callable, Iterable

import pandas as pd

from ncollapse.train.optimizers import LABELS
from ncollapse.train.report import text
from ncollapse.train.report.figures import ablation, depth, epochs, scatter
from ncollapse.train.report.figures import heat_map as heat
from ncollapse.train.report.figures.style import Drawing
from ncollapse.train.report.read import Results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.tables import comparisons as compare
from ncollapse.train.report.tables import main as tables
from ncollapse.train.report.tables.comparisons import NC
from ncollapse.train.report.text import View
from ncollapse.train.results.schema import FINISHED

#: Rows of a table beyond which the page names its file instead.
LONG = 60


@dataclasses.dataclass
class Section:
    """A part of the page.

    Attributes:
        key: its name in links.
        text: what it shows, in a sentence or two.
        lacks: what is not in the sweep, so that a table or a figure is missing.
        files: tables that are written, but are too long for the page.
    """

    key: str
    title: str
    text: str = ""
    lacks: list[str] = dataclasses.field(default_factory=list)
    tables: list[View] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    files: list[tuple[str, pd.DataFrame]] = dataclasses.field(default_factory=list)


MAIN = (
    text.optimizer(),
    text.measured("nc0", best=True),
    text.measured("nc0_predicted", "NC0 predicted"),
    *(text.measured(name, best=True) for name in ("nc1", "nc2", "nc3")),
    text.measured("nc3_difference", "NC3 diff.", best=True),
    text.measured("nc4"),
    text.share("train_accuracy", "train acc."),
    text.share("val_accuracy", "val. acc."),
    text.words("settings", lambda row: "no run reached the threshold" if pd.isna(row.settings) else row.settings),
    text.Column("reached", lambda row: text.Cell(f"{row.eligible} of {row.runs}")),
)
DECAY = (
    text.optimizer(),
    text.setting("weight_decay"),
    text.setting("coupling"),
    text.measured("smallest", "smallest NC0 / start"),
    text.measured("largest", "largest NC0 / start"),
    text.count("runs"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """The runs of one model and data set, with what the sections need of them."""

    title: str
    slug: str
    runs: pd.DataFrame
    results: Results
    selection: Selection

    @property
    def threshold(self) -> str:
        """As it is written."""
        return f"{100 * self.selection.threshold:g} %"

    def sections(self) -> Iterable[Section]:
        """One after the other; each draws when it is asked for."""
        making: tuple[Callable[[], Section], ...] = (
            self.best,
            self.over_epochs,
            self.heat_maps,
            self.coupling,
            self.momentum,
            self.accuracy,
            self.partial,
        )
        # Few sweeps measure all layers: the others are not told each time that they do not.
        return (make() for make in (*making, *([self.layers] if (self.runs.layers == "all").any() else ())))

    def main_view(self) -> View:
        """The paper's table."""
        caption = (
            f"Best = smallest {self.selection.best_by.upper()} of the runs that reached {self.threshold} training "
            "accuracy (reached: how many did). Below each metric its change from initialisation. NC0 predicted: the "
            "exact recursion of SGD and SGDW. NC3 diff.: ‖W/‖W‖ − M/‖M‖‖, by its size at initialisation what the paper "
            "calls NC3."
        )
        return View(f"best-{self.slug}", caption, MAIN, tables.main_table(self.runs, self.selection))

    def decay_view(self) -> View:
        """NC0 by decay and coupling."""
        caption = (
            f"Final NC0 as a multiple of its start, over the runs that reached {self.threshold} training accuracy."
        )
        return View(f"decay-{self.slug}", caption, DECAY, tables.nc0_by_decay(self.runs, self.selection))

    def best(self) -> Section:
        view = self.main_view()
        section = Section("best", "Best run of each optimizer", tables=[view])
        unfinished = int((~self.runs.status.isin(FINISHED)).sum())
        if unfinished:
            section.lacks.append(f"{unfinished} of {len(self.runs)} runs are not finished yet.")
        moved = view.frame.dropna(subset=["nc0_change"])
        for verb, names in (
            ("fell", moved.optimizer[moved.nc0_change < 0]),
            ("did not fall", moved.optimizer[moved.nc0_change >= 0]),
        ):
            if len(names):
                section.text += f"NC0 {verb} in the best run of {', '.join(LABELS[name] for name in names)}. "
        missing = self._undefined(self.runs[self.runs.status.isin(FINISHED)], (*NC, "nc4"))
        return self._also(section, missing)

    def over_epochs(self) -> Section:
        section = Section("epochs", "NC0–NC3 over epochs", f"Of the best run of each optimizer: {self._best_text()}.")
        best = tables.best_runs(self.runs, self.selection)
        if best.empty:
            section.lacks.append(self._none_reached())
            return section
        histories = self.results.histories(best.id)
        section.drawings.append(epochs.nc0_over_epochs(self.slug, best, histories))
        shown = _present(histories, ("nc1", "nc2", "nc3"))
        if shown:
            section.drawings.append(epochs.nc123_over_epochs(self.slug, best, histories, shown))
        return self._also(section, self._undefined(histories, ("nc1", "nc2", "nc3")))

    def heat_maps(self) -> Section:
        section = Section("heat", "Final metrics over weight decay, learning rate and momentum")
        ended = self.runs[self.runs.status.isin(FINISHED)]
        several = ended.groupby("optimizer")[["weight_decay", *heat.AXES]].nunique().max() > 1
        for axis, written in heat.AXES.items():
            if not several[axis] and not (axis == "lr" and several.weight_decay):
                if several.any():
                    section.lacks.append(f"No optimizer has finished runs with more than one {written}.")
                continue
            cells = compare.cells(ended, axis, self.selection)
            section.files.append((f"heat-{axis}-{self.slug}", cells))
            if _present(cells, NC):
                section.drawings.append(heat.heat_maps(self.slug, cells, axis, self.threshold))
        if ended.empty:
            section.lacks.append("No run has ended yet.")
        elif not several.any():
            section.lacks.append(
                "No optimizer has finished runs that differ in weight decay, learning rate or momentum."
            )
        return self._also(section, self._undefined(ended[ended.status == "done"], NC))

    def coupling(self) -> Section:
        section = Section("coupling", "From decoupled to coupled weight decay")
        runs = compare.interpolations(self.runs, self.selection)
        shown = _present(runs, (*NC, "val_accuracy"))
        if not shown:
            section.lacks.append(
                f"No {compare.SHARES} finished runs differ in the coupled share of their weight decay alone "
                "(ncollapse sweep coupling has such runs)."
            )
            return section
        section.drawings.append(ablation.coupling(self.slug, runs, shown))
        columns = [text.optimizer(), text.words("settings", lambda row: row.settings), text.setting("coupling")]
        columns += [text.measured(name) for name in NC] + [text.share("val_accuracy", "val. acc.")]
        kept = ["optimizer", "settings", "coupling", *NC, "train_accuracy", "val_accuracy", "reached", "id"]
        self._add(section, View(f"coupling-{self.slug}", "The runs of the figure.", columns, runs[kept]))
        return self._also(section, self._undefined(runs, (*NC, "val_accuracy")))

    def momentum(self) -> Section:
        section = Section("momentum", "Momentum at equal training loss")
        readings = compare.at_equal_loss(self.runs, self.results, self.selection)
        shown = _present(readings, NC)
        if not shown:
            section.lacks.append(
                f"No two runs that reached {self.threshold} training accuracy differ in momentum alone."
            )
            return section
        below = float((readings.loss / readings.train_loss).max())
        section.text = (
            "Does momentum help collapse beyond making training faster? Runs that differ in momentum alone, each where "
            "it first reaches the same training loss."
        )
        if below > 1.1:
            section.text += (
                f" The epochs that were evaluated lie apart: a loss is up to {below:.2g} times smaller than the one "
                "that it stands for (--eval-every 1 makes this exact)."
            )
        section.drawings.append(ablation.momentum(self.slug, readings, shown))
        columns = [
            text.optimizer(),
            text.setting("lower", "from β"),
            text.setting("higher", "to β"),
            text.count("pairs"),
        ]
        columns += [text.measured(name, f"{name.upper()} ratio") for name in NC]
        caption = "Median of the metric at the higher momentum over that at the lower one; below 1: momentum helps."
        steps = compare.momentum_steps(readings)
        self._add(section, View(f"momentum-{self.slug}", caption, columns, steps))
        section.files.append((f"momentum-runs-{self.slug}", readings))
        return self._also(section, self._undefined(readings, NC))

    def accuracy(self) -> Section:
        section = Section("accuracy", "Validation accuracy against collapse")
        eligible = self.selection.eligible(self.runs)
        if len(eligible) < 3:
            section.lacks.append(f"Fewer than three runs reached {self.threshold} training accuracy.")
        elif eligible.val_accuracy.isna().all():
            section.lacks.append("The runs have no validation accuracy.")
        elif not (shown := _present(eligible.dropna(subset=["val_accuracy"]), NC)):
            self._also(section, self._undefined(eligible, NC))
        else:
            section.drawings.append(scatter.accuracy_against_collapse(self.slug, self.runs, self.selection, shown))
            frame = compare.rank_correlations(self.runs, self.selection)
            wide = frame.pivot(index="optimizer", columns="metric", values="correlation").reset_index()
            wide["runs"] = wide.optimizer.map(frame.groupby("optimizer").runs.max())
            order = [name for name in ("all", *LABELS) if name in set(wide.optimizer)]
            wide = wide.set_index("optimizer").loc[order].reset_index()
            columns = [text.optimizer(), text.count("runs"), *(text.measured(name) for name in NC)]
            caption = (
                "Spearman's rank correlation of validation accuracy with each metric: −1 where more collapse (a "
                "smaller metric) always goes with a higher accuracy, 0 where they are unrelated."
            )
            self._add(section, View(f"accuracy-{self.slug}", caption, columns, wide))
            self._also(section, self._undefined(eligible, NC))
        return section

    def partial(self) -> Section:
        section = Section("partial", "Partial collapse")
        done = self.runs[self.runs.status == "done"]
        shown = [pair for pair in scatter.PARTIAL if len(_present(done, pair)) == 2]
        if done.empty:
            section.lacks.append("No run has ended well yet.")
        if shown:
            section.drawings.append(scatter.partial_collapse(self.slug, self.runs, self.selection, shown))
        frame = compare.partial_collapse(self.runs, self.selection)
        if len(frame) and frame.nc1.notna().any():
            columns = [
                text.optimizer(),
                text.count("runs"),
                text.count("good", "NC1, NC2 good"),
                text.count("partial", "of these partial"),
                text.measured("nc1", "smallest NC1", best=True),
                *(text.measured(name, f"its {title}") for name, title in _OF_THE_BEST),
                text.words("settings", lambda row: "" if pd.isna(row.settings) else row.settings),
            ]
            caption = (
                "Good: both in the better half of the runs that reached the threshold. Partial: of those, the ones "
                "whose NC0 did not fall or whose NC3 is in the worse half. On the right the run with the smallest NC1."
            )
            self._add(section, View(f"partial-{self.slug}", caption, columns, frame))
        return self._also(section, self._undefined(done, (*NC, "nc4")))

    def layers(self) -> Section:
        section = Section("layers", "Collapse through the layers", f"Of {self._best_text()}, for each optimizer.")
        best = tables.best_runs(self.runs[self.runs.layers == "all"], self.selection)
        blocks = self.results.last_layers(best.id)
        if blocks.empty:
            section.lacks.append(self._none_reached())
            return section
        rows = depth.at_the_end(best, blocks)
        if _present(rows, depth.NAMES):
            section.drawings.append(depth.through_the_layers(self.slug, best, rows))
        columns = [
            text.optimizer(),
            text.words("layer", lambda row: row.layer),
            *(text.measured(name) for name in depth.NAMES),
        ]
        self._add(section, View(f"layers-{self.slug}", "The blocks of the figure.", columns, rows))
        return self._also(section, self._undefined(rows, depth.NAMES))

    def _best_text(self) -> str:
        by, threshold = self.selection.best_by.upper(), self.threshold
        return f"the one with the smallest {by} of those that reached {threshold} training accuracy"

    def _none_reached(self) -> str:
        highest = self.runs.train_accuracy[self.runs.status == "done"].max()
        closest = "no run has ended well yet" if pd.isna(highest) else f"the highest is {100 * highest:.2f} %"
        return f"No run reached {self.threshold} training accuracy: {closest}. --threshold sets another."

    def _undefined(self, frame: pd.DataFrame, names: Iterable[str]) -> str:
        missing = [name for name in names if len(frame) and frame[name].isna().all()]
        what = ", ".join("validation accuracy" if name == "val_accuracy" else name.upper() for name in missing)
        return f"Undefined (NaN) in all of these runs: {what}." if missing else ""

    def _also(self, section: Section, lack: str) -> Section:
        section.lacks += [lack] if lack else []
        return section

    def _add(self, section: Section, view: View) -> None:
        """A table, or only its file where it is long."""
        if len(view.frame) <= LONG:
            section.tables.append(view)
        else:
            section.files.append((view.name, view.frame))


_OF_THE_BEST = (("nc2", "NC2"), ("nc0_over_start", "NC0 / start"), ("nc3", "NC3"))


def _present(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """The columns that hold a number."""
    return [name for name in names if frame[name].notna().any()]
