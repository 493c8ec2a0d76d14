"""Views of calibration pictures, and where their values lie."""

from __future__ import annotations

import torch
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.capture import Inputs
from adalayer_native.capture.channels_last import laid_out
from adalayer_native.repair.views import has_views, view


def test_a_view_is_a_part_of_the_picture_at_its_size() -> None:
    rows = torch.linspace(-1, 1, 32).view(1, 1, 1, 32).expand(64, 3, 32, 32).contiguous()
    x = Inputs.of(rows.contiguous(memory_format=torch.channels_last))
    assert has_views(x)
    seen = view(x, torch.Generator().manual_seed(0)).tensors()[0]
    assert seen.shape == rows.shape and seen.is_contiguous(memory_format=torch.channels_last)
    ends = seen[:, 0, 16, [0, -1]]
    mirrored = ends[:, 0] > ends[:, 1]
    assert 0.25 < float(mirrored.float().mean()) < 0.75
    width = (ends[:, 0] - ends[:, 1]).abs() / 2
    assert float(width.min()) > 0.72 and float(width.max()) <= 1.0
    assert float(width.max() - width.min()) > 0.15  # not all of one size
    again = view(x, torch.Generator().manual_seed(0)).tensors()[0]
    assert torch.equal(seen, again)


def test_only_pictures_have_views() -> None:
    picture = torch.rand(2, 3, 32, 32)
    assert not has_views(Inputs.of((picture, picture)))
    assert not has_views(Inputs.of(torch.rand(2, 8, 32, 32)))
    assert not has_views(Inputs.of(torch.rand(2, 3, 8, 8)))
    assert not has_views(Inputs.of(torch.rand(2, 32)))
    assert not has_views(Inputs.of(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))


class _Viewing(nn.Module):
    """Code that no graph has, and that needs its input in the usual order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1)[:, :4] * float(x.shape[0] > 0)


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.own = _Viewing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.conv(x))


def test_channels_lie_side_by_side_unless_code_of_others_sees_them() -> None:
    x = Inputs.of((torch.rand(2, 3, 12, 12), torch.rand(2, 3), torch.zeros(2, 3, 4, 4).long()))
    captured = ada.capture(tiny(), batches(labels=False)[0])
    first, second, third = laid_out(captured, x).tensors()
    assert first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    assert torch.equal(first, x.tensors()[0])
    assert second is x.tensors()[1] and third is x.tensors()[2]
    assert laid_out(tiny(), x) is x
    around = ada.capture(_Around().eval(), torch.rand(2, 3, 12, 12), exclude=["own"])
    assert laid_out(around, x) is x
