"""Recurrent layers: the native operator, and the same law in torch (csrc/reference/recurrence.hpp).

What a layer's inputs contribute to its gates is a product over all steps, which comes first. In
float, in training and in the exact simulation a recurrence is two steps: the states that enter each
step, and, from what a linear layer makes of these, the cells. The native operator is both at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adalayer_native import _C
from adalayer_native.ops.fused import exact_function, fma
from adalayer_native.ops.machine import get_num_threads

__all__ = [
    "EXACT",
    "FLOATS",
    "KINDS",
    "Functions",
    "cells_of",
    "fake_cells",
    "fake_layers",
    "fake_recurrence",
    "fake_states",
    "gates_of",
    "recurrence",
    "recurrent_cells",
    "recurrent_layers",
    "recurrent_states",
    "states_of",
    "torch_operator",
]

# In the order of RecurrentKind (csrc/reference/float_kinds.hpp).
KINDS = ("lstm", "gru", "tanh", "relu")
_GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


def gates_of(kind: str) -> int:
    """Values per unit of the hidden state that a product gives."""
    return _GATES[kind]


@dataclass(frozen=True)
class Functions:
    """What cells are computed with: torch's functions, or the engine's, bit for bit."""

    sigmoid: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]
    fma: Callable[[Tensor, Tensor, Tensor], Tensor]


FLOATS = Functions(torch.sigmoid, torch.tanh, lambda a, b, c: a * b + c)
EXACT = Functions(
    partial(exact_function, kind="sigmoid"), partial(exact_function, kind="tanh"), fma
)


def _lstm_gates(x: Tensor, y: Tensor, f: Functions) -> list[Tensor]:
    """Input gate times candidate, forget gate, output gate."""
    given, kept, candidate, shown = (x + y).chunk(4, -1)
    return [f.sigmoid(given) * f.tanh(candidate), f.sigmoid(kept), f.sigmoid(shown)]


def _gru_gates(x: Tensor, y: Tensor, f: Functions) -> list[Tensor]:
    """Candidate, update gate."""
    hidden = x.shape[-1] // 3
    reset, update = f.sigmoid((x + y)[..., : 2 * hidden]).chunk(2, -1)
    inner = f.fma(reset.contiguous(), y[..., 2 * hidden :], x[..., 2 * hidden :])
    return [f.tanh(inner), update.contiguous()]


def _plain(x: Tensor, y: Tensor, kind: str, f: Functions) -> Tensor:
    return f.tanh(x + y) if kind == "tanh" else torch.relu(x + y)


def _zeros(products: Tensor, kind: str) -> Tensor:
    return products.new_zeros(products.shape[0], products.shape[2] // gates_of(kind))


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def states_of(
    products: Tensor,
    contribution: Callable[[Tensor], Tensor],
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
    f: Functions = FLOATS,
) -> Tensor:
    """The hidden states that enter each step, ``[N, T, H]``.

    Args:
        products: what the inputs contribute, ``[N, T, gates * H]``.
        contribution: what a state ``[N, H]`` contributes.
        state: before the first step, ``[N, H]``; None for zeros, like ``cell`` (of an LSTM).
        reverse: from the last step to the first.
    """
    steps = products.shape[1]
    h = _zeros(products, kind) if state is None else state
    c = _zeros(products, kind) if cell is None else cell
    found: list[Tensor] = [h] * steps
    for t in _order(steps, reverse):
        found[t] = h
        x, y = products[:, t], contribution(h)
        if kind == "lstm":
            given, kept, shown = _lstm_gates(x, y, f)
            c = f.fma(kept, c, given)
            h = shown * f.tanh(c)
        elif kind == "gru":
            candidate, update = _gru_gates(x, y, f)
            h = f.fma(update, h - candidate, candidate)
        else:
            h = _plain(x, y, kind, f)
    return torch.stack(found, 1)


def cells_of(
    products: Tensor,
    recurrent: Tensor,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
    cells: bool,
    f: Functions = FLOATS,
) -> Tensor:
    """The hidden states behind each step, or with ``cells`` an LSTM's cells, ``[N, T, H]``.

    Args:
        recurrent: what the states that enter the steps contribute, ``[N, T, gates * H]``.
    """
    if kind in ("tanh", "relu"):
        return _plain(products, recurrent, kind, f)
    order = _order(products.shape[1], reverse)
    found: dict[int, Tensor] = {}
    if kind == "gru":
        h = _zeros(products, kind) if state is None else state
        candidate, update = _gru_gates(products, recurrent, f)
        for t in order:
            h = f.fma(update[:, t], h - candidate[:, t], candidate[:, t])
            found[t] = h
        return torch.stack([found[t] for t in sorted(found)], 1)
    c = _zeros(products, kind) if cell is None else cell
    given, kept, shown = _lstm_gates(products, recurrent, f)
    for t in order:
        c = f.fma(kept[:, t], c, given[:, t])
        found[t] = c
    whole = torch.stack([found[t] for t in sorted(found)], 1)
    return whole if cells else shown * f.tanh(whole)


# -- operators ------------------------------------------------------------------------------------


def recurrent_states(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
) -> Tensor:
    """:func:`states_of` for a float layer: one operator of an exported graph."""
    run = partial(_linear, weight=weight, bias=bias)
    return states_of(products, run, state, cell, kind, reverse).contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def recurrent_cells(
    products: Tensor,
    recurrent: Tensor,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
    cells: bool,
) -> Tensor:
    """:func:`cells_of` as one operator of an exported graph."""
    return cells_of(products, recurrent, state, cell, kind, reverse, cells).contiguous()


_TORCH = {
    "lstm": torch.ops.aten.lstm.input,
    "gru": torch.ops.aten.gru.input,
    "tanh": torch.ops.aten.rnn_tanh.input,
    "relu": torch.ops.aten.rnn_relu.input,
}


def torch_operator(kind: str) -> torch._ops.OpOverload:
    """torch's own operator: all layers and directions at once."""
    return _TORCH[kind]


def recurrent_layers(
    input: Tensor, hx: list[Tensor], params: list[Tensor], kind: str, *options: bool | int | float
) -> list[Tensor]:
    """torch's operator by another name: while a model is exported, it hides that torch's own loops
    over the steps, which would fix their number.

    Args:
        hx: the states to begin with, and an LSTM's cells.
        options: has_biases, num_layers, dropout, train, bidirectional, batch_first.
    """
    begin = hx if kind == "lstm" else hx[0]
    return list(_TORCH[kind](input, begin, params, *options))


def fake_layers(
    input: Tensor, hx: list[Tensor], params: list[Tensor], kind: str, *options: Any
) -> list[Tensor]:
    """Shapes of :func:`recurrent_layers`."""
    bidirectional = options[4]
    features = hx[0].shape[2] * (2 if bidirectional else 1)
    out = input.new_empty((*input.shape[:2], features))
    return [out, *(item.new_empty(item.shape) for item in hx)]


def _states_like(products: Tensor, kind: str) -> Tensor:
    batch, steps, outputs = products.shape
    return products.new_empty((batch, steps, outputs // gates_of(kind)))


def fake_states(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
) -> Tensor:
    """Shape of :func:`recurrent_states`."""
    return _states_like(products, kind)


def fake_cells(
    products: Tensor,
    recurrent: Tensor,
    state: Tensor | None,
    cell: Tensor | None,
    kind: str,
    reverse: bool,
    cells: bool,
) -> Tensor:
    """Shape of :func:`recurrent_cells`."""
    return _states_like(products, kind)


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


def fake_recurrence(
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
    """Shape of :func:`recurrence`."""
    batch, steps, outputs = products.shape
    hidden = outputs // gates_of(kind)
    return products.new_empty((batch, steps, 2 * hidden if cells else hidden))
