"""What the closed form and the uniform plans would do under the same budget.

Whoever decides layer by layer shall not lose to them: their best plans take part in the last
comparison of method ``"optimal"``. Which plans are their best, the tables say; that costs no
measurement, and they are measured as every other plan is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import BudgetError
from ..importance.analyze import normalise, variance_of
from ..importance.scores import LayerScore, LayerScores
from ..plan import layer_kind
from .adalayer import adalayer
from .evaluate import Measurement
from .options import Choice, Choices, Option, option_of
from .problem import Problem
from .selection import Selection, Tables
from .uniform import uniform

__all__ = ["Predictor", "best_of_other_methods", "table_scores"]

_LEAST = 1e-12  # nats: what stands for an error of nothing in a logarithm
CANDIDATES = 60  # plans of the closed form that are looked at first


class Predictor:
    """Predicts a plan's loss from the error table, at any sparsity; measures nothing.

    Between the options of a table errors are interpolated in the logarithm, and beyond the last one
    they stay as they are.

    Args:
        selection: options and errors.
    """

    samples = 1

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.rows = {name: row for row, name in enumerate(selection.problem.free)}
        self.columns: dict[tuple[int | None, str, int | None], list[int]] = {}
        order = sorted(range(len(selection.options)), key=lambda k: selection.options[k].sparsity)
        for column in order:
            option = selection.options[column]
            self.columns.setdefault(_kind(option), []).append(column)

    def error(self, name: str, option: Option) -> float:
        """Predicted loss increase by one layer."""
        row = self.rows[name]
        offered = self.selection.offered[row]
        columns = [c for c in self.columns.get(_kind(option), []) if offered[c]]
        if not columns:
            return float("inf")
        sparsities = [self.selection.options[c].sparsity for c in columns]
        errors = np.log(np.maximum(self.selection.errors[row, columns], _LEAST))
        return float(np.exp(np.interp(option.sparsity, sparsities, errors)))

    def measure(self, layers: Choices) -> Measurement:
        """The sum over all layers that are decided here."""
        found = [self.error(n, Option(*o)) for n, o in layers.items() if n in self.rows]
        return Measurement(float(sum(found)), float("nan"))

    def save(self) -> None:
        """Nothing is kept."""


def _kind(option: Option) -> tuple[int | None, str, int | None]:
    """What options differ in besides their sparsity."""
    return option.bits, option.pattern, option.activation_bits


def table_scores(problem: Problem, tables: Tables) -> LayerScores | None:
    """A, F and R of eq. (1) from what the tables know: A at their smallest width, unpruned."""
    errors = tables.errors
    bits = min(errors.bits)
    values: Mapping[str, float] = {n: errors.value(n, bits) for n in problem.free}
    layers = {
        name: LayerScore(
            name=name,
            kind=layer_kind(problem.layers[name]),
            params=problem.layers[name].weight.numel(),
            flops=2.0 * tables.work[name].macs,
            raw=values[name],
            variance=variance_of(problem.layers[name].weight),
            criteria={"accuracy": values[name]},
        )
        for name in problem.free
    }
    if not all(np.isfinite(value) for value in values.values()):
        return None
    scores = LayerScores(layers, probe_bits=bits, samples=1)
    normalise(scores)
    return scores


def best_of_other_methods(selection: Selection, tables: Tables) -> list[Choice]:
    """The best plans of methods ``"uniform"`` and ``"adalayer"``, as far as the tables know.

    None for budgets that those methods do not take.
    """
    if not selection.budget.single:
        return []
    problem = selection.problem.limited(selection.budget)
    predictor = Predictor(selection)
    found: list[Choice] = []
    scores = table_scores(problem, tables)
    try:
        plans = [uniform(problem, predictor, progress=False)]
        if scores is not None:
            plans.append(
                adalayer(problem, scores, predictor, candidates=CANDIDATES, progress=False)
            )
    except BudgetError:  # nothing of theirs fits; the solver's plan does
        return found
    for plan in plans:
        choice = {name: option_of(plan[name], problem.activation_bits) for name in problem.free}
        if choice not in found:
            found.append(choice)
    return found
