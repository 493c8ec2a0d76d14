"""``torch.compile(model, backend=\"adalayer\")``."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engine import native_of
from helpers_models import tiny
from helpers_patterns import Net, Shuffle, small_engine, smooth
from torch import Tensor, nn

from adalayer_native.engine import Engine
from adalayer_native.engine.backend import backend


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Engine]:
    return small_engine()


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_torch_compile(small: tuple[nn.Module, Engine]) -> None:
    native, _ = small
    compiled = torch.compile(native, backend=backend, options={"policy": "native", "strict": True})
    for n in (2, 5, 1, 3):
        x = torch.randn(n, 3, 8, 8)
        assert torch.equal(compiled(x), native(x))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_torch_compile_follows_the_weights() -> None:
    native = native_of(tiny(), torch.randn(8, 3, 8, 8))
    compiled = torch.compile(native, backend=backend, options={"policy": "native"})
    x = torch.randn(2, 3, 8, 8)
    before = compiled(x)
    native.get_submodule("fc").bias.add_(1.0)
    torch.testing.assert_close(compiled(x), before + 1.0)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_torch_compile_with_reshapes_of_the_batch() -> None:
    torch.manual_seed(0)
    native = native_of(Net(Shuffle()), smooth(8, seed=1))
    compiled = torch.compile(native, backend=backend, options={"policy": "native", "strict": True})
    for n in (2, 3, 1):
        x = smooth(n, seed=n)
        torch.testing.assert_close(compiled(x), native(x), rtol=0, atol=0.02)


@pytest.mark.usefixtures("fresh_compiler")
def test_torch_compile_of_a_float_model() -> None:
    with pytest.raises(Exception, match=r"adalayer_native\.compress"):
        torch.compile(tiny(), backend=backend)(torch.zeros(2, 3, 8, 8))
    doubled = torch.compile(lambda x: x * 2, backend=backend)
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))


def test_entry_point() -> None:
    """``backend="adalayer"`` is found by its name once the package is installed."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.entry-points.torch_dynamo_backends]")[2]
    module, _, name = section.partition('adalayer = "')[2].partition('"')[0].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_broken_graph_keeps_the_bits() -> None:
    """With gradients layers break the graph, and the compiler runs operators one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    x = torch.randn(2, 9, 16)
    native = native_of(model, x)
    for chosen in ("eager", backend):
        assert torch.equal(torch.compile(native, backend=chosen)(x), native(x))
        torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_torch_compile_at_a_second_size() -> None:
    """The graph that torch's compiler makes then has free sizes; one engine runs them all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    native = native_of(model, torch.randn(8, 3, 16, 16))
    compiled = torch.compile(native, backend=backend, options={"policy": "native", "strict": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for h, w in ((16, 16), (24, 20), (33, 17), (40, 64), (16, 16)):
            x = torch.randn(2, 3, h, w)
            assert torch.equal(compiled(x), native(x))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_torch_compile_where_every_size_has_its_own_engine() -> None:
    """Numbers that follow the size are constants of a program."""

    class Share(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) * (1.0 / x.shape[-1])

    torch.manual_seed(0)
    native = native_of(Share(), torch.randn(8, 3, 16, 16))
    compiled = torch.compile(native, backend=backend, options={"policy": "native"})
    for side in (16, 24, 32, 24):
        x = torch.randn(2, 3, side, side)
        assert torch.equal(compiled(x), native(x))
