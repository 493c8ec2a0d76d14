"""The fuzzer of what Python reads, for a few seconds; `make fuzz` and .ci/run do the long runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).resolve().parent / "fuzz" / "fuzz_python.py"


@pytest.mark.slow
def test_files_are_read_or_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZER), "--seconds", "10", "--crashes", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    executions = re.search(r"number_of_executed_units: *(\d+)", done.stdout + done.stderr)
    assert executions is not None and int(executions[1]) > 50


def test_a_finding_can_be_run_again(tmp_path: Path) -> None:
    """Two inputs that are refused: no safetensors file, and a text that is no JSON."""
    for name, data in (("a", b"\x00not a file of tensors"), ("b", b"\x05[[[")):
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, str(FUZZER), str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": ran") == 2
