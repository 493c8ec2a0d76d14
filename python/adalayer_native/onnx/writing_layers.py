"""Layers as ONNX: integer weights behind a ``DequantizeLinear`` with a scale per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from adalayer_native.engine.export import layer_name, op_name
from adalayer_native.onnx.emitting import Emitter, rule
from adalayer_native.ops import packed_info, unpack_weight
from adalayer_native.rounding import layer_form, weight_range

__all__: list[str] = []

_ON_GRIDS = ("adalayer.conv2d.default", "adalayer.linear.default", "adalayer.fake_quantize.default")
_MOST_STEPS = 1 << 30  # of an int32, half of which are left to the sums


def _grid(a: dict[str, Any], part: str) -> Any:
    return a[f"{part}_scale"], a[f"{part}_zero_point"], a[f"{part}_bits"]


def _grid_behind(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    """The one grid on which a layer's result is put, by itself or by all its readers; else None."""
    if a.get("residual") is not None:
        return None
    if a.get("output_bits"):
        return _grid(a, "output")
    found = set()
    for user in node.users:
        b = e.arguments(user) if op_name(user) in _ON_GRIDS else {}
        if b.get("x") is not node or b.get("residual") is node:
            return None
        found.add(
            _grid(b, "input") if "input_scale" in b else (b["scale"], b["zero_point"], b["bits"])
        )
    return found.pop() if len(found) == 1 else None


def _still(
    e: Emitter, node: fx.Node, a: dict[str, Any], levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Channels that only their bias decides, with no weights and a scale that holds the bias.

    Who computes in integers has biases as int32 in steps of the sums. Beside a bias such steps may
    be next to nothing (a channel that training has switched off), and the sums wrap round. Where
    no input can turn the channel's level, its weights are left out: the network stays the same.
    """
    step, bias = float(a["input_scale"]), e.exported.tensor(a["bias"]).double()
    unit = step * scale.double().abs()
    silent = levels.flatten(1).abs().amax(1) == 0
    lost = (bias.abs() > _MOST_STEPS * unit) & (bias != 0)
    grid = _grid_behind(e, node, a)
    if grid is not None:
        top = (1 << int(a["input_bits"])) - 1 - int(a["input_zero_point"])
        ends = levels.flatten(1).double() * (scale.double() * step)[:, None]
        one, other = ends * top, ends * -int(a["input_zero_point"])
        low, high = (
            (bias + pick(one, other).sum(1)).clamp(a["lo"], a["hi"])
            if (a["lo"], a["hi"]) != (None, None)
            else bias + pick(one, other).sum(1)
            for pick in (torch.minimum, torch.maximum)
        )
        # (A thousandth is more than float32 adds to a number of at most 255.)
        last = (1 << int(grid[2])) - 1
        levels_at = [
            ((y / grid[0] + grid[1] + margin).round().clamp(0, last))
            for y, margin in ((low, -1e-3), (high, 1e-3))
        ]
        silent = silent | (levels_at[0] == levels_at[1])
    still = lost & silent
    levels, scale = levels.clone(), scale.clone()
    levels[still] = 0
    scale[still] = (bias[still].abs() / (step * (1 << 20))).float()
    return levels, scale


def _weights(e: Emitter, node: fx.Node, a: dict[str, Any], name: str) -> tuple[Tensor, Tensor, int]:
    """Integers ``[O, I/groups, KH, KW]``, a scale for each O, and their bits."""
    packed = e.exported.tensor(a["weight_packed"])
    levels, bits = unpack_weight(packed), int(packed_info(packed)["bits"])
    scale = e.exported.tensor(a["weight_scale"]).clone()
    sparsity = 1.0 - float((levels != 0).float().mean()) if levels.numel() else 0.0
    # A batch norm with a negative factor leaves negative scales, which not every reader takes.
    low, high = weight_range(bits)
    turned = (scale < 0) & (levels.flatten(1).amin(1) > low)
    levels = levels.clone()
    levels[turned] = -levels[turned]
    scale[turned] = -scale[turned]
    assert int(levels.max()) <= high
    e.layers[name] = {
        "bits": bits,
        "sparsity": round(sparsity, 6),
        "input_bits": int(a["input_bits"]),
    }
    return *_still(e, node, a, levels, scale), bits


def _dequantized(e: Emitter, levels: Tensor, scale: Tensor, bits: int, axis: int, name: str) -> str:
    weight, kind = e.integers(levels, bits, f"{name}.weight")
    e.layers[name]["stored"] = kind.lower()
    steps = e.constant(scale, f"{name}.weight_scale")
    return str(e.op("DequantizeLinear", [weight, steps], f"{name}.weight_float", axis=axis))


def _bias(e: Emitter, a: dict[str, Any], name: str) -> str:
    """The bias in float, as it is: who computes in integers rounds it himself."""
    return e.constant(e.exported.tensor(a["bias"]), f"{name}.bias")


def clamped(e: Emitter, value: str, low: float | None, high: float | None, name: str) -> str:
    """A value within bounds."""
    if low is None and high is None:
        return value
    if low == 0 and high is None:
        return str(e.op("Relu", [value], name))
    bounds = ["" if b is None else e.constant(b, dtype=np.float32) for b in (low, high)]
    return str(e.op("Clip", [value, *bounds], name))


def _finished(e: Emitter, value: str, a: dict[str, Any], name: str) -> str:
    """Residual, clamp and output grid behind a layer's sums."""
    if a.get("residual") is not None:
        value = str(e.op("Add", [value, e.of(a["residual"])], f"{name}.sum"))
    value = clamped(e, value, a["lo"], a["hi"], f"{name}.clamped")
    if a.get("output_bits"):
        value = e.quantized(value, _grid(a, "output"), f"{name}.out")
    return value


@rule("adalayer.conv2d.default")
def _conv2d(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    name = layer_name(node)
    levels, scale, bits = _weights(e, node, a, name)
    x = e.quantized(e.of(a["x"]), _grid(a, "input"), f"{name}.in")
    weight = _dequantized(e, levels, scale, bits, 0, name)
    top, left, bottom, right = a["padding"]
    out = e.op(
        "Conv", [x, weight, _bias(e, a, name)], name,
        kernel_shape=list(a["kernel_size"]), strides=list(a["stride"]),
        pads=[top, left, bottom, right], dilations=list(a["dilation"]), group=a["groups"],
    )  # fmt: skip
    return _finished(e, out, a, name)


@rule("adalayer.conv_transpose2d.default")
def _conv_transpose2d(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    name = layer_name(node)
    levels, scale, bits = _weights(e, node, a, name)
    groups, outputs = a["groups"], levels.shape[0]
    inputs = levels.shape[1] * groups
    x = e.quantized(e.of(a["x"]), _grid(a, "input"), f"{name}.in")
    shell = nn.ConvTranspose2d(inputs, outputs, 1, groups=groups, bias=False, device="meta")
    form = layer_form(shell, levels)
    if groups == 1:
        weight = _dequantized(e, form, scale, bits, 1, name)
    elif outputs == groups:
        weight = _dequantized(e, form, scale.repeat_interleave(inputs // groups), bits, 0, name)
    else:  # scales along both axes
        whole = _dequantized(e, form, torch.ones(form.shape[0]), bits, 0, name)
        rows = scale.reshape(groups, 1, -1).expand(groups, inputs // groups, -1)
        steps = e.constant(rows.reshape(inputs, -1, 1, 1), f"{name}.weight_scale")
        weight = str(e.op("Mul", [whole, steps], f"{name}.weight_scaled"))
    pads, extra = list(a["padding"]), [int(n) for n in a["output_padding"]]
    out = e.op(
        "ConvTranspose", [x, weight, _bias(e, a, name)], name,
        kernel_shape=list(a["kernel_size"]), strides=list(a["stride"]), pads=pads + pads,
        output_padding=extra, dilations=list(a["dilation"]), group=groups,
    )  # fmt: skip
    return _finished(e, out, a, name)


@rule("adalayer.linear.default")
def _linear(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    name = layer_name(node)
    levels, scale, bits = _weights(e, node, a, name)
    x = e.quantized(e.of(a["x"]), _grid(a, "input"), f"{name}.in")
    matrix = levels.flatten(1)
    bias = _bias(e, a, name)
    if e.rank(a["x"]) == 2:
        weight = _dequantized(e, matrix, scale, bits, 0, name)
        return _finished(e, e.op("Gemm", [x, weight, bias], name, transB=1), a, name)
    weight = _dequantized(e, matrix.t(), scale, bits, 1, name)
    product = e.op("MatMul", [x, weight], f"{name}.product")
    return _finished(e, e.op("Add", [product, bias], name), a, name)


@rule("adalayer.fake_quantize.default")
def _fake_quantize(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.quantized(e.of(a["x"]), (a["scale"], a["zero_point"], a["bits"]), node.name)


# -- layers in float ------------------------------------------------------------------------------


@rule("adalayer.exact_conv2d.default", "aten.conv2d.default")
def _float_conv2d(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    padding = a["padding"]
    if isinstance(padding, str):
        pads: dict[str, Any] = {"auto_pad": "SAME_UPPER" if padding == "same" else "VALID"}
    else:
        padding = list(padding) * (3 - len(padding)) if len(padding) < 2 else list(padding)
        pads = {"pads": padding if len(padding) == 4 else padding + padding}
    operands = [e.of(a["input"]), e.of(a["weight"])]
    operands += [] if a["bias"] is None else [e.of(a["bias"])]
    stride, dilation = (
        list(v) * (3 - len(v)) if len(v) < 2 else list(v) for v in (a["stride"], a["dilation"])
    )
    return str(
        e.op(
            "Conv",
            operands,
            node.name,
            strides=stride,
            dilations=dilation,
            group=a["groups"],
            **pads,
        )
    )


@rule("aten.conv_transpose2d.input")
def _float_conv_transpose2d(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    operands = [e.of(a["input"]), e.of(a["weight"])]
    operands += [] if a["bias"] is None else [e.of(a["bias"])]
    pair = {
        key: (list(a[key]) * 2)[:2] for key in ("stride", "padding", "output_padding", "dilation")
    }
    return str(e.op(
        "ConvTranspose", operands, node.name, strides=pair["stride"], dilations=pair["dilation"],
        pads=pair["padding"] * 2, output_padding=pair["output_padding"], group=a["groups"],
    ))  # fmt: skip


@rule("adalayer.exact_linear.default", "aten.linear.default")
def _float_linear(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    weight = a["weight"]
    if e.rank(a["input"]) == 2:
        operands = [e.of(a["input"]), e.of(weight)]
        operands += [] if a["bias"] is None else [e.of(a["bias"])]
        return str(e.op("Gemm", operands, node.name, transB=1))
    turned = e.op("Transpose", [e.of(weight)], f"{node.name}.weight", perm=[1, 0])
    product = e.op("MatMul", [e.of(a["input"]), turned], node.name)
    if a["bias"] is None:
        return str(product)
    return str(e.op("Add", [product, e.of(a["bias"])], f"{node.name}.sum"))
