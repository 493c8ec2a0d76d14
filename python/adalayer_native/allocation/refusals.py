"""Every refusal of a budget: what it says, wherever it is found out.

Whoever finds out raises what one of these functions makes. A message names the limit that binds
and, where it is known, the smallest value that can be reached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import BudgetError

if TYPE_CHECKING:
    from .budget import Budget

__all__ = [
    "clock_without_table",
    "empty",
    "engines_too_slow",
    "file_limited_twice",
    "learned_loss",
    "levels_apart",
    "levels_of_one_method",
    "limited_frontier",
    "limits_apart",
    "limits_together",
    "loss_not_kept",
    "missing",
    "not_reachable",
    "out_of_range",
    "plan_too_large",
    "several_limits",
    "table_without_clock",
]


# -- a budget that says nothing ---------------------------------------------------------------


def empty(names: Sequence[str]) -> BudgetError:
    """No limit is given."""
    return BudgetError(f"a budget needs at least one of {', '.join(names)}; got none")


def file_limited_twice() -> BudgetError:
    """The file is limited by a share and by bytes."""
    return BudgetError("a budget limits the file by size or by bytes, not by both")


def out_of_range(name: str, value: object) -> BudgetError:
    """A limit is no number above 0."""
    return BudgetError(f"budget {name} must be a finite number above 0, got {value!r}")


# -- a budget that does not go with the rest of a request --------------------------------------


def learned_loss(budget: Budget) -> BudgetError:
    """What is learned loses as little as it can; there is nothing to limit."""
    return BudgetError(f"allocate='learned' takes no budget of loss, got {budget}")


def levels_apart() -> BudgetError:
    """Levels have plans of their own."""
    return BudgetError(
        "--levels says what every level has: it goes with --fix, --exclude and --effort, and "
        "not with a budget, --layer-bits, --stages, --criterion, --latency-table or --no-repair"
    )


def levels_of_one_method(method: str) -> BudgetError:
    """Levels are planned by one method."""
    return BudgetError(f"--levels has a method of its own, which is optimal, not {method}")


def missing(method: str, hint: str = "") -> BudgetError:
    """A method that does nothing without a budget has none."""
    return BudgetError(f"method {method!r} needs a budget{hint}")


def several_limits(method: str, budget: Budget) -> BudgetError:
    """A method gets limits that it does not look at."""
    return BudgetError(
        f"method {method!r} takes one limit of size, bytes and bits, got {budget}; method "
        f"'optimal' takes several, and latency, bops and energy"
    )


def table_without_clock(budget: Budget) -> BudgetError:
    """Another machine's latencies are given, and no limit is about time."""
    return BudgetError(f"a latency table is for a budget of latency or loss, got {budget}")


def clock_without_table() -> BudgetError:
    """A limit is about time, and nothing says how long layers take."""
    return BudgetError("a budget of latency or loss needs a latency table")


def limited_frontier(limit: str) -> BudgetError:
    """The frontier is asked to limit what it is about: ``"file"`` or ``"loss"``."""
    words = {
        "file": "runs over all sizes; within must not limit the file",
        "loss": "is about the loss; within must not limit it",
    }
    return BudgetError(f"the frontier {words[limit]}")


# -- a budget that no plan keeps ---------------------------------------------------------------


def not_reachable(
    budget: Budget | None,
    smallest: float,
    float_bytes: int | None,
    what: str = "",
    in_float: str = "",
) -> BudgetError:
    """One limit, and not even the smallest plan keeps it.

    Args:
        smallest: what that one costs, in bytes, or in average bits where ``float_bytes`` is
            ``None``.
        float_bytes: of the float file.
        what: plans of which kind.
        in_float: layers that no plan makes smaller, in words.
    """
    if float_bytes is None:
        reach = f"average width is {smallest:.3f} bits per weight"
    else:
        # Rounded up, so that the printed share itself is a budget that can be met.
        share = math.ceil(smallest / float_bytes * 1e5) / 1e5
        reach = (
            f"size is {int(smallest):,} bytes, {share:.5f} of the float file "
            f"({float_bytes:,} bytes)"
        )
    return BudgetError(f"{_start(budget)}{what}: the smallest reachable {reach}{in_float}")


def plan_too_large(budget: Budget | None, cost: str, in_float: str) -> BudgetError:
    """A method's plan does not keep the budget."""
    return BudgetError(f"{_start(budget)}: the plan that was found has {cost}{in_float}")


def limits_apart(budget: Budget, reachable: Sequence[str], in_float: str) -> BudgetError:
    """Some limits cannot be kept even alone; ``reachable``: ``"<quantity> is <value>"`` of each."""
    found = "; ".join(f"the smallest reachable {text}" for text in reachable)
    return BudgetError(f"{_start(budget)}: {found}{in_float}")


def limits_together(budget: Budget, possible: Sequence[str]) -> BudgetError:
    """Every limit can be kept, but not all of them; ``possible``: each beside the others."""
    if not possible:
        return BudgetError(f"{_start(budget)}: every limit can be kept alone, but no two together")
    return BudgetError(
        f"{_start(budget)}: every limit can be kept alone, but not together; with the other limits "
        f"as they are, possible is a {' or a '.join(possible)}"
    )


def engines_too_slow(budget: Budget, measured: float) -> BudgetError:
    """Plans were predicted to keep a latency, and their engines do not; the fastest one's ms."""
    return BudgetError(
        f"{_start(budget)}: of the plans that are predicted to keep it, the fastest engine takes "
        f"{measured:.4g} ms"
    )


def loss_not_kept(budget: Budget) -> BudgetError:
    """No plan that was measured loses as little as it was predicted to."""
    return BudgetError(
        f"{_start(budget)}: plans that are predicted to keep it lose more, or take longer, where "
        "they are measured"
    )


def _start(budget: Budget | None) -> str:
    return f"the budget ({budget}) cannot be met"
