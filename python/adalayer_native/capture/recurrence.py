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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from adalayer_native import ops  # noqa: F401 (registers the operators)
from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.ops.recurrence import EXACT, FLOATS, cells_of, gates_of, states_of

__all__ = [
    "CELLS",
    "OPERATORS",
    "STATES",
    "RecurrentCells",
    "RecurrentStates",
    "expand",
    "link_recurrences",
    "recurrences",
]

OPERATORS = {
    "aten.lstm.input": "lstm",
    "aten.gru.input": "gru",
    "aten.rnn_tanh.input": "tanh",
    "aten.rnn_relu.input": "relu",
}
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
        exact: whether to compute by the engine's steps.
    """

    def __init__(self, kind: str, reverse: bool) -> None:
        super().__init__()
        self.kind, self.reverse = kind, reverse
        self.layer_name = ""
        self.grid_name: str | None = None
        self.exact = False

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

        f = EXACT if self.exact else FLOATS
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
        self.exact = False

    def forward(
        self, products: Tensor, recurrent: Tensor, state: Tensor | None, cell: Tensor | None
    ) -> Tensor:
        rest = (state, cell, self.kind, self.reverse, self.cells)
        if _traced():
            found: Tensor = torch.ops.adalayer.recurrent_cells(products, recurrent, *rest)
            return found
        return cells_of(products, recurrent, *rest, EXACT if self.exact else FLOATS)

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


def expand(graph: fx.Graph, node: fx.Node, value: Callable[[Any], Tensor | None]) -> None:
    """Replace one of :data:`OPERATORS` by linear layers, states and cells.

    It stays where weights are computed, states are projected, or something else than the three
    results is read.

    Args:
        value: of a node that depends on parameters alone.
    """
    kind = OPERATORS[op_name(node)]
    a = arguments(node)
    layers, directions = int(a["num_layers"]), 2 if a["bidirectional"] else 1
    params, each = list(a["params"]), 4 if a["has_biases"] else 2
    given = a["input"].meta.get("val")
    if not isinstance(given, Tensor) or given.dim() != 3 or given.dtype != torch.float32:
        return
    if len(params) != layers * directions * each or (a["train"] and a["dropout"]):
        return
    if any(value(item) is None for item in params):
        return
    results = 3 if kind == "lstm" else 2
    users = {user: user.args[1] for user in node.users if op_name(user) == "getitem"}
    if len(users) != len(node.users) or any(
        index not in range(results) for index in users.values()
    ):
        return
    initial = list(a["hx"]) if kind == "lstm" else [a["hx"]]
    with graph.inserting_before(node):
        sizes = [value(item).shape[1] for item in params[1::each]]  # type: ignore[union-attr]
        _Expanded(graph, node, kind, a, initial, users).run(params, each, layers, directions, sizes)


class _Expanded:
    """The nodes in the place of one operator."""

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        kind: str,
        a: dict[str, Any],
        initial: list[Any],
        users: dict[fx.Node, Any],
    ) -> None:
        self.graph, self.node, self.kind, self.users = graph, node, kind, users
        self.batch_first = bool(a["batch_first"])
        self.input = a["input"]
        self.initial = [None if _is_zeros(item) else item for item in initial]
        self.like = self.input.meta["val"]
        sizes = self.like.shape
        self.batch, self.steps = (sizes[0], sizes[1]) if self.batch_first else (sizes[1], sizes[0])

    def run(
        self, params: list[Any], each: int, layers: int, directions: int, hidden: list[int]
    ) -> None:
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
        begin = [None if item is None else self.select(item, 0, k) for item in self.initial]
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
    return op_name(node) in _ZEROS or (op_name(node) == "aten.full.default" and node.args[1] == 0)
