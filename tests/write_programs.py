"""Random programs as .ada files: python tests/write_programs.py FOLDER --count 200 --seed 1

For machines without Python: `ada_outputs answer FOLDER` adds what this one makes of them, and
`ada_outputs check FOLDER` compares there (CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from helpers_program import programs
from hypothesis import HealthCheck, Phase, given, seed, settings

from adalayer_native import _C


def write(folder: Path, count: int, number: int) -> None:
    """Files 0000.ada, 0001.ada, ... of `count` programs; the same ones for the same number."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter(f"{k:04}.ada" for k in range(count))

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs(everything=False))
    def save(program: _C.Program) -> None:
        if (name := next(names, None)) is not None:
            program.save(folder / name)

    save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    write(options.folder, options.count, options.seed)
