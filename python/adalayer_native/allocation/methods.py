"""Names of the methods; nothing else, so that asking for them loads nothing."""

from __future__ import annotations

__all__ = ["BUDGETED", "METHODS", "STAGE_METHODS"]

STAGE_METHODS = ("fixed", "ascending", "descending")
BUDGETED = ("adalayer", "uniform", "optimal", "rl")  # those that do nothing without a budget
METHODS = (*BUDGETED, *STAGE_METHODS)
