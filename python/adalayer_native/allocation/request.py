"""What is wrong with a request, said before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..capture import GraphModel
from ..errors import BudgetError, PlanError
from ..importance.registry import criterion_of
from .budget import Budget
from .closed_form import MAX_SPARSITY, MIN_BITS
from .methods import BUDGETED, METHODS, STAGE_METHODS
from .optimal import reachable
from .problem import Fixed, Problem
from .rl import RLSettings
from .settings import MEASURES, settings_of
from .stages import stage_plan

__all__ = ["check_method", "check_request"]


def check_method(
    method: str,
    budget: Budget | None,
    *,
    criterion: str | None = None,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """What needs no model; arguments as of :func:`~adalayer_native.allocation.allocate`.

    Raises:
        PlanError: an unknown method, criterion or option, or one that the method does not look at.
        BudgetError: a budget that the method needs, or does not take.
        FileFormatError: a latency table that cannot be used.
    """
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}: expected one of {METHODS}")
    if budget is None and method in BUDGETED:
        raise BudgetError(f"method {method!r} needs a budget")
    if budget is not None and method != "optimal" and not budget.single:
        raise BudgetError(
            f"method {method!r} takes one limit of size, bytes and bits, got {budget}; method "
            f"'optimal' takes several, and latency, bops and energy"
        )
    if criterion is not None:
        if method not in ("adalayer", "optimal"):
            raise PlanError(f"method {method!r} looks at no criterion, got {criterion!r}")
        if method == "adalayer" or criterion not in MEASURES:
            criterion_of(criterion)
    if method not in STAGE_METHODS and not (bits is None and stages is None):
        raise PlanError(
            f"method {method!r} takes no bits and stages; they are for methods "
            f"{', '.join(map(repr, STAGE_METHODS))}"
        )
    if options and method not in ("optimal", "rl"):
        raise PlanError(
            f"method {method!r} takes no options; they are for methods 'optimal' and 'rl'"
        )
    if method == "optimal":
        settings = settings_of(options, None)
        settings.check()
        if settings.latency_table is not None and budget is not None and not budget.timed:
            raise BudgetError(f"a latency table is for a budget of latency or loss, got {budget}")
    elif method == "rl":
        RLSettings.of(options)


def check_request(
    model: GraphModel,
    budget: Budget | None,
    *,
    method: str,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    activation_bits: int = 8,
    fixed: Mapping[str, Fixed] | None = None,
    exclude: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Problem:
    """What needs the captured model: names of layers, and whether any plan keeps the budget.

    Latencies, losses and the limits of method ``"adalayer"`` beyond the smallest size are known
    when they have been measured.

    Raises:
        PlanError: unknown layers or stages, or bits that do not fit.
        BudgetError: no plan is small enough; states the smallest reachable size.
        UnsupportedModelError: no layer can be quantized.
    """
    # Method "optimal" takes several limits, which only its own selection can judge.
    single = budget if budget is not None and budget.single else None
    problem = Problem(model, single, activation_bits, fixed=fixed, exclude=exclude)
    if method in STAGE_METHODS:
        stage_plan(problem, method, bits, stages)
    elif method == "optimal" and budget is not None:
        settings = settings_of(options, None)
        settings.input_widths_for(budget, activation_bits)
        reachable(problem, budget, settings)
    else:
        least = problem.uniform(MIN_BITS, 0.0 if method == "rl" else MAX_SPARSITY)
        if not problem.fits(least):
            why = " without pruning, which method 'rl' does not do" if method == "rl" else ""
            raise problem.impossible(problem.cost(least), why)
    return problem
