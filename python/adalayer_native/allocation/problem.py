"""What all allocation methods share: layers, costs, limits, and turning choices into plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ..errors import BudgetError, UnsupportedModelError
from ..importance.analyze import checked_layers
from ..importance.scores import LayerScores
from ..plan import LayerPlan, Plan, layer_kind
from ..pruning.masks import pruned_count
from ..quantization.layout import native_layout
from .budget import Budget
from .closed_form import MAX_BITS, MAX_SPARSITY, MIN_BITS
from .size import estimate_bytes, float_bytes, packed_bytes

__all__ = ["Choice", "Problem"]

# A choice for every layer: bits (None stays float) and sparsity.
Choice = dict[str, tuple[int | None, float]]
PERCENTS = round(100 * MAX_SPARSITY) + 1


class Problem:
    """One model and one budget.

    Attributes:
        layers: supported layers of the model by name.
        free: names of the layers that can be quantized, in order; the others stay float because
            the native layers do not cover them.
        limit: largest allowed cost, in bytes or in average bits per weight; ``None``: no budget.
    """

    def __init__(self, model: nn.Module, budget: Budget | None, activation_bits: int = 8) -> None:
        self.model, self.budget, self.activation_bits = model, budget, activation_bits
        self.layers: dict[str, Any] = checked_layers(model)
        template = self.plan(dict.fromkeys(self.layers, (MAX_BITS, 0.0)))
        self.layout = native_layout(model, template)
        self.free = [name for name in self.layers if name in self.layout.layers]
        if not self.free:
            reasons = "; ".join(f"{n}: {why}" for n, why in self.layout.kept_float.items())
            raise UnsupportedModelError(f"no layer of the model can be quantized ({reasons})")
        self.float_bytes = float_bytes(model)
        self.limit: float | None = None
        if budget is not None:
            limit = budget.limit_bytes(self.float_bytes)
            self.limit = float(budget.bits) if budget.bits is not None else limit

    @property
    def in_bytes(self) -> bool:
        """Whether costs are bytes (else average bits per weight)."""
        return self.budget is None or self.budget.bits is None

    def plan(
        self,
        choice: Choice,
        method: str = "manual",
        hyper: Mapping[str, float] | None = None,
        scores: dict[str, dict[str, float]] | None = None,
    ) -> Plan:
        """A plan from bits and sparsity per layer; layers that are not named stay float."""
        return Plan(
            layers={
                name: LayerPlan(
                    name=name,
                    kind=layer_kind(layer),
                    params=layer.weight.numel(),
                    bits=choice.get(name, (None, 0.0))[0],
                    sparsity=choice.get(name, (None, 0.0))[1],
                    activation_bits=self.activation_bits,
                )
                for name, layer in self.layers.items()
            },
            method=method,
            hyper=dict(hyper or {}),
            scores=scores,
        )

    def cost(self, choice: Choice) -> float:
        """Bytes of the saved file, or average bits per weight, as the budget counts."""
        plan = self.plan(choice)
        if not self.in_bytes:
            return plan.average_bits
        same = all((choice.get(name, (None,))[0] is not None) for name in self.free)
        return estimate_bytes(self.model, plan, layout=self.layout if same else None)

    def fits(self, choice: Choice) -> bool:
        """Whether the choice is within the budget."""
        return self.limit is None or self.cost(choice) <= self.limit + 1e-9

    def uniform(self, bits: int, sparsity: float) -> Choice:
        """The same bits and sparsity for every layer that can be quantized."""
        return dict.fromkeys(self.free, (bits, sparsity))

    def cost_table(self) -> tuple[np.ndarray, float, float]:
        """``(table, constant, slack)``: cost of free layer l at b bits and p per cent zeros.

        ``constant + sum_l table[l, b - 2, p]`` is an upper bound of the cost that is at most
        ``slack`` too high: the digits of the file's header depend on the plan. The table is
        float64 ``[layers, 7, 96]``.
        """
        table = np.zeros((len(self.free), MAX_BITS - MIN_BITS + 1, PERCENTS))
        total = sum(layer.weight.numel() for layer in self.layers.values())
        for row, name in enumerate(self.free):
            count = self.layers[name].weight.numel()
            for bits in range(MIN_BITS, MAX_BITS + 1):
                for percent in range(PERCENTS):
                    if self.in_bytes:
                        kept = count - pruned_count(count, percent / 100)
                        value: float = packed_bytes(count, kept, bits)
                    else:
                        value = count * bits * (1 - percent / 100) / max(1, total)
                    table[row, bits - MIN_BITS, percent] = value
        # The largest plan has the most digits in its header and the smallest the fewest.
        largest = self.cost(self.uniform(MAX_BITS, 0.0))
        smallest = self.cost(self.uniform(MIN_BITS, MAX_SPARSITY))
        constant = largest - float(table[:, MAX_BITS - MIN_BITS, 0].sum())
        return table, constant, constant - (smallest - float(table[:, 0, PERCENTS - 1].sum()))

    def impossible(self, smallest: float, what: str = "") -> BudgetError:
        """The error for a budget that nothing can meet; states the smallest reachable size."""
        if not self.in_bytes:
            reach = f"{smallest:.3f} bits per weight"
        else:
            share = smallest / self.float_bytes
            # Rounded up, so that the printed share itself is a budget that can be met.
            share = np.ceil(share * 1e5) / 1e5
            reach = (
                f"{int(smallest):,} bytes, {share:.5f} of the float file "
                f"({self.float_bytes:,} bytes)"
            )
        return BudgetError(
            f"the budget ({self.budget}) cannot be met{what}: "
            f"the smallest reachable size is {reach}"
        )

    def check_scores(self, scores: LayerScores) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` unless all free layers have scores."""
        for name in self.free:
            scores[name]
