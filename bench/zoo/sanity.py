"""Whether a network with random weights is a fair test: its float activations.

Quantization is judged by comparing with the float network, and that says nothing where random
weights have made the float network itself degenerate. Looked at are the float results of all
modules without children, which is where values would be stored:

- **finite**: all of them.
- **alive**: the root mean square of each lies between 1e-4 and 1e4. Below, the constants that norms
  add to a variance (1e-5 and 1e-3 are common) would decide the result; above, float32 sums over a
  few thousand products no longer have the seven digits that equality to other sums needs.
- **no outliers**: the largest value is at most 50 times the root mean square. A grid of 8 bits over
  [-50, 50] rms has steps of 0.39 rms and a rounding error of 0.39 / sqrt(12) = 11 % of the rms; a
  tensor beyond that loses more to its own shape than to anything that could be done wrong. Normal
  values reach 5.5 in ten millions, those of a relu 8, products of two such values some 20 to 30.
- **varied**: over different noise inputs, the standard deviation of at least one result of the
  network is 1 % of its root mean square or more. Noise averages out over an image, so that a
  classifier's logits differ less than they would between photographs; below 1 % the differences
  would be of the size of the rounding error of its own last layer's input.

How much a relative error of the input has **grown** at the result is measured too, with 1 % of
noise. Random convolutions with batch norms let errors grow from layer to layer, tenfold in twenty
layers and more, as trained networks do not. What that means for a comparison with float,
``bench/zoo/rounding.py`` measures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bench.zoo.entry import Example, call, leaves

ALIVE = (1e-4, 1e4)
NOISE = 0.01  # of the input's root mean square
OUTLIERS = 50.0
VARIED = 0.01


@dataclass(frozen=True)
class Sanity:
    """What was found; see the module's text.

    Attributes:
        problems: in words; empty where all is well.
        outlier: largest absolute value over root mean square, and the module.
        smallest: smallest root mean square of a module's result, and the module.
        largest: largest one.
        variation: standard deviation over inputs, over root mean square, of the result that
            varies most.
        growth: how much more a relative error of the inputs is in the result where it is largest;
            None for a network whose inputs are not floats.
    """

    problems: tuple[str, ...]
    outlier: tuple[float, str]
    smallest: tuple[float, str]
    largest: tuple[float, str]
    variation: float
    growth: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def sanity(model: nn.Module, example: Example) -> Sanity:
    """Judge the activations of a float network on one batch of several inputs."""
    seen: list[tuple[str, float, float]] = []  # module, rms, largest
    handles = [
        module.register_forward_hook(_recorder(name, seen))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        output = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    variation = max((_variation(value) for _, value in leaves(output)), default=0.0)
    problems = [f"{name}: not finite" for name, rms, peak in seen if not rms + peak < float("inf")]
    # A tensor of zeros (a mask that masks nothing) is neither dead nor alive.
    seen = [item for item in seen if 0.0 < item[1] < float("inf")]
    nothing = (0.0, "")
    outlier = max(((peak / rms, name) for name, rms, peak in seen), default=nothing)
    sizes = [(rms, name) for name, rms, _ in seen]
    smallest, largest = min(sizes, default=nothing), max(sizes, default=nothing)
    if outlier[0] > OUTLIERS:
        problems.append(f"{outlier[1]}: largest value {outlier[0]:.0f} times the rms")
    if seen and smallest[0] < ALIVE[0]:
        problems.append(f"{smallest[1]}: rms {smallest[0]:.1e}")
    if seen and largest[0] > ALIVE[1]:
        problems.append(f"{largest[1]}: rms {largest[0]:.1e}")
    if not variation >= VARIED:
        problems.append(f"results vary by {100 * variation:.2g} % from input to input")
    growth = _growth(model, example, output)
    return Sanity(tuple(problems), outlier, smallest, largest, variation, growth)


def _recorder(name: str, seen: list[tuple[str, float, float]]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for _, value in leaves(output):
            if value.numel():
                flat = value.detach().double()
                seen.append((name, float(flat.square().mean().sqrt()), float(flat.abs().max())))

    return hook


def _growth(model: nn.Module, example: Example, output: Any) -> float | None:
    generator = torch.Generator().manual_seed(0)

    def disturbed(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator)
        return value + NOISE * float(value.square().mean().sqrt()) * noise

    if not any(value.is_floating_point() for value in pytree.tree_leaves(example)):
        return None
    other = call(model, pytree.tree_map(disturbed, example))
    shares = [
        float((b - a).double().norm() / a.double().norm())
        for (_, a), (_, b) in zip(leaves(output), leaves(other), strict=True)
        if bool(a.any())
    ]
    return max(shares, default=0.0) / NOISE


def _variation(value: Tensor) -> float:
    if value.dim() == 0 or value.shape[0] < 2:
        return 0.0
    value = value.double()
    rms = float(value.square().mean().sqrt())
    return float(torch.var(value, dim=0).mean().sqrt()) / rms if rms else 0.0
