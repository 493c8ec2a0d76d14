"""``capture``: any model that torch.export can follow, as one graph of operators and layers."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture import tidying
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.example import (
    Inputs,
    at_least_two,
    example_of,
    guessed_example,
    positional_inputs,
)
from adalayer_native.capture.exporting import Export, export, exported_of, untouched
from adalayer_native.capture.lifting import Lifter
from adalayer_native.capture.model import (
    SIGNATURE,
    GraphModel,
    Port,
    Signature,
    TensorInfo,
    code_of,
)
from adalayer_native.errors import UnsupportedModelError

__all__ = ["capture", "captured"]

# Where tensors go whose own place a layer has taken.
CONSTANTS = "constants"
# Layers of the model that the graph does not compute as such.
UNCALLED = "uncalled"
_BATCHES = 64  # the largest batch that is tried


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
) -> GraphModel:
    """A model as a graph: what it computes in evaluation mode, whatever its classes are.

    torch.export follows one call. In the graph, writes into tensors have become new tensors, and
    hooks, subclasses, parametrizations and Python control flow have done their work. Convolutions
    and products with constant weights are modules (``nn.Conv2d``, ``nn.ConvTranspose2d``,
    ``nn.Linear``) under the names that the model has for them, a 1-D convolution as one of height
    1; batch norms, dropouts and stochastic depth are modules, too, so that the graph trains. The
    batch is free, and heights, widths and lengths are where the model's code allows it.

    The model is not changed; parameters that the graph takes over share its memory.

    Args:
        model: an ``nn.Module``, or what ``torch.export.export`` returned for one with a free batch.
        example_inputs: of one call: a tensor, a tuple of positional arguments or a dictionary of
            arguments by name; values do not matter, only shapes and types. Without it one is tried
            that fits the first layer of a model with one input.

    Raises:
        UnsupportedModelError: the model cannot be followed, or the graph does not compute what it
            computes; says why and where.
    """
    if isinstance(model, GraphModel):
        return model
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}"
        )
    model = _in_memory(_unwrapped(model))
    _check(model)
    inputs = guessed_example(model) if example_inputs is None else Inputs.of(example_inputs)
    inputs = _on_device(model, at_least_two(inputs).map(_not_meta))
    return _captured(model, inputs[:2], free_sizes=True)


def _captured(model: nn.Module, inputs: Inputs, *, free_sizes: bool) -> GraphModel:
    marks = _dropouts(model)
    # A mark hides that a dropout returns its operand itself: code that writes into the result is
    # followed without marks only.
    ways = [(marks, False), (marks, True), *([({}, True)] if marks else [])]
    for marked, thorough in ways:
        with _marking(marked):
            exported = export(model, inputs, free_sizes=free_sizes, thorough=thorough)
        found = _build(model, exported, inputs, marked)
        difference = _difference(model, found, inputs)
        if difference is None:
            found.signature.single = _difference(model, found, inputs[:1]) is None
            _try_batches(model, found, inputs)
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__}: the captured graph does not compute what the model computes "
        f"({difference}); it depends on something that torch.export does not see (a random "
        "number, a global, a value of an earlier call)"
    )


def _try_batches(model: nn.Module, found: GraphModel, inputs: Inputs) -> None:
    """Drop conditions like ``x.shape[0] != 8`` where a batch of 8 is treated like any other.

    A module that remembers the shape of its last call, and compares, leaves them.
    """
    kept = []
    for text, shown in found.signature.guards:
        unequal = re.fullmatch(r"s\[\d+\]\[0\] != (\d+)", text)
        count = int(unequal.group(1)) if unequal else 0
        if 1 < count <= _BATCHES:
            index = torch.arange(count) % inputs.count
            batch = inputs.map(
                lambda t, index=index: (
                    t[index.to(t.device)] if t.dim() and t.shape[0] == inputs.count else t
                )
            )
            before, found.signature.guards = found.signature.guards, []
            same = _difference(model, found, batch) is None
            found.signature.guards = before
            if same:
                continue
        kept.append((text, shown))
    found.signature.guards = kept


def captured(model: Any, data: Iterable[Any] | None = None, example: Any = None) -> GraphModel:
    """:func:`capture`, kept for as long as the model stays as it is.

    Args:
        model: a model, or what ``capture`` returned.
        data: its first batch is the example.
        example: takes precedence over ``data``.
    """
    if isinstance(model, GraphModel):
        return model
    if not isinstance(model, nn.Module):
        return capture(model)
    model = _unwrapped(model)
    state = _state_of(model)
    kept = _kept.get(model)
    inputs = None
    if example is not None:
        inputs = Inputs.of(example)
    elif data is not None:
        inputs = example_of(data, positional_inputs(model))
    if kept is not None and kept[0] == state and (inputs is None or _fits(kept[1], inputs)):
        return kept[1]
    found = capture(model, inputs)
    _kept[model] = (state, found)
    return found


_kept: weakref.WeakKeyDictionary[nn.Module, tuple[str, GraphModel]] = weakref.WeakKeyDictionary()


def _fits(model: GraphModel, inputs: Inputs) -> bool:
    from adalayer_native.errors import InputError

    try:
        model.signature.check(model.signature.leaves(inputs.args, inputs.kwargs))
    except InputError:
        return False
    return True


def _state_of(model: nn.Module) -> str:
    """Digest of all that a capture depends on: structure, plain attributes, hooks, values."""
    digest = hashlib.blake2b()
    for name, module in model.named_modules():
        own = [
            (key, value)
            for key, value in sorted(module.__dict__.items())
            if isinstance(value, (int, float, str, bytes, tuple, type(None))) and key != "training"
        ]
        hooks = [list(map(id, getattr(module, key).values())) for key in _HOOKS]
        forward = id(module.__dict__.get("forward"))
        digest.update(repr((name, id(type(module)), own, hooks, forward)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what runs it elsewhere or otherwise."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod") and isinstance(model._orig_mod, nn.Module):
            model = model._orig_mod  # of torch.compile
        else:
            return model


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or type(model).__name__!r} is a TorchScript module, which cannot be looked "
                "into; give the Python module that it was made from"
            )
        for leaf, tensor in module._parameters.items():
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise UnsupportedModelError(
                    f"layer {name!r} is lazy and has no {leaf} yet; run the model once first"
                )


def _not_meta(tensor: Tensor) -> Tensor:
    on_meta = tensor.device.type == "meta"
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if on_meta else tensor


def _on_device(model: nn.Module, inputs: Inputs) -> Inputs:
    reference = next(itertools.chain(model.parameters(), model.buffers()), None)
    return inputs if reference is None else inputs.map(lambda t: t.to(reference.device))


def _in_memory(model: nn.Module) -> nn.Module:
    """A model whose tensors are in memory: a copy with zeros, where it is on the meta device.

    What it computes is then of no use, but its graph is, for values from a file.
    """
    if not any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.device.type == "meta":
                    zeros: Any = torch.zeros(value.shape, dtype=value.dtype)
                    if isinstance(value, nn.Parameter):
                        zeros = nn.Parameter(zeros, value.requires_grad)
                    held[name] = zeros
    return model


# -- dropouts -------------------------------------------------------------------------------------


def _dropouts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if table.is_dropout(m)}


@contextmanager
def _marking(marks: dict[str, nn.Module]) -> Iterator[None]:
    """While a model is exported, its dropouts leave a mark: outside training they leave nothing."""
    before = {name: module.__dict__.get("forward") for name, module in marks.items()}
    try:
        for name, module in marks.items():
            module.__dict__["forward"] = _Mark(name)
        yield
    finally:
        for name, module in marks.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        result: Tensor = torch.ops.adalayer.mark(x, self.name)
        return result


@torch.library.custom_op("adalayer::mark", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    """Stands for a module that does nothing outside training, while a model is captured."""
    return x.clone()


@_mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


# -- the graph ------------------------------------------------------------------------------------


def _from_program(program: torch.export.ExportedProgram) -> GraphModel:
    exported = exported_of(program, free_sizes=True) or exported_of(program, thorough=True)
    if exported is None:
        raise UnsupportedModelError(
            "the exported program has conditions on its sizes that cannot be read; export it with "
            "a free batch alone"
        )
    given = program.example_inputs
    if given is None:
        raise UnsupportedModelError("the exported program holds no example inputs")
    root = program.module()
    inputs = Inputs(tuple(given[0]), dict(given[1]))
    return _build(root, exported, inputs, {})


def _build(
    model: nn.Module, exported: Export, inputs: Inputs, marks: dict[str, nn.Module]
) -> GraphModel:
    module, graph = exported.module, exported.module.graph
    tidying.drop_checks(graph)
    for node in graph.nodes:
        _place(node, model)
    _drop_writes(graph)
    tidying.merge_reshapes(graph)
    lifter = Lifter(module, model, marks)
    modules = lifter.run()
    tidying.drop_dead(graph)
    tidying.sink_squeezes(graph, modules)
    signature = _signature(model, exported, inputs)
    return _assembled(model, module, modules, signature)


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


def _assembled(
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
        copied.meta.update({k: node.meta[k] for k in ("val", "path") if k in node.meta})
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
    owner = target.rpartition(".")[0]
    taken = (
        owner in modules
        or target in modules
        or any(name == target or name.startswith(f"{target}.") for name in modules)
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


# -- whether it is the same -----------------------------------------------------------------------


def _difference(model: nn.Module, found: GraphModel, inputs: Inputs) -> str | None:
    """How the graph's results differ from the model's; None if they are the same."""
    fresh = inputs.map(torch.clone), inputs.map(torch.clone)
    with untouched(model), torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            torch.manual_seed(0)
            wanted = copy.copy(fresh[0](model))
            torch.manual_seed(0)
            got = fresh[1](found)
        except Exception as error:  # whatever it is: it does not compute the same
            return f"{type(error).__name__}: {error}"
    left, right = pytree.tree_leaves(wanted), pytree.tree_leaves(got)
    if len(left) != len(right):
        return f"{len(right)} results instead of {len(left)}"
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                return f"{b} instead of a tensor of shape {list(a.shape)}"
            if not torch.equal(a, b) and not _close(a, b):
                return f"largest difference {float((a.double() - b.double()).abs().max()):.3g}"
        elif a != b:
            return f"{b!r} instead of {a!r}"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of float sums."""
    if not a.is_floating_point():
        return False
    scale = float(a.double().abs().nan_to_num().max()) or 1.0
    tolerance = 64 * torch.finfo(a.dtype).eps * scale
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True)
