"""What is kept: in memory by when it was used, in files by what it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from adalayer_native import _json_cache
from adalayer_native._checkpoint import read_checkpoint, write_checkpoint
from adalayer_native._files import user_cache
from adalayer_native._json_cache import JsonCache
from adalayer_native._recent import Recent
from adalayer_native.allocation.store import Store, cache_dir
from adalayer_native.data.datasets import default_cache_dir, open_dataset
from adalayer_native.errors import FileFormatError

KIND = ("adalayer-test", "1")


def test_what_was_used_last_stays() -> None:
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    recent: Recent[str, str] = Recent(2)
    for key in "abacab":  # c takes the place of b, which was used the longest ago, and b that of c
        assert recent.get_or(key, lambda key=key: make(key)) == key.upper()
    assert made == ["a", "b", "c", "b"]
    assert "a" in recent and "b" in recent and "c" not in recent and recent.get("c") is None


def test_costs_are_added_up_and_some_are_always_kept() -> None:
    recent: Recent[str, int] = Recent(10, lambda _, value: value)
    for key, value in (("a", 4), ("b", 4), ("c", 4)):
        recent.put(key, value)
    assert "a" not in recent and len(recent) == 2
    recent.put("large", 50)
    assert len(recent) == 1 and recent.get("large") == 50  # the newest stays, whatever it costs
    recent.shrink(0, keep=0)
    assert len(recent) == 0


def test_a_cache_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "kept.json"
    with JsonCache(path, "key", "values") as cache:
        cache.values["a"] = 1
        cache.touch()
        assert not path.exists()  # a moment ago is no reason to write
        monkeypatch.setattr(_json_cache, "SAVE_INTERVAL", 0.0)
        cache.touch()
        assert json.loads(path.read_text()) == {"key": "key", "values": {"a": 1}}
    assert JsonCache(path, "key", "values").values == {"a": 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "indices"),
        ('{"key": "other", "values": {}}', "other settings"),
        ('{"key": "key"}', "values"),
        ('{"key": "key", "values": 3}', "not iterable"),
    ],
)
def test_a_cache_that_is_of_no_use_is_begun_anew(tmp_path: Path, text: str, why: str) -> None:
    path, told = tmp_path / "kept.json", []
    path.write_text(text)
    cache = JsonCache(path, "key", "values", report=told.append)
    assert cache.values == {} and len(told) == 1 and why in told[0]
    assert JsonCache(tmp_path / "none.json", "key", "values", report=told.append).values == {}
    assert len(told) == 1  # none yet is nothing to speak of


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    x = torch.arange(6.0).reshape(2, 3)
    write_checkpoint(path, KIND, "run", {"x": x.T, "again": x}, note="here")
    with read_checkpoint(path, KIND) as (metadata, handle):
        assert metadata["identity"] == "run" and metadata["note"] == "here"
        assert torch.equal(handle.get_tensor("x"), x.T)
    with (
        pytest.raises(FileFormatError, match="expected format adalayer-test version 2, got"),
        read_checkpoint(path, ("adalayer-test", "2")),
    ):
        pass
    with (
        pytest.raises(FileFormatError, match="is corrupt"),
        read_checkpoint(path, KIND) as (_, handle),
    ):
        handle.get_tensor("no such tensor")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FileFormatError, match="is corrupt"), read_checkpoint(path, KIND):
        pass


def test_a_table_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", "latency", {"a": 1})
    (tmp_path / "cache").write_text("")  # no folder
    store["x"] = 2.0
    with pytest.warns(RuntimeWarning, match=r"/cache/latency-\w+.json' cannot be kept"):
        store.save()
    with store:  # said once
        store["y"] = 3.0
    assert {name: store[name] for name in store} == {"x": 2.0, "y": 3.0}


def test_nobodys_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container a process may be a number without a name, and HOME unset."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("ADALAYER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "adalayer_native" == default_cache_dir()

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert user_cache() is None and default_cache_dir() is None and cache_dir() is None
    with Store(cache_dir(), "latency", {}) as store:
        store["x"] = 1.0
    for label in ("ape", "bee"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (4, 4)).save(tmp_path / "data" / label / f"{index}.png")
    assert open_dataset(tmp_path / "data", "train", 4).pixels().shape == (8, 3, 4, 4)
