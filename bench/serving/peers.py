"""Other runtimes in the replicas of the same server.

The server's model file is for them a JSON text that names the network, ``{"network": "resnet18"}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adalayer_native.serve.runner import Array, Description, TensorInfo
from bench.networks import Network, network
from bench.peers import openvino_int8_file


def _network(path: str) -> Network:
    return network(json.loads(Path(path).read_text(encoding="utf-8"))["network"])


def _description(source: Network, outputs: int, platform: str) -> Description:
    shape = (3, source.size, source.size)
    return Description(
        (TensorInfo("x", shape),), (TensorInfo("output", (outputs,)),), platform=platform
    )


class TorchRunner:
    """torch float32, channels last."""

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        source = _network(path)
        convert: Any = source.model.to  # no overload in torch's types knows modules' formats
        self._model = convert(memory_format=torch.channels_last)
        with torch.inference_mode():
            outputs = self._model(source.images(1)).shape[1]
        self.description = _description(source, outputs, "pytorch")

    def run(self, inputs: Sequence[Array], level: int = 0) -> list[Array]:
        """See :class:`adalayer_native.serve.runner.Runner`."""
        with torch.inference_mode():
            x = torch.from_numpy(inputs[0]).contiguous(memory_format=torch.channels_last)
            return [self._model(x).numpy()]


class OpenVinoRunner:
    """OpenVINO int8 by NNCF with the latency hint, any batch size."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino

        source = _network(path)
        core = openvino.Core()
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = core.read_model(openvino_int8_file(source))
        model.reshape([-1, 3, source.size, source.size])
        self._compiled = core.compile_model(model, "CPU", options)
        outputs = self.run([source.images(1).numpy()])[0].shape[1]
        self.description = _description(source, outputs, "openvino")

    def run(self, inputs: Sequence[Array], level: int = 0) -> list[Array]:
        """See :class:`adalayer_native.serve.runner.Runner`."""
        result = self._compiled({0: inputs[0]})
        return [np.ascontiguousarray(result[0], dtype=np.float32)]


RUNNERS = {
    "adalayer": "adalayer_native.serve.runner:EngineRunner",
    "torch": "bench.serving.peers:TorchRunner",
    "openvino": "bench.serving.peers:OpenVinoRunner",
}
