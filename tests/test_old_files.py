"""Files that an earlier version has written give the bits that they gave then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import adalayer_native as ada
from adalayer_native.models import resnet20

# Written before models were captured by torch.export: a ResNet-20 of 8, 4 and 3 bits by turns,
# every second layer with 30 % zeros, and what it answered.
FOLDER = Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def answered() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 32)
    rows = json.loads((FOLDER / "resnet20.json").read_text())["output"]
    return x, torch.tensor([[float.fromhex(value) for value in row] for row in rows])


@torch.no_grad()
def test_safetensors(answered: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    x, y = answered
    native = ada.restore(resnet20(10), FOLDER / "resnet20.safetensors")
    assert torch.equal(native(x), y)
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert torch.equal(engine(x), y)
    ada.save(native, tmp_path / "again.safetensors")
    assert torch.equal(ada.restore(resnet20(10), tmp_path / "again.safetensors")(x), y)


def test_ada(answered: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    x, y = answered
    engine = ada.load(shutil.copy(FOLDER / "resnet20.ada", tmp_path))
    assert torch.equal(engine(x), y)
    engine.save(tmp_path / "again.ada")
    assert torch.equal(ada.load(tmp_path / "again.ada")(x), y)
