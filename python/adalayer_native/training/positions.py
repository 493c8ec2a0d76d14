"""What positions between options cost, and the step that keeps every limit.

Positions are one number per layer, in its list of weights, and one per stored tensor whose width is
learned too, in the list of widths. A layer's cost is linear between neighbours in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Costs", "move"]

_HALVINGS = 50  # of the interval in which a multiplier is looked for
_SPAN = 1e8  # times the typical one, up and down
_SWEEPS = 2  # over the limits, where there are several


@dataclass(frozen=True)
class Costs:
    """Costs of every layer and option, of every quantity that is limited.

    Attributes:
        table: float64 ``[limits, layers, options, widths]``; rows end with copies of the last.
        constants: float64 ``[limits]``: what is there whatever is chosen.
        limits: float64 ``[limits]``.
        counts: int64 ``[positions]``: options of every position, those of layers first.
        inputs: int64 ``[layers]``: the position that a layer's input has, ``-1``: it has none.
    """

    table: np.ndarray
    constants: np.ndarray
    limits: np.ndarray
    counts: np.ndarray
    inputs: np.ndarray

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Totals ``[limits]`` at some positions, and what a step to the next option saves.

        Savings are float64 ``[limits, positions]``.
        """
        layers = len(self.inputs)
        rows = np.arange(layers)
        k, f = _split(positions[:layers], self.counts[:layers])
        own = self.inputs >= 0
        widths = np.where(own, positions[self.inputs], 0.0)
        j, g = _split(widths, np.where(own, self.counts[self.inputs], 2))
        richer, cheaper = self.table[:, rows, k], self.table[:, rows, k + 1]  # [R, L, widths]
        between = richer + f[:, None] * (cheaper - richer)
        step = cheaper - richer
        low, high = between[:, rows, j], between[:, rows, j + 1]
        savings = np.zeros((len(self.limits), len(positions)))
        savings[:, :layers] = -(step[:, rows, j] + g * (step[:, rows, j + 1] - step[:, rows, j]))
        for layer in np.flatnonzero(own):
            savings[:, self.inputs[layer]] -= high[:, layer] - low[:, layer]
        return self.constants + (low + g * (high - low)).sum(axis=1), np.maximum(savings, 0.0)


def _split(positions: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = np.clip(positions.astype(np.int64), 0, counts - 2)
    return k, positions - k


def move(
    costs: Costs, positions: np.ndarray, harm: np.ndarray, limits: np.ndarray, rate: float
) -> np.ndarray:
    """Positions after one step of the Lagrangian's descent that keeps the limits.

    With multipliers ``m`` a position goes ``rate * (m s - h) / (m s + h)`` options on, ``h`` being
    what the loss grows by and ``s`` what is saved, so that at rest every position has the same
    ratio of the two. The smallest multipliers are taken with which the limits are kept after the
    step, one limit after the other; with what nothing keeps, all positions go on at full rate.

    Args:
        costs: of positions.
        positions: float64 ``[positions]``.
        harm: float64 ``[positions]``: growth of the loss by a step to the next option, at least 0.
        limits: float64 ``[limits]``: of the totals.
        rate: options per step, at most.
    """
    _, savings = costs.at(positions)
    relative = savings / limits[:, None]
    multipliers = np.zeros(len(limits))

    def moved() -> np.ndarray:
        pull = multipliers @ relative
        whole = harm + pull
        step = np.divide(pull - harm, whole, out=np.zeros_like(whole), where=whole > 0)
        return np.clip(positions + rate * step, 0.0, costs.counts - 1.0)

    for _ in range(_SWEEPS if len(limits) > 1 else 1):
        for row in range(len(limits)):
            multipliers[row] = 0.0
            if costs.at(moved())[0][row] <= limits[row]:
                continue
            typical = float(harm.sum() / max(relative[row].sum(), 1e-300)) or 1.0
            low, high = typical / _SPAN, typical * _SPAN
            for _ in range(_HALVINGS):
                multipliers[row] = middle = (low * high) ** 0.5
                if costs.at(moved())[0][row] <= limits[row]:
                    high = middle
                else:
                    low = middle
            multipliers[row] = high
    return moved()
