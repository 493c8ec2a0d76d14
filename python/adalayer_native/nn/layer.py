"""What all drop-in layers share: packed weights, the grid of their input, refusals.

The modules hold the canonical packed weights as buffers, so ``state_dict``, ``deepcopy`` and
safetensors carry the same device-neutral bytes that the ``.safetensors`` model file has:

======================  =========  ==============================================================
``weight_packed``       uint8      header of 64 bytes, then bit-planes (or mask + the rest)
``weight_scale``        float32    one step per output channel, or per group of input channels of
                                   one (``[out, groups]``), batch norm folded in
``bias``                float32    ``[out]``, batch norm folded in
``input_qparams``       float32    (scale, zero point, bits) of the u8 input grid
======================  =========  ==============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adalayer_native import _C, ops
from adalayer_native._deprecated import renamed_arguments
from adalayer_native.errors import FileFormatError, InputError, UnsupportedModelError
from adalayer_native.padding import window_of
from adalayer_native.plan import GROUP_SIZES
from adalayer_native.rounding import (
    SMALLEST_STEP,
    activation_grid,
    conv_form,
    group_size_of,
    quantize_weight,
)

__all__ = [
    "Activation",
    "NativeLayer",
    "QuantizedInput",
    "checked_qparams",
    "clamp_range",
    "refuse_backward",
]

_Layer = TypeVar("_Layer", bound="NativeLayer")
Activation = str | tuple[float | None, float | None] | None


def clamp_range(activation: Activation) -> tuple[float | None, float | None]:
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


def checked_qparams(scale: float, zero_point: int, bits: int) -> Tensor:
    if not 2 <= bits <= 8:
        raise ValueError(f"activation bits must be 2 to 8, got {bits}")
    # As the engine has it: kernels multiply by its inverse.
    if not SMALLEST_STEP <= scale <= 1.0 / SMALLEST_STEP:
        raise ValueError(
            f"activation scale must be positive and finite, from {SMALLEST_STEP:.3g} to "
            f"{1.0 / SMALLEST_STEP:.3g}, got {scale}"
        )
    if not 0 <= zero_point < 2**bits:
        raise ValueError(f"zero point must be 0 to {2**bits - 1}, got {zero_point}")
    return torch.tensor([scale, zero_point, bits], dtype=torch.float32)


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


def refuse_backward(out: Tensor, x: Tensor, label: Callable[[], str]) -> Tensor:
    """``out``, whose backward is an error that names the layer.

    An export has no backward, and a compiler would have to break its graph at every layer.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return out
    if torch.compiler.is_compiling() or _exporting():
        return out
    return _RefuseBackward.apply(out, x, label())


class QuantizedInput(nn.Module):
    """A u8 input grid kept as a buffer, with its values as Python numbers for the operators."""

    _grid_key = "input_qparams"

    def _set_grid(self, qparams: Tensor) -> None:
        self.register_buffer(self._grid_key, qparams)
        self._read_grid()

    def grid_tensor(self) -> Tensor:
        """Scale, zero point and bits."""
        found: Tensor = getattr(self, self._grid_key)
        return found

    def _read_grid(self) -> None:
        scale, zero_point, bits = self.grid_tensor().tolist()
        self.input_scale, self.input_zero_point, self.input_bits = scale, int(zero_point), int(bits)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + self._grid_key
        if key in state_dict:
            scale, zero_point, bits = state_dict[key].tolist()
            try:
                checked_qparams(scale, int(zero_point), int(bits))
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


def _numbers(grid: QuantizedInput | None) -> tuple[float, int, int] | None:
    """Scale, zero point and bits."""
    if grid is None:
        return None
    return grid.input_scale, grid.input_zero_point, grid.input_bits


class NativeLayer(QuantizedInput):
    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor
    lo: float | None
    hi: float | None
    policy: str = "native"
    has_float_form = True  # whether a policy may run it in float
    # Under another policy (policy.py), what it has found out.
    fastest: Any = None
    # A FakeQuantize elsewhere in the model whose work a layer does on its way out. Written past
    # nn.Module, for it is no child: its tensors belong to the place that the model gave it.
    output_grid: Any = None
    # What _ready() made last.
    _made: ops.Layer | None = None

    @classmethod
    def from_quantized(
        cls: type[_Layer],
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        input_scale: float,
        input_zero_point: int,
        input_bits: int = 8,
        activation: Activation = None,
        **window: Any,
    ) -> _Layer:
        """From integer weights.

        Args:
            weight: int8 ``[O, I]``, or ``[O, I/groups, KH, KW]`` of a convolution (of a transposed
                one, too, and not flipped), within ``bits`` (2 to 8).
            weight_scale: float32 ``[O]``, may be negative; of a linear layer also ``[O, groups]``,
                of 32, 64 or 128 input channels each.
            bias: float32 ``[O]`` or None.
            input_scale, input_zero_point, input_bits: the u8 grid of the input.
            activation: None, "relu", "relu6" or a (lo, hi) clamp, fused into the output.
            window: of a convolution, as torch has them: ``stride``, ``padding`` (of Conv2d also
                (top, left, bottom, right)), ``dilation``, ``groups`` and ``output_padding``.

        Raises:
            TypeError, ValueError: wrong dtype, shape or range.
            UnsupportedModelError: a reduction that could overflow the int32 accumulator.
        """
        qparams = checked_qparams(input_scale, input_zero_point, input_bits)
        return cls(weight, bits, weight_scale, bias, qparams, activation, **window)

    @classmethod
    @renamed_arguments(conv="layer", linear="layer")
    def from_float(
        cls: type[_Layer],
        layer: nn.Module,
        bits: int = 8,
        *,
        input_range: tuple[float, float],
        input_bits: int = 8,
        group_size: int | None = None,
        activation: Activation = None,
    ) -> _Layer:
        """Rounds a float layer (scales of least squared error, one per output channel).

        Args:
            layer: of torch, of the same name.
            input_range: (low, high) of the layer's input, as an observer or calibration gives it.
            group_size: of a linear layer: 32, 64 or 128 input channels share a scale; the last ones
                of an output may be fewer.

        Raises:
            UnsupportedModelError: padding_mode other than zeros, or an overflowing reduction.
            ValueError: NaN or infinity in the weights.
        """
        mode = getattr(layer, "padding_mode", "zeros")
        if mode != "zeros":
            raise UnsupportedModelError(
                f"{cls.__name__}: padding_mode must be 'zeros', got {mode!r}"
            )
        if group_size is not None and (
            group_size not in GROUP_SIZES or not isinstance(layer, nn.Linear)
        ):
            raise ValueError(
                f"{cls.__name__}: group_size must be one of {GROUP_SIZES}, of a linear layer, or "
                f"None, got {group_size}"
            )
        weight: Any = layer.weight
        form = conv_form(layer, weight.detach().float())
        weight, scale = quantize_weight(form, bits, group_size=group_size)
        input_scale, zero_point = activation_grid(*input_range, input_bits, "the input")
        return cls.from_quantized(
            weight,
            bits,
            scale,
            layer.bias,  # type: ignore[arg-type]
            input_scale=input_scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            activation=activation,
            **window_of(layer),
        )

    def operator(self) -> tuple[str, dict[str, Any]]:
        """The operator that the layer is, and its arguments by name, but for the input."""
        raise AssertionError("each layer type says its own operator")

    def _channels(self) -> int:
        """Of the input."""
        raise AssertionError("each layer type says its own channels")

    def _ready(self) -> ops.Layer:
        """The layer as it is now, for tensors on a CPU that nobody traces (ops.plain_eager)."""
        made, held, grid = self._made, self._buffers, self.output_grid
        if made is not None:
            packed, scale, bias = held["weight_packed"], held["weight_scale"], held["bias"]
            if made.holds(packed, scale, bias) and made.geometry.grid == _numbers(grid):  # type: ignore[arg-type]
                return made
        operator, given = self.operator()
        tensors = given["weight_packed"], given["weight_scale"], given["bias"]
        outs = tensors[1].shape[0]
        geometry = ops.LayerGeometry.of(operator, self._channels(), outs, given)
        made = ops.Layer(geometry, *tensors)
        self.__dict__["_made"] = made
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_made", None)  # whatever has changed: it is made anew
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop("_made", None)  # it would keep the memory that tensors leave
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own: it holds addresses.
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

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
        if scale.dim() == 2 and weight.dim() == 2 and len(scale) == out_channels:
            group_size_of(weight.shape[1], scale.shape[1])
            if scale.shape[1] == 1:
                scale = scale.flatten()
            scales = scale.shape
        else:
            scales = torch.Size([out_channels])
        shapes = {"weight_scale": scales, "bias": torch.Size([out_channels])}
        for name, value in (("weight_scale", scale), ("bias", offset)):
            if value.shape != shapes[name]:
                raise ValueError(
                    f"{name} must have shape {list(shapes[name])}, got {list(value.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        try:
            _C.check_accumulator(weight[0].numel(), bits)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from None
        self.lo, self.hi = clamp_range(activation)
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
        held = self._buffers["weight_packed"]
        assert held is not None
        if x.device != held.device:
            raise InputError(
                f"{self._label()}: the layer is on {held.device}, but its input is on {x.device}"
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

    def _may_choose(self, x: Tensor) -> bool:
        """Whether the policy is asked: for what nobody traces, and torch computes in float32."""
        return (
            self.fastest is not None
            and x.is_cpu
            and x.dtype == torch.float32
            and ops.plain_eager(x)
        )

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        return refuse_backward(out, x, self._label)

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
        return text if self.policy == "native" else f"{text}, policy={self.policy}"
