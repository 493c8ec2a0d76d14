"""From an exported program to a captured model: names that a user knows, over a tree of modules."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture import opaque, tidying
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.example import Inputs
from adalayer_native.capture.exporting import Export
from adalayer_native.capture.lifting import Lifter
from adalayer_native.capture.model import (
    SIGNATURE,
    GraphModel,
    Port,
    Signature,
    TensorInfo,
    code_of,
)
from adalayer_native.capture.recurrence import link_recurrences
from adalayer_native.capture.spellings import plain_products
from adalayer_native.errors import UnsupportedModelError

__all__ = ["assembled"]

# Where tensors go whose own place a layer has taken.
CONSTANTS = "constants"
# Layers of the model that the graph does not compute as such.
UNCALLED = "uncalled"


def assembled(
    model: nn.Module, exported: Export, inputs: Inputs, marks: dict[str, nn.Module]
) -> GraphModel:
    module, graph = exported.module, exported.module.graph
    tidying.drop_checks(graph)
    _refuse_branches(graph)
    for node in graph.nodes:
        _place(node, model)
    _drop_writes(graph)
    tidying.merge_reshapes(graph)
    plain_products(graph)
    lifter = Lifter(module, model, marks)
    modules = lifter.run() | opaque.call_modules(graph, exported.calls)
    tidying.drop_dead(graph)
    tidying.sink_squeezes(graph, modules)
    signature = _signature(model, exported, inputs)
    found = _over_a_tree(model, module, modules, signature)
    excluded = {call.name for call in exported.calls.values()}
    called = {str(node.target) for node in found.graph.nodes if node.op == "call_module"}
    found.meta[opaque.OPAQUE] = sorted(excluded & called)
    return found


def _refuse_branches(graph: fx.Graph) -> None:
    """Raise :class:`UnsupportedModelError` where code runs or does not run by a tensor's value."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            trace = node.meta.get("stack_trace") or ""
            lines = [line.strip() for line in trace.splitlines() if line.strip()]
            place = next((line for line in reversed(lines) if line.startswith("File ")), "")
            raise UnsupportedModelError(
                f"torch.{node.target.name()}"
                + (f" at {place}" if place else "")
                + ": a graph has one path for all values; name the submodule that calls it in "
                "capture(..., exclude=[...]): it then stays as it is, in torch"
            )


def _place(node: fx.Node, model: nn.Module) -> None:
    """Remember which module computed a node, and whether it is one of torch's own."""
    stack = [str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1] if stack else ""
    if not all(part.isidentifier() or part.isdigit() for part in path.split(".") if part):
        path = ""
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        owner = None
        path = ""
    node.meta["path"] = path
    node.meta["leaf"] = path != "" and type(owner).__module__.startswith("torch.nn")


def _drop_writes(graph: fx.Graph) -> None:
    """Writes into buffers are dropped where nothing that is returned can see them.

    Raises:
        UnsupportedModelError: what is returned depends on a buffer that the forward writes into.
    """
    written = set()
    for node in list(graph.nodes):
        if node.op == "call_function" and table.op_name(node) == "aten.copy_.default":
            target, value = node.args[:2]
            assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
            if target.op == "get_attr":
                written.add(target)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    tidying.drop_dead(graph)
    for node in graph.nodes:
        if node in written:
            raise UnsupportedModelError(
                f"the model's forward writes into its buffer {node.target!r} and reads it: what it "
                "returns depends on the calls before; expected a model without a state"
            )


def _signature(model: nn.Module, exported: Export, inputs: Inputs) -> Signature:
    spec = exported.program.call_spec
    leaves = pytree.tree_flatten_with_path((inputs.args, inputs.kwargs))[0]
    holders = [n for n in exported.module.graph.nodes if n.op == "placeholder"]
    entry = exported.program.module_call_graph[0].signature
    names = tuple(getattr(entry, "forward_arg_names", None) or ())
    ports, constants = [], {}
    batch = None
    for position, ((path, leaf), node) in enumerate(zip(leaves, holders, strict=True)):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            constants[position] = leaf
            continue
        if batch is None and value.dim():
            batch = value.shape[0]
            if isinstance(batch, int):
                raise UnsupportedModelError(
                    f"{type(model).__name__} fixes the batch size: its code treats a batch of "
                    f"{batch} otherwise than another; expected a forward that treats all samples "
                    "alike"
                )
        shape = tuple(
            size if isinstance(size, int) else "batch" if str(size) == str(batch) else str(size)
            for size in value.shape
        )
        cast = value.dtype == torch.float32 and all(map(_is_cast, node.users))
        ports.append(Port(_port_name(path, names), shape, value.dtype, cast))
    if not ports:
        raise UnsupportedModelError(f"{type(model).__name__} takes no tensor")
    return Signature(
        ports,
        constants,
        spec.in_spec,
        spec.out_spec,
        exported.guards,
        names,
        forward=_forward_of(model),
    )


def _forward_of(model: nn.Module) -> inspect.Signature:
    """Names and defaults of a forward's arguments; annotations may be of any kind."""
    found = inspect.signature(model.forward)
    plain = [item.replace(annotation=item.empty) for item in found.parameters.values()]
    return found.replace(parameters=plain, return_annotation=found.empty)


def _is_cast(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return True  # its size, which does not depend on the type
    return table.op_name(node) in tidying.CASTS and value.dtype == torch.float32


def _port_name(path: Any, names: Sequence[str]) -> str:
    key = path[1]
    if isinstance(key, pytree.SequenceKey):
        name = names[key.idx] if key.idx < len(names) else f"args_{key.idx}"
    else:
        name = str(key.key)
    return name + pytree.keystr(path[2:])


def _over_a_tree(
    model: nn.Module,
    module: fx.GraphModule,
    modules: dict[str, nn.Module],
    signature: Signature,
) -> GraphModel:
    """A new graph with names that a user knows, over a tree of what it reads."""
    root = nn.Module()
    for name, lifted in modules.items():
        _set(root, name, lifted)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    constants: dict[str, str] = {}
    plain = (
        isinstance(code := code_of(signature), fx.graph.CodeGen) and type(code) is fx.graph.CodeGen
    )
    holders = iter(_holder_names(signature))
    for node in module.graph.nodes:
        if node.op == "output":
            flat = [new[item] if isinstance(item, fx.Node) else item for item in node.args[0]]
            nested = pytree.tree_unflatten(flat, signature.out_spec) if plain else tuple(flat)
            graph.output(nested)
            continue
        if node.op == "placeholder":
            name = next(holders)
            copied = graph.placeholder(name)
        elif node.op == "get_attr":
            target = str(node.target)
            if target not in constants:
                constants[target] = _hold(root, target, _attribute(module, target), modules)
            copied = graph.create_node("get_attr", constants[target])
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
            copied = graph.create_node(node.op, node.target, args, kwargs, name=_name(node))
        copied.meta.update({k: node.meta[k] for k in ("val", "path", "macs") if k in node.meta})
        info = TensorInfo.of(node.meta.get("val"))
        if info is not None:
            copied.meta["info"] = info
        new[node] = copied
    graph.set_codegen(code)
    graph.lint()
    _unshare(root)
    found = GraphModel(root, graph, class_name=type(model).__name__)
    found.meta[SIGNATURE] = signature
    found.meta[UNCALLED] = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, table.LAYERS) and name and name not in modules
    ]
    link_recurrences(found)
    return found.eval()


def _holder_names(signature: Signature) -> list[str]:
    """Names of all placeholders: those of the arguments, where each is a tensor."""
    total = signature.in_spec.num_leaves
    names = []
    ports = iter(signature.ports)
    for position in range(total):
        if position in signature.constants:
            names.append(f"constant_{position}")
        else:
            name = next(ports).name
            names.append(name if name.isidentifier() else f"input_{position}")
    return names


def _name(node: fx.Node) -> str:
    """What quantizers and messages call a value: after its module, else after the operator."""
    if node.op == "call_module":
        return str(node.target).replace(".", "_")
    if TensorInfo.of(node.meta.get("val")) is None:
        return "size"
    if node.meta.get("leaf"):
        return str(node.meta["path"]).replace(".", "_")
    name = table.op_name(node)
    name = name.split(".")[1] if "." in name else name
    return f"{name}_value" if hasattr(nn.Module, name) else name  # quantizers are modules


def _hold(root: nn.Module, target: str, tensor: Tensor, modules: dict[str, nn.Module]) -> str:
    """Keep a tensor that operators read, under its own name unless a module is there."""
    taken = any(
        name == target or name.startswith(f"{target}.") or target.startswith(f"{name}.")
        for name in modules
    )
    if taken:
        target = f"{CONSTANTS}.{target.replace('.', '_')}"
    _set(root, target, tensor)
    return target


def _set(root: nn.Module, path: str, item: nn.Module | Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = root
    for part in parent.split(".") if parent else ():
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        child = owner._modules[part]
        assert child is not None
        owner = child
    if isinstance(item, nn.Module):
        before = owner._modules.get(leaf)
        if before is not None:  # its children came first
            for name, child in before._modules.items():
                item.add_module(name, child)
        owner.add_module(leaf, item)
    elif isinstance(item, nn.Parameter):
        owner.register_parameter(leaf, item)
    else:
        owner.register_buffer(leaf, item)


def _attribute(module: nn.Module, path: str) -> Tensor:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


def _unshare(root: nn.Module) -> None:
    """Tensors of different names have memory of their own: a repair writes into one of them."""
    seen: set[int] = set()
    for owner in root.modules():
        for kind in (owner._parameters, owner._buffers):
            for leaf, tensor in kind.items():
                if tensor is None or tensor.device.type == "meta":
                    continue
                place = tensor.untyped_storage().data_ptr()
                if place in seen and tensor.numel():
                    fresh: Any = tensor.detach().clone()
                    if isinstance(tensor, nn.Parameter):
                        fresh = nn.Parameter(fresh, tensor.requires_grad)
                    kind[leaf] = fresh
                seen.add(place)
