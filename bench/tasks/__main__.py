"""Detection and segmentation, end to end: trains, compresses, measures, and writes docs/tasks.md.

    python -m bench.tasks --data DATA

DATA holds cifar10.zip. Networks are trained once and kept under ``build/bench/tasks``, each row's
result is a file there, and an interrupted command goes on where it stopped. Several commands with
other ``--rows`` may run side by side; the page shows whatever is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from adalayer_native._files import write_text_atomic
from bench.record import describe_machine
from bench.tasks.measure import ROWS, measure
from bench.tasks.page import write
from bench.tasks.training import FOLDER


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", help="names, or beginnings of them: detection-4")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for row in ROWS:
        path = options.folder / "rows" / f"{row.name}.json"
        asked = not options.rows or any(row.name.startswith(name) for name in options.rows)
        if path.is_file() or not asked:
            continue
        found = measure(row, options.data, options.folder)
        found["machine"] = describe_machine()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(found, indent=1) + "\n")
        print(row.name, found["figures"], found.get("seconds", ""), file=sys.stderr, flush=True)
    write(options.folder / "rows")


if __name__ == "__main__":
    main()
