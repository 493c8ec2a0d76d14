"""Values that no u8 grid holds, since their smallest and their largest parts both count.

A mask's infinities would leave no levels for what they mask. What something is divided by may be
small where nothing is seen, and as large as all of the rest elsewhere: next to the largest value a
small constant, which keeps a quotient finite, is the lowest level, zero.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx

from adalayer_native.capture.model import GraphModel, info_of
from adalayer_native.capture.rms_norms import rms_norms
from adalayer_native.capture.vocabulary import (
    FUNCTIONS,
    MOVES,
    attribute,
    is_max_pool,
    op_name,
)

__all__ = ["FloatValues", "float_values"]

# Sums and selections that hand the large constants of a mask on to the softmax behind them.
_MASKING = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "sub.Tensor", "mul.Tensor", "where.self", "where.ScalarOther",
        "where.ScalarSelf", "where.Scalar", "masked_fill.Scalar", "masked_fill.Tensor",
        "fill.Scalar", "fill.Tensor", "cat.default", "_to_copy.default", "neg.default",
        "rsub.Scalar", "rsub.Tensor", "full.default", "full_like.default", "slice_scatter.default",
        "select_scatter.default", "triu.default", "tril.default", "maximum.default",
    )
)  # fmt: skip
_LARGE = 1e4  # no activation, but every usual mask
# Functions that grow without bounds near zero.
_INVERSES = ("aten.reciprocal.default", "aten.rsqrt.default")
# What a divisor may be computed by.
_OF_DIVISORS = frozenset(
    [f"aten.{name}.default" for name in FUNCTIONS]
    + [f"aten.{name}.{form}" for name in ("add", "sub", "mul") for form in ("Tensor", "Scalar")]
    + [f"aten.{name}" for name in ("div.Scalar", "pow.Tensor_Scalar", "rsub.Scalar", "mean.dim",
       "mean.default", "sum.dim_IntList", "sum.default", "var.correction", "var.dim", "std.dim",
       "std.correction", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "amax.default",
       "max.dim", "maximum.default", "logsumexp.default")]
    + ["adalayer.exact_mean.default"]
)  # fmt: skip


@dataclass(frozen=True)
class FloatValues:
    """What stays in float.

    Attributes:
        values: that get no grid.
        readers: operations that therefore do not work on levels.
    """

    values: set[fx.Node]
    readers: set[fx.Node]


def float_values(model: GraphModel) -> FloatValues:
    """Masks up to what they mask; and divisors and what they divide, which may be as small, with
    what they alone are computed from."""
    masked = _masked(model)
    found = FloatValues(set(masked), set(masked))
    # One operation, which sums levels up exactly.
    norms = {step for norm in rms_norms(model.graph).values() for step in (norm.node, *norm.inside)}
    for node in reversed(list(model.graph.nodes)):
        if node.op != "call_function" or node in norms or not _divides(node):
            continue
        quotients = [node]
        inverse = not op_name(node).startswith("aten.div.")
        # (A layer that reads an inverse puts it on its grid.)
        if inverse and all(user.op == "call_function" for user in node.users):
            found.values.add(node)
            quotients += node.users
        found.readers.update(quotients)
        for quotient in quotients:
            _add_operands(quotient, found)
    return found


def _divides(node: fx.Node) -> bool:
    """Whether an operation divides by something that is computed from the model's inputs."""
    name, operand = op_name(node), None
    if name in ("aten.div.Tensor", "aten.div.Tensor_mode"):
        operand = node.args[1]
    elif name in _INVERSES or (name == "aten.pow.Tensor_Scalar" and _negative(node.args[1])):
        operand = node.args[0]
    return (
        isinstance(operand, fx.Node) and operand.op != "get_attr" and info_of(operand) is not None
    )


def _negative(value: object) -> bool:
    return isinstance(value, (int, float)) and value < 0


def _add_operands(quotient: fx.Node, found: FloatValues) -> None:
    """What leads to a quotient, as far as nothing else reads that."""
    pending = list(quotient.all_input_nodes)
    while pending:
        node = pending.pop()
        computed = node.op == "call_function" and (
            op_name(node) in _OF_DIVISORS
            or op_name(node) in MOVES
            or node.target is operator.getitem
        )
        readers = [user for user in node.users if user.op == "output" or info_of(user) is not None]
        if computed and found.readers.issuperset(readers):
            found.values.add(node)
            found.readers.add(node)
            pending += node.all_input_nodes


def _masked(model: GraphModel) -> set[fx.Node]:
    """Values with the infinite or very large constants of a mask in them, up to what they mask."""
    found: set[fx.Node] = set()
    for node in model.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(model, str(node.target))
            if _is_large(tensor):
                found.add(node)
        elif node.op == "call_function":
            name = op_name(node)
            moves = (name in MOVES and not is_max_pool(node)) or node.target is operator.getitem
            if name in _MASKING or moves:
                scalars = [*node.args, *node.kwargs.values()]
                large = any(isinstance(v, (int, float)) and abs(v) >= _LARGE for v in scalars)
                # (The ends of slices and sizes are no values.)
                if (large and name in _MASKING and "scatter" not in name) or any(
                    operand in found for operand in node.all_input_nodes
                ):
                    found.add(node)
    return found


def _is_large(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
        return False
    return float(tensor.abs().max()) >= _LARGE
