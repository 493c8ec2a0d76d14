"""The compiled program against the module tree, node by node on identical inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native import ops
from adalayer_native.capture import capture
from adalayer_native.engine import Engine, compile
from adalayer_native.engine.emit import emit
from adalayer_native.engine.export import Exported, export
from adalayer_native.engine.grids import Want
from adalayer_native.engine.lower import Grids
from adalayer_native.engine.segments import Part, divide
from adalayer_native.engine.views import BATCH, with_batch
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization import calibrate, convert, prepare, simulate


@dataclass(frozen=True)
class Difference:
    """One value: how many of its levels differ from the module tree's, and by how much."""

    name: str
    op: str
    count: int
    total: int
    largest: int

    def check(self) -> None:
        """Equal bits."""
        assert self.count == 0, self


def node_differences(model: nn.Module, x: Any, example: Any = None) -> list[Difference]:
    """Law 2, for every u8 value of the engine's program.

    ``x`` is a tensor or any nest of the model's arguments, ``example`` what to export it with, if
    that is not ``x``.

    The exported graph is interpreted in torch. Wherever the program stores a value, torch's result
    is rounded to its grid and compared; then the program's own value takes its place, so that
    every node is judged on inputs that are the same on both sides.
    """
    exported = export(model, x if example is None else example)
    parts, _ = divide(exported, {})
    found: list[Difference] = []
    tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    values: dict[fx.Node, Any] = dict(zip(exported.inputs, tensors, strict=True))
    for part in parts:
        forced = _forced(exported, part, values, len(tensors[0])) if part.native else {}
        _interpret(exported, part, values, len(tensors[0]), forced, found)
    return found


def _forced(
    exported: Exported, part: Part, values: dict[fx.Node, Any], batch: int
) -> dict[fx.Node, list[Any]]:
    assert part.lowered is not None
    program = emit(part.lowered.program)
    # (Token ids have 32 bits in a program.)
    inputs = [
        values[node].contiguous() if values[node].is_floating_point() else values[node].int()
        for node in part.lowered.inputs
    ]
    raw = program.reference_values([t.data_ptr() for t in inputs], [False] * len(inputs), batch)
    operations = {node[3]: node[0] for node in program.nodes()}
    forced: dict[fx.Node, list[Any]] = {}
    for number, (name, kind, c, h, w, scale, zero_point, qmax) in enumerate(program.values()):
        if kind != "u8" or name not in part.lowered.origins:
            continue
        node, dims, want = part.lowered.origins[name]
        flat = torch.from_numpy(np.frombuffer(raw[number], dtype=np.uint8).copy())
        whole = with_batch(dims, exported.folds(node)) if exported.folds(node) else dims
        atoms = [atom for item in whole for atom in item]
        shown = flat.as_strided(
            [batch if atom == BATCH else atom[0] for atom in atoms],
            [c * h * w if atom == BATCH else atom[1] for atom in atoms],
        )
        grid = scale, zero_point, int(math.log2(qmax + 1))
        forced.setdefault(node, []).append((name, operations.get(number, ""), shown, grid, want))
    return forced


def _interpret(
    exported: Exported,
    part: Part,
    values: dict[fx.Node, Any],
    batch: int,
    forced: dict[fx.Node, list[Any]],
    found: list[Difference],
) -> None:
    grids = Grids()

    def value(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return exported.tensor(node)
        size = node.meta.get("val")
        if exported.is_batch(size):
            return batch
        if node not in values and isinstance(size, (int, torch.SymInt)):
            return node.target(*fx.map_arg(node.args, value))  # type: ignore[operator]
        if node not in values and (constant := exported.constant(node)) is not None:
            values[node] = constant.expand(batch, *constant.shape[1:])
        return values[node]

    for node in part.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        own = grids(node)
        stored = forced.get(node, [])
        # The value on the node's own grid first: tables to other grids start from it.
        for name, op, shown, grid, want in sorted(stored, key=lambda item: item[4] != Want(own)):
            levels = shown.reshape(result.shape)
            expected = ops.quantize(result.clamp(want.lo, want.hi).contiguous(), *grid)
            gap = (expected.int() - levels.int()).abs()
            found.append(
                Difference(name, op, int(gap.count_nonzero()), gap.numel(), int(gap.max()))
            )
            if own is None or Want(own) == want:
                result = (levels.float() - grid[1]) * grid[0]
        values[node] = result


def plan_of(model: nn.Module, bits: int = 8, activation_bits: int = 8) -> Plan:
    """The same widths for every layer."""
    return Plan(
        {
            name: LayerPlan(
                name, layer_kind(layer), layer.weight.numel(), bits, activation_bits=activation_bits
            )
            for name, layer in supported_layers(model).items()
        }
    )


def native_of(
    model: nn.Module, calibration: Tensor, *, bits: int = 8, activation_bits: int = 8
) -> fx.GraphModule:
    """A float model converted, with ranges from one batch."""
    prepared = prepare(model.eval(), plan_of(model, bits, activation_bits), calibration)
    calibrate(prepared, [calibration], observer="minmax", progress=False)
    return convert(prepared)


def compiled(model: nn.Module, *example: Tensor, bits: int = 8) -> tuple[nn.Module, Engine]:
    """Native modules, whose bits are those of the simulation and the engine."""
    torch.manual_seed(3)
    graph = capture(model.eval(), example)
    prepared = prepare(graph, plan_of(graph, bits))
    calibrate(prepared, [example], observer="minmax", progress=False)
    native = convert(prepared)
    engine = compile(native, example, policy="native", weights="resident")
    with torch.no_grad(), simulate(prepared) as exact:
        wanted = native(*example)
        assert torch.equal(exact(*example), wanted)
    assert torch.equal(engine(*example), wanted)
    for difference in node_differences(native, example):
        difference.check()
    return native, engine
