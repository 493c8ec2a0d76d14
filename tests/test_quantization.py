"""Weight scales, activation grids, observers and the fake-quantized layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.nn.layer import checked_qparams
from adalayer_native.padding import four_paddings
from adalayer_native.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
)
from adalayer_native.quantization.observers import (
    HistogramObserver,
    PercentileObserver,
    make_observer,
)
from adalayer_native.rounding import activation_grid, quantize_weight, round_weight, weight_range

BITS = list(range(2, 9))


def brute_force_error(row: torch.Tensor, bits: int) -> float:
    """Smallest squared error over a very fine grid of scales."""
    low, high = weight_range(bits)
    largest = float(row.abs().max())
    scales = torch.linspace(0.02, 1.0 / high, 4000, dtype=torch.float64) * largest
    q = (row.double() / scales[:, None]).round().clamp(low, high)
    return float(((q * scales[:, None] - row) ** 2).sum(dim=1).min())


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_scale_is_close_to_the_optimum(bits: int) -> None:
    torch.manual_seed(bits)
    w = torch.cat([torch.randn(3, 200), torch.distributions.Laplace(0.0, 1.0).sample((3, 200))])
    q, scale = quantize_weight(w, bits)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (6,)
    errors = ((q * scale[:, None] - w) ** 2).sum(dim=1)
    best = [brute_force_error(row, bits) for row in w]
    # The error of a few hundred weights jitters with the scale; a grid of some 20 plus
    # refinement comes this close to one of 4000.
    assert float(errors.sum()) <= 1.04 * sum(best)
    assert all(float(e) <= 1.08 * b for e, b in zip(errors, best, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_those_of_round_weight(bits: int) -> None:
    torch.manual_seed(1)
    w = torch.randn(8, 4, 3, 3)
    mask = torch.rand(w.shape) > 0.4
    q, scale = quantize_weight(w, bits, mask)
    assert torch.equal(q.float(), round_weight(w, scale, bits, mask))
    assert q.shape == w.shape
    low, high = weight_range(bits)
    assert low <= int(q.min())
    assert int(q.max()) <= high
    assert not bool(q[~mask].any())


def test_only_kept_weights_choose_the_scale() -> None:
    w = torch.tensor([[1.0, -1.0, 100.0, 0.5]])
    mask = torch.tensor([[True, True, False, True]])
    q, scale = quantize_weight(w, 4, mask)
    assert float(scale) < 0.5
    assert int(q[0, 2]) == 0


def test_zero_channel_and_extremes() -> None:
    w = torch.zeros(5, 6)
    w[1] = 1e-38
    w[2] = 3e38
    w[3, 0] = -1.0
    w[4] = torch.linspace(-1, 1, 6)
    for bits in BITS:
        q, scale = quantize_weight(w, bits)
        assert float(scale[0]) == 1.0
        assert not bool(q[0].any())
        assert bool((scale > 0).all())
        assert bool(torch.isfinite(scale).all())
        assert torch.allclose(q[3] * scale[3], w[3])
    again = quantize_weight(w, 4, chunk=1)
    assert torch.equal(again[0], quantize_weight(w, 4)[0])


def test_weights_refuse_bad_input() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        quantize_weight(torch.tensor([[float("nan")]]), 4)
    with pytest.raises(CalibrationError, match="infinite"):
        quantize_weight(torch.tensor([[float("inf")]]), 4)
    for bits in (1, 9, True, 4.0):
        with pytest.raises(PlanError, match="bits"):
            quantize_weight(torch.ones(1, 1), bits)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="mask"):
        quantize_weight(torch.ones(2, 2), 4, torch.ones(2, 1, dtype=torch.bool))


# -- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_on_the_grid(bits: int) -> None:
    for low, high in [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-3, 1.0)]:
        scale, zero_point = activation_grid(low, high, bits)
        top = 2**bits - 1
        assert 0 <= zero_point <= top
        assert scale > 0
        if high > low:
            assert (0 - zero_point) * scale <= min(low, 0.0) + 0.51 * scale
            assert (top - zero_point) * scale >= max(high, 0.0) - 0.51 * scale
    with pytest.raises(CalibrationError, match="tensor_x"):
        activation_grid(float("nan"), 1.0, bits, "tensor_x")


@given(st.floats(-(2.0**125), 2.0**125), st.floats(-(2.0**125), 2.0**125), st.sampled_from(BITS))
@settings(deadline=None)
def test_every_range_has_a_grid_that_kernels_can_use(a: float, b: float, bits: int) -> None:
    scale, zero_point = activation_grid(min(a, b), max(a, b), bits)
    step = np.float32(scale)
    assert float(step) == scale and np.isfinite(np.float32(1) / step) and 0 <= zero_point < 2**bits
    checked_qparams(scale, zero_point, bits)


def test_a_layer_whose_inputs_are_next_to_nothing() -> None:
    for high in (1e-40, 1e-45, 5e-324):
        layer = ada.nn.Linear.from_float(nn.Linear(4, 3), 8, input_range=(0.0, high))
        x = torch.tensor([[0.0, 1.0, high, -high]])
        assert bool(torch.isfinite(layer(x)).all())
        assert torch.equal(ada.compile(layer, x)(x), layer(x))
    for range_ in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0), (-3e38, 3e40), (0.0, 3e40)):
        with pytest.raises(ValueError, match="range of the input"):
            ada.nn.Linear.from_float(nn.Linear(4, 3), 8, input_range=range_)
    with pytest.raises(ValueError, match="activation scale must be positive and finite"):
        checked_qparams(1e-40, 0, 8)


def test_quantizer_is_idempotent_and_saturates() -> None:
    quantizer = ActivationQuantizer(8, name="act_quant.x")
    x = torch.linspace(-3, 9, 5001)
    assert torch.equal(quantizer(x), x)  # not calibrated: passes through
    quantizer.set_range(-1.0, 6.0)
    y = quantizer(x)
    assert torch.equal(quantizer(y), y)
    assert len(y.unique()) == 256
    inside = (x > -1.0) & (x < 5.9)
    assert float((y - x)[inside].abs().max()) <= 0.5001 * quantizer.scale
    # levels + z are the stored bytes
    levels = quantizer.levels(x) + quantizer.zero_point
    assert int(levels.min()) == 0
    assert int(levels.max()) == 255


def test_quantizer_gradient_stops_outside() -> None:
    quantizer = ActivationQuantizer(4)
    quantizer.set_range(0.0, 1.0)
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


# -- observers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "percentile", "minmax"])
def test_observer_range_does_not_depend_on_batches(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(20000).abs() * torch.rand(20000)
    whole, parts = make_observer(kind, 8, "t"), make_observer(kind, 8, "t")
    whole.observe(x)
    for part in x.sort().values.split(1111):  # growing: the histogram must widen many times
        parts.observe(part)
    for a, b in zip(whole.range(), parts.range(), strict=True):
        assert a == pytest.approx(b, rel=0.06, abs=0.02)


def test_histogram_keeps_every_count() -> None:
    observer = HistogramObserver(8, "t")
    observer.observe(torch.zeros(7))
    for exponent in range(-5, 6):
        observer.observe(torch.randn(100) * 2.0**exponent)
    assert int(observer.bins.sum()) + observer.zeros == 7 + 1100


def test_percentile_cuts_outliers_and_mse_clips_at_few_bits() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.rand(100_000), torch.tensor([1000.0])])
    observer = PercentileObserver(8, "t", 99.9)
    observer.observe(x)
    assert observer.range()[1] < 2.0
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((50_000,))
    ranges = {}
    for bits in (2, 4, 8):
        mse = make_observer("mse", bits, "t")
        mse.observe(laplace)
        ranges[bits] = mse.range()[1] - mse.range()[0]
    assert ranges[2] < ranges[4] < ranges[8]


@pytest.mark.parametrize("kind", ["mse", "percentile", "minmax"])
def test_observers_handle_constant_and_refuse_bad_values(kind: str) -> None:
    observer = make_observer(kind, 8, "act_quant.relu")
    with pytest.raises(CalibrationError, match=r"act_quant\.relu.*no values"):
        observer.range()
    observer.observe(torch.zeros(5))
    assert observer.range() == (0.0, 0.0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match=r"act_quant\.relu: 1 of 3"):
            observer.observe(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(CalibrationError, match="floating point"):
        observer.observe(torch.ones(3, dtype=torch.int64))


def test_unknown_observer() -> None:
    with pytest.raises(CalibrationError, match="median"):
        make_observer("median", 8, "t")


# -- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_layers_compute_with_masked_quantized_weights(bits: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    mask = torch.rand(conv.weight.shape) > 0.3
    layer = QuantConv2d.from_layer(conv, bits, mask, name="conv")
    layer.refresh_scales()
    q, scale = quantize_weight(conv.weight, bits, mask)
    x = torch.randn(2, 4, 9, 9)
    weight = q * scale.view(-1, 1, 1, 1)
    expected = nn.functional.conv2d(x, weight, conv.bias, stride=2, padding=1, groups=2)
    assert torch.equal(layer(x), expected)
    assert f"bits={bits}" in repr(layer)

    linear = nn.Linear(5, 3, bias=False)
    dense = QuantLinear.from_layer(linear, bits, name="fc")
    dense.refresh_scales()
    q, scale = quantize_weight(linear.weight, bits)
    assert torch.equal(dense(torch.eye(5)), (q * scale[:, None]).T)


def test_weight_gradient_is_straight_through_and_lets_clipped_weights_return() -> None:
    linear = nn.Linear(4, 1, bias=False)
    mask = torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.3, 10.0, -10.0, 0.2]]))
    layer = QuantLinear.from_layer(linear, 2, mask)
    layer.weight_scale.fill_(0.25)
    for sign in (1.0, -1.0):
        layer.weight.grad = None
        layer(torch.full((1, 4), sign)).sum().backward()
        assert layer.weight.grad is not None
        # A step goes against the gradient: 10 may only fall, -10 may only rise; pruned stays.
        expected = [sign, 1.0, 0.0, 0.0] if sign > 0 else [sign, 0.0, -1.0, 0.0]
        assert layer.weight.grad.tolist() == [expected]


@pytest.mark.parametrize(("padding", "expected"), [("valid", (0,) * 4), ((1, 2), (1, 2, 1, 2))])
def test_four_paddings(padding: str | tuple[int, int], expected: tuple[int, ...]) -> None:
    layer = QuantConv2d.from_layer(nn.Conv2d(1, 1, 3, padding=padding), 8)
    assert four_paddings(layer) == layer.sides == expected


def test_same_padding_of_even_kernels_is_asymmetric() -> None:
    conv = nn.Conv2d(1, 1, (2, 4), padding="same", dilation=(1, 3))
    assert four_paddings(conv) == (0, 4, 1, 5)
    assert QuantConv2d.from_layer(conv, 8).sides == (0, 4, 1, 5)


def test_refresh_scales_names_the_layer() -> None:
    layer = QuantLinear.from_layer(nn.Linear(2, 2), 4, name="head.fc")
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(CalibrationError, match=r"head\.fc"):
        layer.refresh_scales()
