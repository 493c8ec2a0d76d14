"""The registry of allocation methods: what each needs, and what it refuses."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_models import batches, tiny

import adalayer_native as ada
from adalayer_native.allocation import Settings
from adalayer_native.allocation.methods import METHODS, REGISTRY, method_of
from adalayer_native.allocation.problem import Problem

PACKAGE = Path(ada.__file__).parent
FEW = {
    "optimal": {"widths": (2, 4, 8), "sparsities": (0.0, 0.6), "rounds": 0},
    "rl": {"episodes": 3},
}

pytestmark = pytest.mark.usefixtures("own_cache")


def allocated(method: str, budget: ada.Budget | None, **options) -> ada.Plan:
    """A plan by a method that gets what it needs."""
    if method_of(method).stages:
        options["bits"] = min(8, int(budget.bits)) if budget and budget.bits else 8
    model = tiny().eval()
    data = batches() if method_of(method).data == "needed" else None
    scores = None
    if method_of(method).scores:
        scores = ada.analyze(model, batches(), progress=False)
    return ada.allocate(
        scores, budget, method=method, model=model, calibration=data, options=FEW.get(method),
        progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_stay_float_count_for_every_method(method: str) -> None:
    """A float layer counts 32 bits per weight: what is left of 4 on the average is too little."""
    with pytest.raises(ada.BudgetError, match=r"'fc' stays float, 32 bits per weight") as caught:
        allocated(method, ada.Budget(bits=4), exclude=["fc"])
    assert "average" in str(caught.value) or "bits per weight" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_a_budget_with_a_float_layer(method: str) -> None:
    everywhere = Problem(tiny(), None, exclude=["conv1"])
    bits = everywhere.plan(everywhere.uniform(8, 0.0)).average_bits
    plan = allocated(method, ada.Budget(bits=bits), exclude=["conv1"])
    assert plan["conv1"].bits is None and plan.average_bits <= bits + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_is_asked_for(method: str) -> None:
    known = REGISTRY[method]
    model = tiny().eval()
    given = {"method": method, "model": model, "options": FEW.get(method), "progress": False}
    if known.budget:
        with pytest.raises(ada.BudgetError, match=f"method '{method}' needs a budget"):
            ada.allocate(None, None, **given)
    if known.data == "needed":
        with pytest.raises(ada.CalibrationError, match=f"method '{method}' needs calibration"):
            ada.allocate(None, ada.Budget(bits=5), **given)
    if known.scores:
        with pytest.raises(ada.PlanError, match="needs scores"):
            ada.allocate(None, ada.Budget(bits=5), **given)
    if not known.several:
        with pytest.raises(ada.BudgetError, match="takes one limit"):
            ada.allocate(None, ada.Budget(size=0.5, bits=5), **given)
    if not known.stages:
        with pytest.raises(ada.PlanError, match="takes no bits and stages"):
            ada.allocate(None, ada.Budget(bits=5), stages=["fc"], **given)
    if not known.options:
        with pytest.raises(ada.PlanError, match="takes no options"):
            ada.allocate(None, ada.Budget(bits=5), **{**given, "options": {"rounds": 1}})


def test_an_unknown_method_names_the_closest() -> None:
    with pytest.raises(ada.PlanError, match="unknown method 'optimum': did you mean 'optimal'"):
        method_of("optimum")


def test_a_plan_beyond_its_budget_is_refused() -> None:
    """Whatever a method did: nothing that is larger than asked for is returned."""
    problem = Problem(tiny(), ada.Budget(bits=3))
    problem.check_kept(problem.plan(problem.uniform(3, 0.0)))
    with pytest.raises(ada.BudgetError, match=r"plan that was found has 4\.000 bits per weight"):
        problem.check_kept(problem.plan(problem.uniform(4, 0.0)))


def test_refusals_of_a_budget_stand_in_one_file() -> None:
    makers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and "BudgetError" in ast.unparse(node.func):
                makers.add(str(path.relative_to(PACKAGE)))
    assert makers == {"allocation/refusals.py"}


def test_asking_for_names_loads_no_method() -> None:
    code = (
        "import sys, adalayer_native.allocation.methods as m; print(m.METHODS); "
        "print([n for n in ('numpy', 'torch', 'scipy') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == [str(METHODS), "[]"]


def test_old_names_of_options_warn_and_work() -> None:
    with pytest.warns(DeprecationWarning, match="'finalists' is called 'repaired_plans' now"):
        settings = Settings.of({"finalists": 3})
    assert settings.repaired_plans == 3
    with pytest.warns(DeprecationWarning, match="'rivals' is called 'other_methods' now"):
        assert Settings(rivals=False).other_methods is False
    with pytest.warns(DeprecationWarning, match=r"Settings\.finalists is called 'repaired_plans'"):
        assert settings.finalists == 3
    plan = ada.Plan({})
    with pytest.warns(DeprecationWarning, match=r"Plan\.float_rest is called 'float_work' now"):
        assert plan.float_rest is None
