"""What an ONNX file holds, and what of it would be native: ``adalayer info net.onnx``."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from adalayer_native.allocation.float_work import unsupported_work
from adalayer_native.capture import capture
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.onnx.building import OPERATORS
from adalayer_native.onnx.importing import imported
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.reading import OnnxFile, fixed_size, operator_name, read
from adalayer_native.plan import layer_kind, supported_layers

__all__ = ["FileLayer", "OnnxDescription", "describe"]

# Elements that are shapes, axes and masks, not parameters.
_NO_PARAMETERS = ("INT64", "BOOL", "STRING")


@dataclass(frozen=True)
class FileLayer:
    """One layer of a file's network.

    Attributes:
        name: as ``from_onnx`` calls it.
        kind: ``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"``.
        shape: of its weight.
        bits: of its integers, with which it is native as it is; None in float.
        why_float: why integers that it has are not kept; else empty.
        why_never: why no plan makes it native either; else empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    why_float: str = ""
    why_never: str = ""


@dataclass(frozen=True)
class OnnxDescription:
    """What a file says of itself, and what it would become.

    Attributes:
        name: of the file.
        bytes: of it, without data in other files.
        opset: version of the standard operators; domains: versions of other ones.
        producer: what wrote it.
        inputs, outputs: name, type and sizes (numbers, names of free ones, ``"?"``).
        operators: how often each occurs; unsupported: those that cannot be followed.
        parameters: elements of its constants but shapes and masks.
        layers: in the network's order; empty where it cannot be followed.
        in_float: products that are no layers, with their reason and share of the
            multiply-accumulates, by place.
        macs: multiply-accumulates of the whole network per sample.
        problem: why it cannot be followed; empty where it can.
    """

    name: str
    bytes: int
    opset: int
    domains: dict[str, int]
    producer: str
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    operators: dict[str, int]
    unsupported: tuple[str, ...]
    parameters: int
    layers: tuple[FileLayer, ...] = ()
    in_float: dict[str, dict[str, Any]] | None = None
    macs: float | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def describe(
    path: str | os.PathLike[str], *, sizes: Mapping[str, int] | int | None = None
) -> OnnxDescription:
    """What a file holds; nothing of it is computed.

    Args:
        path: of the file.
        sizes: of inputs that the file leaves free, as for :func:`adalayer_native.from_onnx`.

    Raises:
        FileFormatError: not an ONNX file, or one that is damaged or contradicts itself.
        UnsupportedModelError: its opset is not supported.
        MissingExtraError: the package onnx is not installed.
    """
    file = read(path)
    model = file.model
    counts = Counter(map(operator_name, file.nodes))
    unsupported = tuple(sorted(set(counts) - set(OPERATORS)))
    found = OnnxDescription(
        name=file.name,
        bytes=os.stat(path).st_size,
        opset=file.opset,
        domains={
            item.domain: int(item.version)
            for item in model.opset_import if item.domain not in ("", "ai.onnx")
        },
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(map(_port, file.inputs)),
        outputs=tuple(map(_port, model.graph.output)),
        operators=dict(counts.most_common()),
        unsupported=unsupported,
        parameters=_parameters(file),
    )  # fmt: skip
    try:
        return _followed(found, file, sizes)
    except UnsupportedModelError as error:
        return replace(found, problem=str(error).removeprefix(f"{file.name}: "))


def _port(item: Any) -> dict[str, Any]:
    onnx = onnx_package()
    kind = item.type.tensor_type
    sizes = [fixed_size(dim) or dim.dim_param or "?" for dim in kind.shape.dim]
    return {
        "name": item.name,
        "type": onnx.TensorProto.DataType.Name(kind.elem_type).lower(),
        "sizes": sizes if kind.HasField("shape") else None,
    }


def _parameters(file: OnnxFile) -> int:
    onnx = onnx_package()
    tensors = [*file.model.graph.initializer]
    tensors += [a.t for node in file.nodes for a in node.attribute if a.HasField("t")]
    kinds = onnx.TensorProto.DataType
    return sum(math.prod(t.dims) for t in tensors if kinds.Name(t.data_type) not in _NO_PARAMETERS)


def _followed(
    found: OnnxDescription, file: OnnxFile, sizes: Mapping[str, int] | int | None
) -> OnnxDescription:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reasons, which are shown
        kept = imported(file, sizes).meta["onnx"]["layers"]
        module = imported(file, sizes, integers=False)
    model = capture(module, module.meta["example"])
    rest = unsupported_work(model)
    layers: dict[str, nn.Module] = supported_layers(model)
    reasons = {part.name: part.reason for part in rest.parts}
    listed = []
    for name, layer in layers.items():
        said = kept.get(name, "")
        listed.append(
            FileLayer(
                name=name,
                kind=layer_kind(layer),
                shape=tuple(layer.get_parameter("weight").shape),
                bits=said if isinstance(said, int) else None,
                why_float=said if isinstance(said, str) else "",
                why_never=reasons.pop(name, ""),
            )
        )
    others = {name: part for name, part in rest.as_dict().items() if name in reasons}
    return replace(found, layers=tuple(listed), in_float=others, macs=rest.macs)
