"""The last comparison of method "optimal": a few plans, repaired whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._progress import ProgressBar
from .evaluate import Measurement
from .local_search import add_distinct, corrected
from .selection import Selection

__all__ = ["best_repaired", "plans_to_repair"]

# What an option that prunes counts in the plans that are compared, and powers of the errors.
CHEAPER = (0.3, 0.1)
POWERS = (1.0, 0.5)
UNIFORM = 2  # plans that treat all layers alike among them, at most


def plans_to_repair(selection: Selection, columns: np.ndarray, count: int) -> list[np.ndarray]:
    """Choices to compare: a given one, uniform ones, and the solver's with cheaper pruning."""
    pruned = np.array([option.sparsity > 0 for option in selection.options])
    rows = np.arange(len(selection.errors))
    found = [columns]
    alike = []
    for option in range(len(selection.options)):
        same = np.full(len(rows), option)
        if selection.offered[rows, same].all() and selection.fits(same):
            factor = CHEAPER[0] if pruned[option] else 1.0
            alike.append((factor * selection.predicted(same), option))
    widths: set[int | None] = set()
    for _, option in sorted(alike):
        bits = selection.options[option].bits
        if bits not in widths and len(widths) < UNIFORM:
            widths.add(bits)
            add_distinct(found, np.full(len(rows), option))
    for power in POWERS:
        for factor in (*CHEAPER, 1.0):
            errors = (selection.errors * np.where(pruned, factor, 1.0)) ** power
            add_distinct(found, selection.choose(errors=errors, pairs=()))
    return found[:count]


def best_repaired(
    selection: Selection,
    columns: np.ndarray,
    measure: Callable[[np.ndarray], Measurement],
    *,
    count: int,
    gain: float = 0.0,
    progress: bool = True,
) -> tuple[np.ndarray, Measurement]:
    """The best of at most ``count`` repaired plans, and its measurement.

    The last places go to plans that the solver finds with the table corrected by what the others
    have shown.

    Args:
        selection: tables and limits.
        columns: the best plan so far.
        measure: what a choice loses after the repair.
        count: how many are compared.
        gain: ends the comparison when two plans in a row have lowered the least loss by a smaller
            share than that; 0: all are compared.
        progress: show a progress bar.
    """
    reserved = count // 4
    waiting = plans_to_repair(selection, columns, max(1, count - reserved))
    tried: list[np.ndarray] = []
    measured: list[Measurement] = []
    with ProgressBar("comparing repaired plans", count, unit="plan", enabled=progress) as bar:
        while waiting and len(tried) < count:
            tried.append(waiting.pop(0))
            measured.append(measure(tried[-1]))
            losses = [m.loss for m in measured]
            bar.advance(1, f"best loss {min(losses):.4f}")
            if gain and len(losses) > 2 and min(losses) > min(losses[:-2]) * (1 - gain):
                break
            if not waiting:
                errors = corrected(selection, tried, measured)
                fresh = selection.choose(errors=errors, pairs=())
                if fresh is not None and not any(np.array_equal(fresh, old) for old in tried):
                    waiting = [fresh]
    best = int(np.argmin([m.loss for m in measured]))
    return tried[best], measured[best]
