"""Whether a graph computes what its model computes."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture.example import Inputs
from adalayer_native.capture.exporting import untouched
from adalayer_native.capture.model import GraphModel

__all__ = ["difference", "try_batches"]

_BATCHES = 64  # the largest batch that is tried


def difference(model: nn.Module, found: GraphModel, inputs: Inputs) -> str | None:
    """How the graph's results differ from the model's; None if they are the same."""
    fresh = inputs.map(torch.clone), inputs.map(torch.clone)
    with untouched(model), untouched(found), torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            torch.manual_seed(0)
            wanted = copy.copy(fresh[0](model))
            torch.manual_seed(0)
            got = fresh[1](found)
        except Exception as error:  # whatever it is: it does not compute the same
            return f"{type(error).__name__}: {error}"
    left, right = pytree.tree_leaves(wanted), pytree.tree_leaves(got)
    if len(left) != len(right):
        return f"{len(right)} results instead of {len(left)}"
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                return f"{b} instead of a tensor of shape {list(a.shape)}"
            if not torch.equal(a, b) and not _close(a, b):
                return f"largest difference {float((a.double() - b.double()).abs().max()):.3g}"
        elif a != b:
            return f"{b!r} instead of {a!r}"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of float sums."""
    if not a.is_floating_point():
        return False
    scale = float(a.double().abs().nan_to_num().max()) or 1.0
    tolerance = 64 * torch.finfo(a.dtype).eps * scale
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True)


def try_batches(model: nn.Module, found: GraphModel, inputs: Inputs) -> None:
    """Drop conditions like ``x.shape[0] != 8`` where a batch of 8 is treated like any other.

    A module that remembers the shape of its last call, and compares, leaves them.
    """
    kept = []
    for text, shown in found.signature.guards:
        unequal = re.fullmatch(r"s\[\d+\]\[0\] != (\d+)", text)
        count = int(unequal.group(1)) if unequal else 0
        if 1 < count <= _BATCHES:
            index = torch.arange(count) % inputs.count
            batch = inputs.map(
                lambda t, index=index: (
                    t[index.to(t.device)] if t.dim() and t.shape[0] == inputs.count else t
                )
            )
            before, found.signature.guards = found.signature.guards, []
            same = difference(model, found, batch) is None
            found.signature.guards = before
            if same:
                continue
        kept.append((text, shown))
    found.signature.guards = kept
