"""Engines from ``.ada`` files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from adalayer_native import _C
from adalayer_native.engine.results import Leaf, Output, Port, rebuild
from adalayer_native.engine.runtime import WEIGHTS, Engine, NativePart, Step
from adalayer_native.errors import FileFormatError

__all__ = ["load"]


def load(path: str | os.PathLike[str], *, weights: str = "measured") -> Engine:
    """An engine from a ``.ada`` file; neither the model nor torch.export is needed.

    Args:
        weights: "measured", "streamed" or "resident"; see :func:`adalayer_native.compile`.

    Raises:
        ValueError: an unknown form of weights.
        FileFormatError: missing, truncated or damaged file, or one of a newer version.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    try:
        program = _C.Program.load(os.fspath(path))
    except OSError as error:
        raise FileFormatError(f"{os.fspath(path)}: cannot be read: {error}") from error
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    values, metadata = program.values(), program.metadata()
    try:
        return _rebuilt(program, values, {k: json.loads(v) for k, v in metadata.items()}, weights)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise FileFormatError(
            f"{os.fspath(path)}: its metadata do not describe its program ({error!r})"
        ) from error


def _rebuilt(
    program: _C.Program, values: list[Any], metadata: Mapping[str, Any], weights: str
) -> Engine:
    sizes = [values[number][2:5] for number in program.inputs()]
    results = [values[number][2:5] for number in program.outputs()]
    if "adalayer.inputs" in metadata:
        ports = [Port(str(name), tuple(shape)) for name, shape in metadata["adalayer.inputs"]]
        order = [int(number) for number in metadata["adalayer.order"]]
        for position, number in enumerate(order):
            if math.prod(ports[number].shape) != math.prod(sizes[position]):
                raise ValueError(f"input {ports[number].name!r} does not fit {sizes[position]}")
        if len(order) != len(sizes):
            raise ValueError(f"{len(order)} inputs are described, the program has {len(sizes)}")
        outputs = []
        for source, shape, atoms in metadata["adalayer.outputs"]:
            pairs = None if atoms is None else tuple((int(n), int(step)) for n, step in atoms)
            elements = math.prod(results[source])
            reach = 0 if pairs is None else sum((n - 1) * step for n, step in pairs)
            count = math.prod(shape if pairs is None else [n for n, _ in pairs])
            positive = pairs is None or all(n > 0 and step >= 0 for n, step in pairs)
            if (
                math.prod(shape) != elements
                or count != elements
                or reach >= elements
                or not positive
            ):
                raise ValueError(f"output {source} does not fit {results[source]}")
            outputs.append(Output(int(source), tuple(int(n) for n in shape), pairs))
        first = len(ports)
        leaves = [
            Leaf(first + int(item["tensor"])) if "tensor" in item else item["constant"]
            for item in metadata["adalayer.leaves"]
        ]
        structure = metadata["adalayer.structure"]
    else:  # written by something else
        ports = [Port(values[n][0], tuple(values[n][2:5])) for n in program.inputs()]
        order = list(range(len(ports)))
        outputs = [Output(k, tuple(size), None) for k, size in enumerate(results)]
        first = len(ports)
        leaves = [Leaf(first + k) for k in range(len(outputs))]
        structure = 0 if len(outputs) == 1 else {"tuple": list(range(len(outputs)))}
    for leaf in leaves:
        if isinstance(leaf, Leaf) and not first <= leaf.number < first + len(outputs):
            raise ValueError(f"the result names tensor {leaf.number}")
    rebuild(structure, leaves)
    part = NativePart(program, outputs, weights)
    step = Step(part, order, [first + k for k in range(len(outputs))], [])
    names = metadata.get("classes")
    return Engine(
        [step],
        ports,
        leaves,
        structure,
        preprocessing=metadata.get("preprocessing"),
        class_names=None if names is None else [str(name) for name in names],
    )
