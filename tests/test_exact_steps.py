"""Norms, lines, averages and resizing: modules, simulation and engine have the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_engine import native_of
from test_capture import plan_of
from test_input_norms import settled
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.ops.fused import fma
from adalayer_native.rounding import fma_float32


class ChannelsLast(nn.Module):
    """A layer norm of images' channels, as ConvNeXt has it."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)
        if affine:
            nn.init.uniform_(self.norm.weight, -1, 1)
            nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class Line(nn.Module):
    """A product, sum, quotient or difference with a constant per channel."""

    def __init__(self, kind: str, channels: int = 24, last: bool = False) -> None:
        super().__init__()
        shape = [channels] if last else [channels, 1, 1]
        self.kind, self.last = kind, last
        self.constant = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        c = self.constant
        if self.last:
            return (x.permute(0, 2, 3, 1) * c).permute(0, 3, 1, 2)
        results = {
            "mul": lambda: c * x,
            "div": lambda: x / c,
            "add": lambda: torch.add(x, c, alpha=3),
            "sub": lambda: x - c,
            "rsub": lambda: torch.sub(c, x, alpha=0.5),
        }
        return results[self.kind]()


class Field(nn.Module):
    """A sum and a product with a constant per element."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sum = nn.Parameter(torch.randn(1, 24, size, size))
        self.factor = nn.Parameter(torch.rand(size, size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (x + self.sum) * self.factor
        return y


def grouped(groups: int, affine: bool = True) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, 24, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias, -1, 1)
    return norm


class Bilinear(nn.Module):
    def __init__(self, **how: object) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, mode="bilinear", **self.how)  # type: ignore[arg-type]


class Mean(nn.Module):
    """A squeeze and excitation by mean()."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def around(*norms: nn.Module) -> nn.Module:
    """Norms between convolutions, where none folds."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3), nn.ReLU()]
    for norm in norms:
        layers += [norm, nn.GELU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 8, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: around(ChannelsLast(24), ChannelsLast(24)),
    "without parameters": lambda: around(ChannelsLast(24, affine=False)),
    "batch norm": lambda: around(settled(nn.BatchNorm2d(24)), settled(nn.BatchNorm2d(24))),
    "batch norm without parameters": lambda: around(nn.BatchNorm2d(24, affine=False)),
    "lines": lambda: around(*map(Line, ("mul", "div", "add", "sub", "rsub"))),
    "line of the last axis": lambda: around(Line("mul", last=True)),
    "field": lambda: around(Field(38)),
    "group norm": lambda: around(grouped(1), grouped(6), grouped(24)),
    "group norm without parameters": lambda: around(grouped(2, affine=False)),
    "avg pool": lambda: around(nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, ceil_mode=True)),
    "avg pool without padding": lambda: around(
        nn.AvgPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True, count_include_pad=False)
    ),
    "adaptive": lambda: around(nn.AdaptiveAvgPool2d((7, 10))),
    "global": lambda: around(nn.AdaptiveAvgPool2d(1)),
    "mean": lambda: around(Mean()),
    "bilinear": lambda: around(Bilinear(scale_factor=1.7), Bilinear(size=(30, 31))),
    "aligned": lambda: around(Bilinear(scale_factor=2, align_corners=True)),
}
# Results that no layer reads are float32 throughout.
ENDS: dict[str, Callable[[], nn.Module]] = {
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 5)),
    "avg pool": lambda: nn.AvgPool2d(3, 2, 1),
    "bilinear": lambda: Bilinear(scale_factor=3),
    "softmax": lambda: nn.Softmax(1),
    "softmax of logits": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 50), nn.Softmax(-1)
    ),
    "sigmoid": lambda: nn.Sigmoid(),
    "tanh": lambda: Function(lambda y: 255 * (torch.tanh(y) * 0.5 + 0.5).clamp(0.1, 0.9)),
    "silu": lambda: Function(lambda y: 1 - F.silu(y)),
    "gate": lambda: Function(lambda y: y * y.sigmoid() + (y - 2)),
    "numbers": lambda: Function(lambda y: 3 - (-y + 0.3) * 0.7),
    "mean of two": lambda: Function(lambda y: (y + y.sigmoid()) / 2),
    "pixel shuffle": lambda: nn.Sequential(nn.Tanh(), nn.PixelShuffle(2)),
}


class Function(nn.Module):
    """Any function of a tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Noise(nn.Module):
    """What is taken off the image: DnCNN, on levels and on floats of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.last(F.relu(self.first(x)))


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_the_engine_has_the_bits_of_the_modules(kind: str, tmp_path: Path) -> None:
    """A hundred thousand values per norm; with torch's own sums some lay on the other side."""
    torch.manual_seed(0)
    model = NETWORKS[kind]().eval()
    x = torch.randn(4, 3, 40, 40)
    graph = ada.capture(model, x)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    before = prepared.code, list(prepared.state_dict())
    native = ada.convert(prepared)
    assert "adalayer.grid_" in native.code or "adalayer.exact_" in native.code
    with ada.simulate(prepared) as exact:
        assert torch.equal(native(x), exact(x))
    assert (prepared.code, list(prepared.state_dict())) == before
    ada.save(native, tmp_path / "m.safetensors")
    assert torch.equal(ada.restore(graph, tmp_path / "m.safetensors")(x), native(x))
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert engine.coverage(rounds=0).native_share == 1
    assert torch.equal(engine(x), native(x))
    assert float((native(x) - model(x)).norm() / model(x).norm()) < 0.05


@pytest.mark.parametrize("kind", [*ENDS, "noise"])
@torch.no_grad()
def test_float_results_have_the_bits_of_the_modules(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (Noise() if kind == "noise" else nn.Sequential(around(), ENDS[kind]())).eval()
    x = torch.randn(4, 3, 40, 40)
    prepared = ada.prepare(ada.capture(model, x), plan_of(ada.capture(model, x)))
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    with ada.simulate(prepared) as exact:
        assert torch.equal(native(x), exact(x))
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert {row.kind for row in engine.coverage(rounds=0)} == {"native"}
    assert torch.equal(engine(x), native(x))
    engine.save(tmp_path / "m.ada")
    assert torch.equal(ada.load(tmp_path / "m.ada")(x[:1]), engine(x[:1]))
    assert float((native(x) - model(x)).norm() / model(x).norm()) < 0.05


@torch.no_grad()
def test_floats_that_a_program_cannot_hold_stay_in_torch() -> None:
    """A constant that is not finite, and a factor that torch rounds together with the sum."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 20)
    for end in (
        lambda y: torch.minimum(y + math.inf, y),
        lambda y: torch.add(y, 0.3, alpha=0.7),
        lambda y: torch.sub(3, y, alpha=0.3),
        lambda y: y / 3,
    ):
        native = native_of(nn.Sequential(around(), Function(end)), x)
        engine = ada.compile(native, x, policy="native", weights="resident")
        assert "torch" in {row.kind for row in engine.coverage(rounds=0)}
        assert torch.equal(engine(x), native(x))


POOLS: list[dict[str, object]] = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
]


@pytest.mark.parametrize("on_grid", [True, False])
def test_averages_are_those_of_torch(on_grid: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    scale, zero_point = float(np.float32(0.037)), 91
    x = (torch.randint(0, 256, (2, 3, 11, 14), generator=generator) - zero_point).float() * scale
    qparams = torch.tensor([scale, zero_point, 8]) if on_grid else None
    ours = torch.ops.adalayer
    for options in POOLS:
        wanted = F.avg_pool2d(x.double(), **options).float()  # type: ignore[arg-type]
        two = [
            [v, v] if isinstance(v := options.get(name, default), int) else list(v)  # type: ignore[call-overload]
            for name, default in (("kernel_size", 0), ("stride", 0), ("padding", 0))
        ]
        rest = options.get("ceil_mode", False), options.get("count_include_pad", True)
        torch.testing.assert_close(ours.exact_avg_pool2d(x, *two, *rest, qparams), wanted)
        torch.library.opcheck(ours.exact_avg_pool2d.default, (x, *two, *rest, qparams))
    cases = (
        (ours.exact_adaptive_avg_pool2d, ([4, 5],), F.adaptive_avg_pool2d(x.double(), (4, 5))),
        (ours.exact_mean, ([2, -1], False), x.double().mean((2, 3))),
        (
            ours.exact_bilinear,
            (None, False, [1.5, 2.0]),
            F.interpolate(x.double(), scale_factor=(1.5, 2.0), mode="bilinear"),
        ),
        (
            ours.exact_bilinear,
            ([7, 40], True, None),
            F.interpolate(x.double(), (7, 40), mode="bilinear", align_corners=True),
        ),
    )
    for operator, arguments, wanted in cases:
        found = operator(x, *arguments, qparams)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
        torch.library.opcheck(operator.default, (x, *arguments, qparams))


def test_fused_operations() -> None:
    """Every order in memory; the scalar emulation in torch is the specification."""
    generator = torch.Generator().manual_seed(4)
    for shape in ((1, 1), (3, 37), (2, 5, 9, 7), (65_600,)):
        a, b, c = (torch.randn(shape, generator=generator) for _ in range(3))
        assert torch.equal(fma(a, b, c), fma_float32(a, b, c))
        assert torch.equal(fma(a, b[:1], c[..., :1]), fma_float32(a, b[:1], c[..., :1]))
    image = torch.randn(2, 5, 9, 7).to(memory_format=torch.channels_last)
    line = torch.rand(5, 1, 1)
    assert torch.equal(fma(image, line, -line), fma_float32(image, line, -line))
    assert fma(image, line, line).is_contiguous(memory_format=torch.channels_last)
    for shape in ((3, 11), (2, 21, 6, 5), (1, 1), (0, 4)):
        x = 20 * torch.randn(shape)
        found = torch.ops.adalayer.exact_softmax(x)
        torch.testing.assert_close(found, x.softmax(1), rtol=1e-5, atol=1e-7)
        torch.library.opcheck(torch.ops.adalayer.exact_softmax.default, (x,))
        for kind in ("sigmoid", "tanh", "silu"):
            found = torch.ops.adalayer.exact_function(x, kind)
            wanted = getattr(F, kind)(x)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-7)
            torch.library.opcheck(torch.ops.adalayer.exact_function.default, (x, kind))


def test_batch_norm_is_one_fused_step_per_value() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, zero_point = float(np.float32(0.037)), 91
    q = torch.randint(0, 256, (3, 5, 7, 2), generator=generator)
    x = (q - zero_point).float() * scale
    norm = settled(nn.BatchNorm2d(5)).eval()
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, qparams
    )
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt() * scale
    addend = norm.bias.double() - norm.running_mean.double() * factor / scale - zero_point * factor
    wanted = fma_float32(q.float(), *(t.float().view(1, 5, 1, 1) for t in (factor, addend)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, norm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 31, 768])
def test_layer_norm_adds_whole_numbers(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    scale, zero_point = float(np.float32(0.01)), 3
    q = torch.randint(0, 256, (64, channels), generator=generator)
    q[0], q[1, 0] = 7, 255  # equal values; and an outlier
    x = (q - zero_point).float() * scale
    weight, bias = torch.randn(channels), torch.randn(channels)
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_layer_norm(x, weight, bias, 1e-5, qparams)
    wanted = F.layer_norm(x.double(), [channels], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    # Neither the order of the channels nor the number of rows matters.
    order = torch.randperm(channels, generator=generator)
    again = torch.ops.adalayer.grid_layer_norm(
        x[5:9, order], weight[order], bias[order], 1e-5, qparams
    )
    assert torch.equal(again, found[5:9, order])


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 5), (2, 8, 7, 3)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_adds_whole_numbers(shape: tuple[int, ...], groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    scale, zero_point = float(np.float32(0.01)), 3
    q = torch.randint(0, 256, shape, generator=generator)
    q[0] = 7
    x = (q - zero_point).float() * scale
    weight, bias = torch.randn(8), torch.randn(8)
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_group_norm(x, groups, weight, bias, 1e-5, qparams)
    flat = x.double().reshape(shape[0], groups, -1)
    centred = flat - flat.mean(-1, keepdim=True)
    rest = [1, 8, *[1] * (len(shape) - 2)]
    wanted = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(shape)
    wanted = wanted * weight.double().view(rest) + bias.double().view(rest)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    if len(shape) == 4:  # the order of the positions does not matter
        again = torch.ops.adalayer.grid_group_norm(
            x.flip(2, 3), groups, weight, bias, 1e-5, qparams
        )
        assert torch.equal(again.flip(2, 3), found)


@pytest.mark.parametrize(
    "name", ["grid_batch_norm", "grid_layer_norm", "grid_group_norm", "grid_line"]
)
def test_operators_follow_the_rules_of_torch(name: str) -> None:
    x = (torch.randint(0, 256, (2, 4, 3, 4)) - 3).float() * 0.5
    rest: list[object] = [torch.ones(4), torch.zeros(4), 1e-5, torch.tensor([0.5, 3, 8])]
    if name == "grid_batch_norm":
        rest = [torch.zeros(4), torch.ones(4), *rest]
    if name == "grid_group_norm":
        rest = [2, *rest]
    if name == "grid_line":
        rest = [torch.ones(4), "add", 2.0, True, rest[-1]]
    torch.library.opcheck(getattr(torch.ops.adalayer, name).default, (x, *rest))
