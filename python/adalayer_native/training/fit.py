"""Training of a float network: the baseline that compression starts from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native.capture import Inputs
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.importance.outputs import LossFn, has_logits, logits_of, loss_key
from adalayer_native.quantization.calibrate import batch_norms, reestimate_batch_norms
from adalayer_native.training.batches import NORM_BATCHES, split_batch
from adalayer_native.training.loop import History, Loop, LoopOptions, bf16_helps, check_range
from adalayer_native.training.watch import Watch

__all__ = ["fit"]


@dataclass
class _Options(LoopOptions):
    label_smoothing: float

    def check(self, caller: str) -> None:
        super().check(caller)
        check_range(caller, "label_smoothing", self.label_smoothing, 0.0, 0.999)


def fit(
    model: nn.Module,
    train_loader: Iterable[Any],
    epochs: int,
    *,
    loss_fn: LossFn | None = None,
    lr: float = 0.1,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    ema: float = 0.999,
    amp: bool | str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    max_minutes: float | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> History:
    """Train a float network: a classifier with cross-entropy, others with a loss of their own.

    The learning rate rises over the first 3 % of the steps and then follows a half cosine to 0.
    The result is the moving average of the parameters, with batch norm statistics that are taken
    anew for it from up to 50 training batches. Determinism, checkpoints and interruption are those
    of :func:`finetune`. Augmentation is the loader's business.

    Args:
        model: float network that returns logits ``[N, classes]``, alone or among other outputs
            (:mod:`~adalayer_native.importance.outputs`), or whatever ``loss_fn`` takes; trained in
            place, left in evaluation mode.
        train_loader: re-iterable of batches with labels; labels int64 ``[N]``, or what ``loss_fn``
            takes.
        epochs: passes over the loader.
        loss_fn: ``loss_fn(output, labels)``, a scalar or one value per sample, of which the mean is
            taken; default: cross-entropy.
        lr: peak learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of weights; biases and batch norms have none.
        label_smoothing: share of every label that is spread over all classes; of cross-entropy
            only.
        ema: largest decay per step of the moving average; 0 takes the last parameters.
        amp: ``True``, ``False`` or ``"auto"`` (bfloat16 autocast where it helps).
        checkpoint, resume, seed, max_minutes, watch, progress: as in :func:`finetune`.

    Returns:
        The run's :class:`History`.

    Raises:
        CalibrationError: empty loader, no labels, NaN or infinite inputs or loss.
        PlanError: an argument out of range.
        FileFormatError: the checkpoint is corrupt.
        KeyboardInterrupt: Ctrl-C, after the running step and the checkpoint.
        Paused: ``watch`` said so, likewise.
    """
    options = _Options(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        ema=ema,
        seed=seed,
        amp=bf16_helps() if amp == "auto" else bool(amp),
        label_smoothing=label_smoothing,
    )
    options.check("fit")
    if loss_fn is not None and label_smoothing:
        raise PlanError("fit: label_smoothing belongs to cross-entropy, not to a loss_fn")
    if max_minutes is not None:
        check_range("fit", "max_minutes", max_minutes, 0.0, math.inf)
    identity = {"task": "fit"}
    if loss_fn is not None:
        identity["loss_fn"] = loss_key(loss_fn)
    run = _Fitting(model, train_loader, options, identity)
    run.loss_fn = loss_fn
    return run.execute(checkpoint, resume, max_minutes, progress, watch)


class _Fitting(Loop):
    options: _Options
    loss_fn: LossFn | None = None

    def groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            {
                "params": [p for p in trained if p.dim() > 1],
                "weight_decay": self.options.weight_decay,
            },
        ]

    def split(self, batch: Any) -> tuple[Inputs, Any]:
        x, labels = split_batch(self.model, batch)
        if labels is None:
            raise CalibrationError("the training batches have no labels; training needs them")
        return x, labels

    def forward(self, x: Inputs) -> tuple[Any, None]:
        return x(self.model), None

    def loss(self, output: Any, labels: Any, extra: None) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(output, labels).mean()
        logits = logits_of(output, target=labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)

    def logits(self, output: Any, labels: Any) -> Tensor | None:
        return logits_of(output, target=labels) if has_logits(output, target=labels) else None

    def complete(self) -> None:
        self.average.use()
        once = iter(self.loader) is self.loader  # nothing is left of it
        if self.options.ema > 0.0 and batch_norms(self.model) and not once:
            reestimate_batch_norms(
                self.model, self.loader, batches=NORM_BATCHES, progress=self.progress
            )
