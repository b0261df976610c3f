"""A griffe extension: what docstrings hold beside Google style, as griffe and Markdown know it.

The formulas are TeX for editors that typeset it; here they become lines of Unicode, as no page loads a renderer.
"""

import re
from typing import Any

from griffe import Extension, Object

NO_BREAK = "\N{NO-BREAK SPACE}"
_MATH = re.compile(r"^\.\. math:: *(.*(?:\n[ \t]+.*)*)", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^Attributes:\n(?:(?: .*)?(?:\n|$))*", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w[\w, ]*):", re.MULTILINE)
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEX = (
    (r"\\mathrm\{(\w+)\}", lambda found: found[1]),
    (r"\\hat (\w)", lambda found: f"{found[1]}\N{COMBINING CIRCUMFLEX ACCENT}"),
    (r"\\sqrt\{([^{}\s]+)\}", lambda found: f"√{found[1]}"),
    (r"_(\d)", lambda found: found[1].translate(_SUBSCRIPTS)),
    (r"\^(\d)", lambda found: found[1].translate(_SUPERSCRIPTS)),
)


class Docstrings(Extension):
    """Changes what griffe reads, before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = _MATH.sub(lambda found: f"```text\n{formulas(found[1])}\n```", obj.docstring.value)
        text = _ATTRIBUTES.sub(lambda found: _ENTRY.sub(lambda entry: _names(entry[1], obj), found[0]), text)
        # The section whose code griffe shows as code.
        obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")


def _names(names: str, obj: Object) -> str:
    """The start of an entry "x, y: …": griffe would take what follows a space as the attribute's type."""
    return f"    {names}:" if names in obj.all_members else f"    {names.replace(' ', NO_BREAK)} ():"


def formulas(tex: str) -> str:
    r"""Write formulas, separated by \quad, as lines of Unicode.

    Raises:
        ValueError: a command that is not in `_TEX`.
    """
    lines = [line.strip().removesuffix(",") for line in re.split(r"\\q?quad", re.sub(r"\s+", " ", tex))]
    text = "\n".join(lines)
    for pattern, replacement in _TEX:
        text = re.sub(pattern, replacement, text)
    if unknown := re.search(r"\\\w+|[{}^]|_\w", text):
        raise ValueError(f"cannot show {unknown[0]!r} of {tex!r}: add it to _TEX of docs/.hooks/docstrings.py")
    return text
