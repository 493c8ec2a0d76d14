"""Programs of the engine, built and run with numpy arrays; random ones for hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from adalayer_native import _C

INF = float("inf")


class Grid(NamedTuple):
    scale: float = 0.5
    zero_point: int = 10
    qmax: int = 255


class Value(NamedTuple):
    """A u8, f32 or i32 value of a program; grid is None for the others."""

    number: int
    shape: tuple[int, int, int]
    grid: Grid | None


class Builder:
    """A ``_C.Program`` whose constants are numpy arrays."""

    def __init__(self) -> None:
        self.program = _C.Program()
        self.inputs: list[Value] = []
        self.count = 0

    def value(self, shape: Sequence[int], grid: Grid | None = None, kind: str = "f32") -> Value:
        c, h, w = (int(size) for size in shape)
        self.count += 1
        number = self.program.add_value(
            f"v{self.count}", kind if grid is None else "u8", c, h, w, *(grid or ())
        )
        return Value(number, (c, h, w), grid)

    def input(self, shape: Sequence[int], kind: str = "f32") -> Value:
        value = self.value(shape, kind=kind)
        self.inputs.append(value)
        return value

    def constant(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        add = {
            np.dtype(np.float32): self.program.add_constant_f32,
            np.dtype(np.int32): self.program.add_constant_i32,
            np.dtype(np.uint8): self.program.add_constant_u8,
        }[array.dtype]
        return add(array.ctypes.data, array.size)

    def weights(self, array: np.ndarray, bits: int) -> int:
        array = np.ascontiguousarray(array, dtype=np.int8)
        packed = np.frombuffer(
            _C.pack(array.ctypes.data, array.size, bits, *array.shape), dtype=np.uint8
        )
        return self.program.add_constant_weights(packed.ctypes.data, packed.size)

    def node(
        self,
        op: str,
        inputs: Sequence[Value],
        output: Value,
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
        constants: Sequence[int] = (),
    ) -> Value:
        self.program.add_node(
            op,
            f"{op}.{output.number}",
            [value.number for value in inputs],
            output.number,
            [int(i) for i in ints],
            [float(f) for f in floats],
            list(constants),
        )
        return output

    def finish(self, outputs: Sequence[Value]) -> _C.Program:
        self.program.set_inputs([value.number for value in self.inputs])
        self.program.set_outputs([value.number for value in outputs])
        self.program.validate()
        return self.program


_KINDS = {"u8": np.uint8, "f32": np.float32, "i32": np.int32}


def shapes_of(program: _C.Program, numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    values = program.values()
    return [values[number][2:5] for number in numbers]


def is_ids(program: _C.Program) -> list[bool]:
    """Per input."""
    values = program.values()
    return [values[number][1] == "i32" for number in program.inputs()]


def held(program: _C.Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays as the program reads them."""
    types = [np.int32 if ids else np.float32 for ids in is_ids(program)]
    return [np.ascontiguousarray(x, dtype=t) for x, t in zip(inputs, types, strict=True)]


def reference_values(program: _C.Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every value of a run of the interpreter, [batch, c, h, w]."""
    arrays = held(program, inputs)
    batch = arrays[0].shape[0]
    raw = program.reference_values([x.ctypes.data for x in arrays], [False] * len(arrays), batch)
    return [
        np.frombuffer(data, _KINDS[kind]).reshape(batch, c, h, w)
        for data, (_, kind, c, h, w, *_) in zip(raw, program.values(), strict=True)
    ]


def run_reference(program: _C.Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    values = reference_values(program, inputs)
    return [values[number] for number in program.outputs()]


def run_engine(
    engine: _C.Engine, inputs: Sequence[np.ndarray], *, nhwc: bool = False, threads: int = 1
) -> list[np.ndarray]:
    orders = [nhwc and any_order for any_order in engine.any_order()]
    program = engine.program()
    turned = [
        x.transpose(0, 2, 3, 1) if last else x for x, last in zip(inputs, orders, strict=True)
    ]
    arrays = held(program, turned)
    batch = arrays[0].shape[0]
    outputs = [
        np.full((batch, *shape), np.nan, np.float32)
        for shape in shapes_of(program, program.outputs())
    ]
    engine.run(
        [x.ctypes.data for x in arrays],
        orders,
        batch,
        [y.ctypes.data for y in outputs],
        threads,
    )
    return outputs


def noise(program: _C.Program, batch: int, seed: int, spread: float = 60.0) -> list[np.ndarray]:
    """Random images, of which some values lie outside every grid; and ids that all tables have."""
    rng = np.random.default_rng(seed)
    rows = dict.fromkeys(program.inputs(), ROWS)
    values, constants = program.values(), program.constants()
    for op, _, inputs, output, _, _, used in program.nodes():
        if op == "embedding":
            found = constants[used[0]][1] // values[output][2]
            rows[inputs[0]] = min(rows[inputs[0]], found)
    return [
        rng.integers(0, rows[number], (batch, *shape)).astype(np.int32)
        if ids
        else (rng.standard_normal((batch, *shape)) * spread).astype(np.float32)
        for number, ids, shape in zip(
            program.inputs(),
            is_ids(program),
            shapes_of(program, program.inputs()),
            strict=True,
        )
    ]


ROWS = 40  # of the largest table of random programs

# -- random programs ------------------------------------------------------------------------------


def inverse(grid: Grid) -> float:
    """1 / scale as programs hold it."""
    return float(np.float32(1) / np.float32(grid.scale))


class _Random:
    """Adds random nodes to a builder; every draw makes a valid one."""

    def __init__(self, draw: st.DrawFn, everything: bool, on_gpus: bool) -> None:
        self.draw = draw
        self.everything = everything
        self.on_gpus = on_gpus
        self.masks: list[Value] = []  # of keys, by their number
        self.builder = Builder()
        self.pool: list[Value] = []
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, options: Sequence):
        return options[self.int(0, len(options) - 1)]

    def value(self) -> Value:
        """A value of the pool, one of the last ones mostly."""
        return self.pool[-1 - min(self.int(0, 5), len(self.pool) - 1) // 2]

    def grid(self) -> Grid:
        qmax = self.pick([255, 255, 127, 15])
        return Grid(float(self.rng.uniform(0.1, 2)), self.int(0, qmax), qmax)

    def table(self, qmax: int) -> int:
        return self.builder.constant(self.rng.integers(0, qmax + 1, 256).astype(np.uint8))

    def finish(self, grid: Grid) -> tuple[list[int], float, int]:
        """lo, hi and zero point, the inverse scale, and the table or -1."""
        if self.int(0, 2) == 0:
            lo = self.int(0, 255)
            limits = [lo, self.int(lo, 255), self.int(0, 255)]
            return limits, self.scale(0.3, 3), self.table(grid.qmax)
        lo = self.pick([0, grid.zero_point])
        return [lo, self.int(lo, grid.qmax), grid.zero_point], inverse(grid), -1

    def floats(self, n: int, low: float, high: float) -> int:
        return self.builder.constant(self.rng.uniform(low, high, n).astype(np.float32))

    def scale(self, low: float, high: float) -> float:
        return float(np.float32(self.rng.uniform(low, high)))

    def add(self) -> None:
        ops = [name.removeprefix("op_") for name in dir(self) if name.startswith("op_")]
        getattr(self, f"op_{self.pick(sorted(ops))}")(self.value())

    def put(self, op: str, inputs, shape, grid, ints=(), floats=(), constants=()) -> None:
        value = self.builder.value(shape, grid)
        self.pool.append(self.builder.node(op, inputs, value, ints, floats, constants))

    # -- one method per operation
    def _convolution(self, x: Value, transposed: bool, to_float: bool = False) -> Value | None:
        c, h, w = x.shape
        groups = self.pick([g for g in range(1, c + 1) if c % g == 0])
        o = groups * self.int(1, max(1, 24 // groups))
        kernel = [self.int(1, 4), self.int(1, 4)]
        stride = [self.int(1, 3), self.int(1, 3)]
        most = 2 if self.everything or not transposed else 1
        dilation = [self.int(1, most), self.int(1, most)]
        pad = [self.int(0, 2) for _ in range(4)]  # top, left, bottom, right
        size = []
        for axis, length in enumerate((h, w)):
            extent = dilation[axis] * (kernel[axis] - 1) + 1
            if transposed:
                full = (length - 1) * stride[axis] + extent - pad[axis] - pad[axis + 2]
                size.append(full + self.int(0, max(stride[axis], dilation[axis]) - 1))
            else:
                padded = length + pad[axis] + pad[axis + 2]
                size.append((padded - extent) // stride[axis] + 1 if padded >= extent else 0)
        if min(size) < 1 or o * size[0] * size[1] > 4000:
            return None
        bits = self.int(2, 8)
        reduction = c // groups * kernel[0] * kernel[1]
        shape = (o, c // groups, *kernel)
        weights = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        weights[self.rng.random(shape) < self.pick([0.0, 0.0, 0.7])] = 0
        unit = 1.0 / (2.0 ** (bits - 1) * np.sqrt(reduction))
        grid = None if to_float else self.grid()
        out = self.builder.value((o, *size), grid)
        residual = [v for v in self.pool if v.shape == out.shape]
        inputs = [x, self.pick(residual)] if residual and self.int(0, 1) else [x]
        finish, inv, table = ([0, 255, 0], 1.0, -1) if grid is None else self.finish(grid)
        ints = [*kernel, *stride, *pad, *dilation, groups, *finish]
        limits = self.pick([(-INF, INF), (0.0, 6.0)])
        self.builder.node(
            "conv_transpose" if transposed else "conv",
            inputs,
            out,
            ints,
            [inv, *limits],
            [
                self.builder.weights(weights, bits),
                self.floats(o, -unit, unit),
                self.floats(o, -40, 80),
                table,
            ],
        )
        return out

    def op_conv(self, x: Value) -> None:
        out = self._convolution(x, transposed=False)
        self.pool += [] if out is None else [out]

    # More of what networks are made of.
    op_conv2 = op_conv3 = op_conv

    def op_conv_transpose(self, x: Value) -> None:
        out = self._convolution(x, transposed=True)
        self.pool += [] if out is None else [out]

    def op_lookup(self, x: Value) -> None:
        grid = self.grid()
        self.put("lookup", [x], x.shape, grid, constants=[self.table(grid.qmax)])

    def _second(self, x: Value) -> Value:
        fits = [v for v in self.pool if v.shape in (x.shape, (x.shape[0], 1, 1))]
        return self.pick(fits)

    def op_add(self, x: Value) -> None:
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        factors = [inv, self.scale(-1, 1), self.scale(-1, 1)]
        self.put("add", [x, self._second(x)], x.shape, grid, finish, factors, [table])

    def op_mul(self, x: Value) -> None:
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        factors = [inv, self.scale(-1, 1), self.scale(-0.02, 0.02)]
        self.put("mul", [x, self._second(x)], x.shape, grid, finish, factors, [table])

    def op_affine(self, x: Value) -> None:
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        c = x.shape[0]
        constants = [self.floats(c, -1, 1), self.floats(c, -40, 40), table]
        self.put("affine", [x], x.shape, grid, finish, [inv], constants)

    def op_affine_image(self, x: Value) -> None:
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        sizes = [self.pick([x.shape[0], int(np.prod(x.shape))]) for _ in range(2)]
        constants = [self.floats(sizes[0], -1, 1), self.floats(sizes[1], -40, 40), table]
        self.put("affine_image", [x], x.shape, grid, finish, [inv], constants)

    def op_constant(self, x: Value) -> None:
        grid = self.grid()
        levels = self.rng.integers(0, grid.qmax + 1, int(np.prod(x.shape))).astype(np.uint8)
        self.put("constant", [], x.shape, grid, constants=[self.builder.constant(levels)])

    def op_join(self, x: Value) -> None:
        axis = self.int(1, 2)
        others = [k for k in range(3) if k != axis]
        fits = [v for v in self.pool if all(v.shape[k] == x.shape[k] for k in others)]
        inputs = [x, *(self.pick(fits) for _ in range(self.int(0, 3)))]
        shape = list(x.shape)
        shape[axis] = sum(v.shape[axis] for v in inputs)
        if np.prod(shape) > 4000:
            return
        grid = x.grid
        tables = [
            -1 if v.grid == grid and self.int(0, 1) else self.table(grid.qmax) for v in inputs
        ]
        self.put("join", inputs, shape, grid, [axis], constants=tables)

    def op_group_norm(self, x: Value) -> None:
        grid = self.grid()
        c = x.shape[0]
        groups = self.pick([g for g in range(1, c + 1) if c % g == 0])
        constants = [self.floats(c, -30, 30), self.floats(c, -10, 40)]
        ints = [groups, 0, grid.qmax, grid.zero_point]
        self.put("group_norm", [x], x.shape, grid, ints, [inverse(grid), 1e-5], constants)

    def op_concat(self, x: Value) -> None:
        fits = [v for v in self.pool if v.shape[1:] == x.shape[1:]]
        inputs = [x, *(self.pick(fits) for _ in range(self.int(0, 2)))]
        if sum(v.shape[0] for v in inputs) > 64:
            return
        grid = x.grid
        tables = [
            -1 if v.grid == grid and self.int(0, 1) else self.table(grid.qmax) for v in inputs
        ]
        shape = (sum(v.shape[0] for v in inputs), *x.shape[1:])
        self.put("concat", inputs, shape, grid, constants=tables)

    def op_squeeze(self, x: Value) -> None:
        """The global average, for additions and products per channel."""
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        ratio = [inv, self.scale(0.2, 2)]
        self.put("adaptive_avg_pool", [x], (x.shape[0], 1, 1), grid, finish, ratio, [table])

    def op_adaptive_avg_pool(self, x: Value) -> None:
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        shape = (x.shape[0], self.int(1, 7), self.int(1, 7))
        ratio = [inv, self.scale(0.2, 2)]
        self.put("adaptive_avg_pool", [x], shape, grid, finish, ratio, [table])

    def op_max_pool(self, x: Value) -> None:
        sizes, ints = [], []
        for length in x.shape[1:]:
            kernel, stride, dilation = self.int(1, 4), self.int(1, 3), self.int(1, 2)
            extent = dilation * (kernel - 1) + 1
            pad = self.int(0, min(2, extent // 2))
            most = (length + pad - 1) // stride + 1  # the last one begins inside
            least = max(1, (length + 2 * pad - extent) // stride + 1)
            sizes.append(min(most, self.pick([least, least + 1])))
            ints.append([kernel, stride, pad, dilation])
            inside = [
                any(0 <= i * stride - pad + k * dilation < length for k in range(kernel))
                for i in range(sizes[-1])
            ]
            if not all(inside):
                return
        order = [ints[axis][k] for k in range(4) for axis in range(2)]
        self.put("max_pool", [x], (x.shape[0], *sizes), x.grid, order)

    def op_avg_pool(self, x: Value) -> None:
        sizes, ints = [], []
        for length in x.shape[1:]:
            kernel, stride = self.int(1, min(4, length)), self.int(1, 3)
            before, after = self.int(0, kernel // 2), self.int(0, kernel // 2)
            span = length + before + after - kernel
            up = -(-span // stride) + 1
            size = self.pick([span // stride + 1, up])
            if (size - 1) * stride - before >= length:
                size -= 1
            sizes.append(size)
            ints.append([kernel, stride, before, after])
        grid = self.grid()
        finish, inv, table = self.finish(grid)
        order = [ints[axis][k] for k in range(4) for axis in range(2)]
        ratio = [inv, self.scale(0.2, 2)]
        shape = (x.shape[0], *sizes)
        ints = [*order, self.int(0, 1), *finish]
        self.put("avg_pool", [x], shape, grid, ints, ratio, [table])

    def op_slice(self, x: Value) -> None:
        axis = self.int(0, 2)
        begin, step = self.int(0, x.shape[axis] - 1), self.int(1, 3)
        count = self.int(1, (x.shape[axis] - 1 - begin) // step + 1)
        shape = [count if k == axis else size for k, size in enumerate(x.shape)]
        self.put("slice", [x], shape, x.grid, [axis, begin, step])

    def op_gather(self, x: Value) -> None:
        index = self.rng.integers(0, x.shape[0], self.int(1, 24)).astype(np.int32)
        if self.int(0, 1):
            index = self.rng.permutation(x.shape[0]).astype(np.int32)
        constants = [self.builder.constant(index)]
        self.put("gather", [x], (index.size, *x.shape[1:]), x.grid, constants=constants)

    def op_rearrange(self, x: Value) -> None:
        c, h, w = x.shape
        steps = (h * w, w, 1)
        if self.int(0, 1):  # axes in another order, each the right way round or flipped
            order = self.rng.permutation(3)
            shape = [x.shape[k] for k in order]
            tables = [np.arange(x.shape[k])[:: self.pick([1, -1])] * steps[k] for k in order]
        else:  # any elements, so that rows and channels carry
            shape = [self.int(1, 12) for _ in range(3)]
            left, tables = c * h * w - 1, []
            for size in shape:
                tables.append(self.rng.integers(0, left + 1, size))
                left -= int(tables[-1].max())
        constants = [self.builder.constant(table.astype(np.int32)) for table in tables]
        self.put("rearrange", [x], tuple(shape), x.grid, constants=constants)

    def op_attention(self, x: Value) -> None:
        c, h, w = x.shape
        heads = self.pick([n for n in range(1, c + 1) if c % n == 0])
        rows = self.int(0, 1)
        flags = [rows, self.int(0, 1), self.int(0, 1) and rows, self.int(0, 1)]
        tokens = w if rows else h * w
        if tokens * tokens * heads * h > 20000:
            return
        mask = -1
        if self.int(0, 1):
            sizes = (h if flags[2] else 1, heads if flags[3] else 1, tokens, tokens)
            values = self.rng.choice([0.0, -1.5, 2.0, -np.inf], sizes).astype(np.float32)
            mask = self.builder.constant(values)
        else:
            flags[2:] = [0, 0]
        grid = self.grid()
        ints = [heads, heads, *flags, 0, grid.qmax, grid.zero_point]
        factors = [inverse(grid), self.scale(-20, 0)]
        keys = [] if rows else [v for v in self.masks if v.shape[2] == tokens]
        self.put("attention", [x, x, x, *keys[:1]], x.shape, grid, ints, factors, [mask])

    def op_linear(self, x: Value) -> None:
        """With a scale for every group of input channels."""
        c, h, w = x.shape
        outputs, size = self.int(1, 40), self.pick([32, 64, 128])
        if self.on_gpus or c * outputs * h * w > 100000:
            return
        bits = self.int(2, 8)
        groups = -(-c // size)
        weights = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, c, 1, 1))
        unit = 1.0 / (2.0 ** (bits - 1) * np.sqrt(c))
        constants = [
            self.builder.weights(weights, bits),
            self.floats(outputs * groups, -unit, unit),
            self.floats(outputs, -1, 1),
        ]
        grid = self.grid()
        if self.int(0, 1):
            finish, inv, table = self.finish(grid)
            ints, floats = [size, *finish], [inv, 0.0, 0.0]
            self.put("linear", [x], (outputs, h, w), grid, ints, floats, [*constants, table])
            return
        out = self.builder.value((outputs, h, w))
        ints, floats = [size, 0, 255, 0], [1.0, -2.0, float(np.inf)]
        self.builder.node("linear", [x], out, ints, floats, [*constants, -1])
        self.put("quantize", [out], out.shape, grid)

    def op_recurrence(self, x: Value) -> None:
        """What a value gives to the gates, its positions being steps."""
        c, h, w = x.shape
        kind = self.pick([k for k, gates in enumerate((4, 3, 1, 1)) if c % gates == 0])
        gates = (4, 3, 1, 1)[kind]
        hidden = c // gates
        if self.on_gpus or c * hidden * h * w > 20000:
            return
        builder = self.builder
        value = builder.node("dequantize", [x], builder.value(x.shape))
        value = builder.node("function", [value], builder.value(x.shape), [1], [0.03, 0.0])
        begin = []
        for _ in range((2 if kind == 0 else 1) * self.int(0, 1)):
            state = builder.value((hidden, 1, 1))
            begin.append(builder.node("constant", [], state, (), (), [self.floats(hidden, -1, 1)]))
        bits = self.int(2, 8)
        unit = 1.0 / (2.0 ** (bits - 1) * np.sqrt(hidden))
        weights = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (c, hidden, 1, 1))
        constants = [
            builder.weights(weights, bits), self.floats(c, -unit, unit), self.floats(c, -1, 1),
        ]  # fmt: skip
        reverse, cells = self.int(0, 1), int(kind == 0 and self.int(0, 1))
        if not cells and self.int(0, 1):
            grid = self.grid()
            finish, inv, table = self.finish(grid)
            ints = [kind, reverse, 0, *finish]
            shape = (hidden, h, w)
            self.put("recurrence", [value, *begin], shape, grid, ints, [inv], [*constants, table])
            return
        zero_point = self.int(0, 255)
        ints = [kind, reverse, cells, 0, self.int(zero_point, 255), zero_point]
        out = builder.value((hidden * (1 + cells), h, w))
        builder.node("recurrence", [value, *begin], out, ints, [100.0], [*constants, -1])
        self.put("quantize", [out], out.shape, self.grid())

    def op_floats(self, x: Value) -> None:
        """Some operations on floats, and back to levels."""
        if self.on_gpus:
            return
        value = self.builder.node("dequantize", [x], self.builder.value(x.shape))
        for _ in range(self.int(1, 3)):
            steps = ["conv", "line", "norm", "pool", "turn", "sum", "response", "join"]
            step = self.pick(steps)
            value = getattr(self, f"_float_{step}")(value) or value
        self.put("quantize", [value], value.shape, self.grid())

    def _float_conv(self, x: Value) -> Value | None:
        c, h, w = x.shape
        groups = self.pick([g for g in range(1, c + 1) if c % g == 0])
        o = groups * self.int(1, max(1, 24 // groups))
        kernel, stride = [self.int(1, 3), self.int(1, 3)], [self.int(1, 2), self.int(1, 2)]
        pad = [self.int(0, 1) for _ in range(4)]
        size = [
            (length + pad[k] + pad[k + 2] - kernel[k]) // stride[k] + 1
            for k, length in enumerate((h, w))
        ]
        if min(size) < 1 or o * size[0] * size[1] > 4000:
            return None
        shape = (o, c // groups, *kernel)
        ints = [*kernel, *stride, *pad, 1, 1, groups]
        bias = self.floats(o, -40, 80)
        if self.int(0, 1):
            constants = [self.floats(int(np.prod(shape)), -0.3, 0.3), -1, bias]
        else:
            weights = self.builder.weights(self.rng.integers(-8, 8, shape), 4)
            constants = [weights, self.floats(o, -0.05, 0.05), bias]
        out = self.builder.value((o, *size))
        limits = self.pick([(-INF, INF), (0.0, INF)])
        return self.builder.node("float_conv", [x], out, ints, limits, constants)

    def _float_line(self, x: Value) -> Value:
        constants = [self.floats(x.shape[0], -1, 1), self.floats(x.shape[0], -40, 40), -1]
        out = self.builder.value(x.shape)
        return self.builder.node("affine", [x], out, [0, 255, 0], [1.0], constants)

    def _norm_of(self, x: Value) -> Value:
        """Of levels or floats, to floats."""
        c, kind = x.shape[0], self.pick(["layer_norm", "rms_norm", "group_norm"])
        groups = self.pick([g for g in range(1, c + 1) if c % g == 0])
        ints = [groups] * (kind == "group_norm") + [0, 255, 0]
        constants = [self.floats(c, -30, 30), self.floats(c, -10, 40)]
        out = self.builder.value(x.shape)
        return self.builder.node(kind, [x], out, ints, [1.0, 1e-5], constants)

    _float_norm = _norm_of

    def _float_pool(self, x: Value) -> Value:
        c, h, w = x.shape
        kernel = [self.int(1, min(3, h)), self.int(1, min(3, w))]
        out = self.builder.value((c, h - kernel[0] + 1, w - kernel[1] + 1))
        return self.builder.node("max_pool", [x], out, [*kernel, 1, 1, 0, 0, 1, 1])

    def _float_turn(self, x: Value) -> Value:
        steps = (x.shape[1] * x.shape[2], x.shape[2], 1)
        order = self.rng.permutation(3)
        tables = [np.arange(x.shape[k])[:: self.pick([1, -1])] * steps[k] for k in order]
        constants = [self.builder.constant(table.astype(np.int32)) for table in tables]
        out = self.builder.value([x.shape[k] for k in order])
        return self.builder.node("rearrange", [x], out, constants=constants)

    def _float_sum(self, x: Value) -> Value:
        fixed = self.builder.value(x.shape)
        constants = [self.floats(int(np.prod(x.shape)), -30, 30)]
        self.builder.node("constant", [], fixed, constants=constants)
        both = [x, fixed] if self.int(0, 1) else [fixed, x]
        return self.builder.node("combine", both, self.builder.value(x.shape), [self.int(0, 2)])

    def _reduced(self, x: Value) -> Value:
        """Of levels or floats, to floats."""
        along = [self.int(0, 1) for _ in range(3)]
        along[self.int(0, 2)] = 1
        shape = [1 if gone else n for gone, n in zip(along, x.shape, strict=True)]
        return self.builder.node("reduce", [x], self.builder.value(shape), [self.int(0, 1), *along])

    def _float_response(self, x: Value) -> Value:
        """A value beside one of its reductions: a quotient has no zero below."""
        small = self._reduced(x)
        kind = self.int(0, 3)
        if kind == 3:
            positive = self.builder.value(small.shape)
            small = self.builder.node("function", [small], positive, [3], [0.0, 0.0])
            kind = 3 if self.int(0, 2) else 1
        both = [small, x] if kind != 3 and self.int(0, 1) else [x, small]
        return self.builder.node("combine", both, self.builder.value(x.shape), [kind])

    def _float_join(self, x: Value) -> Value | None:
        axis = self.int(0, 2)
        shape = list(x.shape)
        shape[axis] = self.int(1, 3)
        fixed = self.builder.value(shape)
        constants = [self.floats(int(np.prod(shape)), -30, 30)]
        self.builder.node("constant", [], fixed, constants=constants)
        shape[axis] += x.shape[axis]
        if np.prod(shape) > 4000:
            return None
        pieces = [x, fixed] if self.int(0, 1) else [fixed, x]
        out = self.builder.value(shape)
        op = "join" if axis else "concat"
        return self.builder.node(op, pieces, out, [axis] if axis else [], constants=[-1, -1])

    def mask(self, ids: Value) -> None:
        """A mask of keys from ids."""
        out = self.builder.value(ids.shape)
        hidden = self.pick([-INF, -3e38, -2.0])
        self.masks.append(self.builder.node("choose", [ids], out, [1], [hidden, 0.0]))

    def op_pad(self, x: Value) -> None:
        top, left, bottom, right = (self.int(0, 2) for _ in range(4))
        shape = (x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right)
        if np.prod(shape) > 4000:
            return
        level = self.pick([x.grid.zero_point, self.int(0, x.grid.qmax)])
        self.put("pad", [x], shape, x.grid, [top, left, bottom, right, level])

    def _tables(self, shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
        constants = []
        for length, size in zip(shape, sizes, strict=True):
            low = self.rng.integers(0, length, size).astype(np.int32)
            high = np.minimum(low + self.rng.integers(0, 2, size), length - 1).astype(np.int32)
            constants += [self.builder.constant(low), self.builder.constant(high)]
            part = self.rng.choice([0.0, 0.25, 0.5, 0.7, 1.0], size).astype(np.float32)
            constants.append(self.builder.constant(part))
        return constants

    def op_resize(self, x: Value) -> None:
        sizes = (self.int(1, 10), self.int(1, 10))
        shape = (x.shape[0], *sizes)
        if np.prod(shape) > 4000:
            return
        constants = self._tables(x.shape[1:], sizes)
        if self.int(0, 1):
            self.put("resize", [x], shape, x.grid, [0, 0, 255, 0], [1, 1, 0], constants)
            return
        grid = self.grid()
        finish = [0, grid.qmax, grid.zero_point]
        factors = [inverse(grid), self.scale(-1, 1), self.scale(-40, 40)]
        self.put("resize", [x], shape, grid, [1, *finish], factors, constants)

    def op_layer_norm(self, x: Value) -> None:
        grid = self.grid()
        c = x.shape[0]
        constants = [self.floats(c, -30, 30), self.floats(c, -10, 40)]
        finish = [0, grid.qmax, grid.zero_point]
        self.put("layer_norm", [x], x.shape, grid, finish, [inverse(grid), 1e-5], constants)

    def op_rms_norm(self, x: Value) -> None:
        grid = self.grid()
        c = x.shape[0]
        constants = [self.floats(c, -30, 30), self.floats(c, -10, 40)]
        finish = [0, grid.qmax, grid.zero_point]
        self.put("rms_norm", [x], x.shape, grid, finish, [inverse(grid), 1e-5], constants)

    def embed(self, ids: Value) -> None:
        """Another embedding of the same ids."""
        grid, c, rows = self.grid(), self.int(1, 20), self.pick([1, 2, ROWS])
        table = self.rng.integers(0, grid.qmax + 1, (rows, c)).astype(np.uint8)
        shape = (c, *ids.shape[1:])
        self.put("embedding", [ids], shape, grid, constants=[self.builder.constant(table)])

    def op_reshape(self, x: Value) -> None:
        elements = int(np.prod(x.shape))
        shape = (elements, 1, 1)
        if x.shape == shape and self.int(0, 1):
            sides = [k for k in range(1, 9) if elements % k == 0]
            side = self.pick(sides)
            other = self.pick([k for k in sides if elements % (k * side) == 0])
            shape = (elements // side // other, side, other)
        self.put("reshape", [x], shape, x.grid)

    def tail(self, x: Value) -> Value:
        """One float output."""
        if not self.on_gpus and self.int(0, 4) == 0:
            return self._norm_of(x) if self.int(0, 2) else self._reduced(x)
        transposed = self.everything and self.int(0, 3) == 0
        out = self._convolution(x, transposed, to_float=True) if self.int(0, 1) else None
        if out is None:
            value = self.builder.value(x.shape)
            return self.builder.node("dequantize", [x], value)
        c, h, w = out.shape
        kind = self.int(0, 4)
        if kind == 4:
            function, bounds = self.int(0, 5), [self.scale(-2, 0), self.scale(0, 2)]
            value = self.builder.value(out.shape)
            value = self.builder.node("function", [out], value, [function], bounds)
            both = [out, value] if self.int(0, 1) else [value, out]
            return self.builder.node(
                "combine", both, self.builder.value(out.shape), [self.int(0, 2)]
            )
        if kind == 0:
            sizes = (self.int(1, 8), self.int(1, 8))
            value = self.builder.value((c, *sizes))
            constants = self._tables((h, w), sizes)
            ints = [self.int(0, 1), 0, 255, 0]
            return self.builder.node("resize", [out], value, ints, [1, 1, 0], constants)
        if kind == 1:
            value = self.builder.value((c, 1, 1))
            return self.builder.node("adaptive_avg_pool", [out], value, [0, 255, 0], [1, 1], [-1])
        return out


@st.composite
def programs(
    draw: st.DrawFn, most_nodes: int = 10, everything: bool = True, ids: bool = True
) -> _C.Program:
    """A valid program of up to `most_nodes` random nodes between its quantizers and its tails.

    Without `everything` transposed convolutions have no dilation and no float output, which the
    engine refuses. Without `ids` no input is token ids, and nothing but what follows all layers
    works on floats, which the CUDA engine refuses.
    """
    r = _Random(draw, everything, not ids)
    for _ in range(draw(st.integers(1, 2))):
        shape = (r.int(1, 20), r.int(1, 9), r.int(1, 9))
        x = r.builder.input(shape)
        r.put("quantize", [x], shape, r.grid())
    if ids and r.int(0, 3) == 0:
        x = r.builder.input((1, r.int(1, 3), r.int(1, 12)), "i32")
        for _ in range(r.int(1, 2)):
            r.embed(x)
    if ids and r.int(0, 3) == 0:
        tokens = {v.shape[1] * v.shape[2] for v in r.pool}
        r.mask(r.builder.input((1, 1, r.pick(sorted(tokens))), "i32"))
    for _ in range(draw(st.integers(1, most_nodes))):
        r.add()
    return r.builder.finish([r.tail(r.value()) for _ in range(draw(st.integers(1, 2)))])
