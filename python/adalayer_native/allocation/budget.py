"""What compression may cost: a share of the float file, bytes, or bits per weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BudgetError

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Exactly one of three limits.

    Attributes:
        size: saved file over the float32 ``state_dict`` saved as safetensors, above 0.
        bytes: bytes of the saved file, at least 1.
        bits: average bits per weight, a pruned weight counting 0 (eq. (6)); above 0.

    Raises:
        BudgetError: none or several are given, or a value is out of range.
    """

    size: float | None = None
    bytes: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        given = {
            name: value
            for name, value in (("size", self.size), ("bytes", self.bytes), ("bits", self.bits))
            if value is not None
        }
        if len(given) != 1:
            raise BudgetError(
                f"a budget needs exactly one of size, bytes and bits; got "
                f"{', '.join(given) if given else 'none'}"
            )
        ((name, value),) = given.items()
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= 0
        ):
            raise BudgetError(f"budget {name} must be a finite number above 0, got {value!r}")

    def limit_bytes(self, float_bytes: int) -> int | None:
        """Largest allowed file in bytes; ``None`` where the budget is in bits per weight."""
        if self.size is not None:
            return math.floor(self.size * float_bytes)
        if self.bytes is not None:
            return math.floor(self.bytes)
        return None

    def __str__(self) -> str:
        if self.size is not None:
            return f"size {self.size:g} of the float file"
        if self.bytes is not None:
            return f"{self.bytes:,} bytes"
        return f"{self.bits:g} bits per weight"
