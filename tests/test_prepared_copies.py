"""Copies of models before ``convert``: at every stage they hold what the later steps need."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture import GraphModel
from adalayer_native.errors import CalibrationError
from adalayer_native.plan import Plan
from adalayer_native.training import fit


class Net(nn.Module):
    """A norm before a layer, one behind, a residual, a function on values, every kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm_a, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.up, self.fc = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(self.norm(x))))
        x = self.up(self.drop(nn.functional.silu(torch.relu(self.b(x) + x))))
        return self.fc(x.mean((2, 3)))


def _through_torch(model: GraphModel) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_torch,
}
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
DATA = [(X, torch.arange(6) % 5)]


@pytest.fixture(scope="module")
def planned() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = Net().eval()
    budget = ada.Budget(bits=4)
    plan = ada.allocate(
        None, budget, method="uniform", model=model, calibration=[X], progress=False
    )
    plan["b"].sparsity = 0.5
    return model, plan


def _repaired(prepared: GraphModel) -> None:
    ada.repair(prepared, DATA, progress=False)


def _finetuned(prepared: GraphModel) -> None:
    ada.finetune(prepared, DATA, 1, progress=False)


STEPS = [lambda prepared: ada.calibrate(prepared, DATA, progress=False), _repaired, _finetuned]


@pytest.mark.parametrize("way", COPIES)
def test_every_stage(way: str, planned: tuple[nn.Module, Plan]) -> None:
    model, plan = planned
    mine = ada.prepare(model, plan, X)
    yours = COPIES[way](ada.prepare(model, plan, X))
    for step in STEPS:
        step(mine)
        step(yours)
        yours = COPIES[way](yours)
        assert isinstance(yours, GraphModel) and yours.meta.keys() == mine.meta.keys()
        assert torch.equal(yours(X), mine(X))
        native, other = ada.convert(mine), ada.convert(yours)
        assert torch.equal(other(X), native(X))
        assert list(other.state_dict()) == list(native.state_dict())


def test_restored_from_a_file_into_a_model_without_memory(
    planned: tuple[nn.Module, Plan], tmp_path: Path
) -> None:
    model, plan = planned
    prepared = ada.prepare(model, plan, X)
    ada.calibrate(prepared, DATA, progress=False)
    native = ada.convert(prepared)
    ada.save(native, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = Net().eval()
    for example in (None, X, X.to("meta")):
        restored = ada.restore(empty, tmp_path / "m.safetensors", example)
        assert {tensor.device.type for tensor in restored.state_dict().values()} == {"cpu"}
        assert torch.equal(restored(X), native(X))


# -- data that can be read once -------------------------------------------------------------------


@pytest.mark.parametrize("make", [iter, lambda data: (item for item in data)])
def test_one_pass_takes_iterators(make: Callable[[Any], Any], planned: Any) -> None:
    model, plan = planned
    results = []
    for data in (DATA * 2, make(DATA * 2)):
        prepared = ada.prepare(model, plan, X)
        ada.calibrate(prepared, data, progress=False, bn_reestimate=True)
        results.append(ada.convert(prepared)(X))
    assert torch.equal(*results)
    results = []
    for data in (DATA * 2, make(DATA * 2)):
        prepared = ada.prepare(model, plan, X)
        ada.calibrate(prepared, DATA, progress=False)
        ada.repair(prepared, data, progress=False)
        results.append(ada.convert(prepared)(X))
    assert torch.equal(*results)


def test_several_passes_refuse_iterators_at_once(planned: Any) -> None:
    model, plan = planned
    prepared = ada.prepare(model, plan, X)
    ada.calibrate(prepared, DATA, progress=False)
    before = copy.deepcopy(prepared.state_dict())
    runs: list[Callable[[Any], Any]] = [
        lambda data: ada.analyze(model, data, progress=False),
        lambda data: ada.allocate(None, ada.Budget(bits=4), method="optimal", model=model,
                                  calibration=data, progress=False),
        lambda data: ada.pareto(model, data, progress=False),
        lambda data: ada.compress(model, data, ada.Budget(bits=4), progress=False),
        lambda data: ada.finetune(prepared, data, 2, progress=False),
        lambda data: fit(copy.deepcopy(model), data, 2, progress=False),
    ]  # fmt: skip
    for run in runs:
        data = iter(DATA * 2)
        with pytest.raises(CalibrationError, match="a list_iterator, which can be read only once"):
            run(data)
        assert next(data) is DATA[0]  # nothing was taken from it
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key])
