"""Fixtures for all tests, and the hooks that count kernel cases per instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_counted import (  # noqa: F401  # hooks of pytest
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# What the planner measures in tests stays with them. Before anything is compiled.
os.environ.setdefault("ADALAYER_PLAN_CACHE", "off")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real images and weights beside the repository; skips where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data" / "cifar10.zip").is_file():
        pytest.skip("needs ../shared (CIFAR-10 and baseline weights), which is not here")
    return folder


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory in place of the user's: no test reads or writes their tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", autouse=True)
def guesses_of_small_images(request: pytest.FixtureRequest) -> Iterator[None]:
    """Networks that come without an example are tried on images of 64 pixels first.

    Users' are on 224, which takes ten times as long and was most of many tests' time. What is
    guessed is the business of test_capture*.py, which guess as users do.
    """
    from adalayer_native.capture import example

    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.startswith("test_capture"):
            patch.setattr(example, "_IMAGES", (64, *example._IMAGES))
        yield


@pytest.fixture(scope="session")
def exports() -> Any:
    """``torch.export.export`` that remembers the structures of this process."""
    from helpers_exports import Exports

    return Exports()


@pytest.fixture(scope="module", autouse=True)
def one_export_for_each_structure(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models of one structure are exported once; half of the fast tests' time went into exports.

    What an export gives is the business of test_capture*.py, which export as users do, and so does
    everything with ADALAYER_FRESH_EXPORTS=1.
    """
    from adalayer_native.capture import exporting

    fresh = os.environ.get("ADALAYER_FRESH_EXPORTS", "0") != "0"
    with pytest.MonkeyPatch.context() as patch:
        if not fresh and not request.module.__name__.startswith("test_capture"):
            patch.setattr(exporting, "torch_export", request.getfixturevalue("exports"))
        yield
