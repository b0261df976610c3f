"""Runs and their curves as text for a page: columns of numbers, compressed, as short as three digits allow.

The script `decode.js` reads it: base64 of gzip of the length of a header, the header (JSON) and the arrays. In an array
the first bytes of all numbers stand first, then the second bytes, and so on: gzip finds far more to shorten in them.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.train.report.queries import Results
from ncollapse.train.results.reader import query

Array = np.ndarray[Any, np.dtype[Any]]

#: Explicit bits of a number of a curve (three digits), and of a run's end beyond `_EXACT_ENDS` numbers (four digits);
#: float32 has 23.
_CURVE_BITS, _END_BITS = 11, 14
_EXACT_ENDS = 200_000
#: Runs whose curves are read from the results at a time.
_AT_A_TIME = 500
#: Evaluations of a run below which metrics, and then runs, are left out before its curve is thinned further.
_SMOOTH, _ROUGH = 60, 12


class Pack:
    """Named arrays and a header, for `decode.js`."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {"arrays": {}}
        self._bytes: list[bytes] = []
        self._length = 0

    def add(self, name: str, values: Array) -> None:
        """Add an array of a type that JavaScript has: float32, float64, uint8, uint16 or uint32."""
        planes = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        content = planes.reshape(-1, 1).view(np.uint8).T.tobytes()
        kind = f"{values.dtype.name.capitalize()}Array"
        self.header["arrays"][name] = {"kind": kind, "at": self._length, "length": len(values)}
        self._bytes.append(content)
        self._length += len(content)

    def text(self) -> str:
        """Return all of it as base64."""
        header = json.dumps(self.header, allow_nan=False).encode()
        return compressed(b"".join([len(header).to_bytes(4, "little"), header, *self._bytes]))


def compressed(content: bytes) -> str:
    """Return the content as base64 of gzip, the same each time."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def rounded(values: Array, bits: int) -> Array:
    """Return numbers as float32, rounded to `bits` binary digits after the first one; what is not finite is kept."""
    with np.errstate(over="ignore"):
        numbers = np.array(values, dtype=np.float32)
    pattern, below = numbers.view(np.uint32), 23 - bits
    if below:
        finite = np.isfinite(numbers)
        pattern[finite] = (pattern[finite] + np.uint32(1 << (below - 1))) & np.uint32(0xFFFFFFFF << below & 0xFFFFFFFF)
    return numbers


def add_ends(pack: Pack, runs: pd.DataFrame, metrics: Sequence[str]) -> None:
    """Add each run's metrics at its last evaluation, as `end NAME`."""
    bits = 23 if len(runs) * len(metrics) <= _EXACT_ENDS else _END_BITS
    for name in metrics:
        pack.add(f"end {name}", rounded(runs[name].to_numpy(dtype=float, na_value=np.nan), bits))


def add_words(pack: Pack, name: str, values: "pd.Series[Any]") -> list[str]:
    """Add a column of text as `words NAME`: places in the list of different texts, which is returned."""
    codes, texts = pd.factorize(values.astype(object).where(values.notna(), ""), sort=False)
    pack.add(f"words {name}", codes.astype(np.uint16 if len(texts) < 1 << 16 else np.uint32))
    return [str(text) for text in texts]


def packed_curves(results: Results, metrics: Sequence[str], most: int) -> Pack:
    """Return metrics over the epochs, at most `most` numbers.

    The arrays: `count`, the number of epochs of each run; `epoch`, and `curve NAME` for each metric, run after run. The
    header has the metrics, the number of runs with a curve, of runs that were evaluated (`of`), and of evaluations that
    a run has at most; 0 if none is left out.
    """
    pack = Pack()
    ids = list(results.runs.id)
    counts = query(results.folder, "SELECT run, COUNT(*) AS n FROM metrics GROUP BY run").set_index("run").n
    evaluated = np.array([int(counts.get(run, 0)) for run in ids])
    kept, names, chosen = _plan(evaluated, list(metrics), most)
    number = np.zeros(len(ids), dtype=np.uint32)
    epochs: list[Array] = []
    curves: dict[str, list[Array]] = {name: [] for name in names}
    for first in range(0, len(chosen), _AT_A_TIME):
        places = chosen[first : first + _AT_A_TIME]
        frame = results.histories([ids[i] for i in places])
        values = frame[names].to_numpy(dtype=float)
        epoch = frame.epoch.to_numpy()
        rows = frame.groupby("run", sort=False).indices
        for i in places:
            found = np.asarray(rows.get(ids[i], ()), dtype=int)
            at = found[evenly(len(found), kept)]
            number[i] = len(at)
            epochs.append(epoch[at].astype(np.uint32))
            for name, column in zip(names, values[at].T, strict=True):
                curves[name].append(rounded(column, _CURVE_BITS))
    pack.add("count", number)
    pack.add("epoch", np.concatenate(epochs or [np.zeros(0, dtype=np.uint32)]))
    for name, parts in curves.items():
        pack.add(f"curve {name}", np.concatenate(parts or [np.zeros(0, dtype=np.float32)]))
    pack.header |= {
        "metrics": names, "runs": len(chosen), "of": int((evaluated > 0).sum()),
        "epochs": kept if evaluated.max(initial=0) > kept else 0,
    }  # fmt: skip
    return pack


def _plan(evaluated: Array, metrics: list[str], most: int) -> tuple[int, list[str], list[int]]:
    """Return the evaluations of a run, the metrics and the runs that have at most `most` numbers together."""
    some = np.flatnonzero(evaluated)
    if not len(some) or not metrics or most <= 0:
        return 0, [], []
    longest = int(evaluated.max())

    def fitting(names: int, least: int) -> int:
        """Return the largest number of evaluations that fits, not below `least`."""
        return next((n for n in _lengths(longest, least) if np.minimum(evaluated, n).sum() * names <= most), least)

    kept = fitting(len(metrics), _SMOOTH)
    fit = int(most // np.minimum(evaluated, kept).sum())
    metrics = metrics[: max(fit, min(len(metrics), 9))]
    if fit < len(metrics):
        kept = fitting(len(metrics), _ROUGH)
    total = int(np.minimum(evaluated, kept).sum()) * len(metrics)
    runs = len(some) if total <= most else max(1, len(some) * most // total)
    return kept, metrics, [int(i) for i in some[evenly(len(some), runs)]]


def _lengths(longest: int, least: int) -> Iterator[int]:
    """Yield ever smaller numbers, from `longest` to `least`."""
    while longest > least:
        yield longest
        longest = max(least, longest * 9 // 10)
    yield longest


def evenly(length: int, kept: int) -> Array:
    """Return `kept` places out of `length`, evenly spaced with the first and the last; all if there are fewer."""
    if length <= kept:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, max(kept, 1)).round().astype(int))
