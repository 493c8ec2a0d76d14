"""bench/accuracy_parts.py: whose inputs are made narrow, and that this is what it measures."""

from __future__ import annotations

import torch
from torch import nn

import adalayer_native as ada
from bench import accuracy_parts as bench


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    ).eval()  # fmt: skip


def test_inputs_are_narrowed_by_the_kind_of_their_reader() -> None:
    pictures = list(torch.randn(24, 3, 16, 16).split(8))
    model = ada.capture(network(), pictures[0])
    rows = bench.narrow_inputs(model, pictures[:2], pictures[2:], 2)
    values = {title: int(count) for title, count, *_ in rows}
    assert values == {
        "none": 0, "the picture": 1, "read by expanding": 1, "read by depthwise": 1,
        "read by projecting": 1, "read by classifier": 1,
        "all but the picture and those of depthwise": 3, "all but those of depthwise": 4,
    }  # fmt: skip
    errors = {title: float(error) for title, _, error, _ in rows}
    assert errors["all but those of depthwise"] > errors["the picture"] > errors["none"]
