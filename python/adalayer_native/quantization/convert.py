"""From a prepared model to native layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from adalayer_native.capture import GraphModel
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.tidying import drop_dead
from adalayer_native.padding import window_of
from adalayer_native.quantization.chains import ACT_ROOT
from adalayer_native.quantization.exact_steps import exact_steps
from adalayer_native.quantization.fake_quant import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.fold import check_calibrated, fold
from adalayer_native.quantization.graph import (
    metadata,
    quantizers_of,
    set_submodule,
)

__all__ = ["convert"]


def convert(prepared: GraphModel) -> GraphModel:
    """Replace every quantized layer by its native counterpart.

    Batch norms that follow a native layer are folded into its scale and bias and leave the graph
    (an ``nn.Identity`` keeps their name). So do dropout and stochastic depth, which do nothing
    outside training, and what is the only reader of a convolution: a residual addition (it becomes
    the layer's second argument), then a relu, relu6 or clamp.
    Activation quantizers that only native layers read are dropped, since a native layer quantizes
    its own input on the same grid; the others become ``nn.FakeQuantize``, and a convolution that
    one follows directly puts its output on that grid itself.

    Args:
        prepared: from :func:`prepare`, calibrated. It is copied and stays usable.

    Returns:
        A graph module in evaluation mode, float32 in and out, same module names.

    Raises:
        CalibrationError: an activation has no range (run ``calibrate``), or a parameter is not
            finite.
        UnsupportedModelError: the model did not come from :func:`prepare`.
    """
    from adalayer_native.nn import FakeQuantize

    entries = metadata(prepared, "layers")
    check_calibrated(prepared)
    native = copy.deepcopy(prepared)
    native.eval()
    replaced: dict[fx.Node, fx.Node] = {}
    exact_steps(native, {entry["batch_norm"] for entry in entries.values()}, replaced)
    for step in reversed(replaced):
        native.graph.erase_node(step)
    drop_dead(native.graph)  # the scores of attentions
    _drop_identities(native)
    clamps = _fuse(native, entries)
    for name in entries:
        set_submodule(native, name, _native_layer(prepared, name, clamps.get(name)))
    for target, kept in metadata(prepared, "quantizers").items():
        if kept:
            old = quantizers_of(prepared)[target]
            new = FakeQuantize(old.scale, old.zero_point, old.bits)
            set_submodule(native, target, new)
        else:
            _bypass(native, target)
            native.delete_submodule(target)
    _fuse_output_grids(native)
    if not list(native.get_submodule(ACT_ROOT).children()):
        native.delete_submodule(ACT_ROOT)
    native.graph.lint()
    native.recompile()
    native.eval()
    return native


def _native_layer(prepared: GraphModel, name: str, clamp: Any) -> Any:
    from adalayer_native.nn import Conv2d, ConvTranspose2d, Linear
    from adalayer_native.nn.layer import NativeLayer

    layer: Any = prepared.get_submodule(name)
    folded = fold(prepared, name)
    quantizer = folded.quantizer
    kinds: dict[type, type[NativeLayer]] = {
        QuantLinear: Linear,
        QuantConvTranspose2d: ConvTranspose2d,
        QuantConv2d: Conv2d,
    }
    return kinds[type(layer)].from_quantized(
        folded.weight,
        layer.bits,
        folded.weight_scale,
        folded.bias,
        input_scale=quantizer.scale,
        input_zero_point=quantizer.zero_point,
        input_bits=quantizer.bits,
        activation=clamp,
        **window_of(layer),
    )


def _fuse(native: GraphModel, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take folded batch norms and fusable activations out of the graph; clamp range by layer."""
    norms = {entry["batch_norm"] for entry in entries.values()} - {None}
    for target in norms:
        _bypass(native, target)
        set_submodule(native, target, nn.Identity())
    _fuse_residuals(native, entries)
    calls: dict[str, list[fx.Node]] = {}
    for node in native.graph.nodes:
        if node.op == "call_module" and node.target in entries:
            calls.setdefault(str(node.target), []).append(node)
    clamps: dict[str, Any] = {}
    for name, nodes in calls.items():
        readers = [next(iter(node.users)) for node in nodes if len(node.users) == 1]
        ranges = {table.clamp_range(reader) for reader in readers}
        # A layer that is called twice can only take over what follows it at both places.
        if len(readers) != len(nodes) or len(ranges) != 1 or None in ranges:
            continue
        pairs = list(zip(nodes, readers, strict=True))
        if any(table.source(reader) is not node for node, reader in pairs):
            continue
        bounds = ranges.pop()
        assert bounds is not None
        # A native layer has no bound where torch has an infinite one.
        clamps[name] = tuple(None if abs(bound) == float("inf") else bound for bound in bounds)
        for node, reader in pairs:
            reader.replace_all_uses_with(node)
            native.graph.erase_node(reader)
    return clamps


def _single_calls(native: GraphModel, wanted: Any) -> list[fx.Node]:
    """Calls of modules that ``wanted`` accepts, called once, whose result has one reader."""
    modules = dict(native.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in native.graph.nodes:
        if node.op == "call_module" and wanted(str(node.target), modules[str(node.target)]):
            calls.setdefault(str(node.target), []).append(node)
    return [n[0] for n in calls.values() if len(n) == 1 and len(n[0].users) == 1]


def _fuse_residuals(native: GraphModel, entries: dict[str, dict[str, Any]]) -> None:
    """``add(conv(x), r)`` becomes ``conv(x, r)``, where the shapes are known to be the same."""
    order = {node: i for i, node in enumerate(native.graph.nodes)}
    convs = _single_calls(native, lambda t, m: t in entries and isinstance(m, QuantConv2d))
    # The later of two convolutions takes the addition, as in the chains of `prepare`.
    for node in sorted(convs, key=order.__getitem__, reverse=True):
        addition = next(iter(node.users))
        if not table.is_addition(addition) or len(node.args) != 1:
            continue
        left, right = addition.args[:2]
        other = right if left is node else left
        if other is node or not isinstance(other, fx.Node):
            continue
        with native.graph.inserting_before(addition):
            fused = native.graph.call_module(str(node.target), (node.args[0], other))
        fused.meta.update(addition.meta)
        addition.replace_all_uses_with(fused)
        native.graph.erase_node(addition)
        native.graph.erase_node(node)


def _fuse_output_grids(native: GraphModel) -> None:
    """A convolution whose only reader is a kept quantizer does that quantizer's work."""
    from adalayer_native.nn import Conv2d, ConvTranspose2d, FakeQuantize

    modules = dict(native.named_modules())
    for node in _single_calls(native, lambda t, m: isinstance(m, (Conv2d, ConvTranspose2d))):
        reader = next(iter(node.users))
        grid = modules.get(str(reader.target)) if reader.op == "call_module" else None
        if isinstance(grid, FakeQuantize):
            modules[str(node.target)].__dict__["output_grid"] = grid
            reader.replace_all_uses_with(node)
            native.graph.erase_node(reader)


def _drop_identities(native: GraphModel) -> None:
    modules = dict(native.named_modules())
    for node in list(native.graph.nodes):
        if table.is_identity(node, modules):
            operand = table.source(node)
            assert operand is not None
            node.replace_all_uses_with(operand)
            native.graph.erase_node(node)


def _bypass(native: GraphModel, target: str) -> None:
    """Remove every call of the module at ``target``; its readers read its operand."""
    for node in list(native.graph.nodes):
        if node.op == "call_module" and node.target == target:
            operand = table.source(node)
            assert operand is not None
            node.replace_all_uses_with(operand)
            native.graph.erase_node(node)
