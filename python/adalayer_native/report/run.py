"""A finished run as its directory holds it: report.json and plan.json, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import found_at, read_json
from ..errors import FileFormatError, PlanError
from ..microscope import Comparison
from ..plan import Plan
from .record import RECORD_FORMAT, RECORD_VERSION

__all__ = ["COMPARISON", "ClassRow", "Layer", "Run", "load_run"]

COMPARISON = "compare.json"  # what adalayer compare adds to a run


@dataclass(frozen=True)
class Layer:
    """One row of the report.

    Attributes:
        name: of the layer.
        kind: ``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"``.
        params: number of weights.
        bits: of the weights; ``None`` for a layer that stayed float.
        input_bits: of the layer's input.
        sparsity: share of weights that were pruned.
        pattern: how zeros are placed.
        error: relative error of the layer's output after repair, or where there was none the
            predicted loss increase; ``None`` where neither is known.
        microseconds: of one image in the engine; ``None`` where it was not timed.
        bytes: in the saved file; of a float layer its float32 weights.
        energy_nj: modelled nanojoules per image.
        extrapolated: whether that is below the widths with published figures.
        kernel: what runs.
        flops: per image.
    """

    name: str
    kind: str
    params: int
    bits: int | None
    input_bits: int
    sparsity: float
    pattern: str
    error: float | None
    microseconds: float | None
    bytes: int
    energy_nj: float
    extrapolated: bool
    kernel: str
    flops: float


@dataclass(frozen=True)
class ClassRow:
    """One class of the test images.

    Attributes:
        name: of the class.
        images: test images of it.
        before: right answers of the float model in percent; ``None`` without images.
        after: of the compressed one.
    """

    name: str
    images: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its directory.
        data: report.json.
        plan: plan.json.
        layers: rows of the report.
        error_name: what ``error`` of the rows is, in words.
        classes: accuracy class by class; empty where the run does not say (one of an earlier
            version).
        comparison: with the float network, layer by layer; None where nobody has made it.
    """

    path: Path
    data: dict[str, Any]
    plan: Plan
    layers: tuple[Layer, ...]
    error_name: str
    classes: tuple[ClassRow, ...]
    comparison: Comparison | None = None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read the output directory of ``adalayer compress`` or ``adalayer demo``.

    Raises:
        FileFormatError: no such directory, an empty or half-finished run, or damaged files.
        PlanError: the plan is not the one that the report is about.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileFormatError(
            f"run {os.fspath(path)!r} {found_at(root)}; expected the output directory of a run"
        )
    if not (root / "report.json").is_file():
        if (root / "work").is_dir():
            raise FileFormatError(
                f"run {os.fspath(path)!r} is not finished: there is no report.json; the same "
                f"command goes on where it stopped"
            )
        raise FileFormatError(
            f"run {os.fspath(path)!r} is empty: it has no report.json; expected the output "
            f"directory of adalayer compress or demo"
        )
    source = os.fspath(root / "report.json")
    data = read_json(source, (RECORD_FORMAT, RECORD_VERSION))
    plan = Plan.load(root / "plan.json")
    try:
        rows = data["layers"]
        error_name, key = _error_of(rows)
        layers = tuple(_layer(row, key) for row in rows)
        classes = tuple(_class(row) for row in data.get("classes") or ())
        for name in ("model", "method", "bytes", "float_bytes", "average_bits", "isa", "threads"):
            data[name]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{source}: not a complete report: {error!r}") from None
    _check_plan(plan, layers, os.fspath(root / "plan.json"))
    comparison = None
    if (root / COMPARISON).is_file():
        comparison = Comparison.load(root / COMPARISON)
        _check_comparison(comparison, layers, os.fspath(root / COMPARISON))
    return Run(root, data, plan, layers, error_name, classes, comparison)


def _error_of(rows: list[dict[str, Any]]) -> tuple[str, str]:
    if any("output_error" in row for row in rows):
        return "relative output error", "output_error"
    return "predicted loss increase", "E"


def _layer(row: dict[str, Any], key: str) -> Layer:
    error, time = row.get(key), row.get("microseconds")
    return Layer(
        name=str(row["name"]),
        kind=str(row["kind"]),
        params=int(row["params"]),
        bits=None if row["bits"] is None else int(row["bits"]),
        input_bits=int(row.get("activation_bits", 8)),
        sparsity=float(row["planned_sparsity"]) if row["bits"] is not None else 0.0,
        pattern=str(row["pattern"]),
        error=None if error is None else float(error),
        microseconds=None if time is None else float(time),
        bytes=int(row["bytes"]),
        energy_nj=1e-3 * float(row["energy_pj"]),
        extrapolated=bool(row["energy_extrapolated"]),
        kernel=str(row.get("kernel", "torch (float)" if row["bits"] is None else "")),
        flops=float(row["flops"]),
    )


def _class(row: dict[str, Any]) -> ClassRow:
    images = int(row["images"])
    before, after = (
        100 * int(row[key]) / images if images else None for key in ("float_right", "right")
    )
    return ClassRow(str(row["name"]), images, before, after)


def _check_comparison(comparison: Comparison, layers: tuple[Layer, ...], source: str) -> None:
    known = {layer.name: layer.bits for layer in layers}
    for row in comparison.rows:
        if row.kind != "value" and known.get(row.name, -1) != row.bits:
            raise FileFormatError(
                f"{source} is about another model than report.json: they differ in layer "
                f"{row.name!r}; compare again (adalayer compare), or delete it"
            )


def _check_plan(plan: Plan, layers: tuple[Layer, ...], source: str) -> None:
    names = [layer.name for layer in layers]
    if list(plan) != names:
        other = sorted(set(plan) ^ set(names))
        raise PlanError(
            f"{source} is the plan of another model than report.json: they differ in "
            f"{', '.join(map(repr, other[:3])) or 'the order of layers'}"
        )
    for layer in layers:
        if plan[layer.name].params != layer.params:
            raise PlanError(
                f"{source} is the plan of another model than report.json: layer {layer.name!r} "
                f"has {plan[layer.name].params} weights there and {layer.params} here"
            )
