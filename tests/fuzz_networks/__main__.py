"""Random networks for hours; or, where files of findings are named, those once more."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from .campaign import Report, campaign, case_from_json, finding_of, write
from .check import judge


class Log:
    """Writes findings down, and a line per minute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = self.shown = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, ...]] = Counter()

    def seen(self, number: int, counts: Counter[str], reports: list[Report]) -> None:
        self.counts += counts
        for report in reports:
            signature = report.finding.signature
            self.kinds[signature] += 1
            path = write(report, self.folder)
            if self.kinds[signature] <= 3:
                print(f"\n{path}\n{report}\n", flush=True)
        if time.monotonic() - self.shown >= 60:
            self.shown = time.monotonic()
            self.line(number)

    def line(self, number: int) -> None:
        seconds = time.monotonic() - self.started
        cells = self.counts["cells"]
        rest = ", ".join(f"{v} {k}" for k, v in self.counts.items() if k not in ("cells", "cases"))
        print(
            f"{seconds / 60:6.1f} min: case {number}, {cells} networks in {self.counts['cases']} "
            f"models, {cells / seconds:.1f}/s; {sum(self.kinds.values())} findings of "
            f"{len(self.kinds)} kinds; {rest}",
            flush=True,
        )


def again(paths: list[Path]) -> int:
    """Judge stored findings; returns how many still fail."""
    failing = 0
    for path in paths:
        case = case_from_json(path.read_text().splitlines()[-1])
        for recipe in case.recipes:
            print(recipe)
        finding = finding_of(case, judge)
        failing += finding is not None
        print(f"{path}: {finding or 'nothing wrong'}")
    return failing


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz_networks", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="findings to judge once more")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz-networks"))
    options = parser.parse_args()
    os.environ.setdefault("ADALAYER_PLAN_CACHE", "off")
    torch.set_num_threads(1)
    if options.files:
        return min(again(options.files), 1)
    log = Log(options.out)
    last = campaign(options.seed, options.minutes * 60, options.workers, seen=log.seen)
    log.line(last)
    print(f"go on with SEED={last}")
    return 1 if log.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
