r"""How far a network's outputs are from the float network's, in the terms of its task; no labels.

A detector's outputs are no logits: its boxes are pixels, its scores are sigmoids, and most of its
positions show nothing. A :class:`TaskLoss` says of every output what it is. With ``y`` the float
network's output, ``y'`` the other one's, ``p`` positions and ``c`` channels, an image's loss is

.. math::
    L(y', y) = \sum_o w_o\, d_o(y'_o, y_o)

where ``d`` is by kind

``"classes"``: logits of classes that exclude each other, at every position (or one):
    the mean over positions of :math:`KL(softmax(y_p) \| softmax(y'_p))`
``"binary"``, ``"probabilities"``: logits of sigmoids, or what the sigmoids gave:
    :math:`\frac1m \sum_{p,c} KL(Bernoulli(s_{pc}) \| Bernoulli(s'_{pc}))`, where
    :math:`m = \max(1, \sum_p a_p)` is how many positions show something, as detectors are trained,
    and :math:`a_p = \max_c s_{pc}`
``"values"``: anything else that is regressed:
    the mean over positions and channels of :math:`(y' - y)^2 / \sigma_c^2`, the variance that the
    channel has over positions and images of the batch
``"boxes"``:
    :math:`\frac1m \sum_p \frac{a_p}{4} \sum_c (y'_{pc} - y_{pc})^2 / b_{pc}^2`, the error of every
    side relative to the box's own width or height :math:`b`, where ``a`` is of the scores at the
    same positions: boxes where nothing is seen do not count

All of them are 0 where ``y' = y`` and have a curvature there that is known in closed form. So
method ``"optimal"`` predicts them to second order from one pass per image
(:class:`~adalayer_native.allocation.sensitivity.LogitSensitivity`), and a repair learns by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..detection import Detection, named
from ..errors import CalibrationError

__all__ = ["KINDS", "TaskLoss", "Term"]

KINDS = ("classes", "binary", "probabilities", "values", "boxes")
LEAST = 1e-4  # probabilities are kept so far from 0 and 1
BOXES = 30.0  # weight of boxes of detectors, see of_detection
THIN = 0.01  # sides of boxes count as at least this share of the largest


@dataclass(frozen=True)
class Term:
    """One output of a network and what it is.

    Attributes:
        output: its name: a key, ``output_0``, … in a tuple or list, ``output`` if it is alone.
        kind: one of :data:`KINDS`.
        weight: beside the other terms.
        channels: the first, and the end or ``None``; not all of an output need be alike.
        axis: of the channels.
        where: the scores at the same positions, which say how much a box or value counts there.
        corners: whether boxes are ``x1 y1 x2 y2``, not middle, width and height.
    """

    output: str
    kind: str
    weight: float = 1.0
    channels: tuple[int, int | None] = (0, None)
    axis: int = 1
    where: Term | None = None
    corners: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CalibrationError(
                f"output {self.output!r}: unknown kind {self.kind!r}, expected one of {KINDS}"
            )
        if self.where is not None and self.where.kind not in ("binary", "probabilities"):
            raise CalibrationError(
                f"output {self.output!r}: where={self.where.kind!r}, expected scores, of kind "
                "'binary' or 'probabilities'"
            )

    def rows(self, outputs: Mapping[str, Any]) -> Tensor:
        """The output as ``[N, P, C]``, float32; ``P`` is 1 where there are no positions.

        Raises:
            CalibrationError: the network has no such output, or it has no such channels.
        """
        if self.output not in outputs:
            raise CalibrationError(
                f"TaskLoss: the model has no output {self.output!r}, its outputs are "
                f"{sorted(outputs)}"
            )
        value: Tensor = outputs[self.output]
        if value.dim() < 2:
            raise CalibrationError(
                f"TaskLoss: output {self.output!r} has shape {tuple(value.shape)}, expected a "
                "batch with channels"
            )
        rows = value.float().movedim(self.axis, -1)
        rows = rows.reshape(len(rows), -1, rows.shape[-1])[..., slice(*self.channels)]
        least = {"classes": 2, "boxes": 4}.get(self.kind, 1)
        if rows.shape[-1] < least or (self.kind == "boxes" and rows.shape[-1] != 4):
            raise CalibrationError(
                f"TaskLoss: output {self.output!r} of shape {tuple(value.shape)} has "
                f"{rows.shape[-1]} channels on axis {self.axis}, expected "
                f"{'4' if self.kind == 'boxes' else f'at least {least}'} for {self.kind!r}"
            )
        return rows

    def form(self, outputs: Mapping[str, Any], spread: Tensor | None = None) -> _Form:
        """What the loss of this output is around the float network's outputs.

        Args:
            outputs: of the float network.
            spread: variances of the channels, where the batch is not these images alone.
        """
        with torch.no_grad():
            return _Form(self, outputs, spread)


class _Form:
    """A term around one float output: its distance, and a factor of its curvature.

    Attributes:
        rows: the float output ``[N, P, C]``.
        spread: variances per channel of a term of values.
    """

    def __init__(self, term: Term, outputs: Mapping[str, Any], spread: Tensor | None) -> None:
        self.term = term
        self.rows = term.rows(outputs).detach()
        self.spread = spread
        kind, (_, positions, channels) = term.kind, self.rows.shape
        scores = term.where if kind in ("boxes", "values") else term
        seen = torch.ones(self.rows.shape[:2], device=self.rows.device)
        if scores is not None and scores.kind in ("binary", "probabilities"):
            found = scores.rows(outputs).detach()
            seen = _shares(found, scores.kind).amax(dim=2)  # [N, P]
            if seen.shape != self.rows.shape[:2]:
                raise CalibrationError(
                    f"TaskLoss: output {term.output!r} has {positions} positions, its scores "
                    f"{scores.output!r} have {seen.shape[1]}"
                )
        count = seen.sum(dim=1, keepdim=True).clamp(min=1.0)[..., None]  # [N, 1, 1]
        # Per element of the rows: what its squared change costs, or its Kullback-Leibler term.
        if kind == "classes":
            self.scale = torch.full((1, 1, 1), 1.0 / positions)
        elif kind in ("binary", "probabilities"):
            self.scale = 1.0 / count
        elif kind == "values":
            self.spread = _spread(self.rows) if spread is None else spread
            self.scale = seen[..., None] / (channels * count * self.spread)
        else:
            self.scale = seen[..., None] / (4 * count * self._sides().square())
        self.scale = self.scale * term.weight

    def _sides(self) -> Tensor:
        """Width and height of every box, twice, ``[N, P, 4]``."""
        if self.term.corners:
            sides = (self.rows[..., 2:] - self.rows[..., :2]).abs()
        else:
            sides = self.rows[..., 2:].abs()
        least = (THIN * sides.amax()).clamp(min=1e-6)
        return sides.clamp(min=least).repeat(1, 1, 2)

    def distance(self, outputs: Mapping[str, Any]) -> Tensor:
        """Per image ``[N]``; differentiable in the outputs."""
        kind, y, found = self.term.kind, self.rows, self.term.rows(outputs)
        if kind == "classes":
            reference = functional.log_softmax(y, dim=2)
            terms = reference.exp() * (reference - functional.log_softmax(found, dim=2))
        elif kind == "binary":
            s = y.sigmoid()
            terms = s * (functional.logsigmoid(y) - functional.logsigmoid(found))
            terms = terms + (1 - s) * (functional.logsigmoid(-y) - functional.logsigmoid(-found))
        elif kind == "probabilities":
            s, t = (part.clamp(LEAST, 1 - LEAST) for part in (y, found))
            terms = s * (s / t).log() + (1 - s) * ((1 - s) / (1 - t)).log()
        else:
            terms = (found - y).square()
        return (self.scale * terms).sum(dim=(1, 2))

    def projected(self, outputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """A random combination of the outputs, of whose changes the mean square is the curvature.

        That is ``sum <B v, y'>`` with ``v ~ N(0, I)`` and ``B B^T`` the second derivative of
        :meth:`distance` at the float output.
        """
        rows = self.term.rows(outputs)
        v = torch.randn(rows.shape, generator=generator).to(rows.device)
        root = self.scale.sqrt()
        if self.term.kind == "classes":
            p = self.rows.softmax(dim=2)
            v = p.sqrt() * v
            v = v - p * v.sum(dim=2, keepdim=True)
        elif self.term.kind == "binary":
            s = self.rows.sigmoid()
            v = (s * (1 - s)).sqrt() * v
        elif self.term.kind == "probabilities":
            s = self.rows.clamp(LEAST, 1 - LEAST)
            v = v / (s * (1 - s)).sqrt()
        else:
            v = 2.0**0.5 * v
        return (root * v * rows).sum()


def _spread(rows: Tensor) -> Tensor:
    """Variance of every channel, ``[C]``; of one that never changes its mean square."""
    flat = rows.flatten(0, 1)
    variance, square = flat.var(dim=0, correction=0), flat.square().mean(dim=0)
    found = torch.where(variance > 0, variance, square)
    return torch.where(found > 0, found, torch.ones_like(found))


def _shares(rows: Tensor, kind: str) -> Tensor:
    return rows.sigmoid() if kind == "binary" else rows.clamp(0.0, 1.0)


@dataclass(frozen=True)
class TaskLoss:
    """A loss of several outputs, see the module's text; a ``loss_fn`` for every call that has one.

    ``TaskLoss.of({"logits": "classes", "depth": "values"})`` names the outputs;
    :meth:`of_detection` takes what says to the server which outputs are boxes and scores. Labels
    are not looked at: it compares with the float network's outputs.

    Attributes:
        terms: one per output, or part of one.
    """

    terms: tuple[Term, ...]

    distills = True  # the target is what the float network returns, also where there are labels

    def __post_init__(self) -> None:
        if not self.terms:
            raise CalibrationError("TaskLoss: expected at least one output, got none")

    @classmethod
    def of(cls, outputs: Mapping[str, str] | Sequence[Term]) -> TaskLoss:
        """From ``{output: kind}``, or from terms.

        Raises:
            CalibrationError: no outputs, or an unknown kind.
        """
        if isinstance(outputs, Mapping):
            return cls(tuple(Term(name, kind) for name, kind in outputs.items()))
        return cls(tuple(outputs))

    @classmethod
    def of_detection(
        cls,
        detection: Detection | Mapping[str, Any],
        *,
        scores: str = "probabilities",
        boxes: float = BOXES,
    ) -> TaskLoss:
        """Boxes and scores of a detector.

        Args:
            detection: which outputs they are (:mod:`adalayer_native.detection`).
            scores: ``"binary"`` where the model returns logits.
            boxes: weight of the boxes beside the scores; by default an error of a tenth on every
                side costs what it takes off the IoU, about 0.3.
        """
        if not isinstance(detection, Detection):
            detection = Detection.from_dict(detection)
        axis = 1 if detection.channels == "first" else -1
        terms: list[Term] = []
        for box, score in zip(detection.boxes, detection.scores, strict=True):
            seen = Term(score[0], scores, channels=score[1:], axis=axis)
            place = Term(box[0], "boxes", boxes, box[1:], axis, seen, detection.format == "xyxy")
            terms += [seen, place]
        return cls(tuple(terms))

    def weighted(self, **weights: float) -> TaskLoss:
        """With other weights of some outputs."""
        return TaskLoss(
            tuple(replace(t, weight=weights.get(t.output, t.weight)) for t in self.terms)
        )

    def __call__(self, output: Any, float_output: Any) -> Tensor:
        """Loss of every image ``[N]``; differentiable in ``output``.

        Raises:
            CalibrationError: the outputs are not those that were named.
        """
        outputs, reference = named(output), named(float_output)
        parts = [term.form(reference).distance(outputs) for term in self.terms]
        return torch.stack(parts).sum(dim=0)
