"""Starting or joining Ray (extra ``[serve]``): quiet, calling nobody."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

__all__ = ["connect", "import_ray"]

# No tensor of any size goes through the object store except a model and its batches.
_OBJECT_STORE = 100 << 20
_ATTEMPTS = 3


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
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements of future defaults
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            _start(ray, cpus, object_store)
    return True


def _start(ray: Any, cpus: int, object_store: int) -> None:
    for attempt in range(_ATTEMPTS):
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
            # Its processes have 30 s to come up, which a busy machine may not give them.
            if attempt == _ATTEMPTS - 1 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
