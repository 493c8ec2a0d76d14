"""ONNX files beyond one batch: the same for every number of samples, or refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from helpers_onnx import by_runtime, imported, model, node
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.errors import InputError, UnsupportedModelError

FREE = {"x": ["N", 3]}
IMAGE = {"x": [1, 4, 6, 6]}


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("Gather", ["x", "i"], ["y"], axis=0)], {"i": whole(-1)}),
        ([node("GatherElements", ["x", "i"], ["y"], axis=0)], {"i": whole(-1, -1, 0)[None]}),
        (
            [node("Slice", ["x", "a", "b", "c", "d"], ["y"])],
            {"a": whole(-1), "b": whole(-(2**63)), "c": whole(0), "d": whole(-1)},
        ),
        (
            [
                node("Split", ["x"], ["a", "b"], axis=0, num_outputs=2),
                node("Sub", ["a", "b"], ["y"]),
            ],
            {},
        ),
    ],
)
def test_what_counts_samples_of_a_free_batch_is_refused(
    nodes: list[Any], constants: dict[str, Any]
):
    made = model(nodes, inputs=FREE, outputs=["y"], constants=constants)
    with pytest.raises(UnsupportedModelError, match="depends on the number of samples"):
        imported(made)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ReduceMean", ["x"], ["m"]), node("Sub", ["x", "m"], ["y"])],
        [
            node("Abs", ["x"], ["a"]),
            node("ReduceMax", ["a"], ["m"], keepdims=0),
            node("Div", ["x", "m"], ["y"]),
        ],
        [
            node("Transpose", ["x"], ["t"], perm=[1, 2, 3, 0]),
            node("Softmax", ["t"], ["s"], axis=-1),
            node("Transpose", ["s"], ["y"], perm=[3, 0, 1, 2]),
        ],
        [node("LpNormalization", ["x"], ["y"], axis=0)],
    ],
)
def test_samples_of_a_fixed_batch_that_know_of_each_other_are_refused(nodes: list[Any]):
    made = model(nodes, inputs=IMAGE, outputs=["y"], opset=18)
    with pytest.raises(UnsupportedModelError, match=r"for a batch of 1 alone.*know of each other"):
        imported(made)


def test_a_first_sample_that_all_are_added_to_is_refused():
    nodes = [node("Slice", ["x", "a", "b", "c"], ["p"]), node("Add", ["x", "p"], ["y"])]
    constants = {"a": whole(0), "b": whole(1), "c": whole(0)}
    with pytest.raises(UnsupportedModelError, match="know of each other"):
        imported(model(nodes, inputs=IMAGE, outputs=["y"], constants=constants))


def test_a_fixed_batch_whose_samples_are_apart_is_any_batch():
    weight = np.random.RandomState(0).randn(4, 4, 3, 3).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("ReduceMean", ["c"], ["m"], axes=[1, 2, 3]),
        node("Sub", ["c", "m"], ["y"]),
    ]
    made = model(nodes, inputs=IMAGE, outputs=["y"], constants={"w": weight}, opset=13)
    x = torch.randn(5, 4, 6, 6)
    want = np.concatenate([by_runtime(made.SerializeToString(), row[None])[0] for row in x])
    np.testing.assert_allclose(imported(made)(x).detach().numpy(), want, rtol=1e-4, atol=1e-5)


class ClassToken(nn.Module):
    """What vision transformers begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter that many files are from
@pytest.mark.parametrize("free", [True, False])
def test_class_tokens_by_the_older_exporter(free: bool):
    network, file = ClassToken().eval(), io.BytesIO()
    torch.onnx.export(
        network, (torch.randn(2 if free else 1, 3, 8, 8),), file, opset_version=17, dynamo=False,
        input_names=["x"], dynamic_axes={"x": {0: "n"}} if free else None,
    )  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ada.from_onnx(file.getvalue())(x), network(x))


@pytest.mark.parametrize(
    ("nodes", "constant", "function"),
    [
        ([node("Sub", ["s", "c"], ["d"]), node("Abs", ["d"], ["e"])], (9, 7), lambda c, h: abs(h)),
        (
            [node("Sub", ["s", "c"], ["d"]), node("Sign", ["d"], ["e"])],
            (9, 7),
            lambda c, h: np.sign(h),
        ),
        ([node("Neg", ["s"], ["d"]), node("Div", ["d", "c"], ["e"])], (2, 2), None),
        ([node("Min", ["s", "c"], ["e"])], (2, 9), None),
        ([node("Max", ["s", "c"], ["e"])], (2, 9), None),
    ],
)
def test_arithmetic_on_sizes(nodes: list[Any], constant: tuple[int, int], function: Any):
    every = [
        node("Shape", ["x"], ["s"], start=1, end=3),
        *nodes,
        node("Cast", ["e"], ["f"], to=1),
        node("ReduceSum", ["f"], ["r"], keepdims=0),
        node("Add", ["x", "r"], ["y"]),
    ]
    made = model(every, inputs={"x": ["N", 4, 5]}, outputs=["y"], constants={"c": whole(*constant)})
    x = torch.randn(3, 4, 5)
    want = by_runtime(made.SerializeToString(), x)[0]
    np.testing.assert_allclose(imported(made)(x).detach().numpy(), want, rtol=1e-6)


def test_names_that_python_and_modules_have_for_something_else():
    weight = np.random.RandomState(0).randn(4, 3, 1, 1).astype(np.float32)
    x = torch.randn(2, 3, 5, 5)
    for name in ("forward.weight", "train.weight", "constants.weight", "type.weight"):
        nodes = [node("Conv", ["x", name], ["c"]), node("Add", ["c", "forward"], ["y"])]
        made = model(
            nodes, inputs={"x": ["N", 3, 5, 5]}, outputs=["y"],
            constants={name: weight, "forward": np.ones((1, 4, 5, 5), np.float32)},
        )  # fmt: skip
        want = by_runtime(made.SerializeToString(), x)[0]
        np.testing.assert_allclose(imported(made)(x).detach().numpy(), want, rtol=1e-4, atol=1e-5)
    for pair in (("a.b", "a_b"), ("self", "torch"), ("float", "int")):
        made = model(
            [node("Sub", list(pair), ["y"])],
            inputs={name: ["N", 3] for name in pair},
            outputs=["y"],
        )
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        assert torch.equal(imported(made)(a, b), a - b)


def test_values_as_onnx_runtime_has_them():
    x = torch.tensor([[[[-1.5, 2.0], [float("nan"), 0.0]]]])
    for kind in ("Sign", "ThresholdedRelu"):
        made = model([node(kind, ["x"], ["y"])], inputs={"x": ["N", 1, 2, 2]}, outputs=["y"])
        np.testing.assert_array_equal(
            imported(made)(x).numpy(), by_runtime(made.SerializeToString(), x)[0]
        )
    for kind in ("ReduceSumSquare", "ReduceLogSum", "ReduceL1", "ReduceL2"):
        made = model(
            [node(kind, ["x", "a"], ["y"], noop_with_empty_axes=1)],
            inputs={"x": ["N", 2]}, outputs=["y"], constants={"a": whole()}, opset=18,
        )  # fmt: skip
        v = torch.tensor([[2.0, 3.0]])
        want = by_runtime(made.SerializeToString(), v)[0]
        np.testing.assert_allclose(imported(made)(v).numpy(), want, rtol=1e-6)
    made = model(
        [node("LpNormalization", ["x"], ["y"], axis=-1)], inputs={"x": ["N", 3]}, outputs=["y"]
    )
    tiny = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]) * 1e-15
    torch.testing.assert_close(imported(made)(tiny)[0], torch.tensor([1.0, 2.0, 2.0]) / 3)
    assert not imported(made)(tiny)[1].any()


def test_an_even_window_of_channels_reaches_further_behind():
    made = model(
        [node("LRN", ["x"], ["y"], size=4, alpha=0.5)], inputs={"x": ["N", 6, 2, 2]}, outputs=["y"]
    )
    x = torch.rand(2, 6, 2, 2)
    squares = x.square()
    for channel in range(6):
        total = squares[:, max(0, channel - 1) : channel + 3].sum(1)
        want = x[:, channel] / (1 + 0.5 / 4 * total) ** 0.75
        torch.testing.assert_close(imported(made)(x)[:, channel], want)


@pytest.mark.parametrize("opset", [10, 13])
@pytest.mark.parametrize(("size", "out"), [(24, 22), (12, 7), (5, 13), (9, 4)])
def test_the_pixel_that_onnx_runtime_takes(opset: int, size: int, out: int):
    """Where places are rounded, the last bit of float32 decides."""
    factor = np.array([1, 1, out / size, out / size], np.float32)
    names = ["x", "f"] if opset == 10 else ["x", "", "f"]
    modes = {} if opset == 10 else {
        "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor",
    }  # fmt: skip
    made = model(
        [node("Resize", names, ["y"], mode="nearest", **modes)],
        inputs={"x": ["N", 1, size, size]}, outputs=["y"], constants={"f": factor}, opset=opset,
    )  # fmt: skip
    x = torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size)
    want = by_runtime(made.SerializeToString(), x)[0]
    np.testing.assert_array_equal(imported(made)(x).detach().numpy(), want)


def test_sizes_and_nodes_that_are_none():
    weight = {"w": np.ones((4, 3, 3, 3), np.float32)}
    free = model([node("Conv", ["x", "w"], ["y"])], inputs={"x": ["N", 3, "H", "W"]},
                 outputs=["y"], constants=weight)  # fmt: skip
    for sizes, text in (
        ("32", "whole numbers from 1, or ranges .*, got '32'"),
        ({"H": 32.0, "W": 32}, "got 32.0 for H"),
        (True, "got True"),
        ({"H": 0, "W": 3}, "got 0 for H"),
        ({"H": 16, "W": 16, "typo": 3}, "typo is no axis of an input; expected some of H, N, W"),
    ):
        with pytest.raises(UnsupportedModelError, match=text):
            imported(free, sizes=sizes)
    image = {"x": [1, 3, 8, 8]}
    for broken, text in (
        (node("Conv", ["x"], ["y"]), "1 inputs are too many or too few"),
        (node("Relu", ["x", "x"], ["y"]), "2 inputs are too many or too few"),
        (node("MaxPool", ["x"], ["y"]), "not those of such an operator"),
        (node("Conv", ["x", "w"], ["y"], pads=[1, 1]), "not those of such an operator"),
        (node("Conv", ["x", "w"], ["y"], kernel_shape=[5, 5]), r"kernel_shape \[5, 5\]"),
    ):
        with pytest.raises(UnsupportedModelError, match=text):
            imported(model([broken], inputs=image, outputs=["y"], constants=weight))
    flat = imported(model([node("Relu", ["x"], ["y"])], inputs={"x": [3]}, outputs=["y"]))
    with pytest.raises(InputError, match="input 'x'"):
        flat(torch.rand(2, 4))
