"""Open Inference Protocol v2: requests in JSON and binary tensors, and the answers.

https://github.com/kserve/open-inference-protocol, with Triton's binary tensor extension. Tensors
that come as bytes are passed on as views of what was received.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from .errors import ServeError
from .runner import Description, TensorInfo
from .settings import Settings

__all__ = [
    "Body",
    "InferRequest",
    "build_response",
    "configuration",
    "metadata",
    "named_number",
    "parameters_of",
    "parse_object",
    "parse_request",
]

# JSON has no number that is NaN or infinite, and the protocol does not say what to write. Triton
# writes bare NaN and Infinity, at which most parsers but Python's refuse the whole answer; orjson
# and the servers that use null lose which of the three it was. These texts are those of protobuf's
# JSON mapping: every parser reads them, and float(), numpy (and so tritonclient's as_numpy) and
# JavaScript's Number() make the number of them.
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Body:
    """A request's body in the pieces in which it came."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.size = sum(len(piece) for piece in pieces)

    def take(self, start: int, end: int) -> list[memoryview]:
        """Views of the bytes from ``start`` to ``end``, in pieces."""
        views = []
        for piece in self._pieces:
            if start < len(piece) and end > 0 and start < end:
                views.append(memoryview(piece)[max(start, 0) : end])
            start -= len(piece)
            end -= len(piece)
            start = max(start, 0)
        return views

    def joined(self, start: int, end: int) -> bytes:
        """The bytes in one piece."""
        return b"".join(self.take(start, end))


@dataclass
class InferRequest:
    """A checked request.

    Attributes:
        id: to be repeated in the answer; None without.
        inputs: per input of the model, bytes of float32, or of int32 token ids, in pieces.
        shapes: per input, its sizes without the batch; None where they are the model's own.
        count: samples.
        outputs: number of an output, and whether it is wanted as bytes.
        parameters: of the request.
    """

    id: str | None
    inputs: list[list[memoryview]]
    count: int
    outputs: list[tuple[int, bool]]
    shapes: tuple[tuple[int, ...], ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def parse_request(
    body: Body, json_size: int | None, model: Description, max_samples: int
) -> InferRequest:
    """A request for a model.

    Args:
        body: JSON, followed by the binary tensors.
        json_size: bytes of the JSON, the header ``Inference-Header-Content-Length``; None: all.
        max_samples: largest batch of one request.

    Raises:
        ServeError: 400, what was expected and what came.
    """
    if json_size is not None and json_size > body.size:
        raise ServeError(
            400,
            f"Inference-Header-Content-Length: the JSON has {json_size} bytes, the body "
            f"{body.size}",
        )
    end = body.size if json_size is None else json_size
    data = parse_object(body.joined(0, end), "an inference request", bare_names=True)
    request_id = data.get("id")
    if request_id is not None and not _is_text(request_id):
        raise ServeError(400, "id: expected a string")
    parameters = _parameters(data, "the request")
    tensors = data.get("inputs")
    if not isinstance(tensors, list):
        raise ServeError(400, "inputs: expected a list of tensors")
    found: dict[str, list[memoryview]] = {}
    known = {info.name: info for info in model.inputs}
    counts: set[int] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    offset = end
    for tensor in tensors:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or name not in known:
            raise ServeError(
                400, f"inputs: expected {', '.join(map(repr, known))}, got {_shown(name)}"
            )
        if name in found:
            raise ServeError(400, f"input {name!r} comes twice")
        count, shape = _count(tensor, known[name], max_samples)
        counts.add(count)
        shapes[name] = shape
        info = known[name].at(shape)
        size = _parameters(tensor, f"input {name!r}").get("binary_data_size")
        if size is None:
            found[name] = [_from_json(tensor, info, count)]
            continue
        if json_size is None:
            raise ServeError(
                400,
                f"input {name!r}: binary_data_size needs the header "
                "Inference-Header-Content-Length, which says where the JSON ends",
            )
        found[name], offset = _from_binary(tensor, info, count, body, offset, size)
    missing = [name for name in known if name not in found]
    if missing:
        raise ServeError(400, f"inputs: {missing[0]!r} is missing")
    if len(counts) != 1:
        raise ServeError(400, f"expected one batch size for all inputs, got {sorted(counts)}")
    if offset != body.size:
        raise ServeError(
            400,
            f"{body.size - offset} bytes of the body belong to no input: expected a "
            "binary_data_size for them",
        )
    binary = _flag(parameters, "binary_data_output", "the request", False)
    outputs = _outputs(data.get("outputs"), model.outputs, binary)
    own = all(shapes[name] == info.shape for name, info in known.items())
    return InferRequest(
        request_id,
        [found[name] for name in known],
        counts.pop(),
        outputs,
        None if own else tuple(shapes[name] for name in known),
        parameters,
    )


def parse_object(text: bytes, what: str, *, bare_names: bool = False) -> dict[str, Any]:
    """A JSON object.

    Args:
        bare_names: NaN and Infinity may stand in it, as Python's json and tritonclient write them.

    Raises:
        ServeError: 400.
    """
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        data = _with_bare_names(text) if bare_names else None
        if data is None:
            raise ServeError(400, f"expected {what} in JSON: {error}") from None
    if not isinstance(data, dict):
        raise ServeError(400, f"expected {what} as a JSON object, got {type(data).__name__}")
    return data


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be sent back; Python's json lets halves of pairs through."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_bare_names(text: bytes) -> Any:
    """The value of a text that is JSON but for NaN and Infinity in it; None for other texts."""
    if b"NaN" not in text and b"Infinity" not in text:
        return None
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def named_number(value: float) -> float | str:
    """A number for JSON: itself, or "NaN", "Infinity" or "-Infinity"."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _numbers(values: npt.NDArray[np.float32]) -> Any:
    """An array for orjson, which writes null for what has no number in JSON."""
    others = values[~np.isfinite(values)].tolist()
    if not others:
        return values
    first, *pieces = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY).split(b"null")
    text = [first]
    for value, piece in zip(others, pieces, strict=True):
        text += (f'"{named_number(value)}"'.encode(), piece)
    return orjson.Fragment(b"".join(text))


def _unnamed(data: Any) -> Any:
    """A list of numbers with the names of numbers in it replaced.

    Raises:
        KeyError: another text.
        RecursionError: lists in lists without end.
    """
    if isinstance(data, list):
        return [_unnamed(item) for item in data]
    return _NAMED[data] if isinstance(data, str) else data


def _parameters(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = parameters_of(data, where)
    for key in ("shared_memory_region", "classification"):
        if key in found:
            raise ServeError(400, f"parameters of {where}: {key!r} is not supported")
    return found


def parameters_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is given under "parameters"; a null, there and in it, is as good as nothing.

    Raises:
        ServeError: 400, it is no object.
    """
    found = data.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ServeError(400, f"parameters of {where}: expected an object, got {_shown(found)}")
    return {key: value for key, value in found.items() if value is not None}


def _flag(parameters: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise ServeError(400, f"{key} of {where}: expected true or false, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value of a request as JSON writes it, for a message."""
    try:
        text = json.dumps(value[:20] if isinstance(value, list) else value)
    except RecursionError:
        return "lists in lists without end"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _count(
    tensor: Mapping[str, Any], info: TensorInfo, max_samples: int
) -> tuple[int, tuple[int, ...]]:
    """Samples of a tensor, and the sizes of each."""
    shape = tensor.get("shape")
    wanted = str(info)
    # bool is an int in Python, and true is no size.
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise ServeError(400, f"input {info.name!r}: expected shape {wanted}, got {_shown(shape)}")
    if not shape or not info.fits(shape[1:]) or shape[0] < 1:
        raise ServeError(400, f"input {info.name!r}: expected shape {wanted}, got {_shown(shape)}")
    if shape[0] > max_samples:
        raise ServeError(
            400, f"input {info.name!r}: expected a batch of at most {max_samples}, got {shape[0]}"
        )
    return int(shape[0]), tuple(shape[1:])


def _from_json(tensor: Mapping[str, Any], info: TensorInfo, count: int) -> memoryview:
    _width(tensor, info)
    if tensor.get("data") is None:
        raise ServeError(400, f"input {info.name!r} has neither data nor binary_data_size")
    try:
        array = np.asarray(tensor["data"])
        if array.dtype.kind == "U" and not info.is_ids:
            array = np.asarray(_unnamed(tensor["data"]))
    except ValueError as error:  # lists of different lengths, or nested too deep
        raise ServeError(400, f"input {info.name!r}: {error}") from None
    except (KeyError, RecursionError):
        raise ServeError(
            400, f"input {info.name!r}: expected numbers as data, or {', '.join(_NAMED)}"
        ) from None
    if array.dtype.kind not in ("iu" if info.is_ids else "iuf"):
        kind = "whole numbers" if info.is_ids else "numbers"
        raise ServeError(400, f"input {info.name!r}: expected {kind} as data")
    if array.size != count * math.prod(info.shape):
        raise ServeError(
            400,
            f"input {info.name!r}: expected {count * math.prod(info.shape)} numbers, got "
            f"{array.size}",
        )
    if info.is_ids:
        return _ids(array, info)
    with np.errstate(over="ignore"):  # to infinity, at which the input's grid saturates
        values = np.ascontiguousarray(array.reshape(-1), dtype=np.float32)
    return values.view(np.uint8).data


def _from_binary(
    tensor: Mapping[str, Any], info: TensorInfo, count: int, body: Body, offset: int, size: Any
) -> tuple[list[memoryview], int]:
    width = _width(tensor, info)
    values = count * math.prod(info.shape)
    expected = values * width
    if type(size) is not int:
        raise ServeError(
            400,
            f"input {info.name!r}: expected binary_data_size as a whole number ({expected}), got "
            f"{_shown(size)}",
        )
    if size != expected:
        raise ServeError(
            400,
            f"input {info.name!r}: expected binary_data_size {expected} ({values} values of shape "
            f"{tensor['shape']}, {width} bytes of {tensor['datatype']} each), got {size}",
        )
    if tensor.get("data") is not None:
        raise ServeError(400, f"input {info.name!r} has both data and binary_data_size")
    if offset + size > body.size:
        raise ServeError(
            400,
            f"input {info.name!r}: expected {size} bytes behind the JSON and the inputs before it, "
            f"the body ends after {body.size - offset}",
        )
    if info.is_ids:
        whole = np.frombuffer(body.joined(offset, offset + size), f"<i{width}")
        return [_ids(whole, info)], offset + size
    if width == 4:
        return body.take(offset, offset + size), offset + size
    half = np.frombuffer(body.joined(offset, offset + size), np.float16)
    return [half.astype(np.float32).view(np.uint8).data], offset + size


def _ids(array: npt.NDArray[Any], info: TensorInfo) -> memoryview:
    """Token ids as int32; each in the model's tables, so that it fails no other's request."""
    flat = array.reshape(-1)
    rows = info.rows
    least, most = (0, rows - 1) if rows is not None else (-(2**31), 2**31 - 1)
    wrong = (flat < least) | (flat > most)
    if wrong.any():
        position = int(wrong.argmax())
        each = math.prod(info.shape)
        raise ServeError(
            400,
            f"input {info.name!r}: expected ids of {least} to {most}, got {flat[position]} in "
            f"sample {position // each}, position {position % each}",
        )
    return np.ascontiguousarray(flat, dtype=np.int32).view(np.uint8).data


_WIDTHS = {"FP32": 4, "FP16": 2, "INT64": 8, "INT32": 4}  # bytes per value


def _width(tensor: Mapping[str, Any], info: TensorInfo) -> int:
    """Bytes per value."""
    datatype = tensor.get("datatype")
    known = ("INT64", "INT32") if info.is_ids else ("FP32", "FP16")
    if datatype not in known:
        raise ServeError(
            400,
            f"input {info.name!r}: expected datatype {known[0]} or {known[1]}, got "
            f"{_shown(datatype)}",
        )
    return _WIDTHS[datatype]


def _outputs(asked: Any, infos: Sequence[TensorInfo], binary: bool) -> list[tuple[int, bool]]:
    if asked is None or asked == []:
        return [(number, binary) for number in range(len(infos))]
    if not isinstance(asked, list):
        raise ServeError(400, "outputs: expected a list")
    names = [info.name for info in infos]
    found: list[tuple[int, bool]] = []
    for item in asked:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in names:
            raise ServeError(
                400, f"outputs: expected {', '.join(map(repr, names))}, got {_shown(name)}"
            )
        number = names.index(name)
        if any(number == other for other, _ in found):
            raise ServeError(400, f"output {name!r} comes twice")
        where = f"output {name!r}"
        found.append((number, _flag(_parameters(item, where), "binary_data", where, binary)))
    return found


def build_response(
    name: str,
    version: str,
    request: InferRequest,
    infos: Sequence[TensorInfo],
    results: Sequence[memoryview],
) -> tuple[bytes, int | None]:
    """Body of an answer, and the bytes of its JSON where tensors follow it."""
    answer: dict[str, Any] = {"model_name": name, "model_version": version}
    if request.id is not None:
        answer["id"] = request.id
    outputs: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for number, binary in request.outputs:
        info, data = infos[number], results[number]
        row: dict[str, Any] = {
            "name": info.name,
            "datatype": "FP32",
            "shape": [request.count, *info.shape],
        }
        if binary:
            row["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            row["data"] = _numbers(np.frombuffer(data, np.float32))
        outputs.append(row)
    answer["outputs"] = outputs
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *raw]), len(text)) if raw else (text, None)


def metadata(name: str, versions: Sequence[str], model: Description) -> dict[str, Any]:
    """The model metadata of the protocol; class names and preprocessing as parameters."""

    def rows(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
        return [{"name": i.name, "datatype": i.datatype, "shape": [-1, *i.shown]} for i in infos]

    found: dict[str, Any] = {
        "name": name,
        "versions": list(versions),
        "platform": model.platform,
        "inputs": rows(model.inputs),
        "outputs": rows(model.outputs),
    }
    extra: dict[str, Any] = {}
    if model.preprocessing is not None:
        extra["preprocessing"] = model.preprocessing
    if model.class_names is not None:
        extra["classes"] = list(model.class_names)
    if model.detection is not None:
        extra["detection"] = model.detection.as_dict()
    sizes = {axis[0]: axis[1:] for info in model.inputs for axis in info.free if axis is not None}
    if sizes:
        keys = ("min", "max", "multiple_of")
        extra["sizes"] = {
            name: dict(zip(keys, numbers, strict=True)) for name, numbers in sizes.items()
        }
    if model.levels > 1:
        extra["quality_levels"] = model.levels
    if extra:
        found["parameters"] = extra
    return found


def configuration(name: str, model: Description, settings: Settings) -> dict[str, Any]:
    """Triton's model configuration, of what this server has words for."""

    def rows(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
        return [{"name": i.name, "data_type": f"TYPE_{i.datatype}", "dims": i.shown} for i in infos]

    return {
        "name": name,
        "platform": model.platform,
        "backend": "adalayer",
        "max_batch_size": settings.largest_request,
        "input": rows(model.inputs),
        "output": rows(model.outputs),
        "instance_group": [
            {"name": name, "kind": "KIND_CPU", "count": settings.replicas},
        ],
        "dynamic_batching": {
            "preferred_batch_size": [settings.max_batch],
            "max_queue_delay_microseconds": round(settings.batch_wait_ms * 1000),
            "default_queue_policy": {"max_queue_size": settings.max_queue},
        },
    }
