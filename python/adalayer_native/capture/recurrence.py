"""Recurrent layers as linear layers and two steps between them.

torch's operator for an LSTM, a GRU or a plain RNN has all layers and directions in it. In a graph
each of them becomes

* ``products``, a linear layer of all steps with ``weight_ih``: an ordinary layer of that name,
* :class:`RecurrentStates`, the hidden states that enter the steps,
* a linear layer of these with ``weight_hh``, which sees its true inputs, all steps at once,
* :class:`RecurrentCells`, the hidden states behind the steps.

So both weights are layers like any others: they have bits, a quantizer of their input, and whatever
looks at a layer's input and output sees them. The price is that the second one is computed twice,
once inside the states, since each needs the one before it; a converted model does both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.recurrent import (
    FLOATS,
    Functions,
    cells_of,
    gates_of,
    states_of,
    torch_operator,
)

__all__ = [
    "CELLS",
    "LAYERS",
    "STATES",
    "RecurrentCells",
    "RecurrentStates",
    "expand",
    "link_recurrences",
    "recurrences",
    "whole_layers",
]

LAYERS = "adalayer.recurrent_layers.default"
# What torch's modules call.
_FUNCTIONS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "tanh", "rnn_relu": "relu"}
STATES = "adalayer.recurrent_states.default"
CELLS = "adalayer.recurrent_cells.default"
_ZEROS = frozenset(f"aten.{name}.default" for name in ("zeros", "new_zeros", "zeros_like"))
_SAME = frozenset(f"aten.{name}.default" for name in ("alias", "detach", "clone", "contiguous"))
_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def _traced() -> bool:
    """Whether a loop over steps must not be unrolled."""
    return torch.compiler.is_compiling() or _exporting()


class RecurrentStates(nn.Module):
    """Hidden states ``[N, T, H]`` that enter the steps of a recurrent layer in one direction.

    Called with what the inputs contribute, ``[N, T, gates * H]``, and the states to begin with
    (``[N, H]`` or None). The layer of the recurrent product, and the quantizer of its input where
    there is one, are those of the model that it is in (:func:`link_recurrences`).

    Attributes:
        kind: "lstm", "gru", "tanh" or "relu".
        reverse: from the last step to the first.
        layer_name: of the linear layer with ``weight_hh``.
        grid_name: of the quantizer of its input, or None.
        exact: functions to compute with, bit for bit as the engine does; None for torch's own.
    """

    def __init__(self, kind: str, reverse: bool) -> None:
        super().__init__()
        self.kind, self.reverse = kind, reverse
        self.layer_name = ""
        self.grid_name: str | None = None
        self.exact: Functions | None = None

    def link(self, root: nn.Module) -> None:
        """Find layer and quantizer in the model that this is a part of."""
        # Past nn.Module: they are children elsewhere.
        self.__dict__["layer"] = root.get_submodule(self.layer_name)
        grid = None if self.grid_name is None else root.get_submodule(self.grid_name)
        self.__dict__["grid"] = grid

    def forward(self, products: Tensor, state: Tensor | None, cell: Tensor | None) -> Tensor:
        layer, grid = self.__dict__["layer"], self.__dict__["grid"]
        if _traced() and grid is None:
            found: Tensor = torch.ops.adalayer.recurrent_states(
                products, layer.weight, layer.bias, state, cell, self.kind, self.reverse
            )
            return found
        run = _product(layer)

        def contribution(h: Tensor) -> Tensor:
            # (A quantizer that observes sees all states at once, behind this module.)
            if grid is not None and getattr(grid, "observer", None) is None:
                h = type(grid).forward(grid, h)
            return run(h)

        f = self.exact or FLOATS
        return states_of(products, contribution, state, cell, self.kind, self.reverse, f)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.layer_name}" + (", reverse" if self.reverse else "")


def _product(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer's own computation, without its hooks: once per step is no call of the layer."""
    if type(layer) is nn.Linear:
        return lambda h: functional.linear(h, layer.weight, layer.bias)
    frozen: Any = getattr(layer, "frozen", None)
    if frozen is not None:
        found: Callable[[Tensor], Tensor] = frozen()
        return found
    return lambda h: type(layer).forward(layer, h)


class RecurrentCells(nn.Module):
    """Hidden states ``[N, T, H]`` behind the steps; with ``cells`` an LSTM's cells.

    Called with what inputs and states contribute, both ``[N, T, gates * H]``, and the states to
    begin with.
    """

    def __init__(self, kind: str, reverse: bool, cells: bool) -> None:
        super().__init__()
        self.kind, self.reverse, self.cells = kind, reverse, cells
        self.exact: Functions | None = None

    def forward(
        self, products: Tensor, recurrent: Tensor, state: Tensor | None, cell: Tensor | None
    ) -> Tensor:
        rest = (state, cell, self.kind, self.reverse, self.cells)
        if _traced():
            found: Tensor = torch.ops.adalayer.recurrent_cells(products, recurrent, *rest)
            return found
        return cells_of(products, recurrent, *rest, self.exact or FLOATS)

    def extra_repr(self) -> str:
        return self.kind + (", reverse" if self.reverse else "") + (", cells" if self.cells else "")


def link_recurrences(root: nn.Module) -> None:
    """Connect every :class:`RecurrentStates` with the layer and quantizer that ``root`` has now."""
    for module in root.modules():
        if isinstance(module, RecurrentStates):
            module.link(root)


def recurrences(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, list[fx.Node]]:
    """By call of a :class:`RecurrentStates` the calls of the cells that follow from it."""
    found: dict[fx.Node, list[fx.Node]] = {}

    def called(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(modules.get(str(node.target)), kind)

    for node in graph.nodes:
        if not called(node, RecurrentStates):
            continue
        readers, pending = [], list(node.users)
        while pending:  # through the quantizer and the layer
            user = pending.pop()
            if called(user, RecurrentCells):
                readers.append(user)
            elif user.op == "call_module" or op_name(user) == "adalayer.exact_linear.default":
                pending.extend(user.users)
        found[node] = sorted(readers, key=list(graph.nodes).index)
    return found


# -- from torch's operators -----------------------------------------------------------------------


@contextmanager
def whole_layers() -> Iterator[None]:
    """While a model is exported its recurrent layers call one operator each, of any number of
    steps. Packed sequences and projected states go to torch as they are."""
    functions: Any = torch._VF
    before = {name: getattr(functions, name) for name in _FUNCTIONS}
    own = {name: item for name, item in vars(functions).items() if name in _FUNCTIONS}

    def calling(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if len(args) != 9 or not isinstance(args[2], list):  # packed
                return original(*args)
            x, hx, params, biases, layers, dropout, train, both, first = args
            each = 4 if biases else 2
            whole = len(params) == each * layers * (2 if both else 1)
            if not whole or x.dtype != torch.float32:
                return original(*args)
            begin = list(hx) if kind == "lstm" else [hx]
            options = (biases, layers, float(dropout), train, both, first)
            return tuple(torch.ops.adalayer.recurrent_layers(x, begin, params, kind, *options))

        return call

    for name, kind in _FUNCTIONS.items():
        setattr(functions, name, calling(kind, before[name]))
    try:
        yield
    finally:
        for name in _FUNCTIONS:
            delattr(functions, name)
        vars(functions).update(own)


def expand(graph: fx.Graph, node: fx.Node, value: Callable[[Any], Tensor | None]) -> None:
    """Replace one of :data:`LAYERS` by linear layers, states and cells.

    It becomes torch's own operator where weights are computed, or where something else than its
    results is read.

    Args:
        value: of a node that depends on parameters alone.
    """
    a = arguments(node)
    params, each = list(a["params"]), 4 if a["has_biases"] else 2
    users = {user: user.args[1] for user in node.users if op_name(user) == "getitem"}
    trained = a["train"] and a["dropout"]
    with graph.inserting_before(node):
        if trained or len(users) != len(node.users) or any(value(item) is None for item in params):
            _as_torch_has_it(graph, node, a)
            return
        sizes = [value(item).shape[1] for item in params[1::each]]  # type: ignore[union-attr]
        _Expanded(graph, node, a, users).run(params, each, sizes)


def _as_torch_has_it(graph: fx.Graph, node: fx.Node, a: dict[str, Any]) -> None:
    begin = a["hx"] if a["kind"] == "lstm" else a["hx"][0]
    given = [a["input"], begin, a["params"]]
    for name in ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"):
        given.append(a[name])
    new = graph.call_function(torch_operator(a["kind"]), tuple(given))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


class _Expanded:
    """The nodes in the place of one operator."""

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        a: dict[str, Any],
        users: dict[fx.Node, Any],
    ) -> None:
        self.graph, self.node, self.kind, self.users = graph, node, str(a["kind"]), users
        self.batch_first = bool(a["batch_first"])
        self.layers, self.directions = int(a["num_layers"]), 2 if a["bidirectional"] else 1
        self.input = a["input"]
        self.initial = [None if _is_zeros(item) else item for item in a["hx"]]
        self.like = self.input.meta["val"]
        sizes = self.like.shape
        self.batch, self.steps = (sizes[0], sizes[1]) if self.batch_first else (sizes[1], sizes[0])

    def run(self, params: list[Any], each: int, hidden: list[int]) -> None:
        layers, directions = self.layers, self.directions
        x = self.input if self.batch_first else self.turned(self.input)
        last: list[fx.Node] = []
        cells: list[fx.Node] = []
        wants_cells = any(index == 2 and user.users for user, index in self.users.items())
        for layer in range(layers):
            outs = []
            for direction in range(directions):
                k = layer * directions + direction
                own = [*params[k * each : (k + 1) * each], None, None][:4]
                out, cell = self.direction(x, own, k, hidden[k], direction == 1, wants_cells)
                outs.append(out)
                end = 0 if direction == 1 else -1
                last.append(self.piece(out, end))
                if cell is not None:
                    cells.append(self.piece(cell, end))
            x = outs[0] if directions == 1 else self.joined(outs)
        for user, index in list(self.users.items()):
            if not user.users:
                continue
            if index == 0:
                user.replace_all_uses_with(x if self.batch_first else self.turned(x))
            else:
                self.give_pieces(user, last if index == 1 else cells)
        for user in self.users:
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def direction(
        self, x: fx.Node, params: list[Any], k: int, hidden: int, reverse: bool, wants_cells: bool
    ) -> tuple[fx.Node, fx.Node | None]:
        w_ih, w_hh, b_ih, b_hh = params
        outputs = gates_of(self.kind) * hidden
        aten, ours = torch.ops.aten, torch.ops.adalayer
        begin = [None if item is None else self.begin(item, k) for item in self.initial]
        state, cell = [*begin, None][:2]
        products = self.call(aten.linear.default, (x, w_ih, b_ih), outputs)
        rest = (self.kind, reverse)
        entering = self.call(
            ours.recurrent_states.default, (products, w_hh, b_hh, state, cell, *rest), hidden
        )
        recurrent = self.call(aten.linear.default, (entering, w_hh, b_hh), outputs)

        def behind(of_cells: bool) -> fx.Node:
            given = (products, recurrent, state, cell, *rest, of_cells)
            return self.call(ours.recurrent_cells.default, given, hidden)

        return behind(False), behind(True) if wants_cells else None

    def call(self, target: Any, args: tuple[Any, ...], features: Any) -> fx.Node:
        """A node of ``[N, T, features]``."""
        return self.put(target, args, (self.batch, self.steps, features))

    def put(self, target: Any, args: tuple[Any, ...], sizes: tuple[Any, ...]) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta.update({k: self.node.meta[k] for k in ("path", "leaf") if k in self.node.meta})
        new.meta["val"] = self.like.new_empty(sizes)
        return new

    def turned(self, x: fx.Node) -> fx.Node:
        a, b, features = x.meta["val"].shape
        return self.put(torch.ops.aten.transpose.int, (x, 0, 1), (b, a, features))

    def joined(self, outs: list[fx.Node]) -> fx.Node:
        features = sum(out.meta["val"].shape[2] for out in outs)
        return self.call(torch.ops.aten.cat.default, (outs, -1), features)

    def begin(self, states: fx.Node, k: int) -> fx.Node:
        """One of the states ``[layers, N, H]`` that a caller gives."""
        if op_name(states) == "aten.expand.default":
            # A parameter for every sample: repeated behind what takes one of its rows, so that the
            # batch comes first.
            source, sizes = (arguments(states)[key] for key in ("self", "size"))
            known = source.meta.get("val") if isinstance(source, fx.Node) else None
            if isinstance(known, Tensor) and known.dim() == 3 and k < known.shape[0]:
                one = self.select(source, 0, k)
                batch, hidden = states.meta["val"].shape[1:]
                return self.put(torch.ops.aten.expand.default, (one, sizes[1:]), (batch, hidden))
        return self.select(states, 0, k)

    def select(self, x: fx.Node, axis: int, k: int) -> fx.Node:
        sizes = list(x.meta["val"].shape)
        del sizes[axis]
        return self.put(torch.ops.aten.select.int, (x, axis, k), tuple(sizes))

    def piece(self, out: fx.Node, end: int) -> fx.Node:
        """What a direction ends with, ``[N, H]``."""
        return self.select(out, 1, end)

    def give_pieces(self, user: fx.Node, pieces: list[fx.Node]) -> None:
        """Readers of the last states of all layers, ``[layers, N, H]``, read those they take."""
        for reader in list(user.users):
            if op_name(reader) != "aten.select.int":
                continue
            _, axis, k = reader.args
            if axis == 0 and isinstance(k, int) and -len(pieces) <= k < len(pieces):
                reader.replace_all_uses_with(pieces[k])
                self.graph.erase_node(reader)
        if user.users:
            batch, hidden = pieces[0].meta["val"].shape
            sizes = (len(pieces), batch, hidden)
            user.replace_all_uses_with(self.put(torch.ops.aten.stack.default, (pieces, 0), sizes))


def _is_zeros(node: Any) -> bool:
    """Whether a tensor is zeros whatever the inputs are."""
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in _SAME:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if op_name(node) == "aten.full.default":
        return bool(arguments(node)["fill_value"] == 0)
    return op_name(node) in _ZEROS
