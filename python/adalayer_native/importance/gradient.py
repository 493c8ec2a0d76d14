"""Criterion "gradient": second-order estimate of the loss increase from one backward pass."""

from __future__ import annotations

import torch

from .batches import Batch
from .derivatives import differentiable, loss_with_gradient, squared_change
from .registry import Probe, criterion

__all__ = ["gradient"]


@criterion("gradient", unit="loss")
def gradient(probe: Probe, batch: Batch) -> None:
    """``sum((g * (Q(W) - W))^2) / 2`` with g the gradient of the batch's mean loss.

    The cheap stand-in for criterion "fisher": one backward pass per batch, in which gradients of
    different images cancel. Without labels the float model's own most likely class is the label.
    """
    with differentiable(probe) as weights:
        loss = loss_with_gradient(probe, batch, "gradient")
        found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True
        )
    for name, grad in zip(weights, found, strict=True):
        # A layer that is registered but not used in forward has no gradient.
        value = 0.0 if grad is None else float((grad.square() * squared_change(probe, name)).sum())
        probe.report(name, value / 2)
