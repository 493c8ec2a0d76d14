"""Layer inputs of fewer bits than those of all other layers: what that costs in loss.

A value has one grid, whoever reads it. So the error is that of the value, with all that read it:
layers, and the residual additions beside them. It is measured to second order like that of a
weight (:class:`~adalayer_native.allocation.sensitivity.LogitSensitivity`), with the gradients by
the value itself.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ..capture import GraphModel
from ..importance.batches import Batch
from ..importance.outputs import Pick
from ..importance.task_loss import TaskLoss
from ..plan import MAX_BITS
from ..quantization import ActivationQuantizer, calibrate, prepare
from ..quantization.graph import insert_behind, quantizers_of
from .options import Choices, Option
from .problem import Problem
from .sensitivity import LogitSensitivity
from .store import Store

__all__ = ["NarrowInputs"]

TAPS = "value_taps"


class NarrowInputs:
    """The values whose bits are decided, and their grids.

    Args:
        problem: layers.
        table: images that errors are measured on.
        repair: images that the grids' ranges are chosen on, as loaders yield them.
        logits: as for ``LogitSensitivity``.
        output: which output counts.
        loss: of the task, as for ``LogitSensitivity``.
    """

    def __init__(
        self,
        problem: Problem,
        table: Sequence[Batch],
        repair: Sequence[object],
        *,
        logits: bool = True,
        output: Pick = None,
        loss: TaskLoss | None = None,
    ) -> None:
        self.problem, self.table, self.repair = problem, table, repair
        self.logits, self.output, self.loss = logits, output, loss
        self._grids: dict[int, dict[str, ActivationQuantizer]] = {}

    def quantizer(self, site: str, bits: int) -> ActivationQuantizer:
        """A value's grid of so many bits, calibrated like that of a plan."""
        if bits not in self._grids:
            problem = self.problem
            every = Option(MAX_BITS, activation_bits=bits)
            plan = problem.plan(dict.fromkeys(problem.free, every))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which layers stay float is said elsewhere
                prepared = prepare(problem.model, plan)
            calibrate(prepared, self.repair, progress=False)
            known = problem.structure.sites
            found = quantizers_of(prepared)
            self._grids[bits] = {name: found[known[name].target] for name in problem.shared_inputs}
        return self._grids[bits][site]

    @cached_property
    def model(self) -> GraphModel:
        """The model with a module behind every value that is decided; it shares all tensors."""
        model = self.problem.model
        tensors = itertools.chain(model.parameters(), model.buffers())
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        twin.add_module(TAPS, nn.ModuleDict({self._tap(s): nn.Identity() for s in self._sites}))
        nodes = {node.name: node for node in twin.graph.nodes}
        for site in self._sites:
            for producer in self.problem.structure.sites[site].producers:
                insert_behind(twin.graph, nodes[producer], f"{TAPS}.{self._tap(site)}")
        twin.graph.lint()
        twin.recompile()
        return twin

    @property
    def _sites(self) -> list[str]:
        return list(self.problem.shared_inputs)

    @staticmethod
    def _tap(site: str) -> str:
        return f"of_{site}"

    def tap(self, site: str) -> nn.Module:
        """The module behind a value."""
        return self.model.get_submodule(f"{TAPS}.{self._tap(site)}")

    def narrowed(self, choice: Choices) -> dict[str, int]:
        """Values that a choice gives bits of their own: the fewest that a reader asks for."""
        found: dict[str, int] = {}
        for name, option in choice.items():
            bits = Option(*option).activation_bits
            site = self.problem.structure.inputs.get(name)
            if bits is not None and site in self.problem.shared_inputs:
                found[site] = min(bits, found.get(site, bits))
        return found

    def errors(self, widths: Sequence[int], store: Store) -> dict[int, dict[str, float]]:
        """``{bits: {value: loss}}``: what a value loses on a grid of so many bits, in nats.

        Above what it loses on the grid that all have, which no plan is without.

        Args:
            widths: bits.
            store: errors that are there already are not measured again.
        """
        base = self.problem.activation_bits
        asked = [(site, bits) for bits in (base, *widths) for site in self._sites]
        missing = [(site, bits) for site, bits in asked if f"{site} {bits}" not in store]
        if missing:
            sensitivity = LogitSensitivity(
                self.model,
                self.table,
                {site: self.tap(site) for site in self._sites},
                logits=self.logits,
                output=self.output,
                loss=self.loss,
            )
            with store:
                for site, bits in missing:
                    quantizer = self.quantizer(site, bits)

                    def change(x: Tensor, quantizer: ActivationQuantizer = quantizer) -> Tensor:
                        return quantizer(x) - x

                    store[f"{site} {bits}"] = sensitivity.of_change(site, change)
        return {
            bits: {
                site: max(store[f"{site} {bits}"] - store[f"{site} {base}"], 0.0)
                for site in self._sites
            }
            for bits in widths
        }

    @torch.no_grad()
    def applied(self, choice: Choices) -> list[torch.utils.hooks.RemovableHandle]:
        """Puts the values of a choice on their grids in ``self.model``, until handles are removed.

        Values of the usual bits stay as they are.
        """
        handles = []
        for site, bits in self.narrowed(choice).items():
            quantizer = self.quantizer(site, bits)

            def hook(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                __: Tensor,
                quantizer: ActivationQuantizer = quantizer,
            ) -> Tensor:
                found: Tensor = quantizer(inputs[0])
                return found

            handles.append(self.tap(site).register_forward_hook(hook))
        return handles
