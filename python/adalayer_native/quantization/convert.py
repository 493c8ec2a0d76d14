"""From a prepared model to native layers, and back from a saved file."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native._files import require_file
from adalayer_native.capture import GraphModel, captured
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.tidying import drop_dead
from adalayer_native.errors import FileFormatError
from adalayer_native.nn.tensor_train import with_trains
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization.chains import ACT_ROOT
from adalayer_native.quantization.exact import check_calibrated, fold
from adalayer_native.quantization.exact_steps import exact_steps
from adalayer_native.quantization.fake_quant import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.file_names import with_present_names
from adalayer_native.quantization.graph import (
    build_prepared,
    metadata,
    quantizers_of,
    set_submodule,
)


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

    layer = prepared.get_submodule(name)
    folded = fold(prepared, name)
    quantizer = folded.quantizer
    common: dict[str, Any] = {
        "input_scale": quantizer.scale,
        "input_zero_point": quantizer.zero_point,
        "input_bits": quantizer.bits,
        "activation": clamp,
    }
    if isinstance(layer, QuantLinear):
        return Linear.from_quantized(
            folded.weight, layer.bits, folded.weight_scale, folded.bias, **common
        )
    if isinstance(layer, QuantConvTranspose2d):
        return ConvTranspose2d.from_quantized(
            folded.weight,
            layer.bits,
            folded.weight_scale,
            folded.bias,
            stride=layer.stride,
            padding=layer.padding,  # type: ignore[arg-type]
            output_padding=layer.output_padding,
            dilation=layer.dilation,
            groups=layer.groups,
            **common,
        )
    assert isinstance(layer, QuantConv2d)
    return Conv2d.from_quantized(
        folded.weight,
        layer.bits,
        folded.weight_scale,
        folded.bias,
        stride=layer.stride,
        padding=layer.sides,
        dilation=layer.dilation,
        groups=layer.groups,
        **common,
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


def restore(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None
) -> GraphModel:
    """Rebuild a converted model from its float architecture and a saved safetensors file.

    The file says by itself which layers are native and with how many bits, and which are tensor
    trains; neither a plan nor calibration data is needed.

    Args:
        model: the float model that was compressed; only its architecture is used. It may be on the
            meta device.
        path: file with the ``state_dict`` of what :func:`convert` returned.
        example_inputs: as for :func:`~adalayer_native.capture`; not needed where a guess fits.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        FileFormatError: the file is missing, corrupt, or does not fit the model; names the tensor.
    """
    tensors = _read(path)
    try:
        model = with_trains(model, tensors)
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from None
    skeleton = _skeleton(captured(model, example=example_inputs), tensors, path)
    tensors = with_present_names(tensors, list(skeleton.state_dict()))
    expected = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    if missing or extra:
        raise FileFormatError(
            f"{os.fspath(path)}: does not fit {type(model).__name__}: "
            f"missing {missing[:5]}, unexpected {extra[:5]}"
        )
    for key, shape in expected.items():
        # A packed payload's length depends on how many weights are zero.
        if not key.endswith(".weight_packed") and tuple(tensors[key].shape) != shape:
            raise FileFormatError(
                f"{os.fspath(path)}: tensor {key!r} has shape {tuple(tensors[key].shape)}, "
                f"expected {shape}"
            )
        if tensors[key].is_floating_point() and not bool(torch.isfinite(tensors[key]).all()):
            raise FileFormatError(f"{os.fspath(path)}: tensor {key!r} contains NaN or infinity")
    try:
        skeleton.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    return skeleton


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    require_file(path)
    try:
        return load(Path(path).read_bytes())
    except OSError as error:
        raise FileFormatError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{os.fspath(path)}: not a valid safetensors file: {error}"
        ) from error


def _skeleton(
    model: GraphModel, tensors: dict[str, Tensor], path: str | os.PathLike[str]
) -> GraphModel:
    """Converted model of the right structure, with placeholder values."""
    suffix = ".weight_packed"
    native = {key[: -len(suffix)] for key in tensors if key.endswith(suffix)}
    layers = supported_layers(model)
    unknown = sorted(native - set(layers))
    if unknown:
        raise FileFormatError(
            f"{os.fspath(path)}: layers {unknown[:5]} are not in {type(model).__name__}"
        )
    plans: dict[str, LayerPlan] = {}
    for name, module in layers.items():
        bits: int | None = None
        activation_bits = 8
        if name in native:
            bits = _packed_bits(tensors[name + suffix], name, path)
            activation_bits = _activation_bits(tensors, name, path)
        plans[name] = LayerPlan(
            name=name,
            kind=layer_kind(module),
            params=module.weight.numel(),
            bits=bits,
            activation_bits=activation_bits,
        )
    # Batch norms in front of a layer: in the file are those that it has not taken in.
    statistics = ".running_mean"
    keep = {key[: -len(statistics)] for key in tensors if key.endswith(statistics)}
    prepared = build_prepared(model, Plan(plans, method="restored"), empty=True, keep=keep)
    if prepared.meta["kept_float"]:
        raise FileFormatError(
            f"{os.fspath(path)}: holds native layers that {type(model).__name__} cannot have: "
            f"{prepared.meta['kept_float']}"
        )
    for quantizer in quantizers_of(prepared).values():
        quantizer.set_range(0.0, 1.0)
    with torch.no_grad():
        for name in native:
            layer = prepared.get_submodule(name)
            assert isinstance(layer, (QuantConv2d, QuantConvTranspose2d, QuantLinear))
            layer.weight.zero_()  # whatever the model held must not matter, NaN included
            if layer.bias is not None:
                layer.bias.zero_()
            norm_name = prepared.meta["layers"][name]["batch_norm"]
            if norm_name is not None:
                norm = prepared.get_submodule(norm_name)
                assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
                norm.reset_running_stats()
                norm.reset_parameters()
    return convert(prepared)


def _packed_bits(packed: Tensor, name: str, path: str | os.PathLike[str]) -> int:
    from adalayer_native.ops import packed_info, unpack_weight

    try:
        unpack_weight(packed)  # damage is found here, with a name, and not in the first call
        return int(packed_info(packed)["bits"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{os.fspath(path)}: layer {name!r}: {error}") from error


def _activation_bits(tensors: dict[str, Tensor], name: str, path: str | os.PathLike[str]) -> int:
    qparams = tensors.get(f"{name}.input_qparams")
    if qparams is None or qparams.numel() != 3:
        raise FileFormatError(
            f"{os.fspath(path)}: tensor '{name}.input_qparams' is missing or not of 3 elements"
        )
    return int(qparams.reshape(-1)[2])


__all__ = ["convert", "restore"]
