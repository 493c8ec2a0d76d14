"""Magnitude masks: exact count, order, ties, errors."""

from __future__ import annotations

import pytest
import torch

from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.pruning import magnitude_mask


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.25, 1 / 3, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(7,), (16, 3, 3, 3), (64, 33)])
def test_removes_exactly_the_smallest(shape: tuple[int, ...], sparsity: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape)
    mask = magnitude_mask(w, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == w.shape
    removed = int((~mask).sum())
    assert removed == int(w.numel() * sparsity + 0.5)
    if 0 < removed < w.numel():
        assert w[~mask].abs().max() <= w[mask].abs().min()


def test_ties_go_in_memory_order() -> None:
    w = torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, -1.0]])
    mask = magnitude_mask(w, 0.5)
    assert mask.tolist() == [[False, False, False], [True, True, True]]
    assert torch.equal(mask, magnitude_mask(w.clone(), 0.5))


def test_all_equal_and_empty() -> None:
    assert int(magnitude_mask(torch.zeros(10), 0.3).sum()) == 7
    assert magnitude_mask(torch.zeros(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), 2.0])
def test_refuses_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(PlanError, match="sparsity"):
        magnitude_mask(torch.ones(4), sparsity)


def test_refuses_nan() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        magnitude_mask(torch.tensor([1.0, float("nan")]), 0.5)
