"""Hooks of pytest: how many layers a run compared per instruction set, in whichever process.

Under pytest-xdist the tests run in workers, which have the counters, and the process that began
them prints the summary and ends with the status: workers send it what they counted.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]

# The tests of test_kernels.py that compare random layers on every instruction set.
COUNTED = {"test_random_shapes", "test_random_linear"}

SENT = "kernel_cases"
_found = pytest.StashKey["_Count"]()


class _Count:
    """``cases`` per instruction set: all, random ones. ``chosen``: whether the tests that make the
    random ones were selected; ``loaded``: whether their file was."""

    def __init__(self) -> None:
        self.cases: dict[str, tuple[int, int]] = {}
        self.chosen = self.loaded = False

    def add(self, sent: dict[str, Any]) -> None:
        for isa, (total, random) in sent["cases"].items():
            before = self.cases.get(isa, (0, 0))
            self.cases[isa] = (before[0] + total, before[1] + random)
        self.chosen |= sent["chosen"]
        self.loaded |= sent["loaded"]

    def idle(self) -> list[str]:
        """Instruction sets without a random case although the tests of those were selected."""
        return [isa for isa, (_, random) in self.cases.items() if self.chosen and not random]


def _own(session: pytest.Session) -> dict[str, Any]:
    """What this process has counted, as it can be sent."""
    module = sys.modules.get("test_kernels")
    cases = (
        {}
        if module is None
        else {isa: (module.CASES[isa], module.RANDOM_CASES[isa]) for isa in module.FAST_ISAS}
    )
    chosen = {getattr(item, "originalname", None) for item in session.items}
    return {
        "cases": cases,
        "chosen": chosen >= COUNTED and not session.config.option.collectonly,
        "loaded": module is not None,
    }


def _count(config: pytest.Config) -> _Count:
    return config.stash.setdefault(_found, _Count())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended; one that died has sent nothing."""
    sent = getattr(node, "workeroutput", {}).get(SENT)
    if sent is not None:
        _count(node.config).add(sent)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that compared nothing on some instruction set is a failed run."""
    own = _own(session)
    sending = getattr(session.config, "workeroutput", None)
    if sending is not None:
        sending[SENT] = own
        return
    count = _count(session.config)
    count.add(own)
    if exitstatus == pytest.ExitCode.OK and count.idle():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which instruction sets ran, and how many layers were compared on each."""
    count = _count(terminalreporter.config)
    idle = count.idle()
    if not count.loaded or (count.cases and not idle and not any(map(any, count.cases.values()))):
        return  # a run that selected other tests
    terminalreporter.section("layers compared bit for bit with the scalar reference")
    for isa, (total, random) in count.cases.items():
        terminalreporter.write_line(f"{isa:<12}{total:6d} cases, {random} of them random")
    if not count.cases:
        terminalreporter.write_line("none: this machine runs the scalar reference only")
    for isa in idle:
        terminalreporter.write_line(f"FAILED: no random case ran on {isa}", red=True)
