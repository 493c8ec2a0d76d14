"""What the second law allows an engine that does not have the modules' bits."""

from __future__ import annotations

from typing import Any

from helpers_engine import node_differences
from torch import nn

from .judging import Failed, Finding, pairs
from .network import Call
from .noise import distance

# A level apart on a value in a thousand, the error of a result is of the size of quantization's own
# error, a few levels of everything behind it. This is far above that, and far below a wrong result.
SHARE = 0.05


def check_levels(native: nn.Module, example: Call, call: Call, got: Any, result: Any) -> int:
    """Check an engine whose results differ from those of its modules.

    The law is about values on identical inputs, which ``node_differences`` arranges: it runs the
    engine's program node by node, and puts the program's own level where torch's was judged. Bits
    differ where torch adds up floats, there by one level, on one value in a thousand. Results are
    then compared once more, roughly: parts that run in torch are in no program.

    Returns:
        The number of values that were a level apart.

    Raises:
        Failed: more than that.
    """
    differences = node_differences(native, call.example, example.example)
    for difference in differences:
        try:
            difference.check()
        except AssertionError as error:
            raise Failed(Finding("engine", "wrong", f"against the law: {difference}")) from error
    count = sum(difference.count for difference in differences)
    for cell, path, a, b in pairs("engine", got, result):
        moved, size = distance(a, b), distance(b, 0 * b)
        if moved > (SHARE if count else 1e-6) * size:
            detail = f"{path}: {moved:.4g} from the native result, whose length is {size:.4g}"
            raise Failed(Finding("engine", "wrong", detail, cell))
    return count
