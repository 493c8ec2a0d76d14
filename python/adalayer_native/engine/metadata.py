"""What an ``.ada`` file says of its model beside the program, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.detection import Detection
from adalayer_native.engine.call import Call
from adalayer_native.engine.interface import Interface
from adalayer_native.engine.parts import type_name
from adalayer_native.engine.results import (
    ID_TYPES,
    INTEGERS,
    Leaf,
    Output,
    Port,
    described,
    nest,
)
from adalayer_native.engine.steps import Step
from adalayer_native.errors import UnsupportedModelError

__all__ = ["described_by", "metadata_of"]

# Of the texts that are parsed; Python's objects take many times their bytes.
_MAX_TEXT = 16 << 20
_MAX_AXES = 32

_KEYS = (
    *("adalayer.inputs", "adalayer.order", "adalayer.outputs", "adalayer.leaves"),
    *("adalayer.structure", "adalayer.call", "adalayer.least_batch", "preprocessing", "classes"),
    "detection",
)


def metadata_of(interface: Interface, step: Step, outputs: Sequence[Output]) -> dict[str, Any]:
    """What a file says of a model beside its program.

    Args:
        step: the only one.
        outputs: of its part.

    Raises:
        UnsupportedModelError: a result that a file cannot hold.
    """
    structure, leaves = described(interface.out_spec, interface.leaves, "the model's result")
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        raise UnsupportedModelError(
            "the model returns a tensor that is the same in every call, which a file cannot "
            "hold; leave it out of the results"
        )
    computed = step.outputs
    for leaf in leaves:
        if isinstance(leaf, Leaf) and leaf.number not in computed:
            raise UnsupportedModelError(
                f"the model returns its input {interface.inputs[leaf.number].name!r} as it is, "
                "which a file cannot hold; leave it out of the results"
            )
    metadata = {
        "adalayer.inputs": [_port_row(port) for port in interface.inputs],
        "adalayer.outputs": [
            [output.source, list(output.shape), output.atoms] for output in outputs
        ],
        "adalayer.order": step.inputs,
        "adalayer.leaves": [
            {"tensor": computed.index(leaf.number)}
            if isinstance(leaf, Leaf)
            else {"constant": leaf}
            for leaf in leaves
        ],
        "adalayer.structure": structure,
    }
    call = interface.call.as_json(interface.inputs)
    if call is not None:
        metadata["adalayer.call"] = call
    if interface.least_batch > 1:
        metadata["adalayer.least_batch"] = interface.least_batch
    if interface.preprocessing is not None:
        metadata["preprocessing"] = interface.preprocessing
    if interface.class_names is not None:
        metadata["classes"] = interface.class_names
    if interface.detection is not None:
        metadata["detection"] = interface.detection.as_dict()
    return metadata


def _port_row(port: Port) -> list[Any]:
    """For a file; batches of floats are name and sizes, as they have always been."""
    row: list[Any] = [port.name, list(port.shape)]
    if not port.batched:
        return [*row, type_name(port.dtype), False]
    return row if port.is_float else [*row, type_name(port.dtype)]


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


def described_by(program: _C.Program) -> tuple[Interface, list[int], list[Output]]:
    """What a file's metadata say: the interface, which of its inputs each of the program's is, and
    how tensors show the program's outputs. The outputs' tensors are numbered behind the inputs.

    Raises:
        ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError,
        ValueError: they do not describe this program.
    """
    values, texts = program.values(), program.metadata()
    metadata = {key: _parsed(key, texts[key]) for key in _KEYS if key in texts}
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
    names = metadata.get("classes")
    interface = Interface(
        tuple(ports),
        leaves,
        out_spec,
        Call.flat(ports) if rows is None else Call.from_json(rows, ports),
        preprocessing=metadata.get("preprocessing"),
        class_names=None if names is None else [str(name) for name in names],
        detection=Detection.from_dict(metadata["detection"]) if "detection" in metadata else None,
        least_batch=2 if int(metadata.get("adalayer.least_batch", 1)) > 1 else 1,
    )
    return interface, order, outputs
