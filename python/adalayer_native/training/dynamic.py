"""Widths that follow measured statistics of the layers while a model trains.

The second paper's section 7 proposes bits "adjusted in real time based on layer-wise gradient
statistics or activation distributions". Here weights follow the signal-to-noise ratio of their
gradient and inputs the entropy of their values, each between two bounds:

- ``SNR_l = |E g|^2 / (E|g|^2 - |E g|^2)`` over the steps of a window. While gradients agree, coarse
  weights follow them as well as fine ones; as they come to disagree, what a step changes is less
  than a coarse level. Bits go from ``low`` to ``high`` as the ratio falls by ``decades`` powers of
  ten below that of the layer's first window. ``|E g|^2`` is estimated without another copy of the
  gradients: by the product of a gradient with the optimizer's momentum, which is a weighted sum of
  earlier ones.
- ``H_l``: entropy, in bits, of an input on the grid that ``high`` bits would have. What takes
  ``H_l`` bits to write down gets so many, rounded up or down.

After every window a width goes one bit towards its value, if that is at least ``margin`` of a bit
away, so that a value between two widths does not make it go to and fro. In the last part of the run
widths stay, and what is there then is the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.errors import PlanError
from adalayer_native.importance.observe import entropy_bits
from adalayer_native.plan import MAX_BITS, MIN_BITS, LayerPlan, Plan, layer_kind
from adalayer_native.quantization.graph import layers_of, metadata, quantizers_of
from adalayer_native.quantization.lsq import StepSize
from adalayer_native.training.widths import change_input, change_weight

__all__ = ["DynamicSchedule", "DynamicWidths"]

_EVERY = 8  # steps between two looks at the inputs
_SAMPLES = 16  # that are looked at
_MOMENTA = ("momentum_buffer", "exp_avg")  # of the optimizers that there are


@dataclass(frozen=True)
class DynamicWidths:
    """Bounds and pace of widths that :func:`~adalayer_native.training.finetune` adjusts.

    Attributes:
        low, high: bits, 2 to 8.
        windows: in how many parts of the run widths may change.
        hold: share of the run, at its end, in which they do not.
        decades: powers of ten by which a gradient's signal-to-noise ratio falls from ``low`` to
            ``high``.
        margin: of a bit, above one half.

    Raises:
        PlanError: a value out of range.
    """

    low: int = 2
    high: int = 4
    windows: int = 20
    hold: float = 0.25
    decades: float = 1.0
    margin: float = 0.6

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.low < self.high <= MAX_BITS:
            raise PlanError(
                f"finetune: widths must go from low to a higher high within {MIN_BITS} and "
                f"{MAX_BITS} bits, got {self.low} and {self.high}"
            )
        if self.windows < 1:
            raise PlanError(f"finetune: windows must be at least 1, got {self.windows}")
        for name, least, most in (("hold", 0.0, 1.0), ("decades", 1e-3, 100.0)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise PlanError(f"finetune: {name} must be from {least:g} to {most:g}, got {value}")
        if not 0.5 < self.margin <= 1.0:
            raise PlanError(f"finetune: margin must be above 0.5 and at most 1, got {self.margin}")


class DynamicSchedule:
    """The widths of one run.

    Args:
        prepared: calibrated, with ``low`` bits in all weights and inputs of quantized layers.
        settings: bounds and pace.

    Attributes:
        state: JSON values to go on with.

    Raises:
        PlanError: the model has other bits.
    """

    def __init__(self, prepared: nn.Module, settings: DynamicWidths) -> None:
        self.settings = settings
        self.layers = layers_of(prepared)
        self.entries = metadata(prepared, "layers")
        known = quantizers_of(prepared)
        self.quantizers = {e["input"]: known[e["input"]] for e in self.entries.values()}
        for name, entry in self.entries.items():
            bits = entry["bits"], known[entry["input"]].bits
            if bits != (settings.low, settings.low):
                raise PlanError(
                    f"finetune: dynamic widths begin at {settings.low} bits, but layer {name!r} "
                    f"has {bits[0]} bits and its input {bits[1]}"
                )
        self.state: dict[str, Any] = {
            "window": 0,
            "weights": dict.fromkeys(self.layers, settings.low),
            "inputs": dict.fromkeys(self.quantizers, settings.low),
            "first": {},  # log10 of the ratios in the first window
            "sums": {},  # of this window: signal, power and steps, or entropy and looks
            "log": {"snr": {}, "entropy": {}},  # of the last window
        }
        self._handles: list[Any] = []
        self._look = False

    @property
    def key(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        return asdict(self.settings)

    @property
    def done(self) -> bool:
        """Whether widths stay from here on."""
        return int(self.state["window"]) >= self.settings.windows

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on with a checkpoint's; scales have been loaded."""
        if state is None:
            return
        self.state = state
        for name, bits in state["weights"].items():
            self.layers[name].bits = bits
            self.entries[name]["bits"] = bits
        for name, bits in state["inputs"].items():
            self.quantizers[name].bits = bits

    # -- statistics ---------------------------------------------------------------------------

    def watch(self, step: int) -> None:
        """Look at the inputs of this forward pass, if it is their turn."""
        if not self._handles:
            self._handles = [
                quantizer.register_forward_pre_hook(self._hook(name))
                for name, quantizer in self.quantizers.items()
            ]
        self._look = not self.done and step % _EVERY == 0

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._look:
                bits = entropy_bits(inputs[0][:_SAMPLES], 2**self.settings.high)
                self._add(name, bits, 1.0)

        return hook

    def _add(self, name: str, *values: float) -> None:
        sums = self.state["sums"].setdefault(name, [0.0] * len(values))
        self.state["sums"][name] = [a + b for a, b in zip(sums, values, strict=True)]

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in the gradients of a step, before the optimizer does."""
        self._look = False
        if self.done:
            return
        for name, layer in self.layers.items():
            gradient, state = layer.weight.grad, optimizer.state.get(layer.weight, {})
            momentum = next((state[key] for key in _MOMENTA if key in state), None)
            if gradient is None or momentum is None:
                continue
            # The cosine with the sum of earlier gradients, times its length in units of one: with
            # momentum m the sum is 1 / (1 - m) of the mean.
            share = 1.0
            if "momentum_buffer" in state:
                share = 1.0 - float(optimizer.param_groups[0]["momentum"])
            signal = share * float((gradient * momentum).sum())
            self._add(f"{name} gradient", signal, float(gradient.square().sum()))

    # -- widths -------------------------------------------------------------------------------

    def update(self, time: float) -> list[StepSize]:
        """Change widths where a window ends; returns learned scales that begin anew."""
        settings = self.settings
        part = time / max(1.0 - settings.hold, 1e-9)
        window = min(int(part * settings.windows + 1e-9), settings.windows)
        if window <= self.state["window"]:
            return []
        self.state["window"] = window
        changed = list(self._change())
        self.state["sums"] = {}
        return changed

    def finish(self) -> list[StepSize]:
        """No width changes any more."""
        self.state["window"] = self.settings.windows
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return []

    def _change(self) -> Iterator[StepSize]:
        settings, state = self.settings, self.state
        span = settings.high - settings.low
        for name, layer in self.layers.items():
            signal, power = state["sums"].get(f"{name} gradient", (0.0, 0.0))
            if power <= 0.0:
                continue
            # Of a signal that is lost in its noise no more is known than that it is small.
            signal = min(max(signal, 1e-4 * power), 0.999 * power)
            ratio = math.log10(signal / (power - signal))
            state["log"]["snr"][name] = round(10.0 * ratio, 3)
            fallen = state["first"].setdefault(name, ratio) - ratio
            wanted = settings.low + span * fallen / settings.decades
            bits = self._towards(layer.bits, wanted)
            if bits != layer.bits:
                state["weights"][name] = self.entries[name]["bits"] = bits
                yield from change_weight(layer, bits)
        for name, quantizer in self.quantizers.items():
            total, looks = state["sums"].get(name, (0.0, 0.0))
            if looks <= 0.0:
                continue
            state["log"]["entropy"][name] = round(total / looks, 3)
            bits = self._towards(quantizer.bits, total / looks)
            if bits != quantizer.bits:
                state["inputs"][name] = bits
                yield from change_input(quantizer, bits)

    def _towards(self, bits: int, wanted: float) -> int:
        wanted = min(max(wanted, self.settings.low), self.settings.high)
        if abs(wanted - bits) < self.settings.margin:
            return bits
        return bits + (1 if wanted > bits else -1)

    def notes(self) -> dict[str, Any]:
        """Widths, ratios in dB and entropies now, for the history."""
        inputs = {name: entry["input"] for name, entry in self.entries.items()}
        log = self.state["log"]
        return {
            "widths": dict(self.state["weights"]),
            "input_widths": {name: self.state["inputs"][at] for name, at in inputs.items()},
            "snr_db": dict(log["snr"]),
            "entropy": {n: log["entropy"][at] for n, at in inputs.items() if at in log["entropy"]},
        }

    def plan(self) -> Plan:
        """What the widths are in the end; layers in float are not named."""
        return Plan(
            {
                name: LayerPlan(
                    name, layer_kind(layer), layer.weight.numel(), layer.bits,
                    self.entries[name]["sparsity"], self.entries[name]["pattern"],
                    self.quantizers[self.entries[name]["input"]].bits,
                )
                for name, layer in self.layers.items()
            },
            method="dynamic",
        )  # fmt: skip
