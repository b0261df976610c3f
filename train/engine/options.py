"""The options of a sweep; in a module without torch, so that the command line starts quickly."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ncollapse.train.errors import UserError

#: Bounds on the processes of a sweep and on the runs of a stack, far beyond any machine.
MOST_WORKERS, MOST_RUNS = 1_024, 100_000
_MOST_MINUTES = 525_600.0  # a year

#: For options whose default is described in the help text, where "None" would say less.
hide_default = tyro.conf.arg(help_behavior_hint="")
#: An option that is given or not; "False" would say nothing.
Flag = Annotated[bool, hide_default]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """What is kept besides the metrics, and until when it is trained."""

    save_weights: Flag = False
    """Write each run's final weights to weights/RUN.pt."""
    tensorboard: Flag = False
    """Also log every metric of every run for TensorBoard, in the folder tensorboard."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints of a stack, from which the same command continues."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="", metavar="NAME ...")] = ()
    """Metrics of your own to measure too: --metrics mine.py:margin."""
    accept_changes: Flag = False
    """Go on with code of your own that has changed since the folder's runs were made; the change is recorded."""
    minutes: Annotated[float | None, hide_default] = None
    """Stop after so many minutes, at checkpoints, with exit code 75: --minutes 230 in a job of four hours."""

    def __post_init__(self) -> None:
        # A command inherits from several such classes.
        getattr(super(), "__post_init__", lambda: None)()
        if not 0 <= self.checkpoint_minutes <= _MOST_MINUTES:
            raise UserError(
                f"--checkpoint-minutes must be at least 0, at most {_MOST_MINUTES:g}; got {self.checkpoint_minutes:g}"
            )
        if self.minutes is not None and not 0 < self.minutes <= _MOST_MINUTES:
            raise UserError(f"--minutes must be above 0 and at most {_MOST_MINUTES:g}; got {self.minutes:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(KeepOptions):
    """How the runs of a grid share the machine or the cluster."""

    engine: Literal["local", "ray"] = "local"
    """local: all cores or GPUs of this machine. ray: a Ray cluster."""
    stack: Literal["auto"] | int = "auto"
    """Runs that train as one program, or as branches of one CUDA graph; auto measures what is fastest."""
    workers: Literal["auto"] | int = "auto"
    """Processes of the local engine that train side by side; auto measures what is fastest."""
    ray_address: Annotated[str | None, hide_default] = None
    """Address of a Ray cluster (HOST:6379); by default $RAY_ADDRESS, one on this machine, or else a new one here."""
    stop_hopeless: Annotated[float | None, hide_default] = None
    """End runs whose training loss is still at chance level, or above it, after this share of their epochs, as 0.25."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("stack", MOST_RUNS), ("workers", MOST_WORKERS)):
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= most:
                raise UserError(f"--{name} must be at least 1 and at most {most:,}, or auto; got {value}")
        if self.stop_hopeless is not None and not 0 < self.stop_hopeless < 1:
            raise UserError(f"--stop-hopeless is a share of a run's epochs, in (0, 1); got {self.stop_hopeless:g}")
        if self.engine != "ray" and self.ray_address is not None:
            raise UserError("--ray-address goes with --engine ray")
        if self.engine == "ray" and self.workers != "auto":
            raise UserError("--workers goes with the local engine; a Ray cluster starts as many as it has room for")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where the data come from, and which device trains."""

    data_dir: Annotated[Path | None, hide_default] = None
    """Folder of the data sets; by default $NCOLLAPSE_DATA, else ./data."""
    download: Flag = False
    """Let torchvision download a data set that is missing."""
    stream: Flag = False
    """Read data of your own while they are used, instead of holding them in memory; runs then train one by one."""
    device: Annotated[str | None, hide_default] = None
    """cpu, cuda (all GPUs), cuda:1 …; by default cuda where there is a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceOptions(SourceOptions):
    """Where the results go, too."""

    out: Annotated[Path | None, hide_default] = None
    """Results folder; by default results/NAME. The same command on the same folder continues; other runs are added."""
