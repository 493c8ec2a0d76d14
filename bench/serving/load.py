"""Throughput and latency beside the same server over torch float32 and OpenVINO int8.

    python -m bench.serving.load                      # ResNet-18, 8 bits, all CPUs of the process
    python -m bench.serving.load --network resnet20 --bits 4 --seconds 5 --clients 1,8

Every answer is compared with the first one of the same runtime, and that with torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import adalayer_native as ada
from adalayer_native.serve.runner import open_runner
from bench.engines import engine
from bench.networks import network
from bench.peers import SIMILARITY, similarity
from bench.serving.client import Array, Question, load, question
from bench.serving.peers import RUNNERS
from bench.serving.process import serving

_TOLERANCE = {"adalayer": 0.0, "torch": 1e-4, "openvino": 1e-2}
_LEAST = {"adalayer": 0.9, "torch": SIMILARITY["torch fp32"], "openvino": 0.9}


def main() -> int:
    """Exit status 1 where nothing was asked, or anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="per number of clients")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--runtimes", default="adalayer,torch,openvino")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: list[dict[str, object]] = []
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for runtime in asked.runtimes.split(","):
            path = _model_file(Path(folder), runtime, asked.network, asked.bits)
            good &= _measure(asked, runtime, path, results)
    _print(results)
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if good and results else 1


def _model_file(folder: Path, runtime: str, name: str, bits: int) -> Path:
    if runtime == "adalayer":
        path = folder / f"{name}.ada"
        engine(name, bits).save(path)
    else:
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"network": name}), encoding="utf-8")
    return path


def _questions(runtime: str, path: Path, name: str, threads: int) -> tuple[list[Question], float]:
    """Requests with the answers of a bare call, and the milliseconds of one."""
    ada.set_num_threads(threads)
    runner = open_runner(RUNNERS[runtime])(str(path), threads)
    source = network(name)
    inputs: list[Array] = [source.images(1, seed).numpy() for seed in range(8)]
    questions = []
    for x in inputs:
        answer = runner.run([x])[0].copy()
        with torch.inference_mode():
            wanted = source.model(torch.from_numpy(x))
        close = similarity(torch.from_numpy(answer), wanted)
        if close < _LEAST[runtime]:
            raise RuntimeError(f"{runtime}: similarity to torch {close:.3f}")
        questions.append(question(x, answer, tolerance=_TOLERANCE[runtime]))
    return questions, _bare(lambda: runner.run([inputs[0]]))


def _bare(call: Callable[[], object]) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _measure(
    asked: argparse.Namespace, runtime: str, path: Path, results: list[dict[str, object]]
) -> bool:
    questions, bare = _questions(runtime, path, asked.network, asked.threads)
    good = True
    options = ["--runner", RUNNERS[runtime], "--threads", str(asked.threads)]
    with serving(path, *options) as server:
        asyncio.run(load(server.port, questions, 2, 2.0))  # warm
        for clients in map(int, asked.clients.split(",")):
            counts, seconds = asyncio.run(load(server.port, questions, clients, asked.seconds))
            rate = counts.answered / seconds
            print(
                f"{runtime}, {clients} clients: {rate:.1f}/s, p50 {counts.percentile(0.5):.2f} ms, "
                f"p99 {counts.percentile(0.99):.2f} ms; bare call {bare:.2f} ms; {counts.line()}",
                flush=True,
            )
            good &= counts.perfect
            results.append(
                {
                    "runtime": runtime,
                    "clients": clients,
                    "rate": rate,
                    "p50": counts.percentile(0.5),
                    "p99": counts.percentile(0.99),
                    "bare": bare,
                    "sent": counts.sent,
                    "answered": counts.answered,
                    "wrong": counts.wrong,
                }
            )
    return good


def _print(results: list[dict[str, object]]) -> None:
    rates = {(r["runtime"], r["clients"]): float(str(r["rate"])) for r in results}
    for (runtime, clients), rate in rates.items():
        base = rates.get(("torch", clients))
        if runtime == "adalayer" and base:
            print(f"{clients} clients: {rate / base:.2f}× the rate of torch float32")
    for row in results:
        if row["clients"] == 1:
            over = float(str(row["p50"])) - float(str(row["bare"]))
            print(f"{row['runtime']}: p50 at 1 client is {over:.2f} ms above a bare call")


if __name__ == "__main__":
    sys.exit(main())
