"""The training loop: epochs, learning rate, averages, checkpoints, interruption and resumption."""

# Hooks that a subclass need not fill do nothing.
# ruff: noqa: B027

from __future__ import annotations

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import ProgressBar
from adalayer_native.capture import Inputs
from adalayer_native.capture.example import repeatable
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.plan import Plan
from adalayer_native.training import checkpoint as store
from adalayer_native.training.average import Average
from adalayer_native.training.batches import as_float, on_device
from adalayer_native.training.interrupt import deferred_interrupt
from adalayer_native.training.schedule import half_cosine
from adalayer_native.training.watch import Paused, Watch

__all__ = ["History", "Loop", "LoopOptions", "bf16_helps", "check_range"]

_CHECKPOINT_SECONDS = 60.0
_WARMUP_SHARE = 0.03
# A prime far above any epoch count: streams of different seeds do not meet.
_SEED_STRIDE = 1_000_003


@dataclass
class History:
    """What a run did.

    Attributes:
        epochs: per completed epoch ``epoch``, ``loss`` (mean per sample), ``accuracy`` (share of
            labelled training samples, ``None`` without labels), ``samples``, ``seconds``, ``lr``
            (at its end), what the run itself notes (``widths``: bits per weight of every layer,
            where these change) and what a ``watch`` added.
        plan: of a run that chose one (``allocate="learned"``).
        finished: false if the time limit, or a ``watch``, ended the run early.
        amp: whether bfloat16 autocast was used.
        resumed: whether the run continued from a checkpoint.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = True
    amp: bool = False
    resumed: bool = False
    plan: Plan | None = None


@dataclass
class LoopOptions:
    """What every run has; see :func:`~adalayer_native.training.finetune`."""

    epochs: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    ema: float
    seed: int
    amp: bool

    def check(self, caller: str) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` where a value is out of range."""
        check_range(caller, "epochs", self.epochs, 0, 1e6)
        check_range(caller, "lr", self.lr, 0.0, 1e3)
        check_range(caller, "momentum", self.momentum, 0.0, 0.9999)
        check_range(caller, "weight_decay", self.weight_decay, 0.0, 1.0)
        check_range(caller, "ema", self.ema, 0.0, 0.999999)
        if self.optimizer not in ("sgd", "adamw"):
            raise PlanError(f"{caller}: optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")


def check_range(caller: str, name: str, value: float, low: float, high: float) -> None:
    """Raise :class:`~adalayer_native.errors.PlanError` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise PlanError(f"{caller}: {name} must be from {low:g} to {high:g}, got {value}")


def bf16_helps() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX-512-BF16).

    Elsewhere autocast converts back and forth and is slower than float32.
    """
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False  # also when ATEN_CPU_CAPABILITY asks for less than the machine has
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


class Loop(ABC):
    """A run over a loader. Subclasses say what is trained and how the loss is made.

    Args:
        model: trained in place.
        loader: re-iterable of batches; for one epoch an iterator does, too.
        options: of the run.
        identity: everything else that a checkpoint must agree on, as JSON values.

    Raises:
        CalibrationError: an iterator for several epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        options: LoopOptions,
        identity: Mapping[str, Any],
    ) -> None:
        self.model = model
        # Not after the first epoch, which may take hours.
        self.loader = loader if options.epochs == 1 else repeatable(loader)
        self.options = options
        self.agreed = dict(identity)
        self.device = next(model.parameters()).device
        self.state = store.Progress()
        self.steps = self._length()
        self.started = 0.0
        self.limit: float | None = None
        self.path: str | os.PathLike[str] | None = None
        self.average = Average(model, options.ema)
        self.optimizer: torch.optim.Optimizer

    # -- what a subclass says -----------------------------------------------------------------

    @abstractmethod
    def split(self, batch: Any) -> tuple[Inputs, Any]:
        """Arguments of the model and labels (``None`` where there are none) of a batch."""

    @abstractmethod
    def forward(self, x: Inputs) -> tuple[Any, Any]:
        """The result, and whatever :meth:`loss` needs besides; runs under autocast."""

    @abstractmethod
    def loss(self, output: Any, labels: Any, extra: Any) -> Tensor:
        """The loss, a scalar; tensors of ``output`` are float32."""

    @abstractmethod
    def logits(self, output: Any, labels: Any) -> Tensor | None:
        """Logits ``[N, C, ...]`` for the accuracy; ``None`` where there are none."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, each with its ``weight_decay``."""

    def begin(self) -> None:
        """Called once, before a checkpoint is loaded and the optimizer made."""

    def loaded(self) -> None:
        """Called when a checkpoint was loaded."""

    def before_step(self, time: float) -> None:
        """Called before every step; ``time`` is the share of the run that is done."""

    def before_update(self) -> None:
        """Called when gradients are there."""

    def after_step(self) -> None:
        """Called after every step."""

    def averaging(self) -> bool:
        """Whether the present parameters belong into the average."""
        return True

    def notes(self) -> dict[str, Any]:
        """JSON values for an epoch's entry in the history."""
        return {}

    def remark(self) -> str:
        """What the progress bar says besides loss, accuracy and speed."""
        return ""

    def complete(self) -> None:
        """Called once, after the last step of the run and before its last checkpoint."""

    def end(self) -> None:
        """Called at the end, whatever happened."""

    # -- the run ------------------------------------------------------------------------------

    def execute(
        self,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        max_minutes: float | None,
        progress: bool,
        watch: Watch | None = None,
    ) -> History:
        """Train; see :func:`~adalayer_native.training.finetune` for arguments and errors."""
        self.watch = Watch() if watch is None else watch
        self.limit = None if max_minutes is None else max_minutes * 60.0
        self.path = checkpoint
        self.progress = progress
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.identity = "" if checkpoint is None else self._identity()
        try:
            self.begin()
            self.optimizer = self._optimizer()
            rng = self._resume() if resume else None
            resumed = rng is not None
            self.started = time.monotonic() - self.state.seconds
            with torch.random.fork_rng(devices=[]), deferred_interrupt() as interrupted:
                self.interrupted = interrupted
                while not self.state.ended and self.state.epoch < self.options.epochs:
                    title = f"epoch {self.state.epoch + 1}/{self.options.epochs}"
                    with ProgressBar(title, self.steps, unit="batch", enabled=progress) as bar:
                        self._epoch(bar, rng)
                    rng = None
                if not self.state.finished:
                    self._seed(self.options.epochs)
                    if self.state.history:
                        self.complete()
                    self.state.finished = True
                    self._save()
        finally:
            self.end()
            self.model.eval()
        return History(
            epochs=list(self.state.history),
            finished=self.state.epoch >= self.options.epochs,
            amp=self.options.amp,
            resumed=resumed,
        )

    def _identity(self) -> str:
        agreed = {**vars(self.options), **self.agreed}
        # Another batch size is another run: its steps are not ours.
        agreed["loader"] = [self.steps, getattr(self.loader, "batch_size", None)]
        return fingerprint(self.model, agreed)

    def _resume(self) -> Tensor | None:
        """Load the checkpoint if there is one of this run; the random state, else ``None``."""
        if self.path is None or not Path(self.path).exists():
            return None
        found = store.load(self.path, self.model, self.optimizer, self.average, self.identity)
        if found is None:
            warnings.warn(
                f"checkpoint {os.fspath(self.path)!r} belongs to another run (other options or "
                "initial weights); starting from the beginning",
                stacklevel=4,
            )
            return None
        self.state, rng = found
        self.loaded()
        return rng

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        groups = [group for group in self.groups() if group["params"]]
        if not groups:
            raise PlanError("training: the model has no parameter that requires a gradient")
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

    def _seed(self, epoch: int) -> None:
        """Random numbers and the loader's order for an epoch."""
        number = self.options.seed * _SEED_STRIDE + epoch
        torch.manual_seed(number)
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch: Callable[[int], None] | None = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(number)

    def _epoch(self, bar: ProgressBar, rng: Tensor | None) -> None:
        state = self.state
        self._seed(state.epoch)
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
            if self.watch.pause():
                self._save()
                raise Paused
            if self.limit is not None and state.seconds >= self.limit:
                state.ended = True
                break
            if time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        if state.samples == 0:
            raise CalibrationError("the training loader is empty; expected at least one batch")
        self.steps = state.step if not state.ended else self.steps
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
                **self.notes(),
            }
        )
        if not state.ended:
            state.epoch += 1
            state.step = state.correct = state.labelled = state.samples = 0
            state.loss = 0.0
        self.model.eval()
        entry = state.history[-1]
        before = time.monotonic()
        entry |= self.watch.epoch(self.model, entry)
        self.started += time.monotonic() - before  # is no training
        if self.watch.stop(entry):
            state.ended = True
        self._save()

    def _step(self, batch: Any) -> None:
        options = self.options
        x, labels = self.split(batch)
        if not x.is_finite():
            raise CalibrationError(
                f"training batch {self.state.step} of shape {x.shapes} contains NaN or infinite "
                "values; expected finite numbers"
            )
        x = x.to(self.device).map(_channels_last)
        labels = on_device(labels, self.device)
        done = self.time()
        rate = self._rate(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.before_step(done)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=options.amp):
            output, extra = self.forward(x)
        output = as_float(output)
        loss = self.loss(output, labels, extra)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(
                f"the loss became {value} in epoch {self.state.epoch + 1}, batch "
                f"{self.state.step}; use a smaller lr than {options.lr}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.before_update()
        self.optimizer.step()
        self.after_step()
        if options.ema > 0.0 and self.averaging():
            self.average.update()
        self.state.samples += x.count
        self.state.loss += value * x.count
        if isinstance(labels, Tensor) and labels.dtype == torch.int64:
            logits = self.logits(output, labels)
            found = None if logits is None else logits.detach().argmax(dim=1)
            if found is not None and found.shape == labels.shape:
                self.state.labelled += int((labels >= 0).sum())
                self.state.correct += int((found == labels).sum())

    def time(self) -> float:
        """Share of the run that is done, 0 to 1."""
        state = self.state
        # A loader without a length tells it after its first epoch; until then an epoch counts as
        # half done.
        within = 0.5 if self.steps is None else state.step / max(self.steps, 1)
        done = (state.epoch + min(within, 1.0)) / max(self.options.epochs, 1)
        if self.limit is not None:
            done = max(done, state.seconds / max(self.limit, 1e-9))
        return min(done, 1.0)

    def _rate(self, done: float) -> float:
        """Learning rate of the next step: short linear rise, then a half cosine to 0."""
        state = self.state
        if self.steps is not None:
            warm = _WARMUP_SHARE * self.steps * self.options.epochs
            position = state.epoch * self.steps + state.step + 1
            if position < warm:
                return self.options.lr * position / warm
        return self.options.lr * half_cosine(done)

    def _save(self) -> None:
        if self.path is not None:
            store.save(
                self.path, self.model, self.optimizer, self.average, self.state, self.identity
            )

    def _status(self, state: store.Progress) -> str:
        text = f"loss {state.loss / max(state.samples, 1):.3f}"
        if state.labelled:
            text += f"  accuracy {100.0 * state.correct / state.labelled:.2f} %"
        spent = state.seconds - sum(entry["seconds"] for entry in state.history)
        return text + self.remark() + f"  {state.samples / max(spent, 1e-9):.0f} samples/s"


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
