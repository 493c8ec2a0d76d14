"""Method "uniform": the same bits and the same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from .._progress import ProgressBar
from ..plan import MAX_BITS, MIN_BITS, Plan
from ..rounding import weight_range
from .budget import Budget
from .closed_form import MAX_SPARSITY
from .evaluate import NEGLIGIBLE, Judge, best_of, compared
from .problem import Fixed, Problem

if TYPE_CHECKING:
    from .request import Request

__all__ = [
    "best_uniform_pairs",
    "everywhere",
    "solve",
    "uniform",
    "uniform_pairs",
    "uniform_sparsities",
]

STEPS = 1000  # sparsity in thousandths
REPAIRED = 4  # so many of the candidates are repaired whole


def solve(request: Request) -> Plan:
    """The plan for a request."""
    judges = request.evaluator, request.repaired_check
    return uniform(request.problem, *judges, progress=request.progress)


def uniform(
    problem: Problem,
    evaluator: Judge | None,
    repaired: Judge | None = None,
    *,
    progress: bool = True,
) -> Plan:
    """The best uniform plan within the budget.

    Candidates are the widest bits that fit unpruned, and every greater width with the least
    pruning that makes it fit; the one that does best on calibration data is taken (without
    data, the unpruned one). ``repaired`` decides among the best few, if given. A whole number of
    average bits goes to every layer as it is.

    Raises:
        BudgetError: nothing fits; states the smallest reachable size.
    """
    pairs = uniform_pairs(problem)
    if not pairs:
        raise problem.impossible(problem.cost(problem.uniform(MIN_BITS, MAX_SPARSITY)))
    best, measured = 0, []
    if evaluator is not None:
        with ProgressBar("trying plans", len(pairs), unit="plan", enabled=progress) as bar:
            try:
                for bits, sparsity in pairs:
                    measured.append(
                        evaluator.measure(problem.full(problem.uniform(bits, sparsity)))
                    )
                    bar.advance()
            finally:
                evaluator.save()
        best = best_of(measured, evaluator.samples)
        if repaired is not None and len(pairs) > 1 and measured[best].loss > NEGLIGIBLE:
            few = best_uniform_pairs(problem, evaluator)
            choices = [problem.uniform(*pair) for pair in few]
            row, found = compared(choices, repaired, "comparing repaired plans", progress=progress)
            best = pairs.index(few[row])
            measured[best] = found
    bits, sparsity = pairs[best]
    plan = problem.plan(
        problem.uniform(bits, sparsity), "uniform", {"bits": float(bits), "sparsity": sparsity}
    )
    if measured:
        plan.measured = measured[best].as_dict()
    return plan


def everywhere(
    model: nn.Module,
    bits: int,
    *,
    activation_bits: int = 8,
    fixed: Mapping[str, Fixed] | None = None,
    exclude: Iterable[str] = (),
) -> Plan:
    """So many bits in every layer that can be quantized, nothing pruned; the others stay float.

    Args:
        model: float model.
        bits: 2 to 8.
        activation_bits: of every layer's input.
        fixed: layers that get something else, as for :func:`~adalayer_native.allocation.allocate`.
        exclude: layers, or modules with all their layers, that stay float.

    Raises:
        PlanError: bits out of range, or unknown layers.
        UnsupportedModelError: no layer can be quantized.
    """
    weight_range(bits)
    problem = Problem(model, None, activation_bits, fixed=fixed, exclude=exclude)
    return problem.plan(problem.uniform(bits, 0.0), "uniform", {"bits": float(bits)})


def best_uniform_pairs(problem: Problem, evaluator: Judge) -> list[tuple[int, float]]:
    """The few candidates of :func:`uniform` that lose least, as ``(bits, sparsity)``."""

    def loss(pair: tuple[int, float]) -> float:
        return evaluator.measure(problem.full(problem.uniform(*pair))).loss

    found = sorted(uniform_pairs(problem), key=loss)[:REPAIRED]
    evaluator.save()
    return found


def uniform_pairs(problem: Problem) -> list[tuple[int, float]]:
    """The candidates of :func:`uniform` as ``(bits, sparsity)``; empty if nothing fits."""
    budget = problem.budget
    pairs: list[tuple[int, float]] = []
    whole = budget is not None and budget.bits is not None and budget.bits in range(2, 9)
    if whole and len(problem.free) == len(problem.layers):
        assert budget is not None and budget.bits is not None
        pairs = [(int(budget.bits), 0.0)]
    else:
        for bits in range(MIN_BITS, MAX_BITS + 1):
            if problem.fits(problem.uniform(bits, 0.0)):
                pairs = [(bits, 0.0)]  # wider and unpruned is better than narrower
                continue
            sparsity = _least_sparsity(problem, bits)
            if sparsity is not None:
                pairs.append((bits, sparsity))
    return pairs


def uniform_sparsities(problem: Problem, budget: Budget) -> list[float]:
    """The least sparsities, in thousandths, at which each width keeps a budget in all layers.

    Nothing for budgets that method ``"uniform"`` does not take.
    """
    if not budget.single:
        return []
    limited = problem.limited(budget)
    return sorted({sparsity for _, sparsity in uniform_pairs(limited)} - {0.0})


def _least_sparsity(problem: Problem, bits: int) -> float | None:
    """Smallest sparsity in thousandths at which ``bits`` fit; cost never grows with sparsity."""
    low, high = 0, round(STEPS * MAX_SPARSITY)
    if not problem.fits(problem.uniform(bits, high / STEPS)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if problem.fits(problem.uniform(bits, middle / STEPS)):
            high = middle
        else:
            low = middle
    return high / STEPS
