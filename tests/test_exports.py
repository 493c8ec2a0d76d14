"""Exports that tests share: for models of one structure, and for no others."""

from __future__ import annotations

import pytest
import torch
from helpers_exports import Exports
from torch import Tensor, nn

from adalayer_native.capture import capture, exporting


class Net(nn.Module):
    def __init__(
        self, seed: int = 0, width: int = 4, times: float = 1.0, shift: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.norm.running_mean.uniform_(-1, 1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(width, 5)
        self.times = times
        self.table = {"shift": torch.tensor(shift)}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))) * self.times
        return self.fc(self.drop(x).mean((2, 3)))


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Exports:
    found = Exports()
    monkeypatch.setattr(exporting, "torch_export", found)
    return found


X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_models_of_one_structure_share_an_export(own: Exports) -> None:
    codes = set()
    for seed in range(3):
        model = Net(seed).eval()
        found = capture(model, X)
        codes.add(found.code)
        assert torch.equal(found(X), model(X))  # with its own tensors
        assert found.get_submodule("conv").weight.data_ptr() == model.conv.weight.data_ptr()
    assert len(codes) == 1 and (own.made, own.reused) == (1, 2)


def test_another_structure_is_exported(own: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(Net(), X)
    hooked = Net()
    hooked.conv.register_forward_hook(lambda module, args, out: out * 2)
    tied = Net()
    tied.norm.bias = tied.norm.weight
    strided = Net()
    strided.conv.stride = (2, 2)
    models = [Net(width=6), Net(times=2.0), Net(shift=1.0), Other(), hooked, tied, strided]
    for count, model in enumerate(models, 2):
        model.eval()
        assert torch.equal(capture(model, X)(X), model(X))
        assert (own.made, own.reused) == (count, 0), model
    for x in (X[:, :, :8].clone(), X.to(memory_format=torch.channels_last)):
        before = own.made
        capture(Net(), x)
        assert own.made > before and own.reused == 0
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x) - 1)
    changed = Net().eval()
    assert torch.equal(capture(changed, X)(X), changed(X)) and own.reused == 0


def test_what_cannot_be_compared_is_exported(own: Exports) -> None:
    for _ in range(2):
        model = Net()
        model.table["thing"] = object()
        capture(model, X)
    assert (own.made, own.reused) == (2, 0)
