"""Levels of values that lie on a u8 grid."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["levels"]


def levels(x: Tensor, qparams: Tensor) -> Tensor:
    """Levels of values on a grid: whole numbers in float32.

    Args:
        x: float tensor, every value ``(q - zero_point) * scale``.
        qparams: float32 ``[3]``: scale, zero point and bits.
    """
    return torch.mul(x.float(), float(torch.reciprocal(qparams[0]))).round_().add_(qparams[1])
