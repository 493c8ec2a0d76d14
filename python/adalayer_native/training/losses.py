"""Losses: cross-entropy with soft labels, distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["data_loss", "distillation"]


def distillation(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)``, both softened by ``T`` (Hinton et al. 2015); a scalar.

    Args:
        logits: of the student, float32 ``[N, classes]``.
        target: logits of the teacher, same shape.
        temperature: ``T``.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(target / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature * temperature * divergence


def data_loss(
    logits: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    *,
    distill_weight: float,
    temperature: float,
) -> Tensor:
    """``(1 - d) * CE + d * distillation``; without labels ``d`` is 1, without a teacher 0."""
    share = 0.0 if target is None else (1.0 if labels is None else distill_weight)
    loss = logits.new_zeros(())
    if labels is not None and share < 1.0:
        loss = loss + (1.0 - share) * F.cross_entropy(logits, labels)
    if target is not None and share > 0.0:
        loss = loss + share * distillation(logits, target, temperature)
    return loss
