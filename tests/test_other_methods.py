"""Method "optimal" never does worse than the plans that it is compared with."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_models import batches, tiny

from adalayer_native.allocation import Budget, Settings, allocate, estimate_bytes
from adalayer_native.allocation import optimal as method
from adalayer_native.allocation.evaluate import Evaluator, Measurement
from adalayer_native.allocation.measured_tables import Data, loader_of, measure_tables
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.other_methods import Predictor, best_of_other_methods, table_scores
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.selection import selection_of
from adalayer_native.allocation.uniform import uniform_pairs
from adalayer_native.importance import analyze

pytestmark = pytest.mark.usefixtures("own_cache")

SETTINGS = {"widths": (2, 4, 8), "sparsities": (0.0, 0.6), "weight_of": "rounded"}


@pytest.fixture(scope="module")
def model():
    return tiny()


def known(model, budget: Budget):
    problem, settings = Problem(model, None), Settings(**SETTINGS, interactions=False)
    data = Data.split(model, batches(2, 24), None, None)
    tables = measure_tables(problem, budget, data, settings, progress=False)
    return selection_of(problem, budget, tables, settings), tables, data


def test_predictions_are_the_table_and_between_its_options(model) -> None:
    selection, _, _ = known(model, Budget(bytes=2000))
    predictor = Predictor(selection)
    for name, row in predictor.rows.items():
        for column, option in enumerate(selection.options):
            if selection.offered[row, column]:
                expected = max(selection.errors[row, column], 1e-12)
                assert predictor.error(name, option) == pytest.approx(expected)
        ends = [predictor.error(name, Option(8, s)) for s in (0.35, 0.36, 0.4)]
        assert ends == sorted(ends)
        assert predictor.error(name, Option(8, 0.9)) == predictor.error(name, Option(8, 0.6))
        assert predictor.error(name, Option(5)) == np.inf  # no such width
    choice = selection.problem.uniform(4, 0.0)
    total = sum(predictor.error(n, o) for n, o in choice.items())
    assert predictor.measure(choice).loss == pytest.approx(total)


def test_scores_of_the_tables_are_those_of_an_analysis_of_the_same_loss(model) -> None:
    _, tables, data = known(model, Budget(bytes=2000))
    scores = table_scores(Problem(model, None), tables)
    assert scores is not None
    real = analyze(model, [b.x for b in data.table], progress=False)
    for name in real:
        assert pytest.approx(real[name].F) == scores[name].F
        assert pytest.approx(real[name].R) == scores[name].R
    order = [max(scores, key=lambda n: s[n].A) for s in (scores, real)]
    assert order[0] == order[1] and scores[order[0]].A == 1.0


@pytest.mark.parametrize("budget", [Budget(bytes=1900), Budget(bits=2.5), Budget(size=0.4)])
def test_other_methods_keep_the_budget_and_are_their_best(model, budget: Budget) -> None:
    selection, tables, _ = known(model, budget)
    found = best_of_other_methods(selection, tables)
    assert 1 <= len(found) <= 2
    limited = selection.problem.limited(budget)
    assert all(limited.fits(choice) for choice in found)
    alike = found[0]
    assert len(set(alike.values())) == 1
    predictor = Predictor(selection)
    losses = [predictor.measure(limited.uniform(*pair)).loss for pair in uniform_pairs(limited)]
    assert predictor.measure(alike).loss == min(losses)
    # The uniform plans are plans of the closed form, too.
    assert predictor.measure(found[-1]).loss <= min(losses) * (1 + 1e-9)


def test_no_plans_where_the_other_methods_take_no_such_budget(model) -> None:
    selection, tables, _ = known(model, Budget(bytes=2000, bits=4))
    assert best_of_other_methods(selection, tables) == []


@pytest.mark.parametrize("weights", ["rounded", "repaired"])
def test_a_better_plan_of_another_method_is_taken(model, monkeypatch, weights: str) -> None:
    budget = Budget(bytes=2000)
    options = {**SETTINGS, "weight_of": weights, "rounds": 1, "trials": 1, "repaired_plans": 2}
    monkeypatch.setattr(method, "NEGLIGIBLE", 0.0)

    def plan(**more):
        return allocate(
            None, budget, method="optimal", model=model, calibration=batches(2, 24),
            options={**options, **more}, progress=False,
        )  # fmt: skip

    alone = plan(other_methods=False)
    best = {"conv1": Option(8), "conv2": Option(2), "fc": Option(8)}
    monkeypatch.setattr(method, "best_of_other_methods", lambda *_: [best])
    found = plan()
    data = Data.split(model, batches(2, 24), None, None)
    if weights == "rounded":
        judge = Evaluator(model, loader_of(data.check))
        other = judge.measure(best).loss
        assert found.measured["calibration_loss"] == pytest.approx(
            min(other, alone.measured["calibration_loss"])
        )
    assert found.measured["calibration_loss"] <= alone.measured["calibration_loss"]
    # And where it is the best by far, it is what comes out, with errors for the table.
    lucky = lambda *_: (best, Measurement(1e-6, 1.0))  # noqa: E731
    monkeypatch.setattr(method, "_better", lucky)
    taken = plan()
    assert {n: Option(e.bits, e.sparsity, e.pattern) for n, e in taken.layers.items()} == best
    assert taken.method == "optimal" and set(taken.scores["fc"]) == {"E", "E_even"}
    assert taken.measured["calibration_loss"] == 1e-6
    assert estimate_bytes(model, taken) > 0
