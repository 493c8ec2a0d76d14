"""Layer after layer: what reaches a layer in the prepared model and in the float model."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.errors import CalibrationError
from adalayer_native.quantization import ops_table as table
from adalayer_native.quantization.calibrate import images_of
from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer
from adalayer_native.quantization.graph import layers_of, set_submodule
from adalayer_native.rounding import conv_form

__all__ = ["Data", "float_twin", "in_order", "inputs_of", "norm_gain", "rows_per_image"]

# Input rows per layer: enough for the covariance of K inputs to be well determined.
_ROWS = 32768
_ROWS_PER_COLUMN = 16


class Data:
    """Calibration batches, read again for every layer and never held together.

    Attributes:
        images: number of samples.
        batches: number of batches.
        digest: hash of all of them.
    """

    def __init__(self, loader: Iterable[Any], limit: int | None, device: torch.device) -> None:
        if limit is not None and limit < 1:
            raise CalibrationError(f"batches must be at least 1 or None, got {limit}")
        if iter(loader) is loader:
            # A one-shot iterator cannot be read again.
            loader = list(itertools.islice(loader, limit))
        self.loader, self.limit, self.device = loader, limit, device
        digest = hashlib.sha256()
        self.images = self.batches = 0
        for x in self:
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"calibration batch {self.batches} of shape {tuple(x.shape)} contains NaN or "
                    "infinite values; expected finite numbers"
                )
            digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
            flat = x.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
            self.images += x.shape[0] if x.dim() else 1
            self.batches += 1
        if self.images == 0:
            raise CalibrationError("the calibration loader is empty; expected at least one sample")
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in itertools.islice(self.loader, self.limit):
            yield images_of(batch).to(self.device)


class _Float(nn.Module):
    """A prepared layer that computes with its float weight, nothing pruned or rounded."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        kind = next(kind for kind in kinds if isinstance(self.layer, kind))
        return kind.forward(self.layer, *args, **kwargs)  # type: ignore[arg-type]


def float_twin(prepared: fx.GraphModule) -> fx.GraphModule:
    """Copy of a prepared model that quantizes and prunes nothing, in evaluation mode."""
    twin = copy.deepcopy(prepared)
    for name, layer in layers_of(twin).items():
        set_submodule(twin, name, _Float(layer))
    for name, module in list(twin.named_modules()):
        if isinstance(module, ActivationQuantizer):
            set_submodule(twin, name, nn.Identity())
    return twin.eval()


def in_order(prepared: fx.GraphModule) -> list[str]:
    """Quantized layers in the order in which the graph first calls them."""
    known = layers_of(prepared)
    calls = (str(n.target) for n in prepared.graph.nodes if n.op == "call_module")
    return list(dict.fromkeys(name for name in calls if name in known))


def inputs_of(model: fx.GraphModule, name: str) -> fx.GraphModule:
    """Part of a model's graph that computes what enters the layer ``name``.

    Returns:
        A module of the same arguments that returns a tuple, one tensor per call of the layer. It
        shares all parameters with ``model``.
    """
    calls = [n for n in model.graph.nodes if n.op == "call_module" and n.target == name]
    operands = [operand for operand in map(table.source, calls) if operand is not None]
    needed: set[fx.Node] = set()
    pending = list(operands)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in model.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[operand] for operand in operands))
    return fx.GraphModule(model, part).eval()


def rows_per_image(layer: nn.Module, images: int) -> int:
    """Output positions to look at in each of so many images."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns = conv_form(layer, weight)[0].numel()
    return -(-max(_ROWS, _ROWS_PER_COLUMN * columns) // images)


def norm_gain(norm: Any) -> Tensor | None:
    """What a folded batch norm multiplies its channels by."""
    if norm is None:
        return None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.detach()
