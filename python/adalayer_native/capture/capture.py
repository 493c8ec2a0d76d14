"""``capture``: any model that torch.export can follow, as one graph of operators and layers."""

from __future__ import annotations

import copy
import hashlib
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._fingerprint import memory_of
from adalayer_native.capture.assembling import assembled
from adalayer_native.capture.comparing import difference, try_batches
from adalayer_native.capture.example import (
    Inputs,
    at_least_two,
    example_of,
    guessed_example,
    positional_inputs,
)
from adalayer_native.capture.exporting import export, exported_of, untouched
from adalayer_native.capture.marks import dropouts, marking
from adalayer_native.capture.model import GraphModel
from adalayer_native.capture.opaque import OPAQUE
from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["capture", "captured"]


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    exclude: Sequence[str] = (),
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
        exclude: submodules that are not looked into: the graph calls them, in torch and in float.
            They may do what a graph cannot, as branch on values. They take tensors and give
            tensors, whose sizes follow from the batch, and do not write into what they take; images
            then have one size. The graph's copies share the parameters.

    Raises:
        UnsupportedModelError: the model cannot be followed, or the graph does not compute what it
            computes; says why and where.
    """
    if isinstance(exclude, str):
        raise UnsupportedModelError(f"exclude: expected a sequence of names, got {exclude!r}")
    if exclude and not isinstance(model, nn.Module):
        raise UnsupportedModelError("exclude needs the model: a program is exported already")
    if isinstance(model, GraphModel):
        if set(exclude) - set(model.meta.get(OPAQUE, ())):
            raise UnsupportedModelError("exclude needs the model: this one is captured already")
        return model
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}"
        )
    model = _in_memory(_unwrapped(model))
    # Of a parametrization in training mode even reading a weight changes the model.
    with untouched(model):
        _check(model)
        inputs = guessed_example(model) if example_inputs is None else Inputs.of(example_inputs)
        inputs = _on_device(model, at_least_two(inputs).map(_not_meta))
        return _captured(model, inputs[:2], tuple(exclude))


def _captured(model: nn.Module, inputs: Inputs, exclude: Sequence[str] = ()) -> GraphModel:
    marks = dropouts(model)
    # A mark hides that a dropout returns its operand itself: code that writes into the result is
    # followed without marks only.
    ways = [(marks, False), (marks, True), *([({}, True)] if marks else [])]
    for marked, thorough in ways:
        with marking(marked):
            exported = export(model, inputs, free_sizes=True, thorough=thorough, exclude=exclude)
        found = assembled(model, exported, inputs, marked)
        unlike = difference(model, found, inputs)
        if unlike is None:
            found.signature.single = difference(model, found, inputs[:1]) is None
            try_batches(model, found, inputs)
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__}: the captured graph does not compute what the model computes "
        f"({unlike}); it depends on something that torch.export does not see (a random "
        "number, a global, a value of an earlier call)"
    )


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
    return assembled(root, exported, inputs, {})


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
            digest.update(memory_of(tensor))
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
