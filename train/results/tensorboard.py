"""Write metrics for TensorBoard, a folder per run, at every evaluation.

The file of a run is opened, appended to and closed each time. SummaryWriter would keep a thread for each run in
training, write minutes later, and take five times as long: too much for stacks of hundreds of runs.
"""

import os
import re
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ncollapse.train.config import RunConfig
from ncollapse.train.errors import UserError
from ncollapse.train.results.storage_errors import cannot_write

if TYPE_CHECKING:
    from ncollapse.train.results.record import Evaluation

#: Characters of a folder's name before the id.
_LONGEST = 200


class Logs:
    """The logs of all runs of a results folder, in its folder `tensorboard`.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ImportError:
            raise UserError(
                "--tensorboard needs the package tensorboard, which is not installed: "
                "pip install 'ncollapse[tensorboard]', or leave the option out"
            ) from None
        self._folder = folder / "tensorboard"
        # TensorBoard reads the files of a run in the order of their names: one for each start of the sweep.
        self._name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._last: dict[str, int] = {}  # run -> last epoch recorded since this start

    def evaluated(self, runs: Sequence[RunConfig], evaluation: "Evaluation", finished: Collection[str]) -> None:
        """Record an evaluation of a stack of runs, whose ids in `finished` had ended before.

        Those train again only so that the stack stays the same; their logs are left as they are.
        """
        for n, i in enumerate(evaluation.rows):
            if runs[i].id not in finished:
                values = {name: each[n] for name, each in evaluation.values.items()}
                for layer, metrics in evaluation.layers.items():
                    values |= {f"{layer}/{name}": each[n] for name, each in metrics.items()}
                self.record(runs[i], evaluation.epoch, values)

    def record(self, run: RunConfig, epoch: int, values: dict[str, float]) -> None:
        """Record the metrics of a run at an epoch, each as a scalar; `UserError` where the file cannot be written."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        events = [Event(wall_time=now, step=epoch, summary=Summary(value=scalars))]
        if epoch <= self._last.get(run.id, epoch):
            # The stack has started, perhaps again or from a checkpoint: TensorBoard drops what it has from here on.
            start = SessionLog(status=SessionLog.START)
            version = Event(wall_time=now, file_version="brain.Event:2")
            events = [version, Event(wall_time=now, step=epoch, session_log=start), *events]
        self._last[run.id] = epoch
        folder = self._folder / folder_name(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / self._name, "ab") as file:
                for event in events:
                    RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise cannot_write(folder, error) from None


def folder_name(run: RunConfig) -> str:
    """Return the name of a run in TensorBoard: its settings, in letters that any file system takes, and its id."""
    settings = run.describe().replace("β", "momentum").replace("λ", "decay")
    # Names and options of the user's may be longer than a file system takes.
    return re.sub(r"[^A-Za-z0-9=.+-]+", "_", f"{run.model}-{run.data} {settings}")[:_LONGEST] + f"-{run.id}"
