"""A small vision transformer on CIFAR-10, from training to what compressed linear layers lose.

    python -m bench.vit --data cifar10.zip

DATA is a folder or zip of images (``train/<class>/…``, ``test/<class>/…``). The network is trained
once and kept under ``build/bench/vit``; an interrupted command goes on where it stopped, ``--rows
8 4`` measures those that begin so. Every layer gets the row's bits. Ranges and repairs are from
1,000 training images; the engine of the saved file classifies all test images.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import everywhere, float_bytes
from adalayer_native.data import Batches, calibration_indices, open_dataset
from adalayer_native.training import fit
from bench.markdown import markers, table, write_part
from bench.record import ROOT, describe_machine

FOLDER = ROOT / "build" / "bench" / "vit"
WIDTH, DEPTH, HEADS, PATCH = 128, 6, 4, 4
EPOCHS = 7
BATCH = 128
CALIBRATION = 1000
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = markers("bench/vit.py")


@dataclass(frozen=True)
class Row:
    """A width of all weights, the group size of linear layers, and the drop that is aimed at."""

    name: str
    bits: int
    group_size: int | None
    repaired: bool
    most: float | None = None


ROWS = (
    Row("8", 8, None, False, 0.5),
    Row("4", 4, None, True),
    Row("4-groups-128", 4, 128, True, 1.5),
    Row("4-groups-64", 4, 64, True, 1.5),
    Row("4-groups-32", 4, 32, True, 1.5),
    Row("4-rounded", 4, None, False),
    Row("4-groups-32-rounded", 4, 32, False),
)


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, T, WIDTH]``, the same on both sides."""
        n, t, _ = x.shape
        heads = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        # By hand: the gradient of the fused operator takes more than all else in bfloat16.
        mixed = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4 x 4 pixels as tokens, blocks, the mean of all tokens, one linear layer."""

    def __init__(self, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, size, size]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def train(data: str, folder: Path) -> nn.Module:
    """The trained network, in evaluation mode; what there is of it is not trained again."""
    torch.manual_seed(0)
    model = ViT()
    file = folder / "float.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    images = open_dataset(data, "train", 32)
    loader = Batches(images, BATCH, shuffle=True, augment=True)
    fit(
        model,
        loader,
        EPOCHS,
        lr=1.5e-3,
        optimizer="adamw",
        weight_decay=0.05,
        label_smoothing=0.1,
        checkpoint=folder / "checkpoint.pt",
    )
    torch.save(model.state_dict(), file)
    return model.eval()


def measure(row: Row, model: nn.Module, data: str, folder: Path) -> dict[str, Any]:
    """JSON values: bytes of the file, and accuracies on the test images in percent."""
    images, test = (open_dataset(data, split, 32) for split in ("train", "test"))
    indices = calibration_indices(images, CALIBRATION)
    calibration = list(Batches(images, 125, indices=indices))
    network = ada.capture(model, calibration[0][0][:1])
    plan = everywhere(network, row.bits)
    for layer in plan.layers.values():
        if layer.kind == "linear":
            layer.group_size = row.group_size
    prepared = ada.prepare(network, plan)
    ada.calibrate(prepared, calibration, progress=False)
    if row.repaired:
        ada.repair(prepared, calibration, progress=False)
    file = folder / f"{row.name}.safetensors"
    size = ada.save(ada.convert(prepared), file)
    native = ada.restore(ViT(), file, calibration[0][0][:1])
    engine = ada.compile(native, calibration[0][0], policy="native", strict=True)
    batches = Batches(test, 250)
    return {
        "row": row.name,
        "bytes": size,
        "float_bytes": float_bytes(model),
        "native": engine.native_share,
        "accuracy": accuracy(engine, batches),
        "float": accuracy(model, batches),
    }


@torch.inference_mode()
def accuracy(function: Any, batches: Batches) -> float:
    """Top-1 in percent."""
    right = sum(int((function(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(batches.indices)


def page(results: dict[str, dict[str, Any]]) -> str:
    """The table of docs/accuracy.md."""
    lines = []
    for row in ROWS:
        if row.name not in results:
            continue
        found = results[row.name]
        drop = found["float"] - found["accuracy"]
        aim = ""
        if row.most is not None:
            aim = f"≤ {row.most}: {'met' if drop <= row.most else '**missed**'}"
        scales = f"per {row.group_size} inputs" if row.group_size else "per output channel"
        share = f"{100 * found['bytes'] / found['float_bytes']:.2f} %"
        numbers = (f"{found['float']:.2f}", f"{found['accuracy']:.2f}", f"{drop:+.2f}")
        repaired = "yes" if row.repaired else "no"
        lines.append((f"{row.bits}", scales, repaired, share, *numbers, aim))
    head = (
        "bits",
        "scales of linear layers",
        "repair",
        "of float",
        "float",
        "engine",
        "drop",
        "aim",
    )
    machine = next(iter(results.values()))["machine"]
    versions = machine["versions"]
    said = f"Machine: {machine['cpu']}, kernels {machine['isa']}, torch {versions['torch']}."
    return "\n".join([said, "", *table(head, lines)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.vit", description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", nargs="*", help="names, or beginnings of them")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    model = train(options.data, options.folder)
    file = options.folder / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for row in ROWS:
        asked = not options.rows or any(row.name.startswith(name) for name in options.rows)
        if row.name in results or not asked:
            continue
        results[row.name] = measure(row, model, options.data, options.folder)
        results[row.name]["machine"] = describe_machine()
        write_text_atomic(file, json.dumps(results, indent=1) + "\n")
        print(row.name, results[row.name], file=sys.stderr, flush=True)
    write_part(PAGE, (BEGIN, END), page(results))


if __name__ == "__main__":
    main()
