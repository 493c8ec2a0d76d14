"""Losses: cross-entropy, a loss of the user's, distillation."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native.errors import CalibrationError
from adalayer_native.importance.outputs import (
    LossFn,
    Pick,
    cross_entropy,
    has_logits,
    logits_of,
    picked,
    results_of,
    squared_error,
    target_for,
)

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
    output: Any,
    labels: Any,
    target: Any,
    *,
    distill_weight: float,
    temperature: float,
    loss_fn: LossFn | None = None,
    pick: Pick = None,
    tokens: Set[int] = frozenset(),
) -> Tensor:
    """``(1 - d) * CE + d * distillation``; without labels ``d`` is 1, without a teacher 0.

    Distillation is of every output that counts, with the relative squared error where they are no
    logits. ``loss_fn(output, labels)`` replaces CE, and without labels the distillation.

    Args:
        output: of the student, float32.
        labels: class labels, or whatever ``loss_fn`` takes.
        target: output of the teacher, if there is one.
        distill_weight, temperature: ``d`` and ``T``.
        loss_fn: of the user.
        pick: which output counts.
        tokens: lengths of the model's integer inputs.

    Raises:
        CalibrationError: labels that cross-entropy does not take, and no teacher.
    """
    if loss_fn is not None:
        labels = target_for(loss_fn, labels)
    classes = isinstance(labels, Tensor) and has_logits(output, pick, tokens, labels)
    usable = labels is not None and (classes or loss_fn is not None)
    if not usable and target is None:
        raise CalibrationError(
            f"labels of type {type(labels).__name__} and no single output of logits that they "
            "belong to; give a loss_fn, name the logits with output=, or a teacher"
        )
    share = 0.0 if target is None else (distill_weight if usable else 1.0)
    loss = torch.zeros((), device=results_of(output, pick)[0].value.device)
    if usable and share < 1.0:
        if loss_fn is not None:
            term = loss_fn(picked(output, pick), labels).mean()
        else:
            term = cross_entropy(logits_of(output, pick, tokens, labels), labels)
        loss = loss + (1.0 - share) * term
    if target is not None and share > 0.0:
        if labels is None and loss_fn is not None:
            term = loss_fn(picked(output, pick), picked(target, pick)).mean()
        else:
            term = _distilled(output, target, temperature, pick, tokens)
        loss = loss + share * term
    return loss


def _distilled(
    output: Any, target: Any, temperature: float, pick: Pick, tokens: Set[int]
) -> Tensor:
    student, teacher = results_of(output, pick, tokens), results_of(target, pick, tokens)
    parts = [
        distillation(a.logits, b.logits, temperature)
        if a.is_logits
        else squared_error(b.value, a.value)
        for a, b in zip(student, teacher, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
