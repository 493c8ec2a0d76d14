"""Rules for what only moves or selects values.

It keeps the grid of its operand, and costs nothing while its result is a view
of it (``views.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.lower import (
    RULES,
    CannotLower,
    Grids,
    Lowering,
    Rule,
    letters_of,
)
from adalayer_native.engine.rules_layers import arguments, clamped
from adalayer_native.engine.views import (
    BATCH,
    Positions,
    Ref,
    Size,
    axes_of,
    built,
    is_scattered,
    merged,
    reshaped,
    with_batch,
    without_batch,
)

# -- views ----------------------------------------------------------------------------------------


def operand_grid(grids: Grids, node: fx.Node) -> Grid | None:
    return grids(node.args[0])


def _same_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    return low.u8(node.args[0], want)


def _same_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    return low.f32(node.args[0], lo, hi)


def _dropout(low: Lowering, node: fx.Node, want: Want) -> Ref:
    if arguments(node)["train"]:
        raise CannotLower(node, "dropout in training mode")
    return low.u8(node.args[0], want)


def _cast(low: Lowering, node: fx.Node, want: Want) -> Ref:
    source, result = (item.meta["val"].dtype for item in (node.args[0], node))  # type: ignore[union-attr]
    if source != result:
        raise CannotLower(node, f"a cast from {source} to {result}")
    return low.u8(node.args[0], want)


for _name in ("alias", "contiguous", "clone", "detach", "lift_fresh_copy"):
    RULES[f"aten.{_name}.default"] = Rule(_same_u8, _same_f32, operand_grid, True, True)
RULES["aten.dropout.default"] = Rule(_dropout, _same_f32, operand_grid, True, True)
RULES["aten.feature_dropout.default"] = Rule(_dropout, _same_f32, operand_grid)
for _name in ("to.dtype", "to.dtype_layout", "_to_copy.default"):
    RULES[f"aten.{_name}"] = Rule(_cast, None, operand_grid, folds=True)


def axis_of(low: Lowering, node: fx.Node, axis: Any, ref: Ref | None = None) -> int:
    """An axis of a node's first operand as an axis of its view; of ``ref``, which may list the
    batch."""
    operand = node.args[0]
    operand = operand[0] if isinstance(operand, (list, tuple)) else operand
    assert isinstance(operand, fx.Node)
    axis = int(axis) % operand.meta["val"].dim()
    if ref is not None and is_scattered(ref.dims):
        if BATCH in ref.dims[axis]:
            raise CannotLower(node, "it works along the batch")
        return axis
    if axis == 0:
        raise CannotLower(node, "it works along the batch")
    # Axes that were merged into the batch are the first of the view.
    return axis if low.exported.folds(operand) > 1 else axis - 1


def viewed(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    """The operand's value under the view that the node makes of it."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    dims = with_batch(ref.dims, low.exported.folds(operand))
    name, rank = str(node.target).split(".")[1], len(dims)
    if name == "permute":
        axes: Any = node.args[1]
        dims = tuple(dims[int(item) % rank] for item in axes)
    elif name in ("transpose", "swapaxes"):
        order = list(range(rank))
        first, second = (int(item) % rank for item in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = second, first
        dims = tuple(dims[item] for item in order)
    else:
        sizes = low.exported.all_sizes(node)
        found = None if sizes is None else reshaped(dims, sizes)
        if found is None:
            raise CannotLower(node, "a reshape that would need a copy")
        dims = found
    return Ref(ref.value, without_batch(dims))


def rule_of_view(
    view: Callable[[Lowering, fx.Node, Ref], Ref], folds: bool = False, scatters: bool = False
) -> Rule:
    """A view, or whatever keeps the grid, that is there in levels and in float32."""

    def u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
        return view(low, node, low.u8(node.args[0], want))

    def f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
        return view(low, node, low.f32(node.args[0], lo, hi))

    return Rule(u8, f32, operand_grid, folds, scatters)


_VIEWS = (
    "view.default", "reshape.default", "flatten.using_ints", "unflatten.int", "squeeze.default",
    "squeeze.dim", "squeeze.dims", "unsqueeze.default", "permute.default", "transpose.int",
    "swapaxes.default", "_unsafe_view.default", "view_as.default",
)  # fmt: skip
VIEWS = frozenset(f"aten.{_name}" for _name in _VIEWS)
for _name in VIEWS:
    RULES[_name] = rule_of_view(viewed, folds=True, scatters=True)


def _split_and_joined(
    node: fx.Node, ref: Ref, split: Sequence[int], order: Sequence[int], joined: Sequence[int]
) -> Ref:
    """A view of a view: axes split, put in another order, and joined."""
    parts = reshaped(ref.dims, split)
    whole = None if parts is None else reshaped(tuple(parts[k] for k in order), joined)
    if whole is None:
        raise CannotLower(node, "its operand's axes are in an order that would need a copy")
    return Ref(ref.value, whole)


def _pixel_shuffled(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    factor = int(node.args[1])  # type: ignore[arg-type]
    sizes = low.sizes(node)
    if len(sizes) != 3:
        raise CannotLower(node, f"a pixel shuffle of {len(sizes) + 1} axes")
    c, h, w = sizes
    split = (c, factor, factor, h // factor, w // factor)
    return _split_and_joined(node, ref, split, (0, 3, 1, 4, 2), sizes)


def _pixel_unshuffled(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    factor = int(node.args[1])  # type: ignore[arg-type]
    sizes = low.sizes(node)
    if len(sizes) != 3:
        raise CannotLower(node, f"a pixel shuffle of {len(sizes) + 1} axes")
    c, h, w = sizes
    split = (c // factor**2, h, factor, w, factor)
    return _split_and_joined(node, ref, split, (0, 2, 4, 1, 3), sizes)


RULES["aten.pixel_shuffle.default"] = rule_of_view(_pixel_shuffled)
RULES["aten.pixel_unshuffle.default"] = rule_of_view(_pixel_unshuffled)


def _channel_shuffled(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    groups = int(node.args[1])  # type: ignore[arg-type]
    c, *rest = low.sizes(node)
    order = (1, 0, *range(2, 2 + len(rest)))
    return _split_and_joined(node, ref, (groups, c // groups, *rest), order, (c, *rest))


RULES["aten.channel_shuffle.default"] = rule_of_view(_channel_shuffled)


# -- slices ---------------------------------------------------------------------------------------


def _outermost(ref: Ref, size: Size, axis: int) -> int:
    """Channels of every part where an axis of the view splits them into equal ones; else 0."""
    c, h, w = size
    atoms = ref.dims[axis]
    if len(atoms) != 1 or atoms[0][0] * atoms[0][1] != c * h * w or atoms[0][1] % (h * w):
        return 0
    parts = atoms[0][1] // (h * w)
    return parts if parts > 1 else 0


def sliced(
    low: Lowering, node: fx.Node, ref: Ref, axis: int, begin: int, step: int, count: int
) -> Ref:
    """Every ``step``-th of ``count`` elements along one axis of the view."""
    size = low.size(ref)
    axes = axes_of(ref.dims, size)
    if (begin, step, count) == (0, 1, math.prod(n for n, _ in ref.dims[axis])):
        return ref
    if low.value(ref).grid is None:
        places = {axis: begin + step * np.arange(count)}
        return low.arranged(ref, low.name(node), letters_of(ref.dims, size), places)
    outermost = _outermost(ref, size, axis)
    if outermost and step == 1:
        wide = outermost * count
        number = low.program.node(
            "slice", low.name(node), [ref.value], (wide, *size[1:]), low.value(ref).grid,
            axis=0, begin=begin * outermost, step=1,
        )  # fmt: skip
        parts = merged([(count, ref.dims[axis][0][1])])
        return Ref(number, (*ref.dims[:axis], parts, *ref.dims[axis + 1 :]))
    if axes is None or axes[axis] not in ("c", "h", "w"):
        return low.arranged(
            ref,
            low.name(node),
            letters_of(ref.dims, size),
            {axis: begin + step * np.arange(count)},
        )
    name = axes[axis]
    position = "chw".index(name)
    cut = list(size)
    cut[position] = count
    new: Size = (cut[0], cut[1], cut[2])
    number = low.program.node(
        "slice",
        low.name(node),
        [ref.value],
        new,
        low.value(ref).grid,
        axis=position,
        begin=begin,
        step=step,
    )
    return Ref(number, built(axes, new))


def _slice(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    a = arguments(node)
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    value = operand.meta["val"]
    axis = int(a["dim"]) % value.dim()
    if axis == 0 and a["start"] in (None, 0) and node.meta["val"].shape[0] == value.shape[0]:
        return ref
    place = axis_of(low, node, axis)
    n = int(value.shape[axis])
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        raise CannotLower(node, "a slice with computed bounds")
    begin, _, step = slice(a["start"], a["end"], a["step"]).indices(n)
    count = int(node.meta["val"].shape[axis])
    return sliced(low, node, ref, place, begin, step, count)


RULES["aten.slice.Tensor"] = rule_of_view(_slice, folds=True)


def _narrow(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    a = arguments(node)
    axis = axis_of(low, node, a["dim"])
    return sliced(low, node, ref, axis, int(a["start"]), 1, int(a["length"]))


RULES["aten.narrow.default"] = rule_of_view(_narrow, folds=True)


def _taken(low: Lowering, node: fx.Node, ref: Ref, axis: int, index: int) -> Ref:
    """One element along an axis, which disappears."""
    one = sliced(low, node, ref, axis, index, 1, 1)
    return Ref(one.value, without_batch(one.dims[:axis] + one.dims[axis + 1 :]))


def _select(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    a = arguments(node)
    axis = axis_of(low, node, a["dim"], ref)
    count = math.prod(n for n, _ in ref.dims[axis])
    return _taken(low, node, ref, axis, int(a["index"]) % count)


RULES["aten.select.int"] = rule_of_view(_select, folds=True, scatters=True)


def only_pieces(low: Lowering, node: fx.Node, want: Want) -> Ref:
    raise CannotLower(node, "its pieces are only known one by one")


def _getitem(low: Lowering, node: fx.Node, want: Want | None) -> Ref:
    """One of several pieces, on a grid or in float32."""
    source, index = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(index, int)
    rule = RULES.get(str(source.target))
    if rule is None or rule.u8 is not only_pieces:
        raise CannotLower(source, "the engine has no such operation")
    operand = source.args[0]
    assert isinstance(operand, fx.Node)
    if rule.piece is not None:
        if want is None:
            raise CannotLower(source, "its result is wanted in float32")
        return rule.piece(low, node, want)
    pieces: Sequence[Tensor] = source.meta["val"]
    index = index % len(pieces)
    dim = int(arguments(source)["dim"])
    ref = low.f32(operand) if want is None else low.u8(operand, want)
    axis = axis_of(low, source, dim, ref)
    if str(source.target) == "aten.unbind.int":
        return _taken(low, node, ref, axis, index)
    widths = [int(piece.shape[dim]) for piece in pieces]
    return sliced(low, node, ref, axis, sum(widths[:index]), 1, widths[index])


def _getitem_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    return clamped(low, node, _getitem(low, node, None), lo, hi)


for _name in ("chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int"):
    RULES[f"aten.{_name}"] = Rule(only_pieces, None, operand_grid, True, True)
RULES["getitem"] = Rule(_getitem, _getitem_f32, operand_grid, True, True)


# -- any positions along axes ---------------------------------------------------------------------


def _moved(positions: Callable[[Lowering, fx.Node, list[int]], dict[int, Positions]]) -> Rule:
    """The positions that an operator takes along each axis of its operand's view."""

    def moved(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        picked = positions(low, node, list(low.sizes(operand)))
        return low.arranged(ref, low.name(node), letters_of(ref.dims, low.size(ref)), picked)

    return rule_of_view(moved, folds=True)


def _flipped(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
    axes = [axis_of(low, node, item) for item in node.args[1]]  # type: ignore[union-attr]
    return {axis: np.arange(sizes[axis])[::-1] for axis in axes}


def _rolled(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
    a = arguments(node)
    if not a["dims"]:
        raise CannotLower(node, "it rolls the whole tensor")
    found: dict[int, Positions] = {}
    for item, shift in zip(a["dims"], a["shifts"], strict=True):
        axis = axis_of(low, node, item)
        found[axis] = np.roll(found.get(axis, np.arange(sizes[axis])), int(shift))
    return found


def _selected(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
    a = arguments(node)
    index = low.parameter(a["index"])
    if index is None:
        raise CannotLower(node, "its index is computed by the graph")
    axis = axis_of(low, node, a["dim"])
    return {axis: index.reshape(-1).numpy() % sizes[axis]}


def _repeated(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
    """Heads of keys that several heads of queries share: what has one of something has more."""
    a, operand = arguments(node), node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = operand.meta["val"].shape, node.meta["val"].shape
    if "repeats" in a and not isinstance(a["repeats"], (list, tuple)):  # repeat_interleave
        if a["dim"] is None:
            raise CannotLower(node, "it repeats elements of the whole tensor")
        axis = axis_of(low, node, a["dim"])
        return {axis: np.arange(sizes[axis]).repeat(int(a["repeats"]))}
    if len(before) != len(after) or str(before[0]) != str(after[0]):
        raise CannotLower(node, "it repeats the whole tensor")
    first = len(sizes) - len(before) + 1
    counts = {k: int(after[k]) // int(before[k]) for k in range(1, len(before))}
    return {
        first + k - 1: np.tile(np.arange(int(before[k])), count)
        for k, count in counts.items()
        if count != 1
    }


_BORDERS = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # torch, numpy


def _bordered(
    node: fx.Node, amounts: Sequence[int], mode: str, sizes: list[int]
) -> dict[int, Positions]:
    """Amounts in front of and behind the last axis, the one before it, and so on."""
    found: dict[int, Positions] = {}
    for k in range(len(amounts) // 2):
        axis, pair = len(sizes) - 1 - k, tuple(amounts[2 * k : 2 * k + 2])
        if axis < 0 or min(pair) < 0:
            raise CannotLower(node, f"{mode} padding of {list(amounts)}")
        if any(pair):
            found[axis] = np.pad(np.arange(sizes[axis]), pair, mode=_BORDERS[mode])  # type: ignore[call-overload]
    return found


def bordered(low: Lowering, node: fx.Node, want: Want) -> Ref:
    """Padding with values of the image: ``F.pad`` in a mode that is not constant."""
    mode = str(arguments(node)["mode"])

    def positions(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
        return _bordered(node, [int(n) for n in arguments(node)["pad"]], mode, sizes)

    return _moved(positions).u8(low, node, want)


def _border(mode: str) -> Rule:
    def positions(low: Lowering, node: fx.Node, sizes: list[int]) -> dict[int, Positions]:
        return _bordered(node, [int(n) for n in arguments(node)["padding"]], mode, sizes)

    return _moved(positions)


RULES["aten.flip.default"] = _moved(_flipped)
RULES["aten.roll.default"] = _moved(_rolled)
RULES["aten.index_select.default"] = _moved(_selected)
for _name in (
    "expand.default", "expand_as.default", "repeat.default", "tile.default",
    "repeat_interleave.self_int",
):  # fmt: skip
    RULES[f"aten.{_name}"] = _moved(_repeated)
for _axes in (1, 2):
    RULES[f"aten.reflection_pad{_axes}d.default"] = _border("reflect")
    RULES[f"aten.replication_pad{_axes}d.default"] = _border("replicate")
