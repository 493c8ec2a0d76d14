"""Where other runtimes round otherwise than our engine, one operator at a time.

    python -m bench.onnx_rounding --data DATA

DATA holds imagenet500.zip. EfficientNet-Lite0 is compressed with the same bits everywhere and
written by ``to_onnx``. Every operator of the file is then given *our* levels, so that nothing is
carried on, and what ONNX Runtime (rewriting off and on) and OpenVINO make of them is compared with
ours, and with float64: by how much more than half a level theirs is away from the exact result,
with their biases where they have rounded them to int32.

Beside it stands what any such difference becomes at the end: the engine against itself with one
pixel of each picture one level brighter or darker. Every half of the pictures is run with the other
one calibrating. Results go into a JSON file row by row; the table between this program's markers in
docs/onnx.md is rewritten.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from bench.accuracy_imagenet import pictures
from bench.markdown import markers, table, write_part
from bench.onnx_agreement import BATCH, CALIBRATION, by_openvino, native_of
from bench.record import ROOT, describe_machine
from bench.zoo.networks import efficientnet_lite

PAGE = ROOT / "docs" / "onnx.md"
RESULTS = ROOT / "build" / "bench" / "onnx-rounding.json"
MARKERS = markers("bench/onnx_rounding.py")
WIDTHS = (8, 4)
LOOKED_AT = 4  # pictures, for single operators
RUNTIMES = {
    "onnxruntime-off": "ONNX Runtime, no rewriting",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


class File:
    """A file of ``to_onnx``: its constants, and the operators between two grids."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.onnx, self.model = onnx, onnx.load(path)
        graph = self.model.graph
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.grids = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        self.reals = {n.input[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}

    def with_outputs(self) -> bytes:
        """With all values on grids among the results, as real numbers."""
        model = self._copy()
        for node in self.grids:
            name = self.reals[node.output[0]].output[0]
            model.graph.output.append(self._info(name, self.onnx.TensorProto.FLOAT, None))
        return bytes(model.SerializeToString())

    def fed(self, levels: dict[str, np.ndarray]) -> bytes:
        """Every operator reads levels that are given; all levels are results."""
        model, kind = self._copy(), self.onnx.TensorProto.UINT8
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in levels:
                node.input[0] += ".fed"
        for name, array in levels.items():
            model.graph.output.append(self._info(name, kind, None))
            model.graph.input.append(self._info(f"{name}.fed", kind, array.shape))
        return bytes(model.SerializeToString())

    def _copy(self) -> Any:
        model = self.onnx.ModelProto()
        model.CopyFrom(self.model)
        return model

    def _info(self, name: str, kind: int, shape: Any) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)

    def grid(self, node: Any) -> tuple[float, int]:
        """Scale and zero point of a ``QuantizeLinear`` or ``DequantizeLinear``."""
        zero = self.constants[node.input[2]] if len(node.input) > 2 else 0
        return float(self.constants[node.input[1]]), int(zero)

    def behind(self, node: Any) -> tuple[str, Any, Any, float, float]:
        """Of a ``QuantizeLinear``: kind, convolution, what is added, and the bounds in front."""
        low, high = -np.inf, np.inf
        maker = self.makers.get(node.input[0])
        if maker is not None and maker.op_type == "Clip":
            low, high = (float(self.constants[name]) for name in maker.input[1:])
            maker = self.makers[maker.input[0]]
        added = None
        if maker is not None and maker.op_type == "Add":
            added = self.makers[maker.input[1]]
            maker = self.makers[maker.input[0]]
        if maker is None:
            return "image", None, None, low, high
        if maker.op_type != "Conv":
            return "average pool", None, None, low, high
        groups = next(a.i for a in maker.attribute if a.name == "group")
        name = "convolution" if groups == 1 else "depthwise convolution"
        return name if added is None else f"{name}, residual", maker, added, low, high

    def exact(
        self, node: Any, levels: dict[str, np.ndarray], biases: np.ndarray | None
    ) -> np.ndarray | None:
        """What lies in front of a ``QuantizeLinear``, in levels, float64; None if no convolution.

        Args:
            biases: int32, in steps of the sums, where a runtime has such.
        """
        _, conv, added, low, high = self.behind(node)
        if conv is None:
            return None
        source = self.makers[conv.input[0]]
        step, zero = self.grid(source)
        weight = self.makers[conv.input[1]]
        integers = torch.from_numpy(self.constants[weight.input[0]].astype(np.float64))
        scales = self.constants[weight.input[1]].astype(np.float64)[:, None, None] * step
        bias = self.constants[conv.input[2]].astype(np.float64)[:, None, None]
        said: Any = {a.name: list(a.ints) or a.i for a in conv.attribute}
        top, left, bottom, right = said["pads"]
        x = torch.from_numpy(levels[source.input[0]].astype(np.float64) - zero)
        x = F.pad(x, (left, right, top, bottom))
        sums = F.conv2d(x, integers, None, said["strides"], 0, said["dilations"], said["group"])
        y = sums.numpy()
        y = y * scales + bias if biases is None else (y + biases[:, None, None]) * scales
        if added is not None:
            other, offset = self.grid(added)
            y = y + (levels[added.input[0]].astype(np.float64) - offset) * other
        scale, middle = self.grid(node)
        found: np.ndarray = np.clip(np.clip(y, low, high) / scale + middle, 0, 255)
        return found


def _session(source: bytes | str, rewriting: bool, saved: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not rewriting:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(source, options)


def _rounded_biases(optimized: Path) -> dict[str, np.ndarray]:
    """The biases that ONNX Runtime has made int32, by convolution."""
    import onnx

    end = "/Conv_bias_int32"
    tensors = onnx.load(optimized).graph.initializer
    return {
        t.name.removesuffix(end): onnx.numpy_helper.to_array(t).astype(np.float64)
        for t in tensors
        if t.name.endswith(end)
    }


def _fed_runs(
    file: File, levels: dict[str, np.ndarray], x: np.ndarray, folder: Path
) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """By runtime the levels that it makes of ours, and the biases that it has rounded."""
    import openvino

    data = file.fed(levels)
    names = [*levels]
    given = {file.model.graph.input[0].name: x, **{f"{n}.fed": v for n, v in levels.items()}}
    for key, rewriting in (("onnxruntime-off", False), ("onnxruntime", True)):
        saved = folder / f"{key}.onnx"
        session = _session(data, rewriting, saved)
        results = session.run(None, given)
        yield key, dict(zip(names, results[1:], strict=True)), _rounded_biases(saved)
    (folder / "fed.onnx").write_bytes(data)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(folder / "fed.onnx"), "CPU", options)
    results = compiled(given)
    yield "openvino", {n: np.asarray(results[n]) for n in names}, {}


@torch.inference_mode()
def _ours(file: File, x: Tensor) -> dict[str, np.ndarray]:
    """Levels of the network that ``from_onnx`` reads."""
    _, *values = ada.from_onnx(file.with_outputs())(x)
    found = {}
    for node, value in zip(file.grids, values, strict=True):
        scale, zero = file.grid(node)
        found[node.output[0]] = np.rint(value.numpy() / scale + zero).astype(np.uint8)
    return found


def operators(path: Path, x: Tensor, folder: Path) -> dict[str, dict[str, Any]]:
    """By runtime and kind of operator: levels, those that differ, and how far from half-way."""
    file = File(path)
    levels = _ours(file, x)
    exact = {n.output[0]: file.exact(n, levels, None) for n in file.grids}
    found: dict[str, dict[str, Any]] = {}
    for runtime, got, rounded in _fed_runs(file, levels, x.numpy(), folder):
        kinds = found.setdefault(runtime, {})
        for node in file.grids:
            name = node.output[0]
            kind, conv, *_ = file.behind(node)
            biases = None if conv is None else rounded.get(conv.output[0])
            if biases is not None:
                kind += ", biases rounded"
            entry = kinds.setdefault(
                kind, {"operators": 0, "levels": 0, "other": 0, "largest": 0, "beyond": 0.0}
            )
            apart = np.abs(got[name].astype(int) - levels[name].astype(int))
            entry["operators"] += 1
            entry["levels"] += apart.size
            entry["other"] += int((apart > 0).sum())
            entry["largest"] = max(entry["largest"], int(apart.max()))
            wanted = exact[name] if biases is None else file.exact(node, levels, biases)
            if wanted is not None:  # of a rounded value at most a half, and what float32 adds
                beyond = float(np.abs(got[name] - wanted).max()) - 0.5
                entry["beyond"] = max(entry["beyond"], beyond)
    return found


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    difference = (one - other).astype(np.float64)
    return float(np.sqrt((difference**2).mean() / (other.astype(np.float64) ** 2).mean()))


@torch.inference_mode()
def measure(bits: int, data: Path) -> dict[str, Any]:
    """Single operators, and decisions of whole networks on both halves of the pictures."""
    halves = [[x for x, _ in pictures(data / "imagenet500.zip", half)] for half in ("a", "b")]
    sums: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, Any] = {"pictures": BATCH * sum(map(len, halves))}
    for calibration, images in (halves, halves[::-1]):
        model = efficientnet_lite.ENTRIES[0].make().eval()
        native = native_of(bits, model, calibration[: CALIBRATION // BATCH])
        engine = ada.compile(native, images[0], policy="native", weights="resident")
        wanted = np.concatenate([engine(x).numpy() for x in images])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            ada.to_onnx(native, path)
            step = File(path).grid(File(path).grids[0])[0]
            again = ada.from_onnx(path)
            if "operators" not in found:
                found["operators"] = operators(path, images[0][:LOOKED_AT], Path(folder))
            runs: dict[str, Callable[[Tensor], Any]] = {
                "onnxruntime-off": _runner(_session(str(path), False)),
                "onnxruntime": _runner(_session(str(path), True)),
                "openvino": by_openvino(path),
                "from_onnx": ada.compile(again, images[0], policy="native", weights="resident"),
                "one level": partial(_one_level, engine, step),
            }
            for name, run in runs.items():
                got = np.concatenate([np.asarray(run(x)) for x in images])
                same = 100 * float((got.argmax(1) == wanted.argmax(1)).mean())
                sums.setdefault(name, []).append((same, _apart(got, wanted)))
    found["networks"] = {
        name: {"agreement": float(np.mean([s for s, _ in v])), "apart": max(a for _, a in v)}
        for name, v in sums.items()
    }
    return found


def _runner(session: Any) -> Callable[[Tensor], Any]:
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


def _one_level(engine: Any, step: float, x: Tensor) -> Any:
    """Of pictures whose middle pixel is one level greener, or less green where it is bright."""
    y, middle = x.clone(), x.shape[-1] // 2
    pixel = y[:, 1, middle, middle]
    pixel += torch.where(pixel > 0, -step, step)
    return engine(y)


def part(results: dict[str, Any]) -> str:
    """The page's generated part."""
    single, whole = [], []
    names = {**RUNTIMES, "from_onnx": "`from_onnx`, compiled",
             "one level": "our engine, one pixel by one level"}  # fmt: skip
    for bits in WIDTHS:
        entry = results["rows"].get(str(bits))
        if entry is None:
            continue
        for runtime, kinds in entry["operators"].items():
            for kind, said in sorted(kinds.items()):
                share = said["other"] / said["levels"]
                single.append([f"{bits}", names[runtime], kind, f"{said['operators']}",
                               f"{said['levels']:,}", f"{share:.1e}" if share else "0",
                               f"{said['largest']}",
                               f"{max(said['beyond'], 0):.0e}"])  # fmt: skip
        for name, said in entry["networks"].items():
            whole.append([f"{bits}", names[name], f"{entry['pictures']}",
                          f"{said['agreement']:.1f} %",
                          f"{100 * said['apart']:.2g} %"])  # fmt: skip
    head = ["bits", "runtime", "operator", "how many", "levels", "other than ours", "by at most",
            "beyond half a level of the exact result"]  # fmt: skip
    return "\n".join(
        [f"Machine: {results['machine']['cpu']}.", "", *table(head, single), "",
         *table(["bits", "network", "pictures", "same top-1 as our engine", "logits apart"],
                whole)]
    )  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    results["machine"] = describe_machine()
    for bits in WIDTHS:
        if str(bits) in results["rows"]:
            continue
        results["rows"][str(bits)] = found = measure(bits, options.data)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.results, json.dumps(results, indent=1) + "\n")
        print(bits, found, file=sys.stderr, flush=True)
    write_part(PAGE, MARKERS, part(results))


if __name__ == "__main__":
    main()
