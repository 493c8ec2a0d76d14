"""Latency budgets, and what the real engine takes.

    python -m bench.latency_budget --network resnet18 --shares 0.85 0.7 0.55 --threads 1
    python -m bench.latency_budget --network vgg16_mean --loss 0.001 --shares

The engine with 8 bits in every layer is the whole; a budget is a share of its milliseconds, the
reachable span of this machine being known only afterwards. For each budget method ``"optimal"``
makes a plan, the plan is carried out (calibrated, converted, compiled), and its engine is timed in
turn with the 8-bit one, some calls of each at a time, so that both see the same machine and find
their own weights in its caches. A budget counts as met where the median
is at most 10 % above it. ``--data`` and ``--weights`` take a trained network and its images; random
weights and structured images do for the clock. Budgets that cannot be met say what can be reached.

``--loss`` asks the other way round: for the fastest plan that is predicted to lose no more than 8
bits everywhere and so many nats per image (0.001: 0.1 %), beside 8 bits everywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.data import Batches, calibration_indices, open_dataset
from adalayer_native.models import load_weights
from adalayer_native.plan import Plan, supported_layers
from bench.images import structured_images
from bench.markdown import table
from bench.networks import network

WARM, CALLS = 3, 12  # calls of an engine per turn, of which the first do not count
OVER = 0.10  # a budget is met if the engine takes at most so much more
OPTIONS = {"widths": (2, 4, 6, 8), "sparsities": (0.0, 0.5, 0.75), "step": None}


@dataclass(frozen=True)
class Outcome:
    """One budget.

    Attributes:
        budget: milliseconds.
        predicted: by the table, after its correction; NaN where there is no plan.
        measured: median milliseconds of the real engine; NaN where there is no plan.
        blocks: layers whose zeros lie in blocks.
        bits: average bits per weight.
        why: the error, where there is no plan.
    """

    budget: float
    predicted: float = float("nan")
    measured: float = float("nan")
    blocks: int = 0
    bits: float = float("nan")
    why: str = ""

    @property
    def met(self) -> bool:
        """Whether the engine takes at most 10 % more."""
        return self.measured <= self.budget * (1 + OVER)

    def cells(self) -> list[str]:
        """A row of the table."""
        if self.why:
            return [f"{self.budget:.3f}", "", "", "", "", "", self.why]
        over = 100 * (self.measured / self.budget - 1)
        return [
            f"{self.budget:.3f}", f"{self.predicted:.3f}", f"{self.measured:.3f}", f"{over:+.1f} %",
            f"{self.bits:.2f}", str(self.blocks), "met" if self.met else "**missed**",
        ]  # fmt: skip


def engine_of(model: nn.Module, plan: Plan, images: Sequence[Any]) -> Any:
    """The compiled engine of a plan, for one image per call."""
    native = ada.compress(model, images, None, plan=plan, repair=False, progress=False).model
    first = images[0][0] if isinstance(images[0], (tuple, list)) else images[0]
    return ada.compile(native, first[:1], policy="native")


def in_turn(engines: Mapping[str, Any], x: Tensor, seconds: float) -> dict[str, float]:
    """Median milliseconds of one call of each, warm; several calls of each in turn."""
    samples: dict[str, list[float]] = {name: [] for name in engines}
    begin = time.perf_counter()
    while not all(samples.values()) or time.perf_counter() - begin < seconds:
        for name, engine in engines.items():
            for position in range(WARM + CALLS):
                start = time.perf_counter()
                engine(x)
                if position >= WARM:
                    samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in samples.items()}


def outcome(
    model: nn.Module,
    images: Sequence[Any],
    budget: ada.Budget,
    whole: Any,
    *,
    options: Mapping[str, Any],
    tables: Path | None,
    seconds: float,
) -> Outcome:
    """Plan, carry out, compile and time."""
    assert budget.latency is not None
    try:
        plan = ada.allocate(
            None, budget, method="optimal", model=model, calibration=images, options=options,
            tables=tables,
        )  # fmt: skip
    except ada.BudgetError as error:
        return Outcome(budget.latency, why=str(error))
    first = images[0][0] if isinstance(images[0], (tuple, list)) else images[0]
    engines = {"whole": whole, "plan": engine_of(model, plan, images)}
    found = in_turn(engines, first[:1].contiguous(), seconds)
    return Outcome(
        budget.latency,
        plan.measured["predicted latency"],
        found["plan"],
        sum(e.pattern.startswith("block") and e.sparsity > 0 for e in plan.layers.values()),
        plan.average_bits,
    )


def fastest(
    model: nn.Module,
    images: Sequence[Any],
    loss: float,
    whole: Any,
    *,
    options: Mapping[str, Any],
    tables: Path | None,
    seconds: float,
) -> list[list[str]]:
    """Rows of a table: 8 bits everywhere, and the fastest plan that loses little more."""
    plan = ada.allocate(
        None, ada.Budget(loss=loss), method="optimal", model=model, calibration=images,
        options=options, tables=tables,
    )  # fmt: skip
    first = images[0][0] if isinstance(images[0], (tuple, list)) else images[0]
    engines = {"whole": whole, "plan": engine_of(model, plan, images)}
    found = in_turn(engines, first[:1].contiguous(), seconds)
    narrow = sum(layer.activation_bits < 8 for layer in plan.layers.values())
    names = ("predicted_loss", "calibration_loss")
    usual = [f"{plan.measured[f'{name} of 8 bits']:.2g}" for name in names]
    chosen = [f"{plan.measured[name]:.2g}" for name in names]
    ratio = found["whole"] / found["plan"]
    return [
        ["8 bits everywhere", f"{found['whole']:.3f}", "1.00", "8.00", "0", *usual],
        [
            "the fastest plan", f"{found['plan']:.3f}", f"{ratio:.2f}",
            f"{plan.average_bits:.2f}", str(narrow), *chosen,
        ],
    ]  # fmt: skip


def uniform_plan(model: nn.Module, bits: int) -> Plan:
    """The same width in every layer."""
    return ada.allocate(None, ada.Budget(bits=bits), method="uniform", model=model, progress=False)


def _data(given: argparse.Namespace, size: int) -> list[Any]:
    if given.data is None:
        images = structured_images(given.images, size)
        return list(images.split(16))
    train = open_dataset(given.data, "train", size)
    indices = calibration_indices(train, given.images)
    return list(Batches(train, 16, indices=indices))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a budget is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency_budget", description=__doc__)
    parser.add_argument("--network", default="resnet18", help="a network of bench/networks.py")
    parser.add_argument("--data", help="folder or zip of images; default: structured noise")
    parser.add_argument("--weights", type=Path, help="trained weights; default: random ones")
    parser.add_argument("--images", type=int, default=32, help="for calibration")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.85, 0.7, 0.55])
    parser.add_argument("--loss", type=float, help="nats above 8 bits everywhere, e.g. 0.001")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per budget")
    parser.add_argument("--tables", type=Path, help="folder that keeps tables; default: the cache")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    ops.set_num_threads(given.threads)
    source = network(given.network)
    model = source.model
    if given.weights is not None:
        load_weights(model, given.weights)
        model.eval()
    images = _data(given, source.size)
    whole = engine_of(model, uniform_plan(model, 8), images)
    first = images[0][0] if isinstance(images[0], (tuple, list)) else images[0]
    full = in_turn({"whole": whole}, first[:1].contiguous(), given.seconds)["whole"]
    options = {**OPTIONS, "threads": given.threads, "weight_of": "rounded"}
    options.update(rounds=1, trials=4, interactions=False)
    found = [
        outcome(
            model, images, ada.Budget(latency=share * full), whole, options=options,
            tables=given.tables, seconds=given.seconds,
        )
        for share in given.shares
    ]  # fmt: skip
    print(
        f"{given.network}, {len(supported_layers(model))} layers, batch 1, {given.threads} threads,"
        f" {ops.active_isa()}; 8 bits everywhere: {full:.3f} ms\n"
    )
    if found:
        heading = ["budget ms", "predicted ms", "engine ms", "over", "bits", "block layers", ""]
        print("\n".join(table(heading, [one.cells() for one in found])))
    if given.loss is not None:
        rows = fastest(
            model, images, given.loss, whole, options=options, tables=given.tables,
            seconds=given.seconds,
        )  # fmt: skip
        heading = ["", "engine ms", "×", "bits", "narrow inputs", "predicted loss", "checked loss"]
        print("\n".join(table(heading, rows)))
    return int(not all(one.met for one in found if not one.why))


if __name__ == "__main__":
    sys.exit(main())
