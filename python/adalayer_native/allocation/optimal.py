"""Method "optimal": tables of measured errors and latencies, an exact solver, and a check.

Three steps. The tables say what every width and sparsity of every layer costs in loss and, if the
budget limits it, in time. The multiple-choice knapsack over them gives a plan
(:mod:`~adalayer_native.allocation.knapsack`). Calibration data that the tables have not seen
check it, and plans around it (:mod:`~adalayer_native.allocation.local_search`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ..engine.compiler import compile as compile_engine
from ..engine.latency import LayerTimes
from ..errors import CalibrationError, PlanError
from ..importance.analyze import eval_mode
from ..importance.batches import Batch, LossFn, iterate
from ..importance.flops import count_flops
from ..plan import Plan
from ..quantization import calibrate, convert, prepare
from .budget import Budget
from .closed_form import MAX_BITS, MAX_SPARSITY
from .evaluate import Evaluator, Measurement
from .knapsack import Pair, monotone
from .local_search import local_search
from .problem import Problem
from .resources import resources
from .selection import Selection
from .sensitivity import LayerError, LogitSensitivity, WeightOf
from .store import Store, cache_dir, machine, model_digest
from .tables import BITS, SPARSITIES, LayerTable, fill

__all__ = [
    "MEASURES",
    "Settings",
    "Tables",
    "latency_table",
    "measure_tables",
    "optimal",
    "settings_of",
]

MEASURES = ("logits", "loss")
TABLE_IMAGES = 128  # images that the error table is measured on, at most; the others check
PAIR_LAYERS = 4  # layers among which interactions are measured
PAIR_LEVELS = 6  # sizes of error between which an interaction distinguishes
PAIR_LEAST = 0.1  # correlations below it are left out


@dataclass
class Settings:
    """Options of method ``"optimal"``.

    Attributes:
        widths, sparsities: the options of every layer.
        step: sparsities between the measured ones are offered in such steps, their errors
            interpolated in the logarithm; ``None`` offers the measured ones alone.
        measure: what the error table holds. ``"logits"``: loss increase to second order
            (:class:`~adalayer_native.allocation.sensitivity.LogitSensitivity`); ``"loss"``: the
            loss of the network with that layer alone compressed, several times slower. Or a
            function ``(layer, bits, sparsity) -> float``.
        weight_of: ``(layer, bits, sparsity) -> weight``: the dequantized weight after whatever
            repairs the rounding, in the layer's own shape; or a pair of it and what is added to
            the bias. Default: magnitude pruning and rounding to nearest. Errors, and the plans
            that are tried, are of these weights.
        repair: names ``measure`` and ``weight_of`` where they are functions, so that tables of
            different ones are kept apart; a table is not kept without it.
        interactions: whether to measure terms between the layers that lose most.
        rounds, trials: of the local search; 0 rounds take the solver's plan as it is.
        latency_batch: images per call for which latencies are measured.
        threads: threads per call; default: those of ``ops.get_num_threads()``.
        directory: where tables are kept; default: the user's cache directory.
    """

    widths: Sequence[int] = BITS
    sparsities: Sequence[float] = SPARSITIES
    step: float | None = 0.05
    measure: str | LayerError = "logits"
    weight_of: WeightOf | None = None
    repair: str = ""
    interactions: bool = True
    rounds: int = 4
    trials: int = 10
    latency_batch: int = 1
    threads: int | None = None
    directory: str | os.PathLike[str] | None = None

    def check(self) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` where a value is out of range."""
        if isinstance(self.measure, str) and self.measure not in MEASURES:
            raise PlanError(f"unknown measure {self.measure!r}: expected one of {MEASURES}")
        if not self.widths or not set(self.widths) <= set(BITS):
            raise PlanError(f"widths must be some of {BITS}, got {tuple(self.widths)}")
        if len(set(self.widths)) != len(self.widths):
            raise PlanError(f"widths must differ, got {tuple(self.widths)}")
        good = all(0 <= s <= MAX_SPARSITY for s in self.sparsities)
        if (
            not good
            or 0 not in self.sparsities
            or len(set(self.sparsities)) != len(self.sparsities)
        ):
            raise PlanError(
                f"sparsities must be different numbers from 0 to {MAX_SPARSITY} with 0 among "
                f"them, got {tuple(self.sparsities)}"
            )
        if self.step is not None and not 0.01 <= self.step <= 1:
            raise PlanError(f"step must be from 0.01 to 1 or None, got {self.step!r}")
        if self.rounds < 0 or self.trials < 1 or self.latency_batch < 1:
            raise PlanError("rounds must not be negative; trials and latency_batch at least 1")


def settings_of(
    options: Mapping[str, Any] | None, tables: str | os.PathLike[str] | None
) -> Settings:
    """Settings from a mapping.

    Raises:
        PlanError: an unknown option.
    """
    known = {entry.name for entry in fields(Settings)} - {"directory"}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise PlanError(f"unknown options {unknown}: expected some of {sorted(known)}")
    return Settings(**{**(options or {}), "directory": tables})


@dataclass
class Tables:
    """What is known about a model before a budget is.

    Attributes:
        errors: predicted loss increase per layer and option.
        latency: microseconds per call, where asked for.
        macs: multiply-accumulates per image of every layer.
        pairs: terms between layers.
    """

    errors: LayerTable
    latency: LayerTable | None
    macs: dict[str, float]
    pairs: list[Pair]


@dataclass
class Data:
    """Calibration data in two parts: for the tables, and for the check."""

    table: list[Batch]
    check: list[Batch]
    loss_fn: LossFn | None

    @classmethod
    def split(
        cls,
        model: torch.nn.Module,
        calibration: Iterable[Any],
        loss_fn: LossFn | None,
        batches: int | None,
    ) -> Data:
        """At most ``TABLE_IMAGES`` images, and at most half of them, for the tables."""
        every = list(Evaluator.bounded(iterate(calibration, model, batches)))
        total = sum(batch.count for batch in every)
        if total < 2:
            raise CalibrationError(
                f"method 'optimal' needs at least 2 calibration images, got {total}: some measure "
                f"errors, others check the plan"
            )
        room = min(TABLE_IMAGES, total // 2)
        table, check = [], []
        for batch in every:
            first = min(room, batch.count)
            room -= first
            if first:
                table.append(_part(batch, slice(0, first)))
            if first < batch.count:
                check.append(_part(batch, slice(first, None)))
        return cls(table, check, loss_fn)


def _part(batch: Batch, part: slice) -> Batch:
    target = batch.target
    return Batch(
        batch.x[part], target[part] if isinstance(target, torch.Tensor) else target, batch.index
    )


def _pairs_of(batches: Iterable[Batch]) -> list[Any]:
    return [(b.x, b.target) if b.target is not None else b.x for b in batches]


def optimal(
    problem: Problem,
    budget: Budget,
    calibration: Iterable[Any],
    settings: Settings,
    *,
    loss_fn: LossFn | None = None,
    batches: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan; see :func:`~adalayer_native.allocation.allocate`.

    Raises:
        BudgetError: limits that cannot be kept; names those that bind and what is reachable.
        CalibrationError: unusable data, or an error that is not finite.
        PlanError: settings out of range.
    """
    settings.check()
    _reachable(problem, budget, settings)
    data = Data.split(problem.model, calibration, loss_fn, batches)
    tables = measure_tables(problem, budget, data, settings, progress=progress)
    selection = selection_of(problem, budget, tables, settings)
    columns = selection.choose()
    if columns is None:
        raise selection.impossible()
    measurement = None
    if settings.rounds > 0:
        evaluator = Evaluator(
            problem.model,
            _pairs_of(data.check),
            loss_fn,
            cache=cache,
            weight_of=settings.weight_of,
            key=settings.repair,
        )
        columns, measurement = local_search(
            selection,
            evaluator,
            rounds=settings.rounds,
            trials=settings.trials,
            progress=progress,
        )
    return plan_of(selection, columns, measurement)


def plan_of(
    selection: Selection, columns: np.ndarray, measurement: Measurement | None = None
) -> Plan:
    """A plan that says what its layers are predicted to lose (``E``) and what it costs."""
    problem = selection.problem
    chosen = selection.errors[np.arange(len(columns)), columns]
    scores = {n: {"E": float(e)} for n, e in zip(problem.free, chosen, strict=True)}
    plan = problem.plan(selection.choice(columns), "optimal", {}, scores)
    plan.measured = {} if measurement is None else measurement.as_dict()
    plan.measured["predicted_loss"] = selection.predicted(columns)
    for resource in selection.resources:
        if resource.exact is None:
            plan.measured[f"predicted {resource.name}"] = resource.total(columns)
    return plan


def selection_of(problem: Problem, budget: Budget, tables: Tables, settings: Settings) -> Selection:
    """Tables and limits put together."""
    table, latency = tables.errors, tables.latency
    if settings.step is not None:
        table = table.finer(settings.step, logarithmic=True)
        latency = None if latency is None else latency.finer(settings.step, logarithmic=False)
    missing = np.isnan(table.values)
    filled = monotone(np.where(missing, _nearest(table.values), table.values))
    errors = np.where(missing, np.nan, filled).reshape(len(problem.free), -1)
    options = table.options()
    found = resources(problem, budget, options, tables.macs, latency)
    return Selection(problem, budget, found, options, errors, tables.pairs)


def _nearest(values: np.ndarray) -> np.ndarray:
    """Missing entries taken from the next lower sparsity; the unpruned ones are all there."""
    filled = values.copy()
    for column in range(1, values.shape[-1]):
        gap = np.isnan(filled[..., column])
        filled[..., column][gap] = filled[..., column - 1][gap]
    return filled


def _reachable(problem: Problem, budget: Budget, settings: Settings) -> None:
    """Raise early, before anything is measured, where the file or the widths cannot be met."""
    early = {k: v for k, v in budget.given.items() if k in ("size", "bytes", "bits")}
    if not early:
        return
    options = [(b, s) for b in settings.widths for s in settings.sparsities]
    part = Budget(**early)  # type: ignore[arg-type]
    found = resources(problem, part, options, {})
    errors = np.zeros((len(problem.free), len(options)))
    selection = Selection(problem, part, found, options, errors)
    if selection.choose() is None:
        raise selection.impossible()


# -- measuring --------------------------------------------------------------------------------


def measure_tables(
    problem: Problem,
    budget: Budget,
    data: Data,
    settings: Settings,
    *,
    progress: bool = True,
) -> Tables:
    """All tables that the budget asks for; what is in the cache is not measured again."""
    layers = problem.layers
    with eval_mode(problem.model):
        flops = count_flops(problem.model, layers, data.table[0].x[:1])
    macs = {name: value / 2 for name, value in flops.items()}
    latency = None
    if budget.latency is not None:
        latency = latency_table(problem, data.table[0].x[:1], settings, progress=progress)
    errors = _error_table(problem, budget, data, settings, macs, progress)
    pairs = _interactions(problem, budget, data, settings, macs, latency, errors)
    return Tables(errors, latency, macs, pairs)


def _key(problem: Problem, data: Data, settings: Settings) -> dict[str, Any]:
    digest = hashlib.sha256()
    for batch in data.table:
        digest.update(batch.digest().encode())
    loss = getattr(data.loss_fn, "__qualname__", str(data.loss_fn))
    return {
        "model": model_digest(problem.model),
        "data": digest.hexdigest(),
        "loss": f"{getattr(data.loss_fn, '__module__', '')}.{loss}",
        "repair": settings.repair,
        "measure": settings.measure if isinstance(settings.measure, str) else "own",
    }


class _Unkept(Store):
    """A store without a file."""

    def __init__(self) -> None:
        self.values, self.changed, self.saved = {}, False, np.inf

    def save(self) -> None:
        """Nothing is kept."""


def _error_table(
    problem: Problem,
    budget: Budget,
    data: Data,
    settings: Settings,
    macs: dict[str, float],
    progress: bool,
) -> LayerTable:
    own = callable(settings.measure) or settings.weight_of is not None
    store: Store = _Unkept()
    if not own or settings.repair:
        store = Store(cache_dir(settings.directory), "errors", _key(problem, data, settings))
    wanted = _worthwhile(problem, budget, settings, macs)
    measure: LayerError | None = None

    def error(name: str, bits: int, sparsity: float) -> float:
        nonlocal measure
        if measure is None:  # only now: a table that is in the cache needs no pass at all
            measure = layer_error(problem, data, settings)
        return measure(name, bits, sparsity)

    table = fill(
        "error",
        "nats",
        problem.free,
        error,
        store,
        bits=settings.widths,
        sparsities=settings.sparsities,
        wanted=wanted,
        progress=progress,
    )
    images = sum(batch.count for batch in data.table)
    table.about = {"measure": str(settings.measure), "images": images, "repair": settings.repair}
    # A measured loss may be a little lower than the float model's; no layer is paid for that.
    table.values = np.where(np.isnan(table.values), np.nan, np.maximum(table.values, 0.0))
    return table


def layer_error(problem: Problem, data: Data, settings: Settings) -> LayerError:
    """``(layer, bits, sparsity) -> predicted loss increase`` by the settings' measure."""
    if callable(settings.measure):
        return settings.measure
    evaluator = Evaluator(
        problem.model, _pairs_of(data.table), data.loss_fn, weight_of=settings.weight_of
    )
    if settings.measure == "loss":
        base = evaluator.measure({}).loss
        return lambda name, bits, sparsity: evaluator.measure({name: (bits, sparsity)}).loss - base
    layers = {name: problem.layers[name] for name in problem.free}
    sensitivity = LogitSensitivity(
        problem.model, data.table, layers, images=TABLE_IMAGES, logits=data.loss_fn is None
    )
    return lambda name, bits, sparsity: sensitivity.error(
        name, *evaluator.replacement(name, bits, sparsity)
    )


def _worthwhile(
    problem: Problem, budget: Budget, settings: Settings, macs: dict[str, float]
) -> np.ndarray:
    """Options that cost less of something than the same width with fewer zeros.

    The others can only lose: a bitmask costs a bit per weight. What the clock says counts only
    for options that save bytes; kernels do not skip single zeros.
    """
    options = [(b, s) for b in settings.widths for s in settings.sparsities]
    parts = {k: v for k, v in budget.given.items() if k != "latency"} or {"size": 1.0}
    found = resources(problem, Budget(**parts), options, macs)  # type: ignore[arg-type]
    limited = [r for r in found if np.isfinite(r.limit)] or found
    shape = (len(problem.free), len(settings.widths), len(settings.sparsities))
    order = np.argsort(settings.sparsities)
    wanted = np.zeros(shape, dtype=bool)
    for resource in limited:
        costs = resource.costs.reshape(shape)[..., order]
        least = np.minimum.accumulate(costs, axis=-1)
        wanted[..., order[1:]] |= costs[..., 1:] < least[..., :-1]
    wanted[..., order[0]] = True
    return wanted


def latency_table(
    problem: Problem, x: torch.Tensor, settings: Settings, *, progress: bool = True
) -> LayerTable:
    """Microseconds of every layer at every width and sparsity, in the engine on this machine.

    Args:
        problem: layers.
        x: an input of one image, ``[1, ...]``.
        settings: batch, threads, widths, sparsities, cache directory.
        progress: show a progress bar.
    """
    key = {
        "model": model_digest(problem.model),
        "input": list(x.shape[1:]),
        "batch": settings.latency_batch,
        "pinned": sorted([n, b, s] for n, (b, s) in problem.pinned.items() if b is not None),
        "float": sorted(set(problem.layers) - set(problem.free) - set(problem.pinned)),
        "activation_bits": problem.activation_bits,
        **machine(settings.threads),
    }
    store = Store(cache_dir(settings.directory), "latency", key)
    times: LayerTimes | None = None

    def column(bits: int, sparsity: float) -> None:
        """All layers at once; what is no layer of ours goes by the name ''."""
        nonlocal times
        if times is None:
            times = _layer_times(problem, x, settings)
        layers, other = times.column(bits, sparsity)
        for name in problem.free:
            store[f"{name} {bits} {sparsity:g}"] = layers.get(name, 0.0)
        store[f" {bits} {sparsity:g}"] = other

    def measure(name: str, bits: int, sparsity: float) -> float:
        column(bits, sparsity)
        return store[f"{name} {bits} {sparsity:g}"]

    table = fill(
        "latency",
        "µs",
        problem.free,
        measure,
        store,
        bits=settings.widths,
        sparsities=settings.sparsities,
        progress=progress,
    )
    others = [store[f" {b} {s:g}"] for b, s in table.options()]
    table.constant = float(np.median(others))
    table.about = {"batch": settings.latency_batch, **machine(settings.threads)}
    return table


def _layer_times(problem: Problem, x: torch.Tensor, settings: Settings) -> LayerTimes:
    plan = problem.plan(dict.fromkeys(problem.free, (MAX_BITS, 0.0)))
    prepared = prepare(problem.model, plan)
    calibrate(prepared, [x], observer="minmax", progress=False)
    batch = x.expand(settings.latency_batch, *x.shape[1:]).contiguous()
    engine = compile_engine(convert(prepared), batch, policy="native")
    return LayerTimes(engine, problem.free, batch=settings.latency_batch, threads=settings.threads)


def _interactions(
    problem: Problem,
    budget: Budget,
    data: Data,
    settings: Settings,
    macs: dict[str, float],
    latency: LayerTable | None,
    errors: LayerTable,
) -> list[Pair]:
    """Terms between the layers that lose most in the additive optimum.

    To second order two errors add ``2 rho sqrt(e_i e_j)``, with ``rho`` between -1 and 1. It is
    measured for each pair at the options of that optimum, and kept where it is not small. Errors
    that seem to cancel are not counted: a solver would go where they are largest, and by then
    they no longer cancel.
    """
    if not settings.interactions or len(problem.free) < 2:
        return []
    selection = selection_of(problem, budget, Tables(errors, latency, macs, []), settings)
    columns = selection.choose()
    if columns is None:
        raise selection.impossible()
    chosen = selection.errors[np.arange(len(columns)), columns]
    worst = np.sort(np.argsort(-chosen, kind="stable")[:PAIR_LAYERS]).tolist()
    evaluator = Evaluator(
        problem.model, _pairs_of(data.table), data.loss_fn, weight_of=settings.weight_of
    )
    choice = selection.choice(columns)

    def loss(*rows: int) -> float:
        names = [problem.free[row] for row in rows]
        return evaluator.measure({name: choice[name] for name in names}).loss

    base = evaluator.measure({}).loss
    single = {row: loss(row) - base for row in worst}
    found = []
    for position, first in enumerate(worst):
        for second in worst[position + 1 :]:
            size = 2 * np.sqrt(max(single[first], 0) * max(single[second], 0))
            if size <= 0:
                continue
            joint = loss(first, second) - base - single[first] - single[second]
            rho = min(joint / size, 1.0)
            if rho >= PAIR_LEAST:
                roots = [_levels(selection, row) for row in (first, second)]
                found.append(Pair(first, second, 2 * rho * np.outer(*roots)))
    return found


def _levels(selection: Selection, row: int) -> np.ndarray:
    """Root of every option's error, rounded to a few levels, so that pairs stay small."""
    errors, offered = selection.errors[row], selection.offered[row]
    roots = np.sqrt(errors)
    order = np.flatnonzero(offered)[np.argsort(roots[offered], kind="stable")]
    result = np.zeros(len(errors))
    for group in np.array_split(order, min(PAIR_LEVELS, len(order))):
        result[group] = roots[group].mean()
    return result
