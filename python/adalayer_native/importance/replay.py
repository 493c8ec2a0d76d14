"""The model with one layer changed, without computing again what lies before that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..capture import Inputs

__all__ = ["Replay"]

MEMORY = 1 << 30  # bytes of layer outputs that are kept


@dataclass
class _Call:
    """One call of a layer in the float model: its input's sum, and its output where it is kept."""

    name: str
    total: float
    output: Tensor | None


class Replay:
    """Runs a model for one batch with the weight of one layer replaced.

    The float model runs once, and the outputs of its layers are kept. With layer l changed, layers
    that are called before it return what is kept; everything else of the model runs as it is, so
    that no graph of it is needed. A layer whose input is not what it was (its sum differs) runs,
    and so does all that follows. Results have the bits of a whole run.

    Args:
        model: in eval mode; its layers' ``forward`` is replaced while a run lasts.
        layers: whose outputs are worth keeping.
        x: batch, the model's arguments.
        memory: bytes of outputs that are kept; later layers run again where they do not suffice.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        x: Inputs | Tensor,
        memory: int = MEMORY,
    ) -> None:
        self.model, self.layers, self.x = model, layers, Inputs.of(x)
        self.calls: list[_Call] = []
        held = 0

        def recording(name: str, run: Callable[..., Any], *inputs: Any, **rest: Any) -> Any:
            nonlocal held
            output = run(*inputs, **rest)
            size = output.numel() * output.element_size()
            held += size
            # A copy, because what follows may work in place.
            kept = output.clone() if held <= memory else None
            self.calls.append(_Call(name, _total(inputs), kept))
            return output

        with torch.no_grad(), self._replaced(recording):
            self.x(model)

    @torch.no_grad()
    def run(self, name: str, weight: Tensor) -> Any:
        """The model's output with another weight in layer ``name``."""
        position, replaying = 0, any(call.name == name for call in self.calls)

        def forward(other: str, run: Callable[..., Any], *inputs: Any, **rest: Any) -> Any:
            nonlocal position, replaying
            if replaying and other != name and position < len(self.calls):
                call = self.calls[position]
                position += 1
                replaying = call.name == other and call.total == _total(inputs)
                if replaying and call.output is not None:
                    return call.output.clone()
            elif other == name:
                replaying = False
            return run(*inputs, **rest)

        with self._replaced(forward):
            # functional_call swaps the weight for one call and never touches the user's model.
            changed = {f"{name}.weight": weight}
            return functional_call(self.model, changed, self.x.args, self.x.kwargs)

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every layer's forward goes through a function that gets its name and the real one."""
        before = {name: layer.__dict__.get("forward") for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.__dict__["forward"] = _bound(forward, name, layer.forward)
            yield
        finally:
            for name, layer in self.layers.items():
                own = before[name]
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = own


def _bound(forward: Callable[..., Any], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs, **rest: forward(name, run, *inputs, **rest)


def _total(inputs: tuple[Any, ...]) -> float:
    """A number that tells inputs apart; NaN, which equals nothing, where there is none."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return float("nan")
    return float(inputs[0].sum())
