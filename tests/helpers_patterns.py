"""Small networks with one pattern each that engines have to fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers_engine import native_of
from helpers_models import tiny
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.engine import Engine


class Net(nn.Module):
    """Convolution, then a pattern, then a convolution and a linear layer.

    The layers around the pattern make its operands and its result values that are stored as u8.
    """

    def __init__(self, pattern: nn.Module | Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pattern = pattern
        self.last = nn.Conv2d(channels, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.pattern(self.first(x)))
        return self.fc(y.mean((2, 3)))


class Residual(nn.Module):
    """Additions on both sides, with and without relu, and a batch norm to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), stride=(1, 1))
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.bn(self.a(x)))
        x = self.b(x) + x
        return F.relu6(self.c(F.relu(x)) + x)


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        s = F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(s))


class PreActivation(nn.Module):
    """Batch norms that no convolution can absorb, concatenations of concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(12)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(12, 4, 1)])
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return x


class ConvNextBlock(nn.Module):
    """Linear layers and a layer norm over the last axis, a factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.linspace(-0.5, 1.5, 8).reshape(8, 1, 1))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Shuffle(nn.Module):
    """Halves that go separate ways and are shuffled together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(x).chunk(2, dim=1)
        y = torch.cat([a, self.conv(b)], dim=1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Up(nn.Module):
    """Transposed convolutions beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.grow = nn.ConvTranspose2d(16, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(F.relu(self.down(x))))
        return self.grow(torch.cat([x, y], dim=1))


def slices(x: Tensor) -> Tensor:
    first, second, third = x.split([2, 3, 3], dim=1)
    picked = x[:, 1].unsqueeze(1)
    window = torch.cat([first, second, third, picked], dim=1)[:, :, 1:9:2, ::3]
    return window.narrow(3, 1, 2)


class Tokens(nn.Module):
    """Pixels become rows of features: linear layers along and across them, and back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)
        self.across = nn.Linear(144, 144)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        y = y + self.narrow(F.gelu(self.wide(y)))
        y = y + self.across(y.transpose(1, 2)).transpose(1, 2)
        y = self.norm(y)[:, 2:142].reshape(-1, 14, 10, 8).permute(0, 3, 1, 2)
        return y.roll((3, -4), (2, 3))


class Windows(nn.Module):
    """Windows become part of the batch, and rows of features split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 16)
        self.join = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        y = F.relu(self.mix(y)).reshape(-1, 16, 2, 8).transpose(1, 2)
        y = self.join(y.reshape(-1, 32, 8)[:, 3:19])
        y = y.reshape(n, h // 4, w // 4, 4, 4, 8).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(n, 8, h, w)


class Picked(nn.Module):
    """Channels in an order that a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([7, 0, 3, 3, 1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.order).flip(1, 3)


class ClassTokens(nn.Module):
    """As a vision transformer begins: tokens of its own around those of the image, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 2))
        self.positions = nn.Parameter(torch.randn(1, 147, 8))
        self.factors = nn.Parameter(torch.rand(147, 1) + 0.5)
        self.norm, self.wide = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        first = self.first.expand(x.shape[0], -1, -1)
        y = torch.cat([first, tokens, self.last.repeat(x.shape[0], 1, 1)], dim=1) + self.positions
        y = self.wide(self.norm(y)) * self.factors
        y = torch.cat([y[:, :145], y.new_zeros(x.shape[0], 1, 8), y[:, 146:] * y[:, :1]], 1)
        return y[:, 1:145].transpose(1, 2).reshape(x.shape) + y[:, 145:].mean(1)[..., None, None]


class TokensFirst(nn.Module):
    """The batch is the second axis, and once the inner part of the first: torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(144, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.flatten(2).permute(2, 0, 1) + self.positions)
        first, second, third = (
            self.mix(y).unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2)[..., 0, :]
        )
        first, second, third = (item.transpose(0, 1) for item in (first, second, third))
        z = (F.relu(first) * second + third.flip(1)).transpose(0, 1)
        z = z.reshape(h * w, n * 2, 4).transpose(0, 1).reshape(n, 2, h * w, 4)
        z = self.out(z.permute(2, 0, 1, 3).reshape(h * w * n, c)).reshape(h * w, n, c)
        return z.permute(1, 2, 0).reshape(n, c, h, w)


class Positions(nn.Module):
    """A constant per element, per pixel, per row and channel; and one behind a permutation."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((8, 12, 12), (1, 1, 12, 12), (8, 12, 1), (12, 8, 12))
        self.fields = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.divisors = nn.Parameter(torch.rand(8, 12, 12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        whole, pixels, rows, turned = self.fields
        y = (F.relu(x) + whole) * pixels - rows
        return torch.sub(turned, y.transpose(1, 2)).transpose(1, 2) / self.divisors


def joins(x: Tensor) -> Tensor:
    """Along rows, columns, axes of a view; values stacked."""
    x = F.relu(x)
    y = torch.cat([x[:, :, :5], x.flip(2), x[:, :, 1:2] * 0.5], dim=2)[:, :, 2:14]
    y = torch.cat([y, -x[..., :3]], dim=3)
    tokens = torch.cat([y.flatten(2), x.flatten(2)], dim=2)
    heads = torch.cat([tokens.reshape(-1, 2, 4, 324), tokens.reshape(-1, 2, 4, 324).flip(1)], 1)
    deep = heads[..., :144].reshape(-1, 4, 4, 12, 12).transpose(2, 3)
    deep = torch.cat([deep[:, :2], deep.flip(1), deep[:, 1:2]], dim=1)  # five axes
    deep = torch.cat([deep[..., :5], deep[..., 5:]], dim=4)
    deep = torch.cat([deep, deep[:, :, :3]], dim=2)[:, 2:6, 1:13].transpose(2, 3)
    heads = torch.cat([deep.reshape(-1, 4, 4, 144), heads[..., 100:]], dim=3)
    both = torch.stack([heads[:, 0, :, :144], heads[:, 3, :, :144]], dim=2)  # N, 4, 2, 144
    return torch.stack([both[:, :, 0], both[:, :, 1]], dim=1).reshape(-1, 8, 12, 12)


def borders(x: Tensor) -> Tensor:
    x = F.pad(F.relu(x), (2, 1, 0, 3), mode="reflect")
    x = F.pad(x, (0, 2, 1, 0), mode="replicate")
    return F.pad(x, (1, 1, 2, 0), mode="circular")


PATTERNS: dict[str, tuple[Callable[[], Any], int]] = {
    "residual": (Residual, 8),
    "excite": (Excite, 8),
    "pre-activation": (PreActivation, 16),
    "convnext": (ConvNextBlock, 8),
    "shuffle": (Shuffle, 8),
    "up": (Up, 8),
    "slices": (lambda: slices, 9),
    "tokens": (Tokens, 8),
    "windows": (Windows, 8),
    "picked": (Picked, 6),
    "class tokens": (ClassTokens, 8),
    "tokens first": (TokensFirst, 8),
    "positions": (Positions, 8),
    "joins": (lambda: joins, 8),
    "borders": (lambda: borders, 8),
    "pixel shuffle": (lambda: lambda x: F.pixel_shuffle(F.relu(x), 2), 2),
    "pixel unshuffle": (lambda: lambda x: F.pixel_unshuffle(x, 3), 72),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), 8),
    "asymmetric": (lambda: nn.Conv2d(8, 8, (2, 4), padding="same"), 8),
    "prelu": (lambda: nn.PReLU(), 8),
    "padding": (lambda: lambda x: F.pad(F.relu(x), (1, 2, 0, 3)), 8),
    "zero channels": (lambda: lambda x: F.pad(F.relu(x)[..., ::2, ::2], (0, 0, 0, 0, 3, 4)), 15),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), 8),
    "dilated pool": (lambda: lambda x: F.max_pool2d(x, 2, 1, 1, 2), 8),
    "avg pool": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), 8),
    "avg pool inside": (lambda: nn.AvgPool2d((3, 2), (1, 2), 1, count_include_pad=False), 8),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((5, 3)), 8),
    "mean of last axes": (lambda: lambda x: x.mean((2, 3), keepdim=True), 8),
    "nearest": (lambda: lambda x: F.interpolate(x, scale_factor=2), 8),
    "nearest size": (lambda: lambda x: F.interpolate(x, size=(7, 17)), 8),
    "bilinear": (lambda: lambda x: F.interpolate(x, size=(19, 8), mode="bilinear"), 8),
    "bilinear corners": (
        lambda: lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True),
        8,
    ),
    "constants": (lambda: lambda x: (2.0 - x * 0.5 + 0.25) / 3.0, 8),
    "two of a kind": (lambda: lambda x: x * F.relu(x) - torch.tanh(x), 8),
    "pixel order": (lambda: lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).view_as(x), 8),
    **{
        f"function {function.__name__}": (lambda function=function: function, 8)
        for function in (F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.leaky_relu, F.elu, F.mish)
    },
}


def smooth(batch: int, seed: int, size: int = 12) -> Tensor:
    """Images between noise and blobs."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, size, size, generator=generator)
    blobs = torch.randn(batch, 3, 3, 3, generator=generator)
    return noise + F.interpolate(blobs, size=size, mode="bilinear")


@functools.cache
def small_engine() -> tuple[nn.Module, Engine]:
    """A converted small network and its engine."""
    native = native_of(tiny(), torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return native, ada.compile(native, torch.zeros(1, 3, 8, 8), policy="native", strict=True)
