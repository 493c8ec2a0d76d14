"""Method "adalayer": equations (1)-(3) with their hyper-parameters searched under the budget.

Three steps. A grid over all hyper-parameters gives plans; duplicates and plans beyond the budget
go, and so do plans that leave much of it unused. Proxies rank the rest: the squared weight error
of every layer relative to the probe's, weighted by a power of A. The best few by each, and the
uniform plans, are then tried on calibration data, and around the best of them finer grids are
tried until nothing better comes, ranked by the proxy that has predicted best so far. Where plans
will be repaired, the best few and the best uniform ones are then repaired whole and compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._progress import ProgressBar
from ..errors import PlanError
from ..importance.analyze import dequantized
from ..importance.scores import LayerScores
from ..plan import MAX_BITS, MIN_BITS, Plan
from ..pruning.masks import magnitude_mask, pruned_count
from ..rounding import conv_form
from .closed_form import closed_form
from .evaluate import NEGLIGIBLE, Judge, Measurement, best_of, compared
from .options import Choice, Option, option_of
from .problem import PERCENTS, Problem
from .uniform import best_uniform_pairs, uniform_pairs

if TYPE_CHECKING:
    from .request import Request

__all__ = ["HYPER", "adalayer", "solve"]

HYPER = ("alpha", "beta", "gamma", "delta", "lambda", "bmax")

# (alpha, beta) of eq. (1). With alpha above 1 layers beyond a certain contribution are equally
# important (I is at most 1) and the differences between the others count more. (0, 0) treats all
# layers alike, which makes the uniform plans a part of the search.
_MIX = (
    (1.0, 0.0), (0.85, 0.15), (0.7, 0.3), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0),
    (1.5, 0.0), (2.5, 0.0), (4.0, 0.0), (8.0, 0.0), (0.0, 0.0),
)  # fmt: skip
_GAMMA = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.95)
_DELTA = (0.0, 0.15, 0.3, 0.6)
_LAMBDA = (*np.arange(0, 2, 0.25).tolist(), *np.arange(2, 6.01, 0.5).tolist())
_BMAX = tuple(np.arange(2, 9.01, 0.25).tolist())

GOOD_USE = 0.93  # plans that leave more of the budget unused are only a last resort
REPAIRED = 5  # so many of the best are repaired whole, beside uniform ones
RESORT = 64  # how many of the fullest plans to look at if none uses the budget well
ROUNDS = 3  # at most so many finer grids
REFINE = 8  # plans tried per finer grid
# Powers of A in the proxies. A's own scale exaggerates (a layer that is destroyed at 2 bits is not
# that much worse off at 4), no weight at all knows nothing; which is right depends on the model.
POWERS = (0.5, 0.0, 1.0)
# Weights per layer from which the error table is measured: whole channels, evenly spread.
SAMPLE = 1 << 16
SPARSITIES = (0, 20, 40, 60, 80, 95)  # per cents at which rounding is measured, between: linear


@dataclass
class _Plans:
    """Distinct plans of a grid: bits and per cents ``[plans, layers]``, hyper ``[plans, 6]``."""

    bits: np.ndarray
    percent: np.ndarray
    hyper: np.ndarray
    cost: np.ndarray

    def take(self, rows: np.ndarray) -> _Plans:
        return _Plans(self.bits[rows], self.percent[rows], self.hyper[rows], self.cost[rows])


def solve(request: Request) -> Plan:
    """The plan for a request."""
    if request.scores is None:
        raise PlanError("method 'adalayer' needs scores (from analyze)")
    return adalayer(
        request.problem,
        request.scores,
        request.evaluator,
        request.repaired_check,
        hyper=request.hyper,
        candidates=request.candidates,
        progress=request.progress,
    )


def adalayer(
    problem: Problem,
    scores: LayerScores,
    evaluator: Judge | None,
    repaired: Judge | None = None,
    *,
    hyper: Mapping[str, float] | None = None,
    candidates: int = 20,
    progress: bool = True,
) -> Plan:
    """Find the plan; ``hyper`` fixes some or all of alpha, beta, gamma, delta, lambda, bmax.

    ``repaired`` decides among the best few, see :class:`.repaired_check.RepairedCheck`.

    Raises:
        BudgetError: nothing fits; states the smallest reachable size.
        PlanError: unknown hyper-parameter, or a layer without scores.
    """
    problem.check_scores(scores)
    fixed = _checked(hyper)
    grids = _Grids(problem, scores)
    plans = _first_plans(problem, grids, fixed)
    tried = plans.take(
        _diverse(plans, grids.ranked(plans, POWERS), candidates if evaluator is not None else 1)
    )
    if evaluator is None:
        return _plan(problem, scores, tried, 0, None)

    searched = len(fixed) < len(HYPER) and len(plans.cost) > 1
    if not fixed and searched:  # layer-wise must not lose to uniform for want of trying it
        same = [grids.plans(grid)[0] for grid in _uniform_grids(problem)]
        tried = _joined([tried, *(_without(one, tried) for one in same)])
    total = len(tried.cost) + (ROUNDS * REFINE if searched else 0)
    with ProgressBar("trying plans", total, unit="plan", enabled=progress) as bar:
        measured: list[Measurement] = []
        _measure(problem, evaluator, tried, measured, bar)
        best = best_of(measured, evaluator.samples)
        for _ in range(ROUNDS if searched else 0):
            near = _finer(grids, fixed, tried, measured, best)
            if len(near.cost) == 0:
                break
            tried = _joined([tried, near])
            _measure(problem, evaluator, near, measured, bar)
            before, best = best, best_of(measured, evaluator.samples)
            if best == before:
                break
    if repaired is not None and searched and measured[best].loss > NEGLIGIBLE:
        alike = [] if fixed else best_uniform_pairs(problem, evaluator)
        return _repaired(problem, scores, tried, measured, alike, repaired, progress)
    plan = _plan(problem, scores, tried, best, measured[best])
    return _unrounded(problem, evaluator, plan) if searched and not fixed else plan


class _Grids:
    """Plans of grids of hyper-parameters, and how good proxies take them to be."""

    def __init__(self, problem: Problem, scores: LayerScores) -> None:
        names = problem.free
        self.problem = problem
        self.a = np.array([scores[name].A for name in names])
        self.f = np.array([scores[name].F for name in names])
        self.r = np.array([scores[name].R for name in names])
        self.costs = problem.cost_table()
        self.errors = _error_table(problem, scores)
        # No loss in a small sample is cheap, but never free.
        self.contribution = np.maximum(self.a, 1e-3)

    def plans(self, grid: list[np.ndarray]) -> tuple[_Plans, _Plans]:
        """See :func:`_enumerate`."""
        return _enumerate(self.problem, grid, self.a, self.f, self.r, self.costs)

    def proxy(self, plans: _Plans, power: float) -> np.ndarray:
        """Predicted harm of every plan, errors weighted by a power of A."""
        harm = self.errors[np.arange(len(self.a)), plans.bits - MIN_BITS, plans.percent]
        return np.asarray((harm * self.contribution**power).sum(axis=1))

    def ranked(self, plans: _Plans, powers: tuple[float, ...]) -> np.ndarray:
        """Rows of plans: the best by each proxy, then the second by each, and so on."""
        orders = [np.argsort(self.proxy(plans, power), kind="stable") for power in powers]
        return np.stack(orders, axis=1).ravel()


def _first_plans(problem: Problem, grids: _Grids, fixed: Mapping[str, float]) -> _Plans:
    """The plans of the whole grid that use the budget well; fuller ones, if none does."""
    plans, least = grids.plans(_grid(fixed))
    if len(plans.cost) == 0:
        smallest = problem.cost(_choice(problem, least, 0))
        raise problem.impossible(smallest, " with these hyper-parameters" if fixed else "")
    if not fixed and problem.fits(problem.uniform(MAX_BITS, 0.0)):
        # All weights at full width: nothing to trade, and the rest would be chosen by noise.
        eight = [np.array([[0.0, 0.0]]), *(np.array([v]) for v in (0, 0, 0, float(MAX_BITS)))]
        plans, _ = grids.plans(eight)
    fullest = float(plans.cost.max())
    limit = fullest if problem.limit is None else min(problem.limit, fullest)
    if (plans.cost >= GOOD_USE * limit).any():
        return plans.take(np.flatnonzero(plans.cost >= GOOD_USE * limit))
    return plans.take(np.argsort(-plans.cost, kind="stable")[:RESORT])


def _finer(
    grids: _Grids,
    fixed: Mapping[str, float],
    tried: _Plans,
    measured: list[Measurement],
    best: int,
) -> _Plans:
    """New plans around the two best ones, those first that the best proxy so far prefers."""
    second = min(
        (row for row in range(len(measured)) if row != best),
        key=lambda row: measured[row].loss,
        default=best,
    )
    around = [_around(tried.hyper[row], fixed) for row in (best, second)]
    near = _without(_joined([grids.plans(grid)[0] for grid in around]), tried)
    near = near.take(np.flatnonzero(near.cost >= GOOD_USE * tried.cost[best]))
    losses = [m.loss for m in measured]
    power = max(POWERS, key=lambda p: _rank_correlation(grids.proxy(tried, p), losses))
    return near.take(_diverse(near, grids.ranked(near, (power,)), REFINE))


def _repaired(
    problem: Problem,
    scores: LayerScores,
    tried: _Plans,
    measured: list[Measurement],
    alike: list[tuple[int, float]],
    judge: Judge,
    progress: bool,
) -> Plan:
    """The best of the plans that lost least, and of uniform ones ``(bits, sparsity)``."""
    order = np.argsort([m.loss for m in measured], kind="stable")
    rows = _diverse(tried, order, REPAIRED).tolist()
    choices = [_choice(problem, tried, row) for row in rows]
    choices += [problem.uniform(*pair) for pair in alike]
    best, found = compared(choices, judge, "comparing repaired plans", progress=progress)
    if best < len(rows):
        return _plan(problem, scores, tried, rows[best], found)
    bits, sparsity = alike[best - len(rows)]
    plan = problem.plan(choices[best], "adalayer", _alike(bits, sparsity), scores.as_dict(0.0, 0.0))
    plan.measured = found.as_dict()
    return plan


def _alike(bits: int, sparsity: float) -> dict[str, float]:
    """Hyper-parameters of a uniform plan."""
    return dict(zip(HYPER, (0.0, 0.0, sparsity, 0.0, 0.0, float(bits)), strict=True))


def _unrounded(problem: Problem, evaluator: Judge, plan: Plan) -> Plan:
    """A plan that treats all layers alike, with the sparsity of method ``"uniform"``.

    Eq. (2) has no reason to round gamma to whole per cents then: up to one per cent of the weights
    would be pruned for nothing.
    """
    if any(plan.hyper[name] for name in ("alpha", "beta", "delta", "lambda")):
        return plan
    choice = {name: option_of(plan[name], problem.activation_bits) for name in problem.free}
    for bits, sparsity in uniform_pairs(problem):
        rounded = np.ceil(round(100 * sparsity, 6)) / 100
        if choice == problem.uniform(bits, rounded) and sparsity < rounded:
            exact = problem.uniform(bits, sparsity)
            measurement = evaluator.measure(problem.full(exact))
            evaluator.save()
            if measurement.loss <= plan.measured["calibration_loss"]:
                hyper = {**plan.hyper, "gamma": sparsity}
                better = problem.plan(exact, "adalayer", hyper, plan.scores)
                better.measured = measurement.as_dict()
                return better
    return plan


def _checked(hyper: Mapping[str, float] | None) -> dict[str, float]:
    fixed = dict(hyper or {})
    for name, value in fixed.items():
        if name not in HYPER:
            raise PlanError(f"unknown hyper-parameter {name!r}: expected some of {HYPER}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise PlanError(f"hyper-parameter {name!r} must be a finite number, got {value!r}")
        if value < 0:
            raise PlanError(f"hyper-parameter {name!r} must not be negative, got {value!r}")
    return {name: float(value) for name, value in fixed.items()}


def _grid(fixed: Mapping[str, float]) -> list[np.ndarray]:
    """Mixes ``[m, 2]``, and the values of gamma, delta, lambda and bmax."""
    mixes = sorted({(fixed.get("alpha", m[0]), fixed.get("beta", m[1])) for m in _MIX})
    axes = (("gamma", _GAMMA), ("delta", _DELTA), ("lambda", _LAMBDA), ("bmax", _BMAX))
    return [
        np.array(mixes),
        *(np.array([fixed[name]] if name in fixed else values) for name, values in axes),
    ]


def _around(hyper: np.ndarray, fixed: Mapping[str, float]) -> list[np.ndarray]:
    """A finer grid around one point."""
    alpha, beta, gamma, delta, lam, bmax = hyper.tolist()
    mixes = []
    if alpha + beta == 0:  # from the uniform plan: let importance count a little
        mixes = [(0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (0.0, 0.5)]
    for step in (-0.1, -0.05, 0.0, 0.05, 0.1):
        if alpha > 1:
            mixes.append((alpha * (1 + 2 * step), beta))
        elif alpha + beta > 0:
            share = min(1.0, max(0.0, alpha + step))
            mixes.append((share, 1.0 - share))
        else:
            mixes.append((alpha, beta))
    mixes = sorted({(fixed.get("alpha", m[0]), fixed.get("beta", m[1])) for m in mixes})

    def steps(name: str, value: float, widths: tuple[float, ...], top: float) -> np.ndarray:
        if name in fixed:
            return np.array([fixed[name]])
        points = {value} | {value + w for w in widths} | {value - w for w in widths}
        return np.array(sorted(p for p in points if 0 <= p <= top))

    return [
        np.array(mixes),
        steps("gamma", gamma, (0.03, 0.06, 0.12), 0.95),
        steps("delta", delta, (0.05, 0.1), 2.0),
        steps("lambda", lam, (0.125, 0.25, 0.375), 8.0),
        steps("bmax", bmax, (0.0625, 0.125, 0.1875), 9.0),
    ]


def _uniform_grids(problem: Problem) -> list[list[np.ndarray]]:
    """Grids of one point each: the uniform candidates, as (alpha, beta) = (0, 0)."""
    grids = []
    for bits, sparsity in uniform_pairs(problem):
        point = (np.ceil(round(100 * sparsity, 6)) / 100, 0.0, 0.0, float(bits))
        grids.append([np.array([[0.0, 0.0]]), *(np.array([value]) for value in point)])
    return grids


def _enumerate(
    problem: Problem,
    grid: list[np.ndarray],
    a: np.ndarray,
    f: np.ndarray,
    r: np.ndarray,
    costs: tuple[np.ndarray, float, float],
) -> tuple[_Plans, _Plans]:
    """Distinct plans of a grid within the budget, and the one of least cost, within it or not."""
    mixes, gammas, deltas, lams, bmaxs = grid
    table, constant, slack = costs
    limit = np.inf if problem.limit is None else problem.limit + 1e-9
    columns = np.arange(len(a))
    pruning = np.array(list(itertools.product(gammas, deltas)), dtype=np.float64)
    widths = np.array(list(itertools.product(lams, bmaxs)), dtype=np.float64)
    kept: list[_Plans] = []
    least: _Plans | None = None
    for alpha, beta in mixes:
        importance = np.minimum(1.0, alpha * a + beta * f)
        # Bits depend on (lambda, bmax) only and sparsity on (gamma, delta) only: each pair is
        # evaluated once, reduced to what is distinct, and then combined.
        bits, _ = closed_form(importance, r, 0.0, 0.0, widths[:, :1], widths[:, 1:])
        _, percent = closed_form(importance, r, pruning[:, :1], pruning[:, 1:], 0.0, 8.0)
        bits, width_rows = np.unique(bits, axis=0, return_index=True)
        percent, prune_rows = np.unique(percent, axis=0, return_index=True)
        for row, asked in enumerate(percent):
            single = table[columns, bits - MIN_BITS, asked]
            # Pruning that saves nothing in its layer (the bitmask costs a bit per weight) only
            # loses accuracy: there P is 0.
            saves = single < table[columns, bits - MIN_BITS, 0]
            cost = constant + single.sum(axis=1)
            point = np.empty((len(bits), 6))
            point[:, 0], point[:, 1] = alpha, beta
            point[:, 2:4] = pruning[prune_rows[row]]
            point[:, 4:6] = widths[width_rows]
            plans = _Plans(bits, np.where(saves, asked, 0), point, cost)
            lowest = int(cost.argmin())
            if least is None or cost[lowest] < least.cost[0]:
                least = plans.take(np.array([lowest]))
            fit = np.flatnonzero(cost <= limit + slack)
            if len(fit):
                kept.append(plans.take(fit))
    assert least is not None
    if not kept:
        return least.take(np.empty(0, dtype=np.int64)), least
    plans = _joined(kept)
    # Where the bound cannot tell, the exact cost does.
    good = plans.cost <= limit
    for close in np.flatnonzero(~good).tolist():
        good[close] = problem.fits(_choice(problem, plans, close))
    return plans.take(np.flatnonzero(good)), least


def _joined(parts: list[_Plans]) -> _Plans:
    """All distinct plans of several sets; the first of equal ones stays."""
    plans = _Plans(
        *(
            np.concatenate([getattr(part, key) for part in parts])
            for key in ("bits", "percent", "hyper", "cost")
        )
    )
    rows = np.concatenate([plans.bits, plans.percent], axis=1).astype(np.int8)
    _, first = np.unique(rows, axis=0, return_index=True)
    return plans.take(np.sort(first))


@torch.no_grad()
def _error_table(problem: Problem, scores: LayerScores) -> np.ndarray:
    """Estimated harm to free layer l at b bits and p per cent zeros, float64 ``[layers, 7, 96]``.

    The squared weight error (pruned energy plus rounding of what is left) over the probe's.
    """
    result = np.empty((len(problem.free), MAX_BITS - MIN_BITS + 1, PERCENTS))
    percents = np.arange(PERCENTS)
    for row, name in enumerate(problem.free):
        layer = problem.layers[name]
        weight = conv_form(layer, layer.weight.detach().float())
        step = max(1, -(-weight.numel() // SAMPLE))
        weight = weight[::step]
        energy = np.concatenate(
            [[0.0], weight.double().square().flatten().sort().values.cumsum(0).cpu().numpy()]
        )
        cut = energy[[pruned_count(weight.numel(), p / 100) for p in percents]]
        rounding = np.empty((MAX_BITS - MIN_BITS + 1, len(SPARSITIES)))
        for column, percent in enumerate(SPARSITIES):
            mask = magnitude_mask(weight, percent / 100)
            for bits in range(MIN_BITS, MAX_BITS + 1):
                error = (weight * mask - dequantized(weight, bits, mask)).double().square().sum()
                rounding[bits - MIN_BITS, column] = float(error)
        probe = rounding[scores.probe_bits - MIN_BITS, 0]
        share = 1.0 / probe if probe > 0 else 0.0
        for column, errors in enumerate(rounding):
            result[row, column] = share * (cut + np.interp(percents, SPARSITIES, errors))
    return result


def _rank_correlation(predicted: np.ndarray, losses: list[float]) -> float:
    """Spearman's correlation, ties in order of appearance; 0 where there is nothing to compare."""
    if len(losses) < 3:
        return 0.0
    ranks = [np.argsort(np.argsort(v, kind="stable")) for v in (predicted, np.array(losses))]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _diverse(plans: _Plans, order: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` rows in ``order`` that differ from each other in some layers.

    Neighbours in the ranking often differ in one layer only; trying all of them would measure
    one idea many times.
    """
    distance = max(1, plans.bits.shape[1] // 8)
    chosen: list[int] = []
    for row in order.tolist():
        bits, percent = plans.bits[row], plans.percent[row]
        if all(
            ((plans.bits[c] != bits) | (abs(plans.percent[c] - percent) > 2)).sum() >= distance
            for c in chosen
        ):
            chosen.append(row)
            if len(chosen) == count:
                break
    return np.array(chosen, dtype=np.int64)


def _without(plans: _Plans, known: _Plans) -> _Plans:
    seen = {(b.tobytes(), p.tobytes()) for b, p in zip(known.bits, known.percent, strict=True)}
    rows = [
        row
        for row in range(len(plans.cost))
        if (plans.bits[row].tobytes(), plans.percent[row].tobytes()) not in seen
    ]
    return plans.take(np.array(rows, dtype=np.int64))


def _choice(problem: Problem, plans: _Plans, row: int) -> Choice:
    return {
        name: Option(int(plans.bits[row, column]), int(plans.percent[row, column]) / 100)
        for column, name in enumerate(problem.free)
    }


def _measure(
    problem: Problem,
    evaluator: Judge,
    plans: _Plans,
    measured: list[Measurement],
    bar: ProgressBar,
) -> None:
    try:
        for row in range(len(plans.cost)):
            measured.append(evaluator.measure(problem.full(_choice(problem, plans, row))))
            bar.advance(1, f"best loss {min(m.loss for m in measured):.4f}")
    finally:
        evaluator.save()


def _plan(
    problem: Problem,
    scores: LayerScores,
    plans: _Plans,
    row: int,
    measurement: Measurement | None,
) -> Plan:
    hyper = dict(zip(HYPER, plans.hyper[row].tolist(), strict=True))
    named = scores.as_dict(hyper["alpha"], hyper["beta"])
    plan = problem.plan(_choice(problem, plans, row), "adalayer", hyper, named)
    if measurement is not None:
        plan.measured = measurement.as_dict()
    return plan
