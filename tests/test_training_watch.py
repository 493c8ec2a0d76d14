"""Watching a training run, and widths that change over it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_models import batches, tiny

import adalayer_native as ada
from adalayer_native.errors import PlanError
from adalayer_native.quantization.graph import layers_of, quantizers_of
from adalayer_native.training import Paused, Watch, finetune, fit
from adalayer_native.training.widths import WidthSchedule, narrow_for_ranges


class Pausing(Watch):
    """Pauses after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def pause(self) -> bool:
        self.steps -= 1
        return self.steps == 0


def prepared(bits: int) -> torch.nn.Module:
    model = tiny()
    plan = ada.allocate(None, None, method="fixed", model=model, bits=bits, activation_bits=bits)
    return ada.calibrate(ada.prepare(model, plan), batches(), progress=False)


OPTIONS = {"lr": 0.02, "ema": 0.0, "ramp": 0.0, "progress": False, "amp": False}


def test_an_epoch_is_watched_in_evaluation_mode() -> None:
    seen = []

    class Looking(Watch):
        def epoch(self, model, entry):
            seen.append((model.training, entry["epoch"]))
            return {"more": 10 * entry["epoch"]}

        def stop(self, entry):
            return entry["more"] == 20

    history = fit(tiny(), batches(), 5, watch=Looking(), progress=False, amp=False)
    assert seen == [(False, 1), (False, 2)]
    assert [entry["more"] for entry in history.epochs] == [10, 20]
    assert not history.finished


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_paused_run_goes_on_to_the_same_end(tmp_path, steps: int) -> None:
    whole = prepared(3)
    finetune(whole, batches(), 3, widths=(5, 4, 3), **OPTIONS)
    file = tmp_path / "run.safetensors"
    half = prepared(3)
    with pytest.raises(Paused):
        finetune(
            half, batches(), 3, widths=(5, 4, 3), checkpoint=file, watch=Pausing(steps), **OPTIONS
        )
    again = prepared(3)
    history = finetune(again, batches(), 3, widths=(5, 4, 3), checkpoint=file, **OPTIONS)
    assert history.resumed
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_widths_over_time() -> None:
    """Six steps through 2, 3 and 4 bits: two steps each, weights and their inputs alike."""
    model = prepared(4)
    found = []

    class Looking(Watch):
        def pause(self):
            found.append(
                (
                    {layer.bits for layer in layers_of(model).values()},
                    {q.bits for q in quantizers_of(model).values()},
                    max(len(layer.integers().unique()) for layer in layers_of(model).values()),
                )
            )
            return False

    finetune(model, batches(), 3, widths=(2, 3, 4), watch=Looking(), **OPTIONS)
    widths = [2, 2, 3, 3, 4, 4]
    assert [bits for bits, _, _ in found] == [{width} for width in widths]
    # What the average pool alone reads keeps its 8 bits.
    assert [bits for _, bits, _ in found] == [{width, 8} for width in widths]
    assert all(levels <= 2**width for (_, _, levels), width in zip(found, widths, strict=True))
    native = ada.convert(model)
    x = batches()[0][0]
    with ada.simulate(model, exact=True), torch.no_grad():
        assert torch.equal(native(x), model(x))


def test_steps_follow_the_number_of_levels() -> None:
    """With the range kept, 2 bits would have a step five times as large as 4 bits."""
    model = prepared(4)
    read = {entry["input"] for entry in model.meta["layers"].values()}
    # Behind a ReLU; elsewhere zero must be a level, which moves the step too.
    before = {
        name: q.scale
        for name, q in quantizers_of(model).items()
        if name in read and q.constants()[2] == 0
    }
    assert before
    schedule = WidthSchedule(model, (2, 4))
    for width, expected in ((2, math.sqrt(15 / 3)), (4, 1.0)):
        schedule.update(0.0 if width == 2 else 1.0)
        for name, scale in before.items():
            quantizer = quantizers_of(model)[name]
            assert quantizer.bits == width
            assert float(quantizer.scale) == pytest.approx(float(scale) * expected, rel=1e-4)


def test_ranges_for_the_fewest_bits_that_training_goes_through() -> None:
    """They are those of a plan of that width, and training that begins there keeps them."""
    plan = ada.allocate(None, None, method="fixed", model=tiny(), bits=4, activation_bits=4)
    model = narrow_for_ranges(ada.prepare(tiny(), plan), (2, 4))
    ada.calibrate(model, batches(), progress=False)
    expected, found = quantizers_of(prepared(2)), quantizers_of(model)
    read = {entry["input"] for entry in model.meta["layers"].values()}
    scales = {name: float(expected[name].scale) for name in read}
    assert {name: (found[name].bits, float(found[name].scale)) for name in read} == {
        name: (2, scale) for name, scale in scales.items()
    }
    WidthSchedule(model, (2, 4)).update(0.0)
    for name, scale in scales.items():
        assert float(found[name].scale) == pytest.approx(scale, rel=1e-6)
    finetune(model, batches(), 2, widths=(2, 4), **OPTIONS)
    assert {layer.bits for layer in layers_of(model).values()} == {4}
    falling = narrow_for_ranges(prepared(2), (4, 3, 2))
    assert {layer.bits for layer in layers_of(falling).values()} == {2}
    with pytest.raises(PlanError, match="end at 8 bits, but layer 'conv1' has 4 bits"):
        narrow_for_ranges(model, (2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "at least one width"),
        ({"widths": (9, 4)}, "from 2 to 8, got 9"),
        ({"widths": (2.5, 4)}, "whole numbers, got 2.5"),
        ({"widths": (2, 3)}, "widths end at 3 bits, but layer 'conv1' has 4 bits"),
        ({"widths": (2, 4), "extra_bits": 1}, "both say how the bits change"),
    ],
)
def test_widths_refuse(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        finetune(prepared(4), batches(), 1, progress=False, **options)
