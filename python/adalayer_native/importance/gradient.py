"""Criterion "gradient": second-order estimate of the loss increase from one backward pass."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..errors import CalibrationError
from .batches import Batch, loss_of, tensor_output
from .registry import Probe, criterion

__all__ = ["gradient"]


@criterion("gradient")
def gradient(probe: Probe, batch: Batch) -> float:
    """``sum((g * (Q(W) - W))^2) / 2`` with g the gradient of the batch's mean loss.

    The squared gradient stands for the diagonal of the Hessian (empirical Fisher). Without
    labels the float model's own most likely class is the label.
    """
    weights = {name: layer.weight for name, layer in probe.layers.items()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            output = probe.model(batch.x)
            if probe.loss_fn is not None:
                target = output.detach() if batch.target is None else batch.target
                loss = probe.loss_fn(output, target)
            else:
                logits = tensor_output(output).float()
                target = batch.target if batch.target is not None else logits.detach().argmax(1)
                loss = functional.cross_entropy(logits, target)
            if not loss.requires_grad:
                raise CalibrationError(
                    "criterion 'gradient': the loss does not depend on the weights"
                )
            grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                loss.mean(), list(weights.values()), allow_unused=True
            )
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        if grad is None:  # registered, but not used in forward
            probe.report(name, 0.0)
            continue
        change = probe.quantized[name] - weight.detach()
        probe.report(name, float((grad * change).square().sum()) / 2)
    detached = output.detach() if isinstance(output, torch.Tensor) else output
    with torch.no_grad():
        return loss_of(detached, detached, batch.target, probe.loss_fn)
