"""Method "optimal": tables, limits, the check, the frontier."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from helpers_models import batches, tiny, uneven
from helpers_optimal import FEW, files, optimal
from torch import nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.allocation import (
    Budget,
    LayerTable,
    Settings,
    allocate,
    estimate_bytes,
    pareto,
    plan_energy,
)
from adalayer_native.allocation.evaluate import Evaluator, Measurement
from adalayer_native.allocation.latencies import latency_table
from adalayer_native.allocation.local_search import corrected, most_likely, starts
from adalayer_native.allocation.measured_tables import Data, measure_tables, weights_of
from adalayer_native.allocation.options import Option, option_of
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.resources import bit_operations, resources
from adalayer_native.allocation.selection import Selection, selection_of
from adalayer_native.errors import BudgetError, CalibrationError, PlanError
from adalayer_native.plan import Plan
from adalayer_native.report import error_table

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return uneven()


# -- the choice ---------------------------------------------------------------------------------


def test_without_a_check_it_is_the_best_of_all_plans(model) -> None:
    problem = Problem(model, None)
    settings = Settings(**FEW, interactions=False)
    data = Data.split(model, batches(2, 24), None, None)
    for budget in (Budget(bytes=2000), Budget(bits=4.2), Budget(bytes=2100, bits=3.5)):
        tables = measure_tables(problem, budget, data, settings, progress=False)
        selection = selection_of(problem, budget, tables, settings)
        best, columns = np.inf, None
        for picked in itertools.product(range(len(selection.options)), repeat=3):
            picked = np.array(picked)
            if not selection.offered[np.arange(3), picked].all():
                continue
            plan = problem.plan(selection.choice(picked))
            limit = budget.limit_bytes(problem.float_bytes)
            if limit is not None and estimate_bytes(model, plan) > limit:
                continue
            if budget.bits is not None and plan.average_bits > budget.bits:
                continue
            if selection.predicted(picked) < best:
                best, columns = selection.predicted(picked), picked
        plan = optimal(model, budget, interactions=False, rounds=0)
        assert plan.measured["predicted_loss"] == pytest.approx(best, rel=1e-4)
        found = {name: option_of(entry) for name, entry in plan.layers.items()}
        assert found == selection.choice(columns)


def test_the_plan_holds_its_budget_says_what_layers_lose_and_repeats(model) -> None:
    plan = optimal(model, Budget(size=0.35), trials=4, rounds=2)
    plan.validate(model)
    assert plan.method == "optimal"
    assert estimate_bytes(model, plan) <= 0.35 * 6000
    assert set(plan.scores) == {"conv1", "conv2", "fc"}
    assert all(entry["E"] >= 0 for entry in plan.scores.values())
    assert plan.measured["calibration_loss"] > 0
    assert Plan.from_json(plan.to_json()) == plan
    assert optimal(model, Budget(size=0.35), trials=4, rounds=2) == plan
    printed = str(plan)
    assert "E" in printed.splitlines()[2]
    table = error_table(plan)
    assert table.row_count == 4
    with pytest.raises(PlanError, match="does not know its layers' errors"):
        error_table(Problem(model, None).plan({}))


def test_the_check_begins_with_plans_that_differ(model) -> None:
    problem, budget = Problem(model, None), Budget(bytes=2000)
    settings = Settings(**FEW)
    data = Data.split(model, batches(2, 24), None, None)
    tables = measure_tables(problem, budget, data, settings, progress=False)
    selection = selection_of(problem, budget, tables, settings)
    first = starts(selection)
    assert (first[0] == selection.choose()).all()
    assert all(selection.fits(columns) for columns in first)
    assert len({columns.tobytes() for columns in first}) == len(first) >= 3
    # All layers alike: 2 bits fit as they are, 4 bits with 60 % zeros.
    alike = {selection.options[c[0]] for c in first if len(set(c.tolist())) == 1}
    assert {Option(2), Option(4, 0.6)} <= alike


def test_corrections_find_the_layer_that_was_underestimated(model) -> None:
    problem, budget = Problem(model, None), Budget(bits=8)
    options = [Option(2), Option(4), Option(4, 0.6)]
    errors = np.array([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.3, 0.1, 0.2]])
    found = resources(problem, budget, options, {})
    selection = Selection(problem, budget, found, options, errors)
    truth = errors * np.array([1.0, 3.0, 1.0])[:, None]
    rng = np.random.default_rng(0)
    tried = [rng.integers(0, 2, 3) for _ in range(30)]
    measured = [Measurement(float(truth[np.arange(3), c].sum()), float("nan")) for c in tried]
    factors = corrected(selection, tried, measured) / errors
    assert factors[1, 0] > 1.5 * max(factors[0, 0], factors[2, 0])
    # And pruning, where all of it costs more than the tables say.
    truth = errors * np.array([1.0, 1.0, 4.0])
    tried = [rng.integers(1, 3, 3) for _ in range(30)]
    measured = [Measurement(float(truth[np.arange(3), c].sum()), float("nan")) for c in tried]
    factors = corrected(selection, tried, measured) / errors
    assert factors[:, 2].min() > 2 * factors[:, 1].max()


def test_scores_are_kept_beside_the_errors(model) -> None:
    scores = ada.analyze(model, batches(), progress=False)
    plan = allocate(
        scores,
        Budget(bits=4),
        method="optimal",
        model=model,
        calibration=batches(),
        options={**FEW, "rounds": 0},
        progress=False,
    )
    assert set(plan.scores["fc"]) == {"A", "F", "R", "I", "E", "E_even"}


def test_the_plan_reports_what_was_measured_on_images_the_tables_have_not_seen(model) -> None:
    plan = optimal(model, Budget(bytes=1900), rounds=3, trials=6)
    data = Data.split(model, batches(2, 24), None, None)
    counts = [sum(b.count for b in part) for part in (data.repair, data.table, data.check)]
    assert counts == [24, 12, 12]
    rows = [b.x.args[0] for part in (data.repair, data.table, data.check) for b in part]
    assert len(torch.cat(rows).unique(dim=0)) == 48  # nothing is in two parts
    weights = weights_of(Problem(model, None), data, Settings())
    evaluator = Evaluator(model, [(b.x, b.target) for b in data.check], weight_of=weights)
    real = evaluator.measure({n: (e.bits, e.sparsity) for n, e in plan.layers.items()})
    assert plan.measured["calibration_loss"] == pytest.approx(real.loss)


def test_a_lucky_measurement_does_not_decide_alone(model) -> None:
    problem, budget = Problem(model, None), Budget(bits=8)
    options = [Option(2), Option(4)]
    errors = np.array([[0.4, 0.1]] * 3)
    selection = Selection(problem, budget, resources(problem, budget, options, {}), options, errors)
    tried = [np.array([0, 0, 0]), np.array([1, 1, 1])]

    def taken(*losses: float) -> int:
        measured = [Measurement(loss, float("nan")) for loss in losses]
        return most_likely(selection, errors, tried, measured)

    assert taken(0.3, 0.3) == 1
    assert taken(0.2, 0.3) == 1  # a third better, where four times worse was expected
    assert taken(0.05, 0.3) == 0


def test_overrides_and_exclusions(model) -> None:
    free = optimal(model, Budget(bytes=2300), rounds=0)
    plan = optimal(model, Budget(bytes=2300), rounds=0, fixed={"fc": (3, 0.5)})
    assert (plan["fc"].bits, plan["fc"].sparsity) == (3, 0.5)
    assert "fc" not in plan.scores and set(plan.scores) == {"conv1", "conv2"}
    assert estimate_bytes(model, plan) <= 2300
    edited = Plan.from_json(free.to_json())
    edited["conv1"].bits = 6
    kept = optimal(model, Budget(bytes=2300), rounds=0, fixed={"conv1": edited["conv1"]})
    assert kept["conv1"] == edited["conv1"]
    without = optimal(model, Budget(bytes=2800), rounds=1, trials=2, exclude=["conv1"])
    assert without["conv1"].bits is None and without["fc"].bits is not None
    assert estimate_bytes(model, without) <= 2800
    with pytest.raises(PlanError, match="fixed: unknown layer 'fcc'"):
        optimal(model, Budget(bytes=2300), fixed={"fcc": 3})


# -- limits -------------------------------------------------------------------------------------


def macs(model: nn.Module) -> dict[str, int]:
    return {"conv1": 216 * 64, "conv2": 864 * 16, "fc": 192}


def test_bit_operations_and_energy_are_limited_together_with_the_size(model) -> None:
    full = sum(bit_operations(m, 8, 8) for m in macs(model).values())
    assert bit_operations(100, 4, 8, 0.25) == 100 * 4 * 8 * 0.75
    assert bit_operations(100, None, 8) == 100 * 32 * 32
    budget = Budget(bytes=2300, bops=0.45 * full, bits=4.5)
    plan = optimal(model, budget, rounds=1, trials=3)
    spent = sum(
        bit_operations(macs(model)[n], e.bits, e.activation_bits, e.sparsity)
        for n, e in plan.layers.items()
    )
    assert spent <= 0.45 * full * (1 + 1e-9)
    assert plan.measured["predicted number of bit operations"] == pytest.approx(spent)
    assert estimate_bytes(model, plan) <= 2300 and plan.average_bits <= 4.5 + 1e-9
    lean = optimal(model, Budget(energy=0.09), rounds=0)
    rich = optimal(model, Budget(energy=0.16), rounds=0)
    assert lean.measured["predicted modelled energy"] <= 0.09
    modelled = plan_energy(model, lean, torch.zeros(1, 3, 8, 8))
    assert lean.measured["predicted modelled energy"] == pytest.approx(
        1e-6 * sum(layer.total for layer in modelled.values())
    )
    assert lean.average_bits < rich.average_bits


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"bytes": 1000}, r"the smallest reachable size is 1,\d\d\d bytes, 0\.\d+ of the float"),
        ({"bits": 0.1, "size": 0.5}, r"the smallest reachable average width is 0\.8\d* bits"),
        ({"bops": 10, "size": 0.5}, r"smallest reachable number of bit operations is [\d,]+ per"),
        ({"energy": 1e-6}, r"the smallest reachable modelled energy is 0\.\d+ µJ per image"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_named(model, limits, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        optimal(model, Budget(**limits))


def test_the_smallest_reachable_size_can_be_reached(model) -> None:
    with pytest.raises(BudgetError) as caught:
        optimal(model, Budget(bytes=1000))
    words = str(caught.value).split("smallest reachable size is ")[1]
    smallest = int(words.split(" bytes")[0].replace(",", ""))
    share = float(words.split("bytes, ")[1].split(" ")[0])
    for budget in (Budget(bytes=smallest), Budget(size=share)):
        plan = optimal(model, budget, rounds=0)
        assert estimate_bytes(model, plan) == smallest
    with pytest.raises(BudgetError):
        optimal(model, Budget(bytes=smallest - 1))


def test_limits_that_exclude_each_other_say_so(model) -> None:
    # A machine on which few bits are slow: a small file and a fast one are both possible, alone.
    problem = Problem(model, None)
    options = [Option(2), Option(8)]
    microseconds = np.tile([[[30.0], [10.0]]], (3, 1, 1))
    latency = LayerTable("latency", "µs", tuple(problem.free), (2, 8), (0.0,), microseconds, 5.0)
    smallest, largest = (problem.cost(problem.uniform(b, 0.0)) for b in (2, 8))

    def selection(size: float, ms: float) -> Selection:
        budget = Budget(bytes=size, latency=ms)
        found = resources(problem, budget, options, {}, latency)
        return Selection(problem, budget, found, options, np.array([[1.0, 0.0]] * 3))

    for size, ms in ((smallest, 0.095), (largest, 0.035)):
        assert selection(size, ms).choose() is not None
    both = selection(smallest, 0.035)
    assert both.choose() is None
    message = str(both.impossible())
    assert "every limit can be kept alone, but not together" in message
    assert f"size of at least {int(largest):,} bytes" in message
    assert "latency of at least 0.095 ms" in message


# -- latency ------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    ops.isas() == ["scalar"], reason="the scalar interpreter has no profile of its nodes"
)


@needs_kernels
def test_latencies_come_from_the_engine(model, tmp_path) -> None:
    problem = Problem(model, None)
    settings = Settings(widths=(2, 8), sparsities=(0.0, 0.6), threads=1)
    x = batches(1, 1)[0][0]
    table = latency_table(problem, x, settings, progress=False)
    assert table.layers == ("conv1", "conv2", "fc") and table.unit == "µs"
    assert (table.values > 0).all() and table.constant > 0
    assert table.about["isa"] == ops.active_isa() and table.about["threads"] == 1
    (file,) = files(tmp_path)
    assert file.name.startswith("latency-")
    again = latency_table(problem, x, settings, progress=False)  # from the file: the same numbers
    assert (again.values == table.values).all() and again.constant == table.constant
    other = latency_table(problem, x, Settings(**{**vars(settings), "latency_batch": 2}))
    assert len(files(tmp_path)) == 2
    assert other.about["batch"] == 2


@needs_kernels
def test_a_latency_budget(model) -> None:
    generous = optimal(model, Budget(latency=1000.0, bytes=2200), rounds=0)
    predicted = generous.measured["predicted latency"]
    assert 0 < predicted < 1000
    with pytest.raises(BudgetError, match=r"smallest reachable latency is [\d.e-]+ ms"):
        optimal(model, Budget(latency=1e-7, bytes=2200))


# -- the frontier -------------------------------------------------------------------------------


def test_pareto(model) -> None:
    few = {**FEW, "interactions": False}  # those depend on the budget
    frontier = pareto(model, batches(2, 24), points=8, options=few, progress=False)
    assert len(frontier) >= 4
    sizes = [point.bytes for point in frontier]
    errors = [point.error for point in frontier]
    assert sizes == sorted(set(sizes)) and errors == sorted(set(errors), reverse=True)
    for point in frontier:
        assert estimate_bytes(model, point.plan) == point.bytes
        assert point.plan.measured["predicted_loss"] == point.error
    best = optimal(model, Budget(bytes=sizes[2]), rounds=0, interactions=False)
    assert best.measured["predicted_loss"] <= errors[2] * (1 + 1e-4)
    assert {e.bits for e in frontier[len(frontier) - 1].plan.layers.values()} == {8}
    json.dumps(frontier.as_dicts())
    assert frontier.table().row_count == len(frontier)
    assert frontier.errors.table().row_count == 3
    within = pareto(
        model, batches(2, 24), points=4, within=Budget(bits=4), options=few, progress=False
    )
    assert all(point.plan.average_bits <= 4 + 1e-9 for point in within)
    with pytest.raises(BudgetError, match="must not limit the file"):
        pareto(model, batches(), within=Budget(size=0.5))
    with pytest.raises(PlanError, match="at least 2"):
        pareto(model, batches(), points=1)


# -- bad calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round": 2}, r"unknown options \['round'\]"),
        ({"measure": "magic"}, "unknown measure 'magic'"),
        ({"weight_of": "magic"}, "unknown weight_of 'magic'"),
        ({"widths": (1, 2)}, "widths must be some of"),
        ({"widths": ()}, "widths must be some of"),
        ({"widths": (2, 2)}, "widths must differ"),
        ({"sparsities": (0.5,)}, "with 0 among them"),
        ({"sparsities": (0.0, 1.0)}, "sparsities must be"),
        ({"step": 0}, "step must be"),
        ({"rounds": -1}, "rounds and repaired_plans must not be negative"),
        ({"repaired_plans": -1}, "rounds and repaired_plans must not be negative"),
    ],
)
def test_bad_options(model, options, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        optimal(model, Budget(bits=4), **options)


def test_bad_data(model) -> None:
    with pytest.raises(BudgetError, match="needs a budget"):
        optimal(model, None)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        allocate(None, Budget(bits=4), method="optimal", model=model)
    with pytest.raises(CalibrationError, match="empty"):
        optimal(model, Budget(bits=4), data=[])
    with pytest.raises(CalibrationError, match="at least 2 calibration images, got 1"):
        optimal(model, Budget(bits=4), data=batches(1, 1))
    with pytest.raises(CalibrationError, match="NaN"):
        optimal(model, Budget(bits=4), data=[torch.full((4, 3, 8, 8), float("nan"))])
    zero = tiny()
    with torch.no_grad():
        zero.conv2.weight.zero_()
    plan = optimal(zero, Budget(bytes=2000), rounds=1, trials=2)  # a layer of nothing costs nothing
    assert plan["conv2"].bits == 2
    constant = [torch.ones(16, 3, 8, 8)]
    optimal(model, Budget(bytes=2000), data=constant, rounds=1, trials=2).validate(model)


def test_compress_keeps_its_tables_in_the_work_directory(model, tmp_path) -> None:
    result = ada.compress(
        model,
        batches(2, 24),
        Budget(bytes=2300),
        method="optimal",
        work_dir=tmp_path / "work",
        allocate_options={"options": {**FEW, "rounds": 1, "trials": 2}},
        progress=False,
    )
    assert ada.save(result.model, tmp_path / "m.safetensors") <= 2300
    assert [p.name[:7] for p in (tmp_path / "work" / "tables").iterdir()] == ["errors-"]
    assert not files(tmp_path)
    with pytest.raises(BudgetError, match="'optimal' needs a budget"):
        ada.compress(model, batches(), None, method="optimal", progress=False)
