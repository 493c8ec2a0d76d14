"""One layer's quadratic error, and the best rounding and pruning under it.

A layer that computes ``y = W x + b`` from quantized inputs ``x``, where the float network computes
``W x' + b``, has after rounding to ``Q`` and with the best bias the mean squared error

    E(Q) = var(W x') - 2 tr(W C' Q^T) + tr(Q C Q^T),   C = cov(x), C' = cov(x', x).

Second moments are covariances because a constant error costs nothing: the bias takes it. With a
damping ``c`` that pulls ``Q`` towards ``W``, the unconstrained minimum is
``W* = (W C' + c W) (C + c)^-1``, and rounding approximates it in the norm of ``H = C + d``. So the
error that earlier layers have made is corrected here as far as a linear map can do it. The two
dampings are of different things: what is corrected has to be true of other samples, too, and deep
in a network, behind the noise of many layers, little of it is; how rounding errors of two weights
make up for each other is known from few. Very wide layers are taken in parts, see :func:`parts_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.pruning.masks import pruned_count
from adalayer_native.pruning.patterns import block_size, pattern_mask, pruned_blocks
from adalayer_native.repair.cells import Cells
from adalayer_native.repair.input_rows import columns, groups_of
from adalayer_native.repair.solver import (
    Equations,
    HeldBackError,
    Solver,
    SolverOfParts,
    Statistics,
)
from adalayer_native.rounding import (
    conv_form,
    per_channel,
    quantize_weight,
    round_weight,
    weight_range,
)

__all__ = ["LayerHessian", "LayerSolution"]

PASSES = 4
DAMPING = 0.1
# Where some samples are held back, the dampings that serve those best are taken.
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)
CORRECTIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
USUAL_CORRECTION = 0.3  # where the search for one begins
SAMPLED = 64  # output channels that dampings are compared on
USUAL = (4, 0.0)  # bits and sparsity that they are compared at, where there are to be several
# Columns whose covariance is held in one matrix: 512 channels of 3 x 3, 170 MB in float64.
MOST_COLUMNS = 4608
# Elements of the input rows held at once, and images that share their drawn positions.
_CHUNK = 1 << 23
_IMAGES = 16


@dataclass(frozen=True)
class HeldBack:
    """What a layer's repair does to samples that it has not seen.

    Attributes:
        damping: the one of those tried whose solution has the least error there.
        correction: the same of the weights that are rounded; that of no pair of inputs is the
            float weight, whatever it says.
        error: relative output error there; the solution is that of the other samples.
        plain_error: the same of plain rounding. Where it is not above ``error``, the repair is
            undone: the layer is rounded plainly.
        curve: error by damping, on some of the output channels.
    """

    damping: float
    correction: float
    error: float
    plain_error: float
    curve: dict[float, float]

    @property
    def undone(self) -> bool:
        """Whether plain rounding was better."""
        return self.plain_error <= self.error


@dataclass
class LayerSolution:
    """A layer on its grid.

    Attributes:
        levels: int8, output channels first: ``[O, I/groups, KH, KW]`` or ``[O, I]``.
        scale: float32 ``[O]``, positive.
        mask: bool of the shape of ``levels``, true where a weight is kept; ``None`` at sparsity 0.
        bias_shift: float32 ``[O]``, to be added to the layer's bias.
        error: mean squared error of the layer's output over the variance of the float output,
            both summed over the channels (weighted by ``gain``). 0 is perfect; 1 is as good as a
            constant.
        plain_error: the same of plain rounding: magnitude mask, MSE scales, the bias shift too.
        held: what samples that were held back say of it; ``None`` where there are none.
    """

    levels: Tensor
    scale: Tensor
    mask: Tensor | None
    bias_shift: Tensor
    error: float
    plain_error: float
    held: HeldBack | None = None

    @property
    def weight(self) -> Tensor:
        """Float32 weight ``levels * scale``; rounding it on ``scale`` gives the levels again."""
        return self.levels.float() * per_channel(self.scale, self.levels.dim())


class LayerHessian:
    """Statistics of a layer's inputs, and roundings of its weight that suit them.

    Collected once with :meth:`add`, then asked as often as needed: :meth:`quantize` for a layer as
    it will be stored, :meth:`errors` for a table over many bits and sparsities.

    Args:
        layer: ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear`` (or a prepared layer) with
            its float weight, which is read now.
        name: for messages.
        gain: optional ``[O]``: what follows multiplies the output channel by it (a batch norm);
            errors of a channel count with its square.
        per_image: output positions per image that are looked at, drawn at random.
        seed: of that draw.
        damping: ``d`` over the mean of the diagonal of ``C``.
        correction: ``c`` over the same; default: ``damping``.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        name: str = "",
        gain: Tensor | None = None,
        per_image: int = 1 << 30,
        seed: int = 0,
        damping: float = DAMPING,
        correction: float | None = None,
    ) -> None:
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            raise CalibrationError(
                f"layer {name!r}: expected Conv2d, ConvTranspose2d or Linear, got "
                f"{type(layer).__name__}"
            )
        correction = damping if correction is None else correction
        if per_image < 1 or damping <= 0 or correction <= 0:
            raise CalibrationError(
                f"layer {name!r}: per_image and dampings must be positive, got {per_image}, "
                f"{damping} and {correction}"
            )
        self.layer, self.name = layer, name
        self.per_image, self.damping, self.correction = per_image, damping, correction
        self.generator = torch.Generator().manual_seed(seed)
        form = conv_form(layer, layer.weight.detach()).float()
        if not bool(torch.isfinite(form).all()):
            raise CalibrationError(f"layer {name!r}: its weight contains NaN or infinity")
        self.shape = form.shape
        groups = groups_of(layer)
        self.weight = form.reshape(groups, form.shape[0] // groups, -1).clone()
        self.gain = torch.ones(self.weight.shape[:2], device=form.device)
        if gain is not None:
            self.gain = gain.detach().to(self.gain).reshape(self.gain.shape).square()
        self.parts = parts_of(self.shape)
        self._seen = [Statistics(self.weight[:, :, part]) for part in self.parts]
        self._held: list[Statistics] = []
        self._usual: float | None = None  # damping for many settings
        self._solver: tuple[tuple[float, float], Solver | SolverOfParts] | None = None
        self._equations: list[Equations] = []

    # -- statistics -------------------------------------------------------------------------

    @torch.no_grad()
    def add(
        self, x: Tensor, x_float: Tensor | None = None, held_back: Tensor | None = None
    ) -> None:
        """Take a batch of inputs into account.

        Args:
            x: the layer's (quantized) input, as in :func:`~.columns.columns`.
            x_float: the input that the float network gives the layer for the same samples; all
                calls have it or none.
            held_back: bool ``[N]``: samples that only judge what the others lead to.

        Raises:
            CalibrationError: NaN, infinity, wrong shapes.
        """
        if x_float is not None and x_float.shape != x.shape:
            raise CalibrationError(
                f"layer {self.name!r}: inputs of shape {tuple(x.shape)} and "
                f"{tuple(x_float.shape)} should be of one shape"
            )
        if self.count and (x_float is not None) != self._seen[0].paired:
            raise CalibrationError(f"layer {self.name!r}: float inputs are needed in all batches")
        if held_back is not None and bool(held_back.any()):
            self._held = self._held or [Statistics(self.weight[:, :, p]) for p in self.parts]
            chosen = held_back.to(x.device)
            self._add(self._held, x[chosen], None if x_float is None else x_float[chosen])
            x, x_float = x[~chosen], None if x_float is None else x_float[~chosen]
        self._add(self._seen, x, x_float)

    def _add(self, into: list[Statistics], x: Tensor, x_float: Tensor | None) -> None:
        self._usual = None
        self.release()
        each = self._images_at_once(x) if len(x) else 1
        for start in range(0, x.shape[0], each):
            part = slice(start, start + each)
            state = self.generator.get_state()
            rows, other = self._rows(x[part]), None
            if x_float is not None:
                self.generator.set_state(state)  # the same positions
                other = self._rows(x_float[part])
            for seen, own in zip(into, self.parts, strict=True):
                seen.add(rows[:, :, own], None if other is None else other[:, :, own])

    def release(self) -> None:
        """Let go of what was made of the statistics; it is made again when it is needed.

        That takes twice the memory of the statistics, and more where a layer has many outputs.
        """
        self._solver = None
        self._equations = []
        self.__dict__.pop("_judge", None)

    @property
    def count(self) -> int:
        """Samples that were seen."""
        return self._seen[0].count

    def _images_at_once(self, x: Tensor) -> int:
        """Samples whose rows are held together; they share their drawn positions."""
        if x.dim() != 4 or isinstance(self.layer, nn.Linear):
            return max(1, _CHUNK // max(1, x[:1].numel()))
        positions = x.shape[2:].numel()
        if isinstance(self.layer, nn.ConvTranspose2d):
            positions *= self.layer.stride[0] * self.layer.stride[1]
        rows = min(self.per_image, max(1, positions))
        return max(1, min(_IMAGES, _CHUNK // (rows * x.shape[1] * self.shape[2:].numel())))

    def _rows(self, x: Tensor) -> Tensor:
        rows = columns(self.layer, x.float(), self.per_image, self.generator, name=self.name)
        if rows.shape[2] != self.weight.shape[2]:
            raise CalibrationError(
                f"layer {self.name!r}: an input of shape {tuple(x.shape)} does not fit its weight "
                f"of shape {tuple(self.shape)}"
            )
        # A sum is not finite if one of its numbers is not, and is found in a tenth of the time.
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"layer {self.name!r}: its input contains NaN or infinite values; expected finite "
                "numbers"
            )
        return rows

    # -- results ----------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(
        self,
        bits: int,
        sparsity: float = 0.0,
        *,
        pattern: str = "unstructured",
        mask: Tensor | None = None,
        passes: int = PASSES,
        cells: Cells | None = None,
    ) -> LayerSolution:
        """Integers, scales and mask of small output error; never worse than plain rounding.

        Args:
            bits: 2 to 8.
            sparsity: share of weights to remove; exactly ``round(share * weights)`` are, or as
                many blocks as the pattern says.
            pattern: where zeros may lie (:mod:`adalayer_native.pruning.patterns`). Blocks are
                chosen before the sweep, one after the other (:mod:`.blocks`); the two of four by
                what pruning them costs more than rounding them while everything else can still
                make up for it.
            mask: bool, output channels first: keep exactly these instead of choosing.
            passes: rounds of refinement after the sweep.
            cells: bounds of every integer, output channels first; nothing is pruned then.

        Raises:
            CalibrationError: no data was added.
            PlanError: bits, sparsity, the pattern or the mask's shape are not valid, or something
                is to be pruned within bounds.
        """
        weight_range(bits)
        pruned_count(1, sparsity)
        if cells is not None:
            if sparsity or mask is not None:
                raise PlanError(f"layer {self.name!r}: bounded integers cannot be pruned")
            cells = cells.grouped(len(self.weight))
        given: Tensor | None = None
        if mask is not None:
            if mask.shape != self.shape:
                raise PlanError(
                    f"layer {self.name!r}: mask has shape {tuple(mask.shape)}, expected "
                    f"{tuple(self.shape)}"
                )
            given = mask.reshape(self.weight.shape)
        correction = self._corrected()
        curve = self._curve(bits, sparsity, pattern, given, correction, cells)
        solver = self._ready(_least(curve, self.damping), correction)
        keep = given
        if keep is None and pattern != "unstructured" and sparsity:
            keep = self._pattern(solver, bits, sparsity, pattern)
        levels, scale, kept = solver.run([(bits, sparsity)], passes, keep=keep, cells=cells)
        chosen = kept if keep is not None or pruned_count(kept.numel(), sparsity) else None
        plain = self._plain_rounding(bits, sparsity, pattern, given, cells)
        return self._solution(solver, bits, (levels, scale, chosen), plain, curve, correction)

    @torch.no_grad()
    def solutions(
        self,
        settings: Sequence[tuple[int, float]],
        *,
        pattern: str = "unstructured",
        passes: int = PASSES,
    ) -> Iterator[LayerSolution]:
        """:meth:`quantize` for many ``(bits, sparsity)``, several in one sweep; in their order.

        Raises:
            CalibrationError: no data was added.
            PlanError: bits or sparsity are not valid, or not by the pattern.
        """
        for bits, sparsity in settings:
            weight_range(bits)
            pruned_count(1, sparsity)
        solver = self._usual_solver()
        rows = self.weight.shape[1]
        step = self._together()
        for start in range(0, len(settings), step):
            part = list(settings[start : start + step])
            keep = None
            if pattern != "unstructured":
                masks = [self._pattern(solver, *setting, pattern) for setting in part]
                keep = torch.cat(masks, dim=1)
            levels, scale, kept = solver.run(part, passes, keep=keep)
            for index, (bits, sparsity) in enumerate(part):
                own = slice(index * rows, (index + 1) * rows)
                chosen = kept[:, own] if pruned_count(kept[:, own].numel(), sparsity) else None
                found = (levels[:, own], scale[:, own], chosen)
                plain = self._plain_rounding(bits, sparsity, pattern)
                yield self._solution(solver, bits, found, plain)

    def _pattern(
        self, solver: Solver | SolverOfParts, bits: int, sparsity: float, pattern: str
    ) -> Tensor:
        """Mask of a pattern, ``[G, R, K]``."""
        if not sparsity:
            return torch.ones_like(self.weight, dtype=torch.bool)
        size = block_size(pattern)
        fits = size is not None and (len(self.weight) == 1 or self.weight.shape[1] % size[0] == 0)
        if size is not None and fits and isinstance(solver, Solver):
            order = solver.block_order(size)
            return order.mask(pruned_blocks(order.blocks, sparsity)).to(self.weight.device)
        # What pruning each costs more than rounding it. Blocks here lie across several groups,
        # which no kernel skips, or the layer is too wide for one inverse.
        cost = solver.pruning_cost(bits).reshape(self.shape)
        return pattern_mask(cost, sparsity, pattern, score=cost).reshape(self.weight.shape)

    def _together(self, channels: int | None = None) -> int:
        """Settings that fit a bounded amount of memory and go through one sweep."""
        rows = self.weight.shape[1] if channels is None else channels
        size = self.weight.shape[0] * rows * self.weight.shape[2]
        return max(1, _CHUNK // max(1, size))

    def _plain_rounding(
        self,
        bits: int,
        sparsity: float,
        pattern: str,
        mask: Tensor | None = None,
        cells: Cells | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels, scale and mask without a repair."""
        if mask is None and sparsity:
            mask = pattern_mask(self.weight.reshape(self.shape), sparsity, pattern)
            mask = mask.reshape(self.weight.shape)
        return (*self._plain(bits, mask, cells), mask)

    def _solution(
        self,
        solver: Solver | SolverOfParts,
        bits: int,
        found: tuple[Tensor, Tensor, Tensor | None],
        rounded: tuple[Tensor, Tensor, Tensor | None],
        curve: dict[float, float] | None = None,
        correction: float | None = None,
    ) -> LayerSolution:
        """The sweep's result, or plain rounding where that is better: levels, scale and mask."""
        low, high = weight_range(bits)
        levels, scale, chosen = found
        plain_levels, plain_scale, plain_mask = rounded
        q = levels * scale[:, :, None]
        error, energy = solver.error(q), solver.energy
        plain = solver.error(plain_levels * plain_scale[:, :, None])
        held = self._on_held(
            solver, q, plain_levels * plain_scale[:, :, None], curve or {}, correction
        )
        worse = float((self.gain * plain).sum()) < float((self.gain * error).sum())
        if worse if held is None else held.undone:
            levels, scale, chosen, error = plain_levels, plain_scale, plain_mask, plain
            q = levels * scale[:, :, None]
        form = self.shape
        flat_scale = scale.reshape(-1).float()
        # The division that rounding makes must give the integers back, on the stored scale.
        stored = levels.reshape(form).clamp(low, high)
        weight = stored * per_channel(flat_scale, len(form))
        assert torch.equal(round_weight(weight, flat_scale, bits), stored)
        return LayerSolution(
            levels=stored.to(torch.int8),
            scale=flat_scale,
            mask=None if chosen is None else chosen.reshape(form),
            bias_shift=solver.bias_shift(q).reshape(-1).float(),
            error=self._ratio(error, energy),
            plain_error=self._ratio(plain, energy),
            held=held,
        )

    def _on_held(
        self,
        solver: Solver | SolverOfParts,
        q: Tensor,
        plain: Tensor,
        curve: dict[float, float],
        correction: float | None,
    ) -> HeldBack | None:
        """What a solution and plain rounding do to the samples held back."""
        if not self._held:
            return None
        energy = self._judge.energy
        error, other = (
            self._ratio(self._judge(weight, solver.bias_shift(weight)), energy)
            for weight in (q, plain)
        )
        damping = _least(curve, self.damping)
        return HeldBack(damping, correction or self.correction, error, other, curve)

    @torch.no_grad()
    def errors(
        self,
        settings: Sequence[tuple[int, float]],
        *,
        channels: int | None = 64,
        passes: int = 1,
    ) -> list[float]:
        """Relative output error for every ``(bits, sparsity)``, all in one sweep.

        Args:
            settings: bits from 2 to 8 with a sparsity in ``[0, 1)``.
            channels: look at that many output channels, evenly spread; ``None`` for all.
            passes: as in :meth:`quantize`; fewer give an upper estimate sooner.

        Returns:
            As ``LayerSolution.error``, in the order of ``settings``.
        """
        solver = self._usual_solver()
        chosen = self._sample(channels)
        found: list[float] = []
        # Settings that fit a bounded amount of memory go together.
        step = self._together(len(chosen))
        gain, energy = self.gain[:, chosen], solver.energy[:, chosen]
        for start in range(0, len(settings), step):
            part = list(settings[start : start + step])
            levels, scale, _ = solver.run(part, passes, channels=chosen)
            q = levels * scale[:, :, None]
            for index in range(len(part)):
                rows = slice(index * len(chosen), (index + 1) * len(chosen))
                error = solver.error(q[:, rows], chosen)
                found.append(self._ratio(error, energy, gain))
        return found

    def _ratio(self, error: Tensor, energy: Tensor, gain: Tensor | None = None) -> float:
        gain = self.gain if gain is None else gain
        total = float((gain * energy).sum())
        wrong = max(float((gain * error).sum()), 0.0)
        return wrong / total if total > 0.0 else 0.0

    def _sample(self, channels: int | None) -> Tensor:
        count = self.weight.shape[1]
        if channels is None or self.weight.shape[0] * count <= channels:
            return torch.arange(count)
        each = max(1, channels // self.weight.shape[0])
        return torch.linspace(0, count - 1, min(each, count)).round().long().unique()

    def _plain(
        self, bits: int, mask: Tensor | None, cells: Cells | None = None
    ) -> tuple[Tensor, Tensor]:
        if cells is not None:
            levels = torch.div(self.weight, cells.scale[:, :, None]).round_()
            return torch.clamp(levels, cells.low, cells.high), cells.scale
        rows = self.weight.reshape(-1, self.weight.shape[2])
        keep = None if mask is None else mask.reshape(rows.shape)
        levels, scale = quantize_weight(rows, bits, keep)
        return levels.float().reshape(self.weight.shape), scale.reshape(self.weight.shape[:2])

    @cached_property
    def _judge(self) -> HeldBackError:
        return HeldBackError(self._held, self.parts)

    def _corrected(self) -> float:
        """The damping of ``W*``, unrounded, that has the least error on samples held back."""
        if not self._held or not self._seen[0].paired:
            return self.correction
        channels = self._sample(SAMPLED)
        gain, energy = self.gain[:, channels], self._judge.energy[:, channels]

        def error(correction: float) -> float:
            parts = [(each, each.wanted(correction, channels)) for each in self._solvable()]
            shift = torch.stack([each.bias_shift(w, channels) for each, w in parts]).sum(dim=0)
            wanted = torch.cat([w for _, w in parts], dim=2)
            return self._ratio(self._judge(wanted, shift, channels), energy, gain)

        return _least(_descended(CORRECTIONS, USUAL_CORRECTION, error), self.correction)

    def _curve(
        self,
        bits: int,
        sparsity: float,
        pattern: str,
        given: Tensor | None,
        correction: float,
        cells: Cells | None = None,
    ) -> dict[float, float]:
        """Error on samples held back by damping, on some of the output channels; empty: none."""
        if not self._held:
            return {}
        # What blocks of zeros cost depends on all rows.
        channels = self._sample(SAMPLED if pattern == "unstructured" and given is None else None)
        gain, energy = self.gain[:, channels], self._judge.energy[:, channels]

        def error(damping: float) -> float:
            solver = self._ready(damping, correction)
            keep = given
            if keep is None and pattern != "unstructured" and sparsity:
                keep = self._pattern(solver, bits, sparsity, pattern)
            levels, scale, _ = solver.run(
                [(bits, sparsity)], 1, keep=keep, channels=channels, cells=cells
            )
            q = levels * scale[:, :, None]
            wrong = self._judge(q, solver.bias_shift(q, channels), channels)
            return self._ratio(wrong, energy, gain)

        return _descended(DAMPINGS, DAMPING, error)

    def _usual_solver(self) -> Solver | SolverOfParts:
        """The one for many settings."""
        correction = self._corrected()
        if self._usual is None:
            curve = self._curve(*USUAL, "unstructured", None, correction)
            self._usual = _least(curve, self.damping)
        return self._ready(self._usual, correction)

    def _solvable(self) -> list[Equations]:
        """The equations of every part of the columns."""
        if self.count == 0:
            raise CalibrationError(
                f"layer {self.name!r}: no input was seen; expected at least one sample"
            )
        if not self._equations:
            self._equations = [Equations(seen, self.name) for seen in self._seen]
        return self._equations

    def _ready(self, damping: float, correction: float) -> Solver | SolverOfParts:
        equations, key = self._solvable(), (damping, correction)
        if self._solver is None or self._solver[0] != key:
            self._solver = None  # not two at once: they are large
            taps = self.shape[2:].numel()
            solvers = [
                Solver(each, self.gain, (p.stop - p.start) // taps, damping, correction)
                for each, p in zip(equations, self.parts, strict=True)
            ]
            one = len(solvers) == 1
            self._solver = key, solvers[0] if one else SolverOfParts(solvers, self.parts)
        return self._solver[1]


def _least(curve: dict[float, float], usual: float) -> float:
    """The damping with the least error."""
    return min(curve, key=lambda damping: curve[damping]) if curve else usual


def _descended(
    values: Sequence[float], start: float, measure: Callable[[float], float]
) -> dict[float, float]:
    """Measured values from a start downhill, either way, up to the first that is worse."""
    found: dict[float, float] = {}

    def at(index: int) -> float:
        value = values[index]
        if value not in found:
            found[value] = measure(value)
        return found[value]

    place = values.index(start)
    for step in (1, -1):
        while 0 <= place + step < len(values) and at(place + step) < at(place):
            place += step
    return found


def parts_of(shape: torch.Size) -> list[slice]:
    """Columns of a weight ``[O, I/groups, ...]`` whose covariance is taken into account together.

    One part, unless the layer is very wide: a matrix of all of its columns would take gigabytes
    and, with fewer samples than columns, say little. Whole channels, in multiples of 64.
    """
    taps = shape[2:].numel()
    width = shape[1] * taps
    if width <= MOST_COLUMNS:
        return [slice(0, width)]
    each = max(64, MOST_COLUMNS // taps // 64 * 64) * taps
    return [slice(start, min(start + each, width)) for start in range(0, width, each)]
