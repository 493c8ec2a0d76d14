"""Method "rl" beside the solver: the same budget, the same images, judged on others.

``python -m bench.search --data cifar10.zip --weights resnet20_cifar10.safetensors`` prints one line
per plan: method, plans that it measured, and the KL divergence to the float network on training
images that neither has seen. Widths alone, no pruning and no repair, so that both choose among the
same plans.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from adalayer_native.allocation import Budget, allocate
from adalayer_native.allocation.evaluate import Evaluator
from adalayer_native.data import loaders, open_dataset
from adalayer_native.models import get_model, load_weights

CALIBRATION, HELD = 256, 512


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="image folder or zip")
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--bits", type=float, default=4.0, help="mean bits per weight")
    parser.add_argument("--episodes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    train, test = (
        open_dataset(given.data, split, 32, progress=False) for split in ("train", "test")
    )
    data = loaders(train, test, batch_size=128, calibration=CALIBRATION + HELD, seed=0)
    x, y = (torch.cat(parts) for parts in zip(*data.calibration, strict=True))
    calibration = list(zip(x[:CALIBRATION].split(64), y[:CALIBRATION].split(64), strict=True))
    held = list(zip(x[CALIBRATION:].split(128), y[CALIBRATION:].split(128), strict=True))
    model = load_weights(get_model(given.model, len(train.classes)), given.weights).eval()
    judge = Evaluator(model, held)

    runs: list[tuple[str, str, dict[str, Any] | None]] = [
        ("uniform", "", None),
        ("optimal", "", {"sparsities": (0.0,)}),
        *(
            ("rl", f"{episodes} episodes, seed {seed}", {"episodes": episodes, "seed": seed})
            for episodes in given.episodes
            for seed in given.seeds
        ),
    ]
    for method, about, options in runs:
        plan = allocate(
            None,
            Budget(bits=given.bits),
            method=method,
            model=model,
            calibration=calibration,
            options=options,
            progress=False,
        )
        found = judge.measure({n: (e.bits, e.sparsity) for n, e in plan.layers.items()})
        print(
            f"{method} {about}: KL {found.loss:.4f}, {plan.average_bits:.2f} bits per weight",
            flush=True,
        )


if __name__ == "__main__":
    main()
