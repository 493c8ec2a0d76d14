"""A converted model as a flat graph of operators, with its batch dimension dynamic."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.capture.example import at_least_two
from adalayer_native.capture.exporting import Export
from adalayer_native.capture.exporting import export as export_model
from adalayer_native.capture.opaque import OPAQUE, Call
from adalayer_native.capture.tidying import (
    drop_checks,
    drop_dead,
    merge_reshapes,
    plain_norms,
)
from adalayer_native.capture.vocabulary import FACTORIES, attribute, op_name
from adalayer_native.engine.masks import take_masks_apart
from adalayer_native.engine.repeats import Repeats
from adalayer_native.engine.views import BATCH
from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["Exported", "export", "layer_name", "op_name"]


@dataclass
class Exported:
    """An exported model.

    Attributes:
        module: owner of the parameters that ``get_attr`` nodes name.
        graph: functional operators over one batch; no node writes into its operands.
        inputs: placeholders of tensors, in the order of the call.
        outputs: flat results; anything that is not a node is a constant.
        in_spec: how the inputs are nested in ``(args, kwargs)``.
        out_spec: how the results are nested.
        calls: of submodules that the capture has excluded, by the key that their operator carries.
    """

    module: fx.GraphModule
    graph: fx.Graph
    inputs: list[fx.Node]
    outputs: list[Any]
    in_spec: Any
    out_spec: Any
    calls: dict[str, Call]

    def tensor(self, node: fx.Node) -> Tensor:
        """The parameter or buffer of a ``get_attr`` node."""
        return attribute(self.module, str(node.target))

    def constant(self, node: Any) -> Tensor | None:
        """A tensor that is the same for all samples; None for all others.

        Parameters are, and those that are repeated for every sample of the batch (all that follows
        from parameters and its size is: :class:`Repeats`): then the first axis has size 1 here.
        """
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return self.tensor(node)
        if node.op != "call_function" or op_name(node) != "aten.expand.default":
            return None
        source, sizes = node.args[0], self.sizes(node)
        if not isinstance(source, fx.Node) or source.op != "get_attr" or sizes is None:
            return None
        return self.tensor(source).expand(1, *sizes) if self.folds(node) == 1 else None

    def is_batch(self, value: Any) -> bool:
        """Whether a size is the batch's."""
        # (Comparing symbols themselves would ask whether they are equal in the example.)
        return isinstance(value, torch.SymInt) and str(value) in set(map(str, self._batches))

    @property
    def batch(self) -> Any:
        """The symbol of the batch size: the first axis of the first input that is not fixed."""
        return next(iter(self._batches), self.inputs[0].meta["val"].shape[0])

    @property
    def _batches(self) -> list[torch.SymInt]:
        """Symbols of the batch: inputs that the model does not combine have one each."""
        firsts = [n.meta["val"].shape[0] for n in self.inputs if n.meta["val"].dim()]
        return [size for size in firsts if isinstance(size, torch.SymInt)]

    def folds(self, node: fx.Node) -> int:
        """How many rows of a tensor belong to one sample, all of them in the first axis.

        1 where that axis is the batch; more where other axes were merged into it (tokens, windows);
        0 for other tensors.
        """
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() == 0:
            return 0
        first: Any = value.shape[0]
        if self.is_batch(first):
            return 1
        if not isinstance(first, torch.SymInt):
            return 0
        shares = (first.node.expr / size.node.expr for size in self._batches)
        return next((int(share) for share in shares if share.is_Integer), 0)

    def all_sizes(self, node: fx.Node) -> tuple[int, ...] | None:
        """Sizes of a whole tensor, with :data:`BATCH` for the batch's; None if another one varies.

        It must be a multiple of the batch in one axis, wherever that is.
        """
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape: list[Any] = list(value.shape)
        found: list[int] = []
        for size in shape:
            if isinstance(size, torch.SymInt):
                shares = (size.node.expr / batch.node.expr for batch in self._batches)
                share = next((int(item) for item in shares if item.is_Integer), 0)
                found.append(share * BATCH[0])
            else:
                found.append(int(size))
        batches = [size for size in found if size % BATCH[0] == 0]
        return tuple(found) if len(batches) == 1 and 0 not in batches else None

    def shape(self, node: fx.Node, batch: int) -> tuple[int, ...]:
        """Sizes of a whole tensor for so many samples."""
        sizes = self.all_sizes(node)
        assert sizes is not None
        prime = BATCH[0]
        return tuple(n // prime * batch if n % prime == 0 else n for n in sizes)

    def sizes(self, node: fx.Node) -> tuple[int, ...] | None:
        """Sizes of one sample's share of a tensor; None if the first axis is not the batch.

        Where other axes were merged into the batch (:meth:`folds`), they come first, as one.
        """
        rows = self.folds(node)
        if rows == 0:
            return None
        rest = tuple(node.meta["val"].shape[1:])
        if not all(type(size) is int for size in rest):
            return None
        return rest if rows == 1 else (rows, *rest)


def layer_name(node: fx.Node) -> str:
    """The layer that a node belongs to, as the model calls it, else the node's own name."""
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            name, _, leaf = str(argument.target).rpartition(".")
            if name and leaf in ("weight_packed", "weight"):
                return name
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    if path and all(part.isidentifier() or part.isdigit() for part in path.split(".")):
        return f"{path}.{node.name}"
    return node.name


def export(model: nn.Module, example_inputs: Any) -> Exported:
    """Export ``model`` in evaluation mode with a dynamic batch; other sizes are fixed.

    Args:
        model: with native layers.
        example_inputs: as for :func:`adalayer_native.capture`.

    Raises:
        UnsupportedModelError: torch.export cannot export it or it fixes the batch size; says why.
    """
    inputs = at_least_two(Inputs.of(example_inputs))
    for item in inputs.tensors():
        if item.device.type != "cpu":
            raise UnsupportedModelError(
                f"example_inputs: expected tensors on the CPU, got one on {item.device}"
            )
    inputs = inputs.map(_as_float32)
    if isinstance(model, GraphModel):
        try:
            model.signature.check(model.signature.leaves(inputs.args, inputs.kwargs))
        except InputError as error:
            raise UnsupportedModelError(f"example_inputs: {error}") from None
    closed = getattr(model, "meta", {}).get(OPAQUE, ())
    exported = export_model(model, inputs, free_sizes=False, exclude=closed)
    return flattened(model, exported)


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def flattened(model: nn.Module, exported: Export) -> Exported:
    """An export without checks and views of views, and with constants computed."""
    module, graph = exported.module, exported.module.graph
    drop_checks(graph)
    plain_norms(graph)
    merge_reshapes(graph)
    fold_constants(module)
    _fold_repeats(module)
    take_masks_apart(module)
    drop_dead(graph)
    outputs = next(node for node in graph.nodes if node.op == "output")
    flat = pytree.tree_leaves(outputs.args[0])
    inputs = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    ]
    spec = exported.program.call_spec
    found = Exported(module, graph, inputs, flat, spec.in_spec, spec.out_spec, exported.calls)
    if isinstance(found.batch, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported with a dynamic batch: its code treats a "
            f"batch of {found.batch} otherwise than others; expected a forward that treats all "
            "images alike"
        )
    return found


def _fold_repeats(module: fx.GraphModule) -> None:
    """Write what depends on parameters and the batch's size as constants."""
    holders: dict[fx.Node, Any] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() and type(value.shape[0]) is not int:
            holders[node] = value.shape[0]
    if holders:
        Repeats(module, holders).fold()


_SCALARS = (torch.SymFloat, torch.SymInt, torch.SymBool, int, float, bool)


def fold_constants(module: fx.GraphModule) -> None:
    """Replace what depends on parameters alone by its value."""
    for node in list(module.graph.nodes):
        sources = node.all_input_nodes
        piece = node.target is operator.getitem and isinstance(node.args[0], fx.Node)
        if piece:  # of a parameter that is split
            sources = sources[0].all_input_nodes
        elif not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not (sources or op_name(node) in FACTORIES):
            continue
        if any(item.op != "get_attr" for item in sources):
            continue
        known = node.meta.get("val")
        if not isinstance(known, (Tensor, *_SCALARS)):
            continue
        value = _computed(module, node.args[0])[node.args[1]] if piece else _computed(module, node)
        if not isinstance(value, Tensor):
            _write_out(node, value)
            continue
        name = f"folded_{node.name}"
        module.register_buffer(name, value.detach().clone(), persistent=False)
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)


def _computed(module: fx.GraphModule, node: Any) -> Any:
    """The result of an operator on parameters."""
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda item: attribute(module, str(item.target))
    )
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _write_out(node: fx.Node, value: Any) -> None:
    """A number in the place of the node that computes it."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda item: value if item is node else item
        )
    node.graph.erase_node(node)
