"""Rules for layers that stay in float32 inside a program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import arguments
from adalayer_native.engine.grids import Want
from adalayer_native.engine.lower import RULES, CannotLower, F32Rule, Lowering, Rule
from adalayer_native.engine.views import BATCH, Dims, Ref, Size, image_dims, merged
from adalayer_native.operations import geometry
from adalayer_native.ops.transposed import outputs_first, part_of, phases

__all__ = ["float_conv", "then_levels", "transposed_by_phases"]


def then_levels(f32: F32Rule, *, folds: bool = False) -> Rule:
    """A rule whose result is floats, which a quantizer behind it puts on a grid."""

    def u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
        return low.quantized(f32(low, node, want.lo, want.hi), node, Want(want.grid))

    return Rule(u8, f32, folds=folds)


def float_conv(
    low: Lowering,
    name: str,
    source: Ref,
    size: Size,
    place: dict[str, int],
    constants: dict[str, int],
    bounds: tuple[float, float],
) -> int:
    """A convolution of floats.

    Args:
        place: its geometry, by name.
        constants: weights, their scale if they are packed, bias.
    """
    return low.program.node(
        "float_conv",
        name,
        [source.value],
        size,
        None,
        **place,
        **constants,
        clamp_lo=bounds[0],
        clamp_hi=bounds[1],
    )


def _constants(low: Lowering, node: fx.Node, a: dict[str, Any]) -> tuple[Tensor, dict[str, int]]:
    weight = low.parameter(a["weight"])
    if weight is None:
        raise CannotLower(node, "its weights are computed by the graph")
    outputs = int(node.meta["val"].shape[1]) if weight.dim() == 4 else len(weight)
    bias = torch.zeros(outputs) if a["bias"] is None else low.parameter(a["bias"])
    if bias is None:
        raise CannotLower(node, "its bias is computed by the graph")
    for item in (weight, bias):
        if not bool(torch.isfinite(item).all()):
            raise CannotLower(node, "a parameter of it is not finite")
    given = {"weights": weight, "bias": bias}
    return weight, {name: low.program.f32(item.float().numpy()) for name, item in given.items()}


def _conv2d(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    a = arguments(node)
    weight, constants = _constants(low, node, a)
    source = low.plain(low.f32(a["input"]), low.name(node, "reorder"))
    size: Size = low.sizes(node)  # type: ignore[assignment]
    place = geometry(weight.shape[2:], a["stride"], a["padding"], a["dilation"], a["groups"])
    number = float_conv(low, low.name(node), source, size, place, constants, (lo, hi))
    return Ref(number, image_dims(size))


def transposed_by_phases(
    low: Lowering,
    node: fx.Node,
    source: Ref,
    weight: Tensor,
    constants: Callable[[Tensor], dict[str, int]],
    place: dict[str, int],
    size: Size,
    bounds: tuple[float, float],
) -> Ref:
    """A transposed convolution of floats: one ordinary convolution for every phase of the strides,
    whose results are put between each other.

    Args:
        weight: ``[O, I / groups, KH, KW]``, not flipped.
        constants: of a part of the weight: weights, their scale if they are packed, bias.
        place: the geometry of the transposed one, by name.
    """
    sizes, stride = low.size(source)[1:], (place["stride_h"], place["stride_w"])
    pads = place["pad_top"], place["pad_left"]
    dilation = place["dilation_h"], place["dilation_w"]
    (mh, rows), (mw, columns) = (
        phases(sizes[k], size[1 + k], int(weight.shape[2 + k]), stride[k], pads[k], dilation[k])
        for k in range(2)
    )
    outs, pieces = size[0], []
    for row, column in itertools.product(rows, columns):
        part = part_of(weight, row, column)
        sides = (row.before, column.before, row.after, column.after)
        own = geometry(
            part.shape[2:], (1, 1), sides, (row.dilation, column.dilation), place["groups"]
        )
        name = low.name(node)
        pieces.append(float_conv(low, name, source, (outs, mh, mw), own, constants(part), bounds))
    plane, number = mh * mw, pieces[0]
    if len(pieces) > 1:
        name = low.name(node, "phases")
        number = low.program.node("concat", name, pieces, (outs * len(pieces), mh, mw), None)
    y, x = (np.arange(n) + pad for n, pad in zip(size[1:], pads, strict=True))
    tables = {
        "channel": np.arange(outs) * plane,
        "row": y % stride[0] * (stride[1] * outs * plane) + y // stride[0] * mw,
        "column": x % stride[1] * (outs * plane) + x // stride[1],
    }
    number = low.program.node(
        "rearrange", low.name(node, "between"), [number], size, None,
        **{key: low.program.i32(table) for key, table in tables.items()},
    )  # fmt: skip
    return Ref(number, image_dims(size))


def _conv_transpose2d(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    a = arguments(node)
    weight, constants = _constants(low, node, a)
    source = low.plain(low.f32(a["input"]), low.name(node, "reorder"))
    size: Size = low.sizes(node)  # type: ignore[assignment]
    place = geometry(
        weight.shape[2:], a["stride"], [*a["padding"], *a["padding"]], a["dilation"], a["groups"]
    )

    def parts(part: Tensor) -> dict[str, int]:
        return {"weights": low.program.f32(part.float().numpy()), "bias": constants["bias"]}

    turned = outputs_first(weight, int(a["groups"]))
    return transposed_by_phases(low, node, source, turned, parts, place, size, (lo, hi))


def linear_view(low: Lowering, node: fx.Node, source: Ref, outs: int) -> tuple[Ref, Size, Dims]:
    """What a linear layer reads, and size and view of what it gives: a 1x1 convolution over rows of
    tokens, or one that sees the whole image at once."""
    if BATCH in source.dims[-1]:
        raise CannotLower(node, "it works along the batch")
    if source.dims == ((merged([(math.prod(low.size(source)), 1)])),):
        out: Size = (outs, 1, 1)
        return source, out, image_dims(out)[:1]
    order = low.plain if len(source.dims) == 1 else low.rows
    source = order(source, low.name(node, "reorder"))
    _, h, w = low.size(source)
    if len(source.dims) == 1:
        return source, (outs, h, w), image_dims((outs, h, w))[:1]
    return source, (outs, h, w), (*source.dims[:-1], merged([(outs, h * w)]))


def _linear(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    a = arguments(node)
    weight, constants = _constants(low, node, a)
    source, size, dims = linear_view(low, node, low.f32(a["input"]), len(weight))
    c, h, w = low.size(source)
    kernel = (1, 1) if weight.shape[1] == c else (h, w)
    place = geometry(kernel)
    number = float_conv(low, low.name(node), source, size, place, constants, (lo, hi))
    return Ref(number, dims)


RULES["adalayer.exact_conv2d.default"] = then_levels(_conv2d)
RULES["adalayer.exact_conv_transpose2d.default"] = then_levels(_conv_transpose2d)
RULES["adalayer.exact_linear.default"] = then_levels(_linear, folds=True)
