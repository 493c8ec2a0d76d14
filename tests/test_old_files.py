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


# Small networks that need one version of the .ada format each, with what every level answered.
VERSIONS = json.loads((FOLDER / "versions.json").read_text())


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_of_the_format(name: str, tmp_path: Path) -> None:
    data = (FOLDER / name).read_bytes()
    assert name == f"ada-{data[8]}.{data[10]}.ada"  # the lower bytes of the header's version
    engine = ada.load(shutil.copy(FOLDER / name, tmp_path))
    given, levels = VERSIONS[name]["input"], VERSIONS[name]["output"]
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = images if given == "images" else torch.tensor(given)
    assert engine.levels == len(levels)
    for level, rows in enumerate(levels):
        engine.set_quality(level)
        wanted = torch.tensor([[float.fromhex(value) for value in row] for row in rows])
        assert torch.equal(engine(x), wanted)
    engine.save(tmp_path / "again.ada")
    assert (tmp_path / "again.ada").read_bytes() == data


def test_the_newest_version_of_the_format_is_among_them() -> None:
    text = (Path(__file__).parent.parent / "csrc/engine/container.hpp").read_text()
    newest = text.split("kAdaMinor = ")[1].split(";")[0]
    assert f"ada-1.{newest}.ada" in VERSIONS


def test_each_reader_names_the_other_for_the_other_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(ada.FileFormatError, match=r"packed model file: .*restore\(model, path\)"):
        ada.load(FOLDER / "resnet20.safetensors")
    with pytest.raises(ada.FileFormatError, match=r"an engine's: .*load\(path\) opens it"):
        ada.restore(resnet20(10), FOLDER / "resnet20.ada")
    neither = tmp_path / "model.ada"
    neither.write_bytes(b"neither of them, but long enough")
    for read in (ada.load, lambda path: ada.restore(resnet20(10), path)):
        with pytest.raises(ada.FileFormatError) as caught:
            read(neither)
        assert "opens it" not in str(caught.value)
