"""Criterion "hessian_trace": the mean curvature of the loss in a layer, weighed by its rounding."""

from __future__ import annotations

import torch

from .batches import Batch
from .derivatives import differentiable, loss_with_gradient, squared_change
from .registry import Probe, criterion

__all__ = ["hessian_trace"]

VECTORS = 8  # random vectors per batch; batches average further


@criterion("hessian_trace", unit="loss")
def hessian_trace(probe: Probe, batch: Batch) -> None:
    """``tr(H_l) / n_l * |Q(W_l) - W_l|^2``, H the Hessian of the loss by the layer's n weights.

    Dong et al., "HAWQ-V2", NeurIPS 2020; the trace by Hutchinson's estimate,
    ``tr H = E[v^T H v]`` with v of random signs, which is exact for a diagonal H. The
    vectors depend on the batch's number alone. Without labels the float model's own most likely
    class is the label.
    """
    generator = torch.Generator().manual_seed(batch.index)
    traces = dict.fromkeys(probe.layers, 0.0)
    with differentiable(probe) as weights:
        loss = loss_with_gradient(probe, batch, "hessian_trace")
        first = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True
        )
        # Layers that the loss depends on, and not linearly alone.
        curved = [
            (name, weight, gradient)
            for (name, weight), gradient in zip(weights.items(), first, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        for _ in range(VECTORS if curved else 0):
            signs = [
                (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w)
                for _, w, _ in curved
            ]
            products: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                [g for _, _, g in curved],
                [w for _, w, _ in curved],
                grad_outputs=signs,
                retain_graph=True,
                allow_unused=True,
            )
            for (name, _, _), sign, product in zip(curved, signs, products, strict=True):
                if product is not None:
                    traces[name] += float((sign * product).sum()) / VECTORS
    for name, trace in traces.items():
        count = max(1, probe.layers[name].weight.numel())
        probe.report(name, trace / count * float(squared_change(probe, name).sum()))
