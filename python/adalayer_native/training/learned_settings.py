"""Options of widths that are learned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from adalayer_native.allocation.budget import Budget
from adalayer_native.allocation.optimal_settings import Settings
from adalayer_native.errors import PlanError
from adalayer_native.plan import MIN_BITS

__all__ = ["LearnedSettings"]


@dataclass(frozen=True)
class LearnedSettings:
    """How ``finetune(allocate="learned")`` learns bits and zeros.

    Attributes:
        search: share of the run after which every layer has whole bits and a fixed share of zeros.
        fall: share of that in which the limits fall from what the model has to the budget.
        fixed: names of layers that keep the bits and zeros of the plan that they were prepared by.
        input_widths: bits that inputs of layers may have besides the usual ones. Default: where the
            budget counts bit operations or energy all fewer ones, with a latency 7 and 6, else
            none.
        latency_table: a file of ``adalayer profile``, where the budget's latency is another
            machine's.
        tables: directory of the latencies that are measured here; default: the user's cache.
    """

    search: float = 0.5
    fall: float = 0.6
    fixed: Sequence[str] = ()
    input_widths: Sequence[int] | None = None
    latency_table: str | os.PathLike[str] | None = None
    tables: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> LearnedSettings:
        """Settings from a mapping, checked.

        Raises:
            PlanError: an unknown option, or a value out of range.
        """
        given = dict(options or {})
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise PlanError(
                f"finetune: unknown allocate_options {unknown}: expected some of {sorted(known)}"
            )
        found = cls(**given)
        if not 0.0 < found.search <= 1.0:
            raise PlanError(f"finetune: search must be above 0 and at most 1, got {found.search!r}")
        if not 0.0 <= found.fall < 1.0:
            raise PlanError(f"finetune: fall must be from 0 to below 1, got {found.fall!r}")
        if isinstance(found.fixed, str):
            raise PlanError(f"finetune: fixed must be names of layers, got {found.fixed!r}")
        return found

    def key(self) -> dict[str, Any]:
        """What a checkpoint must agree on, JSON values."""
        values = asdict(self)
        table = values.pop("latency_table")
        values.pop("tables")
        return {**values, "latency_table": None if table is None else os.fspath(table)}

    def of_tables(self, budget: Budget, usual: int) -> tuple[Settings, tuple[int, ...]]:
        """What latencies are measured by, and bits of inputs below the usual ones, most first.

        Raises:
            PlanError: input widths that are not below. FileFormatError: an unusable table.
        """
        options: dict[str, Any] = {"patterns": ("unstructured",)}
        if self.input_widths is not None:
            options["input_widths"] = self.input_widths
        if self.latency_table is not None:
            options["latency_table"] = self.latency_table
        settings = Settings.of(options, self.tables)
        counted = budget.bops is not None or budget.energy is not None
        if self.input_widths is None and counted and not budget.timed:
            return settings, tuple(range(usual - 1, MIN_BITS - 1, -1))
        return settings, settings.input_widths_for(budget, usual)
