"""Method "optimal": tables of measured errors and latencies, an exact solver, and a check.

Four steps. The tables say what every width and sparsity of every layer costs in loss and, if the
budget limits it, in time. The multiple-choice knapsack over them gives a plan (``knapsack.py``).
Calibration data that the tables have not seen check it, and plans around it (``local_search.py``),
and at last a few plans are repaired whole and compared (``repaired_plans.py``), those of the closed
form and the best uniform one among them (``other_methods.py``). Where the budget limits the
latency, engines are compiled and timed on the way (``clock.py``), unless the plan is for another
machine, whose latencies are in a file (``machine_table.py``). A budget of loss asks the other way
round (``fastest.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..importance.outputs import LossFn, Pick
from ..plan import MAX_BITS, Plan
from . import refusals
from .budget import Budget
from .clock import EngineClock, choose_by_clock, keeps_latency
from .evaluate import NEGLIGIBLE, Evaluator, Measurement
from .fastest import fastest
from .local_search import local_search
from .measured_tables import (
    Data,
    emptied,
    inputs_key,
    inputs_of,
    loader_of,
    measure_tables,
    repair_key,
    weights_of,
)
from .optimal_settings import Settings
from .options import UNSTRUCTURED, Choice, Option
from .other_methods import Predictor, best_of_other_methods
from .problem import Problem
from .repaired_check import RepairedCheck
from .repaired_plans import best_repaired
from .resources import LOSS, resources
from .selection import Selection, Tables, selection_of

if TYPE_CHECKING:
    from .request import Request

__all__ = ["check", "optimal", "plan_of", "solve"]

CLOCK_ROUNDS = 3  # searches, where the plan that a search ends with is slower than predicted


def solve(request: Request) -> Plan:
    """The plan for a request."""
    assert request.budget is not None  # checked with the method
    return optimal(
        request.problem,
        request.budget,
        request.check_data(),
        Settings.of(request.options, request.tables),
        loss_fn=request.loss_fn,
        output=request.output,
        batches=request.batches,
        cache=request.cache,
        progress=request.progress,
    )


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
    data = Data.split(problem.model, calibration, loss_fn, batches, output)
    weight_of = weights_of(problem, data, settings, progress=progress)
    inputs = inputs_of(problem, data)
    tables = measure_tables(problem, budget, data, settings, weight_of, inputs, progress=progress)
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
    search = _Search(
        selection=selection_of(problem, budget, tables, settings),
        tables=tables,
        data=data,
        settings=settings,
        evaluator=evaluator,
        clock=clock,
        kernels=tables.kernels if clock is None else clock.kernels,
        progress=progress,
    )
    return search.least_loss() if budget.loss is None else search.least_latency()


@dataclass
class _Search:
    """Everything that is measured, and the plans that come of it.

    Attributes:
        evaluator: measures plans on images that the tables have not seen; ``None``: predictions
            stand.
        clock: times engines; ``None``: nothing limits the latency, or it is another machine's.
        kernels: what ran every layer of a choice.
    """

    selection: Selection
    tables: Tables
    data: Data
    settings: Settings
    evaluator: Evaluator | None
    clock: EngineClock | None
    kernels: Callable[[Choice], dict[str, str]] | None
    progress: bool

    def least_latency(self) -> Plan:
        """The fastest plan within the limit of the loss."""
        found = fastest(self.selection, self.evaluator, self.clock)
        if self.evaluator is not None:
            self.evaluator.save()
        plan = self._plan(found.columns, found.loss)
        if found.usual is not None:
            plan.measured["calibration_loss of 8 bits"] = found.usual.loss
        if self.clock is not None:
            usual = self.selection.choice(self.selection.alike(Option(MAX_BITS)))
            plan.measured["measured latency of 8 bits"] = self.clock(usual)  # in turn with the plan
        return plan

    def least_loss(self) -> Plan:
        """The plan that loses least within all limits."""
        selection, clock = self.selection, self.clock
        if clock is not None:
            columns: np.ndarray | None = choose_by_clock(selection, clock)
        else:
            columns = selection.choose()
        if columns is None:
            raise selection.impossible()
        measurement = None
        for _ in range(CLOCK_ROUNDS):
            if self.evaluator is not None:
                columns, measurement, measure = self._checked(self.evaluator)
                if clock is None and self.settings.compares_other_methods:
                    others = best_of_other_methods(selection, self.tables)
                    better = _better(others, measure, measurement)
                    if better is not None:
                        return self._plan_of_another_method(*better)
            if clock is None or keeps_latency(selection, columns, clock):
                return self._plan(columns, measurement)
            columns = choose_by_clock(selection, clock)
        assert clock is not None
        # These were timed; the checked ones around them turned out slower every time.
        if keeps_latency(selection, columns, clock):
            return self._plan(columns)
        raise refusals.engines_too_slow(selection.budget, clock(selection.choice(columns)))

    def _plan(self, columns: np.ndarray, measurement: Measurement | None = None) -> Plan:
        return plan_of(self.selection, columns, measurement, self.clock, self.kernels)

    def _checked(
        self, evaluator: Evaluator
    ) -> tuple[np.ndarray, Measurement, Callable[[Choice], Measurement]]:
        """The best plan on images that the tables have not seen, and what measures others."""
        selection, settings = self.selection, self.settings
        work = sum(layer.macs for layer in self.tables.work.values())
        work *= sum(batch.count for batch in self.data.repair)
        count = settings.repaired_plans_for(work)
        columns, measurement = local_search(
            selection,
            evaluator,
            rounds=settings.search_rounds,
            trials=settings.search_trials,
            gain=settings.gain,
            progress=self.progress,
        )
        unsure = measurement.loss > NEGLIGIBLE
        if count > 1 and settings.weight_of == "repaired" and unsure:
            check = RepairedCheck(selection.problem, self.data, settings)
            columns, measurement = best_repaired(
                selection,
                columns,
                lambda found: check.measure(selection.choice(found)),
                count=count,
                gain=settings.gain,
                progress=self.progress,
            )
            return columns, measurement, check.measure
        full = selection.problem.full
        return columns, measurement, lambda choice: evaluator.measure(full(choice))

    def _plan_of_another_method(self, choice: Choice, measurement: Measurement) -> Plan:
        """The plan of another method that turned out to lose least."""
        predictor = Predictor(self.selection)
        scores = {name: {"E": predictor.error(name, option)} for name, option in choice.items()}
        plan = self.selection.problem.plan(choice, "optimal", {}, scores)
        plan.measured = measurement.as_dict()
        _compare_with_even(plan, self.selection)
        plan.measured["predicted_loss"] = predictor.measure(choice).loss
        return plan


def _evaluator_key(problem: Problem, budget: Budget, data: Data, settings: Settings) -> str:
    """What the weights and inputs of measured plans depend on besides the model."""
    key = repair_key(data, settings)
    if settings.input_widths_for(budget, problem.activation_bits):
        key += f" {json.dumps(inputs_key(problem, data))}"
    return key


def _better(
    choices: Sequence[Choice], measure: Callable[[Choice], Measurement], than: Measurement
) -> tuple[Choice, Measurement] | None:
    """The best of some choices, if it loses less than a given one; both measured alike."""
    if than.loss <= NEGLIGIBLE:
        return None
    measured = [(choice, measure(choice)) for choice in choices]
    best = min(measured, key=lambda pair: pair[1].loss, default=None)
    return best if best is not None and best[1].loss < than.loss else None


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


def check(request: Request) -> None:
    """Raise early, before anything is measured, where the file or the widths cannot be met.

    Raises:
        BudgetError: names the limits that bind and what is reachable.
        PlanError: settings that do not fit the request.
    """
    problem, budget = request.problem, request.budget
    assert budget is not None  # checked with the method
    settings = Settings.of(request.options)
    settings.input_widths_for(budget, problem.activation_bits)
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
