"""Modules that simulate integer layers in float: activations, convolutions and linear layers.

Outside training and in float32 their values are those of the native kernels up to the rounding of
float32 sums; inside ``simulate(exact=True)`` they are the same bits (see ``exact.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.padding import PaddedConv2d, window_of
from adalayer_native.quantization.fractional import FractionalInput, FractionalWeight
from adalayer_native.quantization.lsq import StepSize, learned_activation, learned_weight
from adalayer_native.rounding import (
    activation_grid,
    conv_form,
    group_count,
    layer_form,
    per_channel,
    quantize_weight,
    round_weight,
    weight_range,
)

if TYPE_CHECKING:
    from adalayer_native.quantization.observers import Observer


class _QuantizeWeight(torch.autograd.Function):
    """``mask * clamp(rne(w/s)) * s`` with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, mask: Tensor | None, bits: int) -> Tensor:
        low, high = weight_range(bits)
        levels = torch.div(weight, scale)
        if weight.requires_grad:
            # -1 / 0 / +1: below, inside and above the range.
            above = (levels > high + 0.5).to(torch.int8)
            ctx.save_for_backward(above.sub_((levels < low - 0.5).to(torch.int8)), mask)
        out = levels.round_().clamp_(low, high)
        if mask is not None:
            out.mul_(mask)
        return out.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        side, mask = ctx.saved_tensors
        # A clipped weight only moves when the step (against the gradient) leads back into the
        # range; were it frozen altogether, it would stay clipped for the rest of the training.
        out = grad * ((side * grad) >= 0)
        if mask is not None:
            out = out * mask
        return out, None, None, None


class _QuantizeActivation(torch.autograd.Function):
    """Round to the grid; the gradient passes inside the range and stops outside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, inverse: float, low: float, high: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Half a step beyond the outer levels still rounds to them without an error of its own.
        ctx.range = (low - 0.5) * scale, (high + 0.5) * scale
        return torch.mul(x, inverse).clamp_(low, high).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        # One vectorised pass; comparing and multiplying by hand takes three and a mask.
        passed = torch.ops.aten.hardtanh_backward(grad, x, *ctx.range)
        return passed, None, None, None, None


class ActivationQuantizer(nn.Module):
    """Fake quantization of one stored tensor, u8 with a zero point.

    ``q = rne(clamp(x * inv, -z, qmax - z)) + z`` with ``qmax = 2^bits - 1`` and the float32
    ``inv = 1 / scale``; the output is ``(q - z) * scale``. Zero is always on the grid exactly.
    Before calibration values pass through unchanged.

    Attributes:
        qparams: float32 ``[3]`` buffer ``(scale, zero_point, bits)``; scale 0 = not calibrated.
        observer: collects the range while calibration runs, else ``None``.
        step: the scale as a parameter while it is being learned, else ``None``.
        fractional: stands in while the bits are being learned, else ``None``.
    """

    qparams: Tensor
    step: StepSize | None
    fractional: FractionalInput | None

    def __init__(self, bits: int = 8, *, name: str = "") -> None:
        super().__init__()
        weight_range(bits)  # the same limits hold for activations
        self.bits = bits
        self.name = name
        self.register_buffer("qparams", torch.tensor([0.0, 0.0, float(bits)]))
        self.observer: Observer | None = None
        self.step = None
        self.fractional = None

    @property
    def calibrated(self) -> bool:
        """Whether a range has been set."""
        return float(self.qparams[0]) > 0.0

    @property
    def scale(self) -> float:
        """Width of one level, a float32 value."""
        return float(self.qparams[0])

    @property
    def zero_point(self) -> int:
        """The level that means 0.0."""
        return int(self.qparams[1])

    def set_range(self, low: float, high: float) -> None:
        """Choose scale and zero point for values from ``low`` to ``high`` (0 is included).

        Raises:
            CalibrationError: a bound is NaN or infinite.
        """
        scale, zero_point = activation_grid(low, high, self.bits, self.name)
        self.qparams.copy_(torch.tensor([scale, float(zero_point), float(self.bits)]))

    def constants(self) -> tuple[float, float, float, float]:
        """``(scale, inv, low, high)`` as used by the kernels: float32 values, integer bounds."""
        scale, zero_point, _ = self.qparams.tolist()
        inverse = float(torch.reciprocal(self.qparams[0]))
        return scale, inverse, -zero_point, (1 << self.bits) - 1 - zero_point

    def levels(self, x: Tensor) -> Tensor:
        """``q - z``: whole numbers in float32, the operand of the native accumulation."""
        _, inverse, low, high = self.constants()
        # A NaN becomes the lowest level, as the kernels have it.
        return torch.mul(x, inverse).nan_to_num_(low, high, low).clamp_(low, high).round_()

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
            return x
        if not self.calibrated:
            return x
        if self.fractional is not None and self.fractional.active:
            between: Tensor = self.fractional(x)
            return between
        if torch.is_grad_enabled() and self.step is not None:
            return learned_activation(x, self.step, self.constants())
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _QuantizeActivation.apply(x, *self.constants())
            return out
        return self.levels(x).mul_(self.scale)

    def extra_repr(self) -> str:
        if not self.calibrated:
            return f"bits={self.bits}, not calibrated"
        return f"bits={self.bits}, scale={self.scale:.6g}, zero_point={self.zero_point}"


class _Exact(Protocol):
    """The layer in integers (``exact.ExactLayer``)."""

    def run(self, x: Tensor, output_size: list[int] | None = None) -> Tensor: ...


Layer = TypeVar("Layer", bound="_QuantLayer")


def _shape(layer: nn.Module) -> dict[str, Any]:
    """The arguments with which a layer like it is made, but for parameters."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    names = "in_channels", "out_channels", "kernel_size"
    found = {name: getattr(layer, name) for name in names} | window_of(layer)
    if isinstance(layer, nn.Conv2d):
        found |= {"sides": found["padding"], "padding": layer.padding}
    return found


class _QuantLayer:
    """What the layers share: bits, mask, scales. Mixed into the float layer's class."""

    weight: Tensor
    weight_scale: Tensor
    mask: Tensor | None
    bits: int
    group_size: int | None
    name: str
    exact: _Exact | None
    step: StepSize | None
    fractional: FractionalWeight | None
    dense_gradient: bool

    @classmethod
    def from_layer(
        cls: type[Layer],
        layer: Any,
        bits: int,
        mask: Tensor | None = None,
        *,
        name: str = "",
        group_size: int | None = None,
    ) -> Layer:
        """Take over parameters and geometry of a float layer; scales are not yet chosen."""
        made: Any = cls
        new = made(**_shape(layer), bias=layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        new._setup(bits, mask, name, group_size)
        new.train(layer.training)
        return new

    def _setup(self, bits: int, mask: Tensor | None, name: str, group_size: int | None) -> None:
        assert isinstance(self, nn.Module)
        weight_range(bits)
        if mask is not None and mask.shape != self.weight.shape:
            raise PlanError(
                f"layer {name!r}: mask has shape {tuple(mask.shape)}, "
                f"expected {tuple(self.weight.shape)}"
            )
        self.bits = bits
        self.group_size = group_size
        self.name = name
        # Set only inside simulate(exact=True): replaces the float computation of forward.
        self.exact = None
        self.step = None  # the scales as a parameter while they are being learned
        self.fractional = None  # stands in while bits and zeros are being learned
        self.dense_gradient = False  # whether pruned weights get a gradient meanwhile
        self.register_buffer("mask", mask)
        channels, inputs = conv_form(self, self.weight).shape[:2]
        groups = group_count(inputs, group_size)
        shape = (channels,) if groups is None else (channels, groups)
        self.register_buffer("weight_scale", torch.ones(shape, device=self.weight.device))

    def refresh_scales(self) -> None:
        """Recompute ``weight_scale`` as the MSE-optimal scale of the present weight."""
        weight, mask = self._conv_form()
        try:
            _, scale = quantize_weight(weight, self.bits, mask, group_size=self.group_size)
        except CalibrationError as error:
            raise CalibrationError(f"layer {self.name!r}: {error}") from None
        self.weight_scale.copy_(scale)

    def quantized_weight(self) -> Tensor:
        """Eq. (4): ``W_opt = mask * Q_b(W)``, float32, differentiable straight through."""
        assert isinstance(self, nn.Module)
        weight, mask = self._conv_form()
        if self.fractional is not None and self.fractional.active:
            return layer_form(self, self.fractional(weight))
        if self.step is not None:
            learned = learned_weight(
                weight, self.step, self.weight_scale, mask, self.bits, dense=self.dense_gradient
            )
            return layer_form(self, learned)
        scale = per_channel(self.weight_scale, weight.shape)
        return layer_form(self, _QuantizeWeight.apply(weight, scale, mask, self.bits))

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The integers of the present weight: int8 ``[O, I/groups, ...]``, masked."""
        weight, mask = self._conv_form()
        return round_weight(weight, self.weight_scale, self.bits, mask).to(torch.int8)

    def _conv_form(self) -> tuple[Tensor, Tensor | None]:
        """Weight and mask with the output channels first."""
        assert isinstance(self, nn.Module)
        return conv_form(self, self.weight), (
            None if self.mask is None else conv_form(self, self.mask)
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, bits={self.bits}"  # type: ignore[misc]
        if self.weight_scale.dim() == 2:
            text += f", group_size={self.group_size}"
        if self.mask is not None:
            text += f", pruned={1.0 - float(self.mask.float().mean()):.3f}"
        return text


class QuantConv2d(_QuantLayer, PaddedConv2d):
    """Convolution whose weight is pruned and quantized on every forward (eq. 4).

    Input and output are float32 ``[N, C, H, W]``. The parameter ``weight`` stays float; the
    buffers are ``mask`` (bool, or ``None`` where nothing is pruned) and ``weight_scale``
    (float32 ``[O]``), which is fixed between calls of :meth:`refresh_scales`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.exact is not None:
            return self.exact.run(input)
        return self.convolve(input, self.quantized_weight())


class QuantConvTranspose2d(_QuantLayer, nn.ConvTranspose2d):
    """Transposed convolution whose weight is pruned and quantized on every forward (eq. 4).

    Input and output are float32 ``[N, C, H, W]``. ``weight`` and ``mask`` have torch's shape
    ``[I, O/groups, KH, KW]``; ``weight_scale`` is float32 ``[O]``, one per output channel.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.exact is not None:
            return self.exact.run(input, output_size)
        return self.convolve(input, self.quantized_weight(), self.bias, output_size)

    def convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
    ) -> Tensor:
        """The layer's operation with other operands; they all have one dtype."""
        geometry = self.stride, self.padding, self.kernel_size
        output_padding = self._output_padding(
            input,
            output_size,
            *geometry,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )


class QuantLinear(_QuantLayer, nn.Linear):
    """Linear layer whose weight is pruned and quantized on every forward (eq. 4).

    Input float32 ``[..., I]``, output ``[..., O]``; state as in :class:`QuantConv2d`, but that
    ``weight_scale`` is ``[O, groups]`` where groups of input channels have scales of their own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.exact is not None:
            return self.exact.run(input)
        return F.linear(input, self.quantized_weight(), self.bias)

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The same function for many calls in a row: the weight is quantized once."""
        if self.exact is not None:
            return self.exact.run
        weight, bias = self.quantized_weight(), self.bias
        return lambda x: F.linear(x, weight, bias)


QUANT_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantConv2d,
    PaddedConv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}
QuantLayer = QuantConv2d | QuantConvTranspose2d | QuantLinear
