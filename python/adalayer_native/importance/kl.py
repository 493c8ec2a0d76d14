"""Criterion "kl": how far the output distribution moves when one layer alone is quantized."""

from __future__ import annotations

import torch

from .accuracy import one_layer_quantized
from .batches import Batch
from .outputs import distance
from .registry import Probe, criterion

__all__ = ["kl"]


@criterion("kl", unit="nats")
@torch.no_grad()
def kl(probe: Probe, batch: Batch) -> None:
    """``mean KL(softmax f(x; W) || softmax f(x; Q(W_l)))``; labels are not looked at.

    Quantization sensitivity as in Cai et al., "ZeroQ", CVPR 2020. Outputs that are no logits count
    with their relative squared error (:mod:`~adalayer_native.importance.outputs`).
    """
    for name, output in one_layer_quantized(probe, batch):
        probe.report(name, float(distance(probe.output, output, probe.pick, batch.tokens)))
