"""The tables of method "optimal": errors, latencies, and terms between layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationError
from ..importance import CRITERIA
from ..importance.analyze import analyze, dequantized_layer, eval_mode
from ..importance.batches import Batch, iterate, model_digest, one_sample
from ..importance.flops import Work, layer_work
from ..importance.outputs import LossFn, Pick, loss_key
from ..importance.task_loss import TaskLoss
from ..pruning.patterns import pattern_pruned_count
from .budget import Budget
from .evaluate import Evaluator
from .knapsack import Pair
from .latencies import latency_table, machine_latencies
from .layer_table import LayerTable, Measured
from .narrow_inputs import NarrowInputs
from .optimal_settings import MEASURES, Settings
from .options import UNSTRUCTURED, Option
from .problem import Problem
from .repaired import REPAIR_VERSION, RepairedWeights
from .resources import resources
from .selection import Selection, Tables, selection_of
from .sensitivity import LayerError, LogitSensitivity, WeightOf
from .store import Store, cache_dir

__all__ = [
    "Data",
    "emptied",
    "inputs_key",
    "inputs_of",
    "layer_error",
    "loader_of",
    "measure_tables",
    "repair_key",
    "table_key",
    "weights_of",
]

TABLE_IMAGES = 128  # images that the error table is measured on, at most
PAIR_LAYERS = 4  # layers among which interactions are measured
PAIR_LEVELS = 6  # sizes of error between which an interaction distinguishes
PAIR_LEAST = 0.1  # correlations below it are left out


@dataclass
class Data:
    """Calibration data in parts that have no sample in common.

    On what it was repaired with, a layer of more inputs than samples loses nothing, whatever is
    pruned; and on what the tables were measured with, the plan that they led to looks best.

    Attributes:
        table: what errors are measured on.
        check: what plans are compared on.
        loss_fn: of both.
        repair: what weights are repaired with.
        pick: which output counts.
    """

    table: list[Batch]
    check: list[Batch]
    loss_fn: LossFn | None
    repair: list[Batch] = field(default_factory=list)
    pick: Pick = None

    @property
    def task_loss(self) -> TaskLoss | None:
        """The loss, where it is one that has a second derivative of its own."""
        return self.loss_fn if isinstance(self.loss_fn, TaskLoss) else None

    @classmethod
    def split(
        cls,
        model: torch.nn.Module,
        calibration: Iterable[Any],
        loss_fn: LossFn | None,
        batches: int | None,
        output: Pick = None,
    ) -> Data:
        """Half of the images repair; of the others half are for the table, the rest check.

        ``TABLE_IMAGES`` at most are for the table. Two images are too few for three parts: the
        table then is of the one that repairs.
        """
        every = list(Evaluator.bounded(iterate(calibration, model, batches)))
        total = sum(batch.count for batch in every)
        if total < 2:
            raise CalibrationError(
                f"method 'optimal' needs at least 2 calibration images, got {total}: some measure "
                f"errors, others check the plan"
            )
        repair, rest = _divided(every, total // 2)
        table, check = _divided(rest, min(TABLE_IMAGES, (total - total // 2) // 2))
        return cls(table or repair, check, loss_fn, repair, output)


def _divided(batches: Iterable[Batch], images: int) -> tuple[list[Batch], list[Batch]]:
    """The first so many images, and the others."""
    first, second = [], []
    for batch in batches:
        count = min(images, batch.count)
        images -= count
        if count:
            first.append(batch.part(slice(0, count)))
        if count < batch.count:
            second.append(batch.part(slice(count, None)))
    return first, second


def loader_of(batches: Iterable[Batch]) -> list[Any]:
    """Batches as a loader would yield them."""
    return [(b.x, b.target) if b.target is not None else b.x for b in batches]


def measure_tables(
    problem: Problem,
    budget: Budget,
    data: Data,
    settings: Settings,
    weight_of: WeightOf | None = None,
    inputs: NarrowInputs | None = None,
    *,
    progress: bool = True,
) -> Tables:
    """All tables that the budget asks for; what is in the cache is not measured again.

    ``weight_of`` and ``inputs`` are :func:`weights_of` and :func:`inputs_of` of the same arguments,
    if they are at hand.
    """
    if inputs is None:
        inputs = inputs_of(problem, data)
    if weight_of is None:
        weight_of = weights_of(problem, data, settings, progress=progress)
    layers = problem.layers
    with eval_mode(problem.model):
        work = layer_work(problem.model, layers, one_sample(problem.model, data.table[0].x))
    latency, kernels = None, None
    widths = settings.input_widths_for(budget, problem.activation_bits)
    if budget.timed:
        x, patterns = data.table[0].x[:1], settings.patterns_for(budget)
        if settings.latency_table is not None:
            latency, kernels = machine_latencies(
                problem, x, settings, patterns=patterns, input_widths=widths
            )
        else:
            latency = latency_table(
                problem, x, settings, patterns=patterns, input_widths=widths, progress=progress
            )
    errors = _error_table(problem, budget, data, settings, weight_of, work, progress)
    if widths:
        store = Store(cache_dir(settings.directory), "inputs", inputs_key(problem, data))
        errors.others += _with_inputs(problem, errors, inputs.errors(widths, store))
    tables = Tables(errors, latency, work, [], kernels)
    tables.pairs = _interactions(problem, budget, data, settings, weight_of, inputs, tables)
    return tables


def inputs_of(problem: Problem, data: Data) -> NarrowInputs:
    """What layer inputs of fewer bits than the usual ones lose."""
    return NarrowInputs(
        problem,
        data.table,
        loader_of(data.repair),
        logits=data.loss_fn is None,
        output=data.pick,
        loss=data.task_loss,
    )


def _with_inputs(
    problem: Problem, errors: LayerTable, found: Mapping[int, Mapping[str, float]]
) -> tuple[LayerTable, ...]:
    """The parts of an error table with inputs of fewer bits.

    To second order the errors of weight and input add up. What a value loses is the error of the
    first layer that reads it; the others, which share its bits, have none by it.
    """
    parts = []
    for bits, losses in found.items():
        added = np.full(len(problem.free), np.nan)
        for site, rows in problem.shared_inputs.items():
            added[rows] = 0.0
            added[rows[0]] = losses[site]
        parts += [
            replace(
                part,
                values=part.values + added[:, None, None],
                others=(),
                activation_bits=bits,
            )
            for part in errors.parts
        ]
    return tuple(parts)


def inputs_key(problem: Problem, data: Data) -> dict[str, Any]:
    """What layer inputs of fewer bits, and what they lose, depend on."""
    digests = []
    for batches in (data.table, data.repair):
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(batch.digest().encode())
        digests.append(digest.hexdigest())
    return {
        "model": model_digest(problem.model),
        "data": digests,
        "logits": data.loss_fn is None,
        **({} if data.task_loss is None else {"loss": str(data.task_loss)}),
        "output": data.pick,
        "layers": list(problem.stored.layers),
        "activation_bits": problem.activation_bits,
    }


def table_key(problem: Problem, data: Data, settings: Settings) -> dict[str, Any]:
    """What measurements of single layers depend on."""
    digest = hashlib.sha256()
    for batch in data.table:
        digest.update(batch.digest().encode())
    by = settings.measure_for(data.loss_fn)
    return {
        "model": model_digest(problem.model),
        "data": digest.hexdigest(),
        "loss": loss_key(data.loss_fn),
        "repair": repair_key(data, settings),
        "measure": by if isinstance(by, str) else "own",
        **({} if data.pick is None else {"output": data.pick}),
    }


def repair_key(data: Data, settings: Settings) -> str:
    """What the weights depend on besides the model."""
    if settings.weight_of != "repaired":
        return settings.repair
    digest = hashlib.sha256()
    for batch in data.repair:
        digest.update(batch.digest().encode())
    return f"{settings.repair} repaired-{REPAIR_VERSION} {digest.hexdigest()}"


def weights_of(
    problem: Problem, data: Data, settings: Settings, *, progress: bool = True
) -> WeightOf | None:
    """What the settings' ``weight_of`` stands for; ``None`` is rounding to nearest."""
    if callable(settings.weight_of):
        return settings.weight_of
    if settings.weight_of == "rounded":
        return None
    names = list(problem.stored.layers)  # pinned ones too: plans are measured with them
    return RepairedWeights(problem.model, loader_of(data.repair), names, progress=progress)


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
    weight_of: WeightOf | None,
    work: dict[str, Work],
    progress: bool,
) -> LayerTable:
    by = settings.measure_for(data.loss_fn)
    own = callable(by) or callable(settings.weight_of)
    store: Store = _Unkept()
    if not own or settings.repair:
        store = Store(cache_dir(settings.directory), "errors", table_key(problem, data, settings))
    patterns = settings.patterns_for(budget)
    wanted = {p: _worthwhile(problem, budget, settings, p, work) for p in patterns}
    options = {p: _options(settings, p) for p in patterns}
    measure: LayerError | None = None

    def missing(name: str, pattern: str) -> list[Option]:
        asked = np.flatnonzero(wanted[pattern][problem.free.index(name)])
        found = [options[pattern][k] for k in asked]
        return [option for option in found if f"{name} {option.name}" not in store]

    def error(name: str, option: Option) -> float:
        nonlocal measure
        if measure is None:  # only now: a table that is in the cache needs no pass at all
            measure = layer_error(problem, data, settings, weight_of)
        if isinstance(weight_of, RepairedWeights) and by in MEASURES:
            # All that the table lacks of a layer goes through few sweeps, and other patterns are
            # measured now: the statistics of all layers may not fit into memory together.
            rest = {pattern: missing(name, pattern) for pattern in patterns}
            weight_of.expect(name, list(dict.fromkeys(o for part in rest.values() for o in part)))
            for other in (o for part in rest.values() for o in part if o.pattern != option.pattern):
                value = float(measure(name, *other.arguments()))
                if np.isfinite(value):  # where it is not, its own turn says so
                    store[f"{name} {other.name}"] = value
        return measure(name, *option.arguments())

    table = Measured("error", "nats", problem.free, error, store).tables(
        settings.widths, settings.sparsities_of, patterns, wanted=wanted, progress=progress
    )
    images = sum(batch.count for batch in data.table)
    table.about = {"measure": str(by), "images": images, "repair": settings.repair}
    table.about["weights"] = "own" if callable(settings.weight_of) else settings.weight_of
    # A measured loss may be a little lower than the float model's; no layer is paid for that.
    return table.mapped(lambda values: np.where(np.isnan(values), np.nan, np.maximum(values, 0.0)))


def _options(settings: Settings, pattern: str) -> list[Option]:
    """What a pattern's part of a table is about, in its order."""
    return [
        Option(bits, sparsity, pattern if sparsity > 0 else UNSTRUCTURED)
        for bits in settings.widths
        for sparsity in settings.sparsities_of(pattern)
    ]


def layer_error(
    problem: Problem, data: Data, settings: Settings, weight_of: WeightOf | None
) -> LayerError:
    """``(layer, bits, sparsity) -> predicted loss increase`` by the settings' measure."""
    by = settings.measure_for(data.loss_fn)
    if callable(by):
        return by
    evaluator = _evaluator(problem, data, weight_of)
    if by == "loss":
        base = evaluator.measure({}).loss
        return lambda name, *option: evaluator.measure({name: Option(*option)}).loss - base
    if by in CRITERIA:
        # Criteria are scaled by the error of the weight, and a repaired weight is far from the
        # float one for the sake of the output.
        if not callable(settings.weight_of):
            evaluator = _evaluator(problem, data, None)
        return _criterion_error(problem, data, by, evaluator)
    layers = {name: problem.layers[name] for name in problem.free}
    sensitivity = LogitSensitivity(
        problem.model, data.table, layers, images=TABLE_IMAGES, logits=data.loss_fn is None,
        output=data.pick, loss=data.task_loss,
    )  # fmt: skip
    return lambda name, *option: sensitivity.error(
        name, *evaluator.replacement(name, Option(*option))
    )


def _evaluator(
    problem: Problem, data: Data, weight_of: WeightOf | None, inputs: NarrowInputs | None = None
) -> Evaluator:
    return Evaluator(
        problem.model, loader_of(data.table), data.loss_fn, weight_of=weight_of, output=data.pick,
        inputs=inputs,
    )  # fmt: skip


def _criterion_error(problem: Problem, data: Data, name: str, evaluator: Evaluator) -> LayerError:
    """A criterion's value per layer, scaled by the squared weight error of every option."""
    scores = analyze(
        problem.model, loader_of(data.table), data.loss_fn, output=data.pick, criterion=name,
        progress=False,
    )  # fmt: skip
    kind = CRITERIA[name]

    def error(layer: str, *option: Any) -> float:
        weight = problem.layers[layer].weight.detach().double()
        rounded = evaluator.replacement(layer, Option(*option))[0].double()
        probe = dequantized_layer(problem.layers[layer], scores.probe_bits).double()
        return kind.error(
            scores[layer].raw,
            float((rounded - weight).square().sum()),
            float((probe - weight).square().sum()),
            float(weight.square().sum()),
        )

    return error


def _worthwhile(
    problem: Problem, budget: Budget, settings: Settings, pattern: str, work: dict[str, Work]
) -> np.ndarray:
    """Options that cost less of something than the same width with fewer zeros.

    The others can only lose: a bitmask costs a bit per weight. What the clock says counts only
    for options that save bytes; kernels do not skip single zeros, and blocks that are left out
    are left out of the file as well.
    """
    options = _options(settings, pattern)
    sparsities = settings.sparsities_of(pattern)
    parts = {k: v for k, v in budget.given.items() if k not in ("latency", "loss")}
    parts = parts or {"size": 1.0}
    found = resources(problem, Budget(**parts), options, work)  # type: ignore[arg-type]
    limited = [r for r in found if np.isfinite(r.limit)] or found
    shape = (len(problem.free), len(settings.widths), len(sparsities))
    order = np.argsort(sparsities)
    wanted = np.zeros(shape, dtype=bool)
    for resource in limited:
        costs = resource.costs.reshape(shape)[..., order]
        least = np.minimum.accumulate(costs, axis=-1)
        wanted[..., order[1:]] |= costs[..., 1:] < least[..., :-1]
    wanted[..., order[0]] = True
    return wanted & ~emptied(problem, options).reshape(shape)


def emptied(problem: Problem, options: Sequence[Option]) -> np.ndarray:
    """Options that leave nothing of a layer, bool ``[layers, options]``: its only block, say."""
    return np.array(
        [
            [
                pattern_pruned_count(problem.form(name), sparsity, pattern)
                >= problem.layers[name].weight.numel()
                for _, sparsity, pattern, _ in options
            ]
            for name in problem.free
        ]
    )


def _interactions(
    problem: Problem,
    budget: Budget,
    data: Data,
    settings: Settings,
    weight_of: WeightOf | None,
    inputs: NarrowInputs,
    tables: Tables,
) -> list[Pair]:
    """Terms between the layers that lose most in the additive optimum.

    To second order two errors add ``2 rho sqrt(e_i e_j)``, with ``rho`` between -1 and 1. It is
    measured for each pair at the options of that optimum, and kept where it is not small. Errors
    that seem to cancel are not counted: a solver would go where they are largest, and by then
    they no longer cancel.
    """
    # A loss that is limited is the sum that a linear program can limit.
    if not settings.interactions or len(problem.free) < 2 or budget.loss is not None:
        return []
    selection = selection_of(problem, budget, tables, settings)
    columns = selection.choose()
    if columns is None:  # by the tables as they are; what follows knows more
        return []
    chosen = selection.errors[np.arange(len(columns)), columns]
    worst = np.sort(np.argsort(-chosen, kind="stable")[:PAIR_LAYERS]).tolist()
    evaluator = _evaluator(problem, data, weight_of, inputs)
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
