"""One network in a process of its own: ``python -m bench.zoo.worker NAME FILE [options]``.

A network that needs all the memory, hangs or crashes then ends nothing but its own process, and
what it left behind in a package (hooks, caches, threads) is not in the next one's figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.zoo.store import ABSENT, write


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 too where the network is refused, which is a result."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo.worker", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args(arguments)
    # Engines are planned in the process that times them, not by an earlier, perhaps busier one.
    os.environ.setdefault("ADALAYER_PLAN_CACHE", "off")
    torch.set_num_threads(1)
    # What packages say about their own code is theirs; it would bury what matters in the log.
    warnings.simplefilter("ignore")

    from bench.zoo.measure import measure
    from bench.zoo.networks import NETWORKS
    from bench.zoo.packages import MissingPackageError, package

    entry = NETWORKS[given.name]

    def save(record: dict[str, Any], complete: bool = False) -> None:
        write(given.file, {**record, "complete": complete}, entry.package)

    try:
        if entry.package != "own":
            package(entry.package)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return ABSENT
    save(measure(entry, given.bits, given.seconds, save), complete=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
