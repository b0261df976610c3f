"""Export results as files for other programs: a table of runs, one of epochs, and the meaning of their columns.

Tables are written block by block as they are read: a sweep of any size takes little memory.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from ncollapse.train.errors import UserError
from ncollapse.train.results.atomic_write import write_whole, writing
from ncollapse.train.results.columns import LAYER_COLUMNS, epoch_columns, run_columns
from ncollapse.train.results.reader import iter_layers, iter_metrics, load_own_metrics, load_runs

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["parquet", "csv"]
#: Writes a block of a table.
_Block = Callable[["pd.DataFrame"], None]


def export_results(folder: Path, format: Format, out: Path | None = None) -> list[Path]:
    """Write the tables of a results folder, finished or not, and return the paths of the files.

    The tables are `runs` (a row per run), `epochs` (a row per run and evaluated epoch) and, if there are runs with
    `layers` = "all", `layers` (a row per run, evaluated epoch and block). Missing values are null in parquet, empty in
    csv, which does not tell them from empty texts. `columns.csv` has a row per column of these tables: table, column,
    meaning. The files go into `out`, made if missing; by default into `export` in the results folder.

    Raises:
        UserError: no results there; parquet without pyarrow; a file cannot be written, and then each file is complete
            or as it was before.
    """
    import pandas as pd

    table = _parquet if format == "parquet" else _csv
    out = out or folder / "export"
    # With all of them open at once, each is complete or none is changed.
    with contextlib.ExitStack() as files:
        written, columns = {}, {}
        for name, blocks in (
            ("runs", iter((load_runs(folder),))), ("epochs", iter_metrics(folder)), ("layers", iter_layers(folder)),
        ):  # fmt: skip
            first = next(blocks)
            if name == "layers" and first.empty:
                continue
            path = out / f"{name}.{format}"
            write = files.enter_context(table(files.enter_context(writing(path)), first))
            for block in itertools.chain((first,), blocks):
                write(block)
            written[name] = path
            columns[name] = set(first.columns)
    own = load_own_metrics(folder)  # last, since a sweep may have added one since its table was read
    described = {"runs": run_columns(own), "epochs": epoch_columns(own), "layers": LAYER_COLUMNS}
    rows = [
        (table, column.name, column.meaning)
        for table, names in columns.items()
        for column in described[table]
        if column.name in names
    ]
    meanings = pd.DataFrame(rows, columns=["table", "column", "meaning"])
    write_whole(out / "columns.csv", meanings.to_csv(index=False, lineterminator="\n").encode())
    return [*written.values(), out / "columns.csv"]


@contextlib.contextmanager
def _csv(file: BinaryIO, first: "pd.DataFrame") -> Iterator[_Block]:
    file.write((",".join(first.columns) + "\n").encode())
    yield lambda block: block.to_csv(file, index=False, header=False, lineterminator="\n")


@contextlib.contextmanager
def _parquet(file: BinaryIO, first: "pd.DataFrame") -> Iterator[_Block]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--format parquet needs pyarrow ({str(error).splitlines()[0]}): pip install 'ncollapse[parquet]', or give "
            "--format csv"
        ) from None
    schema = pyarrow.Schema.from_pandas(first, preserve_index=False)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        yield lambda block: writer.write_table(pyarrow.Table.from_pandas(block, schema, preserve_index=False))
