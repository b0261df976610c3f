"""The connection to a Ray cluster, with errors that come within seconds and say what to do."""

import importlib
import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

from ncollapse.train.errors import UserError

#: Seconds that a machine may take to accept a connection.
_CONNECT_SECONDS = 10.0
#: Bounds on Ray's retries, where something else answers at the address or this machine is not part of the cluster: by
#: default it retries for a quarter of an hour. Ray reads them when it is imported.
_RETRY_LIMITS = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "20",
}


def connect(ray_address: str | None) -> Any:
    """Connect this process to a cluster, or start one, and return the module ray.

    Args:
        ray_address: HOST:PORT; by default $RAY_ADDRESS, a cluster on this machine, or else a new one here.

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
    address = address or _running_here()
    if address is not None and address not in ("auto", "local"):  # names that Ray resolves
        _check_reachable(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(ray_address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        why = [repr(error), *str(error.__cause__ or error).strip().splitlines()][-1]
        raise UserError(_no_answer(address or "this machine", why)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which ends the process at once
    return ray


def _running_here() -> str | None:
    """The address of a cluster that was started on this machine, as far as Ray knows one."""
    with suppress(ImportError, AttributeError):
        found: str | None = importlib.import_module("ray._private.services").canonicalize_bootstrap_address(None)
        return found
    return None


def _check_reachable(address: str) -> None:
    """Raise UserError unless something answers at an address: Ray itself would retry for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise UserError(f"--ray-address is HOST:PORT, as in 192.168.0.1:6379; got {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(_no_answer(address, str(error))) from None


def _no_answer(address: str, why: str) -> str:
    return (
        f"no connection to a Ray cluster at {address} ({why}). Start one with `ray start --head --port 6379`, and with "
        "`ray start --address HOST:6379` on its other machines; this must be one of them. `ray stop` stops an old "
        "cluster here; without a cluster, --ray-address and $RAY_ADDRESS, Ray starts one on this machine only"
    )
