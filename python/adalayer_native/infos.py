"""What ``adalayer info`` shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from . import files, ops
from ._console import print_table
from ._version import __version__
from .engine import load
from .report import load_run, run_table
from .report.onnx_file import FileLayer, OnnxDescription, describe

__all__ = ["show_engine", "show_machine", "show_onnx", "show_packed", "show_run"]


def show_machine(as_json: bool) -> None:
    """Versions, instruction sets and threads."""
    found: dict[str, Any] = {
        "adalayer_native": __version__,
        "torch": str(torch.__version__),
        "instruction_sets": list(ops.isas()),
        "in_use": ops.active_isa(),
        "threads": ops.get_num_threads(),
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"adalayer_native {found['adalayer_native']}, torch {found['torch']}")
    print(f"instruction sets: {', '.join(found['instruction_sets'])}; in use: {found['in_use']}")
    print(f"threads: {found['threads']}")


def show_packed(file: Path, as_json: bool) -> None:
    """A packed model, layer by layer."""
    entries = files.describe(file)
    total = file.stat().st_size
    if as_json:
        print(json.dumps({"file": str(file), "bytes": total, "layers": entries}, indent=2))
        return
    layers = [e for e in entries if e["name"] is not None]
    params = sum(e["params"] for e in layers)
    weight_bits = 8 * sum(e["bytes"] for e in layers) / params
    title = f"{file.name} — {total:,} bytes, {weight_bits:.2f} bits per weight in all"
    table = Table(title=escape(title))
    for column in ("layer", "shape"):
        table.add_column(column)
    for column in ("params", "bits", "nonzero", "encoding", "input bits", "bytes", "of float32"):
        table.add_column(column, justify="right")
    for e in layers:
        table.add_row(
            escape(e["name"]),
            "×".join(str(v) for v in e["shape"]),
            f"{e['params']:,}",
            str(e["bits"]),
            "all stored" if e["encoding"] == "dense" else f"{e['nonzero']:.1%}",
            e["encoding"],
            str(e["input_bits"]),
            f"{e['bytes']:,}",
            f"{e['bytes'] / (4 * e['params']):.1%}",
        )
    table.caption = (
        f"other tensors: {entries[-1]['bytes']:,} bytes; this machine runs "
        f"{', '.join(ops.isas())}, in use: {ops.active_isa()}"
    )
    print_table(table)


def show_run(path: Path, as_json: bool) -> None:
    """The output directory of a finished run."""
    run = load_run(path)
    if as_json:
        print(json.dumps(run.data, indent=2))
    else:
        print_table(run_table(run))


def show_engine(file: Path, as_json: bool) -> None:
    """A compiled engine, node by node."""
    engine = load(file)
    coverage, total = engine.coverage(rounds=0), file.stat().st_size
    if as_json:
        report = {
            "file": str(file),
            "bytes": total,
            "inputs": [{"name": port.name, "shape": list(port.shape)} for port in engine.inputs],
            "sizes": {name: asdict(size) for name, size in engine.sizes.items()},
            "levels": engine.levels,
            "preprocessing": engine.preprocessing,
            "classes": engine.class_names,
            "detection": None if engine.detection is None else engine.detection.as_dict(),
            "nodes": [asdict(row) for row in coverage],
        }
        print(json.dumps(report, indent=2))
        return
    table = Table(title=escape(f"{file.name} — {total:,} bytes"))
    for column in ("node", "operation"):
        table.add_column(column)
    for column in ("bits", "input bits", "bytes", "MACs per image"):
        table.add_column(column, justify="right")
    table.add_column("runs here as")
    for row in coverage:
        numbers = (row.bits, row.input_bits, row.bytes, row.macs)
        counts = (f"{n:,}" if n else "" for n in numbers)
        table.add_row(escape(row.name), row.op, *counts, escape(row.kernel))
    ports = "; ".join(f"{p.name} {p}" for p in engine.inputs)
    classes = f"{len(engine.class_names)} classes" if engine.class_names else "no class names"
    given = "with" if engine.preprocessing else "without"
    levels = f"; {engine.levels} levels of quality, here the best" if engine.levels > 1 else ""
    table.caption = escape(f"input {ports}; {classes}; {given} preprocessing{levels}")
    print_table(table)


def show_onnx(file: Path, as_json: bool, image_size: int | None) -> None:
    """An ONNX file: what it holds, and what of it would be native."""
    found = describe(file, sizes=image_size)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    table = Table(title=escape(f"{file.name} — {found.bytes:,} bytes, opset {found.opset}"))
    for column in ("layer", "kind", "weight"):
        table.add_column(column)
    table.add_column("parameters", justify="right")
    for column in ("as it is", "with a plan"):
        table.add_column(column)
    for layer in found.layers:
        table.add_row(
            escape(layer.name),
            layer.kind,
            "×".join(map(str, layer.shape)),
            f"{math.prod(layer.shape):,}",
            escape(_as_it_is(layer)),
            escape(f"float: {layer.why_never}" if layer.why_never else "native"),
        )
    table.caption = escape("\n".join(_onnx_lines(found)))
    print_table(table)


def _as_it_is(layer: FileLayer) -> str:
    if layer.bits is not None:
        return f"native, {layer.bits} bits"
    return f"float: {layer.why_float}" if layer.why_float else "float"


def _onnx_lines(found: OnnxDescription) -> list[str]:
    lines = [f"written by {found.producer}"] if found.producer else []
    for what, ports in (("input", found.inputs), ("output", found.outputs)):
        for port in ports:
            sizes = "of unknown sizes" if port["sizes"] is None else f"{port['sizes']}"
            lines.append(f"{what} {port['name']}: {port['type']} {sizes}".replace("'", ""))
    listed = ", ".join(f"{count} {kind}" for kind, count in found.operators.items())
    lines.append(f"operators: {listed}")
    macs = f", {found.macs:,.0f} multiply-accumulates per sample" if found.macs else ""
    lines.append(f"{found.parameters:,} parameters{macs}")
    for name, part in (found.in_float or {}).items():
        lines.append(f"float whatever a plan says: {name}, {part['share']:.1%}: {part['reason']}")
    if found.problem:
        lines.append(f"cannot be followed: {found.problem}")
    return lines
