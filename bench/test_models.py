"""Whole networks, float images in and logits out, beside the other runtimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adalayer_native import ops
from bench import engines
from bench.conftest import Bench
from bench.networks import NETWORKS, Network, native_network, network
from bench.peers import PEERS, RIVALS, SIMILARITY, as_tensor, make_files, meet_all_cpus, similarity
from bench.record import Target

# Wanted speed over the faster rival, by (network, batch, threads) and bits, with a tile unit.
WITH_TILES: dict[tuple[str, int, int], dict[int, float]] = {
    ("resnet18", 1, 1): {8: 1.6, 4: 1.9, 2: 2.1},
    ("resnet18", 1, 2): {8: 1.3, 4: 1.6, 2: 1.8},
    ("resnet50", 1, 1): {8: 1.5, 4: 1.7},
    ("resnet50", 1, 2): {8: 1.3, 4: 1.5},
    ("mobilenet_v2", 1, 2): {8: 1.5},
    ("adalayernet", 1, 2): {8: 1.5},
    ("resnet20", 1, 2): {8: 1.5},
    **{(name, 16, 2): {8: 1.2} for name in NETWORKS},
}
# Elsewhere, at batch 1 with one thread or two: what Winograd's fewer products are to bring.
WITH_VNNI: dict[str, dict[int, float]] = {
    "vgg16_mean": {8: 1.6}, "resnet18": {8: 1.35}, "resnet50": {8: 1.15}, "adalayernet": {8: 1.5},
    "resnet20": {8: 1.5}, "unet": {8: 1.5}, "mobilenet_v2": {8: 1.6},
}  # fmt: skip
WITH_AVX2: dict[str, dict[int, float]] = {
    "vgg16_mean": {8: 1.8, 4: 2.3}, "resnet18": {8: 1.4, 4: 1.8}, "resnet50": {8: 1.1, 4: 1.3},
    "adalayernet": {8: 1.6, 4: 2.0}, "resnet20": {8: 1.6, 4: 2.0}, "unet": {8: 1.6, 4: 2.0},
    "mobilenet_v2": {8: 1.1, 4: 1.2},
}  # fmt: skip
# Of the fastest plan that is predicted to lose 0.1 % more than 8 bits everywhere, at batch 1,
# where 8-bit products have an instruction of their own and tiles have none.
BEST_PLAN = {
    "vgg16_mean": 1.9, "resnet18": 1.5, "resnet50": 1.25, "adalayernet": 1.8, "resnet20": 1.8,
    "unet": 1.8, "mobilenet_v2": 1.6,
}  # fmt: skip
# Of the instruction set that runs, which may be a forced one.
HAS_TILES = ops.active_isa() == "amx"


def targets_at(name: str, batch: int, threads: int) -> dict[int, float]:
    """Wanted speed over the faster rival by bits."""
    if HAS_TILES:
        return WITH_TILES.get((name, batch, threads), {})
    if batch > 1:
        return {8: 1.1} if threads == 2 else {}
    return (WITH_VNNI if ops.active_isa() == "avx512vnni" else WITH_AVX2).get(name, {})


RANDOM_TARGET = 1.3 if HAS_TILES else 1.1
BITS = (8, 4, 2)
# Fewer bits may cost this much more, which is noise.
NEVER_SLOWER = 0.95
# A batch of 16 takes gigabytes.
LARGE = ("unet",)
CASES = [(name, batch) for name in NETWORKS for batch in (1, 16) if batch == 1 or name not in LARGE]
SECONDS = {(1, 1): 12.0, (1, 2): 12.0, (16, 1): 8.0, (16, 2): 14.0}


def candidates(
    source: Network, bits: tuple[int, ...], batch: int, threads: int
) -> dict[str, Callable[[], Any]]:
    """Every candidate, each checked for the right result first."""
    images = source.images(batch)
    with torch.inference_mode():
        exact = source.model(images)
    found: dict[str, Callable[[], Any]] = {}
    for width in bits:
        prepared, _ = native_network(source.name, width)
        with torch.inference_mode():
            simulated = prepared(images)
        run = engines.ours(source.name, width, images)
        # Single-step differences of float simulation grow through random weights.
        assert similarity(as_tensor(run()), simulated) > 0.99, f"native, {width} bits"
        found[f"ours {width} bits"] = run
    if _best_plan_targets(source.name, batch):  # it takes minutes to find
        prepared, run = engines.best(source.name, images)
        with torch.inference_mode():
            assert similarity(as_tensor(run()), prepared(images)) > 0.99, "native, best plan"
        found["ours best plan"] = run
    for name, make in PEERS.items():
        run = make(source, images, threads)
        reached = similarity(as_tensor(run()), exact)
        assert reached > SIMILARITY[name], f"{name} is not the network: similarity {reached:.3f}"
        found[name] = run
    return found


@pytest.fixture(autouse=True, scope="module")
def _pools() -> None:
    meet_all_cpus()


def compare(
    bench: Bench, turns: Any, name: str, batch: int, threads: int, wanted: dict[int, float]
) -> None:
    make_files(network(name))
    with bench.cores(threads):
        runs = candidates(network(name), BITS, batch, threads)
        turns(
            f"network/{name}/batch {batch}/{threads}T",
            runs,
            threads=threads,
            seconds=SECONDS[batch, threads],
            side=set(PEERS) - set(RIVALS),
            targets=[
                *(Target(f"ours {b} bits", RIVALS, minimum) for b, minimum in wanted.items()),
                *fewer_bits_targets(),
                *_best_plan_targets(name, batch),
            ],
            info={
                "network": name,
                "batch": batch,
                "native share": [engines.engine(name, bits).native_share for bits in BITS],
            },
            least=5,
        )


def fewer_bits_targets() -> list[Target]:
    """No width is slower than a larger one."""
    names = [f"ours {bits} bits" for bits in BITS]
    return [Target(name, tuple(names[:k]), NEVER_SLOWER) for k, name in enumerate(names) if k]


def _best_plan_targets(name: str, batch: int) -> list[Target]:
    if batch != 1 or name not in BEST_PLAN or ops.active_isa() != "avx512vnni":
        return []
    return [Target("ours best plan", RIVALS, BEST_PLAN[name])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "batch"), CASES)
def test_network(bench: Bench, turns: Any, name: str, batch: int, threads: int) -> None:
    compare(bench, turns, name, batch, threads, targets_at(name, batch, threads))


def test_random_network(bench: Bench, turns: Any, seed: int) -> None:
    """A network that nobody could have tuned for."""
    compare(bench, turns, f"random{seed}", 1, 2, {8: RANDOM_TARGET})
