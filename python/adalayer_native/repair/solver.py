"""Statistics of a layer's inputs, and the equations of its quadratic error solved on them."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native.errors import CalibrationError
from adalayer_native.pruning.masks import magnitude_mask, pruned_count
from adalayer_native.repair.blocks import BlockOrder
from adalayer_native.repair.cells import Cells
from adalayer_native.repair.sweep import Rows, compensate, refine
from adalayer_native.rounding import quantize_weight, weight_range

__all__ = ["Equations", "HeldBackError", "Solver", "SolverOfParts", "Statistics"]

PRECISE = 1024  # columns; the covariance of more is factorised in float32


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
        # Of the float network's output with the columns. Not of its input: ``K x K`` again.
        self._pull: Tensor | None = None
        self._float_sum = self._sum
        self._output = self._zeros(2, groups, rows)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.weight.device)

    @property
    def paired(self) -> bool:
        """Whether the float network's inputs are part of it."""
        return self._pull is not None

    def add(self, rows: Tensor, other: Tensor | None = None) -> None:
        """Take samples ``[G, N, K]`` into account, and what the float network has there."""
        self.count += rows.shape[1]
        self._moment += rows.transpose(1, 2) @ rows
        self._sum += rows.sum(dim=1)
        if other is None:
            return
        if self._pull is None:
            self._pull = self._zeros(*self.weight.shape)
            self._float_sum = torch.zeros_like(self._sum)
        self._float_sum += other.sum(dim=1)
        output = self.weight @ other.transpose(1, 2)
        self._pull += output @ rows
        self._output[0] += output.sum(dim=2)
        self._output[1] += output.square().sum(dim=2)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``C``, ``W C'`` (float64 ``[G, K, K]``, ``[G, R, K]``) and ``var(W x')`` (``[G, R]``)."""
        n = self.count
        mean = self._sum / n
        covariance = (self._moment / n).baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1.0)
        if self._pull is None:
            w = self.weight.double()
            pull = w @ covariance
            return covariance, pull, (pull * w).sum(dim=2)
        first, second = self._output / n
        pull = (self._pull / n).baddbmm_(first.unsqueeze(2), mean.unsqueeze(1), alpha=-1.0)
        return covariance, pull, (second - first.square()).clamp_(min=0.0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean rows of the quantized and of the float input, float64 ``[G, K]``."""
        other = self._sum if self._pull is None else self._float_sum
        return self._sum / self.count, other / self.count


class QuadraticError:
    """``E(Q)`` around the float weight ``W``: what changes is small, so that float32 will do.

    With ``D = Q - W`` it is ``E(W) + D (C D + 2 (W C - W C'))``.

    Args:
        weight: float32 ``[G, R, K]``.
        covariance, pull, energy: as of :meth:`Statistics.moments`.
    """

    def __init__(self, weight: Tensor, covariance: Tensor, pull: Tensor, energy: Tensor) -> None:
        w = weight.double()
        excess = w @ covariance - pull
        self.weight, self.covariance = weight, covariance.float()
        self.slope = (2 * excess).float()
        self.least = energy + (w * (excess - pull)).sum(dim=2)

    def __call__(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """Per channel, float64 ``[G, R]``, of weights ``[G, R, K]`` of all or some channels."""
        weight, slope, least = self.weight, self.slope, self.least
        if channels is not None:
            weight, slope, least = weight[:, channels], slope[:, channels], least[:, channels]
        change = q - weight
        return least + (change @ self.covariance).add_(slope).mul_(change).sum(
            dim=2, dtype=torch.float64
        )


class Equations:
    """What one set of statistics says, before any damping.

    Args:
        seen: the statistics.
        name: of the layer, for messages.
    """

    def __init__(self, seen: Statistics, name: str) -> None:
        self.seen, self.name = seen, name
        self.covariance, self.pull, self.energy = seen.moments()
        diagonal = self.covariance.diagonal(dim1=1, dim2=2)
        level = diagonal.mean(dim=1)
        # Inputs that never vary say nothing: plain rounding then, by an identity.
        self.level = torch.where(level > 0, level, torch.ones_like(level))
        # Important columns first.
        self.order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
        self._wanted: tuple[float, Tensor] | None = None  # the last one asked for
        self.error = QuadraticError(seen.weight, self.covariance, self.pull, self.energy)

    def damped(self, damping: float) -> tuple[Tensor, Tensor]:
        """``H`` with its columns in order, and ``R`` of ``H = R R^T``, upper triangular.

        Both ``[G, K, K]`` and in units of the mean variance, so that float32 is far from its
        limits.

        Raises:
            CalibrationError: no damping makes it positive.
        """
        hessian = _permute(self.covariance, self.order).div_(self.level[:, None, None])
        added = 0.0
        # (Of inputs that hardly vary nothing but what was rounded off is left, which no small
        # damping makes positive; a large one is plain rounding.)
        kinds = [torch.float64] * 12
        if hessian.shape[2] > PRECISE:
            kinds.insert(0, torch.float32)  # twice as fast; it seldom fails
        for turn, kind in enumerate(kinds):
            if turn and kinds[turn - 1] is kind:
                damping *= 10
            hessian.diagonal(dim1=1, dim2=2).add_(damping - added)
            added = damping
            # From the last column to the first: the inverse then is ``U^T U`` with ``U = R^-1``.
            lower, failed = torch.linalg.cholesky_ex(hessian.to(kind).flip(1, 2))
            if not bool(failed.any()):
                return hessian, lower.flip(1, 2)
        raise CalibrationError(
            f"layer {self.name!r}: the covariance of its input cannot be factorised"
        )

    def wanted(self, damping: float, channels: Tensor | None = None) -> Tensor:
        """The unconstrained minimum ``W*``, float32 ``[G, R, K]``, of all or some channels.

        Args:
            damping: the pull towards the float weight.
            channels: the ``R`` that are asked for.
        """
        weight, pull = self.seen.weight, self.pull
        if channels is not None:
            weight, pull = weight[:, channels], pull[:, channels]
        if not self.seen.paired:
            return weight
        if self._wanted is not None and self._wanted[0] == damping:
            return self._wanted[1] if channels is None else self._wanted[1][:, channels]
        excess = _columns_of(pull - weight.double() @ self.covariance, self.order)
        upper = self.damped(damping)[1]
        excess = (excess / self.level[:, None, None]).to(upper.dtype).transpose(1, 2)
        half = torch.linalg.solve_triangular(upper, excess, upper=True)
        correction = torch.linalg.solve_triangular(upper.transpose(1, 2), half, upper=False)
        found = weight + _columns_of(
            correction.transpose(1, 2).float(), torch.argsort(self.order, dim=1)
        )
        if channels is None:
            self._wanted = damping, found
        return found

    def bias_shift(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """``E[W x'] - E[Q x]``, float64 ``[G, R]``."""
        mean, other = self.seen.means()
        weight = self.seen.weight if channels is None else self.seen.weight[:, channels]
        wanted = weight.double() @ other.unsqueeze(2)
        return (wanted - q.double() @ mean.unsqueeze(2)).squeeze(2)


def inverse_factor(upper: Tensor) -> Tensor:
    """``R^-1`` in float32 of an upper triangular ``R``, ``[G, K, K]``."""
    unit = torch.eye(upper.shape[2], device=upper.device).expand(upper.shape)
    return torch.linalg.solve_triangular(upper.float(), unit, upper=True)


class Solver:
    """Factorisation of one set of statistics; columns are permuted, important ones first.

    Args:
        equations: the statistics.
        gain: ``[G, R]``: what a squared error of an output channel counts.
        inputs: input channels per group that the columns belong to.
        damping: of the norm that is rounded in, over the mean of the diagonal of the covariance.
        correction: damping of the weights that are rounded, ``W*``.
    """

    def __init__(
        self,
        equations: Equations,
        gain: Tensor,
        inputs: int,
        damping: float,
        correction: float,
    ) -> None:
        self.equations, self.seen = equations, equations.seen
        self.gain, self.inputs = gain, inputs
        self.energy, self.order = equations.energy, equations.order
        hessian, upper = equations.damped(damping)
        self.hessian = hessian.float()
        del hessian
        self.factor = inverse_factor(upper)
        del upper
        self.target = _columns_of(equations.wanted(correction), self.order)
        self._block_orders: dict[tuple[int, int], BlockOrder] = {}

    def run(
        self,
        settings: list[tuple[int, float]],
        passes: int,
        *,
        keep: Tensor | None = None,
        channels: Tensor | None = None,
        scale: Tensor | None = None,
        cells: Cells | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scales and mask: ``[G, T, K]``, ``[G, T]``, ``[G, T, K]``.

        ``keep`` is a mask for all settings, ``[G, T, K]``; with it nothing is chosen. ``scale`` is
        one that stays, ``[G, T]``. ``cells`` bound the integers of one setting.
        """
        target, gain = self.target, self.gain
        if channels is not None:
            target, gain = target[:, channels], gain[:, channels]
            cells = None if cells is None else cells.of(channels)
        if cells is None:
            rows = self._rows(target, gain, settings, keep, scale)
        else:
            low, high = (_columns_of(end, self.order) for end in (cells.low, cells.high))
            kept = torch.ones_like(low, dtype=torch.bool) if keep is None else keep
            kept = _columns_of(kept, self.order)
            start = cells.scale if scale is None else scale
            rows = Rows(start, low, high, [0], gain, kept)
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
        return self.equations.error(q, channels)

    def bias_shift(self, q: Tensor, channels: Tensor | None = None) -> Tensor:
        """As :meth:`Equations.bias_shift`."""
        return self.equations.bias_shift(q, channels)


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
        cells: Cells | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Solver.run`."""
        if cells is not None:
            return self._run_in(cells, settings, passes, keep, channels)
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

    def _run_in(
        self,
        cells: Cells,
        settings: list[tuple[int, float]],
        passes: int,
        keep: Tensor | None,
        channels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`run` within bounds, on the scale that these are for."""
        scale = cells.scale if channels is None else cells.scale[:, channels]
        found = [
            solver.run(
                settings,
                passes,
                keep=None if keep is None else keep[:, :, part],
                channels=channels,
                scale=scale,
                cells=cells.columns(part),
            )
            for solver, part in zip(self.solvers, self.parts, strict=True)
        ]
        levels, kept = (torch.cat([each[k] for each in found], dim=2) for k in (0, 2))
        return levels, scale, kept

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
        moments = [part.moments() for part in seen]
        self.energy = torch.stack([energy for _, _, energy in moments]).sum(dim=0)
        self._errors = [
            QuadraticError(own.weight, *found) for own, found in zip(seen, moments, strict=True)
        ]

    def __call__(self, q: Tensor, shift: Tensor, channels: Tensor | None = None) -> Tensor:
        """Mean squared error per channel, float64 ``[G, R]``.

        Args:
            q: weights ``[G, R, K]``.
            shift: added to the bias for them, ``[G, R]``. Here it need not take the mean error.
            channels: the ``R`` that ``q`` has.
        """
        missing = -shift.double()
        total = torch.zeros_like(missing)
        for seen, part, error in zip(self.seen, self.parts, self._errors, strict=True):
            own = q[:, :, part]
            total += error(own, channels)
            weight = seen.weight if channels is None else seen.weight[:, channels]
            mean, other = seen.means()
            missing += (weight.double() @ other.unsqueeze(2)).squeeze(2)
            missing -= (own.double() @ mean.unsqueeze(2)).squeeze(2)
        return total + missing.square()


def _columns_of(x: Tensor, order: Tensor) -> Tensor:
    """Columns of ``[G, T, K]`` in another order per group."""
    return torch.gather(x, 2, order.unsqueeze(1).expand(-1, x.shape[1], -1))


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``[G, K, K]`` in another order."""
    return torch.gather(_columns_of(x, order), 1, order.unsqueeze(2).expand_as(x))
