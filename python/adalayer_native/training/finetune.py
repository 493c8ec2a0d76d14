"""Fine-tuning of a prepared model: eq. (5), distillation, learned scales, gradual compression."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.allocation import Budget
from adalayer_native.capture import Inputs
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.importance.batches import tokens_of
from adalayer_native.importance.outputs import LossFn, Pick, has_logits, logits_of, loss_key
from adalayer_native.quantization.calibrate import batch_norms, reestimate_batch_norms
from adalayer_native.quantization.fold import check_calibrated
from adalayer_native.quantization.graph import layers_of, metadata
from adalayer_native.quantization.lsq import StepSize
from adalayer_native.training.batches import NORM_BATCHES, as_float, split_batch
from adalayer_native.training.dynamic import DynamicSchedule, DynamicWidths
from adalayer_native.training.learned import LearnedWidths, check_learned
from adalayer_native.training.learned_settings import LearnedSettings
from adalayer_native.training.loop import History, Loop, LoopOptions, bf16_helps, check_range
from adalayer_native.training.losses import data_loss
from adalayer_native.training.offer import Offer
from adalayer_native.training.scales import (
    apply_scales,
    clip_scale_gradients,
    learn_scales,
    release_scales,
    step_sizes,
)
from adalayer_native.training.schedule import CompressionSchedule
from adalayer_native.training.watch import Watch
from adalayer_native.training.widths import WidthSchedule

__all__ = ["finetune"]


@dataclass
class _Options(LoopOptions):
    eta: float
    activation_l2: float
    distill_weight: float
    temperature: float
    learn_scales: bool
    gradual: bool
    ramp: float
    extra_bits: int
    freeze_norms: float
    reestimate_norms: bool

    def check(self, caller: str) -> None:
        super().check(caller)
        check_range(caller, "eta", self.eta, 0.0, 1e6)
        check_range(caller, "activation_l2", self.activation_l2, 0.0, 1e6)
        check_range(caller, "distill_weight", self.distill_weight, 0.0, 1.0)
        check_range(caller, "temperature", self.temperature, 1e-3, 1e3)
        check_range(caller, "ramp", self.ramp, 0.0, 1.0)
        check_range(caller, "extra_bits", self.extra_bits, 0, 6)
        check_range(caller, "freeze_norms", self.freeze_norms, 0.0, 1.0)


def finetune(
    prepared: nn.Module,
    train_loader: Iterable[Any],
    epochs: int = 2,
    *,
    loss_fn: LossFn | None = None,
    output: Pick = None,
    lr: float = 0.01,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    eta: float = 1e-4,
    activation_l2: float = 0.0,
    scores: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.7,
    temperature: float = 2.0,
    learn_scales: bool = True,
    gradual: bool = True,
    ramp: float = 0.5,
    extra_bits: int = 0,
    widths: Sequence[int] | DynamicWidths | None = None,
    allocate: str | None = None,
    budget: Budget | None = None,
    allocate_options: Mapping[str, Any] | None = None,
    ema: float = 0.999,
    freeze_norms: float = 0.0,
    reestimate_norms: bool = True,
    amp: bool | str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    max_minutes: float | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> History:
    """Train the float weights behind the quantized ones, and the scales of all grids.

    Loss, eq. (5): ``CE + eta * sum_l (1 - I_l) * mean|W_opt,l|``, the sum only with ``scores``.
    With a teacher the data term is ``(1 - d) * CE + d * T^2 * KL(teacher || student)``, both
    softened by ``T``; without labels it is the KL term alone. Outputs that are no logits
    (:mod:`~adalayer_native.importance.outputs`) are taught by their relative squared error, and
    labels that no single output of logits fits are left aside. The learning rate rises over the
    first 3 % of the steps and then follows a half cosine to 0.

    Scales start as calibrated or repaired and are learned (LSQ, Esser et al. 2020): one per output
    channel of a weight, one per activation; zero points stay. Masks of :func:`prepare` grow from
    nothing to the plan's sparsity (Zhu and Gupta 2017), chosen by magnitude again and again over
    the first ``ramp`` of the run; pruned weights go on training meanwhile and may come back. A
    repaired model keeps its masks. Whatever happens, the model ends at exactly the plan's bits and
    sparsity. From there on the parameters are averaged, and the average is the result.

    Batch norms train with the statistics of the batch. Their scale and shift are per channel, as
    the weights' scales are, so folding them changes no integer; what they need is statistics that
    fit the result: taken anew from up to 50 training batches at the end.

    A run is deterministic for a seed, a thread count and a loader that is (the global generator
    is seeded per epoch and restored afterwards; ``set_epoch(epoch)`` or
    ``sampler.set_epoch(epoch)`` is called where it exists, and once more for the batch norms).
    With ``checkpoint`` the state is written after every epoch, about every minute and on Ctrl-C;
    calling again with the same arguments continues at the same step.

    Args:
        prepared: from :func:`prepare`, calibrated, repaired or not; trained in place, left in
            evaluation mode.
        train_loader: re-iterable of batches as for :func:`calibrate`, with labels, or of inputs
            alone with a ``teacher``.
        epochs: passes over the loader.
        loss_fn: ``loss_fn(output, labels) -> loss`` in place of CE, and without labels
            ``loss_fn(output, teacher's output)`` in place of KL.
        output: which of the model's outputs counts, a key, an index or a path; default: all of
            floating point.
        lr: peak learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of float layers' weights; quantized weights, biases and batch norms have none
            (a decaying weight on a grid only drifts off its level).
        eta: weight of the norm term.
        activation_l2: weight of ``mean_l mean(a_l^2)``, ``a_l`` what enters the quantized layer l:
            it keeps the range of activations small, so that few bits hold them (Zhu, Zhou and Li,
            "Adaptive layerwise quantization for deep neural network compression", ICME 2018). 0:
            off.
        scores: importance ``I`` per layer name: a number, or a mapping with the key ``"I"``.
        teacher: float model, captured or not; used in evaluation mode, unchanged.
        distill_weight: ``d``, 0 to 1.
        temperature: ``T``, positive.
        learn_scales: false recomputes weight scales at the start of every epoch and keeps the
            ranges of activations as calibrated.
        gradual: false keeps the masks from the start.
        ramp: share of the run in which sparsity and bits go to the plan's; 0 starts there.
        extra_bits: bits of every weight above the plan's at the start (8 at most in all), taken
            away one by one.
        widths: bits of all weights and activations over time, each for an equal share of the run;
            the last must be the plan's in every layer. Not together with ``extra_bits``. Ranges
            are best calibrated for the fewest, see :func:`narrow_for_ranges`. Or
            :class:`~adalayer_native.training.DynamicWidths`: bits of every layer follow its
            gradients, those of its input its entropy, between two bounds of which the plan has the
            lower one everywhere; what they end at is ``History.plan``, how they got there
            ``widths``, ``input_widths``, ``snr_db`` and ``entropy`` of its epochs.
        allocate: ``"learned"``: bits and zeros of every layer, and bits of inputs where the budget
            counts them, are learned together with the weights
            (:mod:`~adalayer_native.training.learned`), beginning with those that the model was
            prepared by, and whole halfway through the run, within ``budget`` as the file is saved.
            ``teacher`` must be the float model that was prepared, and the loader have a length.
            The plan is ``History.plan``; nothing else may change bits and masks meanwhile.
        budget: of ``allocate``: one or several limits; a latency is that of the measured table.
        allocate_options: fields of
            :class:`~adalayer_native.training.learned_settings.LearnedSettings`.
        ema: largest decay per step of the moving average, which spans about a tenth of the steps;
            0 takes the last parameters.
        freeze_norms: share of the run, at its end, in which batch norms use their running
            statistics.
        reestimate_norms: take batch norm statistics anew at the end. (Not possible with a loader
            that can be read only once.)
        amp: ``True``, ``False`` or ``"auto"`` (bfloat16 autocast where :func:`bf16_helps`).
            Calibration and evaluation are never autocast: bfloat16 does not hold the exact grid.
        checkpoint: file to write; see above.
        resume: continue from ``checkpoint`` if it belongs to this run, else start anew.
        seed: of the random numbers of the run.
        max_minutes: time limit over all starts of the run; all schedules run towards it too.
            (Such a run depends on the machine's speed.)
        watch: looks on, and may pause or end the run.
        progress: show a progress bar.

    Returns:
        The run's :class:`History`.

    Raises:
        CalibrationError: not calibrated, empty loader, NaN or infinite inputs or loss.
        PlanError: an argument out of range, or scores for unknown layers; with ``allocate`` zeros
            in blocks, another model as teacher, or a loader without a length.
        BudgetError: ``allocate`` without a budget, or with one that no widths meet; names the limit
            that binds and the smallest value that can be reached.
        FileFormatError: the checkpoint is corrupt.
        KeyboardInterrupt: Ctrl-C, after the running step and the checkpoint.
        Paused: ``watch`` said so, likewise.
    """
    metadata(prepared, "layers")
    check_calibrated(prepared)
    options = _Options(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        ema=ema,
        seed=seed,
        amp=bf16_helps() if amp == "auto" else bool(amp),
        eta=eta if scores is not None else 0.0,
        activation_l2=activation_l2,
        distill_weight=distill_weight if teacher is not None else 0.0,
        temperature=temperature,
        learn_scales=learn_scales,
        gradual=gradual,
        ramp=ramp,
        extra_bits=extra_bits,
        freeze_norms=freeze_norms,
        reestimate_norms=reestimate_norms,
    )
    options.check("finetune")
    check_learned(allocate, budget, teacher, allocate_options)
    if max_minutes is not None:
        check_range("finetune", "max_minutes", max_minutes, 0.0, math.inf)
    schedules = _schedules(prepared, widths, options)
    penalties = _penalties(prepared, scores)
    learned = None
    if budget is not None and teacher is not None:
        if widths is not None or extra_bits:
            raise PlanError("finetune: with allocate='learned' widths and extra_bits say nothing")
        options.gradual = False  # its zeros come by themselves
        settings = LearnedSettings.of(allocate_options)
        learned = _learned(prepared, teacher, budget, settings, train_loader, progress)
    moving, aim = (*schedules, learned), (loss_fn, output)
    run = _Finetuning(prepared, train_loader, options, penalties, teacher, moving, aim)
    history = run.execute(checkpoint, resume, max_minutes, progress, watch)
    for each in (schedules[1], learned):
        if each is not None:
            history.plan = each.plan()
    return history


def _schedules(
    prepared: nn.Module, widths: Sequence[int] | DynamicWidths | None, options: _Options
) -> tuple[WidthSchedule, DynamicSchedule | None]:
    """What ``widths`` stands for."""
    if widths is not None and options.extra_bits:
        raise PlanError("finetune: widths and extra_bits both say how the bits change; give one")
    if not isinstance(widths, DynamicWidths):
        return WidthSchedule(prepared, widths), None
    if options.optimizer == "sgd" and options.momentum == 0.0:
        raise PlanError("finetune: dynamic widths are told by the optimizer's momentum, got 0")
    return WidthSchedule(prepared, None), DynamicSchedule(prepared, widths)


def _learned(
    prepared: nn.Module,
    teacher: nn.Module,
    budget: Budget,
    settings: LearnedSettings,
    loader: Iterable[Any],
    progress: bool,
) -> LearnedWidths:
    if not isinstance(loader, Sized):
        raise PlanError(
            "finetune: allocate='learned' needs a loader with a length, since its limits fall over "
            f"the steps of the run; got {type(loader).__name__}"
        )

    def sample() -> Inputs:
        with torch.random.fork_rng(devices=[]):
            return split_batch(prepared, next(iter(loader)))[0]

    offer = Offer(prepared, teacher, budget, settings, sample, progress=progress)
    return LearnedWidths(prepared, offer, loader)


def _penalties(prepared: nn.Module, scores: Mapping[str, Any] | None) -> dict[str, float]:
    """``1 - I`` of every quantized layer that has a score."""
    if scores is None:
        return {}
    layers = layers_of(prepared)
    found: dict[str, float] = {}
    known = set(dict(prepared.named_modules()))
    for name, value in scores.items():
        importance = float(value["I"] if isinstance(value, Mapping) else value)
        if not math.isfinite(importance):
            raise PlanError(f"importance of layer {name!r} is {importance}; expected a number")
        if name not in known:
            raise PlanError(f"scores name the layer {name!r}, which the model does not have")
        if name in layers:
            found[name] = 1.0 - importance
    return found


class _Finetuning(Loop):
    options: _Options

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        options: _Options,
        penalties: dict[str, float],
        teacher: nn.Module | None,
        moving: tuple[WidthSchedule, DynamicSchedule | None, LearnedWidths | None],
        aim: tuple[LossFn | None, Pick],
    ) -> None:
        self.widths, self.dynamic, self.learned = moving
        identity: dict[str, Any] = {
            "penalties": penalties,
            "teacher": teacher is not None,
            "layers": metadata(model, "layers"),
        }
        if self.widths.widths:
            identity["widths"] = self.widths.widths
        if self.dynamic is not None:
            identity["dynamic"] = self.dynamic.key
        if self.learned is not None:
            offer = self.learned.offer
            identity["learned"] = [offer.budget.given, offer.settings.key()]
        self.loss_fn, self.pick = aim
        if self.loss_fn is not None:
            identity["loss"] = loss_key(self.loss_fn)
        if self.pick is not None:
            identity["output"] = self.pick
        self.tokens: frozenset[int] = frozenset()
        super().__init__(model, loader, options, identity)
        self.layers = layers_of(model)
        self.penalties = penalties
        self.energies: list[Tensor] = []  # mean squares of what entered the layers in this step
        self.norms = list(batch_norms(model).values())
        self.scales: list[StepSize] = []
        self.schedule = CompressionSchedule(
            model, ramp=options.ramp, extra_bits=options.extra_bits, gradual=options.gradual
        )
        self.count = 0  # samples of this step
        self.teacher: nn.Module | None = None
        if teacher is not None:
            # A copy, so that evaluation mode and memory format do not leak into the caller's.
            self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # -- what is trained ----------------------------------------------------------------------

    def begin(self) -> None:
        if self.options.learn_scales:
            learn_scales(self.model)
            self.scales = step_sizes(self.model)
        if self.learned is not None:
            self.learned.attach()

    def groups(self) -> list[dict[str, Any]]:
        quantized = {id(layer.weight) for layer in self.layers.values()}
        places = {id(position) for position in self._places()}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in places:
                float_weight = parameter.dim() > 1 and id(parameter) not in quantized
                (decayed if float_weight else plain).append(parameter)
        return [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": self.options.weight_decay},
        ]

    def _places(self) -> list[nn.Parameter]:
        """Positions of what is learned, which take steps of their own."""
        return [] if self.learned is None else self.learned.positions()

    def split(self, batch: Any) -> tuple[Inputs, Any]:
        x, labels = split_batch(self.model, batch)
        if labels is None and self.teacher is None:
            raise CalibrationError(
                "the training batches have no labels; pass the float model as teacher to train "
                "without"
            )
        return x, labels

    def forward(self, x: Inputs) -> tuple[Any, Any]:
        self.tokens, self.count = tokens_of(x), x.count
        target = None
        if self.teacher is not None:
            with torch.no_grad():
                target = x(self.teacher)
        self.energies = []
        if self.options.activation_l2 == 0.0:
            return x(self.model), target
        handles = [layer.register_forward_pre_hook(self._energy) for layer in self.layers.values()]
        try:
            return x(self.model), target
        finally:
            for handle in handles:
                handle.remove()

    def _energy(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.energies.append(inputs[0].float().square().mean())

    def loss(self, output: Any, labels: Any, extra: Any) -> Tensor:
        options = self.options
        loss = data_loss(
            output,
            labels,
            None if extra is None else as_float(extra),
            distill_weight=options.distill_weight,
            temperature=options.temperature,
            loss_fn=self.loss_fn,
            pick=self.pick,
            tokens=self.tokens,
        )
        if self.energies:
            loss = loss + options.activation_l2 * torch.stack(self.energies).mean()
        if options.eta > 0.0:
            norms = [
                weight * self.layers[name].quantized_weight().abs().mean()
                for name, weight in self.penalties.items()
            ]
            if norms:
                loss = loss + options.eta * torch.stack(norms).sum()
        return loss

    def logits(self, output: Any, labels: Any) -> Tensor | None:
        where = (self.pick, self.tokens, labels)
        return logits_of(output, *where) if has_logits(output, *where) else None

    # -- what changes with time ---------------------------------------------------------------

    def loaded(self) -> None:
        self.schedule.resume(self.state.stage)
        self.widths.resume(self.state.width)
        if self.dynamic is not None:
            self.dynamic.resume(self.state.dynamic)
        if self.learned is not None:
            self.learned.resume(self.state.choice)

    def before_step(self, time: float) -> None:
        self._rewidth(time)
        if self.learned is not None:
            self._settle(time)
            self.learned.sharpen(time)
        if self.state.step == 0 and not self.scales:
            for layer in self.layers.values():
                layer.refresh_scales()
        self._reschedule(time)
        if self.options.freeze_norms and time >= 1.0 - self.options.freeze_norms:
            for norm in self.norms:
                norm.eval()

    def _reschedule(self, time: float) -> None:
        for layer in self.schedule.update(time):
            if layer.step is not None:
                # Momentum of another grid says nothing about this one.
                self.optimizer.state.pop(layer.step.log, None)
        self.state.stage = self.schedule.stage

    def _rewidth(self, time: float) -> None:
        for step in self.widths.update(time):
            self.optimizer.state.pop(step.log, None)
        self.state.width = self.widths.position
        if self.dynamic is not None and time < 1.0:  # at its end a run changes nothing any more
            for step in self.dynamic.update(time):
                self.optimizer.state.pop(step.log, None)
            self.dynamic.watch(self.state.step)

    def _settle(self, time: float) -> None:
        assert self.learned is not None
        if self.learned.over(time):
            for step in self.learned.settle():
                self.optimizer.state.pop(step.log, None)
            self.state.choice = self.learned.choice

    def before_update(self) -> None:
        clip_scale_gradients(self.scales)
        if self.dynamic is not None:
            self.dynamic.observe(self.optimizer)
            self.state.dynamic = self.dynamic.state
        if self.learned is not None:
            self.learned.observe(self.count)

    def after_step(self) -> None:
        apply_scales(self.model)
        if self.learned is not None:
            assert self.steps is not None  # its loader has a length
            self.learned.move(self.time(), self.steps * self.options.epochs)

    def notes(self) -> dict[str, Any]:
        if self.dynamic is not None:
            return self.dynamic.notes()
        return {} if self.learned is None else {"widths": self.learned.widths()}

    def remark(self) -> str:
        return "" if self.learned is None else f"  {self.learned.average:.2f} bits"

    def averaging(self) -> bool:
        # Weights of another sparsity or on another grid would not average to anything.
        others = (each for each in (self.dynamic, self.learned) if each is not None)
        return self.schedule.done and self.widths.done and all(each.done for each in others)

    def complete(self) -> None:
        self._reschedule(1.0)
        self._rewidth(1.0)
        if self.learned is not None:
            self._settle(1.0)
        self.average.use()
        if self.scales:
            apply_scales(self.model)
        else:
            for layer in self.layers.values():
                layer.refresh_scales()
        once = iter(self.loader) is self.loader  # nothing is left of it
        if self.options.reestimate_norms and self.norms and not once:
            reestimate_batch_norms(
                self.model, self.loader, batches=NORM_BATCHES, progress=self.progress
            )

    def end(self) -> None:
        self.schedule.finish()
        self.widths.finish()
        if self.dynamic is not None:
            self.dynamic.finish()
        if self.learned is not None:
            self.learned.settle()
            self.learned.release()
        release_scales(self.model)
