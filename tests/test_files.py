"""Writing files: whole or not at all, and errors that name the file that was asked for."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_patterns import small_engine
from torch import nn

import adalayer_native as ada
from adalayer_native import plot
from adalayer_native._files import replacing, write_atomic, write_text_atomic


@contextmanager
def no_room(size: int = 16) -> Iterator[None]:
    """Files cannot grow beyond ``size`` bytes: writes fail as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _plan() -> ada.Plan:
    layer = ada.LayerPlan("conv", "conv2d", 100, 4)
    return ada.Plan({"conv": layer})


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: write_atomic(path, bytes(1000)),
    "text": lambda path: write_text_atomic(path, "x" * 1000),
    "plan": lambda path: _plan().save(path),
    "picture": lambda path: plot.ribbon(_plan(), path.with_suffix(".png")),
    "weights": lambda path: ada.save(nn.Linear(4, 4), path),
    "engine": lambda path: small_engine()[1].save(path),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_without_room_is_an_error_that_names_the_file(what: str, tmp_path: Path) -> None:
    if what == "engine":
        small_engine()  # torch's own first compilation writes files, too
    with no_room(), pytest.raises(OSError, match=r"\[Errno .*/out") as caught:
        WRITERS[what](tmp_path / "out")
    assert caught.value.errno in (errno.EFBIG, 0)  # 0: a library's own words
    assert Path(caught.value.filename).stem == "out" and ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="/file'"):
        write_atomic(tmp_path / "file" / "out", b"")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"), replacing(tmp_path / "out"):
        (tmp_path / "nothing.txt").read_bytes()

    def interrupted() -> None:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "out", "old")
    with no_room(), pytest.raises(OSError, match="/out'"):
        write_text_atomic(tmp_path / "out", "new" * 100)
    assert (tmp_path / "out").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
