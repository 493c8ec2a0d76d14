"""Single layers as benchmark candidates: the u8 kernel of an engine beside torch's float layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adalayer_native import ops
from adalayer_native.rounding import quantize_weight


@dataclass(frozen=True)
class Layer:
    """A convolution: channels, kernel, stride, size of its square input, groups, dilation."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    groups: int = 1
    dilation: int = 1

    @property
    def name(self) -> str:
        """As in "3x3/2 64-128 @56"."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        text = f"{self.kernel}x{self.kernel}{stride} {self.inputs}-{self.outputs} @{self.size}"
        if self.groups == self.inputs > 1:
            text += " depthwise"
        elif self.groups > 1:
            text += f" groups {self.groups}"
        return text + (f" dilation {self.dilation}" if self.dilation > 1 else "")

    @property
    def padding(self) -> int:
        """Keeps the size at stride 1."""
        return self.dilation * (self.kernel // 2)

    @property
    def out_size(self) -> int:
        """Side of the output."""
        reach = self.dilation * (self.kernel - 1) + 1
        return (self.size + 2 * self.padding - reach) // self.stride + 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def operations(self) -> int:
        """Multiplications and additions for one image."""
        return 2 * self.weights * self.out_size**2

    def bytes(self, bits: int) -> int:
        """Packed weights, u8 input and u8 output of one image: what has to be moved at least."""
        moved = self.inputs * self.size**2 + self.outputs * self.out_size**2
        return math.ceil(self.weights * bits / 8) + moved

    def torch_layer(self) -> torch.nn.Conv2d:
        """Float, channels_last, random weights."""
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        return layer.requires_grad_(False)


INPUT_SCALE, ZERO_POINT = 8.0 / 255.0, 128


class Candidates:
    """The layer at several widths and in torch, over the same input; checks the results."""

    def __init__(self, layer: Layer, widths: tuple[int, ...]) -> None:
        self.layer = layer
        generator = torch.Generator().manual_seed(1)
        shape = (1, layer.inputs, layer.size, layer.size)
        levels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.levels = levels.contiguous(memory_format=torch.channels_last)
        x = (levels.float() - ZERO_POINT) * INPUT_SCALE
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.module = layer.torch_layer()
        self.runs: dict[str, Callable[[], Tensor]] = {}
        for bits in widths:
            self.runs[f"ours {bits} bits"] = self._native(bits)
        self.runs["torch fp32"] = self._torch

    def _torch(self) -> Tensor:
        with torch.inference_mode():
            return self.module(self.x)

    def _native(self, bits: int) -> Callable[[], Tensor]:
        layer = self.layer
        weight, step = quantize_weight(self.module.weight, bits)
        want = torch.nn.functional.conv2d(
            self.x,
            weight.float() * step.reshape(-1, 1, 1, 1),
            self.module.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        output_scale = float(want.abs().max()) / 127 or 1.0
        assert self.module.bias is not None
        packed = ops.pack_weight(weight, bits)
        scale = (step * INPUT_SCALE / output_scale).contiguous()
        bias = (self.module.bias / output_scale).contiguous()
        geometry: tuple[Any, ...] = (
            (layer.kernel, layer.kernel),
            (layer.stride, layer.stride),
            (layer.padding,) * 4,
            (layer.dilation, layer.dilation),
            layer.groups,
        )
        x = self.levels

        def run() -> Tensor:
            return ops.conv2d_u8(x, packed, scale, bias, ZERO_POINT, 128, *geometry)

        got = (run().float() - 128) * output_scale
        # Half a step of rounding, and a little for the float sums of the other side.
        worst = float((got - want).abs().max())
        assert worst < 0.52 * output_scale, f"{layer.name}, {bits} bits: off by {worst}"
        return run


def reader(megabytes: int) -> Callable[[], int]:
    """Reads that many megabytes, so that they take the place of other data in the caches."""
    memory = np.ones(megabytes << 17, dtype=np.uint64)
    return lambda: int(memory.sum())


RESNET18 = [
    Layer(3, 64, 7, 2, 224),
    Layer(64, 64, 3, 1, 56),
    Layer(64, 128, 3, 2, 56),
    Layer(64, 128, 1, 2, 56),
    Layer(128, 128, 3, 1, 28),
    Layer(128, 256, 3, 2, 28),
    Layer(128, 256, 1, 2, 28),
    Layer(256, 256, 3, 1, 14),
    Layer(256, 512, 3, 2, 14),
    Layer(256, 512, 1, 2, 14),
    Layer(512, 512, 3, 1, 7),
    Layer(512, 1000, 1, 1, 1),
]
RESNET50 = [
    Layer(64, 64, 1, 1, 56),
    Layer(64, 256, 1, 1, 56),
    Layer(256, 64, 1, 1, 56),
    Layer(256, 128, 1, 1, 56),
    Layer(128, 128, 3, 2, 56),
    Layer(128, 512, 1, 1, 28),
    Layer(256, 512, 1, 2, 56),
    Layer(512, 128, 1, 1, 28),
    Layer(512, 256, 1, 1, 28),
    Layer(256, 256, 3, 2, 28),
    Layer(256, 1024, 1, 1, 14),
    Layer(512, 1024, 1, 2, 28),
    Layer(1024, 256, 1, 1, 14),
    Layer(1024, 512, 1, 1, 14),
    Layer(512, 512, 3, 2, 14),
    Layer(512, 2048, 1, 1, 7),
    Layer(1024, 2048, 1, 2, 14),
    Layer(2048, 512, 1, 1, 7),
    Layer(2048, 1000, 1, 1, 1),
]
MOBILENETV2 = [
    Layer(3, 32, 3, 2, 224),
    Layer(32, 32, 3, 1, 112, 32),
    Layer(32, 16, 1, 1, 112),
    Layer(16, 96, 1, 1, 112),
    Layer(96, 96, 3, 2, 112, 96),
    Layer(96, 24, 1, 1, 56),
    Layer(144, 144, 3, 1, 56, 144),
    Layer(144, 32, 1, 1, 28),
    Layer(192, 192, 3, 1, 28, 192),
    Layer(384, 384, 3, 1, 14, 384),
    Layer(576, 160, 1, 1, 7),
    Layer(960, 960, 3, 1, 7, 960),
    Layer(160, 960, 1, 1, 7),
    Layer(320, 1280, 1, 1, 7),
]
UNUSUAL = [
    Layer(128, 128, 3, 1, 28, 2),
    Layer(128, 128, 3, 1, 28, 8),
    Layer(128, 128, 3, 1, 28, 32),
    Layer(256, 256, 3, 1, 14, 32),
    Layer(128, 128, 3, 1, 28, 1, 2),
    Layer(256, 256, 3, 1, 14, 1, 4),
    Layer(96, 96, 3, 1, 56, 96),
    Layer(240, 240, 5, 1, 28, 240),
    Layer(384, 384, 3, 1, 14, 384, 2),
]
