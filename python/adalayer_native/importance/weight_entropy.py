"""Criterion "weight_entropy": how much information a layer's weights hold."""

from __future__ import annotations

from .batches import Batch
from .observe import entropy_bits
from .registry import Probe, criterion

__all__ = ["weight_entropy"]


@criterion("weight_entropy", unit="bits", once=True, increase=False)
def weight_entropy(probe: Probe, batch: Batch) -> None:
    """``H = -sum_k p_k log2 p_k`` over a histogram of 256 equal bins from min W to max W.

    Zhu, Zhou and Li, "Adaptive layerwise quantization for deep neural network compression",
    ICME 2018; also one of the scores of Shinde, "Adaptive quantization and pruning of deep neural
    networks via layer importance estimation", 2024. 8 bits at most.
    """
    for name, layer in probe.layers.items():
        probe.report(name, entropy_bits(layer.weight))
