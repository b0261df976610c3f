"""Numbers and settings as text for people: in tables, figures and messages."""

import json
import math
from collections.abc import Mapping
from typing import Any

#: What stands where a value is missing.
DASH = "–"


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


def interval(low: float, high: float) -> str:
    """Format a range with three significant digits, as one number where both ends read the same."""
    first, last = number(low), number(high)
    return first if first == last else f"{first} to {last}"


def percentages(low: float, high: float) -> str:
    """Format a range of shares in percent, as one number where both ends read the same."""
    first, last = percentage(low), percentage(high)
    return first if first == last or is_missing(low) else f"{100 * low:.2f}–{last}"


def change(percent: float) -> str:
    """Format a change in percent with its sign; empty for NaN."""
    if is_missing(percent):
        return ""
    if -100 <= percent < -99.95:
        return "<-99.9 %"
    return f"{percent:+.0f} %" if percent >= 100 else f"{percent:+.1f} %"


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


def read_json(text: object) -> Any:
    """Return what a JSON text holds; None where it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
