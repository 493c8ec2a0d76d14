"""Criterion "parameter_proportion": a layer's share of all weights."""

from __future__ import annotations

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["parameter_proportion"]


@criterion("parameter_proportion", once=True, increase=False)
def parameter_proportion(probe: Probe, batch: Batch) -> None:
    """``n_l / sum_k n_k`` over all supported layers.

    Shinde, Jain and Sharma, "Lightweight neural networks for speech emotion recognition using
    layer-wise adaptive quantization", 2025, where it is one of three scores that add up.
    """
    counts = {name: layer.weight.numel() for name, layer in probe.layers.items()}
    total = max(1, sum(counts.values()))
    for name, count in counts.items():
        probe.report(name, count / total)
