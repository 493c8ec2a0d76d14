"""Layers, norms and lines in float32 inside a program: same bits in modules, simulation, engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_engine import node_differences, plan_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.capture import capture
from adalayer_native.engine import Engine
from adalayer_native.quantization import calibrate, convert, prepare, simulate

our = torch.ops.adalayer


@torch.no_grad()
def checked(model: nn.Module, x: Tensor, path: Path, floats: Sequence[str] = ()) -> Engine:
    """Compiled with some layers in float: everything is in the program, with the modules' bits."""
    graph = capture(model.eval(), x)
    plan = plan_of(graph)
    for name in floats:
        plan[name].bits = None
    prepared = prepare(graph, plan)
    calibrate(prepared, [x], observer="minmax", progress=False)
    native = convert(prepared)
    engine = ada.compile(native, x, policy="native", weights="resident", strict=True)
    wanted = pytree.tree_leaves(native(x))
    with simulate(prepared) as exact:
        simulated = pytree.tree_leaves(exact(x))
    engine.save(path)
    loaded = ada.load(path)
    several = torch.cat([x, x.flip(0), x[:1]])
    for got in (simulated, *(pytree.tree_leaves(run(x)) for run in (engine, loaded))):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for a, b in zip(*(pytree.tree_leaves(run(several)) for run in (engine, native)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(wanted, pytree.tree_leaves(model(x)), strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999
    for difference in node_differences(native, x):
        difference.check()
    return engine


class Row(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


class Features(nn.Module):
    """A result that another layer reads, too."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3), middle
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.middle(self.first(x))
        return y, self.last(y)


class Ends(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


class Shifted(nn.Module):
    """Lines with constants, a residual and one token of a row norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 12), nn.Linear(12, 12)
        self.scale, self.places = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(5, 12))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        z = y + self.scale * self.b(y)
        return self.norm(z + self.places)[:, 0], self.norm(self.places - z).transpose(1, 2)


def _norm(norm: nn.Module) -> nn.Module:
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("sizes", [(16,), (7, 16), (2, 3, 16)])
def test_norms_of_rows_at_an_end(norm: type, sizes: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Row(_norm(norm(24)))
    checked(model, torch.randn(3, *sizes), tmp_path / "end.ada")


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(8, 8), lambda: nn.BatchNorm2d(8)],
)
@pytest.mark.parametrize("net", [Features, Ends])
def test_norms_of_images_at_an_end(net: type, norm: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checked(net(_norm(norm())), torch.randn(2, 3, 9, 8), tmp_path / "end.ada")


def test_constants_and_pieces_of_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checked(Shifted(), torch.randn(3, 5, 16), tmp_path / "end.ada")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_encoder_of_torch(norm_first: bool, last: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=norm_first, dropout=0.0
    )
    norm = nn.LayerNorm(32) if last else None
    model = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
    engine = checked(model, torch.randn(3, 7, 32), tmp_path / "encoder.ada")
    assert engine.native_share == 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), _norm(nn.BatchNorm2d(16))
        self.deep, self.norm2 = (
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            _norm(nn.BatchNorm2d(16)),
        )
        self.wide, self.fc = nn.Conv2d(16, 24, 1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        x = self.wide(self.norm2(self.deep(x)).relu()).relu()
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


FLOATS = [["fc"], ["stem"], ["deep"], ["stem", "deep"], ["wide", "fc"], ["stem", "fc"]]


@pytest.mark.parametrize("floats", FLOATS, ids="-".join)
def test_layers_that_stay_in_float(floats: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    engine = checked(Net(), torch.randn(2, 3, 20, 20), tmp_path / "net.ada", floats)
    coverage = engine.coverage(rounds=0)
    assert [row.name for row in coverage if row.kind == "float"] == floats
    assert 0.0 < coverage.float_share < 1.0
    assert coverage.native_share + coverage.float_share == pytest.approx(1.0)
    assert "in the engine's float kernels" in str(coverage)
    weights = {name: layer.weight.numel() for name, layer in Net().named_children() if name != ""}
    row = next(row for row in coverage if row.kind == "float")
    assert row.bits == 32 and row.bytes == 4 * weights[row.name]


@pytest.mark.parametrize(
    "function",
    [F.hardswish, F.hardsigmoid, F.silu, torch.tanh, lambda x: F.leaky_relu(x, 0.1), F.relu6],
)
def test_functions_in_front_of_a_layer_in_float(function: Any, tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(function(4.0 * self.conv(x)).mean((2, 3)))
            return y

    torch.manual_seed(0)
    checked(Head(), torch.randn(2, 3, 8, 7), tmp_path / "head.ada", ["fc"])


class Sums(nn.Module):
    """Residuals of every kind: of floats at the end, of levels, and beside a layer in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.side, self.main = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.short, self.long = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (self.main(x) + self.side(x)).relu() + x
        return (self.long(x) + self.short(x)).relu()


@pytest.mark.parametrize("floats", [[], ["main"], ["side"], ["long"], ["short"]], ids="-".join)
def test_residuals(floats: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    checked(Sums(), torch.randn(2, 3, 8, 7), tmp_path / "sums.ada", floats)


def test_flattened_images_and_rows_of_windows(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.last = nn.Conv2d(2, 4, 3), nn.Linear(64, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(self.conv(x).relu().flatten(1)).relu()
            z: Tensor = self.last(y.reshape(-1, 1, 9)).squeeze(1)
            return z

    torch.manual_seed(0)
    for floats in (["fc"], ["last"], ["conv", "fc"]):
        checked(Flat(), torch.randn(3, 2, 6, 6), tmp_path / "flat.ada", floats)


@torch.no_grad()
def test_bits_depend_on_the_operands_alone() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 6, 9, 11), torch.randn(8, 3, 3, 2), torch.randn(8)
    rest = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    rows, matrix = torch.randn(5, 300), torch.randn(70, 300)
    convolved = our.exact_conv2d(x, weight, bias, *rest)
    product = our.exact_linear(rows, matrix)
    padded = F.pad(x, (0, 1, 1, 2))
    close = F.conv2d(padded.double(), weight.double(), bias.double(), rest[0], 0, rest[2], 2)
    torch.testing.assert_close(convolved.double(), close, rtol=0, atol=1e-4)
    torch.testing.assert_close(product, rows @ matrix.T, rtol=0, atol=1e-3)
    before = ops.get_num_threads()
    try:
        for isa in ops.isas():
            ops.force_isa(isa)
            for threads in (1, 3):
                ops.set_num_threads(threads)
                assert torch.equal(our.exact_conv2d(x, weight, bias, *rest), convolved)
                assert torch.equal(our.exact_linear(rows, matrix), product)
                for k in range(5):
                    one = our.exact_conv2d(x[k : k + 1], weight, bias, *rest)
                    assert torch.equal(one, convolved[k : k + 1])
                    assert torch.equal(our.exact_linear(rows[k], matrix), product[k])
    finally:
        ops.force_isa("auto")
        ops.set_num_threads(before)
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(our.exact_conv2d(turned, weight, bias, *rest), convolved)
    half = our.exact_linear(rows.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16


def test_opcheck() -> None:
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 3, 3)
    geometry = ([1, 2], [0, 1, 2, 1], [1, 1], 2)
    torch.library.opcheck(our.exact_conv2d.default, (x, weight, None, *geometry))
    torch.library.opcheck(our.exact_linear.default, (x, torch.randn(3, 6), torch.randn(3)))
    for name, rest in (
        ("grid_layer_norm", (torch.ones(6), None, 1e-5, None)),
        ("grid_rms_norm", (None, 1e-5, None)),
        ("grid_group_norm", (2, None, None, 1e-5, None)),
        ("grid_batch_norm", (torch.zeros(4), torch.ones(4), None, None, 1e-5, None)),
    ):
        torch.library.opcheck(getattr(our, name).default, (x, *rest))


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"exact_linear: weight and bias of .* do not fit"):
        our.exact_linear(torch.randn(2, 5), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"exact_linear: weight and bias of .* do not fit"):
        our.exact_linear(torch.randn(2, 4), torch.randn(3, 4), torch.randn(2))
    with pytest.raises(ValueError, match=r"exact_conv2d: weight and bias of .* do not fit"):
        our.exact_conv2d(
            torch.randn(1, 4, 5, 5), torch.randn(3, 3, 1, 1), None, [1, 1], [0] * 4, [1, 1], 1
        )
    with pytest.raises(TypeError, match=r"exact_linear: expected an input of torch.float32"):
        our.exact_linear(torch.ones(2, 4, dtype=torch.int32), torch.randn(3, 4))
