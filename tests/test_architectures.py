"""Well-known networks with random weights through the whole stack: from prepare to export, and as
engines, natively and as the converted module tree computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_engine import node_differences
from helpers_grids import GridWalk
from helpers_torchvision import ARCHITECTURES, Architecture, build, images
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import adalayer_native as ada
from adalayer_native.engine import Engine
from adalayer_native.importance.flops import count_flops
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

NATIVE_LAYERS = (ada.nn.Conv2d, ada.nn.ConvTranspose2d, ada.nn.Linear)


@dataclass
class Converted:
    architecture: Architecture
    model: nn.Module
    prepared: fx.GraphModule
    native: fx.GraphModule

    def images(self, count: int, seed: int) -> Tensor:
        return images(self.architecture, count, seed=seed)


@pytest.fixture(
    scope="module",
    params=[pytest.param(item, id=item.name, marks=item.marks) for item in ARCHITECTURES],
)
def converted(request: pytest.FixtureRequest) -> Converted:
    architecture: Architecture = request.param
    model = build(architecture)
    plan = Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits=8)
            for name, layer in supported_layers(model).items()
        }
    )
    batch = images(architecture, 2, seed=5)
    prepared = ada.prepare(model, plan, batch)
    ada.calibrate(prepared, [batch], observer="minmax", progress=False)
    return Converted(architecture, model, prepared, ada.convert(prepared))


# Slow networks as engines take minutes, but for these, which have many small layers.
QUICKLY_RUN = {"densenet121", "googlenet"}
on_engines = pytest.mark.parametrize(
    "converted",
    [
        pytest.param(
            item,
            id=item.name,
            marks=[*item.marks, pytest.mark.heavy]
            if item.marks and item.name not in QUICKLY_RUN
            else item.marks,
        )
        for item in ARCHITECTURES
    ],
    indirect=True,
)


@pytest.fixture(scope="module")
def engine(converted: Converted) -> Engine:
    example = images(converted.architecture, 1, seed=6)
    return ada.compile(converted.native, example, policy="native", strict=True)


def output(value: Tensor | dict[str, Tensor]) -> Tensor:
    """Logits; segmentation networks return a dictionary."""
    return value["out"] if isinstance(value, dict) else value


@torch.no_grad()
def test_native_model_has_the_bits_of_the_simulation(converted: Converted) -> None:
    x = converted.images(2, seed=6)
    native, plain = output(converted.native(x)), output(converted.prepared(x))
    with ada.simulate(converted.prepared, exact=True):
        exact = output(converted.prepared(x))
    assert torch.equal(native, exact)
    # Rounding of float32 sums tips a level here and there, and each tipped level tips others: over
    # fifty random layers that adds up, but stays below the error of quantization itself.
    float_model = output(converted.model(x))
    assert native.shape == float_model.shape
    assert float((native - plain).norm()) < float((native - float_model).norm())


def test_nearly_all_arithmetic_is_quantized(converted: Converted) -> None:
    x = converted.images(1, seed=6)
    assert converted.prepared.meta["kept_float"] == {}
    layers = {
        name: layer
        for name, layer in supported_layers(converted.model).items()
        if name in converted.prepared.meta["layers"]
    }
    quantized = sum(count_flops(converted.model, layers, x).values())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        converted.model(x)
    # torch counts a transposed convolution's output; ours are products, cropped borders included.
    assert quantized >= 0.99 * counter.get_total_flops()


def test_u8_flows_from_the_input_to_the_last_quantized_layer(converted: Converted) -> None:
    assert GridWalk(converted.native).problems == []


QUICKLY_EXPORTED = {"resnet18", "mobilenet_v2", "unet"}


@torch.no_grad()
@pytest.mark.parametrize(
    "converted",
    [
        pytest.param(
            item,
            id=item.name,
            marks=[] if item.name in QUICKLY_EXPORTED else [*item.marks, pytest.mark.slow],
        )
        for item in ARCHITECTURES
    ],
    indirect=True,
)
def test_exports_with_a_dynamic_batch(converted: Converted) -> None:
    native = converted.native
    program = torch.export.export(
        native, (converted.images(2, seed=6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    operators = Counter(
        str(node.target) for node in program.graph.nodes if node.op == "call_function"
    )
    kinds = Counter(layer_kind(layer) for layer in supported_layers(converted.model).values())
    for kind, count in kinds.items():
        assert operators[f"adalayer.{kind}.default"] == count
    for batch in (1, 3):
        x = converted.images(batch, seed=batch)
        assert torch.equal(output(program.module()(x)), output(native(x)))


@on_engines
def test_nearly_all_arithmetic_is_native(converted: Converted, engine: Engine) -> None:
    coverage = engine.coverage(rounds=0)
    assert coverage.native_share >= 0.99
    layers = [m for m in converted.native.modules() if type(m) in NATIVE_LAYERS]
    assert sum(row.bits > 0 for row in coverage) == len(layers)


@pytest.mark.slow
@on_engines
def test_every_value_follows_the_module_tree(converted: Converted) -> None:
    """Law 2 on identical inputs."""
    differences = node_differences(converted.native, converted.images(2, seed=6))
    assert len(differences) > 5
    for item in differences:
        item.check()


@torch.no_grad()
@on_engines
def test_batches_give_the_same_results(
    converted: Converted, engine: Engine, tmp_path: Path
) -> None:
    x = converted.images(3, seed=8)
    y = output(engine(x))
    expected = output(converted.native(x))
    assert y.shape == expected.shape
    for k in range(3):
        assert torch.equal(output(engine(x[k : k + 1])), y[k : k + 1])
    assert torch.equal(output(engine(x.to(memory_format=torch.channels_last))), y)
    engine.save(tmp_path / "model.ada")
    assert torch.equal(output(ada.load(tmp_path / "model.ada")(x)), y)
    assert torch.equal(y, expected)


@torch.no_grad()
@on_engines
def test_executor_equals_the_interpreter(converted: Converted, engine: Engine) -> None:
    (step,) = engine._steps
    if converted.architecture.marks and converted.architecture.name not in QUICKLY_RUN:
        pytest.skip("takes long in the interpreter")
    x = converted.images(1, seed=9)
    y = output(engine(x))
    expected = torch.empty(y.shape)
    step.run.program.run_reference(  # type: ignore[union-attr]
        [x.data_ptr()], [False], 1, [expected.data_ptr()]
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_the_walk_over_the_grids_sees_a_missing_one() -> None:
    model = build(next(item for item in ARCHITECTURES if item.name == "unet"))
    plan = Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits=8)
            for name, layer in supported_layers(model).items()
        }
    )
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [torch.randn(1, 3, 32, 32)], observer="minmax", progress=False)
    native = ada.convert(prepared)
    assert GridWalk(native).problems == []
    native.get_submodule("up2").__dict__["output_grid"] = None
    (problem,) = GridWalk(native).problems
    assert problem.startswith("call_module up2: is float where")
