"""Learned step sizes: the paper's gradients, positive scales, and what trains is what converts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import batches, model, prepared_model, run, same
from torch import nn

from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization import calibrate, convert, prepare, simulate
from adalayer_native.quantization.graph import layers_of, quantizers_of
from adalayer_native.quantization.lsq import StepSize, learned_activation, learned_weight
from adalayer_native.rounding import weight_range
from adalayer_native.training.scales import (
    apply_scales,
    clip_scale_gradients,
    learn_scales,
    release_scales,
    step_sizes,
)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000), masked=st.booleans())
def test_weight_gradients_are_the_papers(bits: int, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = weight_range(bits)
    weight = torch.randn(3, 2, 2, generator=generator).requires_grad_()
    scale = torch.rand(3, generator=generator) / high + 0.01
    mask = torch.rand(3, 2, 2, generator=generator) < 0.6 if masked else None
    upstream = torch.randn(3, 2, 2, generator=generator)
    step = StepSize(scale)
    out = learned_weight(weight, step, scale, mask, bits, dense=False)
    out.backward(upstream)
    w = weight.detach()
    for channel in range(3):
        total, count = 0.0, 0
        for row in range(2):
            for column in range(2):
                at = channel, row, column
                kept = mask is None or bool(mask[at])
                level = float(w[at] / scale[channel])
                whole = min(max(round(level), low), high)
                assert out[at].item() == pytest.approx(
                    kept * whole * scale[channel].item(), rel=1e-6, abs=1e-7
                )
                grad = float(upstream[at])
                inside = low - 0.5 <= level <= high + 0.5
                # A clipped weight may come back: the step goes against the gradient.
                back = grad > 0 if level > high else grad < 0
                expected = grad if kept and (inside or back) else 0.0
                assert weight.grad is not None
                assert weight.grad[at].item() == pytest.approx(expected)
                if kept:
                    total += grad * (whole - level * inside)
                    count += 1
        expected = total / math.sqrt(max(count, 1) * high) / float(scale[channel])
        assert step.log.grad is not None
        assert step.log.grad[channel].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_pruned_weights_get_a_gradient_on_request() -> None:
    weight = torch.tensor([[0.3, 0.1]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    scale = torch.tensor([0.1])
    for dense in (False, True):
        weight.grad = None
        out = learned_weight(weight, StepSize(scale), scale, mask, 4, dense=dense)
        assert out.tolist() == [[pytest.approx(0.3), 0.0]]
        out.sum().backward()
        assert weight.grad.tolist() == [[1.0, float(dense)]]


@pytest.mark.parametrize("zero_point", [0, 3])
def test_activation_gradients_are_the_papers(zero_point: int) -> None:
    scale, top = 0.25, 15
    low, high = -zero_point, top - zero_point
    # Four equal samples, since the gradient of the scale is taken from the first quarter.
    sample = torch.tensor([-2.0, -0.3, 0.0, 0.1, 0.13, 1.0, 2.9, 3.7, 9.0])
    x = sample.repeat(4, 1).requires_grad_()
    upstream = torch.linspace(-1, 1, 9)
    step = StepSize(torch.tensor([scale]))
    out = learned_activation(x, step, (scale, 1 / scale, low, high))
    out.backward(upstream.repeat(4, 1))
    total = 0.0
    for index, value in enumerate(sample.tolist()):
        level = min(max(round(value / scale), low), high)
        assert out[0, index].item() == level * scale
        inside = (low - 0.5) * scale < value < (high + 0.5) * scale
        assert x.grad is not None
        assert x.grad[0, index].item() == pytest.approx(float(upstream[index]) * inside)
        total += float(upstream[index]) * (level - value / scale * inside)
    expected = 4 * total / math.sqrt(9 * top) / scale
    assert step.log.grad is not None
    assert step.log.grad.item() == pytest.approx(expected, rel=1e-5)


def test_scales_are_positive_whatever_happens_to_them() -> None:
    start = torch.tensor([1e-30, 0.1, 5.0])
    step = StepSize(start)
    assert torch.equal(step.value(), start)  # bit for bit
    with torch.no_grad():
        step.log.copy_(torch.tensor([-1e9, 1e9, math.log(2.0)]))
    value = step.value()
    assert bool((value > 0).all() and torch.isfinite(value).all())
    assert value.tolist() == pytest.approx([1e-30 / 16, 1.6, 10.0])


def test_learning_scales_leaves_no_trace_and_changes_nothing_by_itself() -> None:
    prepared = prepared_model()
    before = copy.deepcopy(prepared)
    x, _ = batches(1)[0]
    expected = prepared(x)
    learn_scales(prepared)
    assert len(step_sizes(prepared)) == len(layers_of(prepared)) + len(quantizers_of(prepared))
    assert torch.equal(prepared(x), expected)
    apply_scales(prepared)
    release_scales(prepared)
    assert step_sizes(prepared) == []
    assert prepared.state_dict().keys() == before.state_dict().keys()
    assert same(prepared, before)


def test_gradients_of_scales_are_bounded() -> None:
    step = StepSize(torch.ones(4))
    step.log.grad = torch.tensor([1e9, -1e9, 0.01, float("nan")])
    clip_scale_gradients([step])
    assert step.log.grad.tolist() == pytest.approx([0.2, -0.2, 0.01, 0.0])


class Wide(nn.Module):
    """Every kind of quantized layer, a residual and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.b(x) + x)
        return self.fc(torch.flatten(self.pool(torch.relu(self.up(x))), 1))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_what_was_learned_is_what_runs(bits: int, activation_bits: int) -> None:
    torch.manual_seed(0)
    net = Wide()
    layers = {
        name: LayerPlan(
            name,
            layer_kind(m),
            m.weight.numel(),
            bits,
            sparsity=0.3,
            activation_bits=activation_bits,
        )
        for name, m in supported_layers(net).items()
    }
    prepared = prepare(net, Plan(layers))
    data = batches(4)
    calibrate(prepared, data, progress=False)
    scales = {n: layer.weight_scale.clone() for n, layer in layers_of(prepared).items()}
    ranges = {n: q.qparams.clone() for n, q in quantizers_of(prepared).items()}
    run(prepared, data, 3, teacher=net, extra_bits=1)
    for name, layer in layers_of(prepared).items():
        assert layer.bits == bits
        assert not torch.equal(layer.weight_scale, scales[name])
        assert bool((layer.weight_scale > 0).all())
    for name, quantizer in quantizers_of(prepared).items():
        assert quantizer.scale > 0
        assert quantizer.scale != float(ranges[name][0])
        assert torch.equal(quantizer.qparams[1:], ranges[name][1:])  # zero point and bits
    native = convert(prepared)
    x = torch.cat([x for x, _ in data])
    with simulate(prepared) as exact, torch.inference_mode():
        expected = exact(x)
    with torch.inference_mode():
        assert torch.equal(native(x), expected)


def test_learned_scales_do_better_at_two_bits() -> None:
    losses = {}
    for learn in (False, True):
        prepared = prepared_model(bits=2, sparsity=0.0)
        teacher = model()
        history = run(prepared, batches(), 8, teacher=teacher, learn_scales=learn, lr=0.02)
        losses[learn] = history.epochs[-1]["loss"]
    assert losses[True] < losses[False]
