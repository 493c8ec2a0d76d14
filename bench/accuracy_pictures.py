"""How many calibration pictures accuracy asks for: 1,000, 250, 64, and none.

    python -m bench.accuracy_pictures --data cifar10.zip --models weights/

DATA and MODELS are those of ``bench.accuracy``, and so is the protocol; all layers have 8 bits or
4, nothing is pruned or searched. Without pictures, some are distilled from the batch norms
(``compress(model, None, bits)``). Results go into a JSON file row by row, and the part of
``docs/accuracy.md`` between this program's markers is rewritten.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from bench.accuracy import Images, judge, network
from bench.accuracy_page import verdict
from bench.markdown import markers, table, write_part
from bench.record import ROOT, results_of
from bench.trained import NAMES

RESULTS = ROOT / "build" / "bench" / "accuracy-pictures.json"
PAGE = ROOT / "docs" / "accuracy.md"
FORMAT = "adalayer-accuracy-pictures-1"
MARKERS = markers("bench/accuracy_pictures.py")
NETWORKS = ("adalayernet", "resnet20")
COUNTS = (1000, 250, 64, 0)
MOST = 0.5  # points that 8 bits may lose without pictures


def measured(name: str, bits: int, count: int, images: Images, models: Path) -> dict[str, float]:
    """Accuracy of the engine on all test images, and its divergence from the float network."""
    model = network(name, models)
    example = torch.zeros(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are no pictures is the point
        result = ada.compress(
            model, images.calibration(count) if count else None, bits, example_inputs=example
        )
    engine = ada.compile(result.model, example, policy="native")
    return judge(engine, images.tested, model)


def page_section(data: Mapping[str, Any]) -> str:
    """The part of the page."""
    machine = data["machine"]
    lines = [f"Machine: {machine['cpu']}, kernels {machine['isa']}.", ""]
    body = []
    for name in NETWORKS:
        for bits in (8, 4):
            found = [data["rows"].get(f"{name}-{bits}-{count}") for count in COUNTS]
            if not any(found):
                continue
            reference = data["float"][name]
            aim = ""
            if bits == 8 and found[-1]:
                aim = verdict(reference - found[-1]["accuracy"], MOST)
            cells = [f"{r['accuracy']:.2f} ({r['kl']:.4f})" if r else "" for r in found]
            body.append([NAMES[name], str(bits), f"{reference:.2f}", *cells, aim])
    titles = [f"{count:,} pictures" if count else "none" for count in COUNTS]
    heading = ["network", "bits", "float", *titles, "aim without"]
    return "\n".join([*lines, *table(heading, body)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy_pictures", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    data = results_of(given.results, FORMAT, float={}, rows={})
    images = Images(given.data)
    for name in NETWORKS:
        if name not in data["float"]:
            data["float"][name] = judge(network(name, given.models), images.tested)["accuracy"]
        for bits in (8, 4):
            for count in COUNTS:
                key = f"{name}-{bits}-{count}"
                if key not in data["rows"]:
                    data["rows"][key] = measured(name, bits, count, images, given.models)
                    write_text_atomic(given.results, json.dumps(data, indent=1) + "\n")
                    write_part(given.page, MARKERS, page_section(data))
    write_part(given.page, MARKERS, page_section(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
