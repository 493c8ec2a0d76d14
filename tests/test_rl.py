"""Method "rl": within the budget, repeatable, near the best plan where all can be tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers_models import batches, tiny

from adalayer_native.allocation import Budget, allocate, estimate_bytes
from adalayer_native.allocation.evaluate import Evaluator
from adalayer_native.errors import BudgetError, CalibrationError, PlanError


def search(budget: Budget, **more):
    options = {"episodes": more.pop("episodes", 60), **more.pop("options", {})}
    return allocate(
        None, budget, method="rl", model=tiny(), calibration=batches(2), options=options,
        progress=False, **more,
    )  # fmt: skip


def test_near_the_best_of_all_plans() -> None:
    budget = Budget(bits=4)
    plan = search(budget, episodes=120)
    evaluator = Evaluator(tiny(), batches(2))
    counts = {name: plan[name].params for name in plan}
    room = 4 * sum(counts.values())
    losses = []
    for widths in itertools.product(range(2, 9), repeat=3):
        choice = dict(zip(counts, widths, strict=True))
        if sum(counts[name] * bits for name, bits in choice.items()) <= room:
            losses.append(evaluator.measure({n: (b, 0.0) for n, b in choice.items()}).loss)
    losses.sort()
    found = plan.measured["calibration_loss"]
    assert found == pytest.approx(
        evaluator.measure({n: (e.bits, 0.0) for n, e in plan.layers.items()}).loss, rel=1e-5
    )
    uniform = evaluator.measure(dict.fromkeys(counts, (4, 0.0))).loss
    assert found <= uniform * (1 + 1e-5)  # the first plan that is tried
    # Of all plans within the budget, among the best tenth, having measured fewer than half.
    assert plan.measured["plans_tried"] < 0.5 * len(losses)
    assert found <= losses[len(losses) // 10]
    assert all(layer.sparsity == 0 for layer in plan.layers.values())


def test_the_budget_is_kept_and_the_seed_decides() -> None:
    budget, model, data = Budget(bytes=2600), tiny(), batches(2)
    before = torch.get_rng_state()
    plans = [
        allocate(
            None, budget, method="rl", model=model, calibration=data, progress=False,
            options={"episodes": 60, "seed": seed},
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers are untouched
    assert plans[0] == plans[1]
    assert plans[0].hyper["seed"] == 0 and plans[2].hyper["seed"] == 1
    for plan in plans:
        assert estimate_bytes(tiny(), plan) <= 2600
        assert plan.method == "rl"


def test_fixed_and_excluded_layers_stay() -> None:
    plan = search(Budget(bits=9), fixed={"conv1": 6}, exclude=["fc"], episodes=5)
    assert plan["conv1"].bits == 6 and plan["fc"].bits is None


def test_bad_input() -> None:
    with pytest.raises(BudgetError, match=r"without pruning, which method 'rl' does not do"):
        search(Budget(bits=1.5))
    with pytest.raises(BudgetError, match="takes one limit"):
        search(Budget(bits=4, size=0.5))
    with pytest.raises(PlanError, match="unknown options"):
        search(Budget(bits=4), options={"rounds": 3})
    with pytest.raises(PlanError, match="at least 1"):
        search(Budget(bits=4), episodes=0)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        allocate(None, Budget(bits=4), method="rl", model=tiny(), progress=False)
    with pytest.raises(BudgetError, match="needs a budget"):
        allocate(None, None, method="rl", model=tiny(), calibration=batches(), progress=False)
