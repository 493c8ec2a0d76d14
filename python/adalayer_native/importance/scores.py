"""The result of :func:`~adalayer_native.importance.analyze`: A, F, R and I of every layer."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_text_atomic
from ..errors import FileFormatError, PlanError
from .registry import criterion_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerScore", "LayerScores"]

SCORES_FORMAT = "adalayer-scores"
SCORES_VERSION = 1


@dataclass
class LayerScore:
    """One layer's measurements.

    Attributes:
        name: the layer's name in ``model.named_modules()``.
        kind: ``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"``.
        params: number of weights.
        flops: floating-point operations for one sample (a multiply-add counts 2), summed over
            all calls of the layer.
        raw: what the criterion measured, in its own unit (``"accuracy"``: loss increase).
        variance: population variance of the weights.
        A: ``max(0, raw)`` over the largest of all layers, in [0, 1].
        F: ``flops`` over the largest, in [0, 1].
        R: redundancy from the variance, in [0, 1].
        I: eq. (1) with the alpha and beta of the analysis.
        criteria: every criterion that was measured, in its own unit, by name.
    """

    name: str
    kind: str
    params: int
    flops: float
    raw: float
    variance: float
    A: float = 0.0
    F: float = 0.0
    R: float = 0.0
    I: float = 0.0  # noqa: E741  (the paper's name)
    criteria: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerScores:
    """Scores of all layers, in the model's order.

    Attributes:
        layers: one :class:`LayerScore` per layer, by name.
        alpha, beta: weights of A and F in eq. (1).
        criterion: what ``raw`` is.
        probe_bits: width at which each layer alone was tried.
        loss: mean loss of the float model (0 for KL divergence to itself).
        metric: ``"loss_fn"``, ``"cross_entropy"``, or how far the float model's outputs are:
            ``"kl_divergence"``, ``"squared_error"``, or both joined by ``" + "``.
        samples: number of calibration samples seen.
    """

    layers: dict[str, LayerScore]
    alpha: float = 0.7
    beta: float = 0.3
    criterion: str = "accuracy"
    probe_bits: int = 2
    loss: float = 0.0
    metric: str = "kl_divergence"
    samples: int = 0

    def __getitem__(self, name: str) -> LayerScore:
        try:
            return self.layers[name]
        except KeyError:
            close = difflib.get_close_matches(name, list(self.layers), n=3, cutoff=0.4)
            hint = f"; closest names: {', '.join(map(repr, close))}" if close else ""
            raise PlanError(f"no scores for layer {name!r}{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names of all criteria that were measured; the one behind A comes first."""
        rows = iter(self.layers.values())
        return tuple(dict.fromkeys([self.criterion, *next(rows).criteria])) if self.layers else ()

    def by(self, criterion: str) -> LayerScores:
        """The same scores with A and I from another criterion that was measured.

        Raises:
            PlanError: the criterion was not measured.
        """
        other = deepcopy(self)
        other.take(criterion)
        return other

    def take(self, criterion: str) -> None:
        """Let A and I come from a criterion that was measured; see :meth:`by`."""
        if any(criterion not in s.criteria for s in self.layers.values()):
            raise PlanError(
                f"criterion {criterion!r} was not measured; these scores have "
                f"{', '.join(self.criteria)}"
            )
        contribution = criterion_of(criterion).contribution(
            {name: s.criteria[criterion] for name, s in self.layers.items()}
        )
        self.criterion = criterion
        for name, s in self.layers.items():
            s.raw, s.A = s.criteria[criterion], contribution[name]
        for name, value in self.importance().items():
            self.layers[name].I = value

    def importance(self, alpha: float | None = None, beta: float | None = None) -> dict[str, float]:
        """Eq. (1): ``I = min(1, alpha * A + beta * F)`` per layer.

        The minimum does nothing while ``alpha + beta <= 1``, as in the paper; with a larger
        ``alpha`` it makes every layer above a certain contribution equally important.
        """
        a = self.alpha if alpha is None else alpha
        b = self.beta if beta is None else beta
        return {name: min(1.0, a * s.A + b * s.F) for name, s in self.layers.items()}

    def as_dict(self, alpha: float | None = None, beta: float | None = None) -> dict[str, Any]:
        """``{name: {"A":, "F":, "R":, "I":}}``, as a :class:`~adalayer_native.plan.Plan` keeps."""
        importance = self.importance(alpha, beta)
        return {
            name: {"A": s.A, "F": s.F, "R": s.R, "I": importance[name]}
            for name, s in self.layers.items()
        }

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back to equal scores."""
        data: dict[str, Any] = {"format": SCORES_FORMAT, "version": SCORES_VERSION}
        data.update(asdict(self))
        data["layers"] = [asdict(score) for score in self.layers.values()]
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "scores") -> LayerScores:
        """Read scores from JSON text; ``source`` names it in messages.

        Raises:
            FileFormatError: not JSON, or not scores.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FileFormatError(f"{source}: not valid JSON: {error}") from None
        if (
            not isinstance(data, dict)
            or data.pop("format", None) != SCORES_FORMAT
            or data.pop("version", None) != SCORES_VERSION
        ):
            raise FileFormatError(
                f'{source}: expected a JSON object with "format": "{SCORES_FORMAT}" and '
                f'"version": {SCORES_VERSION}'
            )
        try:
            data["layers"] = {row["name"]: LayerScore(**row) for row in data["layers"]}
            return cls(**data)
        except (TypeError, KeyError) as error:
            raise FileFormatError(f"{source}: not complete layer scores: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file is replaced as a whole or not at all."""
        write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerScores:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: missing or unreadable file, or not scores.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"cannot read the scores {os.fspath(path)!r}: {error}") from None
        return cls.from_json(text, source=os.fspath(path))

    def table(self) -> Table:
        """A rich table, one row per layer."""
        from rich.table import Table

        table = Table(
            title=f"Layer scores ({self.criterion} at {self.probe_bits} bits, "
            f"{self.samples} samples, I = {self.alpha:g} A + {self.beta:g} F)"
        )
        table.add_column("Layer")
        for heading in ("Weights", "MFLOPs", "Raw", "A", "F", "R", "I"):
            table.add_column(heading, justify="right")
        others = [name for name in self.criteria if name != self.criterion]
        for other in others:
            table.add_column(other, justify="right")
        importance = self.importance()
        for name, s in self.layers.items():
            table.add_row(
                name,
                f"{s.params:,}",
                f"{s.flops / 1e6:.2f}",
                f"{s.raw:.4g}",
                f"{s.A:.3f}",
                f"{s.F:.3f}",
                f"{s.R:.3f}",
                f"{importance[name]:.3f}",
                *(f"{s.criteria[other]:.4g}" for other in others),
            )
        return table

    def __rich__(self) -> Table:
        return self.table()
