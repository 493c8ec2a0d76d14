"""From a detector's outputs to boxes: decoding, non-maximum suppression. Needs numpy alone.

A :class:`Detection` says which of a model's outputs are boxes and which are scores. It is what an
``.ada`` file keeps (``engine.save(path, detection={...})``), and by which the server knows that a
model is a detector::

    boxes            outputs that hold boxes: a name, or ``[name, begin, end]`` for some of its
                     channels; a list of them where the model has several maps
    scores           those that hold the scores of the classes, in the same order; from 0 to 1
    format           "xyxy" (default): corners; "cxcywh": middle, width and height
    channels         "first" (default): boxes are ``[N, 4, ...]``, scores ``[N, C, ...]``; "last":
                     ``[N, ..., 4]`` and ``[N, ..., C]``
    score_threshold  boxes with a lower score are left out; default 0.25
    iou_threshold    of two boxes of a class that overlap more than this, the lower one is left out;
                     default 0.5
    max_boxes        per image; default 100

Boxes are in pixels of the image that the network reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FileFormatError, InputError

__all__ = ["MOST_BOXES", "Boxes", "Detection", "box_iou", "named", "nms"]

Array = npt.NDArray[np.float32]
Source = tuple[str, int, int | None]  # an output, and which of its channels

MOST_BOXES = 1000  # that may be asked for
CANDIDATES = 3000  # the best so many of an image go through the suppression


def named(result: Any) -> dict[str, Any]:
    """The tensors of a model's result by the names that the server gives them.

    That of a dictionary is its key, of a dataclass its field, in a tuple or list ``output_0``, …,
    of nested ones all of them with dots, and of a single tensor ``output``. Constants are left out.
    """
    return {name.lstrip(".") or "output": value for name, value in _leaves(result, "")}


def _leaves(nested: Any, prefix: str) -> list[tuple[str, Any]]:
    if hasattr(nested, "shape"):
        return [(prefix, nested)]
    items: Sequence[tuple[str, Any]] = ()
    if isinstance(nested, Mapping):
        items = [(f"{prefix}.{key}", value) for key, value in nested.items()]
    elif is_dataclass(nested) and not isinstance(nested, type):
        items = [(f"{prefix}.{f.name}", getattr(nested, f.name)) for f in fields(nested)]
    elif isinstance(nested, (list, tuple)):
        start = prefix or ".output"
        items = [(f"{start}_{k}", value) for k, value in enumerate(nested)]
    return [leaf for name, value in items for leaf in _leaves(value, name)]


@dataclass(frozen=True)
class Boxes:
    """What was found in one image, best first.

    Attributes:
        boxes: float32 ``[K, 4]``: ``x1 y1 x2 y2`` in pixels.
        scores: float32 ``[K]``.
        classes: int64 ``[K]``.
    """

    boxes: Array
    scores: Array
    classes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


def box_iou(boxes: Array, others: Array) -> Array:
    """Intersection over union, ``[A, B]`` of ``[A, 4]`` and ``[B, 4]`` (``x1 y1 x2 y2``).

    A box whose corners are the wrong way round is empty; two empty ones have 0.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (boxes, others)]
    union = areas[0][:, None] + areas[1][None, :] - common
    found: Array = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return found


def nms(boxes: Array, scores: Array, iou_threshold: float, most: int | None = None) -> list[int]:
    """Which boxes stay, best first: those that overlap no better one that stays by more.

    Of equal scores the first counts as better.

    Args:
        boxes: float32 ``[P, 4]``, ``x1 y1 x2 y2``.
        scores: float32 ``[P]``, finite.
        iou_threshold: an overlap of exactly this is allowed.
        most: stop after so many.
    """
    rest = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(rest) and (most is None or len(kept) < most):
        best, rest = int(rest[0]), rest[1:]
        kept.append(best)
        rest = rest[box_iou(boxes[best : best + 1], boxes[rest])[0] <= iou_threshold]
    return kept


@dataclass(frozen=True)
class Detection:
    """Which outputs are boxes and scores, and what is left out; the module's text has the fields.

    Attributes:
        boxes, scores: ``(output, first channel, end or None)`` of every map.
        format, channels, score_threshold, iou_threshold, max_boxes: as there.
    """

    boxes: tuple[Source, ...]
    scores: tuple[Source, ...]
    format: str = "xyxy"
    channels: str = "first"
    score_threshold: float = 0.25
    iou_threshold: float = 0.5
    max_boxes: int = 100

    @classmethod
    def from_dict(cls, data: Any) -> Detection:
        """From what a file or a user says.

        Raises:
            FileFormatError: not an object, an unknown field, or a value that makes no sense.
        """
        if not isinstance(data, Mapping):
            raise FileFormatError(f"detection: expected an object, got {type(data).__name__}")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise FileFormatError(f"detection: unknown field {unknown[0]!r}, expected {known}")
        boxes, scores = (_sources(data.get(key), key) for key in ("boxes", "scores"))
        if len(boxes) != len(scores):
            raise FileFormatError(
                f"detection: {len(boxes)} outputs of boxes, but {len(scores)} of scores"
            )
        for key, choices in (("format", ("xyxy", "cxcywh")), ("channels", ("first", "last"))):
            if data.get(key, choices[0]) not in choices:
                raise FileFormatError(f"detection: {key} {data[key]!r}, expected one of {choices}")
        plain = {key: value for key, value in data.items() if key not in ("boxes", "scores")}
        for key in ("score_threshold", "iou_threshold", "max_boxes"):
            if key in plain:
                try:
                    plain[key] = setting(key, plain[key])
                except InputError as error:
                    raise FileFormatError(f"detection: {error}") from error
        return cls(boxes, scores, **plain)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which :meth:`from_dict` takes."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        for key in ("boxes", "scores"):
            found[key] = [
                name if (begin, end) == (0, None) else [name, begin, end]
                for name, begin, end in found[key]
            ]
        return found

    def changed(self, **settings: Any) -> Detection:
        """With other thresholds.

        Raises:
            InputError: an unknown one, or a value out of range.
        """
        checked: dict[str, Any] = {key: setting(key, value) for key, value in settings.items()}
        return replace(self, **checked)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Whether a model has such outputs; how many classes there are.

        Args:
            shapes: of the outputs, without the batch.

        Raises:
            FileFormatError: says which output does not fit.
        """
        classes: set[int] = set()
        for boxes, scores in zip(self.boxes, self.scores, strict=True):
            places = []
            for (name, begin, end), what in ((boxes, "boxes"), (scores, "scores")):
                if name not in shapes:
                    raise FileFormatError(
                        f"detection: the model has no output {name!r}, its outputs are "
                        f"{sorted(shapes)}"
                    )
                shape = list(shapes[name])
                if len(shape) < 2:
                    raise FileFormatError(
                        f"detection: output {name!r} is {shape}, expected channels and positions"
                    )
                axis = 0 if self.channels == "first" else -1
                count = len(range(shape[axis])[begin:end])
                if (count != 4) if what == "boxes" else (count < 1):
                    wanted = "4 channels" if what == "boxes" else "a channel per class"
                    raise FileFormatError(
                        f"detection: expected {wanted} of {what} in output {name!r} of {shape}, "
                        f"got {count} (channels {self.channels})"
                    )
                del shape[axis]
                places.append(math.prod(shape))
                if what == "scores":
                    classes.add(count)
            if places[0] != places[1]:
                raise FileFormatError(
                    f"detection: {places[0]} boxes in output {boxes[0]!r}, but scores for "
                    f"{places[1]} in {scores[0]!r}"
                )
        if len(classes) != 1:
            raise FileFormatError(f"detection: outputs have scores of {sorted(classes)} classes")
        return classes.pop()

    def decode(self, outputs: Any) -> tuple[Array, Array]:
        """All boxes, float32 ``[N, P, 4]`` as ``x1 y1 x2 y2``, and scores ``[N, P, C]``.

        Args:
            outputs: what the model or an engine returned, arrays or CPU tensors; :func:`named`
                says how outputs are called.

        Raises:
            FileFormatError: outputs that do not fit.
        """
        arrays = {
            name: np.asarray(value, dtype=np.float32) for name, value in named(outputs).items()
        }
        self.check({name: array.shape[1:] for name, array in arrays.items()})
        boxes, scores = (
            np.concatenate([self._rows(arrays[part[0]], part) for part in sources], axis=1)
            for sources in (self.boxes, self.scores)
        )
        if self.format == "cxcywh":
            half = boxes[..., 2:] / 2
            boxes = np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)
        return boxes, scores

    def _rows(self, array: Array, source: Source) -> Array:
        """``[N, P, channels]``."""
        _, begin, end = source
        if self.channels == "first":
            array = np.moveaxis(array, 1, -1)
        return array.reshape(len(array), -1, array.shape[-1])[..., begin:end]

    def select(self, boxes: Array, scores: Array) -> Boxes:
        """What stays of one image's boxes ``[P, 4]`` with scores ``[P, C]``.

        Every class is suppressed for itself. A NaN is no score, and a box that is not finite none.
        """
        usable = np.isfinite(boxes).all(axis=1, keepdims=True)
        places, classes = np.nonzero((scores >= self.score_threshold) & usable)
        found = scores[places, classes]
        if len(found) > CANDIDATES:
            best = np.sort(np.argsort(-found, kind="stable")[:CANDIDATES])
            places, classes, found = places[best], classes[best], found[best]
        kept: list[int] = []
        for number in np.unique(classes):
            rows = np.flatnonzero(classes == number)
            stays = nms(boxes[places[rows]], found[rows], self.iou_threshold, self.max_boxes)
            kept.extend(rows[stays].tolist())
        chosen = np.array(kept, dtype=np.int64)
        chosen = chosen[np.argsort(-found[chosen], kind="stable")][: self.max_boxes]
        return Boxes(boxes[places[chosen]], found[chosen], classes[chosen].astype(np.int64))

    def __call__(self, outputs: Any) -> list[Boxes]:
        """What was found in every image of a batch; see :meth:`decode`."""
        boxes, scores = self.decode(outputs)
        return [self.select(*pair) for pair in zip(boxes, scores, strict=True)]


def setting(name: str, value: Any) -> float | int:
    """A threshold or ``max_boxes``, checked.

    Raises:
        InputError: says what was expected.
    """
    number = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    if name == "max_boxes":
        if not (number and value == int(value) and 1 <= value <= MOST_BOXES):
            raise InputError(f"max_boxes: expected a number from 1 to {MOST_BOXES}, got {value!r}")
        return int(value)
    if name not in ("score_threshold", "iou_threshold"):
        raise InputError(f"unknown setting {name!r}")
    if not (number and 0 <= value <= 1):
        raise InputError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def _sources(value: Any, key: str) -> tuple[Source, ...]:
    """Outputs, from a name or a list of names and of ``[name, begin, end]``."""
    rows = [value] if isinstance(value, str) else value
    found: list[Source] = []
    if isinstance(rows, (list, tuple)):
        if len(rows) == 3 and isinstance(rows[0], str) and not isinstance(rows[1], (str, list)):
            rows = [rows]
        for row in rows:
            if isinstance(row, str):
                found.append((row, 0, None))
            elif isinstance(row, (list, tuple)) and len(row) == 3 and isinstance(row[0], str):
                begin, end = row[1:]
                if isinstance(begin, int) and (end is None or isinstance(end, int)) and begin >= 0:
                    found.append((row[0], begin, end))
    if not found or not isinstance(rows, (list, tuple)) or len(found) != len(rows):
        raise FileFormatError(
            f"detection: expected names of outputs, or [name, begin, end], as {key}, got {value!r}"
        )
    return tuple(found)
