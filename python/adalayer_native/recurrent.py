"""Recurrent layers step by step, in torch (csrc/reference/recurrence.hpp).

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

__all__ = [
    "FLOATS",
    "KINDS",
    "Functions",
    "cells_of",
    "fake_layers",
    "fake_states",
    "gates_of",
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


def fake_states(products: Tensor, *others: Any) -> Tensor:
    """Shape of :func:`recurrent_states`, and of :func:`recurrent_cells`."""
    (kind,) = (item for item in others if isinstance(item, str))
    batch, steps, outputs = products.shape
    return products.new_empty((batch, steps, outputs // gates_of(kind)))


# (Here, since a capture loads nothing native.)
_library = torch.library.Library("adalayer", "FRAGMENT")
_library.define(
    "recurrent_states(Tensor products, Tensor weight, Tensor? bias, Tensor? state, Tensor? cell, "
    "str kind, bool reverse) -> Tensor"
)
_library.define(
    "recurrent_cells(Tensor products, Tensor recurrent, Tensor? state, Tensor? cell, str kind, "
    "bool reverse, bool cells) -> Tensor"
)
_library.define(
    "recurrent_layers(Tensor input, Tensor[] hx, Tensor[] params, str kind, bool has_biases, "
    "int num_layers, float dropout, bool train, bool bidirectional, bool batch_first) -> Tensor[]"
)
_OPERATORS: dict[Any, Any] = {
    recurrent_states: fake_states,
    recurrent_cells: fake_states,
    recurrent_layers: fake_layers,
}
for _function, _fake in _OPERATORS.items():
    for _device in ("CPU", "CUDA"):
        _library.impl(_function.__name__, _function, _device)
    torch.library.register_fake(f"adalayer::{_function.__name__}", _fake, lib=_library)
