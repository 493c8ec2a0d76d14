r"""The multiple-choice knapsack: one option per layer, least total error, within every limit.

.. math::
    \min_x \sum_l \sum_m e_{lm} x_{lm} + \sum_{(i,j)} \sum_{m,n} p_{ijmn} x_{im} x_{jn}
    \quad\text{s.t.}\quad \sum_m x_{lm} = 1,\ \sum_{lm} c^r_{lm} x_{lm} \le C^r,\ x \in \{0, 1\}

Products are linearised exactly (Adams and Sherali 1986): options of a layer that share all their
pair terms form a group, ``y`` is the product of two groups' indicators, and its row and column
sums are those indicators. What several layers share (the bits of a value that all of them read) is
an equation for each kind of option: as much of it in the one layer as in the other. Solved by HiGHS
through ``scipy.optimize.milp``, which is deterministic: no time limit is set, and options that
another one dominates are removed first, ties included.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

__all__ = ["Limit", "Link", "Pair", "monotone", "solve"]

# HiGHS works to absolute tolerances of 1e-6 around objectives of about 1; options that are this
# many times worse than the scale are as good as forbidden, and their digits would only cost its
# precision.
_CLIP = 1e5
GAP = 1e-5  # relative distance from the proven optimum at which the search ends
CORE = 3  # options per layer that are searched first


@dataclass(frozen=True)
class Limit:
    """``sum_l costs[l, option_l] <= limit``; costs are float64 ``[layers, options]``."""

    costs: np.ndarray
    limit: float


@dataclass(frozen=True)
class Pair:
    """Extra error ``values[m, n]`` where layer ``first`` takes option m and ``second`` n."""

    first: int
    second: int
    values: np.ndarray


@dataclass(frozen=True)
class Link:
    """Layers whose options must be of one kind; ``kinds`` are int ``[options]``."""

    layers: tuple[int, ...]
    kinds: np.ndarray


def monotone(errors: np.ndarray) -> np.ndarray:
    """A table ``[..., widths, sparsities]`` that never falls with sparsity nor rises with bits.

    Measurements scatter, and a solver would take every lucky one. The mean of the smallest
    monotone table above and the largest one below; a table that is monotone stays as it is.
    """
    above = np.maximum.accumulate(errors, axis=-1)
    above = np.flip(np.maximum.accumulate(np.flip(above, -2), axis=-2), -2)
    below = np.flip(np.minimum.accumulate(np.flip(errors, -1), axis=-1), -1)
    below = np.minimum.accumulate(below, axis=-2)
    return np.asarray((above + below) / 2)


def solve(
    errors: np.ndarray,
    limits: Sequence[Limit],
    *,
    allowed: np.ndarray | None = None,
    pairs: Sequence[Pair] = (),
    links: Sequence[Link] = (),
) -> np.ndarray | None:
    """The best option of every layer, int64 ``[layers]``; ``None`` if nothing fits.

    Args:
        errors: float64 ``[layers, options]``, finite.
        limits: what the choice must keep.
        allowed: bool ``[layers, options]``; default: all.
        pairs: terms between two layers.
        links: layers that share something.
    """
    layers = len(errors)
    allowed = np.ones(errors.shape, dtype=bool) if allowed is None else allowed
    for limit in limits:
        least = np.where(allowed, limit.costs, np.inf).min(axis=1).sum()
        if not least <= limit.limit + 1e-9 * abs(limit.limit):
            return None
    coupled = {layer for pair in pairs for layer in (pair.first, pair.second)}
    linked = {layer: link.kinds for link in links for layer in link.layers}

    def useful(row: int) -> np.ndarray:
        if row in coupled:  # what its partners lose or gain is not in the row
            return np.flatnonzero(allowed[row])
        costs = [limit.costs[row] for limit in limits]
        if row not in linked:
            return _undominated(errors[row], costs, allowed[row])
        kinds = linked[row]  # an option may be there for the sake of its kind
        parts = [
            _undominated(errors[row], costs, allowed[row] & (kinds == k)) for k in np.unique(kinds)
        ]
        return np.sort(np.concatenate(parts))

    kept = [useful(row) for row in range(layers)]
    rows = np.concatenate([np.full(len(k), row) for row, k in enumerate(kept)])
    problem = _Program(errors, limits, pairs, links, rows, np.concatenate(kept))
    relaxed = problem.relax()
    if relaxed is None:
        return None
    bound, reduced = relaxed
    # A core of options that cost the relaxation least to use gives a good choice; what an option's
    # reduced cost puts beyond that choice can then be no part of a better one (Pisinger 1995).
    core = _core(reduced, problem.sorts)
    found = problem.search(core)
    reach = np.inf if found is None else found[1] - bound + 1e-9
    wider = core | (reduced <= reach)
    if (wider != core).any():
        found = problem.search(wider)
    if found is None:
        return None
    choice = np.full(layers, -1, dtype=np.int64)
    choice[rows[found[0]]] = problem.columns[found[0]]
    return choice


class _Program:
    """The linear program over the options that are left; objectives are scaled to about 1."""

    def __init__(
        self,
        errors: np.ndarray,
        limits: Sequence[Limit],
        pairs: Sequence[Pair],
        links: Sequence[Link],
        rows: np.ndarray,
        columns: np.ndarray,
    ) -> None:
        # Imported where a problem is solved: the package and its other methods need no scipy.
        from scipy.sparse import coo_array, csr_array, vstack

        self.rows, self.columns, self.count = rows, columns, len(rows)
        # Layers, and of linked ones layers and kinds, as numbers.
        self.sorts = rows * (1 + len({int(kind) for link in links for kind in link.kinds}))
        extra: list[float] = []
        sums: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for pair in pairs:
            _linearise(pair, rows, columns, self.count, extra, sums)
        for link in links:
            self._tie(link, sums)
        self.width = width = self.count + len(extra)
        self.objective = np.concatenate([errors[rows, columns], extra])
        ones = coo_array(
            (np.ones(self.count), (rows, np.arange(self.count))), shape=(len(errors), width)
        )
        parts = [ones] + [coo_array((v, (r, c)), shape=(r.max() + 1, width)) for r, c, v in sums]
        self.equal = csr_array(vstack(parts))
        self.right = np.zeros(self.equal.shape[0])
        self.right[: len(errors)] = 1.0
        lines, ends = [], []
        for limit in limits:
            if np.isfinite(limit.limit):
                scale = max(abs(limit.limit), 1e-300)
                lines.append(np.zeros(width))
                lines[-1][: self.count] = limit.costs[rows, columns] / scale
                ends.append(limit.limit / scale)
        self.below = csr_array(np.array(lines)) if lines else None
        self.ends = np.array(ends) if lines else None

    def _tie(self, link: Link, sums: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Append, for each kind, that it is taken by a layer as it is by the first one."""
        names = np.unique(link.kinds)
        number = np.searchsorted(names, link.kinds)[self.columns]  # of every variable's kind
        for layer in link.layers:
            mine = self.rows == layer
            self.sorts[mine] += number[mine]
        first = np.flatnonzero(self.rows == link.layers[0])
        for layer in link.layers[1:]:
            other = np.flatnonzero(self.rows == layer)
            values = np.concatenate([np.ones(len(first)), -np.ones(len(other))])
            both = np.concatenate([first, other])
            sums.append((number[both], both, values))

    def relax(self) -> tuple[float, np.ndarray] | None:
        """Optimum with fractions allowed, and the reduced cost of every option.

        ``None`` if even that fits nothing. A table spans many orders of magnitude, so the scale
        of the objective is approached in steps.
        """
        from scipy.optimize import linprog

        rough = float(np.abs(self.objective).max()) or 1.0
        self.scale = rough
        while True:
            self.scaled = np.clip(self.objective / self.scale, -_CLIP, _CLIP)
            result = linprog(
                self.scaled, self.below, self.ends, self.equal, self.right, method="highs-ds"
            )
            if result.x is None:
                return None
            value = abs(float(self.objective @ result.x))
            if 0.1 < value / self.scale < 10 or self.scale <= 1e-12 * rough:
                return float(result.fun), result.lower.marginals[: self.count]
            self.scale = max(value, 1e-12 * rough)

    def search(self, core: np.ndarray) -> tuple[np.ndarray, float] | None:
        """Options taken and the objective, with those of ``core`` alone; ``None``: none fits."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        chosen = np.flatnonzero(np.concatenate([core, np.ones(self.width - self.count, bool)]))
        equal = self.equal[:, chosen]
        constraints = [LinearConstraint(equal, self.right, self.right)]
        if self.below is not None:
            constraints.append(LinearConstraint(self.below[:, chosen], -np.inf, self.ends))
        with _quiet():
            result = milp(
                self.scaled[chosen],
                integrality=chosen < self.count,
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": GAP},
            )
        if result.x is None:
            return None
        return chosen[(result.x > 0.5) & (chosen < self.count)], float(result.fun)


_quiet_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that C code prints reaches standard output.

    Some releases of HiGHS (the one in scipy 1.17 is one) print a line for debugging whenever they
    repair a rounded solution, whatever the options say; it would end up in ``--json``.
    """
    with _quiet_lock:
        flush = ctypes.CDLL(None).fflush
        try:
            saved = os.dup(1)
        except OSError:  # the process has no standard output
            yield
            return
        try:
            flush(None)
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), 1)
            yield
        finally:
            flush(None)
            os.dup2(saved, 1)
            os.close(saved)


def _core(reduced: np.ndarray, sorts: np.ndarray) -> np.ndarray:
    """The options of least reduced cost of every layer, or sort."""
    core = np.zeros(len(sorts), dtype=bool)
    for sort in np.unique(sorts):
        mine = np.flatnonzero(sorts == sort)
        core[mine[np.argsort(reduced[mine], kind="stable")[:CORE]]] = True
    return core


def _undominated(errors: np.ndarray, costs: list[np.ndarray], allowed: np.ndarray) -> np.ndarray:
    """Options that no other one equals or beats in everything; of equal ones the first."""
    points = np.stack([errors, *costs], axis=1)
    options = np.flatnonzero(allowed)
    # In this order whatever beats an option comes before it, or is itself beaten by what does.
    order = options[np.lexsort((options, *points[options].T[::-1]))]
    kept: list[int] = []
    front = np.empty((len(options), points.shape[1]))
    for option in order.tolist():
        if not (front[: len(kept)] <= points[option]).all(axis=1).any():
            front[len(kept)] = points[option]
            kept.append(option)
    return np.sort(np.array(kept, dtype=np.int64))


def _linearise(
    pair: Pair,
    rows: np.ndarray,
    columns: np.ndarray,
    count: int,
    extra: list[float],
    links: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Append the products of one pair to the variables, and the sums that define them."""
    mine = [np.flatnonzero(rows == layer) for layer in (pair.first, pair.second)]
    values = pair.values[np.ix_(columns[mine[0]], columns[mine[1]])]
    table, first = np.unique(values, axis=0, return_inverse=True)
    table, second = np.unique(table, axis=1, return_inverse=True)
    base = count + len(extra)
    extra.extend(table.ravel().tolist())
    numbers = base + np.arange(table.size).reshape(table.shape)
    for axis, (variables, groups) in enumerate(zip(mine, (first, second), strict=True)):
        lines = numbers if axis == 0 else numbers.T
        sums = np.repeat(np.arange(len(lines)), lines.size // len(lines))
        r = np.concatenate([sums, np.ravel(groups)])
        c = np.concatenate([lines.ravel(), variables])
        v = np.concatenate([np.ones(lines.size), -np.ones(len(variables))])
        links.append((r, c, v))
