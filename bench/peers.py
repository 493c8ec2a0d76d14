"""The runtimes that the native engine is measured against, each in its fastest usual setting.

Exported and quantized models are kept under ``build/bench-cache``, because quantizing one takes
much longer than measuring it. The folder's name holds the weights' hash and the versions involved.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.networks import Network

CALIBRATION_IMAGES = 8
OPSET = 13

# No statistics are sent from a benchmark.
os.environ.setdefault("NNCF_CI", "1")
os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")

# A peer takes the float images that it was built for and gives float logits.
Peer = Callable[[], Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers warn about their own parts; that would hide our own output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def _folder(network: Network) -> Path:
    tools = [(tool, version(tool)) for tool in ("openvino", "nncf", "onnxruntime", "onnx")]
    key = hashlib.sha256(repr([tools, OPSET, CALIBRATION_IMAGES]).encode()).hexdigest()
    folder = network.folder / key[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached(network: Network, filename: str, make: Callable[[Path], None]) -> Path:
    """The file, made on first use; another process never sees half of one."""
    path = _folder(network) / filename
    if not path.is_file():
        scratch = path.parent / f"making-{os.getpid()}"
        scratch.mkdir(exist_ok=True)
        try:
            with quiet():
                make(scratch / filename)
            for made in sorted(scratch.iterdir(), key=lambda p: p.name == filename):
                made.replace(path.parent / made.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def onnx_file(network: Network) -> Path:
    """The float network as ONNX with a free batch size."""

    def make(path: Path) -> None:
        torch.onnx.export(
            network.model,
            (network.images(1),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )

    return _cached(network, "float.onnx", make)


def _calibration(network: Network) -> list[Any]:
    return [network.images(1, seed=10 + i).numpy() for i in range(CALIBRATION_IMAGES)]


def onnxruntime_int8_file(network: Network) -> Path:
    """Static QDQ, weights per channel, u8 activations."""
    source = onnx_file(network)

    def make(path: Path) -> None:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.images = iter(_calibration(network))

            def get_next(self) -> dict[str, Any] | None:
                image = next(self.images, None)
                return None if image is None else {"images": image}

        prepared = path.with_name("prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        prepared.unlink()

    return _cached(network, "onnxruntime-int8.onnx", make)


def openvino_int8_file(network: Network) -> Path:
    """Quantized by NNCF with its defaults."""
    source = onnx_file(network)

    def make(path: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(source)
        quantized = nncf.quantize(
            model, nncf.Dataset(_calibration(network)), subset_size=CALIBRATION_IMAGES
        )
        openvino.save_model(quantized, path, compress_to_fp16=False)

    return _cached(network, "openvino-int8.xml", make)


def make_files(network: Network) -> None:
    """Makes what the peers of a network are built from.

    To be called before the process is restricted to some CPUs: the quantizer runs models with
    thread pools of its own, and those place the calling thread.
    """
    onnxruntime_int8_file(network)
    openvino_int8_file(network)


# ------------------------------------------------------------------------------- running peers


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def torch_fp32(network: Network, images: Tensor, threads: int) -> Peer:
    """Eager, channels_last."""
    model = _channels_last(network.model)
    x = images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def torch_bf16(network: Network, images: Tensor, threads: int) -> Peer:
    """Eager, channels_last, weights and activations in bfloat16."""
    model = _channels_last(copy.deepcopy(network.model).to(torch.bfloat16))
    x = images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x.to(torch.bfloat16)).float()

    return run


def onnxruntime_int8(network: Network, images: Tensor, threads: int) -> Peer:
    """ONNX Runtime, CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its workers would spin on for tens of milliseconds and slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", images.shape[0])
    session = onnxruntime.InferenceSession(
        str(onnxruntime_int8_file(network)), options, providers=["CPUExecutionProvider"]
    )
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)[0]


@lru_cache(maxsize=1)
def meet_all_cpus() -> None:
    """Makes OpenVINO's thread pool count the CPUs before any test restricts the process.

    The pool counts once. Started under a restriction to one CPU, it would answer every later
    request for two threads with one.
    """
    import openvino
    from openvino import opset13

    with quiet():
        x = opset13.parameter([1, 8, 8, 8], openvino.Type.f32)
        model = openvino.Model([opset13.relu(x)], [x], "relu")
        settings = {"INFERENCE_NUM_THREADS": os.cpu_count() or 1, "ENABLE_CPU_PINNING": False}
        openvino.Core().compile_model(model, "CPU", settings).create_infer_request().infer()


def _openvino(path: Path, images: Tensor, threads: int, **hints: str) -> Peer:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # Pinning gains nothing here, and would move threads that interleave.on_cpus placed.
        "ENABLE_CPU_PINNING": False,
        **hints,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    # The tensor shares the images' memory: no copy is charged to the peer.
    tensor = openvino.Tensor(images.numpy(), shared_memory=True)

    request.set_input_tensor(tensor)

    def run(keep: Any = (images, tensor)) -> Any:
        request.infer()
        return request.get_output_tensor().data

    return run


def openvino_int8(network: Network, images: Tensor, threads: int) -> Peer:
    """OpenVINO, int8 by NNCF, latency hint."""
    return _openvino(openvino_int8_file(network), images, threads)


def openvino_bf16(network: Network, images: Tensor, threads: int) -> Peer:
    """OpenVINO, bfloat16, latency hint."""
    return _openvino(onnx_file(network), images, threads, INFERENCE_PRECISION_HINT="bf16")


def openvino_f32(network: Network, images: Tensor, threads: int) -> Peer:
    """OpenVINO, float32, latency hint: where its int8 does not run."""
    return _openvino(onnx_file(network), images, threads, INFERENCE_PRECISION_HINT="f32")


PEERS: dict[str, Callable[[Network, Tensor, int], Peer]] = {
    "openvino int8": openvino_int8,
    "openvino bf16": openvino_bf16,
    "onnxruntime int8": onnxruntime_int8,
    "torch bf16": torch_bf16,
    "torch fp32": torch_fp32,
}
# The ones that targets are stated against: the faster of the two.
RIVALS = ("openvino int8", "openvino bf16")

# Least similarity of the logits to torch float32. Random weights and few calibration images are
# hard on int8, but a broken peer has no similarity at all.
SIMILARITY = {
    "openvino int8": 0.9,
    "openvino bf16": 0.98,
    "onnxruntime int8": 0.9,
    "torch bf16": 0.98,
    "torch fp32": 0.9999,
}


def similarity(got: Tensor, want: Tensor) -> float:
    """Cosine of the logits, or maps of them, each image's mean taken off; the worst one counts."""
    flat = [t.double().flatten(1) for t in (got, want)]
    a, b = (t - t.mean(dim=1, keepdim=True) for t in flat)
    return float(torch.nn.functional.cosine_similarity(a, b, dim=1).min())


def as_tensor(output: Any) -> Tensor:
    """A candidate's output as a tensor of its own."""
    return torch.as_tensor(output).detach().clone().float()
