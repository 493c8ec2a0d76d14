"""compare: what it finds, what its numbers are, and what its suggestions do."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers_microscope import (
    Depthwise,
    Residual,
    Several,
    Tokens,
    captured,
    data_of,
    prepared_of,
    quantizer_of,
    seeded,
)
from torch import nn

import adalayer_native as ada
from adalayer_native import CalibrationError, FileFormatError, InputError, UnsupportedModelError
from adalayer_native.importance.outputs import distance
from adalayer_native.microscope.pairing import pairs_of
from adalayer_native.nn.float_layer import FloatLayer

# A layer in the middle of each network, and the values that its input lies on.
MIDDLE = {Residual: "b2", Depthwise: "deep", Tokens: "encoder.linear2"}


def compared(model: nn.Module, native: nn.Module, data: list, **options) -> ada.Comparison:
    return ada.compare(model, native, data, progress=False, **options)


# -- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", MIDDLE)
def test_nothing_is_found_where_nothing_is_wrong(network) -> None:
    model, data = captured(network), data_of(network)
    found = compared(model, ada.convert(prepared_of(model, data)), data, suggest=False)
    assert [row.finding for row in found if row.finding] == []
    assert min(row.snr for row in found) > 25
    assert found.samples == 64 and found.judging == 0
    assert found.suggestions == () and found.note == ""


@pytest.mark.parametrize("network", MIDDLE)
def test_finds_a_clipped_range(network) -> None:
    model, data, layer = captured(network), data_of(network), MIDDLE[network]
    prepared = prepared_of(model, data)
    quantizer = quantizer_of(prepared, layer)
    top = 255 * quantizer.scale - quantizer.zero_point * quantizer.scale
    quantizer.set_range(0.0, 0.3 * top)
    # (Trying changes copies the model each time, which takes longest for the tokens' graph.)
    found = compared(model, ada.convert(prepared), data, suggest=network is not Tokens)
    worst = found.rows[0]
    assert worst.name == layer and "clips" in worst.finding and "shifted" not in worst.finding
    assert worst.clipped > 0.01 and worst.calibrated[1] < 0.5 * worst.observed[1]
    assert worst.activations > 100 * worst.weights
    if network is Tokens:
        return
    first = found.suggestions[0]
    assert (first.name, first.kind, first.bytes) == (layer, "range", 0)
    assert first.value[1] > 0.6 * top and first.recovered > 0.8


@pytest.mark.parametrize("network", MIDDLE)
def test_finds_a_layer_of_two_bits(network) -> None:
    model, data, layer = captured(network), data_of(network), MIDDLE[network]
    native = ada.convert(prepared_of(model, data, 8, {layer: 2}))
    found = compared(model, native, data)
    worst = found.rows[0]
    assert (worst.name, worst.bits) == (layer, 2)
    assert worst.finding == "the weights' rounding to 2 bits"
    assert worst.weights > 100 * worst.activations
    first = found.suggestions[0]
    assert (first.name, first.kind) == (layer, "bits")
    assert 2 < first.value <= 8 and first.bytes > 0 and first.recovered > 0.5


@pytest.mark.parametrize("network", MIDDLE)
def test_finds_a_wrong_zero_point(network) -> None:
    model, data, layer = captured(network), data_of(network), MIDDLE[network]
    prepared = prepared_of(model, data)
    quantizer_of(prepared, layer).qparams[1] += 150
    found = compared(model, ada.convert(prepared), data, suggest=network is not Tokens)
    worst = found.rows[0]
    assert worst.name == layer and "zero point 15" in worst.finding
    if network is Tokens:
        return
    first = found.suggestions[0]
    assert (first.name, first.kind) == (layer, "range")
    assert first.value[0] > -0.01 and first.recovered > 0.6


def test_finds_a_fault_in_a_value_that_an_addition_reads() -> None:
    model, data = captured(Residual), data_of(Residual)
    prepared = prepared_of(model, data)
    quantizer = quantizer_of(prepared, "a1")  # which the addition behind a2 reads, too
    quantizer.set_range(0.0, 0.3 * 255 * quantizer.scale)
    found = compared(model, ada.convert(prepared), data)
    assert {row.name for row in found.rows[:2]} == {"a1", "act_quant.relu"}
    assert found["act_quant.relu"].kind == "value" and found["act_quant.relu"].weights is None
    assert found["act_quant.relu"].accumulated > 100 * statistics_of(found)
    (first, *_) = found.suggestions
    assert first.kind == "range" and first.recovered > 0.8
    # The change is made wherever the value is rounded: in a1, and in what the addition reads.
    after = compared(model, first.apply(ada.convert(prepared)), data, suggest=False)
    assert after["act_quant.relu"].accumulated < 0.01 * found["act_quant.relu"].accumulated
    assert after["a1"].own < 0.01 * found["a1"].own


def statistics_of(found: ada.Comparison) -> float:
    own = sorted(row.own for row in found)
    return own[len(own) // 2]


# -- numbers --------------------------------------------------------------------------------------


def test_numbers_of_one_layer_by_hand() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2)
        model[1].bias.uniform_(-1, 1)
    data = [torch.randn(8, 3, 8, 8)]
    prepared = prepared_of(model, data, 3)
    quantizer_of(prepared, "0").set_range(-2.0, 2.0)
    native = ada.convert(prepared)
    (row,) = compared(model, native, data, suggest=False)
    x = data[0]
    with torch.no_grad():
        wanted = model[1](model[0](x))
        quantizer, layer = quantizer_of(prepared, "0"), prepared.get_submodule("0")
        rounded = torch.conv2d(x, layer.quantized_weight(), model[0].bias, padding=1)
        on_grid = quantizer(x)
        results = {
            "weights": model[1](rounded),
            "activations": model[1](model[0](on_grid)),
            "own": model[1](
                torch.conv2d(on_grid, layer.quantized_weight(), model[0].bias, padding=1)
            ),
        }
    for kind, result in results.items():
        error = float((result - wanted).square().sum() / wanted.square().sum())
        assert getattr(row, kind) == pytest.approx(error, rel=1e-3)
    assert row.accumulated == row.own  # nothing is rounded before it
    assert row.snr == pytest.approx(-10 * math.log10(row.own))
    cosine = torch.cosine_similarity(results["own"].flatten(), wanted.flatten(), dim=0)
    assert row.cosine == pytest.approx(float(cosine), abs=1e-5)
    low, high = row.calibrated
    assert row.observed == (float(x.min()), float(x.max()))
    half = 0.5 * quantizer.scale
    outside = ((x < low - half) | (x > high + half)).double().mean()
    assert row.clipped == pytest.approx(float(outside)) and row.clipped > 0
    assert (row.bits, row.input_bits, row.kind, row.place) == (3, 8, "conv2d", 0)


@pytest.mark.parametrize("network", [Residual, Depthwise, Tokens, Several])
def test_float_references_are_the_float_layers(network) -> None:
    """A layer's reference gives what the float model has behind the layer and its norm."""
    model, data = captured(network), data_of(network)
    native = ada.convert(prepared_of(model, data))
    model = copy.deepcopy(model)  # it gets hooks
    pairs = pairs_of(model, native)
    assert len(pairs.layers) >= 4
    behind = {"stem": "norm", "a1": "an1", "a2": "an2", "b1": "bn1", "b2": "bn2", "bp": "bnp",
              "wide": "wide_norm", "deep": "deep_norm", "narrow": "narrow_norm"}  # fmt: skip
    seen = {}
    for name, layer in pairs.layers.items():
        here = behind.get(name, name)
        here = here if here in dict(model.named_modules()) else name
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(f"{name} in", args[0].clone())
        )
        model.get_submodule(here).register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, out.clone())
        )
        assert len(layer.inputs) == 1
    with torch.no_grad():
        model(**data[0]) if isinstance(data[0], dict) else model(data[0])
        for name, layer in pairs.layers.items():
            got = layer.reference(seen[f"{name} in"])
            torch.testing.assert_close(got, seen[name], rtol=1e-4, atol=1e-4)


def test_accumulated_error_is_the_networks_error_at_its_end() -> None:
    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data, 3))
    found = compared(model, native, data, suggest=False)
    x = torch.cat(data)
    with torch.no_grad():
        wanted, got = model(x), native(x)
    error = float((got - wanted).square().sum() / wanted.square().sum())
    assert found["fc"].accumulated == pytest.approx(error, rel=1e-4)
    assert found["fc"].accumulated > found["fc"].own
    assert found.error == pytest.approx(float(distance(wanted, got)), rel=1e-3)
    assert found.measure == "kl_divergence"
    own = [row.own for row in found]
    assert own == sorted(own, reverse=True)
    assert [row.name for row in sorted(found, key=lambda row: row.place)] == [
        "stem", "act_quant.relu", "a1", "a2", "b1", "b2", "act_quant.bn2", "bp", "act_quant.relu_4",
        "fc",
    ]  # fmt: skip


def test_memory_is_bounded_and_pieces_change_nothing(monkeypatch) -> None:
    model, data = captured(Residual), data_of(Residual, 1, 30)
    native = ada.convert(prepared_of(model, data, 4))
    whole = compared(model, native, data, suggest=False)
    monkeypatch.setattr("adalayer_native.microscope.layer_errors.MEMORY", 200_000)
    cut = compared(model, native, data, suggest=False)
    for a, b in zip(whole, cut, strict=True):
        assert a.name == b.name and a.clipped == b.clipped and a.observed == b.observed
        assert a.own == pytest.approx(b.own, rel=1e-4)
        assert a.accumulated == pytest.approx(b.accumulated, rel=1e-4)


# -- networks -------------------------------------------------------------------------------------


def test_several_inputs_and_outputs() -> None:
    model, data = captured(Several), data_of(Several)
    native = ada.convert(prepared_of(model, data, 8, {"right": 2}))
    found = compared(model, native, data)
    assert {row.name for row in found} >= {"left", "right", "up", "fc"}
    assert found["up"].kind == "conv_transpose2d"
    assert found.rows[0].name == "right" and found.suggestions[0].name == "right"
    assert found.measure == "kl_divergence + squared_error"
    alone = compared(model, native, data, output="map")
    assert alone.measure == "squared_error" and alone.error < found.error
    with pytest.raises(CalibrationError, match="no such output"):
        compared(model, native, data, output="boxes")
    # Batches with labels, and positional ones.
    tuples = [(batch["image"], batch["depth"]) for batch in data]
    positional = ada.capture(seeded(Several), tuples[0])
    native = ada.convert(prepared_of(positional, tuples, 8))
    assert compared(positional, native, [(*pair, 1) for pair in tuples]).rows


def test_a_layer_in_float_has_no_error_of_its_own() -> None:
    model, data = captured(Residual), data_of(Residual)
    found = compared(
        model, ada.convert(prepared_of(model, data, 4, {"stem": None, "b1": None})), data
    )
    for name in ("stem", "b1"):
        row = found[name]
        assert row.bits is None and row.input_bits is None and row.weights is None
        assert row.clipped is None and row.calibrated is None and row.own < 1e-9
    assert found["stem"].accumulated < 1e-9 < found["b1"].accumulated
    assert not {"stem", "b1"} & {item.name for item in found.suggestions}


def test_a_layer_that_runs_twice() -> None:
    from helpers_cli import CalledTwice

    torch.manual_seed(0)
    model, data = CalledTwice().eval(), data_of(Residual)
    native = ada.convert(prepared_of(model, data, 8, {"conv": 2}))
    found = compared(model, native, data)
    assert found.rows[0].name == "conv" and found.suggestions[0].name == "conv"
    assert [row.name for row in found].count("conv") == 1


def test_a_norm_in_front_of_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Flatten(),
        nn.Linear(216, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[2].running_mean.uniform_(0, 0.5)
        model[2].running_var.uniform_(0.5, 1.5)
    data = data_of(Residual)
    native = ada.convert(prepared_of(model, data))
    assert isinstance(native.get_submodule("2"), nn.Identity)
    found = compared(model, native, data, suggest=False)
    assert found["3"].own < 1e-3 and found["3"].accumulated < 1e-3


def uneven() -> nn.Module:
    """Two layers whose channels in between differ by a factor of a thousand."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 4),
    ).eval()  # fmt: skip
    factor = torch.logspace(-1.5, 1.5, 16)
    with torch.no_grad():
        model[0].weight.mul_(factor.view(-1, 1, 1, 1))
        model[0].bias.mul_(factor)
        model[2].weight.div_(factor.view(1, -1, 1, 1))
    return model


def test_channels_that_a_repair_has_scaled(tmp_path) -> None:
    model, data = uneven(), data_of(Residual)
    prepared = prepared_of(model, data, 6)
    report = ada.repair(prepared, data, progress=False)
    assert [pair.kind for pair in report.pairs if pair.first == "0"] != ["none"]
    native = ada.convert(prepared)
    found = compared(model, native, data)
    assert found.note.count("scaled") == 0
    assert max(row.own for row in found) < 0.01
    # What suggestions round anew is scaled, too: more bits are never as bad as another network.
    for change in [item for item in found.suggestions if item.name in ("0", "2")]:
        assert change.after < change.before
    # A file does not say it: the weights do.
    ada.save(native, tmp_path / "m.safetensors")
    restored = ada.restore(model, tmp_path / "m.safetensors", data[0])
    again = compared(model, restored, data, suggest=False)
    assert "scaled the channels" in again.note and "0, 2" in again.note
    assert max(row.own for row in again) < 0.05
    # And of one without, it is not said.
    plain = ada.convert(prepared_of(model, data, 6))
    ada.save(plain, tmp_path / "p.safetensors")
    restored = ada.restore(model, tmp_path / "p.safetensors", data[0])
    assert compared(model, restored, data, suggest=False).note == ""


# -- suggestions ----------------------------------------------------------------------------------


def test_suggestions_are_judged_on_other_samples_and_can_be_applied() -> None:
    model, data = captured(Residual), data_of(Residual, 3, 20)
    native = ada.convert(prepared_of(model, data, 8, {"a2": 2, "b1": 2}))
    state = {k: v.clone() for k, v in native.state_dict().items()}
    found = compared(model, native, data)
    assert all(torch.equal(v, native.state_dict()[k]) for k, v in state.items())
    assert (found.samples, found.judging) == (30, 30)
    assert {"a2", "b1"} <= {item.name for item in found.suggestions[:2]}
    judging = torch.cat([x[1::2] for x in data])
    with torch.no_grad():
        wanted = model(judging)

        def error(network: nn.Module) -> float:
            return float(distance(wanted, network(judging)))

        for item in (*found.suggestions, found.together):
            assert item.before == pytest.approx(error(native), rel=1e-3)
            changed = item.apply(native)
            assert item.after == pytest.approx(error(changed), rel=1e-3)
            assert item.recovered == pytest.approx(1 - item.after / item.before)
            grown = sum(v.numel() for k, v in changed.state_dict().items() if "packed" in k) - sum(
                v.numel() for k, v in state.items() if "packed" in k
            )
            if item.kind == "bits":
                assert item.bytes == grown > 0
    assert found.together.changes == found.suggestions
    assert found.together.after < found.suggestions[0].after
    engine = ada.compile(found.together.apply(native), data[0])
    torch.testing.assert_close(engine(judging), found.together.apply(native)(judging))


def test_a_layer_in_float_can_be_run_compared_and_compiled() -> None:
    from adalayer_native.microscope.changes import float_layer

    for network, names in ((Residual, ("b2", "fc")), (Several, ("up", "left"))):
        model, data = captured(network), data_of(network)
        native = ada.convert(prepared_of(model, data, 4))
        pairs = pairs_of(model, native)
        for name in names:
            changed = float_layer(pairs.layers[name]).apply(native)
            assert isinstance(changed.get_submodule(name), FloatLayer)
            row = compared(model, changed, data, suggest=False)[name]
            assert row.bits is None and row.own < 1e-9
            batch = data[0]
            engine = ada.compile(changed, batch)
            results = [
                f(**batch) if isinstance(batch, dict) else f(batch) for f in (engine, changed)
            ]
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_input_bits_are_suggested() -> None:
    model, data = captured(Residual), data_of(Residual)
    plan = ada.allocate(None, ada.Budget(bits=8), method="uniform", model=model, progress=False)
    plan["b2"].activation_bits = 2
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, data, progress=False)
    found = compared(model, ada.convert(prepared), data)
    assert found.rows[0].name == "b2" and found.rows[0].input_bits == 2
    assert found.rows[0].finding == "the input's rounding to 2 bits"
    first = found.suggestions[0]
    assert (first.name, first.kind, first.value, first.bytes) == ("b2", "input_bits", 8, 0)


def test_pruned_weights_stay_pruned() -> None:
    model, data = captured(Residual), data_of(Residual)
    plan = ada.allocate(None, ada.Budget(bits=8), method="uniform", model=model, progress=False)
    plan["b2"] = (2, 0.5)
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, data, progress=False)
    native = ada.convert(prepared)
    found = compared(model, native, data)
    zeros = native.get_submodule("b2").weight_int() == 0
    for item in found.suggestions:
        if item.kind == "bits" and item.name == "b2":
            weights = item.apply(native).get_submodule("b2").weight_int()
            assert bool((weights[zeros] == 0).all())
    assert found.rows[0].name == "b2"


def test_few_samples() -> None:
    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data, 4))
    one = compared(model, native, [data[0][:1]])
    assert one.samples == 1 and one.suggestions == () and "choose and judge" in one.note
    two = compared(model, native, [data[0][:1], data[0][1:2]])
    assert (two.samples, two.judging) == (1, 1)
    assert compared(model, native, data, samples=10).samples == 5
    with pytest.raises(ValueError, match="samples must be at least 1"):
        compared(model, native, data, samples=0)


# -- engines --------------------------------------------------------------------------------------


def test_an_engine_is_compared_by_the_model_that_it_came_from(tmp_path) -> None:
    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data, 4))
    engine = ada.compile(native, data[0], policy="native")
    found = compared(model, engine, data, suggest=False)
    assert found.engine == {"equal": 1.0, "snr_db": None}
    assert found.rows == compared(model, native, data, suggest=False).rows
    engine.save(tmp_path / "m.ada")
    loaded = ada.load(tmp_path / "m.ada")
    with pytest.raises(UnsupportedModelError, match="give that model as of="):
        compared(model, loaded, data)
    assert compared(model, loaded, data, of=native, suggest=False).rows == found.rows
    other = ada.convert(prepared_of(model, data, 4, {"b1": 5}))
    with pytest.raises(UnsupportedModelError, match="layer 'b1' has other weights in the engine"):
        compared(model, loaded, data, of=other)
    # The same integers, another grid: the results tell.
    prepared = prepared_of(model, data, 4)
    quantizer = quantizer_of(prepared, "b2")
    quantizer.set_range(0.0, 0.2 * 255 * quantizer.scale)
    with pytest.raises(InputError, match="does not give the converted model's results"):
        compared(model, loaded, data, of=ada.convert(prepared))
    with pytest.raises(ValueError, match="of="):
        compared(model, native, data, of=native)


def test_an_engine_does_not_keep_its_model() -> None:
    import gc
    import pickle

    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data))
    engine = ada.compile(native, data[0], policy="native")
    assert engine.source is native
    assert pickle.loads(pickle.dumps(engine)).source is None
    assert copy.deepcopy(engine).source is None
    del native
    gc.collect()
    assert engine.source is None
    with pytest.raises(UnsupportedModelError, match="not there any more"):
        compared(model, engine, data)


def test_an_engine_that_runs_layers_in_float() -> None:
    model, data = captured(Depthwise), data_of(Depthwise)
    native = ada.convert(prepared_of(model, data, 4))
    for policy in ("native", "fastest"):
        engine = ada.compile(native, data[0], policy=policy)
        found = compared(model, engine, data, suggest=False)
        assert found.engine["equal"] == 1.0 or found.engine["snr_db"] > 30


# -- bad input ------------------------------------------------------------------------------------


def test_models_that_do_not_match() -> None:
    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data))
    other = seeded(Residual)
    other.b1 = nn.Conv2d(8, 16, 5, stride=2, padding=2)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 'b1' has weights of shape \[16, 8, 5, 5\] in .* and "
    ):
        compared(other, native, data)
    with pytest.raises(UnsupportedModelError, match=r"layer 'wide' of .* is not in the converted"):
        compared(seeded(Depthwise), native, data)

    class Shorter(Residual):
        def __init__(self) -> None:
            super().__init__()
            del self.bp, self.bnp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(x + self.an2(self.a2(torch.relu(self.an1(self.a1(x))))))
            return self.fc(self.bn2(self.b2(torch.relu(self.bn1(self.b1(x))))).mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match="layer 'bp' of the converted model is not in"):
        compared(seeded(Shorter), native, data)


def test_models_that_are_not_converted() -> None:
    model, data = captured(Residual), data_of(Residual)
    with pytest.raises(CalibrationError, match="got a prepared one"):
        compared(model, prepared_of(model, data), data)
    with pytest.raises(UnsupportedModelError, match=r"expected a converted model .* got Residual"):
        compared(model, seeded(Residual), data)
    with pytest.raises(UnsupportedModelError, match="no native layers"):
        compared(model, model, data)


def test_data_that_cannot_be_used() -> None:
    model, data = seeded(Residual), data_of(Residual)
    native = ada.convert(prepared_of(captured(Residual), data))
    spoilt = [data[0], data[1].clone()]
    spoilt[1][3, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="comparison batch 1 holds NaN or infinity"):
        compared(model, native, spoilt)
    for nothing in ([], [torch.zeros(0, 3, 8, 8)]):
        with pytest.raises(CalibrationError, match="comparison loader is empty"):
            compared(model, native, nothing)
    for nothing in ([], [torch.zeros(0, 3, 8, 8)]):
        with pytest.raises(CalibrationError, match=r"comparison loader is empty|the data is empty"):
            compared(captured(Residual), native, nothing)
    with pytest.raises(CalibrationError, match=r"batch 1 does not fit .* got \[4, 1, 8, 8\]"):
        compared(model, native, [data[0], torch.rand(4, 1, 8, 8)])
    with pytest.raises(CalibrationError, match="batch 0 does not fit the model"):
        compared(captured(Residual), native, [torch.rand(4, 3, 8)])
    with pytest.raises(CalibrationError, match="read only once"):
        compared(model, native, iter(data))
    huge = [torch.full((2, 3, 8, 8), 3e38)]
    with pytest.raises(CalibrationError, match="'stem': the float model has NaN or infinity there"):
        compared(model, native, huge)
    with pytest.raises(CalibrationError, match="comparison batch 0: expected batches"):
        compared(model, native, ["picture.png"])


# -- as text, JSON and a picture ------------------------------------------------------------------


def test_json_and_tables(tmp_path) -> None:
    model, data = captured(Residual), data_of(Residual)
    native = ada.convert(prepared_of(model, data, 8, {"a2": 2, "b1": 2}))
    found = compared(model, native, data)
    found.save(tmp_path / "c.json")
    again = ada.Comparison.load(tmp_path / "c.json")
    assert again.rows == found.rows and again.suggestions == found.suggestions
    assert again.together == found.together and again.as_dict() == found.as_dict()
    text = str(again)
    assert "What would recover most, measured on 32 other samples" in text
    assert text.index("b1") < text.index("stem")
    assert "bits in the weights instead of 2" in text and "kl divergence" in text
    assert "the weights' rounding to 2 bits" in text
    with pytest.raises(ValueError, match="a comparison from a file"):
        again.suggestions[0].apply(native)
    with pytest.raises(KeyError, match="there are"):
        found["nothing"]
    for damaged, message in (
        ("{", "not readable as JSON"),
        ("[]", 'expected a JSON object with "format"'),
        ('{"format": "adalayer-comparison", "version": 99}', "expected version 1, got 99"),
        ('{"format": "adalayer-comparison", "version": 1}', "not a complete comparison"),
    ):
        (tmp_path / "d.json").write_text(damaged)
        with pytest.raises(FileFormatError, match=message):
            ada.Comparison.load(tmp_path / "d.json")
    with pytest.raises(FileFormatError, match=r"missing\.json: does not exist"):
        ada.Comparison.load(tmp_path / "missing.json")


def test_an_exact_layer_has_infinite_signal_to_noise(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    data = [torch.arange(0, 256.0).reshape(4, 1, 8, 8)]
    model = ada.capture(model, (data[0],))
    prepared = prepared_of(model, data)
    prepared.get_submodule("0").weight_scale.fill_(0.5)
    quantizer_of(prepared, "0").set_range(0.0, 255.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compared(model, ada.convert(prepared), data)
    assert found.error == 0 and found.rows[0].snr == math.inf and found.suggestions == ()
    found.save(tmp_path / "c.json")
    assert '"own_snr_db": null' in (tmp_path / "c.json").read_text()
    assert ada.Comparison.load(tmp_path / "c.json").rows == found.rows
    assert "exact" in str(found)
