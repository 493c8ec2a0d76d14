"""What is known of ATen operators: one table per role, for all rooms above.

An operator that stands in no table is an ordinary producer: its result is a new value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.capture.model import TensorInfo, info_of

__all__ = [
    "arguments",
    "clamp_range",
    "constants",
    "is_addition",
    "is_batch_norm",
    "is_grid_preserving",
    "is_identity",
    "is_max_pool",
    "is_value",
    "keeps_rows",
    "module_of",
    "op_name",
    "source",
]

# Their result holds elements of their first operand, and nothing else: it lies on the same grid.
_MOVES = (
    "alias.default", "clone.default", "contiguous.default", "detach.default",
    "view.default", "reshape.default", "_unsafe_view.default", "view_as.default",
    "reshape_as.default",
    "flatten.using_ints", "unflatten.int", "squeeze.default", "squeeze.dim", "squeeze.dims",
    "unsqueeze.default", "permute.default", "transpose.int", "swapaxes.default", "t.default",
    "numpy_T.default", "movedim.int", "movedim.intlist", "expand.default", "expand_as.default",
    "repeat.default", "tile.default", "repeat_interleave.self_int", "slice.Tensor", "select.int",
    "narrow.default",
    "chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int",
    "index_select.default", "flip.default", "roll.default", "as_strided.default",
    "max_pool1d.default", "max_pool2d.default", "max_pool3d.default",
    "max_pool2d_with_indices.default", "adaptive_max_pool1d.default",
    "adaptive_max_pool2d.default", "adaptive_max_pool3d.default", "amax.default", "max.dim",
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
    "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact2d.default",
    "upsample_nearest1d.default", "upsample_nearest2d.default", "upsample_nearest3d.default",
    "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default",
    "reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default",
    "replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default",
)  # fmt: skip
MOVES = frozenset(f"aten.{name}" for name in _MOVES)
RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        "reshape.default", "view.default", "flatten.using_ints", "unflatten.int",
        "reshape_as.default", "view_as.default",
    )
)  # fmt: skip
_LIKE = frozenset(f"aten.{name}.default" for name in ("reshape_as", "view_as", "expand_as"))
_MAX_POOLS = frozenset(
    f"aten.{name}"
    for name in (
        *(f"max_pool{n}d.default" for n in (1, 2, 3)), "max_pool2d_with_indices.default",
        "amax.default", "max.dim",
    )
)  # fmt: skip
# Identities outside training.
_DROPOUT_OPERATORS = frozenset(
    f"aten.{name}.default"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)
DROPOUTS: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Modules of other libraries that drop whole branches in training, by class name: the graph must
# not depend on these libraries, each of which has a copy of its own.
BRANCH_DROPOUTS = frozenset({"StochasticDepth", "DropPath"})
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_INFINITY = math.inf


# Operators that make a tensor of nothing but numbers and sizes.
FACTORIES = frozenset(
    f"aten.{name}"
    for name in (
        "full.default", "zeros.default", "ones.default", "arange.default", "arange.start",
        "arange.start_step", "eye.default", "scalar_tensor.default", "linspace.default",
    )
)  # fmt: skip
# The same for the sizes and the type of their first operand, whatever it holds.
LIKE_FACTORIES = frozenset(
    f"aten.{name}.default"
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
)
# Functions of one value.
FUNCTIONS = (
    "relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "hardswish",
    "hardsigmoid", "silu", "sigmoid", "gelu", "leaky_relu", "elu", "selu", "celu", "mish",
    "softplus", "softsign", "tanh", "hardshrink", "softshrink", "threshold", "log_sigmoid", "abs",
    "neg", "square", "sqrt", "exp", "erf", "sin", "cos", "round", "floor", "ceil",
)  # fmt: skip
# What makes new values and works on u8 levels, by rules of the engine (a test compares the two).
INTEGER_OPERATORS = frozenset(
    f"aten.{name}"
    for name in (
        *(f"{name}.default" for name in FUNCTIONS),
        *(f"{name}.Scalar" for name in ("add", "sub", "mul", "div")),
        *(f"{name}.Tensor" for name in ("add", "sub", "mul", "div")),
        "pow.Tensor_Scalar", "rsub.Scalar", "prelu.default", "batch_norm.default",
        "layer_norm.default", "group_norm.default", "cat.default", "concat.default",
        "stack.default", "pad.default",
        "constant_pad_nd.default", "avg_pool2d.default", "adaptive_avg_pool2d.default", "mean.dim",
        "upsample_bilinear2d.vec", "upsample_bilinear2d.default", "softmax.int",
        "_softmax.default", "embedding.default", "rms_norm.default", "addcmul.default",
        "reciprocal.default",
    )
)  # fmt: skip


def constants(graph: fx.Graph) -> set[fx.Node]:
    """What depends on parameters, numbers and sizes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operands = [item for item in node.all_input_nodes if info_of(item) is not None]
        held = node.op == "get_attr"
        if node.op == "call_function":
            held = bool(operands) and found.issuperset(operands)
            held |= op_name(node) in LIKE_FACTORIES or (not operands and op_name(node) in FACTORIES)
        if held:
            found.add(node)
    return found


def op_name(node: fx.Node) -> str:
    """``aten.relu.default`` for that operator, the function's name for others."""
    target = node.target
    return (
        str(target)
        if isinstance(target, torch._ops.OpOverload)
        else str(getattr(target, "__name__", target))
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by name, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, item in enumerate(target._schema.arguments):
        if position < len(node.args):
            found[item.name] = node.args[position]
        else:
            found[item.name] = node.kwargs.get(item.name, item.default_value)
    return found


def source(node: fx.Node) -> fx.Node | None:
    """First operand of a node that has one."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def readers(nodes: Iterable[fx.Node], passes: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Who reads values, looking through the operations that ``passes`` accepts."""
    found: list[fx.Node] = []
    pending = list(nodes)
    while pending:
        for user in pending.pop().users:
            if user.op != "output" and info_of(user) is None:
                continue  # a size
            if passes(user):
                pending.append(user)
            elif user not in found:
                found.append(user)
    return found


def only_shapes(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator gives another value the shape of a node, and reads no more of it."""
    return user.op == "call_function" and op_name(user) in _LIKE and user.args[0] is not node


def module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else ``None``."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def is_value(node: fx.Node) -> bool:
    """Whether a node is a float32 tensor, which a u8 grid can hold."""
    info = info_of(node)
    return isinstance(info, TensorInfo) and info.is_float32


def is_dropout(module: nn.Module | None) -> bool:
    """Whether a module is a dropout, or the stochastic depth of some library."""
    return type(module) in DROPOUTS or type(module).__name__ in BRANCH_DROPOUTS


def is_identity(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node returns its input outside training."""
    module = module_of(node, modules)
    if module is not None:
        return isinstance(module, nn.Identity) or is_dropout(module)
    if node.op != "call_function":
        return False
    name = op_name(node)
    if name in _DROPOUT_OPERATORS:
        return arguments(node)["train"] is False
    return name in ("aten.alias.default", "aten.detach.default")


def keeps_rows(node: fx.Node) -> bool:
    """Whether the node is a reshape after which the last axis is what it was."""
    if node.op != "call_function" or op_name(node) not in RESHAPES:
        return False
    before, after = info_of(node.args[0]), info_of(node)
    return (
        isinstance(before, TensorInfo)
        and isinstance(after, TensorInfo)
        and bool(before.shape and after.shape)
        and isinstance(before.shape[-1], int)
        and before.shape[-1] == after.shape[-1]
    )


def is_max_pool(node: fx.Node) -> bool:
    """Whether the node takes maxima over windows."""
    return node.op == "call_function" and op_name(node) in _MAX_POOLS


def is_grid_preserving(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node's result lies on its first operand's u8 grid."""
    if is_identity(node, modules):
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        operand = node.args[0]
        # One of several pieces, or the maxima beside their positions.
        return isinstance(operand, fx.Node) and op_name(operand) in MOVES and is_value(node)
    name = op_name(node)
    if name in ("aten.pad.default", "aten.constant_pad_nd.default"):
        return _pad_keeps_grid(node)
    return name in MOVES


def _pad_keeps_grid(node: fx.Node) -> bool:
    a = arguments(node)
    if a.get("mode", "constant") != "constant":
        return True
    value = a.get("value")
    if not isinstance(value, (int, float)) or value == 0:
        return not value
    # "Same" max pooling pads with -inf: the lowest level does as well, since no window consists
    # of padding alone.
    return value < 0 and all(is_max_pool(user) for user in node.users)


def is_batch_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is a batch norm that keeps running statistics (others cannot be folded)."""
    module = module_of(node, modules)
    return isinstance(module, BATCH_NORMS) and getattr(module, "running_mean", None) is not None


def is_addition(node: fx.Node) -> bool:
    """Whether the node adds two different computed tensors of one shape, with unit weight."""
    if node.op != "call_function" or op_name(node) != "aten.add.Tensor" or node.kwargs:
        return False
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return False
    if "get_attr" in (left.op, right.op):
        return False
    infos = [info_of(item) for item in (left, right, node)]
    sizes = {info.sizes for info in infos if isinstance(info, TensorInfo) and info.is_float32}
    return len(sizes) == 1 and all(map(is_value, (left, right, node)))


def clamp_range(node: fx.Node) -> tuple[float, float] | None:
    """``(lo, hi)`` of a relu, relu6, hardtanh or clamp with constant bounds, else None.

    Only where a native layer can do it: at least one bound is finite, and they are in order.
    """
    bounds = clamp_bounds(node)
    if bounds is None or not bounds[0] <= bounds[1] or bounds == (-_INFINITY, _INFINITY):
        return None
    return bounds


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """``(lo, hi)`` of a node that clamps to constants, else None."""
    if node.op != "call_function":
        return None
    name = op_name(node)
    if name == "aten.relu.default":
        return 0.0, _INFINITY
    if name == "aten.relu6.default":
        return 0.0, 6.0
    keys = {
        "aten.hardtanh.default": ("min_val", "max_val"),
        "aten.clamp.default": ("min", "max"),
        "aten.clip.default": ("min", "max"),
        "aten.clamp_min.default": ("min", ""),
        "aten.clamp_max.default": ("", "max"),
    }.get(name)
    if keys is None:
        return None
    a = arguments(node)
    bounds = [a.get(key) for key in keys]
    if any(item is not None and not isinstance(item, (int, float)) for item in bounds):
        return None
    lo = -_INFINITY if bounds[0] is None else float(bounds[0])
    hi = _INFINITY if bounds[1] is None else float(bounds[1])
    return lo, hi


def attribute(module: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found.detach()
