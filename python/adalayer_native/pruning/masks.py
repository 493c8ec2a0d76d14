"""Unstructured magnitude masks with an exact count."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native.errors import CalibrationError, PlanError


def pruned_count(numel: int, sparsity: float) -> int:
    """Number of weights that ``sparsity`` removes from ``numel``: rounded to the nearest integer.

    Raises:
        PlanError: ``sparsity`` is not in ``[0, 1)``.
    """
    if not 0.0 <= sparsity < 1.0:
        raise PlanError(f"sparsity must satisfy 0 <= sparsity < 1, got {sparsity}")
    return int(numel * sparsity + 0.5)


@torch.no_grad()
def magnitude_mask(w: Tensor, sparsity: float) -> Tensor:
    """Mask that removes the weights of smallest magnitude.

    Args:
        w: floating point tensor of any shape.
        sparsity: fraction to remove, ``0 <= sparsity < 1``.

    Returns:
        bool tensor of the shape of ``w``, false at exactly ``round(w.numel() * sparsity)`` places.
        Among equal magnitudes the ones that come first in memory order are removed, so the same
        weight always gets the same mask.

    Raises:
        PlanError: ``sparsity`` out of range.
        CalibrationError: a weight is NaN (it has no magnitude to rank).
    """
    count = pruned_count(w.numel(), sparsity)
    mask = torch.ones(w.shape, dtype=torch.bool, device=w.device)
    if count == 0:
        return mask
    magnitude = w.detach().abs().reshape(-1)
    if bool(torch.isnan(magnitude).any()):
        raise CalibrationError(f"weight of shape {tuple(w.shape)} contains NaN; cannot rank it")
    flat = mask.view(-1)
    # kthvalue finds the threshold in linear time; only the ties at it need an order.
    threshold = magnitude.kthvalue(count).values
    below = magnitude < threshold
    flat.masked_fill_(below, False)
    ties = torch.nonzero(magnitude == threshold).reshape(-1)
    flat[ties[: count - int(below.sum())]] = False
    return mask
