"""Claim 1: NC0 of SGD and SGDW follows the exact recursion, down to the rounding of float32."""

from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import number
from ncollapse.optimizer_table import row_of
from ncollapse.train.config import sums_to_zero
from ncollapse.train.findings.claim import Comparison, Evidence, Finding
from ncollapse.train.findings.lacking import lack
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.rounding import floor_of_nc0

#: Relative deviation of ‖s‖ that counts as the same, beside the floor.
_SAME = 0.01
#: Predictions this many times the floor are compared in relative terms: there the floor is at most 2 % of NC0.
_ABOVE = 1e4


def exact_recursion(evidence: Evidence) -> Finding:
    """Compare NC0 with the recursion at every evaluated epoch of every run of SGD and SGDW that ended well."""
    runs = evidence.runs
    runs = runs[(runs.status == "done") & runs.optimizer.map(lambda name: row_of(name).family == "sgd").astype(bool)]
    found = {row["id"]: (row, nc0) for _, row in runs.iterrows() if (nc0 := predicted_nc0(row)) is not None}
    histories = evidence.results.histories(found)
    readings = [_compared(epochs, *found[str(run)]) for run, epochs in histories.groupby("run")]
    parts: list[Comparison] = []
    if readings:
        frame = pd.concat(readings)
        parts = [
            _comparison(row_of(str(name)).label, group) for name, group in frame.groupby("optimizer") if len(group)
        ]
    lacks, command = ("", "") if parts else _lacks(evidence)
    return Finding(
        1, "NC0 of SGD and SGDW follows the exact recursion of the row sum, in any network.",
        f"At every evaluated epoch, ‖s‖ = √NC0 differs from the prediction by at most √floor + {100 * _SAME:g} %. "
        "The floor, 16·T·u²/3·‖W‖² after T steps, u = 2⁻²⁴, is what rounding the weights to float32 makes of NC0: "
        "below it both are zero. The number is the largest relative deviation of NC0 where the prediction is "
        f"{_ABOVE:,.0f} floors or more.",
        _says(parts), tuple(parts), tuple(found), lacks, command,
    )  # fmt: skip


def _compared(epochs: pd.DataFrame, row: "pd.Series[Any]", nc0: "np.ndarray[Any, Any]") -> pd.DataFrame:
    """Return NC0 of a run as measured and as predicted, with the floor, at its evaluated epochs after the start."""
    steps = -(-int(row.train_samples) // int(row.batch_size))
    floor = floor_of_nc0(epochs.epoch * steps, epochs.weight_norm)
    frame = pd.DataFrame(
        {"run": row.id, "optimizer": row.optimizer, "nc0": epochs.nc0, "predicted": nc0[epochs.epoch], "floor": floor}
    )
    return frame[(epochs.epoch > 0) & np.isfinite(epochs.nc0)]


def _comparison(label: str, frame: pd.DataFrame) -> Comparison:
    """Return whether the readings of one optimizer follow the recursion."""
    measured, predicted, floor = (np.sqrt(frame[name]) for name in ("nc0", "predicted", "floor"))
    beyond = (measured - predicted).abs() - floor - _SAME * predicted
    above = frame[frame.predicted >= _ABOVE * frame.floor]
    deviation = (above.nc0 / above.predicted - 1).abs()
    zero = frame[frame.predicted < frame.floor]
    more = {
        "epochs": float(len(frame)), "largest floor": float(frame.floor.max()), "floor there": float(zero.floor.max()),
        "epochs below the floor": float(len(zero)),
        "largest NC0 there": float(zero.nc0.max()), "smallest prediction there": float(zero.predicted.min()),
        "largest ‖s‖ deviation over √floor": float(((measured - predicted).abs() / floor).max()),
    }  # fmt: skip
    return Comparison(
        label, "largest relative deviation", float(deviation.max()), "holds" if bool((beyond <= 0).all()) else "fails",
        frame.run.nunique(), more=more,
    )  # fmt: skip


def _says(parts: list[Comparison]) -> str:
    if not parts:
        return ""
    deviations = ", ".join(f"{part.text} ({part.name})" for part in parts)
    epochs, zero = (sum(int(part.more[name]) for part in parts) for name in ("epochs", "epochs below the floor"))
    count = sum(part.n for part in parts)
    runs = f"{count:,} run{'' if count == 1 else 's'}"
    text = f"largest relative deviation {deviations} over {epochs:,} epochs of {runs}"
    if zero:
        floor, largest = (
            np.nanmax([part.more[name] for part in parts]) for name in ("floor there", "largest NC0 there")
        )
        both = "both are zero" if all(part.verdict == "holds" for part in parts) else "the prediction is zero"
        text += f"; in {zero:,} of them {both}: NC0 at most {number(largest)}, float32's floor {number(floor)}"
    return text


def _lacks(evidence: Evidence) -> tuple[str, str]:
    loss = str(evidence.runs.loss.iloc[0])
    if not sums_to_zero(loss):
        return f"the recursion needs a loss whose gradient sums to zero over the classes, {loss} has none", ""
    return lack(
        evidence, "no run of SGD or SGDW that ended well",
        settings={"optimizer": ["sgd", "sgdw"], "lr": [0.01, 0.1], "momentum": [0.9], "weight_decay": [5e-4, 5e-3]},
    )  # fmt: skip
