"""How long an analysis takes, how much memory, and that a killed one goes on.

    python -m bench.analysis --network resnet18 --images 256 --threads 2

Random weights with settled batch norms, images from ``bench/images.py`` with random labels; what
is measured does not depend on them. ``--kill-after SECONDS`` first starts the same analysis in a
process that is killed after so long, and shows what the next one finds in its cache. Prints one
line per figure, with the limit that it should keep: 6 minutes and 4 GB for a ResNet-18 at 224x224
with 256 images on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import adalayer_native as ada
from bench.images import structured_images
from bench.networks import network

MINUTES, GIGABYTES = 6.0, 4.0
CLASSES = 10


class Images:
    """Batches that are made when they are asked for, the same ones every time.

    Args:
        count: of images.
        size: of their sides.
        batch: images per batch.
    """

    def __init__(self, count: int, size: int, batch: int) -> None:
        self.count, self.size, self.batch = count, size, batch

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self)):
            size = min(self.batch, self.count - index * self.batch)
            labels = torch.randint(
                0, CLASSES, (size,), generator=torch.Generator().manual_seed(index)
            )
            yield structured_images(size, self.size, seed=index), labels


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_entries(cache: Path) -> int:
    """Measurements in the cache of an analysis."""
    if not cache.is_file():
        return 0
    batches = json.loads(cache.read_text(encoding="utf-8"))["batches"].values()
    return sum(len(values) for entry in batches for values in entry["raw"].values())


def killed(arguments: Sequence[str], cache: Path, seconds: float) -> int:
    """Start the analysis in another process, kill it, and count what it has left."""
    command = [sys.executable, "-m", "bench.analysis", *arguments, "--cache", str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return kept_entries(cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(prog="python -m bench.analysis", description=__doc__)
    parser.add_argument("--network", default="resnet18", help="a network of bench/networks.py")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="file of the analysis; default: a new one")
    parser.add_argument("--kill-after", type=float, metavar="SECONDS")
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    source = network(given.network)
    images = Images(given.images, source.size, given.batch)
    with tempfile.TemporaryDirectory() as folder:
        cache = given.cache or Path(folder) / "analysis.json"
        found = 0
        if given.kill_after is not None:
            same = [
                "--network", given.network, "--images", str(given.images),
                "--batch", str(given.batch), "--threads", str(given.threads), "--no-progress",
            ]  # fmt: skip
            found = killed(same, cache, given.kill_after)
        start = time.perf_counter()
        scores = ada.analyze(source.model, images, cache=cache, progress=not given.no_progress)
        seconds = time.perf_counter() - start
        total = kept_entries(cache)
    gigabytes = peak_bytes() / 1e9
    print(f"analysis of {given.network}, {scores.samples} images, {given.threads} threads")
    if given.kill_after is not None:
        print(f"killed after {given.kill_after:g} s: {found:,} of {total:,} measurements were kept")
    print(f"wall time {seconds:.1f} s (at most {60 * MINUTES:.0f} s for 256 images)")
    print(f"peak resident memory {gigabytes:.2f} GB (at most {GIGABYTES:g} GB)")
    late = given.images >= 256 and seconds > 60 * MINUTES
    return int(late or gigabytes > GIGABYTES)


if __name__ == "__main__":
    sys.exit(main())
