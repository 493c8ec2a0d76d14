"""The native engine as a candidate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import adalayer_native as ada
from adalayer_native.plan import Plan
from bench.images import structured_images
from bench.networks import native_network, native_plan, network
from bench.peers import Peer

# What the best plan may be predicted to lose more than 8 bits everywhere: 0.1 %.
LOSS = 0.001
# Weights are random: zeros among them would say nothing.
OPTIONS = {"widths": (2, 3, 4, 6, 8), "sparsities": (0.0,), "patterns": ("unstructured",)}
IMAGES = 32


@lru_cache(maxsize=8)
def _engine(name: str, bits: int, weights: str, threads: int) -> Any:
    native = native_network(name, bits)[1]
    return ada.compile(native, network(name).images(1), policy="native", weights=weights)


def engine(name: str, bits: int, weights: str = "measured") -> Any:
    """The compiled engine of a network with ``bits`` in every layer that it can run natively.

    Planned for the current number of threads.
    """
    return _engine(name, bits, weights, torch.get_num_threads())


@lru_cache(maxsize=4)
def _best_plan(name: str, threads: int) -> Plan:
    source = network(name)
    images = list(structured_images(IMAGES, source.size).split(16))
    return ada.allocate(
        None, ada.Budget(loss=LOSS), method="optimal", model=source.model, calibration=images,
        options={**OPTIONS, "step": None, "threads": threads, "weight_of": "rounded"},
        tables=source.folder / "tables", progress=False,
    )  # fmt: skip


def best_plan(name: str) -> Plan:
    """The fastest plan that is predicted to lose at most 0.1 % more than 8 bits everywhere.

    Chosen for this machine and the current number of threads.
    """
    return _best_plan(name, torch.get_num_threads())


@lru_cache(maxsize=4)
def _planned(name: str, threads: int) -> tuple[Any, Any]:
    prepared, native = native_plan(name, _best_plan(name, threads))
    return prepared, ada.compile(native, network(name).images(1), policy="native")


def best(name: str, images: Tensor) -> tuple[Any, Peer]:
    """The fake-quantized twin of that plan, and its engine as a candidate."""
    prepared, compiled = _planned(name, torch.get_num_threads())
    return prepared, lambda: compiled(images)


def ours(name: str, bits: int, images: Tensor) -> Peer:
    """Float NCHW images in, logits out, like every peer; as many threads as torch."""
    compiled = engine(name, bits)
    return lambda: compiled(images)
