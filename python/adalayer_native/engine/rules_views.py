"""Rules for what only moves or selects values.

It keeps the grid of its operand, and costs nothing while its result is a view
of it (``views.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.lower import RULES, CannotLower, Grids, Lowering, Rule
from adalayer_native.engine.rules_layers import arguments
from adalayer_native.engine.views import (
    Ref,
    Size,
    axes_of,
    built,
    reshaped,
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
    RULES[f"aten.{_name}.default"] = Rule(_same_u8, _same_f32, operand_grid)
RULES["aten.dropout.default"] = Rule(_dropout, _same_f32, operand_grid)
RULES["aten.feature_dropout.default"] = Rule(_dropout, _same_f32, operand_grid)
for _name in ("to.dtype", "to.dtype_layout", "_to_copy.default"):
    RULES[f"aten.{_name}"] = Rule(_cast, None, operand_grid)


def axis_of(node: fx.Node, axis: int, rank: int) -> int:
    """An axis of a tensor counted without the batch."""
    axis = axis + rank if axis < 0 else axis
    if axis == 0:
        raise CannotLower(node, "it works along the batch")
    return axis - 1


def _viewed(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    """The operand's value under the view that the node makes of it."""
    name = str(node.target).split(".")[1]
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    rank = operand.meta["val"].dim()
    if name == "permute":
        order = [item % rank for item in node.args[1]]  # type: ignore[union-attr]
        if order[0] != 0:
            raise CannotLower(node, "it moves the batch")
        return Ref(ref.value, tuple(ref.dims[item - 1] for item in order[1:]))
    if name in ("transpose", "swapaxes"):
        first, second = (axis_of(node, item, rank) for item in node.args[1:3])  # type: ignore[arg-type]
        dims = list(ref.dims)
        dims[first], dims[second] = dims[second], dims[first]
        return Ref(ref.value, tuple(dims))
    dims = reshaped(ref.dims, low.sizes(node))  # type: ignore[assignment]
    if dims is None:
        raise CannotLower(node, "a reshape that would need a copy")
    return Ref(ref.value, dims)  # type: ignore[arg-type]


def _view_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    return _viewed(low, node, low.u8(node.args[0], want))


def _view_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    return _viewed(low, node, low.f32(node.args[0], lo, hi))


_VIEWS = (
    "view.default", "reshape.default", "flatten.using_ints", "unflatten.int", "squeeze.default",
    "squeeze.dim", "squeeze.dims", "unsqueeze.default", "permute.default", "transpose.int",
    "swapaxes.default", "_unsafe_view.default", "view_as.default",
)  # fmt: skip
for _name in _VIEWS:
    RULES[f"aten.{_name}"] = Rule(_view_u8, _view_f32, operand_grid)


def _shuffle_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    ref = low.u8(node.args[0], want)
    groups = int(node.args[1])  # type: ignore[arg-type]
    c, h, w = low.sizes(node)
    split = reshaped(ref.dims, [groups, c // groups, h, w])
    if split is None:
        raise CannotLower(node, "a shuffle of channels that are not contiguous")
    first, second, *rest = split
    return Ref(ref.value, reshaped((second, first, *rest), [c, h, w]) or ref.dims)


RULES["aten.channel_shuffle.default"] = Rule(_shuffle_u8, None, operand_grid)


# -- slices ---------------------------------------------------------------------------------------


def _sliced(
    low: Lowering, node: fx.Node, ref: Ref, axis: int, begin: int, step: int, count: int
) -> Ref:
    """Every ``step``-th of ``count`` elements along one axis of the view."""
    size = low.size(ref)
    axes = axes_of(ref.dims, size)
    if axes is None or axes[axis] not in ("c", "h", "w"):
        ref = low.plain(ref, low.name(node, "reorder"))
        size = low.size(ref)
        axes = axes_of(ref.dims, size)
    if axes is None or len(axes[axis]) > 1:
        raise CannotLower(node, "a slice along an axis that is not channels, height or width")
    if axes[axis] == "":  # one element, and all of it is kept
        return ref
    name = axes[axis]
    position = "chw".index(name)
    if (begin, step, count) == (0, 1, size[position]):
        return ref
    cut = list(size)
    cut[position] = count
    new: Size = (cut[0], cut[1], cut[2])
    number = low.program.node(
        "slice",
        low.name(node),
        [ref.value],
        new,
        low.value(ref).grid,
        ints=[position, begin, step],
    )
    return Ref(number, built(axes, new))


def _slice(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    ref = low.u8(node.args[0], want)
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    value = operand.meta["val"]
    axis = int(a["dim"]) % value.dim()
    if axis == 0:
        if a["start"] in (None, 0) and node.meta["val"].shape[0] == value.shape[0]:
            return ref
        raise CannotLower(node, "a slice of the batch")
    n = int(value.shape[axis])
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        raise CannotLower(node, "a slice with computed bounds")
    begin, _, step = slice(a["start"], a["end"], a["step"]).indices(n)
    return _sliced(low, node, ref, axis - 1, begin, step, int(node.meta["val"].shape[axis]))


RULES["aten.slice.Tensor"] = Rule(_slice, None, operand_grid)


def _narrow(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    axis = axis_of(node, int(a["dim"]), operand.meta["val"].dim())
    return _sliced(low, node, low.u8(operand, want), axis, int(a["start"]), 1, int(a["length"]))


RULES["aten.narrow.default"] = Rule(_narrow, None, operand_grid)


def _taken(low: Lowering, node: fx.Node, ref: Ref, axis: int, index: int) -> Ref:
    """One element along an axis, which disappears."""
    one = _sliced(low, node, ref, axis, index, 1, 1)
    return Ref(one.value, one.dims[:axis] + one.dims[axis + 1 :])


def _select(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    axis = axis_of(node, int(a["dim"]), operand.meta["val"].dim())
    index = int(a["index"]) % int(operand.meta["val"].shape[axis + 1])
    return _taken(low, node, low.u8(operand, want), axis, index)


RULES["aten.select.int"] = Rule(_select, None, operand_grid)


def _pieces(low: Lowering, node: fx.Node, want: Want) -> Ref:
    raise CannotLower(node, "its pieces are only known one by one")


def _getitem(low: Lowering, node: fx.Node, want: Want) -> Ref:
    source, index = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(index, int)
    rule = RULES.get(str(source.target))
    if rule is None or rule.u8 is not _pieces:
        raise CannotLower(source, "the engine has no such operation")
    operand = source.args[0]
    assert isinstance(operand, fx.Node)
    pieces: Sequence[Tensor] = source.meta["val"]
    index = index % len(pieces)
    a = arguments(source)
    axis = axis_of(source, int(a["dim"]), operand.meta["val"].dim())
    ref = low.u8(operand, want)
    if str(source.target) == "aten.unbind.int":
        return _taken(low, node, ref, axis, index)
    widths = [int(piece.shape[axis + 1]) for piece in pieces]
    return _sliced(low, node, ref, axis, sum(widths[:index]), 1, widths[index])


for _name in ("chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int"):
    RULES[f"aten.{_name}"] = Rule(_pieces, None, operand_grid)
RULES["getitem"] = Rule(_getitem, None, operand_grid)
