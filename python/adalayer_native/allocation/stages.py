"""Methods "fixed", "ascending" and "descending": bits by stage; other layers stay float."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..plan import MAX_BITS, MIN_BITS, Plan
from .options import Choice, Option
from .problem import Problem

if TYPE_CHECKING:
    from .request import Request

__all__ = ["check", "solve", "stage_plan"]

DEFAULT_BITS = (2, 3, 4)


def solve(request: Request) -> Plan:
    """The plan for a request."""
    return stage_plan(request.problem, request.method.name, request.bits, request.stages)


check = solve  # nothing is measured


def stage_plan(
    problem: Problem,
    method: str,
    bits: int | Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
) -> Plan:
    """Give every stage one width; nothing is pruned.

    Args:
        problem: model and budget (which may be none).
        method: ``"ascending"`` gives the smallest width to the first stage, ``"descending"``
            the largest. ``"fixed"`` gives one width to all stages: the largest of ``bits`` that
            fits the budget.
        bits: widths, 2 to 8; default (2, 3, 4).
        stages: names of modules; a stage is that layer, or all layers in that module. Layers
            in no stage stay float. Default: all layers, in as many equal parts as there are
            widths.

    Raises:
        PlanError: bits out of range, a number of stages that differs from the number of widths,
            an unknown, empty or overlapping stage.
        BudgetError: the plan does not fit the budget; states its size.
    """
    widths = (bits,) if isinstance(bits, int) else tuple(DEFAULT_BITS if bits is None else bits)
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int):
            raise PlanError(f"bits must be whole numbers, got {width!r}")
        if not MIN_BITS <= width <= MAX_BITS:
            raise PlanError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {width}")
    if not widths:
        raise PlanError("bits must name at least one width")
    groups = _groups(problem, stages, 1 if method == "fixed" else len(widths))
    if method == "fixed":
        members = [name for group in groups for name in group]
        options = [dict.fromkeys(members, width) for width in sorted(set(widths), reverse=True)]
    else:
        if len(groups) != len(widths):
            raise PlanError(
                f"method {method!r}: expected as many widths as stages, got {len(widths)} "
                f"widths and {len(groups)} stages"
            )
        ordered = sorted(widths, reverse=method == "descending")
        options = [{name: w for group, w in zip(groups, ordered, strict=True) for name in group}]
    choices: list[Choice] = [
        {name: Option(width) for name, width in option.items()} for option in options
    ]
    for choice in choices:
        if problem.fits(choice):
            used = sorted({o.bits for o in choice.values() if o.bits is not None})
            hyper = {f"bits_{i}": float(w) for i, w in enumerate(used, 1)}
            return problem.plan(choice, method, hyper)
    raise problem.impossible(
        min(problem.cost(choice) for choice in choices),
        f" by method {method!r} with bits {widths}",
    )


def _groups(problem: Problem, stages: Sequence[str] | None, parts: int) -> list[list[str]]:
    names = problem.free
    if stages is None:
        if len(names) < parts:
            raise PlanError(f"the model has {len(names)} layers, too few for {parts} stages")
        edges = [round(part * len(names) / parts) for part in range(parts + 1)]
        return [names[a:b] for a, b in itertools.pairwise(edges)]
    if isinstance(stages, str) or not stages:
        raise PlanError(f"stages must be a sequence of module names, got {stages!r}")
    groups: list[list[str]] = []
    owner: dict[str, str] = {}
    for stage in stages:
        members = [name for name in names if name == stage or name.startswith(f"{stage}.")]
        if not members:
            tops = sorted({name.split(".")[0] for name in names})
            raise PlanError(
                f"stage {stage!r} holds no layer that can be quantized; the model has {tops}"
            )
        for name in members:
            if name in owner:
                raise PlanError(f"layer {name!r} is in two stages: {owner[name]!r} and {stage!r}")
            owner[name] = stage
        groups.append(members)
    return groups
