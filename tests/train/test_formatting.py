"""Numbers, durations and settings as text."""

import io
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from ncollapse.formatting import change, number, percentage, setting_value, short_number, superscript
from ncollapse.train.formatting import duration, plain, rate, rough_duration


@pytest.mark.parametrize(
    ("function", "values", "text"),
    [
        (number, (0.0,), "0"),
        (number, (0.123456,), "0.123"),
        (number, (1.23456,), "1.23"),
        (number, (12345.6,), "1.23e+04"),
        (number, (3.8e-4,), "3.80e-04"),
        (number, (math.nan,), "–"),
        (number, (pd.NA,), "–"),
        (percentage, (0.98765,), "98.77 %"),
        (percentage, (math.nan,), "–"),
        (change, (-68.91,), "-68.9 %"),
        (change, (-99.99,), "<-99.9 %"),
        (change, (-100.0,), "<-99.9 %"),
        (change, (94.53,), "+94.5 %"),
        (change, (1713.2,), "+1713 %"),
        (change, (math.nan,), ""),
        (duration, (0.4,), "0 s"),
        (duration, (59.0,), "59 s"),
        (duration, (90.0,), "1.5 min"),
        (duration, (7200.0,), "2.0 h"),
        (duration, (math.nan,), "–"),
        (rough_duration, (-3.0,), "0 s"),
        (rough_duration, (99.0,), "99 s"),
        (rough_duration, (360.0,), "6 min"),
        (rough_duration, (36000.0,), "10.0 h"),
        (rate, (0.0, 10.0), "… runs/min"),
        (rate, (4.0, 60.0), "4 runs/min"),
        (rate, (1.0, 60.0), "60 runs/h"),
        (setting_value, (None,), "none"),
        (setting_value, (5e-4,), "0.0005"),
        (setting_value, (128,), "128"),
        (setting_value, ("mlp",), "mlp"),
        (short_number, (0.0,), "0"),
        (short_number, (5e-4,), "5e-4"),
        (short_number, (0.0679, 3), "0.0679"),
        (short_number, (0.0679,), "0.068"),
        (short_number, (1234.5,), "1234"),
        (short_number, (123456.0,), "1.2e5"),
        (short_number, (4.51e-12,), "4.5e-12"),
        (short_number, (99.7,), "100"),
        (short_number, (math.nan,), "–"),
        (superscript, (-12,), "⁻¹²"),
    ],
)
def test_text(function: Callable[..., str], values: tuple[Any, ...], text: str) -> None:
    assert function(*values) == text


def test_text_from_outside_is_shown_as_it_is() -> None:
    """Neither markup nor an escape sequence, a line break, an overlong or an invisible character has an effect."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(plain("[/red] [bold]x :smile: \x1b[31mred\x07 \u202eback \ud800 é\nnext"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "[/red] [bold]x :smile: \\x1b[31mred\\x07 \\u202eback \\ud800 é next\n"
    table = Table("a")
    table.add_row(plain("[/red]"))
    console.print(table)  # markup would raise an error here
    assert str(plain("x", "red").style) == "red"
