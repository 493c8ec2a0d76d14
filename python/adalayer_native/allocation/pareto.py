"""The frontier of size against predicted error: what a budget would buy, before choosing one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._progress import ProgressBar
from ..errors import PlanError
from ..importance.batches import captured_on
from ..importance.outputs import LossFn, Pick
from ..plan import Plan
from . import refusals
from .budget import Budget
from .layer_table import LayerTable
from .measured_tables import Data, measure_tables, weights_of
from .optimal import plan_of
from .optimal_settings import Settings
from .problem import Fixed, Problem
from .selection import selection_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Frontier", "Point", "pareto"]


@dataclass(frozen=True)
class Point:
    """One plan of the frontier.

    Attributes:
        bytes: of the saved file (an upper bound, as ``estimate_bytes`` gives).
        size: ``bytes`` over the float file.
        error: predicted loss increase.
        plan: the plan.
    """

    bytes: int
    size: float
    error: float
    plan: Plan


@dataclass(frozen=True)
class Frontier:
    """Plans of growing size and falling predicted error; no point is beaten by another.

    Attributes:
        points: from the smallest file to the largest.
        errors: the error table behind them.
    """

    points: tuple[Point, ...]
    errors: LayerTable

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __getitem__(self, position: int) -> Point:
        return self.points[position]

    def as_dicts(self) -> list[dict[str, Any]]:
        """JSON values, one per point."""
        return [
            {
                "bytes": point.bytes,
                "size": point.size,
                "average_bits": point.plan.average_bits,
                "predicted_loss": point.error,
                "layers": {
                    name: [layer.bits, layer.sparsity] for name, layer in point.plan.layers.items()
                },
            }
            for point in self.points
        ]

    def table(self) -> Table:
        """One row per point."""
        from rich.table import Table

        table = Table(title="Size against predicted loss increase")
        for heading in ("Bytes", "Of float file", "Bits per weight", "Predicted loss"):
            table.add_column(heading, justify="right")
        for point in self.points:
            table.add_row(
                f"{point.bytes:,}",
                f"{100 * point.size:.2f} %",
                f"{point.plan.average_bits:.2f}",
                f"{point.error:.3g}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()


def pareto(
    model: nn.Module | torch.export.ExportedProgram,
    calibration: Iterable[Any],
    *,
    points: int = 24,
    within: Budget | None = None,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    activation_bits: int = 8,
    batches: int | None = None,
    fixed: Mapping[str, Fixed] | None = None,
    exclude: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    tables: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Frontier:
    """The best plan by method ``"optimal"`` for each of many file sizes; nothing is trained.

    The tables are measured once (and kept, see :class:`~adalayer_native.allocation.Settings`);
    every point is one solve. Plans are the solver's, they are not checked one by one as
    ``allocate`` checks its plan.

    Args:
        model: float model, captured or not; not changed.
        calibration: batches as for ``analyze``.
        points: sizes to solve for, evenly spread in the logarithm from the smallest reachable file
            to the one of 8 bits everywhere. Equal and beaten plans are left out.
        within: further limits that all points keep (latency, bits, bops, energy).
        loss_fn, output, activation_bits, batches, fixed, exclude: as in ``allocate``.
        options: further fields of ``Settings``.
        tables: directory of the tables; default: the user's cache directory.
        progress: show progress.

    Raises:
        BudgetError: ``within`` cannot be kept, or limits the file or the loss.
        PlanError, CalibrationError, UnsupportedModelError: as ``allocate``.
    """
    if points < 2:
        raise PlanError(f"points must be at least 2, got {points}")
    if within is not None and (within.size is not None or within.bytes is not None):
        raise refusals.limited_frontier("file")
    if within is not None and within.loss is not None:
        raise refusals.limited_frontier("loss")
    settings = Settings.of(options, tables)
    settings.check()
    model = captured_on(model, calibration)
    problem = Problem(model, None, activation_bits, fixed=fixed, exclude=exclude)
    budget = Budget(**{**(within.given if within else {}), "size": 1e9})  # type: ignore[arg-type]
    data = Data.split(model, calibration, loss_fn, batches, output)
    weight_of = weights_of(problem, data, settings, progress=progress)
    measured = measure_tables(problem, budget, data, settings, weight_of, progress=progress)
    selection = selection_of(problem, budget, measured, settings)
    file = selection.resources[0]
    smallest = selection.least(file, keep=True)
    largest = selection.choose()
    if smallest is None or largest is None:
        raise selection.impossible()
    top = max(smallest, selection.excess(file, largest) + file.limit)
    found: list[Point] = []
    with ProgressBar("solving", points, unit="size", enabled=progress) as bar:
        for limit in np.geomspace(smallest, top, points):
            file.limit = float(np.floor(limit + 1e-6))
            columns = selection.choose()
            bar.advance()
            if columns is None:
                continue
            size = int(selection.excess(file, columns) + file.limit)
            plan = plan_of(selection, columns)
            error = selection.predicted(columns)
            if not found or error < found[-1].error:
                while found and found[-1].bytes >= size:
                    found.pop()
                found.append(Point(size, size / problem.float_bytes, error, plan))
    return Frontier(tuple(found), measured.errors)
