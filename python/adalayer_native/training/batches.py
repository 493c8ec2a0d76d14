"""What a batch of a training loader is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture import Inputs, batch_inputs
from adalayer_native.errors import CalibrationError

__all__ = ["NORM_BATCHES", "as_float", "on_device", "split_batch"]

# Batches from which the final batch norm statistics are taken.
NORM_BATCHES = 50


def split_batch(model: nn.Module, batch: Any) -> tuple[Inputs, Any]:
    """Arguments of the model and labels (``None`` where there are none) of a batch.

    Raises:
        CalibrationError: it is nothing of the kind, or holds no tensor for the model.
    """
    try:
        x, labels = batch_inputs(model, batch)
    except CalibrationError as error:
        raise CalibrationError(f"a training batch: {error}") from None
    if not x.tensors():
        raise CalibrationError(
            f"a training batch must hold tensors, got {type(batch).__name__} without one"
        )
    return x, labels


def on_device(value: Any, device: torch.device) -> Any:
    """Labels on a device, however they are nested."""
    return pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value
    )


def as_float(value: Any) -> Any:
    """A result with its tensors of floating point in float32."""

    def converted(leaf: Any) -> Any:
        known = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.float() if known else leaf

    return pytree.tree_map(converted, value)
