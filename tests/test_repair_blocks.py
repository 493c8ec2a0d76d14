"""The order in which blocks are pruned, against least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from adalayer_native.pruning.patterns import pattern_mask, pruned_blocks
from adalayer_native.repair.blocks import BlockOrder
from adalayer_native.repair.hessian import LayerHessian


def _problem(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a positive definite second moment with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    moment = mix @ mix.T / width + 0.05 * torch.eye(width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), moment


def _least_error(weight: Tensor, moment: Tensor, keep: Tensor) -> Tensor:
    """Error per row where the kept columns ``[R, K]`` take the values that suit best."""
    errors = []
    for row, kept in zip(weight, keep, strict=True):
        gone = row @ moment
        best = torch.zeros_like(row)
        if bool(kept.any()):
            best[kept] = torch.linalg.solve(moment[kept][:, kept], gone[kept])
        difference = row - best
        errors.append(difference @ moment @ difference)
    return torch.stack(errors)


@pytest.mark.parametrize(
    ("rows", "inputs", "positions", "size"),
    [(5, 6, 3, (2, 2)), (4, 7, 1, (4, 3)), (3, 3, 4, (16, 64))],
)
def test_costs_are_those_of_the_best_weights_that_are_left(rows, inputs, positions, size) -> None:
    weight, moment = _problem(rows, inputs * positions)
    gain = torch.rand(1, rows, dtype=torch.float64) + 0.5
    order = BlockOrder(weight[None], torch.linalg.inv(moment)[None], gain, inputs, size)
    assert order.blocks == -(-rows // size[0]) * -(-inputs // size[1]) * positions
    for (_, band), removals in zip(order.bands, order.removals, strict=True):
        assert sorted(column for _, column in removals) == list(range(len(order.columns)))
        keep = torch.ones(weight[band].shape, dtype=torch.bool)
        total = 0.0
        for cost, column in removals:
            # The cheapest one of what is left ...
            found = []
            for other in range(len(order.columns)):
                if bool(keep[0, order.columns[other]].all()):
                    without = keep.clone()
                    without[:, order.columns[other]] = False
                    error = _least_error(weight[band], moment, without)
                    found.append(float((gain[0, band] * error).sum()))
            keep[:, order.columns[column]] = False
            # ... and all costs so far are the error of the best weights without those blocks.
            total += cost
            error = float((gain[0, band] * _least_error(weight[band], moment, keep)).sum())
            assert error == pytest.approx(total, rel=1e-6)
            assert error == pytest.approx(min(found), rel=1e-6)


def test_masks_take_the_cheapest_next_removal_of_any_band() -> None:
    weight, moment = _problem(6, 8)
    order = BlockOrder(
        weight[None], torch.linalg.inv(moment)[None], torch.ones(1, 6).double(), 8, (2, 2)
    )
    before, steps = order.mask(0), [0] * len(order.bands)
    assert bool(before.all())
    for removed in range(1, order.blocks + 1):
        mask = order.mask(removed)
        assert int((~mask).sum()) == removed * 4
        assert not bool((mask & ~before).any())  # one more block, the others stay
        heads = [r[n][0] if n < len(r) else torch.inf
                 for n, r in zip(steps, order.removals, strict=True)]  # fmt: skip
        (band,) = {int(row) // 2 for row in (before & ~mask)[0].nonzero()[:, 0]}
        assert heads[band] == min(heads)
        steps[band] += 1
        before = mask


def test_groups_keep_to_themselves() -> None:
    weights, moments = zip(*(_problem(4, 6, seed) for seed in (1, 2)), strict=True)
    inverse = torch.linalg.inv(torch.stack(moments))
    gain = torch.ones(2, 4).double()
    both = BlockOrder(torch.stack(weights), inverse, gain, 6, (2, 3))
    single = [
        BlockOrder(w[None], i[None], gain[:1], 6, (2, 3))
        for w, i in zip(weights, inverse, strict=True)
    ]
    for found, expected in zip(
        both.removals, itertools.chain(*(order.removals for order in single)), strict=True
    ):
        assert [c for _, c in found] == [c for _, c in expected]
        assert [e for e, _ in found] == pytest.approx([e for e, _ in expected])
    with pytest.raises(ValueError, match="do not fit groups of 4"):
        BlockOrder(torch.stack(weights), inverse, gain, 6, (3, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_layer_loses_less_than_with_blocks_of_least_energy(groups: int) -> None:
    # Of 4 groups, blocks of 16 rows would lie across two.
    torch.manual_seed(0)
    layer = nn.Conv2d(64 * groups, 32, 3, padding=1, groups=groups)
    if groups == 4:
        assert (32 // groups) % 16
    hessian = LayerHessian(layer)
    mix = torch.randn(64 * groups, 64 * groups) / 8
    for _ in range(4):
        x = torch.relu(torch.randn(8, 64 * groups, 8, 8))
        hessian.add(torch.einsum("ij,njhw->nihw", mix, x))
    for sparsity in (0.25, 0.5, 0.75):
        found = hessian.quantize(4, sparsity, pattern="block16x64")
        assert found.mask is not None
        plain = pattern_mask(layer.weight.detach(), sparsity, "block16x64")
        assert int(found.mask.sum()) == int(plain.sum())
        assert found.error < hessian.quantize(4, mask=plain).error
        if groups == 4:  # by what each would cost alone
            cost = (
                hessian._ready(hessian.damping, hessian.correction)
                .pruning_cost(4)
                .reshape(hessian.shape)
            )
            expected = pattern_mask(cost, sparsity, "block16x64", score=cost)
        else:
            order = hessian._ready(hessian.damping, hessian.correction).block_order((16, 64))
            expected = order.mask(pruned_blocks(order.blocks, sparsity)).reshape(hessian.shape)
        assert torch.equal(found.mask, expected)


@pytest.mark.parametrize("kind", ["constant", "copies", "one image"])
def test_inputs_that_say_little(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 32)
    hessian = LayerHessian(layer)
    if kind == "constant":
        hessian.add(torch.ones(8, 128))
    elif kind == "copies":
        hessian.add(torch.randn(64, 1).expand(64, 128) * 1e3)
    else:
        hessian.add(torch.randn(1, 128))
    found = hessian.quantize(3, 0.5, pattern="block16x64")
    assert torch.isfinite(found.weight).all()
    assert found.mask is not None and int(found.mask.sum()) == 32 * 64
