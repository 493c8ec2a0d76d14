"""Starting or joining Ray (extra ``[serve]``): quiet, calling nobody."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from typing import Any

from .errors import ClusterError

__all__ = ["connect", "import_ray"]

# No tensor of any size goes through the object store except a model and its batches.
_OBJECT_STORE = 100 << 20
_ATTEMPTS = 3
_PROBE_SECONDS = 5.0
_LOGS = "/tmp/ray/session_latest/logs"


def import_ray() -> Any:
    """The module ``ray``.

    Raises:
        ImportError: it is not installed; the message says how it would be.
    """
    # Read when ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("this needs Ray: pip install 'adalayer_native[serve]'") from error
    return ray


def connect(address: str | None, cpus: int, *, object_store: int = _OBJECT_STORE) -> bool:
    """Join the cluster at ``address``, or start one of our own; nothing if this process has one.

    Args:
        cpus: of a cluster of our own, as Ray counts them.
        object_store: its bytes of shared memory.

    Returns:
        Whether ``ray.shutdown()`` is ours to call.

    Raises:
        ClusterError: there is no cluster at ``address``, or ours does not come up.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements of future defaults
        if address is not None:
            _join(ray, address)
        else:
            _start(ray, cpus, object_store)
    return True


def _join(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        # Where nobody listens, Ray itself tries for minutes.
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises many kinds
        raise ClusterError(
            f"no Ray cluster at address {address!r}: {_first_line(error)}; start one with "
            "`ray start --head`, or leave the address out to have one for the time"
        ) from error


def _start(ray: Any, cpus: int, object_store: int) -> None:
    begin = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=object_store,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # a plain Exception is what Ray raises
            ray.shutdown()
            # Its processes have 30 s to come up, which a busy machine may not give them.
            if "timed out during startup" not in str(error):
                raise ClusterError(
                    f"Ray cannot be started on this machine: {_first_line(error)}; its logs are in "
                    f"{_LOGS}"
                ) from error
            if attempt == _ATTEMPTS:
                seconds = time.monotonic() - begin
                raise ClusterError(
                    f"Ray did not start on this machine within {seconds:.0f} s, in {attempt} "
                    "attempts: try again when it is less busy, or start Ray with "
                    f"`ray start --head` and give the address auto; its logs are in {_LOGS}"
                ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
