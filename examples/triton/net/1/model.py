"""An engine as a model of Triton's Python backend; ``model.ada`` lies beside this file.

Triton batches (``dynamic_batching`` in config.pbtxt); a list of requests becomes one engine call.
"""

from __future__ import annotations

import os

import numpy as np
import triton_python_backend_utils as pb_utils

import adalayer_native as ada


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.engine = ada.load(os.path.join(folder, "model.ada"))
        self.name = self.engine.inputs[0].name

    def execute(self, requests):
        """One response per request, in order."""
        arrays, failed = [], {}
        for number, request in enumerate(requests):
            array = pb_utils.get_input_tensor_by_name(request, self.name).as_numpy()
            if array.shape[1:] != self.engine.inputs[0].shape:
                failed[number] = f"expected {self.engine.inputs[0].shape}, got {array.shape[1:]}"
                array = array[:0].reshape(0, *self.engine.inputs[0].shape)
            arrays.append(array)
        counts = [len(array) for array in arrays]
        result = None
        if sum(counts):
            result = self.engine.run(np.concatenate(arrays))
        responses, start = [], 0
        for number, count in enumerate(counts):
            if number in failed:
                error = pb_utils.TritonError(failed[number])
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=error))
                continue
            tensor = pb_utils.Tensor("output", result[start : start + count])
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
            start += count
        return responses
