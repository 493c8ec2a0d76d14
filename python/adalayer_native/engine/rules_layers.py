"""Rules for what has weights: convolutions, linear layers, batch and layer norm, and quantizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from adalayer_native import ops
from adalayer_native.capture.vocabulary import arguments
from adalayer_native.engine.grids import Grid, Want, compose_clamps
from adalayer_native.engine.lower import (
    LAYER_INPUTS,
    RULES,
    CannotLower,
    Grids,
    Lowering,
    Rule,
)
from adalayer_native.engine.rules_floats import float_conv, linear_view, transposed_by_phases
from adalayer_native.engine.views import (
    BATCH,
    Dims,
    Ref,
    Size,
    channel_axis,
    image_dims,
    merged,
    reshaped,
)
from adalayer_native.operations import geometry
from adalayer_native.ops.fused import FLOAT_FUNCTIONS
from adalayer_native.ops.norms import unit_as_rms
from adalayer_native.rounding import group_size_of, per_channel

Doubles = npt.NDArray[np.float64]


def _bounds(arguments: dict[str, Any]) -> tuple[float, float]:
    lo, hi = arguments["lo"], arguments["hi"]
    return (-math.inf if lo is None else float(lo)), (math.inf if hi is None else float(hi))


def _double(values: Tensor) -> Doubles:
    return values.detach().to(torch.float64).numpy()


# -- quantizers -----------------------------------------------------------------------------------


def _fake_quantize_grid(grids: Grids, node: fx.Node) -> Grid:
    a = arguments(node)
    return Grid(float(a["scale"]), int(a["zero_point"]), int(a["bits"]))


def _fake_quantize(low: Lowering, node: fx.Node, want: Want) -> Ref:
    return low.u8(node.args[0], want)


RULES["adalayer.fake_quantize.default"] = Rule(
    _fake_quantize, grid=_fake_quantize_grid, folds=True, scatters=True
)


# -- convolutions and linear layers ---------------------------------------------------------------


@dataclass
class _Layer:
    """A convolution, a transposed one or a linear layer, ready to be emitted."""

    op: str
    source: Ref
    input_grid: Grid
    weights: int
    multiplier: Doubles  # input_scale * weight_scale as the module has it
    bias: Doubles
    geometry: dict[str, int]
    size: Size
    dims: Dims  # of the result
    residual: Any
    bounds: tuple[float, float]

    @property
    def in_groups(self) -> bool:
        """Whether groups of input channels have scales of their own."""
        return self.op == "linear"


def _input_grid(node: fx.Node) -> Grid:
    a = arguments(node)
    return Grid(float(a["input_scale"]), int(a["input_zero_point"]), int(a["input_bits"]))


def _output_grid(grids: Grids, node: fx.Node) -> Grid | None:
    a = arguments(node)
    if not a["output_bits"]:
        return None
    return Grid(float(a["output_scale"]), int(a["output_zero_point"]), int(a["output_bits"]))


def _source(low: Lowering, node: fx.Node) -> Ref:
    return low.u8(node.args[0], Want(_input_grid(node)))


def _constants(low: Lowering, node: fx.Node) -> tuple[Tensor, Doubles, Doubles]:
    packed, scale, bias = (low.parameter(item) for item in node.args[1:4])
    if packed is None or scale is None or bias is None:
        raise CannotLower(node, "its weights are computed by the graph; expected parameters")
    multiplier = scale * torch.tensor(_input_grid(node).scale, dtype=torch.float32)
    return packed, _double(multiplier), _double(bias)


def _conv(low: Lowering, node: fx.Node) -> _Layer:
    a = arguments(node)
    packed, multiplier, bias = _constants(low, node)
    source = low.plain(_source(low, node), low.name(node, "reorder"))
    padding = list(a["padding"])
    if len(padding) == 2:
        padding = [*padding, *padding]
    size: Size = low.sizes(node)  # type: ignore[assignment]
    if low.size(source)[0] != _in_channels(packed, int(a["groups"])):
        raise CannotLower(node, f"its weights do not fit an input of {low.size(source)}")
    return _Layer(
        "conv_transpose" if "transpose" in str(node.target) else "conv",
        source,
        _input_grid(node),
        low.program.constant("weights", packed.numpy().tobytes()),
        multiplier,
        bias,
        geometry(a["kernel_size"], a["stride"], padding, a["dilation"], a["groups"]),
        size,
        image_dims(size),
        a.get("residual"),
        _bounds(a),
    )


def _in_channels(packed: Tensor, groups: int) -> int:
    return int(ops.packed_info(packed)["shape"][1]) * groups


def _linear(low: Lowering, node: fx.Node) -> _Layer:
    packed, multiplier, bias = _constants(low, node)
    features = int(node.meta["val"].shape[-1])
    source, out, dims = linear_view(low, node, _source(low, node), features)
    c, h, w = low.size(source)
    inputs = _in_channels(packed, 1)
    kernel = (1, 1) if inputs == c else (h, w)
    if multiplier.ndim == 2:
        if kernel != (1, 1):
            source = low.arranged(source, low.name(node, "reorder"), "c")
            out = (features, 1, 1)
            dims = image_dims(out)[:1]
        return _Layer(
            "linear",
            source,
            _input_grid(node),
            low.program.constant("weights", packed.numpy().tobytes()),
            multiplier,
            bias,
            {"group_size": group_size_of(inputs, multiplier.shape[1])},
            out,
            dims,
            None,
            _bounds(arguments(node)),
        )
    if kernel != (1, 1):
        weight = ops.unpack_weight(packed).reshape(features, c, h, w)
        packed = ops.pack_weight(weight, int(ops.packed_info(packed)["bits"]))
    return _Layer(
        "conv",
        source,
        _input_grid(node),
        low.program.constant("weights", packed.numpy().tobytes()),
        multiplier,
        bias,
        geometry(kernel),
        out,
        dims,
        None,
        _bounds(arguments(node)),
    )


def _layer(low: Lowering, node: fx.Node) -> _Layer:
    return _linear(low, node) if "linear" in str(node.target) else _conv(low, node)


def _residual(low: Lowering, node: fx.Node, layer: _Layer) -> list[int]:
    if layer.residual is None:
        return []
    ref, _ = low.on_own_grid(layer.residual)
    ref = low.plain(ref, low.name(node, "residual"))
    if low.size(ref) != layer.size:
        raise CannotLower(node, f"its residual is {low.size(ref)}, its result {layer.size}")
    return [ref.value]


def _as_float(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    """A layer with the same weights and input, whose products are of floats."""
    layer = _layer(low, node)
    bounds = compose_clamps(layer.bounds, (lo, hi))
    plain = layer.residual is None
    program = low.program
    reals = program.node(
        "dequantize", low.name(node, "floats"), [layer.source.value], low.size(layer.source), None
    )
    packed, scale = low.parameter(node.args[1]), low.parameter(node.args[2])
    assert packed is not None
    assert scale is not None
    place = layer.geometry
    if layer.in_groups:  # packed weights of a float layer have one scale per output channel
        weight = ops.unpack_weight(packed).flatten(1)
        whole = _double(weight * per_channel(scale, weight.shape))
        constants, place = {"weights": program.f32(whole)}, geometry((1, 1))
    else:
        constants = {"weights": layer.weights, "scale": program.f32(_double(scale))}
    constants["bias"] = program.f32(layer.bias)
    if layer.op == "conv_transpose":
        return _transposed_as_float(
            low, node, layer, Ref(reals, layer.source.dims), constants, bounds
        )
    number = float_conv(
        low, low.name(node), Ref(reals, layer.source.dims), layer.size, place, constants,
        bounds if plain else (-math.inf, math.inf),
    )  # fmt: skip
    result = Ref(number, layer.dims)
    return result if plain else _plus_residual(low, node, layer, result, bounds)


def _transposed_as_float(
    low: Lowering,
    node: fx.Node,
    layer: _Layer,
    source: Ref,
    constants: dict[str, int],
    bounds: tuple[float, float],
) -> Ref:
    packed = low.parameter(node.args[1])
    assert packed is not None
    bits = int(ops.packed_info(packed)["bits"])

    def parts(part: Tensor) -> dict[str, int]:
        data = ops.pack_weight(part, bits).numpy().tobytes()
        return {**constants, "weights": low.program.constant("weights", data)}

    weight = ops.unpack_weight(packed)
    return transposed_by_phases(
        low, node, source, weight, parts, layer.geometry, layer.size, bounds
    )


def _plus_residual(
    low: Lowering, node: fx.Node, layer: _Layer, ref: Ref, bounds: tuple[float, float]
) -> Ref:
    """Floats and a residual in float32, clamped."""
    other = low.plain(low.f32(layer.residual), low.name(node, "residual"))
    if low.size(other) != layer.size:
        raise CannotLower(node, f"its residual is {low.size(other)}, its result {layer.size}")
    number = low.program.node(
        "combine", low.name(node, "sum"), [ref.value, other.value], layer.size, None, pair=0
    )
    return clamped(low, node, Ref(number, layer.dims), *bounds)


def clamped(low: Lowering, node: fx.Node, ref: Ref, lo: float, hi: float) -> Ref:
    """Floats between two bounds, which may be infinite."""
    if (lo, hi) == (-math.inf, math.inf):
        return ref
    return float_function(low, node, ref, "clamp", lo, hi)


def float_function(
    low: Lowering, node: fx.Node, ref: Ref, kind: str, a: float = 0.0, b: float = 0.0
) -> Ref:
    """A function of every float of a value."""
    number = low.program.node(
        "function",
        low.name(node, kind),
        [ref.value],
        low.size(ref),
        None,
        function=FLOAT_FUNCTIONS[kind],
        a=a,
        b=b,
    )
    return Ref(number, ref.dims)


def _has_float_residual(low: Lowering, node: fx.Node) -> bool:
    """Whether what is added to a layer is on no grid, since no quantized layer follows."""
    residual = arguments(node).get("residual")
    return residual is not None and low.grids(residual) is None


def _layer_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    if node in low.as_float or _has_float_residual(low, node):
        return low.quantized(_layer_f32(low, node, want.lo, want.hi), node, Want(want.grid))
    layer = _layer(low, node)
    want = want.after(*layer.bounds)
    residual = _residual(low, node, layer)
    program = low.program
    number = program.node(
        layer.op,
        low.name(node),
        [layer.source.value, *residual],
        layer.size,
        want.grid,
        **layer.geometry,
        **want.finish(),
        weights=layer.weights,
        scale=program.f32(layer.multiplier),
        bias=program.f32(layer.bias),
    )
    return Ref(number, layer.dims)


def _layer_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    if node in low.as_float:
        return _as_float(low, node, lo, hi)
    layer = _layer(low, node)
    bounds = compose_clamps(layer.bounds, (lo, hi))
    floats = _has_float_residual(low, node)
    residual = [] if floats else _residual(low, node, layer)
    lo, hi = (-math.inf, math.inf) if floats else bounds
    program = low.program
    number = program.node(
        layer.op,
        low.name(node),
        [layer.source.value, *residual],
        layer.size,
        None,
        **layer.geometry,
        clamp_lo=lo,
        clamp_hi=hi,
        weights=layer.weights,
        scale=program.f32(layer.multiplier),
        bias=program.f32(layer.bias),
    )
    result = Ref(number, layer.dims)
    return _plus_residual(low, node, layer, result, bounds) if floats else result


def _no_grid(grids: Grids, node: fx.Node) -> None:
    return None


for _name, _grid, _rows in (
    ("adalayer.conv2d.default", _output_grid, False),
    ("adalayer.conv_transpose2d.default", _output_grid, False),
    ("adalayer.linear.default", _no_grid, True),
):
    RULES[_name] = Rule(_layer_u8, _layer_f32, _grid, _rows, _rows)
    LAYER_INPUTS[_name] = _source


# -- norms ----------------------------------------------------------------------------------------


def affine(
    low: Lowering, node: fx.Node, operand: Any, factor: Doubles, offset: Doubles, want: Want
) -> Ref:
    """``operand * factor + offset`` for an operand on its own grid.

    Args:
        factor, offset: one value per channel, or per element: ``[h, w, c]``.
    """
    ref, grid = low.on_own_grid(operand)
    c, h, w = low.size(ref)
    scale = factor * grid.scale
    bias = offset - grid.zero_point * scale
    for values in (scale, bias):
        if values.shape not in ((c,), (h, w, c)):
            raise CannotLower(node, f"{values.size} factors for {c} channels")
        with np.errstate(over="ignore"):
            if not np.isfinite(values.astype(np.float32)).all():
                raise CannotLower(node, "a constant operand that is not finite")
    per_channel = scale.ndim == bias.ndim == 1
    return low.emit(
        "affine" if per_channel else "affine_image",
        low.name(node),
        [ref.value],
        ref,
        want,
        **want.finish(),
        scale=low.program.f32(scale),
        bias=low.program.f32(bias),
    )


def _batch_line(low: Lowering, node: fx.Node) -> tuple[Doubles, Doubles]:
    """Factor and offset of a batch norm, per channel."""
    a = arguments(node)
    if a.get("training"):
        raise CannotLower(node, "a batch norm in training mode")
    mean, var = low.parameter(a["running_mean"]), low.parameter(a["running_var"])
    if mean is None or var is None:
        raise CannotLower(node, "a batch norm without running statistics")
    weight = low.parameter(a["weight"]) if a["weight"] is not None else torch.ones_like(mean)
    bias = low.parameter(a["bias"]) if a["bias"] is not None else torch.zeros_like(mean)
    if weight is None or bias is None:
        raise CannotLower(node, "its parameters are computed by the graph")
    factor = _double(weight) / np.sqrt(_double(var) + float(a["eps"]))
    return factor, _double(bias) - _double(mean) * factor


def _channels_first(low: Lowering, node: fx.Node, ref: Ref) -> None:
    if channel_axis(ref.dims, low.size(ref)) != 0:
        raise CannotLower(node, "its channels are not on axis 1")


def _batch_norm(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    if on_floats(low, node):
        return low.quantized(_batch_norm_f32(low, node, want.lo, want.hi), node, Want(want.grid))
    factor, offset = _batch_line(low, node)
    ref, grid = low.on_own_grid(a["input"])
    check_grid(low, node, grid, a.get("qparams"))
    _channels_first(low, node, ref)
    return affine(low, node, a["input"], factor, offset, want)


def _batch_norm_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    a = arguments(node)
    if a.get("qparams") is not None:
        raise CannotLower(node, "a batch norm of levels whose result is wanted in float32")
    factor, offset = _batch_line(low, node)
    ref = low.f32(a["input"])
    _channels_first(low, node, ref)
    number = low.program.node(
        "affine", low.name(node), [ref.value], low.size(ref), None,
        scale=low.program.f32(factor), bias=low.program.f32(offset),
    )  # fmt: skip
    return clamped(low, node, Ref(number, ref.dims), lo, hi)


def on_floats(low: Lowering, node: fx.Node) -> bool:
    """Whether an operator was made for values that are on no grid."""
    a = arguments(node)
    return "qparams" in a and a["qparams"] is None


RULES["aten.batch_norm.default"] = Rule(_batch_norm)
RULES["adalayer.grid_batch_norm.default"] = Rule(_batch_norm, _batch_norm_f32)


def check_grid(low: Lowering, node: fx.Node, grid: Grid, qparams: Any) -> None:
    """Raise :class:`CannotLower` where an operator was made for values on another grid."""
    said = low.parameter(qparams)
    if said is not None and said.tolist()[:2] != [grid.scale, grid.zero_point]:
        raise CannotLower(node, f"it expects a grid of {said.tolist()}, its input has {grid}")


def _scale_and_shift(
    low: Lowering, node: fx.Node, a: dict[str, Any], channels: int
) -> dict[str, int]:
    """Constants of a norm's weight and bias, one number per channel."""
    found = {}
    for constant, name, fill in (("gamma", "weight", 1.0), ("beta", "bias", 0.0)):
        given = a.get(name)
        value = torch.full((channels,), fill) if given is None else low.parameter(given)
        if value is None:
            raise CannotLower(node, "its parameters are computed by the graph")
        found[constant] = low.program.f32(_double(value.reshape(-1)))
    return found


def _norm_rule(
    op: str,
    arrange: Callable[[Lowering, fx.Node, dict[str, Any], Ref], Ref],
    rows: bool,
    unit: bool = False,
) -> Rule:
    """A norm of levels to levels or floats, or of floats.

    Args:
        arrange: puts the operand in the order that the norm needs.
        rows: it works along the last axis, whatever the others are.
        unit: to vectors of length one.
    """

    def put(low: Lowering, node: fx.Node, a: dict[str, Any], ref: Ref, want: Want | None) -> Ref:
        ref = arrange(low, node, a, ref)
        eps = torch.finfo(torch.float32).eps if a["eps"] is None else float(a["eps"])
        channels = low.size(ref)[0]
        if unit:
            number, eps = unit_as_rms(channels, eps)
            constants = {"gamma": np.full(channels, number), "beta": np.zeros(channels)}
            given = {name: low.program.f32(values) for name, values in constants.items()}
        else:
            given = _scale_and_shift(low, node, a, channels)
        groups = {"groups": int(a["num_groups"])} if "num_groups" in a else {}
        number = low.program.node(
            op,
            low.name(node),
            [ref.value],
            low.size(ref),
            None if want is None else want.grid,
            **groups,
            **({} if want is None else want.finish()),
            eps=eps,
            **given,
        )
        return Ref(number, ref.dims)

    def f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
        a = arguments(node)
        if a.get("qparams") is None:
            ref = low.f32(a["input"])
        else:
            ref, grid = low.on_own_grid(a["input"])
            check_grid(low, node, grid, a["qparams"])
        return clamped(low, node, put(low, node, a, ref, None), lo, hi)

    def u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
        a = arguments(node)
        if on_floats(low, node):
            return low.quantized(f32(low, node, want.lo, want.hi), node, Want(want.grid))
        ref, grid = low.on_own_grid(a["input"])
        check_grid(low, node, grid, a.get("qparams"))
        return put(low, node, a, ref, want)

    return Rule(u8, f32, folds=rows, scatters=rows)


def _in_rows(low: Lowering, node: fx.Node, a: dict[str, Any], ref: Ref) -> Ref:
    axes = list(a.get("normalized_shape", node.meta["val"].shape[-1:]))
    if len(axes) != 1 or not ref.dims or BATCH in ref.dims[-1]:
        raise CannotLower(node, f"it normalises {axes}, which is not the last axis alone")
    return low.rows(ref, low.name(node, "reorder"))


def _in_planes(low: Lowering, node: fx.Node, a: dict[str, Any], ref: Ref) -> Ref:
    # It is over all positions, in whatever order they are; in float their order counts.
    floats = low.value(ref).grid is None
    if channel_axis(ref.dims, low.size(ref)) != 0 or (floats and not _in_memory(low, ref)):
        axes = "c" + "h" * (len(ref.dims) > 1) + "w" * (len(ref.dims) - 2)
        ref = low.arranged(ref, low.name(node, "reorder"), axes)
    groups = int(a["num_groups"])
    if math.prod(low.size(ref)) // groups > MAX_GROUP_NORM:
        raise CannotLower(node, f"groups of {low.size(ref)} values by {groups}")
    return ref


def _in_memory(low: Lowering, ref: Ref) -> bool:
    """Whether a view lists the elements of a value in their own order."""
    total = math.prod(low.size(ref))
    return reshaped(ref.dims, [total]) == (merged([(total, 1)]),)


MAX_GROUP_NORM = 1 << 23  # kMaxGroupNorm of csrc/reference/image_spec.hpp
for _name in ("layer_norm", "rms_norm"):
    _rule = _norm_rule(_name, _in_rows, rows=True)
    RULES[f"aten.{_name}.default"] = Rule(_rule.u8, folds=True, scatters=True)
    RULES[f"adalayer.grid_{_name}.default"] = _rule
RULES["adalayer.grid_unit.default"] = _norm_rule("rms_norm", _in_rows, rows=True, unit=True)
_rule = _norm_rule("group_norm", _in_planes, rows=False)
RULES["aten.group_norm.default"] = Rule(_rule.u8)
RULES["adalayer.grid_group_norm.default"] = _rule

__all__ = [
    "affine",
    "arguments",
    "check_grid",
    "clamped",
    "float_function",
    "image_dims",
]
