"""What the second law allows an engine that does not have the modules' bits."""

from __future__ import annotations

from typing import Any

from helpers_engine import node_differences
from torch import fx, nn
from torch.utils import _pytree as pytree

from .judging import Failed, Finding, pairs, unequal
from .network import Call
from .noise import distance

# Operators that torch adds up in an order of its own, as their names show; and modules that are
# such operators.
SUMS = ("avg_pool", "mean", "sum", "norm", "upsample", "interpolate")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# A level apart on a value in a thousand, the error of a result is of the size of quantization's own
# error, a few levels of everything behind it. This is far above that, and far below a wrong result.
SHARE = 0.05
# Without such a level it is that of float sums.
FLOAT = 1e-6

Unequal = tuple[int, str, Any, Any]


def differing(got: Any, result: Any) -> list[Unequal]:
    """The leaves of an engine's result that have not the bits of the native model's."""
    return [item for item in pairs("engine", got, result) if unequal(item[2], item[3])]


def check_levels(native: fx.GraphModule, example: Call, call: Call, found: list[Unequal]) -> int:
    """Check an engine whose results differ from those of its modules.

    The law is about values on identical inputs, which ``node_differences`` arranges: it runs the
    engine's program node by node, and puts the program's own level where torch's was judged. Bits
    differ where torch adds up floats, there by one level, on one value in a thousand. Results are
    then compared once more, roughly: parts that run in torch are in no program.

    Returns:
        The number of values that were a level apart.

    Raises:
        Failed: more than that, or a cell without such sums differs at all.
    """
    excused = cells_with_sums(native)
    for cell, path, a, b in found:
        if cell not in excused:
            detail = f"{path}: {unequal(a, b)}"
            raise Failed(Finding("engine", "wrong", detail, cell))
    differences = node_differences(native, call.example, example.example)
    for difference in differences:
        try:
            difference.check()
        except AssertionError as error:
            raise Failed(Finding("engine", "wrong", f"against the law: {difference}")) from error
    count = sum(difference.count for difference in differences)
    for cell, path, a, b in found:
        moved, size = distance(a, b), distance(b, 0 * b)
        if moved > (SHARE if count else FLOAT) * size:
            detail = f"{path}: {moved:.4g} from the native result, whose length is {size:.4g}"
            raise Failed(Finding("engine", "wrong", detail, cell))
    return count


def cells_with_sums(native: fx.GraphModule) -> set[int]:
    """Cells whose results depend on an operator that torch adds up in an order of its own."""
    (output,) = (node for node in native.graph.nodes if node.op == "output")
    flat = pytree.tree_leaves(output.args[0])
    found = set()
    for cell, result in enumerate(pytree.tree_unflatten(flat, native.meta["signature"].out_spec)):
        pending = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)]
        seen = set(pending)
        while pending:
            node = pending.pop()
            module = native.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, NORMS) or any(name in str(node.target) for name in SUMS):
                found.add(cell)
            pending += [item for item in node.all_input_nodes if item not in seen]
            seen.update(node.all_input_nodes)
    return found
