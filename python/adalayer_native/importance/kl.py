"""Criterion "kl": how far the output distribution moves when one layer alone is quantized."""

from __future__ import annotations

import torch

from .accuracy import one_layer_quantized
from .batches import Batch, kl_divergence, tensor_output
from .registry import Probe, criterion

__all__ = ["kl"]


@criterion("kl", unit="nats")
@torch.no_grad()
def kl(probe: Probe, batch: Batch) -> None:
    """``mean KL(softmax f(x; W) || softmax f(x; Q(W_l)))``; labels are not looked at.

    Quantization sensitivity as in Cai et al., "ZeroQ", CVPR 2020.
    """
    reference = tensor_output(probe.output)
    for name, output in one_layer_quantized(probe, batch):
        probe.report(name, kl_divergence(reference, tensor_output(output)))
