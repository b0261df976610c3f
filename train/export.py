"""The results as files for other programs: a table of runs, one of epochs, and what their columns mean."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nc.train.columns import epoch_columns, run_columns
from nc.train.errors import UserError
from nc.train.files import write_whole
from nc.train.results import load_metrics, load_runs

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["parquet", "csv"]


def export(folder: Path, format: Format, out: Path | None = None) -> list[Path]:
    """Write `runs` (a row per run), `epochs` (a row per run and evaluated epoch) and `columns.csv` (what they mean).

    Args:
        folder: a results folder, finished or not.
        format: of the two tables. Missing values are null in parquet, empty in csv.
        out: folder for the files, made if missing; by default `export` in the results folder.

    Returns:
        The paths of the files.

    Raises:
        UserError: no results there; parquet without pyarrow; the files cannot be written. Each file is whole or as it
            was before.
    """
    import pandas as pd

    encode = _parquet if format == "parquet" else _csv
    columns = [
        (table, name, meaning)
        for table, meanings in (("runs", run_columns()), ("epochs", epoch_columns()))
        for name, meaning in meanings.items()
    ]
    contents = {
        f"runs.{format}": encode(load_runs(folder)),
        f"epochs.{format}": encode(load_metrics(folder)),
        "columns.csv": _csv(pd.DataFrame(columns, columns=["table", "column", "meaning"])),
    }
    paths = {(out or folder / "export") / name: content for name, content in contents.items()}
    for path, content in paths.items():
        write_whole(path, content)
    return list(paths)


def _csv(frame: "pd.DataFrame") -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def _parquet(frame: "pd.DataFrame") -> bytes:
    buffer = io.BytesIO()
    try:
        frame.to_parquet(buffer, engine="pyarrow", index=False)
    except ImportError as error:  # missing, or older than pandas asks for
        raise UserError(
            f"--format parquet needs pyarrow ({str(error).splitlines()[0]}): pip install 'ncollapse[parquet]', or give "
            "--format csv"
        ) from None
    return buffer.getvalue()
