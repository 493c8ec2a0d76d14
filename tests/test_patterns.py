"""Patterns of pruning: which weights go, how many, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.allocation.size import estimate_bytes
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.plan import PATTERNS, LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.pruning import magnitude_mask, pattern_mask
from adalayer_native.pruning.patterns import block_size, pattern_pruned_count, pruned_blocks


@pytest.mark.parametrize("pattern", ["block16x64", "block32x64"])
@pytest.mark.parametrize("shape", [(64, 128, 3, 3), (40, 70, 2, 1), (33, 100), (5, 3, 1, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
def test_whole_blocks_of_least_energy_go(
    shape: tuple[int, ...], sparsity: float, pattern: str
) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape)
    mask = pattern_mask(w, sparsity, pattern)
    size = block_size(pattern)
    assert size is not None
    kept, removed = [], []
    flat, chosen = w.reshape(*shape[:2], -1), mask.reshape(*shape[:2], -1)
    for k in range(flat.shape[2]):
        for o in range(0, shape[0], size[0]):
            for i in range(0, shape[1], size[1]):
                part = chosen[o : o + size[0], i : i + size[1], k]
                assert part.all() or not part.any()
                energy = float(flat[o : o + size[0], i : i + size[1], k].square().sum())
                (kept if part.all() else removed).append(energy)
    assert len(removed) == pruned_blocks(len(kept) + len(removed), sparsity)
    if kept and removed:
        assert max(removed) <= min(kept) * (1 + 1e-5)
    least = pattern_pruned_count(shape, sparsity, pattern)
    pruned = int((~mask).sum())
    assert least <= pruned
    if shape[0] % size[0] == 0 and shape[1] % size[1] == 0:
        assert least == pruned


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 21), st.integers(1, 3), st.integers(1, 2)),
    st.integers(0, 2**31),
)
def test_two_of_four(shape: tuple[int, ...], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mask = pattern_mask(w, 0.5, "2:4")
    assert int((~mask).sum()) == pattern_pruned_count(shape, 0.5, "2:4")
    for run, kept in zip(w.split(4, dim=1), mask.split(4, dim=1), strict=True):
        wanted = min(2, run.shape[1])
        assert (kept.sum(dim=1) == wanted).all()
        least_kept = run.abs().masked_fill(~kept, float("inf")).amin(dim=1)
        assert (run.abs().masked_fill(kept, 0).amax(dim=1) <= least_kept).all()


@pytest.mark.parametrize("shape", [(10, 64), (32, 48, 3, 3)])
def test_a_block_is_left_of_every_layer(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.5, 0.95, 0.999):
        mask = pattern_mask(weight, sparsity, "block32x64")
        assert bool(mask.any())
        assert int((~mask).sum()) == pattern_pruned_count(shape, sparsity, "block32x64")
    # At the largest sparsity one block is left.
    positions = weight[0, 0].numel()
    assert int((~mask).sum()) == (positions - 1) * weight.shape[0] * weight.shape[1]


def test_scores_decide_and_equal_ones_go_in_order() -> None:
    w = torch.ones(32, 64)
    assert pattern_mask(w, 0.5, "block16x64")[:, 0].tolist() == [False] * 16 + [True] * 16
    score = torch.ones(32, 64)
    score[:16] = 2
    kept = pattern_mask(w, 0.5, "block16x64", score=score)
    assert kept[:, 0].tolist() == [True] * 16 + [False] * 16
    assert torch.equal(pattern_mask(w, 0.5), magnitude_mask(w, 0.5))
    assert pattern_mask(w, 0.0, "2:4").all()


def test_refusals() -> None:
    w = torch.ones(4, 8)
    with pytest.raises(PlanError, match="pattern must be one of"):
        pattern_mask(w, 0.5, "diagonal")
    with pytest.raises(PlanError, match=r"half of the weights or none, got 0\.25"):
        pattern_mask(w, 0.25, "2:4")
    with pytest.raises(PlanError, match="sparsity"):
        pattern_mask(w, 1.0, "block16x64")
    w[0, 0] = float("nan")
    for pattern in PATTERNS:
        with pytest.raises(CalibrationError, match="NaN"):
            pattern_mask(w, 0.5, pattern)
    entry = LayerPlan("a", "linear", 32, 4, 0.5, "2:4")
    with pytest.raises(PlanError, match=r"sparsity with pattern '2:4' must be 0 or 0\.5"):
        entry.sparsity = 0.3
    with pytest.raises(PlanError, match="pattern must be one of"):
        entry.pattern = "channel"


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(96, 64, 2, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


def _plan(model: nn.Module, sparsity: float, pattern: str) -> Plan:
    return Plan(
        {
            n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), 4, sparsity, pattern)
            for n, layer in supported_layers(model).items()
        }
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_is_carried_out_and_its_file_foretold(pattern: str, tmp_path) -> None:
    model, x = _model(), torch.rand(2, 3, 8, 8)
    plan = _plan(model, 0.5, pattern)
    assert Plan.from_json(plan.to_json()) == plan
    assert (pattern in str(plan)) == (pattern != "unstructured")
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    for name in plan:
        weight = native.get_submodule(name).weight_int()
        pruned = int((weight == 0).sum())
        assert pruned >= pattern_pruned_count(tuple(weight.shape), 0.5, pattern)
    size = ada.save(native, tmp_path / "m.safetensors")
    assert size <= estimate_bytes(model, plan)
    # Rounding to 4 bits makes a few zeros more, which only a bitmask can use.
    assert size >= 0.9 * estimate_bytes(model, plan)
    if pattern.startswith("block"):
        packed = native.get_submodule("3").weight_packed
        assert ops.packed_info(packed)["encoding"] == "blocks"


@pytest.mark.parametrize("pattern", ["block16x64", "block32x64", "2:4"])
def test_repair_keeps_to_the_pattern(pattern: str) -> None:
    model, images = _model(), [torch.rand(8, 3, 8, 8) for _ in range(4)]
    prepared = ada.prepare(model, _plan(model, 0.5, pattern))
    ada.calibrate(prepared, images, progress=False)
    report = ada.repair(prepared, images, progress=False)
    assert all(row.error <= row.plain_error * (1 + 1e-6) for row in report.layers.values())
    native = ada.convert(prepared)
    for name in ("3", "10"):
        weight = native.get_submodule(name).weight_int()
        keep = weight != 0
        if pattern == "2:4":
            for part in keep.split(4, dim=1):
                assert (part.sum(dim=1) <= 2).all()
        else:
            pruned = int((~keep).sum())
            assert pruned >= pattern_pruned_count(tuple(weight.shape), 0.5, pattern)
            # What is kept lies in blocks that are kept: the mask of the nonzeros is no larger.
            size = block_size(pattern)
            assert size is not None
            live = keep.reshape(*keep.shape[:2], -1)
            blocks = [
                bool(part.any())
                for rows in live.split(size[0])
                for columns in rows.split(size[1], dim=1)
                for part in columns.unbind(dim=2)
            ]
            assert sum(blocks) <= len(blocks) - pruned_blocks(len(blocks), 0.5)
