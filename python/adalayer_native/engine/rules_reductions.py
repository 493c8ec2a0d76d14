"""Rules for what goes along whole axes: means, sums, lengths of vectors, and a softmax."""

from __future__ import annotations

import math

from torch import fx

from adalayer_native.engine.grids import Want
from adalayer_native.engine.lower import RULES, CannotLower, Lowering, Rule
from adalayer_native.engine.rules_floats import then_levels
from adalayer_native.engine.rules_images import average_f32, no_clamp
from adalayer_native.engine.rules_layers import arguments, check_grid, clamped, float_function
from adalayer_native.engine.rules_views import axis_of
from adalayer_native.engine.views import (
    Dims,
    Ref,
    arranged_as,
    axes_of,
    built,
    channel_axis,
    is_scattered,
    merged,
)

# -- means ----------------------------------------------------------------------------------------


def _mean_axes(low: Lowering, node: fx.Node, ref: Ref) -> tuple[Ref, Dims, int]:
    """The operand, the view after a mean over height and width, and the number of channels."""
    a = arguments(node)
    over = [axis_of(low, node, item) for item in a["dim"] or ()]
    if sorted(over) == list(range(len(ref.dims) - 1)) and low.value(ref).grid is not None:
        if a.get("dtype") is not None:
            raise CannotLower(node, "a mean in another type")
        ref = low.rows(ref, low.name(node, "reorder"))  # over all tokens, in whatever order
        c = low.size(ref)[0]
        kept: Dims = ((),) * len(over) if a["keepdim"] else ()
        return ref, (*kept, merged([(c, 1)])), c
    size = low.size(ref)
    if a.get("dtype") is not None or not over:
        raise CannotLower(node, "a mean over everything, or in another type")
    if not _is_global(low, node, ref):
        ref, lengths = _gathered(low, node, ref, set(over))
        dims = arranged_as("c" * len(lengths), lengths)[1]
        left_over = [item for k, item in enumerate(dims) if k not in over or a["keepdim"]]
        return ref, tuple(left_over), low.size(ref)[0]
    axes = axes_of(ref.dims, size)
    assert axes is not None
    c = size[0]
    left = ["c" if "c" in name else "" for name in axes]
    keep = [left[i] for i in range(len(left)) if i not in over or a["keepdim"]]
    return ref, built(keep, (c, 1, 1)), c


def _is_global(low: Lowering, node: fx.Node, ref: Ref) -> bool:
    """Whether a mean is one over height and width."""
    size, over = low.size(ref), [axis_of(low, node, item) for item in arguments(node)["dim"] or ()]
    axes = axes_of(ref.dims, size)
    spatial = {axis for axis, n in zip("hw", size[1:], strict=True) if n > 1}
    return axes is not None and set("".join(axes[k] for k in over)) == spatial and bool(over)


def _gathered(low: Lowering, node: fx.Node, ref: Ref, over: set[int]) -> tuple[Ref, list[int]]:
    """A copy whose columns are the axes that go, and the sizes of all; the others are channels."""
    letters = "".join("w" if k in over else "c" for k in range(len(ref.dims)))
    lengths = [math.prod(n for n, _ in atoms) for atoms in ref.dims]
    copy = low.arranged(ref, low.name(node, "reorder"), letters)
    return copy, [1 if k in over else n for k, n in enumerate(lengths)]


def _mean(low: Lowering, node: fx.Node, want: Want) -> Ref:
    ref, grid = low.on_own_grid(node.args[0])
    ref, dims, c = _mean_axes(low, node, ref)
    number = low.program.node(
        "adaptive_avg_pool",
        low.name(node),
        [ref.value],
        (c, 1, 1),
        want.grid,
        **want.finish(),
        ratio=grid.scale,
    )
    return Ref(number, dims)


def _mean_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    ref = low.f32(node.args[0])
    if not _is_global(low, node, ref):
        return clamped(low, node, _reduced(low, node, ref, "mean"), lo, hi)
    no_clamp(node, lo, hi)
    ref, dims, c = _mean_axes(low, node, ref)
    return Ref(average_f32(low, node, ref, "adaptive_avg_pool", (c, 1, 1), {}), dims)


for _name in ("aten.mean.dim", "adalayer.exact_mean.default"):
    RULES[_name] = Rule(_mean, _mean_f32)


_REDUCTIONS = {"mean": 0, "norm": 1}  # Reduction of csrc/reference/float_kinds.hpp


def _reduced(low: Lowering, node: fx.Node, ref: Ref, kind: str) -> Ref:
    """Floats of all values along axes of a view."""
    a = arguments(node)
    if is_scattered(ref.dims) or a.get("dtype") is not None:
        raise CannotLower(node, f"a {kind} in another type, or across the batch")
    over = {axis_of(low, node, item) for item in a["dim"]}
    axes = axes_of(ref.dims, low.size(ref))
    gone = "" if axes is None else "".join(axes[k] for k in sorted(over))
    if axes is None or not gone:
        ref, lengths = _gathered(low, node, ref, over)
        gone, size = "w", (low.size(ref)[0], 1, 1)
        dims = list(arranged_as("c" * len(lengths), lengths)[1])
    else:
        c, h, w = (1 if axis in gone else n for axis, n in zip("chw", low.size(ref), strict=True))
        size = (c, h, w)
        dims = list(built(["" if k in over else axis for k, axis in enumerate(axes)], size))
    number = low.program.node(
        "reduce", low.name(node), [ref.value], size, None,
        kind=_REDUCTIONS[kind], **{f"along_{axis}": 1 for axis in gone},
    )  # fmt: skip
    return Ref(number, tuple(item for k, item in enumerate(dims) if k not in over or a["keepdim"]))


def _of_levels_or_floats(low: Lowering, node: fx.Node) -> Ref:
    a = arguments(node)
    if a["qparams"] is None:
        return low.f32(a["input"])
    ref, grid = low.on_own_grid(a["input"])
    check_grid(low, node, grid, a["qparams"])
    return ref


def _vector_norm(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    ref = _of_levels_or_floats(low, node)
    return clamped(low, node, _reduced(low, node, ref, "norm"), lo, hi)


def _sum(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    """A mean, and the number of values."""
    operand = _of_levels_or_floats(low, node)
    mean = _reduced(low, node, operand, "mean")
    count = math.prod(low.size(operand)) // math.prod(low.size(mean))
    total = float_function(low, node, mean, "multiply", float(count))
    return clamped(low, node, total, lo, hi)


RULES["adalayer.exact_vector_norm.default"] = then_levels(_vector_norm, folds=True)
RULES["adalayer.exact_sum.default"] = then_levels(_sum, folds=True)


# -- softmax --------------------------------------------------------------------------------------


def _softmax(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    a = arguments(node)
    ref = low.f32(node.args[0])
    axis = axis_of(low, node, a.get("dim", 1), ref)
    if a.get("dtype") is not None:
        raise CannotLower(node, "a softmax in another type")
    if channel_axis(ref.dims, low.size(ref)) != axis:
        letters = "".join("c" if k == axis else "w" for k in range(len(ref.dims)))
        ref = low.arranged(ref, low.name(node, "reorder"), letters)
    number = low.program.node("softmax", low.name(node), [ref.value], low.size(ref), None)
    return clamped(low, node, Ref(number, ref.dims), lo, hi)


def _no_u8(low: Lowering, node: fx.Node, want: Want) -> Ref:
    raise CannotLower(node, "torch's own softmax in the middle of the network")


for _name in ("aten.softmax.int", "aten._softmax.default"):
    RULES[_name] = Rule(_no_u8, _softmax)
RULES["adalayer.exact_softmax.default"] = then_levels(_softmax, folds=True)
