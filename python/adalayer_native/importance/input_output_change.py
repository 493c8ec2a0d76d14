"""Criterion "input_output_change": how much a layer changes what goes through it."""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import Batch
from .observe import observe
from .registry import Probe, criterion

__all__ = ["input_output_change"]


@criterion("input_output_change", increase=False)
@torch.no_grad()
def input_output_change(probe: Probe, batch: Batch) -> None:
    """``1 - cos(K_in, K_out)`` with ``K = X X^T`` over the images of a batch, X ``[N, values]``.

    The layer input modification of Dumitru et al., "Layer-wise quantization", arXiv 2406.17415, is
    minus the cosine between a layer's input and output. In a CNN these differ in shape, so they
    are compared through the similarities of the images that they give (the kernel alignment of
    Cristianini et al., NeurIPS 2001), which keep what the cosine promises: 0 for a layer that does
    nothing, or only scales and rotates, 1 where nothing of the input's structure is left. A batch
    of one image says nothing and counts 0; a layer that is called several times has the mean.
    """
    found: dict[str, list[float]] = {name: [] for name in probe.layers}

    def visit(name: str, entering: Tensor, leaving: Tensor) -> None:
        if entering.shape[0] == leaving.shape[0]:
            found[name].append(1.0 - _alignment(entering, leaving))

    observe(probe.model, probe.layers, batch.x, visit)
    for name, values in found.items():
        probe.report(name, sum(values) / len(values) if values else 0.0)


def _alignment(left: Tensor, right: Tensor) -> float:
    kernels = []
    for side in (left, right):
        flat = side.detach().double().flatten(1)
        kernels.append(flat @ flat.T)
    inner = float((kernels[0] * kernels[1]).sum())
    norms = float(kernels[0].norm() * kernels[1].norm())
    return min(1.0, inner / norms) if norms > 0 else 1.0
