"""Pools and resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adalayer_native.onnx import functions
from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.layers import window
from adalayer_native.onnx.shapes import moved
from adalayer_native.onnx.values import Constant, Size, Value

__all__: list[str] = []

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(
    node: NodeView, x: Value
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, stride, dilation, padding, and what ``ceil_mode`` reaches beyond the padding."""
    kernel = list(node.get("kernel_shape"))
    axes = x.rank - 2
    if axes not in _MAX_POOLS or len(kernel) != axes:
        raise Refused(f"windows of {len(kernel)} axes over {x.rank} axes; expected one to three")
    stride, dilation, pads = window(node, x, kernel)
    beyond = [0] * axes
    if node.get("ceil_mode"):
        for i in range(axes):
            size, reach = x.shape[i + 2] + pads[i], dilation[i] * (kernel[i] - 1) + 1
            count = -(-(size + pads[axes + i] - reach) // stride[i]) + 1
            if (count - 1) * stride[i] >= size:  # would begin in the padding behind the image
                count -= 1
            beyond[i] = max(0, (count - 1) * stride[i] + reach - size - pads[axes + i])
    return kernel, stride, dilation, pads, beyond


def _plain(kernel: list[int], pads: list[int], beyond: list[int]) -> bool:
    """Whether torch's pools have such a padding."""
    axes = len(kernel)
    even = pads[:axes] == pads[axes:] and not any(beyond)
    return even and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))


@operator_of("MaxPool", quantized=True)
def _max_pool(g: Builder, node: NodeView, x: Value) -> Any:
    if len([name for name in node.outputs if name]) > 1:
        raise Refused("the positions of its maxima are read, which count through the whole batch")
    kernel, stride, dilation, pads, beyond = _windows(node, x)
    axes = len(kernel)
    dtype = x.fake.dtype
    operand = x if dtype.is_floating_point else g.call(torch.Tensor.to, x, torch.float32)
    padding, up = pads[:axes], False
    if g.ranged and node.get("ceil_mode") and _plain(kernel, pads, [0] * axes):
        up = True  # windows are as many as the size asks for
    elif not _plain(kernel, pads, beyond):
        ends = [p + more for p, more in zip(pads[axes:], beyond, strict=True)]
        around = [0, 0, *pads[:axes], 0, 0, *ends]
        operand = g.call(functions.pad, operand, around, "constant", -math.inf)
        padding = [0] * axes
    result = g.call(_MAX_POOLS[axes], operand, kernel, stride, padding, dilation, up)
    return moved(
        result
        if operand is x or dtype.is_floating_point
        else g.call(torch.Tensor.to, result, dtype),
        x,
    )


@operator_of("AveragePool")
def _average_pool(g: Builder, node: NodeView, x: Value) -> Any:
    kernel, stride, dilation, pads, beyond = _windows(node, x)
    axes, whole = len(kernel), bool(node.get("count_include_pad"))
    if _plain(kernel, pads, beyond) and max(dilation) == 1:
        return g.call(_AVG_POOLS[axes], x, kernel, stride, pads[:axes], False, whole)
    return g.call(functions.average_pool, x, kernel, stride, dilation, pads, beyond, whole)


@operator_of("LpPool")
def _lp_pool(g: Builder, node: NodeView, x: Value) -> Any:
    kernel, stride, dilation, pads, beyond = _windows(node, x)
    p = node.get("p", 2)
    return g.call(functions.norm_pool, x, float(p), kernel, stride, dilation, pads, beyond)


@operator_of("GlobalAveragePool")
def _global_average(g: Builder, node: NodeView, x: Value) -> Any:
    if x.rank == 4:
        return g.call(F.adaptive_avg_pool2d, x, 1)
    return g.call(torch.mean, x, list(range(2, x.rank)), True)


@operator_of("GlobalMaxPool", quantized=True)
def _global_max(g: Builder, node: NodeView, x: Value) -> Any:
    return moved(g.call(torch.amax, x, list(range(2, x.rank)), True), x)


@operator_of("GlobalLpPool")
def _global_lp(g: Builder, node: NodeView, x: Value) -> Any:
    return g.call(torch.linalg.vector_norm, x, node.get("p", 2), list(range(2, x.rank)), True)


# -- resizing -----------------------------------------------------------------------------------


@operator_of("Resize", quantized=True)
def _resize(
    g: Builder, node: NodeView, x: Value, roi: Any = None, scales: Any = None, sizes: Any = None
) -> Any:
    mode = _coordinates(node)
    # Moved, or computed with the integers, whose value for what lies outside is one, too.
    moves = node.get("mode", "nearest") == "nearest" and mode != "tf_crop_and_resize"
    if x.quantized and not moves:
        x = g.integers_of(x)
    if node.opset < 11:  # two operands then
        roi, scales = None, roi
    axes = [axis % x.rank for axis in node.get("axes") or range(x.rank)]
    factors, out = _factors(g, node, x, axes, scales, sizes)
    region: list[float] = []
    if mode == "tf_crop_and_resize":
        region = [float(v) for v in g.known(roi, "roi").tolist()]
    used = [
        i for i, axis in enumerate(axes) if out[i] != x.shape[axis] or factors[i] != 1.0 or region
    ]
    plain = _plain_resize(
        g, node, x, [axes[i] for i in used], [factors[i] for i in used], [out[i] for i in used],
        _sizes_asked(g, x, axes, factors, sizes) if g.ranged else {},
    )  # fmt: skip
    if plain is not None:
        return plain
    if any(axes[i] == 0 for i in used) and g.batch[1] is not None:
        raise Refused("it resizes the batch")
    tables = []
    for i in used:
        ends = (region[i], region[len(axes) + i]) if region else (0.0, 1.0)
        tables.append(_table(node, mode, x.shape[axes[i]], out[i], factors[i], ends))
    outside = node.get("extrapolation_value", 0.0) if region else None
    constants = [tuple(Constant(torch.from_numpy(part)) for part in table) for table in tables]
    found = g.call(functions.resize, x, [axes[i] for i in used], constants, outside)
    return moved(found, x) if moves else found


@operator_of("Upsample", quantized=True)
def _upsample(g: Builder, node: NodeView, x: Value, scales: Any = None) -> Any:
    # What Resize was called before opset 10; its scales were an attribute before 9.
    if node.opset < 9:
        scales = Constant(torch.tensor(node.get("scales")))
    return _resize(g, replace(node, opset=10), x, scales)


def _coordinates(node: NodeView) -> str:
    return str(
        node.get(
            "coordinate_transformation_mode", "half_pixel" if node.opset >= 11 else "asymmetric"
        )
    )


def _factors(
    g: Builder, node: NodeView, x: Value, axes: list[int], scales: Any, sizes: Any
) -> tuple[list[float], list[int]]:
    """Scale and output size along each axis."""
    given = None if scales is None else g.known(scales, "scales")
    if given is not None and given.numel():
        factors = [float(v) for v in given.tolist()]
        # As everybody's arithmetic has it: 12 * 0.58333331 is 7 in float32.
        return factors, [
            int(np.float32(x.shape[a]) * np.float32(f)) for a, f in zip(axes, factors, strict=True)
        ]
    if sizes is None:
        raise Refused("it has neither scales nor sizes")
    wanted = [item if isinstance(item, int) else item.example for item in g.sizes(sizes, "sizes")]
    if axes[0] == 0 and g.batch[1] is not None and wanted[0] == g.batch[1]:
        wanted[0] = x.shape[0]  # the batch that the file fixes
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    factors = [n / x.shape[axis] for axis, n in zip(axes, wanted, strict=True)]
    if policy != "stretch":
        factor = min(factors) if policy == "not_larger" else max(factors)
        factors = [factor] * len(axes)
        wanted = [math.floor(x.shape[axis] * factor + 0.5) for axis in axes]
    return factors, wanted


def _sizes_asked(
    g: Builder, x: Value, axes: list[int], factors: list[float], sizes: Any
) -> dict[int, Any]:
    """By axis the size of the result, as it follows from sizes of inputs."""
    if sizes is not None:
        listed = list(sizes.flat) if isinstance(sizes, np.ndarray) else []
        pairs = zip(axes, listed, strict=False)
        return {axis: size for axis, size in pairs if isinstance(size, Size)}
    found: dict[int, Any] = {}
    for axis, factor in zip(axes, factors, strict=True):
        if factor.is_integer():
            found[axis] = g.size(x, axis) * int(factor)
        elif (1 / factor).is_integer():
            found[axis] = g.size(x, axis) // int(1 / factor)
    return found


def _plain_resize(
    g: Builder, node: NodeView, x: Value, axes: list[int], factors: list[float], out: list[int],
    asked: dict[int, Any],
) -> Any:  # fmt: skip
    """One of torch's own functions, where it computes the same.

    Args:
        asked: by axis what the size follows from, where images of other sizes have others.
    """
    if not axes:
        return x
    if x.rank not in (3, 4, 5) or min(axes) < 2 or not x.fake.is_floating_point():
        return None
    if node.get("antialias") or node.get("exclude_outside"):
        return None
    spatial = list(x.shape[2:])
    full = [out[axes.index(a)] if a in axes else x.shape[a] for a in range(2, x.rank)]
    exact = [factors[axes.index(a)] if a in axes else 1.0 for a in range(2, x.rank)]
    if any(n != f * size for n, f, size in zip(full, exact, spatial, strict=True)):
        return None
    kind, how = node.get("mode", "nearest"), _coordinates(node)
    whole = all(f >= 1 and float(f).is_integer() for f in exact)
    if kind == "nearest" and whole:
        rounding = node.get("nearest_mode", "round_prefer_floor")
        floors = how == "asymmetric" and rounding == "floor"
        # Centres of pixels never lie half-way between others where the factor is whole.
        centres = how in ("half_pixel", "half_pixel_symmetric") and rounding.startswith("round")
        if floors or centres:
            factor = [float(f) for f in exact]
            return moved(g.call(F.interpolate, x, scale_factor=factor, mode="nearest"), x)
        return None
    modes = {"linear": {3: "linear", 4: "bilinear"}, "cubic": {4: "bicubic"}}
    name, several = modes.get(kind, {}).get(x.rank), min(full) > 1
    if name is None or (kind == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75):
        return None
    full = [asked.get(axis, n) for axis, n in zip(range(2, x.rank), full, strict=True)]
    if how == "align_corners":
        return g.call(F.interpolate, x, size=full, mode=name, align_corners=True)
    half = how in ("half_pixel", "half_pixel_symmetric")
    if half or (how == "pytorch_half_pixel" and several):
        return g.call(F.interpolate, x, size=full, mode=name, align_corners=False)
    return None


def _table(
    node: NodeView, how: str, size: int, out: int, factor: float, ends: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of an axis make up each of the new ones, and how much of each."""
    # In float32, as ONNX Runtime does: where places are rounded, the last bit decides.
    i, factor = np.arange(out, dtype=np.float32), np.float32(factor)
    length = size * factor
    if how == "half_pixel":
        x = (i + 0.5) / factor - 0.5
    elif how == "half_pixel_symmetric":
        x = size / 2 * (1 - out / length) + (i + 0.5) / factor - 0.5
    elif how == "pytorch_half_pixel":
        x = (i + 0.5) / factor - 0.5 if length > 1 else np.zeros(out)
    elif how == "align_corners":
        x = i * (size - 1) / (length - 1) if length != 1 else np.zeros(out)
    elif how == "asymmetric":
        x = i / factor
    elif how == "tf_crop_and_resize":
        low, high = ends
        x = low * (size - 1) + i * (high - low) * (size - 1) / (length - 1) if length > 1 else (
            np.full(out, 0.5 * (low + high) * (size - 1))
        )  # fmt: skip
    else:
        raise Refused(f"coordinate_transformation_mode {how!r} is not supported")
    outside = (x < 0) | (x > size - 1) if how == "tf_crop_and_resize" else np.zeros(out, bool)
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        places, weights = _nearest(node, x, factor)[:, None], np.ones((out, 1))
    else:
        places, weights = _taps(node, mode, x, factor)
        if node.get("exclude_outside"):
            weights = np.where((places < 0) | (places >= size), 0.0, weights)
            weights /= weights.sum(1, keepdims=True)
    places = np.clip(places, 0, size - 1)
    places[outside] = -1
    if outside.any():
        weights[outside] = 0.0
        weights[outside, 0] = 1.0
    return places.astype(np.int64), weights.astype(np.float32)


def _nearest(node: NodeView, x: np.ndarray, factor: float) -> np.ndarray:
    how = node.get("nearest_mode", "round_prefer_floor" if node.opset >= 11 else "floor")
    rounded: dict[str, Any] = {
        "round_prefer_floor": lambda: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda: np.floor(x + 0.5),
        "floor": lambda: np.floor(x),
        "ceil": lambda: np.ceil(x),
    }
    if node.opset < 11:  # ONNX Runtime's rule; that version says nothing
        how = "ceil" if factor < 1 else "floor"
    return np.asarray(rounded[how]()).astype(np.int64)


def _taps(node: NodeView, mode: str, x: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Elements around a place and their weights; of a wider window where antialiasing shrinks."""
    a = node.get("cubic_coeff_a", -0.75)
    shrink = min(1.0, factor) if node.get("antialias") else 1.0
    reach = 1 if mode == "linear" else 2
    low = np.floor(x)
    span = math.ceil(reach / shrink)
    offsets: Sequence[int] = range(1 - span, span + 1)
    places = low[:, None] + np.array(offsets)
    distance = np.abs(places - x[:, None]) * shrink
    if mode == "linear":
        weights = np.clip(1 - distance, 0, None)
    else:
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    if node.get("antialias"):
        weights /= weights.sum(1, keepdims=True)
    return places.astype(np.int64), weights
