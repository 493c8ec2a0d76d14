"""The energy model's terms fitted to what layers took on a machine: microseconds or microjoules.

The published constants of :mod:`~adalayer_native.energy.model` rank plans; they do not know a
machine. Here a measured quantity of a layer is

    ``y = m * macs * bits * activation_bits / 64 + a * macs + w * weight_bytes
    + v * activations + c``

with coefficients that are not negative, found by least squares of the relative errors, so that
small layers count as large ones do. With times of layers and the power that the machine draws
meanwhile, which counters measure, the result is energy; without it stays time, and is said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EnergyError

__all__ = ["Fit", "Row", "fit_layers"]

TERMS = ("multiplications", "additions", "weights", "activations", "constant")


@dataclass(frozen=True)
class Row:
    """A layer at some widths, and what was measured of it.

    Attributes:
        name: of the layer, or whatever the row is to be called.
        macs: multiply-accumulates.
        bits, activation_bits: of weights and inputs.
        weight_bytes: as stored.
        activations: values read and written.
        measured: above 0, in the fit's unit.
    """

    name: str
    macs: float
    bits: int
    activation_bits: int
    weight_bytes: float
    activations: float
    measured: float

    def terms(self) -> list[float]:
        """What the coefficients are multiplied with."""
        products = self.macs * self.bits * self.activation_bits / 64.0
        return [products, self.macs, self.weight_bytes, self.activations, 1.0]


@dataclass(frozen=True)
class Fit:
    """Coefficients, and how far they are off.

    Attributes:
        coefficients: by name of the term, in ``unit`` per operation, byte, value or layer.
        unit: of what was measured.
        rows: that were fitted.
        predicted: of every row.
    """

    coefficients: Mapping[str, float]
    unit: str
    rows: tuple[Row, ...]
    predicted: tuple[float, ...]

    @property
    def residuals(self) -> tuple[float, ...]:
        """``predicted / measured - 1`` of every row."""
        return tuple(
            p / row.measured - 1.0 for p, row in zip(self.predicted, self.rows, strict=True)
        )

    @property
    def error(self) -> float:
        """Root of the mean square of the residuals."""
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "unit": self.unit,
            "coefficients": dict(self.coefficients),
            "error": self.error,
            "rows": [
                {"name": row.name, "measured": row.measured, "predicted": p, "residual": r}
                for row, p, r in zip(self.rows, self.predicted, self.residuals, strict=True)
            ],
        }


def fit_layers(rows: Sequence[Row], unit: str) -> Fit:
    """Fit the model to measured layers.

    Args:
        rows: at least two; terms that all rows have alike cannot be told apart and share what they
            explain.
        unit: of ``measured``, such as ``"µs"`` or ``"µJ"``.

    Raises:
        EnergyError: too few rows, or a measured value that is no finite number above 0.
    """
    from scipy.optimize import nnls

    if len(rows) < 2:
        raise EnergyError(f"a fit needs at least 2 measured layers, got {len(rows)}")
    for row in rows:
        if not (np.isfinite(row.measured) and row.measured > 0):
            raise EnergyError(
                f"layer {row.name!r}: measured is {row.measured}; expected a finite number above 0"
            )
    terms = np.array([row.terms() for row in rows]) / np.array([[r.measured] for r in rows])
    scale = np.abs(terms).max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(terms / scale, np.ones(len(rows)))
    coefficients = dict(zip(TERMS, (found / scale).tolist(), strict=True))
    predicted = [float(np.dot(row.terms(), list(coefficients.values()))) for row in rows]
    return Fit(coefficients, unit, tuple(rows), tuple(predicted))
