"""Fine-tuning of a prepared model: eq. (5), distillation, interruption and resumption."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import ProgressBar
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.quantization.exact import check_calibrated
from adalayer_native.quantization.graph import layers_of, metadata
from adalayer_native.training import checkpoint as store

_CHECKPOINT_SECONDS = 60.0
_WARMUP_SHARE = 0.03


@dataclass
class History:
    """What a run did.

    Attributes:
        epochs: per completed epoch ``epoch``, ``loss`` (mean per sample), ``accuracy`` (share of
            labelled training samples, ``None`` without labels), ``samples``, ``seconds``, ``lr``
            (at its end).
        finished: false if the time limit ended the run early.
        amp: whether bfloat16 autocast was used.
        resumed: whether the run continued from a checkpoint.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = True
    amp: bool = False
    resumed: bool = False


@dataclass
class _Options:
    epochs: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    eta: float
    distill_weight: float
    temperature: float
    seed: int
    amp: bool


def bf16_helps() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX-512-BF16).

    Elsewhere autocast converts back and forth and is slower than float32.
    """
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False  # also when ATEN_CPU_CAPABILITY asks for less than the machine has
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def finetune(
    prepared: nn.Module,
    train_loader: Iterable[Any],
    epochs: int = 2,
    *,
    lr: float = 0.01,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    eta: float = 1e-4,
    scores: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.7,
    temperature: float = 2.0,
    amp: bool | str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    max_minutes: float | None = None,
    progress: bool = True,
) -> History:
    """Train the float weights behind the quantized ones.

    Loss, eq. (5): ``CE + eta * sum_l (1 - I_l) * mean|W_opt,l|``, the sum only with ``scores``.
    With a teacher the data term is ``(1 - d) * CE + d * T^2 * KL(teacher || student)``, both
    softened by ``T``; without labels it is the KL term alone. The learning rate rises over the
    first 3 % of the steps and then follows a half cosine to 0. Weight scales are recomputed at the
    start of every epoch; activation ranges stay as calibrated; batch norms train.

    A run is deterministic for a seed, a thread count and a loader that is (the global generator
    is seeded per epoch and restored afterwards; ``set_epoch(epoch)`` or
    ``sampler.set_epoch(epoch)`` is called where it exists). With ``checkpoint`` the state is
    written after every epoch, about every minute and on Ctrl-C; calling again with the same
    arguments continues at the same step.

    Args:
        prepared: from :func:`prepare`, calibrated; trained in place, left in evaluation mode.
        train_loader: re-iterable of ``(inputs, labels)``, or of inputs alone with a ``teacher``.
        epochs: passes over the loader.
        lr: peak learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of float layers' weights; quantized weights, biases and batch norms have none
            (a decaying weight under a fixed scale only drifts off its grid).
        eta: weight of the norm term.
        scores: importance ``I`` per layer name: a number, or a mapping with the key ``"I"``.
        teacher: float model; used in evaluation mode, unchanged.
        distill_weight: ``d``, 0 to 1.
        temperature: ``T``, positive.
        amp: ``True``, ``False`` or ``"auto"`` (bfloat16 autocast where :func:`bf16_helps`).
            Calibration and evaluation are never autocast: bfloat16 does not hold the exact grid.
        checkpoint: file to write; see above.
        resume: continue from ``checkpoint`` if it belongs to this run, else start anew.
        seed: of the random numbers of the run.
        max_minutes: time limit over all starts of the run; the learning rate is annealed
            towards it too. (Such a run depends on the machine's speed.)
        progress: show a progress bar.

    Returns:
        The run's :class:`History`.

    Raises:
        CalibrationError: not calibrated, empty loader, NaN or infinite inputs or loss.
        PlanError: an argument out of range, or scores for unknown layers.
        FileFormatError: the checkpoint is corrupt.
        KeyboardInterrupt: Ctrl-C, after the running step and the checkpoint.
    """
    metadata(prepared, "layers")
    check_calibrated(prepared)
    options = _Options(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        eta=eta if scores is not None else 0.0,
        distill_weight=distill_weight if teacher is not None else 0.0,
        temperature=temperature,
        seed=seed,
        amp=bf16_helps() if amp == "auto" else bool(amp),
    )
    _check(options, max_minutes)
    penalties = _penalties(prepared, scores)
    run = _Run(prepared, train_loader, options, penalties, teacher)
    return run.execute(checkpoint, resume, max_minutes, progress)


def _check(options: _Options, max_minutes: float | None) -> None:
    limits: list[tuple[str, float, float, float]] = [
        ("epochs", options.epochs, 0, 1e6),
        ("lr", options.lr, 0.0, 1e3),
        ("momentum", options.momentum, 0.0, 0.9999),
        ("weight_decay", options.weight_decay, 0.0, 1.0),
        ("eta", options.eta, 0.0, 1e6),
        ("distill_weight", options.distill_weight, 0.0, 1.0),
        ("temperature", options.temperature, 1e-3, 1e3),
        ("max_minutes", 1.0 if max_minutes is None else max_minutes, 0.0, math.inf),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise PlanError(f"finetune: {name} must be from {low:g} to {high:g}, got {value}")
    if options.optimizer not in ("sgd", "adamw"):
        raise PlanError(f"finetune: optimizer must be 'sgd' or 'adamw', got {options.optimizer!r}")


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


class _Run:
    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        options: _Options,
        penalties: dict[str, float],
        teacher: nn.Module | None,
    ) -> None:
        self.model = model
        self.loader = loader
        self.options = options
        self.layers = layers_of(model)
        self.penalties = penalties
        self.device = next(model.parameters()).device
        self.teacher: nn.Module | None = None
        if teacher is not None:
            # A copy, so that evaluation mode and memory format do not leak into the caller's.
            self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = self._optimizer()
        self.state = store.Progress()
        self.steps = self._length()
        self.started = 0.0
        self.limit: float | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        quantized = {id(layer.weight) for layer in self.layers.values()}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                float_weight = parameter.dim() > 1 and id(parameter) not in quantized
                (decayed if float_weight else plain).append(parameter)
        groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": options.weight_decay},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise PlanError("finetune: the model has no parameter that requires a gradient")
        if options.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
            )
        return torch.optim.AdamW(groups, lr=options.lr)

    def _length(self) -> int | None:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return None

    # -- the run ----------------------------------------------------------------------------

    def execute(
        self,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        max_minutes: float | None,
        progress: bool,
    ) -> History:
        self.limit = None if max_minutes is None else max_minutes * 60.0
        self.path = checkpoint
        self.identity = ""
        resumed = False
        rng: Tensor | None = None
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is not None:
            options = {**vars(self.options), "penalties": self.penalties}
            options["teacher"] = self.teacher is not None
            options["layers"] = metadata(self.model, "layers")
            # Another batch size is another run: its steps are not ours.
            options["loader"] = [self.steps, getattr(self.loader, "batch_size", None)]
            self.identity = fingerprint(self.model, options)
            if resume and Path(checkpoint).exists():
                loaded = store.load(checkpoint, self.model, self.optimizer, self.identity)
                if loaded is None:
                    warnings.warn(
                        f"checkpoint {os.fspath(checkpoint)!r} belongs to another run (other "
                        "options or initial weights); starting from the beginning",
                        stacklevel=3,
                    )
                else:
                    self.state, rng = loaded
                    resumed = True
        self.started = time.monotonic() - self.state.seconds
        try:
            with torch.random.fork_rng(devices=[]), _deferred_interrupt() as interrupted:
                self.interrupted = interrupted
                while not self.state.finished and self.state.epoch < self.options.epochs:
                    title = f"epoch {self.state.epoch + 1}/{self.options.epochs}"
                    with ProgressBar(title, self.steps, unit="batch", enabled=progress) as bar:
                        self._epoch(bar, rng)
                    rng = None
                if not self.state.finished and self.state.epoch >= self.options.epochs:
                    self.state.finished = True
                    self._save()
        finally:
            self.model.eval()
        return History(
            epochs=list(self.state.history),
            finished=self.state.epoch >= self.options.epochs,
            amp=self.options.amp,
            resumed=resumed,
        )

    def _epoch(self, bar: ProgressBar, rng: Tensor | None) -> None:
        state = self.state
        # 1000003 is a prime far above any epoch count: streams of different seeds do not meet.
        torch.manual_seed(self.options.seed * 1_000_003 + state.epoch)
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch: Callable[[int], None] | None = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.options.seed * 1_000_003 + state.epoch)
        if state.step == 0 and state.samples == 0:
            for layer in self.layers.values():
                layer.refresh_scales()
        self.model.train()
        skip = state.step
        saved = time.monotonic()
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches, None)
            bar.advance()
        if skip and rng is not None:
            # The state between the last step before the checkpoint and the next batch.
            torch.set_rng_state(rng)
        for batch in batches:
            self._step(batch)
            state.step += 1
            state.seconds = time.monotonic() - self.started
            bar.advance(note=self._status(state))
            if self.interrupted():
                self._save()
                raise KeyboardInterrupt
            if self.limit is not None and state.seconds >= self.limit:
                state.finished = True
                break
            if time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        if state.samples == 0:
            raise CalibrationError(
                "the training loader is empty; expected at least one batch (a generator can be "
                "read only once: pass a list or a DataLoader)"
            )
        self.steps = state.step if not state.finished else self.steps
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        state = self.state
        state.history.append(
            {
                "epoch": state.epoch + 1,
                "loss": state.loss / state.samples,
                "accuracy": state.correct / state.labelled if state.labelled else None,
                "samples": state.samples,
                "seconds": round(state.seconds - sum(e["seconds"] for e in state.history), 3),
                "lr": self.optimizer.param_groups[0]["lr"],
            }
        )
        if not state.finished:
            state.epoch += 1
            state.step = state.correct = state.labelled = state.samples = 0
            state.loss = 0.0
            state.finished = state.epoch >= self.options.epochs
        self._save()

    def _step(self, batch: Any) -> None:
        options = self.options
        x, labels = _split(batch, self.teacher is not None)
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"training batch {self.state.step} of shape {tuple(x.shape)} contains NaN or "
                "infinite values; expected finite numbers"
            )
        x = x.to(self.device)
        labels = None if labels is None else labels.to(self.device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.amp):
            logits = self.model(x)
            target = None
            if self.teacher is not None and (options.distill_weight > 0 or labels is None):
                with torch.no_grad():
                    target = self.teacher(x)
        loss = self._loss(logits.float(), labels, None if target is None else target.float())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(
                f"the loss became {value} in epoch {self.state.epoch + 1}, batch "
                f"{self.state.step}; use a smaller lr than {options.lr}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.state.samples += x.shape[0]
        self.state.loss += value * x.shape[0]
        if labels is not None and labels.dtype == torch.int64:
            self.state.labelled += x.shape[0]
            self.state.correct += int((logits.detach().argmax(dim=1) == labels).sum())

    def _loss(self, logits: Tensor, labels: Tensor | None, target: Tensor | None) -> Tensor:
        options = self.options
        share = 0.0 if target is None else (1.0 if labels is None else options.distill_weight)
        loss = logits.new_zeros(())
        if labels is not None and share < 1.0:
            loss = loss + (1.0 - share) * F.cross_entropy(logits, labels)
        if target is not None and share > 0.0:
            t = options.temperature
            divergence = F.kl_div(
                F.log_softmax(logits / t, dim=1),
                F.log_softmax(target / t, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + share * t * t * divergence
        if options.eta > 0.0:
            norms = [
                weight * self.layers[name].quantized_weight().abs().mean()
                for name, weight in self.penalties.items()
            ]
            if norms:
                loss = loss + options.eta * torch.stack(norms).sum()
        return loss

    def _rate(self) -> float:
        """Learning rate of the next step: short linear rise, then a half cosine to 0."""
        options, state = self.options, self.state
        # A loader without a length tells it after its first epoch; until then an epoch counts as
        # half done.
        within = 0.5 if self.steps is None else state.step / max(self.steps, 1)
        done = (state.epoch + min(within, 1.0)) / max(options.epochs, 1)
        if self.limit is not None:
            done = max(done, state.seconds / max(self.limit, 1e-9))
        done = min(done, 1.0)
        if self.steps is not None:
            warm = _WARMUP_SHARE * self.steps * options.epochs
            position = state.epoch * self.steps + state.step + 1
            if position < warm:
                return options.lr * position / warm
        return options.lr * 0.5 * (1.0 + math.cos(math.pi * done))

    def _save(self) -> None:
        if self.path is not None:
            store.save(self.path, self.model, self.optimizer, self.state, self.identity)

    # -- showing ----------------------------------------------------------------------------

    def _status(self, state: store.Progress) -> str:
        text = f"loss {state.loss / max(state.samples, 1):.3f}"
        if state.labelled:
            text += f"  accuracy {100.0 * state.correct / state.labelled:.2f} %"
        spent = state.seconds - sum(entry["seconds"] for entry in state.history)
        return text + f"  {state.samples / max(spent, 1e-9):.0f} samples/s"


def _split(batch: Any, has_teacher: bool) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels (``None`` where there are none) of a batch."""
    labels: Any = None
    if isinstance(batch, (tuple, list)) and batch:
        x = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    else:
        x = batch
    if not isinstance(x, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise CalibrationError(
            "a training batch must be a tensor or a tuple (inputs, labels) of tensors, got "
            f"{type(batch).__name__}"
        )
    if labels is None and not has_teacher:
        raise CalibrationError(
            "the training batches have no labels; pass the float model as teacher to train without"
        )
    return x, labels


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that it never cuts an optimizer step in half.

    A second Ctrl-C interrupts at once. Outside the main thread signals are left alone.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    try:
        signal.signal(signal.SIGINT, handler)
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)


__all__ = ["History", "bf16_helps", "finetune"]
