"""Range observers: they see every value of a tensor once and keep a bounded summary.

``minmax`` keeps two numbers. ``percentile`` and ``mse`` keep a histogram of fixed size whose range
doubles when a value falls outside it; doubling merges neighbouring bins, so that nothing has to be
seen twice and the result does not depend on how the data is cut into batches by more than a bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adalayer_native.errors import CalibrationError
from adalayer_native.rounding import activation_grid

_BINS = 8192  # at least 16 bins per 8-bit level even after a doubling of a two-sided range


class Observer:
    """Base: counts values, checks them and tracks their smallest and largest.

    Args:
        bits: width of the grid that will be chosen.
        name: the tensor's name, for messages.
    """

    def __init__(self, bits: int, name: str) -> None:
        self.bits = bits
        self.name = name
        self.count = 0
        self.minimum = math.inf
        self.maximum = -math.inf

    def observe(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        if x.numel() == 0:
            return
        values = x.detach()
        if not values.is_floating_point():
            raise CalibrationError(
                f"{self.name}: expected a floating point tensor, got {values.dtype}"
            )
        low, high = (float(value) for value in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(values)).sum())
            raise CalibrationError(
                f"{self.name}: {bad} of {values.numel()} values are NaN or infinite "
                f"(batch of shape {tuple(values.shape)}); expected finite numbers"
            )
        self.count += values.numel()
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._add(values.float(), max(abs(low), abs(high)))

    def _add(self, values: Tensor, largest: float) -> None:
        """Hook for subclasses: ``values`` float32 with ``max|values| == largest``."""

    def range(self) -> tuple[float, float]:
        """The chosen ``(low, high)``.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.count == 0:
            raise CalibrationError(
                f"{self.name}: no values were observed; the loader was empty or the model's "
                "forward does not reach this tensor"
            )
        return self._range()

    def _range(self) -> tuple[float, float]:
        return self.minimum, self.maximum


class MinMaxObserver(Observer):
    """The smallest and largest value seen."""


class HistogramObserver(Observer):
    """Histogram over ``[-limit, limit]`` in ``8192`` bins; ``limit`` doubles as needed."""

    def __init__(self, bits: int, name: str) -> None:
        super().__init__(bits, name)
        self.limit = 0.0
        self.bins = torch.zeros(_BINS, dtype=torch.float64)
        self.zeros = 0.0

    def _add(self, values: Tensor, largest: float) -> None:
        if largest > 0.0:
            if self.limit == 0.0:
                self.limit = max(largest, 2.0**-100)
            while self.limit < largest:
                self._double()
            # Counts per batch stay below 2^24 in float32 bins only if the batch does: piecewise.
            for part in torch.split(values.reshape(-1), 1 << 24):
                counts = torch.histc(part, bins=_BINS, min=-self.limit, max=self.limit)
                self.bins += counts.to(device="cpu", dtype=torch.float64)
        else:
            # All zero; remembered apart because no limit is known yet.
            self.zeros += values.numel()

    def _double(self) -> None:
        merged = self.bins.view(_BINS // 2, 2).sum(dim=1)
        self.bins.zero_()
        self.bins[_BINS // 4 : 3 * _BINS // 4] = merged
        self.limit *= 2.0

    def centers(self) -> Tensor:
        """Middle of every bin, float64."""
        step = 2.0 * self.limit / _BINS
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * step - self.limit


class PercentileObserver(HistogramObserver):
    """Range that leaves out a share of the values at either end.

    Args:
        bits: width of the grid.
        name: the tensor's name.
        percentile: share kept below the upper end, in percent.
    """

    def __init__(self, bits: int, name: str, percentile: float = 99.99) -> None:
        super().__init__(bits, name)
        if not 50.0 < percentile <= 100.0:
            raise CalibrationError(f"percentile must be in (50, 100], got {percentile}")
        self.percentile = percentile

    def _range(self) -> tuple[float, float]:
        if self.limit == 0.0:
            return 0.0, 0.0
        bins = self.bins.clone()
        bins[_BINS // 2] += self.zeros
        cumulative = bins.cumsum(0)
        cut = float(cumulative[-1]) * (1.0 - self.percentile / 100.0)
        step = 2.0 * self.limit / _BINS
        first = int(torch.searchsorted(cumulative, cut, right=True))
        last = int(torch.searchsorted(cumulative, float(cumulative[-1]) - cut))
        low = first * step - self.limit
        high = (min(last, _BINS - 1) + 1) * step - self.limit
        return max(low, self.minimum), min(high, self.maximum)


class MSEObserver(HistogramObserver):
    """Range with the least squared quantization error over the histogram.

    Both ends are searched together over fractions of what was seen; an end at or beyond zero is
    left alone (a grid always contains zero).

    Attributes:
        function: what alone reads the values, where it is a function of one value: the error is
            that of its results.
    """

    _FRACTIONS = 64
    _PASSES = 2

    def __init__(self, bits: int, name: str) -> None:
        super().__init__(bits, name)
        self.function: Callable[[Tensor], Tensor] | None = None

    def _range(self) -> tuple[float, float]:
        if self.limit == 0.0:
            return 0.0, 0.0
        used = torch.nonzero(self.bins).reshape(-1)
        counts, centers = self.bins[used], self.centers()[used]
        wanted = centers if self.function is None else self.function(centers)
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        best = low, high
        best_error = self._error(counts, centers, wanted, low, high)
        lower = [low * f for f in self._fractions()] if low < 0.0 else [0.0]
        upper = [high * f for f in self._fractions()] if high > 0.0 else [0.0]
        # Alternating the two ends needs 2n evaluations instead of n^2 and finds the same optimum
        # up to a fraction; starting with the shared shrinkage avoids a poor corner.
        shared = [(low * f, high * f) for f in self._fractions()]
        for pair in shared:
            best, best_error = self._better(counts, centers, wanted, pair, best, best_error)
        for _ in range(self._PASSES):
            for candidate in lower:
                pair = (candidate, best[1])
                best, best_error = self._better(counts, centers, wanted, pair, best, best_error)
            for candidate in upper:
                pair = (best[0], candidate)
                best, best_error = self._better(counts, centers, wanted, pair, best, best_error)
        return best

    def _fractions(self) -> list[float]:
        # Geometric: at 2 bits the best range of a long-tailed tensor is a few percent of its
        # extremes, at 8 bits it is close to them.
        return [0.04 ** (index / self._FRACTIONS) for index in range(self._FRACTIONS + 1)]

    def _better(
        self,
        counts: Tensor,
        centers: Tensor,
        wanted: Tensor,
        pair: tuple[float, float],
        best: tuple[float, float],
        best_error: float,
    ) -> tuple[tuple[float, float], float]:
        error = self._error(counts, centers, wanted, *pair)
        return (pair, error) if error < best_error else (best, best_error)

    def _error(
        self, counts: Tensor, centers: Tensor, wanted: Tensor, low: float, high: float
    ) -> float:
        scale, zero_point = activation_grid(low, high, self.bits, self.name)
        top = (1 << self.bits) - 1
        q = (centers / scale).round_().clamp_(-zero_point, top - zero_point)
        found = q.mul_(scale)
        if self.function is not None:
            found = self.function(found)
        return float((counts * (found - wanted).square_()).sum())


OBSERVERS: dict[str, type[Observer]] = {
    "mse": MSEObserver,
    "percentile": PercentileObserver,
    "minmax": MinMaxObserver,
}


def make_observer(kind: str, bits: int, name: str) -> Observer:
    """A fresh observer by name: ``"mse"``, ``"percentile"`` or ``"minmax"``.

    Raises:
        CalibrationError: unknown name.
    """
    if kind not in OBSERVERS:
        raise CalibrationError(f"observer must be one of {sorted(OBSERVERS)}, got {kind!r}")
    return OBSERVERS[kind](bits, name)
