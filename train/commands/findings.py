"""`ncollapse findings`: the paper's claims, each with its number and verdict, from the runs of a results folder."""

import dataclasses
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ncollapse.formatting import number
from ncollapse.plot.looks import with_variants
from ncollapse.train.errors import UserError
from ncollapse.train.findings.claim import Comparison, Finding, Verdict
from ncollapse.train.findings.registry import CLAIMS, as_json, findings_of
from ncollapse.train.formatting import plain
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection

_STYLES: dict[Verdict, str] = {"holds": "green", "fails": "red", "not enough": "yellow"}
#: Claim 12 needs no runs.
_LAST = max(CLAIMS) + 1
#: Ids of runs that are printed.
_RUNS = 6


def print_findings(folder: Path, selection: Selection, console: Console, claim: int | None = None) -> None:
    """Print the findings in a folder's runs, or those of one claim in detail.

    Args:
        claim: its number, from 1 to 12.

    Raises:
        UserError: the folder holds no results; no claim has this number.
    """
    if claim is not None and not 1 <= claim <= _LAST:
        raise UserError(f"--claim must lie between 1 and {_LAST}; got {claim}")
    for title, findings in _found(folder, selection):
        shown = [one for one in findings if claim in (None, one.number)]
        if not shown:
            continue
        console.print(plain(title, "bold"), soft_wrap=True)
        if claim is None:
            console.print(_table(shown))
            _print_commands(shown, console)
        for one in shown if claim is not None else ():
            _print_details(one, console)
    if claim is None:
        text = f"How claim 1 is tested, all its comparisons and its runs: ncollapse findings {folder} --claim 1"
        console.print(plain(text), soft_wrap=True)


def findings_json(folder: Path, selection: Selection) -> str:
    """Return the findings in a folder's runs as JSON: title -> findings, with all numbers and the ids of the runs.

    Raises:
        UserError: the folder holds no results.
    """
    return as_json(_found(folder, selection))


def _found(folder: Path, selection: Selection) -> list[tuple[str, list[Finding]]]:
    results = read_results(folder)
    return findings_of(dataclasses.replace(results, runs=with_variants(results.runs)), selection)


def _table(findings: list[Finding]) -> Table:
    """Return a row per claim: number, verdict, and below the claim its numbers and what is missing."""
    columns = (
        Column("", justify="right"),
        Column("verdict", min_width=10, max_width=12),
        Column("claim, and what the runs say"),
    )
    table = Table(*columns, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for one in findings:
        lines = [plain(one.claim, "bold"), plain(one.says), plain(f"missing: {one.lacks}" if one.lacks else "", "dim")]
        text = Text("\n").join(line for line in lines if line)
        table.add_row(str(one.number), Text(one.verdict_text, _STYLES[one.verdict]), text)
    return table


def _print_commands(findings: list[Finding], console: Console) -> None:
    """Print the commands that add what is missing, each once, with the numbers of its claims."""
    claims: dict[str, list[str]] = {}
    for one in findings:
        if one.command:
            claims.setdefault(one.command, []).append(str(one.number))
    for command, numbers in claims.items():
        several = "claims" if len(numbers) > 1 else "claim"
        console.print(plain(f"For {several} {', '.join(numbers)}: {command}"), soft_wrap=True)
    if claims:
        console.print()


def _print_details(finding: Finding, console: Console) -> None:
    console.print(plain(f"{finding.number}. {finding.claim}"))
    console.print(Text.assemble("Verdict: ", (finding.verdict_text, _STYLES[finding.verdict])))
    console.print(plain(f"Tested: {finding.tested}"))
    if finding.parts:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("comparison", "number (95 % interval)", "n", "verdict"):
            table.add_column(name, justify="right" if name == "n" else "left")
        for part in finding.parts:
            table.add_row(*_cells(part))
        console.print(table)
    if finding.runs:
        ids = ", ".join(finding.runs[:_RUNS]) + (", …; all with --json" if len(finding.runs) > _RUNS else "")
        console.print(plain(f"Runs: {len(finding.runs):,} ({ids})"))
    if finding.lacks:
        console.print(plain(f"Missing: {finding.lacks}"))
    if finding.command:
        console.print(plain(f"To add it: {finding.command}"), soft_wrap=True)


def _cells(part: Comparison) -> tuple[Text, Text, Text, Text]:
    """Return the cells of a comparison; further numbers stand below the one that decides."""
    more = ", ".join(f"{name} {number(value)}" for name, value in part.more.items())
    numbers = Text("\n").join([plain(f"{part.of} {part.text}"), *([plain(more, "dim")] if more else [])])
    return plain(part.name), numbers, plain(f"{part.n:,} {part.counted}"), Text(part.verdict, _STYLES[part.verdict])
