"""Method "optimal": tables of measured errors and latencies, an exact solver, and a check.

Four steps. The tables say what every width and sparsity of every layer costs in loss and, if the
budget limits it, in time. The multiple-choice knapsack over them gives a plan
(:mod:`~adalayer_native.allocation.knapsack`). Calibration data that the tables have not seen
check it, and plans around it (:mod:`~adalayer_native.allocation.local_search`), and at last a few
plans are repaired whole and compared (:mod:`~adalayer_native.allocation.finals`), those of the
closed form and the best uniform one among them (:mod:`~adalayer_native.allocation.rivals`). Where
the budget limits the latency, engines are compiled and timed on the way
(:mod:`~adalayer_native.allocation.clock`), unless the plan is for another machine, whose latencies
are in a file (:mod:`~adalayer_native.allocation.machine_table`). A budget of loss asks the other
way round (:mod:`~adalayer_native.allocation.fastest`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..importance.outputs import LossFn, Pick
from ..plan import Plan
from .budget import Budget
from .clock import EngineClock, kept, refused, settle
from .closed_form import MAX_BITS
from .evaluate import NEGLIGIBLE, Evaluator, Measurement
from .fastest import fastest
from .finals import finals
from .local_search import local_search
from .measuring import (
    Data,
    emptied,
    inputs_key,
    inputs_of,
    loader_of,
    measure_tables,
    repair_key,
    weights_of,
)
from .options import UNSTRUCTURED, Choice, Option
from .problem import Problem
from .repaired_check import RepairedCheck
from .resources import LOSS, resources
from .rivals import Predictor, rivals
from .selection import Selection, selection_of
from .settings import Settings

__all__ = ["optimal", "plan_of", "reachable"]

CLOCK_ROUNDS = 3  # searches, where the plan that a search ends with is slower than predicted


def optimal(
    problem: Problem,
    budget: Budget,
    calibration: Iterable[Any],
    settings: Settings,
    *,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    batches: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan; see :func:`~adalayer_native.allocation.allocate`.

    Raises:
        BudgetError: limits that cannot be kept; names those that bind and what is reachable.
        CalibrationError: unusable data, or an error that is not finite.
        PlanError: settings out of range.
    """
    settings.check()
    reachable(problem, budget, settings)
    data = Data.split(problem.model, calibration, loss_fn, batches, output)
    weight_of = weights_of(problem, data, settings, progress=progress)
    inputs = inputs_of(problem, data)
    tables = measure_tables(problem, budget, data, settings, weight_of, inputs, progress=progress)
    selection = selection_of(problem, budget, tables, settings)
    evaluator = None
    if settings.search_rounds > 0:
        evaluator = Evaluator(
            problem.model,
            loader_of(data.check),
            loss_fn,
            cache=cache,
            weight_of=weight_of,
            key=_evaluator_key(problem, budget, data, settings),
            output=output,
            inputs=inputs,
        )
    clock = None
    if budget.timed and settings.latency_table is None:
        clock = EngineClock(problem, data.table[0].x[:1], settings)
    kernels = tables.kernels if clock is None else clock.kernels
    if budget.loss is not None:
        found = fastest(selection, evaluator, clock)
        if evaluator is not None:
            evaluator.save()
        plan = plan_of(selection, found.columns, found.loss, clock, kernels)
        if found.usual is not None:
            plan.measured["calibration_loss of 8 bits"] = found.usual.loss
        if clock is not None:
            usual = selection.choice(selection.alike(Option(MAX_BITS)))
            plan.measured["measured latency of 8 bits"] = clock(usual)  # in turn with the plan
        return plan
    if clock is not None:
        columns: np.ndarray | None = settle(selection, clock)
    else:
        columns = selection.choose()
    if columns is None:
        raise selection.impossible()
    measurement = None
    for _ in range(CLOCK_ROUNDS):
        if evaluator is not None:
            work = sum(layer.macs for layer in tables.work.values())
            work *= sum(batch.count for batch in data.repair)
            columns, measurement, measure = _checked(
                selection, evaluator, data, settings, settings.finalists_for(work), progress
            )
            if clock is None and settings.compares_rivals:
                rival = _better(rivals(selection, tables), measure, measurement)
                if rival is not None:
                    return _rival_plan(selection, *rival)
        if clock is None or kept(selection, columns, clock):
            return plan_of(selection, columns, measurement, clock, kernels)
        columns = settle(selection, clock)
    assert clock is not None
    # Settled plans were timed; the checked ones around them turned out slower every time.
    if kept(selection, columns, clock):
        return plan_of(selection, columns, None, clock, kernels)
    raise refused(selection, clock(selection.choice(columns)))


def _evaluator_key(problem: Problem, budget: Budget, data: Data, settings: Settings) -> str:
    """What the weights and inputs of measured plans depend on besides the model."""
    key = repair_key(data, settings)
    if settings.input_widths_for(budget, problem.activation_bits):
        key += f" {json.dumps(inputs_key(problem, data))}"
    return key


def _checked(
    selection: Selection,
    evaluator: Evaluator,
    data: Data,
    settings: Settings,
    finalists: int,
    progress: bool,
) -> tuple[np.ndarray, Measurement, Callable[[Choice], Measurement]]:
    """The plan that is best on images that the tables have not seen, and what measures others."""
    columns, measurement = local_search(
        selection,
        evaluator,
        rounds=settings.search_rounds,
        trials=settings.search_trials,
        gain=settings.gain,
        progress=progress,
    )
    unsure = measurement.loss > NEGLIGIBLE
    if finalists > 1 and settings.weight_of == "repaired" and unsure:
        check = RepairedCheck(selection.problem, data, settings)
        columns, measurement = finals(
            selection,
            columns,
            lambda found: check.measure(selection.choice(found)),
            count=finalists,
            gain=settings.gain,
            progress=progress,
        )
        return columns, measurement, check.measure
    return columns, measurement, lambda choice: evaluator.measure(selection.problem.full(choice))


def _better(
    choices: Sequence[Choice], measure: Callable[[Choice], Measurement], than: Measurement
) -> tuple[Choice, Measurement] | None:
    """The best of some choices, if it loses less than a given one; both measured alike."""
    if than.loss <= NEGLIGIBLE:
        return None
    measured = [(choice, measure(choice)) for choice in choices]
    best = min(measured, key=lambda pair: pair[1].loss, default=None)
    return best if best is not None and best[1].loss < than.loss else None


def _rival_plan(selection: Selection, choice: Choice, measurement: Measurement) -> Plan:
    """The plan of another method that turned out to lose least."""
    predictor = Predictor(selection)
    scores = {name: {"E": predictor.error(name, option)} for name, option in choice.items()}
    plan = selection.problem.plan(choice, "optimal", {}, scores)
    plan.measured = measurement.as_dict()
    _compare_with_even(plan, selection)
    plan.measured["predicted_loss"] = predictor.measure(choice).loss
    return plan


def plan_of(
    selection: Selection,
    columns: np.ndarray,
    measurement: Measurement | None = None,
    clock: EngineClock | None = None,
    kernels: Callable[[Choice], dict[str, str]] | None = None,
) -> Plan:
    """A plan that says what its layers are predicted to lose (``E``) and what it costs.

    ``kernels`` knows what runs every layer of a choice.
    """
    problem = selection.problem
    chosen = selection.errors[np.arange(len(columns)), columns]
    scores = {n: {"E": float(e)} for n, e in zip(problem.free, chosen, strict=True)}
    plan = problem.plan(selection.choice(columns), "optimal", {}, scores)
    plan.measured = {} if measurement is None else measurement.as_dict()
    _compare_with_even(plan, selection)
    plan.measured["predicted_loss"] = selection.predicted(columns)
    for resource in selection.resources:
        if resource.name == LOSS:
            usual = resource.total(selection.alike(Option(MAX_BITS)))
            plan.measured["predicted_loss of 8 bits"] = usual
        elif resource.exact is None:
            plan.measured[f"predicted {resource.name}"] = resource.total(columns)
    choice = selection.choice(columns)
    if clock is not None:
        plan.measured["measured latency"] = clock(choice)
    if kernels is not None:
        for name, kernel in kernels(choice).items():
            plan[name].kernel = kernel
    return plan


def _compare_with_even(plan: Plan, selection: Selection) -> None:
    """Let a plan say what its layers would lose with its mean width: why some have more."""
    layers = [plan[name] for name in selection.problem.free]
    weights = sum(layer.params for layer in layers)
    mean = sum(layer.params * (layer.bits or 0) for layer in layers) / weights
    widths = {option.bits for option in selection.options if option.bits is not None}
    even = min(sorted(widths), key=lambda bits: abs(bits - mean))
    predictor = Predictor(selection)
    assert plan.scores is not None
    for layer in layers:
        found = predictor.error(layer.name, Option(even))
        if np.isfinite(found):
            plan.scores[layer.name]["E_even"] = found
    plan.measured["even_bits"] = float(even)


def reachable(problem: Problem, budget: Budget, settings: Settings) -> None:
    """Raise early, before anything is measured, where the file or the widths cannot be met.

    Raises:
        BudgetError: names the limits that bind and what is reachable.
    """
    early = {k: v for k, v in budget.given.items() if k in ("size", "bytes", "bits")}
    if not early:
        return
    options = [
        Option(bits, sparsity, pattern)
        for pattern in settings.patterns_for(budget)
        for bits in settings.widths
        for sparsity in settings.sparsities_of(pattern)
        if sparsity > 0 or pattern == UNSTRUCTURED
    ]
    part = Budget(**early)  # type: ignore[arg-type]
    found = resources(problem, part, options, {})
    errors = np.where(emptied(problem, options), np.nan, 0.0)
    selection = Selection(problem, part, found, options, errors)
    if selection.choose() is None:
        raise selection.impossible()
