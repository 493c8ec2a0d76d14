"""Files that leave height and width free stay so, or it is said why not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import InputError, UnsupportedModelError
from tests.helpers_onnx import by_runtime, converted, imported, model, node

RANDOM = np.random.default_rng(12)
SIZES = ((32, 32), (48, 96), (96, 32), (80, 64))


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(floats(count, 3, height, width))


class Ladder(nn.Module):
    """Down and up again, to the sizes of what came before; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(8, 8, 3, padding=1)
        self.joined = nn.Conv2d(16, 8, 1)
        self.map, self.head = nn.Conv2d(8, 2, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x).relu()
        y = F.max_pool2d(self.down(x).relu(), 2, ceil_mode=True)
        y = F.interpolate(self.bottom(y).relu(), scale_factor=2.0, mode="nearest")
        y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        y = self.joined(torch.cat([x, y], 1)).relu()
        return self.map(y).flatten(2), self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Any:
    """The ladder with batch, height and width free."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sizes") / "ladder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        torch.onnx.export(
            Ladder().eval(), (images(32, 32),), str(path), opset_version=17, dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "N", 2: "height", 3: "width"}},
        )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "sizes",
    [(32, 96, 16), ada.Size(32, 96, 16), {"height": (32, 96, 16), "x.3": ada.Size(32, 96, 32)}],
)
def test_any_size_of_the_range(file: Any, sizes: Any) -> None:
    net = ada.from_onnx(file, sizes=sizes)
    for height, width in SIZES:
        x = images(height, width)
        with torch.no_grad():
            got = net(x)
        for mine, wanted in zip(got, by_runtime(str(file), x), strict=True):
            np.testing.assert_allclose(mine.numpy(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"'x': expected sizes \[any, 3, 32 to 96 by 16, 32 to 96"):
        net(images(40, 32))
    with pytest.raises(InputError, match=r"got \[2, 3, 32, 128\]"):
        net(images(32, 128))


def test_an_engine_of_all_sizes(file: Any) -> None:
    """Through capture and conversion, with the bits of an engine of one size."""
    net = ada.from_onnx(file, sizes=(32, 96, 16))
    native = converted(net, images(32, 32, 4))
    engine = ada.compile(native, images(32, 32, 1), sizes=(32, 96, 16), strict=True)
    for height, width in SIZES:
        x = images(height, width)
        with torch.no_grad():
            wanted = native(x)
        assert all(torch.equal(a, b) for a, b in zip(engine(x), wanted, strict=True))


def test_one_size_stays_one(file: Any) -> None:
    net = ada.from_onnx(file, sizes=64)
    with pytest.raises(InputError, match=r"expected sizes \[any, 3, 64, 64\], got"):
        net(images(32, 32))
    with pytest.raises(UnsupportedModelError, match=r"x.shape\[2\] == 64, which height 32, "):
        ada.compile(converted(net, images(64, 64)), images(64, 64), sizes=(32, 64, 32))


def quantized() -> Any:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws"], ["wf"]),
        node("Conv", ["d", "wf"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {
        "s": np.float32(0.03), "z": np.uint8(128), "ws": np.float32(0.01),
        "w": RANDOM.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8),
    }  # fmt: skip
    return model(nodes, inputs={"x": ["N", 3, "h", "w"]}, outputs=["y"], constants=constants)


def test_a_quantized_file() -> None:
    net = imported(quantized(), sizes=(8, 24))
    assert isinstance(net.get_submodule("y_node"), ada.nn.Conv2d)
    engine = ada.compile(net, images(8, 8), sizes=(8, 24), strict=True)
    for height, width in ((8, 8), (9, 24), (17, 11)):
        x = images(height, width)
        assert torch.equal(engine(x), net(x))


def same_padding() -> Any:
    return model(
        [node("Conv", ["x", "w"], ["y"], strides=[2, 2], auto_pad="SAME_UPPER")],
        inputs={"x": ["N", 3, "h", "w"]}, outputs=["y"], constants={"w": floats(4, 3, 3, 3)},
    )  # fmt: skip


def test_padding_that_follows_the_size() -> None:
    made = same_padding()
    with pytest.raises(
        UnsupportedModelError, match=r"Conv y_node: what it does depends on .* height 9"
    ):
        imported(made, sizes=(8, 24))
    net = imported(made, sizes=(8, 24, 2))
    for height, width in ((8, 8), (10, 24)):
        x = images(height, width)
        wanted = by_runtime(made.SerializeToString(), x)[0]
        np.testing.assert_allclose(net(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_wants_one_size() -> None:
    made = model(
        [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "w"], ["y"])],
        inputs={"x": ["N", 3, "h", "w"]}, outputs=["y"], constants={"w": floats(192, 5)},
    )  # fmt: skip
    with pytest.raises(
        UnsupportedModelError, match=r"MatMul y_node: .* \(at height 9, width 9; give"
    ):
        imported(made, sizes=(8, 24))
    assert imported(made, sizes=8)(images(8, 8)).shape == (2, 5)


@pytest.mark.parametrize("how", ["align_corners", "half_pixel"])
def test_resizing_by_a_factor(how: str) -> None:
    made = model(
        [node("Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode=how)],
        inputs={"x": ["N", 3, "h", "w"]}, outputs=["y"],
        constants={"s": np.float32([1, 1, 2, 2])},
    )  # fmt: skip
    net = imported(made, sizes=(4, 20))
    for height, width in ((4, 5), (11, 20)):
        x = images(height, width)
        wanted = by_runtime(made.SerializeToString(), x)[0]
        np.testing.assert_allclose(net(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_halves_of_an_image() -> None:
    """Sizes of pieces that the graph computes from those of the image."""
    made = model(
        [
            node("Shape", ["x"], ["s"], start=3), node("Div", ["s", "two"], ["l"]),
            node("Sub", ["s", "l"], ["r"]), node("Concat", ["l", "r"], ["p"], axis=0),
            node("Split", ["x", "p"], ["a", "b"], axis=3),
            node("Concat", ["b", "a"], ["y"], axis=3),
        ],
        inputs={"x": ["N", 3, "h", "w"]}, outputs=["y"], constants={"two": np.array([2])},
    )  # fmt: skip
    net = imported(made, sizes=(4, 20))
    for height, width in ((4, 5), (11, 20)):
        x = images(height, width)
        assert torch.equal(net(x), torch.roll(x, -(width // 2), 3))


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((8,), "expected whole numbers from 1, or ranges"),
        ((24, 8), "expected whole numbers from 1, or ranges"),
        (True, "got True for height and width"),
        ({"h": 0}, "got 0 for h"),
        ({"h": (8, 16), "depth": 8}, "depth is no axis of an input; expected some of N, h, w, x.0"),
        ({"x.1": 4, "h": 8, "w": 8}, "x.1 is 3 in the file, got 4"),
        ({"h": (8, 16)}, r"numbers or ranges, for x.3 \(w\)"),
        ({"h": ada.Size(8, 16, name="side"), "w": ada.Size(8, 24, name="side")}, "side is both"),
    ],
)
def test_sizes_that_make_no_sense(sizes: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        imported(same_padding(), sizes=sizes)


def test_a_range_for_a_file_of_one_size() -> None:
    made = model([node("Relu", ["x"], ["y"])], inputs={"x": ["N", 3, 8, 8]}, outputs=["y"])
    with pytest.raises(UnsupportedModelError, match=r"got 8..24, but no input leaves height and"):
        imported(made, sizes=(8, 24))


def test_axes_of_one_name_are_one() -> None:
    """As torch.export has it for networks that want squares."""
    side = ada.Size(8, 16, 2, name="side")
    net = imported(same_padding(), sizes={"h": side, "w": side})
    assert net(images(12, 12)).shape == (2, 4, 6, 6)
