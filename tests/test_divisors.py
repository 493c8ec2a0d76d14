"""What something is divided by stays in float: a small constant is no level of a u8 grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_capture import plan_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture.float_values import float_values


def layer_norm(y: Tensor) -> Tensor:
    """Over the channels, by hand."""
    mean = y.mean(1, keepdim=True)
    var = (y - mean).pow(2).mean(1, keepdim=True)
    return (y - mean) / torch.sqrt(var + 1e-6)


DIVISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda y: F.normalize(y, dim=1),
    "pixel norm": lambda y: y / torch.sqrt(torch.mean(y**2, dim=1, keepdim=True) + 1e-8),
    "rsqrt": lambda y: y * torch.rsqrt(torch.mean(y**2, dim=1, keepdim=True) + 1e-8),
    "l2 norm": lambda y: y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10),
    "layer norm": layer_norm,
    "power": lambda y: y * (y.square().mean(1, keepdim=True) + 1e-8) ** -0.5,
    "reciprocal": lambda y: y * (y.amax(1, keepdim=True) + 1e-6).reciprocal(),
    "share": lambda y: y / (y.sum((2, 3), keepdim=True) + 1e-6),
}


class Divides(nn.Module):
    def __init__(self, divide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.divide = divide
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.divide(self.first(x).relu()))
        return y


@pytest.mark.parametrize("kind", DIVISIONS)
@torch.no_grad()
def test_pixels_without_anything_stay_finite(kind: str) -> None:
    """Many pixels are zero in all channels."""
    torch.manual_seed(0)
    model = Divides(DIVISIONS[kind]).eval()
    model.first.bias.sub_(0.7)
    x = torch.randn(4, 3, 9, 7)
    wanted = model(x)
    graph = ada.capture(model, x)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    got = native(x)
    assert bool(wanted.isfinite().all()) and bool(got.isfinite().all())
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    with ada.simulate(prepared) as exact:
        assert torch.equal(exact(x), got)
    engine = ada.compile(native, x, policy="native", weights="resident")
    torch.testing.assert_close(engine(x), got, rtol=0, atol=0.02 * float(got.abs().max()))


def test_what_else_is_read_keeps_its_grid() -> None:
    model = Divides(DIVISIONS["pixel norm"]).eval()
    graph = ada.capture(model, torch.randn(2, 3, 8, 8))
    names = {node.name for node in float_values(graph).values}
    assert names == {"relu", "pow_1", "mean", "add", "sqrt"}
    gates = Divides(lambda y: y * (y.mean((2, 3), keepdim=True) / 6).sigmoid()).eval()
    assert not float_values(ada.capture(gates, torch.randn(2, 3, 8, 8))).values


@torch.no_grad()
def test_a_layer_may_read_an_inverse() -> None:
    x = torch.randn(4, 3, 9, 7)
    model = Divides(lambda y: (y + 1).reciprocal()).eval()
    graph = ada.capture(model, x)
    prepared = ada.prepare(graph, plan_of(graph))
    native = ada.convert(ada.calibrate(prepared, [x], progress=False))
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert torch.equal(engine(x), native(x))
    assert float((native(x) - model(x)).norm() / model(x).norm()) < 0.02


@torch.no_grad()
def test_a_nan_becomes_the_lowest_level_in_the_simulation_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    graph = ada.capture(model, x)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 2, 1, 1] = torch.nan, torch.inf, -torch.inf
    with ada.simulate(prepared) as exact:
        assert torch.equal(exact(x), ada.convert(prepared)(x))
