"""Numbers, durations and settings as text for people: on the terminal, on the page and in messages."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

#: What stands where a value is missing.
DASH = "–"


def visible(text: object) -> str:
    """Return text on one line in which every character can be seen: control characters, escape sequences as \\x1b."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else ascii(c)[1:-1] for c in str(text))


def plain(text: object, style: str = "") -> Text:
    """Return text from outside for the terminal, in one style: brackets are no markup, escape sequences are visible.

    Whatever a file, a path, an option or an exception says reaches the terminal through this function.
    """
    return Text(visible(text), style)


def is_missing(value: Any) -> bool:
    """Return whether a value is None, NaN or pandas' NA."""
    try:
        return math.isnan(value)
    except TypeError:  # pandas' NA and None have no float value
        return True


def number(value: float) -> str:
    """Format a number with three significant digits; a dash for NaN."""
    if is_missing(value):
        return DASH
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def percentage(share: float) -> str:
    """Format a share in [0, 1] in percent with two decimals; a dash for NaN."""
    return DASH if is_missing(share) else f"{100 * share:.2f} %"


def change(percent: float) -> str:
    """Format a change in percent with its sign; empty for NaN."""
    if is_missing(percent):
        return ""
    if -100 <= percent < -99.95:
        return "<-99.9 %"
    return f"{percent:+.0f} %" if percent >= 100 else f"{percent:+.1f} %"


def duration(seconds: float) -> str:
    """Format a measured duration in the largest unit of which it has at least one; a dash for NaN."""
    if is_missing(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def rough_duration(seconds: float) -> str:
    """Format an estimated duration without decimals below 100 minutes; negative ones (clocks differ) as 0 s."""
    seconds = max(seconds, 0.0)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def rate(runs: float, seconds: float) -> str:
    """Format a rate in runs per minute, or per hour below two a minute; `runs` may be a fraction."""
    if seconds <= 0 or runs <= 0:
        return "… runs/min"
    per_minute = 60 * runs / seconds
    return f"{per_minute:.0f} runs/min" if per_minute >= 2 else f"{60 * per_minute:.3g} runs/h"


def setting_value(value: Any) -> str:
    """Format the value of a setting: floats without trailing zeros, None as "none"."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def options_text(options: Mapping[str, Any]) -> str:
    """Format options as `depth=3 bias=false`: values as in JSON, but texts without quotes."""
    return " ".join(f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items())


def short_number(value: float, digits: int = 2) -> str:
    """Format a number with `digits` significant digits in few characters: 0.0005 is 5e-4; a dash if not finite."""
    if not math.isfinite(value):
        return DASH
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 99 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def superscript(exponent: int) -> str:
    """Format an integer in superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
