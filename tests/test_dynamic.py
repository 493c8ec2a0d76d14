"""Widths that follow gradients and activations: known statistics, bounds, going on, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training import Interrupting, batches, model, run, same
from torch import fx

import adalayer_native as ada
from adalayer_native.allocation import everywhere
from adalayer_native.errors import PlanError
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.quantization.graph import layers_of, quantizers_of
from adalayer_native.training import DynamicWidths
from adalayer_native.training.dynamic import DynamicSchedule


def start(bits: int = 2) -> fx.GraphModule:
    plan = everywhere(model(), bits)
    for layer in plan.layers.values():
        layer.activation_bits = bits
    prepared = prepare(model(), plan)
    calibrate(prepared, batches(2), progress=False)
    return prepared


def feed(schedule: DynamicSchedule, noise: dict[str, float], time: float) -> None:
    """A window of gradients with signal 1 and some noise, both per element, and its end."""
    generator = torch.Generator().manual_seed(0)
    states: dict[Any, dict[str, torch.Tensor]] = {}
    optimizer = SimpleNamespace(state=states, param_groups=[{"momentum": 0.5}])
    for _ in range(200):
        for name, layer in schedule.layers.items():
            weight = layer.weight
            weight.grad = 1.0 + noise[name] * torch.randn(weight.shape, generator=generator)
        schedule.observe(optimizer)  # type: ignore[arg-type]
        for layer in schedule.layers.values():
            weight = layer.weight
            before = states.get(weight, {"momentum_buffer": torch.zeros_like(weight)})
            states[weight] = {"momentum_buffer": 0.5 * before["momentum_buffer"] + weight.grad}
    schedule.update(time)


def test_weights_get_bits_as_their_gradient_drowns() -> None:
    prepared = start()
    schedule = DynamicSchedule(prepared, DynamicWidths(2, 4, windows=10, hold=0.0))
    feed(schedule, {"0": 1.0, "6": 1.0}, 0.1)
    first = schedule.notes()
    assert first["snr_db"] == pytest.approx({"0": 0.0, "6": 0.0}, abs=0.7)  # |1|^2 over 1^2
    assert first["widths"] == {"0": 2, "6": 2}
    # 10 dB less in one layer: a bit per window up to the upper bound. As before in the other.
    for window, bits in ((2, 3), (3, 4), (4, 4)):
        feed(schedule, {"0": math.sqrt(12.0), "6": 1.0}, 0.1 * window)
        assert schedule.notes()["widths"] == {"0": bits, "6": 2}
        assert layers_of(prepared)["0"].bits == prepared.meta["layers"]["0"]["bits"] == bits
    assert schedule.notes()["snr_db"]["0"] == pytest.approx(-10.8, abs=0.7)
    feed(schedule, {"0": 1.0, "6": 1.0}, 0.5)  # and back
    assert schedule.notes()["widths"] == {"0": 3, "6": 2}
    schedule.finish()
    assert schedule.done
    assert schedule.plan()["0"].bits == 3


def test_inputs_get_bits_as_their_values_spread() -> None:
    prepared = start()
    schedule = DynamicSchedule(prepared, DynamicWidths(2, 5, windows=4, hold=0.0))
    names = [prepared.meta["layers"][name]["input"] for name in ("0", "6")]
    modules = [quantizers_of(prepared)[name] for name in names]
    flat = torch.linspace(0, 1, 4096).reshape(16, -1)  # every level alike: 5 bits
    few = (flat > 0.5).float()  # two values: one bit
    for window in (1, 2, 3):
        schedule.watch(0)
        for module, value in zip(modules, (flat, few), strict=True):
            module(value)
        schedule.observe(SimpleNamespace(state={}, param_groups=[{}]))  # type: ignore[arg-type]
        modules[1](flat)  # an evaluation between steps is not looked at
        schedule.update(0.25 * window)
    notes = schedule.notes()
    assert notes["entropy"] == pytest.approx({"0": 5.0, "6": 1.0}, abs=1e-3)
    assert notes["input_widths"] == {"0": 5, "6": 2}
    assert [module.bits for module in modules] == [5, 2]
    schedule.finish()


def test_a_run_stays_within_its_bounds_and_ends_with_a_plan(tmp_path: Path) -> None:
    prepared = start()
    history = run(prepared, batches(), 6, widths=DynamicWidths(2, 4, windows=12, decades=0.2))
    assert not history.plan.scores
    seen = {
        bits
        for epoch in history.epochs
        for key in ("widths", "input_widths")
        for bits in epoch[key].values()
    }
    assert seen <= {2, 3, 4} and len(seen) > 1
    last = history.epochs[-1]
    for name, layer in history.plan.layers.items():
        assert layer.bits == last["widths"][name] == layers_of(prepared)[name].bits
        assert layer.activation_bits == last["input_widths"][name]
    native = convert(prepared)
    x = batches(1)[0][0]
    ada.save(native, tmp_path / "model.safetensors")
    assert torch.equal(ada.restore(model(), tmp_path / "model.safetensors")(x), native(x))
    ada.plot.widths(history.epochs, tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 1000
    with pytest.raises(PlanError, match="did not change any"):
        ada.plot.widths([{"epoch": 1, "loss": 1.0}])


@pytest.mark.parametrize("at", [5, 14])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, at: int) -> None:
    options = {"widths": DynamicWidths(2, 4, windows=8, decades=0.2)}
    whole = start()
    expected = run(whole, Interrupting(None), 3, **options)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(start(), Interrupting(at, by_signal=True), 3, checkpoint=path, **options)
    again = start()
    history = run(again, Interrupting(None), 3, checkpoint=path, **options)
    assert history.resumed
    assert same(whole, again)
    assert history.plan == expected.plan
    assert [e["snr_db"] for e in history.epochs] == [e["snr_db"] for e in expected.epochs]


def test_refusals() -> None:
    for options, message in (
        ({"low": 4, "high": 4}, "from low to a higher high"),
        ({"high": 9}, "within 2 and 8 bits, got 2 and 9"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"hold": 1.5}, "hold must be from 0 to 1"),
        ({"decades": 0.0}, "decades must be from"),
        ({"margin": 0.5}, "margin must be above"),
    ):
        with pytest.raises(PlanError, match=message):
            DynamicWidths(**options)
    with pytest.raises(PlanError, match=r"begin at 2 bits, but layer '0' has 3 bits"):
        run(start(3), batches(), 1, widths=DynamicWidths())
    with pytest.raises(PlanError, match="momentum, got 0"):
        run(start(), batches(), 1, widths=DynamicWidths(), momentum=0.0)
