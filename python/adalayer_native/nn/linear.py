"""Linear over the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native import ops
from adalayer_native.nn.layer import Activation, NativeLayer, checked_qparams
from adalayer_native.rounding import activation_grid, quantize_weight

__all__ = ["Linear"]


class Linear(NativeLayer):
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
        qparams = checked_qparams(input_scale, input_zero_point, input_bits)
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
        input_scale, zero_point = activation_grid(*input_range, input_bits, "the input")
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
        if self._may_choose(x):
            with torch.no_grad():
                out = self.fastest.run(self, self._native, x)
        else:
            out = self._native(x)
        return self._finish(out, x)

    def _native(self, x: Tensor) -> Tensor:
        if x.is_cpu and ops.plain_eager(x):
            return self._ready()(x)
        return ops.linear(x, *self.operator()[1].values())

    def _channels(self) -> int:
        return self.in_features

    def operator(self) -> tuple[str, dict[str, Any]]:
        keys = ("weight_packed", "weight_scale", "bias", "input_scale", "input_zero_point")
        return "linear", {key: getattr(self, key) for key in (*keys, "input_bits", "lo", "hi")}

    def _size_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
