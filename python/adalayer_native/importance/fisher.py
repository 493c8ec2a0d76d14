"""Criterion "fisher": the empirical Fisher information of a layer, weighed by its rounding."""

from __future__ import annotations

import torch

from ..errors import CalibrationError
from .batches import Batch
from .derivatives import differentiable, loss_with_gradient, squared_change
from .registry import Probe, criterion

__all__ = ["fisher"]


@criterion("fisher", unit="loss")
def fisher(probe: Probe, batch: Batch) -> None:
    """``1/2 sum_i F_i (Q(w_i) - w_i)^2``, ``F_i = mean over images of (d loss(x) / d w_i)^2``.

    The loss increase to second order with the diagonal of the empirical Fisher information in
    place of the Hessian: Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", arXiv 1801.05787. One backward pass per image. Without labels the float
    model's own most likely class is the label.

    Raises:
        CalibrationError: labels that cannot be told apart by image.
    """
    target = batch.target
    tensor = isinstance(target, torch.Tensor)
    if target is not None and (not tensor or target.shape[:1] != (batch.count,)):
        got = f"shape {tuple(target.shape)}" if tensor else type(target).__name__
        raise CalibrationError(
            f"criterion 'fisher' needs a tensor with one label per image, got {got} for "
            f"{batch.count} images"
        )
    changes = {name: squared_change(probe, name) for name in probe.layers}
    sums = dict.fromkeys(probe.layers, 0.0)
    with differentiable(probe) as weights:
        for row in range(batch.count):
            loss = loss_with_gradient(probe, batch.part(slice(row, row + 1)), "fisher")
            found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True
            )
            for name, grad in zip(weights, found, strict=True):
                if grad is not None:
                    sums[name] += float((grad.square() * changes[name]).sum())
    for name, value in sums.items():
        probe.report(name, value / (2 * max(1, batch.count)))
