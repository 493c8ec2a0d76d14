"""u8 grids, what a reader asks of a value, and the tables of pointwise functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adalayer_native import ops

__all__ = ["Grid", "Table", "Want"]

Table = npt.NDArray[np.uint8]

_INF = math.inf


@dataclass(frozen=True)
class Grid:
    """A u8 grid: real = (q - zero_point) * scale, q in 0 ... 2^bits - 1.

    Attributes:
        scale: a float32 value.
        zero_point: the level of 0.0.
        bits: 2 to 8.
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def qmax(self) -> int:
        """The highest level."""
        return (1 << self.bits) - 1

    @property
    def inverse(self) -> float:
        """1 / scale as the kernels have it: rounded to float32."""
        return float(np.float32(1.0) / np.float32(self.scale))

    def reals(self) -> Tensor:
        """Values of the 256 levels of the container, float32."""
        return (torch.arange(256, dtype=torch.float32) - self.zero_point) * self.scale

    def holds(self, value: float) -> bool:
        """Whether a value is exactly that of a level."""
        reals = self.reals()[: self.qmax + 1]
        return bool((reals == value).any())

    def level(self, value: float) -> int:
        """The level that a float32 value is stored as."""
        inverse = np.float32(self.inverse)
        with np.errstate(over="ignore"):
            scaled = float(np.float32(value) * inverse)
        if math.isnan(scaled):
            return 0
        clamped = min(max(scaled, -self.zero_point), self.qmax - self.zero_point)
        return int(np.rint(clamped)) + self.zero_point


@dataclass(frozen=True)
class Want:
    """A grid that a reader asks for, and the clamp (in real values) that comes before it.

    Rounding to a grid is monotone, so clamping before it equals clamping the levels after it.
    """

    grid: Grid
    lo: float = -_INF
    hi: float = _INF

    @property
    def clamps(self) -> bool:
        """Whether any bound is set."""
        return self.lo != -_INF or self.hi != _INF

    def after(self, lo: float, hi: float) -> Want:
        """The same with an inner clamp to ``lo ... hi`` that is applied first."""
        lo, hi = compose_clamps((lo, hi), (self.lo, self.hi))
        return replace(self, lo=lo, hi=hi)

    def finish(self) -> dict[str, int | float]:
        """The finish of a program node, by name: the grid, and the clamp as levels."""
        grid = self.grid
        low = 0 if self.lo == -_INF else grid.level(self.lo)
        high = grid.qmax if self.hi == _INF else grid.level(self.hi)
        return {
            "lo": low,
            "hi": max(low, high),
            "zero_point": grid.zero_point,
            "inv": grid.inverse,
        }

    def table(self, source: Grid, function: Callable[[Tensor], Tensor] | None = None) -> Table:
        """Level of ``source`` -> level asked for, through ``function``, as the modules compute it.

        Raises:
            ValueError: the function does not keep the shape of its argument.
        """
        values = source.reals()
        if function is not None:
            values = function(values)
            if values.shape != (256,) or values.dtype != torch.float32:
                raise ValueError(
                    f"a pointwise function must keep shape and type, got {list(values.shape)} "
                    f"{values.dtype}"
                )
        if self.clamps:
            values = values.clamp(self.lo, self.hi)
        grid = self.grid
        levels = ops.quantize(values, grid.scale, grid.zero_point, grid.bits)
        return np.asarray(levels.numpy())


def compose_clamps(inner: tuple[float, float], outer: tuple[float, float]) -> tuple[float, float]:
    """One clamp that equals ``inner`` followed by ``outer``."""
    lo, hi = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    return lo, hi
