"""From scores and a budget to a plan: the one entry to all methods."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..capture.loading import captured_on, first_sample
from ..capture.work import work_of
from ..errors import PlanError
from ..importance.batches import warn_of_first_guess
from ..importance.outputs import LossFn, Pick
from ..importance.scores import LayerScores
from ..plan import Plan
from .budget import Budget
from .float_work import unsupported_work
from .methods import method_of
from .problem import Fixed
from .request import Request, check_method, check_request

__all__ = ["allocate"]


def allocate(
    scores: LayerScores | None,
    budget: Budget | None,
    *,
    method: str = "adalayer",
    model: nn.Module | torch.export.ExportedProgram,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    hyper: Mapping[str, float] | None = None,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    activation_bits: int = 8,
    batches: int | None = None,
    candidates: int = 20,
    repaired: bool = False,
    fixed: Mapping[str, Fixed] | None = None,
    exclude: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    tables: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Decide bits and sparsity of every layer under a budget.

    ``"adalayer"`` is eq. (2) ``P = gamma (1 - I) + delta R`` and eq. (3)
    ``B = Bmax - lambda (1 - I)``, hyper-parameters searched for the highest calibration
    accuracy within the budget, eq. (6). ``"uniform"`` gives every layer the same bits and
    sparsity, chosen the same way. ``"optimal"`` measures what every width and sparsity costs in
    each layer, solves the multiple-choice knapsack under all limits together, and checks and
    repairs the plan on data that the tables have not seen; its plan carries each layer's
    predicted loss increase, ``plan.scores[name]["E"]``; with ``Budget(loss=...)`` it gives the
    fastest plan that loses little more than 8 bits everywhere. ``"rl"`` searches widths alone by
    deep Q-learning over the layers; it is there for comparison. ``"fixed"``, ``"ascending"`` and
    ``"descending"`` give widths to stages. A size budget is about the real saved file, see
    :func:`~adalayer_native.allocation.estimate_bytes`.

    Args:
        scores: from ``analyze``; only ``"adalayer"`` needs them.
        budget: the limit, or for ``"optimal"`` one or several; may be ``None`` for the three stage
            methods only.
        method: one of ``METHODS``.
        model: the float model, an exported program, or what
            :func:`~adalayer_native.capture` made of one; not changed.
        calibration: batches as for ``analyze`` on which candidate plans are compared, never test
            images. Without it the best plan by the proxy is taken; ``"optimal"`` needs it.
        loss_fn: ``loss_fn(output, target)``, a scalar or one value per sample; default: how far the
            outputs are from the float model's, KL divergence for logits and relative squared error
            for others. A :class:`~adalayer_native.TaskLoss` says what every output is.
        output: which of the model's outputs counts, as for ``analyze``.
        hyper: fixes some of alpha, beta, gamma, delta, lambda, bmax (``"adalayer"``).
        bits, stages: for the three stage methods, see ``stage_plan``.
        activation_bits: bits of every quantized layer's input, 2 to 8. ``"optimal"`` may give
            fewer to some (``input_widths`` in ``options``).
        batches: use at most this many calibration batches.
        candidates: how many plans are tried on calibration data in the first round.
        repaired: for ``"adalayer"`` and ``"uniform"``: compare plans with weights as ``repair``
            will make them, not rounded ones, and the best few after a repair of the whole plan on
            half of the images, measured on the other half. Slower by far, and worth it where a
            repair follows; ``"optimal"`` always does so unless its options say otherwise.
        fixed: layers that are decided already, by any method: bits, ``(bits, sparsity)``, or an
            entry of another plan (``{"conv1": plan["conv1"]}``).
        exclude: layers, or modules with all their layers, that stay float.
        options: for ``"optimal"``: fields of :class:`~adalayer_native.allocation.Settings`; for
            ``"rl"``: of :class:`~adalayer_native.allocation.RLSettings`.
        tables: directory that keeps the tables of ``"optimal"`` and what plans lost that were
            repaired whole, one file per model, data and machine; default: the user's cache
            directory.
        cache: JSON file that keeps every trial, so that an interrupted search goes on.
        progress: show progress.

    Raises:
        BudgetError: impossible budget; the message names the limit that binds and the smallest
            value that can be reached.
        PlanError: unknown method, option or hyper-parameter, bits or stages that do not fit, an
            unknown layer in ``fixed`` or ``exclude``.
        CalibrationError: unusable calibration data or weights.
        UnsupportedModelError: a model that cannot be captured, or without supported layers.
    """
    check_method(method, budget, bits=bits, stages=stages, options=options)
    if candidates < 1:
        raise PlanError(f"candidates must be at least 1, got {candidates}")
    known = method_of(method)
    model = captured_on(model, calibration)
    if loss_fn is None and calibration is not None and known.data:
        warn_of_first_guess(model, calibration, output)
    problem = check_request(
        model, budget, method=method, bits=bits, stages=stages, activation_bits=activation_bits,
        fixed=fixed, exclude=exclude, options=options,
    )  # fmt: skip
    request = Request(
        problem, known, budget, scores=scores, calibration=calibration, loss_fn=loss_fn,
        output=output, hyper=hyper, bits=bits, stages=stages, batches=batches,
        candidates=candidates, repaired=repaired, options=options, tables=tables, cache=cache,
        progress=progress,
    )  # fmt: skip
    plan = known.solve(request)
    if scores is not None and not known.scores:
        given, own = scores.as_dict(), plan.scores
        plan.scores = given
        if own is not None:
            plan.scores = {n: {**given.get(n, {}), **own.get(n, {})} for n in plan}
    if budget is not None and budget.single:
        problem.limited(budget).check_kept(plan)
    plan.validate(model)
    sample = None if calibration is None else first_sample(model, calibration)
    plan.float_work = unsupported_work(model, work=work_of(model, sample)).as_dict()
    return plan
