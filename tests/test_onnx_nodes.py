"""The ONNX project's own tests of single operators (bench/onnx_nodes.py), and the page's table."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs the extra [onnx]")

import onnx.backend.base

from adalayer_native.onnx.backend import AdalayerBackend
from bench import onnx_nodes

# Why a test of these operators may be refused. Anything else has to pass.
REASONS = ("FLOAT8", "FLOAT4", "positions of its maxima")


@pytest.fixture(scope="module")
def found():
    return onnx_nodes.rows()


def test_the_package_has_the_tests():
    kinds = [kind for kind, _ in onnx_nodes.cases()]
    assert set(kinds) == set(onnx_nodes.OPERATORS)
    assert len(kinds) >= 150


@pytest.mark.parametrize("kind", onnx_nodes.OPERATORS)
def test_operator(found, kind):
    row = found[kind]
    assert row.passed
    strange = {
        name: why
        for name, why in row.refused.items()
        if not any(reason in why for reason in REASONS)
    }
    assert not strange
    if kind not in ("QuantizeLinear", "DequantizeLinear", "MaxPool"):
        assert not row.refused


def test_page_has_the_table(found):
    if f"onnx {onnx.__version__}:" not in onnx_nodes.PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is about another version of onnx")
    assert onnx_nodes.table(found) in onnx_nodes.PAGE.read_text(encoding="utf-8")


def test_interface():
    assert issubclass(AdalayerBackend, onnx.backend.base.Backend)
    assert AdalayerBackend.supports_device("CPU")
    assert not AdalayerBackend.supports_device("CUDA")
