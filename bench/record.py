"""The JSON files that the scripts of this folder write: where and with what first, saved again after every case."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from nc.train.provenance import describe_machine

RESULTS = Path(__file__).parent / "results"


class Record:
    """A file of results, complete at every moment: a run that is cut short keeps what it has.

    Args:
        path: the file.
        command: what gives such a file again.
        device: "cpu" or "cuda".
        commit: of the sources, where git cannot tell: a copy, or a checkout with new results in it.
    """

    def __init__(self, path: Path, command: str, device: str, commit: str | None = None) -> None:
        self.path = path
        machine = describe_machine(device)
        machine["commit"] = commit or machine["commit"]
        if device == "cuda":
            machine["cuda"] = torch.version.cuda
        self.data: dict[str, Any] = {"command": command, "machine": machine}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.path)


def first_line(error: Exception) -> str:
    """An error in a line of a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
