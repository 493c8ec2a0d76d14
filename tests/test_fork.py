"""A forked child runs native layers, whatever threads its parent had."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# The parent's OpenMP team is up before the fork and does not exist in the child; libgomp would wait
# for it forever. `alarm` turns such a wait into a failure.
SCRIPT = """
    import os, signal, sys
    import torch
    import adalayer_native as ada

    torch.set_num_threads(2)
    torch.randn(1 << 20).exp()
    conv = torch.nn.Conv2d(64, 64, 3, padding=1)
    native = ada.nn.Conv2d.from_float(conv, 8, input_range=(-3, 3))
    x = torch.randn(2, 64, 56, 56)
    with torch.inference_mode():
        if sys.argv[1] == "after":
            native(x)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            native(x)
            os._exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("fork", ["before", "after"])
@pytest.mark.parametrize("threads", ["auto", "own"])
def test_fork(fork, threads):
    """The fork comes before or after the parent's own first use of a native layer."""
    env = {**os.environ, "ADALAYER_THREADS": threads}
    code = textwrap.dedent(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-c", code, fork]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
