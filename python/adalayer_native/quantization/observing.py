"""What the range of a stored value is chosen for: the error that its readers see.

A grid's steps are worth spending where a reader tells values apart. Most readers (layers, sums)
feel every error alike. A function of one value does not: hard-swish, SiLU and GELU are nearly zero
over the whole negative half of what a convolution gives them, so that the error is measured behind
them. A softmax lives on the largest of its operands, which hold one weight each and the sum of
many: they are never clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from adalayer_native.capture import vocabulary as table
from adalayer_native.quantization.fake_quant import ActivationQuantizer
from adalayer_native.quantization.graph import quantizers_of
from adalayer_native.quantization.observers import (
    MinMaxObserver,
    MSEObserver,
    Observer,
    make_observer,
)

_FUNCTIONS = frozenset(f"aten.{name}.default" for name in table.FUNCTIONS)
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
# What stands between a product of queries and keys and its softmax.
_SCALING = frozenset(
    f"aten.{name}.{form}" for name in ("add", "sub", "mul", "div") for form in ("Tensor", "Scalar")
)


def observers_for(prepared: nn.Module, kind: str) -> dict[str, Observer]:
    """A fresh observer for every activation quantizer of a prepared model, by its name.

    Args:
        prepared: from :func:`~adalayer_native.prepare`.
        kind: ``"mse"``, ``"percentile"`` or ``"minmax"``.

    Raises:
        CalibrationError: unknown kind.
    """
    assert isinstance(prepared, fx.GraphModule)
    modules = dict(prepared.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    readers = _Readers(modules)
    found = {}
    for name, quantizer in quantizers_of(prepared).items():
        observer = make_observer(kind, quantizer.bits, name)
        users = readers.of(calls.get(name, []))
        if users and all(map(readers.end_in_softmax, users)):
            observer = MinMaxObserver(quantizer.bits, name)
        elif isinstance(observer, MSEObserver):
            observer.function = _common_function(users)
        found[name] = observer
    return found


class _Readers:
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules

    def of(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Who reads values, looking through quantizers and what keeps the grid."""
        return table.readers(nodes, self._passes)

    def end_in_softmax(self, node: fx.Node) -> bool:
        """Whether a value that an operation reads ends in softmaxes alone."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node.op == "call_function" and table.op_name(node) in _SOFTMAX:
                continue
            if node.op != "call_function" or table.op_name(node) not in _SCALING:
                return False
            users = self.of([node])
            if not users:
                return False
            pending += users
        return True

    def _passes(self, node: fx.Node) -> bool:
        module = table.module_of(node, self.modules)
        return isinstance(module, ActivationQuantizer) or table.is_grid_preserving(
            node, self.modules
        )


def _common_function(users: list[fx.Node]) -> Callable[[Tensor], Tensor] | None:
    """The one function of one value that all readers compute, if so."""
    wanted = None
    for user in users:
        if user.op != "call_function" or table.op_name(user) not in _FUNCTIONS:
            return None
        said = (user.target, user.args[1:], tuple(user.kwargs.items()))
        if any(isinstance(item, fx.Node) for item in [*said[1], *user.kwargs.values()]):
            return None
        if wanted not in (None, said):
            return None
        wanted = said
    if wanted is None:
        return None
    target, arguments, keywords = wanted
    assert callable(target)
    return partial(_apply, target, arguments, dict(keywords))


def _apply(
    target: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    x: Tensor,
) -> Tensor:
    return target(x, *arguments, **keywords)
