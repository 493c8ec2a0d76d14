"""Reading calibration batches and checking them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._fingerprint import memory_of
from ..capture import GraphModel, Inputs
from ..capture.loading import captured_on, checked_batches
from .outputs import LossFn, Pick, kl_divergence, loss_of, metric_name, warn_of_guess

__all__ = [
    "Batch",
    "LossFn",
    "captured_on",
    "iterate",
    "kl_divergence",
    "loss_of",
    "metric_name",
    "model_digest",
    "one_sample",
    "warn_of_first_guess",
]


@dataclass
class Batch:
    """One calibration batch on the model's device; ``target`` is ``None`` without labels.

    Attributes:
        x: arguments of the model; a tensor stands for one argument.
        target: labels.
        index: which batch of the loader it is.
    """

    x: Inputs
    target: Any
    index: int

    def __post_init__(self) -> None:
        self.x = Inputs.of(self.x)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.x.count

    @property
    def tokens(self) -> frozenset[int]:
        """Lengths of its integer inputs ``[N, T]``."""
        return tokens_of(self.x)

    def part(self, part: slice) -> Batch:
        """Some of the samples."""
        count = self.count

        def of_target(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count
            return leaf[part] if batched else leaf

        return Batch(self.x[part], pytree.tree_map(of_target, self.target), self.index)

    def digest(self) -> str:
        """Hash of the batch's contents."""
        digest = hashlib.sha256()
        plain = len(self.x.args) == 1 and not self.x.kwargs and isinstance(self.x.args[0], Tensor)
        if not plain:
            leaves, spec = pytree.tree_flatten((self.x.args, self.x.kwargs))
            rest = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
            digest.update(f"{spec} {rest}".encode())
        for tensor in self.x.tensors():
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(memory_of(tensor))
        for leaf in pytree.tree_leaves(self.target):
            if isinstance(leaf, Tensor):
                digest.update(memory_of(leaf))
        return digest.hexdigest()


def tokens_of(x: Inputs) -> frozenset[int]:
    """Lengths of integer inputs ``[N, T]``."""
    return frozenset(
        int(t.shape[1]) for t in x.tensors() if t.dim() == 2 and not t.is_floating_point()
    )


def model_digest(model: nn.Module) -> str:
    """Hash of what a model computes: its graph where it is captured, and its whole state."""
    computed = model.code if isinstance(model, GraphModel) else type(model).__qualname__
    digest = hashlib.sha256(computed.encode())
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(memory_of(value))
    return digest.hexdigest()


def one_sample(model: nn.Module, x: Inputs) -> Inputs:
    """The first sample; the first two where the model treats a batch of one otherwise."""
    if isinstance(model, GraphModel) and not model.signature.single:
        return x[:2]
    return x[:1]


def warn_of_first_guess(model: nn.Module, calibration: Iterable[Any], output: Pick) -> None:
    """Warn where nothing says what the maps are that a model returns for the first batch."""
    for batch in iterate(calibration, model, 1):
        few = batch.part(slice(0, 2))
        with torch.no_grad():
            warn_of_guess(few.x(model), output, batch.tokens, few.target)


def iterate(loader: Iterable[Any], model: nn.Module, limit: int | None = None) -> Iterator[Batch]:
    """Yield at most ``limit`` checked batches.

    See :func:`~adalayer_native.capture.loading.checked_batches` for what a batch may be.

    Raises:
        CalibrationError: no batch at all, a batch of another kind or with NaN or infinity in it;
            the message names the batch.
    """
    for index, x, target in checked_batches(loader, model, limit):
        yield Batch(x, target, index)
