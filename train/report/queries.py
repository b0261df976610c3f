"""What the report reads of a results folder: the ends of all runs, and the histories of a few.

The metrics of a large sweep have a million rows. SQLite finds the few that are needed by their key, whereas pandas
would have to load them all.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ncollapse.formatting import options_text, read_json
from ncollapse.plot.settings import USUAL_LOSS
from ncollapse.train.results.columns import LAYER_COLUMNS, OwnMetrics, epoch_columns
from ncollapse.train.results.own_metrics import read_metrics
from ncollapse.train.results.reader import (
    load_geometry,
    open_results,
    query,
    read_meta,
    read_runs,
    read_sessions,
)

if TYPE_CHECKING:
    from ncollapse.snapshot import Snapshot

#: Settings that tell the parts of a folder apart.
PARTS = ("model", "data", "data_options", "pad", "loss")
#: The values of a parameter that is a list in JSON: the ids of 100,000 runs are too long for the text of a query.
_LISTED = "SELECT value FROM json_each(?)"


@dataclasses.dataclass(frozen=True)
class Results:
    """A results folder, finished or not: what `load_runs`, `load_meta` and `load_sessions` return, and queries."""

    folder: Path
    runs: pd.DataFrame
    meta: dict[str, str]
    sessions: list[dict[str, Any]]
    metrics: OwnMetrics = dataclasses.field(default_factory=dict)
    """Metrics of the user's that the runs have: name -> meaning."""

    def histories(self, runs: Iterable[str]) -> pd.DataFrame:
        """Return the evaluated epochs of these runs, in the columns of `load_metrics`."""
        sql = f"SELECT * FROM metrics WHERE run IN ({_LISTED}) ORDER BY run, epoch"
        return query(self.folder, sql, epoch_columns(self.metrics), (json.dumps(list(runs)),))

    def last_layers(self, runs: Iterable[str]) -> pd.DataFrame:
        """Return the blocks of these runs at their last evaluated epochs, in the columns of `load_layers`."""
        sql = (
            f"SELECT * FROM layers WHERE run IN ({_LISTED}) "
            "AND epoch = (SELECT MAX(epoch) FROM layers AS all_layers WHERE all_layers.run = layers.run) "
            "ORDER BY run, position"
        )
        return query(self.folder, sql, LAYER_COLUMNS, (json.dumps(list(runs)),))

    def snapshots(self, runs: Iterable[str]) -> "dict[str, dict[int, Snapshot]]":
        """Return the geometry that is kept of these runs, as `load_geometry` does: run -> epoch -> snapshot."""
        return load_geometry(self.folder, runs)

    def lowest_loss(self, runs: Iterable[str]) -> "pd.Series[float]":
        """Return the smallest training loss over the evaluated epochs, indexed by run."""
        sql = f"SELECT run, MIN(train_loss) AS loss FROM metrics WHERE run IN ({_LISTED}) GROUP BY run"
        return query(self.folder, sql, parameters=(json.dumps(list(runs)),)).set_index("run").loss.astype(float)

    def first_at(self, losses: Mapping[str, float]) -> pd.DataFrame:
        """Return, for each run in `losses`, its first evaluated epoch with a training loss of at most `losses[run]`."""
        # With MIN(), SQLite takes the other columns from the row that holds the minimum. The columns of `wanted` are
        # numbers of JSON as Python writes them: the same floats. CROSS JOIN: in this order.
        found = (
            "WITH wanted(run, loss) AS (SELECT key, value FROM json_each(?)) "
            "SELECT metrics.*, MIN(epoch) AS first FROM wanted CROSS JOIN metrics "
            "ON metrics.run = wanted.run AND train_loss <= loss GROUP BY metrics.run"
        )
        return query(self.folder, found, epoch_columns(self.metrics), (json.dumps(dict(losses), allow_nan=False),))


def read_results(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        UserError: the folder holds no results, or results in a format that cannot be read.
    """
    with open_results(folder) as connection:  # one moment, also while a sweep writes
        return Results(
            folder, read_runs(connection, folder), read_meta(connection, folder), read_sessions(connection, folder),
            read_metrics(connection, folder),
        )  # fmt: skip


def parts_by_title(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield title and runs of each model, data set (with its options and border) and loss."""
    for (model, of_data, options, pad, loss), group in runs.groupby(list(PARTS), sort=False):
        data = f"{of_data} {options_text(read_json(options) or {})}" if options else str(of_data)
        border = f" padded by {pad}" if pad else ""
        yield f"{model} on {data}{border}{'' if loss == USUAL_LOSS else f', {loss}'}", group
