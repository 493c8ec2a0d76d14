"""Mean average precision of boxes, and mean intersection over union of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalayer_native.detection import Boxes, box_iou

__all__ = ["COCO", "Truth", "average_precision", "confusion", "mean_average_precision", "mean_iou"]

COCO = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())  # overlaps of COCO's main figure
POINTS = np.linspace(0, 1, 101)  # recalls at which precision is read


@dataclass(frozen=True)
class Truth:
    """The objects of an image.

    Attributes:
        boxes: float32 ``[K, 4]``, ``x1 y1 x2 y2``.
        classes: int64 ``[K]``.
    """

    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]


def mean_average_precision(
    found: Sequence[Boxes], truth: Sequence[Truth], classes: int, overlaps: Sequence[float] = COCO
) -> dict[float, float]:
    """Mean over the classes that have objects of their average precision, per IoU.

    The mean of the values is COCO's AP; that of 0.5 is VOC's and COCO's AP50.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} images with boxes, but {len(truth)} with objects")
    rows = [average_precision(found, truth, number, overlaps) for number in range(classes)]
    known = [row for row in rows if row is not None]
    if not known:
        raise ValueError("there is no object in any image")
    return dict(zip(overlaps, np.mean(known, axis=0).tolist(), strict=True))


def average_precision(
    found: Sequence[Boxes], truth: Sequence[Truth], number: int, overlaps: Sequence[float]
) -> npt.NDArray[np.float64] | None:
    """Of one class, per IoU, as COCO defines it; ``None`` where no image has such an object.

    Boxes of all images, best first, take the object of their image that they overlap most and that
    no better one has taken. Precision is the highest that is reached at a recall or beyond it, and
    its mean over 101 recalls is the average.
    """
    objects = sum(int((image.classes == number).sum()) for image in truth)
    if not objects:
        return None
    scores: list[float] = []
    hits: list[npt.NDArray[np.bool_]] = []
    for boxes, image in zip(found, truth, strict=True):
        mine, theirs = boxes.classes == number, image.classes == number
        order = np.argsort(-boxes.scores[mine], kind="stable")
        scores.extend(boxes.scores[mine][order].tolist())
        hits.append(_matched(box_iou(boxes.boxes[mine][order], image.boxes[theirs]), overlaps))
    order = np.argsort(-np.array(scores), kind="stable")
    right = np.concatenate(hits)[order].cumsum(axis=0)  # [boxes, overlaps]
    precision = right / np.arange(1, len(order) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    values = np.zeros(len(overlaps))
    for k in range(len(overlaps)):
        # In whole objects, so that a recall of exactly 0.6 is reached by 3 of 5.
        places = np.searchsorted(right[:, k], np.ceil(POINTS * objects - 1e-9).clip(1))
        reached = places < len(order)
        values[k] = precision[places[reached], k].sum() / len(POINTS)
    return values


def _matched(iou: npt.NDArray[np.float32], overlaps: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which boxes of an image, best first, get an object: ``[boxes, overlaps]``."""
    result = np.zeros((len(iou), len(overlaps)), dtype=bool)
    for k, least in enumerate(overlaps):
        free = np.ones(iou.shape[1], dtype=bool)
        for row, values in enumerate(iou):
            left = np.where(free, values, -1.0)
            best = int(left.argmax()) if len(left) else -1
            if best >= 0 and left[best] >= least:
                free[best], result[row, k] = False, True
    return result


def confusion(
    truth: npt.NDArray[np.int64], found: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.int64]:
    """How many pixels of every class (rows) were taken for which (columns)."""
    pairs = truth.ravel() * classes + found.ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: npt.NDArray[np.int64]) -> float:
    """Mean over the classes that occur, in truth or in what was found, of their IoU."""
    common = counts.diagonal().astype(np.float64)
    union = counts.sum(axis=0) + counts.sum(axis=1) - common
    return float((common[union > 0] / union[union > 0]).mean())
