"""Threads, instruction sets, and how zeros are used."""

from __future__ import annotations

import threading

import torch

from adalayer_native import _C

__all__ = [
    "active_isa",
    "force_isa",
    "get_num_threads",
    "isas",
    "set_num_threads",
    "set_sparse_policy",
    "set_winograd_policy",
]

_threads_lock = threading.Lock()
_threads: int | None = None


def set_num_threads(threads: int | None) -> None:
    """Sets how many threads a native operator may use; ``None`` follows torch.get_num_threads().

    Raises:
        ValueError: if ``threads`` is below 1.
    """
    global _threads
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 or None, got {threads}")
    with _threads_lock:
        _threads = threads


def get_num_threads() -> int:
    """Threads that a native operator may use."""
    return torch.get_num_threads() if _threads is None else _threads


def isas() -> list[str]:
    """Instruction sets that this build and this machine have, fastest first."""
    return list(_C.isas())


def active_isa() -> str:
    """The instruction set in use: ``ADALAYER_FORCE_ISA`` in the environment, else the fastest."""
    return str(_C.active_isa())


def force_isa(name: str) -> None:
    """Uses one instruction set from now on; ``"auto"`` goes back to the fastest.

    Raises:
        ValueError: for an unknown name or one that the machine does not support.
    """
    _C.force_isa(name)


def set_sparse_policy(name: str) -> None:
    """Chooses how zero weights are used from here on; for tests and measurements.

    Args:
        name: ``"auto"`` (the default: by the clock, layer by layer), ``"dense"``, ``"blocks"`` or
            ``"bitmask"``. Results have the same bits under each. ``ADALAYER_SPARSE`` sets it at the
            start. Engines that exist stay as they are; drop-in layers choose anew.

    Raises:
        ValueError: for an unknown name.
    """
    _C.set_sparse_policy(name)


def set_winograd_policy(name: str) -> None:
    """Chooses which 3x3 convolutions run by Winograd from here on; for tests and measurements.

    Args:
        name: ``"auto"`` (the default: by the clock, layer by layer), ``"off"``, or ``"4x4"`` or
            ``"2x2"``: this form wherever it gives the exact sums. Results have the same bits under
            each. ``ADALAYER_WINOGRAD`` sets it at the start. Engines that exist stay as they are;
            drop-in layers choose anew.

    Raises:
        ValueError: for an unknown name.
    """
    _C.set_winograd_policy(name)
