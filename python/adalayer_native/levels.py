"""Several widths of one network, whose weights are stored once.

The levels of a network are native models of the same layers, best first. Each reads some of the
bit-planes of one stored weight (:func:`adalayer_native.rounding.upper_planes`) and has scales,
biases and ranges of its own. They are repaired together, from the narrowest width to the widest:
few bits are what a network is most sensitive to, so these integers are chosen freely, as if there
were no others; every wider level then chooses the planes below, within what is chosen already, so
that its own output error becomes least. :func:`adalayer_native.compile` makes one engine of them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalayer_native import _C
from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import stage
from adalayer_native._stages import Stage
from adalayer_native.allocation import Budget, allocate, everywhere
from adalayer_native.allocation.float_work import planned_work, unsupported_work
from adalayer_native.allocation.optimal_settings import check_effort
from adalayer_native.capture.loading import captured_on, first_sample
from adalayer_native.capture.work import FloatWork, work_of
from adalayer_native.compress import LEARNING, learned_distance, stages_of
from adalayer_native.errors import PlanError
from adalayer_native.importance.outputs import LossFn, Pick
from adalayer_native.plan import Plan
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.quantization.file_contents import stored_model
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair import Repair
from adalayer_native.repair import repair as repair_layers
from adalayer_native.repair.cells import Cells, Nest, planes_for
from adalayer_native.rounding import Planes, conv_form

__all__ = ["MOST_LEVELS", "Levels", "check_plans", "compress_levels", "level_plans", "level_stages"]

MOST_LEVELS: int = _C.MOST_LEVELS


@dataclass
class Levels:
    """What :func:`compress_levels` gives.

    Attributes:
        models: native models, best first; float in and float out.
        plans: bits per layer of each.
        repairs: output errors of every layer, of each.
        float_work: everything with multiply-accumulates that stays float, with the reason.
    """

    models: list[nn.Module] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    float_work: FloatWork | None = None


def check_plans(plans: Sequence[Plan]) -> None:
    """Raise unless these can be levels of one network, best first.

    Raises:
        PlanError: fewer than two or too many; layers that not all of them quantize, that have more
            bits at a lower level, or are pruned.
    """
    if not 2 <= len(plans) <= MOST_LEVELS:
        raise PlanError(f"expected 2 to {MOST_LEVELS} levels, got {len(plans)}")
    above = _widths(plans[0])
    for number, plan in enumerate(plans):
        widths = _widths(plan)
        if list(widths) != list(above):
            raise PlanError(f"level {number} quantizes other layers than level 0")
        for name, bits in widths.items():
            if plan[name].sparsity:
                raise PlanError(f"level {number}, layer {name!r}: weights of levels are not pruned")
            if plan[name].group_size is not None:
                raise PlanError(f"level {number}, layer {name!r}: levels have no weight groups")
            if bits > above[name]:
                raise PlanError(
                    f"level {number}, layer {name!r}: expected at most the {above[name]} bits of "
                    f"the level before, got {bits}; levels go from the best to the smallest"
                )
        above = widths
    if any(a.average_bits <= b.average_bits for a, b in pairwise(plans)):
        raise PlanError(
            "expected fewer bits from level to level, got "
            + ", ".join(f"{plan.average_bits:.4g}" for plan in plans)
        )


def _widths(plan: Plan) -> dict[str, int]:
    """Bits of the layers that a plan quantizes."""
    return {name: layer.bits for name, layer in plan.layers.items() if layer.bits is not None}


def level_plans(
    model: nn.Module,
    calibration: Iterable[Any],
    bits: Sequence[float],
    *,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    effort: str = "normal",
    fixed: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Plan]:
    """Plans of falling average widths, that :func:`check_plans` takes.

    The first one, which is stored, has one width in all layers: its average, rounded up. The others
    are those of method ``"optimal"`` at their average, without pruning, with at most the bits of
    the level before in every layer.

    Args:
        bits: average bits per weight, best first.
        loss_fn, output, effort: as for :func:`adalayer_native.compress`.
        fixed, exclude: layers that have the same bits at all levels, and that stay float.
        work_dir: measurements are kept here.

    Raises:
        PlanError, BudgetError: averages that do not fall, or that no plan has.
    """
    if not 2 <= len(bits) <= MOST_LEVELS:
        raise PlanError(f"expected 2 to {MOST_LEVELS} levels, got {len(bits)}")
    if any(a <= b for a, b in pairwise(bits)) or bits[-1] < 2:
        raise PlanError(
            "levels go from the best to the smallest, of 8 to 2 bits: got "
            + ", ".join(f"{each:g}" for each in bits)
        )
    model = captured_on(model, calibration)
    plans = [everywhere(model, math.ceil(bits[0]), fixed=fixed, exclude=exclude)]
    tables = None if work_dir is None else Path(work_dir) / "tables"
    for average in bits[1:]:
        with stage(_search(average), enabled=progress):
            plan = allocate(
                None,
                Budget(bits=average),
                method="optimal",
                model=model,
                calibration=calibration,
                loss_fn=loss_fn,
                output=output,
                options={"sparsities": (0.0,), "effort": effort},
                fixed=fixed,
                exclude=exclude,
                tables=tables,
                progress=progress,
            )
        above = _widths(plans[-1])
        for name, width in _widths(plan).items():
            plan[name].bits = min(width, above.get(name, width))
        plans.append(plan)
    check_plans(plans)
    return plans


def compress_levels(
    model: nn.Module | torch.export.ExportedProgram,
    calibration: Iterable[Any],
    plans: Sequence[Plan | int],
    *,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    observer: str = "mse",
    effort: str = "normal",
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Levels:
    """Compress a float model to several widths that share their stored weights.

    Every level is calibrated and repaired, the narrowest first; what a level has settled binds
    those above it.

    Args:
        model: as for :func:`adalayer_native.compress`.
        calibration: as there; never test images.
        plans: best first; a whole number stands for so many bits in every layer. The first one's
            bits are stored.
        loss_fn, output, observer, effort, seed, progress: as there.
        work_dir: checkpoints of the repairs are kept here.

    What has multiply-accumulates and cannot be native is said in one warning, with its share.

    Raises:
        PlanError: see :func:`check_plans`.
        CalibrationError, UnsupportedModelError: as the steps do.
    """
    check_effort(effort)
    model = captured_on(model, calibration)
    wanted = [everywhere(model, plan) if isinstance(plan, int) else plan for plan in plans]
    check_plans(wanted)
    sample = first_sample(model, calibration)
    macs = work_of(model, sample)
    unsupported = unsupported_work(model, wanted[0], macs)
    if unsupported:
        warnings.warn(
            f"{100 * unsupported.share:.2g} % of the multiply-accumulates stay in float: "
            f"{unsupported}",
            stacklevel=2,
        )
    native = stored_model(model, wanted[0]).kept_float
    stored = {name: bits for name, bits in _widths(wanted[0]).items() if name not in native}
    found = Levels(plans=wanted, float_work=planned_work(model, wanted[0], macs))
    nests: dict[str, Nest] = {}
    lowest: dict[str, Planes] = {}
    for number in reversed(range(len(wanted))):
        plan = wanted[number]
        with stage(_title(number), enabled=progress):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which layers stay float was said
                prepared = prepare(model, plan)
            calibrate(prepared, calibration, observer=observer, progress=progress)
            layers = layers_of(prepared)
            floats = {
                name: conv_form(layers[name], layers[name].weight.detach()).clone()
                for name in stored
            }
            planes = {
                name: _planes(layers[name].bits, stored[name], below)
                for name, below in lowest.items()
            }
            cells: dict[str, Cells] = {name: nests[name].cells(planes[name]) for name in planes}
            checkpoint = None
            if work_dir is not None:
                key = fingerprint(prepared, {"seed": seed, "level": number})[:16]
                checkpoint = Path(work_dir) / f"level-{number}-{key}.safetensors"
            report = repair_layers(
                prepared,
                calibration,
                distance=learned_distance(prepared, sample, loss_fn, output),
                learning_passes=LEARNING[effort],
                # Factors between channels would be another weight at every level.
                equalize=False,
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
                cells=cells,
            )
            for name, bits in stored.items():
                layer = layers[name]
                if name in nests:
                    nests[name].settle(layer.integers(), planes[name])
                    continue
                scale = layer.weight_scale.clone()
                lowest[name] = planes_for(floats[name], scale, bits, layer.bits)
                nests[name] = Nest(bits, layer.integers(), scale, lowest[name])
        found.models.insert(0, convert(prepared))
        found.repairs.insert(0, report)
    return found


def level_stages(
    model: nn.Module, calibration: Iterable[Any], bits: Sequence[float], effort: str = "normal"
) -> list[Stage]:
    """The stages of :func:`level_plans` and :func:`compress_levels`, as
    :func:`~adalayer_native.compress.stages_of` gives those of a compression."""
    one = stages_of(
        model,
        calibration,
        method="optimal",
        repair=True,
        train_loader=None,
        epochs=0,
        effort=effort,
    )
    search, ranges, repair = one
    found = [Stage(_search(average), *search[1:]) for average in bits[1:]]
    both = ranges.work + repair.work, ranges.bars + repair.bars
    return found + [Stage(_title(number), *both) for number in reversed(range(len(bits)))]


def _search(average: float) -> str:
    return f"search for a plan of {average:g} bits"


def _title(number: int) -> str:
    return f"ranges and repair of level {number}"


def _planes(bits: int, stored: int, below: Planes) -> Planes:
    """The planes of a level above the narrowest one: the same top one, and more below."""
    return Planes(bits, min(stored - bits, max(0, below.drop - (bits - below.bits))))
