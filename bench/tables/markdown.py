"""Records read, and tables of Markdown made of them."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ncollapse.formatting import DASH

RESULTS = Path(__file__).parents[1] / "results"
#: Times that differ by less count as the same.
NEAR = 1.05


def read(name: str) -> Any:
    """A record."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(lines)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, thousands apart, without an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def duration(us: float | None) -> str:
    """Microseconds in the unit of which there is at least one."""
    if us is None:
        return DASH
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{significant(us / size)} {unit}"
    return f"{significant(us)} µs"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    """How many times as fast."""
    if ratio is None:
        return DASH
    return f"{ratio:.2f}" if ratio < 2 else significant(ratio, 2 if ratio < 10 else 3)


def median(timings: dict[str, Any], *names: str) -> float | None:
    """The median of the first of these candidates that was timed, in microseconds."""
    return next((float(timings[name]["median"]) for name in names if name in timings), None)


def fastest_bold(values: Sequence[float | None], shown: Callable[[float], str]) -> list[str]:
    """Times as cells: bold what is fastest, or as fast within the difference that counts; bold nothing alone."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return [DASH if value is None else shown(value) for value in values]
    bold = NEAR * min(known)
    return [DASH if v is None else f"**{shown(v)}**" if v <= bold else shown(v) for v in values]


def device(record: dict[str, Any]) -> str:
    """The device of a record, in short: H100, or the processor's name."""
    name: str = record["machine"]["device"]
    return name.removeprefix("NVIDIA ").partition(" ")[0] if name.startswith("NVIDIA ") else name
