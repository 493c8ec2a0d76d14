"""From bytes to a checked model: everything about a file that can be wrong before it is followed.

A file may come from a stranger. So its parts outside (external data) have to lie in its own
folder, sizes are looked at before anything is allocated, and the graph has to be one: names that
exist, no circles, operators that are known. All unknown operators are named at once.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalayer_native._files import require_file
from adalayer_native.errors import FileFormatError, UnsupportedModelError
from adalayer_native.onnx.package import onnx_package

__all__ = [
    "NEWEST_OPSET",
    "OLDEST_OPSET",
    "OnnxFile",
    "check_operators",
    "fixed_size",
    "node_label",
    "operator_name",
    "ordered",
    "read",
]

OLDEST_OPSET, NEWEST_OPSET = 7, 28
MOST_BYTES = (1 << 31) - 1  # of a protobuf message
MOST_NODES = 1 << 20  # with the file's functions in their places
# Of one constant, and of all: more than any network for images has.
MOST_ELEMENTS = 1 << 31
_BITS_OF_SMALL = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}


@dataclass
class OnnxFile:
    """A model that can be followed.

    Attributes:
        name: of the file, for messages.
        model: the ModelProto, functions inlined, external data loaded.
        nodes: in an order in which every node comes after what it reads.
        opset: version of the standard operators.
    """

    name: str
    model: Any
    nodes: list[Any]
    opset: int

    @property
    def inputs(self) -> list[Any]:
        """What a call of the network is given: no constants, which older files list as well."""
        held = {item.name for item in self.model.graph.initializer}
        return [item for item in self.model.graph.input if item.name not in held]


def fixed_size(dim: Any) -> int | None:
    """The size that a file says of an axis; None for a free one, which some write as -1 or 0."""
    return int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value > 0 else None


def operator_name(node: Any) -> str:
    """Of a node: with its domain, unless that is the standard one."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    return f"{domain}{node.op_type}"


def node_label(node: Any) -> str:
    """A node as messages call it."""
    return f"{operator_name(node)} {node.name or '→ ' + ', '.join(node.output)!s}"


def read(source: str | os.PathLike[str] | bytes) -> OnnxFile:
    """Read and check a model, whatever its operators are.

    Args:
        source: a path, or the bytes of a file.

    Raises:
        FileFormatError: not a file, not ONNX, or one that contradicts itself.
        UnsupportedModelError: an opset, or a kind of constants, that is not supported.
        MissingExtraError: the package onnx is not installed.
    """
    onnx = onnx_package()
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, folder, data = f"{len(source)} bytes of ONNX", None, bytes(source)
    else:
        path = Path(source)
        name, folder = os.fspath(source), path.parent
        require_file(path)
        if path.stat().st_size > MOST_BYTES:
            raise FileFormatError(
                f"{name}: has {path.stat().st_size} bytes; expected at most {MOST_BYTES} (larger "
                "networks have their weights in other files)"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FileFormatError(f"{name}: cannot be read: {error.strerror}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # DecodeError of whichever protobuf there is
        raise FileFormatError(f"{name}: not an ONNX model, or one cut short: {error}") from None
    # Any short piece of text may pass for an empty message.
    if not model.HasField("graph") or not model.opset_import:
        raise FileFormatError(
            f"{name}: not an ONNX model: it has no graph, or says no version of the operators"
        )
    opset = _opset(name, model)
    if model.functions:
        model = _inlined(name, model)
    if model.graph.sparse_initializer:
        raise UnsupportedModelError(
            f"{name}: constant {model.graph.sparse_initializer[0].values.name!r} is a sparse "
            "tensor, which is not supported"
        )
    _check_tensors(name, list(_tensors(model.graph)), folder)
    nodes = ordered(name, model.graph)
    return OnnxFile(name, model, nodes, opset)


def _opset(name: str, model: Any) -> int:
    versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    if not versions:
        raise UnsupportedModelError(
            f"{name}: uses no standard operators, only "
            f"{', '.join(sorted(item.domain for item in model.opset_import))}"
        )
    opset = int(max(versions))
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UnsupportedModelError(
            f"{name}: opset {opset} is not supported, expected {OLDEST_OPSET} to {NEWEST_OPSET}; "
            "onnx.version_converter.convert_version converts between them"
        )
    return opset


def _inlined(name: str, model: Any) -> Any:
    """The model without functions: their nodes in the place of their calls."""
    bodies = {(item.domain, item.name, item.overload): item.node for item in model.functions}
    counts: dict[tuple[str, str, str], int] = {}

    def nodes_of(nodes: Any, above: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in bodies and key not in above:  # (circles are the package's to find)
                if key not in counts:
                    counts[key] = nodes_of(bodies[key], (*above, key))
                total += counts[key]
            total += 1
        return total

    count = nodes_of(model.graph.node, ())
    if count > MOST_NODES:  # a few functions that call each other twice are as many as one likes
        raise UnsupportedModelError(
            f"{name}: {count} nodes with its functions in place of their calls; expected at most "
            f"{MOST_NODES}"
        )
    try:
        return onnx_package("inliner").inline_local_functions(model)
    except Exception as error:  # the package's own, of several kinds
        raise FileFormatError(f"{name}: its functions cannot be inlined: {error}") from None


def _tensors(graph: Any) -> Iterator[Any]:
    """All constants of a graph and of its branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def _reads(node: Any) -> list[str]:
    """What a node reads, and what its branches read of the graph around them."""
    found = list(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = attribute.g
            own = {item.name for item in (*inner.input, *inner.initializer)}
            own |= {output for part in inner.node for output in part.output}
            outer = [item for part in inner.node for item in _reads(part)]
            found += [item for item in outer if item not in own]
    return found


def _check_tensors(name: str, tensors: Any, folder: Path | None) -> None:
    total = 0
    for tensor in tensors:
        sizes = list(tensor.dims)
        if any(size < 0 for size in sizes):
            raise FileFormatError(f"{name}: tensor {tensor.name!r} has sizes {sizes}")
        elements = math.prod(sizes)
        total += elements
        if total > MOST_ELEMENTS:
            raise UnsupportedModelError(
                f"{name}: tensor {tensor.name!r} of sizes {sizes}: constants of more than "
                f"{MOST_ELEMENTS} elements are not supported"
            )
        if tensor.data_location == tensor.EXTERNAL:
            _load_external(name, tensor, folder, elements)
        _check_length(name, tensor, elements)


def _check_length(name: str, tensor: Any, elements: int) -> None:
    """Whether a tensor holds as much as its sizes say."""
    onnx = onnx_package()
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    except ValueError:
        raise FileFormatError(
            f"{name}: tensor {tensor.name!r} is of unknown type {tensor.data_type}"
        ) from None
    if kind == "STRING" or kind == "UNDEFINED":
        return
    if tensor.HasField("raw_data"):
        size = _element_bits(kind)
        expected, got = (elements * size + 7) // 8, len(tensor.raw_data)
        unit = "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        got, unit = len(getattr(tensor, field)), "values"
        per = 8 // _BITS_OF_SMALL[kind] if kind in _BITS_OF_SMALL else 1
        expected = -(-elements // per) * (2 if kind.startswith("COMPLEX") else 1)
    if got != expected:
        raise FileFormatError(
            f"{name}: tensor {tensor.name!r} of sizes {list(tensor.dims)} and type {kind}: "
            f"expected {expected} {unit}, got {got}"
        )


def _element_bits(kind: str) -> int:
    if kind in _BITS_OF_SMALL:
        return _BITS_OF_SMALL[kind]
    onnx = onnx_package()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, kind))
    return 8 * int(dtype.itemsize)


def _load_external(name: str, tensor: Any, folder: Path | None, elements: int) -> None:
    """Read what a tensor keeps in another file, which has to lie in the model's folder."""
    where = f"{name}: tensor {tensor.name!r}"
    if folder is None:
        raise FileFormatError(
            f"{where} is in another file, which bytes have none of; give the path of the model"
        )
    entries = {item.key: item.value for item in tensor.external_data}
    location = entries.get("location", "")
    base = folder.resolve()
    target = (base / location).resolve()
    if not location or os.path.isabs(location) or base not in target.parents:
        raise FileFormatError(
            f"{where} is in {location!r}, which is not below the model's own folder"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        size = target.stat().st_size
    except ValueError:
        raise FileFormatError(
            f"{where}: expected whole numbers for offset and length of its data in {location!r}"
        ) from None
    except OSError as error:
        raise FileFormatError(
            f"{where} is in {location!r}, which cannot be read: {error.strerror}"
        ) from None
    kind = onnx_package().TensorProto.DataType.Name(tensor.data_type)
    expected = (elements * _element_bits(kind) + 7) // 8
    length = expected if length < 0 else length
    if offset < 0 or length != expected or offset + length > size:
        raise FileFormatError(
            f"{where}: expected {expected} bytes in {location!r}, which has {size}; got offset "
            f"{offset} and length {length}"
        )
    with target.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    del tensor.external_data[:]
    tensor.data_location = tensor.DEFAULT


def ordered(name: str, graph: Any, around: Collection[str] = ()) -> list[Any]:
    """The nodes so that each comes after what it reads.

    Args:
        around: what the graph around a branch has.
    """
    given = {item.name for item in graph.input} | {item.name for item in graph.initializer}
    given |= {"", *around}  # "": an optional operand that is left out
    reads = [_reads(node) for node in graph.node]
    makers: dict[str, Any] = {}
    for node in graph.node:
        for output in node.output:
            if output and (output in makers or output in given):
                raise FileFormatError(f"{name}: {output!r} is computed twice ({node_label(node)})")
            makers[output] = node
    for node, read_ in zip(graph.node, reads, strict=True):
        missing = [item for item in read_ if item not in given and item not in makers]
        if missing:
            raise FileFormatError(
                f"{name}: {node_label(node)} reads {missing[0]!r}, which nothing gives"
            )
    absent = [o.name for o in graph.output if o.name not in makers and o.name not in given]
    if absent or not graph.output:
        raise FileFormatError(f"{name}: nothing gives its output {absent[0] if absent else ''!r}")
    # As the standard wants it they lie in order already; so the first in the file comes first.
    waits = [sum(item not in given for item in set(read_)) for read_ in reads]
    readers: dict[str, list[int]] = {}
    for index, read_ in enumerate(reads):
        for item in set(read_):
            readers.setdefault(item, []).append(index)
    ready = [index for index, count in enumerate(waits) if count == 0]
    heapq.heapify(ready)
    found = []
    while ready:
        node = graph.node[heapq.heappop(ready)]
        found.append(node)
        for index in (i for output in node.output if output for i in readers.get(output, ())):
            waits[index] -= 1
            if waits[index] == 0:
                heapq.heappush(ready, index)
    if len(found) < len(graph.node):
        circle = [n for n, count in zip(graph.node, waits, strict=True) if count][:5]
        raise FileFormatError(
            f"{name}: nodes that wait for each other in a circle: "
            f"{', '.join(map(node_label, circle))}"
        )
    return found


def check_operators(file: OnnxFile, known: Collection[str], nodes: Any = None) -> None:
    """Raise for operators that are not among those that can be followed; names all of them.

    Args:
        nodes: of a branch; default: the file's.
    """
    unknown: dict[str, str] = {}
    for node in file.nodes if nodes is None else nodes:
        kind = operator_name(node)
        if kind not in known:
            unknown.setdefault(kind, node.name or (node.output[0] if node.output else ""))
    if unknown:
        listed = ", ".join(f"{kind} (first: {place!r})" for kind, place in sorted(unknown.items()))
        raise UnsupportedModelError(f"{file.name}: operators that are not supported: {listed}")
