"""`ncollapse check`: what of a results folder is whole, and a copy of that."""

from collections import Counter
from pathlib import Path

from rich.console import Console

from ncollapse.train.errors import DamageError
from ncollapse.train.formatting import plain
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE

#: First word of a finding -> what is counted.
_KINDS = {"run": "run(s)", "checkpoints": "checkpoint(s)", "weights": "file(s) of weights", "failures": "traceback(s)"}
#: Damaged things that are listed; the rest is counted.
_LISTED = 50


def print_check(folder: Path, salvage: Path | None, console: Console) -> None:
    """Print what a results folder holds and what of it is damaged; copy what is whole into `salvage`, if given.

    Raises:
        DamageError: something is damaged, and was not salvaged.
        UserError: no results there; the copy cannot be made.
    """
    whole: Counter[str] = Counter()
    damaged = []
    for finding in inspect_folder(folder):
        if finding.problem:
            damaged.append(finding)
        else:
            whole[_KINDS.get(finding.what.replace("/", " ").split()[0], finding.what)] += 1
    counts = [FILE] * whole.pop(FILE, 0) + [f"{n} {kind}" for kind, n in whole.items()]
    console.print(plain(f"Whole: {', '.join(counts) or 'nothing'}"), soft_wrap=True)
    for finding in damaged[:_LISTED]:
        console.print(plain(f"Damaged: {finding.what}: {finding.problem}", "yellow"), soft_wrap=True)
    if len(damaged) > _LISTED:
        console.print(plain(f"Damaged: {len(damaged) - _LISTED} more"))
    if salvage is not None:
        copied = salvage_folder(folder, salvage)
        console.print(
            plain(
                f"Copied into {salvage}: {copied.finished} finished runs, {copied.unfinished} to be trained, "
                f"{copied.weights} weights, {copied.checkpoints} checkpoints; {copied.lost} runs are lost. Continue "
                f"with the same command and --out {salvage}"
            ),
            soft_wrap=True,
        )
    elif damaged:
        raise DamageError(
            f"{len(damaged)} things in {folder} are damaged; `ncollapse check {folder} --salvage OUT` copies the rest"
        )
