"""Batch norms in front of a layer are folded into it where that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_capture import plan_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.quantization.convert import convert
from adalayer_native.quantization.file_contents import stored_model
from adalayer_native.quantization.graph import build_prepared


def settled(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    with torch.no_grad():
        for tensor in (norm.bias, norm.running_mean):
            tensor.uniform_(-1, 1)
        norm.weight.uniform_(0.7, 1)
        norm.weight[::2] *= -1
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def rows() -> tuple[nn.Module, Tensor]:
    norm = settled(nn.BatchNorm1d(12))
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), norm, nn.Linear(12, 5)), torch.randn(32, 6)


def images(bias: bool = False, **kwargs: object) -> tuple[nn.Module, Tensor]:
    norm = settled(nn.BatchNorm2d(8))
    conv = nn.Conv2d(8, 12, 3, bias=bias, **kwargs)  # type: ignore[arg-type]
    return nn.Sequential(norm, conv, nn.ReLU(), nn.Conv2d(12, 4, 1)), torch.randn(16, 8, 9, 9)


CASES = {
    "linear": rows,
    "convolution": images,
    "with a bias": lambda: images(bias=True),
    "grouped": lambda: images(groups=4),
    "depthwise, strided": lambda: (
        nn.Sequential(settled(nn.BatchNorm2d(8)), nn.Conv2d(8, 16, 3, 2, groups=8)),
        torch.randn(16, 8, 9, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_leaves_the_graph(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = CASES[case]()
    graph = ada.capture(model.eval(), x)
    plan = plan_of(graph)
    prepared = ada.prepare(graph, plan)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in prepared.modules())
    ada.calibrate(prepared, [x], observer="minmax", progress=False)
    native = ada.convert(prepared)
    wanted = model(x)
    assert float((native(x) - wanted).norm() / wanted.norm()) < 0.03
    with ada.simulate(prepared) as exact:
        assert torch.equal(native(x), exact(x))
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert torch.equal(engine(x), native(x))
    keys = {key for key, _, _ in stored_model(graph, plan).entries()}
    assert keys == set(native.state_dict())
    ada.save(native, tmp_path / "m.safetensors")
    assert torch.equal(ada.restore(graph, tmp_path / "m.safetensors")(x), native(x))


class Read(nn.Module):
    """Something else reads the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = settled(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = self.conv(y) + y
        return z


class Twice(nn.Module):
    """The layer has another input, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = settled(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x)) + self.conv(x)
        return y


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(settled(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(settled(nn.BatchNorm2d(4)), nn.Dropout(), nn.Conv2d(4, 4, 1)),
        nn.Sequential(settled(nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 4, 2)),
        Read(),
        Twice(),
    ],
    ids=["padded", "dropout between", "transposed", "read twice", "layer called twice"],
)
@torch.no_grad()
def test_where_it_would_not_be_exact_it_stays(model: nn.Module) -> None:
    x = torch.randn(4, 4, 6, 6)
    graph = ada.capture(model.eval(), x)
    prepared = ada.prepare(graph, plan_of(graph))
    assert any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    ada.calibrate(prepared, [x], observer="minmax", progress=False)
    native = ada.convert(prepared)
    assert float((native(x) - model(x)).norm() / model(x).norm()) < 0.05


@torch.no_grad()
def test_uneven_factors_stay_where_they_cost_the_weights_nothing(tmp_path: Path) -> None:
    """Channels of different sizes: folded, the weights of the largest ones would have no levels."""
    torch.manual_seed(0)
    model, x = rows()
    sizes = 10.0 ** torch.linspace(-2, 1, 12)
    model[0].weight *= sizes[:, None]
    model[0].bias *= sizes
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    y = model[:2](x)
    norm.running_mean, norm.running_var = y.mean(0), y.var(0)
    graph = ada.capture(model.eval(), x)
    losses = {}
    for keep in (None, []):
        prepared = build_prepared(graph, plan_of(graph, 4), keep=keep)
        ada.calibrate(prepared, [x], progress=False)
        native = convert(prepared)
        losses[keep is None] = float((native(x) - model(x)).norm() / model(x).norm())
        ada.save(native, tmp_path / "m.safetensors")
        assert torch.equal(ada.restore(graph, tmp_path / "m.safetensors")(x), native(x))
        assert ("2.running_mean" in native.state_dict()) == (keep is None)
    assert losses[True] < 0.7 * losses[False]


@torch.no_grad()
def test_files_that_hold_it_load_with_the_same_bits(tmp_path: Path) -> None:
    model, x = images()
    graph = ada.capture(model.eval(), x)
    prepared = build_prepared(graph, plan_of(graph), keep=["0"])
    ada.calibrate(prepared, [x], progress=False)
    old = convert(prepared)
    assert "0.running_mean" in old.state_dict()
    ada.save(old, tmp_path / "old.safetensors")
    assert torch.equal(ada.restore(model, tmp_path / "old.safetensors", x)(x), old(x))


def test_the_model_keeps_it() -> None:
    model, x = rows()
    graph = ada.capture(model.eval(), x)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    ada.prepare(graph, plan_of(graph))
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())
