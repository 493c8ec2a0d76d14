"""Rules for functions of single values, and for sums and products of two tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import FUNCTIONS, clamp_bounds, op_name
from adalayer_native.engine.grids import Want, compose_clamps
from adalayer_native.engine.lower import RULES, CannotLower, F32Rule, Grids, Lowering, Rule
from adalayer_native.engine.rules_layers import (
    Doubles,
    affine,
    arguments,
    check_grid,
    clamped,
    float_function,
)
from adalayer_native.engine.views import (
    BATCH,
    Atom,
    Dims,
    Ref,
    Size,
    arranged_as,
    axis_atoms,
    in_order,
    is_scattered,
    merged,
)
from adalayer_native.ops.fused import FLOAT_FUNCTIONS, SIXTH
from adalayer_native.ops.norms import line_of

# -- functions of one value -----------------------------------------------------------------------


def _function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The operator as a function of its first operand."""
    rest, kwargs = node.args[1:], node.kwargs
    if any(isinstance(item, fx.Node) for item in (*rest, *kwargs.values())):
        raise CannotLower(node, "a pointwise function with a computed operand")
    target = node.target
    assert callable(target)

    def run(values: Tensor) -> Tensor:
        result = target(values, *rest, **kwargs)
        assert isinstance(result, Tensor)
        return result

    return run


def _clamp(node: fx.Node) -> tuple[float, float] | None:
    bounds = clamp_bounds(node)
    # torch gives the upper bound where they cross
    return None if bounds is None else (min(bounds), bounds[1])


def _pointwise(low: Lowering, node: fx.Node, want: Want) -> Ref:
    operand = node.args[0]
    grid = low.grids(operand)
    if grid is None:
        # Nothing stores the operand; a clamp can still join the node that computes it.
        bounds = _clamp(node)
        if bounds is None:
            return _then_levels(low, node, want, _function_f32)
        return low.u8(operand, want.after(*bounds))
    return low.retable(low.u8(operand, Want(grid)), node, grid, want, _function(node))


def _then_levels(low: Lowering, node: fx.Node, want: Want, f32: F32Rule) -> Ref:
    """What is computed from floats, on a grid."""
    return low.quantized(f32(low, node, want.lo, want.hi), node, Want(want.grid))


# Sums, differences and products with a number.
_LINES = ("add", "sub", "mul", "rsub", "div")


def _line_of(node: fx.Node, constant: Tensor, left: bool) -> list[tuple[str, float]]:
    """A sum, difference or product with a number as steps that round as torch does."""
    kind = op_name(node).split(".")[1]
    if float(arguments(node).get("alpha", 1)) != 1.0:
        raise CannotLower(node, "a factor of its second operand, which torch rounds with the sum")
    number = float(constant.float())
    if not math.isfinite(number):
        raise CannotLower(node, f"a constant operand of {number}")
    if kind == "div":
        if left or number == 0.0 or abs(math.frexp(number)[0]) != 0.5:
            raise CannotLower(node, "a quotient of floats whose divisor is no power of two")
        number = 1.0 / number  # exact, and so is the product
    if kind in ("mul", "div"):
        return [("multiply", number)]
    if kind == "add":
        return [("plus", number)]
    if left or kind == "rsub":
        return [("multiply", -1.0), ("plus", number)]
    return [("plus", -number)]


def _float_steps(node: fx.Node) -> list[tuple[str, float]] | None:
    """A function of one float as steps that the engine has; None if it has none."""
    name = op_name(node)
    if name == "adalayer.exact_function.default" and node.args[1] in FLOAT_FUNCTIONS:
        return [(str(node.args[1]), 0.0)]
    if name == "aten.neg.default":
        return [("multiply", -1.0)]
    kind, _, overload = name.removeprefix("aten.").partition(".")
    if overload == "Scalar" and kind in _LINES and isinstance(node.args[1], (int, float)):
        return _line_of(node, torch.tensor(float(node.args[1])), False)
    return None


_HARD = ("hardsigmoid", "hardswish")


def _combined(low: Lowering, node: fx.Node, kind: str, a: Ref, b: Ref) -> Ref:
    number = low.program.node(
        "combine", low.name(node), [a.value, b.value], low.size(a), None, pair=_PAIRS[kind]
    )
    return Ref(number, a.dims)


def _hard(low: Lowering, node: fx.Node, kind: str) -> Ref:
    """The steps of ``ops.fused.exact_function``."""
    ref = low.f32(node.args[0])
    part = float_function(low, node, ref, "plus", 3.0)
    part = float_function(low, node, part, "clamp", 0.0, 6.0)
    if kind == "hardswish":
        part = _combined(low, node, "mul", ref, part)
    return float_function(low, node, part, "multiply", SIXTH)


def _leaky(low: Lowering, node: fx.Node) -> Ref:
    """Both signs apart: each is one product at most, as torch has it."""
    slope = float(torch.tensor(float(arguments(node)["negative_slope"]), dtype=torch.float32))
    if not math.isfinite(slope):
        raise CannotLower(node, f"a slope of {slope}")
    ref = low.f32(node.args[0])
    above = float_function(low, node, ref, "clamp", 0.0, math.inf)
    below = float_function(low, node, ref, "clamp", -math.inf, 0.0)
    return _combined(low, node, "add", above, float_function(low, node, below, "multiply", slope))


def _absolute(low: Lowering, node: fx.Node) -> Ref:
    """Both signs apart, one of which is zero."""
    ref = low.f32(node.args[0])
    turned = float_function(low, node, ref, "multiply", -1.0)
    parts = [float_function(low, node, part, "clamp", 0.0, math.inf) for part in (ref, turned)]
    return _combined(low, node, "add", *parts)


def _inverse(low: Lowering, node: fx.Node) -> Ref:
    ref, program = low.f32(node.args[0]), low.program
    one = program.node(
        "constant", low.name(node, "one"), [], (1, 1, 1), None, values=program.f32([1.0])
    )
    pair = _PAIRS["div"]
    name, operands = low.name(node), [one, ref.value]
    return Ref(program.node("combine", name, operands, low.size(ref), None, pair=pair), ref.dims)


def _square(low: Lowering, node: fx.Node) -> Ref:
    ref = low.f32(node.args[0])
    return _combined(low, node, "mul", ref, ref)


# Of floats, in steps that round as torch does.
_IN_STEPS: dict[str, Callable[[Lowering, fx.Node], Ref]] = {
    "aten.leaky_relu.default": _leaky,
    "aten.abs.default": _absolute,
    "aten.reciprocal.default": _inverse,
    "aten.square.default": _square,
}


def _function_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    bounds = _clamp(node)
    if bounds is not None:
        return low.f32(node.args[0], *compose_clamps(bounds, (lo, hi)))
    if op_name(node) == "adalayer.exact_function.default" and node.args[1] in _HARD:
        return clamped(low, node, _hard(low, node, str(node.args[1])), lo, hi)
    in_steps = _IN_STEPS.get(op_name(node))
    if op_name(node) == "aten.pow.Tensor_Scalar" and node.args[1] == 2:
        in_steps = _square
    if in_steps is not None:
        return clamped(low, node, in_steps(low, node), lo, hi)
    steps = _float_steps(node)
    if steps is None:
        raise CannotLower(
            node,
            "its result is wanted in float32 (no quantized layer reads it), which the engine has "
            "no operation for",
        )
    ref = low.f32(node.args[0])
    for kind, a in steps:
        ref = float_function(low, node, ref, kind, a)
    return clamped(low, node, ref, lo, hi)


for _name in FUNCTIONS:
    RULES[f"aten.{_name}.default"] = Rule(_pointwise, _function_f32, folds=True, scatters=True)
RULES["aten.reciprocal.default"] = Rule(_pointwise, _function_f32, folds=True)
RULES["aten.pow.Tensor_Scalar"] = Rule(_pointwise, _function_f32, folds=True)
RULES["aten.rsub.Scalar"] = Rule(_pointwise, _function_f32, folds=True)
for _name in ("add", "sub", "mul", "div"):
    RULES[f"aten.{_name}.Scalar"] = Rule(_pointwise, _function_f32, folds=True)
RULES["adalayer.exact_function.default"] = Rule(_pointwise, _function_f32, folds=True)


def _prelu(low: Lowering, node: fx.Node, want: Want) -> Ref:
    slope = low.parameter(node.args[1])
    if slope is None or slope.numel() != 1:
        raise CannotLower(node, "a slope per channel")
    ref, grid = low.on_own_grid(node.args[0])
    return low.retable(ref, node, grid, want, lambda x: torch.prelu(x, slope.reshape(1)))


RULES["aten.prelu.default"] = Rule(_prelu)


# -- sums and products ----------------------------------------------------------------------------


def _spread(low: Lowering, node: fx.Node, ref: Ref, value: Tensor) -> Doubles:
    """A constant operand with an entry per element of ``ref``, ``[h, w, c]``."""
    sizes = [math.prod(n for n, _ in atoms if n != BATCH[0]) for atoms in ref.dims]
    shape = list(value.shape)
    if len(shape) > len(sizes) and shape[0] == 1:
        shape = shape[1:]  # the batch
    try:
        spread = value.reshape(shape).expand(sizes).numpy()
    except RuntimeError:
        raise CannotLower(node, f"a constant operand of shape {list(value.shape)}") from None
    found: Doubles = in_order(spread, ref.dims, low.size(ref))
    return found


def _of_elements(low: Lowering, node: fx.Node, ref: Ref, value: Tensor) -> Doubles:
    """A constant operand as one value per channel of ``ref``, or per element, ``[h, w, c]``."""
    found = _spread(low, node, ref, value)
    first: Doubles = found[0, 0]
    return first if bool((found == first).all()) else found


def _with_constant(
    low: Lowering, node: fx.Node, operand: Any, constant: Tensor, left: bool, want: Want
) -> Ref:
    """A sum, difference, product or quotient of a tensor and a parameter or number."""
    kind = op_name(node).split(".")[1]
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    ref, grid = low.on_own_grid(operand)
    target = node.target
    assert callable(target)
    if constant.numel() == 1:
        scalar = constant.reshape(())

        def run(values: Tensor) -> Tensor:
            pair = (scalar, values) if left else (values, scalar)
            result = target(*pair, **node.kwargs)
            assert isinstance(result, Tensor)
            return result

        return low.retable(ref, node, grid, want, run)
    if (kind == "div" and left) or sum(size != 1 for size in constant.shape) != 1:
        # The module adds and multiplies floats.
        return _then_levels(low, node, want, _binary_f32)
    return _line(low, node, operand, constant, kind, alpha, left, want)


def _line(
    low: Lowering,
    node: fx.Node,
    operand: Any,
    constant: Tensor,
    kind: str,
    alpha: float,
    left: bool,
    want: Want,
    addend: Tensor | None = None,
) -> Ref:
    """A sum, difference, product or quotient of a tensor and a constant, and what is added."""
    ref, _ = low.on_own_grid(operand)
    lines = line_of(kind, constant, alpha, left)
    factor, offset = (_of_elements(low, node, ref, item) for item in lines)
    if addend is not None:
        both = np.broadcast_arrays(offset, _of_elements(low, node, ref, addend.double()))
        offset = both[0] + both[1]
    return affine(low, node, operand, factor, offset, want)


def _grid_line(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    constant, addend = low.parameter(a["constant"]), low.parameter(a["addend"])
    if constant is None or (addend is None and a["addend"] is not None):
        raise CannotLower(node, "its constant is computed by the graph")
    check_grid(low, node, low.on_own_grid(a["input"])[1], a["qparams"])
    return _line(low, node, a["input"], constant, a["kind"], a["alpha"], a["left"], want, addend)


RULES["adalayer.grid_line.default"] = Rule(_grid_line, folds=True, scatters=True)


def _no_line(low: Lowering, node: fx.Node, want: Want) -> Ref:
    raise CannotLower(node, "a product that is added where no levels are, or to no constant")


RULES["aten.addcmul.default"] = Rule(_no_line)


def _length(atoms: tuple[Atom, ...]) -> int:
    return math.prod(n for n, _ in atoms)


def _pair(low: Lowering, node: fx.Node, a: Ref, b: Ref) -> tuple[Ref, Ref, bool]:
    """Two operands in one layout, the full one first; whether they were exchanged."""
    if low.size(a) == low.size(b) and a.dims == b.dims:
        return a, b, False
    if len(a.dims) != len(b.dims):
        raise CannotLower(node, f"operands of {len(a.dims) + 1} and {len(b.dims) + 1} axes")
    if list(map(_length, a.dims)) == list(map(_length, b.dims)):
        # In the order of the one whose channels lie together, if not of both.
        name = low.name(node, "reorder")
        for target, other in ((a, b), (b, a)):
            if target.dims[-1] == merged([axis_atoms(low.size(target))["c"]]):
                found = low.alike(other, target, name)
                if found is not None:
                    return (target, found, False) if target is a else (found, target, False)
    given = a, b
    orders = (low.rows, low.in_rows)
    for order in (low.plain, *orders) if len(a.dims) in (1, 3) else orders:
        a, b = (order(item, low.name(node, "reorder")) for item in given)
        size_a, size_b = low.size(a), low.size(b)
        if (size_a == size_b and a.dims == b.dims) or size_b == (size_a[0], 1, 1):
            return a, b, False
        if size_a == (size_b[0], 1, 1):
            return b, a, True
    raise CannotLower(
        node, f"operands of {size_a} and {size_b}; expected equal ones or one value per channel"
    )


def _binary(low: Lowering, node: fx.Node, want: Want) -> Ref:
    left, right = node.args[:2]
    computed = [item for item in (left, right) if low.parameter(item) is None]
    if any(low.grids(item) is None for item in computed):
        return _then_levels(low, node, want, _binary_f32)
    for operand, other, is_left in ((right, left, False), (left, right, True)):
        constant = low.parameter(operand)
        if constant is not None:
            return _with_constant(low, node, other, constant, is_left, want)
    (a, grid_a), (b, grid_b) = low.on_own_grid(left), low.on_own_grid(right)
    try:
        a, b, exchanged = _pair(low, node, a, b)
    except CannotLower:
        return _then_levels(low, node, want, _binary_f32)  # which are repeated along any axes
    if exchanged:
        grid_a, grid_b = grid_b, grid_a
    scale_a, scale_b = grid_a.scale, grid_b.scale
    kind = op_name(node).split(".")[1]
    if kind in ("add", "sub"):
        factor = float(node.kwargs.get("alpha", 1)) * (1.0 if kind == "add" else -1.0)  # type: ignore[arg-type]
        if exchanged:
            scale_a = float(np.float32(factor * scale_a))
        else:
            scale_b = float(np.float32(factor * scale_b))
    elif kind != "mul":
        raise CannotLower(node, f"{kind} of two tensors")
    return low.emit(
        "mul" if kind == "mul" else "add",
        low.name(node),
        [a.value, b.value],
        a,
        want,
        **want.finish(),
        scale_a=scale_a,
        scale_b=scale_b,
    )


# FloatPair of csrc/reference/float_kinds.hpp
_PAIRS = {"add": 0, "sub": 1, "mul": 2, "div": 3}


def _pair_number(node: fx.Node) -> int:
    """What the engine does with two float tensors."""
    kind = op_name(node).split(".")[1]
    if kind not in _PAIRS or float(arguments(node).get("alpha", 1)) != 1.0:
        raise CannotLower(node, f"{kind} of two float tensors, {dict(node.kwargs)}")
    return _PAIRS[kind]


def _with_floats(low: Lowering, node: fx.Node, operand: Any, constant: Tensor, left: bool) -> Ref:
    """Floats and a constant with an entry per element."""
    number = _pair_number(node)
    ref = low.f32(operand)
    if not bool(torch.isfinite(constant).all()):
        raise CannotLower(node, "a constant operand that is not finite")
    values = _spread(low, node, ref, constant.float()).transpose(2, 0, 1)
    held = low.program.node(
        "constant", low.name(node, "constant"), [], low.size(ref), None,
        values=low.program.f32(values),
    )  # fmt: skip
    pair = [held, ref.value] if left else [ref.value, held]
    value = low.program.node("combine", low.name(node), pair, low.size(ref), None, pair=number)
    return Ref(value, ref.dims)


def _binary_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    left, right = node.args[:2]
    kind = op_name(node).split(".")[1]
    for operand, other, is_left in ((right, left, False), (left, right, True)):
        constant = low.parameter(operand)
        if constant is None:
            continue
        if constant.numel() != 1:
            return clamped(low, node, _with_floats(low, node, other, constant, is_left), lo, hi)
        if kind not in _LINES:
            raise CannotLower(node, f"{kind} of floats and a constant")
        ref = low.f32(other)
        for step, number in _line_of(node, constant.reshape(()), is_left):
            ref = float_function(low, node, ref, step, number)
        return clamped(low, node, ref, lo, hi)
    number = _pair_number(node)
    a, b, size, dims = _together(low, node, low.f32(left), low.f32(right))
    value = low.program.node("combine", low.name(node), [a.value, b.value], size, None, pair=number)
    return clamped(low, node, Ref(value, dims), lo, hi)


def _together(low: Lowering, node: fx.Node, a: Ref, b: Ref) -> tuple[Ref, Ref, Size, Dims]:
    """Two float operands in one order, and size and view of what their elements give.

    Along an axis where one has size 1 it is repeated.
    """
    if low.size(a) == low.size(b) and a.dims == b.dims:
        return a, b, low.size(a), a.dims
    if is_scattered(a.dims) or is_scattered(b.dims):
        raise CannotLower(node, "operands in whose middle the batch is")
    rank = len(a.dims)
    if len(b.dims) != rank:
        raise CannotLower(node, f"operands of {rank + 1} and {len(b.dims) + 1} axes")
    lengths = [tuple(map(_length, ref.dims)) for ref in (a, b)]
    if lengths[0] == lengths[1]:
        found = low.alike(b, a, low.name(node, "reorder"))
        if found is not None:
            return a, found, low.size(a), a.dims
    if rank > 3:
        raise CannotLower(node, f"operands of {rank + 1} axes that are repeated along some")
    letters = "hwc"[-rank:] if rank < 3 else "chw"
    size, dims = arranged_as(letters, tuple(map(max, *lengths)))
    ordered = []
    for ref, own in zip((a, b), lengths, strict=True):
        like = arranged_as(letters, own)
        in_place = (low.size(ref), ref.dims) == like
        copy = ref if in_place else low.arranged(ref, low.name(node, "reorder"), letters)
        ordered.append(copy)
    return ordered[0], ordered[1], size, dims


def _no_grid(grids: Grids, node: fx.Node) -> None:
    return None


for _name in ("add", "sub", "mul", "div"):
    RULES[f"aten.{_name}.Tensor"] = Rule(_binary, _binary_f32, _no_grid, folds=True)
