"""Which kernel a drop-in layer runs: its own, or torch's in float where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native import ops
from adalayer_native.nn.float_layer import FloatLayer
from adalayer_native.nn.layer import NativeLayer

__all__ = ["POLICIES", "Choice", "choices", "set_policy"]

POLICIES = ("native", "fastest")

# Sizes of inputs for which a layer is timed; more have the choice of the nearest one.
MOST_SIZES = 8
# Timings of microseconds scatter: float must win by this much.
_CLEARLY = 0.95
_ROUNDS = 5


@dataclass(frozen=True)
class Choice:
    """What a layer runs for inputs of one size.

    Attributes:
        kernel: "native" or "float".
        native_us, float_us: medians of both, conversions at both ends included.
    """

    kernel: str
    native_us: float
    float_us: float


class Fastest:
    """The choices of one layer by the clock, and its float form where it is in use."""

    def __init__(self, layer: NativeLayer) -> None:
        self.choices: dict[tuple[Any, ...], Choice] = {}
        self.float_layer: FloatLayer | None = None
        self.stamp = _stamp(layer)

    def run(
        self, layer: NativeLayer, native: Callable[..., Tensor], x: Tensor, *rest: Tensor
    ) -> Tensor:
        """The result of the kernel that is the faster one for such an input."""
        if self.stamp != _stamp(layer):  # other weights have been loaded
            self.float_layer, self.stamp = None, _stamp(layer)
        # torch's kernels take other formats in other times; so do ours.
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        key = (tuple(x.shape), channels_last, len(rest), ops.get_num_threads())
        choice = self.choices.get(key)
        if choice is None and len(self.choices) < MOST_SIZES:
            choice = self.choices[key] = self._choose(layer, native, x, *rest)
        if choice is None:
            choice = self._nearest(key, x.numel())
        if choice.kernel == "native":
            return native(x, *rest)
        result: Tensor = self._in_float(layer)(x, *rest)
        return result

    def _in_float(self, layer: NativeLayer) -> FloatLayer:
        # Another thread may drop or replace it at any time.
        found = self.float_layer
        if found is None or _changes_unseen(layer):
            found = self.float_layer = FloatLayer(*layer.operator(), on_grid=False)
        return found

    def _choose(
        self,
        layer: NativeLayer,
        native: Callable[..., Tensor],
        x: Tensor,
        *rest: Tensor,
    ) -> Choice:
        runs: tuple[Callable[..., Tensor], ...] = (native, self._in_float(layer))
        samples: tuple[list[float], ...] = ([], [])
        for position in range(_ROUNDS + 1):
            for run, found in zip(runs, samples, strict=True):
                start = time.perf_counter()
                run(x, *rest)
                if position:  # the first round warms up
                    found.append(1e6 * (time.perf_counter() - start))
        native_us, float_us = map(median, samples)
        wins = float_us < _CLEARLY * native_us
        choice = Choice("float" if wins else "native", native_us, float_us)
        if not wins and all(known.kernel == "native" for known in self.choices.values()):
            self.float_layer = None  # its weights take 4 bytes each
        return choice

    def _nearest(self, key: tuple[Any, ...], elements: int) -> Choice:
        """The choice of the size that is most like this one."""

        def distance(known: tuple[Any, ...]) -> tuple[int, float]:
            product = 1
            for size in known[0]:
                product *= size
            other = sum(a != b for a, b in zip(known[1:], key[1:], strict=True))
            return other, abs(product - elements)

        return self.choices[min(self.choices, key=distance)]


def _tensors(layer: NativeLayer) -> list[Tensor]:
    held: list[Tensor] = [layer.weight_packed, layer.weight_scale, layer.bias, layer.grid_tensor()]
    grid = getattr(layer, "output_grid", None)
    return held if grid is None else [*held, grid.grid_tensor()]


def _changes_unseen(layer: NativeLayer) -> bool:
    """Inference tensors count no versions: what is made of them is made anew in every call."""
    return any(t.is_inference() for t in _tensors(layer))


def _stamp(layer: NativeLayer) -> tuple[Any, ...]:
    """Another one after a change of the layer's tensors, or of what else its operator takes."""
    held = tuple((id(t), 0 if t.is_inference() else t._version) for t in _tensors(layer))
    _, arguments = layer.operator()
    return held, tuple(str(a) for a in arguments.values() if not isinstance(a, Tensor))


def set_policy(model: nn.Module, policy: str) -> None:
    """How every drop-in layer of a model runs on a CPU.

    ``"native"``, which is what layers begin with: always on integers, with the bits of
    ``simulate(exact=True)``. ``"fastest"``: at the first call with a size of input, a layer times
    its kernel, conversions at both ends included, against torch's float32 kernel with the same
    dequantized weights on the same fake-quantized input, and runs the faster from then on. Where
    that is torch's, results may differ in their last bits, and the layer keeps its weights in
    float, too. Compilers, exports and engines see the native operator in either case.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    for module in model.modules():
        if isinstance(module, NativeLayer) and module.has_float_form:
            module.policy = policy
            module.fastest = Fastest(module) if policy == "fastest" else None


def choices(model: nn.Module) -> dict[str, dict[tuple[Any, ...], Choice]]:
    """What layers with the policy "fastest" have chosen: by layer, then by size of input.

    A size is the input's shape, whether it is channels_last, the number of residuals, and threads.
    """
    return {
        name: dict(module.fastest.choices)
        for name, module in model.named_modules()
        if isinstance(module, NativeLayer) and module.fastest is not None
    }
