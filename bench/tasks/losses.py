"""What the tasks are trained with, and what the solver then measures: a loss per image.

The detector's is that of the anchor-free family: every position of a map whose middle lies in the
inner part of an object's box learns the object's class and box, all others learn that there is
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bench.tasks.networks import STRIDES

__all__ = ["assigned", "classification_loss", "detection_loss", "paired_giou", "segmentation_loss"]

SMALL = 36.0  # objects whose larger side is shorter belong to the finer map
INNER = 1.5  # strides around the middle of a box
BOX = 2.0  # weight of boxes beside classes
LEAST = 1e-6  # scores are kept so far from 0 and 1


def classification_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits ``[N, C]`` with classes ``[N]``, per image."""
    return functional.cross_entropy(output.float(), target, reduction="none")


def segmentation_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits ``[N, C, H, W]`` with masks ``[N, H, W]``, a mean per image."""
    return functional.cross_entropy(output.float(), target, reduction="none").mean(dim=(1, 2))


def detection_loss(output: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """Of scores and boxes, per image ``[N]``.

    Scores lose ``|y - p|^2 BCE(p, y)`` (quality focal loss, Li et al. 2020), where y is the IoU of
    the position's box for the right class of an object and 0 elsewhere; boxes lose ``1 - GIoU``
    (Rezatofighi et al. 2019). Both are sums over positions, over the number of those that belong
    to an object.

    Args:
        output: of :class:`~bench.tasks.networks.Detector`.
        target: :attr:`~bench.tasks.scenes.Scenes.boxes`.
    """
    total = torch.zeros(len(target))
    positives = torch.zeros(len(target))
    for level in range(len(STRIDES)):
        boxes = output[f"boxes{level}"].float().flatten(2).transpose(1, 2)  # [N, P, 4]
        scores = output[f"scores{level}"].float().flatten(2).transpose(1, 2)
        owner = assigned(target, level, output[f"boxes{level}"].shape[2])  # [N, P]
        belongs = owner >= 0
        owned = target.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 5))  # [N, P, 5]
        iou, giou = paired_giou(boxes, owned[..., 1:])
        quality = torch.where(belongs, iou.detach().clamp(min=0), torch.zeros(()))
        classes = torch.arange(scores.shape[-1])
        y = quality[..., None] * (owned[..., :1] == classes)
        p = scores.clamp(LEAST, 1 - LEAST)
        entropy = -(y * p.log() + (1 - y) * (1 - p).log())
        total = total + ((y - p).square() * entropy).sum(dim=(1, 2))
        total = total + BOX * torch.where(belongs, 1 - giou, torch.zeros(())).sum(dim=1)
        positives = positives + belongs.sum(dim=1)
    return total / positives.clamp(min=1)


def assigned(target: Tensor, level: int, cells: int) -> Tensor:
    """Which object every position of a map belongs to, int64 ``[N, cells * cells]``; -1: none.

    Of several the smallest.
    """
    stride = STRIDES[level]
    middle = (torch.arange(cells) + 0.5) * stride
    y, x = (part.flatten() for part in torch.meshgrid(middle, middle, indexing="ij"))
    label, x1, y1, x2, y2 = (part[:, None, :] for part in target.unbind(dim=2))  # [N, 1, M]
    x, y = x[None, :, None], y[None, :, None]
    within = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    near = ((x - (x1 + x2) / 2).abs() < INNER * stride) & (
        (y - (y1 + y2) / 2).abs() < INNER * stride
    )
    small = torch.maximum(x2 - x1, y2 - y1) < SMALL
    fits = within & near & (label >= 0) & (small if level == 0 else ~small)
    area = torch.where(fits, (x2 - x1) * (y2 - y1), torch.full((), torch.inf))
    least, owner = area.min(dim=2)
    return torch.where(least < torch.inf, owner, torch.full((), -1))


def paired_giou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes ``[..., 4]`` with as many others."""
    low, high = torch.maximum(boxes, others)[..., :2], torch.minimum(boxes, others)[..., 2:]
    common = (high - low).clamp(min=0).prod(dim=-1)
    areas = sum((b[..., 2:] - b[..., :2]).clamp(min=0).prod(dim=-1) for b in (boxes, others))
    union = (areas - common).clamp(min=1e-6)
    hull = torch.maximum(boxes, others)[..., 2:] - torch.minimum(boxes, others)[..., :2]
    around = hull.clamp(min=0).prod(dim=-1).clamp(min=1e-6)
    iou = common / union
    return iou, iou - (around - union) / around
