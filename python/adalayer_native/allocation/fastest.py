"""The fastest plan that loses no more than 8 bits everywhere and a little.

What is limited and what is made small have changed places: the solver minimises the latencies of
the table within the predicted loss. Images that the tables have not seen then say whether the plan
keeps the limit in truth: where it does not, the solver gets less of it and chooses again. At last
engines say whether the plan is faster than 8 bits everywhere at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..plan import MAX_BITS
from . import refusals
from .clock import EngineClock, keeps_latency, latency_of
from .evaluate import Evaluator, Measurement
from .options import Option
from .resources import LATENCY, LOSS
from .selection import Selection

__all__ = ["Found", "fastest"]

ROUNDS = 6  # of choosing, at most
LESS = 0.8  # of the limit is left for the next choice at most, where one did not keep it
TIES = 1e-6  # what the predicted loss counts, at its limit, beside the latency


@dataclass(frozen=True)
class Found:
    """A plan, and what was measured on the images of the check.

    Attributes:
        columns: the plan.
        loss: of it; ``None`` where nothing was measured.
        usual: of 8 bits everywhere.
    """

    columns: np.ndarray
    loss: Measurement | None = None
    usual: Measurement | None = None


def fastest(selection: Selection, evaluator: Evaluator | None, clock: EngineClock | None) -> Found:
    """The plan, and what it loses.

    Args:
        selection: with a limit of the loss (:class:`~adalayer_native.allocation.Budget`).
        evaluator: measures plans on data that the tables have not seen; ``None``: predictions
            stand.
        clock: of engines; ``None``: the latencies are another machine's, and stand as predicted.

    Raises:
        BudgetError: no plan keeps all limits.
    """
    resource = selection.resource(LOSS)
    assert resource is not None
    usual = selection.alike(Option(MAX_BITS))
    allowed = resource.limit - resource.total(usual)
    found = _within(selection, evaluator, clock, usual, allowed)
    if found is None and selection.fits(usual):
        found = _measured(selection, evaluator, usual, usual)
    if found is None:
        raise refusals.loss_not_kept(selection.budget)
    if not np.array_equal(found.columns, usual) and selection.fits(usual):
        both = found.columns, usual
        if clock is not None:
            times = clock.together([selection.choice(columns) for columns in both])
        else:
            latency = selection.resource(LATENCY)
            assert latency is not None
            times = [latency.total(columns) for columns in both]
        if times[0] >= times[1]:
            return Found(usual, found.usual, found.usual)
    return found


def _within(
    selection: Selection,
    evaluator: Evaluator | None,
    clock: EngineClock | None,
    usual: np.ndarray,
    allowed: float,
) -> Found | None:
    """The fastest plan that keeps the limits where it is measured; ``None`` after some tries."""
    loss, latency = selection.resource(LOSS), selection.resource(LATENCY)
    assert loss is not None
    assert latency is not None
    left = allowed
    for _ in range(ROUNDS):
        loss.limit = loss.total(usual) + left
        tie = TIES * latency.total(usual) / max(loss.limit, 1e-30)
        columns = selection.choose(errors=latency.costs + tie * loss.costs, pairs=())
        if columns is None:
            raise selection.impossible()
        limited = latency_of(selection) is not None
        if clock is not None and limited and not keeps_latency(selection, columns, clock):
            continue  # latencies are scaled
        found = _measured(selection, evaluator, columns, usual)
        if found.loss is None or found.usual is None:
            return found
        more = found.loss.loss - found.usual.loss
        if more <= allowed:
            return found
        left *= min(LESS, allowed / more)
    return None


def _measured(
    selection: Selection, evaluator: Evaluator | None, columns: np.ndarray, usual: np.ndarray
) -> Found:
    if evaluator is None:
        return Found(columns)
    full = selection.problem.full
    losses = [evaluator.measure(full(selection.choice(c))) for c in (columns, usual)]
    return Found(columns, *losses)
