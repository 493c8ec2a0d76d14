"""Derivatives of the loss by the layers' weights, whatever the model's parameters require."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CalibrationError
from .batches import Batch
from .outputs import cross_entropy, logits_of, picked, target_for
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


def loss_with_gradient(probe: Probe, batch: Batch, criterion: str) -> Tensor:
    """Mean loss of a batch as a graph.

    Without labels the float model's own most likely class is the label, or for a ``loss_fn`` its
    own output the target.

    Raises:
        CalibrationError: the loss does not depend on the weights, or there are no logits.
    """
    output, target = batch.x(probe.model), batch.target
    if probe.loss_fn is not None:
        output, target = picked(output, probe.pick), target_for(probe.loss_fn, target)
        if target is None:
            target = pytree.tree_map(
                lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output
            )
        loss = probe.loss_fn(output, target)
    else:
        logits = logits_of(output, probe.pick, batch.tokens, target).float()
        labels = target if target is not None else logits.detach().argmax(1)
        loss = cross_entropy(logits, labels)
    if not loss.requires_grad:
        raise CalibrationError(f"criterion {criterion!r}: the loss does not depend on the weights")
    return loss.mean()


def squared_change(probe: Probe, name: str) -> Tensor:
    """``(Q(W) - W)^2`` of a layer at the probe's bits, in the weight's shape."""
    return (probe.quantized[name] - probe.layers[name].weight.detach()).square()
