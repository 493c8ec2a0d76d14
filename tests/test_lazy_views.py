"""Tensors that are negative or conjugate lazily: memory alone does not say what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers_patterns import small_engine
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native._fingerprint import memory_of
from adalayer_native.ops.fused import exact_softmax, fma


def lazily_negative(x: Tensor) -> Iterator[Tensor]:
    """Views equal to ``x`` whose memory holds ``-x``."""
    yield torch._neg_view(-x)
    yield torch.complex(torch.zeros_like(x), -x).conj().imag
    if x.dim() == 4:
        yield torch._neg_view((-x).contiguous(memory_format=torch.channels_last))


def same_for_views(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    expected = run(x)
    for view in lazily_negative(x):
        assert view.is_neg() and torch.equal(view, x)
        found = run(view)
        assert torch.equal(found, expected) and not found.is_neg()


IMAGES, ROWS = torch.randn(2, 3, 8, 8), torch.randn(4, 6)
RANGE = (-3.0, 3.0)


@pytest.mark.parametrize("policy", ["native", "fastest"])
def test_layers(policy: str) -> None:
    up = nn.ConvTranspose2d(3, 4, 2)
    for layer, x in (
        (ada.nn.Conv2d.from_float(nn.Conv2d(3, 4, 3), 4, input_range=RANGE), IMAGES),
        (ada.nn.ConvTranspose2d.from_float(up, 4, input_range=RANGE), IMAGES),
        (ada.nn.Linear.from_float(nn.Linear(6, 5), 4, input_range=RANGE), ROWS),
        (ada.nn.FakeQuantize(0.05, 10, 8), IMAGES),
    ):
        ada.nn.set_policy(layer, policy)
        same_for_views(layer, x)
        same_for_views(lambda v, layer=layer: layer(v.bfloat16()), x)


def test_residual() -> None:
    layer = ada.nn.Conv2d.from_float(nn.Conv2d(3, 4, 1), 4, input_range=RANGE)
    same_for_views(lambda view: layer(IMAGES, view), torch.randn(2, 4, 8, 8))


def test_layers_made_of_views() -> None:
    plain, lazy = nn.Linear(6, 5), nn.Linear(6, 5)
    for name in ("weight", "bias"):
        value = getattr(plain, name).detach()
        setattr(lazy, name, nn.Parameter(torch._neg_view(-value)))
    one, other = (ada.nn.Linear.from_float(layer, 4, input_range=RANGE) for layer in (plain, lazy))
    assert torch.equal(one(ROWS), other(ROWS))


def test_operators() -> None:
    same_for_views(lambda v: torch.ops.adalayer.quantize(v, 0.05, 10, 8), IMAGES)
    same_for_views(lambda v: fma(v, ROWS, ROWS), torch.randn(4, 6))
    same_for_views(lambda v: fma(ROWS, v, ROWS), torch.randn(4, 6))
    same_for_views(lambda v: fma(ROWS, ROWS, v), torch.randn(6))
    same_for_views(exact_softmax, ROWS)
    weight = torch.randint(-3, 4, (4, 6), dtype=torch.int8)
    assert torch.equal(ops.pack_weight(torch._neg_view(-weight), 4), ops.pack_weight(weight, 4))


def test_engine_and_model(tmp_path: Path) -> None:
    native, engine = small_engine()
    x = torch.randn(2, 3, 8, 8)
    same_for_views(engine, x)
    same_for_views(lambda view: engine.flat([view]), x)
    same_for_views(native, x)


class Between(nn.Module):
    """Its torch part gives the native one behind it a view that is negative lazily."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (
            ada.nn.Conv2d.from_float(nn.Conv2d(3, 3, 3, padding=1), 8, input_range=RANGE)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch._neg_view(-y))


def test_between_parts_of_an_engine() -> None:
    model, x = Between().eval(), torch.randn(2, 3, 8, 8)
    engine = ada.compile(model, x, policy="native")
    assert len(engine._steps) == 3
    assert torch.equal(engine(x), model(x))


def test_calibration_weights_and_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.PReLU(4)).eval()
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.PReLU(4)).eval()
    for (name, _), value in zip(list(lazy.named_parameters()), model.parameters(), strict=True):
        owner, _, leaf = name.rpartition(".")
        view = nn.Parameter(torch._neg_view(-value.detach()))
        setattr(lazy.get_submodule(owner), leaf, view)
    found = []
    for net, data in ((model, [IMAGES]), (lazy, [torch._neg_view(-IMAGES)])):
        scores = ada.analyze(net, data, progress=False)
        plan = ada.allocate(scores, ada.Budget(bits=5), model=net, calibration=data, progress=False)
        prepared = ada.prepare(net, plan)
        ada.calibrate(prepared, data, progress=False)
        ada.repair(prepared, data, progress=False)
        native = ada.convert(prepared)
        file = tmp_path / f"{len(found)}.safetensors"
        ada.save(native, file)
        found.append((native(IMAGES), ada.restore(net, file)(IMAGES), file.read_bytes()))
    (want, restored, held), (other, again, others) = found
    assert torch.equal(want, other) and torch.equal(restored, again) and held == others
    assert torch.equal(want, restored)


def test_bytes_are_those_of_the_values() -> None:
    for x in (torch.randn(5), torch.randn(2, 3).t(), torch.randn(4, dtype=torch.complex64)):
        plain = bytes(memory_of(x))
        assert bytes(memory_of(torch._neg_view(-x))) == plain
        if x.is_complex():
            assert bytes(memory_of(x.conj().resolve_conj().conj())) == plain
