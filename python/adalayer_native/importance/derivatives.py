"""Derivatives of the loss by the layers' weights, whatever the model's parameters require."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CalibrationError
from .batches import tensor_output
from .registry import Probe

__all__ = ["differentiable", "loss_with_gradient", "squared_change"]


@contextmanager
def differentiable(probe: Probe) -> Iterator[dict[str, Tensor]]:
    """Weights of all layers by name, requiring gradients inside, as they were outside."""
    weights = {name: layer.weight for name, layer in probe.layers.items()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield weights
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])


def loss_with_gradient(probe: Probe, x: Tensor, target: Any, criterion: str) -> Tensor:
    """Mean loss of a batch as a graph.

    Without labels the float model's own most likely class is the label, or for a ``loss_fn`` its
    own output the target.

    Raises:
        CalibrationError: the loss does not depend on the weights.
    """
    output = probe.model(x)
    if probe.loss_fn is not None:
        given = output.detach() if target is None and isinstance(output, Tensor) else target
        loss = probe.loss_fn(output, given)
    else:
        logits = tensor_output(output).float()
        labels = target if target is not None else logits.detach().argmax(1)
        loss = functional.cross_entropy(logits, labels)
    if not loss.requires_grad:
        raise CalibrationError(f"criterion {criterion!r}: the loss does not depend on the weights")
    return loss.mean()


def squared_change(probe: Probe, name: str) -> Tensor:
    """``(Q(W) - W)^2`` of a layer at the probe's bits, in the weight's shape."""
    return (probe.quantized[name] - probe.layers[name].weight.detach()).square()
