"""The command `ncollapse`, also as `python -m ncollapse.train`: what has to be so before its libraries are imported."""

import contextlib
import importlib.util
import os
import sys

#: A library of each kind that the extra `train` installs.
_NEEDED = ("tyro", "rich", "pydantic", "pandas", "sklearn", "matplotlib", "torchvision")


def main() -> None:
    """Run the command line, on any terminal."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that cannot hold Greek letters shows "?" in their place.
        with contextlib.suppress(AttributeError):  # a stream that was replaced
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if os.environ.get("NO_COLOR"):  # rich reads it, tyro does not
        os.environ["PYTHON_TYRO_ANSI_CODES"] = "False"
    # Figures only draw files. That of a notebook may name a package that this environment lacks.
    os.environ.pop("MPLBACKEND", None)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"ncollapse: the command needs {', '.join(missing)}: pip install 'ncollapse[train]'")
    try:
        from ncollapse.train.cli import main as run

        run()
    except KeyboardInterrupt:  # while libraries are imported
        sys.exit(130)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
