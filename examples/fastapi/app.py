"""An engine in a FastAPI application: image in, classes out.

MODEL=model.ada uvicorn --app-dir examples/fastapi app:app
curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' localhost:8000/classify
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

import adalayer_native as ada
from adalayer_native.serve.images import Preprocessing, probabilities

MAX_BYTES = 16 << 20
MAX_PIXELS = 50_000_000


@asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.engine = ada.load(os.environ["MODEL"])
    engine = app.state.engine
    app.state.preprocess = Preprocessing(engine.preprocessing, engine.inputs[0].shape)
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request, top: int = 5) -> list[dict[str, object]]:
    """The most likely classes of a JPEG or PNG."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"expected at most {MAX_BYTES} bytes")
    engine, preprocess = request.app.state.engine, request.app.state.preprocess
    try:
        # Both leave Python's lock while they work, so a thread keeps the event loop free.
        x = await run_in_threadpool(preprocess, bytes(data), MAX_PIXELS)
    except ada.InputError as error:
        raise HTTPException(400, str(error)) from None
    scores = await run_in_threadpool(engine.run, x[None])
    shares = probabilities(scores)[0]
    names = engine.class_names or [str(k) for k in range(len(shares))]
    best = (-shares).argsort(kind="stable")[:top].tolist()
    return [{"class": names[k], "probability": float(shares[k])} for k in best]
