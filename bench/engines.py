"""The native engine as a candidate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import adalayer_native as ada
from bench.networks import native_network, network
from bench.peers import Peer


@lru_cache(maxsize=8)
def _engine(name: str, bits: int, weights: str, threads: int) -> Any:
    native = native_network(name, bits)[1]
    return ada.compile(native, network(name).images(1), policy="native", weights=weights)


def engine(name: str, bits: int, weights: str = "measured") -> Any:
    """The compiled engine of a network with ``bits`` in every layer that it can run natively.

    Planned for the current number of threads.
    """
    return _engine(name, bits, weights, torch.get_num_threads())


def ours(name: str, bits: int, images: Tensor) -> Peer:
    """Float NCHW images in, logits out, like every peer; as many threads as torch."""
    compiled = engine(name, bits)
    return lambda: compiled(images)
