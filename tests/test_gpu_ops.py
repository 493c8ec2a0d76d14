"""Operators and drop-in layers on a GPU: the bits of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_cuda import MARKS
from helpers_engine import native_of
from helpers_models import batches, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adalayer_native import ops
from adalayer_native.errors import InputError
from adalayer_native.nn import Conv2d, FakeQuantize

pytestmark = MARKS

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_elementwise(dtype):
    x = (torch.randn(3, 5, 7, 9) * 4).to(dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for t in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[:, ::2], x[:0]):
        for op in (ops.quantize, ops.fake_quantize):
            expected, got = op(t, 0.1, 30, 6), op(t.cuda(), 0.1, 30, 6)
            assert torch.equal(got.cpu(), expected) and got.dtype == expected.dtype


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(FLOATS),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions(data, bits, dtype, last, seed):
    torch.manual_seed(seed)
    groups = data.draw(st.sampled_from([1, 1, 1, 2, 4]))
    c, o = groups * data.draw(st.integers(1, 24)), groups * data.draw(st.integers(1, 40))
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 5), (4, 4)]))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    x = torch.randn(2, c, 12, 11).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    packed = ops.pack_weight(weights((o, c // groups, *kernel), bits), bits)
    scale, bias = torch.rand(o) * 0.01, torch.randn(o)
    args = (
        0.03,
        100,
        8,
        kernel,
        (stride, stride),
        (1, 2, 0, 1),
        (dilation, dilation),
        groups,
        data.draw(st.sampled_from([None, 0.0])),
        data.draw(st.sampled_from([None, 6.0])),
    )
    plain = ops.conv2d(x, packed, scale, bias, *args)
    residual = torch.randn_like(plain) if data.draw(st.booleans()) else None
    grid = (0.05, 20, 7) if data.draw(st.booleans()) else (0.0, 0, 0)
    expected = ops.conv2d(x, packed, scale, bias, *args, residual, *grid)
    got = ops.conv2d(
        x.cuda(),
        packed.cuda(),
        scale.cuda(),
        bias.cuda(),
        *args,
        None if residual is None else residual.cuda(),
        *grid,
    )
    assert torch.equal(got.cpu(), expected)
    assert got.stride() == expected.stride()


def test_conv2d_u8():
    packed = ops.pack_weight(weights((10, 7, 3, 3), 5), 5)
    scale, bias = torch.rand(10) * 0.01, torch.randn(10) * 20
    x = torch.randint(0, 256, (2, 7, 9, 8), dtype=torch.uint8)
    args = (17, 90, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 5, 250)
    expected = ops.conv2d_u8(x, packed, scale, bias, *args)
    got = ops.conv2d_u8(x.cuda(), packed.cuda(), scale.cuda(), bias.cuda(), *args)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_conv_transpose2d(groups):
    packed = ops.pack_weight(weights((8, 12 // groups, 3, 4), 4), 4)
    scale, bias = torch.rand(8) * 0.01, torch.randn(8)
    x = torch.randn(2, 12, 5, 6)
    args = (0.03, 100, 8, (3, 4), (2, 3), (1, 0), (1, 1), (1, 1), groups)
    expected = ops.conv_transpose2d(x, packed, scale, bias, *args)
    got = ops.conv_transpose2d(x.cuda(), packed.cuda(), scale.cuda(), bias.cuda(), *args)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("rows", [0, 1, 5, 200])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_linear(rows, bits):
    packed = ops.pack_weight(weights((70, 333), bits), bits)
    scale, bias = torch.rand(70) * 0.01, torch.randn(70)
    x = torch.randn(rows, 333)
    expected = ops.linear(x, packed, scale, bias, 0.05, 128, 8)
    got = ops.linear(x.cuda(), packed.cuda(), scale.cuda(), bias.cuda(), 0.05, 128, 8)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 7, 30, 100])
def test_linear_weight_only(dtype, bits, rows):
    torch.manual_seed(bits)
    w = weights((130, 520), bits)
    packed, scale, bias = ops.pack_weight(w, bits), torch.rand(130) * 0.01, torch.randn(130)
    x = torch.randn(rows, 520).to(dtype)
    got = ops.linear_weight_only(x.cuda(), packed.cuda(), scale.cuda(), bias.cuda())
    assert got.dtype == dtype
    terms = x.double() @ (w.double() * scale.double()[:, None]).T
    size = x.double().abs() @ (w.double().abs() * scale.double()[:, None]).T
    expected = terms + bias.double()
    # float32 sums of 520 terms, then one rounding of the result.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    bound = size * 521 * 2.0**-24 + expected.abs() * unit + 1e-6
    assert bool(((got.cpu().double() - expected).abs() <= bound).all())


def test_opcheck():
    packed = ops.pack_weight(weights((6, 5, 3, 3), 4), 4).cuda()
    scale, bias = (torch.rand(6) * 0.01).cuda(), torch.randn(6).cuda()
    conv = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1)
    for x in (
        torch.randn(2, 5, 7, 6, device="cuda"),
        torch.randn(2, 5, 7, 6, device="cuda").to(memory_format=torch.channels_last),
        torch.randn(2, 5, 7, 6, device="cuda", dtype=torch.bfloat16),
        torch.randn(0, 5, 7, 6, device="cuda"),
    ):
        torch.library.opcheck(ops.conv2d, (x, packed, scale, bias, 0.02, 99, 8, *conv))
    flat = ops.pack_weight(weights((6, 9), 3), 3).cuda()
    x = torch.randn(4, 9, device="cuda")
    torch.library.opcheck(ops.linear, (x, flat, scale, bias, 0.1, 5, 8))
    torch.library.opcheck(ops.quantize, (x, 0.1, 3, 8))
    torch.library.opcheck(ops.fake_quantize, (x, 0.1, 3, 8))
    torch.library.opcheck(ops.linear_weight_only, (x.half(), flat, scale, bias))


def test_a_module_tree_moves_to_the_gpu_and_back():
    native = native_of(tiny(), batches(labels=False)[0])
    x = batches(labels=False)[0]
    expected = native(x)
    moved = copy.deepcopy(native).to("cuda")
    assert torch.equal(moved(x.cuda()).cpu(), expected)
    assert torch.equal(moved.to("cpu")(x), expected)
    state = {k: v.cpu() for k, v in copy.deepcopy(native).to("cuda").state_dict().items()}
    native.load_state_dict(state)
    assert torch.equal(native(x), expected)


def test_torch_compile():
    native = native_of(tiny(), batches(labels=False)[0]).to("cuda")
    x = batches(labels=False)[0].cuda()
    with torch.no_grad():
        expected = native(x)
        assert torch.equal(torch.compile(native)(x), expected)


def test_changed_parameters_are_noticed():
    w = weights((4, 3, 1, 1), 4)
    layer = Conv2d.from_quantized(
        w, 4, torch.ones(4), torch.zeros(4), input_scale=0.1, input_zero_point=0
    )
    layer = layer.to("cuda")
    x = torch.rand(1, 3, 4, 4, device="cuda")
    before = layer(x)
    layer.bias.add_(1.0)
    assert torch.equal(layer(x), before + 1.0)
    other = Conv2d.from_quantized(
        -1 - w, 4, torch.ones(4), torch.zeros(4), input_scale=0.1, input_zero_point=0
    )
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x).cpu(), other(x.cpu()))


def test_wrong_devices_are_named():
    w = weights((4, 3, 1, 1), 4)
    layer = Conv2d.from_quantized(w, 4, torch.ones(4), None, input_scale=0.1, input_zero_point=0)
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(InputError, match="the layer is on cpu, but its input is on cuda:0"):
        layer(x.cuda())
    with pytest.raises(InputError, match="the layer is on cuda:0, but its input is on cpu"):
        layer.to("cuda")(x)
    with pytest.raises(InputError, match="residual is on cpu"):
        layer(x.cuda(), torch.zeros(1, 4, 4, 4))


def test_misaligned_views():
    grid = FakeQuantize(0.1, 3)
    x = torch.randn(1001, device="cuda")[1:]
    assert torch.equal(grid(x).cpu(), grid(x.cpu()))
    packed = ops.pack_weight(weights((16, 24), 4), 4)
    scale, bias = torch.rand(16), torch.randn(16)
    values = torch.randn(2 * 24 + 3, dtype=torch.half)[3:].reshape(2, 24)
    got = ops.linear_weight_only(values.cuda(), packed.cuda(), scale.cuda(), bias.cuda())
    shifted = torch.cat([torch.zeros(3, dtype=torch.half), values.flatten()]).cuda()[3:]
    again = ops.linear_weight_only(shifted.reshape(2, 24), packed.cuda(), scale.cuda(), bias.cuda())
    assert torch.equal(got, again)
