"""Pruning of channels: widths, residuals and concatenations, and what is refused."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.errors import PlanError, UnsupportedModelError
from adalayer_native.models import get_model
from adalayer_native.plan import supported_layers
from adalayer_native.pruning import prune_channels


class Joined(nn.Module):
    """A residual addition and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.inner = nn.Conv2d(64, 64, 3, padding=1)
        self.side = nn.Conv2d(64, 48, 1)
        self.depthwise = nn.Conv2d(112, 112, 3, padding=1, groups=112)
        self.last = nn.Linear(112, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.inner(x) + x)
        x = torch.relu(self.depthwise(torch.cat([x, self.side(x)], dim=1)))
        return self.last(x.mean(dim=(2, 3)))


def widths(model: nn.Module) -> dict[str, int]:
    return {name: layer.weight.shape[0] for name, layer in supported_layers(model).items()}


def test_widths_shrink_through_residuals_and_concatenations() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.rand(2, 3, 8, 8)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    # Channels that cannot matter: both layers of the residual addition have zeros there.
    with torch.no_grad():
        for layer in (model.first, model.inner):
            layer.weight[1::2] = 0
            layer.bias[1::2] = 0
        model.norm.bias[1::2] = 0
        model.inner.weight[:, 1::2] = 0
        model.side.weight[:, 1::2] = 0
        model.depthwise.weight[1:64:2] = 0
        model.depthwise.bias[1:64:2] = 0
        model.last.weight[:, 1:64:2] = 0
    smaller = prune_channels(model, x, {"first": 0.5, "inner": 0.5})
    found = widths(smaller)
    assert found == {
        "first": 32, "inner": 32, "side": 48, "depthwise": 80, "last": 10,
    }  # fmt: skip
    # What went contributed nothing.
    torch.testing.assert_close(smaller(x), model(x))
    assert widths(model)["first"] == 64
    assert set(before) == set(smaller.state_dict())
    assert all(p.requires_grad for p in smaller.parameters())


@pytest.mark.parametrize(("share", "width"), [(0.0, 64), (0.1, 64), (0.3, 48), (0.99, 16)])
def test_widths_are_whole_tiles(share: float, width: int) -> None:
    pytest.importorskip("torch_pruning")
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 3)).eval()
    smaller = prune_channels(model, torch.rand(1, 3, 8, 8), share)
    assert widths(smaller) == {"0": width, "2": 10}


def test_a_narrower_network_goes_all_the_way() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, x = get_model("resnet20").eval(), torch.rand(4, 3, 32, 32)
    smaller = prune_channels(model, x, 0.5)
    assert smaller(x).shape == model(x).shape
    found = widths(smaller)
    assert found != widths(model)
    assert all(width % 16 == 0 for name, width in found.items() if width != 10), found
    result = ada.compress(smaller, [x], ada.Budget(bits=4), method="uniform")
    assert result.model(x).shape == (4, 10)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)), torch.rand(1, 3, 8, 8)
    load = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "torch_pruning":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        with pytest.raises(ImportError, match=r"adalayer_native\[channels\]"):
            prune_channels(model, x, 0.5)
    pytest.importorskip("torch_pruning")
    with pytest.raises(PlanError, match="unknown layer 'a'"):
        prune_channels(model, x, {"a": 0.5})
    with pytest.raises(PlanError, match="layer '0': sparsity"):
        prune_channels(model, x, {"0": 1.0})
    with pytest.raises(PlanError, match="multiple"):
        prune_channels(model, x, 0.5, multiple=0)

    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match="cannot be traced"):
        prune_channels(Branching(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)), x, 0.5)
