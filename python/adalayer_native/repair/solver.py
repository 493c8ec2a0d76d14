"""Statistics of a layer's inputs, and the equations of its quadratic error solved on them."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native.errors import CalibrationError
from adalayer_native.pruning.masks import magnitude_mask, pruned_count
from adalayer_native.repair.blocks import BlockOrder
from adalayer_native.repair.sweep import Rows, compensate, refine
from adalayer_native.rounding import quantize_weight, weight_range

__all__ = ["HeldBackError", "Solver", "SolverOfParts", "Statistics"]


class Statistics:
    """First and second moments of the columns of a layer's input.

    Args:
        weight: float32 ``[G, R, K]``: what multiplies the columns.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.count = 0
        groups, rows, width = weight.shape
        self._moment = self._zeros(groups, width, width)
        self._sum = self._zeros(groups, width)
        self._cross: Tensor | None = None
        self._float_sum = self._sum
        self._output = self._zeros(2, groups, rows)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.weight.device)

    @property
    def paired(self) -> bool:
        """Whether the float network's inputs are part of it."""
        return self._cross is not None

    def add(self, rows: Tensor, other: Tensor | None = None) -> None:
        """Take samples ``[G, N, K]`` into account, and what the float network has there."""
        self.count += rows.shape[1]
        self._moment += rows.transpose(1, 2) @ rows
        self._sum += rows.sum(dim=1)
        if other is None:
            return
        if self._cross is None:
            self._cross = torch.zeros_like(self._moment)
            self._float_sum = torch.zeros_like(self._sum)
        self._cross += other.transpose(1, 2) @ rows
        self._float_sum += other.sum(dim=1)
        output = self.weight @ other.transpose(1, 2)
        self._output[0] += output.sum(dim=2)
        self._output[1] += output.square().sum(dim=2)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``C``, ``C'`` (float64 ``[G, K, K]``) and ``var(W x')`` per channel (``[G, R]``)."""
        n = self.count
        mean, other = self._sum / n, self._float_sum / n
        covariance = (self._moment / n).baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1.0)
        if self._cross is None:
            w = self.weight.double()
            return covariance, covariance, ((w @ covariance) * w).sum(dim=2)
        cross = (self._cross / n).baddbmm_(other.unsqueeze(2), mean.unsqueeze(1), alpha=-1.0)
        first, second = self._output / n
        return covariance, cross, (second - first.square()).clamp_(min=0.0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean rows of the quantized and of the float input, float64 ``[G, K]``."""
        other = self._sum if self._cross is None else self._float_sum
        return self._sum / self.count, other / self.count


class Solver:
    """Factorisation of one set of statistics; columns are permuted, important ones first.

    Args:
        seen: the statistics.
        gain: ``[G, R]``: what a squared error of an output channel counts.
        inputs: input channels per group that the columns belong to.
        damping: over the mean of the diagonal of the covariance.
        name: of the layer, for messages.
    """

    def __init__(
        self, seen: Statistics, gain: Tensor, inputs: int, damping: float, name: str
    ) -> None:
        self.seen, self.gain, self.inputs = seen, gain, inputs
        weight = seen.weight.double()
        self.covariance, cross, self.energy = seen.moments()
        self.pull = weight @ cross  # W C'
        del cross
        diagonal = self.covariance.diagonal(dim1=1, dim2=2)
        level = diagonal.mean(dim=1)
        # Inputs that never vary say nothing: plain rounding then, by an identity.
        level = torch.where(level > 0, level, torch.ones_like(level))
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
        damped = _permute(self.covariance, order)
        added = 0.0
        for _ in range(6):
            damped.diagonal(dim1=1, dim2=2).add_((damping - added) * level[:, None])
            added = damping
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not bool(failed.any()):
                break
            damping *= 10
        else:
            raise CalibrationError(
                f"layer {name!r}: the covariance of its input cannot be factorised"
            )
        excess = self.pull - weight @ self.covariance
        correction = torch.cholesky_solve(
            _columns_of(excess, order).transpose(1, 2), lower
        ).transpose(1, 2)
        scale = level[:, None, None]
        self.order = order
        # In units of the mean variance, so that float32 is far from its limits.
        self.target = (_columns_of(weight, order) + correction).float()
        self.hessian = damped.div_(scale).float()
        del damped
        inverse = torch.cholesky_inverse(lower).mul_(scale)
        del lower
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()
        self._block_orders: dict[tuple[int, int], BlockOrder] = {}

    def run(
        self,
        settings: list[tuple[int, float]],
        passes: int,
        *,
        keep: Tensor | None = None,
        channels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scales and mask: ``[G, T, K]``, ``[G, T]``, ``[G, T, K]``.

        ``keep`` is a mask for all settings, ``[G, T, K]``; with it nothing is chosen. ``scale`` is
        one that stays, ``[G, T]``.
        """
        target, gain = self.target, self.gain
        if channels is not None:
            target, gain = target[:, channels], gain[:, channels]
        rows = self._rows(target, gain, settings, keep, scale)
        repeated = target.repeat(1, len(settings), 1)
        levels, kept = compensate(repeated, self.factor, rows)
        levels, found = refine(
            repeated, self.hessian, levels, kept, rows, passes, refit=scale is None
        )
        back = torch.argsort(self.order, dim=1)
        return _columns_of(levels, back), found, _columns_of(kept, back)

    def wanted(self) -> Tensor:
        """The unconstrained minimum ``W*``, float32 ``[G, R, K]``."""
        return _columns_of(self.target, torch.argsort(self.order, dim=1))

    def block_order(self, size: tuple[int, int]) -> BlockOrder:
        """In which order blocks of a size are pruned; found once."""
        if size not in self._block_orders:
            back = torch.argsort(self.order, dim=1)
            self._block_orders[size] = BlockOrder(
                self.wanted(),
                _permute(self.factor.transpose(1, 2) @ self.factor, back),
                self.gain,
                self.inputs,
                size,
            )
        return self._block_orders[size]

    def pruning_cost(self, bits: int) -> Tensor:
        """What pruning each weight costs more than rounding it, not negative: ``[G, R, K]``.

        ``(w_j^2 - (w_j - q_j)^2) / [H^-1]_jj``, with the whole inverse, as if each were alone.
        """
        low, high = weight_range(bits)
        flat = self.target.reshape(-1, self.target.shape[2])
        scale = quantize_weight(flat, bits, None)[1].reshape(self.target.shape[:2])[:, :, None]
        rounding = torch.clamp(torch.div(self.target, scale).round_(), low, high).mul_(scale)
        cost = self.target.square() - rounding.sub_(self.target).square_()
        inverse = self.factor.square().sum(dim=1)  # diagonal of U^T U
        cost = (cost / inverse[:, None]).clamp_(min=0.0) * self.gain[:, :, None]
        # Where many round to zero anyway and cost nothing, the smallest go first.
        cost += 1e-30 * self.target.abs()
        return _columns_of(cost, torch.argsort(self.order, dim=1))

    def _rows(
        self,
        target: Tensor,
        gain: Tensor,
        settings: list[tuple[int, float]],
        keep: Tensor | None,
        scale: Tensor | None,
    ) -> Rows:
        groups, per_group, width = target.shape
        flat = target.reshape(-1, width)
        diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, None]
        scales, bounds, pruned = [], [], []
        kept = None if keep is None else _columns_of(keep, self.order)
        for index, (bits, sparsity) in enumerate(settings):
            bounds.append(weight_range(bits))
            pruned.append(0 if keep is not None else pruned_count(target.numel(), sparsity))
            if scale is not None:
                continue
            likely = None
            if kept is not None:
                likely = kept[:, index * per_group : (index + 1) * per_group]
            if pruned[-1]:
                # A first guess of what will be kept, for the scale alone.
                likely = magnitude_mask(target * gain[:, :, None].sqrt() / diagonal, sparsity)
            part = None if likely is None else likely.reshape(flat.shape)
            _, first = quantize_weight(flat, bits, part)
            scales.append(first.reshape(groups, per_group))
        low, high = (
            torch.tensor([pair[end] for pair in bounds], dtype=torch.float32, device=flat.device)
            for end in (0, 1)
        )
        return Rows(
            scale=torch.cat(scales, dim=1) if scale is None else scale,
            low=low.repeat_interleave(per_group),
            high=high.repeat_interleave(per_group),
            pruned=pruned,
            gain=gain,
            keep=kept,
        )

    def error(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """``E(Q)`` per channel, float64 ``[G, R]``, without the damping."""
        q = q.double()
        pull, energy = self.pull, self.energy
        if channels is not None:
            pull, energy = pull[:, channels], energy[:, channels]
        return energy + (q * (q @ self.covariance - 2 * pull)).sum(dim=2)

    def bias_shift(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """``E[W x'] - E[Q x]``, float64 ``[G, R]``."""
        mean, other = self.seen.means()
        weight = self.seen.weight if channels is None else self.seen.weight[:, channels]
        wanted = weight.double() @ other.unsqueeze(2)
        return (wanted - q.double() @ mean.unsqueeze(2)).squeeze(2)


class SolverOfParts:
    """Parts of a wide layer's columns, whose covariance with each other is left out of account.

    The parts of a row share its scale, which is that of plain rounding, and what is pruned is
    chosen over the whole layer before any part.
    """

    def __init__(self, solvers: list[Solver], parts: list[slice]) -> None:
        self.solvers, self.parts = solvers, parts
        self.energy = torch.stack([solver.energy for solver in solvers]).sum(dim=0)

    def run(
        self,
        settings: list[tuple[int, float]],
        passes: int,
        *,
        keep: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Solver.run`."""
        target = torch.cat([solver.wanted() for solver in self.solvers], dim=2)
        if channels is not None:
            target = target[:, channels]
        groups, rows, width = target.shape
        masks, scales = [], []
        for index, (bits, sparsity) in enumerate(settings):
            if keep is not None:
                masks.append(keep[:, index * rows : (index + 1) * rows])
            elif sparsity:
                cost = self.pruning_cost(bits)
                cost = cost if channels is None else cost[:, channels]
                masks.append(magnitude_mask(cost, sparsity))
            else:
                masks.append(torch.ones_like(target, dtype=torch.bool))
            flat = target.reshape(-1, width)
            _, scale = quantize_weight(flat, bits, masks[-1].reshape(flat.shape))
            scales.append(scale.reshape(groups, rows))
        kept, scale = torch.cat(masks, dim=1), torch.cat(scales, dim=1)
        levels = [
            solver.run(settings, passes, keep=kept[:, :, part], channels=channels, scale=scale)[0]
            for solver, part in zip(self.solvers, self.parts, strict=True)
        ]
        return torch.cat(levels, dim=2), scale, kept

    def pruning_cost(self, bits: int) -> Tensor:
        """As :meth:`Solver.pruning_cost`."""
        return torch.cat([solver.pruning_cost(bits) for solver in self.solvers], dim=2)

    def error(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """As :meth:`Solver.error`, the parts as if they were independent."""
        return torch.stack(
            [
                solver.error(q[:, :, part], channels)
                for solver, part in zip(self.solvers, self.parts, strict=True)
            ]
        ).sum(dim=0)

    def bias_shift(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """As :meth:`Solver.bias_shift`."""
        return torch.stack(
            [
                solver.bias_shift(q[:, :, part], channels)
                for solver, part in zip(self.solvers, self.parts, strict=True)
            ]
        ).sum(dim=0)


class HeldBackError:
    """What weights that other samples led to do to these.

    Args:
        seen: statistics of the samples, a part of the columns each.
        parts: those columns. Their covariance with each other is left out of account.
    """

    def __init__(self, seen: list[Statistics], parts: list[slice]) -> None:
        self.seen, self.parts = seen, parts
        self._moments = [part.moments() for part in seen]
        self.energy = torch.stack([energy for _, _, energy in self._moments]).sum(dim=0)

    def __call__(self, q: Tensor, shift: Tensor, channels: Tensor | None = None) -> Tensor:
        """Mean squared error per channel, float64 ``[G, R]``.

        Args:
            q: weights ``[G, R, K]``.
            shift: added to the bias for them, ``[G, R]``. Here it need not take the mean error.
            channels: the ``R`` that ``q`` has.
        """
        q, total = q.double(), self.energy.clone()
        total = total if channels is None else total[:, channels]
        missing = -shift.double()
        for seen, part, (covariance, cross, _) in zip(
            self.seen, self.parts, self._moments, strict=True
        ):
            weight = seen.weight.double()
            weight = weight if channels is None else weight[:, channels]
            own = q[:, :, part]
            total += (own * (own @ covariance - 2 * (weight @ cross))).sum(dim=2)
            mean, other = seen.means()
            missing += (weight @ other.unsqueeze(2) - own @ mean.unsqueeze(2)).squeeze(2)
        return total + missing.square()


def _columns_of(x: Tensor, order: Tensor) -> Tensor:
    """Columns of ``[G, T, K]`` in another order per group."""
    return torch.gather(x, 2, order.unsqueeze(1).expand(-1, x.shape[1], -1))


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``[G, K, K]`` in another order."""
    return torch.gather(_columns_of(x, order), 1, order.unsqueeze(2).expand_as(x))
