"""Methods "uniform" and "adalayer" where a repair follows: plans are compared as they will be."""

from __future__ import annotations

import json

import pytest
from helpers_models import batches, uneven

import adalayer_native as ada
from adalayer_native.allocation import Budget, allocate, estimate_bytes
from adalayer_native.allocation.adalayer import adalayer
from adalayer_native.allocation.evaluate import Evaluator, Measurement
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.repaired import RepairedWeights
from adalayer_native.plan import Plan

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model():
    return uneven()


def negligible(monkeypatch, loss: float) -> None:
    """Losses from here on are worth the last comparison."""
    for module in ("uniform", "adalayer"):
        monkeypatch.setattr(f"adalayer_native.allocation.{module}.NEGLIGIBLE", loss)


@pytest.mark.parametrize("method", ["uniform", "adalayer"])
def test_other_methods_compare_plans_with_repaired_weights_if_asked(
    model, method, tmp_path, monkeypatch
):
    negligible(monkeypatch, float("inf"))  # without the last comparison
    data = batches(2, 24)
    scores = ada.analyze(model, data, progress=False)

    def plan(**options) -> Plan:
        return allocate(
            scores, Budget(bytes=1700), method=method, model=model, calibration=data,
            cache=tmp_path / "search.json", fixed={"fc": 4}, progress=False, **options,
        )  # fmt: skip

    plain, repaired = plan(), plan(repaired=True)
    assert plain == plan()  # the cache does not mix them up
    weights = RepairedWeights(model, data, list(repaired.layers), progress=False)
    evaluator = Evaluator(model, data, weight_of=weights)

    def loss(which: Plan) -> float:
        choice = {n: (e.bits, e.sparsity) for n, e in which.layers.items()}
        return evaluator.measure(choice).loss

    assert repaired.measured["calibration_loss"] == pytest.approx(loss(repaired), rel=1e-3)
    # A part of the images only judges the weights, whose loss is measured on all of them here.
    assert loss(repaired) < 1.05 * plain.measured["calibration_loss"]


def test_other_methods_repair_their_last_plans_whole_and_compare_them(model, tmp_path, monkeypatch):
    negligible(monkeypatch, 0.0)
    data = batches(2, 24)
    scores = ada.analyze(model, data, progress=False)
    found: dict[str, Plan] = {}
    for method in ("uniform", "adalayer"):
        found[method] = allocate(
            scores, Budget(bytes=1700), method=method, model=model, calibration=data,
            repaired=True, tables=tmp_path / "tables", progress=False,
        )  # fmt: skip
        assert estimate_bytes(model, found[method]) <= 1700
    (kept,) = (json.loads(f.read_text()) for f in (tmp_path / "tables").iterdir())
    losses = {k[5:]: v for k, v in kept["values"].items() if k.startswith("loss ")}
    for plan in found.values():
        name = json.dumps([[n, e.bits, round(e.sparsity, 6)] for n, e in plan.layers.items()])
        assert plan.measured["calibration_loss"] == losses[name]
    # The closed form's search has the uniform plans among its last ones.
    assert found["adalayer"].measured["calibration_loss"] == min(losses.values())
    assert len(losses) > 4
    # One image can be repaired with or measured on.
    one = [(x[:1], y[:1]) for x, y in data[:1]]
    allocate(
        scores, Budget(bytes=1700), method="uniform", model=model, calibration=one,
        repaired=True, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("best", ["searched", "alike"])
def test_the_closed_form_takes_whichever_plan_loses_least(model, best, monkeypatch) -> None:
    negligible(monkeypatch, 0.0)
    data = batches(2, 24)
    scores = ada.analyze(model, data, progress=False)
    problem = Problem(model, Budget(bytes=1700))
    evaluator, seen = Evaluator(model, data), []

    class Final:
        samples = 1

        def measure(self, layers) -> Measurement:
            alike = len({tuple(option) for option in layers.values()}) == 1
            seen.append((dict(layers), alike))
            # What was measured later loses less, among those that may win.
            wins = alike == (best == "alike")
            return Measurement(1.0 / len(seen) if wins else 2.0, float("nan"))

        def save(self) -> None:
            pass

    plan = adalayer(problem, scores, evaluator, Final(), progress=False)
    choice = {n: Option(e.bits, e.sparsity, e.pattern) for n, e in plan.layers.items()}
    assert choice == [layers for layers, alike in seen if alike == (best == "alike")][-1]
    if best == "alike":
        assert plan.hyper["alpha"] == plan.hyper["beta"] == 0
        assert {(e.bits, e.sparsity) for e in plan.layers.values()} == {
            (plan.hyper["bmax"], plan.hyper["gamma"])
        }
