"""Whole channels: a smaller model of ordinary layers.

Removing an output channel of one layer removes the input channel of its readers, and where layers
meet in a residual addition, all of them lose the same one. `torch-pruning
<https://github.com/VainF/Torch-Pruning>`_ (Fang et al., DepGraph, 2023) finds what depends on what;
what is removed, and how much, is decided here: the widths that remain are whole kernel tiles.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.errors import PlanError, UnsupportedModelError
from adalayer_native.plan import supported_layers, unknown_layer

__all__ = ["prune_channels"]

_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_TILE = 16  # output channels of a weight tile (csrc/formats/panels.hpp)


def prune_channels(
    model: nn.Module,
    example_inputs: Tensor,
    sparsity: float | Mapping[str, float],
    *,
    multiple: int = _TILE,
) -> nn.Module:
    """A copy of a float model with fewer channels, chosen by the norm of what depends on each.

    It has the same module tree with narrower layers and is a model like any other: fine-tune it,
    then ``analyze``, ``allocate`` and so on. Layers that make the model's outputs keep their width,
    and so do grouped convolutions other than depthwise ones, and whatever is tied to any of them.

    Args:
        model: traceable by ``torch.fx``; not changed.
        example_inputs: one batch, as the model takes it.
        sparsity: share of the output channels to remove, ``0 <= sparsity < 1``; one for all layers,
            or by layer name. Layers that must lose the same channels follow the first of them.
        multiple: remaining widths are the nearest multiple of it, and at least one.

    Raises:
        ImportError: torch-pruning is not installed (``pip install 'adalayer_native[channels]'``).
        PlanError: a share or name that is not valid.
        UnsupportedModelError: the model cannot be traced, or does not run after the removal.
    """
    pruning = _torch_pruning()
    if multiple < 1:
        raise PlanError(f"multiple must be at least 1, got {multiple}")
    smaller = copy.deepcopy(model).eval()
    layers = supported_layers(smaller)
    shares = dict.fromkeys(layers, sparsity) if isinstance(sparsity, (int, float)) else sparsity
    for name, share in shares.items():
        if name not in layers:
            raise PlanError(unknown_layer(name, list(layers)))
        if not 0.0 <= share < 1.0:
            raise PlanError(f"layer {name!r}: sparsity must satisfy 0 <= sparsity < 1, got {share}")
    fixed = [layers[name] for name in _output_layers(smaller)]
    wanted = {name: p.requires_grad for name, p in smaller.named_parameters()}
    smaller.requires_grad_(True)  # dependencies are found in the graph of gradients
    try:
        with torch.no_grad():
            before = smaller(example_inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = pruning.DependencyGraph()
            graph.build_dependency(smaller, example_inputs)
            done: set[nn.Module] = set()
            for name, layer in layers.items():
                if layer not in done:
                    done |= _prune(pruning, graph, layer, shares.get(name, 0.0), multiple, fixed)
        with torch.no_grad():
            after = smaller(example_inputs)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its channels cannot be removed: {error}"
        ) from error
    if _shapes(before) != _shapes(after):
        raise UnsupportedModelError(
            f"{type(model).__name__}: outputs of shape {_shapes(before)} became {_shapes(after)}"
        )
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    return smaller


def _prune(
    pruning: Any, graph: Any, layer: nn.Module, share: float, multiple: int, fixed: list[nn.Module]
) -> set[nn.Module]:
    """Narrows a layer with all that must follow; returns the layers whose width that decides."""
    narrow = graph.get_pruner_of_module(layer).prune_out_channels
    width = graph.get_out_channels(layer)
    group = graph.get_pruning_group(layer, narrow, list(range(width)))
    tied: set[Any] = {
        dep.target.module
        for dep, _ in group
        if isinstance(dep.target.module, _LAYERS) and graph.is_out_channel_pruning_fn(dep.handler)
    }
    kept = max(1, round(width * (1.0 - share) / multiple)) * multiple
    grouped = any(m.groups not in (1, m.in_channels) for m in tied if not isinstance(m, nn.Linear))
    if kept >= width or grouped or any(module in fixed for module in tied):
        return tied
    norms = pruning.importance.GroupMagnitudeImportance(p=2)(group)
    removed = norms.argsort(stable=True)[: width - kept].tolist()
    group = graph.get_pruning_group(layer, narrow, sorted(removed))
    if graph.check_pruning_group(group):  # something would have no channel left
        group.prune()
    return tied


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ImportError(
            "pruning of channels needs torch-pruning: pip install 'adalayer_native[channels]'"
        ) from None
    return torch_pruning


def _output_layers(model: nn.Module) -> set[str]:
    """Layers whose output reaches the model's without passing another layer."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error}"
        ) from error
    layers = supported_layers(model)
    waiting = [node for node in graph.nodes if node.op == "output"]
    found: set[str] = set()
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module" and node.target in layers:
            found.add(str(node.target))
        else:
            waiting.extend(node.all_input_nodes)
    return found


def _shapes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, Mapping):
        return {key: _shapes(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [_shapes(value) for value in result]
    return result
