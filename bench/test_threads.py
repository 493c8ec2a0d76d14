"""The parallel loop: cost of an empty one, and what native layers do to torch operators between."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native import _C

FORK_JOIN_LIMIT = 5e-6


def test_fork_join(benchmark: Any) -> None:
    seconds = min(_C.fork_join_seconds(2, 2000) for _ in range(20))
    benchmark.extra_info.update(backend=_C.threading_backend(), fork_join_us=1e6 * seconds)
    benchmark.pedantic(lambda: _C.fork_join_seconds(2, 2000), rounds=5, iterations=1)
    assert seconds < FORK_JOIN_LIMIT


def test_fork_join_own_pool() -> None:
    """The pool that servers without OpenMP use, in a process of its own."""
    code = (
        "from adalayer_native import _C; assert _C.threading_backend() == 'own'; "
        "print(min(_C.fork_join_seconds(2, 2000) for _ in range(20)))"
    )
    env = {**os.environ, "ADALAYER_THREADS": "own"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < FORK_JOIN_LIMIT


@pytest.mark.parametrize("backend", ["auto", "own"])
def test_torch_between_native_layers_is_not_starved(backend: str) -> None:
    """A torch operator takes at most 1.5 times as long between native layers as among its own."""
    env = {**os.environ, "ADALAYER_THREADS": backend}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.5


def starvation() -> float:
    """Median time of torch.add (two threads) after a native layer over that after a torch one."""
    torch.set_num_threads(2)
    native = ada.nn.Conv2d.from_float(
        torch.nn.Conv2d(64, 64, 3, padding=1), 8, input_range=(-3.0, 3.0)
    )
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 28, 28)
    big = torch.randn(1 << 18)
    times: dict[str, list[float]] = {"native": [], "torch": []}
    with torch.inference_mode():
        for _ in range(300):
            for name, run in (("native", native), ("torch", layer)):
                run(x)
                start = time.perf_counter()
                torch.add(big, big)
                times[name].append(time.perf_counter() - start)
    return statistics.median(times["native"]) / statistics.median(times["torch"])


if __name__ == "__main__":
    print(starvation())
