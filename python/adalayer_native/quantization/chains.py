"""Where fake quantization sits: tracing and chain analysis.

The native engine stores u8 between *chains*. A chain is a convolution or linear layer, its batch
norm, a residual addition (to a convolution) and a clamp-like activation, as far as each is the only
consumer of the one before. A batch norm that no layer absorbs begins a chain of itself and its
activation. Everything inside a chain stays in high precision, so an :class:`ActivationQuantizer`
stands only

* after the model's input,
* after the end of every chain,
* after every other operation (average pooling, mean, concatenation, multiplication, ...),

and not where it would do nothing or nothing would profit: after operations that keep the grid (max
pooling, reshaping, slicing, zero padding), after values from which no quantized layer is reachable
(the logits), and after values that only float layers read.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from adalayer_native.errors import AdaError, UnsupportedModelError
from adalayer_native.plan import Plan
from adalayer_native.quantization import ops_table as table
from adalayer_native.rounding import conv_form

ACT_ROOT = "act_quant"
# int32 accumulators hold K products of a u8 activation and a signed weight.
_ACCUMULATOR_LIMIT = 2**31
# What can be quantized; subclasses are seen, but stay float.
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


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
        batch_norms: quantized layer -> name of the batch norm that is folded into it.
        inputs: quantized layer -> name of the quantizer site of its input.
        sites: quantizer sites by name, in graph order.
        used: qualified names of the modules and attributes that the graph reads.
    """

    batch_norms: dict[str, str]
    inputs: dict[str, str]
    sites: dict[str, QuantizerSite]
    used: list[str]


class _Tracer(fx.Tracer):
    """Does not look into layers, the user's subclasses of them included, nor stochastic depth."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LAYERS) or table.is_branch_dropout(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """Symbolic trace of ``model`` as it runs in evaluation mode; the model is not changed.

    Raises:
        UnsupportedModelError: the forward cannot be traced; says why.
    """
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        graph = _Tracer().trace(model)
        _read_inplace_results(graph, dict(model.named_modules()))
        return graph
    except AdaError:
        raise
    except Exception as error:  # tracing runs the user's code: anything may come out of it
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward cannot be traced by torch.fx "
            f"({type(error).__name__}: {error}); expected a forward without control flow that "
            "depends on tensor values"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _read_inplace_results(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Whoever reads a tensor after an operation overwrote it reads that operation's result.

    It is the same tensor; said explicitly, chains and quantizers are found where values change.
    """
    shapes: set[fx.Node] = set()
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if table.is_shape_value(node, shapes):
            shapes.add(node)
            continue
        operand = table.source(node)
        if operand is None or not table.is_inplace(node, modules):
            continue
        for user in list(operand.users):
            if order[user] > order[node]:
                user.replace_input_with(operand, node)


def quantizable(
    model: nn.Module, plan: Plan, graph: fx.Graph
) -> tuple[dict[str, int], dict[str, str]]:
    """Split the plan's layers into those that are quantized and those that must stay float.

    Returns:
        ``(bits, kept_float)``: bits by layer name, and the reason by name for every layer that
        the plan quantizes but that the native kernels cannot run.
    """
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    modules = dict(model.named_modules())
    bits: dict[str, int] = {}
    kept: dict[str, str] = {}
    for name, layer in plan.layers.items():
        if layer.bits is None:
            continue
        reason = _unsupported(modules[name], name in called, layer.bits)
        if reason is None:
            bits[name] = layer.bits
        else:
            kept[name] = reason
    return bits, kept


def _unsupported(module: nn.Module, called: bool, bits: int) -> str | None:
    if not called:
        return "the layer is not called as a module by the model's forward"
    if type(module) not in LAYERS:
        return f"{type(module).__name__} is a subclass that may compute something else"
    assert isinstance(module, LAYERS)
    if module.weight.dtype != torch.float32:
        return f"its weight is {module.weight.dtype}; expected torch.float32"
    if not isinstance(module, nn.Linear) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}; native layers pad with zeros only"
    if module.weight.numel() == 0:
        return "its weight is empty"
    reduced = conv_form(module, module.weight)[0].numel()
    if reduced * 255 * (1 << (bits - 1)) >= _ACCUMULATOR_LIMIT:
        return (
            f"{reduced} products of 8 and {bits} bits can overflow the int32 accumulator; "
            "use fewer weight bits"
        )
    return None


def analyse(graph: fx.Graph, modules: dict[str, nn.Module], quantized: set[str]) -> Structure:
    """Chain analysis: which batch norms fold, and where activation quantizers stand.

    Args:
        graph: trace of the model.
        modules: the model's modules by name.
        quantized: names of the layers that are quantized.

    Raises:
        UnsupportedModelError: a quantized layer reads something that is not a tensor value.
    """
    return _Analysis(graph, modules, quantized).run()


class _Analysis:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], quantized: set[str]) -> None:
        self.modules = modules
        self.quantized = quantized
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.shapes: set[fx.Node] = set()
        for node in self.nodes:
            if table.is_shape_value(node, self.shapes):
                self.shapes.add(node)
        self.internal: set[fx.Node] = set()
        self.batch_norms: dict[str, str] = {}

    # -- roles ------------------------------------------------------------------------------

    def layer(self, node: fx.Node) -> str | None:
        """Name of the convolution or linear layer that the node calls."""
        module = table.module_of(node, self.modules)
        return str(node.target) if isinstance(module, LAYERS) else None

    def passes_grid(self, node: fx.Node) -> bool:
        return table.is_grid_preserving(node, self.modules)

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
            followers = [self.only_reader(node) for node in nodes]
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
            fits = isinstance(module, nn.BatchNorm2d) != isinstance(layer, nn.Linear)
            sources = {self.behind(call) for call in calls[target]}
            if fits and module.num_features == channels and sources == set(nodes):
                folded[name] = target
        return folded

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one operation that reads a value, looking through dropout and other identities."""
        while True:
            users = list(node.users)
            if len(users) != 1 or users[0].op == "output":
                return None
            if not self.is_identity(users[0]):
                return users[0]
            node = users[0]

    def behind(self, node: fx.Node) -> fx.Node | None:
        """The value that an operation reads first, looking through identities."""
        operand = table.source(node)
        while operand is not None and self.is_identity(operand):
            operand = table.source(operand)
        return operand

    def build_chains(self) -> None:
        calls = self.calls()
        norms = self.fold_batch_norms(calls)
        # Current end of every chain -> how far it has come: 0 layer or batch norm, 1 addition,
        # 2 activation. A step only ever follows a lower one, as in the fused kernel's epilogue.
        tails: dict[fx.Node, int] = {}
        joins: set[fx.Node] = set()  # tails that may take an addition
        for node in self.nodes:
            name = self.layer(node)
            if name is None:
                if table.is_batch_norm(node, self.modules):
                    tails.setdefault(node, 0)
                continue
            tail = node
            if name in norms:
                user = self.only_reader(node)
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
            if table.is_tensor_add(node, self.shapes):
                # The later chain absorbs the addition; the other operand is a stored tensor.
                operands = [tail for tail in joins if self.only_reader(tail) is node]
                if operands:
                    absorbing = max(operands, key=lambda item: self.order[item])
                    tails[node] = 1
                    self.internal.add(absorbing)
            elif table.clamp_range(node, self.modules) is not None:
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
            ranges = {
                None if reader is None else table.clamp_range(reader, self.modules)
                for reader in readers
            }
            if len(ranges) != 1 or None in ranges:
                found.update(ends)
        return found

    # -- quantizer sites --------------------------------------------------------------------

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Readers of a value, looking through grid-preserving operations."""
        found: list[fx.Node] = []
        pending = [node]
        while pending:
            for user in pending.pop().users:
                if user in self.shapes:
                    continue
                if self.passes_grid(user):
                    pending.append(user)
                elif user not in found:
                    found.append(user)
        return found

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
        return (
            not self.passes_grid(node)
            and node.op in ("call_module", "call_function", "call_method")
            and self.layer(node) is None
            and bool(node.users)
            and all(
                user.target is operator.getitem and isinstance(user.args[1], int)
                for user in node.users
            )
        )

    def wants_quantizer(self, node: fx.Node, reaching: set[fx.Node]) -> bool:
        if node.op in ("output", "root") or node in self.shapes or node in self.internal:
            return False
        if node not in reaching or self.yields_tuple(node):
            return False
        if self.passes_grid(node):
            previous = table.source(node)
            # Grid-preserving on a value without a grid: an element of a tuple.
            return previous is not None and self.yields_tuple(previous)
        readers = self.consumers(node)
        layers = [self.layer(reader) for reader in readers]
        if node.op == "get_attr":
            # A parameter that enters an addition or product is a float constant of the program.
            return any(name in self.quantized for name in layers)
        return any(name is None or name in self.quantized for name in layers)

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
        used = [str(n.target) for n in self.nodes if n.op in ("call_module", "get_attr")]
        return Structure(
            batch_norms=self.batch_norms,
            inputs={name: names[id(sites[node])] for name, node in inputs.items()},
            sites=result,
            used=list(dict.fromkeys(used)),
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
                    "which is not a tensor that can be quantized; keep this layer in float"
                )
            if name in inputs:
                first, second = sites[inputs[name]], sites[origin]
                if first is not second:
                    merged = sorted({*first, *second}, key=lambda item: self.order[item])
                    for member in merged:
                        sites[member] = merged
            else:
                inputs[name] = origin
        return inputs


def check_model(model: nn.Module) -> None:
    """Raise unless the model has a convolution or linear layer, and none of them is lazy."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)
    ]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.Conv2d, nn.ConvTranspose2d or nn.Linear layer; "
            "nothing can be compressed"
        )
    for name, module in layers:
        if isinstance(module.weight, nn.UninitializedParameter):
            raise UnsupportedModelError(
                f"layer {name!r} is lazy and has no weight yet; run the model once first"
            )
