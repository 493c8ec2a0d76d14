"""Well-known networks as engines: natively, and as the converted module tree computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_engine import native_of, node_differences
from helpers_torchvision import ARCHITECTURES, Architecture, build, images
from torch import Tensor, fx

import adalayer_native as ada
from adalayer_native.engine import Engine


@dataclass
class Compiled:
    architecture: Architecture
    native: fx.GraphModule
    engine: Engine

    def images(self, count: int, seed: int) -> Tensor:
        return images(self.architecture, count, seed=seed)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            item, id=item.name, marks=[*item.marks, pytest.mark.heavy] if item.marks else []
        )
        for item in ARCHITECTURES
    ],
)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    architecture: Architecture = request.param
    native = native_of(build(architecture), images(architecture, 2, seed=5))
    example = images(architecture, 1, seed=6)
    engine = ada.compile(native, example, policy="native", strict=True)
    return Compiled(architecture, native, engine)


def output(value: Tensor | dict[str, Tensor]) -> Tensor:
    """Logits; segmentation networks return a dictionary."""
    return value["out"] if isinstance(value, dict) else value


def test_nearly_all_arithmetic_is_native(compiled: Compiled) -> None:
    coverage = compiled.engine.coverage(rounds=0)
    assert coverage.native_share >= 0.99
    layers = [m for m in compiled.native.modules() if type(m) in NATIVE_LAYERS]
    assert sum(row.bits > 0 for row in coverage) == len(layers)


@pytest.mark.slow
def test_every_value_follows_the_module_tree(compiled: Compiled) -> None:
    """Law 2 on identical inputs."""
    differences = node_differences(compiled.native, compiled.images(2, seed=6))
    assert len(differences) > 5
    for item in differences:
        item.check()


@torch.no_grad()
def test_batches_give_the_same_results(compiled: Compiled, tmp_path: Path) -> None:
    x = compiled.images(3, seed=8)
    y = output(compiled.engine(x))
    expected = output(compiled.native(x))
    assert y.shape == expected.shape
    for k in range(3):
        assert torch.equal(output(compiled.engine(x[k : k + 1])), y[k : k + 1])
    assert torch.equal(output(compiled.engine(x.to(memory_format=torch.channels_last))), y)
    compiled.engine.save(tmp_path / "model.ada")
    assert torch.equal(output(ada.load(tmp_path / "model.ada")(x)), y)
    assert torch.equal(y, expected)


@torch.no_grad()
def test_executor_equals_the_interpreter(compiled: Compiled) -> None:
    (step,) = compiled.engine._steps
    if compiled.architecture.marks:
        pytest.skip("takes long in the interpreter")
    x = compiled.images(1, seed=9)
    y = output(compiled.engine(x))
    expected = torch.empty(y.shape)
    step.run.program.run_reference(  # type: ignore[union-attr]
        [x.data_ptr()], [False], 1, [expected.data_ptr()]
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


NATIVE_LAYERS = (ada.nn.Conv2d, ada.nn.ConvTranspose2d, ada.nn.Linear)
