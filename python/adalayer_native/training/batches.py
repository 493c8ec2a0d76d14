"""What a batch of a training loader is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adalayer_native.errors import CalibrationError

__all__ = ["NORM_BATCHES", "split_batch"]

# Batches from which the final batch norm statistics are taken.
NORM_BATCHES = 50


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels (``None`` where there are none) of a batch.

    Raises:
        CalibrationError: it is neither a tensor nor a tuple or list of tensors.
    """
    labels: Any = None
    if isinstance(batch, (tuple, list)) and batch:
        x = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    else:
        x = batch
    if not isinstance(x, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise CalibrationError(
            "a training batch must be a tensor or a tuple (inputs, labels) of tensors, got "
            f"{type(batch).__name__}"
        )
    return x, labels
