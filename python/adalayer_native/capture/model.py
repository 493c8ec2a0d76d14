"""What a capture gives: a graph of operators with its layers as modules."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["GraphModel", "Port", "Signature", "TensorInfo", "info_of"]

SIGNATURE = "signature"
OPAQUE = "opaque"  # in meta: the names of excluded submodules


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is computed.

    Attributes:
        shape: whole numbers, or the text of an expression for a size that the inputs decide.
        dtype: of its elements.
        sizes: in the example. Operands that torch adds without broadcasting have equal ones, and
            then in every other call: the export has made that a condition.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> TensorInfo | tuple[TensorInfo, ...] | None:
        """From a (fake) tensor or a sequence of them; None for anything else."""
        if isinstance(value, Tensor):
            shape = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
            return cls(shape, value.dtype, tuple(map(_in_example, value.shape)))
        if isinstance(value, (list, tuple)) and value:
            # Results of split, or of an LSTM; sizes are no tensors.
            items = [cls.of(item) for item in value]
            if all(isinstance(item, cls) for item in items):
                return tuple(item for item in items if isinstance(item, cls))
        return None

    @property
    def is_float32(self) -> bool:
        """Whether it can lie on a u8 grid at all."""
        return self.dtype == torch.float32


def _in_example(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def info_of(node: Any) -> TensorInfo | tuple[TensorInfo, ...] | None:
    """What is known of a node's result; None where it is no tensor (a size, say)."""
    return node.meta.get("info") if isinstance(node, fx.Node) else None


@dataclass(frozen=True)
class Port:
    """One input tensor of a captured model.

    Attributes:
        name: as messages call it: ``x``, or ``batch['image']`` inside a container.
        shape: sizes; a text stands for one that is free, ``"batch"`` for the batch's.
        dtype: of its elements.
        cast: whether the model begins with a cast to float32, so that integers do as well.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    cast: bool = False


@dataclass
class Signature:
    """How a captured model is called and what it gives back.

    Attributes:
        ports: the input tensors, flat, in the order of the graph's placeholders.
        constants: by position among all leaves of the arguments, what was no tensor in the example
            (a flag, a number); a call must give the same.
        in_spec: how the leaves are nested in ``(args, kwargs)``.
        out_spec: how the results are.
        guards: conditions on the free sizes that the model's own code has asked for, as Python
            expressions over ``s[port][axis]``, with the text that is shown.
        parameters: names of the positional arguments.
        single: whether a batch of one gives what the model gives.
        forward: names and defaults of the model's own arguments.
    """

    ports: list[Port]
    constants: dict[int, Any]
    in_spec: Any
    out_spec: Any
    guards: list[tuple[str, str]] = field(default_factory=list)
    parameters: tuple[str, ...] = ()
    single: bool = True
    forward: inspect.Signature | None = None

    def __deepcopy__(self, memo: Any) -> Signature:
        return self  # never changed once a model is there

    def __reduce__(self) -> tuple[Any, ...]:
        # torch warns about its own leaves when they are pickled.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            specs = pickle.dumps((self.in_spec, self.out_spec))
        rest = (self.ports, self.constants, self.guards, self.parameters, self.single)
        return _signature, (specs, *rest, self.forward)

    @property
    def is_plain(self) -> bool:
        """Whether every argument is a tensor of its own name."""
        args, kwargs = self.arguments
        return not self.constants and all(
            leaf.is_leaf() for leaf in (*children_of(args), *children_of(kwargs))
        )

    @property
    def arguments(self) -> tuple[Any, Any]:
        """Structure of the positional arguments, and of those by name."""
        args, kwargs = children_of(self.in_spec)
        return args, kwargs

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """All leaves of a call, in the order of the placeholders.

        Raises:
            InputError: nested otherwise than the example of the capture.
        """
        names = list(self.arguments[1].context or ())
        positional = self.arguments[0].num_children
        args, kwargs = self._without_defaults(list(args), dict(kwargs), positional, names)
        # A positional argument may come by name and the other way round.
        for name in self.parameters[len(args) : positional]:
            if name in kwargs:
                args.append(kwargs.pop(name))
        for name in self.parameters[positional : len(args)]:
            if name in names and name not in kwargs:
                kwargs[name] = args.pop(positional)
        unknown = sorted(set(kwargs) - set(names))
        if len(args) != positional or unknown or set(names) - set(kwargs):
            raise InputError(
                f"expected the arguments that the model was captured with, "
                f"{self.describe()}; got {len(args)} positional ones"
                + (f" and {sorted(kwargs)}" if kwargs else "")
            )
        ordered = {name: kwargs[name] for name in names}
        found, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != self.in_spec:
            raise InputError(
                f"expected arguments nested as in the example of the capture, {self.in_spec}; "
                f"got {spec}"
            )
        return list(found)

    def _without_defaults(
        self, args: list[Any], kwargs: dict[str, Any], positional: int, names: list[str]
    ) -> tuple[list[Any], dict[str, Any]]:
        """A call without the arguments that the example left out and that are at their defaults."""
        if self.forward is None:
            return args, kwargs
        defaults = {
            name: item.default
            for name, item in self.forward.parameters.items()
            if item.default is not item.empty and name not in names
        }
        order = list(self.forward.parameters)
        while len(args) > positional and len(args) <= len(order):
            name = order[len(args) - 1]
            if name not in defaults or not _same(args[-1], defaults[name]):
                break
            args.pop()
        captured = self.parameters[:positional]
        for name, default in defaults.items():
            if name in kwargs and name not in captured and _same(kwargs[name], default):
                del kwargs[name]
        return args, kwargs

    def describe(self) -> str:
        """The arguments in a few words."""
        shown = [
            f"{port.name} [{', '.join(map(str, port.shape))}] {str(port.dtype)[6:]}"
            for port in self.ports
        ]
        return "(" + ", ".join(shown) + ")"

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise :class:`InputError` unless a call fits what was captured.

        A model that branches on a size gives another graph for another branch: a call that would
        take it must be an error and not another result.
        """
        tensors = []
        for position, leaf in enumerate(leaves):
            if position in self.constants:
                wanted = self.constants[position]
                if type(leaf) is not type(wanted) or leaf != wanted:
                    raise InputError(
                        f"argument {position} was {wanted!r} when the model was captured, got "
                        f"{leaf!r}; capture it with that value"
                    )
            else:
                tensors.append(leaf)
        free: dict[str, int] = {}
        for port, x in zip(self.ports, tensors, strict=True):
            self._check_tensor(port, x, free)
        batch = free.get("batch")
        if batch == 1 and not self.single:
            raise InputError("the model treats a batch of 1 otherwise than others; give 2 or more")
        if self.guards:
            # torch.export reasons about batches from 2 on; one sample of every input was tried
            # (``single``), and inputs may have batches of their own.
            first = {port.shape[0] for port in self.ports if port.shape}
            batches = {known for known in free if known in first}
            tried = batches if all(free[known] == 1 for known in batches) else {"batch"}
            sizes = [
                tuple(
                    max(size, 2) if known in tried else size
                    for known, size in zip(port.shape, x.shape, strict=True)
                )
                for port, x in zip(self.ports, tensors, strict=True)
            ]
            for expression, shown in self.guards:
                if not holds(expression, sizes):
                    got = ", ".join(str(list(x.shape)) for x in tensors)
                    raise InputError(
                        f"the model's code treats other sizes differently: it was captured for "
                        f"{shown}, got {got}; capture it with an example of that size"
                    )

    def _check_tensor(self, port: Port, x: Any, free: dict[str, int]) -> None:
        if not isinstance(x, Tensor):
            raise InputError(
                f"input {port.name!r}: expected a torch.Tensor, got {type(x).__name__}"
            )
        wanted = f"[{', '.join(map(str, port.shape))}]"
        shape = tuple(x.shape)
        fits = len(shape) == len(port.shape) and all(
            free.setdefault(known, size) == size if isinstance(known, str) else known == size
            for known, size in zip(port.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(f"input {port.name!r}: expected shape {wanted}, got {list(shape)}")
        if x.is_floating_point() != port.dtype.is_floating_point and not port.cast:
            raise InputError(
                f"input {port.name!r}: expected {port.dtype} as in the example of the capture, got "
                f"{x.dtype}"
            )


def _signature(
    specs: bytes,
    ports: list[Port],
    constants: dict[int, Any],
    guards: list[tuple[str, str]],
    parameters: tuple[str, ...],
    single: bool,
    forward: inspect.Signature | None,
) -> Signature:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_spec, out_spec = pickle.loads(specs)
    return Signature(ports, constants, in_spec, out_spec, guards, parameters, single, forward)


def _same(value: Any, default: Any) -> bool:
    """Whether an argument that is no tensor is the default."""
    if value is default:
        return True
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default


# What torch writes into conditions on sizes that are factors of others.
_TORCH = SimpleNamespace(
    sym_float=float, sym_int=int, sym_max=max, sym_min=min, sym_sum=sum, sym_not=lambda a: not a
)
_FUNCTIONS = {
    "__builtins__": {},
    "max": max,
    "min": min,
    "math": math,
    "int": int,
    "float": float,
    "abs": abs,
    "torch": _TORCH,
}


def holds(expression: str | CodeType, sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a guard holds for the sizes of the ports."""
    try:
        return bool(eval(expression, dict(_FUNCTIONS), {"s": sizes}))
    except ArithmeticError:  # a size of 0 in a divisor: not what was captured
        return False


class GraphModel(fx.GraphModule):
    """A captured model: operators in a graph, layers, norms and dropouts as modules.

    Called like the model that it was captured from. ``meta["signature"]`` says with what.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature: Signature | None = self.meta.get(SIGNATURE)
        if signature is not None and not torch.compiler.is_compiling():
            leaves = signature.leaves(args, kwargs)
            signature.check(leaves)
            args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
        return super().__call__(*args, **kwargs)

    @property
    def signature(self) -> Signature:
        """How the model is called."""
        found = self.meta[SIGNATURE]
        assert isinstance(found, Signature)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own description of nests
            found = super().__deepcopy__(memo)
        assert isinstance(found, GraphModel)
        return found

    def __copy__(self) -> GraphModel:
        # fx would give a plain GraphModule over the same graph.
        return _rebuilt(self._state())

    def __reduce__(self) -> tuple[Any, ...]:
        for name in self.meta.get(OPAQUE, ()):
            check_picklable(name, self.get_submodule(name))
        return _rebuilt, (self._state(),)

    def _state(self) -> dict[str, Any]:
        # fx would trace the generated code again and lose meta.
        modules = {name: child for name, child in self._modules.items() if child is not None}
        return {
            "modules": modules,
            "parameters": dict(self._parameters),
            "buffers": dict(self._buffers),
            "not saved": set(self._non_persistent_buffers_set),
            "nodes": _described(self.graph),
            "meta": dict(self.meta),
            "training": self.training,
            "name": type(self).__name__,
        }


def children_of(spec: Any) -> list[Any]:
    """The parts of a nested structure, by the name that this version of torch has for them."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def code_of(signature: Signature) -> CodeGen:
    """How the generated forward takes its arguments apart and puts its result together."""
    if signature.is_plain and _plain_output(signature.out_spec):
        return CodeGen()
    positional = signature.arguments[0].num_children
    names = [f"arg_{k}" for k in range(positional)]
    for position, name in enumerate(signature.parameters[:positional]):
        names[position] = name
    names += list(signature.arguments[1].context or ())
    return _PyTreeCodeGen(_PyTreeInfo(names, signature.in_spec, signature.out_spec))


def _plain_output(spec: Any) -> bool:
    """Whether the result is nested in what Python code can write down."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(_plain_output, children_of(spec)))


# -- pickling -------------------------------------------------------------------------------------


def check_picklable(name: str, module: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if an excluded submodule cannot be pickled."""
    try:
        pickle.dumps(module)
    except Exception as error:  # whatever the module's own attributes raise
        raise UnsupportedModelError(
            f"excluded module {name!r} ({type(module).__name__}) cannot be pickled, and so neither "
            f"can what calls it: {error}"
        ) from error


def _described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph as plain data; operators by name."""

    def plain(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return _Reference(item.name)
        if isinstance(item, torch._ops.OpOverload):
            return _Operator(str(item))
        return item

    found = []
    for node in graph.nodes:
        target = _Operator(str(node.target)) if _is_operator(node.target) else node.target
        args, kwargs = pytree.tree_map(plain, (tuple(node.args), dict(node.kwargs)))
        kept = {k: node.meta[k] for k in ("info", "path", "macs") if k in node.meta}
        found.append((node.op, node.name, target, args, kwargs, kept))
    return found


@dataclass(frozen=True)
class _Reference:
    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator by its full name, ``aten.relu.default``."""

    name: str

    def find(self) -> Any:
        found: Any = torch.ops
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


def _is_operator(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def _rebuilt(state: dict[str, Any]) -> GraphModel:
    root = nn.Module()
    root._modules.update(state["modules"])
    root._parameters.update(state["parameters"])
    root._buffers.update(state["buffers"])
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def found(item: Any) -> Any:
        if isinstance(item, _Reference):
            return nodes[item.name]
        return item.find() if isinstance(item, _Operator) else item

    for op, name, target, args, kwargs, kept in state["nodes"]:
        args, kwargs = pytree.tree_map(found, (args, kwargs))
        target = target.find() if isinstance(target, _Operator) else target
        node = graph.create_node(op, target, args, kwargs, name=name)
        node.meta.update(kept)
        nodes[name] = node
    meta = state["meta"]
    if SIGNATURE in meta:
        graph.set_codegen(code_of(meta[SIGNATURE]))
    model = GraphModel(root, graph, class_name=state["name"])
    # fx takes over what the graph calls, in that order; a repair and files go by the model's own.
    for mine, held in (
        (model._modules, root._modules),
        (model._parameters, root._parameters),
        (model._buffers, root._buffers),
    ):
        mine.clear()
        mine.update(held)  # type: ignore[arg-type]
    model._non_persistent_buffers_set = state["not saved"]
    model.meta.update(copy.copy(meta))
    model.training = state["training"]
    return model
