"""A recurrent layer by the engine's own steps (csrc/reference/recurrence.hpp)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.fused import exact_function, fma
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.recurrent import KINDS, Functions, gates_of

__all__ = ["EXACT", "fake_recurrence", "recurrence"]

# What cells are computed with, bit for bit.
EXACT = Functions(
    partial(exact_function, kind="sigmoid"), partial(exact_function, kind="tanh"), fma
)


def _checked(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape) != shape:
        raise ValueError(f"recurrence: expected {name} of {list(shape)}, got {list(x.shape)}")
    return x.float().contiguous()


@torch.no_grad()
def recurrence(
    products: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
    cells: bool,
) -> Tensor:
    """A recurrent layer in one direction; its hidden state meets the weights on a u8 grid.

    Args:
        products: float ``[N, T, gates * H]``: what the inputs contribute, their bias included.
        weight_packed: of ``[gates * H, H]`` weights, gates in torch's order.
        weight_scale, bias: float32 ``[gates * H]``.
        input_scale, input_zero_point, input_bits: the grid of the hidden state.
        state, cell: before the first step, ``[N, H]``; None for zeros.
        kind: "lstm", "gru", "tanh" or "relu".
        reverse: from the last step to the first.
        cells: of an LSTM: the result is ``[N, T, 2 * H]``, states and then cells.

    Returns:
        float ``[N, T, H]`` of the type of ``products``.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if kind not in KINDS:
        raise ValueError(f"recurrence: expected one of {', '.join(KINDS)}, got {kind!r}")
    if cells and kind != "lstm":
        raise ValueError(f"recurrence: cells are an LSTM's, got {kind!r}")
    outputs = int(weight_scale.numel())
    hidden = outputs // gates_of(kind)
    if products.dim() != 3 or products.shape[2] != outputs:
        raise ValueError(
            f"recurrence: expected products of [N, T, {outputs}], got {list(products.shape)}"
        )
    batch, steps = products.shape[:2]
    given = products.float().contiguous()
    begin = [
        None if item is None else _checked(name, item, (batch, hidden))
        for name, item in (("a state", state), ("a cell", cell))
    ]
    packed, scale, offset = (item.contiguous() for item in (weight_packed, weight_scale, bias))
    out = given.new_empty(batch, steps, hidden * (2 if cells else 1))
    if out.numel():
        # A float32 product of two float32 numbers, rounded once.
        multiplier = scale * torch.tensor(input_scale, dtype=torch.float32)
        _C.recurrence(
            (batch, steps, hidden),
            (KINDS.index(kind), reverse, cells),
            (packed.data_ptr(), packed.numel()),
            (multiplier.data_ptr(), offset.data_ptr()),
            (input_scale, input_zero_point, input_bits),
            [0 if item is None else item.data_ptr() for item in (given, *begin, out)],
            get_num_threads(),
        )
    return out.to(products.dtype)


def fake_recurrence(products: Tensor, *others: Any) -> Tensor:
    """Shape of :func:`recurrence`."""
    kind, _, cells = others[-3:]
    batch, steps, outputs = products.shape
    hidden = outputs // gates_of(kind)
    return products.new_empty((batch, steps, 2 * hidden if cells else hidden))
