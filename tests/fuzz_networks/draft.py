"""A recipe while it is written: every step is run at once, so that sizes and memory are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .network import draw_input
from .ops import OPS
from .parts import OF_CALL, OF_WEIGHT, attach
from .recipe import Input, Part, Recipe, Step

BATCH = 3  # of the draft: no size of a network depends on it
SMALLEST, LARGEST = 0.03, 12.0  # largest elements beyond these are scaled
PIXELS, CHANNELS, TOKENS, FEATURES = 14, 12, 20, 700

# Adds one or several steps to a draft, or nothing where no value has the form that it needs.
Draw = Callable[["Draft"], None]
DRAWS: list[tuple[Draw, float]] = []
ODD: list[tuple[Draw, float]] = []


def draw(weight: float, *, odd: bool = False) -> Callable[[Draw], Draw]:
    """Register a way to go on; ``weight`` says how often it is taken."""

    def register(function: Draw) -> Draw:
        (ODD if odd else DRAWS).append((function, weight))
        return function

    return register


class Draft:
    """Values that live so far, and what was done.

    Attributes:
        writes: whether steps may write into values that others read, before or after.
        live: values by name, as they are now.
        shared: modules that can be called once more, with the size of their input.
    """

    def __init__(self, seed: int, *, writes: bool = True) -> None:
        self.seed = seed
        self.writes = writes
        self.rng = random.Random(f"recipe {seed}")
        self.inputs: list[Input] = []
        self.parts: list[Part] = []
        self.steps: list[Step] = []
        self.live: dict[str, Any] = {}
        self.shared: list[tuple[str, tuple[int, ...]]] = []
        self.owner = nn.Module().eval()
        self.odd = False
        self._given: dict[str, Any] = {}
        self._scaled: dict[str, str] = {}
        self._unbound: set[int] = set()

    # -- choosing ---------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def one_of(self, items: Sequence[Any]) -> Any:
        return self.rng.choice(items)

    def value(self, wanted: Callable[[Tensor], bool]) -> str | None:
        """A live float value, of the last ones rather than of the first."""
        names = [name for name, value in self.live.items() if _is_float(value) and wanted(value)]
        if not names:
            return None
        return names[-1] if self.chance(0.55) else self.rng.choice(names)

    def image(self, smallest: int = 1) -> str | None:
        return self.value(lambda v: v.dim() == 4 and min(v.shape[2:]) >= smallest)

    def sequence(self) -> str | None:
        return self.value(lambda v: v.dim() == 3)

    def row(self) -> str | None:
        return self.value(lambda v: v.dim() == 2 and v.shape[1] <= FEATURES)

    def any(self) -> str | None:
        return self.value(lambda v: v.dim() >= 2)

    def like(self, name: str) -> str | None:
        """Another value of the same sizes (or, where there is none, the same value)."""
        shape = self.live[name].shape
        return self.value(lambda v: v.shape == shape)

    def fresh(self, wanted: Callable[[Tensor], bool] = lambda v: v.dim() >= 2) -> str | None:
        """A value that may be written: neither expanded nor, mostly, memory of the caller.

        Nor what unbind shows: torch.export fixes the batch where that is written.
        """
        if not self.writes:
            return None
        inputs = {v.untyped_storage().data_ptr() for v in self._given.values()}
        own = self.chance(0.03)

        def allowed(value: Tensor) -> bool:
            expanded = any(
                s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)
            )
            callers = value.untyped_storage().data_ptr() in inputs
            unbound = value.untyped_storage().data_ptr() in self._unbound
            return wanted(value) and not expanded and not unbound and (own or not callers)

        return self.value(allowed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without the batch."""
        return tuple(self.live[name].shape[1:])

    # -- adding -----------------------------------------------------------------------------

    def add_input(self, kind: str, shape: tuple[int, ...], *, given: bool = True) -> str:
        item = Input(f"x{len(self.inputs)}", kind, shape, given)
        self.inputs.append(item)
        rng = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        missing = {"number": 0.75, "flag": True}.get(kind)
        self.live[item.name] = draw_input(item, BATCH, rng) if given else missing
        if given:
            self._given[item.name] = self.live[item.name]
        return item.name

    def part(
        self, kind: str, *, dress: Sequence[str] = (), tied: str | None = None, **args: Any
    ) -> str:
        """Something of the network's own."""
        seed = self.rng.randrange(1 << 30)
        part = Part(f"p{len(self.parts)}", kind, args, seed, tuple(dress), tied)
        attach(self.owner, part)
        self.owner.eval()
        self.parts.append(part)
        return part.name

    def parameter(self, *shape: int, fill: str = "weight", kinds: Sequence[str] = ()) -> str:
        kind = self.one_of(kinds or ("Parameter",) * 4 + ("Buffer", "HiddenBuffer", "Attribute"))
        return self.part(kind, shape=shape, fill=fill)

    def dress(self, *, weight: bool = False, call: bool = True) -> tuple[str, ...]:
        """What is done to a module, its weight and its calls; mostly nothing."""
        found = []
        if weight and self.chance(0.15):
            found.append(self.one_of(OF_WEIGHT))
        if call and self.chance(0.08):
            found.append(self.one_of(OF_CALL))
        return tuple(found)

    def current(self, name: str) -> str:
        """The value that stands for another one since that grew too large."""
        while name in self._scaled:
            name = self._scaled[name]
        return name

    @torch.no_grad()
    def step(self, op: str, *operands: str, makes: int = 1, **args: Any) -> str:
        """Run an operation and keep it; returns the name of the (last) value that it made."""
        operands = tuple(map(self.current, operands))
        values = [self.live[n] if n in self.live else getattr(self.owner, n) for n in operands]
        result = OPS[op](*values, **args)
        if op == "unbind":
            self._unbound.add(values[0].untyped_storage().data_ptr())
        letters = "abcdefghijkl"[:makes] if makes > 1 else [""] * makes
        names = tuple(f"v{len(self.steps)}{letter}" for letter in letters)
        self.steps.append(Step(names, op, operands, args))
        self.live.update(zip(names, [result] if makes == 1 else result or (), strict=True))
        for name, value in list(self.live.items()):
            if _is_float(value):
                self._tame(name, value)
        return self.current(names[-1]) if names else ""

    def call(self, module: str, x: str) -> str:
        """Call a module, which other steps may call again."""
        self.shared.append((module, self.shape(self.current(x))))
        return self.step("call", module, x)

    def _tame(self, name: str, value: Tensor) -> None:
        """Values neither grow without bound nor vanish, where others would be one level only."""
        largest = float(value.abs().amax())
        assert math.isfinite(largest), f"{name} = {largest} after\n{self.recipe(name)}"
        if largest == 0 or SMALLEST < largest < LARGEST:
            return
        factor = 2.0 ** -round(math.log2(largest / 2))
        scaled = f"v{len(self.steps)}"
        self.steps.append(Step((scaled,), "scalar", (name,), {"name": "*", "value": factor}))
        self._scaled[name] = scaled
        self.live[scaled] = self.live.pop(name) * factor

    def recipe(self, returns: Any) -> Recipe:
        return Recipe(
            self.seed, tuple(self.inputs), tuple(self.parts), tuple(self.steps), returns, self.odd
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() > 0
