"""Networks that users bring, from capture to engine: what they get, and what they miss.

    python -m bench.zoo [--only NAME ...] [--bits 8 4] [--out docs/zoo.md] [--json FILE]

NAME is a network, its package, or a pattern with ``*``. Every network is measured in a process of
its own and its result is kept in ``build/zoo``; a run that is interrupted goes on, and a network is
measured again where a version or the processor has changed, or with ``--fresh``. A run over all
networks writes docs/zoo.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adalayer_native._files import write_text_atomic
from adalayer_native._progress import ProgressBar
from bench.record import ROOT
from bench.zoo.entry import Entry
from bench.zoo.judge import misses
from bench.zoo.networks import NETWORKS
from bench.zoo.page import write_page
from bench.zoo.store import ABSENT, FOLDER, is_fresh, path_of, read, write

PAGE = ROOT / "docs" / "zoo.md"


def chosen(patterns: Sequence[str] | None) -> list[Entry]:
    """The networks that are asked for, in the order of the page.

    Raises:
        ValueError: a pattern that fits no network.
    """
    if patterns is None:
        return list(NETWORKS.values())
    found: set[str] = set()
    for pattern in patterns:
        fitting = {
            name
            for name, entry in NETWORKS.items()
            for known in (name, name.partition("/")[2], entry.package)
            if fnmatch.fnmatchcase(known, pattern)
        }
        if not fitting:
            raise ValueError(f"no network fits {pattern!r}; there are {', '.join(NETWORKS)}")
        found |= fitting
    return [entry for name, entry in NETWORKS.items() if name in found]


def run_one(entry: Entry, bits: Sequence[int], seconds: float, limit: float, folder: Path) -> bool:
    """Measure a network in another process; false where its package is not installed.

    Its output goes to a ``.log`` beside the result. A process that ends by itself before it is
    done, or takes too long, is a result too.
    """
    path = path_of(entry.name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "bench.zoo.worker", entry.name, str(path),
        "--bits", *map(str, bits), "--seconds", str(seconds),
    ]  # fmt: skip
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            status = process.wait(limit)
            ending = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            status, ending = 1, f"took more than {limit:.0f} s"
        finally:
            process.kill()
            process.wait()
    if status == ABSENT:
        return False
    if status != 0:
        known = read(path) or {"name": entry.name, "convolutional": entry.convolutional, "bits": {}}
        known.pop("key", None)
        write(path, {**known, "crashed": ending, "complete": True}, entry.package)
    return True


def run(entries: Sequence[Entry], given: argparse.Namespace) -> list[str]:
    """Measure what is not known yet; returns the networks whose packages are not installed."""
    waiting = [
        entry
        for entry in entries
        if given.fresh
        or not is_fresh(read(path_of(entry.name, given.folder)), entry.package, given.bits)
    ]
    absent = []
    with ProgressBar("networks", len(entries), unit="network") as bar:
        bar.advance(len(entries) - len(waiting))
        for entry in waiting:
            bar.advance(0, note=entry.name)
            if not run_one(entry, given.bits, given.seconds, given.limit, given.folder):
                absent.append(entry.name)
            bar.advance()
    return absent


def report(records: Sequence[dict[str, Any]]) -> None:
    """Every miss, for the terminal."""
    for record in records:
        found = misses(record)
        print(f"{record['name']}: {'misses nothing' if not found else ''}".rstrip())
        for miss in found:
            print(f"    {miss}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of all weights")
    parser.add_argument("--out", type=Path, help="page to write, of all results that are kept")
    parser.add_argument("--json", type=Path, help="file of the same results")
    parser.add_argument("--fresh", action="store_true", help="measure what is known already")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of engine and torch by turns, per width"
    )
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one network")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are kept")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    given = parser.parse_args(arguments)
    try:
        entries = chosen(given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        print("\n".join(entry.name for entry in entries))
        return 0
    given.folder = given.folder.resolve()
    try:
        absent = run(entries, given)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    found = {name: read(path_of(name, given.folder)) for name in NETWORKS}
    known = {name: record for name, record in found.items() if record and record["complete"]}
    report([known[entry.name] for entry in entries if entry.name in known])
    if absent:
        print(f"not installed (pip install 'adalayer_native[zoo]'): {', '.join(absent)}")
    out = given.out or (PAGE if given.only is None else None)
    if out is not None:
        write_page(list(known.values()), out, [name for name in NETWORKS if name not in known])
        print(f"written: {out}")
    if given.json is not None:
        write_text_atomic(given.json, json.dumps(list(known.values()), indent=1) + "\n")
        print(f"written: {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
