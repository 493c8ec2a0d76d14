"""One network of the zoo: how it is built, and what goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Example: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""A tensor, positional arguments, or keyword arguments."""
Inputs: TypeAlias = Callable[[int, int], Example]
"""Of a batch size and a seed."""

# Inputs that batch-norm statistics are taken from. Deep layers have few positions: with a tenth of
# these, other inputs give them values many times as large.
SETTLING = 64
TRAINED = (0.5, 1.5)  # what a scale that training starts at zero is drawn from
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def noise(*shape: int) -> Inputs:
    """Float inputs ``[batch, *shape]`` with zero mean and unit variance."""

    def make(batch: int, seed: int) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))

    return make


def tokens(vocabulary: int, length: int) -> Inputs:
    """Token ids ``[batch, length]``, all equally likely; 0 is left to padding."""

    def make(batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, vocabulary, (batch, length), generator=generator)

    return make


def positional(*parts: Inputs) -> Inputs:
    """Several positional arguments; each draws from a seed of its own."""

    def make(batch: int, seed: int) -> tuple[Tensor, ...]:
        return tuple(_tensor(part(batch, seed + 1000 * k)) for k, part in enumerate(parts))

    return make


def keywords(**parts: Inputs) -> Inputs:
    """Keyword arguments; each draws from a seed of its own."""

    def make(batch: int, seed: int) -> dict[str, Tensor]:
        return {
            name: _tensor(part(batch, seed + 1000 * k))
            for k, (name, part) in enumerate(parts.items())
        }

    return make


def _tensor(value: Example) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"an argument must be a tensor, got {type(value).__name__}")
    return value


def arguments(example: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments of a call."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def call(model: Callable[..., Any], example: Example) -> Any:
    """The model on the example, without gradient."""
    args, kwargs = arguments(example)
    with torch.no_grad():
        return model(*args, **kwargs)


def leaves(output: Any) -> list[tuple[str, Tensor]]:
    """All float tensors of a result, with their places in it, in a fixed order."""
    try:
        found, _ = pytree.tree_flatten_with_path(output)
        named = [(pytree.keystr(path) or "result", value) for path, value in found]
    except ValueError:  # a container whose package has not told torch the names of its places
        named = [(f"result {k}", value) for k, value in enumerate(pytree.tree_leaves(output))]
    return [
        (name, value)
        for name, value in named
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        name: ``package/network``.
        package: what has to be installed, as pip calls it; ``"own"`` for networks written here.
        make: builds it, with whatever weights it has then; called under a seed.
        inputs: its example inputs.
        other: inputs of another size, where the network takes several.
        convolutional: at least 95 % of its multiply-accumulates are to be quantized. Not so where
            products of two activations, or recurrence, take their share.
        trained: the package brings weights; batch norms keep their statistics.
        seed: of weights and of the noise that settles batch norms.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    other: Inputs | None = None
    convolutional: bool = True
    trained: bool = False
    seed: int = 0

    def build(self) -> nn.Module:
        """The network in evaluation mode, without gradients."""
        torch.manual_seed(self.seed)
        model = self.make().eval().requires_grad_(False)
        if not self.trained:
            draw_late_weights(model, self.seed)
            settle(model, self.inputs(SETTLING, self.seed + 100))
        return model

    def batches(self, count: int, size: int = 8, seed: int = 300) -> list[Example]:
        """Calibration data, apart from what batch norms are settled on."""
        return [self.inputs(size, self.seed + seed + k) for k in range(count)]


@torch.no_grad()
def draw_late_weights(model: nn.Module, seed: int) -> None:
    """Random values for the weights that training begins with at nearly zero.

    Many networks begin as the identity: the last norm of a residual branch has weight 0, a layer
    scale is 1e-6; or they begin by answering nothing, with a head of zeros. Left so, most layers
    would compute what nobody reads, and a mistake in them would not show. Constant parameters below
    0.01 are drawn instead: from 0.5 to 1.5 if they have one axis that is not 1, else normal with a
    variance of 1 / inputs. Biases are recognised by their name and stay.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.numel() < 2 or name.endswith(("bias", "beta")):
            continue
        first = parameter.flatten()[0]
        if abs(float(first)) >= 0.01 or not bool((parameter == first).all()):
            continue
        if max(parameter.shape) == parameter.numel():
            parameter.uniform_(*TRAINED, generator=generator)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, batch: Example) -> None:
    """Running statistics of batch norms become those of one batch.

    Fresh ones are nearly the identity, and dozens of them in a row let activations vanish or
    explode. Only batch norms are in training mode meanwhile, so dropout changes nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    call(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
