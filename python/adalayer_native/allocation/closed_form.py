"""Equations (2) and (3): sparsity and bits of every layer from importance and redundancy."""

from __future__ import annotations

import numpy as np

from ..plan import MAX_BITS, MIN_BITS

__all__ = ["MAX_SPARSITY", "closed_form"]

MAX_SPARSITY = 0.95


def closed_form(
    importance: np.ndarray,
    redundancy: np.ndarray,
    gamma: np.ndarray | float,
    delta: np.ndarray | float,
    lam: np.ndarray | float,
    bmax: np.ndarray | float,
) -> tuple[np.ndarray, np.ndarray]:
    """``P = gamma (1 - I) + delta R`` (2) and ``B = Bmax - lambda (1 - I)`` (3).

    P is rounded to whole per cents and clamped to [0, 0.95]; B is rounded half up and clamped
    to 2..8. The arguments broadcast; the last axis is the layers.

    Returns:
        ``(bits, percent)``: int64 arrays, ``percent`` is 100 P.
    """
    sparsity = gamma * (1.0 - importance) + delta * redundancy
    bits = bmax - lam * (1.0 - importance)
    # The small term makes values that are exact halves on paper round up in binary, too.
    percent = np.floor(100.0 * sparsity + 0.5 + 1e-9).clip(0, round(100 * MAX_SPARSITY))
    return (
        np.floor(bits + 0.5 + 1e-9).clip(MIN_BITS, MAX_BITS).astype(np.int64),
        percent.astype(np.int64),
    )
