"""Which blocks of a layer to prune, one after the other, the kept weights making up for each.

Removing the columns ``B`` from the rows ``W`` of a band (the output channels that a block has),
with every other column moved to where it makes up best, costs ``sum_r w_B ([H^-1]_BB)^-1 w_B^T`` in
squared error of the outputs. The cheapest block goes, the others and the inverse follow:

    ``W <- W - w_B ([H^-1]_BB)^-1 [H^-1]_B``,
    ``H^-1 <- H^-1 - [H^-1]_B^T ([H^-1]_BB)^-1 [H^-1]_B``

until nothing is left. That is Optimal Brain Compression (Frantar and Alistarh, 2022) for groups of
columns; as there, one run gives every sparsity: what each removal cost is kept, and a mask takes
the cheapest next removal of any band until enough blocks are gone.
"""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor

__all__ = ["BlockOrder"]

_Removal = tuple[float, int]  # what it costs, which group of columns


class BlockOrder:
    """The order in which the blocks of one layer are pruned.

    Args:
        target: ``[G, R, K]``: rows of ``G`` groups, columns in the order ``[I, positions]``.
        inverse: ``H^-1``, ``[G, K, K]``.
        gain: ``[G, R]``: what a squared error of a row counts.
        inputs: ``I``, input channels per group.
        size: output and input channels of a block. With more than one group, ``R`` is a multiple of
            the former.
    """

    def __init__(
        self, target: Tensor, inverse: Tensor, gain: Tensor, inputs: int, size: tuple[int, int]
    ) -> None:
        groups, rows, width = target.shape
        if groups > 1 and rows % size[0]:
            raise ValueError(f"blocks of {size[0]} rows do not fit groups of {rows}")
        self.shape = target.shape
        channels = torch.arange(width).reshape(inputs, -1)
        self.columns = [c for part in channels.split(size[1]) for c in part.unbind(dim=1)]
        self.bands = [
            (group, slice(start, min(start + size[0], rows)))
            for group in range(groups)
            for start in range(0, rows, size[0])
        ]
        # A block's columns side by side: what is left after a removal is then cut out in slabs.
        together = torch.cat(self.columns).to(target.device)
        weighted = (target * gain.sqrt().unsqueeze(2))[:, :, together]
        inverse = inverse[:, together][:, :, together]
        widths = [len(c) for c in self.columns]
        self.removals = [_trace(weighted[g, r], inverse[g], widths) for g, r in self.bands]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.bands) * len(self.columns)

    def mask(self, removed: int) -> Tensor:
        """Mask of the kept weights without ``removed`` blocks: bool ``[G, R, K]``."""
        keep = torch.ones(self.shape, dtype=torch.bool)
        queue = [(steps[0][0], band, 0) for band, steps in enumerate(self.removals)]
        heapq.heapify(queue)
        for _ in range(removed):
            _, band, step = heapq.heappop(queue)
            group, rows = self.bands[band]
            keep[group, rows, self.columns[self.removals[band][step][1]]] = False
            if step + 1 < len(self.columns):
                heapq.heappush(queue, (self.removals[band][step + 1][0], band, step + 1))
        return keep


def _trace(weight: Tensor, inverse: Tensor, widths: list[int]) -> list[_Removal]:
    """All removals of a band ``[R, K]``, in their order; ``widths``: columns of its blocks."""
    widths, left = list(widths), list(range(len(widths)))
    found: list[_Removal] = []
    while left:
        ends = list(itertools.accumulate(widths))
        places = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
        costs = _costs(weight, inverse, places)
        best = int(torch.argmin(costs))
        found.append((float(costs[best]), left.pop(best)))
        widths.pop(best)
        gone = places[best]
        lower = torch.linalg.cholesky(inverse[gone, gone])
        # L^-1 [H^-1]_B and L^-1 w_B^T: their products are the two updates.
        across = _without(inverse[gone], gone, 1)
        across = torch.linalg.solve_triangular(lower, across, upper=False)
        lost = torch.linalg.solve_triangular(lower, weight[:, gone].T, upper=False)
        weight = _without(weight, gone, 1).addmm_(lost.T, across, alpha=-1.0)
        inverse = _without(_without(inverse, gone, 0), gone, 1)
        inverse.addmm_(across.T, across, alpha=-1.0)
    return found


def _without(x: Tensor, gone: slice, dim: int) -> Tensor:
    """A copy without some rows or columns."""
    return torch.cat(
        (x.narrow(dim, 0, gone.start), x.narrow(dim, gone.stop, x.shape[dim] - gone.stop)), dim
    )


def _costs(weight: Tensor, inverse: Tensor, places: list[slice]) -> Tensor:
    """What removing each block would cost, ``[blocks]``; blocks at the edge are narrower."""
    costs = weight.new_empty(len(places))
    for width in {place.stop - place.start for place in places}:
        which = [i for i, place in enumerate(places) if place.stop - place.start == width]
        inner = torch.stack([inverse[places[i], places[i]] for i in which])
        rows = torch.stack([weight[:, places[i]].T for i in which])
        lost = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), rows, upper=False)
        costs[which] = lost.square().sum(dim=(1, 2))
    return costs
