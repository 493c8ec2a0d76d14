"""Small ONNX models made by hand, and what other runtimes say about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")

FLOAT = onnx.TensorProto.FLOAT


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    """A node that is named after its first result."""
    return onnx.helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}_node", **attributes)


def model(
    nodes: Sequence[Any],
    *,
    inputs: dict[str, Sequence[Any]],
    outputs: Sequence[str],
    constants: dict[str, Any] | None = None,
    opset: int = 21,
    kind: int = FLOAT,
) -> Any:
    """A model; constants are arrays, or (array, ONNX type)."""
    held = []
    for name, value in (constants or {}).items():
        array, number = value if isinstance(value, tuple) else (np.asarray(value), None)
        if number is not None:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
            array = np.asarray(array).astype(dtype)
        held.append(onnx.numpy_helper.from_array(array, name))
    infos = [onnx.helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()]
    results = [onnx.helper.make_tensor_value_info(n, FLOAT, None) for n in outputs]
    graph = onnx.helper.make_graph(list(nodes), "net", infos, results, held)
    imports = [onnx.helper.make_opsetid("", opset)]
    version = onnx.helper.find_min_ir_version_for(imports)
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=version)


def imported(made: Any, **options: Any) -> Any:
    """``from_onnx`` of a model's bytes."""
    return ada.from_onnx(made.SerializeToString(), **options)


def by_runtime(source: Any, x: torch.Tensor) -> list[np.ndarray]:
    """What ONNX Runtime gives for a file or bytes, without its own rewriting."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(source, options)
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found


def by_openvino(path: Any, x: torch.Tensor) -> np.ndarray:
    """What OpenVINO gives for a file, in float32 where it computes in floats."""
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return np.asarray(compiled([x.numpy()])[0])


def converted(net: nn.Module, x: Any, bits: Any = 8, sparsity: float = 0.0) -> Any:
    """A native network: every layer of so many bits, or as a dictionary says by name."""
    captured = ada.capture(net.eval(), x)
    layers = supported_layers(captured)
    width = (lambda name: bits.get(name, 8)) if isinstance(bits, dict) else (lambda name: bits)
    plan = Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), width(name), sparsity)
            for name, layer in layers.items()
        }
    )
    prepared = ada.prepare(captured, plan)
    ada.calibrate(prepared, [x], progress=False)
    return ada.convert(prepared)
