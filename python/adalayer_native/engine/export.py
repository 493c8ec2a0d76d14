"""A model as a flat graph of operators, with its batch dimension dynamic."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native.errors import AdaError, UnsupportedModelError

__all__ = ["Exported", "export", "layer_name", "op_name"]

# Results that share memory with their operand.
_SHARING = (
    "alias.default", "view.default", "reshape.default", "flatten.using_ints", "unflatten.int",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "permute.default",
    "transpose.int", "t.default", "slice.Tensor", "select.int", "narrow.default", "chunk.default",
    "split.Tensor", "split_with_sizes.default", "unbind.int", "expand.default", "detach.default",
    "contiguous.default", "view_as.default", "dropout.default", "to.dtype",
)  # fmt: skip
_ALIASES = frozenset(f"aten.{name}" for name in _SHARING)


@dataclass
class Exported:
    """An exported model.

    Attributes:
        module: owner of the parameters that ``get_attr`` nodes name.
        graph: functional operators over one batch; no node writes into its operands.
        inputs: placeholders, in the order of the call.
        outputs: flat results; anything that is not a node is a constant.
        out_spec: how the results are nested.
    """

    module: fx.GraphModule
    graph: fx.Graph
    inputs: list[fx.Node]
    outputs: list[Any]
    out_spec: Any

    def tensor(self, node: fx.Node) -> Tensor:
        """The parameter or buffer of a ``get_attr`` node."""
        return attribute(self.module, str(node.target))

    def is_batch(self, value: Any) -> bool:
        """Whether a size is the batch's."""
        return isinstance(value, torch.SymInt) and value == self.batch

    @property
    def batch(self) -> Any:
        """The symbol of the batch size."""
        return self.inputs[0].meta["val"].shape[0]

    def sizes(self, node: fx.Node) -> tuple[int, ...] | None:
        """Sizes of a tensor without its batch; None if the first axis is not the batch alone."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() == 0 or not self.is_batch(value.shape[0]):
            return None
        rest = tuple(value.shape[1:])
        return rest if all(type(size) is int for size in rest) else None


def op_name(node: fx.Node) -> str:
    """``aten.relu.default`` for that operator, the function's name for others."""
    target = node.target
    return (
        str(target)
        if isinstance(target, torch._ops.OpOverload)
        else str(getattr(target, "__name__", target))
    )


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


def example_tuple(example_inputs: Any) -> tuple[Tensor, ...]:
    """The example inputs as a tuple, with at least two images each.

    Raises:
        UnsupportedModelError: not tensors, no images, or batches of different sizes.
    """
    items = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not items or not all(isinstance(item, Tensor) for item in items):
        raise UnsupportedModelError(
            "example_inputs: expected a tensor or a sequence of tensors, got "
            f"{[type(item).__name__ for item in items]}"
        )
    sizes = {tuple(item.shape[:1]) for item in items}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise UnsupportedModelError(
            "example_inputs: expected tensors of one batch size of at least 1, got shapes "
            f"{[list(item.shape) for item in items]}"
        )
    found = []
    for item in items:
        if item.device.type != "cpu" or not item.is_floating_point():
            raise UnsupportedModelError(
                f"example_inputs: expected floating point tensors on the CPU, got {item.dtype} "
                f"on {item.device}"
            )
        item = item.detach().float()
        # torch.export takes a batch of 1 for a constant.
        found.append(torch.cat([item, item]) if item.shape[0] == 1 else item)
    return tuple(found)


def export(model: nn.Module, example_inputs: Any) -> Exported:
    """Export ``model`` in evaluation mode with a dynamic batch.

    Raises:
        UnsupportedModelError: torch.export cannot export it or it fixes the batch size; says why.
    """
    examples = example_tuple(example_inputs)
    training = {module: module.training for module in model.modules()}
    model.eval()
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in examples)
    signature = inspect.signature(model.forward)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        shapes = (shapes,)  # type: ignore[assignment]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export about itself
            program = torch.export.export(model, examples, dynamic_shapes=shapes, strict=False)
            options = inspect.signature(program.module).parameters
            module = program.module(
                **({"check_guards": False} if "check_guards" in options else {})
            )
    except AdaError:
        raise
    except Exception as error:  # export runs the user's code: anything may come out of it
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported with a dynamic batch "
            f"({type(error).__name__}: {str(error).strip()[:600]}); expected a forward that treats "
            "all images alike and has no control flow that depends on tensor values"
        ) from error
    finally:
        for item, mode in training.items():
            item.training = mode
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in list(graph.nodes):
        if (node.op == "call_module" and not node.users) or (
            op_name(node).startswith(("aten._assert", "aten.sym_constrain")) and not node.users
        ):  # checks of the inputs
            graph.erase_node(node)
    functionalise(graph)
    fold_constants(module)
    graph.eliminate_dead_code()
    outputs = next(node for node in graph.nodes if node.op == "output")
    flat = pytree.tree_leaves(outputs.args[0])
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return Exported(module, graph, inputs, flat, program.call_spec.out_spec)


def functionalise(graph: fx.Graph) -> None:
    """Replace operators that write into their operand by those that return a new tensor.

    Raises:
        UnsupportedModelError: the old memory is read later through another view of it, or the
            operator has no other form; names it.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = target._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overload = getattr(packet, target._overloadname, None) if name.endswith("_") else None
        operand = node.args[0]
        if overload is None or not isinstance(operand, fx.Node):
            raise UnsupportedModelError(
                f"layer {layer_name(node)!r}: {op_name(node)} writes into memory in a way that "
                "the engine does not follow"
            )
        node.target = overload
        for reader in list(operand.users):
            if order[reader] > order[node]:
                reader.replace_input_with(operand, node)
        relatives = _family(operand) - {operand, node}
        if any(order[reader] > order[node] for item in relatives for reader in item.users):
            raise UnsupportedModelError(
                f"layer {layer_name(node)!r}: {op_name(node)} writes into memory that is read "
                "later through another view of it"
            )


def fold_constants(module: fx.GraphModule) -> None:
    """Replace what depends on parameters alone by its value."""
    for node in list(module.graph.nodes):
        sources = node.all_input_nodes
        foldable = isinstance(node.target, torch._ops.OpOverload) and sources
        if not foldable or any(item.op != "get_attr" for item in sources):
            continue
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda item: attribute(module, str(item.target))
        )
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        name = f"folded_{node.name}"
        module.register_buffer(name, value.detach().clone(), persistent=False)
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)


def attribute(module: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found.detach()


def _family(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share memory with one."""
    found = {node}
    pending = [node]

    def visit(item: Any) -> None:
        if isinstance(item, fx.Node) and item not in found:
            found.add(item)
            pending.append(item)

    while pending:
        item = pending.pop()
        if op_name(item) in _ALIASES or item.target is operator.getitem:
            visit(item.args[0])
        for reader in item.users:
            if op_name(reader) in _ALIASES or reader.target is operator.getitem:
                visit(reader)
    return found


def multiply_accumulates(exported: Exported, node: fx.Node) -> int:
    """Products per image of a convolution or linear layer, 0 for other nodes."""
    name = op_name(node)
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return 0
    outputs = math.prod(int(size) for size in value.shape[1:] if isinstance(size, int))
    if name == "adalayer.linear.default":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return outputs * int(source.meta["val"].shape[-1])
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, fx.Node):
        return 0
    if name in ("adalayer.conv2d.default", "adalayer.conv_transpose2d.default"):
        from adalayer_native import ops

        shape: Sequence[int] = ops.packed_info(exported.tensor(weight))["shape"]
        per_output = math.prod(shape[1:])
        if name == "adalayer.conv2d.default":
            return outputs * per_output
        source = node.args[0]
        assert isinstance(source, fx.Node)
        pixels = math.prod(int(size) for size in source.meta["val"].shape[2:])
        return pixels * shape[0] * per_output
    shape = tuple(weight.meta["val"].shape) if "val" in weight.meta else ()
    if name in ("aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"):
        return outputs * math.prod(shape[1:])
    if name == "aten.linear.default":
        return outputs * shape[-1]
    if name.startswith("aten.conv_transpose2d"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        pixels = math.prod(int(size) for size in source.meta["val"].shape[2:])
        return pixels * math.prod(shape)
    return 0
