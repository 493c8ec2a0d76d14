"""Speed on an NVIDIA GPU beside torch: ``python -m bench.gpu`` (``make gpu-bench``).

Every result is compared with the CPU engine, or with float64, before it is timed. Medians of CUDA
events; what is shorter than a launch is timed as replays of a CUDA graph. Sections run in the order
of their importance and print row by row, so that a run that is cut off has said something;
``--only`` picks sections, ``--minutes`` limits the whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import _C, cuda, ops
from adalayer_native.cuda import CudaEngine
from adalayer_native.operations import geometry, parameters
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.pruning import pattern_mask
from bench.gpu_peers import torchao_linears
from bench.gpu_report import RESULTS

# More than the second-level cache of any of these devices.
_FLUSH_BYTES = 256 << 20

# channels in, out, kernel, stride, side, groups
RESNET50 = [
    (3, 64, 7, 2, 224, 1),
    (64, 64, 1, 1, 56, 1),
    (64, 64, 3, 1, 56, 1),
    (64, 256, 1, 1, 56, 1),
    (128, 128, 3, 1, 28, 1),
    (512, 128, 1, 1, 28, 1),
    (256, 256, 3, 1, 14, 1),
    (1024, 256, 1, 1, 14, 1),
    (256, 1024, 1, 1, 14, 1),
    (512, 512, 3, 1, 7, 1),
    (512, 2048, 1, 1, 7, 1),
]
MOBILENET = [
    (32, 32, 3, 1, 112, 32),
    (144, 144, 3, 1, 56, 144),
    (24, 144, 1, 1, 56, 1),
    (192, 192, 3, 2, 28, 192),
    (384, 64, 1, 1, 14, 1),
    (960, 960, 3, 1, 7, 960),
    (960, 320, 1, 1, 7, 1),
]
# Bound by arithmetic at large batches, where leaving out products can pay.
PRUNED = [
    (256, 256, 3, 1, 14, 1),
    (512, 512, 3, 1, 7, 1),
    (512, 512, 3, 1, 14, 1),
    (1024, 1024, 1, 1, 14, 1),
]


class Report:
    """Rows of all sections, written after each of them."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.end = time.monotonic() + 60 * minutes
        major, minor = torch.cuda.get_device_capability()
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "torch": torch.__version__,
        }

    def table(self, section: str, rows: Iterator[dict[str, Any]]) -> None:
        """Prints rows as they come, and keeps them."""
        print(f"\n== {section}", flush=True)
        kept: list[dict[str, Any]] = self.found.setdefault(section, [])
        header: list[str] = []
        for row in rows:
            if list(row) != header:
                header = list(row)
                print("  ".join(f"{name:>16}" for name in header), flush=True)
            cells = (f"{v:16.4g}" if isinstance(v, float) else f"{v!s:>16}" for v in row.values())
            print("  ".join(cells), flush=True)
            kept.append(row)
            self.write()
            if time.monotonic() > self.end:
                print("(out of time)", flush=True)
                break

    def write(self) -> None:
        """Everything so far, as JSON."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


# ------------------------------------------------------------------------------------------ timing


def median_us(run: Callable[[], Any], *, seconds: float = 0.4, least: int = 15) -> float:
    """Median microseconds of one call by CUDA events."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    samples: list[float] = []
    stop = time.monotonic() + seconds
    while len(samples) < least or (time.monotonic() < stop and len(samples) < 2000):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(1e3 * begin.elapsed_time(end))
    return statistics.median(samples)


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """Replays what one call enqueues."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cold_us(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one call, where the calls together read more than the cache holds."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return median_us(graph_of(all_of_them)) / len(calls)


# --------------------------------------------------------------------------------------- programs


def layer_program(
    layer: tuple[int, int, int, int, int, int],
    bits: int,
    seed: int = 0,
    pruned: tuple[float, str] | None = None,
) -> tuple[_C.Program, int]:
    """Quantize, convolve, dequantize; and the multiply-accumulates of one image, zeros included.

    ``pruned`` is (sparsity, pattern).
    """
    c, o, k, stride, side, groups = layer
    random = np.random.default_rng(seed)
    pad = k // 2
    out = (side + 2 * pad - k) // stride + 1
    p = _C.Program()
    x = p.add_value("x", "f32", c, side, side)
    q = p.add_value("q", "u8", c, side, side, 0.02, 128)
    y = p.add_value("y", "u8", o, out, out, 0.05, 100)
    z = p.add_value("z", "f32", o, out, out)
    half = 2 ** (bits - 1)
    w = random.integers(-half, half, (o, c // groups, k, k)).astype(np.int8)
    if pruned is not None:
        mask = pattern_mask(torch.from_numpy(random.random(w.shape)), *pruned)
        w = np.ascontiguousarray(w * mask.numpy().astype(np.int8))
    packed = np.frombuffer(_C.pack(w.ctypes.data, w.size, bits, *w.shape), np.uint8)
    unit = np.full(o, 0.05 * 0.4 / (half * np.sqrt(w[0].size)), np.float32)
    bias = random.normal(size=o).astype(np.float32)
    lists = parameters(
        "conv",
        **geometry((k, k), (stride, stride), (pad,) * 4, groups=groups),
        zero_point=100,
        inv=float(np.float32(1) / np.float32(0.05)),
        weights=p.add_constant_weights(packed.ctypes.data, packed.size),
        scale=p.add_constant_f32(unit.ctypes.data, o),
        bias=p.add_constant_f32(bias.ctypes.data, o),
    )
    p.add_node("quantize", "quantize", [x], q)
    p.add_node("conv", "conv", [q], y, *lists)
    p.add_node("dequantize", "dequantize", [y], z)
    p.set_inputs([x])
    p.set_outputs([z])
    return p, out * out * w.size


def compressed(name: str, bits: int) -> tuple[nn.Module, Any, Tensor]:
    """A torchvision network, its engine with ``bits`` in every layer, and images."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    images = torch.randn(2, 3, 224, 224)
    layers = {
        n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), bits)
        for n, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}), images)
    ada.calibrate(prepared, [images], observer="minmax", progress=False)
    engine = ada.compile(ada.convert(prepared), images[:1], policy="native", strict=True)
    return model, engine, images


# --------------------------------------------------------------------------------------- sections


def peaks() -> Iterator[dict[str, Any]]:
    """What the device gives: copies, and torch's own int8 and half products."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    us = median_us(lambda: b.copy_(a))
    yield {"what": "copy", "unit": "GB/s", "value": 2e-3 * a.numel() / us}
    n = 8192
    x = torch.randint(-100, 100, (n, n), dtype=torch.int8, device="cuda")
    us = median_us(lambda: torch._int_mm(x, x.t()))
    yield {"what": "_int_mm 8192", "unit": "TOPS", "value": 2e-6 * n**3 / us}
    h = torch.randn(n, n, dtype=torch.half, device="cuda")
    us = median_us(lambda: h @ h)
    yield {"what": "half 8192", "unit": "TFLOPS", "value": 2e-6 * n**3 / us}


def layers(batches: list[int], widths: list[int]) -> Iterator[dict[str, Any]]:
    """Convolutions by themselves, weights and activations as warm as they come."""
    for layer in [*RESNET50, *MOBILENET]:
        c, o, k, stride, side, groups = layer
        for batch in batches:
            conv = nn.Conv2d(c, o, k, stride, k // 2, groups=groups, bias=False)
            conv.half().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = torch.randn(batch, c, side, side, dtype=torch.half, device="cuda")
            x = x.to(memory_format=torch.channels_last)
            with torch.no_grad():
                half = median_us(graph_of(partial(conv, x)), seconds=0.1)
            out = (side + 2 * (k // 2) - k) // stride + 1
            row: dict[str, Any] = {
                "layer": layer_name(layer),
                "channels": c,
                "out channels": o,
                "batch": batch,
                "half us": half,
            }
            moved = batch * (c * side**2 + o * out**2)  # levels in and out
            for bits in widths:
                program, macs = layer_program(layer, bits)
                engine = CudaEngine(program, torch.cuda.current_device())
                rows = engine.profile(batch, 1, 9)
                us = rows[1][7]
                row |= {f"b{bits} us": us, f"b{bits} x": half / us}
                row[f"b{bits} MB"] = 1e-6 * (moved + macs // out**2 * bits / 8)
                if bits == widths[0]:
                    row |= {"kernel": rows[1][2], "TOPS": 2e-6 * macs * batch / us}
                    row["MMAC"] = 1e-6 * macs * batch
                del engine
            yield row


def layer_name(layer: tuple[int, int, int, int, int, int]) -> str:
    """Kernel, stride, channels and side in one word."""
    c, o, k, stride, side, groups = layer
    return f"{k}x{k}/{stride} {c}-{o}@{side}" + (" dw" if groups > 1 else "")


def sparse(batches: list[int], bits: int) -> Iterator[dict[str, Any]]:
    """Pruned convolutions beside the same layers with all of their weights."""
    patterns = {
        "2:4": (0.5, "2:4"),
        "blocks32 50%": (0.5, "block32x64"),
        "blocks32 75%": (0.75, "block32x64"),
        "blocks16 75%": (0.75, "block16x64"),
    }
    for layer in PRUNED:
        for batch in batches:
            row: dict[str, Any] = {"layer": layer_name(layer), "batch": batch, "bits": bits}
            dense = 0.0
            for name, pruned in {"dense": None, **patterns}.items():
                program, _ = layer_program(layer, bits, pruned=pruned)
                x = torch.randn(2, layer[0], layer[4], layer[4])
                check_against_cpu(program, x, name)
                engine = CudaEngine(program, torch.cuda.current_device())
                rows = engine.profile(batch, 1, 9)
                us = rows[1][7]
                dense = dense or us
                row |= {f"{name} us": us, f"{name} x": dense / us, f"{name} by": rows[1][2]}
                del engine
            yield row


def check_against_cpu(program: _C.Program, x: Tensor, name: str) -> None:
    """The levels of one input and output, both of ``program``, on the CPU and here.

    Raises:
        AssertionError: they differ.
    """
    on_gpu = CudaEngine(program, torch.cuda.current_device())
    on_cpu = _C.Engine(program)
    shape = (x.shape[0], *program.values()[program.outputs()[0]][2:5])
    expected = torch.empty(shape)
    on_cpu.run([x.data_ptr()], [False], x.shape[0], [expected.data_ptr()], 1)
    there, got = x.cuda(), torch.empty(shape, device="cuda")
    on_gpu.run([there.data_ptr()], [False], x.shape[0], [got.data_ptr()])
    if not torch.equal(got.cpu(), expected):
        raise AssertionError(f"{name} differs from the CPU")


def products(sizes: list[int], batches: list[int]) -> Iterator[dict[str, Any]]:
    """Linear layers with u8 activations beside torch's int8 product and torchao's layers."""
    for n in sizes:
        for batch in batches:
            row: dict[str, Any] = {"size": n, "batch": batch}
            if batch > 16:  # what _int_mm asks for
                x = torch.randint(-100, 100, (batch, n), dtype=torch.int8, device="cuda")
                w = torch.randint(-100, 100, (n, n), dtype=torch.int8, device="cuda")
                row["_int_mm us"] = median_us(graph_of(partial(torch._int_mm, x, w.t())))
            x16 = torch.randn(batch, n, dtype=torch.bfloat16, device="cuda")
            for column, calls in torchao_linears(x16, 1, integer=True):
                row[f"{column} us"] = calls if isinstance(calls, str) else median_us(calls[0])
            for bits in (8, 4, 2):
                program, macs = layer_program((n, n, 1, 1, 1, 1), bits)
                check_against_cpu(program, torch.randn(2, n, 1, 1), f"linear {n}")
                engine = CudaEngine(program, torch.cuda.current_device())
                us = engine.profile(batch, 1, 9)[1][7]
                row |= {f"b{bits} us": us, f"b{bits} TOPS": 2e-6 * macs * batch / us}
                del engine
            yield row


def networks(
    names: list[str], batches: list[int], widths: list[int], compiled: bool
) -> Iterator[dict[str, Any]]:
    """Float images in, logits out; the whole batch."""
    for name in names:
        peers: dict[int, dict[str, float]] = {batch: {} for batch in batches}
        for bits in widths:
            model, engine, images = compressed(name, bits)
            on_gpu = engine.to("cuda")
            if not torch.equal(on_gpu(images.cuda()).cpu(), engine(images)):
                raise AssertionError(f"{name} at {bits} bits differs from the CPU")
            for batch in batches:
                x = torch.randn(batch, 3, 224, 224, device="cuda")
                if not peers[batch]:
                    peers[batch] = dict(_half(model, x, compiled))
                us = median_us(partial(on_gpu, x))
                best = min(peers[batch].values())
                yield {
                    "network": name,
                    "bits": bits,
                    "batch": batch,
                    "us": us,
                    "images/s": 1e6 * batch / us,
                    **{f"{key} us": value for key, value in peers[batch].items()},
                    "x best": best / us,
                }
                del x


def _half(model: nn.Module, x: Tensor, compiled: bool) -> Iterator[tuple[str, float]]:
    half = copy.deepcopy(model).half().cuda()
    half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = x.half().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        yield "half graph", median_us(graph_of(lambda: half(images)))
        if compiled:
            torch._dynamo.reset()
            best = torch.compile(half, mode="max-autotune", dynamic=False)
            for _ in range(4):
                best(images)
            yield "max-autotune", median_us(lambda: best(images))


def linears(sizes: list[int], batches: list[int]) -> Iterator[dict[str, Any]]:
    """Half activations and b-bit weights that come from memory, not from the cache."""
    for n in sizes:
        for batch in batches:
            x = torch.randn(batch, n, dtype=torch.half, device="cuda")
            copies = max(2, _FLUSH_BYTES // (2 * n * n) + 1)
            full = [torch.randn(n, n, dtype=torch.half, device="cuda") for _ in range(copies)]
            half = cold_us([partial(torch.matmul, x, w.t()) for w in full])
            del full
            row: dict[str, Any] = {"size": n, "batch": batch, "half us": half}
            cold = min(24, _FLUSH_BYTES // (n * n // 2) + 1)
            for column, calls in torchao_linears(x.bfloat16(), cold):
                row[f"{column} us"] = calls if isinstance(calls, str) else cold_us(calls)
            for bits in (8, 4, 3, 2):
                lo = 2 ** (bits - 1)
                w = torch.randint(-lo, lo, (n, n), dtype=torch.int8)
                w.view(-1)[0] = -lo
                copies = min(48, _FLUSH_BYTES // (n * n * bits // 8) + 1)
                scale = torch.full((n,), 0.01, device="cuda")
                bias = torch.zeros(n, device="cuda")
                # Other scales are other layers, with packed weights of their own.
                scales = [scale + 1e-4 * k for k in range(copies)]
                packed = ops.pack_weight(w, bits).cuda()
                expected = (x.cpu().double() @ w.double().T) * 0.01
                got = ops.linear_weight_only(x, packed, scale, bias).cpu().double()
                error = float((got - expected).norm() / expected.norm())
                if not error < 2e-3:
                    raise AssertionError(f"linear {n} at {bits} bits: relative error {error}")
                packs = [packed.clone() for _ in range(copies)]
                us = cold_us(
                    [
                        partial(ops.linear_weight_only, x, p, s, bias)
                        for p, s in zip(packs, scales, strict=True)
                    ]
                )
                row |= {f"b{bits} us": us, f"b{bits} x": half / us}
                row[f"b{bits} GB/s"] = 1e-3 * n * n * bits / 8 / us
                cuda.layers._linears.clear()
                del packs
            yield row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    reason = cuda.why_unavailable()
    if reason is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    torch.backends.cudnn.benchmark = True
    report = Report(options.results, options.minutes)
    compiled = not options.no_compile
    sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "peaks": peaks,
        "networks": lambda: networks(["resnet50"], [1, 32, 256], [8, 4, 2], False),
        "linears": lambda: linears([8192, 4096], [1, 16, 256]),
        "sparse": lambda: sparse([256, 32], 8),
        "products": lambda: products([8192, 4096], [1, 16, 256]),
        "layers": lambda: layers([256, 1], [8, 4, 2]),
        "mobilenet": lambda: networks(["mobilenet_v2"], [1, 32, 256], [8, 4], False),
        "compiled": lambda: networks(["resnet50"], [1, 256], [8], compiled),
    }
    chosen = [name for name in options.only.split(",") if name] or list(sections)
    for name in chosen:
        if name not in sections:
            raise SystemExit(f"unknown section {name!r}; there are {', '.join(sections)}")
        if time.monotonic() > report.end:
            print(f"\n== {name}: left out, out of time")
            continue
        report.table(name, sections[name]())
    print(f"\nwritten to {options.results}")


if __name__ == "__main__":
    main()
