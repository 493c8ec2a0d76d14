"""Benchmarks run interleaved: before every timed native call the peer is timed too, so both see the
same neighbours on the machine. Each timed call follows an untimed one of its own, so that neither
pays for the caches that the other left. Ratios are of medians; absolute times are not compared
across runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adalayer_native as ada

ROWS: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(2)
    yield
    ada.ops.force_isa("auto")


@pytest.fixture
def versus(benchmark, request) -> Callable[..., float]:
    """``versus(name, native, peer)``: median time of peer over native, measured in turns."""

    def run(
        name: str, native: Callable[[], Any], peer: Callable[[], Any], rounds: int = 60
    ) -> float:
        peer_seconds: list[float] = []

        def peer_first() -> None:
            peer()
            start = time.perf_counter()
            peer()
            peer_seconds.append(time.perf_counter() - start)
            native()

        with torch.inference_mode():
            for _ in range(3):
                peer()
                native()
            benchmark.pedantic(native, setup=peer_first, rounds=rounds, iterations=1)
        native_median = benchmark.stats.stats.median
        peer_median = statistics.median(peer_seconds)
        row = {
            "name": name,
            "native_ms": 1000 * native_median,
            "torch_fp32_ms": 1000 * peer_median,
            "speedup": peer_median / native_median,
            "rounds": rounds,
            "isa": ada.ops.active_isa(),
            "threads": ada.get_num_threads(),
        }
        benchmark.extra_info.update(row)
        ROWS.append(row)
        return row["speedup"]

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("native against torch fp32 eager (medians of interleaved runs)")
    for row in ROWS:
        terminalreporter.write_line(
            f"{row['name']:<52} native {row['native_ms']:9.3f} ms   torch "
            f"{row['torch_fp32_ms']:9.3f} ms   {row['speedup']:6.2f}x   "
            f"[{row['isa']}, {row['threads']} threads, {row['rounds']} rounds]"
        )
