"""What a cell owns: modules, some of them the user's subclasses, parameters and buffers.

Whatever people do to modules after building them stands in ``DRESSES``: hooks, pruning,
parametrizations, a forward that is replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from .recipe import Part

# ---- the user's own modules ---------------------------------------------------------------------


class PaddedConv2d(nn.Conv2d):
    """Pads as TensorFlow does, more at the end than at the beginning (timm's Conv2dSame)."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            missing = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size
            missing = max(missing, 0)
            sides += [missing // 2, missing - missing // 2]
        x = F.pad(x, sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardConv2d(nn.Conv2d):
    """Standardises its weight in every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
        return self._conv_forward(x, weight, self.bias)


class ScaledLinear(nn.Linear):
    """Equalised learning rate: the stored weight is not the one that multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias) + 0.25


class NormAct2d(nn.BatchNorm2d):
    """A batch norm that is its activation, too (timm's BatchNormAct2d)."""

    def __init__(self, channels: int, act: str = "ReLU") -> None:
        super().__init__(channels)
        self.act = getattr(nn, act)()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum or 0.0, self.eps,
        )  # fmt: skip
        return self.act(x)


class PickyReLU(nn.ReLU):
    """Not a relu, whatever it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.25 * x)


class Optional2d(nn.Module):
    """A layer that is there or not, as downsampling shortcuts are."""

    def __init__(self, channels: int, there: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1) if there else None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.layer is None else self.layer(x)


class Block(nn.Sequential):
    """Convolution, batch norm, activation in one module, as an attribute and as children."""

    def __init__(self, channels: int, out: int, act: str) -> None:
        super().__init__(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            getattr(nn, act)(inplace=True),
        )


class Counted(nn.Module):
    """Counts its calls in a buffer, which is state that a call changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 1.5


OWN: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        PaddedConv2d, StandardConv2d, ScaledLinear, NormAct2d, PickyReLU, Optional2d, Block,
        Counted,
    )
}  # fmt: skip

TENSORS = ("Parameter", "Buffer", "HiddenBuffer", "Attribute")


def _tensor(shape: tuple[int, ...], fill: str) -> Tensor:
    if fill == "weight":  # of a product over all axes but the first
        return torch.randn(shape) / max(1, shape[1:].numel() if shape else 1) ** 0.5
    if fill == "scale":
        return torch.rand(shape) + 0.5
    if fill == "mask":
        return torch.rand(shape) < 0.6
    if fill == "order":
        return torch.randperm(shape[0])
    return torch.randn(shape) * 0.5


def attach(owner: nn.Module, part: Part) -> None:
    """Build a part and make it an attribute of ``owner``, under its name."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about weight_norm in its old form
        torch.manual_seed(part.seed)
        if part.kind in TENSORS:
            value = _tensor(torch.Size(part.args["shape"]), part.args["fill"])
            if part.kind == "Parameter":
                owner.register_parameter(part.name, nn.Parameter(value))
            elif part.kind == "Attribute":
                setattr(owner, part.name, value)
            else:
                owner.register_buffer(part.name, value, persistent=part.kind == "Buffer")
            return
        module = (OWN.get(part.kind) or getattr(nn, part.kind))(**part.args)
        _unsettle(module)
        if part.tied:
            module.weight = getattr(owner, part.tied).weight
        for item in part.dress:
            DRESSES[item](module)
        owner.add_module(part.name, module)


@torch.no_grad()
def _unsettle(module: nn.Module) -> None:
    """Values as training leaves them: fresh norms are identities, which would hide mistakes."""
    for item in module.modules():
        if isinstance(item, nn.modules.batchnorm._NormBase):
            for tensor, start in ((item.weight, 0.5), (item.running_var, 0.5)):
                if tensor is not None:
                    tensor.copy_(torch.rand_like(tensor) + start)
            for tensor in (item.bias, item.running_mean):
                if tensor is not None:
                    tensor.copy_(torch.randn_like(tensor) * 0.3)
        elif isinstance(item, (nn.LayerNorm, nn.GroupNorm)):
            if item.weight is not None:
                item.weight.copy_(torch.rand_like(item.weight) + 0.5)
            if item.bias is not None:
                item.bias.copy_(torch.randn_like(item.bias) * 0.3)
        elif isinstance(item, nn.MultiheadAttention):
            item.in_proj_bias.copy_(torch.randn_like(item.in_proj_bias) * 0.2)
            item.out_proj.bias.copy_(torch.randn_like(item.out_proj.bias) * 0.2)
        elif isinstance(item, nn.PReLU):
            item.weight.copy_(torch.rand_like(item.weight) * 0.5)


# ---- what is done to modules --------------------------------------------------------------------


class _Folded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * (weight + weight.flip(0))


def _half(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 0.5 + 0.25


def _bounded(module: nn.Module, args: Any, output: Any) -> Any:
    return output.clamp(-1.0, 1.5)


def _shifted(module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.5, *args[1:])


def _shifted_words(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] * 0.5, *args[1:]), kwargs


def _in_place(module: nn.Module, args: Any, output: Any) -> None:
    output.mul_(0.5)


def _patch(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x) * 0.75 - 0.125  # type: ignore[method-assign]


def _decayed(module: nn.Module) -> None:
    # In newer versions a parametrization alone; old code has the one made of hooks.
    torch.nn.utils.weight_norm(module)  # type: ignore[no-untyped-call]


DRESSES: dict[str, Callable[[Any], Any]] = {
    "forward_hook": lambda m: m.register_forward_hook(_half),
    "clamping_hook": lambda m: m.register_forward_hook(_bounded),
    "writing_hook": lambda m: m.register_forward_hook(_in_place),
    "looking_hook": lambda m: m.register_forward_hook(lambda *_: None),
    "pre_hook": lambda m: m.register_forward_pre_hook(_shifted),
    "pre_hook_with_kwargs": lambda m: m.register_forward_pre_hook(_shifted_words, with_kwargs=True),
    "patched_forward": _patch,
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "old_weight_norm": _decayed,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m),
    "old_spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", _Folded()),
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.4),
    "prune_rows": lambda m: prune.ln_structured(m, "weight", amount=0.3, n=2, dim=0),
    "pruned_for_good": lambda m: prune.remove(prune.l1_unstructured(m, "weight", 0.3), "weight"),
    "frozen": lambda m: m.requires_grad_(False),
}
# Of the weight: for layers that have one. Of the call: for all modules of one input and one output.
OF_WEIGHT = (
    "weight_norm", "old_weight_norm", "spectral_norm", "old_spectral_norm", "parametrization",
    "prune", "prune_rows", "pruned_for_good", "frozen",
)  # fmt: skip
OF_CALL = (
    "forward_hook", "clamping_hook", "writing_hook", "looking_hook", "pre_hook",
    "pre_hook_with_kwargs", "patched_forward",
)  # fmt: skip
