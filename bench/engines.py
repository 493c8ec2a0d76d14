"""The native engine as a candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import _C
from bench.peers import Peer

COVERAGE_FIELDS = ("name", "kind", "bits", "microseconds", "bytes", "macs", "where")


def compiled(native: nn.Module, images: Tensor, threads: int) -> Any:
    """The engine of a converted network: callable, with ``coverage()``."""
    if not hasattr(ada, "compile"):
        return DropIn(native)
    return ada.compile(native, (images,), threads=threads)


def ours(native: nn.Module, images: Tensor, threads: int) -> Peer:
    """Float NCHW images in, logits out, like every peer."""
    engine = compiled(native, images, threads)
    return lambda: engine(images)


def weight_bytes(engine: Any) -> int:
    """Bytes that the engine holds for its weights."""
    if isinstance(engine, DropIn):
        return _C.cache_info()[1]
    return sum(row.bytes for row in engine.coverage())


class DropIn:
    """Stands for an engine where there is none: the converted modules under torch."""

    def __init__(self, native: nn.Module) -> None:
        self.native = native

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.native(images.contiguous(memory_format=torch.channels_last))
