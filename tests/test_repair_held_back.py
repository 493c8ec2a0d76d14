"""Samples held back from a repair: they judge, nothing is fitted to them, and they decide."""

from __future__ import annotations

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.plan import layer_kind, supported_layers
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair import LayerHessian
from adalayer_native.repair.hessian import CORRECTIONS, DAMPINGS
from adalayer_native.repair.learning import learn
from adalayer_native.repair.streams import Data, float_twin, rows_of


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    """Samples of one distribution with few directions that matter."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) / width**0.5
    mix = mix * torch.linspace(2.0, 0.1, width)[:, None]
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return (x @ mix + 0.3).relu()


def layer_of(width: int, outputs: int = 24) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, outputs).requires_grad_(False)


def held_error(layer: nn.Linear, solution, x: torch.Tensor, exact: torch.Tensor) -> float:
    got = x @ solution.weight.t() + layer.bias + solution.bias_shift
    wanted = layer(exact)
    return float((got - wanted).square().mean(0).sum() / wanted.var(0, unbiased=False).sum())


@pytest.mark.parametrize("rows", [8, 24, 100, 600])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_never_above_plain_rounding_on_samples_held_back(rows: int, bits: int, sparsity: float):
    """Also with fewer samples than inputs, where a repair fits what it has seen and no other."""
    layer, x = layer_of(64), correlated(rows, 64, seed=1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    wrong = x + 0.05 * noise
    held = torch.arange(rows) % 4 == 3
    hessian = LayerHessian(layer)
    for part in range(0, rows, 50):
        own = slice(part, part + 50)
        hessian.add(wrong[own], x[own], held_back=held[own])
    solution = hessian.quantize(bits, sparsity)
    assert solution.held is not None
    found = held_error(layer, solution, wrong[held], x[held])
    best = min(solution.held.error, solution.held.plain_error)
    assert found == pytest.approx(best, rel=1e-3)
    assert found <= solution.held.plain_error * (1 + 1e-4)
    assert len(solution.held.curve) >= 2 and not set(solution.held.curve) - set(DAMPINGS)
    assert solution.held.correction in CORRECTIONS
    # Nothing of the solution comes from them but the choice.
    chosen = solution.held
    alone = LayerHessian(layer, damping=chosen.damping, correction=chosen.correction)
    for part in range(0, rows, 50):
        own = slice(part, part + 50)
        alone.add(wrong[own][~held[own]], x[own][~held[own]])
    if not solution.held.undone:
        assert torch.equal(alone.quantize(bits, sparsity).levels, solution.levels)


def test_fewer_samples_want_a_smaller_correction() -> None:
    layer, chosen = layer_of(64), []
    for rows in (40, 4000):
        x = correlated(rows, 64, seed=2)
        wrong = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        hessian = LayerHessian(layer)
        hessian.add(wrong, x, held_back=torch.arange(rows) % 4 == 3)
        chosen.append(hessian.quantize(4).held.correction)
    assert chosen[0] > chosen[1]


def test_wide_covariances_in_float32_and_dampings_found_downhill(monkeypatch) -> None:
    """What is faster has the same answers: a layer's solution as with float64."""
    from adalayer_native.repair import hessian as module
    from adalayer_native.repair import solver

    layer, x = layer_of(96), correlated(400, 96, seed=6)
    wrong = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))

    def solved():
        hessian = LayerHessian(layer)
        hessian.add(wrong, x, held_back=torch.arange(400) % 4 == 3)
        return hessian.quantize(4)

    usual = solved()
    monkeypatch.setattr(solver, "PRECISE", 1)
    single = solved()
    assert single.held.damping == usual.held.damping
    assert single.held.correction == usual.held.correction
    assert single.error == pytest.approx(usual.error, rel=0.01)
    seen = []
    found = module._descended((1.0, 2.0, 3.0, 4.0), 2.0, lambda v: seen.append(v) or (v - 3) ** 2)
    assert min(found, key=found.get) == 3.0 and sorted(seen) == [2.0, 3.0, 4.0]
    found = module._descended((1.0, 2.0, 3.0), 2.0, lambda value: value)
    assert min(found, key=found.get) == 1.0 and len(found) == 3


def test_a_repair_that_only_suits_its_own_samples_is_undone() -> None:
    layer = layer_of(2)
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    alike, opposite = torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)
    hessian = LayerHessian(layer)
    hessian.add(torch.cat([alike, opposite[:100]]), held_back=torch.arange(500) >= 400)
    solution = hessian.quantize(3)
    assert solution.held.undone
    plain = LayerHessian(layer)
    plain.add(torch.eye(2).repeat(50, 1))
    assert solution.held.error > solution.held.plain_error
    levels, scale = ada.rounding.quantize_weight(layer.weight, 3)
    assert torch.equal(solution.levels, levels)
    assert torch.equal(solution.scale, scale)


def test_samples_are_held_back_evenly_and_with_all_their_rows() -> None:
    x = [torch.zeros(n, 3, 8, 8) for n in (5, 7, 8)]
    data = Data(tiny(), x, None)
    found = data.held_back(0.25)
    assert [len(part) for part in found] == [5, 7, 8]
    assert torch.cat(found).nonzero().flatten().tolist() == [3, 7, 11, 15, 19]
    assert not any(part.any() for part in data.held_back(0.0))
    few = Data(tiny(), [torch.zeros(8, 3, 8, 8)], None)
    assert not few.held_back(0.25)[0].any()
    assert rows_of(torch.tensor([False, True]), torch.zeros(6, 4)).tolist() == 3 * [False] + 3 * [
        True
    ]
    assert not rows_of(torch.tensor([False, True]), torch.zeros(5, 4)).any()


def test_the_report_says_what_was_held_back_and_undone(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    model, data = tiny(), batches(labels=False)
    plan = ada.Plan(
        {n: ada.LayerPlan(n, layer_kind(m), m.weight.numel(), 3)
         for n, m in supported_layers(model).items()}
    )  # fmt: skip
    prepared = ada.prepare(model, plan, data[0])
    ada.calibrate(prepared, data, progress=False)
    report = ada.repair(prepared, data, progress=False)
    assert report.held_back == 8
    for row in report.layers.values():
        assert min(row.held_error, row.held_plain_error) > 0
        assert row.damping in DAMPINGS and row.correction in CORRECTIONS
        assert 2 <= len(row.curve) <= len(DAMPINGS)
    row.held_error = row.held_plain_error + 1
    assert row.undone
    Console(width=200).print(report.table())
    text = capsys.readouterr().out
    assert "32 images, 8 held back" in text
    assert "fc rounded plainly" in text
    with pytest.raises(ada.CalibrationError, match="held_back must be from 0 to"):
        ada.repair(prepared, data, held_back=0.7)
    every = ada.prepare(model, plan, data[0])
    ada.calibrate(every, data, progress=False)
    assert ada.repair(every, data, held_back=0.0, progress=False).held_back == 0


def test_learning_keeps_what_is_better_on_samples_held_back() -> None:
    model, data = tiny(), batches(8, 32, labels=False)
    plan = ada.Plan(
        {n: ada.LayerPlan(n, layer_kind(m), m.weight.numel(), 3, 0.3)
         for n, m in supported_layers(model).items()}
    )  # fmt: skip
    prepared = ada.prepare(model, plan, data[0])
    ada.calibrate(prepared, data, progress=False)
    twin = float_twin(prepared)
    ada.repair(prepared, data, progress=False)
    layers = layers_of(prepared)
    with torch.no_grad():  # the best scale is far from this one
        layers["conv2"].weight_scale.mul_(1.2)
        layers["conv2"].weight.mul_(1.2)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    every = Data(prepared, data, None)
    norms = {"conv1": prepared.get_submodule("bn1")}

    def learned(distance):
        return learn(prepared, twin, norms, every, every.held_back(0.25), distance, progress=False)

    nothing = learned(constant)
    assert nothing.kept == 0
    for key, value in before.items():
        torch.testing.assert_close(prepared.state_dict()[key], value)
    found = learned(relative)
    assert found.curve[found.kept] == min(found.curve) < 0.9 * found.curve[0]
    after = prepared.state_dict()
    assert set(before) == set(after)
    smaller = after["conv2.weight_scale"] < before["conv2.weight_scale"]
    assert float(smaller.float().mean()) > 0.8
    assert not torch.equal(after["bn1.bias"], before["bn1.bias"])
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert all(parameter.requires_grad for parameter in prepared.parameters())
    for name, layer in layers.items():  # on the grid, and pruned is what was
        assert torch.equal(layer.mask, before[f"{name}.mask"])
        assert not layer.weight[~layer.mask].any()
        scale = layer.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1))
        torch.testing.assert_close(layer.integers() * scale, layer.weight, rtol=1e-6, atol=1e-7)
    # The whole repair does it, too, where it is told what counts.
    ada.calibrate(prepared, data, progress=False)
    report = ada.repair(prepared, data, distance=relative, progress=False)
    assert report.learned is not None and len(report.learned.curve) > 1


def relative(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()


def constant(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return 0.0 * found.sum() + 1.0


def test_what_is_released_is_made_again() -> None:
    """Many layers' statistics wait for questions; their factors need not."""
    layer, x = layer_of(16), correlated(200, 16, seed=1)
    hessian = LayerHessian(layer)
    hessian.add(x, held_back=torch.arange(200) % 4 == 3)
    settings = [(4, 0.0), (3, 0.5)]
    before = list(hessian.solutions(settings))
    hessian.release()
    assert hessian._solver is None and not hessian._equations and "_judge" not in vars(hessian)
    for first, second in zip(before, hessian.solutions(settings), strict=True):
        assert torch.equal(first.levels, second.levels)
        assert torch.equal(first.scale, second.scale)
        assert first.held == second.held
