"""A budgeted choice from tables: the knapsack with real limits, and errors that explain them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, PlanError
from ..importance.flops import Work
from ..plan import MAX_BITS
from . import refusals
from .budget import Budget
from .knapsack import Limit, Link, Pair, monotone, solve
from .layer_table import LayerTable
from .optimal_settings import Settings
from .options import UNSTRUCTURED, Choice, Option
from .problem import Problem
from .resources import LATENCY, LOSS, Resource, resources
from .uniform import uniform_sparsities

__all__ = ["Selection", "Tables", "selection_of"]

_TRIES = 20
# What an input of fewer bits must save to be offered: clocks scatter by as much.
_CLEARLY = 0.97


class Selection:
    """Chooses one option per layer by predicted error, within every limit.

    Args:
        problem: layers.
        budget: for messages.
        resources: what is limited.
        options: the columns of all tables.
        errors: float64 ``[layers, options]``; NaN where an option is not offered.
        pairs: terms between layers.
    """

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        resources: Sequence[Resource],
        options: Sequence[Option],
        errors: np.ndarray,
        pairs: Sequence[Pair] = (),
    ) -> None:
        self.problem, self.budget = problem, budget
        self.resources, self.options = list(resources), list(options)
        self.offered = np.isfinite(errors)
        self.errors = np.where(self.offered, errors, 0.0)
        self.pairs = list(pairs)
        widths = np.array([option.activation_bits or 0 for option in self.options])
        shared = problem.shared_inputs.values() if widths.any() else ()
        self.links = [Link(tuple(rows), widths) for rows in shared if len(rows) > 1]

    def choice(self, columns: np.ndarray) -> Choice:
        """The option of every layer."""
        names = self.problem.free
        return {n: self.options[c] for n, c in zip(names, columns.tolist(), strict=True)}

    def predicted(self, columns: np.ndarray, errors: np.ndarray | None = None) -> float:
        """Sum of the layers' errors and of the terms between them."""
        table = self.errors if errors is None else errors
        total = float(table[np.arange(len(columns)), columns].sum())
        for pair in self.pairs:
            total += float(pair.values[columns[pair.first], columns[pair.second]])
        return total

    def resource(self, name: str) -> Resource | None:
        """What is counted by some name, if it is."""
        return next((r for r in self.resources if r.name == name), None)

    def alike(self, option: Option) -> np.ndarray:
        """The choice of one option for all layers."""
        return np.full(len(self.errors), self.options.index(option))

    def excess(self, resource: Resource, columns: np.ndarray) -> float:
        """How far a choice is beyond a limit; at most 0 if it keeps it."""
        if resource.exact is None:
            total = resource.total(columns)
        else:
            total = resource.exact(self.choice(columns))
        return total - resource.limit

    def fits(self, columns: np.ndarray) -> bool:
        """Whether a choice keeps all limits."""
        return all(
            self.excess(r, columns) <= 1e-9 * max(1.0, abs(r.limit))
            for r in self.resources
            if np.isfinite(r.limit)
        )

    def choose(
        self,
        *,
        errors: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        without: Resource | None = None,
        pairs: Sequence[Pair] | None = None,
    ) -> np.ndarray | None:
        """Columns of the best choice that keeps all limits, or ``None`` if there is none.

        Args:
            errors: instead of the table's.
            allowed: bool ``[layers, options]``: options to choose from.
            without: a resource whose limit does not count.
            pairs: instead of the selection's.
        """
        table = self.errors if errors is None else errors
        usable = self.offered if allowed is None else self.offered & allowed
        if not usable.any(axis=1).all():
            return None
        active = [r for r in self.resources if r is not without and np.isfinite(r.limit)]
        ends = {id(r): r.limit - r.constant + r.slack for r in active}
        for _ in range(_TRIES):
            found = solve(
                table,
                [Limit(r.costs, ends[id(r)]) for r in active],
                allowed=usable,
                pairs=self.pairs if pairs is None else pairs,
                links=self.links,
            )
            if found is None:
                return None
            over = {id(r): self.excess(r, found) for r in active}
            beyond = [r for r in active if over[id(r)] > 1e-9 * max(1.0, abs(r.limit))]
            if not beyond:
                return found
            # The file's header has some digits more or fewer than the sum of the layers says, and
            # the solver its tolerance: less is left for the layers, and again.
            for resource in beyond:
                spent = resource.total(found) - resource.constant
                ends[id(resource)] = min(
                    ends[id(resource)] - 1e-9 * abs(resource.limit), spent - over[id(resource)]
                )
        return None

    def least(self, resource: Resource, keep: bool) -> float | None:
        """Smallest reachable total of a resource; with ``keep`` the others' limits count."""
        found: np.ndarray | None
        if not keep:
            found = solve(resource.costs, [], allowed=self.offered, links=self.links)
        else:
            found = self.choose(errors=resource.costs, without=resource, pairs=())
        if found is None:
            return None
        return self.excess(resource, found) + resource.limit

    def impossible(self) -> BudgetError:
        """The error for limits that nothing keeps: names those that bind and what they can be."""
        limited = [r for r in self.resources if np.isfinite(r.limit)]
        alone = [(r, self.least(r, False)) for r in limited]
        beyond = [
            f"{r.name} is {r.show(least)}"
            for r, least in alone
            if least is not None and least > r.limit * (1 + 1e-9)
        ]
        if beyond:
            return refusals.limits_apart(self.budget, beyond, self.problem.in_float)
        together = [(r, self.least(r, True)) for r in limited]
        possible = [
            f"{r.name} of at least {r.show(least)}" for r, least in together if least is not None
        ]
        return refusals.limits_together(self.budget, possible)


@dataclass
class Tables:
    """What is known about a model before a budget is.

    Attributes:
        errors: predicted loss increase per layer and option.
        latency: microseconds per call, where asked for.
        work: per image, of every layer.
        pairs: terms between layers.
        kernels: what ran every layer of a choice on the machine of the latencies; ``None`` where
            that is this one, whose engines say it.
    """

    errors: LayerTable
    latency: LayerTable | None
    work: dict[str, Work]
    pairs: list[Pair]
    kernels: Callable[[Choice], dict[str, str]] | None = None


def selection_of(problem: Problem, budget: Budget, tables: Tables, settings: Settings) -> Selection:
    """Tables and limits put together."""
    table, latency = tables.errors, tables.latency
    if settings.step is not None:
        # Plans that treat all layers alike are among those that are tried, and they shall use the
        # budget as well as any other.
        extra = [s for s in uniform_sparsities(problem, budget) if s <= max(table.sparsities)]
        table = table.finer(settings.step, logarithmic=True, extra=extra)
        if latency is not None:
            latency = latency.finer(settings.step, logarithmic=False, extra=extra)
    errors = table.mapped(_monotone).flat()
    options = table.options()
    found = resources(problem, budget, options, tables.work, latency)
    errors = np.where(_saving(problem, found, options), errors, np.nan)
    if budget.loss is not None:
        found.append(_loss(errors, options, budget.loss))
    return Selection(problem, budget, found, options, errors, tables.pairs)


def _loss(errors: np.ndarray, options: Sequence[Option], more: float) -> Resource:
    """The predicted loss as something that is limited: that of 8 bits everywhere, and some more."""
    if Option(MAX_BITS) not in options:
        raise PlanError(f"a budget of loss needs {MAX_BITS} bits among the widths")
    usual = float(errors[:, list(options).index(Option(MAX_BITS))].sum())
    return Resource(
        LOSS, np.where(np.isfinite(errors), errors, 0.0), 0.0, usual + more,
        lambda value: f"{value:.4g} nats per image ({usual:.4g} with {MAX_BITS} bits everywhere)",
    )  # fmt: skip


def _monotone(values: np.ndarray) -> np.ndarray:
    missing = np.isnan(values)
    filled = monotone(np.where(missing, _nearest(values), values))
    return np.where(missing, np.nan, filled)


def _saving(problem: Problem, found: Sequence[Resource], options: Sequence[Option]) -> np.ndarray:
    """Options that cost less of something than simpler ones, ``[layers, options]``.

    A few zeros do not pay for the bitmask; in an interpolated table they may look as good as none.
    Nor does an input of fewer bits pay where it brings no faster form to any layer that reads it.
    """
    limited = [r for r in found if np.isfinite(r.limit) or r.name == LATENCY] or list(found)
    saving = np.ones(limited[0].costs.shape, dtype=bool)
    columns = {option: column for column, option in enumerate(options)}

    def less(column: int, other: int | None, factor: float = 1.0) -> np.ndarray:
        if other is None:
            return np.ones(len(saving), dtype=bool)
        cheaper = [r.costs[:, column] < factor * r.costs[:, other] for r in limited]
        return np.asarray(np.any(cheaper, axis=0))

    for option, column in columns.items():
        if option.sparsity > 0:
            unpruned = option._replace(sparsity=0.0, pattern=UNSTRUCTURED)
            saving[:, column] &= less(column, columns.get(unpruned))
        if option.activation_bits is not None:
            faster = less(column, columns.get(option.weight), _CLEARLY)
            for rows in problem.shared_inputs.values():
                saving[rows, column] &= faster[rows].any()
    return saving


def _nearest(values: np.ndarray) -> np.ndarray:
    """Missing entries taken from the next lower sparsity; the unpruned ones are all there."""
    filled = values.copy()
    for column in range(1, values.shape[-1]):
        gap = np.isnan(filled[..., column])
        filled[..., column][gap] = filled[..., column - 1][gap]
    return filled
