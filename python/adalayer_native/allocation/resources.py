"""What every option of every layer costs, in each of the units that a budget can limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..energy.model import FLOAT_BITS, LayerEnergy, layer_energy
from ..importance.flops import Work
from ..rounding import conv_form
from . import refusals
from .budget import Budget
from .layer_table import LayerTable
from .options import Choice, Option
from .problem import Problem
from .size import layer_bytes

__all__ = ["LATENCY", "LOSS", "Resource", "bit_operations", "resources", "stored_energy"]

LATENCY, LOSS = "latency", "loss"  # names of resources that others look for


def bit_operations(
    macs: float, bits: int | None, activation_bits: int, sparsity: float = 0.0
) -> float:
    """``MACs * weight bits * activation bits * (1 - sparsity)``; a float layer has 32 times 32."""
    if bits is None:
        return macs * FLOAT_BITS * FLOAT_BITS
    return macs * bits * activation_bits * (1.0 - sparsity)


@dataclass
class Resource:
    """One quantity that is added up over layers, and its limit.

    Attributes:
        name: what it is, in words.
        costs: float64 ``[layers, options]``.
        constant: what does not depend on the options.
        limit: largest allowed total; infinite where nothing is asked.
        slack: ``constant + sum(costs)`` is at most so much above the real total.
        exact: the real total of a choice; default: the sum.
        show: a total in words.
    """

    name: str
    costs: np.ndarray
    constant: float
    limit: float
    show: Callable[[float], str]
    slack: float = 0.0
    exact: Callable[[Choice], float] | None = None

    def scale(self, factor: float) -> None:
        """Multiply all costs, and what is there in any case."""
        self.costs = self.costs * factor
        self.constant *= factor

    def total(self, choice: np.ndarray) -> float:
        """``constant + sum_l costs[l, choice_l]``; at least the real total."""
        return self.constant + float(self.costs[np.arange(len(choice)), choice].sum())


def resources(
    problem: Problem,
    budget: Budget,
    options: Sequence[Option],
    work: Mapping[str, Work],
    latency: LayerTable | None = None,
) -> list[Resource]:
    """A :class:`Resource` for each limit of the budget, and the file's bytes in any case.

    Args:
        problem: without a budget of its own: its costs are bytes.
        budget: limits.
        options: the columns.
        work: per image, of every layer of the model.
        latency: microseconds per call, where the clock counts (``Budget.timed``); its layers and
            options are those of the problem.

    Raises:
        BudgetError: the clock counts and there is no table.
    """
    found = [_bytes(problem, budget, options)]
    if budget.bits is not None:
        found.append(_average_bits(problem, budget.bits, options))
    if budget.timed:
        if latency is None:
            raise refusals.clock_without_table()
        found.append(
            Resource(
                LATENCY,
                latency.flat() / 1000.0,
                latency.constant / 1000.0,
                np.inf if budget.latency is None else budget.latency,
                lambda value: f"{_up(value, 4)} ms",
            )
        )
    if budget.bops is not None:
        found.append(
            _summed(
                problem,
                "number of bit operations",
                budget.bops,
                options,
                lambda name, option: bit_operations(
                    work[name].macs,
                    option.bits,
                    option.activation_bits or problem.activation_bits,
                    option.sparsity,
                ),
                lambda value: f"{np.ceil(value):,.0f} per image",
            )
        )
    if budget.energy is not None:
        found.append(
            _summed(
                problem,
                "modelled energy",
                budget.energy,
                options,
                lambda name, option: (
                    1e-6
                    * stored_energy(
                        _form(problem, name),
                        option,
                        option.activation_bits or problem.activation_bits,
                        work[name],
                    ).total
                ),
                lambda value: f"{_up(value, 4)} µJ per image",
            )
        )
    return found


def _up(value: float, digits: int) -> str:
    """Rounded up, so that what is printed is a limit that can be kept."""
    if value <= 0:
        return "0"
    power = 10.0 ** (digits - 1 - np.floor(np.log10(value)))
    return f"{np.ceil(value * power * (1 - 1e-12)) / power:g}"


def _bytes(problem: Problem, budget: Budget, options: Sequence[Option]) -> Resource:
    costs = np.zeros((len(problem.free), len(options)))
    for row, name in enumerate(problem.free):
        for column, option in enumerate(options):
            assert option.bits is not None
            costs[row, column] = layer_bytes(
                problem.form(name), option.bits, option.sparsity, option.pattern
            )

    def choice(columns: np.ndarray) -> Choice:
        return {n: options[c] for n, c in zip(problem.free, columns.tolist(), strict=True)}

    # The header of the file is text: the largest plan has the most digits in it.
    rows = np.arange(len(problem.free))
    ends = [costs.argmax(axis=1), costs.argmin(axis=1)]
    above, below = (problem.cost(choice(end)) - costs[rows, end].sum() for end in ends)
    limit = budget.limit_bytes(problem.float_bytes)

    def show(value: float) -> str:
        share = np.ceil(value / problem.float_bytes * 1e5) / 1e5
        return (
            f"{int(np.ceil(value)):,} bytes, {share:.5f} of the float file "
            f"({problem.float_bytes:,} bytes)"
        )

    return Resource(
        "size",
        costs,
        float(above),
        np.inf if limit is None else float(limit),
        show,
        float(above - below),
        problem.cost,
    )


def _average_bits(problem: Problem, limit: float, options: Sequence[Option]) -> Resource:
    total = sum(layer.weight.numel() for layer in problem.layers.values())
    counts = np.array([problem.layers[name].weight.numel() for name in problem.free])
    each = np.array([(o.bits or 0) * (1.0 - o.sparsity) for o in options])
    rest = problem.plan(dict.fromkeys(problem.free, options[0]))
    costs = counts[:, None] * each[None] / max(1, total)
    constant = rest.average_bits - float(costs[:, 0].sum())
    return Resource(
        "average width", costs, constant, limit, lambda value: f"{_up(value, 4)} bits per weight"
    )


def _summed(
    problem: Problem,
    name: str,
    limit: float,
    options: Sequence[Option],
    cost: Callable[[str, Option], float],
    show: Callable[[float], str],
) -> Resource:
    costs = np.array([[cost(n, option) for option in options] for n in problem.free])
    others = [n for n in problem.layers if n not in set(problem.free)]
    constant = sum(cost(n, problem.pinned.get(n, Option(None))) for n in others)
    return Resource(name, costs, constant, limit, show)


def _form(problem: Problem, name: str) -> tuple[int, ...]:
    layer = problem.layers[name]
    return tuple(conv_form(layer, layer.weight).shape)


def stored_energy(
    shape: tuple[int, ...], option: Option, activation_bits: int, work: Work
) -> LayerEnergy:
    """Modelled energy of a layer whose weight is stored as a file stores it.

    ``shape`` is the weight's, output channels first.
    """
    bits = option.bits
    if bits is None:
        stored = 4.0 * math.prod(shape)
        return layer_energy(work.macs, stored, None, activations=work.activations)
    stored = layer_bytes(shape, bits, option.sparsity, option.pattern)
    return layer_energy(work.macs, stored, bits, activation_bits, work.activations)
