"""Rewrites of a captured graph that change no value: shorter chains, images instead of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import op_name

__all__ = [
    "drop_checks",
    "drop_dead",
    "merge_reshapes",
    "plain_norms",
    "sink_squeezes",
]

_RESHAPES = (
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default",
    "aten.reshape_as.default",
)  # fmt: skip
CASTS = (
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other",
    "aten._to_copy.default", "aten.type_as.default",
)  # fmt: skip
_PADS = ("aten.pad.default", "aten.constant_pad_nd.default")
# Functions of single values, and of pairs of them.
_POINTWISE = frozenset(
    f"aten.{name}.default"
    for name in (
        "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "hardswish", "hardsigmoid",
        "silu", "sigmoid", "gelu", "leaky_relu", "elu", "selu", "celu", "mish", "softplus",
        "tanh", "abs", "neg", "square", "sqrt", "exp", "alias", "detach",
    )
)  # fmt: skip
_PAIRS = frozenset(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div"))


def drop_checks(graph: fx.Graph) -> None:
    """Take out what only asserts: sizes are checked where the model is called."""
    for node in reversed(list(graph.nodes)):
        name = op_name(node) if node.op == "call_function" else ""
        asserts = name.startswith(("aten._assert", "aten.sym_constrain"))
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            asserts = True
        if asserts and not node.users:
            graph.erase_node(node)


def drop_dead(graph: fx.Graph) -> None:
    """Take out what nobody reads; after the writes are gone, no operator has another effect."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_module", "get_attr"):
            graph.erase_node(node)


def merge_reshapes(graph: fx.Graph) -> None:
    """``view`` of ``view`` is one; none is left where the shape stays, nor padding by nothing.

    Views were made for the strides of the export; a reshape does for any.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in ("aten.lift_fresh_copy.default", "aten.lift_fresh.default"):
            node.target = torch.ops.aten.clone.default
        if name == "aten.mT.default":
            node.target, node.args = torch.ops.aten.transpose.int, (node.args[0], -2, -1)
        if name in _PADS and not any(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            continue
        if name in CASTS and _same_type(node):
            node.replace_all_uses_with(node.args[0])
            continue
        if name == "aten.type_as.default":  # a type, and no value, of its second operand
            node.target = torch.ops.aten.to.dtype
            node.args = (node.args[0], node.meta["val"].dtype)
            continue
        if name not in _RESHAPES:
            continue
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        while operand.op == "call_function" and op_name(operand) in _RESHAPES:
            assert isinstance(operand.args[0], fx.Node)
            operand = operand.args[0]
        if _same_shape(node, operand):
            node.replace_all_uses_with(operand)
            graph.erase_node(node)
            continue
        sizes = _sizes(node)
        if sizes is not None:
            node.target = torch.ops.aten.reshape.default
            node.args, node.kwargs = (operand, sizes), {}
    drop_dead(graph)


def _sizes(node: fx.Node) -> Any:
    """The sizes that a reshape is asked for; None where they cannot be written down."""
    if op_name(node) in ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"):
        return node.args[1]
    shape = list(node.meta["val"].shape)
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(free) > 1:
        # As sizes of the inputs: the operand whose shape is taken has one reader less.
        found = {axis: _size_of_input(node, str(shape[axis])) for axis in free}
        if None in found.values():
            return None
        return [found.get(axis, size) for axis, size in enumerate(shape)]
    return [-1 if axis in free else size for axis, size in enumerate(shape)]


def _size_of_input(node: fx.Node, symbol: str) -> fx.Node | None:
    """A node of a size that is one of the inputs'."""
    graph = node.graph
    for holder in graph.find_nodes(op="placeholder"):
        value = holder.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if str(size) == symbol:
                with graph.inserting_before(node):
                    found = graph.call_function(torch.ops.aten.sym_size.int, (holder, axis))
                found.meta["val"] = size
                return found
    return None


def _same_type(node: fx.Node) -> bool:
    """Whether a cast changes nothing; that of an input may, in another call."""
    if node.args[0].op == "placeholder":  # type: ignore[union-attr]
        return False
    before, after = (n.meta.get("val") for n in (node.args[0], node))  # type: ignore[union-attr]
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and (before.dtype, before.device) == (after.dtype, after.device)
        and "memory_format" not in node.kwargs
    )


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    a, b = left.meta.get("val"), right.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
        return False
    return [str(s) for s in a.shape] == [str(s) for s in b.shape]


def plain_norms(graph: fx.Graph) -> None:
    """Batch norms of three results back to the operator of one."""
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        if name != "aten._native_batch_norm_legit_no_training.default":
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        for reader in list(node.users):
            if reader.args[1] != 0:
                continue
            with graph.inserting_before(node):
                new = graph.call_function(
                    torch.ops.aten.batch_norm.default,
                    (x, weight, bias, mean, var, False, momentum, eps, False),
                )
            new.meta.update(reader.meta)
            reader.replace_all_uses_with(new)
            graph.erase_node(reader)
        if not node.users:
            graph.erase_node(node)


def sink_squeezes(graph: fx.Graph, modules: dict[str, Any]) -> None:
    """Keep images of height 1 images through batch norms, activations and additions.

    A one-dimensional convolution stands between ``unsqueeze(2)`` and ``squeeze(2)``. What follows
    it works on the image as well; so the squeeze moves behind it, and meets the next unsqueeze.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "aten.contiguous.default":
            if _is_squeezed(node.args[0]):  # of an image that is contiguous
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            continue
        if node.op == "call_function" and op_name(node) == "aten.unsqueeze.default":
            inner = node.args[0]
            if _is_squeezed(inner) and node.args[1] == 2:
                assert isinstance(inner, fx.Node) and isinstance(inner.args[0], fx.Node)
                node.replace_all_uses_with(inner.args[0])
                graph.erase_node(node)
            continue
        squeezed = [arg for arg in node.args if _is_squeezed(arg)]
        if not squeezed or not _works_on_images(node, modules):
            continue
        with graph.inserting_before(node):
            for arg in list(node.args):
                if not isinstance(arg, fx.Node):
                    continue
                if _is_squeezed(arg):
                    image = arg.args[0]
                    assert isinstance(image, fx.Node)
                    node.replace_input_with(arg, image)
                else:
                    image = graph.call_function(torch.ops.aten.unsqueeze.default, (arg, 2))
                    image.meta.update(arg.meta)
                    image.meta["val"] = arg.meta["val"].unsqueeze(2)
                    node.replace_input_with(arg, image)
        value = node.meta["val"]
        node.meta["val"] = value.unsqueeze(2)
        with graph.inserting_after(node):
            flat = graph.call_function(torch.ops.aten.squeeze.dim, (node, 2))
        flat.meta.update(node.meta)
        flat.meta["val"] = value
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, f=flat: user is not f)
    drop_dead(graph)


def _is_squeezed(node: Any) -> bool:
    """Whether a node is an image of height 1 without its height."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if op_name(node) != "aten.squeeze.dim" or node.args[1] != 2:
        return False
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == 1


def _works_on_images(node: fx.Node, modules: dict[str, Any]) -> bool:
    """Whether a node does the same to [N, C, 1, L] as to [N, C, L]."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, torch.nn.BatchNorm1d):
            _as_2d(modules, str(node.target))
            return True
        return type(module) in (torch.nn.Dropout,) and not module.training
    if node.op != "call_function":
        return False
    if op_name(node) in _POINTWISE:
        return True
    if op_name(node) not in _PAIRS:
        return False
    left, right = node.args[:2]
    if not isinstance(right, fx.Node):
        return True
    return isinstance(left, fx.Node) and all(
        isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() == 3 for n in (left, right)
    )


def _as_2d(modules: dict[str, Any], name: str) -> None:
    old = modules[name]
    new = torch.nn.BatchNorm2d(old.num_features, eps=old.eps, affine=False)
    new.__dict__.update(old.__dict__)
    modules[name] = new
