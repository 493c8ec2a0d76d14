"""Criterion "accuracy": how much the loss grows when one layer alone is quantized to few bits."""

from __future__ import annotations

import torch
from torch.func import functional_call

from .batches import Batch, loss_of
from .registry import Probe, criterion

__all__ = ["accuracy"]


@criterion("accuracy")
@torch.no_grad()
def accuracy(probe: Probe, batch: Batch) -> float:
    """Loss with one layer quantized minus loss of the float model, for every layer in turn."""
    float_output = probe.model(batch.x)
    base = loss_of(float_output, float_output, batch.target, probe.loss_fn)
    for name, weight in probe.quantized.items():
        if name in probe.done:
            continue
        # functional_call swaps the weight for one call and never touches the user's model.
        output = functional_call(probe.model, {f"{name}.weight": weight}, (batch.x,))
        probe.report(name, loss_of(output, float_output, batch.target, probe.loss_fn) - base)
    return base
