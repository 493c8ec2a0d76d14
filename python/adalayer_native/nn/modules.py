"""Conv2d, ConvTranspose2d, Linear and FakeQuantize over the native kernels.

The modules hold the canonical packed weights as buffers, so ``state_dict``, ``deepcopy`` and
safetensors carry the same device-neutral bytes that the ``.safetensors`` model file has:

======================  =========  =====================================================
``weight_packed``       uint8      header of 64 bytes, then bit-planes (or mask + the rest)
``weight_scale``        float32    one step per output channel, batch norm folded in
``bias``                float32    ``[out]``, batch norm folded in
``input_qparams``       float32    (scale, zero point, bits) of the u8 input grid
======================  =========  =====================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native import _C, ops
from adalayer_native.errors import FileFormatError, InputError, UnsupportedModelError
from adalayer_native.rounding import conv_form, quantize_weight

__all__ = ["Conv2d", "ConvTranspose2d", "FakeQuantize", "Linear"]

Activation = str | tuple[float | None, float | None] | None


_Pair = tuple[int, int]
_ConvArguments = tuple[
    Tensor, Tensor, Tensor, float, int, int, _Pair, _Pair, tuple[int, int, int, int], _Pair, int
]


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


def _clamp_range(activation: Activation) -> tuple[float | None, float | None]:
    if activation is None:
        return None, None
    if activation == "relu":
        return 0.0, None
    if activation == "relu6":
        return 0.0, 6.0
    if isinstance(activation, str):
        raise ValueError(
            f"activation must be None, 'relu', 'relu6' or (lo, hi), got {activation!r}"
        )
    lo, hi = activation
    if lo is not None and hi is not None and not lo <= hi:
        raise ValueError(f"activation range must have lo <= hi, got {activation!r}")
    return lo, hi


def _qparams(scale: float, zero_point: int, bits: int) -> Tensor:
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits must be 2 to 8, got {bits}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"activation scale must be positive and finite, got {scale}")
    if not 0 <= zero_point < 2**bits:
        raise ValueError(f"zero point must be 0 to {2**bits - 1}, got {zero_point}")
    return torch.tensor([scale, zero_point, bits], dtype=torch.float32)


def _grid_of(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of the u8 grid over [low, high], widened to contain zero exactly."""
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"input range must be finite with low <= high, got ({low}, {high})")
    low, high = min(low, 0.0), max(high, 0.0)
    qmax = 2**bits - 1
    scale = float(torch.tensor((high - low) / qmax, dtype=torch.float32)) or 1.0
    return scale, min(max(round(-low / scale), 0), qmax)


class _RefuseBackward(torch.autograd.Function):
    """Identity whose backward explains itself: integer kernels have no gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, name: str) -> Tensor:
        ctx.layer = name
        # Not a view of it: what reads the result may overwrite it.
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"backward through the native layer {ctx.layer} is not possible: it computes in "
            "integers. Train the prepared model (adalayer_native.prepare) and convert it again."
        )


# Newer versions of torch say whether an export is under way; older ones keep the node.
_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def _refuse_backward(out: Tensor, x: Tensor, label: Callable[[], str]) -> Tensor:
    """``out``, whose backward is an error that names the layer; an export has no backward."""
    if torch.is_grad_enabled() and x.requires_grad and not _exporting():
        return _RefuseBackward.apply(out, x, label())
    return out


class _QuantizedInput(nn.Module):
    """A u8 input grid kept as a buffer, with its values as Python numbers for the operators."""

    _grid_key = "input_qparams"

    def _set_grid(self, qparams: Tensor) -> None:
        self.register_buffer(self._grid_key, qparams)
        self._read_grid()

    def _read_grid(self) -> None:
        scale, zero_point, bits = getattr(self, self._grid_key).tolist()
        self.input_scale, self.input_zero_point, self.input_bits = scale, int(zero_point), int(bits)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + self._grid_key
        if key in state_dict:
            scale, zero_point, bits = state_dict[key].tolist()
            try:
                _qparams(scale, int(zero_point), int(bits))
            except ValueError as error:
                raise FileFormatError(f"{key}: {error}") from None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_grid()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half() and .bfloat16() cast floating buffers; scales must stay float32 (law 1).
        kept = {k: v for k, v in self._buffers.items() if v is not None}
        super()._apply(fn, recurse)
        for key, value in kept.items():
            now = self._buffers[key]
            if now is not None and now.dtype != value.dtype:
                self._buffers[key] = value.to(now.device)
        return self


class _NativeLayer(_QuantizedInput):
    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor
    lo: float | None
    hi: float | None

    def _set_weight(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: Activation,
    ) -> None:
        out_channels = weight.shape[0]
        if not 2 <= bits <= 8:
            raise ValueError(f"weight bits must be 2 to 8, got {bits}")
        scale = weight_scale.detach().to(torch.float32).cpu().contiguous().clone()
        offset = torch.zeros(out_channels) if bias is None else bias
        offset = offset.detach().to(torch.float32).cpu().contiguous().clone()
        for name, value in (("weight_scale", scale), ("bias", offset)):
            if value.shape != (out_channels,):
                raise ValueError(
                    f"{name} must have shape [{out_channels}], got {list(value.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        try:
            _C.check_accumulator(weight[0].numel(), bits)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from None
        self.lo, self.hi = _clamp_range(activation)
        self.register_buffer("weight_packed", ops.pack_weight(weight, bits))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", offset)

    @property
    def bits(self) -> int:
        """Bits per weight, from the packed header."""
        return int(ops.packed_info(self.weight_packed)["bits"])

    def weight_int(self) -> Tensor:
        """The integer weights, int8 in the layer's shape."""
        return ops.unpack_weight(self.weight_packed)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + "weight_packed"
        if key in state_dict:
            # Another plan packs to another size: adopt it, once it describes this layer's shape.
            packed = state_dict[key]
            try:
                shape = tuple(ops.packed_info(packed)["shape"])
            except FileFormatError as error:
                raise FileFormatError(f"{key}: {error}") from None
            expected = tuple(ops.packed_info(self.weight_packed)["shape"])
            if shape != expected:
                raise FileFormatError(
                    f"{key}: expected packed weights of shape {expected}, got {shape}"
                )
            if packed.shape != self.weight_packed.shape:
                self.weight_packed = torch.empty_like(packed, device=self.weight_packed.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check(self, x: Tensor, channels: int, axis: int, dims: int | None) -> None:
        if x.device != self.weight_packed.device:
            raise InputError(
                f"{self._label()}: the layer is on {self.weight_packed.device}, but its input is "
                f"on {x.device}"
            )
        if dims is not None and x.dim() != dims:
            raise ValueError(
                f"{self._label()}: expected {dims} dimensions, got shape {list(x.shape)}"
            )
        if x.dim() == 0 or x.shape[axis] != channels:
            raise ValueError(
                f"{self._label()}: expected {channels} channels on axis {axis}, "
                f"got shape {list(x.shape)}"
            )

    def _label(self) -> str:
        return f"{type(self).__name__}({self._size_repr()})"

    def _size_repr(self) -> str:
        raise AssertionError("each layer type says its own size")

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        return _refuse_backward(out, x, self._label)

    def extra_repr(self) -> str:
        info = ops.packed_info(self.weight_packed)
        stored = info["stored"] / math.prod(info["shape"])
        text = (
            f"{self._size_repr()}, bits={info['bits']}, encoding={info['encoding']}"
            f"{f', stored={stored:.1%}' if info['encoding'] != 'dense' else ''}, "
            f"bytes={self.weight_packed.numel()}, input=u{self.input_bits}"
            f"(scale={self.input_scale:.4g}, zero_point={self.input_zero_point})"
        )
        if self.lo is not None or self.hi is not None:
            text += f", clamp=({self.lo}, {self.hi})"
        return text


class Conv2d(_NativeLayer):
    """2-d convolution with packed b-bit weights on the u8 grid of its input.

    ``y = clamp(fma(acc, input_scale * weight_scale[o], bias[o]))`` with the exact int32
    ``acc = Σ w·(q − zero_point)``; padding is the zero point, that is 0.0. Float ``[N, C, H, W]``
    in (float32, bfloat16 or half; contiguous or channels_last), the same type and format out.
    A NaN in the input becomes the grid's lowest level; infinities saturate.

    Build one with :meth:`from_quantized` or :meth:`from_float`.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        if weight.dim() != 4:
            raise ValueError(f"weight must be [O, I/groups, KH, KW], got {list(weight.shape)}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"{weight.shape[0]} output channels do not divide in {groups} groups")
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups = groups
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)
        # A FakeQuantize elsewhere in the model whose work this layer does on its way out. Not a
        # child: its tensors belong to the place that the model gave it.
        self.__dict__["output_grid"] = None

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
            _qparams(input_scale, input_zero_point, input_bits),
            _pair(stride, "stride"),
            _padding4(padding),
            _pair(dilation, "dilation"),
            groups,
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
        input_scale, zero_point = _grid_of(*input_range, input_bits)
        return cls.from_quantized(
            weight,
            bits,
            scale,
            conv.bias,
            input_scale=input_scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            stride=conv.stride,
            padding=_explicit_padding(conv),
            dilation=conv.dilation,
            groups=conv.groups,
            activation=activation,
        )

    output_grid: FakeQuantize | None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` convolved, plus ``residual`` of the output's shape before the clamp."""
        self._check(x, self.in_channels, 1, 4)
        if residual is not None and not self._same_shape(x, residual):
            return self._finish(self._broadcast(x, residual), x)
        grid = self.output_grid
        run = ops.conv2d_direct if x.is_cpu and ops.plain_eager(x) else ops.conv2d
        out = run(
            x,
            *self._arguments(),
            lo=self.lo,
            hi=self.hi,
            residual=residual,
            output_scale=0.0 if grid is None else grid.input_scale,
            output_zero_point=0 if grid is None else grid.input_zero_point,
            output_bits=0 if grid is None else grid.input_bits,
        )
        return self._finish(out, x)

    def _arguments(self) -> _ConvArguments:
        """The operator's arguments from the weights to the groups."""
        return (
            self.weight_packed,
            self.weight_scale,
            self.bias,
            self.input_scale,
            self.input_zero_point,
            self.input_bits,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _same_shape(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the output's shape (written out: this runs on every call)."""
        n, _, h, w = x.shape
        top, left, bottom, right = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        out_h = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        out_w = (w + left + right - dw * (kw - 1) - 1) // sw + 1
        return tuple(residual.shape) == (n, self.out_channels, out_h, out_w)

    def _broadcast(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same function for an addend that torch would broadcast; the kernels take none."""
        out = ops.conv2d(x, *self._arguments()) + residual
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


def _explicit_padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a float convolution; "same" puts the odd pixel last."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        h, w = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return h // 2, w // 2, h - h // 2, w - w // 2
    return _padding4(conv.padding)  # type: ignore[arg-type]


class ConvTranspose2d(_NativeLayer):
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
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        if weight.dim() != 4:
            raise ValueError(f"weight must be [O, I/groups, KH, KW], got {list(weight.shape)}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"{weight.shape[0]} output channels do not divide in {groups} groups")
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
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.output_padding = output_padding
        self.groups = groups
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)
        self.__dict__["output_grid"] = None  # as in Conv2d

    output_grid: FakeQuantize | None

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
            _qparams(input_scale, input_zero_point, input_bits),
            _pair(stride, "stride"),
            _pair(padding, "padding"),
            _pair(output_padding, "output_padding"),
            _pair(dilation, "dilation"),
            groups,
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
        input_scale, zero_point = _grid_of(*input_range, input_bits)
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
        grid = self.output_grid
        out = ops.conv_transpose2d(
            x,
            self.weight_packed,
            self.weight_scale,
            self.bias,
            self.input_scale,
            self.input_zero_point,
            self.input_bits,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding if output_size is None else self._extra(x, output_size),
            self.dilation,
            self.groups,
            self.lo,
            self.hi,
            0.0 if grid is None else grid.input_scale,
            0 if grid is None else grid.input_zero_point,
            0 if grid is None else grid.input_bits,
        )
        return self._finish(out, x)

    def _extra(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, int]:
        """The output padding that gives the wanted size."""
        extra = [
            wanted - ((size - 1) * s - 2 * p + d * (k - 1) + 1)
            for wanted, size, s, p, d, k in zip(
                output_size[-2:],
                x.shape[-2:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
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


class Linear(_NativeLayer):
    """Linear layer with packed b-bit weights on the u8 grid of its input.

    Float ``[..., in_features]`` in (float32, bfloat16 or half), ``[..., out_features]`` of the same
    type out. Arithmetic and NaN behaviour as :class:`Conv2d`.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        activation: Activation,
    ) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight must be [O, I], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)

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
        activation: Activation = None,
    ) -> Linear:
        """From int8 weights ``[O, I]``; arguments and errors as :meth:`Conv2d.from_quantized`."""
        qparams = _qparams(input_scale, input_zero_point, input_bits)
        return cls(weight, bits, weight_scale, bias, qparams, activation)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        *,
        input_range: tuple[float, float],
        input_bits: int = 8,
        activation: Activation = None,
    ) -> Linear:
        """Rounds a float linear layer; arguments and errors as :meth:`Conv2d.from_float`."""
        weight, scale = quantize_weight(linear.weight.detach().float(), bits)
        input_scale, zero_point = _grid_of(*input_range, input_bits)
        return cls.from_quantized(
            weight,
            bits,
            scale,
            linear.bias,
            input_scale=input_scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            activation=activation,
        )

    def weight_int(self) -> Tensor:
        return super().weight_int().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.in_features, -1, None)
        out = ops.linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.bias,
            self.input_scale,
            self.input_zero_point,
            self.input_bits,
            self.lo,
            self.hi,
        )
        return self._finish(out, x)

    def _size_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class FakeQuantize(_QuantizedInput):
    """Puts a float tensor of any shape on a u8 grid: ``(q − zero_point) · scale``, float32 out.

    Stands where several readers share a tensor that the engine stores as u8, a residual input
    for one.
    """

    _grid_key = "qparams"

    def __init__(self, scale: float, zero_point: int, bits: int = 8) -> None:
        super().__init__()
        self._set_grid(_qparams(scale, zero_point, bits))

    def forward(self, x: Tensor) -> Tensor:
        out = ops.fake_quantize(x, self.input_scale, self.input_zero_point, self.input_bits)
        return _refuse_backward(out, x, lambda: "FakeQuantize")

    def extra_repr(self) -> str:
        return (
            f"u{self.input_bits}, scale={self.input_scale:.4g}, zero_point={self.input_zero_point}"
        )
