"""The weight that a layer will have after the repair, for tables and plans of any method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .._recent import Recent
from ..repair import HELD_BACK, LayerHessian, LayerSolution, layer_hessians
from ..rounding import conv_form, layer_form
from .options import UNSTRUCTURED, Option

__all__ = ["REPAIR_VERSION", "RepairedWeights"]

REPAIR_VERSION = 4  # of the weights behind measurements that are kept
MEMORY = 1 << 29  # bytes of statistics that are kept, and as many of solutions
PASSES = 1  # of refinement: the repair of the chosen plan makes more


class RepairedWeights:
    """Weights and bias shifts by layer and option, repaired against the layer's output.

    Every layer by itself, on the inputs that the float model gives it: errors of earlier layers,
    which the repair of a whole plan corrects, depend on the plan. Statistics of a layer are
    gathered when it is first asked for, those of several layers in one pass over the data, and the
    oldest are given up where all would take too much memory.

    Args:
        model: float model; not changed.
        batches: re-iterable of calibration inputs.
        layers: names that will be asked for.
        passes: rounds of refinement.
        memory: bytes of statistics kept, and of integer weights kept.
        progress: show a progress bar while data is read.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Sequence[str],
        *,
        passes: int = PASSES,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> None:
        self.model, self.batches, self.layers = model, batches, list(layers)
        self.passes, self.memory, self.progress = passes, memory, progress
        self.modules = modules = dict(model.named_modules())
        # Without ``self``, which would be a circle that is let go of much later than it is left.
        self._hessians = Recent[str, LayerHessian](memory, lambda name, _: _bytes(modules[name]))
        self._known = Recent[tuple[Any, ...], LayerSolution](
            memory, lambda _, solution: solution.levels.numel()
        )

    def __call__(
        self, name: str, bits: int, sparsity: float, pattern: str = UNSTRUCTURED
    ) -> tuple[Tensor, Tensor]:
        """Dequantized weight in the layer's own shape, and what is added to its bias."""
        option = Option(bits, sparsity, pattern)
        key = (name, *option.values)
        if key not in self._known:
            self.expect(name, [option])
        solution = self._known.get(key)
        assert solution is not None
        layer: Any = self.modules[name]
        weight = layer_form(layer, solution.weight)
        return weight.to(layer.weight), solution.bias_shift

    def expect(self, name: str, options: Sequence[Option]) -> None:
        """Work out what is going to be asked for; many options in one sweep cost less."""
        missing = [o for o in options if (name, *o.values) not in self._known]
        if not missing:
            return
        hessian = self._hessian(name)
        for pattern in dict.fromkeys(option.pattern for option in missing):
            part = [option for option in missing if option.pattern == pattern]
            asked = [(option.bits or 0, option.sparsity) for option in part]
            solutions = hessian.solutions(asked, pattern=pattern, passes=self.passes)
            for option, solution in zip(part, solutions, strict=True):
                # A copy: a part of a sweep's tensor would keep the whole of it.
                solution.mask, solution.levels = None, solution.levels.clone()
                self._known.put((name, *option.values), solution, shrink=False)
        self._known.shrink(keep=len(missing))
        hessian.release()

    def _hessian(self, name: str) -> LayerHessian:
        if name not in self._hessians:
            self._gather(name)
        found = self._hessians.get(name)
        assert found is not None
        return found

    def _gather(self, name: str) -> None:
        """Statistics of a layer, and of those behind it that fit into the same memory."""
        position = self.layers.index(name)
        wanted, held = [name], _bytes(self.modules[name])
        for other in self.layers[position + 1 :]:
            if other in self._hessians or held + _bytes(self.modules[other]) > self.memory:
                break
            wanted.append(other)
            held += _bytes(self.modules[other])
        self._hessians.shrink(self.memory - held, keep=0)
        for found, hessian in layer_hessians(
            self.model, self.batches, wanted, held_back=HELD_BACK, memory=self.memory,
            progress=self.progress,
        ):  # fmt: skip
            self._hessians.put(found, hessian, shrink=False)


def _bytes(layer: Any) -> int:
    """What a layer's statistics take."""
    width = conv_form(layer, layer.weight)[0].numel()
    # Two matrices of float64: the samples that are repaired with, and those held back.
    return 16 * int(getattr(layer, "groups", 1)) * width * width
