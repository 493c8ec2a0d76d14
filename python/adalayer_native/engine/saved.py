"""Engines from ``.ada`` files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from adalayer_native import _C
from adalayer_native.detection import Detection
from adalayer_native.engine.call import Call
from adalayer_native.engine.parts import WEIGHTS, NativePart
from adalayer_native.engine.results import ID_TYPES, INTEGERS, Leaf, Output, Port, nest
from adalayer_native.engine.runtime import Engine, Step
from adalayer_native.errors import FileFormatError
from adalayer_native.files import PACKED, kind_of

__all__ = ["load"]


# A file that needs more, its weights and tables on this machine and one call's tensors included, is
# refused. The same default as in the C interface.
_MAX_MEMORY = 4 << 30
# Of the texts that are parsed; Python's objects take many times their bytes.
_MAX_TEXT = 16 << 20
_MAX_AXES = 32


def load(
    path: str | os.PathLike[str], *, weights: str = "measured", max_memory: int | None = None
) -> Engine:
    """An engine from a ``.ada`` file; neither the model nor torch.export is needed.

    The file may be untrusted: it can be refused or compute something else than it claims, no more
    (``SECURITY.md``).

    Args:
        weights: "measured", "streamed" or "resident"; see :func:`adalayer_native.compile`.
        max_memory: bytes that the file, the weights and tables made of it and the tensors of one
            call may take in all; default 4 GiB. Nothing of that size is allocated before the check.
            Forms of weights that take more than they must (Winograd) are left out without room.

    Raises:
        ValueError: an unknown form of weights, or a limit below 1.
        FileFormatError: missing, truncated or damaged file, one of a newer version, or one that
            needs more memory than allowed. Of a packed model file, which :func:`.restore` opens,
            it says so.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    limit = _MAX_MEMORY if max_memory is None else max_memory
    if limit < 1:
        raise ValueError(f"max_memory must be at least 1 byte, got {max_memory}")
    try:
        program = _C.Program.load(os.fspath(path), limit)
    except OSError as error:
        raise FileFormatError(f"{os.fspath(path)}: cannot be read: {error}") from error
    except (ValueError, MemoryError) as error:
        hint = ""
        if kind_of(path) == PACKED:
            hint = "; it is a packed model file: adalayer_native.restore(model, path) opens it"
        raise FileFormatError(f"{os.fspath(path)}: {error}{hint}") from error
    values, texts = program.values(), program.metadata()
    try:
        # RecursionError: json and nest() follow the text as deep as it goes.
        metadata = {key: _parsed(key, texts[key]) for key in _KEYS if key in texts}
        return _rebuilt(program, values, metadata, weights, limit)
    except MemoryError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise FileFormatError(
            f"{os.fspath(path)}: its metadata do not describe its program ({error!r})"
        ) from error


_KEYS = (
    *("adalayer.inputs", "adalayer.order", "adalayer.outputs", "adalayer.leaves"),
    *("adalayer.structure", "adalayer.call", "adalayer.least_batch", "preprocessing", "classes"),
    "detection",
)


def _parsed(key: str, text: str) -> Any:
    if len(text) > _MAX_TEXT:
        raise ValueError(f"{key}: expected at most {_MAX_TEXT} characters, got {len(text)}")
    return json.loads(text)


def _sizes(numbers: Any) -> tuple[int, ...]:
    """A tuple of sizes that can be multiplied."""
    if len(numbers) > _MAX_AXES:
        raise ValueError(f"expected at most {_MAX_AXES} axes, got {len(numbers)}")
    sizes = tuple(int(n) for n in numbers)
    if any(not 0 < n <= 1 << 40 for n in sizes):
        raise ValueError(f"expected sizes of 1 to 2^40, got {sizes}")
    return sizes


_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, *INTEGERS)}


def _port(name: Any, shape: Any, dtype: str = "float32", batched: Any = True) -> Port:
    return Port(str(name), _sizes(shape), _TYPES[dtype], bool(batched))


def _place(number: Any, count: int) -> int:
    """An index into ``count`` things."""
    place = int(number)
    if not 0 <= place < count:
        raise ValueError(f"expected a number from 0 to {count - 1}, got {place}")
    return place


def _rebuilt(
    program: _C.Program,
    values: list[Any],
    metadata: Mapping[str, Any],
    weights: str,
    max_memory: int,
) -> Engine:
    sizes = [values[number][2:5] for number in program.inputs()]
    ids = [values[number][1] == "i32" for number in program.inputs()]
    results = [values[number][2:5] for number in program.outputs()]
    if "adalayer.inputs" in metadata:
        ports = [_port(*row) for row in metadata["adalayer.inputs"]]
        order = [_place(number, len(ports)) for number in metadata["adalayer.order"]]
        for position, number in enumerate(order):
            port = ports[number]
            fits = math.prod(port.shape) == math.prod(sizes[position])
            whole = port.dtype in (*ID_TYPES, torch.bool)
            known = whole if ids[position] else port.is_float
            if not (fits and known and port.batched):
                raise ValueError(f"input {port.name!r} does not fit {sizes[position]}")
        if len(order) != len(sizes):
            raise ValueError(f"{len(order)} inputs are described, the program has {len(sizes)}")
        outputs = []
        for source, shape, atoms in metadata["adalayer.outputs"]:
            place, shape = _place(source, len(results)), _sizes(shape)
            elements = math.prod(results[place])
            pairs = None
            if atoms is not None:
                counts = _sizes([n for n, _ in atoms])
                pairs = tuple((n, int(step)) for n, (_, step) in zip(counts, atoms, strict=True))
            output = Output(place, shape, pairs)
            if not output.fits(elements):
                raise ValueError(f"output {source} does not fit {results[place]}")
            outputs.append(output)
        first = len(ports)
        leaves = [
            Leaf(first + _place(item["tensor"], len(outputs)))
            if "tensor" in item
            else item["constant"]
            for item in metadata["adalayer.leaves"]
        ]
        structure = metadata["adalayer.structure"]
    else:  # written by something else
        ports = [
            Port(values[n][0], tuple(values[n][2:5]), torch.int32 if whole else torch.float32)
            for n, whole in zip(program.inputs(), ids, strict=True)
        ]
        order = list(range(len(ports)))
        outputs = [Output(k, tuple(size), None) for k, size in enumerate(results)]
        first = len(ports)
        leaves = [Leaf(first + k) for k in range(len(outputs))]
        structure = 0 if len(outputs) == 1 else {"tuple": list(range(len(outputs)))}
    out_spec, leaves = nest(structure, leaves)
    rows = metadata.get("adalayer.call")
    call = None if rows is None else Call.from_json(rows, ports)
    part = NativePart(program, outputs, weights, max_memory)
    step = Step(part, order, [first + k for k in range(len(outputs))], [])
    names = metadata.get("classes")
    return Engine(
        [step],
        ports,
        leaves,
        out_spec,
        call=call,
        preprocessing=metadata.get("preprocessing"),
        class_names=None if names is None else [str(name) for name in names],
        detection=Detection.from_dict(metadata["detection"]) if "detection" in metadata else None,
        least_batch=2 if int(metadata.get("adalayer.least_batch", 1)) > 1 else 1,
    )
