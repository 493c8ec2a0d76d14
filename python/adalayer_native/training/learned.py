"""Bits and zeros that are learned together with the weights, under a budget.

Every layer, and every input whose width the budget counts, has a position among its options
(:mod:`~adalayer_native.quantization.fractional`). While it trains, a limit falls from what the
model has to the budget (``1 - (1 - t)^3`` of the way), and positions take steps of the Lagrangian's
descent (:func:`~adalayer_native.training.positions.move`). What the loss grows by where layer ``l``
goes to its next option, ``d`` being the change of its weight, is modelled to second order with
Fisher's information, of the same gradients that train the weights:

    ``h_l = <g, d> + n/2 <g, d>^2``, ``g`` the mean gradient of ``n`` samples.

Where weights have found their minimum the first term is noise, and counts only as far as it is
surely more; the second says what the layer's precision is worth. Kept are means relative to the
growth of the squared error, since that carries over from an option to the next.

In the end the positions are sharpened to whole options, and the knapsack that method ``"optimal"``
uses takes the ones around them whose modelled loss is least and whose file, as it will be saved,
keeps the budget to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from adalayer_native.allocation import Budget
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.refusals import learned_loss, missing
from adalayer_native.errors import PlanError
from adalayer_native.plan import Plan
from adalayer_native.pruning.masks import magnitude_mask
from adalayer_native.quantization.calibrate import calibrate
from adalayer_native.quantization.fractional import FractionalInput, FractionalWeight
from adalayer_native.quantization.lsq import StepSize
from adalayer_native.rounding import conv_form
from adalayer_native.training.offer import Offer
from adalayer_native.training.positions import move

__all__ = ["LearnedWidths", "check_learned"]

_REFRESH = 50  # steps between new scales and thresholds of a layer
_SHARPEN = 0.75  # share of the search after which fractions go to 0 or 1
_TRAVEL = 4.0  # times through the longest list of options at full rate
_BATCHES = 4  # that the grids of narrower inputs are calibrated on


def check_learned(
    allocate: str | None,
    budget: Budget | None,
    teacher: Any,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raise where the arguments of ``finetune`` do not go together.

    Raises:
        PlanError: an unknown ``allocate``, or no float model. BudgetError: no budget, one that
            nothing is learned for, or one of the loss.
    """
    if allocate is None:
        if budget is not None:
            raise PlanError("finetune: a budget is for allocate='learned'")
        if options:
            raise PlanError("finetune: allocate_options are for allocate='learned'")
        return
    if allocate != "learned":
        raise PlanError(f"finetune: allocate must be 'learned' or None, got {allocate!r}")
    if budget is None:
        raise missing("learned")
    if budget.loss is not None:
        raise learned_loss(budget)
    if teacher is None:
        raise PlanError(
            "finetune: allocate='learned' needs the float model as teacher, which says what the "
            "file holds; distill_weight=0 trains without its outputs"
        )


class LearnedWidths:
    """The search of one run.

    Args:
        prepared: calibrated; its plan is where the search begins.
        offer: what can be chosen.
        loader: of the training, on whose first batches the grids of narrower inputs are calibrated.

    Attributes:
        choice: what was chosen in the end, by layer the values of its
            :class:`~adalayer_native.allocation.options.Option`; ``None`` before.
    """

    def __init__(self, prepared: torch.nn.Module, offer: Offer, loader: Iterable[Any]) -> None:
        self.prepared, self.offer, self.loader = prepared, offer, loader
        self.names = offer.problem.free
        self.weights: list[FractionalWeight] = []
        self.inputs: list[FractionalInput] = []
        self.choice: dict[str, list[Any]] | None = None

    def attach(self) -> None:
        """Give every owner its position, where its plan is in the list."""
        offer = self.offer
        grids = {site: self._grids(site) for site in offer.sites}
        for site, found in self._calibrated(grids).items():
            quantizer = offer.quantizers[offer.target(site)]
            made = FractionalInput(offer.widths, found, 0.0)
            quantizer.fractional = made.to(quantizer.qparams.device)
            self.inputs.append(made)
        for row, name in enumerate(self.names):
            layer = offer.layers[name]
            weight = conv_form(layer, layer.weight.detach())
            chain = [offer.options[column] for column in offer.chains[row]]
            options = [(o.bits or 0, o.sparsity) for o in chain]
            # The scales of the first two options need the weight where it is.
            one = FractionalWeight(options, offer.start(row), weight)
            layer.fractional = one.to(weight.device)
            layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)
            self.weights.append(one)
        start, _ = offer.costs.at(self._positions())
        self.begin = np.maximum(start, offer.costs.limits)

    def _grids(self, site: str) -> list[tuple[float, int]]:
        quantizer = self.offer.quantizers[self.offer.target(site)]
        return [(quantizer.scale, quantizer.zero_point)]

    def _calibrated(
        self, grids: dict[str, list[tuple[float, int]]]
    ) -> dict[str, list[tuple[float, int]]]:
        """Scale and zero point of every learned input at every width, by calibration."""
        if not grids:
            return grids
        before = {key: value.clone() for key, value in self.prepared.state_dict().items()}
        quantizers = {s: self.offer.quantizers[self.offer.target(s)] for s in grids}
        batches = [batch for batch, _ in zip(self.loader, range(_BATCHES), strict=False)]
        with torch.random.fork_rng(devices=[]):
            for width in self.offer.widths[1:]:
                for quantizer in quantizers.values():
                    quantizer.bits = width
                calibrate(self.prepared, batches, progress=False)
                for site, quantizer in quantizers.items():
                    grids[site].append((quantizer.scale, quantizer.zero_point))
        for quantizer in quantizers.values():
            quantizer.bits = self.offer.widths[0]
        self.prepared.load_state_dict(before)
        return grids

    @property
    def _owners(self) -> list[FractionalWeight | FractionalInput]:
        return [*self.weights, *self.inputs]

    def positions(self) -> list[torch.nn.Parameter]:
        """The parameters that take steps of their own."""
        return [owner.position for owner in self._owners]

    def _positions(self) -> np.ndarray:
        return np.array([float(owner.position.detach()) for owner in self._owners])

    def _units(self) -> np.ndarray:
        """Growth of the squared error from the option before every position to the next."""
        offer, found = self.offer, []
        for row, owner in enumerate(self.weights):
            k, _ = owner.place
            first, second = (offer.same[c] for c in offer.chains[row][k : k + 2])
            found.append(float(offer.errors[row, second] - offer.errors[row, first]))
        for each in self.inputs:
            k, _ = each.place
            found.append(4.0 ** -each.widths[k + 1] - 4.0 ** -each.widths[k])
        return np.array(found)

    def _sensitivity(self) -> np.ndarray:
        pairs = zip(self._owners, self._units(), strict=True)
        return np.array([owner.sensitivity(unit) for owner, unit in pairs])

    # -- the search -----------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether bits are whole."""
        return self.choice is not None

    def over(self, time: float) -> bool:
        """Whether the search ends now; ``time`` is the share of the run that is done."""
        return not self.done and time >= self.offer.settings.search

    def sharpen(self, time: float) -> None:
        """Set how close to whole options values are."""
        left = 1.0 - min(time / self.offer.settings.search, 1.0)
        for owner in self._owners:
            owner.sharpness = 1.0 / min(max(left / (1.0 - _SHARPEN), 1e-3), 1.0)

    def observe(self, count: int) -> None:
        """Take in the gradients of a batch of ``count`` samples."""
        if not self.done:
            for owner, unit in zip(self._owners, self._units(), strict=True):
                owner.observe(count, unit)

    @torch.no_grad()
    def move(self, time: float, steps: int) -> None:
        """Take a step of the positions.

        Args:
            time: share of the run that is done.
            steps: of the whole run.
        """
        if self.done:
            return
        offer, settings = self.offer, self.offer.settings
        part = min(time / settings.search, 1.0)
        left = max(1.0 - part / settings.fall, 0.0) ** 3 if settings.fall else 0.0
        limits = offer.costs.limits + (self.begin - offer.costs.limits) * left
        longest = float(offer.costs.counts.max())
        rate = _TRAVEL * longest * (1.0 - part) / max(steps * settings.search, 1.0)
        before = [owner.place[0] for owner in self.weights]
        harm = self._sensitivity() * self._units()
        found = move(offer.costs, self._positions(), harm, limits, min(rate, longest))
        for owner, value in zip(self._owners, found.tolist(), strict=True):
            owner.position.fill_(value)
        for name, owner, k in zip(self.names, self.weights, before, strict=True):
            if owner.place[0] != k or float(owner.seen) % _REFRESH == 0:
                layer = offer.layers[name]
                owner.refresh(conv_form(layer, layer.weight.detach()))

    def widths(self) -> dict[str, float]:
        """Bits per weight of every learned layer now, zeros counting none."""
        found = {}
        for name, owner in zip(self.names, self.weights, strict=True):
            if self.choice is not None:
                bits, share = self.choice[name][:2]
                found[name] = round(bits * (1.0 - share), 4)
            else:
                k, f = owner.place
                first, second = (b * (1.0 - s) for b, s in owner.options[k : k + 2])
                found[name] = round(first + f * (second - first), 4)
        return found

    @property
    def average(self) -> float:
        """Mean bits per weight of the learned layers."""
        sizes = {name: self.offer.layers[name].weight.numel() for name in self.names}
        widths = self.widths()
        return sum(sizes[name] * widths[name] for name in sizes) / max(sum(sizes.values()), 1)

    # -- its end --------------------------------------------------------------------------------

    @torch.no_grad()
    def settle(self) -> list[StepSize]:
        """Take whole options that keep the budget; returns learned scales that begin anew."""
        if self.done or not self.weights:
            return []
        sensitivity = self._sensitivity()
        if not sensitivity.any():  # nothing was seen: all alike
            sensitivity[:] = 1.0
        found = self.offer.choose([owner.place[0] for owner in self.weights], sensitivity)
        self.choice = {name: list(option) for name, option in found.items()}
        self._apply()
        restarted = []
        for name in self.names:
            layer = self.offer.layers[name]
            layer.mask = magnitude_mask(layer.weight.detach(), self.choice[name][1])
            layer.refresh_scales()
            if layer.step is not None:
                layer.step.restart(layer.weight_scale)
                restarted.append(layer.step)
        for site, each in zip(self.offer.sites, self.inputs, strict=True):
            quantizer = self.offer.quantizers[self.offer.target(site)]
            scale, zero = each.grids[each.widths.index(quantizer.bits)].tolist()
            quantizer.qparams.copy_(torch.tensor([scale, zero, float(quantizer.bits)]))
            if quantizer.step is not None:
                quantizer.step.restart(quantizer.qparams[:1])
                restarted.append(quantizer.step)
        return restarted

    def _apply(self) -> None:
        """Write the choice to where bits are read."""
        assert self.choice is not None
        offer = self.offer
        for name, owner in zip(self.names, self.weights, strict=True):
            bits, share, pattern, _ = self.choice[name]
            offer.layers[name].bits = bits
            offer.entries[name].update(bits=bits, sparsity=share, pattern=pattern)
            owner.active = False
        for (site, rows), each in zip(offer.sites.items(), self.inputs, strict=True):
            width = self.choice[self.names[rows[0]]][3]
            offer.quantizers[offer.target(site)].bits = width or offer.widths[0]
            each.active = False

    def resume(self, choice: dict[str, list[Any]] | None) -> None:
        """Go on with what a checkpoint says was chosen; masks and scales have been loaded."""
        self.choice = choice
        if choice is not None:
            self._apply()

    def release(self) -> None:
        """Take the positions out again; what was chosen stays."""
        offer = self.offer
        for name in self.names[: len(self.weights)]:
            layer = offer.layers[name]
            del layer.fractional  # of the registered modules
            layer.fractional = None
            if not offer.entries[name]["sparsity"]:
                layer.mask = None
        for site in list(offer.sites)[: len(self.inputs)]:
            quantizer = offer.quantizers[offer.target(site)]
            del quantizer.fractional
            quantizer.fractional = None
        self.weights, self.inputs = [], []

    def plan(self) -> Plan:
        """What was chosen, as a plan."""
        assert self.choice is not None
        chosen = {name: Option(*values) for name, values in self.choice.items()}
        plan = self.offer.problem.plan(chosen, "learned")
        for name, entry in self.offer.entries.items():
            plan[name].activation_bits = self.offer.quantizers[entry["input"]].bits
        return plan
