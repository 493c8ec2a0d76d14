"""Method "adalayer": equations (1)-(3) with their hyper-parameters searched under the budget.

Three steps. A grid over all hyper-parameters gives plans; duplicates and plans beyond the budget
go, and so do plans that leave much of it unused. A proxy ranks the rest: the squared weight error
of every layer, times the loss that one unit of such error cost when the layer was probed. The
best few are then tried on calibration data, and around the winner a finer grid is tried again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .._progress import ProgressBar
from ..errors import PlanError
from ..importance.analyze import dequantized
from ..importance.scores import LayerScores
from ..plan import Plan
from .closed_form import MAX_BITS, MIN_BITS, closed_form
from .evaluate import Evaluator, Measurement, best_of
from .problem import PERCENTS, Choice, Problem

__all__ = ["HYPER", "adalayer"]

HYPER = ("alpha", "beta", "gamma", "delta", "lambda", "bmax")

# (alpha, beta) of eq. (1). With alpha above 1 layers beyond a certain contribution are equally
# important (I is at most 1) and the differences between the others count more. (0, 0) treats all
# layers alike, which makes the uniform plans a part of the search.
_MIX = (
    (1.0, 0.0), (0.85, 0.15), (0.7, 0.3), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0),
    (1.5, 0.0), (2.5, 0.0), (4.0, 0.0), (8.0, 0.0), (0.0, 0.0),
)  # fmt: skip
_GAMMA = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)
_DELTA = (0.0, 0.15, 0.3, 0.6)
_LAMBDA = tuple(np.arange(0, 6.01, 0.5).tolist())
_BMAX = tuple(np.arange(2, 9.01, 0.25).tolist())

GOOD_USE = 0.93  # a plan that leaves more of the budget unused is only a last resort
RESORT = 64  # how many of the fullest plans to look at if none uses the budget well
REFINE = 8  # plans tried around the winner


@dataclass
class _Plans:
    """Distinct plans of a grid: bits and per cents ``[plans, layers]``, hyper ``[plans, 6]``."""

    bits: np.ndarray
    percent: np.ndarray
    hyper: np.ndarray
    cost: np.ndarray

    def take(self, rows: np.ndarray) -> _Plans:
        return _Plans(self.bits[rows], self.percent[rows], self.hyper[rows], self.cost[rows])


def adalayer(
    problem: Problem,
    scores: LayerScores,
    evaluator: Evaluator | None,
    *,
    hyper: Mapping[str, float] | None = None,
    candidates: int = 20,
    progress: bool = True,
) -> Plan:
    """Find the plan; ``hyper`` fixes some or all of alpha, beta, gamma, delta, lambda, bmax.

    Raises:
        BudgetError: nothing fits; states the smallest reachable size.
        PlanError: unknown hyper-parameter, or a layer without scores.
    """
    problem.check_scores(scores)
    fixed = _checked(hyper)
    names = problem.free
    a = np.array([scores[name].A for name in names])
    f = np.array([scores[name].F for name in names])
    r = np.array([scores[name].R for name in names])
    table, constant = problem.cost_table()
    errors = _error_table(problem, scores)

    def plans_of(grid: list[np.ndarray]) -> tuple[_Plans, float]:
        return _enumerate(grid, a, f, r, table, constant, problem.limit)

    plans, smallest = plans_of(_grid(fixed))
    if len(plans.cost) == 0:
        raise problem.impossible(smallest, " with these hyper-parameters" if fixed else "")
    limit = problem.limit if problem.limit is not None else float(plans.cost.max())
    used = plans.cost >= GOOD_USE * limit
    if used.any():
        plans = plans.take(np.flatnonzero(used))
    else:
        plans = plans.take(np.argsort(-plans.cost, kind="stable")[:RESORT])
    order = np.argsort(_proxy(plans, errors), kind="stable")
    tried = plans.take(_diverse(plans, order, candidates if evaluator is not None else 1))

    if evaluator is None or len(tried.cost) == 1:
        return _plan(problem, scores, tried, 0, None)
    title = "trying plans"
    total = len(tried.cost) + (REFINE if len(fixed) < len(HYPER) else 0)
    with ProgressBar(title, total, unit="plan", enabled=progress) as bar:
        measured: list[Measurement] = []
        _measure(problem, evaluator, tried, measured, bar)
        best = best_of(measured, evaluator.samples)
        if len(fixed) < len(HYPER):
            near, _ = plans_of(_around(tried.hyper[best], fixed))
            near = _without(near, tried)
            near = near.take(np.flatnonzero(near.cost >= GOOD_USE * tried.cost[best]))
            near = near.take(np.argsort(_proxy(near, errors), kind="stable")[:REFINE])
            _measure(problem, evaluator, near, measured, bar)
            tried = _Plans(
                *(
                    np.concatenate([getattr(tried, key), getattr(near, key)])
                    for key in ("bits", "percent", "hyper", "cost")
                )
            )
            best = best_of(measured, evaluator.samples)
    return _plan(problem, scores, tried, best, measured[best])


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
        steps("gamma", gamma, (0.03, 0.06), 0.95),
        steps("delta", delta, (0.05, 0.1), 2.0),
        steps("lambda", lam, (0.125, 0.25, 0.375), 8.0),
        steps("bmax", bmax, (0.0625, 0.125, 0.1875), 9.0),
    ]


def _enumerate(
    grid: list[np.ndarray],
    a: np.ndarray,
    f: np.ndarray,
    r: np.ndarray,
    table: np.ndarray,
    constant: float,
    limit: float | None,
) -> tuple[_Plans, float]:
    """Distinct plans of a grid within the limit, and the smallest cost of the whole grid."""
    mixes, gammas, deltas, lams, bmaxs = grid
    columns = np.arange(len(a))
    kept: list[_Plans] = []
    smallest = np.inf
    pruning = np.array(list(itertools.product(gammas, deltas)))
    widths = np.array(list(itertools.product(lams, bmaxs)))
    for alpha, beta in mixes:
        importance = np.minimum(1.0, alpha * a + beta * f)
        # Bits depend on (lambda, bmax) only and sparsity on (gamma, delta) only: each pair is
        # evaluated once, reduced to what is distinct, and then combined.
        bits, _ = closed_form(importance, r, 0.0, 0.0, widths[:, :1], widths[:, 1:])
        _, percent = closed_form(importance, r, pruning[:, :1], pruning[:, 1:], 0.0, 8.0)
        bits, width_rows = np.unique(bits, axis=0, return_index=True)
        percent, prune_rows = np.unique(percent, axis=0, return_index=True)
        for row, percents in enumerate(percent):
            cost = constant + table[columns, bits - MIN_BITS, percents].sum(axis=1)
            smallest = min(smallest, float(cost.min()))
            fit = np.flatnonzero(cost <= (np.inf if limit is None else limit + 1e-9))
            if len(fit) == 0:
                continue
            point = np.empty((len(fit), 6))
            point[:, 0], point[:, 1] = alpha, beta
            point[:, 2:4] = pruning[prune_rows[row]]
            point[:, 4:6] = widths[width_rows[fit]]
            kept.append(
                _Plans(bits[fit], np.broadcast_to(percents, (len(fit), len(a))), point, cost[fit])
            )
    if not kept:
        empty = np.empty((0, len(a)), dtype=np.int64)
        return _Plans(empty, empty, np.empty((0, 6)), np.empty(0)), smallest
    plans = _Plans(
        np.concatenate([k.bits for k in kept]),
        np.concatenate([k.percent for k in kept]),
        np.concatenate([k.hyper for k in kept]),
        np.concatenate([k.cost for k in kept]),
    )
    rows = np.concatenate([plans.bits, plans.percent], axis=1).astype(np.int8)
    _, first = np.unique(rows, axis=0, return_index=True)
    return plans.take(np.sort(first)), smallest


@torch.no_grad()
def _error_table(problem: Problem, scores: LayerScores) -> np.ndarray:
    """Estimated loss of free layer l at b bits and p per cent zeros, float64 ``[layers, 7, 96]``.

    Squared weight error: the pruned weights' energy, plus the rounding error of the dense layer
    on the share that is left. It is scaled so that the probe's error costs the probe's loss.
    """
    result = np.empty((len(problem.free), MAX_BITS - MIN_BITS + 1, PERCENTS))
    percents = np.arange(PERCENTS) / 100
    for row, name in enumerate(problem.free):
        weight = problem.layers[name].weight.detach().float()
        energy = weight.double().square().flatten().sort().values.cumsum(0)
        pruned = np.array([int(weight.numel() * p + 0.5) for p in percents])
        cut = np.zeros(PERCENTS)
        some = pruned > 0
        cut[some] = energy.cpu().numpy()[pruned[some] - 1]
        rounding = [
            float((weight - dequantized(weight, bits)).double().square().sum())
            for bits in range(MIN_BITS, MAX_BITS + 1)
        ]
        probe = rounding[scores.probe_bits - MIN_BITS]
        # A layer that showed no loss in a small sample is cheap, but never free.
        weighted = max(scores[name].A, 1e-3) / probe if probe > 0 else 0.0
        for column, error in enumerate(rounding):
            result[row, column] = weighted * (cut + error * (1 - percents))
    return result


def _proxy(plans: _Plans, errors: np.ndarray) -> np.ndarray:
    columns = np.arange(errors.shape[0])
    return errors[columns, plans.bits - MIN_BITS, plans.percent].sum(axis=1)


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
    return np.array(chosen)


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
        name: (int(plans.bits[row, column]), int(plans.percent[row, column]) / 100)
        for column, name in enumerate(problem.free)
    }


def _measure(
    problem: Problem,
    evaluator: Evaluator,
    plans: _Plans,
    measured: list[Measurement],
    bar: ProgressBar,
) -> None:
    try:
        for row in range(len(plans.cost)):
            measured.append(evaluator.measure(_choice(problem, plans, row)))
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
        plan.measured = measurement_dict(measurement)
    return plan


def measurement_dict(measurement: Measurement) -> dict[str, float]:
    """What a plan keeps of its measurement."""
    result = {"calibration_loss": measurement.loss}
    if not np.isnan(measurement.accuracy):
        result["calibration_accuracy"] = measurement.accuracy
    return result
