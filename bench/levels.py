"""Levels of quality in one file beside plans that were made separately, with the same widths.

    python -m bench.levels --data cifar10.zip --models weights/

DATA and MODELS are those of ``bench.accuracy``. For every row three levels are repaired together
and saved in one ``.ada`` file, and the plan of each level is compressed by itself, with the same
images; the engine classifies all test images at every level. ``--times`` then times calls at every
level, and a switch. Results go into a JSON file row by row, so that an interrupted command goes on,
and the part of ``docs/quality.md`` between this program's markers is rewritten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import everywhere
from bench.accuracy import Images, judge, network
from bench.markdown import markers, table, write_part
from bench.record import ROOT, results_of

RESULTS = ROOT / "build" / "bench" / "levels.json"
PAGE = ROOT / "docs" / "quality.md"
FORMAT = "adalayer-levels-1"
MARKERS = markers("bench/levels.py")
IMAGES = 1000
CALLS = 101


@dataclass(frozen=True)
class Row:
    """A network at three levels.

    Attributes:
        title: of the row in the table.
        network: a built-in model.
        bits: of every level; average ones where ``mixed``, else of all layers.
        mixed: whether layers have widths of their own.
    """

    title: str
    network: str
    bits: tuple[int, ...] = (8, 4, 3)
    mixed: bool = True


ROWS = {
    "resnet20-mixed": Row("ResNet-20, by layer", "resnet20"),
    "adalayernet-mixed": Row("AdaLayerNet, by layer", "adalayernet"),
    "resnet20-uniform": Row("ResNet-20, all layers alike", "resnet20", mixed=False),
    "adalayernet-uniform": Row("AdaLayerNet, all layers alike", "adalayernet", mixed=False),
}


def measure(
    row: Row,
    found: dict[str, Any],
    images: Images,
    models: Path,
    work: Path,
    effort: str,
    keep: Callable[[], None],
) -> None:
    """The levels and the separate plans of a row, classified one by one; what is found is kept."""
    model = network(row.network, models)
    calibration = images.calibration(IMAGES)
    common: dict[str, Any] = {"effort": effort, "work_dir": work, "progress": False}
    plans = _plans(row, model, calibration, work, common)
    x = torch.rand(1, 3, 32, 32)
    path = work / "levels.ada"
    if not path.is_file():
        levels = ada.compress_levels(model, calibration, plans, **common)
        first, *others = levels.models
        ada.compile(first, x, policy="native", weights="streamed", levels=others).save(path)
    if "float" not in found:
        accuracy = judge(model, images.tested)["accuracy"]
        found.update(float=accuracy, bytes=path.stat().st_size, effort=effort, levels=[])
        keep()
    engine = ada.load(path, weights="streamed")
    for number in range(len(found["levels"]), len(plans)):
        plan = plans[number]
        engine.set_quality(number)
        alone = ada.compress(
            model, calibration, None, plan=plan, effort=effort, work_dir=work, progress=False
        ).model
        other = ada.compile(alone, x, policy="native", weights="streamed")
        found["levels"].append(
            {
                "bits": plan.average_bits,
                "accuracy": judge(engine, images.tested)["accuracy"],
                "alone": judge(other, images.tested)["accuracy"],
                "alone_bytes": other.save(work / f"alone-{number}.ada"),
                "layers": {name: layer.bits for name, layer in plan.layers.items()},
            }
        )
        print(f"{row.title}, level {number}: {found['levels'][-1]}", file=sys.stderr, flush=True)
        keep()


def _plans(
    row: Row, model: nn.Module, calibration: list[Any], work: Path, common: Mapping[str, Any]
) -> list[ada.Plan]:
    paths = [work / f"plan-{number}.json" for number in range(len(row.bits))]
    if not all(path.is_file() for path in paths):
        plans = (
            ada.level_plans(model, calibration, row.bits, **common)
            if row.mixed
            else [everywhere(model, bits) for bits in row.bits]
        )
        for plan, path in zip(plans, paths, strict=True):
            plan.save(path)
    return [ada.Plan.load(path) for path in paths]


def timed(path: Path) -> dict[str, Any]:
    """Milliseconds of calls at every level, in turn, and of a switch."""
    engine = ada.load(path)
    engines = [engine.at_quality(level) for level in range(engine.levels)]
    found: dict[str, Any] = {}
    for batch in (1, 16):
        x = torch.rand(batch, 3, 32, 32)
        samples: list[list[float]] = [[] for _ in engines]
        for turn in range(CALLS + 3):
            for level, each in enumerate(engines):
                begin = time.perf_counter()
                each(x)
                if turn > 2:
                    samples[level].append(time.perf_counter() - begin)
        found[f"ms_batch{batch}"] = [1e3 * statistics.median(each) for each in samples]
    switches = []
    for turn in range(CALLS):
        begin = time.perf_counter()
        engine.set_quality(turn % engine.levels)
        switches.append(time.perf_counter() - begin)
    found["switch_us"] = 1e6 * statistics.median(switches)
    found["threads"] = ada.get_num_threads()
    found["derived_bytes"] = [each.weight_bytes for each in engines]
    return found


def page_section(data: Mapping[str, Any]) -> str:
    """The part of the page."""
    machine = data["machine"]
    lines = [f"Machine: {machine['cpu']}, kernels {machine['isa']}.", ""]
    rows, clock = [], []
    for name, found in data["rows"].items():
        if not found.get("levels"):
            continue
        apart = sum(level["alone_bytes"] for level in found["levels"])
        for number, level in enumerate(found["levels"]):
            rows.append(
                [
                    f"{ROWS[name].title} (float {found['float']:.2f} %)" if not number else "",
                    f"{level['bits']:.2f}",
                    f"{level['accuracy']:.2f}",
                    f"{level['alone']:.2f}",
                    f"{level['accuracy'] - level['alone']:+.2f}",
                    f"{found['bytes']:,} ({apart:,})" if not number else "",
                ]
            )
        if "times" not in found:
            continue
        times = found["times"]
        clock.append(
            [
                f"{ROWS[name].title}, {times['threads']} thread"
                + ("s" if times["threads"] > 1 else ""),
                " / ".join(f"{ms:.3f}" for ms in times["ms_batch1"]),
                " / ".join(f"{ms:.2f}" for ms in times["ms_batch16"]),
                f"{times['switch_us']:.0f}",
                " / ".join(f"{size / 1e6:.2f}" for size in times["derived_bytes"]),
            ]
        )
    lines += table(
        (
            "Network",
            "average bits",
            "one file, %",
            "made separately, %",
            "difference",
            "bytes (of three files)",
        ),
        rows,
    )
    if clock:
        lines += table(
            (
                "ms per call, best level first",
                "1 image",
                "16 images",
                "a switch, µs",
                "MB of weights in memory",
            ),
            clock,
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.levels", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--data", required=True, help="folder or zip of CIFAR-10")
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--effort", default="low", help="of searches and repairs")
    parser.add_argument("--times", action="store_true", help="only time what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    data = results_of(given.results, FORMAT, rows={})
    images = None

    def keep() -> None:
        write_text_atomic(given.results, json.dumps(data, indent=1) + "\n")
        write_part(given.page, MARKERS, page_section(data))

    for name in given.rows:
        work = given.results.parent / "levels" / name
        work.mkdir(parents=True, exist_ok=True)
        if given.times:
            if name in data["rows"]:
                data["rows"][name]["times"] = timed(work / "levels.ada")
        elif len(data["rows"].get(name, {}).get("levels", ())) < len(ROWS[name].bits):
            images = images or Images(given.data, progress=False)
            found = data["rows"].setdefault(name, {})
            measure(ROWS[name], found, images, given.models, work, given.effort, keep)
        keep()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
