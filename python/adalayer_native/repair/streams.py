"""Layer after layer: what reaches a layer in the prepared model and in the float model."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from adalayer_native._fingerprint import memory_of
from adalayer_native.capture import GraphModel, Inputs, batch_inputs
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.channels_last import laid_out
from adalayer_native.capture.recurrence import link_recurrences
from adalayer_native.errors import CalibrationError, InputError
from adalayer_native.padding import PaddedConv2d
from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer
from adalayer_native.quantization.graph import layers_of, set_submodule
from adalayer_native.rounding import conv_form

__all__ = [
    "Data",
    "Streams",
    "float_twin",
    "in_order",
    "norm_gain",
    "rows_of",
    "rows_per_image",
]

# Input rows per layer: enough for the covariance of K inputs to be well determined.
_ROWS = 32768
_NARROW = 64  # with fewer columns, a quarter of the rows is enough
_ROWS_PER_COLUMN = 8


FEWEST = 4  # samples on either side of a comparison


class Data:
    """Calibration batches, read again for every layer and never held together.

    Attributes:
        images: number of samples.
        batches: number of batches.
        counts: samples of every batch.
        digest: hash of all of them.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any], limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise CalibrationError(f"batches must be at least 1 or None, got {limit}")
        if iter(loader) is loader:
            # A one-shot iterator cannot be read again.
            loader = list(itertools.islice(loader, limit))
        self.model, self.loader, self.limit = model, loader, limit
        self.device = next(model.parameters()).device
        digest = hashlib.sha256()
        self.images = self.batches = 0
        self.counts: list[int] = []
        for x in self:
            if not x.is_finite():
                raise CalibrationError(
                    f"calibration batch {self.batches} of shape {x.shapes} contains NaN or "
                    "infinite values; expected finite numbers"
                )
            for tensor in x.tensors():
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(memory_of(tensor))
            self.images += x.count
            self.batches += 1
            self.counts.append(x.count)
        if self.images == 0:
            raise CalibrationError("the calibration loader is empty; expected at least one sample")
        self.digest = digest.hexdigest()

    def held_back(self, share: float) -> list[Tensor]:
        """Which samples of every batch are held back, bool: evenly spread over all of them.

        None, where that leaves fewer than ``FEWEST`` or takes fewer.
        """
        places = torch.arange(self.images, dtype=torch.float64)
        chosen = ((places + 1) * share).floor() > (places * share).floor()
        if min(int(chosen.sum()), int((~chosen).sum())) < FEWEST:
            chosen = torch.zeros_like(chosen)
        return list(chosen.split(self.counts))

    def __iter__(self) -> Iterator[Inputs]:
        for batch in itertools.islice(self.loader, self.limit):
            yield laid_out(self.model, batch_inputs(self.model, batch)[0].to(self.device))


class _Float(nn.Module):
    """A prepared layer that computes with its float weight, nothing pruned or rounded."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        kinds = (PaddedConv2d, nn.ConvTranspose2d, nn.Linear)  # with a padding of its own
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
    link_recurrences(twin)
    return twin.eval()


def in_order(prepared: fx.GraphModule) -> list[str]:
    """Quantized layers in the order in which the graph first calls them."""
    known = layers_of(prepared)
    calls = (str(n.target) for n in prepared.graph.nodes if n.op == "call_module")
    return list(dict.fromkeys(name for name in calls if name in known))


class Streams:
    """Runs models of one graph side by side, batch by batch, from one layer to the next.

    Where a pass ends the values that are still needed may be kept for every batch, so that the next
    pass goes on there; where they take more than ``memory``, it starts from the last values that
    were kept, or from the data. A layer that is repaired in between must lie behind that point:
    layers are asked for in graph order.

    Args:
        models: graph modules of the same graph and input.
        data: calibration batches.
        memory: bytes that may be kept, all models and batches together.
    """

    def __init__(self, models: Sequence[fx.GraphModule], data: Data, memory: int) -> None:
        self.runners = [fx.Interpreter(model, garbage_collect_values=False) for model in models]
        self.graphs = [list(model.graph.nodes) for model in models]
        self.order = {node: i for graph in self.graphs for i, node in enumerate(graph)}
        self.data, self.memory = data, memory
        self.position = 0
        self.kept: list[list[_Values]] | None = None

    def inputs(self, name: str) -> Iterator[list[tuple[Tensor, ...]]]:
        """Per batch what enters the layer: for every call of it one tensor per model."""
        calls = [
            index
            for index, node in enumerate(self.graphs[0])
            if node.op == "call_module" and node.target == name
        ]
        if calls[0] < self.position:
            raise ValueError(f"layer {name!r} was asked for out of order")
        source: Iterator[Any] = iter(self.data if self.kept is None else self.kept)
        new: list[list[_Values]] | None = None
        for batch, start in enumerate(source):
            found: list[list[Tensor]] = []
            envs: list[_Values] = []
            for runner, graph in zip(self.runners, self.graphs, strict=True):
                env: _Values = {}
                if self.kept is None:
                    runner.args_iter = iter(self.leaves(start))
                else:
                    env = _cloned(start[len(envs)])
                self._advance(runner, graph, env, self.position, calls[0])
                envs.append(env)
                found.append(self._operands(runner, graph, env, calls))
            if batch == 0 and sum(map(_bytes, envs)) * self.data.batches <= self.memory:
                new = []
            if new is not None:
                new.append(envs)
                if self.kept is not None:
                    self.kept[batch] = []  # its successor is kept now
            yield list(zip(*found, strict=True))
        if new is not None:
            self.kept, self.position = new, calls[0]

    def leaves(self, inputs: Inputs) -> list[Any]:
        """A batch in the order of the placeholders."""
        model = self.runners[0].module
        assert isinstance(model, GraphModel)
        signature = model.signature
        try:
            leaves: list[Any] = signature.leaves(inputs.args, inputs.kwargs)
            signature.check(leaves)
        except InputError as error:
            raise CalibrationError(f"a calibration batch does not fit: {error}") from None
        return leaves

    def _operands(
        self, runner: fx.Interpreter, graph: list[fx.Node], env: _Values, calls: list[int]
    ) -> list[Tensor]:
        """What the calls read; later ones need a look ahead, which must not touch ``env``."""
        found = []
        ahead = env if len(calls) == 1 else _cloned(env)
        for previous, call in zip([calls[0], *calls[:-1]], calls, strict=True):
            self._advance(runner, graph, ahead, previous, call)
            operand = table.source(graph[call])
            assert operand is not None
            value = ahead[operand]
            found.append(value if len(calls) == 1 else value.clone())
        return found

    def _advance(
        self, runner: fx.Interpreter, graph: list[fx.Node], env: _Values, start: int, stop: int
    ) -> None:
        """Run nodes ``start`` to ``stop``, without it, and drop what nobody reads any more."""
        order = self.order
        runner.env = env
        for node in graph[start:stop]:
            env[node] = runner.run_node(node)
            for operand in (node, *node.all_input_nodes):
                if operand in env and all(order[user] <= order[node] for user in operand.users):
                    del env[operand]  # its last reader has run


_Values = dict[fx.Node, Any]


def _cloned(env: _Values) -> _Values:
    # Operations in place must not reach what another pass will start from.
    return {
        node: map_aggregate(value, lambda v: v.clone() if isinstance(v, Tensor) else v)
        for node, value in env.items()
    }


def _bytes(env: _Values) -> int:
    total = 0

    def add(value: Any) -> Any:
        nonlocal total
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        return value

    for value in env.values():
        map_aggregate(value, add)
    return total


def rows_of(chosen: Tensor, x: Tensor) -> Tensor:
    """Of a tensor made of a batch the rows that belong to some of its samples, bool ``[len(x)]``.

    Where a sample has several rows (windows, tokens), they lie together.
    """
    each, rest = divmod(len(x), max(1, len(chosen)))
    if rest or not each:  # no telling whose they are
        return torch.zeros(len(x), dtype=torch.bool)
    return chosen.repeat_interleave(each)


def rows_per_image(layer: nn.Module, images: int) -> int:
    """Output positions to look at in each of so many images."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns = conv_form(layer, weight)[0].numel()
    rows = _ROWS // 4 if columns < _NARROW else _ROWS
    return -(-max(rows, _ROWS_PER_COLUMN * columns) // images)


def norm_gain(norm: Any) -> Tensor | None:
    """What a folded batch norm multiplies its channels by."""
    if norm is None:
        return None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.detach()
