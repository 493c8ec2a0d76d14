"""The main job in one call: analyze, allocate, prepare, calibrate, repair, finetune, convert."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._deprecated import renamed_fields
from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import stage
from adalayer_native._stages import Stage, job
from adalayer_native.allocation import (
    Budget,
    allocate,
    check_method,
    check_request,
    everywhere,
)
from adalayer_native.allocation.float_work import planned_work, unsupported_work
from adalayer_native.allocation.methods import method_of
from adalayer_native.allocation.optimal_settings import check_effort
from adalayer_native.capture import GraphModel, Inputs, captured
from adalayer_native.capture.example import guessed_example
from adalayer_native.capture.loading import captured_on, first_sample
from adalayer_native.capture.work import FloatWork, Work, work_of
from adalayer_native.data import distilled
from adalayer_native.errors import CalibrationError, PlanError, UnsupportedModelError
from adalayer_native.importance import LayerScores, analyze
from adalayer_native.importance.batches import warn_of_first_guess
from adalayer_native.importance.calibration import check_calibration
from adalayer_native.importance.outputs import LossFn, Pick, distance, has_distance, picked
from adalayer_native.importance.task_loss import TaskLoss
from adalayer_native.plan import MAX_BITS, Plan, supported_layers
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.quantization.file_contents import stored_model
from adalayer_native.repair import Distance, Repair
from adalayer_native.repair import repair as repair_layers
from adalayer_native.tensor_train import Decomposed, tensor_train
from adalayer_native.training import check_learned, finetune

__all__ = ["Compressed", "compress", "stages_of"]


@renamed_fields(float_rest="float_work")
@dataclass
class Compressed:
    """Result of :func:`compress`.

    Attributes:
        model: the native model, float in and float out.
        plan: bits and sparsity per layer.
        scores: A, F, R, I per layer (None for methods that do not look at them).
        kept_float: layers that stay float because no native layer covers them, with the reason.
        history: of the fine-tuning; None without.
        repair: output error of every layer before and after the repair; None without.
        float_work: everything with multiply-accumulates that stays float, layers that the plan
            keeps so included, with the reason and the share of them.
        lower: models and plans of the levels of quality below ``model``, better ones first; of
            :func:`~adalayer_native.compress_levels` alone.
        decomposed: the float model with its tensor trains, of method ``"tensor_train"``; it is what
            :func:`~adalayer_native.restore` takes to read the saved file.
    """

    model: nn.Module
    plan: Plan
    scores: LayerScores | None = None
    kept_float: dict[str, str] = field(default_factory=dict)
    history: Any = None
    repair: Repair | None = None
    float_work: FloatWork | None = None
    decomposed: Decomposed | None = None
    lower: list[tuple[nn.Module, Plan]] = field(default_factory=list)


def compress(
    model: nn.Module | torch.export.ExportedProgram,
    calibration: Iterable[Any] | None,
    budget: Budget | int | None,
    *,
    example_inputs: Any = None,
    method: str = "adalayer",
    plan: Plan | None = None,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    strict: bool = False,
    train_loader: Iterable[Any] | None = None,
    epochs: int = 2,
    allocate: str | None = None,
    distill: bool = True,
    repair: bool = True,
    observer: str = "mse",
    effort: str = "normal",
    work_dir: str | os.PathLike[str] | None = None,
    allocate_options: Mapping[str, Any] | None = None,
    finetune_options: Mapping[str, Any] | None = None,
    criterion: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Compresses a float model to native layers under a budget.

    What has multiply-accumulates and cannot be native is said in one warning, with its share.

    Args:
        model: float model, an exported program, or what :func:`~adalayer_native.capture` made of
            one; not changed. It is captured with the first calibration batch as its example.
        calibration: batches, read several times: tensors, tuples (inputs, then labels) or
            dictionaries of arguments, with ``labels`` among them or without. Layer scores, plan
            search and activation ranges come from them. Never test images. ``None`` takes
            pictures that are distilled from the model's batch norms
            (:func:`adalayer_native.data.distilled`), with a warning: real ones are better.
        budget: limit on the saved file or on the bits per weight; method ``"optimal"`` takes
            several at once, on latency, bit operations and energy, too. A whole number from 2 to 8
            is no limit but the plan: so many bits in every layer that can be quantized, nothing
            pruned.
        example_inputs: one input ``[N, C, H, W]``, without calibration data; not needed where its
            shape can be guessed.
        method: see :func:`adalayer_native.allocate`; or ``"tensor_train"``, which first replaces
            layers by :func:`~adalayer_native.tensor_train` and goes on with ``"optimal"``. Its
            options are in ``allocate_options["options"]`` with those of ``"optimal"``: ``error``
            or ``rank``, ``layers``, ``clock``. A budget in ``size`` is of the model before.
        plan: use this plan instead of analyzing and allocating.
        loss_fn: ``loss_fn(output, target)``, a scalar or one value per sample, by which plans are
            judged and the model is fine-tuned; or a :class:`~adalayer_native.TaskLoss`, which says
            what every output is and needs no labels, and by which the repair learns, too. Default:
            how far every output is from the float model's
            (:mod:`~adalayer_native.importance.outputs`), and for scores and fine-tuning
            cross-entropy where there are labels.
        output: which of the model's outputs counts, a key, an index or a path (``"heads.0"``).
        strict: make it an error that anything with multiply-accumulates stays float.
        train_loader: batches for fine-tuning, as for calibration; without it there is none.
        epochs: of fine-tuning, eq. (5).
        allocate: ``"learned"``: no method is asked; bits and zeros are learned while fine-tuning
            (:func:`~adalayer_native.training.finetune`), within ``budget``, beginning with ``plan``
            or 8 bits everywhere. Nothing is repaired.
        distill: the float model teaches while fine-tuning.
        repair: round and prune by the error of the layers' outputs
            (:func:`adalayer_native.repair`) instead of weight by weight. Fine-tuning, if there is
            any, starts from the repaired weights and keeps their masks; without the repair it
            prunes gradually.
        observer: "mse", "percentile" or "minmax".
        effort: ``"low"``, ``"normal"`` or ``"high"``: passes of learning at the end of the repair
            (0, 3, 6; kept if samples held back confirm them), and how much method ``"optimal"``
            measures before it takes a plan (:class:`~adalayer_native.allocation.Settings`).
        work_dir: measurements and the checkpoints of repair and fine-tuning are kept here;
            calling again with the same arguments after an interruption goes on where it stopped.
            Each of them is keyed by what it depends on, so that other arguments never reuse what
            does not fit.
        allocate_options, finetune_options: further arguments of the two steps.
        criterion: a name in ``importance.CRITERIA``: what A of eq. (1) is, and for method
            ``"optimal"`` what its error table is made from.
        seed: of the repair and the fine-tuning.

    Raises:
        BudgetError, CalibrationError, UnsupportedModelError, PlanError: as the steps do.
        PlanError: an unknown effort; ``allocate="learned"`` without training.
        UnsupportedModelError: ``strict``, and something stays float; before the work where it is
            known by then.
    """
    check_effort(effort)
    asked = dict(allocate_options or {})
    if calibration is None:
        calibration = _without_data(model, example_inputs, seed, progress)
    decomposed = None
    if method == TENSOR_TRAIN:
        if plan is not None:
            raise PlanError(f"a plan names layers as they are: method {method!r} takes none")
        decomposed, budget, asked = _decomposed(model, calibration, budget, asked, progress)
        model, method = decomposed.model, "optimal"
    learned = None
    if allocate is not None:
        model = captured_on(model, calibration)
        learned = _learned(model, allocate, budget, plan, train_loader, epochs, asked)
        plan, budget, repair = learned.start, None, False
    if isinstance(budget, int):
        model = captured_on(model, calibration)
        plan, budget = _everywhere(model, plan, budget, asked), None
    if plan is None:
        agreed = {key: asked.get(key) for key in ("bits", "stages", "options")}
        check_method(method, budget, criterion=criterion, **agreed)
    model = captured_on(model, calibration)
    check_calibration(model, calibration, output, labels=loss_fn is None)
    sample = first_sample(model, calibration)
    if loss_fn is None and plan is not None and repair:  # a search says so itself
        warn_of_first_guess(model, calibration, output)
    macs = work_of(model, sample)
    _check_float(model, plan, macs, strict)
    steps = _Steps(
        model, calibration, loss_fn, output, criterion, effort, repair,
        None if work_dir is None else Path(work_dir), seed, progress,
    )  # fmt: skip
    if plan is None:  # what can be said now is not said after an analysis of an hour
        check_request(model, budget, method=method, **{k: asked[k] for k in EARLY if k in asked})
    ahead = stages_of(
        model, calibration, method=None if plan is not None else method, repair=repair,
        train_loader=train_loader, epochs=epochs, effort=effort,
    )  # fmt: skip
    scores, report, history = None, None, None
    with job(ahead):
        if plan is None:
            scores, plan = steps.search(method, budget, asked)
        in_float = planned_work(model, plan, macs)
        if strict:
            _refuse(in_float)
        prepared = steps.prepared(plan, observer)
        if repair:
            report = steps.repaired(prepared, sample)
        if train_loader is not None and epochs > 0:
            teacher = model if distill or learned is not None else None
            options = _training_options(learned, distill, finetune_options)
            history = steps.finetuned(prepared, plan, train_loader, epochs, teacher, options)
            plan = history.plan or plan
    kept = kept_float(model, plan)
    return Compressed(convert(prepared), plan, scores, kept, history, report, in_float, decomposed)


@dataclass
class _Steps:
    """The steps of one call of :func:`compress`; attributes are its arguments."""

    model: GraphModel
    calibration: Iterable[Any]
    loss_fn: LossFn | None
    output: Pick
    criterion: str | None
    effort: str
    repair: bool
    work: Path | None
    seed: int
    progress: bool

    def inside(self, name: str) -> Path | None:
        """A file of the work directory, if there is one."""
        return None if self.work is None else self.work / name

    def search(
        self, method: str, budget: Budget | None, asked: dict[str, Any]
    ) -> tuple[LayerScores | None, Plan]:
        """Scores, where the method looks at some, and the plan."""
        scores = None
        if method_of(method).scores:
            with stage(SCORES, enabled=self.progress):
                scores = analyze(
                    self.model,
                    self.calibration,
                    self.loss_fn,
                    output=self.output,
                    criterion=self.criterion,
                    cache=self.inside("analysis.json"),
                    progress=self.progress,
                )
        if method == "optimal":
            if self.work is not None:
                asked.setdefault("tables", self.inside("tables"))
            own: dict[str, Any] = {} if self.criterion is None else {"measure": self.criterion}
            if not self.repair:  # tables of weights that there will not be would mislead
                own["weight_of"] = "rounded"
            own["effort"] = self.effort
            asked["options"] = {**own, **(asked.get("options") or {})}
        with stage(SEARCH, enabled=self.progress):
            plan = allocate(
                scores,
                budget,
                method=method,
                model=self.model,
                calibration=self.calibration,
                cache=self.inside("search.json"),
                progress=self.progress,
                **{"loss_fn": self.loss_fn, "output": self.output, **asked},
            )
        return scores, plan

    def prepared(self, plan: Plan, observer: str) -> GraphModel:
        """The simulated model with ranges."""
        with stage(RANGES, enabled=self.progress):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which layers stay float was said
                prepared = prepare(self.model, plan)
            calibrate(prepared, self.calibration, observer=observer, progress=self.progress)
        return prepared

    def repaired(self, prepared: GraphModel, sample: Inputs) -> Repair:
        """Repair it in place."""
        checkpoint = None
        if self.work is not None:
            # Calibrated ranges are in it, and with them the data.
            name = f"repair-{fingerprint(prepared, {'seed': self.seed})[:16]}.safetensors"
            checkpoint = self.work / name
        learned = learned_distance(prepared, sample, self.loss_fn, self.output)
        with stage(REPAIR, enabled=self.progress):
            return repair_layers(
                prepared,
                self.calibration,
                distance=learned,
                learning_passes=LEARNING[self.effort],
                seed=self.seed,
                checkpoint=checkpoint,
                progress=self.progress,
            )

    def finetuned(
        self,
        prepared: GraphModel,
        plan: Plan,
        loader: Iterable[Any],
        epochs: int,
        teacher: nn.Module | None,
        options: Mapping[str, Any],
    ) -> Any:
        """Train it; the history."""
        with stage(TRAINING, enabled=self.progress):
            return finetune(
                prepared,
                loader,
                epochs,
                # I as eq. (1) gives it with the plan's own alpha and beta. Without scores the norm
                # term of eq. (5) is off: nothing says which layers it should shrink.
                scores=importance_of(plan),
                teacher=teacher,
                checkpoint=self.inside("finetune.safetensors"),
                seed=self.seed,
                progress=self.progress,
                **{"loss_fn": self.loss_fn, "output": self.output, **options},
            )


def _everywhere(model: GraphModel, plan: Plan | None, bits: int, asked: dict[str, Any]) -> Plan:
    """So many bits in every layer."""
    if plan is not None:
        raise PlanError(f"give a plan, or bits of all layers ({bits!r}), not both")
    other = sorted(set(asked) - {"activation_bits", "fixed", "exclude"})
    if other:
        raise PlanError(f"{bits} bits everywhere need no search: got options {other} of one")
    return everywhere(model, bits, **asked)


@dataclass
class _Learned:
    """Where widths that are learned begin, and what the fine-tuning is told of them."""

    start: Plan
    options: dict[str, Any]


def _learned(
    model: GraphModel,
    allocate: str,
    budget: Budget | int | None,
    plan: Plan | None,
    loader: Iterable[Any] | None,
    epochs: int,
    asked: dict[str, Any],
) -> _Learned:
    """What ``allocate="learned"`` stands for, checked before anything is done."""
    if isinstance(budget, int):
        budget = Budget(bits=budget)
    if loader is None or epochs < 1:
        raise PlanError("compress: allocate='learned' needs a train_loader and at least one epoch")
    check_learned(allocate, budget, model)
    known = {k: asked[k] for k in ("activation_bits", "fixed", "exclude") if k in asked}
    others = sorted(set(asked) - {*known, "options"})
    if others:
        raise PlanError(f"allocate='learned' asks no method: got options {others} of one")
    # No plan is small enough: said now, in the words of the method with the same options.
    options = dict(asked.get("options") or {})
    table = {k: v for k, v in options.items() if k == "latency_table"}
    check_request(model, budget, method="optimal", options=table or None, **known)
    start = everywhere(model, MAX_BITS, **known) if plan is None else plan
    fixed = [name for name in asked.get("fixed") or {} if start[name].bits is not None]
    return _Learned(
        start,
        {
            "allocate": allocate,
            "budget": budget,
            "allocate_options": {**({"fixed": fixed} if fixed else {}), **options},
        },
    )


def _training_options(
    learned: _Learned | None, distill: bool, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the fine-tuning is told; a teacher may only be there to say what the file holds."""
    options = {} if distill else {"distill_weight": 0.0}
    return {**options, **({} if learned is None else learned.options), **(given or {})}


def _check_float(model: GraphModel, plan: Plan | None, macs: list[Work], strict: bool) -> None:
    """Warn of what stays in float, or refuse it."""
    in_float = unsupported_work(model, plan, macs)
    if strict:
        _refuse(in_float if plan is None else planned_work(model, plan, macs))
    elif in_float:
        warnings.warn(
            f"{100 * in_float.share:.2g} % of the multiply-accumulates stay in float: {in_float}",
            stacklevel=3,
        )


def _without_data(model: Any, example: Any, seed: int, progress: bool) -> list[Tensor]:
    """Pictures out of nothing but the model."""
    front = captured(model, example=example)
    inputs = (guessed_example(front) if example is None else Inputs.of(example)).tensors()
    if len(inputs) != 1:
        raise CalibrationError(
            f"without calibration data a model of one input is needed, got {len(inputs)}"
        )
    warnings.warn(
        "no calibration data: pictures are distilled from the batch norms' statistics; real ones "
        "are better, even a few",
        stacklevel=3,
    )
    return distilled(front, inputs[0], seed=seed, progress=progress)


EARLY = ("bits", "stages", "activation_bits", "fixed", "exclude", "options")  # known at once
TENSOR_TRAIN = "tensor_train"


def _decomposed(
    model: Any,
    calibration: Iterable[Any],
    budget: Budget | int | None,
    asked: dict[str, Any],
    progress: bool,
) -> tuple[Decomposed, Budget | int | None, dict[str, Any]]:
    """The model in tensor trains, the budget of it, and the options that are left."""
    options = dict(asked.get("options") or {})
    own = {k: options.pop(k) for k in ("error", "rank", "layers", "clock") if k in options}
    found = tensor_train(model, calibration, progress=progress, **own)
    if isinstance(budget, Budget) and budget.size is not None:
        budget = replace(budget, size=None, bytes=budget.limit_bytes(found.float_bytes))
    left = {key: value for key, value in asked.items() if key != "options"}
    return found, budget, {**left, "options": options} if options else left


LEARNING = {"low": 0, "normal": 3, "high": 6}  # passes by effort
SCORES, SEARCH = "importance of the layers", "search for a plan"
RANGES, REPAIR, TRAINING = "ranges of the activations", "repair", "fine-tuning"


def stages_of(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    method: str | None,
    repair: bool,
    train_loader: Iterable[Any] | None,
    epochs: int,
    effort: str = "normal",
) -> list[Stage]:
    """The stages of :func:`compress`, with their work in batches that go through the network.

    Only for an estimate of the time, which every finished stage corrects: what a stage does beside
    that (weights are rounded, options are solved for) is counted as batches, too.

    Args:
        method: ``None`` where there is a plan.
    """
    layers, batches = len(supported_layers(model)), _length(calibration)
    found = []
    if method is not None and method_of(method).scores:
        found.append(Stage(SCORES, layers * batches))
    repairing = layers * (4 + batches)
    if method is not None:
        plans = {"adalayer": 44, "uniform": 7, "rl": 300, "optimal": 50}.get(method, 1)
        trials, bars = 2 * plans * batches, 1  # each of them quantized anew
        if method == "optimal":  # a table of all options, and a few plans repaired on half of it
            wholes = 0 if effort == "low" else 4
            trials, bars = trials + 20 * layers + wholes * repairing, 4 if wholes else 3
        found.append(Stage(SEARCH, trials, bars))
    found.append(Stage(RANGES, 3 * batches))
    if repair:
        # Learning: forward and back, and the float model.
        learning = 4 * LEARNING[effort] * batches
        found.append(Stage(REPAIR, repairing + learning, 3 if learning else 2))
    if train_loader is not None and epochs > 0:
        # Forwards and back, the teacher, and the average's batch norms in the end.
        found.append(Stage(TRAINING, 6 * epochs * _length(train_loader), epochs))
    return found


def learned_distance(
    prepared: nn.Module, sample: Inputs, loss_fn: LossFn | None, output: Pick
) -> Distance | None:
    """By what the repair learns at its end; None where no distance of the outputs is known."""
    if isinstance(loss_fn, TaskLoss):
        return partial(_task_distance, loss_fn, output)
    with torch.no_grad():
        known = has_distance(sample(prepared), output)
    return partial(distance, pick=output) if known else None


def _task_distance(loss: TaskLoss, pick: Pick, float_output: Any, output: Any) -> torch.Tensor:
    return loss(picked(output, pick), picked(float_output, pick)).mean()


def _length(loader: Iterable[Any]) -> int:
    return len(loader) if isinstance(loader, Sized) else 1


def _refuse(rest: FloatWork) -> None:
    if rest:
        raise UnsupportedModelError(
            f"strict: {100 * rest.share:.2g} % of the multiply-accumulates would stay in float: "
            f"{rest}"
        )


def kept_float(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Layers that no plan could make native, with the reason; planned as float or not."""
    wanted = {name: replace(layer, bits=layer.bits or 8) for name, layer in plan.layers.items()}
    return stored_model(model, Plan(wanted)).kept_float


def importance_of(plan: Plan) -> dict[str, float] | None:
    """I per layer where the plan knows it, else ``None``."""
    known = {name: s["I"] for name, s in (plan.scores or {}).items() if "I" in s}
    return known or None
