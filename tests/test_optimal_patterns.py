"""Method "optimal": patterns of zeros among the options, and latencies that the engine keeps."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.allocation import Budget, LayerTable, Settings, allocate, estimate_bytes
from adalayer_native.allocation import clock as clocks
from adalayer_native.allocation import optimal as method
from adalayer_native.allocation.clock import EngineClock, choose_by_clock, keeps_latency
from adalayer_native.allocation.evaluate import Evaluator
from adalayer_native.allocation.latencies import latency_table
from adalayer_native.allocation.measured_tables import Data, measure_tables
from adalayer_native.allocation.options import Option, option_of
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.repaired import RepairedWeights
from adalayer_native.allocation.resources import resources
from adalayer_native.allocation.selection import Selection, selection_of
from adalayer_native.allocation.sensitivity import LogitSensitivity
from adalayer_native.errors import BudgetError, PlanError
from adalayer_native.importance.batches import iterate
from adalayer_native.plan import LayerPlan, Plan
from adalayer_native.pruning.patterns import pattern_mask, pattern_pruned_count
from adalayer_native.repair import HELD_BACK, layer_hessians

pytestmark = pytest.mark.usefixtures("own_cache")

FEW = {"widths": (2, 4, 8), "sparsities": (0.0, 0.5), "step": None, "repaired_plans": 0}
PATTERNS = ("unstructured", "block16x64", "block32x64", "2:4")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Layers of several blocks each; the middle one has blocks that do nearly nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[3].weight[:32] *= 0.01
        net[7].weight *= 5
    return net


def images(count: int = 2, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def optimal(model: nn.Module, budget: Budget, *, fixed=None, tables=None, **options) -> Plan:
    return allocate(
        None, budget, method="optimal", model=model, calibration=images(), fixed=fixed,
        tables=tables, options={**FEW, **options}, progress=False,
    )  # fmt: skip


# -- tables -------------------------------------------------------------------------------------


def test_the_error_table_knows_every_pattern(model, tmp_path) -> None:
    problem, data = Problem(model, None), Data.split(model, images(), None, None)
    settings = Settings(**FEW, patterns=PATTERNS, interactions=False)
    errors = measure_tables(problem, Budget(bits=4), data, settings, progress=False).errors
    assert errors.patterns == PATTERNS
    assert [table.sparsities for table in errors.others] == [(0.0, 0.5)] * 3
    options = errors.options()
    assert len(options) == len(set(options)) == errors.flat().shape[1] == 3 * 5
    hessian = dict(layer_hessians(model, data_of(data), ["3"], held_back=HELD_BACK))["3"]
    measure = LogitSensitivity(model, data.table, {"3": model[3]})
    for pattern in PATTERNS:
        # The entries are of the very weights that a repair by this pattern gives.
        (solution,) = hessian.solutions([(4, 0.5)], pattern=pattern, passes=1)
        expected = measure.error("3", solution.weight, solution.bias_shift)
        found = errors.value("3", 4, 0.5, pattern)
        assert found == pytest.approx(expected, rel=1e-3)
        column = options.index(Option(4, 0.5, pattern))
        assert errors.flat()[errors.layers.index("3"), column] == found
    json.dumps(errors.as_dict(), allow_nan=False)
    assert "2:4" in str(errors.of("2:4").table(0.5).title)
    # A pattern more measures only what is new.
    (file,) = (tmp_path / "cache" / "adalayer_native").glob("errors-*.json")
    names = set(json.loads(file.read_text())["values"])
    assert {"3 4 0.5", "3 4 0.5 2:4", "3 4 0.5 block32x64"} <= names
    with pytest.raises(PlanError, match=r"holds patterns .*not 'channel'"):
        errors.value("3", 4, 0.5, "channel")


def test_statistics_of_a_layer_are_gathered_once_for_all_patterns(model, monkeypatch) -> None:
    problem, data = Problem(model, None), Data.split(model, images(), None, None)
    gathered: list[str] = []
    original = RepairedWeights._gather
    monkeypatch.setattr(
        RepairedWeights, "_gather", lambda self, name: (gathered.append(name), original(self, name))
    )
    weights = RepairedWeights(model, data_of(data), problem.free, memory=1, progress=False)
    settings = Settings(**FEW, patterns=PATTERNS, interactions=False)
    measure_tables(problem, Budget(bits=4), data, settings, weights, progress=False)
    assert gathered == problem.free


def data_of(data: Data) -> list[torch.Tensor]:
    return [batch.x for batch in data.repair]


def test_finer_tables_leave_other_patterns_alone() -> None:
    values = np.array([[[1.0, 4.0]]])
    other = LayerTable("error", "nats", ("a",), (4,), (0.0, 0.5), values, pattern="2:4")
    block = replace(other, pattern="block32x64")
    table = LayerTable("error", "nats", ("a",), (4,), (0.0, 0.5), values, others=(other, block))
    finer = table.finer(0.25, logarithmic=True)
    assert finer.value("a", 4, 0.25) == pytest.approx(2.0)
    assert finer.of("2:4").sparsities == finer.of("block32x64").sparsities == (0.0, 0.5)
    assert Option(4, 0.0, "2:4") not in finer.options()


def test_many_settings_of_a_pattern_in_one_sweep_are_those_of_single_ones(model) -> None:
    hessian = dict(layer_hessians(model, images(), ["3"]))["3"]
    asked = [(2, 0.5), (4, 0.25), (8, 0.0)]
    for pattern in ("block16x64", "block32x64"):
        together = list(hessian.solutions(asked, pattern=pattern, passes=1))
        for (bits, sparsity), solution in zip(asked, together, strict=True):
            alone = hessian.quantize(bits, sparsity, pattern=pattern, passes=1)
            assert torch.equal(solution.levels, alone.levels)
            pruned = int((solution.levels == 0).sum())
            assert pruned >= pattern_pruned_count((64, 64, 3, 3), sparsity, pattern)


def test_plans_are_tried_with_the_weights_of_their_pattern(model) -> None:
    weights = RepairedWeights(model, images(), ["0", "3", "7"], progress=False)
    for weight_of in (None, weights):
        evaluator = Evaluator(model, images(), weight_of=weight_of)
        found, _ = evaluator.replacement("3", Option(4, 0.5, "block32x64"))
        blocks = found.detach().reshape(2, 32, 64, 9).abs().amax(dim=(1, 2))
        assert int((blocks == 0).sum()) == 9
        losses = {
            pattern: evaluator.measure({"3": Option(2, 0.5, pattern)}).loss for pattern in PATTERNS
        }
        assert losses["2:4"] != losses["block32x64"]
    # Half of the blocks hold next to nothing, and magnitude finds them.
    mask = pattern_mask(model[3].weight, 0.5, "block32x64")
    assert not mask[:32].any() and mask[32:].all()


# -- the choice ---------------------------------------------------------------------------------


def test_blocks_are_chosen_where_they_cost_no_mask(model) -> None:
    """Half of the middle layer is empty blocks: leaving them out needs no bit per weight."""
    problem, rest = Problem(model, None), {"weight_of": "rounded", "rounds": 0}
    with pytest.raises(BudgetError, match=r"smallest reachable size is 11,\d\d\d bytes"):
        optimal(model, Budget(bytes=11_000), **rest)
    for size in (11_000, 16_000):
        plan = optimal(model, Budget(bytes=size), patterns=PATTERNS[:3], **rest)
        assert plan["3"].pattern.startswith("block") and plan["3"].sparsity == 0.5
        assert estimate_bytes(model, plan) <= size
        choice = {name: option_of(entry) for name, entry in plan.layers.items()}
        assert problem.cost(choice) == estimate_bytes(model, plan)
        assert Plan.from_json(plan.to_json()) == plan
    other = optimal(model, Budget(bytes=16_000), **rest)
    assert plan.measured["predicted_loss"] < other.measured["predicted_loss"]
    # The check tries plans that treat all layers alike by every pattern.
    checked = optimal(
        model, Budget(bytes=16_000), patterns=PATTERNS[:3], weight_of="rounded", rounds=1, trials=1
    )
    assert estimate_bytes(model, checked) <= 16_000


def test_fixed_entries_keep_their_pattern(model) -> None:
    entry = LayerPlan("3", "conv2d", model[3].weight.numel(), 4, 0.5, "block32x64")
    for how in ("optimal", "uniform"):
        plan = allocate(
            None, Budget(bits=4), method=how, model=model, calibration=images(),
            fixed={"3": entry}, progress=False,
            options={**FEW, "rounds": 0} if how == "optimal" else None,
        )  # fmt: skip
        assert plan["3"] == entry


def test_blocks_are_offered_by_default_where_time_counts() -> None:
    assert Settings().patterns_for(Budget(size=0.1)) == ("unstructured",)
    assert Settings().patterns_for(Budget(latency=1.0)) == PATTERNS[:3]
    asked = Settings(patterns=("2:4", "unstructured"))
    assert asked.patterns_for(Budget(latency=1.0)) == ("unstructured", "2:4")


@pytest.mark.parametrize(
    "patterns", ["unstructured", (), ("2:4",), ("unstructured",) * 2, ("unstructured", "channel")]
)
def test_bad_patterns(model, patterns) -> None:
    with pytest.raises(PlanError, match="patterns must be"):
        optimal(model, Budget(bits=4), patterns=patterns)


# -- latency ------------------------------------------------------------------------------------


class Clock:
    """An engine that takes ``factor`` of what the table says, and a constant more."""

    def __init__(self, selection: Selection, factor: float, more: float) -> None:
        self.table = next(r for r in selection.resources if r.name == "latency").costs.copy()
        self.options, self.names = selection.options, selection.problem.free
        self.factor, self.more, self.calls = factor, more, 0

    def __call__(self, choice) -> float:
        self.calls += 1
        columns = [self.options.index(choice[name]) for name in self.names]
        rows = np.arange(len(columns))
        return self.factor * float(self.table[rows, columns].sum()) + self.more


def timed(model: nn.Module, limit: float) -> Selection:
    """A table in which time grows with the bits."""
    problem, options = Problem(model, None), [Option(bits) for bits in range(2, 9)]
    count = len(problem.free)
    values = np.tile(np.arange(2.0, 9.0)[None, :, None] * 100, (count, 1, 1))
    values *= np.array([1.0, 1.1, 1.2])[:, None, None]
    latency = LayerTable("latency", "µs", tuple(problem.free), tuple(range(2, 9)), (0.0,), values)
    budget = Budget(latency=limit)
    errors = np.tile(4.0 ** -np.arange(2.0, 9.0), (count, 1)) * np.array([[1.0], [2.0], [3.0]])
    return Selection(
        problem, budget, resources(problem, budget, options, {}, latency), options, errors
    )


@pytest.mark.parametrize(("factor", "more"), [(1.0, 0.0), (1.4, 0.0), (0.7, 0.0), (0.8, 0.5)])
def test_the_table_is_scaled_until_the_engine_agrees(model, factor: float, more: float) -> None:
    limit = 1.8
    selection = timed(model, limit)
    clock = Clock(selection, factor, more)
    columns = choose_by_clock(selection, clock)
    taken = clock(selection.choice(columns))
    assert taken <= limit * 1.03
    assert keeps_latency(selection, columns, clock)
    # And the budget is used: one more bit in the cheapest layer would be too much, or nearly.
    assert taken >= limit * 0.85
    assert clock.calls <= clocks.ROUNDS + 3


def test_an_unreachable_latency_names_what_the_fastest_engine_takes(model) -> None:
    selection = timed(model, 0.5)
    # By the table 0.66 ms at least; the engine takes half as long, so that 0.5 ms can be reached.
    assert selection.choose() is None
    assert choose_by_clock(selection, Clock(selection, 0.5, 0.0)) is not None
    selection = timed(model, 0.5)
    with pytest.raises(BudgetError, match=r"latency 0\.5 ms.*smallest reachable latency is 1\.32"):
        choose_by_clock(selection, Clock(selection, 2.0, 0.0))


def test_a_choice_that_is_too_slow_is_noticed(model) -> None:
    selection = timed(model, 1.8)
    columns = selection.choose()
    assert columns is not None
    assert not keeps_latency(selection, columns, Clock(selection, 1.2, 0.0))
    assert not selection.fits(columns)  # the table knows it now


needs_kernels = pytest.mark.skipif(
    ops.isas() == ["scalar"], reason="the scalar interpreter has no profile of its nodes"
)


@needs_kernels
def test_latencies_of_patterns_and_of_the_real_engine(model, tmp_path) -> None:
    problem = Problem(model, None)
    settings = Settings(widths=(8,), sparsities=(0.0, 0.5), threads=1)
    x = images()[0][:1]
    table = latency_table(problem, x, settings, patterns=PATTERNS[:3], progress=False)
    assert table.patterns == PATTERNS[:3] and (table.flat() > 0).all()
    files = list((tmp_path / "cache" / "adalayer_native").glob("latency-*.json"))
    assert len(files) == 1
    again = latency_table(problem, x, settings, patterns=PATTERNS[:3], progress=False)
    assert (again.flat() == table.flat()).all()
    clock = EngineClock(problem, x, settings)
    choice = problem.uniform(8, 0.5, "block32x64")
    took = clock(choice)
    assert 0 < took < 1000
    assert EngineClock(problem, x, settings)(choice) == took  # kept


@needs_kernels
def test_a_latency_budget_ends_with_a_timed_engine(model, monkeypatch) -> None:
    budget = Budget(latency=500.0, bytes=30_000)
    few = {"widths": (4, 8), "rounds": 1, "trials": 1, "threads": 1, "weight_of": "rounded"}
    plan = optimal(model, budget, **few)
    assert 0 < plan.measured["measured latency"] <= 500.0
    assert plan.measured["predicted latency"] == pytest.approx(
        plan.measured["measured latency"], rel=0.5
    )
    result = ada.compress(model, images(), None, plan=plan, repair=False, progress=False)
    assert ada.compile(result.model, images()[0][:1])(images()[0][:1]).shape == (1, 4)
    # Plans whose engines never keep what was predicted are no plans.
    monkeypatch.setattr(method, "keeps_latency", lambda *_: False)
    with pytest.raises(BudgetError, match=r"predicted to keep it, the fastest engine takes .* ms"):
        optimal(model, budget, **few)


def test_selections_know_the_bytes_of_blocks(model) -> None:
    problem = Problem(model, None)
    settings = Settings(**FEW, patterns=PATTERNS[:3], interactions=False, weight_of="rounded")
    data = Data.split(model, images(), None, None)
    budget = Budget(bytes=20_000)
    tables = measure_tables(problem, budget, data, settings, progress=False)
    selection = selection_of(problem, budget, tables, settings)
    size = selection.resources[0]
    row = problem.free.index("3")
    for pattern, blocks in (("block16x64", 4 * 9), ("block32x64", 4 * 9)):
        column = selection.options.index(Option(4, 0.5, pattern))
        assert selection.offered[row, column]
        assert size.costs[row, column] == 64 + -(-blocks // 8) + 64 * 64 * 9 // 4
        # A layer of one block cannot do without it.
        assert not selection.offered[problem.free.index("7"), column]


def test_tables_go_with_whoever_asked_for_them(model) -> None:
    """Not when Python next looks for circles: the repair behind a search needs the memory."""
    model = ada.capture(model, images()[0])  # torch.export leaves circles with its callers' frames
    gc.disable()
    try:
        weights = RepairedWeights(model, images(), ["3", "7"], progress=False)
        data = list(iterate(images(), model))
        layers = {"3": model.get_submodule("3")}
        evaluator = Evaluator(model, images(), weight_of=weights)
        evaluator.measure({"3": Option(4, 0.0)})
        kept = [weights, evaluator, LogitSensitivity(model, data, layers, images=2, directions=1)]
        left = [weakref.ref(each) for each in kept]
        del weights, evaluator, kept
        assert [each() for each in left] == [None, None, None]
    finally:
        gc.enable()
