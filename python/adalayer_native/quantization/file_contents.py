"""Which tensors the file of a converted model will hold, before anything is quantized."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adalayer_native.capture import GraphModel, captured
from adalayer_native.plan import Plan
from adalayer_native.quantization.chains import (
    ACT_ROOT,
    Structure,
    analyse,
    check_model,
    quantizable,
)
from adalayer_native.rounding import conv_form, group_count


@dataclass(frozen=True)
class StoredLayer:
    """A layer as it will be stored.

    Attributes:
        name: layer name.
        kind: ``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"``.
        weight_shape: shape of the packed weight, ``[O, I/groups, KH, KW]`` or ``[O, I]``.
        bits: bits per weight.
        sparsity: share of zeros that the plan asks for (rounding adds more).
        activation_bits: bits of the input.
        batch_norm: the batch norm that is folded into it and disappears, or ``None``.
        scales: shape of the weight's scales, ``[O]``, or ``[O, groups]``.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    bits: int
    sparsity: float
    activation_bits: int
    batch_norm: str | None
    scales: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.weight_shape:
            count *= size
        return count


@dataclass(frozen=True)
class StoredModel:
    """Contents of the saved file of ``convert(prepare(model, plan))``.

    Attributes:
        layers: native layers by name.
        quantizers: names of kept activation quantizers; each stores ``<name>.qparams``.
        float_tensors: ``(key, shape, dtype)`` of everything that stays as it is.
        kept_float: reason by name for layers that the plan quantizes but that stay float.
    """

    layers: dict[str, StoredLayer]
    quantizers: list[str]
    float_tensors: list[tuple[str, tuple[int, ...], torch.dtype]]
    kept_float: dict[str, str]

    def entries(self) -> list[tuple[str, str, tuple[int, ...] | None]]:
        """Every tensor as ``(key, safetensors dtype, shape)``.

        The shape is ``None`` for ``<layer>.weight_packed``, whose length depends on bits and
        zeros.
        """
        found: list[tuple[str, str, tuple[int, ...] | None]] = []
        for name, layer in self.layers.items():
            found.append((f"{name}.weight_packed", "U8", None))
            found.append((f"{name}.weight_scale", "F32", layer.scales))
            found.append((f"{name}.bias", "F32", layer.weight_shape[:1]))
            found.append((f"{name}.input_qparams", "F32", (3,)))
        found += [(f"{name}.qparams", "F32", (3,)) for name in self.quantizers]
        found += [(key, _DTYPES[dtype], shape) for key, shape, dtype in self.float_tensors]
        return found


_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_structures: weakref.WeakKeyDictionary[nn.Module, dict[frozenset[str], Structure]] = (
    weakref.WeakKeyDictionary()
)


def structure_of(model: GraphModel, quantized: set[str]) -> Structure:
    """The chain analysis of a captured model, made once per set of quantized layers."""
    known = _structures.setdefault(model, {})
    key = frozenset(quantized)
    if key not in known:
        known[key] = analyse(model, quantized)
    return known[key]


def stored_model(model: nn.Module | torch.export.ExportedProgram, plan: Plan) -> StoredModel:
    """Tensors of the file that ``convert(prepare(model, plan))`` would be saved to.

    Cheap for a captured model: it is analysed once per set of quantized layers (bits and sparsity
    do not matter for the structure).

    Raises:
        UnsupportedModelError: it cannot be captured, or has no supported layer.
        PlanError: the plan does not fit the model.
    """
    model = captured(model)
    check_model(model)
    plan.validate(model)
    bits, kept_float = quantizable(model, plan)
    modules = dict(model.named_modules())
    structure = structure_of(model, set(bits))
    layers: dict[str, StoredLayer] = {}
    for name, width in bits.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        layers[name] = StoredLayer(
            name=name,
            kind=plan[name].kind,
            weight_shape=tuple(conv_form(modules[name], weight).shape),
            bits=width,
            sparsity=plan[name].sparsity,
            activation_bits=plan[name].activation_bits,
            batch_norm=structure.batch_norms.get(name),
            scales=_scales(conv_form(modules[name], weight).shape, plan[name].group_size),
        )
    folded = (*structure.batch_norms.values(), *structure.input_norms.values())
    gone = {*bits, *folded}
    return StoredModel(
        layers=layers,
        quantizers=[f"{ACT_ROOT}.{site.name}" for site in structure.sites.values() if site.kept],
        float_tensors=_remaining(model, gone),
        kept_float=kept_float,
    )


def _scales(weight: torch.Size, group_size: int | None) -> tuple[int, ...]:
    groups = group_count(weight[1], group_size)
    return tuple(weight[:1]) if groups is None else (weight[0], groups)


def _remaining(model: GraphModel, gone: set[str]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """What a captured model holds, but for the modules that native layers take in."""
    return [
        (key, tuple(value.shape), value.dtype)
        for key, value in model.state_dict().items()
        if key.rpartition(".")[0] not in gone
    ]
