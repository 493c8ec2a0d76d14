"""Rules for images: concatenation, padding, pooling and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from adalayer_native import ops
from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.lower import RULES, CannotLower, Grids, Lowering, Rule
from adalayer_native.engine.rules_layers import arguments, clamped
from adalayer_native.engine.rules_views import (
    axis_of,
    bordered,
    only_pieces,
    operand_grid,
    rule_of_view,
)
from adalayer_native.engine.views import (
    Dims,
    Ref,
    Size,
    arranged_as,
    axes_of,
    built,
    image_dims,
)
from adalayer_native.operations import geometry
from adalayer_native.ops.resizing import linear_tables, nearest_tables

# -- concatenation and padding --------------------------------------------------------------------


def _axes_to_join(dims: Dims, size: Size, place: int) -> list[str] | None:
    """Axes of a value that the axes of its view are, the one at ``place`` alone; None if not so."""
    axes = axes_of(dims, size)
    if axes is None or len(axes[place]) > 1:
        return None
    if not axes[place]:  # any axis of size 1
        spare = [axis for axis in "chw" if axis not in "".join(axes)]
        axes[place] = spare[0] if spare else ""
    return axes if axes[place] else None


def _copied_axes(rank: int, place: int) -> str:
    """Axes of copies for tensors whose views have nothing in common; that at ``place`` is alone."""
    if rank <= 3:
        return "chw" if rank == 3 else "hc"[-rank:]
    axes = ["w"] * (rank - 1) + ["c"]
    if place < rank - 1:
        axes[place] = "h"
    return "".join(axes)


Form = Callable[[int], tuple[Size, Dims]]
"""Size and view of a value with so many elements along the axis that grows."""


def _form_of(axes: list[str], size: Size, place: int) -> Form:
    """Values that lie as one whose axes are these."""

    def form(count: int) -> tuple[Size, Dims]:
        c, h, w = (
            count if letter == axes[place] else n for letter, n in zip("chw", size, strict=True)
        )
        return (c, h, w), built(axes, (c, h, w))

    return form


def _form_of_copies(letters: str, sizes: Sequence[int], place: int) -> Form:
    """Copies whose axes are at these letters."""
    return lambda count: arranged_as(letters, [*sizes[:place], count, *sizes[place + 1 :]])


def joined(
    low: Lowering,
    node: fx.Node,
    items: Sequence[Any],
    refs: dict[int, Ref],
    place: int,
    want: Want | None,
) -> Ref:
    """Values and constants along one axis of their views.

    Args:
        items: operands.
        refs: those of them that are computed, by position, on the wanted grid, or in float32.
        place: number of the axis.
    """
    largest = max(refs.values(), key=lambda ref: math.prod(low.size(ref)))
    sizes = [math.prod(n for n, _ in atoms) for atoms in largest.dims]
    if any(len(ref.dims) != len(sizes) for ref in refs.values()):
        raise CannotLower(node, "its operands differ in their number of axes")

    def fits(ref: Ref, form: Form) -> bool:
        return (low.size(ref), ref.dims) == form(math.prod(n for n, _ in ref.dims[place]))

    axes = _axes_to_join(largest.dims, low.size(largest), place)
    letters = _copied_axes(len(sizes), place)
    if axes is None or (
        any(len(name) > 1 for name in axes)
        and not all(fits(ref, _form_of(axes, low.size(largest), place)) for ref in refs.values())
    ):
        form, letter = _form_of_copies(letters, sizes, place), letters[place]
    else:
        letters = "".join(name or "w" for name in axes)  # axes of size 1 are anywhere
        form, letter = _form_of(axes, low.size(largest), place), axes[place]
    for position, ref in refs.items():
        if not fits(ref, form):
            refs[position] = low.arranged(ref, low.name(node, "reorder"), letters)
    for position, item in enumerate(items):
        constant = None if position in refs else low.parameter(item)
        if constant is not None:
            like = form(int(constant.shape[place + 1]))
            if math.prod(like[0]) != constant.numel():
                raise CannotLower(node, f"a constant of {list(constant.shape)} among its operands")
            refs[position] = low.held(item, constant, want, like)
    parts = [refs[position] for position in range(len(items))]
    along = "chw".index(letter)
    size, dims = form(sum(low.size(ref)[along] for ref in parts))
    number = low.program.node(
        "join" if along else "concat",
        low.name(node),
        [ref.value for ref in parts],
        size,
        None if want is None else want.grid,
        **({"axis": along} if along else {}),
    )
    return Ref(number, dims)


def _piece(low: Lowering, item: Any, want: Want | None) -> Ref:
    return low.f32(item) if want is None else low.u8(item, want)


def _cat(low: Lowering, node: fx.Node, want: Want | None) -> Ref:
    items, axis = node.args[0], int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    assert isinstance(items, (list, tuple))
    computed = [k for k, item in enumerate(items) if low.parameter(item) is None]
    rank = node.meta["val"].dim()
    if axis % rank == 0:
        raise CannotLower(node, "it works along the batch")
    refs = {k: _piece(low, items[k], want) for k in computed}
    return joined(low, node, items, refs, axis % rank - 1, want)


def _stack(low: Lowering, node: fx.Node, want: Want | None) -> Ref:
    items, axis = node.args[0], int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    assert isinstance(items, (list, tuple))
    place = axis % node.meta["val"].dim() - 1
    if place < 0:
        raise CannotLower(node, "it works along the batch")
    if any(low.parameter(item) is not None for item in items):
        raise CannotLower(node, "a constant among what it stacks")
    refs = {}
    for position, item in enumerate(items):
        ref = _piece(low, item, want)
        refs[position] = Ref(ref.value, (*ref.dims[:place], (), *ref.dims[place:]))
    return joined(low, node, items, refs, place, want)


def _rule_of_joined(join: Callable[[Lowering, fx.Node, Want | None], Ref]) -> Rule:
    def f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
        return clamped(low, node, join(low, node, None), lo, hi)

    return Rule(join, f32)


RULES["aten.cat.default"] = RULES["aten.concat.default"] = _rule_of_joined(_cat)
RULES["aten.stack.default"] = _rule_of_joined(_stack)


def _pad_grid(grids: Grids, node: fx.Node) -> Grid | None:
    grid = grids(node.args[0])
    if arguments(node).get("mode", "constant") != "constant":
        return grid
    value = _pad_value(node)
    # A value between two levels would be put on the reader's grid only.
    if grid is None or value is None:
        return None
    return grid if grid.holds(value) else None


def _pad_value(node: fx.Node) -> float | None:
    a = arguments(node)
    if a.get("mode", "constant") != "constant":
        return None
    value = a.get("value")
    return 0.0 if value is None else float(value)


def _pad(low: Lowering, node: fx.Node, want: Want) -> Ref:
    if arguments(node).get("mode", "constant") != "constant":
        return bordered(low, node, want)
    value = _pad_value(node)
    amounts = list(arguments(node)["pad"])
    if value is None or min(amounts) < 0 or len(amounts) > 6 or (any(amounts[4:]) and value != 0):
        raise CannotLower(
            node, f"padding of {amounts}: only a constant around the image, or channels of zeros"
        )
    left, right, top, bottom, front, back = [*amounts, *[0] * 6][:6]
    ref = low.plain(low.u8(node.args[0], want), low.name(node, "reorder"))
    if len(ref.dims) != 3:
        raise CannotLower(node, "padding of something that is no image")
    number = ref.value
    c, h, w = low.size(ref)
    if left or right or top or bottom:
        h, w = h + top + bottom, w + left + right
        level = want.grid.level(min(max(value, want.lo), want.hi))
        number = low.program.node(
            "pad",
            low.name(node),
            [number],
            (c, h, w),
            want.grid,
            top=top,
            left=left,
            bottom=bottom,
            right=right,
            level=level,
        )
    if front or back:
        number = _zero_channels(low, node, number, (c, h, w), (front, back), want)
    size: Size = (front + c + back, h, w)
    return Ref(number, image_dims(size))


def _zero_channels(
    low: Lowering, node: fx.Node, number: int, size: Size, amounts: tuple[int, int], want: Want
) -> int:
    """Channels of zeros in front and behind: a 1x1 convolution with the identity, which is exact
    and can take an addition that follows."""
    front, back = amounts
    c, h, w = size
    outs = front + c + back
    identity = torch.zeros(outs, c, 1, 1, dtype=torch.int8)
    identity[front : front + c, :, 0, 0] = torch.eye(c, dtype=torch.int8)
    program = low.program
    return program.node(
        "conv",
        low.name(node, "channels"),
        [number],
        (outs, h, w),
        want.grid,
        **geometry((1, 1)),
        **want.finish(),
        weights=program.constant("weights", ops.pack_weight(identity, 2).numpy().tobytes()),
        scale=program.f32(np.full(outs, want.grid.scale)),
        bias=program.f32(np.zeros(outs)),
    )


RULES["aten.pad.default"] = Rule(_pad, None, _pad_grid)
RULES["aten.constant_pad_nd.default"] = Rule(_pad, None, _pad_grid)


# -- pooling --------------------------------------------------------------------------------------


def _two(value: Any, default: Sequence[int] = ()) -> list[int]:
    items = [int(item) for item in ([value] if isinstance(value, int) else value)]
    items = items or list(default)
    return items * 2 if len(items) == 1 else items


def _window(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)
) -> dict[str, int]:
    """Kernel, strides, and padding above and left of a pooling, by name."""
    names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")
    return dict(zip(names, (*kernel, *stride, *padding), strict=True))


def _image(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    ref = low.plain(ref, low.name(node, "reorder"))
    if len(ref.dims) != 3:
        raise CannotLower(node, "its operand is no image")
    return ref


def _image_size(low: Lowering, node: fx.Node) -> Size:
    sizes = low.sizes(node)
    if len(sizes) != 3:
        raise CannotLower(node, "its operand is no image")
    c, h, w = sizes
    return c, h, w


def _max_pool(low: Lowering, node: fx.Node, ref: Ref) -> Ref:
    a = arguments(node)
    kernel = _two(a["kernel_size"])
    stride, padding = _two(a["stride"], kernel), _two(a["padding"])
    ref = _image(low, node, ref)
    size = _image_size(low, node)
    number = low.program.node(
        "max_pool",
        low.name(node),
        [ref.value],
        size,
        low.value(ref).grid,
        **_window(kernel, stride, padding),
        **dict(zip(("dilation_h", "dilation_w"), _two(a["dilation"]), strict=True)),
    )
    return Ref(number, image_dims(size))


RULES["aten.max_pool2d.default"] = rule_of_view(_max_pool)


def _maxima(low: Lowering, node: fx.Node, source: fx.Node, want: Want) -> Ref:
    """The largest values along whole axes: a window as large as the image."""
    a = arguments(source)
    dim = a["dim"]
    over = [axis_of(low, source, item) for item in ([dim] if isinstance(dim, int) else dim)]
    ref = low.u8(source.args[0], want)
    if not over:
        raise CannotLower(source, "a maximum over everything")
    axes = axes_of(ref.dims, low.size(ref))
    if axes is None or any("c" in axes[k] for k in over) or max(map(len, axes)) > 1:
        letters = "".join("w" if k in over else "c" for k in range(len(ref.dims)))
        ref = low.arranged(ref, low.name(node, "reorder"), letters)
        kernel, left = low.size(ref)[1:], [k not in over for k in range(len(ref.dims))]
        dims = [item if stays else () for item, stays in zip(ref.dims, left, strict=True)]
        c = low.size(ref)[0]
        plane = math.prod(kernel)
        # Channels are neighbours in the result.
        dims = [tuple((n, stride // plane) for n, stride in item) for item in dims]
        size: Size = (c, 1, 1)
    else:
        gone = {axes[k] for k in over}
        c, h, w = low.size(ref)
        kernel = (h if "h" in gone else 1, w if "w" in gone else 1)
        size = (c, h // kernel[0], w // kernel[1])
        dims = list(built(["" if k in over else axis for k, axis in enumerate(axes)], size))
    number = low.program.node(
        "max_pool",
        low.name(node),
        [ref.value],
        size,
        want.grid,
        **_window(kernel, kernel),
    )
    kept = [item for k, item in enumerate(dims) if k not in over or a["keepdim"]]
    return Ref(number, tuple(kept))


def _amax(low: Lowering, node: fx.Node, want: Want) -> Ref:
    return _maxima(low, node, node, want)


def _max_of(low: Lowering, node: fx.Node, want: Want) -> Ref:
    source, index = node.args[:2]
    assert isinstance(source, fx.Node)
    if index != 0:
        raise CannotLower(source, "the places of its maxima are wanted")
    return _maxima(low, node, source, want)


RULES["aten.amax.default"] = Rule(_amax, None, operand_grid, folds=True)
RULES["aten.max.dim"] = Rule(only_pieces, None, operand_grid, folds=True, piece=_max_of)


def _average(
    low: Lowering, node: fx.Node, op: str, size: Size, window: dict[str, int], want: Want
) -> Ref:
    ref, grid = low.on_own_grid(node.args[0])
    ref = _image(low, node, ref)
    number = low.program.node(
        op,
        low.name(node),
        [ref.value],
        size,
        want.grid,
        **window,
        **want.finish(),
        ratio=grid.scale,
    )
    return Ref(number, image_dims(size))


def average_f32(
    low: Lowering, node: fx.Node, ref: Ref, op: str, size: Size, window: dict[str, int]
) -> int:
    return low.program.node(op, low.name(node), [ref.value], size, None, **window)


def no_clamp(node: fx.Node, lo: float, hi: float) -> None:
    if (lo, hi) != (-math.inf, math.inf):
        raise CannotLower(node, "a clamp of its float32 result")


def _avg_pool_window(node: fx.Node) -> dict[str, int]:
    a = arguments(node)
    if a.get("divisor_override") is not None:
        raise CannotLower(node, "average pooling with a divisor of its own")
    kernel = _two(a["kernel_size"])
    stride, padding = _two(a["stride"], kernel), _two(a["padding"])
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    image = operand.meta["val"].shape[-2:]
    # With ceil_mode torch gives such an image one window, which no padding explains.
    if any(size + 2 * p < k for size, k, p in zip(image, kernel, padding, strict=True)):
        raise CannotLower(node, "average pooling over a window larger than the padded image")
    below = dict(zip(("pad_bottom", "pad_right"), padding, strict=True))
    counts = {"count_padding": int(a["count_include_pad"])}
    return _window(kernel, stride, padding) | below | counts


def _avg_pool(low: Lowering, node: fx.Node, want: Want) -> Ref:
    window = _avg_pool_window(node)
    return _average(low, node, "avg_pool", _image_size(low, node), window, want)


def _avg_pool_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    no_clamp(node, lo, hi)
    ref, size = _image(low, node, low.f32(node.args[0])), _image_size(low, node)
    number = average_f32(low, node, ref, "avg_pool", size, _avg_pool_window(node))
    return Ref(number, image_dims(size))


def _adaptive(low: Lowering, node: fx.Node, want: Want) -> Ref:
    return _average(low, node, "adaptive_avg_pool", _image_size(low, node), {}, want)


def _adaptive_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    no_clamp(node, lo, hi)
    ref, size = _image(low, node, low.f32(node.args[0])), _image_size(low, node)
    return Ref(average_f32(low, node, ref, "adaptive_avg_pool", size, {}), image_dims(size))


for _name in ("aten.avg_pool2d", "adalayer.exact_avg_pool2d"):
    RULES[f"{_name}.default"] = Rule(_avg_pool, _avg_pool_f32)
for _name in ("aten.adaptive_avg_pool2d", "adalayer.exact_adaptive_avg_pool2d"):
    RULES[f"{_name}.default"] = Rule(_adaptive, _adaptive_f32)


# -- resizing -------------------------------------------------------------------------------------


def _resize_tables(low: Lowering, node: fx.Node, size: Size) -> dict[str, int]:
    """What every resizing has."""
    a = arguments(node)
    name = str(node.target)
    factors = a.get("scale_factors")
    if factors is None:
        factors = (a.get("scales_h"), a.get("scales_w"))  # or neither was given
    target = low.sizes(node)
    bilinear = "bilinear" in name
    found = {"bilinear": int(bilinear)}
    for axis, n_in, n_out, factor in zip("hw", size[1:], target[1:], factors, strict=True):
        if bilinear:
            tables = linear_tables(n_in, n_out, factor, bool(a["align_corners"]))
        else:
            tables = nearest_tables(n_in, n_out, factor, "exact" in name)
        first, second, part = tables
        program = low.program
        found |= {
            f"low_{axis}": program.i32(first),
            f"high_{axis}": program.i32(second),
            f"part_{axis}": program.f32(part),
        }
    return found


def _resize_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    bilinear = "bilinear" in str(node.target)
    if bilinear:
        ref, grid = low.on_own_grid(node.args[0])
        scale, offset = grid.scale, -grid.zero_point * grid.scale
    else:
        ref, scale, offset = low.u8(node.args[0], want), 1.0, 0.0
    ref = _image(low, node, ref)
    size = _image_size(low, node)
    number = low.program.node(
        "resize",
        low.name(node),
        [ref.value],
        size,
        want.grid,
        **_resize_tables(low, node, low.size(ref)),
        **want.finish(),
        scale=scale,
        offset=offset,
    )
    return Ref(number, image_dims(size))


def _resize_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    no_clamp(node, lo, hi)
    ref = _image(low, node, low.f32(node.args[0]))
    size = _image_size(low, node)
    tables = _resize_tables(low, node, low.size(ref))
    number = low.program.node("resize", low.name(node), [ref.value], size, None, **tables)
    return Ref(number, image_dims(size))


def _nearest_grid(grids: Grids, node: fx.Node) -> Grid | None:
    return None if "bilinear" in str(node.target) else grids(node.args[0])


for _name in ("upsample_bilinear2d", "upsample_nearest2d", "_upsample_nearest_exact2d"):
    for _form in ("vec", "default"):
        RULES[f"aten.{_name}.{_form}"] = Rule(_resize_u8, _resize_f32, _nearest_grid)
RULES["adalayer.exact_bilinear.default"] = Rule(_resize_u8, _resize_f32, _nearest_grid)
