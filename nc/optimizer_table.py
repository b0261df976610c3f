"""The optimizers that a run may name, a row each: settings, stacks, theory, tables and figures read all they know here.

A new optimizer is a class of `ncollapse.optim`, and two rows here: one with its decay coupled into the gradient, one
with it decoupled. A run may also name an optimizer of the user's or of another package (`plugins.py`): `row_of` makes a
row of it, since tables and figures treat it as they do the others.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class OptimizerRow:
    """What is known of an optimizer by its name.

    Attributes:
        name: as settings and the command line have it.
        label: as tables and figures write it.
        family: the update rule, whatever its coupling: a name of `ncollapse.optim` in lower case.
        coupling: the share of the decay that is added to the gradient by default; None: not known.
        in_paper: whether arXiv 2602.16642 compares it.
        colour, dark_colour: of its family, on light and dark ground (after Okabe & Ito, safe for the colour-blind).
        dashed: whether figures draw it with a dashed line.
        theory_width: width of its line in the figure of `ncollapse theory`, in points. Where theory has two families on
            one curve, the later one is narrower, so that both are visible.
        theorem: what is proven of NC0, with its theorem in arXiv 2602.16642.
        takes: those of the settings momentum, beta2 and eps that its update uses.
        own_stack: its step is not that of the other rules, so that it trains in stacks of its own.
        foreign: it is no class of `ncollapse.optim`: each run has its own object, and nothing is predicted.
    """

    name: str
    label: str
    family: str
    coupling: float | None
    in_paper: bool
    colour: str
    dark_colour: str
    dashed: bool
    theory_width: float
    theorem: str
    takes: tuple[str, ...]
    own_stack: bool
    foreign: bool = False


def _rows() -> Iterator[OptimizerRow]:
    # family, label, in the paper, colours, width of the line, what it takes,
    # theorems of the coupled and the decoupled form
    families = (
        ("sgd", "SGD", True, ("#0072b2", "#4fa9e6"), 3.0, ("momentum",),
         ("→ 0 in any network (3.1)", "→ 0 in any network (3.2)")),
        ("signum", "Signum", True, ("#009e73", "#2cc294"), 3.0, ("momentum",),
         ("rises, → 0 as η decays (3.4)", "rises to K(K − 2)²/λ² (3.3)")),
        ("adam", "Adam", True, ("#d55e00", "#f5894a"), 1.8, ("momentum", "beta2", "eps"),
         ("Signum idealises it", "SignumW idealises it")),
        ("lion", "Lion", False, ("#cc79a7", "#e39bc6"), 1.3, ("momentum", "beta2"),
         ("–", "as SignumW")),
        ("muon", "Muon", False, ("#e69f00", "#f0b73c"), 1.3, ("momentum", "beta2", "eps"),
         ("–", "as SGDW, any network")),
    )  # fmt: skip
    for family, label, in_paper, colours, width, takes, theorems in families:
        for suffix, coupling, theorem in zip(("", "w"), (1.0, 0.0), theorems, strict=True):
            yield OptimizerRow(
                f"{family}{suffix}", f"{label}{suffix.upper()}", family, coupling, in_paper, *colours,
                dashed=coupling == 0, theory_width=width, theorem=theorem, takes=takes, own_stack=family == "muon",
            )  # fmt: skip


#: name -> row, in the order of tables and figures.
TABLE: dict[str, OptimizerRow] = {row.name: row for row in _rows()}
OPTIMIZERS: tuple[str, ...] = tuple(TABLE)
#: Those that arXiv 2602.16642 compares.
PAPER_OPTIMIZERS: tuple[str, ...] = tuple(row.name for row in TABLE.values() if row.in_paper)
#: name -> the update rule whatever its coupling.
FAMILY: dict[str, str] = {row.name: row.family for row in TABLE.values()}
#: name -> how tables and figures write it.
LABELS: dict[str, str] = {row.name: row.label for row in TABLE.values()}
#: family -> (colour on light ground, on dark ground).
FAMILY_COLOURS: dict[str, tuple[str, str]] = {row.family: (row.colour, row.dark_colour) for row in TABLE.values()}

#: Colours of optimizers that are not in the table, on light and dark ground: `row_of` chooses one by the name.
FOREIGN_COLOURS = (
    ("#7a5195", "#b48ad0"), ("#8c564b", "#c49189"), ("#56b4e9", "#86c9ef"), ("#666666", "#a6a6a6"),
    ("#bc8f00", "#dcb945"), ("#9b2226", "#d9696d"), ("#2f6f5e", "#6fb3a1"), ("#3b3b98", "#8686d8"),
)  # fmt: skip


@functools.cache
def row_of(name: str) -> OptimizerRow:
    """Return what is known of an optimizer; of one that is not in `TABLE`, its name without the module."""
    if name in TABLE:
        return TABLE[name]
    colours = FOREIGN_COLOURS[zlib.crc32(name.encode()) % len(FOREIGN_COLOURS)]
    return OptimizerRow(
        name, name.rpartition(":")[2], name, None, False, *colours,
        dashed=False, theory_width=1.3, theorem="–", takes=(), own_stack=True, foreign=True,
    )  # fmt: skip


def in_table_order(names: set[str]) -> list[str]:
    """Sort names of optimizers: those of `TABLE` in its order, then the others by their labels."""
    return [name for name in OPTIMIZERS if name in names] + sorted(
        names - TABLE.keys(), key=lambda name: (row_of(name).label, name)
    )
