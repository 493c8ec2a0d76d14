"""An engine behind LitServe, which collects requests into batches.

MODEL=model.ada python examples/litserve/server.py
curl -H 'Content-Type: application/json' -d '{"pixels": [[[...]]]}' localhost:8000/predict
"""

from __future__ import annotations

import os
from typing import Any

import litserve
import numpy as np

import adalayer_native as ada


class EngineAPI(litserve.LitAPI):
    """Float pixels ``[channels, height, width]`` in, scores out."""

    def setup(self, device: Any) -> None:
        self.engine = ada.load(os.environ["MODEL"])

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        return np.asarray(request["pixels"], dtype=np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.engine.run(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return {"scores": output.tolist()}


def server() -> litserve.LitServer:
    """One worker; the engine's threads share the machine's cores."""
    api = EngineAPI(max_batch_size=8, batch_timeout=0.002)
    return litserve.LitServer(api, accelerator="cpu")


if __name__ == "__main__":
    server().run(host="127.0.0.1", port=8000, generate_client_file=False)
