"""Two results of one network beside each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.entry import leaves


@dataclass(frozen=True)
class Difference:
    """How far apart two results are.

    Attributes:
        equal: bit for bit, all float tensors.
        where: the place in the result that differs most.
        relative: largest difference there, over the root mean square of the reference.
        levels: the same in 255ths of the reference's range: levels of an 8-bit grid.
        share: how many values differ there, 0 to 1.
        nodes: stored values inside the engine that differ although their inputs are the same:
            ``[name, operation, how many, of how many, by how many levels at most]``.
    """

    equal: bool
    where: str = ""
    relative: float = 0.0
    levels: float = 0.0
    share: float = 0.0
    nodes: tuple[tuple[str, str, int, int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def difference(found: Any, wanted: Any) -> Difference:
    """Compare all float tensors of two results.

    Raises:
        ValueError: they have other numbers or shapes of tensors.
    """
    ours, theirs = leaves(found), leaves(wanted)
    shapes = [[tuple(value.shape) for _, value in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected float tensors of shapes {shapes[1]}, got {shapes[0]}")
    worst = Difference(True)
    for (_, a), (name, b) in zip(ours, theirs, strict=True):
        if torch.equal(a, b):
            continue
        gap = (a.double() - b.double()).abs()
        apart = ~((a == b) | (a.isnan() & b.isnan()))
        if not bool(apart.any()):
            continue
        rms = float(b.double().square().mean().sqrt())
        span = float(b.max() - b.min())
        largest = float(gap.max())
        one = Difference(
            False,
            name,
            largest / rms if rms else float("inf"),
            255 * largest / span if span else float("inf"),
            float(apart.double().mean()),
        )
        if worst.equal or one.relative > worst.relative:
            worst = one
    return worst


def cosines(found: Any, wanted: Any) -> dict[str, tuple[float, float]]:
    """Per float tensor its cosine over a whole batch, and that of what differs between inputs.

    For the second the mean over the batch is taken off. Where a network answers nearly the same to
    any noise, the first is near 1 whatever the layers do. What does not vary at all (anchors, say)
    has 1 in both if it is the same.
    """
    table = {}
    for (_, a), (name, b) in zip(leaves(found), leaves(wanted), strict=True):
        whole = varying = _cosine(a, b)
        if b.dim() and b.shape[0] > 1:
            centred = b - b.mean(0, keepdim=True)
            if bool(centred.any()):
                varying = _cosine(a - a.mean(0, keepdim=True), centred)
        table[name] = (whole, varying)
    return table


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    if norms == 0.0:
        return 1.0 if torch.equal(x, y) else 0.0
    return float(x @ y) / norms


def differing_nodes(native: nn.Module, x: Tensor) -> tuple[tuple[str, str, int, int, int], ...]:
    """What the engine stores otherwise than the modules do, each on the modules' own inputs."""
    from tests.helpers_engine import node_differences

    return tuple(
        (item.name, item.op, item.count, item.total, item.largest)
        for item in node_differences(native, x)
        if item.count
    )
