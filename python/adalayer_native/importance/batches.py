"""Reading calibration batches, checking them, and measuring a model's output on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import CalibrationError

__all__ = ["Batch", "LossFn", "iterate", "loss_of", "metric_name", "tensor_output"]

LossFn = Callable[[Any, Any], torch.Tensor]


@dataclass
class Batch:
    """One calibration batch on the model's device; ``target`` is ``None`` without labels."""

    x: torch.Tensor
    target: Any
    index: int

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def digest(self) -> str:
        """Hash of the batch's contents."""
        digest = hashlib.sha256(f"{tuple(self.x.shape)} {self.x.dtype}".encode())
        digest.update(tensor_bytes(self.x))
        if isinstance(self.target, torch.Tensor):
            digest.update(tensor_bytes(self.target))
        return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's raw bytes, whatever its dtype and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def iterate(loader: Iterable[Any], model: nn.Module, limit: int | None = None) -> Iterator[Batch]:
    """Yield at most ``limit`` checked batches; each is a tensor or an ``(x, y, ...)`` pair.

    Raises:
        CalibrationError: no batch at all, a batch that is not a floating-point tensor, or one
            with NaN or infinity; the message names the batch.
    """
    reference = next(model.parameters(), None)
    index = -1
    for index, item in enumerate(loader):
        if limit is not None and index >= limit:
            return
        x, target = item, None
        if isinstance(item, (tuple, list)):
            x, target = (item[0], item[1] if len(item) > 1 else None) if item else (None, None)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = f"{x.dtype} tensor" if isinstance(x, torch.Tensor) else type(x).__name__
            raise CalibrationError(
                f"calibration batch {index}: expected a floating-point tensor or (tensor, "
                f"label), got {got}"
            )
        if x.dim() == 0 or x.shape[0] == 0:
            continue
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"calibration batch {index} holds NaN or infinity")
        if reference is not None:
            x = x.to(device=reference.device, dtype=reference.dtype)
            if isinstance(target, torch.Tensor):
                target = target.to(reference.device)
        yield Batch(x, target, index)
    if index < 0:
        raise CalibrationError("the calibration loader is empty: it yields no batch")


def metric_name(loss_fn: LossFn | None, labelled: bool) -> str:
    """Which loss :func:`loss_of` computes."""
    if loss_fn is not None:
        return "loss_fn"
    return "cross_entropy" if labelled else "kl_divergence"


def loss_of(output: Any, float_output: Any, target: Any, loss_fn: LossFn | None = None) -> float:
    """Mean loss of one batch.

    ``loss_fn(output, target)`` if given (``target`` is the float model's output where there are
    no labels), else cross-entropy against labels, else KL divergence from the float output.
    """
    if loss_fn is not None:
        value = loss_fn(output, float_output if target is None else target)
        return float(value.mean() if isinstance(value, torch.Tensor) else value)
    logits = tensor_output(output).float()
    if isinstance(target, torch.Tensor):
        return float(functional.cross_entropy(logits, target))
    return kl_divergence(tensor_output(float_output), logits)


def kl_divergence(float_output: torch.Tensor, output: torch.Tensor) -> float:
    """Mean over samples (and positions) of KL(softmax(float) || softmax(output)), in nats."""
    reference = functional.log_softmax(float_output.float(), dim=1)
    logp = functional.log_softmax(output.float(), dim=1)
    return float((reference.exp() * (reference - logp)).sum(dim=1).mean())


def tensor_output(output: Any) -> torch.Tensor:
    """The output as logits ``[N, C, ...]``.

    Raises:
        CalibrationError: the model returns something else; a ``loss_fn`` is needed then.
    """
    if isinstance(output, torch.Tensor) and output.dim() >= 2:
        return output
    got = (
        f"a tensor of shape {tuple(output.shape)}"
        if isinstance(output, torch.Tensor)
        else type(output).__name__
    )
    raise CalibrationError(
        f"expected the model to return logits [N, classes, ...], got {got}; give a loss_fn"
    )
