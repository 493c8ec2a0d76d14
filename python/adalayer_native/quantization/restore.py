"""A converted model from a saved file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._files import require_file
from adalayer_native.capture import GraphModel, captured
from adalayer_native.errors import FileFormatError
from adalayer_native.files import ENGINE, kind_of
from adalayer_native.nn.tensor_train import with_trains
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization.convert import convert
from adalayer_native.quantization.fake_quant import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.file_names import with_present_names
from adalayer_native.quantization.graph import build_prepared, quantizers_of
from adalayer_native.rounding import group_size_of

__all__ = ["restore"]


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
        hint = ""
        if kind_of(path) == ENGINE:
            hint = "; it is an engine's: adalayer_native.load(path) opens it"
        raise FileFormatError(
            f"{os.fspath(path)}: not a valid safetensors file: {error}{hint}"
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
        group_size = None
        if name in native:
            bits = _packed_bits(tensors[name + suffix], name, path)
            activation_bits = _activation_bits(tensors, name, path)
            group_size = _group_size(tensors.get(f"{name}.weight_scale"), module, name, path)
        plans[name] = LayerPlan(
            name=name,
            kind=layer_kind(module),
            params=module.weight.numel(),
            bits=bits,
            activation_bits=activation_bits,
            group_size=group_size,
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


def _group_size(
    scale: Tensor | None, layer: nn.Module, name: str, path: str | os.PathLike[str]
) -> int | None:
    """Input channels per scale; None for one scale per output, or where something is wrong."""
    if scale is None or scale.dim() != 2 or not isinstance(layer, nn.Linear):
        return None
    try:
        size = group_size_of(layer.in_features, scale.shape[1])
    except ValueError as error:
        raise FileFormatError(
            f"{os.fspath(path)}: tensor '{name}.weight_scale' of shape {tuple(scale.shape)}: "
            f"{error}"
        ) from None
    return size if size < layer.in_features else None
