"""What the second law allows an engine that does not have the modules' bits."""

from __future__ import annotations

from typing import Any

from helpers_engine import node_differences
from torch import fx
from torch.utils import _pytree as pytree

from adalayer_native.engine.runtime import Engine

from .judging import Failed, Finding, pairs, unequal
from .network import Call
from .noise import distance

# Operators for which torch has kernels that round otherwise, as their names show. Which one runs
# depends on how operands lie in memory, and an engine hands contiguous ones to its torch parts.
KERNELS = (
    "softmax", "sum", "mean", "norm", "var", "std", "mm", "matmul", "linear", "conv", "attention",
    "lstm", "gru", "rnn", "einsum", "prod", "pool", "upsample", "exp", "log", "sigmoid", "tanh",
    "gelu", "silu", "mish", "elu", "softplus", "erf", "sin", "cos", "sqrt", "pow", "logsumexp",
)  # fmt: skip
# That moves the last bit of a float...
FLOAT = 1e-6
# ...and so, rarely, a level that a quantizer makes of it, with an error of the size of
# quantization's own behind it. This is far above that, and far below a wrong result.
SHARE = 0.05

Unequal = tuple[int, str, Any, Any]


def differing(got: Any, result: Any) -> list[Unequal]:
    """The leaves of an engine's result that have not the bits of the native model's."""
    return [item for item in pairs("engine", got, result) if unequal(item[2], item[3])]


def check_levels(
    engine: Engine, native: fx.GraphModule, example: Call, call: Call, found: list[Unequal]
) -> bool:
    """Check an engine whose results differ from those of its modules.

    Every step of its programs has the modules' bits on identical inputs, which ``node_differences``
    arranges: it runs them node by node, and puts the program's own level where torch's was judged.
    What is left are the floats of parts that run in torch.

    Returns:
        Whether a result differs by more than the last bits of floats.

    Raises:
        Failed: a step differs; nothing like that runs in torch; or the difference is large.
    """
    excused = cells_with_kernels(native) if _runs_torch(engine) else set()
    for cell, path, a, b in found:
        if cell not in excused:
            raise Failed(Finding("engine", "wrong", f"{path}: {unequal(a, b)}", cell))
    for difference in node_differences(native, call.example, example.example):
        try:
            difference.check()
        except AssertionError as error:
            raise Failed(Finding("engine", "wrong", f"against the law: {difference}")) from error
    levels = False
    for cell, path, a, b in found:
        moved, size = distance(a, b), distance(b, 0 * b)
        if moved > SHARE * size:
            detail = f"{path}: {moved:.4g} from the native result, whose length is {size:.4g}"
            raise Failed(Finding("engine", "wrong", detail, cell))
        levels |= moved > FLOAT * size
    return levels


def _runs_torch(engine: Engine) -> bool:
    return any(row.kind != "native" for row in engine.coverage(rounds=0))


def cells_with_kernels(native: fx.GraphModule) -> set[int]:
    """Cells whose results depend on an operator of ``KERNELS``."""
    (output,) = (node for node in native.graph.nodes if node.op == "output")
    flat = pytree.tree_leaves(output.args[0])
    found = set()
    for cell, result in enumerate(pytree.tree_unflatten(flat, native.meta["signature"].out_spec)):
        pending = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)]
        seen = set(pending)
        while pending:
            node = pending.pop()
            name = str(node.target)
            # (A norm on a grid is torch's own in a part that runs in torch.)
            ours = name.startswith("adalayer.") and "norm" not in name
            ours |= node.op != "call_function"
            if not ours and any(kernel in name for kernel in KERNELS):
                found.add(cell)
            pending += [item for item in node.all_input_nodes if item not in seen]
            seen.update(node.all_input_nodes)
    return found
