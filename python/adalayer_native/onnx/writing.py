"""``to_onnx``: a native network as QDQ ONNX, of standard operators alone."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native._files import write_atomic
from adalayer_native._version import __version__
from adalayer_native.capture import GraphModel, TensorInfo, info_of
from adalayer_native.engine.compiler import check_converted
from adalayer_native.engine.export import Exported, export, op_name
from adalayer_native.errors import InputError, UnsupportedModelError
from adalayer_native.onnx import writing_choices, writing_layers  # noqa: F401  (they fill the table of rules)
from adalayer_native.onnx.emitting import RULES, Emitter, Unwritable, described
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.writing_rules import getitem, is_getitem

__all__ = ["to_onnx"]

OLDEST, NEWEST = 13, 25
_MOST_BYTES = (1 << 31) - 1  # of a protobuf message


def to_onnx(
    native: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    opset: int = 21,
) -> int:
    """Write a converted model as an ONNX file that other runtimes run.

    Weights are integers behind a ``DequantizeLinear`` with one scale per output channel: of 4
    bits up to 4 bits (from opset 21 on), of 2 bits for 2 (from opset 25 on), else int8 of which
    only the levels of the layer's bits are used. Values on a grid stand between
    ``QuantizeLinear`` and ``DequantizeLinear``. Batch norms are in scales and biases.
    The batch is free. ``metadata_props["adalayer.layers"]`` is JSON: by layer its bits, sparsity,
    bits of the input, and the type that stores it.

    Another runtime rounds sums and softmaxes in its own way: values on the last grid may be a
    step apart from what the engine gives.

    Args:
        native: what :func:`adalayer_native.convert` or :func:`adalayer_native.from_onnx` gave.
        example_inputs: as for :func:`adalayer_native.compile`; not needed for these two.
        opset: version of the standard operators, 13 to 25. ONNX Runtime reads all of them (25 from
            version 1.24 on), OpenVINO none with integers of 2 bits.

    Returns:
        Bytes of the file.

    Raises:
        UnsupportedModelError: operations that standard ONNX cannot express, all of them named; or
            a model without native layers.
        CalibrationError: the model is prepared, but not converted.
        MissingExtraError: the package onnx is not installed.
        OSError: the file cannot be written; what was there stays.
    """
    onnx = onnx_package()
    if not OLDEST <= opset <= NEWEST:
        raise InputError(f"opset must be {OLDEST} to {NEWEST}, got {opset}")
    if not isinstance(native, nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module, got {type(native).__name__}")
    check_converted(native)
    example = _example(native) if example_inputs is None else example_inputs
    exported = export(native, example)
    model = _model(exported, opset)
    onnx.checker.check_model(model, full_check=True)
    if model.ByteSize() > _MOST_BYTES:
        raise UnsupportedModelError(
            f"{os.fspath(path)}: the model has {model.ByteSize()} bytes; an ONNX file of one piece "
            f"holds {_MOST_BYTES}"
        )
    data = model.SerializeToString()
    write_atomic(path, data)
    return len(data)


def _example(native: nn.Module) -> Any:
    """The example that a model was captured or imported with."""
    if isinstance(native, GraphModel):
        tensors = []
        for node in native.graph.find_nodes(op="placeholder"):
            info = info_of(node)
            if isinstance(info, TensorInfo):
                tensors.append(torch.zeros(info.sizes, dtype=info.dtype))
        signature = native.signature
        if signature.is_plain and not signature.arguments[1].num_children:
            return tuple(tensors)
    found = getattr(native, "meta", {}).get("example")
    if found is None:
        raise UnsupportedModelError(
            f"{type(native).__name__}: an example of its inputs is needed; give example_inputs="
        )
    return tuple(found)


def _model(exported: Exported, opset: int) -> Any:
    onnx = onnx_package()
    e = Emitter(exported, opset)
    inputs = [_input(e, node) for node in exported.inputs]
    _write_nodes(e)
    outputs = [_output(e, item, place) for place, item in enumerate(exported.outputs)]
    graph = onnx.helper.make_graph(e.nodes, "adalayer", inputs, outputs, e.constants)
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        graph,
        opset_imports=imports,
        producer_name="adalayer_native",
        producer_version=__version__,
        ir_version=onnx.helper.find_min_ir_version_for(imports),
    )
    onnx.helper.set_model_props(model, {"adalayer.layers": json.dumps(e.layers)})
    return model


def _write_nodes(e: Emitter) -> None:
    problems: dict[str, str] = {}
    for node in e.exported.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, (Tensor, list, tuple)):
            continue  # sizes, which the graph's shapes say, too
        if any(operand in problems for operand in map(described, node.all_input_nodes)):
            problems[described(node)] = ""  # follows from another
            continue
        try:
            if is_getitem(node):
                e.names[node] = getitem(e, node)
                continue
            write = RULES.get(op_name(node))
            if write is None:
                raise Unwritable("no operator of ONNX is known for it")
            e.names[node] = write(e, node, e.arguments(node))
        except Unwritable as error:
            problems[described(node)] = str(error)
    reasons = {name: why for name, why in problems.items() if why}
    if reasons:
        listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise UnsupportedModelError(f"operations that cannot be written as ONNX: {listed}")


def _info(e: Emitter, name: str, value: Tensor) -> Any:
    onnx = onnx_package()
    sizes: list[Any] = [
        size if isinstance(size, int) else "batch" if e.exported.is_batch(size) else None
        for size in value.shape
    ]
    kind = onnx.helper.np_dtype_to_tensor_dtype(torch.zeros((), dtype=value.dtype).numpy().dtype)
    return onnx.helper.make_tensor_value_info(name, kind, sizes)


def _input(e: Emitter, node: fx.Node) -> Any:
    e.names[node] = e.unused(str(node.target))
    return _info(e, e.names[node], node.meta["val"])


def _output(e: Emitter, item: Any, place: int) -> Any:
    """An output, under a name of its own."""
    name = "output" if len(e.exported.outputs) == 1 else f"output_{place}"
    if not isinstance(item, fx.Node):
        raise UnsupportedModelError(
            f"result {place} of the model is {item!r}; an ONNX file gives tensors alone"
        )
    source = e.of(item)
    result = e.op("Identity", [source], name)
    return _info(e, result, item.meta["val"])
