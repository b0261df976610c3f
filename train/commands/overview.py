"""Help of the command line: the overview of `ncollapse --help`, and the examples that end the help of each command."""

from collections.abc import Mapping

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

#: Command -> two command lines that show its use.
EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": ("ncollapse demo", "ncollapse demo --out results/first --best-by nc3"),
    "run": (
        "ncollapse run --optimizer adamw --lr 0.003 --epochs 50",
        "ncollapse run --model resnet9 --data fashion-mnist --download --lr 0.0679",
    ),
    "sweep": (
        "ncollapse sweep coupling",
        "ncollapse sweep grid.toml --lr 0.01 0.1 --seed 0 1 2 --dry-run",
    ),
    "status": ("ncollapse status results/coupling --watch", "ncollapse status results/coupling --json"),
    "report": (
        "ncollapse report results/coupling --best-by nc3",
        "ncollapse report /data/paper --out report",
    ),
    "findings": ("ncollapse findings results/findings", "ncollapse findings results/findings --claim 3"),
    "rerun": (
        "ncollapse rerun results/coupling --where status=diverged --lr 0.01",
        'ncollapse rerun results/coupling --where "optimizer=adam lr<0.1" --seed 1 2',
    ),
    "export": (
        "ncollapse export results/coupling --format csv",
        "ncollapse export results/coupling --out tables",
    ),
    "merge": (
        "ncollapse merge results/shard-1 results/shard-2 --out results/paper",
        "ncollapse merge results/old results/new --out results/both --keep-first",
    ),
    "check": (
        "ncollapse check results/coupling",
        "ncollapse check results/coupling --salvage results/mended",
    ),
    "theory": ("ncollapse theory", "ncollapse theory --momentum 0.9 --weight-decay 0.01 --steps 10000"),
    "doctor": ("ncollapse doctor", "ncollapse doctor --data-dir /data"),
    "bench": ("ncollapse bench", "ncollapse bench --device cpu --seconds 30 --json"),
    "completion": (
        "source <(ncollapse completion bash)",
        "ncollapse completion fish > ~/.config/fish/completions/ncollapse.fish",
    ),
}


def print_overview(commands: Mapping[str, type]) -> None:
    """Print what every command does, by the first line of its docstring, in the order of `commands`."""
    options = {
        "-h, --help": "Show this; after a command: its options, with examples.",
        "-V, --version": "Show the version.",
    }
    console = Console(highlight=False)
    with console.capture() as shown:  # printed by `print`, which leaves a closed pipe to the caller
        console.print("[bold]usage:[/bold] ncollapse COMMAND [OPTIONS]\n")
        console.print("Which optimizers drive a classifier into neural collapse, and why.\n")
        console.print(_box("commands", {name: str(kind.__doc__).splitlines()[0] for name, kind in commands.items()}))
        console.print(_box("options", options))
    print(shown.get(), end="")
    _print_lines(("ncollapse demo", "ncollapse sweep --help"))


def print_examples(command: str) -> None:
    """Print the examples of a command."""
    _print_lines(EXAMPLES[command])


def _box(title: str, rows: Mapping[str, str]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name), Text(text))
    return Panel(table, title=title, title_align="left", border_style="dim")


def _print_lines(commands: tuple[str, str]) -> None:
    # Without a box: the lines are for copying.
    print("\nexamples:", *(f"  {line}" for line in commands), sep="\n")
