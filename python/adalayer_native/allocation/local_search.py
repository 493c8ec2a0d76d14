"""Local search around a choice: what the tables predict, corrected by what whole plans show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._progress import ProgressBar
from .evaluate import Evaluator, Measurement
from .selection import Selection

__all__ = ["add_distinct", "corrected", "local_search", "most_likely", "starts"]

MOVED = 12  # layers that are moved up and down per round, at most
PER_TRIAL = 2  # of them for every plan that is measured: each is a problem for the solver
# Standard deviations that are assumed where the tables are corrected: of a layer's factor around
# the common one, of what pruning adds to it, and of a plan's predicted loss with the right factors.
FACTOR_SD, PRUNED_SD, PLAN_SD = 0.5, 2.0, 0.3
FACTORS = (0.2, 10.0)  # what a factor is kept within
# How much dearer pruning is made, and powers of the errors, in the plans to begin with.
DEARER = (1.0, 3.0, 10.0)
POWERS = (1.0, 0.75, 0.5)


def starts(selection: Selection) -> list[np.ndarray]:
    """Choices to begin with, the solver's own first; they differ where the tables are least sure.

    Errors of several layers add up to more than their sum, and most of all those of pruning: it
    shrinks every layer's output, so that layers err in the same direction. How much more depends
    on the network, so plans with pruning made dearer, and with errors spread over fewer layers
    (a power below 1), are measured against each other. So are the plans that treat all layers
    alike: whoever decides layer by layer should not lose to them for want of trying.
    """
    found: list[np.ndarray] = []
    pruned = np.array([option.sparsity > 0 for option in selection.options])
    for dearer in DEARER:
        for power in POWERS:
            errors = (selection.errors * np.where(pruned, dearer, 1.0)) ** power
            pairs = selection.pairs if power == 1 and dearer == 1 else ()
            add_distinct(found, selection.choose(errors=errors, pairs=pairs))
    layers = len(selection.errors)
    kinds: dict[tuple[int, str, int], list[tuple[float, int]]] = {}
    for column, option in enumerate(selection.options):
        kind = (option.bits or 0, option.pattern, option.activation_bits or 0)
        kinds.setdefault(kind, []).append((option.sparsity, column))
    for kind in sorted(kinds):
        for _, column in sorted(kinds[kind]):
            columns = np.full(layers, column)
            if selection.offered[np.arange(layers), columns].all() and selection.fits(columns):
                add_distinct(found, columns)
                break
    return found


def add_distinct(found: list[np.ndarray], columns: np.ndarray | None) -> None:
    """Append a choice that is none of those found."""
    if columns is not None and not any((columns == other).all() for other in found):
        found.append(columns)


def local_search(
    selection: Selection,
    evaluator: Evaluator,
    *,
    rounds: int = 4,
    trials: int = 10,
    gain: float = 0.0,
    progress: bool = True,
) -> tuple[np.ndarray, Measurement]:
    """The best of the choices that were measured (:func:`most_likely`), and its measurement.

    After the plans of :func:`starts`, each round moves single layers of the best choice to a
    better or a cheaper option, lets the solver choose for the other layers with what that costs or
    frees, measures the plans that look best, and corrects the table by what all measured plans
    show (:func:`corrected`). It ends when a round brings nothing, or too little.

    Args:
        selection: tables and limits that can be kept.
        evaluator: measures plans, on data that the tables have not seen.
        rounds, trials: at most so many rounds, and plans per round.
        gain: the share by which a round has to lower the corrected prediction to be followed by
            another.
        progress: show a progress bar.
    """
    tried: list[np.ndarray] = []
    measured: list[Measurement] = []
    seen: set[bytes] = set()
    first = starts(selection)
    total = len(first) + rounds * trials
    with ProgressBar("trying plans", total, unit="plan", enabled=progress) as bar:

        def measure(columns: np.ndarray) -> None:
            seen.add(columns.tobytes())
            tried.append(columns)
            choice = selection.problem.full(selection.choice(columns))
            measured.append(evaluator.measure(choice))
            bar.advance(1, f"best loss {min(m.loss for m in measured):.4f}")

        try:
            for columns in first:
                measure(columns)
            for _ in range(rounds):
                errors = corrected(selection, tried, measured)
                best = most_likely(selection, errors, tried, measured)
                moved = min(MOVED, PER_TRIAL * trials)
                fresh = _neighbours(selection, tried[best], errors, seen, moved)
                fresh.sort(key=lambda columns: selection.predicted(columns, errors))
                for columns in fresh[:trials]:
                    measure(columns)
                errors = corrected(selection, tried, measured)
                now = most_likely(selection, errors, tried, measured)
                least = selection.predicted(tried[best], errors) * (1 - gain)
                if now == best or selection.predicted(tried[now], errors) > least:
                    break
        finally:
            evaluator.save()
    errors = corrected(selection, tried, measured)
    best = most_likely(selection, errors, tried, measured)
    return tried[best], measured[best]


def most_likely(
    selection: Selection,
    errors: np.ndarray,
    tried: list[np.ndarray],
    measured: list[Measurement],
) -> int:
    """Index of the plan with the least loss as far as measurement and prediction know it.

    The mean loss of a few hundred images rests on the few that the plan gets wrong: the same plan
    differs by a third from one sample to the next, and the best of fifty by measurement alone is
    one that was lucky. The corrected prediction has about the same error, but another one; the
    score is the geometric mean of both.
    """
    scores = [
        np.log(max(m.loss, 1e-12)) + np.log(max(selection.predicted(c, errors), 1e-12))
        for c, m in zip(tried, measured, strict=True)
    ]
    return int(np.argmin(scores))


def _neighbours(
    selection: Selection, columns: np.ndarray, errors: np.ndarray, seen: set[bytes], moved: int
) -> list[np.ndarray]:
    """Choices that differ from one in a moved layer and in what the solver makes of the rest.

    ``moved`` layers are moved up and as many down.
    """
    rows = np.arange(len(columns))
    current = errors[rows, columns]
    open_ = selection.offered

    found: list[np.ndarray] = []

    def add(choice: np.ndarray | None) -> None:
        if choice is not None and choice.tobytes() not in seen:
            add_distinct(found, choice)

    add(selection.choose(errors=errors))
    # Worth moving up: what loses most. Worth moving down: where the next option costs least.
    up = np.argsort(-current, kind="stable")[:moved]
    worse = np.where(open_ & (errors > current[:, None]), errors, np.inf).min(axis=1) - current
    down = np.argsort(worse, kind="stable")[:moved]
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
    r"""The error table with factors that make the measured plans' losses come out.

    A factor ``1 + d_l`` per layer, and ``d_p`` more for every option that prunes. With ``a_kl``
    the share of layer l in plan k's predicted loss (scaled by one common factor) over plan k's
    measured loss, ridge regression minimises ``sum_k (1 - sum_l a_kl (1 + d_l + d_p [pruned]))^2
    / PLAN_SD^2 + sum_l d_l^2 / FACTOR_SD^2 + d_p^2 / PRUNED_SD^2``.
    """
    rows = np.arange(len(selection.errors))
    pruned = np.array([option.sparsity > 0 for option in selection.options])
    parts = np.array([selection.errors[rows, columns] for columns in tried])
    losses = np.array([max(m.loss, 1e-12) for m in measured])
    shares = parts / losses[:, None]
    sums = shares.sum(axis=1)
    if not (sums > 0).any():
        return selection.errors
    shares *= sums.sum() / np.square(sums).sum()  # the common factor, by least squares
    common = (shares * pruned[np.array(tried)]).sum(axis=1, keepdims=True)
    matrix = np.concatenate([shares, common], axis=1)
    weights = np.array([FACTOR_SD] * len(rows) + [PRUNED_SD])
    penalty = np.diag((PLAN_SD / weights) ** 2)
    found = np.linalg.solve(matrix.T @ matrix + penalty, matrix.T @ (1 - shares.sum(axis=1)))
    factors = 1 + found[:-1, None] + found[-1] * pruned[None]
    return np.asarray(selection.errors * factors.clip(*FACTORS))
