"""Linear layers with a scale per group of input channels, from the plan to the engine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalayer_native as ada
import adalayer_native.nn as native_nn
from adalayer_native import ops
from adalayer_native.allocation import estimate_bytes
from adalayer_native.errors import FileFormatError, PlanError, UnsupportedModelError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization import calibrate, convert, prepare, restore, simulate
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair.hessian import LayerHessian
from adalayer_native.rounding import (
    fma_float32,
    group_count,
    group_size_of,
    per_channel,
    quantize_weight,
    round_weight,
)


class Tokens(nn.Module):
    """Linear layers over tokens, over one row, and over a flattened image; odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 40, 4, 4)
        self.norm = nn.LayerNorm(40)
        self.fc1, self.fc2 = nn.Linear(40, 100), nn.Linear(100, 40)
        self.flat = nn.Linear(16 * 40, 33)
        self.head = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm(tokens))))
        mixed: Tensor = self.head(torch.relu(self.flat(tokens.transpose(1, 2).flatten(1))))
        return mixed


def plan_for(model: nn.Module, bits: int = 4, group_size: int | None = 32) -> Plan:
    return Plan(
        {
            name: LayerPlan(
                name,
                layer_kind(module),
                module.weight.numel(),
                bits,
                group_size=group_size if isinstance(module, nn.Linear) else None,
            )
            for name, module in supported_layers(model).items()
        }
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


def native_of(model: nn.Module, images: Tensor, plan: Plan) -> tuple[nn.Module, nn.Module]:
    prepared = prepare(copy.deepcopy(model), plan, example_inputs=images[:1])
    calibrate(prepared, [images], progress=False)
    return prepared, convert(prepared)


# -- rounding and the plan ------------------------------------------------------------------------


def test_scales_are_those_of_the_groups_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 100) * torch.linspace(0.01, 4, 100)
    levels, scale = quantize_weight(weight, 4, group_size=32)
    assert levels.shape == weight.shape
    assert scale.shape == (7, 4)
    for group, part in enumerate(weight.split(32, dim=1)):
        own, alone = quantize_weight(part.contiguous(), 4)
        assert torch.equal(scale[:, group], alone)
        assert torch.equal(levels[:, group * 32 : group * 32 + 32], own)
    assert torch.equal(round_weight(weight, scale, 4), levels.float())
    error = (levels * per_channel(scale, weight.shape) - weight).square().sum()
    whole, one = quantize_weight(weight, 4)
    assert error < 0.8 * (whole * one[:, None] - weight).square().sum()


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 64, 65, 100, 128, 129, 4096])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_number_of_scales_says_the_group_size(inputs: int, size: int) -> None:
    groups = group_count(inputs, size)
    if groups is None:
        assert inputs <= size
    else:
        assert group_size_of(inputs, groups) == size


def test_a_number_of_scales_that_no_size_gives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"100 input channels have \[4, 2, 1\] scales"):
        group_size_of(100, 3)


def test_plans_check_and_keep_group_sizes(model: nn.Module) -> None:
    plan = plan_for(model)
    assert Plan.from_json(plan.to_json()) == plan
    assert "group_size" not in plan_for(model, group_size=None).to_json()
    assert "Group" in str(plan)
    with pytest.raises(PlanError, match="group_size must be one of"):
        plan["fc1"].group_size = 48
    with pytest.raises(PlanError, match="group_size must be None for a layer of kind conv2d"):
        plan["patches"].group_size = 32


def test_what_has_no_groups_refuses_them(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(PlanError, match="levels have no weight groups"):
        ada.levels.check_plans([plan_for(model), plan_for(model, 3)])
    network = nn.GRU(8, 40, batch_first=True)
    captured = ada.capture(network, torch.randn(1, 3, 8))
    with pytest.raises(PlanError, match="product of a hidden state"):
        prepare(captured, plan_for(captured))
    _, native = native_of(model, images, plan_for(model))
    with pytest.raises(UnsupportedModelError, match="weight groups"):
        ada.to_onnx(native, "/dev/null", images[:1])


# -- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [31, 40, 64, 200])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layer_adds_up_its_groups_in_their_order(inputs: int, bits: int) -> None:
    torch.manual_seed(inputs)
    linear = nn.Linear(inputs, 21)
    for size in (32, 64, 128):
        native = native_nn.Linear.from_float(
            linear, bits, input_range=(-2, 3), input_bits=7, group_size=size
        )
        groups = group_count(inputs, size)
        assert native.weight_scale.shape == ((21,) if groups is None else (21, groups))
        x = torch.randn(3, 5, inputs)
        x[0, 0, 0], x[0, 1], x[0, 2] = float("nan"), 0.0, float("inf")
        scale = native.weight_scale.reshape(21, -1) * native.input_scale
        low, high = -native.input_zero_point, 127 - native.input_zero_point
        inverse = 1 / torch.tensor(native.input_scale)
        levels = (x * inverse).nan_to_num(low, 1e9, -1e9).clamp(low, high).round()
        want = native.bias.expand(3, 5, 21)
        own = native.weight_int().double()
        for group in range(scale.shape[1]):
            part = slice(group * size, group * size + size) if groups else slice(None)
            acc = F.linear(levels[..., part].double(), own[:, part]).float()
            want = fma_float32(acc, scale[:, group], want)
        for isa in ops.isas():
            ops.force_isa(isa)
            try:
                assert torch.equal(native(x), want), isa
                assert torch.equal(native(x[:1, :1]), want[:1, :1]), isa
            finally:
                ops.force_isa("auto")
        assert native(x[:0]).shape == (0, 5, 21)


def test_parameters_are_read_where_they_lie() -> None:
    native = native_nn.Linear.from_float(
        nn.Linear(64, 4, bias=False), 4, input_range=(-1, 1), group_size=32
    )
    x = torch.randn(2, 64)
    before = native(x)
    native.weight_scale.mul_(2)
    assert torch.equal(native(x), 2 * before)


def test_wrong_scales_are_refused() -> None:
    weight = torch.zeros(4, 100, dtype=torch.int8)
    for shape in ((4, 3), (3, 4), (4, 4, 1)):
        with pytest.raises(ValueError, match=r"scales|must have shape"):
            native_nn.Linear.from_quantized(
                weight, 4, torch.ones(shape), None, input_scale=0.1, input_zero_point=0
            )
    with pytest.raises(ValueError, match="group_size must be one of"):
        native_nn.Linear.from_float(nn.Linear(64, 4), input_range=(0, 1), group_size=16)
    packed = ops.pack_weight(weight, 4)
    with pytest.raises(ValueError, match="got 3"):
        ops.linear(torch.ones(1, 100), packed, torch.ones(4, 3), torch.ones(4), 0.1, 0, 8)
    with pytest.raises(TypeError, match="bias must be"):
        ops.linear(torch.ones(1, 100), packed, torch.ones(4, 4), torch.ones(4, 4), 0.1, 0, 8)


def test_the_operator_with_groups() -> None:
    packed = ops.pack_weight(torch.randint(-8, 8, (5, 70), dtype=torch.int8), 4)
    given = torch.randn(2, 3, 70), packed, torch.rand(5, 3), torch.randn(5), 0.02, 120, 8
    torch.library.opcheck(torch.ops.adalayer.linear.default, given)


# -- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128])
def test_simulation_layers_and_engine_agree(
    model: nn.Module, images: Tensor, size: int, tmp_path: Path
) -> None:
    plan = plan_for(model, group_size=size)
    prepared, native = native_of(model, images, plan)
    with torch.no_grad(), simulate(prepared, exact=True):
        exact = prepared(images)
    assert torch.equal(native(images), exact)
    rough = prepared(images)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()

    file = tmp_path / "model.safetensors"
    assert ada.save(native, file) <= estimate_bytes(model, plan)
    again = restore(Tokens(), file, images[:1])
    assert torch.equal(again(images), exact)

    engine = ada.compile(native, images[:1], strict=True, policy="native")
    assert torch.equal(engine(images), exact)
    rows = {row.name: row for row in engine.coverage(rounds=0)}
    assert f"groups of {min(size, 40)}" in rows["fc1"].kernel or size > 40
    assert rows["flat"].op == "linear"
    assert rows["flat"].bits == 4
    assert rows["flat"].macs == 33 * 640
    ada_file = tmp_path / "model.ada"
    engine.save(ada_file)
    for isa in ops.isas():
        ops.force_isa(isa)
        try:
            assert torch.equal(ada.load(ada_file)(images), exact), isa
        finally:
            ops.force_isa("auto")


def test_a_file_of_other_groups_is_refused(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    _, native = native_of(model, images, plan_for(model))
    file = tmp_path / "model.safetensors"
    ada.save(native, file)
    tensors = load_file(file)
    tensors["fc2.weight_scale"] = tensors["fc2.weight_scale"][:, :3].contiguous()
    save_file(tensors, file)
    with pytest.raises(FileFormatError, match=r"fc2.weight_scale.*100 input channels"):
        restore(Tokens(), file, images[:1])


def test_old_plans_make_old_programs(model: nn.Module, images: Tensor) -> None:
    _, native = native_of(model, images, plan_for(model, group_size=None))
    engine = ada.compile(native, images[:1], policy="native")
    assert all(row.op != "linear" for row in engine.coverage(rounds=0))


# -- repair and training --------------------------------------------------------------------------


def correlated(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(inputs, inputs, generator=generator) * torch.linspace(3, 0.1, inputs)
    return torch.randn(rows, inputs, generator=generator) @ basis.T


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_repair_works_per_group(sparsity: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(100, 24)
    linear.weight.data *= torch.linspace(0.2, 3, 100)
    found = {}
    for size in (None, 32):
        layer = native_nn_twin(linear, size)
        hessian = LayerHessian(layer)
        hessian.add(correlated(600, 100))
        solution = hessian.quantize(3, sparsity)
        assert solution.error < solution.plain_error
        weight = solution.weight
        assert torch.equal(round_weight(weight, solution.scale, 3), solution.levels.float())
        found[size] = solution
    assert found[32].scale.shape == (24, 4)
    assert found[32].error < 0.9 * found[None].error


def native_nn_twin(linear: nn.Linear, size: int | None) -> nn.Module:
    from adalayer_native.quantization.fake_quant import QuantLinear

    return QuantLinear.from_layer(linear, 3, group_size=size)


def test_repair_of_a_wide_layer_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from adalayer_native.repair import hessian as module

    monkeypatch.setattr(module, "MOST_COLUMNS", 64)
    torch.manual_seed(0)
    layer = native_nn_twin(nn.Linear(150, 16), 32)
    hessian = LayerHessian(layer)
    hessian.add(correlated(400, 150))
    solution = hessian.quantize(3, 0.2)
    assert solution.scale.shape == (16, 5)
    assert solution.error < solution.plain_error
    weight = solution.weight
    assert torch.equal(round_weight(weight, solution.scale, 3), solution.levels.float())


def test_repair_of_a_network(model: nn.Module, images: Tensor) -> None:
    prepared, _ = native_of(model, images, plan_for(model, 3))
    before = {n: layer.weight_scale.clone() for n, layer in layers_of(prepared).items()}
    ada.repair(prepared, [images], progress=False)
    assert layers_of(prepared)["flat"].weight_scale.shape == (33, 20)
    assert any(
        not torch.equal(before[name], layer.weight_scale)
        for name, layer in layers_of(prepared).items()
    )
    native = convert(prepared)
    with torch.no_grad(), simulate(prepared, exact=True):
        assert torch.equal(native(images), prepared(images))


def test_training_learns_a_scale_per_group(model: nn.Module, images: Tensor) -> None:
    prepared, _ = native_of(model, images, plan_for(model))
    before = layers_of(prepared)["flat"].weight_scale.clone()
    labels = torch.arange(8) % 10
    ada.finetune(prepared, [(images, labels)] * 3, epochs=1, progress=False)
    after = layers_of(prepared)["flat"].weight_scale
    assert after.shape == (33, 20)
    assert not torch.equal(before, after)
    native = convert(prepared)
    with torch.no_grad(), simulate(prepared, exact=True):
        assert torch.equal(native(images), prepared(images))
