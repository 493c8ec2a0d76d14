"""Fixtures for all tests, and the count of kernel cases per instruction set."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What the planner measures in tests stays with them. Before anything is compiled.
os.environ.setdefault("ADALAYER_PLAN_CACHE", "off")

REPOSITORY = Path(__file__).resolve().parent.parent
# The tests of test_kernels.py that compare random layers on every instruction set.
COUNTED = {"test_random_shapes", "test_random_linear"}


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


def _kernel_cases() -> dict[str, tuple[int, int]]:
    """(all cases, random ones) per instruction set that was loaded; empty without these tests."""
    module = sys.modules.get("test_kernels")
    if module is None:
        return {}
    return {isa: (module.CASES[isa], module.RANDOM_CASES[isa]) for isa in module.FAST_ISAS}


def _idle(session: pytest.Session) -> list[str]:
    """Instruction sets without a random case although the tests that make them were selected."""
    chosen = {getattr(item, "originalname", None) for item in session.items}
    if not chosen >= COUNTED or session.config.option.collectonly:
        return []
    return [isa for isa, (_, random) in _kernel_cases().items() if random == 0]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that compared nothing on some instruction set is a failed run."""
    if exitstatus == pytest.ExitCode.OK and _idle(session):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which instruction sets ran, and how many layers were compared on each."""
    cases = _kernel_cases()
    idle = _idle(terminalreporter._session)
    if "test_kernels" not in sys.modules or (
        cases and not idle and not any(map(any, cases.values()))
    ):
        return  # a run that selected other tests
    terminalreporter.section("layers compared bit for bit with the scalar reference")
    for isa, (total, random) in cases.items():
        terminalreporter.write_line(f"{isa:<12}{total:6d} cases, {random} of them random")
    if not cases:
        terminalreporter.write_line("none: this machine runs the scalar reference only")
    for isa in idle:
        terminalreporter.write_line(f"FAILED: no random case ran on {isa}", red=True)
