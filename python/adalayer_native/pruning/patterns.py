"""Where zeros may lie: patterns of pruning, and the masks that keep to them.

- ``"unstructured"``: anywhere; the file holds a bitmask and the nonzeros.
- ``"block16x64"``: blocks of 16 output channels x 64 input channels at one kernel position, fewer
  at the edges; the kernels skip them and the file leaves them out.
- ``"block32x64"``: the same with 32 output channels, which the kernels take together.
- ``"2:4"``: of every four neighbouring input channels at a kernel position at most two are kept:
  half of the weights, as GPUs multiply them.

A weight here has its output channels first: ``[O, I/groups, KH, KW]`` or ``[O, I]``. In a grouped
convolution the kernels skip a block only where groups begin at multiples of its height.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from adalayer_native import _C
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.plan import PATTERNS
from adalayer_native.pruning.masks import magnitude_mask, pruned_count

__all__ = ["FILE_BLOCK", "block_size", "pattern_mask", "pattern_pruned_count", "pruned_blocks"]

# Output x input channels of what the file's encoding of blocks can leave out.
FILE_BLOCK: tuple[int, int] = _C.FILE_BLOCK
_RUN = 4  # of input channels, in the pattern 2:4
_KEPT = 2


def block_size(pattern: str) -> tuple[int, int] | None:
    """Output and input channels of a block; ``None`` for a pattern without blocks.

    Raises:
        PlanError: unknown pattern.
    """
    _check(pattern)
    if not pattern.startswith("block"):
        return None
    rows, columns = pattern.removeprefix("block").split("x")
    return int(rows), int(columns)


def pruned_blocks(blocks: int, sparsity: float) -> int:
    """How many of a layer's blocks a sparsity removes: the nearest whole number, but never all.

    A layer that is one block would otherwise be gone at one half.

    Raises:
        PlanError: ``sparsity`` is not in ``[0, 1)``.
    """
    return min(pruned_count(blocks, sparsity), max(0, blocks - 1))


def pattern_pruned_count(shape: tuple[int, ...], sparsity: float, pattern: str) -> int:
    """How many weights :func:`pattern_mask` removes at least; exactly so many where blocks fit.

    Args:
        shape: of the weight, output channels first.
        sparsity: share to remove, ``0 <= sparsity < 1``.

    Raises:
        PlanError: unknown pattern, or a sparsity that it cannot have.
    """
    numel = 1
    for extent in shape:
        numel *= extent
    count = pruned_count(numel, sparsity)
    size = block_size(pattern)
    if pattern == "2:4":
        _check_half(sparsity)
        return 0 if sparsity == 0 else numel // shape[1] * _run_pruned(shape[1])
    if size is None:
        return count
    sizes = sorted(_weights_per_block(shape, size).reshape(-1).tolist())
    return int(sum(sizes[: pruned_blocks(len(sizes), sparsity)]))


@torch.no_grad()
def pattern_mask(
    weight: Tensor, sparsity: float, pattern: str = "unstructured", *, score: Tensor | None = None
) -> Tensor:
    """Mask that removes what matters least, by a pattern.

    Args:
        weight: floating point ``[O, I/groups, KH, KW]`` or ``[O, I]``.
        sparsity: share to remove, ``0 <= sparsity < 1``. Of blocks exactly the nearest whole
            number of them is removed, but one at least stays; ``"2:4"`` takes 0 or 0.5.
        pattern: one of ``adalayer_native.plan.PATTERNS``.
        score: what losing each weight costs, not negative, in the weight's shape; default: its
            square. The costs of a block add up.

    Returns:
        bool tensor of the weight's shape, true where a weight is kept. Where costs are equal, what
        comes first in memory is removed.

    Raises:
        PlanError: unknown pattern or a sparsity that it cannot have.
        CalibrationError: a weight or a cost is NaN.
    """
    size = block_size(pattern)
    if pattern == "unstructured":
        return magnitude_mask(weight if score is None else score, sparsity)
    count = pruned_count(weight.numel(), sparsity)
    cost = (weight.double().square() if score is None else score.double()).detach()
    if bool(torch.isnan(cost).any()):
        raise CalibrationError(
            f"weight of shape {tuple(weight.shape)} contains NaN; cannot rank it"
        )
    if pattern == "2:4":
        _check_half(sparsity)
        return _two_of_four(cost) if count else torch.ones_like(weight, dtype=torch.bool)
    assert size is not None
    per_block = _block_sums(cost, size)
    flat = per_block.reshape(-1)
    keep = torch.ones(flat.numel(), dtype=torch.bool, device=weight.device)
    keep[flat.argsort(stable=True)[: pruned_blocks(flat.numel(), sparsity)]] = False
    return _spread(keep.view(per_block.shape), tuple(weight.shape), size)


def _check(pattern: str) -> None:
    if pattern not in PATTERNS:
        raise PlanError(f"pattern must be one of {PATTERNS}, got {pattern!r}")


def _check_half(sparsity: float) -> None:
    if sparsity not in (0.0, 0.5):
        raise PlanError(f"pattern '2:4' removes half of the weights or none, got {sparsity}")


def _run_pruned(inputs: int) -> int:
    """Weights that 2:4 removes of one output channel at one kernel position."""
    rest = inputs % _RUN
    return inputs // _RUN * (_RUN - _KEPT) + max(0, rest - _KEPT)


def _two_of_four(cost: Tensor) -> Tensor:
    outputs, inputs = cost.shape[:2]
    flat = cost.reshape(outputs, inputs, -1)
    # Channels that only fill the last run up go first.
    runs = functional.pad(flat, (0, 0, 0, -inputs % _RUN), value=-1.0)
    runs = runs.reshape(outputs, -1, _RUN, flat.shape[2])
    order = runs.argsort(dim=2, stable=True)
    keep = torch.ones_like(runs, dtype=torch.bool)
    keep.scatter_(2, order[:, :, : _RUN - _KEPT], False)
    return keep.reshape(outputs, -1, flat.shape[2])[:, :inputs].reshape(cost.shape)


def _block_sums(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Sums over blocks: ``[O / rows, I / columns, positions]``, rounded up."""
    outputs, inputs = x.shape[:2]
    flat = x.reshape(outputs, inputs, -1)
    flat = functional.pad(flat, (0, 0, 0, -inputs % size[1], 0, -outputs % size[0]))
    rows, columns = flat.shape[0] // size[0], flat.shape[1] // size[1]
    return flat.reshape(rows, size[0], columns, size[1], -1).sum(dim=(1, 3))


def _weights_per_block(shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    # A layer's shape without its data: ones in one kernel position tell all of them.
    positions = 1
    for extent in shape[2:]:
        positions *= extent
    sums = _block_sums(torch.ones(shape[0], shape[1], dtype=torch.int64), size)
    return sums.expand(-1, -1, positions)


def _spread(blocks: Tensor, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """One value per block to one per weight."""
    wide = blocks.repeat_interleave(size[0], 0)[: shape[0]]
    return wide.repeat_interleave(size[1], 1)[:, : shape[1]].reshape(shape)
