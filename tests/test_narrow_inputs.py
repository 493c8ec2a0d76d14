"""Layer inputs of 7 and 6 bits: tables, plans, the bits of every way to compute, files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cli import run as run_command
from helpers_optimal import FEW, files, optimal
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.allocation import Budget, LayerTable, Settings
from adalayer_native.allocation import measured_tables as tables_of
from adalayer_native.allocation import optimal as method
from adalayer_native.allocation.evaluate import Evaluator
from adalayer_native.allocation.knapsack import Limit, Link, solve
from adalayer_native.allocation.latencies import latency_table
from adalayer_native.allocation.measured_tables import (
    Data,
    inputs_of,
    loader_of,
    measure_tables,
)
from adalayer_native.allocation.options import Choice, Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.selection import Tables, selection_of
from adalayer_native.errors import BudgetError, PlanError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.report import load_run, record, run_table

pytestmark = pytest.mark.usefixtures("own_cache")


class Block(nn.Module):
    """A value that two layers and an addition read, and two that one layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.left(x) + self.right(x) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ada.capture(Block().eval(), torch.randn(2, 3, 8, 8))


def images(count: int = 2, size: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((size, 3, 8, 8), generator=generator) for _ in range(count)]


def uniform(model: nn.Module, bits: int, activation_bits: int) -> Plan:
    return Plan(
        {
            name: LayerPlan(
                name, layer_kind(m), m.weight.numel(), bits, activation_bits=activation_bits
            )
            for name, m in supported_layers(model).items()
        }
    )


# -- options and tables -------------------------------------------------------------------------


def test_names_of_options_are_what_they_were() -> None:
    assert Option(4, 0.5, "2:4").name == "4 0.5 2:4" and Option(4).values == [4, 0.0]
    narrow = Option(4, 0.5, "2:4", 7)
    assert narrow.name == "4 0.5 2:4 a7" and narrow.values == [4, 0.5, "2:4", 7]
    assert narrow.arguments() == (4, 0.5, "2:4") and narrow.weight == Option(4, 0.5, "2:4")
    assert Option(4, activation_bits=6).arguments() == (4, 0.0)


def test_a_value_belongs_to_all_that_read_it(model: nn.Module) -> None:
    problem = Problem(model, None)
    names = [sorted(problem.free[row] for row in rows) for rows in problem.shared_inputs.values()]
    assert sorted(names) == [["fc"], ["left", "right"], ["stem"]]
    # Whoever is pinned has decided.
    pinned = Problem(model, None, fixed={"right": 8})
    names = [sorted(pinned.free[row] for row in rows) for rows in pinned.shared_inputs.values()]
    assert sorted(names) == [["fc"], ["stem"]]


def test_the_error_is_the_value_s(model: nn.Module, tmp_path: Path) -> None:
    problem, settings = (
        Problem(model, None),
        Settings(**FEW, input_widths=(4, 3), weight_of="rounded"),
    )
    data = Data.split(model, images(), None, None)
    table = measure_tables(problem, Budget(bits=4), data, settings, progress=False).errors
    shared = next(rows for rows in problem.shared_inputs.values() if len(rows) == 2)
    for bits in (4, 3):
        part = table.of("unstructured", bits)
        added = part.values - table.values
        assert np.nanmax(np.ptp(added, axis=(1, 2))) < 1e-12  # the same for all weights
        assert (added[shared[0]] > 0).all() and (added[shared[1]] == 0).all()
        assert table.value("fc", 8, 0.0, activation_bits=bits) > table.value("fc", 8)
    assert (table.of("unstructured", 3).values >= table.of("unstructured", 4).values).all()
    with pytest.raises(PlanError, match=r"inputs of \[3, 4\] bits, not 7"):
        table.value("fc", 8, activation_bits=7)
    # Predicted and measured: the loss of the network with that value on its grid, the addition
    # beside the layers included.
    evaluator = Evaluator(model, loader_of(data.table), inputs=inputs_of(problem, data))
    for name in ("stem", "left", "fc"):
        row = problem.free.index(name)
        predicted = float(table.of("unstructured", 3).values[row, -1, 0] - table.values[row, -1, 0])
        measured = evaluator.measure({name: Option(None, activation_bits=3)}).loss
        assert 0.4 * measured < predicted < 2.5 * measured
    # Found again, and not measured again.
    assert [path.name.split("-")[0] for path in files(tmp_path)] == ["errors", "inputs"]
    data.table = data.table[:0] + data.table
    again = measure_tables(problem, Budget(bits=4), data, settings, progress=False).errors
    assert np.array_equal(again.flat(), table.flat(), equal_nan=True)


def test_a_measured_plan_has_its_values_on_their_grids(model: nn.Module) -> None:
    problem, data = Problem(model, None), Data.split(model, images(), None, None)
    inputs = inputs_of(problem, data)
    evaluator = Evaluator(model, loader_of(data.check), inputs=inputs)
    choice: Choice = {"left": Option(None, activation_bits=2), "right": Option(None)}
    assert list(inputs.narrowed(choice).values()) == [2]
    batch = data.check[0]
    handles = inputs.applied(choice)
    got = batch.x(inputs.model)
    for handle in handles:
        handle.remove()
    assert torch.equal(batch.x(inputs.model), batch.x(model))

    block, quantizer = model, inputs.quantizer(next(iter(inputs.narrowed(choice))), 2)
    layers = dict(block.named_modules())
    x = quantizer(torch.relu(layers["stem"](*batch.x.args)))
    x = torch.relu(layers["left"](x) + layers["right"](x) + x)
    assert torch.equal(got, layers["fc"](x.mean((2, 3))))
    assert evaluator.measure(choice).loss > 10 * evaluator.measure({"left": Option(8)}).loss
    assert evaluator.measure({"left": Option(None)}).loss == 0.0


@pytest.mark.skipif(ops.isas() == ["scalar"], reason="the scalar interpreter has no profile")
def test_latencies(model: nn.Module) -> None:
    problem = Problem(model, None)
    settings = Settings(widths=(4, 8), sparsities=(0.0,), threads=1)
    x = images()[0][:1]
    table = latency_table(problem, x, settings, input_widths=(7, 6), progress=False)
    assert [part.activation_bits for part in table.parts] == [None, 7, 6]
    assert (table.flat() > 0).all()
    # Where no form differs with 7 bits (weights are small): the same numbers, not other ones.
    adds_in_16_bits = ops.active_isa() in ("avx2", "avx512")
    seven = table.of("unstructured", 7).values[:, 1]
    assert np.array_equal(seven, table.values[:, 1]) != adds_in_16_bits
    again = latency_table(problem, x, settings, input_widths=(7, 6), progress=False)
    assert np.array_equal(again.flat(), table.flat())
    if ops.active_isa() == "avx2":  # it adds more products in 16 bits
        assert not np.array_equal(table.of("unstructured", 6).values, table.values)


# -- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_linked_layers_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, kinds = 4, np.array([0, 0, 1, 1, 2])
    errors = np.exp(random.normal(size=(layers, 5)))
    costs = random.integers(1, 40, (layers, 5)).astype(float)
    allowed = random.random((layers, 5)) < 0.8
    allowed[:, 0] = True
    links = [Link((0, 2), kinds), Link((1, 3), kinds)]
    limit = float(np.round(random.uniform(costs.min(1).sum(), costs.max(1).sum())))
    best = None
    for columns in itertools.product(range(5), repeat=layers):
        picked = np.arange(layers), np.array(columns)
        tied = all(len({int(kinds[columns[row]]) for row in link.layers}) == 1 for link in links)
        if tied and allowed[picked].all() and costs[picked].sum() <= limit:
            best = min(np.inf if best is None else best, errors[picked].sum())
    found = solve(errors, [Limit(costs, limit)], allowed=allowed, links=links)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert all(kinds[found[a]] == kinds[found[b]] for a, b in ((0, 2), (1, 3)))
        assert allowed[np.arange(layers), found].all()
        assert costs[np.arange(layers), found].sum() <= limit
        assert errors[np.arange(layers), found].sum() <= best * (1 + 1e-4) + 1e-9


def made(problem: Problem, faster: dict[str, float]) -> LayerTable:
    """Latencies of 100 µs per layer and option, less where some layers have 7-bit inputs."""
    names = tuple(problem.free)
    usual = np.full((len(names), 2, 1), 100.0)
    narrow = usual * np.array([faster.get(name, 1.0) for name in names])[:, None, None]
    part = LayerTable("latency", "µs", names, (4, 8), (0.0,), narrow, activation_bits=7)
    return LayerTable("latency", "µs", names, (4, 8), (0.0,), usual, 10.0, others=(part,))


WIDTHS = {"widths": (4, 8), "sparsities": (0.0,), "patterns": ("unstructured",), "step": None}


def test_offered_where_it_saves_time_to_some_reader(model: nn.Module) -> None:
    problem, settings = Problem(model, None), Settings(**WIDTHS, input_widths=(7,))
    data, budget = Data.split(model, images(), None, None), Budget(bits=8)
    errors = measure_tables(problem, budget, data, settings, progress=False)
    budget = Budget(latency=0.4)
    found = Tables(errors.errors, made(problem, {"right": 0.5, "fc": 0.99}), errors.work, [])
    selection = selection_of(problem, budget, found, settings)
    narrow = [option.activation_bits == 7 for option in selection.options]
    offered = {n: bool(selection.offered[r, narrow].all()) for r, n in enumerate(problem.free)}
    assert offered == {"stem": False, "left": True, "right": True, "fc": False}
    assert not selection.offered[problem.free.index("fc"), narrow].any()  # 1 % is noise
    columns = selection.choose()  # 410 µs otherwise
    assert columns is not None
    choice = selection.choice(columns)
    assert [n for n, option in choice.items() if option.activation_bits == 7] == ["left", "right"]
    assert all(option.bits == 8 for option in choice.values())
    plan = problem.plan(choice)
    assert [layer.activation_bits for layer in plan.layers.values()] == [8, 7, 7, 8]
    usual = selection_of(problem, Budget(latency=0.5), found, settings)
    columns = usual.choose()
    assert columns is not None
    assert all(o == Option(8) for o in usual.choice(columns).values())


class Predicted:
    """A clock that says what the table says."""

    def __init__(self, problem: Problem, table: LayerTable) -> None:
        self.problem, self.table = problem, table

    def __call__(self, choice: Choice) -> float:
        assert all(isinstance(option.sparsity, float) for option in choice.values())
        times = (self.table.value(name, *option) for name, option in choice.items())
        return (sum(times) + self.table.constant) / 1000

    def together(self, choices: Sequence[Choice]) -> list[float]:
        return [self(choice) for choice in choices]

    def kernels(self, choice: Choice) -> dict[str, str]:
        return {name: f"made for {option.name}" for name, option in choice.items()}


@pytest.fixture
def made_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which ``left`` is twice as fast with 7-bit inputs."""

    def table(problem: Problem, *_: object, **__: object) -> LayerTable:
        return made(problem, {"left": 0.5})

    monkeypatch.setattr(tables_of, "latency_table", table)
    monkeypatch.setattr(
        method, "EngineClock", lambda problem, *_: Predicted(problem, table(problem))
    )


def planned(model: nn.Module, budget: Budget, **options: object) -> Plan:
    options = {**WIDTHS, "input_widths": (7,), "rounds": 1, "trials": 2, **options}
    return optimal(model, budget, data=images(4), **options)


@pytest.mark.usefixtures("made_tables")
def test_seven_bits_where_only_they_fit_a_latency(model: nn.Module) -> None:
    plan = planned(model, Budget(latency=0.37))
    assert [layer.activation_bits for layer in plan.layers.values()] == [8, 7, 7, 8]
    assert plan.measured["measured latency"] == pytest.approx(0.36)
    assert plan["left"].kernel == "made for 8 0 a7"
    plan = planned(model, Budget(latency=0.42))
    assert [layer.activation_bits for layer in plan.layers.values()] == [8] * 4
    with pytest.raises(BudgetError, match=r"smallest reachable latency is 0\.36 ms"):
        planned(model, Budget(latency=0.35))


@pytest.mark.usefixtures("made_tables")
def test_the_fastest_plan_within_a_loss(model: nn.Module) -> None:
    plan = planned(model, Budget(loss=0.001))
    assert [layer.activation_bits for layer in plan.layers.values()] == [8, 7, 7, 8]
    # Of equally fast ones the one that loses least.
    assert all(layer.bits == 8 for layer in plan.layers.values())
    known = plan.measured
    assert known["measured latency"] == pytest.approx(0.36)
    assert known["measured latency of 8 bits"] == pytest.approx(0.41)
    assert 0 < known["predicted_loss"] - known["predicted_loss of 8 bits"] <= 0.001
    assert known["calibration_loss"] - known["calibration_loss of 8 bits"] <= 0.001
    # Less than a bit of one value loses: nothing may change.
    less = 0.5 * (known["predicted_loss"] - known["predicted_loss of 8 bits"])
    plan = planned(model, Budget(loss=less))
    assert [layer.activation_bits for layer in plan.layers.values()] == [8] * 4
    assert plan.measured["measured latency"] == pytest.approx(0.41)
    # Nor where other images say that more is lost than was predicted.
    lost = known["calibration_loss"] - known["calibration_loss of 8 bits"]
    if lost > 2 * less:
        plan = planned(model, Budget(loss=1.01 * 2 * less))
        assert [layer.activation_bits for layer in plan.layers.values()] == [8] * 4
    # Other limits hold as well.
    plan = planned(model, Budget(loss=1.0, bits=4.5))
    assert plan.average_bits <= 4.5 and plan["left"].activation_bits == 7
    with pytest.raises(BudgetError, match=r"every limit can be kept alone.*loss of at least"):
        planned(model, Budget(loss=1e-9, bits=4.0))


@pytest.mark.skipif(ops.isas() == ["scalar"], reason="the scalar interpreter has no profile")
def test_a_budget_of_loss_on_this_machine(model: nn.Module) -> None:
    plan = planned(model, Budget(loss=0.02), input_widths=None, threads=1)
    known = plan.measured
    assert known["predicted_loss"] <= known["predicted_loss of 8 bits"] + 0.02
    assert known["calibration_loss"] <= known["calibration_loss of 8 bits"] + 0.02
    assert 0 < known["measured latency"] <= known["measured latency of 8 bits"]
    assert all(layer.kernel.startswith(ops.active_isa()) for layer in plan.layers.values())
    assert plan["left"].activation_bits == plan["right"].activation_bits
    assert Plan.from_json(plan.to_json()) == plan
    result = ada.compress(model, images(), None, plan=plan, repair=False, progress=False)
    engine = ada.compile(result.model, images()[0], policy="native", strict=True)
    assert torch.equal(engine(images()[0]), result.model(images()[0]))


@pytest.mark.skipif(ops.isas() == ["scalar"], reason="the scalar interpreter names no kernels")
def test_kernels_are_those_of_layers() -> None:
    class Padded(nn.Module):
        """Zero channels, which the engine adds by a convolution of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.last(nn.functional.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3))

    x = torch.randn(4, 3, 8, 8)
    problem = Problem(ada.capture(Padded().eval(), x), None)
    clock = method.EngineClock(problem, x[:1], Settings(threads=1))
    choice = problem.uniform(8, 0.0)
    assert clock(choice) > 0 and list(clock.kernels(choice)) == ["first", "last"]


def test_settings(model: nn.Module) -> None:
    budgets = {name: Budget(**{name: 1.0}) for name in ("latency", "loss", "bits", "bops")}
    offered = {name: Settings().input_widths_for(b, 8) for name, b in budgets.items()}
    assert offered == {"latency": (7, 6), "loss": (7, 6), "bits": (), "bops": ()}
    assert Settings().input_widths_for(budgets["loss"], 7) == (6,)
    assert Settings(input_widths=(5, 6)).input_widths_for(budgets["bits"], 8) == (6, 5)
    with pytest.raises(PlanError, match=r"input_widths must be below activation_bits, 8, got \(8"):
        optimal(model, budgets["bits"], data=images(), input_widths=(8,))
    with pytest.raises(PlanError, match="input_widths must be different ones of"):
        optimal(model, budgets["bits"], data=images(), input_widths=(9,))
    with pytest.raises(PlanError, match="a budget of loss needs 8 bits among the widths"):
        optimal(model, Budget(loss=0.1), data=images(), widths=(2, 4), sparsities=(0.0,))
    assert str(Budget(loss=0.001)) == "0.001 nats per image more than with 8 bits everywhere"
    with pytest.raises(BudgetError, match="within must not limit it"):
        ada.pareto(model, images(), within=Budget(loss=0.1))
    with pytest.raises(BudgetError, match="takes one limit"):
        ada.allocate(None, Budget(loss=0.1), method="uniform", model=model)


def test_bit_operations_pay_for_inputs(model: nn.Module) -> None:
    plan = optimal(
        model, Budget(bops=250_000), data=images(), input_widths=(6, 4), rounds=0, step=None
    )
    assert min(layer.activation_bits for layer in plan.layers.values()) < 8
    assert plan["left"].activation_bits == plan["right"].activation_bits
    assert plan.measured["predicted number of bit operations"] <= 250_000


# -- what runs ----------------------------------------------------------------------------------


def wide(channels: int) -> nn.Module:
    """A 3x3 layer of large weights of one sign, behind a value that reaches its largest level."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.ReLU(),
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
    ).eval()
    with torch.no_grad():
        model[0].weight.abs_()
        model[2].weight.fill_(1.0)
    return model


def native_of(model: nn.Module, plan: Plan, x: Tensor) -> tuple[nn.Module, nn.Module]:
    prepared = ada.prepare(model, plan, x)
    ada.calibrate(prepared, [x], observer="minmax", progress=False)
    return prepared, ada.convert(prepared)


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("activation_bits", [8, 7, 6])
def test_simulation_native_and_engine_have_the_same_bits(activation_bits: int, isa: str) -> None:
    model, x = wide(120), torch.rand(2, 3, 11, 9)
    x[0] = 1.0
    prepared, native = native_of(model, uniform(model, 8, activation_bits), x)
    with torch.no_grad(), ada.simulate(prepared, exact=True) as exact:
        simulated = exact(x)
    ops.force_isa(isa)
    try:
        for policy in ("auto", "4x4", "2x2", "off"):
            ops.set_winograd_policy(policy)
            assert torch.equal(native(x), simulated)
            engine = ada.compile(native, x, policy="native", strict=True)
            assert torch.equal(engine(x), simulated)
            if isa != "scalar" and policy == "4x4":
                row = {row.name: row for row in engine.coverage(rounds=0)}["2"]
                # 127 * 9 * 120 * 255 is above 2^25, with 127 levels it is below.
                assert (" winograd 4x4, " in row.kernel) == (activation_bits < 8)
                assert row.input_bits == activation_bits and row.microseconds == 0.0
    finally:
        ops.set_winograd_policy("auto")
        ops.force_isa("auto")


def test_files(tmp_path: Path, model: nn.Module) -> None:
    x = images()[0][:3]
    plan = uniform(model, 4, 8)
    plan["left"].activation_bits = 7
    plan["fc"].activation_bits = 6
    plan["stem"].kernel = "avx2 stem"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert "avx2 stem" in str(plan)
    _, native = native_of(model, plan, x)
    # The value is shared: the fewest bits count for both readers.
    bits = {
        n: int(m.input_qparams[2]) for n, m in native.named_modules() if hasattr(m, "input_qparams")
    }
    assert bits == {"stem": 8, "left": 7, "right": 7, "fc": 6}
    ada.save(native, tmp_path / "model.safetensors")
    again = ada.restore(Block().eval(), tmp_path / "model.safetensors", example_inputs=x)
    engine = ada.compile(native, x, policy="native", strict=True)
    engine.save(tmp_path / "model.ada")
    loaded = ada.load(tmp_path / "model.ada")
    expected = native(x)
    assert torch.equal(again(x), expected)
    assert torch.equal(engine(x), expected) and torch.equal(loaded(x), expected)
    found = {row.name: row.input_bits for row in loaded.coverage(rounds=0) if row.bits}
    assert sorted(found.values()) == [6, 7, 7, 8]
    assert "Input" in str(loaded.coverage(rounds=0))


def test_report_and_info(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan, x = uniform(model, 4, 8), images()[0][:3]
    plan["right"].activation_bits = 7
    result = ada.compress(model, [x], None, plan=plan, repair=False, progress=False)
    ada.save(result.model, tmp_path / "model.safetensors")
    told = record("block", model, result, tmp_path / "model.safetensors", x)
    assert [layer["activation_bits"] for layer in told["layers"]] == [8, 7, 7, 8]
    assert all(layer["kernel"] for layer in told["layers"])
    (tmp_path / "report.json").write_text(json.dumps(told))
    plan.save(tmp_path / "plan.json")
    run = load_run(tmp_path)
    assert [layer.input_bits for layer in run.layers] == [8, 7, 7, 8]
    assert "input bits" in [column.header for column in run_table(run).columns]
    ada.compile(result.model, x, policy="native").save(tmp_path / "model.ada")
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(monkeypatch, "info", tmp_path / "model.ada") == 0
    shown = capsys.readouterr().out
    assert "input bits" in shown and f"{ops.active_isa()}" in shown


def test_old_plans_and_notes_of_kernels() -> None:
    row = '{"name": "a", "kind": "linear", "params": 4, "bits": 4, "activation_bits": 6}'
    text = f'{{"format": "adalayer-plan", "version": 1, "layers": [{row}]}}'
    plan = Plan.from_json(text)
    assert plan["a"].activation_bits == 6 and plan["a"].kernel == ""
    assert '"kernel"' not in plan.to_json()
    plan["a"].kernel = "avx2 panels"
    assert Plan.from_json(plan.to_json()) == plan
    plan["a"].bits = 4
    assert plan["a"].kernel == "avx2 panels"
    plan["a"].activation_bits = 8  # what ran was another layer
    assert plan["a"].kernel == ""
    plan["a"].kernel = "avx2 panels"
    plan["a"] = 3
    assert plan["a"].kernel == ""
    with pytest.raises(PlanError, match="kernel must be text, got 3"):
        plan["a"].kernel = 3  # type: ignore[assignment]


@pytest.mark.skipif(ops.isas() == ["scalar"], reason="no clock without kernels")
def test_choices_are_kept_apart_where_forms_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADALAYER_PLAN_CACHE", str(tmp_path / "plans"))
    x, model = torch.rand(1, 3, 11, 9), wide(120)

    def lines(activation_bits: int) -> int:
        _, native = native_of(model, uniform(model, 8, activation_bits), x)
        ada.compile(native, x, policy="native", strict=True)
        return len((tmp_path / "plans").read_text().splitlines())

    assert [lines(8), lines(8), lines(7), lines(7)] == [2, 2, 3, 3]
