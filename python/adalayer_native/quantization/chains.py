"""Where fake quantization sits: chain analysis of a captured model.

The native engine stores u8 between *chains*. A chain is a convolution or linear layer, its batch
norm, a residual addition (to a convolution) and a clamp-like activation, as far as each is the only
consumer of the one before. A batch norm in front of a layer that does not pad is folded into it,
where nothing else reads it. One that no layer absorbs begins a chain of itself and its activation.
Everything inside a chain stays in high precision, so an :class:`ActivationQuantizer` stands only

* after the model's input,
* after the end of every chain,
* after every other operation (average pooling, mean, concatenation, multiplication, ...),

and not where it would do nothing or nothing would profit: after operations that keep the grid (max
pooling, reshaping, slicing, zero padding), after values from which no quantized layer is reachable
(the logits), after values that only float layers or operations read which need floats (a recurrent
layer), between the products of an attention, and in its mask, which holds large constants.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from adalayer_native.capture import GraphModel, TensorInfo, info_of
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.attention import attentions, mask_values
from adalayer_native.capture.float_values import float_values
from adalayer_native.capture.recurrence import recurrences
from adalayer_native.capture.rms_norms import rms_norms
from adalayer_native.capture.vocabulary import LAYERS
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.padding import four_paddings
from adalayer_native.plan import Plan
from adalayer_native.rounding import conv_form

ACT_ROOT = "act_quant"
# int32 accumulators hold K products of a u8 activation and a signed weight.
_ACCUMULATOR_LIMIT = 2**31
_MORE_NOISE = 4.0  # times the noise of a layer's weights
_NOT_CALLED = (
    "the layer is not called by the model's forward, or its weight depends on the inputs there"
)


@dataclass
class QuantizerSite:
    """One activation quantizer: where it stands and who reads it.

    Attributes:
        name: module name below ``act_quant``.
        producers: names of the graph nodes whose output it quantizes (several where one layer is
            called with different inputs, which must then share a grid).
        layers: quantized layers that read it, through grid-preserving operations.
        kept: whether the converted model still needs it, because something other than a native
            layer reads it. A native layer quantizes its own input.
    """

    name: str
    producers: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    kept: bool = False

    @property
    def target(self) -> str:
        """Qualified module name in the prepared model."""
        return f"{ACT_ROOT}.{self.name}"


@dataclass
class Structure:
    """Result of the chain analysis for one model and one set of quantized layers.

    Attributes:
        batch_norms: quantized layer -> name of the batch norm behind it that is folded into it.
        input_norms: quantized layer -> name of the batch norm in front of it that is.
        inputs: quantized layer -> name of the quantizer site of its input.
        sites: quantizer sites by name, in graph order.
    """

    batch_norms: dict[str, str]
    input_norms: dict[str, str]
    inputs: dict[str, str]
    sites: dict[str, QuantizerSite]


def quantizable(model: GraphModel, plan: Plan) -> tuple[dict[str, int], dict[str, str]]:
    """Split the plan's layers into those that are quantized and those that must stay float.

    Returns:
        ``(bits, kept_float)``: bits by layer name, and the reason by name for every layer that
        the plan quantizes but that the native kernels cannot run.
    """
    modules = dict(model.named_modules())
    bits: dict[str, int] = {}
    kept: dict[str, str] = {}
    for name, layer in plan.layers.items():
        if layer.bits is None:
            continue
        called = name in modules and isinstance(modules[name], LAYERS)
        reason = _unsupported(modules[name], layer.bits) if called else _NOT_CALLED
        if reason is None:
            bits[name] = layer.bits
        else:
            kept[name] = reason
    return bits, kept


def _unsupported(module: nn.Module, bits: int) -> str | None:
    assert isinstance(module, LAYERS)
    if module.weight.dtype != torch.float32:
        return f"its weight is {module.weight.dtype}; expected torch.float32"
    if module.weight.numel() == 0:
        return "its weight is empty"
    reduced = conv_form(module, module.weight)[0].numel()
    if reduced * 255 * (1 << (bits - 1)) >= _ACCUMULATOR_LIMIT:
        return (
            f"{reduced} products of 8 and {bits} bits can overflow the int32 accumulator; "
            "use fewer weight bits"
        )
    return None


def analyse(
    model: GraphModel, quantized: set[str], keep: Collection[str] | None = None
) -> Structure:
    """Chain analysis: which batch norms fold, and where activation quantizers stand.

    Args:
        model: a captured model.
        quantized: names of the layers that are quantized.
        keep: batch norms that are not folded into the layer behind them, because a file holds
            them; all others are that can be. Default: those whose factors would cost the layer's
            weights more than a rounding of its input does.

    Raises:
        UnsupportedModelError: a quantized layer reads something that is not a tensor value.
    """
    return _Analysis(model, quantized, keep).run()


def _even(norm: nn.Module) -> bool:
    """Whether the weights behind a batch norm lose little by taking its factors in.

    A row of weights is rounded with one step. With the factors ``k`` that is as coarse as the
    largest needs, and multiplies inputs of deviation ``s``; without, inputs of deviation ``k s``.
    """
    assert isinstance(norm, table.BATCH_NORMS)
    assert norm.running_var is not None
    if norm.running_var.device.type == "meta":
        return True
    variance = norm.running_var.double() + norm.eps
    square = 1 / variance
    if norm.weight is not None:
        square = square * norm.weight.detach().double().square()
    folded = float(square.max()) * float(variance.sum())
    return folded <= _MORE_NOISE * float((square * variance).sum())


class _Analysis:
    def __init__(
        self, model: GraphModel, quantized: set[str], keep: Collection[str] | None
    ) -> None:
        self.graph = model.graph
        self.modules = dict(model.named_modules())
        self.quantized = quantized
        self.keep = keep
        self.nodes: list[fx.Node] = list(model.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.constant = table.constants(model.graph)
        self.floats = float_values(model)
        found = attentions(model)
        self.attending = {node for item in found for node in item.entries}
        self.scores = {node for item in found for node in item.inner - {item.result}}
        self.masks = mask_values(model.graph, found)
        self.internal = {s for norm in rms_norms(model.graph).values() for s in norm.inside}
        self.batch_norms: dict[str, str] = {}
        self.input_norms: dict[str, str] = {}
        self.gone: set[fx.Node] = set()  # calls of those

    # -- roles ------------------------------------------------------------------------------

    def layer(self, node: fx.Node) -> str | None:
        """Name of the convolution or linear layer that the node calls."""
        module = table.module_of(node, self.modules)
        return str(node.target) if isinstance(module, LAYERS) else None

    def passes_grid(self, node: fx.Node) -> bool:
        return node in self.gone or table.is_grid_preserving(node, self.modules)

    # -- chains -----------------------------------------------------------------------------

    def calls(self) -> dict[str, list[fx.Node]]:
        """Calls of every module, in graph order."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_module":
                found.setdefault(str(node.target), []).append(node)
        return found

    def is_identity(self, node: fx.Node) -> bool:
        return table.is_identity(node, self.modules)

    def fold_batch_norms(self, calls: dict[str, list[fx.Node]]) -> dict[str, str]:
        """Layer -> batch norm, where every call of the one feeds only the other and vice versa."""
        folded: dict[str, str] = {}
        for name, nodes in calls.items():
            if self.layer(nodes[0]) is None:
                continue
            rows = isinstance(self.modules[name], nn.Linear)
            followers = [self.only_reader(node, rows=rows) for node in nodes]
            targets = {str(user.target) for user in followers if user is not None}
            if len(targets) != 1 or any(user is None for user in followers):
                continue
            norm = followers[0]
            assert norm is not None
            if not table.is_batch_norm(norm, self.modules):
                continue
            target = targets.pop()
            layer, module = self.modules[name], self.modules[target]
            assert isinstance(layer, LAYERS)
            channels = conv_form(layer, layer.weight).shape[0]
            fits = all(self.norm_fits(layer, call) for call in calls[target])
            sources = {self.behind(call, rows=rows) for call in calls[target]}
            if fits and module.num_features == channels and sources == set(nodes):
                folded[name] = target
        return folded

    def fold_into_readers(self, calls: dict[str, list[fx.Node]], folded: Collection[str]) -> None:
        """Batch norms that only a layer reads to whose inputs they mean a factor and a constant.

        Not where the layer pads: the zeros would have to be another number in every channel.
        """
        for name, nodes in calls.items():
            module = self.modules[name]
            norm = table.source(nodes[0])
            if name not in self.quantized or len(nodes) != 1 or norm is None:
                continue
            if not table.is_batch_norm(norm, self.modules) or list(norm.users) != nodes:
                continue
            target, info = str(norm.target), info_of(norm)
            if len(calls[target]) != 1 or target in folded:
                continue
            if not _even(self.modules[target]) if self.keep is None else target in self.keep:
                continue
            channels = self.modules[target].num_features
            if isinstance(module, nn.Linear):
                fits = isinstance(info, TensorInfo) and len(info.shape) == 2
                fits = fits and module.in_features == channels
            else:
                fits = isinstance(module, nn.Conv2d) and not any(four_paddings(module))
                fits = fits and module.in_channels == channels
            if fits:
                self.input_norms[name] = target
                self.gone.add(norm)

    def norm_fits(self, layer: nn.Module, norm: fx.Node) -> bool:
        """Whether a batch norm behind a layer normalises the layer's output channels."""
        info = info_of(norm)
        if not isinstance(info, TensorInfo):
            return False
        # Axis 1 is normalised; a linear layer's outputs are the last one.
        return not isinstance(layer, nn.Linear) or len(info.shape) == 2

    def only_reader(self, node: fx.Node, *, rows: bool = False) -> fx.Node | None:
        """The one operation that reads a value, looking through dropout and other identities.

        With ``rows`` also through reshapes that keep the last axis, which a linear layer and a
        batch norm of its rows do not notice.
        """
        while True:
            users = [user for user in node.users if not table.only_shapes(user, node)]
            if len(users) != 1 or users[0].op == "output":
                return None
            if not (self.is_identity(users[0]) or (rows and table.keeps_rows(users[0]))):
                return users[0]
            node = users[0]

    def behind(self, node: fx.Node, *, rows: bool = False) -> fx.Node | None:
        """The value that an operation reads first, looking through the same."""
        operand = table.source(node)
        while operand is not None and (
            self.is_identity(operand) or (rows and table.keeps_rows(operand))
        ):
            operand = table.source(operand)
        return operand

    def build_chains(self) -> None:
        calls = self.calls()
        norms = self.fold_batch_norms(calls)
        self.fold_into_readers(calls, set(norms.values()))
        # Current end of every chain -> how far it has come: 0 layer or batch norm, 1 addition,
        # 2 activation. A step only ever follows a lower one, as in the fused kernel's epilogue.
        tails: dict[fx.Node, int] = {}
        joins: set[fx.Node] = set()  # tails that may take an addition
        for node in self.nodes:
            name = self.layer(node)
            if name is None:
                if table.is_batch_norm(node, self.modules) and node not in self.gone:
                    tails.setdefault(node, 0)
                continue
            tail = node
            if name in norms:
                user = self.only_reader(node, rows=isinstance(self.modules[name], nn.Linear))
                assert user is not None
                self.internal.add(node)
                tail = user
            tails[tail] = 0
            # A layer that is called twice cannot take an addition at one place only.
            if isinstance(self.modules[name], nn.Conv2d) and len(calls[name]) == 1:
                joins.add(tail)
        self.batch_norms = {name: bn for name, bn in norms.items() if name in self.quantized}
        split = self.split_activations(calls, norms)
        for node in self.nodes:  # graph order: a chain's addition is seen before its activation
            if table.is_addition(node):
                # The later chain absorbs the addition; the other operand is a stored tensor.
                operands = [tail for tail in joins if self.only_reader(tail) is node]
                if operands:
                    absorbing = max(operands, key=lambda item: self.order[item])
                    tails[node] = 1
                    self.internal.add(absorbing)
            elif table.clamp_range(node) is not None:
                origin = self.behind(node)
                if (
                    origin is not None
                    and origin not in split
                    and tails.get(origin, 2) < 2
                    and node is self.only_reader(origin)
                ):
                    tails[node] = 2
                    self.internal.add(origin)

    def split_activations(
        self, calls: dict[str, list[fx.Node]], norms: dict[str, str]
    ) -> set[fx.Node]:
        """Ends of layers called several times whose calls are not all followed by one clamp."""
        found: set[fx.Node] = set()
        for name, nodes in calls.items():
            if len(nodes) == 1 or self.layer(nodes[0]) is None:
                continue
            ends = calls[norms[name]] if name in norms else nodes
            readers = [self.only_reader(end) for end in ends]
            ranges = {None if reader is None else table.clamp_range(reader) for reader in readers}
            if len(ranges) != 1 or None in ranges:
                found.update(ends)
        return found

    # -- quantizer sites --------------------------------------------------------------------

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Readers of a value, looking through grid-preserving operations."""
        return table.readers([node], self.passes_grid)

    def origin(self, node: fx.Node) -> fx.Node:
        """The value that a layer's operand comes from, looking through grid-preserving ones."""
        while self.passes_grid(node):
            previous = table.source(node)
            if previous is None or self.yields_tuple(previous):
                break
            node = previous
        return node

    def yields_tuple(self, node: fx.Node) -> bool:
        """Whether a value is unpacked, by an operation that does not keep the grid."""
        return isinstance(info_of(node), tuple) and not self.passes_grid(node)

    def wants_quantizer(self, node: fx.Node, reaching: set[fx.Node]) -> bool:
        if not table.is_value(node) or node in self.internal or node not in reaching:
            return False
        if self.passes_grid(node) or node in self.floats.values or node in self.scores:
            return False
        if node in self.masks:
            return False
        readers = self.consumers(node)
        if any(self.layer(reader) in self.quantized for reader in readers):
            return True
        # A parameter that enters an addition or product is a float constant of the program.
        return node not in self.constant and any(map(self.reads_levels, readers))

    def reads_levels(self, reader: fx.Node) -> bool:
        """Whether an operation between layers can work on u8 levels at all."""
        if reader in self.attending:
            return True
        if reader in self.floats.readers or reader in self.scores:
            return False
        if reader.op == "call_module":
            return table.is_batch_norm(reader, self.modules)
        return reader.op == "call_function" and table.op_name(reader) in table.INTEGER_OPERATORS

    def run(self) -> Structure:
        self.build_chains()
        reaching: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if any(user in reaching or self.layer(user) in self.quantized for user in node.users):
                reaching.add(node)
        sites = {node: [node] for node in self.nodes if self.wants_quantizer(node, reaching)}
        inputs = self.unite(sites)
        result: dict[str, QuantizerSite] = {}
        names: dict[int, str] = {}
        for node, group in sites.items():
            if id(group) not in names:
                names[id(group)] = node.name
                result[node.name] = QuantizerSite(name=node.name)
            site = result[names[id(group)]]
            site.producers.append(node.name)
            for reader in self.consumers(node):
                name = self.layer(reader)
                if name in self.quantized and name is not None:
                    if name not in site.layers:
                        site.layers.append(name)
                else:
                    site.kept = True
        return Structure(
            batch_norms=self.batch_norms,
            input_norms=self.input_norms,
            inputs={name: names[id(sites[node])] for name, node in inputs.items()},
            sites=result,
        )

    def unite(self, sites: dict[fx.Node, list[fx.Node]]) -> dict[str, fx.Node]:
        """Merge the sites that feed one layer; returns one input node per quantized layer."""
        inputs: dict[str, fx.Node] = {}
        for node in self.nodes:
            name = self.layer(node)
            if name is None or name not in self.quantized:
                continue
            operand = table.source(node)
            origin = None if operand is None else self.origin(operand)
            if origin is None or origin not in sites:
                raise UnsupportedModelError(
                    f"layer {name!r} reads {operand} ({operand.op if operand else 'no tensor'}), "
                    "which is not a float32 tensor that can be quantized; keep this layer in float"
                )
            if name in inputs:
                first, second = sites[inputs[name]], sites[origin]
                self.merge(sites, first, second)
            else:
                inputs[name] = origin
        # A recurrent layer's state has one grid, in front of the next step and in what follows.
        for states, cells in recurrences(self.graph, self.modules).items():
            for node in cells:
                if node in sites and states in sites and not self.modules[str(node.target)].cells:
                    self.merge(sites, sites[states], sites[node])
        return inputs

    def merge(
        self, sites: dict[fx.Node, list[fx.Node]], first: list[fx.Node], second: list[fx.Node]
    ) -> None:
        """Two sites share a grid from here on."""
        if first is second:
            return
        merged = sorted({*first, *second}, key=lambda item: self.order[item])
        for member in merged:
            sites[member] = merged


def check_model(model: GraphModel) -> None:
    """Raise unless the model has a layer that can be quantized."""
    if not any(isinstance(module, LAYERS) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no convolution or linear layer with constant weights; "
            "nothing can be compressed"
        )
