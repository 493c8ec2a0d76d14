"""Operators that move elements: shapes, axes, slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from adalayer_native.onnx import functions
from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.pointwise import as_sizes
from adalayer_native.onnx.values import Constant, Integers, Size, Value

__all__ = ["moved", "transposed"]


def moved(result: Any, x: Any) -> Any:
    """A result that holds elements of ``x`` alone lies on the same grid."""
    if isinstance(x, Value) and isinstance(result, Value):
        result.kind = x.kind
        return result.on(x.grid, x.quantized)
    if isinstance(x, Value) and isinstance(result, tuple):
        return tuple(moved(item, x) for item in result)
    return result


@operator_of("Constant")
def _constant(g: Builder, node: NodeView) -> Any:
    for name, value in node.attributes.items():
        if isinstance(value, Constant):
            return value
        if name in ("value_float", "value_floats"):
            return Constant(torch.tensor(value, dtype=torch.float32))
        if name in ("value_int", "value_ints"):
            return Constant(torch.tensor(value, dtype=torch.int64))
    raise Refused(f"a constant of {', '.join(node.attributes) or 'nothing'} is not supported")


@operator_of("Shape", quantized=True)
def _shape(g: Builder, node: NodeView, x: Any) -> Any:
    if isinstance(x, Value):
        found: list[Any] = [g.size(x, axis) for axis in range(x.rank)]
    else:
        found = list(x.shape)
    part = found[slice(node.get("start", 0), node.get("end"))]
    result = np.empty(len(part), dtype=object)
    result[:] = part
    return result


@operator_of("Size", quantized=True)
def _size(g: Builder, node: NodeView, x: Any) -> Any:
    total = math.prod(_shape(g, NodeView("Shape", "", node.opset, {}, []), x).tolist())
    result = np.empty((), dtype=object)
    result[()] = total
    return result


@operator_of("ConstantOfShape")
def _constant_of_shape(g: Builder, node: NodeView, shape: Any) -> Any:
    value = node.get("value")
    fill = torch.zeros(1) if value is None else value.tensor
    return g.call(torch.full, g.sizes(shape, "shape"), fill.item(), dtype=fill.dtype)


@operator_of("Range")
def _range(g: Builder, node: NodeView, start: Any, limit: Any, delta: Any) -> Any:
    ends = []
    dtype = torch.int64
    for item in (start, limit, delta):
        if isinstance(item, np.ndarray):
            ends.append(item.item())
        else:
            ends.append(g.known(item, "range").item())
            dtype = g.known(item, "range").dtype
    return g.call(torch.arange, *ends, dtype=dtype)


@operator_of("Reshape", quantized=True)
def _reshape(g: Builder, node: NodeView, x: Any, shape: Any) -> Any:
    wanted = g.sizes(shape, "shape")
    if isinstance(x, np.ndarray):
        return x.reshape([int(n) for n in wanted])
    if not node.get("allowzero"):
        wanted = [
            (g.size(x, axis) if isinstance(x, Value) else x.shape[axis])
            if isinstance(n, int) and n == 0
            else n
            for axis, n in enumerate(wanted)
        ]
    if isinstance(x, Value):
        wanted = _for_batch(g, x, wanted)
    result = moved(g.call(torch.reshape, x, wanted), x)
    if isinstance(x, Value) and wanted == [-1]:
        result.flat_of = x
    return result


def _for_batch(g: Builder, x: Value, wanted: list[Any]) -> list[Any]:
    """Sizes for any batch, where the file has them for the one that it fixes.

    What an exporter wrote for a batch of 1, ``[1, -1]``, would make one row of all samples.
    """
    batch, fixed = g.batch
    if fixed is None or not wanted or not isinstance(wanted[0], int) or x.shape[:1] != (batch,):
        return wanted
    first, rest = wanted[0], wanted[1:]
    per_sample = math.prod(x.shape[1:])
    sizes = [item.example if isinstance(item, Size) else item for item in rest]
    known = math.prod(n for n in sizes if n != -1)
    share, left = divmod(first, fixed)
    if first <= 0 or left:
        return wanted
    fits = per_sample % (share * known) == 0 if -1 in sizes else per_sample == share * known
    return [g.size(x, 0) * share, *rest] if fits else wanted


@operator_of("Flatten", quantized=True)
def _flatten(g: Builder, node: NodeView, x: Any) -> Any:
    axis = node.get("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1 and x.rank >= 2:
        return moved(g.call(torch.flatten, x, 1), x)
    if axis == 0:
        return moved(g.call(torch.reshape, x, [1, -1]), x)
    if axis == x.rank:
        return moved(g.call(torch.reshape, x, [-1, 1]), x)
    return moved(g.call(torch.flatten, g.call(torch.flatten, x, axis), 0, axis - 1), x)


@operator_of("Transpose", quantized=True)
def _transpose(g: Builder, node: NodeView, x: Any) -> Any:
    return transposed(g, x, node.get("perm") or list(reversed(range(x.rank))))


def transposed(g: Builder, x: Any, order: list[int]) -> Any:
    """A value with its axes in another order; of a constant its integers, too."""
    result = moved(g.call(torch.permute, x, order), x)
    if isinstance(x, Constant):
        result.name, result.kind = x.name, x.kind
        if x.integers is not None:
            old = x.integers
            axis = None if old.axis is None else order.index(old.axis)
            levels = old.levels if old.why_not else old.levels.permute(order)
            result.integers = Integers(levels, old.scale, axis, old.kind, old.why_not)
    return result


def _axes(g: Builder, node: NodeView, axes: Any) -> list[int] | None:
    if axes is not None:
        return [int(n) for n in g.known(axes, "axes").flatten().tolist()]
    found = node.get("axes")
    return None if found is None else list(found)


@operator_of("Squeeze", quantized=True)
def _squeeze(g: Builder, node: NodeView, x: Any, axes: Any = None) -> Any:
    along = _axes(g, node, axes)
    if isinstance(x, np.ndarray):
        return np.asarray(x.reshape(()) if along in ([0], [-1], None) else x, dtype=object)
    if along is None:
        along = [axis for axis, size in enumerate(x.shape) if size == 1]
    wrong = [axis for axis in along if x.shape[axis] != 1]
    if wrong:
        raise Refused(
            f"axis {wrong[0]} has size {x.shape[wrong[0]]}, expected 1 (a batch is free here, also "
            "where the file fixes it)"
        )
    return moved(g.call(torch.squeeze, x, tuple(along)), x)


@operator_of("Unsqueeze", quantized=True)
def _unsqueeze(g: Builder, node: NodeView, x: Any, axes: Any = None) -> Any:
    along = _axes(g, node, axes) or []
    if isinstance(x, np.ndarray):
        return np.expand_dims(x, tuple(along))
    rank = x.rank + len(along)
    found = x
    for axis in sorted(axis % rank for axis in along):
        found = moved(g.call(torch.unsqueeze, found, axis), found)
    return found


@operator_of("Concat", quantized=True)
def _concat(g: Builder, node: NodeView, *parts: Any) -> Any:
    axis = node.get("axis")
    lists = [as_sizes(part) for part in parts]
    if any(isinstance(part, np.ndarray) for part in parts) and all(p is not None for p in lists):
        return np.concatenate([np.atleast_1d(p) for p in lists])  # type: ignore[arg-type]
    values = [g.tensor(part) if isinstance(part, np.ndarray) else part for part in parts]
    values = _for_every_sample(g, axis, values)
    first = values[0]
    alike = all(
        isinstance(v, Value) and v.grid == getattr(first, "grid", None)
        and v.quantized == getattr(first, "quantized", False)
        for v in values
    )  # fmt: skip
    if alike:
        return moved(g.call(torch.cat, values, axis), first)
    plain = [g.integers_of(v) if isinstance(v, Value) and v.quantized else v for v in values]
    return g.call(torch.cat, plain, axis)


def _for_every_sample(g: Builder, axis: int, values: list[Any]) -> list[Any]:
    """Constants of the file's batch of one sample, beside what has another batch: for all of it."""
    batch, fixed = g.batch
    whole = next((v for v in values if isinstance(v, Value) and v.shape[:1] == (batch,)), None)
    if fixed != 1 or whole is None or axis % whole.rank == 0:
        return values
    return [
        g.call(torch.Tensor.expand, v, [g.size(whole, 0), *[-1] * (v.rank - 1)])
        if isinstance(v, Constant) and v.rank == whole.rank and v.shape[0] == 1
        else v
        for v in values
    ]


@operator_of("Split", quantized=True)
def _split(g: Builder, node: NodeView, x: Any, split: Any = None) -> Any:
    axis = node.get("axis", 0)
    count = node.get("num_outputs", len(node.outputs))
    sizes = node.get("split") if split is None else g.sizes(split, "sizes")
    if isinstance(x, np.ndarray):
        places = np.cumsum(sizes)[:-1] if sizes else count
        return tuple(np.split(x, places))
    if not sizes:
        piece = -(-x.shape[axis] // count)
        sizes = [min(piece, x.shape[axis] - i * piece) for i in range(count)]
    pieces = [n if isinstance(n, Size) else int(n) for n in sizes]
    return moved(g.call(torch.split, x, pieces, axis), x)


@operator_of("Slice", quantized=True)
def _slice(
    g: Builder, node: NodeView, x: Any, starts: Any = None, ends: Any = None, axes: Any = None,
    steps: Any = None,
) -> Any:  # fmt: skip
    if node.opset < 10:  # attributes then
        starts, ends, axes = (
            None if node.get(key) is None else Constant(torch.tensor(node.get(key)))
            for key in ("starts", "ends", "axes")
        )
    begin, end = g.sizes(starts, "starts"), g.sizes(ends, "ends")
    along = list(range(len(begin))) if axes is None else g.sizes(axes, "axes")
    by = [1] * len(begin) if steps is None else g.sizes(steps, "steps")
    if isinstance(x, np.ndarray):
        (low,), (high,), (step,) = begin, end, by
        return x[slice(int(low), int(high), int(step))]
    found = x
    for low, high, axis, step in zip(begin, end, along, by, strict=True):
        found = moved(_sliced(g, found, low, high, int(axis) % x.rank, int(step)), found)
    return found


def _sliced(g: Builder, x: Any, low: Any, high: Any, axis: int, step: int) -> Any:
    if step < 0:
        size = x.shape[axis]
        places = range(*slice(int(low), int(high) if high >= -size else None, step).indices(size))
        return g.call(torch.index_select, x, axis, Constant(torch.tensor(list(places))))
    if isinstance(high, int) and high > 2**62:
        high = 2**63 - 1
    return g.call(torch.ops.aten.slice.Tensor, x, axis, low, high, step)


@operator_of("Gather", quantized=True)
def _gather(g: Builder, node: NodeView, x: Any, indices: Any) -> Any:
    axis = node.get("axis", 0)
    if isinstance(x, np.ndarray):
        chosen = as_sizes(indices)
        if chosen is not None:
            return np.asarray(x.take(chosen.astype(np.int64)), dtype=object)
        x = g.tensor(x)
    axis %= x.rank
    indices = g.tensor(indices) if isinstance(indices, np.ndarray) else indices
    if isinstance(indices, Value):
        if isinstance(x, Constant) and axis == 0 and x.rank == 2:
            return g.call(torch.nn.functional.embedding, indices, x)
        flat = g.call(torch.index_select, x, axis, g.call(torch.flatten, indices))
        shape = [*_sizes(g, x)[:axis], *_sizes(g, indices), *_sizes(g, x)[axis + 1 :]]
        return moved(g.call(torch.reshape, flat, shape), x)
    places: torch.Tensor = indices.tensor
    if isinstance(x, Value) and x.flat_of is not None:
        again = _unflattened(g, x.flat_of, places)
        if again is not None:
            return again
    size = x.shape[axis]
    places = torch.where(places < 0, places + size, places)
    if bool(((places < 0) | (places >= size)).any()):
        raise Refused(f"index {int(indices.tensor.flatten()[0])} of an axis of {size} elements")
    if places.dim() == 0:
        return moved(g.call(torch.select, x, axis, int(places)), x)
    flat = g.call(torch.index_select, x, axis, Constant(places.flatten(), indices.name))
    if places.dim() == 1:
        return moved(flat, x)
    return moved(g.call(torch.Tensor.unflatten, flat, axis, tuple(places.shape)), x)


def _unflattened(g: Builder, x: Value, places: torch.Tensor) -> Any:
    """Elements in their order and another shape, as torch's exporter writes a strided view.

    It numbers them for the batch that the file fixes.
    """
    batch, fixed = g.batch
    if fixed is None or x.shape[:1] != (batch,) or places.dim() < 2 or places.shape[0] != fixed:
        return None
    count = fixed * math.prod(x.shape[1:])
    if places.numel() != count or not torch.equal(places.flatten(), torch.arange(count)):
        return None
    return moved(g.call(torch.reshape, x, [g.size(x, 0), *places.shape[1:]]), x)


def _sizes(g: Builder, x: Any) -> list[Any]:
    return [g.size(x, axis) for axis in range(x.rank)] if isinstance(x, Value) else list(x.shape)


@operator_of("GatherElements", quantized=True)
def _gather_elements(g: Builder, node: NodeView, x: Any, indices: Any) -> Any:
    axis = node.get("axis", 0)
    if isinstance(indices, Constant):
        size = x.shape[axis]
        places = indices.tensor.long()
        indices = Constant(torch.where(places < 0, places + size, places), indices.name)
    return moved(g.call(torch.gather, x, axis, indices), x)


@operator_of("Expand", quantized=True)
def _expand(g: Builder, node: NodeView, x: Any, shape: Any) -> Any:
    wanted = g.sizes(shape, "shape")
    lead = len(wanted) - x.rank
    sizes = [1] * -lead + wanted if lead < 0 else wanted
    own = [1] * max(0, lead) + list(x.shape)
    target = [
        -1 if isinstance(n, int) and n == 1 and axis >= lead else n for axis, n in enumerate(sizes)
    ]
    if lead > 0:
        x_full = moved(g.call(torch.reshape, x, [1] * lead + _sizes(g, x)), x)
    else:
        x_full = x
    target = [1 if n == -1 and size == 1 else n for n, size in zip(target, own, strict=True)]
    return moved(g.call(torch.Tensor.expand, x_full, target), x)


@operator_of("Tile", quantized=True)
def _tile(g: Builder, node: NodeView, x: Any, repeats: Any) -> Any:
    return moved(g.call(torch.tile, x, g.sizes(repeats, "repeats")), x)


@operator_of("DepthToSpace", quantized=True)
def _depth_to_space(g: Builder, node: NodeView, x: Value) -> Any:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return moved(g.call(torch.pixel_shuffle, x, block), x)
    n, _, h, w = _sizes(g, x)
    depth = x.shape[1] // block**2
    parts = g.call(torch.reshape, x, [n, block, block, depth, h, w])
    parts = g.call(torch.permute, parts, [0, 3, 4, 1, 5, 2])
    return moved(g.call(torch.reshape, parts, [n, depth, h * block, w * block]), x)


@operator_of("SpaceToDepth", quantized=True)
def _space_to_depth(g: Builder, node: NodeView, x: Value) -> Any:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return moved(g.call(torch.pixel_unshuffle, x, block), x)
    n, _, h, w = _sizes(g, x)
    parts = g.call(torch.reshape, x, [n, x.shape[1], h // block, block, w // block, block])
    parts = g.call(torch.permute, parts, [0, 3, 5, 1, 2, 4])
    return moved(g.call(torch.reshape, parts, [n, -1, h // block, w // block]), x)


@operator_of("Pad", quantized=True)
def _pad(
    g: Builder, node: NodeView, x: Value, pads: Any = None, value: Any = None, axes: Any = None
) -> Any:
    mode = node.get("mode", "constant")
    amounts = [int(n) for n in (node.get("pads") if pads is None else g.sizes(pads, "pads"))]
    fill = node.get("value", 0.0) if value is None else g.known(value, "value").item()
    if axes is not None:
        along = [int(n) % x.rank for n in g.sizes(axes, "axes")]
        full = [0] * (2 * x.rank)
        for place, axis in enumerate(along):
            full[axis], full[x.rank + axis] = amounts[place], amounts[len(along) + place]
        amounts = full
    if x.quantized and mode == "constant":
        # The file's fill is an integer; the graph's values are real numbers.
        assert x.grid is not None
        fill = (fill - x.grid.lowest - x.grid.zero_point) * x.grid.scale
    elif mode == "constant" and fill != 0 and x.grid is not None:
        x = x.on(None)
    if not any(amounts):
        return x
    return moved(g.call(functions.pad, x, amounts, mode, fill), x)


@operator_of("TopK")
def _topk(g: Builder, node: NodeView, x: Value, count: Any = None) -> Any:
    (k,) = [node.get("k")] if node.opset < 10 else g.sizes(count, "k")
    return g.call(functions.top_k, x, k, node.get("axis", -1), bool(node.get("largest", 1)))


@operator_of("Einsum")
def _einsum(g: Builder, node: NodeView, *operands: Any) -> Any:
    return g.call(torch.einsum, node.get("equation"), *operands)


@operator_of("Trilu")
def _trilu(g: Builder, node: NodeView, x: Any, k: Any = None) -> Any:
    diagonal = 0 if k is None else int(g.known(k, "k"))
    return g.call(torch.triu if node.get("upper", 1) else torch.tril, x, diagonal)
