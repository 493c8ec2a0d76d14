"""torch.export once for all models of one structure: tests export few networks, over and over.

A program that was exported for one model is given the tensors of another one of its structure:
same classes and code, attributes, hooks, places and shapes of parameters and buffers, values of all
other tensors, and arguments of the same shapes and values. What cannot be compared counts as
different, so that it is exported anew. What an export may depend on besides is not seen (globals);
``capture`` compares what it has captured with the model itself, whatever it comes from.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native._fingerprint import memory_of

__all__ = ["Exports"]

_MOST = 64  # structures that are kept
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
# What is looked at elsewhere, does not matter (exports are in evaluation mode), or is derived when
# a native layer runs.
_HELD = ("_parameters", "_buffers", "_modules", "training", "_made")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Different(Exception):
    """A structure that cannot be compared."""


class Exports:
    """A stand-in for ``torch.export.export`` that remembers structures.

    Attributes:
        made: how many programs were exported.
        reused: how many calls were answered by an earlier one.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, torch.export.ExportedProgram] = OrderedDict()
        self.made = self.reused = 0

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: Any = None, **options: Any
    ) -> torch.export.ExportedProgram:
        """Arguments as of ``torch.export.export``."""
        try:
            key = _structure(model, args, kwargs or {}, options)
        except _Different:
            key = None
        if key in self._kept:
            self._kept.move_to_end(key)
            self.reused += 1
            return _for(self._kept[key], model, (args, kwargs or {}))
        program = torch.export.export(model, args, kwargs, **options)
        self.made += 1
        if key is not None and _can_be_kept(program, model):
            self._kept[key] = _for(program, None, None)
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        return program


def _for(
    program: torch.export.ExportedProgram, model: nn.Module | None, example: Any
) -> torch.export.ExportedProgram:
    """The program with the tensors of a model; without any, to be kept."""
    found = copy.copy(program)
    names = list(program.state_dict)
    tensors: dict[str, Any] = dict.fromkeys(names)
    if model is not None:
        owned = dict(model.named_parameters(remove_duplicate=False))
        owned |= dict(model.named_buffers(remove_duplicate=False))
        tensors = {name: owned[name] for name in names}
    found._state_dict = tensors  # type: ignore[attr-defined]
    found._example_inputs = example  # type: ignore[attr-defined]
    return found


def _can_be_kept(program: torch.export.ExportedProgram, model: nn.Module) -> bool:
    """Whether all of its tensors are parameters and buffers that a name leads to."""
    owned = dict(model.named_parameters(remove_duplicate=False))
    owned |= dict(model.named_buffers(remove_duplicate=False))
    return (
        not program.constants
        and not list(program.graph_module.children())
        and all(owned.get(name) is value for name, value in program.state_dict.items())
    )


def _structure(model: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """All that an export depends on, as something that can be a key.

    Raises:
        _Different: some of it cannot be compared.
    """
    if not isinstance(model, nn.Module):
        raise _Different
    found: list[Any] = []
    seen: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found += [name, _code(module), tuple(module._modules)]
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            found += [leaf, None if tensor is None else _place(tensor, seen)]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    found += [_place(leaf, {}) if isinstance(leaf, Tensor) else _value(leaf) for leaf in leaves]
    found += [str(spec), torch.get_default_dtype()]
    for key, value in sorted(options.items()):
        # (ShapesCollection knows tensors by their identity.)
        shapes = getattr(value, "_shapes", None)
        found += [key, _value(value) if shapes is None else str(list(shapes.values()))]
        if shapes is not None:
            found.append(tuple(id(leaf) in shapes for leaf in leaves))
    return tuple(found)


def _code(module: nn.Module) -> Any:
    """What a module does with its tensors."""
    if isinstance(module, fx.GraphModule):  # each has a class of its own
        targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
        hooks = [len(getattr(module, key)) for key in _HOOKS]
        return type(module).__mro__[1], module.code, tuple(targets), tuple(hooks)
    own = {key: value for key, value in module.__dict__.items() if key not in _HELD}
    return type(module), type(module).forward, _value(own)


def _place(tensor: Tensor, seen: dict[int, int]) -> Any:
    """What is known of a tensor whose values do not matter; tensors in two places are one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise _Different
    number = seen.setdefault(id(tensor), len(seen))
    about = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return number, *about, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()


def _value(value: Any, depth: int = 0) -> Any:
    """A value as something that is equal only for the same."""
    if depth > 6:
        raise _Different
    if isinstance(value, _PLAIN):
        return type(value), repr(value)  # (nan is not equal to itself, and -0.0 is to 0.0)
    if type(value) is Tensor:
        return _place(value, {}), bytes(memory_of(value))
    if isinstance(value, dict):
        items = [(_value(k, depth + 1), _value(v, depth + 1)) for k, v in value.items()]
        return type(value), tuple(items)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_value(item, depth + 1) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_value(item, depth + 1) for item in value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return value  # by its identity
    if callable(value) and hasattr(value, "__dict__"):  # marks that stand for dropouts
        return type(value), _value(value.__dict__, depth + 1)
    raise _Different
