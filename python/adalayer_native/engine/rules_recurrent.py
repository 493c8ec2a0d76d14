"""The rule for recurrent layers: steps in the positions, gates in the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adalayer_native import ops
from adalayer_native.capture.vocabulary import arguments
from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.lower import RULES, CannotLower, Lowering, Rule
from adalayer_native.engine.rules_layers import clamped
from adalayer_native.engine.views import Dims, Ref, Size, image_dims, merged
from adalayer_native.recurrent import KINDS


def _grid(a: dict[str, Any]) -> Grid:
    """Of the hidden state."""
    return Grid(float(a["input_scale"]), int(a["input_zero_point"]), int(a["input_bits"]))


def _view(size: Size) -> Dims:
    """A value as ``[batch, steps, features]``."""
    c, h, w = size
    return merged([(h * w, 1)]), merged([(c, h * w)])


def _in_steps(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    if ref.dims == _view(low.size(ref)):
        return ref
    return low.arranged(ref, low.name(node, "reorder"), "wc")


def _begin(low: Lowering, node: fx.Node, operand: Any) -> int:
    """A state before the first step."""
    fixed = low.parameter(operand)
    if fixed is not None:
        if fixed.dim() != 2 or fixed.shape[0] != 1 or fixed.dtype != torch.float32:
            raise CannotLower(node, f"a state to begin with of {list(fixed.shape)}")
        return low.program.node(
            "constant", low.name(node, "state"), [], (fixed.shape[1], 1, 1), None,
            values=low.program.f32(fixed.reshape(-1).numpy()),
        )  # fmt: skip
    ref = low.f32(operand)
    size = low.size(ref)
    if size[1:] == (1, 1) and ref.dims == image_dims(size)[:1]:
        return ref.value
    return low.arranged(ref, low.name(node, "reorder"), "c").value


def _recurrence(low: Lowering, node: fx.Node, levels: bool) -> Ref:
    """On the hidden state's grid, or in float32."""
    a = arguments(node)
    packed, scale, bias = (low.parameter(a[k]) for k in ("weight_packed", "weight_scale", "bias"))
    if packed is None or scale is None or bias is None:
        raise CannotLower(node, "its weights are computed by the graph; expected parameters")
    grid = _grid(a)
    hidden = int(ops.packed_info(packed)["shape"][1])
    source = _in_steps(low, node, low.f32(a["products"]))
    begin = [_begin(low, node, a[k]) for k in ("state", "cell") if a[k] is not None]
    if a["kind"] == "lstm" and len(begin) == 1:
        raise CannotLower(node, "a state to begin with, and no cell")
    _, h, w = low.size(source)
    size: Size = (2 * hidden if a["cells"] else hidden, h, w)
    multiplier = scale * torch.tensor(grid.scale, dtype=torch.float32)
    number = low.program.node(
        "recurrence",
        low.name(node),
        [source.value, *begin],
        size,
        grid if levels else None,
        kind=KINDS.index(a["kind"]),
        reverse=bool(a["reverse"]),
        cells=bool(a["cells"]),
        **Want(grid).finish(),
        weights=low.program.constant("weights", packed.numpy().tobytes()),
        scale=low.program.f32(multiplier.double().numpy()),
        bias=low.program.f32(bias.double().numpy()),
    )
    return Ref(number, _view(size))


def _f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    return clamped(low, node, _recurrence(low, node, False), lo, hi)


def _u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    grid = _grid(a)
    if want.grid == grid and not a["cells"]:
        return low.retable(_recurrence(low, node, True), node, grid, want)
    return low.quantized(_f32(low, node, want.lo, want.hi), node, Want(want.grid))


def _in_float(low: Lowering, node: fx.Node, *_: Any) -> Ref:
    raise CannotLower(
        node, "its recurrent weights are float: the plan has no layer of them (weight_hh)"
    )


RULES["adalayer.recurrence.default"] = Rule(_u8, _f32)
# What a prepared layer consists of; converted, it is the operator above.
for _name in ("states", "cells"):
    RULES[f"adalayer.recurrent_{_name}.default"] = Rule(_in_float, _in_float)
