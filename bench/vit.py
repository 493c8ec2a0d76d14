"""A small vision transformer on CIFAR-10, from training to what compressed linear layers lose.

    python -m bench.vit --data cifar10.zip

DATA is a folder or zip of images (``train/<class>/…``, ``test/<class>/…``). The network is trained
once and kept under ``build/bench/vit``; an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native.data import Batches, open_dataset
from adalayer_native.training import fit
from bench.record import ROOT

FOLDER = ROOT / "build" / "bench" / "vit"
WIDTH, DEPTH, HEADS, PATCH = 128, 6, 4, 4
EPOCHS = 7
BATCH = 128


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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.vit", description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    train(options.data, options.folder)


if __name__ == "__main__":
    main()
