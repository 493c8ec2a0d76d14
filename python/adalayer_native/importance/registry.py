"""The registry of criteria. A criterion is one file that registers one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..plan import unknown_name
from .batches import Batch
from .outputs import LossFn, Pick

__all__ = ["CRITERIA", "Criterion", "Measure", "Probe", "criterion", "criterion_of"]


@dataclass
class Probe:
    """What a criterion is given for each batch.

    Attributes:
        model: the captured float model, in eval mode, on its own device.
        layers: supported layers by name.
        quantized: per layer the dequantized weight at ``probe_bits``.
        loss_fn: the user's loss, or ``None``.
        done: results of this batch that a cache already holds, ``{layer: value}``; a criterion
            need not compute them again.
        report: to be called as ``report(layer, value)`` with every result of this batch; values
            are means over the batch.
        output: what the float model returns for this batch, without gradient.
        loss: mean loss of ``output``.
        pick: which output counts, see :mod:`~adalayer_native.importance.outputs`.
    """

    model: nn.Module
    layers: dict[str, Any]
    quantized: dict[str, Any]
    loss_fn: LossFn | None
    done: dict[str, float]
    report: Callable[[str, float], None]
    output: Any
    loss: float
    pick: Pick = None


# A criterion measures all layers on one batch.
Measure = Callable[[Probe, Batch], None]


@dataclass(frozen=True)
class Criterion:
    """One registered criterion.

    Attributes:
        name: as ``analyze(criteria=[...])`` takes it.
        measure: the function.
        unit: of its values, for tables.
        once: whether it does not look at the data, so that one batch is enough.
        increase: whether a value is what the layer loses at ``probe_bits`` (else it is a property
            of the layer). It decides how the value becomes an error at other bits, see
            :meth:`error`.
        falling: whether small values, between 0 and 1, mean an important layer.
    """

    name: str
    measure: Measure
    unit: str = ""
    once: bool = False
    increase: bool = True
    falling: bool = False

    def importance(self, value: float) -> float:
        """The value turned so that more is more important, at least 0."""
        return max(0.0, 1.0 - value if self.falling else value)

    def contribution(self, values: Mapping[str, float]) -> dict[str, float]:
        """A of eq. (1): every layer's importance over the largest; 0 everywhere if that is 0."""
        turned = {name: self.importance(value) for name, value in values.items()}
        most = max(turned.values(), default=0.0)
        return {name: value / most if most > 0 else 0.0 for name, value in turned.items()}

    def error(self, value: float, squared: float, probe: float, energy: float) -> float:
        """What a layer is taken to lose for a squared weight error, in the criterion's unit.

        A loss grows with the squared error to first order, so what was lost at ``probe_bits`` is
        scaled by it; a property of the layer weighs the relative squared error.

        Args:
            value: what was measured.
            squared: ``|W - Q(W)|^2`` of the wanted bits and sparsity.
            probe: the same at ``probe_bits``.
            energy: ``|W|^2``.
        """
        base = probe if self.increase else energy
        return self.importance(value) * squared / base if base > 0 else 0.0


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str,
    *,
    unit: str = "",
    once: bool = False,
    increase: bool = True,
    falling: bool = False,
) -> Callable[[Measure], Measure]:
    """Register a function as the criterion ``name``; see :class:`Criterion` for the rest."""

    def register(function: Measure) -> Measure:
        CRITERIA[name] = Criterion(name, function, unit, once, increase, falling)
        return function

    return register


def criterion_of(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        PlanError: there is none; the message names all and the closest.
    """
    if name not in CRITERIA:
        raise unknown_name("criterion", name, sorted(CRITERIA))
    return CRITERIA[name]
