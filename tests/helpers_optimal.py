"""Method "optimal" on a small network with few options."""

from __future__ import annotations

from pathlib import Path

from helpers_models import batches

from adalayer_native.allocation import allocate
from adalayer_native.plan import Plan

FEW = {"widths": (2, 4, 8), "sparsities": (0.0, 0.6), "step": None, "repaired_plans": 0}


def optimal(model, budget, *, data=None, **options) -> Plan:
    rest = {key: options.pop(key) for key in ("fixed", "exclude", "tables") if key in options}
    return allocate(
        None,
        budget,
        method="optimal",
        model=model,
        calibration=batches(2, 24) if data is None else data,
        options={**FEW, **options},
        progress=False,
        **rest,
    )


def files(tmp_path: Path) -> list[Path]:
    """The tables in the cache of the fixture ``own_cache``."""
    return sorted((tmp_path / "cache" / "adalayer_native").glob("*.json"))
