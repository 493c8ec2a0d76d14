"""An hour at a part of what the server can do, with the memory of its processes as a picture.

    python -m bench.serving.soak --out soak.png                     # an hour at 50 %
    python -m bench.serving.soak --seconds 300 --load 1 --clients 4 --out soak.png

First the server is asked as fast as it answers, for a tenth of the time and at most 20 s; then it
is asked at the given part of that rate. Beside the picture a ``.json`` with its figures is written.
It fails if an answer is lost or wrong, or if the last third of the time holds more memory than the
second by 3 %.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from adalayer_native._files import write_atomic
from bench.engines import engine
from bench.networks import network
from bench.serving.client import Counts, Question, load, questions_of
from bench.serving.process import Server, serving

CALIBRATION_SECONDS = 20.0
LONGEST = 4 * 3600.0
GROWTH = 0.03


@dataclass
class Sample:
    """One piece of the time.

    Attributes:
        minutes: since the beginning, at its end.
        front, replicas: bytes that belong to those processes alone.
        rate: answers per second.
        p50, p99: milliseconds.
    """

    minutes: float
    front: int
    replicas: int
    rate: float
    p50: float
    p99: float


def soak(
    server: Server, questions: Sequence[Question], clients: int, rate: float, seconds: float
) -> tuple[Counts, list[Sample]]:
    """Ask at a rate for a time; what happened, and some 120 samples of it."""
    total, samples = Counts(), []
    piece = max(1.0, seconds / 120)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        counts, took = asyncio.run(load(server.port, questions, clients, piece, rate=rate))
        total.add(counts)
        memory = server.memory()
        sample = Sample(
            (time.monotonic() - begin) / 60,
            memory["front"],
            memory["replicas"],
            counts.answered / took,
            counts.percentile(0.5),
            counts.percentile(0.99),
        )
        samples.append(sample)
        print(
            f"{sample.minutes:6.2f} min: front {sample.front / 1e6:.1f} MB, replicas "
            f"{sample.replicas / 1e6:.1f} MB, {sample.rate:.0f}/s, p50 {sample.p50:.1f} ms, p99 "
            f"{sample.p99:.1f} ms",
            flush=True,
        )
    return total, samples


def growth(values: Sequence[float]) -> float:
    """The mean of the last third over that of the second, less one."""
    third = len(values) // 3
    if not third:
        return math.nan
    return float(np.mean(values[-third:]) / np.mean(values[third : 2 * third]) - 1)


def picture(samples: Sequence[Sample], title: str) -> bytes:
    """Memory and times over the minutes, as PNG."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    minutes = [sample.minutes for sample in samples]
    above.plot(minutes, [sample.front / 1e6 for sample in samples], label="front")
    above.plot(minutes, [sample.replicas / 1e6 for sample in samples], label="all replicas")
    above.set(ylabel="memory of their own, MB", title=title)
    above.set_ylim(bottom=0)
    below.plot(minutes, [sample.p50 for sample in samples], label="p50")
    below.plot(minutes, [sample.p99 for sample in samples], label="p99")
    below.set(xlabel="minutes", ylabel="time to the answer, ms")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def main() -> int:
    """Exit status 1 where anything was lost or wrong, or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help=f"at most {LONGEST:.0f}")
    parser.add_argument("--load", type=float, default=0.5, help="of what it can do, up to 1")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    asked = parser.parse_args()
    if not 0 < asked.seconds <= LONGEST:
        parser.error(f"--seconds: expected up to {LONGEST:.0f}, got {asked.seconds:g}")
    if not 0 < asked.load <= 1:
        parser.error(f"--load: expected above 0 and up to 1, got {asked.load:g}")
    if asked.out.suffix != ".png" or not asked.out.parent.is_dir():
        parser.error(f"--out: expected a .png in a folder that exists, got {asked.out}")
    compiled = engine(asked.network, asked.bits)
    questions = questions_of(compiled, network(asked.network))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "net.ada"
        compiled.save(model)
        with serving(model, "--replicas", str(asked.replicas), "--threads", "1") as server:
            server.wait_replicas(asked.replicas)
            asyncio.run(load(server.port, questions, asked.clients, 2.0))  # warm
            short = min(CALIBRATION_SECONDS, asked.seconds / 10)
            counts, took = asyncio.run(load(server.port, questions, asked.clients, short))
            capacity = counts.answered / took
            print(f"it answers {capacity:.0f}/s: {counts.line()}", flush=True)
            rate = math.inf if asked.load == 1 else asked.load * capacity
            total, samples = soak(server, questions, asked.clients, rate, asked.seconds)
    grown = {
        "front": growth([sample.front for sample in samples]),
        "replicas": growth([sample.replicas for sample in samples]),
    }
    good = counts.perfect and total.perfect and all(value < GROWTH for value in grown.values())
    title = (
        f"{asked.network}, {asked.bits} bits, {asked.replicas} replicas, {asked.clients} clients, "
        f"{asked.load:.0%} of {capacity:.0f}/s"
    )
    figures = {
        "title": title,
        "seconds": asked.seconds,
        "sent": total.sent,
        "answered": total.answered,
        "wrong": total.wrong,
        "growth": grown,
        "samples": [asdict(sample) for sample in samples],
    }
    write_atomic(asked.out, picture(samples, title))
    write_atomic(asked.out.with_suffix(".json"), (json.dumps(figures, indent=1) + "\n").encode())
    text = ", ".join(f"{part} {value:+.2%}" for part, value in grown.items())
    print(
        f"{'ok  ' if good else 'FAIL'} soak: {total.line()}; memory of the last third over the "
        f"second: {text}; {asked.out}",
        flush=True,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
