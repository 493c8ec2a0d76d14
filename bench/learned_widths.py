"""Bits and zeros that are learned while fine-tuning, beside ``optimal`` and fine-tuning after it.

    python -m bench.learned_widths --data cifar10.zip --models weights/ --budget 0.065 --seed 0

ResNet-20 for CIFAR-10 from its trained weights, as in ``bench.accuracy_training``: 5,000 training
images are held out, neither plan nor training sees them. Both ways get the same budget of bytes,
the same epochs of the same images, the same teacher and learning rate: *learned* begins with 8 bits
everywhere (``compress(..., allocate="learned")``), *optimal* with that method's plan, repaired. The
compiled engine of the saved file classifies the test images.

An interrupted run goes on where it stopped when the same command is given again. Every way and seed
has a folder of its own with its checkpoint and its ``result.json``, so that commands with other
seeds may run side by side (``--threads 1``); the page shows whatever is there. ``--images`` takes
only so many of the training images: such rows say so, and are no measure of what long runs reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import float_bytes
from adalayer_native.data import Batches
from bench.accuracy_training import BATCH, Images, accuracy
from bench.markdown import markers, table, write_part
from bench.record import ROOT, describe_machine
from bench.trained import network

RESULTS = ROOT / "build" / "bench" / "learned-widths"
PAGE = ROOT / "docs" / "accuracy.md"
FORMAT = "adalayer-learned-widths-1"
MARKERS = markers("bench/learned_widths.py")
NETWORK = "resnet20"
WAYS = ("learned", "optimal")


@dataclass(frozen=True)
class Setting:
    """What both ways have in common.

    Attributes:
        budget: of the float file.
        epochs: of training.
        images: training images; ``None``: all that are not held out.
        lr: peak learning rate.
        effort: of the search and the repair of ``optimal``.
    """

    budget: float
    epochs: int
    images: int | None
    lr: float
    effort: str

    @property
    def name(self) -> str:
        """Of the folder."""
        some = "" if self.images is None else f"-{self.images}"
        return f"{self.budget:g}-{self.epochs}{some}-{self.lr:g}-{self.effort}"


def run(
    setting: Setting, way: str, seed: int, images: Images, models: Path, results: Path
) -> dict[str, Any]:
    """Train, save, compile and classify; what was found, which is written to a file."""
    work = results / setting.name
    folder = work / f"{way}-{seed}"
    model = network(NETWORK, models)
    budget = ada.Budget(size=setting.budget)
    loader = images.training(seed)
    if setting.images is not None:
        some = loader.indices[: setting.images]
        loader = Batches(images.train, BATCH, indices=some, shuffle=True, augment=True, seed=seed)
    common: dict[str, Any] = {
        "train_loader": loader, "epochs": setting.epochs, "effort": setting.effort, "seed": seed,
        "finetune_options": {"lr": setting.lr}, "work_dir": folder,
    }  # fmt: skip
    if way == "learned":
        result = ada.compress(model, images.calibration, budget, allocate="learned", **common)
    else:
        plan = _plan(setting, budget, model, images, work)
        result = ada.compress(model, images.calibration, None, plan=plan, **common)
    size = ada.save(result.model, folder / "model.safetensors")
    engine = ada.compile(result.model, images.calibration[0][0], policy="native")
    found = {
        "format": FORMAT,
        "machine": describe_machine(),
        "setting": asdict(setting),
        "way": way,
        "seed": seed,
        "bytes": size,
        "float_bytes": float_bytes(model),
        "held_out": accuracy(engine, images.held_out),
        "accuracy": accuracy(engine, images.test),
        "float": accuracy(model, images.test),
        "layers": {n: [p.bits, p.sparsity] for n, p in result.plan.layers.items()},
        "history": result.history.epochs,
    }
    write_text_atomic(folder / "result.json", json.dumps(found, indent=1) + "\n")
    return found


def _plan(
    setting: Setting, budget: ada.Budget, model: torch.nn.Module, images: Images, work: Path
) -> ada.Plan:
    """The plan of ``optimal``, from its file if it is there already; the same for every seed."""
    file = work / "optimal.json"
    if not file.is_file():
        plan = ada.allocate(
            None, budget, method="optimal", model=model, calibration=images.calibration,
            options={"effort": setting.effort}, tables=work / "tables", cache=work / "search.json",
        )  # fmt: skip
        plan.save(file)
    return ada.Plan.load(file)


def load(results: Path) -> list[dict[str, Any]]:
    """Everything that is there.

    Raises:
        ValueError: a file of another format.
    """
    found = []
    for file in sorted(results.glob("*/*/result.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{file}: not a result of this benchmark")
        found.append(data)
    return found


def page_section(results: Path) -> str:
    """The table of docs/accuracy.md: a row per setting and way, over all seeds there are."""
    groups: dict[tuple[Setting, str], list[dict[str, Any]]] = {}
    for data in load(results):
        groups.setdefault((Setting(**data["setting"]), data["way"]), []).append(data)
    rows = []
    for (setting, way), runs in sorted(groups.items(), key=lambda g: (g[0][0].name, g[0][1])):
        found = [run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        percent = 100 * max(run["bytes"] for run in runs) / runs[0]["float_bytes"]
        most = "all" if setting.images is None else f"{setting.images:,}"
        rows.append([
            f"{100 * setting.budget:g} %", way, f"{setting.epochs} of {most} images",
            f"{percent:.2f} %", f"{statistics.mean(found):.2f}{spread} ({len(found)})",
            f"{runs[0]['float'] - statistics.mean(found):+.2f}",
            f"`python -m bench.learned_widths --data DATA --models MODELS --budget "
            f"{setting.budget:g} --epochs {setting.epochs}"
            + ("" if setting.images is None else f" --images {setting.images}")
            + f" --lr {setting.lr:g} --effort {setting.effort}`",
        ])  # fmt: skip
    heading = ["budget", "way", "epochs", "of float", "test, % (seeds)", "drop", "command"]
    return "\n".join(["### Learned widths", "", *table(heading, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learned_widths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", required=True, type=Path, help="folder of the trained weights")
    parser.add_argument("--budget", type=float, default=0.065, help="file, of the float file")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--images", type=int, help="training images; default: all")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    parser.add_argument("--effort", default="normal", help="of method optimal")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    ada.set_num_threads(given.threads)
    setting = Setting(given.budget, given.epochs, given.images, given.lr, given.effort)
    images = Images(given.data)
    for seed in given.seed:
        for way in given.ways:
            file = given.results / setting.name / f"{way}-{seed}" / "result.json"
            if not file.is_file():
                run(setting, way, seed, images, given.models, given.results)
            found = json.loads(file.read_text(encoding="utf-8"))
            print(
                f"{way} seed {seed}: {found['accuracy']:.2f} % with {found['bytes']:,} bytes "
                f"({100 * found['bytes'] / found['float_bytes']:.2f} %), float {found['float']:.2f}"
            )
    write_part(given.page, MARKERS, page_section(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
