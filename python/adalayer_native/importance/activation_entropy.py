"""Criterion "activation_entropy": how much information enters a layer."""

from __future__ import annotations

from torch import Tensor

from .batches import Batch
from .observe import entropy_bits, observe
from .registry import Probe, criterion

__all__ = ["activation_entropy"]


@criterion("activation_entropy", unit="bits", increase=False)
def activation_entropy(probe: Probe, batch: Batch) -> None:
    """``H = -sum_k p_k log2 p_k`` of the layer's input: 256 equal bins from its min to its max.

    Zhu, Zhou and Li, "Adaptive layerwise quantization for deep neural network compression",
    ICME 2018. The input, because that is the activation that a quantized layer rounds. A layer
    that is called several times has the mean.
    """
    found: dict[str, list[float]] = {name: [] for name in probe.layers}

    def visit(name: str, entering: Tensor, _: Tensor) -> None:
        found[name].append(entropy_bits(entering))

    observe(probe.model, probe.layers, batch.x, visit)
    for name, values in found.items():
        probe.report(name, sum(values) / len(values) if values else 0.0)
