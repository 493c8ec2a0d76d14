"""Files as other tools and people write them: the results are ONNX Runtime's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adalayer_native.errors import UnsupportedModelError
from tests.helpers_onnx import by_runtime, imported, model, onnx

RANDOM = np.random.default_rng(11)
T = onnx.TensorProto


def op(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node without a name; "-" is an operand that is left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return onnx.helper.make_node(kind, names, outputs.split(), **attributes)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


W, B = floats(4, 3, 3, 3), floats(4)
IMAGE = ["N", 3, 9, 8]
NORM = {"s": floats(3), "b": floats(3), "m": floats(3), "v": np.abs(floats(3)) + 0.5}
HALF = W.astype(np.float16)
SCALES = onnx.numpy_helper.from_array(np.float32([1, 1, 2, 3]), "scales")
TENSOR = onnx.numpy_helper.from_array(W, "inner")
# Nodes, sizes of x, constants and opset.
STYLES: dict[str, tuple[list[Any], list[Any], dict[str, Any], int]] = {
    "constant nodes behind identities": (
        [
            op("Constant", "", "a", value=TENSOR), op("Identity", "a", "b"),
            op("Identity", "b", "c"), op("Conv", "x c", "y"),
        ],
        IMAGE, {}, 11,
    ),
    "a weight that the graph computes": (
        [
            op("Transpose", "w", "t", perm=[3, 2, 0, 1]), op("Mul", "t k", "u"),
            op("Conv", "x u", "y"),
        ],
        IMAGE, {"w": floats(3, 3, 3, 4), "k": floats(4, 1, 1, 1)}, 13,
    ),
    "empty operands": (
        [
            op("Conv", "x w -", "c"), op("Clip", "c - h", "d"), op("Clip", "d l", "e"),
            op("Clip", "e", "f"), op("Resize", "f - s", "y", mode="nearest"),
        ],
        IMAGE, {"w": W, "h": np.float32(1), "l": np.float32(0), "s": np.float32([1, 1, 2, 2])}, 22,
    ),
    "images with channels last, padded as Keras does": (
        [
            op("Transpose", "x", "t", perm=[0, 3, 1, 2]),
            op("Conv", "t w b", "c", pads=[0, 0, 1, 1], strides=[2, 2]),
            op("Transpose", "c", "u", perm=[0, 2, 3, 1]), op("Relu", "u", "r"),
            op("Transpose", "r", "v", perm=[0, 3, 1, 2]),
            op("MaxPool", "v", "p", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
            op("Transpose", "p", "o", perm=[0, 2, 3, 1]), op("Reshape", "o flat", "f"),
            op("MatMul", "f fc", "g"), op("Add", "g fb", "y"),
        ],
        ["N", 8, 8, 3],
        {"w": W, "b": B, "flat": ints(-1, 16), "fc": floats(16, 5), "fb": floats(5)}, 13,
    ),
    "half precision": (
        [
            op("Cast", "x", "h", to=T.FLOAT16), op("Conv", "h w", "c", auto_pad="SAME_LOWER"),
            op("Cast", "c", "y", to=T.FLOAT),
        ],
        ["N", 3, 8, 8], {"w": HALF[:, :, :2, :2]}, 13,
    ),
    "norms in unusual places": (
        [
            op("BatchNormalization", "x s b m v", "n", epsilon=1e-3), op("Relu", "n", "r"),
            op("BatchNormalization", "r s b m v", "k"), op("Add", "k x", "a"),
            op("BatchNormalization", "a s b m v", "o"), op("Conv", "o w", "y", pads=[1, 1, 1, 1]),
        ],
        IMAGE, {**NORM, "w": W}, 15,
    ),
    "one weight, three uses": (
        [
            op("Conv", "x w", "a"), op("Conv", "x w", "b", strides=[2, 2], pads=[1, 0, 1, 0]),
            op("GlobalAveragePool", "a", "p"), op("GlobalAveragePool", "b", "q"),
            op("ReduceMean", "w", "r", keepdims=0), op("Mul", "p r", "t"), op("Sub", "t q", "y"),
        ],
        IMAGE, {"w": W}, 13,
    ),
    "Gemm with everything": (
        [
            op("Gemm", "x w c", "g", transB=1, alpha=0.5, beta=0.3),
            op("Gemm", "g v", "y", alpha=2.0),
        ],
        ["N", 6], {"w": floats(4, 6), "c": floats(1, 4), "v": floats(4, 3)}, 11,
    ),
    "sizes of 0 and -1": (
        [op("Reshape", "x a", "r"), op("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]),
         op("Reshape", "t b", "y")],
        ["N", 6, 4, 4], {"a": ints(0, 2, -1, 4, 4), "b": ints(0, -1, 4, 4)}, 13,
    ),
    "splits by attribute": (
        [op("Split", "x", "a b", axis=1, split=[1, 2]), op("Concat", "b a", "y", axis=-3)],
        IMAGE, {}, 11,
    ),
    "uneven splits": (
        [op("Split", "x", "a b", axis=2, num_outputs=2), op("Concat", "b a", "y", axis=2)],
        IMAGE, {}, 18,
    ),
    "slices from behind": (
        [op("Slice", "x a b c d", "y")], IMAGE,
        {"a": ints(-1, 1), "b": ints(-100, 2**63 - 1), "c": ints(-1, 2), "d": ints(-2, 3)}, 13,
    ),
    "pads that cut": (
        [op("Pad", "x p", "a"), op("Pad", "a q", "y", mode="reflect")],
        IMAGE, {"p": ints(0, 0, -1, 2, 0, 0, -2, 1), "q": ints(0, 0, 1, 1, 0, 0, 0, 2)}, 11,
    ),
    "pads by attribute": (
        [op("Pad", "x", "y", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=2.0)], IMAGE, {}, 10,
    ),
    "slices by attribute": (
        [
            op("Slice", "x", "a", starts=[1, -6], ends=[3, 99], axes=[1, 2]),
            op("Slice", "a", "y", starts=[0, 0, 1], ends=[9, 2, -1]),
        ],
        IMAGE, {}, 9,
    ),
    "the largest by attribute": ([op("TopK", "x", "y places", k=2, axis=1)], IMAGE, {}, 9),
    "upsampled by a constant": (
        [op("Constant", "", "s", value=SCALES), op("Upsample", "x s", "y", mode="nearest")],
        IMAGE, {}, 9,
    ),
    "upsampled by attribute": (
        [
            op("Upsample", "x", "a", scales=[1.0, 1.0, 2.0, 2.0], mode="linear"),
            op("Upsample", "a", "y", scales=[1.0, 1.0, 1.0, 3.0]),
        ],
        IMAGE, {}, 7,
    ),
    "resized to a size": (
        [op("Resize", "x - - s", "y", mode="linear", coordinate_transformation_mode="asymmetric")],
        [1, 3, 9, 8], {"s": ints(1, 3, 5, 13)}, 13,
    ),
    "a softmax that flattens": ([op("Softmax", "x", "y", axis=1)], ["N", 3, 4], {}, 11),
    "sums from the end": (
        [op("CumSum", "x a", "y", reverse=1, exclusive=1)], ["N", 5], {"a": ints(-1)[0]}, 14,
    ),
}  # fmt: skip


@pytest.mark.parametrize("listed", [False, True], ids=["constants", "inputs too"])
@pytest.mark.parametrize("style", list(STYLES))
def test_style(style: str, listed: bool) -> None:
    """Older files list constants among the inputs as well."""
    nodes, sizes, constants, opset = STYLES[style]
    if listed and not constants:
        pytest.skip("it has no constants")
    made = model(nodes, inputs={"x": sizes}, outputs=["y"], constants=constants, opset=opset)
    if listed:
        made.graph.input.extend(
            onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
            for item in made.graph.initializer
        )
    net = imported(made)
    for count in (2, 5) if sizes[0] == "N" else (1,):
        x = torch.from_numpy(floats(count, *sizes[1:]))
        wanted = by_runtime(made.SerializeToString(), x)[0]
        with torch.no_grad():
            got = net(x).numpy()
        tolerance = 2e-2 if style == "half precision" else 1e-4
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("free", [-1, 0])
def test_free_axes_as_numbers(free: int) -> None:
    """As Paddle's exporter writes them."""
    constants = {"w": W}
    sizes: list[Any] = ["N", 3, "h", "w"]
    made = model([op("Conv", "x w", "y")], inputs={"x": sizes}, outputs=["y"], constants=constants)
    x = torch.from_numpy(floats(2, 3, 16, 9))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    dims = made.graph.input[0].type.tensor_type.shape.dim
    for axis in (0, 2, 3):
        dims[axis].dim_value = free
    with pytest.raises(UnsupportedModelError, match=r"numbers or ranges, for x.2, x.3"):
        imported(made)
    net = imported(made, sizes={"x.2": (8, 16, 8), "x.3": 9})
    np.testing.assert_allclose(net(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-4)


def quantized(*nodes: Any, **constants: Any) -> Any:
    """x → Q → the nodes from q to y."""
    held = {"s": np.float32(0.0625), "z": np.uint8(117), **constants}
    first = op("QuantizeLinear", "x s z", "q")
    return model([first, *nodes], inputs={"x": ["N", 4, 4]}, outputs=["y"], constants=held)


def test_what_is_cut_out_of_integers_is_their_0() -> None:
    """Not the zero point, which is 0 in real numbers."""
    made = quantized(op("Trilu", "q", "t"), op("DequantizeLinear", "t s z", "y"))
    x = floats(2, 4, 4)
    levels = np.triu(np.clip(np.rint(x / 0.0625) + 117, 0, 255))
    wanted = (levels - 117) * 0.0625
    np.testing.assert_array_equal(imported(made)(torch.from_numpy(x)).numpy(), wanted)


def test_half_precision_begins_where_the_file_says() -> None:
    made = quantized(op("DequantizeLinear", "q h z", "y"), h=np.float16(0.0625))
    made.graph.output[0].type.tensor_type.elem_type = T.FLOAT16
    x = torch.from_numpy(floats(2, 4, 4))
    got = imported(made)(x)
    wanted = by_runtime(made.SerializeToString(), x)[0]
    assert got.dtype == torch.float16
    np.testing.assert_array_equal(got.numpy(), wanted)


def _body(kind: str, *constants: Any) -> Any:
    info = onnx.helper.make_tensor_value_info("o", T.FLOAT, None)
    nodes = [op(kind, " ".join(["r", *(c.name for c in constants)]), "o")]
    return onnx.helper.make_graph(nodes, "body", [], [info], list(constants))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_branch_that_is_known_is_followed(axes: int) -> None:
    """As torch's older exporter writes a squeeze: it asks for the number of axes, or for a size."""
    axis = onnx.numpy_helper.from_array(np.array([1]), "axis")
    made = model(
        [
            # (Behind what its branches read, whatever the order in the file.)
            op("If", "c", "y", then_branch=_body("Squeeze", axis), else_branch=_body("Neg")),
            op("Shape", "x", "s"), op("Size", "s", "n"), op("Equal", "n three", "c"),
            op("Relu", "x", "r"),
        ],
        inputs={"x": ["N", 1, 4][:axes]}, outputs=["y"], constants={"three": np.int64(3)},
    )  # fmt: skip
    x = torch.from_numpy(floats(*[2, 1, 4][:axes]))
    wanted = x.relu().squeeze(1) if axes == 3 else -x.relu()
    assert torch.equal(imported(made)(x), wanted)


def test_a_branch_that_is_not_known_is_refused() -> None:
    made = model(
        [op("Relu", "x", "r"), op("ReduceMax", "x", "m", keepdims=0), op("Greater", "m zero", "c"),
         op("If", "c", "y", then_branch=_body("Neg"), else_branch=_body("Abs"))],
        inputs={"x": ["N", 3]}, outputs=["y"], constants={"zero": np.float32(0)},
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="If → y: its condition is computed while"):
        imported(made)
    for body, said in ((_body("Loop"), "not supported: Loop "), (_body("Nothing"), "Nothing")):
        made.graph.node[3].attribute[0].g.CopyFrom(body)
        made.graph.node[3].attribute[1].g.CopyFrom(body)
        made.graph.node[3].input[0] = "yes"
        if not any(t.name == "yes" for t in made.graph.initializer):
            made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
        with pytest.raises(UnsupportedModelError, match=said):
            imported(made)


def test_loops_are_refused_by_name() -> None:
    info = onnx.helper.make_tensor_value_info("o", T.FLOAT, None)
    body = onnx.helper.make_graph([op("Relu", "x", "o")], "body", [], [info])
    made = model(
        [op("Loop", "- c", "y", body=body)],
        inputs={"x": ["N", 3]}, outputs=["y"], constants={"c": np.array(True)},
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="not supported: Loop "):
        imported(made)
