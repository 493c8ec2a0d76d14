"""Rounding and pruning one layer with error compensation, for many settings at once.

With ``H`` the second moment of a layer's inputs, the squared error of its outputs is
``tr((W - Q) H (W - Q)^T)``, and the rows of ``W`` (output channels) are independent of each other.

:func:`compensate` fixes the columns of ``Q`` one after the other and moves the columns that are
still free to where they make up best for the error made so far. For the first column of what is
left that is the update of Optimal Brain Compression (Frantar and Alistarh, 2022),
``dw = -(w_j - q_j) / [H^-1]_jj * H^-1[:, j]``; the inverses of all the trailing submatrices are
read from one Cholesky factor ``H^-1 = U^T U``, as in GPTQ (Frantar et al., 2023). A weight may also
be fixed at zero; that costs ``w_j^2 / [H^-1]_jj`` instead of ``(w_j - q_j)^2 / [H^-1]_jj``, and the
weights with the least difference are the ones that are pruned, block by block (SparseGPT, Frantar
and Alistarh, 2023, there with ``w_j^2 / [H^-1]_jj`` alone).

:func:`refine` then takes the result as a start: scales by least squares, integers by coordinate
descent, in turn. No step of it can increase the error.

Tensors are float32 ``[G, T, K]``: ``G`` groups, ``T`` rows per group (settings x output channels of
the group, the settings outermost), ``K`` columns. A *setting* is a number of bits with a sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "compensate", "refine"]

_BLOCK = 128


@dataclass
class Rows:
    """The grid of every row and how much of it is pruned.

    Attributes:
        scale: float32 ``[G, T]``, positive; of columns in groups ``[G, T, groups]``, or one for
            each of them, ``[G, T, K]``, which then stays.
        low, high: float32, bounds of the integers: ``[T]``, or ``[G, T, K]`` where each has its
            own.
        pruned: for every setting the number of weights to remove, over all its rows and groups.
        gain: float32 ``[G, R]``: what a squared error of an output channel counts in that choice.
        keep: bool ``[G, T, K]``: weights that may differ from zero. Without it the weights to
            prune are chosen here.
        members: int64 ``[1, K]``: the group of every column.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    pruned: list[int]
    gain: Tensor
    keep: Tensor | None = None
    members: Tensor | None = None

    def steps(self, scale: Tensor, width: int) -> Tensor:
        """The scale of every weight, ``[G, T, K]``."""
        if scale.dim() == 2:
            return scale.unsqueeze(2).expand(-1, -1, width)
        return scale if self.members is None else scale[:, :, self.members[0]]

    def round(self, weight: Tensor, scale: Tensor, column: int) -> Tensor:
        """Integers of a column's weights ``[G, T]``."""
        low, high = self.low, self.high
        if low.dim() == 3:
            low, high = low[:, :, column], high[:, :, column]
        return torch.clamp(torch.div(weight, scale).round_(), low, high)


def compensate(target: Tensor, factor: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """One sweep over the columns, the first one first.

    Args:
        target: ``[G, T, K]``, the weights to approximate.
        factor: ``[G, K, K]``, upper triangular ``U`` with ``U^T U = H^-1``.
        rows: grids, and what is pruned.

    Returns:
        ``(levels, keep)``: integers as float32 ``[G, T, K]``, and the mask, bool of that shape.
    """
    groups, _, width = target.shape
    weight = target.clone()
    levels = torch.zeros_like(weight)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    choice = None if rows.keep is not None else _Choice(target, diagonal, rows)
    keep = torch.ones_like(weight, dtype=torch.bool) if rows.keep is None else rows.keep
    steps = rows.steps(rows.scale, width)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        if choice is not None:
            keep[:, :, start:stop] = choice.block(weight[:, :, start:stop], start, stop)
        kept = keep[:, :, start:stop].float()
        errors = weight.new_empty(groups, weight.shape[1], stop - start)
        for j in range(start, stop):
            w, scale = weight[:, :, j], steps[:, :, j]
            q = rows.round(w, scale, j).mul_(kept[:, :, j - start])
            levels[:, :, j] = q
            error = w.sub(q.mul_(scale)).div_(diagonal[:, j, None])
            errors[:, :, j - start] = error
            if j + 1 < stop:
                weight[:, :, j + 1 : stop].baddbmm_(
                    error.unsqueeze(2), factor[:, j : j + 1, j + 1 : stop], alpha=-1.0
                )
        if stop < width:
            weight[:, :, stop:].baddbmm_(errors, factor[:, start:stop, stop:], alpha=-1.0)
    return levels, keep


class _Choice:
    """Which weights are pruned: a number per block, the weights themselves when it comes up.

    Weights of later blocks move until then, so only their number is decided before: as many as the
    block has of the weights that look cheapest at the beginning.
    """

    def __init__(self, target: Tensor, diagonal: Tensor, rows: Rows) -> None:
        self.rows, self.diagonal = rows, diagonal
        self.settings = len(rows.pruned)
        self.shape = target.shape
        width = target.shape[2]
        blocks = range(0, width, _BLOCK)
        self.counts: list[list[int]] = []
        for setting, count in enumerate(rows.pruned):
            if count == 0:
                self.counts.append([0] * len(blocks))
                continue
            cost = self._cost(target, 0, width, setting)
            removed = ~_keep_largest(cost, count)
            self.counts.append([int(removed[:, :, b : b + _BLOCK].sum()) for b in blocks])

    def _cost(self, weight: Tensor, start: int, stop: int, setting: int) -> Tensor:
        """What pruning each weight costs more than rounding it, ``[G, R, B]``."""
        channels = self.shape[1] // self.settings
        part = slice(setting * channels, (setting + 1) * channels)
        w = weight[:, part]
        scale = self.rows.steps(self.rows.scale, self.shape[2])[:, part, start:stop]
        low, high = self.rows.low[part, None], self.rows.high[part, None]
        q = torch.clamp(torch.div(w, scale).round_(), low, high).mul_(scale)
        cost = w.square() - q.sub_(w).square_()
        cost /= self.diagonal[:, None, start:stop].square()
        # Many weights round to zero anyway and cost nothing; of those the smallest go first.
        return cost.mul_(self.rows.gain[:, :, None]).add_(w.abs(), alpha=1e-30)

    def block(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Mask of a block, bool ``[G, T, B]``."""
        keep = torch.ones_like(weight, dtype=torch.bool)
        channels = self.shape[1] // self.settings
        for setting in range(self.settings):
            count = self.counts[setting][start // _BLOCK]
            if count:
                part = slice(setting * channels, (setting + 1) * channels)
                keep[:, part] = _keep_largest(self._cost(weight, start, stop, setting), count)
        return keep


def _keep_largest(cost: Tensor, removed: int) -> Tensor:
    """Mask that is false at the ``removed`` smallest values; ties go in memory order."""
    flat = cost.reshape(-1)
    keep = torch.ones_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(removed).values
    below = flat < threshold
    keep[below] = False
    ties = torch.nonzero(flat == threshold).reshape(-1)
    keep[ties[: removed - int(below.sum())]] = False
    return keep.view(cost.shape)


def refine(
    target: Tensor,
    hessian: Tensor,
    levels: Tensor,
    keep: Tensor,
    rows: Rows,
    passes: int,
    *,
    refit: bool = True,
) -> tuple[Tensor, Tensor]:
    """Least-squares scales and coordinate descent over the integers, in turn.

    For fixed integers ``q`` of a row the best scale is ``(q H w) / (q H q)``; for a fixed scale and
    all other integers the best ``q_j`` is the rounded minimum of a parabola.

    Args:
        target: ``[G, T, K]``.
        hessian: ``[G, K, K]``, symmetric, positive diagonal.
        levels: integers to start from, ``[G, T, K]``; changed in place.
        keep: where integers may differ from zero.
        rows: grids.
        passes: sweeps over the columns.
        refit: false leaves the scales as they are.

    Returns:
        ``(levels, scale)``: the integers, and scales of the shape of ``rows.scale``.
    """
    width = target.shape[2]
    pull = target @ hessian
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    scale = rows.scale
    for turn in range(passes + 1):
        if scale.dim() == 2:
            product = levels @ hessian
            if refit:
                scale = _refit(levels, pull, product, scale)
            product.mul_(scale[:, :, None])
        else:
            product = (levels * rows.steps(scale, width)) @ hessian
            if refit and rows.members is not None:
                scale = _refit_groups(levels, pull, product, scale, hessian, rows.members[0])
        if turn == passes:
            break
        gradient = pull - product  # (W - Q) H
        each = rows.steps(scale, width)
        changed = False
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            kept = keep[:, :, start:stop].float()
            steps = torch.zeros_like(kept)
            for j in range(start, stop):
                old, own = levels[:, :, j], each[:, :, j]
                best = torch.addcdiv(old * own, gradient[:, :, j], diagonal[:, j, None])
                new = rows.round(best, own, j).mul_(kept[:, :, j - start])
                step = new.sub(old).mul_(own)
                levels[:, :, j] = new
                steps[:, :, j - start] = step
                if j + 1 < stop:
                    gradient[:, :, j + 1 : stop].baddbmm_(
                        step.unsqueeze(2), hessian[:, j : j + 1, j + 1 : stop], alpha=-1.0
                    )
            if stop < width and bool(steps.any()):
                gradient[:, :, stop:].baddbmm_(steps, hessian[:, start:stop, stop:], alpha=-1.0)
            changed = changed or bool(steps.any())
        if not changed:
            break
    return levels, scale


def _refit(levels: Tensor, pull: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    return _better(scale, (levels * pull).sum(dim=2), (levels * product).sum(dim=2))


def _refit_groups(
    levels: Tensor, pull: Tensor, product: Tensor, scale: Tensor, hessian: Tensor, members: Tensor
) -> Tensor:
    """Scales ``[1, T, groups]``, one group after the other; ``product`` follows in place."""
    scale = scale.clone()
    for group in range(scale.shape[2]):
        own = (members == group).nonzero().flatten()
        part, old = levels[:, :, own], scale[:, :, group]
        moved = part @ hessian[:, own]
        below = (part * moved[:, :, own]).sum(dim=2)
        missing = pull[:, :, own] - product[:, :, own]
        above = (part * missing).sum(dim=2) + old * below
        new = _better(old, above, below)
        product += moved.mul_((new - old)[:, :, None])
        scale[:, :, group] = new
    return scale


def _better(scale: Tensor, above: Tensor, below: Tensor) -> Tensor:
    fits = (above > 0) & (below > 0)
    best = above / torch.where(fits, below, torch.ones_like(below))
    # Far from the present scale the quotient is noise, of a row that hardly matters.
    return torch.where(fits & (best > scale / 4) & (best < scale * 4), best, scale)
