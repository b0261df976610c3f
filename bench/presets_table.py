"""The table of the presets in docs/sweeps.md, made from the grids that the package holds."""

from ncollapse.train.grid import load_grid, presets


def presets_table() -> str:
    """A row a preset: its name, the number of its runs and its description."""
    lines = ["| preset | runs | what |", "| --- | --- | --- |"]
    for name in presets():
        grid = load_grid(name)
        lines.append(f"| `{name}` | {len(grid.runs):,} | {grid.description} |")
    return "\n".join(lines)
