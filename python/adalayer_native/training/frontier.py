"""The options of a layer in the order in which a budget would take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adalayer_native.pruning.masks import pruned_count
from adalayer_native.rounding import per_channel, quantize_weight

__all__ = ["hull", "weight_errors"]


@torch.no_grad()
def weight_errors(weight: Tensor, bits: Sequence[int], sparsities: Sequence[float]) -> np.ndarray:
    """Squared error of a weight at every width and sparsity over its square, float64.

    Zeros are those of least magnitude; scales are those of the whole weight, so that one order of
    the magnitudes and one rounding per width do.

    Args:
        weight: float32 ``[O, ...]``.

    Returns:
        ``[widths, sparsities]``.
    """
    flat = weight.detach().double().flatten()
    order = flat.abs().argsort(stable=True)
    total = float(flat.square().sum()) or 1.0
    pruned = torch.cat([flat.new_zeros(1), flat[order].square().cumsum(0)])
    counts = [pruned_count(flat.numel(), share) for share in sparsities]
    found = np.zeros((len(bits), len(sparsities)))
    for row, width in enumerate(bits):
        levels, scale = quantize_weight(weight, width)
        value = levels.to(torch.float32) * per_channel(scale, weight.shape)
        error = (value.double().flatten() - flat)[order].square()
        kept = error.sum() - torch.cat([error.new_zeros(1), error.cumsum(0)])
        for column, count in enumerate(counts):
            found[row, column] = max(float(pruned[count] + kept[count]), 0.0) / total
    return found


def hull(costs: np.ndarray, errors: np.ndarray, usable: np.ndarray) -> list[int]:
    """Options on the lower convex hull of error over cost, the most expensive first.

    From each of them to the next the error grows by more per unit saved than before, so that a
    position that moves along the list never has to cross an option that is not worth its cost.

    Args:
        costs, errors: float64 ``[options]``.
        usable: bool ``[options]``.
    """
    order = sorted(np.flatnonzero(usable).tolist(), key=lambda k: (costs[k], errors[k]))
    kept: list[int] = []
    for option in order:
        if kept and (errors[option] >= errors[kept[-1]] or costs[option] <= costs[kept[-1]]):
            continue
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            along = (costs[b] - costs[a]) * (errors[option] - errors[a])
            if along > (costs[option] - costs[a]) * (errors[b] - errors[a]):
                break
            kept.pop()
        kept.append(option)
    return kept[::-1]
