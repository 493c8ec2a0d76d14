"""What widths that are learned can be chosen from, what that costs, and the choice that is kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from adalayer_native.allocation import Budget
from adalayer_native.allocation.latencies import latency_table, machine_latencies
from adalayer_native.allocation.layer_table import BITS
from adalayer_native.allocation.measured_tables import emptied
from adalayer_native.allocation.optimal_settings import Settings
from adalayer_native.allocation.options import UNSTRUCTURED, Choice, Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.resources import resources
from adalayer_native.allocation.selection import Selection
from adalayer_native.capture import Inputs, captured
from adalayer_native.errors import PlanError
from adalayer_native.importance.analyze import eval_mode
from adalayer_native.importance.batches import one_sample
from adalayer_native.importance.flops import layer_work
from adalayer_native.plan import LayerPlan, layer_kind
from adalayer_native.quantization.graph import layers_of, metadata, quantizers_of
from adalayer_native.rounding import conv_form
from adalayer_native.training.frontier import hull, weight_errors
from adalayer_native.training.learned_settings import LearnedSettings
from adalayer_native.training.positions import Costs

__all__ = ["Offer"]

SPARSITIES = tuple(round(0.05 * k, 2) for k in range(19))


class Offer:
    """Options of every layer and input, and what they cost.

    Args:
        prepared: calibrated, from :func:`~adalayer_native.quantization.prepare`.
        model: the float model that it was prepared from.
        budget: limits.
        settings: of the search.
        sample: arguments of the model from a training batch; asked for only where the budget
            counts more than the file.
        progress: of what is measured.

    Attributes:
        problem: the layers, and sizes of files.
        widths: of inputs, most bits first; the first alone where they are not learned.
        limited: what is limited, with ``options`` as columns.
        usable: bool ``[layers, options]``.
        plain: columns with inputs of the usual width.
        same: position in ``plain`` of the option of every column with such an input.
        relative: float64 ``[layers, plain]``: costs over their limits, added up.
        errors: float64 ``[layers, plain]``: squared error of the weight over its square.
        chains: by layer the columns that its position goes along, rich ones first.
        sites: rows of the layers that read a value whose width is learned, by value.
        costs: of positions along chains and widths.

    Raises:
        BudgetError: limits that no options keep; names those that bind.
        PlanError: zeros in blocks, inputs of different widths where these are to be learned, an
            unknown layer, or another model.
    """

    def __init__(
        self,
        prepared: nn.Module,
        model: nn.Module,
        budget: Budget,
        settings: LearnedSettings,
        sample: Callable[[], Inputs],
        *,
        progress: bool = True,
    ) -> None:
        self.budget, self.settings = budget, settings
        self.layers = layers_of(prepared)
        self.entries = metadata(prepared, "layers")
        self.quantizers = quantizers_of(prepared)
        read = {self.quantizers[entry["input"]].bits for entry in self.entries.values()}
        tables, narrower = settings.of_tables(budget, max(read, default=8))
        self.widths = (max(read, default=8), *narrower)
        if narrower and len(read) > 1:
            raise PlanError(
                f"finetune: widths of inputs are learned, but the plan gives them {sorted(read)} "
                "bits; prepare with one width, or give input_widths=()"
            )
        self.problem = self._problem(model)
        self._check_patterns()
        self._count(tables, sample, progress)
        self.usable = ~emptied(self.problem, self.options)
        if self._selection(np.zeros(self.usable.shape)).choose() is None:
            raise self._selection(np.zeros(self.usable.shape)).impossible()
        self._lists()

    def _problem(self, model: nn.Module) -> Problem:
        front, usual = captured(model), self.widths[0]
        known = Problem(front, None, usual).layers
        unknown = sorted(set(self.entries) - set(known))
        if unknown:
            raise PlanError(
                f"finetune: the teacher has no layer {unknown[0]!r}; allocate='learned' needs the "
                "model that was prepared"
            )
        lost = sorted(set(self.settings.fixed) - set(self.entries))
        if lost:
            raise PlanError(f"finetune: fixed names {lost[0]!r}, which is no quantized layer")
        fixed = {
            name: LayerPlan(
                name, layer_kind(known[name]), known[name].weight.numel(), entry["bits"],
                entry["sparsity"], entry["pattern"], self.quantizers[entry["input"]].bits,
                group_size=self.layers[name].group_size,
            )
            for name, entry in self.entries.items()
            if name in self.settings.fixed
        }  # fmt: skip
        apart = [name for name in known if name not in self.entries]
        return Problem(front, None, usual, fixed=fixed, exclude=apart)

    def _check_patterns(self) -> None:
        for name in self.problem.free:
            entry = self.entries[name]
            if entry["sparsity"] and entry["pattern"] != UNSTRUCTURED:
                raise PlanError(
                    f"layer {name!r}: zeros of pattern {entry['pattern']!r} cannot be learned, "
                    "only unstructured ones; keep the layer as it is with fixed"
                )
            size = self.layers[name].group_size
            if size is not None:
                raise PlanError(
                    f"layer {name!r}: bits of weight groups (group_size {size}) cannot be learned, "
                    "only those of output channels; keep the layer as it is with fixed"
                )

    def _count(self, tables: Settings, sample: Callable[[], Inputs], progress: bool) -> None:
        """``options``, and everything that is limited with them as columns."""
        problem, budget, work, latency = self.problem, self.budget, {}, None
        narrower = self.widths[1:]
        self.options = [
            Option(bits, share, UNSTRUCTURED, width)
            for width in (None, *narrower)
            for bits in BITS
            for share in SPARSITIES
        ]
        if budget.timed or budget.bops is not None or budget.energy is not None:
            x = one_sample(problem.model, sample())
            with eval_mode(problem.model):
                work = layer_work(problem.model, problem.layers, x)
            if budget.timed and tables.latency_table is not None:
                latency, _ = machine_latencies(problem, x, tables, input_widths=narrower)
            elif budget.timed:
                latency = latency_table(
                    problem, x, tables, input_widths=narrower, progress=progress
                )
            if latency is not None:
                latency = latency.finer(0.05, logarithmic=False)
                self.options = latency.options()
        found = resources(problem, budget, self.options, work, latency)
        self.limited = [r for r in found if np.isfinite(r.limit)]

    def _selection(self, errors: np.ndarray) -> Selection:
        table = np.where(self.usable, errors, np.nan)
        return Selection(self.problem, self.budget, self.limited, self.options, table)

    def _lists(self) -> None:
        """Chains of every layer, and what positions along them cost."""
        problem, limited = self.problem, self.limited
        columns = {option: column for column, option in enumerate(self.options)}
        self.plain = [k for k, o in enumerate(self.options) if o.activation_bits is None]
        self.same = [self.plain.index(columns[option.weight]) for option in self.options]
        kinds = [self.options[k] for k in self.plain]
        bits = sorted({o.bits for o in kinds if o.bits is not None})
        shares = sorted({o.sparsity for o in kinds})
        self.relative = np.zeros((len(problem.free), len(self.plain)))
        for resource in limited:
            self.relative += resource.costs[:, self.plain] / resource.limit
        self.errors = np.zeros((len(problem.free), len(self.plain)))
        self.chains: list[list[int]] = []
        for row, name in enumerate(problem.free):
            layer = self.layers[name]
            table = weight_errors(conv_form(layer, layer.weight), bits, shares)
            for column, option in enumerate(kinds):
                at = bits.index(option.bits or 0), shares.index(option.sparsity)
                self.errors[row, column] = float(table[at])
            chain = hull(self.relative[row], self.errors[row], self.usable[row, self.plain])
            # A layer of one option only stands still between it and itself.
            self.chains.append([self.plain[k] for k in (chain if len(chain) > 1 else chain * 2)])
        self.sites: dict[str, list[int]] = problem.shared_inputs if len(self.widths) > 1 else {}
        self.costs = self._costs(columns)

    def _costs(self, columns: dict[Option, int]) -> Costs:
        problem = self.problem
        longest = max(map(len, self.chains))
        widths = (None, *self.widths[1:]) if self.sites else (None, None)
        table = np.zeros((len(self.limited), len(problem.free), longest, len(widths)))
        for row, chain in enumerate(self.chains):
            for step in range(longest):
                option = self.options[chain[min(step, len(chain) - 1)]]
                for column, width in enumerate(widths):
                    at = columns[option._replace(activation_bits=width)]
                    table[:, row, step, column] = [r.costs[row, at] for r in self.limited]
        inputs = np.full(len(problem.free), -1)
        for position, rows in enumerate(self.sites.values()):
            inputs[rows] = len(problem.free) + position
        counts = [*map(len, self.chains), *([len(self.widths)] * len(self.sites))]
        return Costs(
            table,
            np.array([r.constant for r in self.limited]),
            np.array([r.limit for r in self.limited]),
            np.array(counts),
            inputs,
        )

    def target(self, site: str) -> str:
        """The quantizer of a value whose width is learned, by name."""
        found: str = self.entries[self.problem.free[self.sites[site][0]]]["input"]
        return found

    def start(self, row: int) -> float:
        """The position whose cost is that of the plan that the model was prepared by."""
        entry = self.entries[self.problem.free[row]]

        def distance(column: int) -> tuple[float, float]:
            option = self.options[column]
            assert option.bits is not None
            return abs(option.bits - entry["bits"]), abs(option.sparsity - entry["sparsity"])

        line = self._line(row)[::-1]
        own = self.relative[row, self.same[min(self.plain, key=distance)]]
        return float(len(line) - 1 - np.interp(own, line, np.arange(len(line))))

    def _line(self, row: int) -> np.ndarray:
        """What the options of a chain cost, falling."""
        return self.relative[row, [self.same[column] for column in self.chains[row]]]

    def choose(self, places: list[int], sensitivity: np.ndarray) -> Choice:
        """The options around some places in the chains with the least modelled loss.

        The loss is that of the squared errors, weighted; budgets are kept as files are saved. Where
        nothing around the places keeps them, all options count.

        Args:
            places: position of every layer, rounded down.
            sensitivity: growth of the loss per unit of squared error, of layers and inputs; not all
                zero.
        """
        rows = np.arange(len(self.chains))
        options = self.options
        errors = sensitivity[: len(rows), None] * self.errors[:, self.same]
        near = np.zeros(self.usable.shape, dtype=bool)
        for row, k in enumerate(places):
            line = self._line(row)
            least, most = line[min(k + 2, len(line) - 1)], line[max(k - 1, 0)]
            costs = self.relative[row, self.same]
            near[row] = (costs >= least) & (costs <= most)
        width = np.array([o.activation_bits or self.widths[0] for o in options])
        alone = set(rows.tolist())
        for weight, readers in zip(sensitivity[len(rows) :], self.sites.values(), strict=True):
            errors[readers[0]] += weight * 4.0**-width
            alone -= set(readers)
        usual = np.array([o.activation_bits is None for o in options])
        self.usable[sorted(alone)] &= usual  # the width of these inputs is not for choice
        selection = self._selection(errors / max(float(errors.max()), 1e-300))
        found = selection.choose(allowed=near)
        if found is None:
            found = selection.choose()
        if found is None:
            raise selection.impossible()
        return selection.choice(found)
