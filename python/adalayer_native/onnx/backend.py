"""Imported networks behind the interface of the ONNX project's own tests.

``onnx.backend.base.Backend`` takes a model and arrays. The network's input is the first of its
inputs; all others are what they are in real networks, weights, shapes and scales, and taken as
constants with the values of the first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adalayer_native.onnx.building import OPERATORS
from adalayer_native.onnx.importing import followed
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.pointwise import SMALL
from adalayer_native.onnx.reading import OnnxFile, check_operators, read

if TYPE_CHECKING:
    from onnx.backend.base import Backend as _Backend
    from onnx.backend.base import BackendRep as _BackendRep
else:
    _Backend = onnx_package("backend.base").Backend
    _BackendRep = onnx_package("backend.base").BackendRep

__all__ = ["AdalayerBackend", "Prepared"]


class Prepared(_BackendRep):
    """A checked model, followed when its constants are known."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The network's results for arrays, in the types that the model names.

        Raises:
            UnsupportedModelError: an operator cannot be followed; says which and why.
        """
        graph = self.file.model.graph
        names = [item.name for item in self.file.inputs]
        arrays = dict(zip(names, map(_array, inputs), strict=True))
        first, *others = names
        constants = {name: arrays[name] for name in others}
        module = followed(self.file, constants=constants, free_batch=False)
        with torch.no_grad():
            found = module(_tensor(arrays[first]))
        results = found if isinstance(found, tuple) else (found,)
        return tuple(
            _typed(item, output) for item, output in zip(results, graph.output, strict=True)
        )


class AdalayerBackend(_Backend):
    """The interface of ``onnx.backend.test``."""

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> Prepared:
        """Check a model; see :func:`adalayer_native.from_onnx` for its errors."""
        file = read(model.SerializeToString())
        check_operators(file, OPERATORS)
        return Prepared(file)

    @classmethod
    def run_model(
        cls, model: Any, inputs: Any, device: str = "CPU", **kwargs: Any
    ) -> tuple[Any, ...]:
        """Results of a model for arrays."""
        return cls.prepare(model, device).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Imported networks run where torch does; they are tested on the CPU."""
        return device == "CPU"


def _array(value: Any) -> np.ndarray:
    onnx = onnx_package()
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return np.asarray(value)


def _tensor(array: np.ndarray) -> torch.Tensor:
    kind = array.dtype.name.upper()
    if kind in SMALL:
        array = array.astype(str(SMALL[kind])[6:])
    return torch.from_numpy(np.array(array))


def _typed(result: torch.Tensor, output: Any) -> np.ndarray:
    onnx = onnx_package()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    array: np.ndarray = result.detach().numpy()
    return array if array.dtype == dtype else array.astype(dtype)
