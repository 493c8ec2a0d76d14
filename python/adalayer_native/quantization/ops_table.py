"""What the graph analysis knows about torch operations: one table per role.

An operation that stands in no table is an ordinary producer: its output is stored, so it gets an
activation quantizer of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# Values that are already on a u8 grid come out on the same grid with the same zero: the operation
# only moves, drops or selects elements.
_GRID_MODULES: tuple[type[nn.Module], ...] = (
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_GRID_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.max_pool1d,
        F.max_pool2d,
        F.adaptive_max_pool1d,
        F.adaptive_max_pool2d,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        torch.max_pool2d,
        torch.flatten,
        torch.unflatten,
        torch.reshape,
        torch.squeeze,
        torch.unsqueeze,
        torch.permute,
        torch.transpose,
        torch.swapaxes,
        torch.movedim,
        torch.clone,
        torch.detach,
        torch.chunk,
        torch.split,
        torch.unbind,
        torch.narrow,
        torch.select,
        torch.flip,
        torch.roll,
        torch.t,
    }
)
_GRID_METHODS = frozenset(
    {
        "flatten",
        "unflatten",
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "t",
        "contiguous",
        "clone",
        "detach",
        "expand",
        "expand_as",
        "repeat",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "select",
        "flip",
        "roll",
    }
)
# Identities outside training, of modules and of functions with a `training` argument.
_DROPOUT_MODULES: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUT_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
    }
)
# Modules of other libraries that drop whole branches in training, by qualified name: the graph
# must not depend on these libraries.
_BRANCH_DROPOUTS = frozenset(
    {
        "torchvision.ops.stochastic_depth.StochasticDepth",
        "timm.layers.drop.DropPath",
    }
)
_INPLACE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
    }
)
_SHAPE_METHODS = frozenset(
    {
        "size",
        "dim",
        "numel",
        "ndimension",
        "stride",
        "nelement",
    }
)
_SHAPE_ATTRIBUTES = frozenset(
    {
        "shape",
        "ndim",
        "dtype",
        "device",
        "requires_grad",
        "layout",
    }
)

_BN_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d)
_ADD_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}
)
_RELU_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, torch.relu, torch.relu_}
)
_CLAMP_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({torch.clamp, torch.clip, torch.clamp_})
_INFINITY = float("inf")


def source(node: fx.Node) -> fx.Node | None:
    """First tensor operand of a node that has one."""
    if node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    value = node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else ``None``."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def is_shape_value(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a node yields a size, dtype or other non-tensor; ``known`` are earlier such nodes."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return len(node.args) > 1 and node.args[1] in _SHAPE_ATTRIBUTES
    inputs = node.all_input_nodes
    return bool(inputs) and all(item in known for item in inputs)


def is_branch_dropout(module: nn.Module) -> bool:
    """Whether a module is the stochastic depth of a known library."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" in _BRANCH_DROPOUTS


def is_identity(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node returns its input outside training: dropout, stochastic depth, identity."""
    module = module_of(node, modules)
    if module is not None:
        known = (nn.Identity, *_DROPOUT_MODULES)
        return type(module) in known or is_branch_dropout(module)
    if node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS:
        return False
    if len(node.args) > 2:
        return node.args[2] is False
    # F.alpha_dropout and its kin are off unless told otherwise, the others on.
    off = node.target in (F.alpha_dropout, F.feature_alpha_dropout)
    name = "train" if node.target is torch.dropout else "training"
    return node.kwargs.get(name, not off) is False


def is_inplace(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node overwrites its first operand, which then holds the node's result."""
    module = module_of(node, modules)
    if module is not None:
        return getattr(module, "inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    # F.relu(x, True); other functions take `inplace` later and practically always by name.
    return node.target in (F.relu, F.relu6) and len(node.args) > 1 and node.args[1] is True


def is_grid_preserving(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node's output lies on its input's u8 grid."""
    if is_identity(node, modules):
        return True
    if node.op == "call_module":
        module = module_of(node, modules)
        if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            return not module.return_indices
        if isinstance(module, nn.ConstantPad2d) and type(module) is nn.ConstantPad2d:
            return module.value == 0
        if isinstance(module, nn.Upsample):
            return module.mode == "nearest"
        return type(module) in _GRID_MODULES
    if node.op == "call_method":
        return node.target in _GRID_METHODS
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        # Slices and unpacking; an index that is computed by the graph could be a mask or a gather.
        return len(node.all_input_nodes) == 1
    if node.target is F.pad:
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        return mode != "constant" or not value
    if node.target is F.interpolate:
        return node.kwargs.get("mode", "nearest") == "nearest"
    return node.target in _GRID_FUNCTIONS


def is_batch_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is a batch norm that keeps running statistics (others cannot be folded)."""
    module = module_of(node, modules)
    return type(module) in _BN_MODULES and getattr(module, "running_mean", None) is not None


def is_tensor_add(node: fx.Node, shapes: set[fx.Node]) -> bool:
    """Whether the node adds two different tensors with unit weight, neither of them a constant."""
    is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not is_add or node.kwargs or len(node.args) != 2:
        return False
    left, right = node.args
    return (
        isinstance(left, fx.Node)
        and isinstance(right, fx.Node)
        and left is not right
        and left not in shapes
        and right not in shapes
        and left.op != "get_attr"
        and right.op != "get_attr"
    )


def clamp_range(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    """``(lo, hi)`` if the node is a relu, relu6, hardtanh or clamp with constant bounds.

    Only where a native layer can do it: at least one bound is finite, and they are in order.
    """
    bounds = _clamp_bounds(node, modules)
    if bounds is None or not bounds[0] <= bounds[1] or bounds == (-_INFINITY, _INFINITY):
        return None
    return bounds


def _clamp_bounds(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    module = module_of(node, modules)
    if module is not None:
        if type(module) is nn.ReLU:
            return 0.0, _INFINITY
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            assert isinstance(module, nn.Hardtanh)
            return float(module.min_val), float(module.max_val)
        return None
    function = node.target if node.op == "call_function" else None
    method = node.target if node.op == "call_method" else None
    if function in _RELU_FUNCTIONS or method in ("relu", "relu_"):
        return 0.0, _INFINITY
    if function is F.relu6:
        return 0.0, 6.0
    if function is F.hardtanh:
        return _bounds(node, ("min_val", "max_val"), (-1.0, 1.0))
    if function in _CLAMP_FUNCTIONS or method in ("clamp", "clamp_", "clip"):
        return _bounds(node, ("min", "max"), (-_INFINITY, _INFINITY))
    return None


def _bounds(
    node: fx.Node, names: tuple[str, str], default: tuple[float, float]
) -> tuple[float, float] | None:
    values: list[float] = []
    for position, (name, fallback) in enumerate(zip(names, default, strict=True), start=1):
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        if value is None:
            value = fallback
        if not isinstance(value, (int, float)):
            return None
        values.append(float(value))
    return values[0], values[1]
