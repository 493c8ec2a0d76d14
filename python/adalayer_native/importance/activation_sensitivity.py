"""Criterion "activation_sensitivity": how far a layer's own output moves at few bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from .batches import Batch
from .observe import observe
from .registry import Probe, criterion

__all__ = ["activation_sensitivity"]


@criterion("activation_sensitivity")
@torch.no_grad()
def activation_sensitivity(probe: Probe, batch: Batch) -> None:
    """``|y(x; Q(W)) - y(x; W)|^2 / |y(x; W)|^2``, x what really enters the layer.

    SensiBoost in Zhang et al., "Towards superior quantization accuracy: a layer-sensitive
    approach", arXiv 2503.06518, relative to the size of the output, so that layers of different
    scale compare. All calls of a layer together; 0 for an output of zeros.
    """
    change = dict.fromkeys(probe.layers, 0.0)
    energy = dict.fromkeys(probe.layers, 0.0)

    def visit(name: str, entering: Tensor, leaving: Tensor) -> None:
        moved = functional_call(probe.layers[name], {"weight": probe.quantized[name]}, (entering,))
        change[name] += float((moved - leaving).double().square().sum())
        energy[name] += float(leaving.double().square().sum())

    observe(probe.model, probe.layers, batch.x, visit)
    for name, size in energy.items():
        probe.report(name, change[name] / size if size > 0 else 0.0)
