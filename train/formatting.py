"""Text from outside, durations and rates for people: on the terminal, on the page and in messages."""

from rich.text import Text

from ncollapse.formatting import DASH, is_missing


def visible(text: object) -> str:
    """Return text on one line in which every character can be seen: control characters, escape sequences as \\x1b."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else ascii(c)[1:-1] for c in str(text))


def plain(text: object, style: str = "") -> Text:
    """Return text from outside for the terminal, in one style: brackets are no markup, escape sequences are visible.

    Whatever a file, a path, an option or an exception says reaches the terminal through this function.
    """
    return Text(visible(text), style)


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
