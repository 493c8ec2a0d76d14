"""Saved engines: files, damage to them, and how their weights are held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_engine import native_of
from helpers_patterns import PATTERNS, Net, small_engine, smooth
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import _C, ops
from adalayer_native.engine import Engine
from adalayer_native.engine.emit import emit
from adalayer_native.engine.export import export
from adalayer_native.engine.segments import divide
from adalayer_native.errors import FileFormatError, UnsupportedModelError


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Engine]:
    return small_engine()


@torch.no_grad()
def test_save_and_load(small: tuple[nn.Module, Engine], tmp_path: Path) -> None:
    _, engine = small
    path = tmp_path / "model.ada"
    preprocessing = {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    names = ["cat", "dog", "häschen", "fish"]
    size = engine.save(path, preprocessing=preprocessing, class_names=names)
    assert size == path.stat().st_size
    assert [item.name for item in tmp_path.iterdir()] == ["model.ada"]
    loaded = ada.load(path)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(x), engine(x))
    assert loaded.preprocessing == preprocessing
    assert loaded.class_names == names
    assert loaded.inputs == engine.inputs
    assert loaded.coverage(rounds=0).native_share == 1.0
    again = tmp_path / "again.ada"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        engine.save(tmp_path / "file" / "model.ada")


def test_a_file_says_nothing_of_another_one(
    small: tuple[nn.Module, Engine], tmp_path: Path
) -> None:
    _, engine = small
    plain, named = tmp_path / "plain.ada", tmp_path / "named.ada"
    engine.save(plain)
    engine.save(named, preprocessing={"size": [8, 8]}, class_names=["a", "b", "c", "d"])
    before = plain.read_bytes()
    engine.save(plain)
    assert plain.read_bytes() == before
    assert ada.load(plain).class_names is None
    assert ada.load(named).class_names == ["a", "b", "c", "d"]


def test_damaged_files(small: tuple[nn.Module, Engine], tmp_path: Path) -> None:
    _, engine = small
    path = tmp_path / "model.ada"
    engine.save(path)
    data = path.read_bytes()
    with pytest.raises(FileFormatError, match=r"missing\.ada"):
        ada.load(tmp_path / "missing.ada")
    with pytest.raises(FileFormatError, match=tmp_path.name):
        ada.load(tmp_path)
    broken = tmp_path / "broken.ada"
    for content in (b"", b"nonsense" * 20, data[: len(data) // 2], data[:-1], data + b"x"):
        broken.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"broken\.ada"):
            ada.load(broken)
    for position in range(0, len(data), max(1, len(data) // 200)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        broken.write_bytes(bytes(flipped))
        with pytest.raises(FileFormatError, match=r"broken\.ada"):
            ada.load(broken)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("adalayer.outputs", "[[0, [5], null]]"),
        ("adalayer.outputs", "[[3, [4], null]]"),
        ("adalayer.outputs", "[[0, [4], [[4, 7]]]]"),
        ("adalayer.outputs", "[[0, [4], [[4, -1]]]]"),
        ("adalayer.inputs", '[["x", [3, 8, 9]]]'),
        ("adalayer.inputs", "{}"),
        ("adalayer.order", "[0, 0]"),
        ("adalayer.order", "[2]"),
        ("adalayer.leaves", '[{"tensor": 4}]'),
        ("adalayer.structure", "3"),
        ("adalayer.structure", '{"tuple": [0], "list": []}'),
        ("adalayer.structure", "nothing"),
        ("adalayer.structure", "[" * 100_000),
        ("adalayer.order", "[1e999]"),
        ("adalayer.order", "[-1]"),
        ("adalayer.outputs", "[[-1, [4], null]]"),
        ("adalayer.outputs", f"[[0, {[1] * 1000 + [4]}, null]]"),
        ("adalayer.outputs", "[[0, [4], [[-2, 1], [-2, 1]]]]"),
        ("adalayer.leaves", '[{"tensor": -1}]'),
    ],
)
def test_metadata_that_does_not_fit_the_program(
    small: tuple[nn.Module, Engine], tmp_path: Path, key: str, text: str
) -> None:
    _, engine = small
    path = tmp_path / "model.ada"
    engine.save(path)
    program = _C.Program.load(str(path))
    assert key in program.metadata()
    program.set_metadata(key, text)
    program.save(str(path))
    with pytest.raises(FileFormatError, match="metadata"):
        ada.load(path)


def test_a_file_that_needs_too_much_memory(small: tuple[nn.Module, Engine], tmp_path: Path) -> None:
    _, engine = small
    path = tmp_path / "model.ada"
    size = engine.save(path)
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(ada.load(path, max_memory=64 << 20)(x), engine(x))
    for limit in (1, size - 1, size + 1):  # at last the file is read, but not made ready
        with pytest.raises(FileFormatError, match="limit"):
            ada.load(path, max_memory=limit)
    with pytest.raises(ValueError, match="max_memory"):
        ada.load(path, max_memory=0)


def test_a_program_of_another_writer(small: tuple[nn.Module, Engine], tmp_path: Path) -> None:
    """Without our metadata inputs and outputs are what the program says: c x h x w."""
    native, _ = small
    exported = export(native, torch.zeros(2, 3, 8, 8))
    (part,), _ = divide(exported, {})
    assert part.lowered is not None
    path = tmp_path / "model.ada"
    emit(part.lowered.program).save(str(path))
    engine = ada.load(path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(engine(x), native(x).reshape(2, 4, 1, 1))
    assert engine.class_names is None and engine.preprocessing is None


@torch.no_grad()
def test_forms_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed, resident or measured: the same bits, the same file, other memory."""
    make, channels = PATTERNS["residual"]
    torch.manual_seed(5)
    native = native_of(Net(make(), channels), smooth(16, seed=1), bits=3)
    x = smooth(3, seed=2)
    monkeypatch.setenv("ADALAYER_PLAN_CACHE", str(tmp_path / "plans"))
    engines = {
        form: ada.compile(native, x[:1], policy="native", strict=True, weights=form)
        for form in ("streamed", "resident", "measured")
    }
    files = []
    for form, engine in engines.items():
        assert torch.equal(engine(x), native(x)), form
        engine.save(tmp_path / f"{form}.ada")
        files.append((tmp_path / f"{form}.ada").read_bytes())
        loaded = ada.load(tmp_path / "streamed.ada", weights=form)
        assert loaded.weight_bytes == engine.weight_bytes
    assert files[0] == files[1] == files[2]
    if ops.active_isa() != "scalar":
        assert engines["streamed"].weight_bytes < engines["resident"].weight_bytes
        assert (tmp_path / "plans").read_text().startswith("adalayer plans 1\n")
    with pytest.raises(ValueError, match="weights must be one of"):
        ada.compile(native, x[:1], weights="packed")
    with pytest.raises(ValueError, match="weights must be one of"):
        ada.load(tmp_path / "streamed.ada", weights="packed")


def test_an_input_among_the_results_cannot_be_saved(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.conv(x)

    x = smooth(2, seed=1)
    engine = ada.compile(native_of(Echo(), x), x, policy="native")
    assert torch.equal(engine(x)[0], x)
    with pytest.raises(UnsupportedModelError, match="returns its input 'x' as it is"):
        engine.save(tmp_path / "m.ada")
    assert not list(tmp_path.iterdir())
