"""An MLServer custom runtime for ``.ada`` files: ``mlserver start examples/mlserver``.

``model-settings.json`` beside this file names the model's.
"""

from __future__ import annotations

import asyncio

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri

import adalayer_native as ada


class AdaRuntime(MLModel):
    """One engine; MLServer does the protocol and the batching."""

    async def load(self) -> bool:
        path = await get_model_uri(self._settings)
        self._engine = await asyncio.to_thread(ada.load, path)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        by_name = {item.name: item for item in payload.inputs}
        arrays = [
            NumpyCodec.decode_input(by_name[port.name]).astype("float32")
            for port in self._engine.inputs
        ]
        result = await asyncio.to_thread(self._engine.run, *arrays)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[NumpyCodec.encode_output("output", result)],
        )
