"""Training in several processes with few bits per gradient, beside float32 gradients.

    python -m bench.distributed --processes 2 --bits 4.5

AdaLayerNet learns scikit-learn's digits in processes of this machine, from fresh weights of every
seed, with float32 gradients and with quantized ones. Bytes are counted where they are sent; the
time of a step on a slow link is computed, from the time that it takes here and the bytes over the
link's rate. The part of ``docs/studies.md`` between this program's markers is rewritten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adalayer_native._files import write_text_atomic
from adalayer_native.data import Batches, digits
from adalayer_native.distributed import QuantizedGradients
from adalayer_native.measure import accuracy
from adalayer_native.models import AdaLayerNet
from bench.markdown import markers, table, write_part
from bench.record import ROOT, results_of

RESULTS = ROOT / "build" / "bench" / "distributed.json"
PAGE = ROOT / "docs" / "studies.md"
FORMAT = "adalayer-distributed-1"
MARKERS = markers("bench/distributed.py")
LINK = 100e6 / 8  # bytes per second
BATCH = 128  # of all processes together


def work(rank: int, processes: int, bits: float, seed: int, epochs: int, folder: str) -> None:
    """One process of one run; the first one writes what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes
    )
    train, test = digits()
    torch.manual_seed(seed)
    model = AdaLayerNet(num_classes=10)
    ddp = DistributedDataParallel(model)
    gradients = QuantizedGradients(ddp, bits, seed=seed) if bits < 32 else None
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    mine = torch.arange(rank, len(train) // processes * processes, processes)
    loader = Batches(train, BATCH // processes, indices=mine, shuffle=True, seed=seed)
    seconds, steps = 0.0, 0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - epoch / epochs)
        for x, y in loader:
            begin = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()
            seconds += time.perf_counter() - begin
            steps += 1
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        ring = 2 * 4 * parameters * (processes - 1) // processes
        found = {
            "accuracy": accuracy(model.eval(), Batches(test, 250), progress=False),
            "seconds": seconds / steps,
            "bytes": gradients.sent / steps if gradients else ring,
            "widths": gradients.widths if gradients else {},
        }
        Path(folder, "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def page_section(data: Mapping[str, Any]) -> str:
    """The part of the page."""
    rows = []
    for key, runs in data["runs"].items():
        processes, bits = key.split("-")
        got = [run["accuracy"] for run in runs.values()]
        spread = f" ± {statistics.stdev(got):.2f}" if len(got) > 1 else ""
        seconds = statistics.median(run["seconds"] for run in runs.values())
        sent = statistics.mean(run["bytes"] for run in runs.values())
        full = data["runs"].get(f"{processes}-32")
        ratio = statistics.mean(run["bytes"] for run in full.values()) / sent if full else 1.0
        rows.append(
            [
                f"{processes}, {'float32' if bits == '32' else bits + ' bits'}",
                f"{statistics.mean(got):.2f}{spread} ({len(got)})",
                f"{sent:,.0f}",
                f"{ratio:.1f}",
                f"{1e3 * seconds:.0f}",
                f"{1e3 * (seconds + sent / LINK):.0f}",
            ]
        )
    machine = data["machine"]
    heading = ("processes, gradients", "accuracy", "bytes sent per step and process", "times fewer",
               "ms per step here", "at 100 Mbit/s, computed")  # fmt: skip
    lines = [f"Machine: {machine['cpu']}, {machine['cores']} cores. {data['epochs']} epochs.", ""]
    return "\n".join([*lines, *table(heading, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.distributed", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bits", type=float, nargs="+", default=[32, 5, 4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    data = results_of(given.results, FORMAT, epochs=given.epochs, runs={})
    if data["epochs"] != given.epochs:  # another training: its figures are no neighbours of these
        parser.error(f"{given.results} has runs of {data['epochs']} epochs; give another --results")
    for processes in given.processes:
        for bits in given.bits:
            runs = data["runs"].setdefault(f"{processes}-{bits:g}", {})
            for seed in range(given.seeds):
                if str(seed) in runs:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    rest = (processes, bits, seed, given.epochs, folder)
                    mp.spawn(work, args=rest, nprocs=processes, join=True)
                    runs[str(seed)] = json.loads(Path(folder, "result.json").read_text())
                print(f"{processes} processes, {bits:g} bits, seed {seed}: {runs[str(seed)]}")
                write_text_atomic(given.results, json.dumps(data, indent=1) + "\n")
    write_part(given.page, MARKERS, page_section(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
