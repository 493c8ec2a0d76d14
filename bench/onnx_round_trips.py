"""Networks of other packages from torch to ONNX, back, to native layers and to ONNX again.

    python -m bench.onnx_round_trips --data DATA

DATA holds imagenet500.zip. EfficientNet-Lite0 has its package's weights. Those of all others are
random: batch norms and the last layer's bias are set by pictures of one half (every class is
equally far from being chosen), the rest is drawn.
Each network is exported by ``torch.onnx.export``, read by ``from_onnx``, converted with 8 bits
everywhere, written by ``to_onnx``, and run on pictures of the other half by ONNX Runtime, OpenVINO
and ``from_onnx``. Results go into a JSON file row by row; the table between this program's markers
in docs/onnx.md is rewritten.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from adalayer_native.nn.layer import NativeLayer
from bench.accuracy_imagenet import pictures
from bench.markdown import markers, table, write_part
from bench.onnx_agreement import by_onnxruntime, by_openvino, native_of
from bench.record import ROOT, describe_machine
from bench.zoo.entry import draw_late_weights, settle
from bench.zoo.networks import efficientnet_lite
from bench.zoo.networks.own.images import UNet
from bench.zoo.packages import package, torchvision_models

PAGE = ROOT / "docs" / "onnx.md"
RESULTS = ROOT / "build" / "bench" / "onnx-round-trips.json"
MARKERS = markers("bench/onnx_round_trips.py")
SIDE = 128  # pixels of the middle of each picture
BATCH, CALIBRATION = 10, 60


@dataclass(frozen=True)
class Network:
    """What goes round.

    Attributes:
        name: for people.
        make: builds it.
        classes: first and last channel of its classes, of which the largest is looked at.
        trained: its package brings weights.
    """

    name: str
    make: Callable[[], nn.Module]
    classes: tuple[int, int | None] = (0, None)
    trained: bool = False


def _torchvision(name: str) -> nn.Module:
    model: nn.Module = getattr(torchvision_models(), name)(weights=None)
    return model


def _yolov8n() -> nn.Module:
    """As ultralytics exports it: one tensor of boxes and scores, decoded."""
    model: nn.Module = package("ultralytics", "nn.tasks").DetectionModel(
        "yolov8n.yaml", verbose=False
    )
    for module in model.modules():
        if hasattr(module, "export"):
            module.export, module.format = True, "onnx"  # type: ignore[assignment]
    return model


NETWORKS = (
    Network("EfficientNet-Lite0 (trained)", efficientnet_lite.ENTRIES[0].make, trained=True),
    Network("ResNet-18", partial(_torchvision, "resnet18")),
    Network("MobileNetV2", partial(_torchvision, "mobilenet_v2")),
    Network("ConvNeXt-tiny", partial(_torchvision, "convnext_tiny")),
    Network("YOLOv8n", _yolov8n, (4, None)),
    Network("U-Net", UNet),
)


@torch.no_grad()
def built(network: Network, x: Tensor) -> nn.Module:
    """A network whose random weights make something of pictures."""
    torch.manual_seed(0)
    model = network.make().eval().requires_grad_(False)
    if network.trained:
        return model
    draw_late_weights(model, 0)
    settle(model, x)
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    y = model(x)
    if isinstance(y, Tensor) and last.bias is not None and y.shape[1] == len(last.bias):
        last.bias -= y.mean([axis for axis in range(y.dim()) if axis != 1])
    return model


def _exported(model: nn.Module, x: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        torch.onnx.export(model, (x,), str(path), opset_version=17, dynamo=False)


def _all(run: Callable[[Tensor], Any], images: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([np.asarray(run(x)) for x in images])


def _share(one: np.ndarray, other: np.ndarray, network: Network) -> float:
    """Positions where the same class is the largest, in percent."""
    first, end = network.classes
    a, b = (y[:, first:end].argmax(1) for y in (one, other))
    return 100 * float((a == b).mean())


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Root of mean squares of the difference, as a share of the other's."""
    difference = (one - other).astype(np.float64)
    return float(np.sqrt((difference**2).mean() / (other.astype(np.float64) ** 2).mean()))


def _compared(one: np.ndarray, other: np.ndarray, network: Network) -> dict[str, float]:
    return {"agreement": _share(one, other, network), "apart": _apart(one, other)}


def with_rounded_biases(native: nn.Module, file: Path) -> nn.Module:
    """A copy whose biases are whole steps of the sums where they are in ONNX Runtime.

    That is in its integer kernels. What it leaves in float, as a last layer or one that a residual
    is added to, has its bias as it is.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3  # that such a file is for this machine alone
    onnxruntime.InferenceSession(str(file), options)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    integer = {n.name.partition("/")[0] for n in nodes if n.op_type in ("QLinearConv", "QGemm")}
    other = copy.deepcopy(native)
    for name, layer in other.named_modules():
        if isinstance(layer, NativeLayer) and name in integer:
            step = layer.input_scale * layer.weight_scale
            layer.bias.copy_(torch.round(layer.bias / step) * step)
    return other


@torch.inference_mode()
def measure(network: Network, data: Path, count: int) -> dict[str, Any]:
    """Differences on the way, and shares of positions where the same class is the largest."""
    side = 224 if network.trained else SIDE
    cut = slice((224 - side) // 2, (224 + side) // 2)
    halves = [
        [x[..., cut, cut].contiguous() for x, _ in pictures(data / "imagenet500.zip", half)]
        for half in ("a", "b")
    ]
    calibration, images = halves[0][: CALIBRATION // BATCH], halves[1][: count // BATCH]
    model = built(network, torch.cat(calibration)).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        with torch.inference_mode(False), torch.no_grad():
            _exported(model, calibration[0][:1].clone(), path)
            read = ada.from_onnx(path)
            calibration = [x.clone() for x in calibration]
            native = native_of(8, read, calibration)
        floats = _all(model, images)
        engine = ada.compile(native, images[0], policy="native", weights="resident")
        wanted = _all(engine, images)
        file = Path(folder) / "native.onnx"
        size = ada.to_onnx(native, file)
        found: dict[str, Any] = {
            "images": len(wanted),
            "positions": int(np.prod(wanted.shape[2:])),
            "classes": len(np.unique(wanted[:, slice(*network.classes)].argmax(1))),
            "bytes": size,
            "read": _apart(_all(read, images), floats),
            "quantized": _compared(wanted, floats, network),
        }  # fmt: skip
        readers: dict[str, Callable[[Path], Callable[[Tensor], Any]]] = {
            "onnxruntime": by_onnxruntime,
            "openvino": by_openvino,
            "from_onnx": ada.from_onnx,
        }
        for name, reader in readers.items():
            got = _all(reader(file), images)
            found[name] = _compared(got, wanted, network)
            if name == "onnxruntime":
                theirs = got
        rounded = ada.compile(
            with_rounded_biases(native, file), images[0], policy="native", weights="resident"
        )
        found["rounded"] = _compared(theirs, _all(rounded, images), network)
    return found


def part(results: dict[str, Any]) -> str:
    """The page's generated part."""
    lines = []
    for network in NETWORKS:
        entry = results["rows"].get(network.name)
        if entry is None:
            continue
        places = f"{entry['images']}"
        if entry["positions"] > 1:
            places += f" × {entry['positions']:,}"
        cells = [network.name, places, f"{entry['classes']}", f"{entry['read']:.1g}"]
        for name in ("quantized", "onnxruntime", "rounded", "openvino", "from_onnx"):
            said = entry[name]
            cells.append(f"{said['agreement']:.1f} % ({100 * said['apart']:.2g} %)")
        lines.append(cells)
    head = ["network", "decisions", "classes among them", "`from_onnx` of the float file",
            "engine, to float", "ONNX Runtime", "the same, to the engine with its biases",
            "OpenVINO", "`from_onnx`"]  # fmt: skip
    return "\n".join([f"Machine: {results['machine']['cpu']}.", "", *table(head, lines)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rows", nargs="*", help="names of networks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    results["machine"] = describe_machine()
    for network in NETWORKS:
        if network.name in results["rows"] or (options.rows and network.name not in options.rows):
            continue
        found = measure(network, options.data, options.images)
        results["rows"][network.name] = found
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.results, json.dumps(results, indent=1) + "\n")
        print(network.name, found, file=sys.stderr, flush=True)
    write_part(PAGE, MARKERS, part(results))


if __name__ == "__main__":
    main()
