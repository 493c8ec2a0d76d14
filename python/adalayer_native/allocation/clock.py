"""A latency limit, kept by the real engine.

A latency table says how a call divides among layers whose neighbours all have the same width. What
a plan's engine takes is another matter: widths are mixed, and zeros lie where the weights have
them. So the engine of the chosen plan is compiled and timed, the table is scaled by what that took
over what was predicted, and the solver chooses again, until both agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..capture import Inputs
from ..engine.compiler import compile as compile_engine
from ..engine.latency import call_seconds, seconds_in_turn
from ..engine.runtime import Engine
from ..importance.batches import model_digest
from ..quantization import calibrate, convert, prepare
from .latencies import repeated, sizes_of
from .optimal_settings import Settings
from .options import Choice
from .problem import Problem
from .resources import LATENCY, Resource
from .selection import Selection
from .store import Store, cache_dir, machine

__all__ = ["AGREEMENT", "EngineClock", "choose_by_clock", "keeps_latency", "latency_of"]

ROUNDS = 5  # of measuring and scaling, at most
AGREEMENT = 0.03  # relative difference of prediction and measurement that ends them


class EngineClock:
    """Milliseconds of one call of a plan's compiled engine, all supported layers native.

    Weights are masked and rounded as :func:`prepare` does it: which forms are exact, and how many
    products 16 bits hold, depends on their values. What was measured is kept beside the tables, for
    these kernels alone.

    Args:
        problem: layers.
        x: an input of one sample.
        settings: batch, threads, cache directory.
    """

    def __init__(self, problem: Problem, x: Inputs | Tensor, settings: Settings) -> None:
        x = Inputs.of(x)
        self.problem, self.x, self.settings = problem, x, settings
        key = {
            "model": model_digest(problem.model),
            "input": sizes_of(x),
            "batch": settings.latency_batch,
            "activation_bits": problem.activation_bits,
            **machine(settings.threads),
        }
        self.store = Store(cache_dir(settings.directory), "engines", key)
        self._kernels: dict[str, dict[str, str]] = {}

    def __call__(self, choice: Choice) -> float:
        """Median milliseconds with ``choice``, and with what is pinned."""
        full = self.problem.full(choice)
        name = _name(full)
        if name not in self.store:
            self.store[name] = self._measure(full)
            self.store.save()
        return self.store[name]

    def together(self, choices: Sequence[Choice]) -> list[float]:
        """The same for several choices, timed in turn and anew."""
        full = [self.problem.full(choice) for choice in choices]
        engines = [self._engine(choice) for choice in full]
        settings = self.settings
        found = seconds_in_turn(engines, settings.latency_batch, settings.threads, seconds=1.0)
        for choice, engine, seconds in zip(full, engines, found, strict=True):
            self._kernels[_name(choice)] = _kernels(engine, choice)
            self.store[_name(choice)] = 1e3 * seconds
        self.store.save()
        return [1e3 * seconds for seconds in found]

    def kernels(self, choice: Choice) -> dict[str, str]:
        """What runs every layer in that engine."""
        full = self.problem.full(choice)
        name = _name(full)
        if name not in self._kernels:  # its time was known
            self._kernels[name] = _kernels(self._engine(full), full)
        return self._kernels[name]

    def _measure(self, choice: Choice) -> float:
        engine = self._engine(choice)
        self._kernels[_name(choice)] = _kernels(engine, choice)
        return 1e3 * call_seconds(engine, self.settings.latency_batch, self.settings.threads)

    def _engine(self, choice: Choice) -> Engine:
        prepared = prepare(self.problem.model, self.problem.plan(choice))
        calibrate(prepared, [self.x], observer="minmax", progress=False)
        batch = repeated(self.x, self.settings.latency_batch)
        return compile_engine(convert(prepared), batch, policy="native")


def _name(choice: Choice) -> str:
    return json.dumps([[layer, *option.values] for layer, option in choice.items()])


def _kernels(engine: Engine, choice: Choice) -> dict[str, str]:
    """By layer; the second call of one is "layer#2"."""
    found: dict[str, str] = {}
    for row in engine.coverage(rounds=0):
        name = row.name.split("#", 1)[0]
        if row.bits and name in choice:  # others stand for operations that are no layers
            found.setdefault(name, row.kernel)
    return found


def latency_of(selection: Selection) -> Resource | None:
    """The latency among the limits, if there is one."""
    found = selection.resource(LATENCY)
    return found if found is not None and np.isfinite(found.limit) else None


def correct(selection: Selection, columns: np.ndarray, clock: EngineClock) -> tuple[float, float]:
    """Scale the latencies so that a choice has the one that its engine is measured to have.

    Returns:
        ``(measured, predicted)`` milliseconds, the second as it was before.
    """
    resource = latency_of(selection)
    assert resource is not None
    predicted = resource.total(columns)
    measured = clock(selection.choice(columns))
    if predicted > 0 and measured > 0:
        resource.scale(measured / predicted)
    return measured, predicted


def choose_by_clock(selection: Selection, clock: EngineClock) -> np.ndarray:
    """The solver's choice, with latencies scaled until the choice runs as fast as predicted.

    Raises:
        BudgetError: no plan keeps the limits; names those that bind. The smallest reachable
            latency is that of the fastest plan's engine.
    """
    resource = latency_of(selection)
    assert resource is not None
    probed = False
    for _ in range(ROUNDS):
        columns = selection.choose()
        if columns is None:
            # The table alone shall not say that it is impossible: the fastest plan is timed.
            fastest = None if probed else selection.choose(
                errors=resource.costs, without=resource, pairs=()
            )  # fmt: skip
            if fastest is None:
                raise selection.impossible()
            correct(selection, fastest, clock)
            probed = True
            continue
        measured, predicted = correct(selection, columns, clock)
        if abs(measured - predicted) <= AGREEMENT * predicted:
            break
    final = selection.choose()
    if final is None:
        raise selection.impossible()
    return final


def keeps_latency(selection: Selection, columns: np.ndarray, clock: EngineClock) -> bool:
    """Whether the engine of a choice keeps the limit; where it does not, latencies are scaled."""
    resource = latency_of(selection)
    assert resource is not None
    if clock(selection.choice(columns)) <= resource.limit * (1 + AGREEMENT):
        return True
    correct(selection, columns, clock)
    return False
