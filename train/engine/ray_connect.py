"""The connection to a Ray cluster, or to a private one on this machine, whose head is watched.

A cluster that requires a token needs RAY_AUTH_MODE=token on every machine, and the token in RAY_AUTH_TOKEN or in
`~/.ray/auth_token`. The private cluster listens on all interfaces, as all of Ray's do, so it requires one too.
"""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from ncollapse.train.errors import UserError

#: Seconds that a machine may take to accept a connection.
_CONNECT_SECONDS = 10.0
#: Seconds without an answer after which the head of the cluster is lost, and after which this process ends where it
#: waits for an answer: after 60, Ray would end it without a word on the results.
_LOST_SECONDS, _END_SECONDS = 10.0, 45.0
#: Seconds between two looks of the watch.
_WATCH_SECONDS = 2.0
#: Bounds on Ray's retries, where something else answers at the address or this machine is not part of the cluster: by
#: default it retries for a quarter of an hour. Ray reads them when it is imported.
_RETRY_LIMITS = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "20",
}


class ClusterHead:
    """The head of a cluster, at HOST:PORT; a thread watches it until it is closed.

    Attributes:
        lost: why it does not answer any more; empty while it does.
    """

    def __init__(self, address: str) -> None:
        self.address, self.lost = address, ""
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def check(self) -> None:
        """Raise UserError where the head has not answered for some seconds."""
        began = time.monotonic()
        while not self.lost and (why := _refusal(self.address)):
            if time.monotonic() - began >= _LOST_SECONDS:
                self.lost = why
            time.sleep(0.5)
        if self.lost:
            raise UserError(self._text())

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _text(self) -> str:
        return (
            f"the head of the Ray cluster at {self.address} does not answer any more ({self.lost}): finished runs and "
            "the last checkpoints are kept; start the cluster again, then give the same command again"
        )

    def _watch(self) -> None:
        """End this process where it waits for an answer of a lost head: no signal reaches Ray's own code."""
        answered = time.monotonic()
        while not self._closed.wait(_WATCH_SECONDS):
            why = _refusal(self.address)
            if not why:
                answered = time.monotonic()
            elif time.monotonic() - answered >= _END_SECONDS:
                self.lost = why
                print(f"ncollapse: {self._text()}", file=sys.stderr, flush=True)
                os._exit(1)


def connect(ray_address: str | None) -> tuple[Any, str]:
    """Connect this process to a cluster, or start a private one; errors come within seconds.

    Returns:
        The module ray; a sentence for the user on a private cluster, empty for another one.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        for name, value in _RETRY_LIMITS.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}): pip install 'ncollapse[ray]'") from None
    if address is None:
        address = _running_here()
        # Ray remembers a cluster that was killed, and would wait for it.
        address = "local" if address is None or _refusal(address) else address
    if address not in ("auto", "local"):  # names that Ray resolves
        _check_reachable(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        why = [repr(error), *str(error.__cause__ or error).strip().splitlines()][-1]
        raise UserError(_no_answer(address, why)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which ends the process at once
    return ray, _note() if address == "local" else ""


def _running_here() -> str | None:
    """The address of a cluster that was started on this machine, as far as Ray knows one."""
    with contextlib.suppress(ImportError, AttributeError):
        return importlib.import_module("ray._private.services").canonicalize_bootstrap_address(None)
    return None


def _check_reachable(address: str) -> None:
    """Raise UserError unless something answers at an address: Ray itself would retry for a quarter of an hour."""
    if "://" in address or not address.rpartition(":")[2].isdigit():
        raise UserError(f"--ray-address is HOST:PORT, as in 192.168.0.1:6379; got {address}")
    if why := _refusal(address):
        raise UserError(_no_answer(address, why))


def _refusal(address: str) -> str:
    """Return why nothing answers at HOST:PORT; empty where something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def _note() -> str:
    """Say who can reach the cluster that Ray has started here; Ray itself has it require a token (2.59 and later)."""
    # Ray sets the variable of this process when it makes, or finds, the token.
    if (mode := os.environ.get("RAY_AUTH_MODE")) == "token":
        return "Ray has started a cluster on this machine; it requires a token, that of ~/.ray/auth_token by default"
    return f"Ray has started a cluster on this machine that everyone who reaches it can use: RAY_AUTH_MODE is {mode}"


def _no_answer(address: str, why: str) -> str:
    return (
        f"no connection to a Ray cluster at {address} ({why}). Start one with `ray start --head --port 6379`, and with "
        "`ray start --address HOST:6379` on its other machines; this must be one of them. Without a cluster, "
        "--ray-address and $RAY_ADDRESS, Ray starts one on this machine only"
    )
