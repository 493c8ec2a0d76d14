"""A recurrent layer over the native kernels, in one direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.errors import InputError
from adalayer_native.nn.layer import Activation, NativeLayer, checked_qparams
from adalayer_native.recurrent import KINDS, gates_of
from adalayer_native.rounding import activation_grid, quantize_weight

__all__ = ["Recurrence"]


class Recurrence(NativeLayer):
    """One layer of an LSTM, a GRU or a plain RNN in one direction, its recurrent weights packed.

    What the inputs contribute to the gates is a linear layer of its own, which comes first:
    ``products`` is its result for all steps, ``[N, T, gates * H]``. The result is the hidden state
    behind every step, ``[N, T, H]``. In a product the hidden state is on a u8 grid,
    ``input_qparams``; cells are computed in float32, by the engine's steps, and go from step to
    step in float. Runs on the CPU alone.

    Args:
        kind: "lstm", "gru", "tanh" or "relu"; gates are in torch's order.
        weight: int8 ``[gates * H, H]``.
        bits: of each weight.
        weight_scale: float32 ``[gates * H]``.
        bias: of the recurrent product, ``[gates * H]``, or None.
        qparams: scale, zero point and bits of the hidden state's grid.
    """

    has_float_form = False

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        qparams: Tensor,
        activation: Activation = None,
        *,
        kind: str,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if activation is not None:
            raise ValueError(f"a recurrent layer has no activation, got {activation!r}")
        if weight.dim() != 2 or weight.shape[0] != gates_of(kind) * weight.shape[1]:
            raise ValueError(
                f"weight must be [{gates_of(kind)} * H, H] for {kind!r}, got {list(weight.shape)}"
            )
        self.kind = kind
        self.hidden_size = int(weight.shape[1])
        self._set_weight(weight, bits, weight_scale, bias, None)
        self._set_grid(qparams)

    @classmethod
    def rounded(
        cls,
        kind: str,
        product: nn.Linear,
        bits: int = 8,
        *,
        state_range: tuple[float, float] = (-1.0, 1.0),
        state_bits: int = 8,
    ) -> Recurrence:
        """From the recurrent product of a float layer, ``weight_hh`` and ``bias_hh`` in torch.

        Args:
            state_range: (low, high) of the hidden state.
        """
        weight, scale = quantize_weight(product.weight.detach().float(), bits)
        step, zero_point = activation_grid(*state_range, state_bits, "the hidden state")
        qparams = checked_qparams(step, zero_point, state_bits)
        return cls(weight, bits, scale, product.bias, qparams, kind=kind)

    def weight_int(self) -> Tensor:
        return super().weight_int().flatten(1)

    def forward(
        self,
        products: Tensor,
        state: Tensor | None = None,
        cell: Tensor | None = None,
        reverse: bool = False,
        cells: bool = False,
    ) -> Tensor:
        """Hidden states, ``[N, T, H]``; with ``cells`` an LSTM's cells behind them, ``[N, T, 2H]``.

        Args:
            products: float ``[N, T, gates * H]``.
            state: before the first step, ``[N, H]``; zeros by default, like ``cell`` (of an LSTM).
            reverse: from the last step to the first.
        """
        if products.device.type not in ("cpu", "meta"):
            raise InputError(
                f"{self._label()}: recurrent layers run on the CPU alone, got {products.device}"
            )
        self._check(products, gates_of(self.kind) * self.hidden_size, -1, 3)
        held = self.operator()[1].values()
        out = torch.ops.adalayer.recurrence(products, *held, state, cell, self.kind, reverse, cells)
        return self._finish(out, products)

    def _channels(self) -> int:
        return self.hidden_size

    def operator(self) -> tuple[str, dict[str, Any]]:
        keys = ("weight_packed", "weight_scale", "bias", "input_scale", "input_zero_point")
        return "recurrence", {key: getattr(self, key) for key in (*keys, "input_bits")}

    def _size_repr(self) -> str:
        return f"{self.kind}, {self.hidden_size}"
