"""Image folders, zips, digits, and the loaders."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adalayer_native.data import (
    Batches,
    calibration_indices,
    datasets,
    digits,
    loaders,
    open_dataset,
    sources,
)
from adalayer_native.errors import DataError
from adalayer_native.models import get_model, load_weights


def picture(value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.full((size[1], size[0], 3), value, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def make_folder(root: Path, per_class: int = 5) -> Path:
    for split, offset in (("train", 0), ("test", 100)):
        for label, name in enumerate(("ape", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                (folder / f"{index}.png").write_bytes(picture(offset + 10 * label + index))
    return root


def zipped(folder: Path, target: Path, top: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return target


@pytest.mark.parametrize("form", ["folder", "zip", "zip with top folder"])
def test_folder_and_zip_give_the_same(tmp_path, form: str) -> None:
    path = make_folder(tmp_path / "data")
    if form != "folder":
        path = zipped(path, tmp_path / "data.zip", "images/" if "top" in form else "")
    train = open_dataset(path, "train", 8, cache=False)
    test = open_dataset(path, "test", 8, cache=False)
    assert train.classes == ["ape", "bee", "cat"]
    assert train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert train.pixels()[:, 0, 0, 0].tolist() == [10 * (i // 5) + i % 5 for i in range(15)]
    assert test.pixels(torch.tensor([14, 0]))[:, 2, 7, 7].tolist() == [124, 100]
    image, label = train[6]
    assert label == 1
    assert image[0, 0, 0].item() == pytest.approx((11 / 255 - 0.485) / 0.229, abs=1e-6)


def test_val_is_test_and_classes_without_splits(tmp_path) -> None:
    root = make_folder(tmp_path / "data", 10)
    (root / "test").rename(root / "val")
    assert len(open_dataset(root, "test", 8, cache=False)) == 30
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"no 'test' directory .*found train"):
        open_dataset(root, "test", 8)
    train = open_dataset(root / "train", "train", 8, cache=False)
    test = open_dataset(root / "train", "test", 8, cache=False)
    assert (len(train), len(test)) == (24, 6)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_other_sizes_are_scaled_and_cropped(tmp_path) -> None:
    for name, data in (
        ("a.png", picture(50, (40, 20))),
        ("b.jpg", picture(50, (9, 30), "JPEG")),
        ("c.webp", picture(50, (3, 3), "WEBP")),
    ):
        target = tmp_path / "train" / "one" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    pixels = open_dataset(tmp_path, "train", 8, cache=False).pixels()
    assert pixels.shape == (3, 3, 8, 8)
    assert (pixels.int() - 50).abs().max() <= 3


def test_grey_and_transparent_images_become_rgb(tmp_path) -> None:
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8), 77).save(folder / "grey.png")
    Image.new("RGBA", (8, 8), (77, 77, 77, 128)).save(folder / "alpha.png")
    assert (open_dataset(tmp_path, "train", 8, cache=False).pixels() == 77).all()


def test_disk_cache(tmp_path, monkeypatch) -> None:
    root = make_folder(tmp_path / "data")
    cache = tmp_path / "cache"
    first = open_dataset(root, "train", 8, cache_dir=cache)
    part = first.pixels(torch.tensor([3]))
    assert part.shape == (1, 3, 8, 8)
    assert not cache.exists()  # only a complete split is kept
    expected = first.pixels().clone()
    (file,) = cache.iterdir()

    def never(*_: object) -> None:
        raise AssertionError("decoded although cached")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "decode_image", never)
        assert torch.equal(open_dataset(root, "train", 8, cache_dir=cache).pixels(), expected)
    file.write_bytes(file.read_bytes()[:200])  # damaged: decoded again and replaced
    assert torch.equal(open_dataset(root, "train", 8, cache_dir=cache).pixels(), expected)
    assert len(file.read_bytes()) > 200
    (root / "train" / "ape" / "0.png").write_bytes(picture(200))
    changed = open_dataset(root, "train", 8, cache_dir=cache).pixels()
    assert changed[0, 0, 0, 0] == 200


def test_cache_that_cannot_be_written_is_only_a_warning(tmp_path) -> None:
    root = make_folder(tmp_path / "data")
    (tmp_path / "file").write_text("not a folder")
    data = open_dataset(root, "train", 8, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="could not be cached"):
        data.pixels()


def test_large_splits_are_not_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 100)
    data = open_dataset(make_folder(tmp_path / "data"), "train", 8, cache_dir=tmp_path / "cache")
    assert data.pixels(torch.tensor([7, 7]))[:, 0, 0, 0].tolist() == [12, 12]
    assert sum(len(y) for _, y in Batches(data, 4)) == 15
    assert data._pixels is None


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", picture(1, (64, 64))[:-40], picture(1)[:30]],
    ids=["empty", "text", "half the pixels", "half a header"],
)
def test_unreadable_image_names_the_file(tmp_path, content: bytes) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train" / "bee" / "2.png").write_bytes(content)
    for path in (root, zipped(root, tmp_path / "data.zip")):
        with pytest.raises(DataError, match=r"bee/2\.png"):
            open_dataset(path, "train", 8, cache=False).pixels()


def test_oversized_images_are_refused(tmp_path, monkeypatch) -> None:
    root = make_folder(tmp_path / "data")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/0.png", b"\x00" * 300_000)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 200_000)
    with pytest.raises(DataError, match=r"train/a/0\.png.*at most 200,000"):
        open_dataset(bomb, "train", 8, cache=False).pixels()
    monkeypatch.setattr(datasets, "MAX_PIXELS", 63)
    with pytest.raises(DataError, match="8x8; at most 63 pixels"):
        open_dataset(root, "train", 8, cache=False).pixels()


def test_names_in_a_zip(tmp_path) -> None:
    def written(name: str, change: Callable[[str], str]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for split in ("train", "test"):
                for label in "ab":
                    for i in range(2):
                        archive.writestr(change(f"{split}/{label}/{i}.png"), picture(i))
        return tmp_path / name

    windows = open_dataset(written("windows.zip", lambda name: name.replace("/", "\\")), "train", 8)
    assert windows.classes == ["a", "b"] and len(windows) == 4
    assert len(windows.pixels()) == 4
    with pytest.raises(DataError, match=r"entry '\.\./train/a/0\.png' leads out of the zip"):
        open_dataset(written("outside.zip", lambda name: f"../{name}"))
    with pytest.raises(DataError, match="leads out of the zip"):
        open_dataset(written("back.zip", lambda name: f"..\\{name}".replace("/", "\\")))


def test_missing_and_useless_data(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images found"):
        open_dataset(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"x\.zip.* readable zip"):
        open_dataset(tmp_path / "x.zip")
    (tmp_path / "loose.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"'loose\.png' is in no class directory"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="split must be"):
        open_dataset(tmp_path, "validation")
    with pytest.raises(DataError, match="image size"):
        open_dataset(tmp_path, size=0)


def test_digits() -> None:
    train, test = digits(32)
    assert len(train) + len(test) == 1797
    assert train.pixels().shape[1:] == (3, 32, 32)
    assert train.pixels().dtype == torch.uint8
    assert torch.bincount(test.labels).min() >= 34
    again, _ = digits(32)
    assert torch.equal(train.pixels(), again.pixels())


def test_batches_are_deterministic_per_epoch() -> None:
    train, _ = digits(16)
    one = Batches(train, 64, shuffle=True, augment=True, seed=3)
    two = Batches(train, 64, shuffle=True, augment=True, seed=3)
    first, second = list(one), list(one)
    assert len(first) == len(one)
    assert not torch.equal(first[0][0], second[0][0])
    two.set_epoch(1)
    for (x, y), (u, v) in zip(second, two, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert len(Batches(train, 64, drop_last=True)) == len(train) // 64
    seen = torch.cat([y for _, y in Batches(train, 100)])
    assert torch.equal(seen, train.labels)
    assert list(Batches(train, 8, indices=torch.empty(0, dtype=torch.int64))) == []


def test_augmentation_shifts_and_mirrors() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    moved = datasets_augment(pixels, generator)
    base = torch.nn.functional.pad(pixels[0, 0], (4, 4, 4, 4))
    windows = [base[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    allowed = {tuple(w.flatten().tolist()) for w in windows}
    mirrored = {tuple(w.flip(1).flatten().tolist()) for w in windows}
    kinds = [tuple(image[0].flatten().tolist()) for image in moved]
    assert all(kind in allowed or kind in mirrored for kind in kinds)
    assert 50 < sum(kind in mirrored for kind in kinds) < 150
    assert torch.equal(moved[:, 0], moved[:, 2])


def datasets_augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    from adalayer_native.data.loaders import random_crop_flip

    return random_crop_flip(pixels, generator)


def test_loaders_take_calibration_from_train_only() -> None:
    train, test = digits(8)
    data = loaders(train, test, calibration=50)
    indices = calibration_indices(train, 50)
    assert len(indices.unique()) == 50
    assert torch.bincount(train.labels[indices]).tolist() == [5] * 10
    x = torch.cat([x for x, _ in data.calibration])
    assert torch.equal(x, train.normalise(train.pixels(indices)))
    assert sum(len(y) for _, y in data.test) == len(test)
    assert len(calibration_indices(train, 10**6)) == len(train)


def test_loader_errors() -> None:
    train, test = digits(8)
    with pytest.raises(DataError, match="at least 1 image"):
        loaders(train, test, calibration=0)
    with pytest.raises(DataError, match="batch_size"):
        Batches(train, 0)
    test.classes = ["x"]
    with pytest.raises(DataError, match="different classes"):
        loaders(train, test)
    train.classes = ["x"]
    with pytest.raises(DataError, match=r"one class only, 'x'"):
        loaders(train, test)


def test_real_images_and_weights(shared_dir) -> None:
    data = open_dataset(shared_dir / "data" / "cifar10.zip", "test", cache=False)
    assert len(data) == 10_000
    model = load_weights(
        get_model("resnet20"), shared_dir / "models" / "resnet20_cifar10.safetensors"
    )
    hits = 0
    with torch.no_grad():
        for x, y in Batches(data, 250, indices=torch.arange(0, 10_000, 20)):
            hits += int((model(x).argmax(1) == y).sum())
    assert hits / 500 > 0.88  # 91.73 % on all; three standard errors of 500 images are 3.7
