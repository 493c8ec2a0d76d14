"""Engines of two builds by turns: how many times as fast the second one is.

    python -m bench.two_builds BEFORE AFTER FILE.ada [FILE.ada …] [--threads 1] [--compilations 12]

BEFORE and AFTER are ``python/`` folders of two source trees with their compiled extension. Each has
a process of its own, which compiles every file with choices of its own (nothing kept by earlier
processes counts). The processes take turns of a tenth of a second; a ratio is of two neighbouring
turns, of each its first quartile. With ``--compilations`` each build compiles every file so often
instead, and prints the 5th percentile of every compilation's calls: what the clock's choices differ
by. Inputs are noise; ids are zeros.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TURN = 0.12  # seconds
ROUNDS = 25
CALLS = 40

# Of a build, which knows nothing of this file's: lines "NUMBER" in, milliseconds out.
_PROCESS = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
import adalayer_native as ada

def noise(size, kind):
    return torch.zeros(1, *size, dtype=torch.long) if kind else torch.randn(1, *size)

class Candidate:
    def __init__(self, path):
        self.engine = ada.load(path)
        self.inputs = [
            noise(port.shape, not port.dtype.is_floating_point) for port in self.engine.inputs
        ]
        self.seconds(3)

    def seconds(self, calls):
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            self.engine(*self.inputs)
            found.append(time.perf_counter() - start)
        return sorted(found)

    def turn(self, length):
        self.seconds(1)
        found, end = [], time.perf_counter() + length
        while time.perf_counter() < end or len(found) < 3:
            found += self.seconds(1)
        return sorted(found)[len(found) // 4]

candidates = [Candidate(path) for path in sys.argv[4:]]
print("ready", flush=True)
for line in sys.stdin:
    print(1e3 * candidates[int(line)].turn(float(sys.argv[3])), flush=True)
"""


class Build:
    """A process of one build, which has compiled the files."""

    def __init__(self, folder: Path, files: list[Path], threads: int) -> None:
        if not list((folder / "adalayer_native").glob("_C*")):
            raise SystemExit(f"{folder}: expected a folder with a compiled adalayer_native")
        environment = {**os.environ, "ADALAYER_PLAN_CACHE": "off", "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(folder), str(threads), str(TURN),
             *map(str, files)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a build has ended; its error is above")
        return line

    def turn(self, number: int) -> float:
        """Milliseconds of a call of file ``number``."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self._line())

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def by_turns(folders: list[Path], files: list[Path], threads: int) -> None:
    """Prints a row per file."""
    with Build(folders[0], files, threads) as before, Build(folders[1], files, threads) as after:
        pairs: list[list[tuple[float, float]]] = [[] for _ in files]
        for _ in range(ROUNDS):
            for number in range(len(files)):
                pairs[number].append((before.turn(number), after.turn(number)))
    for file, found in zip(files, pairs, strict=True):
        old, new = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(a / b for a, b in found)
        print(f"{file.name}: {old:.3f} ms, {new:.3f} ms, {ratio:.3f} times as fast")


def compilations(folders: list[Path], file: Path, threads: int, count: int) -> None:
    """Prints a row per build."""
    for folder in folders:
        with Build(folder, [file] * count, threads) as build:
            turns = [[build.turn(number) for number in range(count)] for _ in range(CALLS)]
        least = [statistics.quantiles(column, n=20)[0] for column in zip(*turns, strict=True)]
        print(f"{folder}: {file.name}: {', '.join(f'{ms:.3f}' for ms in sorted(least))} ms")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.ada")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compilations", type=int, default=0)
    options = parser.parse_args()
    folders = [options.before, options.after]
    if options.compilations:
        for file in options.files:
            compilations(folders, file, options.threads, options.compilations)
    else:
        by_turns(folders, options.files, options.threads)


if __name__ == "__main__":
    main()
