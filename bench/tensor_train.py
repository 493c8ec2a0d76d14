"""Tensor trains beside pruning and bits at equal bytes: a network, and a large layer.

    python -m bench.tensor_train --data cifar10.zip --models weights/

DATA and MODELS are those of ``bench.accuracy``. For every row AdaLayerNet's layers become tensor
trains, the cores get the row's bits, and the saved file's size is the budget under which method
``"optimal"`` prunes and chooses bits for the network as it is; both are repaired, fine-tuned for
the row's epochs, compiled, and classify all test images. The layer is 4096 x 4096, of noise and
with singular values that fall as those of trained layers do; there, the output's error and the time
of a call are compared. Results go into a JSON file row by row, so that an interrupted command goes
on, and the part of ``docs/studies.md`` between this program's markers is rewritten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import float_bytes
from bench.accuracy import judge, network
from bench.accuracy_training import Images
from bench.markdown import markers, table, write_part
from bench.record import ROOT, results_of

RESULTS = ROOT / "build" / "bench" / "tensor-train.json"
PAGE = ROOT / "docs" / "studies.md"
FORMAT = "adalayer-tensor-train-1"
MARKERS = markers("bench/tensor_train.py")
SIZE = 4096  # of the large layer
CALLS = 41


@dataclass(frozen=True)
class Row:
    """A network in trains, and what it is compared with.

    Attributes:
        name: of the row.
        title: of the row in the table.
        error: of every weight, at most.
        bits: of every weight left.
        layers: those that may become trains; none: all.
        epochs: of fine-tuning, of both.
    """

    name: str
    title: str
    error: float
    bits: int
    layers: tuple[str, ...] | None = None
    epochs: int = 0


CONNECTED = ("fc1", "fc2", "classifier")
ROWS = {
    row.name: row
    for row in (
        Row("connected-30", "fully connected layers, error 0.3", 0.3, 8, CONNECTED),
        Row("connected-50", "fully connected layers, error 0.5", 0.5, 8, CONNECTED),
        Row("all-30", "all layers, error 0.3", 0.3, 8),
        Row("all-50", "all layers, error 0.5", 0.5, 8),
        Row("all-50-trained", "all layers, error 0.5, 2 epochs", 0.5, 8, None, 2),
    )
}


def compressed(row: Row, images: Images, model: nn.Module, work: Path, budget: Any) -> Any:
    """In trains where the budget is the bits of all layers; under it, as it is, elsewhere."""
    options: dict[str, Any] = {}
    method = "optimal"
    if isinstance(budget, int):
        method = "tensor_train"
        trains: dict[str, Any] = {"error": row.error, "clock": False}
        if row.layers is not None:
            trains["layers"] = row.layers
        options = {"options": trains}
    else:
        options = {"tables": work / "tables"}
    return ada.compress(
        model,
        images.calibration,
        budget,
        method=method,
        train_loader=images.training(0) if row.epochs else None,
        epochs=row.epochs,
        effort="low",
        allocate_options=options,
        work_dir=work / f"{row.name}-{method}",
    )


def measured(row: Row, images: Images, models: Path, work: Path) -> dict[str, Any]:
    """One row as JSON values."""
    model = network("adalayernet", models)
    found: dict[str, Any] = {"row": asdict(row), "float_bytes": float_bytes(model)}
    budget: Any = row.bits
    for name in ("train", "optimal"):
        result = compressed(row, images, model, work, budget)
        size = ada.save(result.model, work / f"{row.name}-{name}.safetensors")
        x = images.calibration[0][0]
        engine = ada.compile(result.model, x, policy="native")
        found[name] = {"bytes": size, **judge(engine, images.test)}
        if result.decomposed is not None:
            layers = result.decomposed.layers.values()
            found["layers"] = {layer.name: asdict(layer) for layer in layers}
            found["kept"] = result.decomposed.kept
        budget = ada.Budget(bytes=size)
    return found


def large(kind: str) -> nn.Linear:
    """A layer of noise, or one whose singular values fall with the root of their number."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    if kind == "falling":
        left, _ = torch.linalg.qr(torch.randn(SIZE, SIZE))
        right, _ = torch.linalg.qr(torch.randn(SIZE, SIZE))
        weight = left * torch.arange(1, SIZE + 1).pow(-0.5) @ right
    layer.weight.data = weight
    return layer.eval()


def measured_layer(kind: str, rank: int) -> dict[str, Any]:
    """Output error and time of the large layer in both forms, at the bytes of the train."""
    layer = large(kind)
    model = nn.Sequential(layer)
    data = [torch.randn(64, SIZE, generator=torch.Generator().manual_seed(1))]
    options = {"rank": rank, "clock": False}
    train = ada.compress(
        model, data, 8, method="tensor_train", repair=False, effort="low",
        allocate_options={"options": options},
    )  # fmt: skip
    state = train.model.state_dict().values()
    size = sum(value.numel() * value.element_size() for value in state)
    pruned = ada.compress(model, data, ada.Budget(bytes=size + 4096), method="uniform",
                          repair=False, effort="low")  # fmt: skip
    x = torch.randn(32, SIZE, generator=torch.Generator().manual_seed(2))
    engines: dict[str, Callable[[Tensor], Tensor]] = {
        "train": ada.compile(train.model, x[:1], policy="native"),
        "pruned": ada.compile(pruned.model, x[:1], policy="native"),
    }
    with torch.inference_mode():
        want = model(x)
        errors = {n: float((e(x) - want).norm() / want.norm()) for n, e in engines.items()}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(CALLS):
            for name, engine in engines.items():
                begin = time.perf_counter()
                engine(x[:1])
                times[name].append(time.perf_counter() - begin)
    assert train.decomposed is not None
    found = next(iter(train.decomposed.layers.values()))
    plan = next(iter(pruned.plan.layers.values()))
    return {
        "kind": kind,
        "rank": rank,
        "bytes": size,
        "modes": found.modes,
        "weight_error": found.error,
        "plan": [plan.bits, plan.sparsity],
        "errors": errors,
        "seconds": {name: statistics.median(kept) for name, kept in times.items()},
    }


def page_section(data: Mapping[str, Any]) -> str:
    """The part of the page."""
    machine = data["machine"]
    lines = [f"Machine: {machine['cpu']}, kernels {machine['isa']}.", ""]
    rows = []
    for name, found in data["rows"].items():
        train, other = found["train"], found["optimal"]
        weights = sum(layer["weights"] for layer in found["layers"].values())
        dense = sum(layer["dense_weights"] for layer in found["layers"].values())
        rows.append(
            [
                ROWS[name].title,
                f"{len(found['layers'])}, {weights / dense:.0%}",
                f"{train['bytes']:,}, {train['bytes'] / found['float_bytes']:.1%}",
                f"{train['accuracy']:.2f}",
                f"{other['accuracy']:.2f} ({other['bytes']:,})",
            ]
        )
    lines += table(
        ("AdaLayerNet", "trains, weights left", "file, of float", "8-bit trains", "`optimal`"), rows
    )
    rows = [
        [
            f"{entry['kind']}, rank {entry['rank']}",
            f"{entry['bytes']:,}",
            f"{entry['errors']['train']:.3f}",
            f"{entry['errors']['pruned']:.3f} ({entry['plan'][0]} bits, {entry['plan'][1]:.0%} 0)",
            f"{1e3 * entry['seconds']['train']:.3f}",
            f"{1e3 * entry['seconds']['pruned']:.3f}",
        ]
        for entry in data["layers"].values()
    ]
    lines += table(
        ("4096 x 4096", "bytes", "error of the train", "pruned", "train, ms", "pruned, ms"), rows
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tensor_train", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "layers"], default=[*ROWS, "layers"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    data = results_of(given.results, FORMAT, rows={}, layers={})
    work = given.results.parent / "tensor-train"
    work.mkdir(parents=True, exist_ok=True)
    images = None

    def keep() -> None:
        write_text_atomic(given.results, json.dumps(data, indent=1) + "\n")
        write_part(given.page, MARKERS, page_section(data))

    for name in given.rows:
        if name == "layers":
            for rank in (512, 1024):  # of fewer, the train is smaller than pruning can be
                for kind in ("noise", "falling"):
                    key = f"{kind}-{rank}"
                    if key not in data["layers"]:
                        data["layers"][key] = measured_layer(kind, rank)
                        keep()
        elif name not in data["rows"]:
            images = images or Images(given.data)
            data["rows"][name] = measured(ROWS[name], images, given.models, work)
            keep()
    keep()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
