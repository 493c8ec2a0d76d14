"""What was asked for, and what is wrong with it, said before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..capture import GraphModel
from ..errors import CalibrationError, PlanError
from ..importance.outputs import LossFn, Pick
from ..importance.registry import criterion_of
from ..importance.scores import LayerScores
from . import refusals
from .budget import Budget
from .evaluate import Evaluator
from .measured_tables import Data, loader_of
from .methods import REGISTRY, Method, method_of
from .optimal_settings import MEASURES, Settings
from .problem import Fixed, Problem
from .repaired import REPAIR_VERSION, RepairedWeights
from .repaired_check import RepairedCheck

__all__ = ["Request", "check_method", "check_request"]


@dataclass
class Request:
    """Arguments of :func:`~adalayer_native.allocation.allocate`, checked, for its methods.

    Attributes:
        problem: the model's layers. Its budget is ``budget`` for methods that take one limit, and
            none for those that take several, which judge them by themselves.
    """

    problem: Problem
    method: Method
    budget: Budget | None
    scores: LayerScores | None = None
    calibration: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    output: Pick = None
    hyper: Mapping[str, float] | None = None
    bits: int | Sequence[int] | None = None
    stages: Sequence[str] | None = None
    batches: int | None = None
    candidates: int = 20
    repaired: bool = False
    options: Mapping[str, Any] | None = None
    tables: str | os.PathLike[str] | None = None
    cache: str | os.PathLike[str] | None = None
    progress: bool = True

    def check(self) -> None:
        """Refuse what no plan can meet, as far as that is known without measuring.

        Raises:
            PlanError: bits or stages that do not fit.
            BudgetError: no plan is small enough; states the smallest reachable size.
        """
        if self.method.checks:
            self.method.check(self)
        else:
            self.problem.check_smallest(prunes=self.method.prunes, method=self.method.name)

    @cached_property
    def evaluator(self) -> Evaluator | None:
        """What tries plans on the calibration data, if there are some."""
        if self.calibration is None:
            return None
        found = Evaluator(
            self.problem.model,
            self.calibration,
            self.loss_fn,
            batches=self.batches,
            cache=self.cache,
            key=f"repaired-{REPAIR_VERSION}" if self.repaired else "",
            output=self.output,
        )
        if self.repaired:
            names, data = list(self.problem.stored.layers), loader_of(found.batches)
            found.weight_of = RepairedWeights(found.model, data, names, progress=self.progress)
        return found

    @cached_property
    def repaired_check(self) -> RepairedCheck | None:
        """What compares plans that are repaired whole: where that is asked for, and images are
        there to repair with and to compare on."""
        if not self.repaired or self.evaluator is None or self.evaluator.samples < 2:
            return None
        loader = loader_of(self.evaluator.batches)
        data = Data.split(self.problem.model, loader, self.loss_fn, None, self.output)
        return RepairedCheck(self.problem, data, Settings.of(None, self.tables))

    def check_data(self) -> Iterable[Any]:
        """The calibration data of a method that needs some."""
        if self.calibration is None:
            raise CalibrationError(
                f"method {self.method.name!r} needs calibration data: it measures "
                f"its {'plans' if self.method.training else 'errors'}"
            )
        return self.calibration


def check_method(
    method: str,
    budget: Budget | None,
    *,
    criterion: str | None = None,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """What needs no model; arguments as of :func:`~adalayer_native.allocation.allocate`.

    Raises:
        PlanError: an unknown method, criterion or option, or one that the method does not look at.
        BudgetError: a budget that the method needs, or does not take.
        FileFormatError: a latency table that cannot be used.
    """
    known = method_of(method)
    if budget is None and known.budget:
        raise refusals.missing(method)
    if budget is not None and not known.several and not budget.single:
        raise refusals.several_limits(method, budget)
    if criterion is not None:
        if not (known.scores or known.several):
            raise PlanError(f"method {method!r} looks at no criterion, got {criterion!r}")
        if known.scores or criterion not in MEASURES:
            criterion_of(criterion)
    if not known.stages and not (bits is None and stages is None):
        takers = ", ".join(repr(each.name) for each in REGISTRY.values() if each.stages)
        raise PlanError(
            f"method {method!r} takes no bits and stages; they are for methods {takers}"
        )
    if known.options:
        found = known.options_class().of(options)
        if known.several and budget is not None and found.latency_table and not budget.timed:
            raise refusals.table_without_clock(budget)
    elif options:
        takers = " and ".join(repr(each.name) for each in REGISTRY.values() if each.options)
        raise PlanError(f"method {method!r} takes no options; they are for methods {takers}")


def check_request(
    model: GraphModel,
    budget: Budget | None,
    *,
    method: str,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    activation_bits: int = 8,
    fixed: Mapping[str, Fixed] | None = None,
    exclude: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Problem:
    """What needs the captured model: names of layers, and whether any plan keeps the budget.

    Latencies, losses and the limits of method ``"adalayer"`` beyond the smallest size are known
    when they have been measured.

    Raises:
        PlanError: unknown layers or stages, or bits that do not fit.
        BudgetError: no plan is small enough; states the smallest reachable size.
        UnsupportedModelError: no layer can be quantized.
    """
    known = method_of(method)
    one = None if known.several else budget
    problem = Problem(model, one, activation_bits, fixed=fixed, exclude=exclude)
    request = Request(problem, known, budget, bits=bits, stages=stages, options=options)
    request.check()
    return problem
