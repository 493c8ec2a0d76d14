"""Exported networks beside our engine, on real images: top-1 of ONNX Runtime and OpenVINO.

    python -m bench.onnx_agreement --data DATA --models MODELS

DATA holds cifar10.zip and imagenet500.zip, MODELS the weights of the two CIFAR-10 baselines. Every
network is compressed with the same bits everywhere, written by ``to_onnx``, read back by
``from_onnx``, and run by all of them. Results go into a JSON file row by row, so that an
interrupted command goes on; the table between this program's markers in docs/onnx.md is rewritten.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.data import IMAGENET_MEAN, IMAGENET_STD, open_dataset
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench.accuracy_imagenet import pictures
from bench.markdown import markers, table, write_part
from bench.record import ROOT, describe_machine
from bench.trained import NAMES, network
from bench.zoo.networks import efficientnet_lite

PAGE = ROOT / "docs" / "onnx.md"
RESULTS = ROOT / "build" / "bench" / "onnx-agreement.json"
MARKERS = markers("bench/onnx_agreement.py")
BATCH = 10
CALIBRATION = 100


@dataclass(frozen=True)
class Row:
    """One network at one width."""

    network: str
    bits: int
    opset: int = 21

    @property
    def name(self) -> str:
        """How the results call it."""
        return f"{self.network}-{self.bits}-{self.opset}"


ROWS = (
    Row("resnet20", 8), Row("resnet20", 4), Row("resnet20", 2, 25),
    Row("adalayernet", 8), Row("adalayernet", 4),
    Row("efficientnet_lite0", 8), Row("efficientnet_lite0", 4),
)  # fmt: skip


def _images(row: Row, data: Path, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to calibrate with, and others to compare on."""
    if row.network == "efficientnet_lite0":
        first = [x for x, _ in pictures(data / "imagenet500.zip", "a")]
        second = [x for x, _ in pictures(data / "imagenet500.zip", "b")]
        return first[: CALIBRATION // BATCH], second
    parts = []
    for split, wanted in (("train", CALIBRATION), ("test", count)):
        images = open_dataset(str(data / "cifar10.zip"), split, 32, progress=False)
        images.mean, images.std = IMAGENET_MEAN, IMAGENET_STD
        step = max(1, len(images) // wanted)
        x = torch.stack([images[i][0] for i in range(0, step * wanted, step)])
        parts.append(list(x.split(BATCH)))
    return parts[0], parts[1]


def native_of(bits: int, model: nn.Module, calibration: Sequence[Tensor]) -> Any:
    """Every layer of so many bits, rounded; ranges of some batches."""
    captured = ada.capture(model, calibration[0])
    layers = supported_layers(captured)
    plan = Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits)
            for name, layer in layers.items()
        }
    )
    prepared = ada.prepare(captured, plan)
    ada.calibrate(prepared, list(calibration), progress=False)
    return ada.convert(prepared)


def by_onnxruntime(path: Path) -> Callable[[Tensor], np.ndarray]:
    """A file in ONNX Runtime, as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x.numpy()})[0])


def by_openvino(path: Path) -> Callable[[Tensor], np.ndarray]:
    """A file in OpenVINO; what is in float there stays in float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda x: np.asarray(compiled([x.numpy()])[0])


@torch.inference_mode()
def measure(row: Row, data: Path, models: Path, count: int) -> dict[str, Any]:
    """Agreement of top-1 with the engine in percent, and the largest difference of a logit.

    Differences are shares of the engine's largest logit.
    """
    model = (
        efficientnet_lite.ENTRIES[0].make().eval()
        if row.network == "efficientnet_lite0"
        else network(row.network, models)
    )
    calibration, images = _images(row, data, count)
    native = native_of(row.bits, model, calibration)
    engine = ada.compile(native, images[0], policy="native", weights="resident")
    wanted = np.concatenate([engine(x).numpy() for x in images])
    found: dict[str, Any] = {"images": len(wanted)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        found["bytes"] = ada.to_onnx(native, path, opset=row.opset)
        readers: dict[str, Callable[[Path], Callable[[Tensor], Any]]] = {
            "onnxruntime": by_onnxruntime,
            "openvino": by_openvino,
            "from_onnx": ada.from_onnx,
        }
        for name, reader in readers.items():
            try:
                run = reader(path)
            except Exception as error:  # a runtime's own, for what it does not read
                found[name] = {"error": " ".join(str(error).split())[-200:]}
                continue
            got = np.concatenate([np.asarray(run(x)) for x in images])
            found[name] = {
                "agreement": 100 * float((got.argmax(1) == wanted.argmax(1)).mean()),
                "difference": float(np.abs(got - wanted).max() / np.abs(wanted).max()),
            }
    return found


def part(results: dict[str, Any]) -> str:
    """The page's generated part."""
    lines = []
    for row in ROWS:
        entry = results["rows"].get(row.name)
        if entry is None:
            continue
        cells = [NAMES.get(row.network, "EfficientNet-Lite0"), f"{row.bits}", f"{row.opset}",
                 f"{entry['images']}", f"{entry['bytes']:,}"]  # fmt: skip
        for reader in ("onnxruntime", "openvino", "from_onnx"):
            said = entry[reader]
            if "error" in said:
                cells.append("not read")
            else:
                cells.append(f"{said['agreement']:.1f} % ({said['difference']:.2g})")
        lines.append(cells)
    head = [
        "network",
        "bits",
        "opset",
        "images",
        "bytes",
        "ONNX Runtime",
        "OpenVINO",
        "`from_onnx`",
    ]
    return "\n".join([f"Machine: {results['machine']['cpu']}.", "", *table(head, lines)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="of CIFAR-10's test images")
    parser.add_argument("--rows", nargs="*", help="names, as resnet20-8-21")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    results["machine"] = describe_machine()
    for row in ROWS:
        if row.name in results["rows"] or (options.rows and row.name not in options.rows):
            continue
        found = measure(row, options.data, options.models, options.images)
        results["rows"][row.name] = found
        write_text_atomic(options.results, json.dumps(results, indent=1) + "\n")
        print(row.name, found, file=sys.stderr, flush=True)
    write_part(PAGE, MARKERS, part(results))


if __name__ == "__main__":
    main()
