"""What all allocation methods share: layers, costs, limits, and turning choices into plans."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from ..capture import captured
from ..errors import BudgetError, PlanError, UnsupportedModelError
from ..importance.analyze import checked_layers
from ..importance.scores import LayerScores
from ..plan import MAX_BITS, MIN_BITS, LayerPlan, Plan, layer_kind, unknown_layer
from ..pruning.masks import pruned_count
from ..quantization.chains import Structure
from ..quantization.file_contents import stored_model, structure_of
from . import refusals
from .budget import Budget
from .closed_form import MAX_SPARSITY
from .options import UNSTRUCTURED, Choice, Choices, Option, option_of
from .size import estimate_bytes, float_bytes, packed_bytes

__all__ = ["Choice", "Fixed", "Problem"]

# What a person decides for a layer: bits, bits and sparsity, or another plan's entry.
Fixed = int | tuple[int, float] | LayerPlan | None
NAMED = 5  # layers that a message names
PERCENTS = round(100 * MAX_SPARSITY) + 1


class Problem:
    """One model, captured, and one budget.

    Attributes:
        layers: supported layers of the model by name.
        pinned: what the caller decided: fixed layers, and excluded ones, which stay float.
        free: names of the layers that are to be decided, in order; the others are pinned, or stay
            float because the native layers do not cover them.
        limit: largest allowed cost, in bytes or in average bits per weight; ``None``: no budget.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | None,
        activation_bits: int = 8,
        *,
        fixed: Mapping[str, Fixed] | None = None,
        exclude: Iterable[str] = (),
    ) -> None:
        model = captured(model)
        self.model, self.budget, self.activation_bits = model, budget, activation_bits
        self.layers: dict[str, Any] = checked_layers(model)
        self.pinned: Choice = {}
        self._pin(fixed or {}, exclude)
        template = self.plan(
            {name: Option(MAX_BITS) for name in self.layers if name not in self.pinned}
        )
        self.stored = stored_model(model, template)
        for name, option in self.pinned.items():
            bits = option.bits
            if bits is not None and name not in self.stored.layers:
                raise PlanError(
                    f"layer {name!r} cannot be fixed to {bits} bits: "
                    f"{self.stored.kept_float.get(name, 'it has no native form')}"
                )
        self.free = [
            name for name in self.layers if name in self.stored.layers and name not in self.pinned
        ]
        if not self.free and self.pinned:
            raise PlanError("all layers are fixed or excluded: there is nothing to decide")
        if not self.free:
            reasons = "; ".join(f"{n}: {why}" for n, why in self.stored.kept_float.items())
            raise UnsupportedModelError(f"no layer of the model can be quantized ({reasons})")
        self.float_bytes = float_bytes(model)
        self.limit = self._limit(budget)

    def _limit(self, budget: Budget | None) -> float | None:
        if budget is None:
            return None
        return budget.limit_bytes(self.float_bytes) if budget.bits is None else float(budget.bits)

    def limited(self, budget: Budget) -> Problem:
        """The same problem with another budget, of one limit of size, bytes and bits."""
        other = copy.copy(self)
        other.budget, other.limit = budget, self._limit(budget)
        return other

    def _pin(self, fixed: Mapping[str, Fixed], exclude: Iterable[str]) -> None:
        if isinstance(exclude, str):
            raise PlanError(f"exclude must be a sequence of names, got the text {exclude!r}")
        for name in exclude:
            members = [n for n in self.layers if n == name or n.startswith(f"{name}.")]
            if not members:
                raise PlanError(f"exclude: {unknown_layer(name, list(self.layers))}")
            self.pinned.update(dict.fromkeys(members, Option(None)))
        for name, value in fixed.items():
            if name not in self.layers:
                raise PlanError(f"fixed: {unknown_layer(name, list(self.layers))}")
            if name in self.pinned:
                raise PlanError(f"layer {name!r} is both fixed and excluded")
            layer = self.layers[name]
            if isinstance(value, LayerPlan):
                entry = value
            else:
                bits, sparsity = value if isinstance(value, tuple) else (value, 0.0)
                entry = LayerPlan(
                    name=name,
                    kind=layer_kind(layer),
                    params=layer.weight.numel(),
                    bits=bits,
                    sparsity=sparsity,
                    activation_bits=self.activation_bits,
                )
            entry.check()
            self.pinned[name] = option_of(entry, self.activation_bits)

    def full(self, choice: Choices) -> Choice:
        """The choice with what is pinned, in the model's order."""
        both = {**choice, **self.pinned}
        return {name: Option(*both[name]) for name in self.layers if name in both}

    @cached_property
    def structure(self) -> Structure:
        """Where values are quantized, with every layer that can be native."""
        return structure_of(self.model, set(self.stored.layers))

    @cached_property
    def shared_inputs(self) -> dict[str, list[int]]:
        """By quantized value the rows of ``free`` that read it, where all of its readers are free.

        A value has one grid, whoever reads it: what is decided about its bits is decided for all of
        these layers. Where one reader is pinned, it has decided already.
        """
        rows = {name: row for row, name in enumerate(self.free)}
        return {
            site.name: [rows[name] for name in site.layers]
            for site in self.structure.sites.values()
            if site.layers and all(name in rows for name in site.layers)
        }

    @property
    def in_bytes(self) -> bool:
        """Whether costs are bytes (else average bits per weight)."""
        return self.budget is None or self.budget.bits is None

    def plan(
        self,
        choice: Choices,
        method: str = "manual",
        hyper: Mapping[str, float] | None = None,
        scores: dict[str, dict[str, float]] | None = None,
    ) -> Plan:
        """A plan from an option per layer.

        Layers that are not named are as they are pinned, else float.
        """
        chosen = {
            name: Option(*choice.get(name, self.pinned.get(name, Option(None))))
            for name in self.layers
        }
        return Plan(
            layers={
                name: LayerPlan(
                    name=name,
                    kind=layer_kind(layer),
                    params=layer.weight.numel(),
                    bits=chosen[name].bits,
                    sparsity=chosen[name].sparsity,
                    pattern=chosen[name].pattern,
                    activation_bits=chosen[name].activation_bits or self.activation_bits,
                )
                for name, layer in self.layers.items()
            },
            method=method,
            hyper=dict(hyper or {}),
            scores=scores,
        )

    def cost(self, choice: Choices) -> float:
        """Bytes of the saved file, or average bits per weight, as the budget counts."""
        plan = self.plan(choice)
        if not self.in_bytes:
            return plan.average_bits
        same = all((choice.get(name, Option(None))[0] is not None) for name in self.free)
        return estimate_bytes(self.model, plan, stored=self.stored if same else None)

    def fits(self, choice: Choices) -> bool:
        """Whether the choice is within the budget."""
        return self.limit is None or self.cost(choice) <= self.limit + 1e-9

    def uniform(self, bits: int, sparsity: float, pattern: str = UNSTRUCTURED) -> Choice:
        """The same bits and sparsity for every layer that can be quantized."""
        return dict.fromkeys(self.free, Option(bits, sparsity, pattern))

    def form(self, name: str) -> tuple[int, ...]:
        """Shape of a layer's weight with the output channels first."""
        return tuple(self.stored.layers[name].weight_shape)

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
        """The error for a budget that nothing can meet; states the least that can be reached."""
        of = self.float_bytes if self.in_bytes else None
        return refusals.not_reachable(self.budget, smallest, of, what, self.in_float)

    def check_smallest(self, *, prunes: bool, method: str = "") -> None:
        """Raise :class:`~adalayer_native.errors.BudgetError` where no uniform plan is small enough.

        Args:
            prunes: whether plans may prune.
            method: which does not, for the message.
        """
        smallest = self.uniform(MIN_BITS, MAX_SPARSITY if prunes else 0.0)
        if not self.fits(smallest):
            why = "" if prunes else f" without pruning, which method {method!r} does not do"
            raise self.impossible(self.cost(smallest), why)

    def check_kept(self, plan: Plan) -> None:
        """Raise :class:`~adalayer_native.errors.BudgetError` where a plan is beyond the budget.

        The one check of what a method returns: whatever it did, layers that stay float count.
        """
        choice = {name: option_of(plan[name], self.activation_bits) for name in plan}
        if not self.fits(choice):
            cost = self.cost(choice)
            shown = f"{cost:,.0f} bytes" if self.in_bytes else f"{cost:.3f} bits per weight"
            raise refusals.plan_too_large(self.budget, shown, self.in_float)

    @property
    def in_float(self) -> str:
        """Layers that stay float whatever is decided, for messages; with what they count."""
        decided = {*self.free, *(n for n, option in self.pinned.items() if option.bits)}
        names = [name for name in self.layers if name not in decided]
        if not names:
            return ""
        shown = ", ".join(map(repr, names[:NAMED]))
        if len(names) > NAMED:
            shown += f" and {len(names) - NAMED} more"
        one = len(names) == 1
        return (
            f"; {'layer' if one else 'layers'} {shown} {'stays' if one else 'stay'} float, 32 bits "
            "per weight"
        )

    def check_scores(self, scores: LayerScores) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` unless all free layers have scores."""
        for name in self.free:
            scores[name]
