"""Everything between layers as ONNX."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native.engine.export import op_name
from adalayer_native.onnx.emitting import Emitter, Unwritable, rule
from adalayer_native.onnx.writing_layers import clamped

__all__ = ["getitem"]

_UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "log": "Log", "mish": "Mish", "neg": "Neg", "reciprocal": "Reciprocal", "round": "Round",
    "sigmoid": "Sigmoid", "sin": "Sin", "softsign": "Softsign", "sqrt": "Sqrt", "tanh": "Tanh",
    "relu": "Relu",
}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
_SAME = (
    "clone.default", "contiguous.default", "alias.default", "detach.default", "dropout.default",
    "lift_fresh_copy.default", "feature_dropout.default",
)  # fmt: skip


def _aten(*names: str) -> list[str]:
    return [f"aten.{name}" for name in names]


@rule(*_aten(*_SAME))
def _same(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.of(node.args[0])


@rule(*_aten(*(f"{name}.default" for name in _UNARY)))
def _unary(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x = e.of(node.args[0])
    kind = op_name(node).split(".")[1]
    return e.op(_UNARY[kind], [x], node.name)


@rule("adalayer.exact_function.default")
def _function(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    return function(e, a["kind"], e.of(a["input"]), node.name)


def function(e: Emitter, kind: str, x: str, name: str) -> Any:
    """A function of single values by its name in torch."""
    if kind in _UNARY:
        return e.op(_UNARY[kind], [x], name)
    if kind == "silu":
        return e.op("Mul", [x, e.op("Sigmoid", [x], f"{name}.sigmoid")], name)
    if kind == "hardsigmoid":
        return e.op("HardSigmoid", [x], name, alpha=1 / 6, beta=0.5)
    if kind == "hardswish":
        return e.op("HardSwish", [x], name)
    raise Unwritable(f"the function {kind} is not written")


@rule(*_aten("silu.default", "hardsigmoid.default", "hardswish.default"))
def _smooth(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    return function(e, op_name(node).split(".")[1], e.of(a["self"]), node.name)


@rule(*_aten("gelu.default"))
def _gelu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x = e.of(a["self"])
    if e.opset >= 20:
        return e.op("Gelu", [x], node.name, approximate=a["approximate"])
    if a["approximate"] != "none":
        raise Unwritable("gelu by tanh needs opset 20")
    inner = e.op("Mul", [x, e.of(math.sqrt(0.5))], f"{node.name}.scaled")
    bell = e.op("Add", [e.op("Erf", [inner], f"{node.name}.erf"), e.of(1.0)], f"{node.name}.one")
    return e.op("Mul", [e.op("Mul", [x, bell], f"{node.name}.twice"), e.of(0.5)], node.name)


@rule(*_aten("leaky_relu.default", "elu.default", "softplus.default", "prelu.default"))
def _bent(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = op_name(node).split(".")[1]
    x = e.of(node.args[0])
    if kind == "leaky_relu":
        return e.op("LeakyRelu", [x], node.name, alpha=float(a["negative_slope"]))
    if kind == "elu":
        if a["scale"] != 1 or a["input_scale"] != 1:
            raise Unwritable("elu with scales")
        return e.op("Elu", [x], node.name, alpha=float(a["alpha"]))
    if kind == "softplus":
        if a["beta"] != 1:
            raise Unwritable(f"softplus with beta {a['beta']}")
        return e.op("Softplus", [x], node.name)
    slope = e.exported.tensor(a["weight"])
    shape = [-1] + [1] * max(0, e.rank(node) - 2)
    return e.op("PRelu", [x, e.constant(slope.reshape(shape), f"{node.name}.slope")], node.name)


@rule(*_aten("relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default",
             "clamp_max.default", "clip.default"))  # fmt: skip
def _clamp(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = op_name(node).split(".")[1]
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    low, high = (0.0, 6.0) if kind == "relu6" else (low, high)
    return clamped(e, e.of(node.args[0]), low, high, node.name)


@rule(*_aten(*(f"{n}.{k}" for n in _BINARY for k in ("Tensor", "Scalar")), "rsub.Scalar"))
def _binary(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = op_name(node).split(".")[1]
    dtype = e.value(node).dtype
    left, right = e.of(a["self"], dtype), e.of(a["other"], dtype)
    if a.get("alpha", 1) != 1:
        right = e.op("Mul", [right, e.of(a["alpha"], dtype)], f"{node.name}.alpha")
    if kind == "rsub":
        kind, left, right = "sub", right, left
    return e.op(_BINARY[kind], [left, right], node.name)


@rule("adalayer.grid_line.default")
def _line(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    value, constant = e.of(a["input"]), e.of(a["constant"])
    left, right = (constant, value) if a["left"] else (value, constant)
    if a["alpha"] != 1:
        right = e.op("Mul", [right, e.of(a["alpha"])], f"{node.name}.alpha")
    if a["addend"] is None:
        return e.op(_BINARY[a["kind"]], [left, right], node.name)
    product = e.op(_BINARY[a["kind"]], [left, right], f"{node.name}.product")
    return e.op("Add", [product, e.of(a["addend"])], node.name)


@rule(*_aten("pow.Tensor_Scalar", "square.default", "rsqrt.default"))
def _power(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x = e.of(a["self"])
    if op_name(node) == "aten.rsqrt.default":
        return e.op("Reciprocal", [e.op("Sqrt", [x], f"{node.name}.root")], node.name)
    exponent = float(a.get("exponent", 2.0))
    return e.op("Mul", [x, x], node.name) if exponent == 2 else e.op(
        "Pow", [x, e.of(exponent)], node.name
    )  # fmt: skip


@rule(
    "adalayer.exact_softmax.default", *_aten("softmax.int", "_softmax.default", "log_softmax.int")
)
def _softmax(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = int(a.get("dim", 1))
    kind = "LogSoftmax" if "log_softmax" in op_name(node) else "Softmax"
    return e.op(kind, [e.of(node.args[0])], node.name, axis=axis)


# -- moving ---------------------------------------------------------------------------------------


def _ints(e: Emitter, values: Any) -> str:
    return e.constant(np.array(values, dtype=np.int64))


@rule(*_aten("reshape.default", "view.default", "flatten.using_ints", "unflatten.int",
             "_unsafe_view.default", "squeeze.dim", "squeeze.dims", "squeeze.default",
             "unsqueeze.default"))  # fmt: skip
def _reshape(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes, before = e.sizes(node), e.sizes(x)
    free = [axis for axis, size in enumerate(sizes) if size is None]
    wanted = [-1 if size is None else size for size in sizes]
    if len(free) > 1:
        raise Unwritable(f"a reshape to sizes of which {len(free)} follow from the batch")
    # 0 says that a size is the operand's.
    if free and free[0] < len(before):
        after, own = e.value(node).shape[free[0]], e.value(x).shape[free[0]]
        wanted[free[0]] = 0 if str(after) == str(own) else -1
    operand = e.of(x)
    return e.moved(e.op("Reshape", [operand, _ints(e, wanted)], node.name), operand)


@rule(*_aten("permute.default", "transpose.int", "t.default", "swapaxes.default"))
def _permute(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = e.rank(x)
    if "dims" in a:
        order = [int(axis) % rank for axis in a["dims"]]
    else:
        order = list(range(rank))
        first, second = (a.get("dim0", a.get("axis0", 0)), a.get("dim1", a.get("axis1", rank - 1)))
        order[first], order[second] = order[second], order[first]
    operand = e.of(x)
    return e.moved(e.op("Transpose", [operand], node.name, perm=order), operand)


@rule(*_aten("cat.default", "concat.default"))
def _cat(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operands = [e.of(item) for item in a["tensors"]]
    result = e.op("Concat", operands, node.name, axis=int(a["dim"]))
    alike = {e.grids.get(item) for item in operands}
    return e.moved(result, operands[0]) if len(alike) == 1 else result


@rule(*_aten("split.Tensor", "split_with_sizes.default", "chunk.default"))
def _split(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = int(a["dim"])
    parts = [int(item.shape[axis]) for item in node.meta["val"]]
    operand = e.of(node.args[0])
    found = e.op("Split", [operand, _ints(e, parts)], node.name, len(parts), axis=axis)
    return e.moved(found if isinstance(found, tuple) else (found,), operand)


def getitem(e: Emitter, node: fx.Node) -> Any:
    """One of several results."""
    several, index = node.args
    found = e.names[several]  # type: ignore[index]
    if not isinstance(found, tuple):
        if index != 0:
            raise Unwritable(f"result {index} of {several} is not written")
        return found
    return found[index]  # type: ignore[index]


@rule(*_aten("slice.Tensor", "narrow.default", "select.int"))
def _slice(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand, axis = e.of(a["self"]), int(a["dim"])
    if "index" in a:
        place = e.constant(np.int64(a["index"]))
        return e.moved(e.op("Gather", [operand, place], node.name, axis=axis), operand)
    start, step = a.get("start") or 0, a.get("step") or 1
    end = a["start"] + a["length"] if "length" in a else a.get("end")
    end = (1 << 63) - 1 if end is None else end
    if not all(isinstance(item, int) for item in (start, end, step)):
        raise Unwritable("a slice whose ends follow from the batch")
    rest = [_ints(e, [item]) for item in (start, end, axis, step)]
    return e.moved(e.op("Slice", [operand, *rest], node.name), operand)


@rule(*_aten("index_select.default", "embedding.default"))
def _gather(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    if "weight" in a:
        return e.op("Gather", [e.of(a["weight"]), e.of(a["indices"])], node.name, axis=0)
    operand = e.of(a["self"])
    return e.moved(
        e.op("Gather", [operand, e.of(a["index"])], node.name, axis=int(a["dim"])), operand
    )


@rule(*_aten("expand.default", "repeat.default"))
def _expand(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    if op_name(node) == "aten.repeat.default":
        counts = list(a["repeats"])
        if not all(isinstance(n, int) for n in counts) or len(counts) != e.rank(x):
            raise Unwritable("a repeat whose counts follow from the batch")
        return e.moved(e.op("Tile", [operand, _ints(e, counts)], node.name), operand)
    sizes, before = e.sizes(node), e.sizes(x)
    lead = len(sizes) - len(before)
    if any(n is None and (i < lead or before[i - lead] is not None) for i, n in enumerate(sizes)):
        raise Unwritable("an expansion to the size of the batch")
    wanted = [1 if n is None else n for n in sizes]
    return e.moved(e.op("Expand", [operand, _ints(e, wanted)], node.name), operand)


@rule(*_aten("pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default"))
def _shuffle(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    if "upscale_factor" in a:
        block = int(a["upscale_factor"])
        found = e.op("DepthToSpace", [operand], node.name, blocksize=block, mode="CRD")
        return e.moved(found, operand)
    _, c, h, w = (n if n is not None else 0 for n in e.sizes(x))
    if "groups" in a:
        groups = int(a["groups"])
        first, order, last = [0, groups, c // groups, h * w], [0, 2, 1, 3], [0, c, h, w]
    else:
        b = int(a["downscale_factor"])
        first = [0, c, h // b, b, w // b, b]
        order, last = [0, 1, 3, 5, 2, 4], [0, c * b * b, h // b, w // b]
    parts = e.op("Reshape", [operand, _ints(e, first)], f"{node.name}.parts")
    turned = e.op("Transpose", [parts], f"{node.name}.turned", perm=order)
    return e.moved(e.op("Reshape", [turned, _ints(e, last)], node.name), operand)


@rule(*_aten("pad.default", "constant_pad_nd.default", "reflection_pad2d.default",
             "replication_pad2d.default", "reflection_pad1d.default"))  # fmt: skip
def _pad(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    kind = op_name(node).split(".")[1]
    mode = {"reflection": "reflect", "replication": "edge"}.get(kind.split("_")[0])
    mode = mode or {"replicate": "edge"}.get(a.get("mode", "constant"), a.get("mode", "constant"))
    if mode == "circular":
        mode = "wrap"
        if e.opset < 19:
            raise Unwritable("circular padding needs opset 19")
    amounts = list(a["pad"] if "pad" in a else a["padding"])
    rank = e.rank(x)
    begins, ends = [0] * rank, [0] * rank
    for place in range(len(amounts) // 2):
        begins[rank - 1 - place], ends[rank - 1 - place] = amounts[2 * place : 2 * place + 2]
    value = a.get("value") or 0.0
    rest = [_ints(e, begins + ends)] + ([e.of(float(value))] if mode == "constant" else [])
    found = e.op("Pad", [operand, *rest], node.name, mode=mode)
    return e.moved(found, operand) if mode != "constant" or value == 0 else found


# -- windows --------------------------------------------------------------------------------------


def _pair(value: Any) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return [int(n) for n in (items * 2)[:2]]


@rule(*_aten("max_pool2d.default", "max_pool2d_with_indices.default"))
def _max_pool(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand = e.of(a["self"])
    kernel = _pair(a["kernel_size"])
    found = e.op(
        "MaxPool", [operand], node.name, kernel_shape=kernel,
        strides=_pair(a["stride"]) if a["stride"] else kernel, pads=_pair(a["padding"]) * 2,
        dilations=_pair(a["dilation"]), ceil_mode=int(a["ceil_mode"]),
    )  # fmt: skip
    return e.moved(found, operand)


@rule("adalayer.exact_avg_pool2d.default", *_aten("avg_pool2d.default"))
def _avg_pool(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("divisor_override") is not None:
        raise Unwritable("an average with a divisor of its own")
    kernel = _pair(a["kernel_size"])
    return e.op(
        "AveragePool", [e.of(node.args[0])], node.name, kernel_shape=kernel,
        strides=_pair(a["stride"]) if a["stride"] else kernel, pads=_pair(a["padding"]) * 2,
        ceil_mode=int(a["ceil_mode"]), count_include_pad=int(a["count_include_pad"]),
    )  # fmt: skip


@rule("adalayer.exact_adaptive_avg_pool2d.default",
      *_aten("adaptive_avg_pool2d.default", "adaptive_max_pool2d.default"))  # fmt: skip
def _adaptive(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    largest = "max" in op_name(node)
    size = e.sizes(x)[-2:]
    out = [int(n) for n in a["output_size"]]
    if out == [1, 1]:
        found = e.op("GlobalMaxPool" if largest else "GlobalAveragePool", [operand], node.name)
    elif None in size or any(n % m for n, m in zip(size, out, strict=True)):  # type: ignore[operator]
        raise Unwritable(f"windows of several sizes: {size} to {out}")
    else:
        kernel = [n // m for n, m in zip(size, out, strict=True)]  # type: ignore[operator]
        kind = "MaxPool" if largest else "AveragePool"
        found = e.op(kind, [operand], node.name, kernel_shape=kernel, strides=kernel)
    return e.moved(found, operand) if largest else found


@rule("adalayer.exact_mean.default", "adalayer.exact_sum.default",
      "adalayer.exact_vector_norm.default",
      *_aten("mean.dim", "amax.default", "sum.dim_IntList"))  # fmt: skip
def _reduce(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    kind = op_name(node).split(".")[1]
    names = {"amax": "ReduceMax", "sum": "ReduceSum", "exact_sum": "ReduceSum",
             "exact_vector_norm": "ReduceL2"}  # fmt: skip
    name = names.get(kind, "ReduceMean")
    axes = [int(axis) for axis in a["dim"] or range(e.rank(x))]
    keep = int(a["keepdim"])
    if e.opset >= 18 or name == "ReduceSum":
        found = e.op(name, [operand, _ints(e, axes)], node.name, keepdims=keep)
    else:
        found = e.op(name, [operand], node.name, axes=axes, keepdims=keep)
    return e.moved(found, operand) if kind == "amax" else found


@rule("adalayer.grid_unit.default")
def _unit(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand, keep = e.of(node.args[0]), {"keepdims": 1}
    if e.opset >= 18:
        length = e.op("ReduceL2", [operand, _ints(e, [-1])], f"{node.name}.length", **keep)
    else:
        length = e.op("ReduceL2", [operand], f"{node.name}.length", axes=[-1], **keep)
    length = e.op("Max", [length, e.of(a["eps"])], f"{node.name}.least")
    return e.op("Div", [operand, length], node.name)


def _scaled(size: Any, factor: np.float32) -> int | None:
    """The size that readers of ONNX come to; None where they may differ."""
    one, other = int(np.float32(size) * factor), int(float(size) * float(factor))
    return one if one == other else None


@rule("adalayer.exact_bilinear.default",
      *_aten("upsample_bilinear2d.vec", "upsample_nearest2d.vec", "upsample_nearest2d.default",
             "upsample_bilinear2d.default"))  # fmt: skip
def _resize(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    x, operand = node.args[0], e.of(node.args[0])
    assert isinstance(x, fx.Node)
    nearest = "nearest" in op_name(node)
    size, out = e.sizes(x)[-2:], e.sizes(node)[-2:]
    if None in size or None in out:
        raise Unwritable("resizing to a size that follows from the batch")
    factors = a.get("scale_factors")
    if factors is None and a.get("scales_h") is not None:
        factors = [a["scales_h"], a["scales_w"]]
    if factors is None:
        factors = [n / m for n, m in zip(out, size, strict=True)]  # type: ignore[operator]
    scales = np.array([1, 1, *factors], dtype=np.float32)
    if all(_scaled(m, f) == n for n, m, f in zip(out, size, scales[2:], strict=True)):
        scaling = [e.constant(scales)]
    else:  # a factor in float32 that means another size
        batch = e.op("Gather", [e.op("Shape", [operand], node.name), _ints(e, [0])], node.name)
        rest = _ints(e, [e.sizes(x)[1], *out])
        scaling = ["", e.op("Concat", [batch, rest], node.name, axis=0)]
    how = "asymmetric" if nearest else "align_corners" if a["align_corners"] else "half_pixel"
    found = e.op(
        "Resize", [operand, "", *scaling], node.name, mode="nearest" if nearest else "linear",
        coordinate_transformation_mode=how, nearest_mode="floor" if nearest else None,
    )  # fmt: skip
    return e.moved(found, operand) if nearest else found


# -- norms ----------------------------------------------------------------------------------------


@rule("adalayer.grid_batch_norm.default", *_aten("batch_norm.default"))
def _batch_norm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    mean, var = (e.exported.tensor(a[key]) for key in ("running_mean", "running_var"))
    gamma = torch.ones_like(mean) if a["weight"] is None else e.exported.tensor(a["weight"])
    beta = torch.zeros_like(mean) if a["bias"] is None else e.exported.tensor(a["bias"])
    rest = [
        e.constant(item, f"{node.name}.{leaf}")
        for item, leaf in ((gamma, "weight"), (beta, "bias"), (mean, "mean"), (var, "variance"))
    ]
    x = e.of(node.args[0])
    return e.op("BatchNormalization", [x, *rest], node.name, epsilon=float(a["eps"]))


@rule("adalayer.grid_layer_norm.default", *_aten("layer_norm.default"))
def _layer_norm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    axes = len(a.get("normalized_shape") or [1])
    if e.opset < 17:
        raise Unwritable("layer norms need opset 17")
    size = [int(n) for n in e.value(node).shape[-axes:]]
    scale = e.constant(torch.ones(size)) if a["weight"] is None else e.of(a["weight"])
    rest = [] if a["bias"] is None else [e.of(a["bias"])]
    x = e.of(node.args[0])
    return e.op(
        "LayerNormalization", [x, scale, *rest], node.name, axis=-axes, epsilon=float(a["eps"])
    )


@rule("adalayer.grid_group_norm.default", *_aten("group_norm.default"))
def _group_norm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    if e.opset < 21:
        raise Unwritable("group norms need opset 21")
    channels = int(e.value(node).shape[1])
    scale = e.constant(torch.ones(channels)) if a["weight"] is None else e.of(a["weight"])
    bias = e.constant(torch.zeros(channels)) if a["bias"] is None else e.of(a["bias"])
    operands = [e.of(node.args[0]), scale, bias]
    groups = int(a["num_groups"])
    return e.op(
        "GroupNormalization", operands, node.name, num_groups=groups, epsilon=float(a["eps"])
    )


# -- attention ------------------------------------------------------------------------------------


@rule(*_aten("matmul.default", "mm.default", "bmm.default"))
def _matmul(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    return e.op("MatMul", [e.of(item) for item in node.args[:2]], node.name)


@rule("adalayer.grid_attention.default", *_aten("scaled_dot_product_attention.default"))
def _attention(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("is_causal") or a.get("enable_gqa") or a.get("factor") is not None:
        raise Unwritable("attention that is causal, shares heads or has a factor of its own")
    query, key, value = a["query"], a["key"], a["value"]
    if e.sizes(query)[1:-2] != e.sizes(key)[1:-2]:
        raise Unwritable("attention that shares heads")
    rank = e.rank(key)
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned = e.op("Transpose", [e.of(key)], f"{node.name}.key", perm=order)
    scores = e.op("MatMul", [e.of(query), turned], f"{node.name}.scores")
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(int(e.value(query).shape[-1]))
    scores = e.op("Mul", [scores, e.of(float(scale))], f"{node.name}.scaled")
    if a["attn_mask"] is not None:
        mask = e.exported.constant(a["attn_mask"])
        if not isinstance(mask, Tensor):
            raise Unwritable("attention with a mask that is computed")
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        scores = e.op("Add", [scores, e.constant(mask, f"{node.name}.mask")], f"{node.name}.masked")
    weights = e.op("Softmax", [scores], f"{node.name}.weights", axis=-1)
    return e.op("MatMul", [weights, e.of(value)], node.name)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return node.target is operator.getitem
