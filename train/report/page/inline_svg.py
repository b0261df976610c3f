"""A figure's SVG file as an element of the page: shorter, in the page's colours and font, its points linked to runs."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from ncollapse.plot.looks import PAGE_COLOURS
from ncollapse.plot.style import GRID, GROUND, INK, QUIET

#: Colour in the files -> the page's CSS variable, which differs between light and dark.
_VARIABLES = {INK: "ink", QUIET: "quiet", GRID: "grid", GROUND: "card"}
_VARIABLES |= {light: name for name, (light, _) in PAGE_COLOURS.items()}
_COLOUR = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r'(href="#|url\(#)([^")]+)')


def inline(svg: str, name: str, about: str, runs: Mapping[str, Sequence[int]]) -> str:
    """Return the `<svg>` element for the page.

    Args:
        svg: as matplotlib wrote it, with text as text.
        name: unique on the page; the prefix of all ids.
        about: what the figure shows, for screen readers.
        runs: id of a group of points -> the number of each point's run, in the order drawn.
    """
    start, _, body = svg.partition("</metadata>")[2].partition("</defs>")  # the page needs neither
    assert "<style" in start
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box
    body = re.sub(r'<g id="patch_1">.*?</g>', "", body, count=1, flags=re.DOTALL)  # the background
    body = re.sub(r"<[^>]+>", _short_tag, body.removesuffix("\n").removesuffix("</svg>"))
    body = re.sub(r">\s+<", "><", body)
    body = re.sub(r"<g([^>]*)>((?:<use [^>]*/>)+)</g>", _share_style, body)
    for group, numbers in runs.items():
        body = _link_points(body, group, numbers)
    known = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(m[2] for m in _REFERENCE.finditer(body)))}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{known[m[1]]}"' if m[1] in known else "", body)
    body = _REFERENCE.sub(lambda m: m[1] + known[m[2]], body)
    size = f'viewBox="0 0 {box[1]} {box[2]}" style="--wide:{float(box[1]):.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(about)}">{body}</svg>'


def _short_tag(match: re.Match[str]) -> str:
    """Shorten a tag: two decimals, no spaces, no default attributes; replace fonts and colours by the page's."""
    tag = " ".join(match[0].split()).replace("xlink:href", "href")
    if "base64" in tag:
        return re.sub(r"(?<=base64,)[^\"]+", lambda m: m[0].replace(" ", ""), tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r" ?font-family: [^;]*;", "", tag)
    tag = tag.replace(": ", ":").replace("; ", ";")
    return _COLOUR.sub(lambda m: f"var(--{_VARIABLES[m[0]]})", tag)


def _share_style(match: re.Match[str]) -> str:
    """Move the style of markers to their group, if all have the same."""
    styles = set(re.findall(r' style="[^"]*"', match[2]))
    if len(styles) != 1 or "style=" in match[1]:
        return match[0]
    (style,) = styles
    return f"<g{match[1]}{style}>{match[2].replace(style, '')}</g>"


def _link_points(body: str, group: str, numbers: Sequence[int]) -> str:
    """Write the numbers of the runs into the tag of a group of points."""
    mark = f'<g id="{group}">'
    before, found, after = body.partition(mark)
    points = re.match(r"(?:<defs>.*?</defs>)?(.*?)</g>", after)  # a shape is defined where it is first used
    assert found, group
    assert points, group
    assert points[1].count("<use ") == len(numbers), group
    return f'{before}<g data-runs="{" ".join(map(str, numbers))}">{after}'
