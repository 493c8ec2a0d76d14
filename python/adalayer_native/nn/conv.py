"""Conv2d and ConvTranspose2d over the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adalayer_native import ops
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.nn.fake_quantize import FakeQuantize
from adalayer_native.nn.layer import Activation, NativeLayer, checked_qparams
from adalayer_native.padding import four_paddings
from adalayer_native.rounding import activation_grid, conv_form, quantize_weight

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


class _Window(NamedTuple):
    """How a kernel goes over an image."""

    stride: _Pair
    padding: tuple[int, ...]
    dilation: _Pair
    groups: int


class _Convolution(NativeLayer):
    output_grid: FakeQuantize | None

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        window: _Window,
        activation: Activation,
    ) -> None:
        super().__init__()
        groups = window.groups
        if weight.dim() != 4:
            raise ValueError(f"weight must be [O, I/groups, KH, KW], got {list(weight.shape)}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"{weight.shape[0]} output channels do not divide in {groups} groups")
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.stride, self.padding, self.dilation, self.groups = window
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)

    def _channels(self) -> int:
        return self.in_channels


class Conv2d(_Convolution):
    """2-d convolution with packed b-bit weights on the u8 grid of its input.

    ``y = clamp(fma(acc, input_scale * weight_scale[o], bias[o]))`` with the exact int32
    ``acc = Σ w·(q − zero_point)``; padding is the zero point, that is 0.0. Float ``[N, C, H, W]``
    in (float32, bfloat16 or half; contiguous or channels_last), the same type and format out.
    A NaN in the input becomes the grid's lowest level; infinities saturate.

    Build one with :meth:`from_quantized` or :meth:`from_float`.
    """

    @classmethod
    def from_quantized(
        cls,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        input_scale: float,
        input_zero_point: int,
        input_bits: int = 8,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: Activation = None,
    ) -> Conv2d:
        """From integer weights.

        Args:
            weight: int8 ``[O, I/groups, KH, KW]`` within ``bits`` (2 to 8).
            weight_scale: float32 ``[O]``, may be negative. bias: float32 ``[O]`` or None.
            input_scale, input_zero_point, input_bits: the u8 grid of the input.
            padding: int, (h, w) or (top, left, bottom, right).
            activation: None, "relu", "relu6" or a (lo, hi) clamp, fused into the output.

        Raises:
            TypeError, ValueError: wrong dtype, shape or range.
            UnsupportedModelError: a reduction that could overflow the int32 accumulator.
        """
        return cls(
            weight,
            bits,
            weight_scale,
            bias,
            checked_qparams(input_scale, input_zero_point, input_bits),
            _Window(
                _pair(stride, "stride"), _padding4(padding), _pair(dilation, "dilation"), groups
            ),
            activation,
        )

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        bits: int = 8,
        *,
        input_range: tuple[float, float],
        input_bits: int = 8,
        activation: Activation = None,
    ) -> Conv2d:
        """Rounds a float convolution (per-channel scales of least squared error).

        Args:
            input_range: (low, high) of the layer's input, as an observer or calibration gives it.

        Raises:
            UnsupportedModelError: padding_mode other than zeros, or an overflowing reduction.
            ValueError: NaN or infinity in the weights.
        """
        if conv.padding_mode != "zeros":
            raise UnsupportedModelError(
                f"Conv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}"
            )
        weight, scale = quantize_weight(conv.weight.detach().float(), bits)
        input_scale, zero_point = activation_grid(*input_range, input_bits, "the input")
        return cls.from_quantized(
            weight,
            bits,
            scale,
            conv.bias,
            input_scale=input_scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            stride=conv.stride,
            padding=four_paddings(conv),
            dilation=conv.dilation,
            groups=conv.groups,
            activation=activation,
        )

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

    def _size_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if any(self.padding):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text


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

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        window: _Window,
        output_padding: tuple[int, int],
        activation: Activation,
    ) -> None:
        super().__init__(weight, bits, weight_scale, bias, qparams, window, activation)
        stride, padding, dilation = window.stride, window.padding, window.dilation
        if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
            raise ValueError(
                "stride and dilation must be at least 1 and padding at least 0, "
                f"got {stride}, {dilation} and {padding}"
            )
        for extra, step, spread in zip(output_padding, stride, dilation, strict=True):
            if not 0 <= extra < max(step, spread):
                raise ValueError(
                    f"output_padding must be at least 0 and smaller than stride {stride} or "
                    f"dilation {dilation}, got {output_padding}"
                )
        self.output_padding = output_padding

    @classmethod
    def from_quantized(
        cls,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        input_scale: float,
        input_zero_point: int,
        input_bits: int = 8,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: Activation = None,
    ) -> ConvTranspose2d:
        """From int8 weights ``[O, I/groups, KH, KW]``, not flipped.

        Padding is an int or (h, w); other arguments and errors as :meth:`Conv2d.from_quantized`.
        """
        return cls(
            weight,
            bits,
            weight_scale,
            bias,
            checked_qparams(input_scale, input_zero_point, input_bits),
            _Window(
                _pair(stride, "stride"),
                _pair(padding, "padding"),
                _pair(dilation, "dilation"),
                groups,
            ),
            _pair(output_padding, "output_padding"),
            activation,
        )

    @classmethod
    def from_float(
        cls,
        conv: nn.ConvTranspose2d,
        bits: int = 8,
        *,
        input_range: tuple[float, float],
        input_bits: int = 8,
        activation: Activation = None,
    ) -> ConvTranspose2d:
        """Rounds a float layer; arguments and errors as :meth:`Conv2d.from_float`."""
        weight, scale = quantize_weight(conv_form(conv, conv.weight.detach().float()), bits)
        input_scale, zero_point = activation_grid(*input_range, input_bits, "the input")
        return cls.from_quantized(
            weight,
            bits,
            scale,
            conv.bias,
            input_scale=input_scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            stride=conv.stride,
            padding=conv.padding,  # type: ignore[arg-type]
            output_padding=conv.output_padding,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=activation,
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

    def _size_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name, value, default in (
            ("padding", self.padding, (0, 0)),
            ("output_padding", self.output_padding, (0, 0)),
            ("dilation", self.dilation, (1, 1)),
            ("groups", self.groups, 1),
        ):
            if value != default:
                text += f", {name}={value}"
        return text
