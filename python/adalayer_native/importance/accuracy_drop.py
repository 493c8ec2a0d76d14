"""Criterion "accuracy_drop": points of accuracy that are lost when one layer alone is quantized."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CalibrationError
from .accuracy import one_layer_quantized
from .batches import Batch
from .outputs import logits_of
from .registry import Probe, criterion

__all__ = ["accuracy_drop"]


@criterion("accuracy_drop", unit="points")
@torch.no_grad()
def accuracy_drop(probe: Probe, batch: Batch) -> None:
    """``100 (acc(W) - acc(Q(W_l)))``, top-1, one layer quantized at a time.

    Gluska and Grobman, "Exploring neural networks quantization via layer-wise quantization
    analysis", arXiv 2012.08420. Without labels the float model is right by definition, and this is
    the share of decisions that change. A few hundred images resolve no less than a few tenths of
    a point; criterion "accuracy" measures the same thing as a loss.

    Raises:
        CalibrationError: labels that are not one class per output position, or no logits.
    """

    def decisions(output: Any) -> torch.Tensor:
        return logits_of(output, probe.pick, batch.tokens, batch.target).argmax(1)

    reference = decisions(probe.output)
    truth = reference if batch.target is None else batch.target
    if not isinstance(truth, torch.Tensor) or truth.shape != reference.shape:
        got = tuple(truth.shape) if isinstance(truth, torch.Tensor) else type(truth).__name__
        raise CalibrationError(
            f"criterion 'accuracy_drop': expected class labels of shape {tuple(reference.shape)}, "
            f"got {got}"
        )
    right = int((reference == truth).sum())
    for name, output in one_layer_quantized(probe, batch):
        still = int((decisions(output) == truth).sum())
        probe.report(name, 100.0 * (right - still) / truth.numel())
