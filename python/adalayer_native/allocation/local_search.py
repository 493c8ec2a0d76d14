"""Local search around a choice: what the tables predict, corrected by what whole plans show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._progress import ProgressBar
from .evaluate import Evaluator, Measurement, best_of
from .selection import Selection

__all__ = ["corrected", "local_search"]

MOVED = 12  # layers that are moved up and down per round
# Standard deviations that are assumed where the tables are corrected: of a layer's factor around
# the common one, and of a plan's predicted loss with the right factors.
FACTOR_SD, PLAN_SD = 0.5, 0.1
FACTORS = (0.2, 5.0)  # what a factor is kept within


def local_search(
    selection: Selection,
    start: np.ndarray,
    evaluator: Evaluator,
    *,
    rounds: int = 4,
    trials: int = 10,
    progress: bool = True,
) -> tuple[np.ndarray, Measurement]:
    """The best choice that was measured, and its measurement.

    Each round moves single layers of the best choice to a better or a cheaper option, lets the
    solver settle the other layers for what that costs or frees, measures the plans that look
    best, and corrects the table by what all measured plans show (:func:`corrected`). It ends when
    a round brings nothing.

    Args:
        selection: tables and limits.
        start: columns of the first choice.
        evaluator: measures plans, on data that the tables have not seen.
        rounds, trials: at most so many rounds, and plans per round.
        progress: show a progress bar.
    """
    tried: list[np.ndarray] = []
    measured: list[Measurement] = []
    seen: set[bytes] = set()

    def note() -> str:
        return f"best loss {min(m.loss for m in measured):.4f}"

    with ProgressBar("trying plans", 1 + rounds * trials, unit="plan", enabled=progress) as bar:

        def measure(columns: np.ndarray) -> None:
            seen.add(columns.tobytes())
            tried.append(columns)
            choice = selection.problem.full(selection.choice(columns))
            measured.append(evaluator.measure(choice))
            bar.advance(1, note())

        try:
            measure(start)
            for _ in range(rounds):
                best = best_of(measured, evaluator.samples)
                errors = corrected(selection, tried, measured)
                fresh = _neighbours(selection, tried[best], errors, seen)
                fresh.sort(key=lambda columns: selection.predicted(columns, errors))
                if not fresh:
                    break
                for columns in fresh[:trials]:
                    measure(columns)
                if best_of(measured, evaluator.samples) == best:
                    break
        finally:
            evaluator.save()
    best = best_of(measured, evaluator.samples)
    return tried[best], measured[best]


def _neighbours(
    selection: Selection, columns: np.ndarray, errors: np.ndarray, seen: set[bytes]
) -> list[np.ndarray]:
    """Choices that differ from one in a moved layer and in what the solver makes of the rest."""
    rows = np.arange(len(columns))
    current = errors[rows, columns]
    open_ = selection.offered

    found: list[np.ndarray] = []

    def add(choice: np.ndarray | None) -> None:
        if choice is None or choice.tobytes() in seen:
            return
        if not any((choice == other).all() for other in found):
            found.append(choice)

    add(selection.choose(errors=errors))
    # Worth moving up: what loses most. Worth moving down: where the next option costs least.
    up = np.argsort(-current, kind="stable")[:MOVED]
    worse = np.where(open_ & (errors > current[:, None]), errors, np.inf).min(axis=1) - current
    down = np.argsort(worse, kind="stable")[:MOVED]
    moves: list[tuple[int, Callable[[np.ndarray], np.ndarray]]] = []
    for row in up.tolist():
        moves.append((row, lambda values, row=row: values < current[row]))  # type: ignore[misc]
    for row in down.tolist():
        moves.append((row, lambda values, row=row: values > current[row]))  # type: ignore[misc]
    for row, wanted in moves:
        allowed = open_.copy()
        allowed[row] &= wanted(errors[row])
        add(selection.choose(errors=errors, allowed=allowed))
    return found


def corrected(
    selection: Selection, tried: list[np.ndarray], measured: list[Measurement]
) -> np.ndarray:
    r"""The error table with a factor per layer that makes the measured plans' losses come out.

    Ridge regression: with ``a_kl`` the share of layer l in plan k's predicted loss, scaled by one
    common factor, over plan k's measured loss, the factors ``1 + d`` minimise
    ``sum_k (1 - sum_l a_kl (1 + d_l))^2 + (PLAN_SD / FACTOR_SD)^2 |d|^2``.
    """
    rows = np.arange(len(selection.errors))
    parts = np.array([selection.errors[rows, columns] for columns in tried])
    losses = np.array([max(m.loss, 1e-12) for m in measured])
    shares = parts / losses[:, None]
    sums = shares.sum(axis=1)
    if not (sums > 0).any():
        return selection.errors
    shares *= sums.sum() / np.square(sums).sum()  # the common factor, by least squares
    matrix = shares.T @ shares + (PLAN_SD / FACTOR_SD) ** 2 * np.eye(len(rows))
    factors = 1 + np.linalg.solve(matrix, shares.T @ (1 - shares.sum(axis=1)))
    return np.asarray(selection.errors * factors.clip(*FACTORS)[:, None])
