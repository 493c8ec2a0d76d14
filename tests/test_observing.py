"""Ranges are chosen for the error that a value's readers see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization.graph import quantizers_of
from adalayer_native.quantization.observers import MinMaxObserver, MSEObserver
from adalayer_native.quantization.observing import observers_for


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.body(self.first(x)))
        return y


class Attention(nn.Module):
    """Its weights are a result, too: so it is no one operation, and its scores are stored."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q(x), self.k(x)
        weights = (q @ k.transpose(1, 2) * 0.25 + self.bias).softmax(-1)
        return self.out(weights @ x), weights

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(10, 10))


def prepared(network: nn.Module, *shape: int) -> ada.capture.GraphModel:
    captured = ada.capture(network.eval(), torch.randn(2, *shape))
    layers = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 8)
        for name, layer in supported_layers(captured).items()
    }
    return ada.prepare(captured, Plan(layers, "uniform"))


def after_first(body: Callable[[Tensor], Tensor], kind: str = "mse") -> MSEObserver:
    model = prepared(Between(body), 16)
    found = observers_for(model, kind)
    (observer,) = (found[name] for name in found if name.endswith("first"))
    assert isinstance(observer, MSEObserver)
    return observer


@pytest.mark.parametrize(
    "function",
    [F.silu, F.hardswish, F.gelu, lambda y: F.gelu(y, approximate="tanh"),
     lambda y: F.leaky_relu(y, 0.3)],
    ids=["silu", "hardswish", "gelu", "tanh gelu", "leaky relu"],
)  # fmt: skip
def test_the_error_is_that_behind_a_function(function: Callable[[Tensor], Tensor]) -> None:
    observer = after_first(function)
    assert observer.function is not None
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(observer.function(x), function(x))


@pytest.mark.parametrize(
    "body",
    [lambda y: y * y.sigmoid(), lambda y: F.silu(y) + F.gelu(y), lambda y: y.cumsum(-1)],
    ids=["read twice", "two functions", "no function of one value"],
)
def test_other_readers_feel_every_error(body: Callable[[Tensor], Tensor]) -> None:
    model = prepared(Between(body), 16)
    observers = [o for o in observers_for(model, "mse").values() if isinstance(o, MSEObserver)]
    assert len(observers) == len(observers_for(model, "mse"))
    first = next((o for o in observers if o.name.endswith("first")), None)
    assert first is None or first.function is None


def test_a_range_behind_hard_swish_leaves_out_what_becomes_zero() -> None:
    torch.manual_seed(0)
    plain, behind = MSEObserver(8, "y"), MSEObserver(8, "y")
    behind.function = F.hardswish
    values = 2.0 * torch.randn(100_000)
    for observer in (plain, behind):
        observer.observe(values)
    assert plain.range()[0] < -6 and behind.range()[0] == pytest.approx(-3, abs=0.3)
    steps = [(high - low) / 255 for low, high in (plain.range(), behind.range())]
    assert steps[1] < 0.8 * steps[0]

    def error(observer: MSEObserver) -> float:
        quantizer = ada.quantization.fake_quant.ActivationQuantizer(8)
        quantizer.set_range(*observer.range())
        return float((F.hardswish(quantizer(values)) - F.hardswish(values)).square().mean())

    assert error(behind) < 0.7 * error(plain)


def test_calibrate_chooses_ranges_so() -> None:
    torch.manual_seed(0)
    x = 4.0 * torch.randn(64, 16)
    model = ada.calibrate(prepared(Between(F.hardswish), 16), [x], progress=False)
    (first,) = (q for name, q in quantizers_of(model).items() if name.endswith("first"))
    with torch.no_grad():
        assert float(model.get_submodule("first")(x).min()) < -4
    assert -3.5 < -first.zero_point * first.scale < -2.5


def test_a_function_that_is_not_finite_leaves_the_whole_range() -> None:
    observer = MSEObserver(8, "y")
    observer.function = torch.exp
    observer.observe(torch.tensor([-5.0, 2000.0]))
    assert observer.range() == (-5.0, 2000.0)


@pytest.mark.parametrize("kind", ["mse", "percentile", "minmax"])
def test_what_ends_in_a_softmax_is_not_clipped(kind: str) -> None:
    torch.manual_seed(0)
    model = prepared(Attention(), 10, 16)
    observers = observers_for(model, kind)
    logits = [n for n, o in observers.items() if type(o) is MinMaxObserver]
    if kind != "minmax":
        assert {name.split(".")[1] for name in logits} == {"matmul", "mul", "add"}
    ada.calibrate(model, [torch.randn(8, 10, 16)], observer=kind, progress=False)
    assert all(quantizers_of(model)[name].calibrated for name in logits)
