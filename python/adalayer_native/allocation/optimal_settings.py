"""Options of method "optimal"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .._deprecated import renamed_fields, renamed_keys
from ..errors import PlanError
from ..importance.outputs import LossFn
from ..importance.registry import CRITERIA
from ..importance.task_loss import TaskLoss
from ..plan import PATTERNS
from .budget import Budget
from .closed_form import MAX_SPARSITY
from .layer_table import BITS, SPARSITIES
from .machine_table import MachineTable
from .options import UNSTRUCTURED
from .sensitivity import LayerError, WeightOf

__all__ = ["EFFORTS", "MEASURES", "Settings", "check_effort"]

MEASURES = ("logits", "loss")
WEIGHTS = ("repaired", "rounded")
BLOCKS = ("block16x64", "block32x64")  # what the kernels of the CPU skip
REPAIRED_PLANS, FEWEST_REPAIRED = 8, 3
REPAIR_WORK = 2.5e11  # multiply-accumulates of all images that repaired_plans are repaired with
NARROW = (7, 6)  # bits of an input with which some layers run in a faster form


@dataclass(frozen=True)
class _Search:
    """What an effort stands for.

    Attributes:
        rounds, trials, other_methods: as in :class:`Settings`, where they are not given.
        repaired_plans: the same; ``None``: by the work of a repair.
        gain: the share by which the least loss has to fall for the search to go on.
    """

    rounds: int
    trials: int
    repaired_plans: int | None
    other_methods: bool
    gain: float


_SEARCHES = {
    "low": _Search(rounds=1, trials=4, repaired_plans=0, other_methods=False, gain=0.1),
    "normal": _Search(rounds=4, trials=10, repaired_plans=None, other_methods=True, gain=0.02),
    "high": _Search(
        rounds=8, trials=16, repaired_plans=2 * REPAIRED_PLANS, other_methods=True, gain=0.0
    ),
}
EFFORTS = tuple(_SEARCHES)


def check_effort(effort: str) -> None:
    """Raise :class:`~adalayer_native.errors.PlanError` for an unknown one."""
    if effort not in EFFORTS:
        raise PlanError(f"unknown effort {effort!r}: expected one of {EFFORTS}")


RENAMED = {"finalists": "repaired_plans", "rivals": "other_methods"}


@renamed_fields(**RENAMED)
@dataclass
class Settings:
    """Options of method ``"optimal"``.

    Attributes:
        widths, sparsities: the options of every layer.
        patterns: where zeros may lie, ``"unstructured"`` among them; options of every layer, each
            with all sparsities but ``"2:4"``, which is half. Default: unstructured, and with a
            latency budget the blocks that the kernels skip (``"block16x64"``, ``"block32x64"``).
            Blocks lose more at the same sparsity, so that they only pay where time counts, or
            where a layer has so many weights per block to spare that it can do without the mask of
            single zeros.
        input_widths: bits that the input of a layer may have besides those of all layers
            (``activation_bits``), fewer than those. A value has one grid, so all layers that read
            it get the same. Offered where some of them then cost less of what is limited. Default:
            7 and 6 where the clock counts (a budget of latency or loss), else none.
        step: sparsities between the measured ones are offered in such steps, their errors
            interpolated in the logarithm; ``None`` offers the measured ones alone.
        measure: what the error table holds. ``"logits"``: loss increase to second order
            (:class:`~adalayer_native.allocation.sensitivity.LogitSensitivity`); ``"loss"``: the
            loss of the network with that layer alone compressed, several times slower. Default:
            the second with a ``loss_fn`` whose second derivative nobody knows, else the first. With
            such a loss ``"logits"`` takes half the squared change of what would be logits. A name
            in ``importance.CRITERIA``: that criterion, measured once per layer and scaled by the
            weight error (:meth:`~adalayer_native.importance.Criterion.error`). Or a function
            ``(layer, bits, sparsity) -> float``, which gets the pattern as a fourth argument
            wherever it is another than ``"unstructured"``.
        weight_of: which weight a layer has at some bits and sparsity; errors, and the plans that
            are tried, are of these weights. ``"repaired"``: what
            :class:`~adalayer_native.repair.LayerHessian` makes of it, as ``repair`` will;
            ``"rounded"``: magnitude pruning and rounding to nearest. Or a function ``(layer, bits,
            sparsity) -> weight``, the dequantized weight in the layer's own shape, or a pair of it
            and what is added to the bias; patterns as for ``measure``.
        repair: names ``measure`` and ``weight_of`` where they are functions, so that tables of
            different ones are kept apart; a table is not kept without it.
        interactions: whether to measure terms between the layers that lose most.
        effort: ``"low"``, ``"normal"`` or ``"high"``: how much is measured after the tables, where
            ``rounds``, ``trials``, ``repaired_plans`` and ``other_methods`` do not say it. Low
            compares a dozen plans of weights repaired layer by layer and repairs none whole; normal
            and high say below what they do. A search ends where its last round (of the local
            search), or its last two plans (of those that are repaired whole), lowered the least
            loss by less than 10, 2 or 0 percent.
        rounds, trials: of the local search; 0 rounds take the solver's plan as it is. Default: 4
            and 10; at low effort 1 and 4, at high effort 8 and 16.
        repaired_plans: so many plans are repaired whole, as ``repair`` does it, and compared on the
            images of the check (``repaired_plans.py``); 0 or 1: none. Only with repaired weights,
            and where the local search leaves a loss worth speaking of. Default: 8, down to 3 where
            a repair is much work (:meth:`repaired_plans_for`); 0 at low effort and 16 at high.
        other_methods: whether the best plans of methods ``"uniform"`` and ``"adalayer"``, as the
            tables predict them, are measured as well and taken where they lose less; for budgets
            that those methods take. Default: but at low effort.
        latency_batch: images per call for which latencies are measured.
        threads: threads per call; default: those of ``ops.get_num_threads()``.
        latency_table: a file of ``adalayer profile`` from the machine that the plan is for. Then
            latencies are that machine's, as predicted, and no engine is timed. Widths, sparsities,
            patterns, inputs, batch and threads that are not given are those of the file.
        directory: where tables are kept; default: the user's cache directory.
    """

    widths: Sequence[int] = BITS
    sparsities: Sequence[float] = SPARSITIES
    patterns: Sequence[str] | None = None
    input_widths: Sequence[int] | None = None
    step: float | None = 0.05
    measure: str | LayerError | None = None
    weight_of: str | WeightOf = "repaired"
    repair: str = ""
    interactions: bool = True
    effort: str = "normal"
    rounds: int | None = None
    trials: int | None = None
    repaired_plans: int | None = None
    other_methods: bool | None = None
    latency_batch: int = 1
    threads: int | None = None
    latency_table: str | os.PathLike[str] | None = None
    directory: str | os.PathLike[str] | None = None

    @classmethod
    def of(
        cls, options: Mapping[str, Any] | None, tables: str | os.PathLike[str] | None = None
    ) -> Settings:
        """Settings from a mapping, checked; ``tables`` is the directory.

        Raises:
            PlanError: an unknown option, a value out of range, or a latency table of another batch
                or other threads.
            FileFormatError: a latency table that cannot be used.
        """
        given = renamed_keys(options or {}, RENAMED)
        known = {entry.name for entry in fields(cls)} - {"directory"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise PlanError(f"unknown options {unknown}: expected some of {sorted(known)}")
        if given.get("latency_table") is not None:
            given = {**_of_table(MachineTable.load(given["latency_table"]), given), **given}
        found = cls(**given, directory=tables)
        found.check()
        return found

    def measure_for(self, loss_fn: LossFn | None) -> str | LayerError:
        """What the error table holds of a loss."""
        if self.measure is not None:
            return self.measure
        return "logits" if loss_fn is None or isinstance(loss_fn, TaskLoss) else "loss"

    def check(self) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` where a value is out of range."""
        check_effort(self.effort)
        if isinstance(self.measure, str) and self.measure not in (*MEASURES, *CRITERIA):
            raise PlanError(
                f"unknown measure {self.measure!r}: expected one of {MEASURES} or a criterion, "
                f"one of {sorted(CRITERIA)}"
            )
        if isinstance(self.weight_of, str) and self.weight_of not in WEIGHTS:
            raise PlanError(f"unknown weight_of {self.weight_of!r}: expected one of {WEIGHTS}")
        if not self.widths or not set(self.widths) <= set(BITS):
            raise PlanError(f"widths must be some of {BITS}, got {tuple(self.widths)}")
        if len(set(self.widths)) != len(self.widths):
            raise PlanError(f"widths must differ, got {tuple(self.widths)}")
        good = all(0 <= s <= MAX_SPARSITY for s in self.sparsities)
        if (
            not good
            or 0 not in self.sparsities
            or len(set(self.sparsities)) != len(self.sparsities)
        ):
            raise PlanError(
                f"sparsities must be different numbers from 0 to {MAX_SPARSITY} with 0 among "
                f"them, got {tuple(self.sparsities)}"
            )
        if self.patterns is not None and (
            isinstance(self.patterns, str)
            or not set(self.patterns) <= set(PATTERNS)
            or UNSTRUCTURED not in self.patterns
            or len(set(self.patterns)) != len(self.patterns)
        ):
            raise PlanError(
                f"patterns must be different ones of {PATTERNS} with {UNSTRUCTURED!r} among them, "
                f"got {self.patterns!r}"
            )
        if self.input_widths is not None and (
            not set(self.input_widths) <= set(BITS)
            or len(set(self.input_widths)) != len(self.input_widths)
        ):
            raise PlanError(
                f"input_widths must be different ones of {BITS}, got {self.input_widths!r}"
            )
        if self.step is not None and not 0.01 <= self.step <= 1:
            raise PlanError(f"step must be from 0.01 to 1 or None, got {self.step!r}")
        few = min(self.search_rounds, self.repaired_plans or 0) < 0
        if few or min(self.search_trials, self.latency_batch) < 1:
            raise PlanError(
                "rounds and repaired_plans must not be negative; trials and latency_batch at "
                "least 1"
            )

    @property
    def search_rounds(self) -> int:
        """Rounds of the local search."""
        return _SEARCHES[self.effort].rounds if self.rounds is None else self.rounds

    @property
    def search_trials(self) -> int:
        """Plans per round."""
        return _SEARCHES[self.effort].trials if self.trials is None else self.trials

    @property
    def compares_other_methods(self) -> bool:
        """Whether plans of other methods take part in the last comparison."""
        return (
            _SEARCHES[self.effort].other_methods
            if self.other_methods is None
            else self.other_methods
        )

    @property
    def gain(self) -> float:
        """The share by which the least loss has to fall for a search to go on."""
        return _SEARCHES[self.effort].gain

    def patterns_for(self, budget: Budget) -> tuple[str, ...]:
        """The patterns that are offered, the unstructured one first."""
        if self.patterns is None:
            return (UNSTRUCTURED, *BLOCKS) if budget.timed else (UNSTRUCTURED,)
        return (UNSTRUCTURED, *(p for p in self.patterns if p != UNSTRUCTURED))

    def input_widths_for(self, budget: Budget, usual: int) -> tuple[int, ...]:
        """Bits that are offered for inputs besides the ``usual`` ones, the most first.

        Raises:
            PlanError: some are not fewer.
        """
        if self.input_widths is None:
            return tuple(width for width in NARROW if width < usual) if budget.timed else ()
        if any(width >= usual for width in self.input_widths):
            raise PlanError(
                f"input_widths must be below activation_bits, {usual}, got "
                f"{tuple(self.input_widths)}"
            )
        return tuple(sorted(self.input_widths, reverse=True))

    def repaired_plans_for(self, work: float) -> int:
        """Plans that are repaired whole, where one repair looks at so many multiply-accumulates."""
        asked = (
            _SEARCHES[self.effort].repaired_plans
            if self.repaired_plans is None
            else self.repaired_plans
        )
        if asked is not None:
            return asked
        return max(FEWEST_REPAIRED, min(REPAIRED_PLANS, int(REPAIR_WORK / max(work, 1.0))))

    def sparsities_of(self, pattern: str) -> tuple[float, ...]:
        """The sparsities that a pattern is measured at, 0 among them."""
        return (0.0, 0.5) if pattern == "2:4" else tuple(self.sparsities)


def _of_table(table: MachineTable, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a latency table says where nothing is given."""
    fixed = {"latency_batch": table.batch, "threads": table.machine["threads"]}
    for name, value in fixed.items():
        if given.get(name, value) not in (value, None):
            raise PlanError(
                f"{table.source}: measured with {name} {value}, expected {given[name]} as in the "
                "options"
            )
    return {
        **fixed,
        "widths": table.widths,
        "sparsities": table.sparsities,
        "patterns": table.patterns,
        "input_widths": table.input_widths,
    }
