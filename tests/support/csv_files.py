"""CSV files, read to the last digit."""

from pathlib import Path
from typing import Any

import pandas as pd

#: Before pandas 3 the last digit is lost unless it is asked for; since then asking is deprecated.
_EXACT: dict[str, Any] = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


def read_csv_exactly(path: Path, **how: Any) -> pd.DataFrame:
    """Read a file as `pandas.read_csv` does."""
    frame: pd.DataFrame = pd.read_csv(path, **_EXACT, **how)
    return frame
