"""Files that are damaged, hostile or not supported: errors that name file and node."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch

import adalayer_native as ada
from adalayer_native.errors import FileFormatError, MissingExtraError, UnsupportedModelError
from tests.helpers_onnx import FLOAT, imported, model, node, onnx

WEIGHT = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)


def small(**options):
    """A convolution of 3 to 4 channels and a relu."""
    return model(
        [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["y"])],
        inputs={"x": [1, 3, 8, 8]},
        outputs=["y"],
        constants={"w": WEIGHT},
        **options,
    )


def test_no_such_file(tmp_path):
    with pytest.raises(FileFormatError, match=r"nothing\.onnx: does not exist; expected a file"):
        ada.from_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(FileFormatError, match="is a directory; expected a file"):
        ada.from_onnx(tmp_path)


def test_truncated(tmp_path):
    data = small().SerializeToString()
    path = tmp_path / "cut.onnx"
    for count in range(0, len(data), 7):
        path.write_bytes(data[:count])
        with pytest.raises((FileFormatError, UnsupportedModelError), match=r"cut\.onnx: "):
            ada.from_onnx(path)


def test_random_bytes():
    source = random.Random(5)
    for count in (0, 1, 8, 100, 5000):
        with pytest.raises((FileFormatError, UnsupportedModelError)):
            ada.from_onnx(source.randbytes(count))


def test_one_byte_wrong_is_an_error_of_ours_or_harmless():
    data, source = bytearray(small().SerializeToString()), random.Random(6)
    refused = 0
    for _ in range(60):
        place = source.randrange(len(data))
        damaged = bytes(data[:place]) + source.randbytes(1) + bytes(data[place + 1 :])
        try:
            ada.from_onnx(damaged)
        except (FileFormatError, UnsupportedModelError):
            refused += 1
    assert refused


def external(location, **entries):
    """The small model with its weight in another file."""
    made = small()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return made.SerializeToString()


def test_external_data(tmp_path):
    path = tmp_path / "net.onnx"
    (tmp_path / "net.data").write_bytes(b"pad!" + WEIGHT.tobytes())
    path.write_bytes(external("net.data", offset=4, length=WEIGHT.nbytes))
    net = ada.from_onnx(path)
    assert torch.equal(net.get_submodule("c_node").weight, torch.from_numpy(WEIGHT))


@pytest.mark.parametrize(
    ("location", "entries", "match"),
    [
        ("missing.data", {}, "missing.data.*No such file"),
        ("../net.data", {}, "not below the model's own folder"),
        ("/etc/passwd", {}, "not below the model's own folder"),
        ("link", {}, "not below the model's own folder"),
        ("", {}, "not below the model's own folder"),
        ("net.data", {"offset": 400}, "expected 432 bytes"),
        ("net.data", {"offset": -4}, "expected 432 bytes"),
        ("net.data", {"length": 12}, "expected 432 bytes"),
        ("net.data", {"offset": "four"}, "whole numbers"),
    ],
)
def test_external_data_that_is_wrong(tmp_path, location, entries, match):
    folder = tmp_path / "inner"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "net.data").write_bytes(WEIGHT.tobytes())
    (folder / "link").symlink_to(tmp_path / "net.data")
    path = folder / "net.onnx"
    path.write_bytes(external(location, **entries))
    with pytest.raises(FileFormatError, match=rf"(?s)net\.onnx: tensor 'w'.*{match}"):
        ada.from_onnx(path)


def test_bytes_have_no_other_file():
    with pytest.raises(FileFormatError, match="give the path"):
        ada.from_onnx(external("net.data"))


def test_unknown_operators_are_all_named():
    made = model(
        [
            node("NonZero", ["x"], ["a"]),
            node("Relu", ["x"], ["b"]),
            onnx.helper.make_node("Magic", ["b"], ["y"], name="wand", domain="com.example"),
        ],
        inputs={"x": [1, 3]},
        outputs=["a", "y"],
    )
    with pytest.raises(
        UnsupportedModelError, match=r"NonZero \(first: 'a_node'\), com.example.Magic.*'wand'"
    ):
        imported(made)


@pytest.mark.parametrize("opset", [1, 6, 29, 1000])
def test_opset(opset):
    made = small()
    made.opset_import[0].version = opset
    with pytest.raises(UnsupportedModelError, match=f"opset {opset} is not supported, expected 7"):
        imported(made)


def test_circle():
    made = model(
        [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["x"], ["y"])],
        inputs={"x": [1, 3]},
        outputs=["y"],
    )
    with pytest.raises(FileFormatError, match=r"in a circle: Add a_node, Relu b_node"):
        imported(made)


def test_order_in_the_file_does_not_matter():
    made = model(
        [node("Neg", ["a"], ["y"]), node("Relu", ["x"], ["a"])],
        inputs={"x": [1, 3]},
        outputs=["y"],
    )
    x = torch.tensor([[-1.0, 2.0, 3.0]])
    assert torch.equal(imported(made)(x), -x.relu())


@pytest.mark.parametrize(
    ("nodes", "outputs", "match"),
    [
        ([node("Relu", ["nowhere"], ["y"])], ["y"], "Relu y_node reads 'nowhere', which nothing"),
        ([node("Relu", ["x"], ["y"])], ["z"], "nothing gives its output 'z'"),
        ([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], ["y"], "'y' is computed twice"),
        ([node("Relu", ["x"], ["x"])], ["x"], "'x' is computed twice"),
    ],
)
def test_graph_that_contradicts_itself(nodes, outputs, match):
    with pytest.raises(FileFormatError, match=match):
        imported(model(nodes, inputs={"x": [1, 3]}, outputs=outputs))


def test_free_sizes_have_to_be_given():
    made = model(
        [node("Conv", ["x", "w"], ["y"])],
        inputs={"x": ["batch", 3, "height", None]},
        outputs=["y"],
        constants={"w": WEIGHT},
    )
    with pytest.raises(UnsupportedModelError, match=r"sizes=.* for x.2 \(height\), x.3"):
        imported(made)
    for sizes in ({"height": 8, "x.3": 8}, 8):
        net = imported(made, sizes=sizes)
        assert net(torch.zeros(5, 3, 8, 8)).shape == (5, 4, 6, 6)


def test_input_without_shape_or_of_another_kind():
    made = small()
    made.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedModelError, match="input 'x': expected a tensor with a number"):
        imported(made)


def test_huge_constant():
    made = small()
    tensor = made.graph.initializer[0]
    tensor.dims[:] = [1 << 20, 1 << 20, 3, 3]
    with pytest.raises(UnsupportedModelError, match=r"tensor 'w' of sizes .* not supported"):
        imported(made)
    tensor.dims[:] = [4, 3, 3, 4]
    with pytest.raises(FileFormatError, match=r"tensor 'w' .* expected 576 bytes, got 432"):
        imported(made)
    tensor.dims[:] = [4, 3, 3, -3]
    with pytest.raises(FileFormatError, match="tensor 'w' has sizes"):
        imported(made)


def test_small_file_that_asks_for_a_huge_constant():
    made = model(
        [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])],
        inputs={"x": [1, 3]},
        outputs=["y"],
        constants={"s": np.array([1 << 20, 1 << 20, 3])},
    )
    with pytest.raises(UnsupportedModelError, match="ConstantOfShape c_node: it makes a constant"):
        imported(made)


def test_a_file_of_more_than_two_gigabytes(tmp_path):
    path = tmp_path / "huge.onnx"
    path.touch()
    os.truncate(path, 1 << 31)  # of holes
    with pytest.raises(
        FileFormatError, match=r"huge\.onnx: has 2147483648 bytes; expected at most"
    ):
        ada.from_onnx(path)


def test_sizes_that_double_and_square():
    for kind, count, match in (("Concat", 30, "a list of 131072 sizes"), ("Mul", 30, "bits")):
        attributes = {"axis": 0} if kind == "Concat" else {}
        nodes = [node("Shape", ["x"], ["s0"])]
        nodes += [node(kind, [f"s{i}", f"s{i}"], [f"s{i + 1}"], **attributes) for i in range(count)]
        nodes += [node("Cast", [f"s{count}"], ["y"], to=FLOAT)]
        made = model(nodes, inputs={"x": ["N", 3]}, outputs=["y"])
        with pytest.raises(UnsupportedModelError, match=f"{kind} s.*{match}"):
            imported(made)


def test_functions_that_call_each_other_twice():
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("d", 1)]
    functions = []
    for i in range(30):
        kind, domain = (f"F{i + 1}", "d") if i < 29 else ("Relu", "")
        body = [
            onnx.helper.make_node(kind, [a], [b], domain=domain)
            for a, b in (("a", "t"), ("t", "b"))
        ]
        functions.append(onnx.helper.make_function("d", f"F{i}", ["a"], ["b"], body, opsets))
    made = model([node("F0", ["x"], ["y"], domain="d")], inputs={"x": [1, 3]}, outputs=["y"])
    made.functions.extend(functions)
    made.opset_import.append(opsets[1])
    with pytest.raises(UnsupportedModelError, match=r"\d{10} nodes with its functions in place"):
        imported(made)
    del made.functions[:]
    body = [onnx.helper.make_node("F0", ["a"], ["b"], domain="d")]
    made.functions.append(onnx.helper.make_function("d", "F0", ["a"], ["b"], body, opsets))
    with pytest.raises(FileFormatError, match="its functions cannot be inlined: Cycle"):
        imported(made)


def test_shapes_that_do_not_fit_name_the_node():
    made = model(
        [node("Conv", ["x", "w"], ["y"])],
        inputs={"x": [1, 5, 8, 8]},
        outputs=["y"],
        constants={"w": WEIGHT},
    )
    with pytest.raises(UnsupportedModelError, match=r"bytes of ONNX: Conv y_node: "):
        imported(made)


def test_shape_from_values():
    made = model(
        [
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Cast", ["m"], ["i"], to=onnx.TensorProto.INT64),
            node("ConstantOfShape", ["i"], ["y"]),
        ],
        inputs={"x": [1, 3]},
        outputs=["y"],
        opset=13,
    )
    with pytest.raises(UnsupportedModelError, match="its shape is computed while the network runs"):
        imported(made)


def test_batch_that_the_operators_fix():
    made = model(
        [node("Reshape", ["x", "s"], ["a"]), node("Gather", ["a", "i"], ["y"])],
        inputs={"x": [1, 6]},
        outputs=["y"],
        constants={"s": np.array([-1]), "i": np.array([[0, 1, 3]])},
    )
    made.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", FLOAT, [1, 3]))
    with pytest.raises(UnsupportedModelError, match="'y' is computed for a batch of 1 alone"):
        imported(made)


def test_without_the_package(monkeypatch):
    for name in [key for key in sys.modules if key == "onnx" or key.startswith("onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adalayer_native\[onnx\]'"):
        ada.from_onnx(b"")
    with pytest.raises(MissingExtraError, match=r"adalayer_native\[onnx\]"):
        ada.to_onnx(torch.nn.Identity(), "x.onnx")
