"""Export results as files for other programs: a table of runs, one of epochs, and the meaning of their columns."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ncollapse.train.errors import UserError
from ncollapse.train.results.atomic_write import write_whole
from ncollapse.train.results.columns import EPOCH_COLUMNS, LAYER_COLUMNS, RUN_COLUMNS
from ncollapse.train.results.reader import load_layers, load_metrics, load_runs

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["parquet", "csv"]


def export_results(folder: Path, format: Format, out: Path | None = None) -> list[Path]:
    """Write the tables of a results folder, finished or not, and return the paths of the files.

    The tables are `runs` (a row per run), `epochs` (a row per run and evaluated epoch) and, if there are runs with
    `layers` = "all", `layers` (a row per run, evaluated epoch and block). Missing values are null in parquet, empty in
    csv. `columns.csv` has a row per column of these tables: table, column, meaning. The files go into `out`, made if
    missing; by default into `export` in the results folder.

    Raises:
        UserError: no results there; parquet without pyarrow; a file cannot be written, and then each file is complete
            or as it was before.
    """
    import pandas as pd

    encode = _parquet if format == "parquet" else _csv
    tables = {"runs": (load_runs(folder), RUN_COLUMNS), "epochs": (load_metrics(folder), EPOCH_COLUMNS)}
    layers = load_layers(folder)
    if len(layers):
        tables["layers"] = (layers, LAYER_COLUMNS)
    contents = {f"{table}.{format}": encode(frame) for table, (frame, _) in tables.items()}
    columns = [(table, column.name, column.meaning) for table, (_, each) in tables.items() for column in each]
    contents["columns.csv"] = _csv(pd.DataFrame(columns, columns=["table", "column", "meaning"]))
    out = out or folder / "export"
    for name, content in contents.items():
        write_whole(out / name, content)
    return [out / name for name in contents]


def _csv(frame: "pd.DataFrame") -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def _parquet(frame: "pd.DataFrame") -> bytes:
    buffer = io.BytesIO()
    try:
        frame.to_parquet(buffer, engine="pyarrow", index=False)
    except ImportError as error:  # pyarrow is missing, or older than pandas requires
        raise UserError(
            f"--format parquet needs pyarrow ({str(error).splitlines()[0]}): pip install 'ncollapse[parquet]', or give "
            "--format csv"
        ) from None
    return buffer.getvalue()
