"""Accuracy per byte, by the protocol of docs/accuracy.md.

    python -m bench.accuracy --data cifar10.zip --models weights/ --rows no-training

DATA is a folder or zip of images (``train/<class>/…``, ``test/<class>/…``), the weights are
``<network>_cifar10.safetensors``. Every row is compressed with what the product offers, converted,
saved, compiled, and the engine classifies all test images; nothing else sees them. 5,000 training
images are held out: calibration draws from the others, and alternatives of a row (``Row.choices``)
are compared on the held-out ones alone. Results go into a JSON file row by row, so that an
interrupted run goes on, and ``docs/accuracy.md`` is rewritten from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import float_bytes
from adalayer_native.data import Batches, ImageDataset, calibration_indices, open_dataset
from adalayer_native.importance.batches import kl_divergence
from bench.record import ROOT, describe_machine
from bench.trained import network as trained_network

RESULTS = ROOT / "build" / "bench" / "accuracy.json"
PAGE = ROOT / "docs" / "accuracy.md"
FORMAT = "adalayer-accuracy-1"
UNPRUNED = "2.5 bits, unpruned"
HELD_OUT = 5000
BATCH = 250


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: of the row; ``--rows`` takes it.
        group: rows that belong to one table.
        network: a built-in model.
        budget: arguments of :class:`adalayer_native.Budget`.
        method: of the allocation.
        images: calibration images.
        most: largest drop in points that is aimed at; ``None`` where rows are only compared.
        repair: whether rounding is repaired.
        prune: whether ``"optimal"`` may prune.
        label: what rows that are compared have in common; default: the budget.
    """

    name: str
    group: str
    network: str
    budget: tuple[tuple[str, float], ...]
    method: str = "optimal"
    images: int = 1000
    most: float | None = None
    repair: bool = True
    prune: bool = True
    label: str = ""

    @property
    def limits(self) -> ada.Budget:
        """The budget."""
        return ada.Budget(**dict(self.budget))  # type: ignore[arg-type]


def _rows() -> list[Row]:
    rows = [
        Row(
            f"{network}-{size}",
            "longer-training" if network.endswith("-long") else "no-training",
            network,
            (("size", size / 100),),
            most=most,
        )
        for network, size, most in (
            ("adalayernet", 16.5, 0.1),
            ("adalayernet", 12.5, 0.4),
            ("adalayernet", 10.0, 1.2),
            ("resnet20", 13.5, 0.8),
            ("adalayernet-long", 16.5, 0.1),
            ("adalayernet-long", 12.5, 0.4),
            ("adalayernet-long", 10.0, 1.2),
        )
    ]
    sizes = {"adalayernet": (10.0, 8.0, 6.0), "resnet20": (13.5, 10.0, 8.0)}
    for network, given in sizes.items():
        for size in given:
            rows += [
                Row(f"{network}-{size}-{method}", "equal-size", network, (("size", size / 100),),
                    method)
                for method in ("uniform", "adalayer", "optimal")
            ]  # fmt: skip
        for repaired in (False, True):
            rows += [
                Row(f"{network}-2.5-bits-{method}{'' if repaired else '-rounded'}",
                    "average-bits", network, (("bits", 2.5),), method, repair=repaired)
                for method in ("uniform", "adalayer", "optimal")
            ]  # fmt: skip
        # Without pruning, the widest uniform plan of at most 2.5 bits has 2. "mixed" gives 3 bits
        # to layers from the first on and 2 to the others: who has 2.5 bits and measures nothing.
        rows += [
            Row(f"{network}-2.5-bits-{method}-unpruned", "average-bits", network,
                (("bits", bits),), method, prune=False, label=UNPRUNED)
            for method, bits in (("uniform", 2.0), ("mixed", 2.5), ("optimal", 2.5))
        ]  # fmt: skip
    return rows


ROWS = {row.name: row for row in _rows()}


class Images:
    """Train and test split, with the held-out images set apart.

    Args:
        source: folder or zip.
        progress: show progress while images are decoded.
    """

    def __init__(self, source: str, *, progress: bool = True) -> None:
        self.train: ImageDataset
        self.test: ImageDataset
        self.train, self.test = (
            open_dataset(source, split, 32, progress=progress) for split in ("train", "test")
        )
        # The first images of a fixed class-balanced order; calibration takes the next ones.
        order = calibration_indices(self.train, len(self.train))
        self.held_out = Batches(self.train, BATCH, indices=order[:HELD_OUT])
        self._rest = order[HELD_OUT:]

    def calibration(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of ``count`` training images that are not held out."""
        return list(Batches(self.train, 125, indices=self._rest[:count]))

    @property
    def tested(self) -> Batches:
        """All test images."""
        return Batches(self.test, BATCH)


def network(name: str, models: Path) -> nn.Module:
    """A trained float network in the memory format that it runs fastest in."""
    return trained_network(name, models).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def judge(function: Any, batches: Batches, reference: nn.Module | None = None) -> dict[str, float]:
    """Top-1 accuracy in percent, and the KL divergence from a reference in nats per image."""
    right = total = 0
    divergence = 0.0
    for x, y in batches:
        output = function(x)
        right += int((output.argmax(1) == y).sum())
        total += len(y)
        if reference is not None:
            divergence += kl_divergence(reference(x), output) * len(y)
    found = {"accuracy": 100 * right / total}
    if reference is not None:
        found["kl"] = divergence / total
    return found


def mixed_plan(model: nn.Module, budget: ada.Budget) -> ada.Plan:
    """3 bits for layers from the first on, as many as an average width allows; 2 for the others.

    Raises:
        BudgetError: 2 bits everywhere are too many.
    """
    plan = ada.allocate(None, ada.Budget(bits=2), method="uniform", model=model, progress=False)
    limit = budget.bits or 0.0
    if plan.average_bits > limit:
        raise ada.BudgetError(f"2 bits everywhere are more than {budget}")
    plan.method = "mixed"
    for name in plan:
        plan[name].bits = 3
        if plan.average_bits > limit + 1e-9:
            plan[name].bits = 2
    return plan


def run_row(row: Row, images: Images, models: Path, work: Path) -> dict[str, Any]:
    """Compress, save, compile, and classify the test images; JSON values."""
    model = network(row.network, models)
    calibration = images.calibration(row.images)
    folder = work / row.name
    options: dict[str, Any] = {}
    plan = None
    if row.method == "mixed":
        plan = mixed_plan(model, row.limits)
    elif row.method == "optimal":
        options["tables"] = work / "tables"
        if not row.prune:
            options["options"] = {"sparsities": (0.0,), "step": None}
    else:
        options["repaired"] = row.repair  # plans compared as they will be
    result = ada.compress(
        model,
        calibration,
        row.limits,
        method="uniform" if plan is not None else row.method,
        plan=plan,
        repair=row.repair,
        work_dir=folder,
        allocate_options=options,
    )
    result.plan.save(folder / "plan.json")
    file = folder / "model.safetensors"
    size = ada.save(result.model, file)
    engine = ada.compile(ada.restore(model, file), calibration[0][0], policy="native")
    held = judge(engine, images.held_out, model)
    tested = judge(engine, images.tested)
    return {
        **asdict(row),
        "bytes": size,
        "float_bytes": float_bytes(model),
        "average_bits": result.plan.average_bits,
        "held_out": held,
        "accuracy": tested["accuracy"],
        "layers": {n: [e.bits, e.sparsity] for n, e in result.plan.layers.items()},
    }


def load(path: Path = RESULTS) -> dict[str, Any]:
    """Results so far.

    Raises:
        ValueError: a file of another format.
    """
    if not path.is_file():
        return {"format": FORMAT, "machine": {}, "float": {}, "rows": {}}
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of accuracy results")
    return data


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """Rows by name or group; ``all`` is every row.

    Raises:
        ValueError: a name that is neither.
    """
    known = {*ROWS, *(row.group for row in ROWS.values()), "all"}
    for name in names:
        if name not in known:
            raise ValueError(f"no row or group {name!r}: expected some of {sorted(known)}")
    wanted = set(names)
    return [r for r in ROWS.values() if wanted & {r.name, r.group, "all"}]


def run(
    rows: Sequence[Row], data: str, models: Path, results: Path, *, again: bool = False
) -> dict[str, Any]:
    """Run rows that are not in the results yet, and write the results after each."""
    images = Images(data)
    found = load(results)
    found["machine"] = describe_machine()
    for row in rows:
        if row.network not in found["float"]:
            model = network(row.network, models)
            found["float"][row.network] = {
                "accuracy": judge(model, images.tested)["accuracy"],
                "held_out": judge(model, images.held_out)["accuracy"],
            }
        if row.name in found["rows"] and not again:
            print(f"{row.name}: there already (--again measures it anew)", file=sys.stderr)
            continue
        entry = run_row(row, images, models, results.parent / "accuracy")
        found["rows"][row.name] = entry
        write_text_atomic(results, json.dumps(found, indent=1) + "\n")
        drop = found["float"][row.network]["accuracy"] - entry["accuracy"]
        share = 100 * entry["bytes"] / entry["float_bytes"]
        print(f"{row.name}: {share:.2f} % of the float file, {entry['accuracy']:.2f} %, drop "
              f"{drop:+.2f}", file=sys.stderr)  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    from bench.accuracy_page import write_page

    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", required=True, type=Path, help="folder of the trained weights")
    parser.add_argument("--rows", nargs="+", default=["all"], metavar="ROW",
                        help="rows or groups of rows; default: all")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of all results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    parser.add_argument("--list", action="store_true", help="only name the rows")
    given = parser.parse_args(arguments)
    try:
        rows = chosen_rows(given.rows)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        print("\n".join(f"{row.group}: {row.name}" for row in rows))
        return 0
    results = run(rows, given.data, given.models, given.results, again=given.again)
    write_page(results, given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
