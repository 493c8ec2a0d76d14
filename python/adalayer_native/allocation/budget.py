"""What compression may cost: bytes, bits per weight, time, bit operations, energy, loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from . import refusals

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """One or several upper limits; a plan has to keep all of them.

    Attributes:
        size: saved file over the float32 ``state_dict`` saved as safetensors, above 0.
        bytes: bytes of the saved file, at least 1; not together with ``size``.
        bits: average bits per weight, a pruned weight counting 0 (eq. (6)); above 0.
        latency: milliseconds of one call of the engine on this machine, or on the one of a latency
            table (:class:`~adalayer_native.allocation.Settings`); above 0.
        bops: bit operations per image, ``MACs * weight bits * activation bits * (1 - sparsity)``
            summed over the layers; above 0.
        energy: microjoules per image by the model of
            :func:`~adalayer_native.energy.layer_energy`; above 0.
        loss: nats per image that the plan may be predicted to lose above 8 bits everywhere. Then
            the plan is not the one that loses least but the one whose engine is the fastest
            there. 0.001 nats are 0.1 % of the probability that is given to the right
            answer, or of the perplexity. Above 0.

    Only method ``"optimal"`` takes several at once, or the last four.

    Raises:
        BudgetError: none is given, ``size`` and ``bytes`` together, or a value is out of range.
    """

    size: float | None = None
    bytes: int | None = None
    bits: float | None = None
    latency: float | None = None
    bops: float | None = None
    energy: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = self.given
        if not given:
            raise refusals.empty([entry.name for entry in fields(self)])
        if "size" in given and "bytes" in given:
            raise refusals.file_limited_twice()
        for name, value in given.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                raise refusals.out_of_range(name, value)

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def single(self) -> bool:
        """Whether there is one limit only, of size, bytes or bits."""
        given = list(self.given)
        return len(given) == 1 and given[0] in ("size", "bytes", "bits")

    @property
    def timed(self) -> bool:
        """Whether it matters how fast a plan runs."""
        return self.latency is not None or self.loss is not None

    def limit_bytes(self, float_bytes: int) -> int | None:
        """Largest allowed file in bytes; ``None`` where the budget is in bits per weight."""
        if self.size is not None:
            return math.floor(self.size * float_bytes)
        if self.bytes is not None:
            return math.floor(self.bytes)
        return None

    def describe(self, name: str) -> str:
        """One limit in words."""
        value = self.given[name]
        return {
            "size": f"size {value:g} of the float file",
            "bytes": f"{value:,.0f} bytes" if name == "bytes" else "",
            "bits": f"{value:g} bits per weight",
            "latency": f"latency {value:g} ms",
            "bops": f"{value:,.0f} bit operations per image",
            "energy": f"energy {value:g} µJ per image",
            "loss": f"{value:g} nats per image more than with 8 bits everywhere",
        }[name]

    def __str__(self) -> str:
        return " and ".join(self.describe(name) for name in self.given)
