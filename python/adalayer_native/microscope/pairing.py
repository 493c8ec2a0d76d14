"""Which parts of a converted model stand for which parts of the float model.

A native layer is a float layer with the batch norm behind it (or one in front of it) folded in, so
what the two compute is compared there: **before** a residual is added and anything is clamped,
where both are plain convolutions or products. Names and shapes have to agree, and so has the order
of the calls; the chain analysis that placed the grids (``quantization/chains.py``) says which value
of the float model every grid is of.

A repair may have scaled the channels between two layers (``repair/equalize.py``). That changes no
function, but every value in between; what the float model has there is scaled in the same way
before it is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native import ops
from adalayer_native.capture import GraphModel
from adalayer_native.capture.vocabulary import LAYERS, op_name
from adalayer_native.errors import CalibrationError, UnsupportedModelError
from adalayer_native.nn import FakeQuantize, Recurrence
from adalayer_native.nn.float_layer import FloatLayer
from adalayer_native.nn.layer import NativeLayer
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization.chains import Structure, analyse
from adalayer_native.quantization.graph import build_prepared, norm_line
from adalayer_native.repair.equalize import Pair
from adalayer_native.repair.equalize import pairs_of as scalable_pairs
from adalayer_native.rounding import conv_form, layer_form, per_channel

__all__ = ["Layer", "Pairs", "Value", "pairs_of", "scaled_channels"]

# Channels scaled by a repair show as slopes that differ from 1 by this factor, in most channels.
_SCALED = 1.2
# Operators of layers that stay in float (quantization/exact_steps.py).
_FLOAT_LAYERS = ("adalayer.exact_conv2d.default", "adalayer.exact_linear.default")


@dataclass
class Layer:
    """A layer in both models.

    Attributes:
        name: in both.
        native: the native layer, or the float one where it stayed float.
        reference: the float layer as a function of its input, norms folded in.
        weight, bias: of a layer that can be native, those of ``reference``: float32, output
            channels first.
        weights_only: the same with the native layer's weights and bias; None for a float layer.
        calls: in the float model and in the native one.
        inputs: per call the float model's value that it reads, and the native model's.
        factor: what the channels of its input are divided by in the native model; None for 1.
        site: of its input's grid; None for a float layer.
        estimated: whether ``factor`` had to be estimated from the weights.
    """

    name: str
    native: nn.Module
    reference: Callable[[Tensor], Tensor]
    weights_only: Callable[[Tensor], Tensor] | None
    calls: list[tuple[fx.Node, fx.Node]]
    inputs: list[tuple[fx.Node, fx.Node]]
    weight: Tensor | None = None
    bias: Tensor | None = None
    factor: Tensor | None = None
    site: str | None = None
    estimated: bool = False


@dataclass
class Value:
    """A value between layers that something besides native layers reads, and its grid.

    Attributes:
        name: of its quantizer, ``act_quant.`` and the float model's operation.
        grid: in the native model.
        nodes: per call the float model's value, and the native model's on its grid.
        factor: as in :class:`Layer`.
    """

    name: str
    grid: FakeQuantize
    nodes: list[tuple[fx.Node, fx.Node]]
    factor: Tensor | None = None


@dataclass
class Pairs:
    """Everything that is compared.

    Attributes:
        model, native: float and converted model.
        layers, values: in graph order.
        producers: by name of a grid's site, the float model's values that lie on it.
        factors: by name of a site, what its channels are divided by.
    """

    model: GraphModel
    native: GraphModel
    layers: dict[str, Layer] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    producers: dict[str, list[fx.Node]] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)

    def readers(self, site: str) -> list[str]:
        """Native layers that read a site's grid."""
        return [name for name, layer in self.layers.items() if layer.site == site]


def pairs_of(model: GraphModel, native: Any) -> Pairs:
    """Layers and values of a float model and of what was made of it.

    Raises:
        CalibrationError: ``native`` is prepared, not converted.
        UnsupportedModelError: it is not a converted model, or of another one; names the first
            layer that differs.
    """
    if not isinstance(native, GraphModel):
        raise UnsupportedModelError(
            "expected a converted model (of compress, convert or restore) or its engine, got "
            f"{type(native).__name__}"
        )
    layers = supported_layers(model)
    _check_same(model, native, layers)
    # A layer that a suggestion has put in float is the native one otherwise: norms are folded in.
    quantized = {n for n in layers if isinstance(_find(native, n), (NativeLayer, FloatLayer))}
    structure = analyse(model, quantized, _kept_norms(native))
    found = Pairs(model, native)
    equalized = _equalized(model, native, structure, quantized)
    calls, native_calls = _calls(model), _calls(native)
    for name, module in layers.items():
        here, there = calls.get(name, []), native_calls.get(name, [])
        if len(here) != len(there):
            raise UnsupportedModelError(
                f"layer {name!r} is called {len(here)} times by {type(model).__name__} and "
                f"{len(there)} times by the converted model: they are not the same network"
            )
        both = list(zip(here, there, strict=True))
        norm = structure.input_norms.get(name)
        reads = [_operand(call) for call in here]
        if norm is not None:
            reads = [_operand(read) for read in reads]
        inputs = list(zip(reads, map(_operand, there), strict=True))
        other = native.get_submodule(name)
        if name not in quantized:
            found.layers[name] = Layer(name, other, module, None, both, inputs)
            continue
        if isinstance(other, Recurrence):
            continue  # what it makes of its states, step by step, has no counterpart
        weight, bias = _folded(model, name, structure)
        row = equalized.rows.get(name)
        if row is not None:
            weight, bias = weight / _leading(row, weight), bias / row
        column = equalized.columns.get(name)
        if column is not None:
            weight = weight * _columns(module, weight, column)
        assert isinstance(other, (NativeLayer, FloatLayer))
        weights_only = _sums_in_float(other)
        reference = copy.deepcopy(weights_only)
        form = layer_form(module, weight.float())
        reference.weight = form.reshape(reference.weight.shape)
        reference.bias = bias.float()
        estimated = equalized.estimated and (row is not None or column is not None)
        if isinstance(other, FloatLayer):
            found.layers[name] = Layer(
                name, weights_only, reference, None, both, inputs, factor=column
            )
            continue
        found.layers[name] = Layer(
            name,
            other,
            reference,
            weights_only,
            both,
            inputs,
            weight.float(),
            bias.float(),
            column,
            structure.inputs[name],
            estimated,
        )
    _add_values(found, structure, equalized)
    return found


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _operand(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _calls(model: fx.GraphModule) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in model.graph.nodes:
        name = str(node.target) if node.op == "call_module" else _float_layer(node)
        if name is not None:
            found.setdefault(name, []).append(node)
    return found


def _float_layer(node: fx.Node) -> str | None:
    """The layer that an operator of floats computes."""
    if node.op != "call_function" or op_name(node) not in _FLOAT_LAYERS:
        return None
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target).rpartition(".")[0]


# -- the same network -----------------------------------------------------------------------------


def _check_same(model: GraphModel, native: GraphModel, layers: dict[str, Any]) -> None:
    kinds = (NativeLayer, FloatLayer, *LAYERS)
    inside = {n: m for n, m in native.named_modules() if isinstance(m, kinds)}
    if not any(isinstance(module, NativeLayer) for module in inside.values()):
        if native.meta.get("layers"):
            raise CalibrationError(
                "expected a converted model, got a prepared one; call calibrate(prepared, loader) "
                "and convert(prepared) first"
            )
        raise UnsupportedModelError(
            f"{type(native).__name__} has no native layers; there is nothing to compare"
        )
    for name, module in layers.items():
        other = inside.get(name)
        wanted = tuple(conv_form(module, module.weight).shape)
        if other is None:
            raise UnsupportedModelError(
                f"layer {name!r} of {type(model).__name__}, with weights of shape {list(wanted)}, "
                "is not in the converted model: they are not the same network"
            )
        got = _shape_of(other, module)
        if got[: len(wanted)] != wanted or any(size != 1 for size in got[len(wanted) :]):
            raise UnsupportedModelError(
                f"layer {name!r} has weights of shape {list(wanted)} in {type(model).__name__} and "
                f"{list(got)} in the converted model: they are not the same network"
            )
    more = [name for name in inside if name not in layers]
    if more:
        raise UnsupportedModelError(
            f"layer {more[0]!r} of the converted model is not in {type(model).__name__}: they are "
            "not the same network"
        )


def _shape_of(layer: Any, model_layer: nn.Module) -> tuple[int, ...]:
    """Of a layer's weights, output channels first."""
    if isinstance(layer, NativeLayer):
        return tuple(ops.packed_info(layer.weight_packed)["shape"])
    if isinstance(layer, FloatLayer):
        return tuple(conv_form(model_layer, layer.weight).shape)
    return tuple(conv_form(layer, layer.weight).shape)


# -- weights --------------------------------------------------------------------------------------


@torch.no_grad()
def _folded(model: GraphModel, name: str, structure: Structure) -> tuple[Tensor, Tensor]:
    """Float weights (output channels first) and bias of a layer with its norms, float64."""
    layer: Any = model.get_submodule(name)
    weight = conv_form(layer, layer.weight).double()
    outputs = weight.shape[0]
    bias = weight.new_zeros(outputs) if layer.bias is None else layer.bias.double()
    if name in structure.input_norms:
        factor, offset = norm_line(model.get_submodule(structure.input_norms[name]))
        groups = getattr(layer, "groups", 1)
        grouped = weight.reshape(groups, outputs // groups, weight.shape[1], -1)
        bias = bias + (grouped * offset.view(groups, 1, -1, 1)).sum((2, 3)).flatten()
        weight = (grouped * factor.view(groups, 1, -1, 1)).reshape(weight.shape)
    if name in structure.batch_norms:
        factor, offset = norm_line(model.get_submodule(structure.batch_norms[name]))
        weight, bias = weight * _leading(factor, weight), bias * factor + offset
    return weight, bias


def _sums_in_float(layer: NativeLayer | FloatLayer) -> FloatLayer:
    """A layer's weights and bias with float inputs, and nothing behind the sum."""
    if isinstance(layer, FloatLayer):
        found = copy.deepcopy(layer)
        found.input_grid, found.bounds, found.output_grid = None, (None, None), None
        return found
    operator, arguments = layer.operator()
    return FloatLayer(operator, {**arguments, "lo": None, "hi": None, "output_bits": 0}, True)


def _leading(values: Tensor, weight: Tensor) -> Tensor:
    """One value per output channel, for weights of so many axes."""
    return values.to(weight.dtype).view(-1, *([1] * (weight.dim() - 1)))


def _columns(layer: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """One value per input channel, for weights ``[O, I/groups, ...]``."""
    if isinstance(layer, nn.Linear):
        return values.to(weight.dtype).repeat_interleave(weight.shape[1] // len(values))
    groups = int(getattr(layer, "groups", 1))
    rows = values.to(weight.dtype).view(groups, 1, -1)
    spread = rows.expand(groups, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
    return spread.view(*spread.shape, *([1] * (weight.dim() - 2)))


def scaled_channels(x: Tensor, factor: Tensor | None) -> Tensor:
    """A float model's value as the native model has it: its channels divided by factors."""
    if factor is None:
        return x
    if x.dim() == 4:
        return x / factor.view(1, -1, 1, 1)
    return x / factor.repeat_interleave(x.shape[-1] // len(factor))


# -- channels that a repair has scaled ------------------------------------------------------------


@dataclass
class _Equalized:
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Tensor] = field(default_factory=dict)
    estimated: bool = False


def _equalized(
    model: GraphModel, native: GraphModel, structure: Structure, quantized: set[str]
) -> _Equalized:
    """What a repair has scaled: as it noted it, else (a file has no notes) by the weights."""
    noted = native.meta.get("equalized")
    found = _Equalized(estimated=noted is None)
    if noted is None:
        noted = _estimated(model, native, structure, quantized)
    for first, entry in noted.items():
        found.rows[first] = entry["factor"]
        found.columns[entry["second"]] = entry["factor"]
        for target in entry["quantizers"]:
            found.sites[target] = entry["factor"]
    return found


@torch.no_grad()
def _estimated(
    model: GraphModel, native: GraphModel, structure: Structure, quantized: set[str]
) -> dict[str, Any]:
    """Pairs whose weights say that the channels between them are scaled, and by how much.

    A factor of the first layer's rows has to be the inverse of that of the second one's columns:
    rounding and training move single channels, but not both in opposite ways in most of them.
    """
    found: dict[str, Any] = {}
    for pair in _candidates(model, native, quantized):
        rows = _slopes(model, native, structure, pair.first, columns=False)
        columns = _slopes(model, native, structure, pair.second, columns=True)
        columns = columns.reshape(len(rows), -1).median(dim=1).values
        if bool((rows <= 0).any() or (columns <= 0).any()):
            continue
        both = 0.5 * (columns.log() - rows.log())
        apart = 0.5 * (columns.log() + rows.log())
        if float(both.abs().median()) > torch.tensor(_SCALED).log() and float(
            apart.abs().median()
        ) < 0.5 * float(both.abs().median()):
            found[pair.first] = {
                "second": pair.second,
                "quantizers": pair.quantizers,
                "factor": both.exp().float(),
            }
    return found


def _candidates(model: GraphModel, native: GraphModel, quantized: set[str]) -> list[Pair]:
    """Pairs of layers whose channels a repair may scale."""
    plan = Plan(
        {
            name: LayerPlan(
                name, layer_kind(layer), layer.weight.numel(), 8 if name in quantized else None
            )
            for name, layer in supported_layers(model).items()
        }
    )
    prepared = build_prepared(model, plan, empty=True, keep=_kept_norms(native))
    return scalable_pairs(prepared)


def _kept_norms(native: GraphModel) -> set[str]:
    """Batch norms that no layer has taken in: they still have statistics."""
    end = ".running_mean"
    return {key[: -len(end)] for key in native.state_dict() if key.endswith(end)}


def _slopes(
    model: GraphModel, native: GraphModel, structure: Structure, name: str, *, columns: bool
) -> Tensor:
    """Native weights over float ones in the least squares sense, per row or input channel."""
    layer: Any = model.get_submodule(name)
    weight, _ = _folded(model, name, structure)
    other: Any = native.get_submodule(name)
    held = other.weight_int().reshape(weight.shape).double()
    held = held * per_channel(other.weight_scale, weight.shape)
    if not columns:
        a, b = weight.flatten(1), held.flatten(1)
    else:
        groups = int(getattr(layer, "groups", 1))
        shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        a, b = (w.reshape(shape).transpose(1, 2).flatten(0, 1).flatten(1) for w in (weight, held))
    return (a * b).sum(1) / a.square().sum(1).clamp_min(1e-300)


# -- values between layers ------------------------------------------------------------------------


def _add_values(found: Pairs, structure: Structure, equalized: _Equalized) -> None:
    nodes = {node.name: node for node in found.model.graph.nodes}
    modules = dict(found.native.named_modules())
    on_grid: dict[int, list[fx.Node]] = {}
    for node in found.native.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        grid = module if isinstance(module, FakeQuantize) else getattr(module, "output_grid", None)
        if isinstance(grid, FakeQuantize):
            on_grid.setdefault(id(grid), []).append(node)
    for site in structure.sites.values():
        found.producers[site.name] = [nodes[name] for name in site.producers]
        factor = equalized.sites.get(site.target)
        if factor is not None:
            found.factors[site.name] = factor
        grid = modules.get(site.target)
        if not isinstance(grid, FakeQuantize):
            continue
        there = on_grid.get(id(grid), [])
        if len(there) != len(site.producers):
            continue  # an operator that knows the grid has taken the value in
        pairs = list(zip(found.producers[site.name], there, strict=True))
        found.values[site.name] = Value(site.target, grid, pairs, factor)
