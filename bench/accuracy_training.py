"""Accuracy per byte after training, over several seeds.

    python -m bench.accuracy_training --data cifar10.zip --models weights/ --rows adalayernet-5

DATA is a folder or zip of images (``train/<class>/…``, ``test/<class>/…``), the weights are
``<network>_cifar10.safetensors``. A row is a network, a size and a number of epochs. Its plan is
chosen once, on training images; every seed then trains with the recipe that
:func:`adalayer_native.compress` has by default, and the compiled engine of the saved file
classifies the test images. 5,000 training images are held out: neither plan nor training sees them.

An interrupted run goes on where it stopped when the same command is given again. Every seed of a
row has a folder of its own with its checkpoint and its ``result.json``, so several commands may run
side by side; the page shows whatever is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import float_bytes
from adalayer_native.data import Batches, ImageDataset, calibration_indices, open_dataset
from bench.markdown import markers, table, write_part
from bench.record import ROOT, describe_machine
from bench.trained import NAMES, network

RESULTS = ROOT / "build" / "bench" / "accuracy-training"
PAGE = ROOT / "docs" / "accuracy.md"
FORMAT = "adalayer-accuracy-training-1"
BEGIN, END = markers("bench/accuracy_training.py")
HELD_OUT = 5000
CALIBRATION = 1000
BATCH = 128


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        network: a built-in model.
        percent: size of the saved file, of the float file.
        epochs: of training.
        most: largest mean drop in points that is aimed at.
    """

    network: str
    percent: float
    epochs: int
    most: float

    @property
    def name(self) -> str:
        """What ``--rows`` takes."""
        return f"{self.network}-{self.percent:g}"


ROWS = {
    row.name: row
    for row in (
        Row("adalayernet", 10.0, 2, 0.5),
        Row("adalayernet", 5.0, 4, 1.39),
        Row("adalayernet-long", 10.0, 2, 0.5),
        Row("adalayernet-long", 5.0, 4, 1.39),
        Row("resnet20", 10.0, 4, 0.5),
        Row("resnet20", 7.5, 12, 1.2),
    )
}


class Images:
    """Both splits, and the parts of the training images.

    Attributes:
        held_out: images that nothing is trained or calibrated on.
        calibration: images for the plan, the ranges and the repair.
        test: all test images.
    """

    def __init__(self, source: str) -> None:
        self.train: ImageDataset
        self.train, test = (open_dataset(source, split, 32) for split in ("train", "test"))
        # The first images of a fixed class-balanced order; calibration takes the next ones.
        order = calibration_indices(self.train, len(self.train))
        self._rest = order[HELD_OUT:]
        self.held_out = Batches(self.train, 250, indices=order[:HELD_OUT])
        self.calibration = list(Batches(self.train, 125, indices=self._rest[:CALIBRATION]))
        self.test = Batches(test, 250)

    def training(self, seed: int) -> Batches:
        """Shuffled and augmented training images, without those held out."""
        return Batches(self.train, BATCH, indices=self._rest, shuffle=True, augment=True, seed=seed)


def plan_of(row: Row, model: nn.Module, images: Images, work: Path) -> ada.Plan:
    """The row's plan, from its file if it is there already."""
    file = work / "plan.json"
    if file.is_file():
        return ada.Plan.load(file)
    plan = ada.allocate(
        None,
        ada.Budget(size=row.percent / 100),
        method="optimal",
        model=model,
        calibration=images.calibration,
        tables=work / "tables",
        cache=work / "search.json",
    )
    plan.save(file)
    return plan


def run_seed(
    row: Row, seed: int, images: Images, models: Path, results: Path, lr: float | None = None
) -> dict[str, Any]:
    """Train with one seed, save, compile, classify; JSON values, which are written to a file."""
    work = results / f"{row.name}-{row.epochs}"
    folder = work / f"seed-{seed}"
    model = network(row.network, models)
    result = ada.compress(
        model,
        images.calibration,
        None,
        plan=plan_of(row, model, images, work),
        train_loader=images.training(seed),
        epochs=row.epochs,
        finetune_options={} if lr is None else {"lr": lr},
        work_dir=folder,
        seed=seed,
    )
    size = ada.save(result.model, folder / "model.safetensors")
    engine = ada.compile(result.model, images.calibration[0][0], policy="native")
    found = {
        "format": FORMAT,
        "machine": describe_machine(),
        "row": asdict(row),
        "seed": seed,
        "bytes": size,
        "float_bytes": float_bytes(model),
        "lr": lr,
        "held_out": accuracy(engine, images.held_out),
        "accuracy": accuracy(engine, images.test),
        "float": accuracy(model, images.test),
        "history": result.history.epochs,
    }
    write_text_atomic(folder / "result.json", json.dumps(found, indent=1) + "\n")
    return found


@torch.inference_mode()
def accuracy(function: Any, batches: Batches) -> float:
    right = sum(int((function(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(batches.indices)


def load(row: Row, results: Path) -> dict[int, dict[str, Any]]:
    """What there is of a row, by seed.

    Raises:
        ValueError: a file of another format.
    """
    found = {}
    for file in sorted((results / f"{row.name}-{row.epochs}").glob("seed-*/result.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{file}: not a result of this benchmark")
        found[int(data["seed"])] = data
    return dict(sorted(found.items()))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation of accuracies, the mean drop, the largest file in percent."""
    found = [run["accuracy"] for run in runs]
    return {
        "float": runs[0]["float"],
        "mean": statistics.mean(found),
        "sd": statistics.stdev(found) if len(found) > 1 else 0.0,
        "drop": runs[0]["float"] - statistics.mean(found),
        "percent": 100 * max(run["bytes"] for run in runs) / runs[0]["float_bytes"],
        "seeds": len(found),
    }


def line(row: Row, runs: Sequence[Mapping[str, Any]]) -> str:
    """A row in one line."""
    s = summary(runs)
    return (
        f"{row.name}: {s['percent']:.2f} % of the float file, {s['mean']:.2f} ± {s['sd']:.2f} % "
        f"over {s['seeds']} seeds, float {s['float']:.2f} %, drop {s['drop']:+.2f} "
        f"(aim: at most {row.most:g})"
    )


def run(
    rows: Sequence[Row],
    seeds: Sequence[int],
    data: str,
    models: Path,
    results: Path,
    lr: float | None = None,
) -> None:
    """Run what is not there yet."""
    images = Images(data)
    for row in rows:
        for seed in seeds:
            found = load(row, results).get(seed)
            if found is None:
                found = run_seed(row, seed, images, models, results, lr)
            print(f"{row.name} seed {seed}: {found['accuracy']:.2f} %", file=sys.stderr)
        print(line(row, list(load(row, results).values())))


def page_section(results: Path) -> str:
    """The table of docs/accuracy.md."""
    body = []
    for row in ROWS.values():
        runs = list(load(row, results).values())
        if not runs:
            continue
        s = summary(runs)
        met = "met" if s["drop"] <= row.most else "**missed**"
        spread = f" ± {s['sd']:.2f}" if len(runs) > 1 else ""
        body.append([
            NAMES[row.network], f"{s['percent']:.2f} %", str(row.epochs), f"{s['float']:.2f}",
            f"{s['mean']:.2f}{spread} ({s['seeds']})", f"{s['drop']:+.2f}",
            f"≤ {row.most:g}: {met}",
            f"`python -m bench.accuracy_training --data DATA --models MODELS --rows {row.name}`",
        ])  # fmt: skip
    heading = ["network", "of float", "epochs", "float", "compressed (seeds)", "drop", "aim",
               "command"]  # fmt: skip
    return "\n".join(["### With training", "", *table(heading, body)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", required=True, type=Path, help="folder of the trained weights")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS),
                        help="default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="peak learning rate; default: finetune's. Give "
                        "another one a folder of its own with --results")  # fmt: skip
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
        ada.set_num_threads(given.threads)
    rows = [ROWS[name] for name in given.rows]
    run(rows, given.seeds, given.data, given.models, given.results, given.lr)
    write_part(given.page, (BEGIN, END), page_section(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
