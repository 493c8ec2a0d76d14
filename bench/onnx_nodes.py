"""The ONNX project's own tests of single operators, through our backend: a table in docs/onnx.md.

    python -m bench.onnx_nodes

runs the tests of the installed package ``onnx`` and replaces the generated part of the page.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adalayer_native.errors import AdaError
from bench.markdown import markers, write_part

__all__ = ["MARKERS", "OPERATORS", "PAGE", "Row", "cases", "outcome", "rows", "table"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "onnx.md"
MARKERS = markers("bench/onnx_nodes.py")
# What layers, quantization and images are made of.
OPERATORS = (
    "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul", "MatMulInteger",
    "QLinearMatMul", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "AveragePool",
    "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Pad", "Softmax",
    "LogSoftmax",
)  # fmt: skip


@dataclass
class Row:
    """What became of one operator's tests.

    Attributes:
        passed: their names.
        refused: why, by name.
    """

    passed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@functools.cache
def cases() -> list[tuple[str, Any]]:
    """Operator and test case, for every test of one of :data:`OPERATORS` alone.

    The package makes all of its tests for that, which takes seconds.
    """
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about overflows that tests are made of
        found = load_model_tests(kind="node")
    chosen = []
    for case in sorted(found, key=lambda item: item.name):
        kinds = [node.op_type for node in case.model.graph.node]
        if len(kinds) == 1 and kinds[0] in OPERATORS:
            chosen.append((kinds[0], case))
    return chosen


def outcome(case: Any) -> str:
    """Runs a test: an empty text, or why the backend refuses it.

    Integers have to be equal, floats within the tolerance that the test itself names.

    Raises:
        AssertionError: the backend gives another result.
    """
    from adalayer_native.onnx.backend import AdalayerBackend

    for inputs, wanted in case.data_sets:
        try:
            results = AdalayerBackend.run_model(case.model, inputs)
        except AdaError as error:
            return str(error).split(": ", 1)[1]
        for result, expected in zip(results, map(_array, wanted), strict=True):
            assert result.dtype == expected.dtype, (case.name, result.dtype, expected.dtype)
            if np.issubdtype(expected.dtype, np.floating):
                np.testing.assert_allclose(result, expected, rtol=case.rtol, atol=case.atol)
            else:  # those of 2 and 4 bits are types that numpy does not know
                np.testing.assert_array_equal(result.astype(np.int64), expected.astype(np.int64))
    return ""


def _array(value: Any) -> np.ndarray:
    import onnx

    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return np.asarray(value)


def rows() -> dict[str, Row]:
    """All tests, by operator."""
    found = {kind: Row() for kind in OPERATORS}
    for kind, case in cases():
        why = outcome(case)
        if why:
            found[kind].refused[case.name] = why
        else:
            found[kind].passed.append(case.name)
    return found


def table(found: dict[str, Row]) -> str:
    """The page's generated part."""
    import onnx

    tests = sum(len(row.passed) + len(row.refused) for row in found.values())
    passed = sum(len(row.passed) for row in found.values())
    lines = [
        f"onnx {onnx.__version__}: {passed} of {tests} tests pass, the others are refused.",
        "",
        "| operator | tests | pass | refused, and why |",
        "|---|---|---|---|",
    ]
    for kind, row in found.items():
        reasons: dict[str, list[str]] = {}
        for name, why in row.refused.items():
            reasons.setdefault(_reason(why), []).append(name.removeprefix("test_"))
        text = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        count = len(row.passed) + len(row.refused)
        lines.append(f"| {kind} | {count} | {len(row.passed)} | {text} |")
    return "\n".join(lines)


def _reason(why: str) -> str:
    """Without the names that each test has for its values."""
    return why.rpartition(": ")[2].replace("|", "\\|")


def main() -> None:
    """Replaces the table in the page."""
    write_part(PAGE, MARKERS, table(rows()))


if __name__ == "__main__":
    main()
