"""The prepared graph: :func:`prepare` builds it, the others look into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.capture import GraphModel, captured
from adalayer_native.capture.recurrence import RecurrentStates, link_recurrences
from adalayer_native.capture.vocabulary import BATCH_NORMS, LAYERS
from adalayer_native.errors import CalibrationError, PlanError, UnsupportedModelError
from adalayer_native.plan import LayerPlan, Plan
from adalayer_native.pruning.masks import magnitude_mask
from adalayer_native.pruning.patterns import pattern_mask
from adalayer_native.quantization.chains import (
    ACT_ROOT,
    Structure,
    analyse,
    check_model,
    quantizable,
)
from adalayer_native.quantization.fake_quant import (
    QUANT_LAYERS,
    ActivationQuantizer,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLayer,
    QuantLinear,
)
from adalayer_native.rounding import conv_form, layer_form


def prepare(
    model: nn.Module | torch.export.ExportedProgram, plan: Plan, example_inputs: Any = None
) -> GraphModel:
    """Trainable simulation of the compressed model: eq. (4), ``W_opt = mask * Q_b(W)``.

    The model is copied and stays as it is. In the copy, every layer with bits becomes a
    :class:`QuantConv2d`, :class:`QuantConvTranspose2d` or :class:`QuantLinear` of the same name
    (float weight as the parameter, a magnitude mask where the plan prunes, one scale per output
    channel), batch norms stay live, and activation quantizers stand under ``act_quant`` (see
    :mod:`.chains`). A quantizer has the fewest bits that the plan gives to any of the quantized
    layers reading it, and 8 where none reads it directly. Until :func:`calibrate` has run they
    pass values through.

    ``prepared.meta["kept_float"]`` is ``{layer: reason}`` for layers that the plan quantizes but
    the native kernels cannot run; each also gives a warning.

    Args:
        model: float32 model, or what :func:`adalayer_native.capture` made of it. It is captured in
            evaluation mode: functional dropout is therefore off, module dropout is not.
        plan: see :class:`adalayer_native.plan.Plan`; layers that it does not name stay float.
        example_inputs: as for :func:`~adalayer_native.capture`; not needed for what is captured
            already, ``analyze`` or ``allocate`` have seen, or a guess fits.

    Returns:
        A graph module in evaluation mode with the same inputs and outputs as ``model``.

    Raises:
        UnsupportedModelError: it cannot be captured, or has no convolution or linear layer.
        PlanError: the plan names an unknown layer or a value out of range.
        CalibrationError: a layer's weight contains NaN or infinity.
    """
    return build_prepared(captured(model, example=example_inputs), plan)


def build_prepared(
    model: GraphModel, plan: Plan, *, empty: bool = False, keep: Collection[str] | None = None
) -> GraphModel:
    """:func:`prepare`; with ``empty`` the scales and masks are left for a later load.

    ``keep`` is as in :func:`~adalayer_native.quantization.chains.analyse`.
    """
    check_model(model)
    plan.validate(model)
    bits, kept_float = quantizable(model, plan)
    for name, reason in kept_float.items():
        warnings.warn(f"layer {name!r} stays in float: {reason}", stacklevel=3)
    _check_groups(model, plan, bits)
    structure = analyse(model, set(bits), keep)
    prepared = copy.deepcopy(model).eval()
    for name, norm in structure.input_norms.items():
        fold_into_reader(prepared, name, norm, empty=empty)
    for name, width in bits.items():
        _replace_layer(prepared, plan[name], width, structure, empty=empty)
    _insert_quantizers(prepared, plan, structure)
    _link_states(prepared, structure)
    prepared.meta["kept_float"] = kept_float
    prepared.meta["layers"] = {
        name: {
            "bits": bits[name],
            "sparsity": plan[name].sparsity,
            "pattern": plan[name].pattern,
            "input": f"{ACT_ROOT}.{structure.inputs[name]}",
            "batch_norm": structure.batch_norms.get(name),
        }
        for name in bits
    }
    if not empty:  # what a file was repaired by is not known
        prepared.meta["equalized"] = {}
    prepared.meta["quantizers"] = {site.target: site.kept for site in structure.sites.values()}
    prepared.eval()
    return prepared


def _check_groups(model: GraphModel, plan: Plan, bits: Collection[str]) -> None:
    for module in model.modules():
        if isinstance(module, RecurrentStates) and module.layer_name in bits:
            size = plan[module.layer_name].group_size
            if size is not None:
                raise PlanError(
                    f"plan of layer {module.layer_name!r}: group_size must be None for the product "
                    f"of a hidden state, got {size}"
                )


def _link_states(prepared: GraphModel, structure: Structure) -> None:
    """Recurrent layers go through the layers and quantizers that there are now."""
    for module in prepared.modules():
        if isinstance(module, RecurrentStates):
            site = structure.inputs.get(module.layer_name)
            module.grid_name = None if site is None else f"{ACT_ROOT}.{site}"
    link_recurrences(prepared)


def _replace_layer(
    prepared: GraphModel,
    plan: LayerPlan,
    bits: int,
    structure: Structure,
    *,
    empty: bool,
) -> None:
    name = plan.name
    old = prepared.get_submodule(name)
    assert isinstance(old, LAYERS)
    weight = old.weight.detach()
    if not empty and not bool(torch.isfinite(weight).all()):
        raise CalibrationError(
            f"layer {name!r}: its weight contains NaN or infinity; expected finite numbers"
        )
    mask = None
    if plan.sparsity and not empty:
        if plan.pattern == "unstructured":
            mask = magnitude_mask(weight, plan.sparsity)
        else:
            form = pattern_mask(conv_form(old, weight), plan.sparsity, plan.pattern)
            mask = layer_form(old, form)
    new = QUANT_LAYERS[type(old)].from_layer(old, bits, mask, name=name, group_size=plan.group_size)
    if not empty:
        new.refresh_scales()
    set_submodule(prepared, name, new)


@torch.no_grad()
def fold_into_reader(prepared: GraphModel, name: str, norm_name: str, *, empty: bool) -> None:
    """Take a batch norm out of the graph; the layer behind it does its work.

    With ``k = gamma / sqrt(var + eps)`` the layer's weights are ``w * k`` and its bias is
    ``b + sum(w * (beta - mean * k))``, computed in float64.
    """
    layer, norm = prepared.get_submodule(name), prepared.get_submodule(norm_name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    assert isinstance(norm, BATCH_NORMS)
    outputs = layer.weight.shape[0]
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))
    if not empty:
        factor, offset = norm_line(norm)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        # [groups, outputs / groups, inputs / groups, positions]
        weight = layer.weight.double().view(groups, outputs // groups, -1, *layer.weight.shape[2:])
        weight = weight.flatten(3) if weight.dim() > 3 else weight.unsqueeze(3)
        shift = (weight * offset.view(groups, 1, -1, 1)).sum((2, 3)).flatten()
        scaled = (weight * factor.view(groups, 1, -1, 1)).view_as(layer.weight)
        layer.weight = nn.Parameter(scaled.to(layer.weight.dtype))
        layer.bias = nn.Parameter((layer.bias.double() + shift).to(layer.bias.dtype))
    for node in list(prepared.graph.nodes):
        if node.op == "call_module" and node.target == norm_name:
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    set_submodule(prepared, norm_name, nn.Identity())


@torch.no_grad()
def norm_line(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and constant of every channel that a batch norm in evaluation mode is, float64."""
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = -norm.running_mean.double() * factor
    if norm.bias is not None:
        offset = offset + norm.bias.double()
    return factor, offset


def _insert_quantizers(prepared: GraphModel, plan: Plan, structure: Structure) -> None:
    graph = prepared.graph
    if hasattr(prepared, ACT_ROOT):
        raise UnsupportedModelError(
            f"the model has an attribute {ACT_ROOT!r}, which is reserved; rename it"
        )
    prepared.add_module(ACT_ROOT, nn.Module())
    nodes = {node.name: node for node in graph.nodes}
    for site in structure.sites.values():
        widths = [plan[name].activation_bits for name in site.layers]
        quantizer = ActivationQuantizer(min(widths, default=8), name=site.target)
        set_submodule(prepared, site.target, quantizer)
        for producer in site.producers:
            insert_behind(graph, nodes[producer], site.target)
    graph.lint()
    prepared.recompile()


def insert_behind(graph: fx.Graph, node: fx.Node, target: str) -> None:
    """A call of the module ``target`` between a value and all that read it."""
    # What is given back as it came stays so.
    kept = node.op == "placeholder"
    readers = [user for user in node.users if not (kept and user.op == "output")]
    # Placeholders must all stand before the first operation.
    anchor = node
    while anchor.op == "placeholder" and anchor.next.op == "placeholder":
        anchor = anchor.next
    with graph.inserting_after(anchor):
        inserted = graph.call_module(target, (node,))
    inserted.meta.update(node.meta)
    for reader in readers:
        reader.replace_input_with(node, inserted)


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the qualified ``name`` below ``root``, replacing what is there."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def layers_of(prepared: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers of a prepared model by name, in the model's order."""
    return {
        name: module
        for name, module in prepared.named_modules()
        if isinstance(module, (QuantConv2d, QuantConvTranspose2d, QuantLinear))
    }


def quantizers_of(prepared: nn.Module) -> dict[str, ActivationQuantizer]:
    """Activation quantizers of a prepared model by qualified name, in graph order."""
    return {
        name: module
        for name, module in prepared.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def metadata(prepared: nn.Module, key: str) -> dict[str, Any]:
    """An entry of ``prepared.meta``.

    Raises:
        UnsupportedModelError: the model did not come from :func:`prepare`.
    """
    meta = getattr(prepared, "meta", None)
    if not isinstance(meta, dict) or key not in meta:
        raise UnsupportedModelError(
            f"expected a model that prepare() returned, got {type(prepared).__name__}"
        )
    value = meta[key]
    assert isinstance(value, dict)
    return value
