"""The JSON files that the scripts of this folder write: where and with what first, saved again after every case."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from ncollapse.train.results.provenance import describe_machine, device_name

RESULTS = Path(__file__).parent / "results"


def recording(doc: str | None) -> argparse.ArgumentParser:
    """The options of a script that records: where to, and of which commit."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    return parser


def timing_options(
    doc: str | None, arguments: list[str] | None, seconds: float, flags: dict[str, str] | None = None,
    values: dict[str, str] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """The options of a benchmark of many cases, parsed; without the GPU that is asked for it ends here.

    Args:
        seconds: for each group of timings, unless the user says otherwise.
        flags, values: further switches, and options with a value, with their help.
    """
    parser = recording(doc)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="what is timed by then is recorded")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each group of timings")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    for name, told in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=told)
    for name, told in (values or {}).items():
        parser.add_argument(f"--{name}", help=told)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA GPU here; --device cpu times the CPU kernels\n")
    return options


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
        machine = describe_machine(device_name(device))
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
