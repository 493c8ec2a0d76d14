"""The native engine as a candidate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

import adalayer_native as ada
from bench.networks import native_network, network
from bench.peers import Peer


@lru_cache(maxsize=4)
def engine(name: str, bits: int) -> Any:
    """The compiled engine of a network with ``bits`` in every layer that it can run natively."""
    native = native_network(name, bits)[1]
    return ada.compile(native, network(name).images(1), policy="native")


def ours(name: str, bits: int, images: Tensor) -> Peer:
    """Float NCHW images in, logits out, like every peer; as many threads as torch."""
    compiled = engine(name, bits)
    return lambda: compiled(images)
