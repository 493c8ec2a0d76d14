"""How far two detectors' AP may differ by the choice of test scenes: a paired bootstrap.

    python -m bench.tasks.spread detection-4-distilled detection-3-distilled --data DATA

The engines are those that ``python -m bench.tasks`` left; both see the same resampled scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import adalayer_native as ada
from bench.tasks.measure import average_precisions, detected
from bench.tasks.training import FOLDER

RESAMPLES = 30


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks.spread", description=__doc__)
    parser.add_argument("rows", nargs=2, help="names of rows")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    engines = [ada.load(options.folder / "engines" / f"{row}.ada") for row in options.rows]
    pairs = [detected(engine, options.data) for engine in engines]
    draw = np.random.default_rng(0)
    differences = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(len(pairs[0][0]), size=len(pairs[0][0])).tolist()
        first, second = (
            average_precisions([found[k] for k in chosen], [truth[k] for k in chosen])["AP"]
            for found, truth in pairs
        )
        differences.append(first - second)
    whole = [average_precisions(*pair)["AP"] for pair in pairs]
    print(
        f"AP {whole[0]:.2f} and {whole[1]:.2f}: difference {whole[0] - whole[1]:.2f}, standard "
        f"error {np.std(differences, ddof=1):.2f} ({RESAMPLES} resamples)"
    )


if __name__ == "__main__":
    main()
