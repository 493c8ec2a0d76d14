"""Configurations of the second paper: widths of layer1, layer2 and layer3 over depth and time."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from ..allocation import allocate
from ..errors import PlanError
from ..models.resnet_cifar import ResNetCifar
from ..plan import Plan
from ..training import DynamicWidths

__all__ = ["CONFIGURATIONS", "STAGES", "WIDTHS", "Configuration", "configuration", "network",
           "plan_of"]  # fmt: skip

STAGES = ("layer1", "layer2", "layer3")
WIDTHS = (2, 3, 4)
# In this order they run: first those of the paper.
CONFIGURATIONS = ("full", "ascending", "descending", "fixed", "rising", "falling", "dynamic")


@dataclass(frozen=True)
class Configuration:
    """One row of the study.

    Attributes:
        name: ``"full"``, ``"ascending"``, …
        title: in words.
        depth: final bits of layer1, layer2, layer3, weights and activations; ``None`` is float.
        time: bits of all three over the training, in equal parts; ``None``: ``depth`` all along.
        dynamic: bounds between which every layer's bits follow its gradients and activations, from
            ``depth`` on; ``None``: they do not.
    """

    name: str
    title: str
    depth: tuple[int, ...] | None
    time: tuple[int, ...] | None = None
    dynamic: DynamicWidths | None = None


def configuration(name: str, fixed: int = 2) -> Configuration:
    """A configuration by name.

    Args:
        name: one of ``CONFIGURATIONS``, or ``"fixed-N"`` for N bits.
        fixed: bits of ``"fixed"``.

    Raises:
        PlanError: an unknown name, or bits out of range.
    """
    number = re.fullmatch(r"fixed(?:-(\d+))?", name)
    if number:
        bits = int(number[1]) if number[1] else fixed
        if not 2 <= bits <= 8:
            raise PlanError(f"study green: {name!r}: bits must be from 2 to 8, got {bits}")
        return Configuration(name, f"fixed ({bits})", (bits,) * 3)
    known = {
        "full": Configuration("full", "full precision", None),
        "ascending": Configuration("ascending", "ascending (2, 3, 4)", WIDTHS),
        "descending": Configuration("descending", "descending (4, 3, 2)", WIDTHS[::-1]),
        "rising": Configuration("rising", "rising over time (2, 3, 4)", (4, 4, 4), WIDTHS),
        "falling": Configuration("falling", "falling over time (4, 3, 2)", (2, 2, 2), WIDTHS[::-1]),
        "dynamic": Configuration(
            "dynamic", "dynamic (2 to 4)", (2, 2, 2), dynamic=DynamicWidths(2, 4)
        ),
    }
    if name not in known:
        raise PlanError(
            f"study green: unknown configuration {name!r}: expected one of {CONFIGURATIONS} or "
            f"'fixed-N'"
        )
    return known[name]


def network(blocks: int, classes: int, seed: int) -> nn.Module:
    """The paper's Table 2 with fresh weights of a seed: ``blocks`` basic blocks in each stage."""
    if blocks < 1:
        raise PlanError(f"study green: blocks must be at least 1, got {blocks}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetCifar(blocks, classes).eval()


def plan_of(model: nn.Module, chosen: Configuration) -> Plan | None:
    """Final widths of weights and of what enters each layer; ``None`` for full precision.

    Of dynamic widths those that they begin with.
    """
    if chosen.depth is None:
        return None
    method = "fixed" if len(set(chosen.depth)) == 1 else chosen.name
    plan = allocate(
        None,
        None,
        method=method,
        model=model,
        bits=chosen.depth[0] if method == "fixed" else sorted(chosen.depth),
        stages=STAGES,
    )
    for layer in plan.layers.values():
        if layer.bits is not None:
            layer.activation_bits = layer.bits
    return plan
