"""Criterion "variance": how widely a layer's weights are spread."""

from __future__ import annotations

import torch

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["variance"]


@criterion("variance", once=True, increase=False)
@torch.no_grad()
def variance(probe: Probe, batch: Batch) -> None:
    """``mean((w - mean w)^2)``, the population variance, in squared units of the weights.

    Shinde, "Adaptive quantization and pruning of deep neural networks via layer importance
    estimation", NeurIPS workshop on Machine Learning and Compression, 2024: widely spread weights
    make an important layer. (R of eq. (2) is the same number, read as redundancy.)
    """
    for name, layer in probe.layers.items():
        weight = layer.weight.detach().double()
        probe.report(name, float(weight.var(correction=0)) if weight.numel() else 0.0)
