"""Linear over the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adalayer_native import ops
from adalayer_native.nn.layer import Activation, NativeLayer

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
        activation: Activation = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight must be [O, I], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self._set_weight(weight, bits, weight_scale, bias, activation)
        self._set_grid(qparams)

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
