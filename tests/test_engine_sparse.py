"""Zeros left out by the engine and by single layers: the same bits, and what coverage says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

POLICIES = ["auto", "dense", "blocks", "bitmask"]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    yield
    ops.set_sparse_policy("auto")
    ops.force_isa("auto")


def native_of(model: nn.Module, x: Tensor, bits: int, sparsity: float, pattern: str) -> nn.Module:
    plan = Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits, sparsity, pattern)
            for name, layer in supported_layers(model).items()
        }
    )
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [x], progress=False)
    return ada.convert(prepared)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 130),
    ).eval()


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize(("bits", "pattern"), [(8, "block32x64"), (4, "block16x64"), (3, "2:4")])
def test_every_form_gives_the_same_bits(bits: int, pattern: str, isa: str) -> None:
    ops.force_isa(isa)
    model, x = network(), torch.rand(3, 3, 12, 10)
    native = native_of(model, x, bits, 0.5, pattern)
    layers, engines = [], []
    for policy in POLICIES:
        ops.set_sparse_policy(policy)
        layers.append(native(x))
        engines.append(ada.compile(native, x, policy="native", strict=True)(x))
    assert all(torch.equal(layers[0], other) for other in layers[1:])
    assert all(torch.equal(engines[0], other) for other in engines[1:])


def linear(zeros: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 8, (256, 512), generator=generator, dtype=torch.int8)
    weight[torch.rand(weight.shape, generator=generator) < zeros] = 0
    return ada.nn.Linear.from_quantized(
        weight, 4, torch.full((256,), 0.01), None, input_scale=0.01, input_zero_point=100
    )


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])
def test_a_linear_layer_behind_a_bitmask(rows: int) -> None:
    layer, x = linear(0.6), torch.randn(rows, 512)
    found = []
    for policy in POLICIES:
        ops.set_sparse_policy(policy)
        found.append(layer(x))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_coverage_says_how_zeros_are_used() -> None:
    if ops.active_isa() == "scalar":
        pytest.skip("the scalar reference has one form")
    model, x = network(), torch.rand(2, 3, 12, 10)
    native = native_of(model, x, 4, 0.5, "block32x64")
    rows = {}
    for policy in POLICIES:
        ops.set_sparse_policy(policy)
        engine = ada.compile(native, x, policy="native", strict=True)
        rows[policy] = {row.name: row for row in engine.coverage() if row.bits}
    assert all(not row.why for row in rows["dense"].values())
    assert " sparse panels, blocks" in rows["blocks"]["2"].kernel
    assert rows["blocks"]["2"].why.startswith("blocks: 50 % of the tiles")
    # The clock decides, and says what it saw.
    row = rows["auto"]["2"]
    assert row.why.startswith("blocks: 50 %" if "blocks" in row.kernel else "dense, not blocks: 50")
    assert "µs, dense" in row.why
    ops.set_sparse_policy("blocks")
    engine = ada.compile(native, x, policy="native", strict=True)
    assert "tiles" in str(engine.coverage())  # a cell may be wrapped


def test_less_memory_and_a_file_that_keeps_it(tmp_path) -> None:
    model, x = network(), torch.rand(2, 3, 12, 10)
    native = native_of(model, x, 4, 0.75, "block16x64")
    sizes = {}
    for policy in ("dense", "blocks"):
        ops.set_sparse_policy(policy)
        engine = ada.compile(native, x, policy="native", strict=True, weights="streamed")
        sizes[policy] = engine.weight_bytes
        engine.save(tmp_path / f"{policy}.ada")
        assert torch.equal(ada.load(tmp_path / f"{policy}.ada")(x), engine(x))
    if ops.active_isa() != "scalar":
        assert sizes["blocks"] < 0.6 * sizes["dense"]
    # What is saved does not depend on what ran.
    both = [(tmp_path / f"{policy}.ada").read_bytes() for policy in ("dense", "blocks")]
    assert both[0] == both[1]


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="auto, dense, blocks or bitmask, got 'fast'"):
        ops.set_sparse_policy("fast")
