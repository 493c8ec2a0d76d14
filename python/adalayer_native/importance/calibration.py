"""What can be seen to be wrong with calibration data before anything is measured on it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._fingerprint import memory_of
from ..capture import GraphModel
from ..errors import CalibrationError
from .analyze import eval_mode
from .batches import Batch, iterate, one_sample
from .outputs import Pick, has_logits, logits_of

__all__ = ["check_calibration"]

ENOUGH = 10  # samples per class: with as many, a class without one is missing
SHOWN = 8  # classes that a message names
IGNORED = -100  # torch's label of what does not count


def check_calibration(
    model: GraphModel, loader: Iterable[Any], output: Pick = None, *, labels: bool = True
) -> None:
    """Look at all samples once; warn of what says too little, refuse what cannot be meant.

    Warns of a single sample, of samples that are all the same, and of classes without a sample
    where there are many of the others.

    Args:
        model: captured.
        loader: calibration batches.
        output: which output counts.
        labels: whether what comes beside the inputs is meant as class labels.

    Raises:
        CalibrationError: labels that the model has no class for, or unusable batches.
    """
    samples: set[bytes] = set()
    count, classes, seen = 0, None, torch.zeros(0, dtype=torch.bool)
    for batch in iterate(loader, model):
        if count == 0 and labels:
            classes = _classes(model, batch, output)
            seen = torch.zeros(classes or 0, dtype=torch.bool)
        count += batch.count
        if len(samples) < 2:
            samples.update(_digests(batch))
        if classes and isinstance(batch.target, Tensor):
            found = batch.target.reshape(-1)
            found = found[found != IGNORED].long().cpu()
            wrong = found[(found < 0) | (found >= classes)]
            if len(wrong):
                raise CalibrationError(
                    f"calibration batch {batch.index}: label {int(wrong[0])} is out of range; the "
                    f"model has {classes} classes, expected labels from 0 to {classes - 1}"
                )
            seen[found] = True
    if count == 1:
        _warn("the calibration data is a single sample")
    elif len(samples) == 1:
        _warn(f"all {count} calibration samples are the same")
    missing = (~seen).nonzero().flatten().tolist()
    if missing and bool(seen.any()) and count >= ENOUGH * len(seen):
        shown = ", ".join(map(str, missing[:SHOWN]))
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        warnings.warn(
            f"the calibration data has no sample of class {shown}{more}: what is measured and "
            "repaired on it does not speak for those",
            stacklevel=3,
        )


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}: ranges, plan and repair will fit it alone; some hundred different ones are usual",
        stacklevel=4,
    )


@torch.no_grad()
def _classes(model: GraphModel, batch: Batch, output: Pick) -> int | None:
    """Classes that labels are of, where the labels of a batch are such."""
    if not isinstance(batch.target, Tensor) or batch.target.is_floating_point():
        return None
    if batch.target.dim() == 0 or batch.target.shape[0] != batch.count:
        return None
    few = batch.part(slice(0, one_sample(model, batch.x).count))
    with eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that do not belong; said when they are used
        found = few.x(model)
        where = output, few.tokens, few.target
        return int(logits_of(found, *where).shape[1]) if has_logits(found, *where) else None


def _digests(batch: Batch) -> list[bytes]:
    """A digest of every sample."""
    tensors = [t for t in batch.x.tensors() if t.dim() and t.shape[0] == batch.count]
    return [
        hashlib.sha256(b"".join(memory_of(t[index].contiguous()) for t in tensors)).digest()
        for index in range(batch.count)
    ]
