"""Submodules that stay as they are: the graph calls them and does not look into them.

``torch.export`` follows all of a model's code. What it cannot follow, a branch on values say, may
stand in a submodule that is named in ``exclude``: while the model is exported, its calls are calls
of one operator, of which the shapes of the results are known from calls with two batch sizes.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from adalayer_native.capture.example import Inputs
from adalayer_native.capture.vocabulary import op_name
from adalayer_native.errors import UnsupportedModelError

__all__ = ["OPAQUE", "OPERATOR", "Call", "OpaqueCall", "call_modules", "opaque_calls"]

OPAQUE = "opaque"  # in a captured model's meta: the names of its excluded submodules
OPERATOR = "adalayer.opaque.default"


@dataclass
class Call:
    """One call of an excluded submodule.

    Attributes:
        name: of the submodule.
        module: the submodule.
        spec: how tensors and other values are nested in ``(args, kwargs)``.
        leaves: all values of the call; None for tensors.
        shapes: of the tensors that go in, at the batch size of the example and at one more.
        results: shapes of the tensors that come out, likewise.
        dtypes: of the results.
        single: whether the result is a tensor, not a tuple or list of them.
        macs: multiply-accumulates for one sample; 0 where they cannot be counted.
    """

    name: str
    module: nn.Module
    spec: Any
    leaves: list[Any]
    shapes: list[list[tuple[int, ...]]]
    results: list[list[tuple[int, ...]]]
    dtypes: list[torch.dtype]
    single: bool
    macs: float

    def fake(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Empty results for inputs whose batch may be a symbol."""
        return [
            inputs[0].new_empty([self._size(sizes, inputs) for sizes in zip(*pair, strict=True)],
                                dtype=dtype)
            for pair, dtype in zip(zip(*self.results, strict=True), self.dtypes, strict=True)
        ]  # fmt: skip

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
        rest = iter(tensors)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


class OpaqueCall(nn.Module):
    """A submodule as a function from tensors to a list of tensors, as the operator has it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.module = call.module
        self.call = copy.copy(call)
        self.call.module = nn.Module()

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs = self.call.arguments(tensors)
        result = self.module(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)


@torch.library.custom_op("adalayer::opaque", mutates_args=())
def _opaque(key: str, inputs: list[Tensor]) -> list[Tensor]:
    """Stands for a call of an excluded submodule while a model is exported."""
    raise RuntimeError(f"adalayer::opaque({key!r}) is called outside of an export")


@_opaque.register_fake
def _(key: str, inputs: list[Tensor]) -> list[Tensor]:
    return _active[key].fake(inputs)


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
            call.shapes += other.shapes
            call.results += other.results
            key = f"{name}#{next(_numbers)}"
            calls[key] = call
            queues.setdefault(name, []).append(key)
    _active.update(calls)
    try:
        with _forwards(modules, lambda name, _: _Stand(calls, queues.get(name, []))):
            yield calls
    finally:
        for key in calls:
            del _active[key]


class _Stand:
    """The forward of an excluded submodule during an export."""

    def __init__(self, calls: dict[str, Call], keys: list[str]) -> None:
        self.calls, self.keys = calls, keys
        self.next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # (An export may run the model's code more than once.)
        key = self.keys[self.next % len(self.keys)]
        self.next += 1
        leaves = pytree.tree_leaves((args, kwargs))
        results = torch.ops.adalayer.opaque(key, [x for x in leaves if isinstance(x, Tensor)])
        return results[0] if self.calls[key].single else tuple(results)


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

    with _forwards(modules, lambda name, module: _Recorder(found[name], name, module)):
        inputs.map(torch.clone)(model)
    for call in itertools.chain.from_iterable(found.values()):
        call.macs /= inputs.count
    return found


@contextmanager
def _forwards(
    modules: dict[str, nn.Module], make: Callable[[str, nn.Module], Any]
) -> Iterator[None]:
    """Other forwards for some modules."""
    new = {name: make(name, module) for name, module in modules.items()}
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = new[name]
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


class _Recorder:
    """Runs a submodule's forward and notes the call."""

    def __init__(self, calls: list[Call], name: str, module: nn.Module) -> None:
        self.calls, self.name, self.module = calls, name, module
        self.forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled: list[Any] = []
        compile = torch.compile

        def noted(*args: Any, **kwargs: Any) -> Any:
            compiled.append(args)
            return compile(*args, **kwargs)

        try:
            torch.compile = noted
            result = self.forward(*args, **kwargs)
        finally:
            torch.compile = compile
        leaves, spec = pytree.tree_flatten((args, kwargs))
        single = isinstance(result, Tensor)
        results = [result] if single else result
        if not isinstance(results, (tuple, list)) or not all(
            isinstance(item, Tensor) for item in results
        ):
            raise UnsupportedModelError(
                f"excluded module {self.name!r}: expected a tensor or a tuple of tensors as its "
                f"result, got {type(result).__name__}"
            )
        self.calls.append(
            Call(
                self.name,
                self.module,
                spec,
                [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                [[tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]],
                [[tuple(item.shape) for item in results]],
                [item.dtype for item in results],
                single,
                0.0 if compiled else self._macs(args, kwargs),
            )
        )
        return result

    def _macs(self, args: Any, kwargs: Any) -> float:
        """What the call multiplies.

        Not for torch.cond and its like, which compile what they call: torch 2.13 cannot do that
        under a counter, and not any more afterwards.
        """
        with FlopCounterMode(display=False) as counter:
            self.forward(*args, **kwargs)
        return float(counter.get_total_flops() / 2)


def call_modules(graph: fx.Graph, calls: dict[str, Call]) -> dict[str, nn.Module]:
    """Replace the operator by calls of the submodules; copies of them that share their tensors."""
    modules: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != OPERATOR:
            continue
        key, tensors = node.args
        call = calls[str(key)]
        if call.name not in modules:
            memo = {id(t): t for t in (*call.module.parameters(), *call.module.buffers())}
            modules[call.name] = copy.deepcopy(call.module, memo)
        args, kwargs = call.arguments(tensors)
        values = node.meta.get("val")
        with graph.inserting_before(node):
            new = graph.call_module(call.name, args, kwargs)
        new.meta = {**node.meta, "path": call.name, "leaf": True, "macs": call.macs}
        if call.single:
            new.meta["val"] = values[0] if values else None
            for reader in list(node.users):
                assert reader.target is operator.getitem
                reader.replace_all_uses_with(new)
                graph.erase_node(reader)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return modules
