"""``from_onnx``: a network from an ONNX file, as a module of torch."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from adalayer_native.capture.quiet import quiet
from adalayer_native.errors import AdaError, UnsupportedModelError
from adalayer_native.onnx import (  # noqa: F401  (they fill the table of operators)
    layers,
    pointwise,
    qoperator,
    quantized,
    recurrences,
    shapes,
    windows,
)
from adalayer_native.onnx.batch import difference, mixed
from adalayer_native.onnx.building import OPERATORS, Builder, NodeView, Refused
from adalayer_native.onnx.input_sizes import NOTHING, Asked, asked_sizes
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.pointwise import SMALL, torch_dtype
from adalayer_native.onnx.reading import (
    OnnxFile,
    check_operators,
    fixed_size,
    node_label,
    operator_name,
    ordered,
    read,
)
from adalayer_native.onnx.tidying import tidy
from adalayer_native.onnx.values import Constant, Size, Value

__all__ = ["OnnxModule", "followed", "from_onnx", "imported"]


MOST_SIZES = 1 << 16  # in one list


class OnnxModule(fx.GraphModule):
    """An imported network."""

    def __reduce__(self) -> tuple[Any, ...]:
        # fx would trace the generated code again, through functions that look at sizes.
        raise TypeError(
            "an imported network cannot be pickled; what adalayer_native.capture makes of it can"
        )


def from_onnx(
    source: str | os.PathLike[str] | bytes,
    *,
    sizes: Any = None,
    integers: bool = True,
) -> fx.GraphModule:
    """A network from an ONNX file, as a torch module that every other call here takes.

    Convolutions, products with constants and batch norms become torch's own layers under the
    names that the file has for them; everything else is torch's functions. The module computes
    what the file says, for any batch, also where the file fixes one.

    Of a quantized network (``QuantizeLinear`` and ``DequantizeLinear``, or QLinear operators) the
    integers are kept: a layer with integer weights, one scale per output channel or one in all,
    and an input of 8 or fewer bits becomes one of :mod:`adalayer_native.nn`, of the fewest bits
    that hold the weights. Such a module is compiled as it is. Other layers stay in float with the
    dequantized weights, and a warning says why. ``module.meta["onnx"]["layers"]`` has the bits of
    each, or the reason.

    Args:
        source: path of a file, or its bytes (which have no external data).
        sizes: those of inputs that the file leaves free, but for the batch, by the name that the
            file gives them, or ``"input.axis"``: ``{"height": 224, "x.3": 224}``. One number is the
            height and width of images. In the place of a number a range leaves them free:
            ``(128, 512, 32)`` or an :class:`adalayer_native.Size`, as ``compile(..., sizes=)`` has
            them; the network is then followed at several of these sizes, which have to give the
            same graph.
        integers: False gives a float network also of a quantized one: layers with the dequantized
            weights, which may be compressed anew, and of every activation's grid its ends.

    Raises:
        FileFormatError: not an ONNX file, or one that is damaged or contradicts itself.
        UnsupportedModelError: operators (all are named), an opset or sizes that are not supported;
            names file and node.
        MissingExtraError: the package onnx is not installed.
    """
    file = read(source)
    module = imported(file, sizes, integers=integers)
    reasons = {n: why for n, why in module.meta["onnx"]["layers"].items() if isinstance(why, str)}
    if reasons:
        listed = "; ".join(f"{name!r}: {why}" for name, why in reasons.items())
        warnings.warn(
            f"{file.name}: layers whose integers are not kept, they stay in float: {listed}",
            stacklevel=2,
        )
    return module


def imported(file: OnnxFile, sizes: Any, *, integers: bool = True) -> fx.GraphModule:
    """The module of a file that was read, for any batch.

    Raises:
        UnsupportedModelError: see :func:`from_onnx`.
    """
    check_operators(file, {*OPERATORS, "If"})
    asked = asked_sizes(file, {} if sizes is None else sizes)
    module = followed(file, asked=asked, integers=integers)
    _check_any_batch(file, module, asked, integers)
    _check_any_size(file, module, asked, integers)
    return module


def _check_any_batch(file: OnnxFile, module: fx.GraphModule, asked: Asked, integers: bool) -> None:
    """Raise where the module holds for one batch alone."""
    hint = "what it computes depends on the number of samples"
    try:
        other = followed(file, asked=asked, integers=integers, more=1)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} ({hint})") from error
    where = difference(module, other)
    if where is not None:
        raise UnsupportedModelError(f"{file.name}: {where}: {hint}, which is not supported")
    fixed = module.meta["onnx"]["batch"]
    why = None if fixed is None else mixed(module, module.meta["example"], fixed)
    if why is not None:
        raise UnsupportedModelError(
            f"{file.name}: it is for a batch of {fixed} alone: in a larger one its samples would "
            f"know of each other ({why}); export it with a free first axis"
        )


def _check_any_size(file: OnnxFile, module: fx.GraphModule, asked: Asked, integers: bool) -> None:
    """Raise where the module does not hold for all sizes of the ranges."""
    if not asked.ranges:
        return
    for sizes in asked.others():
        at = ", ".join(f"{name} {n}" for name, n in sizes.items())
        hint = "give one size, or a range with multiples for which it does not"
        try:
            other = followed(file, asked=asked, integers=integers, at=asked.at(sizes))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} (at {at}; {hint})") from error
        where = difference(module, other)
        if where is not None:
            raise UnsupportedModelError(
                f"{file.name}: {where}: what it does depends on the size of the image, as at {at}; "
                f"{hint}"
            )


def followed(
    file: OnnxFile,
    *,
    asked: Asked = NOTHING,
    at: Mapping[tuple[str, int], int] | None = None,
    integers: bool = True,
    constants: Mapping[str, Any] | None = None,
    free_batch: bool = True,
    more: int = 0,
) -> fx.GraphModule:
    """The module of a checked file.

    Args:
        asked: about sizes.
        at: sizes of the example; default: the smallest.
        constants: values of inputs (numpy arrays) that are none for the module.
        free_batch: the first axis of inputs is a batch, of any size.
        more: samples of the example beyond the usual number.
    """
    graph = file.model.graph
    known: dict[str, Any] = {"": None}
    for tensor in graph.initializer:
        known[tensor.name] = _constant_of(file, tensor)
    for name, array in (constants or {}).items():
        try:
            known[name] = _constant_of_array(name, array)
        except (TypeError, Refused) as error:
            raise UnsupportedModelError(f"{file.name}: constant {name!r}: {error}") from None
    inputs = [item for item in file.inputs if item.name not in known]
    if not inputs:
        raise UnsupportedModelError(f"{file.name}: the network has no input")
    given = asked.at() if at is None else at
    examples, batch = _examples(file, inputs, given, free_batch, more)
    g = Builder(FakeTensorMode(allow_non_fake_inputs=True), batch, integers)
    g.ranged = {place: asked.ranges[name] for place, name in asked.ranged.items()}
    for item in inputs:
        value = g.input(item.name, examples[item.name])
        kind = _kind(item)
        value.kind = kind if kind in SMALL else ""
        known[item.name] = value
    if free_batch:
        g.check_inputs()
    with quiet():  # what torch logs beside an error
        for node in file.nodes:
            _follow(g, file, node, known)
    for item in graph.output:
        _check_batch(g, file, item, known[item.name])
    results = tuple(_result(g, known[item.name]) for item in graph.output)
    g.graph.output(results[0] if len(results) == 1 else results)
    tidy(g)
    module = OnnxModule(g.root, g.graph, "OnnxModule")
    module.eval()
    module.meta["onnx"] = {
        "file": file.name, "opset": file.opset, "layers": dict(g.kept), "batch": batch[1],
    }  # fmt: skip
    module.meta["example"] = tuple(examples[item.name] for item in inputs)
    return module


def _kind(item: Any) -> str:
    """ONNX type of an input's elements."""
    return str(onnx_package().TensorProto.DataType.Name(item.type.tensor_type.elem_type))


def _follow_if(g: Builder, file: OnnxFile, node: Any, known: dict[str, Any]) -> None:
    """The branch that is taken; exporters leave the choice to the number of axes."""
    try:
        taken = g.known(known[node.input[0]], "condition")
        if taken.numel() != 1:
            raise Refused(f"its condition has sizes {list(taken.shape)}; expected one element")
    except Refused as error:
        raise UnsupportedModelError(f"{file.name}: {node_label(node)}: {error}") from None
    name = "then_branch" if bool(taken) else "else_branch"
    branch = next((a.g for a in node.attribute if a.name == name), None)
    if branch is None or len(branch.output) < len(node.output):
        raise UnsupportedModelError(f"{file.name}: {node_label(node)}: its {name} is missing")
    nodes = ordered(file.name, branch, known)
    check_operators(file, {*OPERATORS, "If"}, nodes)
    inside = dict(known)
    inside.update({tensor.name: _constant_of(file, tensor) for tensor in branch.initializer})
    for item in nodes:
        _follow(g, file, item, inside)
    for output, item in zip(node.output, branch.output, strict=False):
        known[output] = inside[item.name]


def _follow(g: Builder, file: OnnxFile, node: Any, known: dict[str, Any]) -> None:
    if operator_name(node) == "If":
        _follow_if(g, file, node, known)
        return
    function, takes_quantized = OPERATORS[operator_name(node)]
    names = list(node.output)
    last = next(iter(reversed(g.graph.nodes)))
    try:
        view = NodeView(
            node.op_type, node.name or names[0], file.opset, _attributes(file, node), names
        )
        operands = [known[name] for name in node.input]
        if not takes_quantized:
            operands = [
                g.integers_of(item) if isinstance(item, Value) and item.quantized else item
                for item in operands
            ]
        try:
            inspect.signature(function).bind(g, view, *operands)
        except TypeError:
            raise Refused(f"{len(operands)} inputs are too many or too few") from None
        results = function(g, view, *operands)
        _check_sizes(results)
    except AdaError:
        raise
    except Exception as error:  # torch's own, about sizes and types that do not go together
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (TypeError, IndexError, KeyError, AttributeError, AssertionError)):
            text = f"its inputs or attributes are not those of such an operator ({text})"
        raise UnsupportedModelError(f"{file.name}: {node_label(node)}: {text}") from (
            None if isinstance(error, Refused) else error
        )
    made = last.next
    while made.op != "root":  # for whoever has to name the operator of a node of the graph
        made.meta["onnx"] = node_label(node)
        made = made.next
    if not isinstance(results, tuple):
        results = (results,)
    if len(results) < len([name for name in names if name]):
        raise UnsupportedModelError(
            f"{file.name}: {node_label(node)}: {len(names)} results are read, {len(results)} are "
            "supported"
        )
    for name, value in zip(names, results, strict=False):
        if name:
            known[name] = value


def _check_sizes(results: Any) -> None:
    """Raise for lists of sizes that no network has: a few nodes may square or double them."""
    for item in results if isinstance(results, tuple) else (results,):
        if not isinstance(item, np.ndarray):
            continue
        if item.size > MOST_SIZES:
            raise Refused(f"a list of {item.size} sizes; expected at most {MOST_SIZES}")
        sizes = [n.example if isinstance(n, Size) else n for n in item.flat]
        wrong = [n for n in sizes if isinstance(n, int) and abs(n) >= 1 << 63]
        if wrong:
            raise Refused(f"a size of {wrong[0].bit_length()} bits; expected at most 63")


def _attributes(file: OnnxFile, node: Any) -> dict[str, Any]:
    onnx = onnx_package()
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, list) and any(isinstance(item, bytes) for item in value):
            value = [item.decode("utf-8", "replace") for item in value]
        elif isinstance(value, float):  # of 32 bits in the file; who wrote 1e-5 meant 1e-5
            value = float(str(np.float32(value)))
        elif isinstance(value, onnx.TensorProto):
            value = _constant_of(file, value)
        elif isinstance(value, (onnx.GraphProto, onnx.SparseTensorProto)):
            raise Refused(f"its attribute {attribute.name!r} is not supported")
        found[attribute.name] = value
    return found


def _constant_of(file: OnnxFile, tensor: Any) -> Constant:
    onnx = onnx_package()
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        array = onnx.numpy_helper.to_array(tensor)
        return _constant_of_array(tensor.name, array, kind)
    except (ValueError, TypeError, Refused) as error:
        raise UnsupportedModelError(f"{file.name}: tensor {tensor.name!r}: {error}") from None


def _constant_of_array(name: str, array: Any, kind: str = "") -> Constant:
    array = np.asarray(array)
    kind = kind or array.dtype.name.upper()
    if kind in SMALL:
        whole = array.astype(str(SMALL[kind])[6:])
        return Constant(torch.from_numpy(whole), name, kind)
    if kind == "BFLOAT16":
        return Constant(torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16), name)
    if array.dtype.kind not in "fiub" or array.dtype.isbuiltin != 1:
        raise Refused(f"elements of type {kind} are not supported")
    return Constant(torch.from_numpy(np.ascontiguousarray(array).copy()).reshape(array.shape), name)


def _examples(
    file: OnnxFile,
    inputs: list[Any],
    sizes: Mapping[tuple[str, int], int],
    free_batch: bool,
    more: int,
) -> tuple[dict[str, Tensor], tuple[int, int | None]]:
    """A tensor of zeros for each input, and the batch: in these, and in the file if it is fixed."""
    shapes_: dict[str, list[Any]] = {}
    free: list[str] = []
    for item in inputs:
        kind = item.type.tensor_type
        if not item.type.HasField("tensor_type") or not kind.HasField("shape"):
            raise UnsupportedModelError(
                f"{file.name}: input {item.name!r}: expected a tensor with a number of axes"
            )
        shape: list[Any] = []
        for axis, dim in enumerate(kind.shape.dim):
            said = fixed_size(dim)
            if said is not None:
                shape.append(said)
                continue
            size = sizes.get((item.name, axis))
            if size is None and (axis > 0 or not free_batch):
                free.append(
                    f"{item.name}.{axis}" + (f" ({dim.dim_param})" if dim.dim_param else "")
                )
            shape.append(size)
        shapes_[item.name] = shape
    if free:
        raise UnsupportedModelError(
            f"{file.name}: sizes but the batch have to be known; give sizes={{...}}, numbers or "
            f"ranges, for {', '.join(free)}"
        )
    first = next((shape[0] for shape in shapes_.values() if shape), None)
    fixed = first if free_batch else None
    # Another batch than the file's, so that its own stands out where it matters.
    count = 2 if first is None else first + 1 if free_batch else first
    count += more
    examples = {}
    for item in inputs:
        shape = shapes_[item.name]
        if shape and free_batch and (shape[0] is None or shape[0] == first):
            shape = [count, *shape[1:]]
        try:
            dtype = SMALL.get(_kind(item)) or torch_dtype(item.type.tensor_type.elem_type)
        except Refused as error:
            raise UnsupportedModelError(f"{file.name}: input {item.name!r}: {error}") from None
        if any(n is None or n < 0 for n in shape):
            raise UnsupportedModelError(f"{file.name}: input {item.name!r} has sizes {shape}")
        try:
            examples[item.name] = torch.zeros((), dtype=dtype).expand(shape)
        except RuntimeError as error:
            raise UnsupportedModelError(f"{file.name}: input {item.name!r}: {error}") from None
    return examples, (count, fixed)


def _check_batch(g: Builder, file: OnnxFile, item: Any, value: Any) -> None:
    """Raise where operators of the file have lost the batch, which it fixes."""
    batch, fixed = g.batch
    dims = item.type.tensor_type.shape.dim
    said = dims[0].dim_value if len(dims) else 0
    if fixed is None or said != fixed or not isinstance(value, Value):
        return
    if value.shape[:1] != (batch,):
        raise UnsupportedModelError(
            f"{file.name}: output {item.name!r} is computed for a batch of {fixed} alone: one of "
            f"{batch} gives sizes {list(value.shape)}; export it with a free first axis"
        )


def _result(g: Builder, value: Any) -> fx.Node:
    if isinstance(value, Value) and value.quantized:
        value = g.integers_of(value)
    return g.tensor(value).node
