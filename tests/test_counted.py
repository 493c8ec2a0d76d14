"""A run that compares no kernel with the reference fails, however many processes it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Other plugins take seconds to load.
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}

KERNELS = """
from collections import Counter
CASES, RANDOM_CASES = Counter(), Counter()
FAST_ISAS = ["avx7", "avx8"]
def test_random_shapes():
    for count in (CASES, RANDOM_CASES):
        count.update({compared!r})
def test_random_linear():
    for count in (CASES, RANDOM_CASES):
        count.update({compared!r})
def test_else():
    pass
"""


@pytest.mark.parametrize(
    ("processes", "compared", "chosen", "status"),
    [
        (2, ["avx7", "avx8"], [], 0),
        (2, ["avx7"], [], 1),
        (2, [], ["-k", "else"], 0),
        (0, ["avx7"], [], 1),
        (0, [], ["--collect-only"], 0),
    ],
)
def test_the_status_of_a_run(tmp_path, processes, compared, chosen, status):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("from helpers_counted import *\n")
    (tmp_path / "test_kernels.py").write_text(KERNELS.format(compared=compared))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "xdist.plugin", f"-n{processes}", *chosen],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **ALONE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    for isa in ("avx7", "avx8"):
        idle = status and isa not in compared
        assert (f"FAILED: no random case ran on {isa}" in done.stdout) == bool(idle)
    shown = not chosen
    assert ("of them random" in done.stdout) == shown
    if compared and shown:
        # Each of the two tests counted once, wherever it ran.
        assert "avx7             2 cases, 2 of them random" in done.stdout
