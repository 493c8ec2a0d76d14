"""Tensor trains: a matrix of many weights as a chain of small ones (LTNN: Huang and Yu 2018).

A matrix whose rows are counted by ``(i_d, ..., i_1)`` and whose columns by ``(j_1, ..., j_d)`` is a
tensor with the modes ``(i_k, j_k)``. Its tensor train is

    W[(i_d ... i_1), (j_1 ... j_d)] = sum over r of G_1[i_1 j_1 r_1] G_2[r_1 i_2 j_2 r_2] ...

and comes from d - 1 singular value decompositions, each of which cuts off what the error allows
(TT-SVD: Oseledets 2011). Two modes of which one is 1 are the plain decomposition of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adalayer_native.errors import PlanError
from adalayer_native.nn.tensor_train import Modes

__all__ = ["matrix_modes", "svd_train", "train_of_matrix", "truncated"]


def truncated(matrix: Tensor, error: float, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """``(left, right)`` whose product is the matrix, but for ``error`` (Frobenius, absolute).

    The singular values are in the left factor. At least rank 1; at most ``rank``. Third comes what
    is lost.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # What would be lost if only the first k were kept, for k from 0.
    lost = s.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = max(1, int((lost > error).sum()))
    if rank is not None:
        kept = min(kept, rank)
    return u[:, :kept] * s[:kept], v[:kept], float(s[kept:].norm())


def svd_train(tensor: Tensor, error: float, rank: int | None = None) -> tuple[list[Tensor], float]:
    """Cores ``[r, n, r']`` of a tensor with the modes n, float64, by TT-SVD, and their error.

    What the decompositions cut off is orthogonal, so that the squares of it add up to the square of
    the difference.

    Args:
        tensor: of two modes or more, float64.
        error: largest Frobenius norm of the difference over that of the tensor, if no rank binds.
        rank: largest rank.
    """
    modes = tensor.shape
    allowed = error * float(tensor.norm()) / math.sqrt(len(modes) - 1)
    cores, rest, left, lost = [], tensor, 1, 0.0
    # From the last mode on: what is left over, and holds the singular values, is the first core.
    # Every other one has orthogonal rows, so that no error grows.
    for mode in reversed(modes[1:]):
        rest, core, cut = truncated(rest.reshape(-1, mode * left), allowed, rank)
        lost += cut**2
        cores.append(core.reshape(len(core), mode, left))
        left = len(core)
    cores.append(rest.reshape(1, modes[0], left))
    return cores[::-1], math.sqrt(lost) / float(tensor.norm())


def train_of_matrix(
    matrix: Tensor, modes: Modes, error: float, rank: int | None = None
) -> tuple[list[Tensor], float]:
    """The matrices ``[i_k r_(k-1), j_k r_k]`` that linear layers apply one after the other, and
    the error of their product.

    Core k takes ``(j_k, r_k)`` to ``(i_k, r_(k-1))``; the last core comes first in a forward pass.

    Args:
        matrix: ``[rows, columns]``.
        modes: of rows and columns; their products are the matrix's sizes.
        error, rank: see :func:`svd_train`.
    """
    d = len(modes)
    rows, columns = [m for m, _ in modes], [n for _, n in modes]
    tensor = matrix.double().reshape(*reversed(rows), *columns)
    # (i_d ... i_1, j_1 ... j_d) -> (i_1 j_1, ..., i_d j_d)
    tensor = tensor.permute([axis for k in range(d) for axis in (d - 1 - k, d + k)])
    cores, lost = svd_train(tensor.reshape([m * n for m, n in modes]), error, rank)
    layers = []
    for core, (m, n) in zip(cores, modes, strict=True):
        before, _, after = core.shape
        # [r, i, j, r'] -> [(i, r), (j, r')]
        split = core.reshape(before, m, n, after).permute(1, 0, 2, 3)
        layers.append(split.reshape(m * before, n * after))
    return layers, lost


def matrix_modes(rows: int, columns: int, count: int) -> Modes:
    """``count`` modes of a matrix, as nearly equal as its sizes' divisors allow.

    Raises:
        PlanError: a size is not positive, or fewer than two modes.
    """
    if min(rows, columns) < 1 or count < 2:
        raise PlanError(f"expected a matrix and two modes or more, got {rows}x{columns}, {count}")
    return tuple(zip(_divided(rows, count), reversed(_divided(columns, count)), strict=True))


def _divided(size: int, count: int) -> Sequence[int]:
    """Factors of a size, rising: each the divisor next to the root of what is left."""
    parts = []
    for left in range(count, 1, -1):
        root = size ** (1 / left)
        divisors = [k for k in range(1, size + 1) if size % k == 0]
        parts.append(min(divisors, key=lambda k: abs(math.log(k / root))))
        size //= parts[-1]
    return sorted([*parts, size])
