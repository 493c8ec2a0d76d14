"""Method "optimal": the tables of errors and latencies, and where they are kept."""

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
from adalayer_native.allocation import (
    Budget,
    Settings,
    estimate_bytes,
    packed_bytes,
)
from adalayer_native.allocation.evaluate import Evaluator, Measurement
from adalayer_native.allocation.measured_tables import Data, measure_tables
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.repaired import RepairedWeights
from adalayer_native.allocation.repaired_plans import best_repaired, plans_to_repair
from adalayer_native.allocation.selection import selection_of
from adalayer_native.allocation.sensitivity import LogitSensitivity
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.importance.batches import iterate, kl_divergence
from adalayer_native.pruning.masks import pruned_count
from adalayer_native.repair import HELD_BACK, layer_hessians

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return uneven()


def test_sensitivity_is_the_loss_of_small_errors(model) -> None:
    data = list(iterate(batches(1, 64), model))
    layers = {name: model.get_submodule(name) for name in ("conv1", "conv2", "fc")}
    measure = LogitSensitivity(model, data, layers, directions=64)
    evaluator_data = [b.x for b in data]
    torch.manual_seed(0)
    for name, layer in layers.items():
        changed = layer.weight.detach() + 0.02 * torch.randn_like(layer.weight)
        real = Evaluator(model, evaluator_data, weight_of=lambda *_, w=changed: w).measure(
            {name: (8, 0.0)}
        )
        assert measure.error(name, changed) == pytest.approx(real.loss, rel=0.3)
        assert measure.error(name, layer.weight.detach()) == 0.0


def test_sensitivity_counts_a_shift_of_the_bias(model) -> None:
    layers = {"conv1": model.conv1, "fc": model.fc}
    measure = LogitSensitivity(model, list(iterate(batches(1, 32), model)), layers)
    for name, layer in layers.items():
        shift = torch.linspace(-0.1, 0.1, layer.weight.shape[0])
        assert measure.error(name, layer.weight.detach(), shift) > 0
        data = batches(1, 32, labels=False)
        plain, moved = (
            Evaluator(
                model, data, weight_of=lambda n, b, s, v=v: (model.get_submodule(n).weight, v)
            )
            for v in (None, shift)
        )
        assert plain.measure({name: (8, 0.0)}).loss == pytest.approx(0, abs=1e-7)
        assert moved.measure({name: (8, 0.0)}).loss > 1e-6
    assert not model.conv1._forward_hooks  # nothing is left on the model


class Twice(nn.Module):
    """One layer that runs twice, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def test_layers_called_twice_frozen_and_in_place() -> None:
    torch.manual_seed(0)
    net = Twice().eval().requires_grad_(False)
    data = list(iterate(batches(1, 64), net))
    measure = LogitSensitivity(net, data, {"conv": net.conv}, directions=64)
    changed = net.conv.weight + 0.01 * torch.randn_like(net.conv.weight)
    real = Evaluator(net, [b.x for b in data], weight_of=lambda *_: changed)
    assert measure.error("conv", changed) == pytest.approx(
        real.measure({"conv": (8, 0.0)}).loss, rel=0.35
    )


def test_an_own_repair_and_an_own_error(model) -> None:
    seen: list[tuple[str, int, float]] = []

    def weight_of(name: str, bits: int, sparsity: float) -> torch.Tensor:
        seen.append((name, bits, sparsity))
        return model.get_submodule(name).weight.detach() * (1 - 0.1**bits)

    plan = optimal(model, Budget(bytes=2000), weight_of=weight_of, rounds=1, trials=2)
    assert {name for name, _, _ in seen} == {"conv1", "conv2", "fc"}
    assert plan.measured["calibration_loss"] < 1e-3
    # A layer that must not be touched, by one's own measure.
    plan = optimal(
        model,
        Budget(bytes=2100),
        measure=lambda name, bits, sparsity: (name == "fc") * 100.0 / bits + sparsity,
        interactions=False,
        rounds=0,
    )
    assert plan["fc"].bits == 8
    with pytest.raises(CalibrationError, match=r"weight_of gave shape \(3,\)"):
        optimal(model, Budget(bytes=2100), weight_of=lambda *_: torch.zeros(3))
    with pytest.raises(CalibrationError, match=r"layer 'conv1' at 2 bits.*error is nan"):
        optimal(model, Budget(bytes=2100), measure=lambda *_: float("nan"))


def test_tables_are_of_repaired_weights(model, tmp_path) -> None:
    problem, budget = Problem(model, None), Budget(size=1.0)
    data = Data.split(model, batches(3, 40), None, None)
    assert sum(b.count for b in data.repair) == 60
    assert sum(b.count for b in data.table) == sum(b.count for b in data.check) == 30
    tables = {
        kind: measure_tables(problem, budget, data, Settings(**FEW, weight_of=kind)).errors
        for kind in ("repaired", "rounded")
    }
    assert tables["repaired"].about["weights"] == "repaired"
    assert len(files(tmp_path)) == 2  # one never stands for the other
    repaired, rounded = (np.nansum(tables[kind].values[:, :2]) for kind in tables)
    assert repaired < 0.8 * rounded
    # The entries are of the very weights that LayerHessian gives.
    images = [b.x for b in data.repair]
    hessian = dict(layer_hessians(model, images, ["conv2"], held_back=HELD_BACK))["conv2"]
    (solution,) = hessian.solutions([(2, 0.6)], passes=1)
    measure = LogitSensitivity(model, data.table, {"conv2": model.conv2})
    expected = measure.error("conv2", solution.weight, solution.bias_shift)
    assert tables["repaired"].value("conv2", 2, 0.6) == pytest.approx(expected, rel=1e-3)


def test_repaired_weights_in_little_memory(model) -> None:
    data, names = [x for x, _ in batches(2, 24)], ["conv1", "conv2", "fc"]
    options = [Option(bits, sparsity) for bits in (2, 4) for sparsity in (0.0, 0.5)]
    roomy = RepairedWeights(model, data, names, progress=False)
    tight = RepairedWeights(model, data, names, memory=1, progress=False)
    roomy.expect("conv2", options)
    for name, (bits, sparsity, *_) in itertools.product(names, options):
        one, other = roomy(name, bits, sparsity), tight(name, bits, sparsity)
        torch.testing.assert_close(one, other)
        weight = model.get_submodule(name).weight
        assert one[0].shape == weight.shape and one[1].shape == (weight.shape[0],)
        assert int((one[0] != 0).sum()) <= weight.numel() - round(weight.numel() * sparsity)
    assert len(tight._hessians) == 1 and len(tight._known) == 1


def test_repaired_weights_of_grouped_depthwise_and_transposed_layers() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=4), nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, 2, groups=3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    plan = optimal(net, Budget(bits=3), rounds=1, trials=2)
    assert plan.average_bits <= 3 + 1e-9
    assert plan.measured["calibration_loss"] < 0.1


def test_the_last_plans_are_repaired_whole_and_compared(model, tmp_path, monkeypatch) -> None:
    budget, options = Budget(bytes=1900), {"rounds": 1, "trials": 2, "repaired_plans": 5}
    assert optimal(model, budget, **options).measured["calibration_loss"] < 3e-3
    assert len(files(tmp_path)) == 1  # so nothing was compared
    monkeypatch.setattr("adalayer_native.allocation.optimal.NEGLIGIBLE", 0.0)
    plan = optimal(model, budget, **options)
    (kept,) = (json.loads(f.read_text()) for f in files(tmp_path) if f.name.startswith("finals"))
    losses = {k[5:]: v for k, v in kept["values"].items() if k.startswith("loss ")}
    assert 3 <= len(losses) <= 5 + 2  # and those of other methods
    chosen = json.dumps([[n, e.bits, round(e.sparsity, 6)] for n, e in plan.layers.items()])
    assert losses[chosen] == min(losses.values()) == plan.measured["calibration_loss"]
    assert estimate_bytes(model, plan) <= 1900
    # The number is that of the steps a person would take.
    data = Data.split(model, batches(2, 24), None, None)
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [b.x for b in data.repair], progress=False)
    ada.repair(prepared, [b.x for b in data.repair], equalize=False, passes=1, progress=False)
    x = torch.cat([b.x.args[0] for b in data.check])
    with torch.no_grad():
        assert kl_divergence(model(x), prepared(x)) == pytest.approx(losses[chosen], rel=1e-4)
    # And it is not measured twice.
    monkeypatch.setattr("adalayer_native.allocation.repaired_check.repair", lambda *_, **__: 1 / 0)
    assert optimal(model, budget, **options) == plan


def test_pruning_that_saves_nothing_is_not_offered(model) -> None:
    data = Data.split(model, batches(2, 24), None, None)
    settings, budget = Settings(widths=(2, 4), sparsities=(0.0, 0.6)), Budget(bytes=1700)
    problem = Problem(model, None)
    tables = measure_tables(problem, budget, data, settings, progress=False)
    selection = selection_of(problem, budget, tables, settings)
    for column, (bits, sparsity, *_) in enumerate(selection.options):
        for row, name in enumerate(problem.free):
            count = model.get_submodule(name).weight.numel()
            kept = count - pruned_count(count, sparsity)
            saves = packed_bytes(count, kept, bits) < packed_bytes(count, count, bits)
            if sparsity <= 0.6 and (sparsity == 0 or bits == 4):
                assert selection.offered[row, column] == (saves or sparsity == 0), (name, sparsity)


def test_plans_to_repair_and_what_corrects_them(model) -> None:
    data = Data.split(model, batches(2, 24), None, None)
    settings, budget = Settings(widths=(2, 3, 4, 8), sparsities=(0.0, 0.6)), Budget(bytes=1700)
    problem = Problem(model, None)
    tables = measure_tables(problem, budget, data, settings, progress=False)
    selection = selection_of(problem, budget, tables, settings)
    first = selection.choose()
    assert first is not None
    found = plans_to_repair(selection, first, 8)
    assert (found[0] == first).all() and all(selection.fits(choice) for choice in found)
    assert len({choice.tobytes() for choice in found}) == len(found)
    alike = [choice for choice in found if len(set(choice.tolist())) == 1]
    assert alike
    bits, sparsity, *_ = selection.options[alike[0][0]]
    # It uses the budget: a thousandth less pruning would not fit.
    assert sparsity == 0 or not problem.limited(budget).fits(
        problem.uniform(bits, sparsity - 0.001)
    )
    pruned = np.array([option.sparsity > 0 for option in selection.options])

    def pruning_is_free(choice: np.ndarray) -> Measurement:
        errors = selection.errors * np.where(pruned, 0.2, 1.0)
        return Measurement(selection.predicted(choice, errors), float("nan"))

    best, measurement = best_repaired(selection, first, pruning_is_free, count=8, progress=False)
    assert measurement.loss == pruning_is_free(best).loss
    assert all(measurement.loss <= pruning_is_free(choice).loss for choice in found[:6])
    # Two plans in a row that gain nothing are enough, where that is asked for.
    measured: list[np.ndarray] = []

    def never_better(choice: np.ndarray) -> Measurement:
        measured.append(choice)
        return Measurement(1.0 + len(measured), float("nan"))

    best, _ = best_repaired(selection, first, never_better, count=8, gain=0.02, progress=False)
    assert (best == first).all() and len(measured) == 3


def test_effort_says_what_options_do_not() -> None:
    low, normal, high = (Settings(effort=effort) for effort in ("low", "normal", "high"))
    work = 1e12  # of a repair that is much work
    assert [s.repaired_plans_for(work) for s in (low, normal, high)] == [0, 3, 16]
    assert low.search_rounds < normal.search_rounds < high.search_rounds
    assert low.search_trials < normal.search_trials < high.search_trials
    assert low.gain > normal.gain > high.gain == 0
    assert not low.compares_other_methods and normal.compares_other_methods
    given = Settings(effort="low", rounds=3, trials=2, repaired_plans=5, other_methods=True)
    assert (given.search_rounds, given.search_trials, given.repaired_plans_for(work)) == (3, 2, 5)
    assert given.compares_other_methods
    with pytest.raises(PlanError, match="unknown effort 'lots': expected one of"):
        Settings(effort="lots").check()


def test_measured_loss_as_error(model) -> None:
    options = {"measure": "loss", "rounds": 0, "interactions": False, "weight_of": "rounded"}
    plan = optimal(model, Budget(bytes=2000), **options)
    data = Data.split(model, batches(2, 24), None, None).table
    evaluator = Evaluator(model, [(b.x, b.target) for b in data])
    for name, entry in plan.layers.items():
        if entry.bits == 2:  # no monotone repair moves the largest error of a column much
            real = evaluator.measure({name: (2, entry.sparsity)}).loss
            assert plan.scores[name]["E"] == pytest.approx(real, rel=0.2)


def test_tables_are_kept_and_keyed(model, tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    original = LogitSensitivity.error

    def counting(self, name, *rest):
        calls.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(LogitSensitivity, "error", counting)
    first = optimal(model, Budget(bytes=2000), rounds=0)
    count = len(calls)
    assert count > 0 and len(files(tmp_path)) == 1
    assert optimal(model, Budget(bytes=2200), rounds=0) != first
    assert len(calls) == count  # another budget, the same table
    other = tiny(1)
    optimal(other, Budget(bytes=2000), rounds=0)
    assert len(calls) == 2 * count and len(files(tmp_path)) == 2
    optimal(model, Budget(bytes=2000), rounds=0, data=batches(2, 24, seed=5))
    assert len(calls) == 3 * count and len(files(tmp_path)) == 3
    optimal(model, Budget(bytes=2000), rounds=0, tables=tmp_path / "explicit")
    assert len(list((tmp_path / "explicit").glob("errors-*.json"))) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: json.dumps({**json.loads(text), "key": {}}),
        lambda text: json.dumps({**json.loads(text), "values": {"a": "x"}}),
        lambda text: text.replace('"values": {', '"values": {"a": Infinity, '),
    ],
)
def test_a_damaged_table_is_reported_and_measured_anew(model, tmp_path, damage) -> None:
    plan = optimal(model, Budget(bytes=2000), rounds=0)
    (file,) = files(tmp_path)
    good = file.read_text()
    file.write_text(damage(good))
    with pytest.warns(UserWarning, match=rf"{file.name}.*cannot be used.*measured anew"):
        assert optimal(model, Budget(bytes=2000), rounds=0) == plan
    assert file.read_text() == good
    assert not list(file.parent.glob("*.tmp"))


def test_an_interrupted_table_goes_on(model, tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    original = LogitSensitivity.error

    def interrupted(self, name, *rest):
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, name, *rest)

    monkeypatch.setattr(LogitSensitivity, "error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimal(model, Budget(bytes=2000), rounds=0)
    assert len(json.loads(files(tmp_path)[0].read_text())["values"]) == 7
    resumed = optimal(model, Budget(bytes=2000), rounds=0)
    entries = len(json.loads(files(tmp_path)[0].read_text())["values"])
    assert len(calls) == entries + 1  # the interrupted one alone was measured twice
    assert resumed == optimal(model, Budget(bytes=2000), rounds=0, tables=tmp_path / "other")


def test_the_cache_directory_follows_xdg(monkeypatch, tmp_path) -> None:
    from adalayer_native.allocation.store import cache_dir

    assert cache_dir() == tmp_path / "cache" / "adalayer_native"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "adalayer_native"
    assert cache_dir(tmp_path / "x") == tmp_path / "x"


def test_finer_tables_interpolate_and_keep_what_was_measured(model) -> None:
    settings = Settings(widths=(2, 4), sparsities=(0.0, 0.6), step=None)
    data = Data.split(model, batches(2, 24), None, None)
    tables = measure_tables(Problem(model, None), Budget(bits=3), data, settings, progress=False)
    table = tables.errors
    finer = table.finer(0.15, logarithmic=True)
    assert finer.sparsities == (0.0, 0.15, 0.3, 0.45, 0.6)
    for name, bits in itertools.product(table.layers, table.bits):
        ends = [table.value(name, bits, s) for s in (0.0, 0.6)]
        assert [finer.value(name, bits, s) for s in (0.0, 0.6)] == ends
        assert finer.value(name, bits, 0.3) == pytest.approx(np.sqrt(np.prod(ends)))
    with pytest.raises(PlanError, match="unknown layer 'conv9'"):
        table.value("conv9", 2)
    with pytest.raises(PlanError, match="not 3 and 0"):
        table.value("conv1", 3)
