"""Conv2d and ConvTranspose2d over the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalayer_native import ops
from adalayer_native.nn.fake_quantize import FakeQuantize
from adalayer_native.nn.layer import Activation, NativeLayer

__all__ = ["Conv2d", "ConvTranspose2d"]

_Pair = tuple[int, int]


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or a pair, got {value!r}")
    return int(value[0]), int(value[1])


def _padding4(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) from an int, (h, w) or four values."""
    if not isinstance(value, int) and len(value) == 4:
        top, left, bottom, right = value
        return int(top), int(left), int(bottom), int(right)
    h, w = _pair(value, "padding")
    return h, w, h, w


class _Convolution(NativeLayer):
    output_grid: FakeQuantize | None

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        activation: Activation = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if weight.dim() != 4:
            raise ValueError(f"weight must be [O, I/groups, KH, KW], got {list(weight.shape)}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"{weight.shape[0]} output channels do not divide in {groups} groups")
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.stride, self.dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
        self.padding, self.groups = self._paddings(padding), groups
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)

    def _paddings(self, padding: int | Sequence[int]) -> tuple[int, ...]:
        """As the layer's operator has them."""
        return _pair(padding, "padding")

    def _channels(self) -> int:
        return self.in_channels

    def _size_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        usual = {"padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
        for name, value in usual.items():
            given = getattr(self, name, value)
            if any(n != value for n in (given if isinstance(given, tuple) else (given,))):
                text += f", {name}={given}"
        return text


class Conv2d(_Convolution):
    """2-d convolution with packed b-bit weights on the u8 grid of its input.

    ``y = clamp(fma(acc, input_scale * weight_scale[o], bias[o]))`` with the exact int32
    ``acc = Σ w·(q − zero_point)``; padding is the zero point, that is 0.0. Float ``[N, C, H, W]``
    in (float32, bfloat16 or half; contiguous or channels_last), the same type and format out.
    A NaN in the input becomes the grid's lowest level; infinities saturate.

    Build one with :meth:`from_quantized` or :meth:`from_float`.
    """

    def _paddings(self, padding: int | Sequence[int]) -> tuple[int, ...]:
        return _padding4(padding)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` convolved, plus ``residual`` of the output's shape before the clamp."""
        self._check(x, self.in_channels, 1, 4)
        if residual is not None and not self._same_shape(x, residual):
            return self._finish(self._broadcast(x, residual), x)
        if self._may_choose(x):
            with torch.no_grad():
                rest = () if residual is None else (residual,)
                out = self.fastest.run(self, self._native, x, *rest)
        else:
            out = self._native(x, residual)
        return self._finish(out, x)

    def _native(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.is_cpu and ops.plain_eager(x):
            return self._ready()(x, residual)
        return ops.conv2d(
            x,
            *(getattr(self, key) for key in _CONV_KEYS),
            residual=residual,
            **_finish_of(self),
        )

    def operator(self) -> tuple[str, dict[str, Any]]:
        return "conv2d", {key: getattr(self, key) for key in _CONV_KEYS} | _finish_of(self)

    def _same_shape(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the output's shape."""
        return residual.shape == ops.conv_out_shape(
            x.shape, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation
        )

    def _broadcast(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same function for an addend that torch would broadcast; the kernels take none."""
        out = ops.conv2d(x, *(getattr(self, key) for key in _CONV_KEYS)) + residual
        if self.lo is not None or self.hi is not None:
            out = out.clamp(self.lo, self.hi)
        return out if self.output_grid is None else self.output_grid(out)


_CONV_KEYS = (
    "weight_packed", "weight_scale", "bias", "input_scale", "input_zero_point", "input_bits",
    "kernel_size", "stride", "padding", "dilation", "groups",
)  # fmt: skip
_TRANSPOSED_KEYS = (*_CONV_KEYS[:9], "output_padding", *_CONV_KEYS[9:])


def _finish_of(layer: Conv2d | ConvTranspose2d) -> dict[str, Any]:
    """What an operator does behind its sums, as arguments."""
    grid = layer.output_grid
    return {
        "lo": layer.lo,
        "hi": layer.hi,
        "output_scale": 0.0 if grid is None else grid.input_scale,
        "output_zero_point": 0 if grid is None else grid.input_zero_point,
        "output_bits": 0 if grid is None else grid.input_bits,
    }


class ConvTranspose2d(_Convolution):
    """Transposed 2-d convolution with packed b-bit weights on the u8 grid of its input.

    Arithmetic, dtypes and memory formats as :class:`Conv2d`. The packed weight has the form of a
    convolution's, ``[O, I/groups, KH, KW]``: torch's ``[I, O/groups, KH, KW]`` transposed within
    each group and not flipped, so that there is one scale per output channel.
    """

    def __init__(self, *given: Any, output_padding: int | Sequence[int] = 0, **window: Any) -> None:
        super().__init__(*given, **window)
        stride, padding, dilation = self.stride, self.padding, self.dilation
        if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
            raise ValueError(
                "stride and dilation must be at least 1 and padding at least 0, "
                f"got {stride}, {dilation} and {padding}"
            )
        self.output_padding = _pair(output_padding, "output_padding")
        for extra, step, spread in zip(self.output_padding, stride, dilation, strict=True):
            if not 0 <= extra < max(step, spread):
                raise ValueError(
                    f"output_padding must be at least 0 and smaller than stride {stride} or "
                    f"dilation {dilation}, got {self.output_padding}"
                )

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``x`` convolved; ``output_size`` (h, w) or a whole shape overrules output_padding."""
        self._check(x, self.in_channels, 1, 4)
        if output_size is None and self._may_choose(x):
            with torch.no_grad():
                out = self.fastest.run(self, self._native, x)
        else:
            out = self._native(x, output_size)
        return self._finish(out, x)

    def operator(self) -> tuple[str, dict[str, Any]]:
        given = {key: getattr(self, key) for key in _TRANSPOSED_KEYS}
        return "conv_transpose2d", given | _finish_of(self)

    def _native(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is None and x.is_cpu and ops.plain_eager(x):
            return self._ready()(x)
        given = self.operator()[1]
        if output_size is not None:
            given["output_padding"] = self._extra(x, output_size)
        return ops.conv_transpose2d(x, *given.values())

    def _extra(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, int]:
        """The output padding that gives the wanted size."""
        size = ops.transposed_out_size(
            x.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation
        )
        extra = [wanted - least for wanted, least in zip(output_size[-2:], size, strict=True)]
        if any(not 0 <= value < step for value, step in zip(extra, self.stride, strict=True)):
            raise ValueError(
                f"{self._label()}: an input of {list(x.shape)} has no output of size "
                f"{list(output_size)}"
            )
        return extra[0], extra[1]
