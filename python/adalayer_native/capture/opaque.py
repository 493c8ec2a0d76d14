"""Submodules that stay as they are: the graph calls them and does not look into them.

``torch.export`` follows all of a model's code. What it cannot follow, a branch on values say, may
stand in a submodule that is named in ``exclude``: while the model is exported, its calls are calls
of one operator, of which the shapes of the results are known from calls with two batch sizes.
"""

from __future__ import annotations

import copy
import itertools
import operator
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from adalayer_native.capture.example import Inputs
from adalayer_native.capture.marks import standing_in
from adalayer_native.capture.model import OPAQUE, check_picklable
from adalayer_native.capture.vocabulary import op_name
from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["OPAQUE", "OPERATOR", "Call", "OpaqueCall", "call_modules", "opaque_calls"]

OPERATOR = "adalayer.opaque.default"
# nn.Module.__call__ calls this where it is not None; ``forward`` would leave the hooks outside.
_CALL = "_compiled_call_impl"


@dataclass
class Call:
    """One call of an excluded submodule.

    Attributes:
        name: of the submodule.
        module: the submodule.
        spec: how tensors and other values are nested in ``(args, kwargs)``.
        leaves: all values of the call; the class ``Tensor`` in the place of tensors.
        shapes: of the tensors that go in, at the batch size of the example and at one more.
        results: shapes of the tensors that come out, likewise.
        kinds: types and devices of the results.
        out_spec: how the results are nested.
        places: of every tensor in the nest, the keys that lead to it.
        out_leaves: everything in the nest, likewise.
        macs: multiply-accumulates for one sample; 0 where they cannot be counted.
    """

    name: str
    module: nn.Module
    spec: Any
    leaves: list[Any]
    shapes: list[list[tuple[int, ...]]]
    results: list[list[tuple[int, ...]]]
    kinds: list[tuple[torch.dtype, torch.device]]
    out_spec: Any
    places: list[tuple[Any, ...]]
    out_leaves: list[Any]
    macs: float

    def sizes(self, inputs: Sequence[Tensor]) -> list[list[Any]]:
        """Sizes of the results for inputs whose batch may be a symbol."""
        return [
            [self._size(sizes, inputs) for sizes in zip(*pair, strict=True)]
            for pair in zip(*self.results, strict=True)
        ]

    def _size(self, sizes: tuple[int, int], inputs: Sequence[Tensor]) -> Any:
        first, second = sizes
        if first == second:
            return first
        for tensor, *pair in zip(inputs, *self.shapes, strict=True):
            for size, (a, b) in zip(tensor.shape, zip(*pair, strict=True), strict=True):
                if a != b and first * b == second * a and first % a == 0:
                    return size * (first // a)
        raise UnsupportedModelError(
            f"excluded module {self.name!r}: a size of its results is {first} for one batch and "
            f"{second} for another, which is not proportional to a size of its inputs"
        )

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Nested as the submodule takes them."""
        args, kwargs = pytree.tree_unflatten(_filled(self.leaves, tensors), self.spec)
        return tuple(args), dict(kwargs)

    def nested(self, tensors: Sequence[Tensor]) -> Any:
        """The result as the submodule gives it."""
        return pytree.tree_unflatten(_filled(self.out_leaves, tensors), self.out_spec)


def _filled(leaves: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if leaf is Tensor else leaf for leaf in leaves]


def _split(nest: Any) -> tuple[list[Tensor], list[Any], Any]:
    """The tensors of a nest; all of its leaves without them; and how it is nested."""
    leaves, spec = pytree.tree_flatten(nest)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


class OpaqueCall(nn.Module):
    """A submodule as a function from tensors to a list of tensors, as the operator has it.

    The engine relies on the sizes and types that the export has seen; another branch of the
    submodule's code may give others.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.module = call.module
        self.call = copy.copy(call)
        self.call.module = nn.Module()

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueCall:
        call = copy.copy(self.call)  # of which nothing changes
        call.module = copy.deepcopy(self.module, memo)
        return OpaqueCall(call)

    def __reduce__(self) -> tuple[Any, ...]:
        check_picklable(self.call.name, self.module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own descriptions of nests
            return _opaque_call, (pickle.dumps(self.call), self.module)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        versions = [tensor._version for tensor in tensors]
        args, kwargs = self.call.arguments(tensors)
        results, leaves, _ = _split(self.module(*args, **kwargs))
        if leaves != self.call.out_leaves:
            raise InputError(
                f"excluded module {self.call.name!r}: its result is nested otherwise than when the "
                "engine was compiled"
            )
        if versions != [tensor._version for tensor in tensors]:
            raise InputError(f"excluded module {self.call.name!r} {_WRITES}")
        sizes = self.call.sizes(tensors)
        for tensor, size, kind in zip(results, sizes, self.call.kinds, strict=True):
            if (list(tensor.shape), tensor.dtype) != (size, kind[0]) or (
                tensor.device.type != tensors[0].device.type
            ):
                raise InputError(
                    f"excluded module {self.call.name!r}: expected a result of shape {size} and "
                    f"type {kind[0]} as when the engine was compiled, got {list(tensor.shape)}, "
                    f"{tensor.dtype} on {tensor.device}"
                )
        return results


def _opaque_call(held: bytes, module: nn.Module) -> OpaqueCall:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call: Call = pickle.loads(held)
    call.module = module
    return OpaqueCall(call)


_WRITES = (
    "writes into its input, which others read: let it work on a copy (x = x.clone(), or "
    "inplace=False)"
)


@torch.library.custom_op("adalayer::opaque", mutates_args=())
def _opaque(key: str, inputs: list[Tensor]) -> list[Tensor]:
    """Stands for a call of an excluded submodule while a model is exported."""
    raise RuntimeError(f"adalayer::opaque({key!r}) is called outside of an export")


@_opaque.register_fake
def _(key: str, inputs: list[Tensor]) -> list[Tensor]:
    call = _active[key]
    return [
        inputs[0].new_empty(size, dtype=dtype, device=device)
        for size, (dtype, device) in zip(call.sizes(inputs), call.kinds, strict=True)
    ]


_active: dict[str, Call] = {}
_numbers = itertools.count()


@contextmanager
def opaque_calls(
    model: nn.Module, names: Sequence[str], inputs: Inputs
) -> Iterator[dict[str, Call]]:
    """While a model is exported, calls of the submodules are calls of the operator.

    The model is called twice before. Gives the calls by the key that the operator carries.

    Raises:
        UnsupportedModelError: no such submodule, or its results are not tensors.
    """
    if not names:
        yield {}
        return
    modules = {name: _submodule(model, name) for name in names}
    first = _record(model, modules, inputs)
    second = _record(model, modules, _one_more(inputs))
    calls: dict[str, Call] = {}
    queues: dict[str, list[str]] = {}
    for name, items in first.items():
        more = second[name]
        if len(items) != len(more):
            raise UnsupportedModelError(
                f"excluded module {name!r}: called {len(items)} times with one batch and "
                f"{len(more)} times with another"
            )
        for call, other in zip(items, more, strict=True):
            if call.out_spec != other.out_spec or call.spec != other.spec:
                raise UnsupportedModelError(
                    f"excluded module {name!r}: what it takes or gives is nested otherwise for "
                    "another batch (a list with an entry per sample?); expected tensors of the "
                    "whole batch"
                )
            call.shapes += other.shapes
            call.results += other.results
            key = f"{name}#{next(_numbers)}"
            calls[key] = call
            queues.setdefault(name, []).append(key)
    _active.update(calls)
    try:
        with standing_in(modules, _CALL, lambda name, _: _Stand(calls, queues.get(name, []))):
            yield calls
    finally:
        for key in calls:
            del _active[key]


class _Stand:
    """Is called in the place of an excluded submodule during an export."""

    def __init__(self, calls: dict[str, Call], keys: list[str]) -> None:
        self.calls, self.keys = calls, keys
        self.next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # (An export may run the model's code more than once.)
        key = self.keys[self.next % len(self.keys)]
        self.next += 1
        tensors, _, _ = _split((args, kwargs))
        return self.calls[key].nested(torch.ops.adalayer.opaque(key, tensors))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = model
    if found is model:
        raise UnsupportedModelError(f"exclude: {type(model).__name__} has no submodule {name!r}")
    return found


def _one_more(inputs: Inputs) -> Inputs:
    count = inputs.count
    index = torch.arange(count + 1) % count
    return inputs.map(lambda t: t[index.to(t.device)] if t.dim() and t.shape[0] == count else t)


def _record(
    model: nn.Module, modules: dict[str, nn.Module], inputs: Inputs
) -> dict[str, list[Call]]:
    """Run the model and note every call of the submodules."""
    found: dict[str, list[Call]] = {name: [] for name in modules}
    with standing_in(modules, _CALL, lambda name, module: _Recorder(found[name], name, module)):
        inputs.map(torch.clone)(model)
    for call in itertools.chain.from_iterable(found.values()):
        call.macs /= inputs.count
    return found


class _Recorder:
    """Calls a submodule and notes how."""

    def __init__(self, calls: list[Call], name: str, module: nn.Module) -> None:
        self.calls, self.name, self.module = calls, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, leaves, spec = _split((args, kwargs))
        if not tensors:
            raise UnsupportedModelError(
                f"excluded module {self.name!r}: expected a tensor among its arguments"
            )
        if torch.is_autocast_enabled(tensors[0].device.type):
            raise UnsupportedModelError(
                f"excluded module {self.name!r} is called under torch.autocast, which is not part "
                "of a graph: let the submodule's own forward enter it"
            )
        versions = [tensor._version for tensor in tensors]
        result, countable = self._called(args, kwargs)
        if versions != [tensor._version for tensor in tensors]:
            raise UnsupportedModelError(f"excluded module {self.name!r} {_WRITES}")
        places, results = self._places(result)
        self.calls.append(
            Call(
                self.name,
                self.module,
                spec,
                leaves,
                [[tuple(tensor.shape) for tensor in tensors]],
                [[tuple(tensor.shape) for tensor in results]],
                [(tensor.dtype, tensor.device) for tensor in results],
                pytree.tree_structure(result),
                places,
                _split(result)[1],
                self._macs(args, kwargs) if countable else 0.0,
            )
        )
        return result

    def _called(self, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The result, and whether what the call multiplies can be counted.

        Not for torch.cond and its like, which compile what they call: torch 2.13 cannot do that
        under a counter, and not any more afterwards.
        """
        compiled: list[Any] = []
        compile = torch.compile

        def noted(*args: Any, **kwargs: Any) -> Any:
            compiled.append(args)
            return compile(*args, **kwargs)

        try:
            torch.compile = noted
            result = self.module._call_impl(*args, **kwargs)
        finally:
            torch.compile = compile
        return result, not compiled

    def _macs(self, args: Any, kwargs: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            self.module._call_impl(*args, **kwargs)
        return float(counter.get_total_flops() / 2)

    def _places(self, result: Any) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
        """The tensors of a result and the keys that lead to them."""
        places, tensors = [], []
        for path, leaf in pytree.tree_flatten_with_path(result)[0]:
            keys = _keys(result, path)
            if keys is None or not isinstance(leaf, (Tensor, type(None))):
                raise UnsupportedModelError(
                    f"excluded module {self.name!r}: expected a tensor, or tensors in (named) "
                    f"tuples, lists and dictionaries, as its result, got {_shown(result, leaf)}"
                )
            if isinstance(leaf, Tensor):
                places.append(keys)
                tensors.append(leaf)
        return places, tensors


def call_modules(graph: fx.Graph, calls: dict[str, Call]) -> dict[str, nn.Module]:
    """Replace the operator by calls of copies of the submodules, which share their parameters."""
    modules: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != OPERATOR:
            continue
        key, tensors = node.args
        call = calls[str(key)]
        if call.name not in modules:
            modules[call.name] = _copied(call.module)
        args, kwargs = call.arguments(tensors)
        with graph.inserting_before(node):
            # (Not graph.call_module, which looks for it in the exported module.)
            new = graph.create_node("call_module", call.name, args, kwargs)
            new.meta = {**node.meta, "path": call.name, "leaf": True, "macs": call.macs}
            values = new.meta.pop("val", None)
            if call.places == [()]:
                new.meta["val"] = values[0] if values else None
            for reader in list(node.users):
                assert reader.target is operator.getitem
                found = new
                for step in call.places[reader.args[1]]:
                    found = graph.call_function(operator.getitem, (found, step))
                    found.meta = dict(reader.meta)
                reader.replace_all_uses_with(found)
                graph.erase_node(reader)
        graph.erase_node(node)
    return modules


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters: its buffers and attributes are its own."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for owner in module.modules():
        for value in vars(owner).values():
            # Such are computed anew in every call (the weight of an old-fashioned weight norm).
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _keys(nest: Any, path: Sequence[Any]) -> tuple[Any, ...] | None:
    """What to index a nest with, one after the other; None where that does not lead to a leaf."""
    keys: list[Any] = []
    for step in path:
        if isinstance(step, pytree.SequenceKey):
            keys.append(step.idx)
        elif isinstance(step, pytree.MappingKey):
            keys.append(step.key)
        elif isinstance(step, pytree.GetAttrKey) and hasattr(nest, "_fields"):
            keys.append(nest._fields.index(step.name))  # a named tuple
        else:
            return None
        nest = nest[keys[-1]]
    return tuple(keys)


def _shown(result: Any, leaf: Any) -> str:
    """What is wrong with a result."""
    inside = type(leaf).__name__
    outside = type(result).__name__
    return inside if leaf is result else f"{inside} in a {outside}"
