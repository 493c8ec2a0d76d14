"""Exact simulation, conversion to native layers, the file's layout, and restoring from a file."""

from __future__ import annotations

import copy
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import adalayer_native.nn as native_nn
from adalayer_native.errors import (
    CalibrationError,
    FileFormatError,
    InputError,
    UnsupportedModelError,
)
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization import (
    calibrate,
    convert,
    prepare,
    restore,
    simulate,
    stored_model,
)
from adalayer_native.quantization.graph import layers_of
from adalayer_native.rounding import fma_float32


def plan_for(model: nn.Module, bits: int | None = 4, sparsity: float = 0.0, act: int = 8) -> Plan:
    return Plan(
        {
            name: LayerPlan(
                name,
                layer_kind(module),
                module.weight.numel(),
                bits,
                sparsity,
                activation_bits=act,
            )
            for name, module in supported_layers(model).items()
        }
    )


class Block(nn.Module):
    """Every construct that conversion handles: residuals, depthwise, clamps, reuse, concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn_d = nn.BatchNorm2d(8, affine=False)
        self.relu6 = nn.ReLU6()
        self.even = nn.Conv2d(8, 8, (2, 4), padding="same")
        self.shared = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(16, 12)
        self.bn_f = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.relu6(self.bn_d(self.depthwise(x)))
        y = torch.clamp(self.even(y), -0.5, 0.75)
        y = F.relu(self.shared(y) + x)
        z = self.shared(F.max_pool2d(y, 2))
        y = torch.cat([F.avg_pool2d(y, 2), z], dim=1)
        y = y.mean((2, 3)).flatten(1)
        return self.out(torch.relu(self.bn_f(self.fc(y))))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: also negative factors, so that folded scales change sign."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def ready(bits: int = 4, sparsity: float = 0.0, act: int = 8) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = randomised(Block())
    prepared = prepare(model, plan_for(model, bits, sparsity, act))
    calibrate(prepared, [torch.randn(16, 3, 12, 12)], progress=False)
    return model, prepared


# -- fma ------------------------------------------------------------------------------------------


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    a = rng.integers(-(2**24), 2**24, n).astype(np.float32)
    b = (rng.standard_normal(n) * 2.0 ** rng.integers(-40, 10, n)).astype(np.float32)
    c = (rng.standard_normal(n) * 2.0 ** rng.integers(-40, 30, n)).astype(np.float32)
    # Near-ties: c is the product rounded to float32 plus half an ulp's worth of something small.
    c[::2] = (a[::2] * b[::2]).astype(np.float32)
    got = fma_float32(*(torch.from_numpy(v) for v in (a, b, c))).numpy()
    for i in range(n):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got[i] == nearest_float32(exact), (a[i], b[i], c[i])


def nearest_float32(value: Fraction) -> np.float32:
    """The float32 nearest to an exact rational, ties to even."""
    guess = np.float32(float(value))
    around = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    distances = [abs(Fraction(float(item)) - value) for item in around]
    least = min(distances)
    best = [item for item, d in zip(around, distances, strict=True) if d == least]
    return min(best, key=lambda item: int(item.view(np.int32)) & 1)


def test_fma_case_where_double_rounding_is_wrong() -> None:
    # product + addend lies just above a float32 tie, by less than float64 resolves: rounding to
    # float64 first lands on the tie, which then goes to even, downwards.
    a = torch.tensor([1.0 + 2.0**-12])
    c = torch.tensor([2.0**40 * (1.0 + 2.0**-23)])
    b = torch.tensor([2.0**16 * (1.0 + 2.0**-12)])
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    assert fma_float32(a, b, c).numpy()[0] == nearest_float32(exact)


# -- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_simulation_is_bit_equal_to_native(bits: int) -> None:
    _, prepared = ready(bits, sparsity=0.3 if bits % 2 else 0.0, act=8 if bits > 3 else 5)
    native = convert(prepared)
    x = torch.randn(7, 3, 12, 12)
    with simulate(prepared, exact=True):
        expected = prepared(x)
    assert torch.equal(native(x), expected)
    assert torch.equal(prepared(x), prepared(x))
    assert all(layer.exact is None for layer in layers_of(prepared).values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_each_layer_agrees_on_identical_inputs(bits: int) -> None:
    """Law 2: at most one step of the next grid apart, on less than one value in a thousand."""
    _, prepared = ready(bits)
    native = convert(prepared)
    torch.manual_seed(3)
    values = 0
    different = 0
    modules = dict(native.named_modules())
    for name, layer in layers_of(prepared).items():
        entry = prepared.meta["layers"][name]
        quantizer = prepared.get_submodule(entry["input"])
        channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
        shape = (32, channels, 9, 9) if layer.weight.dim() == 4 else (64, channels)
        x = quantizer(torch.randn(shape) * 40 * quantizer.scale)
        y = layer(x)
        if entry["batch_norm"] is not None:
            y = prepared.get_submodule(entry["batch_norm"])(y)
        module = modules[name]
        if module.lo is not None or module.hi is not None:
            y = y.clamp(module.lo, module.hi)
        z = module(x)
        step = float((z.max() - z.min()) / 255)
        grid = getattr(module, "output_grid", None)
        if grid is not None:  # the layer rounds to the grid of the quantizer that follows it
            y, step = grid(y), grid.input_scale
        levels = [torch.round(value / step) for value in (y, z)]
        gap = (levels[0] - levels[1]).abs()
        assert float(gap.max()) <= 1.0
        values += gap.numel()
        different += int(gap.count_nonzero())
    assert values > 10_000
    assert different < values / 1000


def test_conversion_folds_fuses_and_drops() -> None:
    _, prepared = ready()
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    code = prepared.code
    native = convert(prepared)
    modules = dict(native.named_modules())
    assert isinstance(modules["stem"], native_nn.Conv2d)
    assert isinstance(modules["fc"], native_nn.Linear)
    assert isinstance(modules["bn"], nn.Identity)
    assert (modules["stem"].lo, modules["stem"].hi) == (0.0, None)
    assert (modules["depthwise"].lo, modules["depthwise"].hi) == (0.0, 6.0)
    assert (modules["even"].lo, modules["even"].hi) == (-0.5, 0.75)
    assert (modules["shared"].lo, modules["shared"].hi) == (None, None)
    called = {node.target for node in native.graph.nodes if node.op == "call_module"}
    assert not called & {"bn", "bn_d", "bn_f", "relu6", "act_quant.x"}
    # bit-identical to before, and still usable
    assert prepared.code == code
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key])
    # stored operands of the addition, the pooling and the concatenation keep their grid
    kept = [name for name, module in modules.items() if isinstance(module, native_nn.FakeQuantize)]
    assert sorted(kept) == sorted(stored_model(*model_and_plan()).quantizers)


def model_and_plan() -> tuple[nn.Module, Plan]:
    model = randomised(Block())
    return model, plan_for(model)


def test_batch_sizes_and_memory_formats() -> None:
    _, prepared = ready()
    native = convert(prepared)
    x = torch.randn(5, 3, 12, 12)
    y = native(x)
    assert torch.equal(native(x.contiguous(memory_format=torch.channels_last)), y)
    assert torch.equal(native(x[:1]), y[:1])
    assert native(x[:0]).shape == (0, 5)


def test_partly_float_model() -> None:
    torch.manual_seed(0)
    model = randomised(Block())
    plan = plan_for(model, 5)
    for name in ("stem", "out"):
        plan[name].bits = None
    prepared = prepare(model, plan)
    calibrate(prepared, [torch.randn(16, 3, 12, 12)], progress=False)
    native = convert(prepared)
    assert type(native.get_submodule("stem")) is nn.Conv2d
    assert isinstance(native.get_submodule("bn"), nn.BatchNorm2d)
    x = torch.randn(4, 3, 12, 12)
    with simulate(prepared):
        assert torch.equal(native(x), prepared(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_all_float_plan_converts_to_the_model_itself() -> None:
    model = randomised(Block())
    prepared = prepare(model, plan_for(model, None))
    native = convert(prepared)
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(native(x), model(x))


def test_uncalibrated_is_refused() -> None:
    model = randomised(Block())
    prepared = prepare(model, plan_for(model))
    with pytest.raises(CalibrationError, match=r"act_quant\.x.*calibrate\("):
        convert(prepared)
    with pytest.raises(CalibrationError, match="calibrate"), simulate(prepared):
        pass
    with pytest.raises(UnsupportedModelError, match="prepare"):
        convert(model)  # type: ignore[arg-type]


def test_broken_batch_norm_is_named() -> None:
    _, prepared = ready()
    prepared.get_submodule("bn").running_var[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"'stem'.*'bn'"):
        convert(prepared)


def test_simulate_restores_after_an_error() -> None:
    _, prepared = ready()
    x = torch.randn(2, 3, 12, 12)
    before = prepared(x)
    prepared.train()
    with pytest.raises(ZeroDivisionError), simulate(prepared):
        raise ZeroDivisionError
    assert prepared.training
    assert isinstance(prepared.get_submodule("bn"), nn.BatchNorm2d)
    prepared.eval()
    assert torch.equal(prepared(x), before)


def test_folded_linear_refuses_three_dimensions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    prepared = prepare(model, plan_for(model))
    with pytest.raises(InputError, match=r"expected shape \[batch, 4\], got \[2, 4, 4\]"):
        prepared(torch.randn(2, 4, 4))
    # Captured with three dimensions, axis 1 is no output of the layer: nothing is folded.
    prepared = prepare(model, plan_for(model), torch.randn(2, 4, 4))
    assert prepared.meta["layers"]["0"]["batch_norm"] is None


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_layout_is_what_the_file_holds(sparsity: float) -> None:
    model, prepared = ready(4, sparsity)
    state = convert(prepared).state_dict()
    entries = stored_model(model, plan_for(model, 4, sparsity)).entries()
    assert sorted(key for key, _, _ in entries) == sorted(state)
    names = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}
    for key, dtype, shape in entries:
        assert state[key].dtype == names[dtype], key
        assert shape is None or tuple(state[key].shape) == shape, key


def test_layout_follows_the_plan_and_the_model() -> None:
    model = randomised(Block())
    plan = plan_for(model)
    assert "bn.weight" not in {key for key, _, _ in stored_model(model, plan).float_tensors}
    plan["stem"].bits = None
    keys = {key for key, _, _ in stored_model(model, plan).float_tensors}
    assert {"stem.weight", "bn.running_var"} <= keys
    # Exchanging a module must not meet a remembered trace.
    model.bn = nn.Identity()
    keys = {key for key, _, _ in stored_model(model, plan).float_tensors}
    assert "bn.running_var" not in keys


@pytest.mark.parametrize(("bits", "sparsity"), [(4, 0.0), (5, 0.6), (2, 0.0)])
def test_restore_gives_the_same_bits(tmp_path: Path, bits: int, sparsity: float) -> None:
    _, prepared = ready(bits, sparsity, act=6)
    native = convert(prepared)
    path = tmp_path / "model.safetensors"
    save_file(native.state_dict(), path)
    other = randomised(Block(), seed=99)
    with torch.no_grad():
        other.stem.weight.fill_(float("nan"))  # only the architecture counts
    again = restore(other, path)
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(again(x), native(x))
    assert torch.equal(copy.deepcopy(again)(x), native(x))


def test_restore_refuses_bad_files(tmp_path: Path) -> None:
    model, prepared = ready()
    state = convert(prepared).state_dict()
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileFormatError, match=r"model\.safetensors"):
        restore(model, path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(FileFormatError, match="not a valid safetensors"):
        restore(model, path)

    def refused(change: dict[str, Tensor | None], message: str) -> None:
        tensors = {key: value.clone() for key, value in state.items()}
        for key, value in change.items():
            if value is None:
                tensors.pop(key)
            else:
                tensors[key] = value
        save_file(tensors, path)
        with pytest.raises(FileFormatError, match=message):
            restore(model, path)

    refused({"fc.bias": None}, r"missing \['fc.bias'\]")
    refused({"extra": torch.zeros(1)}, r"unexpected \['extra'\]")
    refused({"fc.weight_scale": torch.zeros(3)}, "weight_scale.*shape")
    refused({"fc.weight_scale": torch.full((12,), float("nan"))}, "weight_scale.*NaN")
    refused({"stem.weight_packed": torch.zeros(80, dtype=torch.uint8)}, "stem")
    refused({"stem.weight_packed": state["shared.weight_packed"]}, "stem")
    damaged = state["stem.weight_packed"].clone()
    damaged[-1] ^= 1  # of the weights, not of their header
    refused({"stem.weight_packed": damaged}, "'stem'.*damaged")
    refused({"stem.input_qparams": None}, "input_qparams")
    refused({"nothing.weight_packed": state["stem.weight_packed"]}, "nothing")


# -- real images ----------------------------------------------------------------------------------

# CIFAR-10 and trained weights, which the repository does not hold: beside it, or where told.
SHARED = Path(os.environ.get("ADALAYER_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.mark.skipif(
    not (SHARED / "data" / "cifar10.zip").is_file(),
    reason="no CIFAR-10 and trained weights beside the repository or at $ADALAYER_SHARED",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalayernet", "resnet20"])
def test_native_and_prepared_agree_on_real_images(name: str) -> None:
    """Law 2 over a network: top-1 agrees on at least 99.9 % of real images."""
    from adalayer_native.data import open_dataset
    from adalayer_native.models import get_model, load_weights

    model = get_model(name)
    load_weights(model, SHARED / "models" / f"{name}_cifar10.safetensors")
    model.eval()
    path = SHARED / "data" / "cifar10.zip"
    data = open_dataset(path, "test", cache=False, progress=False)
    x = torch.stack([data[i * 10][0] for i in range(1000)])
    prepared = prepare(model, plan_for(model, 4))
    calibrate(prepared, list(x[:256].split(64)), progress=False)
    native = convert(prepared)
    with torch.no_grad():
        a, b = (torch.cat([m(part) for part in x.split(100)]).argmax(1) for m in (prepared, native))
    assert int((a != b).sum()) <= 1
