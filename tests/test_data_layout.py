"""Folders and zips that are not quite as expected: what is found, refused, or left out aloud."""

from __future__ import annotations

import inspect
import io
import os
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from adalayer_native.cli import app
from adalayer_native.data import open_dataset
from adalayer_native.data.folders import DATA_HELP
from adalayer_native.data.sources import ImageList, list_images
from adalayer_native.errors import DataError


def dot(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path: Path):
    """A function from names to a folder or zip with such files; a name with a / at its end is a
    folder."""

    def made(*names: str) -> Path:
        if request.param == "zip":
            target = tmp_path / "data.zip"
            with zipfile.ZipFile(target, "w") as archive:
                for name in names:
                    archive.writestr(name, b"" if name.endswith("/") else dot())
            return target
        for name in names:
            file = tmp_path / "data" / name
            if name.endswith("/"):
                file.mkdir(parents=True)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(dot())
        return tmp_path / "data"

    return made


def some(*folders: str, count: int = 5, ending: str = ".png") -> list[str]:
    return [f"{folder}/{index}{ending}" for folder in folders for index in range(count)]


PARTS = some("train/ape", "train/bee", "test/ape", "test/bee")


def listed(path: Path) -> tuple[ImageList, ImageList]:
    return list_images(path, "train"), list_images(path, "test")


@pytest.mark.parametrize("top", ["", "one/", "one/two/", "one/two/three/"])
def test_folders_that_hold_nothing_else_do_not_matter(make, top: str) -> None:
    train, test = listed(make(*(top + name for name in PARTS)))
    assert train.classes == test.classes == ["ape", "bee"]
    assert train.names == [top + name for name in PARTS if "train/" in name]
    assert test.labels == [0] * 5 + [1] * 5


@pytest.mark.parametrize("top", ["", "one/", "one/two/"])
def test_every_fifth_image_of_a_class_is_a_test_image(make, top: str) -> None:
    train, test = listed(make(*some(f"{top}ape", f"{top}bee", count=10)))
    assert test.names == [f"{top}{name}/{index}.png" for name in ("ape", "bee") for index in (4, 9)]
    assert len(train.names) == 16 and not set(train.names) & set(test.names)


@pytest.mark.parametrize(
    "names",
    [
        some("a/train/ape", "a/test/ape", "b/train/ape", "b/test/ape"),
        some("train_set/ape", "train_set/bee", "test_set/ape", "test_set/bee"),
        [*some("one/ape", "one/bee"), *some("two")],
    ],
)
def test_classes_that_lie_too_deep_are_refused(make, names: list[str]) -> None:
    with pytest.raises(DataError, match=r"is too far down .*expected train/<class>/<image> and"):
        list_images(make(*names), "train")


def test_images_that_lie_in_the_parts_themselves_are_refused(make) -> None:
    with pytest.raises(DataError, match=r"'test', 'train' itself, in no class directory"):
        list_images(make(*some("train", "test")), "train")


def test_a_class_may_be_called_like_a_part(make) -> None:
    assert list_images(make(*some("car", "train", "truck")), "train").classes == [
        "car", "train", "truck",
    ]  # fmt: skip


def test_folders_within_a_class(make) -> None:
    train, _ = listed(make(*PARTS, *some("train/bee/more")))
    assert train.labels == [0] * 5 + [1] * 10


def test_a_class_that_only_test_has_is_refused(make) -> None:
    with pytest.raises(DataError, match=r"class 'cat' only in 'test': nothing in 'train'"):
        list_images(make(*PARTS, *some("test/cat")), "train")


def test_a_class_that_only_train_has_is_named(make) -> None:
    path = make(*PARTS, *some("train/cat"))
    with pytest.warns(UserWarning, match=r"class 'cat' only in 'train', so no test image is of it"):
        train = list_images(path, "train")
    assert train.classes == ["ape", "bee", "cat"]
    with pytest.warns(UserWarning, match="class 'cat' only in 'train'"):
        assert list_images(path, "test").labels == [0] * 5 + [1] * 5


def test_a_class_too_small_for_a_test_image_is_named(make) -> None:
    with pytest.warns(UserWarning, match=r"class 'cat' of fewer than 5 images"):
        list_images(make(*some("ape", "bee"), *some("cat", count=4)), "test")


def test_numbers_of_classes_are_those_of_train(make) -> None:
    """A model's outputs are what it was trained on; the other part cannot move them."""
    path = make(*some("val/bee", "train/bee", "train/ape"))
    with pytest.warns(UserWarning, match="class 'ape' only in 'train'"):
        assert list_images(path, "test").labels == [1] * 5


def test_what_lies_outside_of_the_parts_is_named(make) -> None:
    path = make(*PARTS, *some("val/ape", "extra/ape", count=2), "train/loose.png", "cover.png")
    with pytest.warns(
        UserWarning, match=r"6 images \('cover\.png', 'extra/ape/0\.png' and 4 more\)"
    ):
        _, test = listed(path)
    assert {name.split("/")[0] for name in test.names} == {"test"}


def test_folders_without_images_are_named(make) -> None:
    path = make(*PARTS, "train/cow/", "train/dog/clip.mp4", "test/dog/clip.mp4")
    expected = (
        r"3 folders \('test/dog', 'train/cow' and 1 more\) without images that can be read; "
        r"2 files of other kinds left out \(\.mp4 2\)"
    )
    with pytest.warns(UserWarning, match=expected):
        list_images(path, "train")


def test_other_kinds_of_files_are_counted(make) -> None:
    path = make(*PARTS, "README", *some("train/ape", count=3, ending=".HEIC"), "train/ape/x.txt")
    with pytest.warns(UserWarning, match=r"left out \(\.heic 3, without ending 1, \.txt 1\)"):
        list_images(path, "train")
    # Both parts of one data set say the same, so that it is shown once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for split in ("train", "test"):
            open_dataset(path, split, 8, cache=False)
    assert len(caught) == 1


def test_nothing_but_other_kinds(make) -> None:
    with pytest.raises(DataError, match=r"no images found \(.*\.webp\); 3 files .*\.heic 3"):
        list_images(make(*some("train/ape", count=3, ending=".heic")), "train")


def test_hidden_files_are_nobodys_business(make) -> None:
    path = make(*PARTS, ".DS_Store", "__MACOSX/train/ape/._0.png", "train/ape/._0.png", ".git/x")
    assert len(list_images(path, "train").names) == 10


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("bmp", "BMP"),
        ("gif", "GIF"),
        ("JPG", "JPEG"),
        ("jfif", "JPEG"),
        ("png", "PNG"),
        ("tif", "TIFF"),
        ("tiff", "TIFF"),
        ("webp", "WEBP"),
    ],
)
def test_every_known_kind_is_read(tmp_path, ending: str, kind: str) -> None:
    file = tmp_path / "train" / "one" / f"x.{ending}"
    file.parent.mkdir(parents=True)
    file.write_bytes(dot(kind))
    assert (open_dataset(tmp_path, "train", 4, cache=False).pixels() == 9).all()


# -- links ----------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, names: list[str]) -> Path:
    for name in names:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dot())
    return tmp_path / "data"


def test_linked_folders_are_followed(tmp_path) -> None:
    root = folder_with(tmp_path, [*some("train/ape", "test/ape", "test/bee"), "../far/bee/0.png"])
    (root / "train" / "bee").symlink_to(tmp_path / "far" / "bee")
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        assert list_images(path, "train").names[-1] == "train/bee/0.png"


@pytest.mark.parametrize("name", ["train/cat", "train/ape/9.png"])
def test_dangling_links_are_named(tmp_path, name: str) -> None:
    root = folder_with(tmp_path, PARTS)
    (root / name).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=rf"dangling link '.*{name}': it leads to '.*/gone'"):
        list_images(root, "train")


def test_links_in_a_circle_are_named(tmp_path) -> None:
    root = folder_with(tmp_path, PARTS)
    (root / "train" / "ape" / "again").symlink_to(root)
    with pytest.raises(DataError, match=r"link '.*again' leads back"):
        list_images(root, "train")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch) -> None:
    root = folder_with(tmp_path, PARTS)
    scandir = os.scandir

    def refused(path: Path) -> object:
        if path.name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot read the folder '.*/bee'.*denied"):
        list_images(root, "train")


def test_the_help_says_the_rule() -> None:
    for command in (["compress"], ["train"], ["study", "green"], ["study", "adalayernet"]):
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "400"}).stdout
        assert " ".join(DATA_HELP.split()) in " ".join(shown.split()), command


def test_something_else_than_a_file_is_named(tmp_path) -> None:
    for name in PARTS:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dot())
    os.mkfifo(tmp_path / "train" / "ape" / "pipe.png")  # reading it would wait for ever
    with pytest.warns(UserWarning, match=r"pipe, socket or device 'train/ape/pipe.png' left out"):
        train = list_images(tmp_path, "train")
    assert len(train.names) == 10


def test_a_class_whose_name_is_no_text_is_refused(tmp_path) -> None:
    """It could be written into no report and no engine's file, after all of the work."""
    for label in (b"ape", b"caf\xe9"):
        folder = os.fsencode(tmp_path) + b"/data/" + label
        os.makedirs(folder)
        for index in range(5):
            Path(os.fsdecode(folder), f"{index}.png").write_bytes(dot())
    with pytest.raises(DataError, match=r"class folder 'caf\\udce9'.*is not UTF-8.*rename it"):
        list_images(tmp_path / "data", "train")


def test_more_folders_within_each_other_than_calls(tmp_path) -> None:
    inside = tmp_path.joinpath(*["d"] * 200)  # (as many as shutil.rmtree of old Pythons can remove)
    for label in ("ape", "bee"):
        (inside / label).mkdir(parents=True)
        for index in range(5):
            (inside / label / f"{index}.png").write_bytes(dot())
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack(0)) + 100)
        assert len(list_images(tmp_path, "train").names) == 8
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "data '' is no path"),
        ("a\0b", "cannot be looked at"),
        ("x" * 5000, "cannot be looked at .*too long"),
        ("/dev/null", "is a device"),
    ],
)
def test_paths_that_cannot_be(path: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        list_images(path, "train")


def test_zips_damaged_anywhere_are_refused_or_read(tmp_path) -> None:
    """Python's reader has other errors for names that are none, sizes and versions."""
    names = [
        f"{part}/{label}/{i}.png" for part in ("train", "test") for label in "aé" for i in "01"
    ]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, dot())
    whole = stream.getvalue()
    directory = whole.index(b"PK\1\2")
    refused = 0
    for place in range(directory, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file = tmp_path / "data.zip"
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = list_images(file, "train")
                for name in found.names:
                    found.read(name)
            except DataError as error:  # any other is a failure
                refused += str(file) in str(error)
    assert refused > 100
