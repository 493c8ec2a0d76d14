"""The scalar interpreter against numpy and torch: integer sums, exact rational rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_program import INF, Builder, Grid, Value, inverse, noise, reference_values
from oracle import fma32

fma = np.vectorize(fma32, otypes=[np.float32])
GRID = Grid(0.25, 30, 255)


def finish(
    y: np.ndarray, inv: float, lo: int, hi: int, zero: int, table: np.ndarray | None
) -> np.ndarray:
    """Onto the grid, clamp to levels lo .. hi, round half to even with rationals, look up."""
    y = y.astype(np.float32) * np.float32(inv)
    clamped = np.minimum(np.maximum(y, np.float32(lo - zero)), np.float32(hi - zero))
    rounded = np.vectorize(lambda v: round(Fraction(float(v))), otypes=[np.int64])(clamped)
    q = (rounded + zero).astype(np.uint8)
    return q if table is None else table[q]


class Case:
    """One u8 input on GRID, one operation under test."""

    def __init__(self, *shapes: tuple[int, int, int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.b = Builder()
        self.inputs: list[Value] = []
        for shape in shapes:
            x = self.b.input(shape)
            self.inputs.append(self.b.node("quantize", [x], self.b.value(shape, GRID)))
        self.table = self.rng.permutation(256).astype(np.uint8)

    def floats(self, n: int, spread: float) -> np.ndarray:
        return (self.rng.standard_normal(n) * spread).astype(np.float32)

    def run(self, output: Value) -> list[np.ndarray]:
        """The levels of the inputs, then the output, for two images."""
        last = output
        if output.grid is not None:
            last = self.b.node("dequantize", [output], self.b.value(output.shape))
        program = self.b.finish([last])
        values = reference_values(program, noise(program, 2, seed=1, spread=40.0))
        return [values[v.number] for v in (*self.inputs, output)]


def as_torch(levels: np.ndarray, zero: int = GRID.zero_point) -> torch.Tensor:
    return torch.from_numpy(levels.astype(np.float64)) - zero


def test_quantize_and_dequantize():
    case = Case((3, 4, 5))
    (q, y) = case.run(case.b.node("dequantize", case.inputs, case.b.value((3, 4, 5))))
    program = case.b.program
    x = noise(program, 2, seed=1, spread=40.0)[0]
    expected = np.clip(np.rint(x * np.float32(4.0)), -30, 225) + 30
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(y, (q.astype(np.float32) - 30) * np.float32(0.25))
    assert q.min() == 0 and q.max() == 255  # the noise reaches beyond the grid


@pytest.mark.parametrize(("to_float", "with_table"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(transposed, to_float, with_residual, with_table):
    stride, dilation, groups, kernel, bits = (2, 1), (1, 2), 2, (3, 2), 5
    case = Case((4, 6, 5), (6, 13, 6) if transposed else (6, 3, 6))
    w = case.rng.integers(-16, 16, (6, 2, *kernel))
    scale, bias = case.floats(6, 0.02), case.floats(6, 10)
    x, r = case.inputs
    # Padding: top 1, left 1, bottom 1, right 2 forward; 0, 1 and output padding transposed.
    pad = [0, 1, 0, 1] if transposed else [1, 1, 1, 2]
    shape = (6, 13, 5) if transposed else (6, 3, 6)
    if transposed:
        case = Case((4, 6, 5), shape)
        x, r = case.inputs
    grid = None if to_float else Grid(0.3, 20, 255)
    inv = 1.7 if to_float or with_table else inverse(grid)
    table = case.b.constant(case.table) if with_table else -1
    output = case.b.node(
        "conv_transpose" if transposed else "conv",
        [x, r] if with_residual else [x],
        case.b.value(shape, grid),
        [*kernel, *stride, *pad, *dilation, groups, 3, 250, 20],
        [inv, -25.0, INF],
        [case.b.weights(w, bits), case.b.constant(scale), case.b.constant(bias), table],
    )
    q, residual, got = case.run(output)
    weight = torch.from_numpy(w.astype(np.float64))
    if transposed:
        # torch holds [in channels][out channels of the group].
        weight = weight.reshape(2, 3, 2, *kernel).transpose(1, 2).reshape(4, 3, *kernel)
        sums = F.conv_transpose2d(
            as_torch(q), weight, None, stride, (0, 1), (0, 0), groups, dilation
        )
        sums = F.pad(sums, (0, shape[2] - sums.shape[3], 0, shape[1] - sums.shape[2]))
    else:
        padded = F.pad(as_torch(q), (pad[1], pad[3], pad[0], pad[2]))
        sums = F.conv2d(padded, weight, None, stride, 0, dilation, groups)
    acc = sums.numpy().astype(np.float32)
    y = fma(acc, scale[:, None, None], bias[:, None, None])
    if with_residual:
        y = y + (residual.astype(np.float32) - 30) * np.float32(GRID.scale)
    if to_float:
        np.testing.assert_array_equal(got, np.maximum(y, np.float32(-25)))
        return
    expected = finish(y, inv, 3, 250, 20, case.table if with_table else None)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_table", [False, True])
def test_two_operands(op, per_channel, with_table):
    case = Case((3, 4, 5), (3, 1, 1) if per_channel else (3, 4, 5))
    table = case.b.constant(case.table) if with_table else -1
    grid = Grid(0.3, 40, 255)
    inv = 1.7 if with_table else inverse(grid)
    out = case.b.value((3, 4, 5), grid)
    floats = [inv, 0.7, -0.3]
    a, b, got = case.run(case.b.node(op, case.inputs, out, [5, 240, 40], floats, [table]))
    x = (a.astype(np.float32) - 30) * np.float32(0.7)
    y = (np.broadcast_to(b, a.shape).astype(np.float32) - 30) * np.float32(-0.3)
    y = x + y if op == "add" else x * y
    expected = finish(y, inv, 5, 240, 40, case.table if with_table else None)
    np.testing.assert_array_equal(got, expected)


def test_affine_and_lookup():
    case = Case((3, 4, 5))
    scale, bias = case.floats(3, 1), case.floats(3, 50)
    constants = [case.b.constant(scale), case.b.constant(bias), case.b.constant(case.table)]
    out = case.b.value((3, 4, 5), Grid(0.5, 7, 255))
    line = case.b.node("affine", case.inputs, out, [2, 200, 90], [1.7], constants)
    look = case.b.value((3, 4, 5), Grid(1.0, 0, 255))
    looked = case.b.node("lookup", [line], look, constants=[constants[2]])
    q, got = case.run(looked)
    y = fma(q.astype(np.float32), scale[:, None, None], bias[:, None, None])
    np.testing.assert_array_equal(got, case.table[finish(y, 1.7, 2, 200, 90, case.table)])


def test_moving_levels():
    case = Case((4, 5, 6), (2, 5, 6))
    table = case.b.constant(case.table)
    both = case.b.value((6, 5, 6), GRID)
    both = case.b.node("concat", case.inputs, both, constants=[-1, table])
    part = case.b.node("slice", [both], case.b.value((6, 5, 3), GRID), [2, 1, 2])
    index = np.array([5, 0, 0, 3, 2], np.int32)
    mixed = case.b.value((5, 5, 3), GRID)
    mixed = case.b.node("gather", [part], mixed, constants=[case.b.constant(index)])
    wide = case.b.node("pad", [mixed], case.b.value((5, 6, 8), GRID), [1, 2, 0, 3, 77])
    flat = case.b.node("reshape", [wide], case.b.value((240, 1, 1), GRID))
    a, b, got = case.run(flat)
    x = np.concatenate([a, case.table[b]], 1)[..., 1:6:2][:, index]
    x = np.pad(x, ((0, 0), (0, 0), (1, 0), (2, 3)), constant_values=77)
    np.testing.assert_array_equal(got.reshape(2, 5, 6, 8), x)


def test_max_pool():
    case = Case((3, 7, 8))
    out = case.b.value((3, 3, 4), GRID)
    q, got = case.run(case.b.node("max_pool", case.inputs, out, [3, 2, 2, 2, 1, 1, 1, 2]))
    x = torch.from_numpy(q.astype(np.float32))
    expected = F.max_pool2d(F.pad(x, (1, 1, 1, 0), value=-1), (3, 2), 2, 0, (1, 2))
    np.testing.assert_array_equal(got, expected.numpy()[:, :, :3, :4])


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("to_float", [False, True])
def test_avg_pool(ceil, count, to_float):
    case = Case((3, 7, 8))
    pool = torch.nn.AvgPool2d(3, 2, 1, ceil_mode=ceil, count_include_pad=count)
    shape = tuple(pool(torch.zeros(3, 7, 8)).shape)
    x = case.inputs[0]
    if to_float:
        x = case.b.node("dequantize", [x], case.b.value((3, 7, 8)))
        finish_ints, inv, out = [0, 255, 0], 1.0, case.b.value(shape)
    else:
        grid = Grid(1.3, 60, 255)
        finish_ints, inv, out = [0, 255, 60], inverse(grid), case.b.value(shape, grid)
    ints = [3, 3, 2, 2, 1, 1, 1, 1, int(count), *finish_ints]
    q, got = case.run(case.b.node("avg_pool", [x], out, ints, [inv, 1.25], [-1]))
    if to_float:
        expected = pool(as_torch(q) * 0.25).numpy()
        np.testing.assert_array_equal(got, expected.astype(np.float32))
        return
    # Of the divisor, one float division; torch tells the sums and the divisors.
    sums = F.avg_pool2d(as_torch(q), 3, 2, 1, ceil, True, divisor_override=1).numpy()
    ones = torch.ones(1, 1, 7, 8, dtype=torch.float64)
    inside = F.avg_pool2d(ones, 3, 2, 1, ceil, True, divisor_override=1).numpy()
    divisor = inside / pool(ones).numpy()
    ratio = np.float32(1.25) / divisor.astype(np.float32)
    y = sums.astype(np.float32) * ratio
    np.testing.assert_array_equal(got, finish(y, inv, 0, 255, 60, None))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 11)])
def test_adaptive_avg_pool(size):
    case = Case((3, 7, 8))
    out = case.b.value((3, *size), Grid(0.2, 60, 255))
    constants = [case.b.constant(case.table)]
    q, got = case.run(
        case.b.node("adaptive_avg_pool", case.inputs, out, [10, 240, 60], [0.9, 1.25], constants)
    )
    y = F.adaptive_avg_pool2d(as_torch(q), size).numpy() * 1.25
    # One rounding of the ratio apart: equal but where the exact value lies on a tie.
    expected = finish(y, 0.9, 10, 240, 60, None)
    raw = np.argsort(case.table)[got]
    assert np.abs(raw - expected).max() <= 1
    assert (raw != expected).mean() < 0.02


@pytest.mark.parametrize("to_float", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resize(mode, to_float):
    case = Case((2, 4, 5))
    size = (7, 9)
    constants = []
    for length, n in zip((4, 5), size, strict=True):
        at = (
            np.arange(n) * length / n
            if mode == "nearest"
            else np.arange(n) * (length - 1) / (n - 1)
        )
        low = np.floor(at).astype(np.int32)
        high = np.minimum(low + 1, length - 1).astype(np.int32)
        part = (at - low).astype(np.float32)
        constants += [case.b.constant(v) for v in (low, high, part)]
    x = case.inputs[0]
    grid = GRID if mode == "nearest" else Grid(0.5, 9, 255)
    if to_float:
        x, grid = case.b.node("dequantize", [x], case.b.value((2, 4, 5))), None
    out = case.b.value((2, *size), grid)
    ints = [int(mode == "bilinear"), 0, 255, 9]
    inv = 1.0 if grid is None else inverse(grid)
    q, got = case.run(case.b.node("resize", [x], out, ints, [inv, 0.5, -6.0], constants))
    align = True if mode == "bilinear" else None
    y = F.interpolate(as_torch(q, 0), size, mode=mode, align_corners=align).numpy()
    if to_float:
        np.testing.assert_allclose(got, (y - 30) * 0.25, rtol=1e-5, atol=1e-5)
    elif mode == "nearest":
        np.testing.assert_array_equal(got, y)
    else:
        expected = finish(y * 0.5 - 6, inv, 0, 255, 9, None).astype(int)
        assert np.abs(got - expected).max() <= 1
        assert (got != expected).mean() < 0.05


def test_layer_norm():
    case = Case((11, 3, 4))
    gamma, beta = case.floats(11, 30), case.floats(11, 20)
    grid = Grid(1.3, 100, 255)
    out = case.b.value((11, 3, 4), grid)
    constants = [case.b.constant(gamma), case.b.constant(beta)]
    floats = [inverse(grid), 1e-3]
    q, got = case.run(case.b.node("layer_norm", case.inputs, out, [0, 255, 100], floats, constants))
    x = as_torch(q).permute(0, 2, 3, 1) * 0.25
    y = F.layer_norm(
        x, (11,), torch.from_numpy(gamma).double(), torch.from_numpy(beta).double(), 1e-3
    )
    y = y.permute(0, 3, 1, 2).numpy()
    expected = finish(y, inverse(grid), 0, 255, 100, None)
    difference = np.abs(got.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference != 0).mean() < 0.01


def test_softmax():
    case = Case((5, 2, 3))
    numbers = case.b.node("dequantize", case.inputs, case.b.value((5, 2, 3)))
    q, got = case.run(case.b.node("softmax", [numbers], case.b.value((5, 2, 3))))
    expected = torch.softmax(as_torch(q) * 0.25, 1).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
