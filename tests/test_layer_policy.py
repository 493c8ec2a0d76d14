"""Drop-in layers that run torch's float kernel where a clock says that it is faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.nn import Conv2d, ConvTranspose2d, Linear, choices, set_policy
from adalayer_native.nn import policy as policies


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(2, 8, 9, 10)
    uneven = Conv2d.from_float(nn.Conv2d(8, 12, 3, 2), 4, input_range=(-3, 3), activation="relu")
    uneven.padding = (0, 1, 2, 1)
    up = nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2)
    return {
        "conv": (Conv2d.from_float(nn.Conv2d(8, 12, 3, padding=1), 8, input_range=(-3, 3)), image),
        "uneven": (uneven, image),
        "depthwise": (
            Conv2d.from_float(nn.Conv2d(8, 8, 3, groups=8), 3, input_range=(-3, 3)),
            image.contiguous(memory_format=torch.channels_last),
        ),
        "transposed": (ConvTranspose2d.from_float(up, 5, input_range=(-3, 3)), image),
        "linear": (
            Linear.from_float(nn.Linear(10, 7), 4, input_range=(-3, 3), activation=(-1, 1)),
            image,
        ),
    }


@pytest.fixture(params=["float", "native"])
def clock(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Says that one of the kernels is faster, whatever was measured."""
    order = [1.0, 2.0] if request.param == "native" else [2.0, 1.0]

    def medians(run: Any, samples: Any) -> list[float]:
        assert all(len(found) == 5 for found in samples)
        return order

    monkeypatch.setattr(policies, "map", medians, raising=False)
    return str(request.param)


@torch.no_grad()
@pytest.mark.parametrize("name", layers())
def test_the_faster_kernel_runs(name: str, clock: str) -> None:
    layer, x = layers()[name]
    want = layer(x)
    assert "policy" not in repr(layer)
    set_policy(layer, "fastest")
    assert "policy=fastest" in repr(layer)
    for _ in range(2):
        got = layer(x)
        assert got.stride() == want.stride() and got.dtype == want.dtype
        if clock == "native":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ((size, choice),) = choices(layer)[""].items()
    assert choice.kernel == clock and size[0] == tuple(x.shape)
    assert (choice.native_us, choice.float_us) == ((1, 2) if clock == "native" else (2, 1))
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "bias", "input_qparams"}
    assert not list(layer.children())
    # Other types, and whoever traces, have the operator.
    assert layer(x.half()).dtype == torch.float16
    assert len(choices(layer)[""]) == 1
    set_policy(layer, "native")
    assert torch.equal(layer(x), want) and choices(layer) == {}


@torch.no_grad()
@pytest.mark.parametrize("clock", ["float"], indirect=True)
def test_residual_and_output_grid(clock: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x) + x)
            return self.b(y) + y

    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 7)
    model = Block().eval()
    layer = ada.LayerPlan
    plan = ada.Plan({"a": layer("a", "conv2d", 576, 8), "b": layer("b", "conv2d", 64, 4)})
    prepared = ada.prepare(model, plan, x)
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    want = native(x)
    set_policy(native, "fastest")
    got = native(x)
    # A value near the middle of two levels may become the other one.
    assert float((got - want).abs().mean()) < 1e-3
    assert {each.kernel for sizes in choices(native).values() for each in sizes.values()} == {
        "float"
    }
    assert torch.equal(copy.deepcopy(native)(x), got)
    # Engines are made of integers as before.
    engine = ada.compile(native, x, policy="native", weights="streamed")
    assert torch.equal(engine(x), want)


@torch.no_grad()
@pytest.mark.parametrize("clock", ["float"], indirect=True)
def test_other_weights_are_used_at_once(clock: str) -> None:
    torch.manual_seed(0)
    one, other = (Conv2d.from_float(nn.Conv2d(8, 8, 3), 4, input_range=(-2, 2)) for _ in range(2))
    x = torch.randn(1, 8, 6, 6)
    set_policy(one, "fastest")
    one(x)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


def test_other_weights_of_inference_tensors(clock: str) -> None:
    """They count no versions."""
    torch.manual_seed(0)
    with torch.inference_mode():
        one, other = (
            Conv2d.from_float(nn.Conv2d(8, 8, 3), 4, input_range=(-2, 2)) for _ in range(2)
        )
        x = torch.randn(1, 8, 6, 6)
        set_policy(one, "fastest")
        one(x)
        one.load_state_dict(other.state_dict())
        torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_padding_is_used_at_once(clock: str) -> None:
    torch.manual_seed(0)
    layer = Conv2d.from_float(nn.Conv2d(8, 8, 3), 4, input_range=(-2, 2))
    x = torch.randn(1, 8, 6, 6)
    set_policy(layer, "fastest")
    assert layer(x).shape[-1] == 4
    layer.padding = (1, 1, 1, 1)
    assert layer(x).shape[-1] == 6


@torch.no_grad()
def test_the_table_of_sizes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Conv2d.from_float(nn.Conv2d(3, 4, 3), 4, input_range=(-2, 2))
    set_policy(layer, "fastest")
    sizes = range(5, 5 + policies.MOST_SIZES)
    for size in sizes:
        layer(torch.randn(1, 3, size, size))
    known = choices(layer)[""]
    assert len(known) == policies.MOST_SIZES
    monkeypatch.setattr(layer.fastest, "_in_float", None)  # no more trials
    table = layer.fastest.choices
    for key, found in table.items():
        table[key] = policies.Choice("native", found.native_us, found.float_us)
    layer(torch.randn(1, 3, 40, 40))
    assert list(choices(layer)[""]) == list(known)
    nearest = layer.fastest._nearest(((1, 3, 40, 40), False, 0, ops.get_num_threads()), 4800)
    assert nearest is table[((1, 3, sizes[-1], sizes[-1]), False, 0, ops.get_num_threads())]


def test_gradients_are_refused_in_either_kernel() -> None:
    layer = Conv2d.from_float(nn.Conv2d(3, 4, 3), 4, input_range=(-2, 2))
    set_policy(layer, "fastest")
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backward through the native layer"):
            layer(x).sum().backward()


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="policy must be one of"):
        set_policy(nn.Identity(), "quick")
