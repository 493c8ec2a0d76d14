"""One engine at many image sizes: first calls, memory, and calls beside engines of one size.

    python -m bench.sizes
    python -m bench.sizes --network resnet18 --most 320 --step 32 --compared 96 224x320

Calls at fifty sizes in a row, each twice: the first one makes what the size needs. Then, at some of
them, the engine in turn with one that was compiled for that size alone: as the size came, and after
``warm_up``. Weights are random; every result is compared bit for bit. Batch 1, one thread.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import adalayer_native as ada
from bench.networks import network

ROUNDS = 25


def milliseconds(engine: ada.Engine, x: Tensor) -> float:
    """Of one call."""
    start = time.perf_counter()
    engine(x)
    return 1e3 * (time.perf_counter() - start)


def in_turn(engines: Sequence[ada.Engine], x: Tensor) -> list[float]:
    """Median milliseconds of each."""
    samples: list[list[float]] = [[] for _ in engines]
    for _ in range(ROUNDS):
        for engine, times in zip(engines, samples, strict=True):
            times.append(milliseconds(engine, x))
    return [median(times[1:]) for times in samples]


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def many_sizes(engine: ada.Engine, sizes: Sequence[tuple[int, int]]) -> str:
    """Calls at every size, twice."""
    least, most = (
        tuple(getattr(size, end) for size in engine.sizes.values()) for end in ("first", "last")
    )
    for shape in (most, least):  # the memory of a call, and torch's own
        engine(torch.rand(1, 3, *shape))
    before = resident()
    first, second = [], []
    for shape in sizes:
        x = torch.rand(1, 3, *shape)
        first.append(milliseconds(engine, x))
        second.append(milliseconds(engine, x))
    more = [a - b for a, b in zip(first, second, strict=True)]
    cache = engine.size_cache()
    return (
        f"{len(sizes)} sizes: first call {median(first):.1f} ms (median), {max(first):.1f} ms "
        f"(longest), {median(more):.1f} and {max(more):.1f} ms more than the second; "
        f"{cache['entries']} sizes held, {cache['bytes'] / 1e6:.1f} MB beside "
        f"{engine.weight_bytes / 1e6:.1f} MB of weights; the process grew by "
        f"{resident() - before:.1f} MB"
    )


def compared(engine: ada.Engine, shape: tuple[int, int]) -> str:
    """Beside an engine for one size."""
    alone = engine.fixed(shape)
    x = torch.rand(1, 3, *shape)
    cold = in_turn([engine, alone], x)
    start = time.perf_counter()
    engine.warm_up(shape)
    seconds = time.perf_counter() - start
    warm = in_turn([engine, alone], x)
    if not torch.equal(engine(x), alone(x)):
        raise AssertionError(f"other bits at {shape}")
    return (
        f"{shape[0]} x {shape[1]}: {cold[0]:.2f} ms, for one size {cold[1]:.2f} ms "
        f"({cold[0] / cold[1]:.3f}); warmed up in {seconds:.1f} s {warm[0]:.2f} and "
        f"{warm[1]:.2f} ms ({warm[0] / warm[1]:.3f})"
    )


def ranged(name: str, sizes: tuple[int, int, int], example: int) -> ada.Engine:
    """An engine of 8 bits everywhere."""
    torch.manual_seed(0)
    model = network(name).model.eval()
    x = torch.rand(2, 3, example, example)
    plan = ada.allocate(None, ada.Budget(bits=8), method="uniform", model=model, calibration=[x])
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [x], progress=False)
    return ada.compile(ada.convert(prepared), x[:1], policy="native", sizes=sizes)


def _shape(text: str) -> tuple[int, int]:
    h, _, w = text.partition("x")
    return int(h), int(w or h)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--example", type=int, default=224)
    parser.add_argument("--least", type=int, default=64)
    parser.add_argument("--most", type=int, default=320)
    parser.add_argument("--step", type=int, default=32)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--compared", type=_shape, nargs="*", default=[(96, 96), (224, 320)])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ada.set_num_threads(1)
    engine = ranged(options.network, (options.least, options.most, options.step), options.example)
    sides = range(engine.sizes["height"].first, options.most + 1, options.step)
    shapes = [(h, w) for h in sides for w in sides if (h, w) != (options.example,) * 2]
    random.Random(0).shuffle(shapes)
    print(many_sizes(engine, shapes[: options.count]))
    for shape in options.compared:
        print(compared(engine, shape))


if __name__ == "__main__":
    main()
