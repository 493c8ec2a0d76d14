"""Recurrent layers: an LSTM, a GRU or an RNN of torch for every operator.

Both have one weight of all gates for the inputs and one for the states, in orders of their own:
torch has i f g o and r z n where ONNX has i o f c and z r h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.values import Constant, Value

# Places of torch's gates among those of ONNX.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_CLASSES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
_LEAVES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@operator_of("LSTM")
def _lstm(
    g: Builder,
    node: NodeView,
    x: Value,
    weight: Any,
    recurrent: Any,
    bias: Any = None,
    lengths: Any = None,
    state: Any = None,
    cell: Any = None,
    peepholes: Any = None,
) -> Any:
    if peepholes is not None and bool(g.known(peepholes, "peepholes").any()):
        raise Refused("peepholes from its cells to its gates, which torch's LSTM does not have")
    if node.get("input_forget"):
        raise Refused("input_forget, which couples its gates; torch's LSTM does not")
    return _recurrence(g, node, x, weight, recurrent, bias, lengths, [state, cell])


@operator_of("GRU")
def _gru(
    g: Builder,
    node: NodeView,
    x: Value,
    weight: Any,
    recurrent: Any,
    bias: Any = None,
    lengths: Any = None,
    state: Any = None,
) -> Any:
    if not node.get("linear_before_reset"):
        raise Refused(
            "linear_before_reset 0: its reset gate stands in front of the product with its state; "
            "expected 1, as torch's GRU has it"
        )
    return _recurrence(g, node, x, weight, recurrent, bias, lengths, [state])


@operator_of("RNN")
def _rnn(
    g: Builder,
    node: NodeView,
    x: Value,
    weight: Any,
    recurrent: Any,
    bias: Any = None,
    lengths: Any = None,
    state: Any = None,
) -> Any:
    return _recurrence(g, node, x, weight, recurrent, bias, lengths, [state])


def _recurrence(
    g: Builder,
    node: NodeView,
    x: Value,
    weight: Any,
    recurrent: Any,
    bias: Any,
    lengths: Any,
    begin: list[Any],
) -> tuple[Value, ...]:
    """Steps ``[T, directions, N, H]``, and what the directions end with, ``[directions, N, H]``."""
    direction, batch_first = node.get("direction", "forward"), bool(node.get("layout", 0))
    if direction not in _DIRECTIONS:
        raise Refused(f"direction {direction!r}; expected one of {', '.join(_DIRECTIONS)}")
    if x.rank != 3:
        raise Refused(f"an operand of {x.rank} axes; expected 3: steps, samples, features")
    count, time = _DIRECTIONS[direction], 1 if batch_first else 0
    options = {"nonlinearity": _activation(node, count)} if node.kind == "RNN" else {}
    if node.kind != "RNN":
        _activation(node, count)
    if node.get("clip"):
        raise Refused(f"clip {node.get('clip')}, which torch's layers do not have")
    if lengths is not None and bool((g.known(lengths, "sequence_lens") != x.shape[time]).any()):
        raise Refused("sequence_lens that differ from the number of steps")
    for item, what in ((weight, "weight"), (recurrent, "recurrent weight"), (bias, "bias")):
        if item is not None:
            g.known(item, what)
    layer = _layer(node, weight.tensor, recurrent.tensor, None if bias is None else bias.tensor,
                   count, {**options, "batch_first": batch_first})  # fmt: skip
    name = g.layer_name(node, weight)
    if getattr(weight, "integers", None) is not None and g.integers:
        g.kept[name] = "a recurrent layer, whose integers are not kept"
    begin = [_turned(g, item, batch_first) for item in begin if item is not None]
    if node.kind == "LSTM" and len(begin) == 1:
        raise Refused("one of initial_h and initial_c; expected both or neither")
    if all(isinstance(item, Constant) and not bool(item.tensor.any()) for item in begin):
        begin = []
    batch = g.size(x, 0 if batch_first else 1) if begin else None
    begin = [_for_all(g, item, batch) for item in begin]
    operands = [x if direction != "reverse" else g.call(torch.flip, x, [time])]
    if begin:
        operands.append(tuple(begin) if node.kind == "LSTM" else begin[0])
    steps, last = g.module(name, layer, *operands)
    if direction == "reverse":
        steps = g.call(torch.flip, steps, [time])
    steps = g.call(torch.unflatten, steps, -1, [count, layer.hidden_size])
    if not batch_first:
        steps = g.call(torch.transpose, steps, 1, 2)
    ends = last if isinstance(last, tuple) else (last,)
    return (steps, *(_turned(g, item, batch_first) for item in ends))


def _for_all(g: Builder, states: Any, batch: Any) -> Any:
    """States ``[directions, N, H]``; those of the file that all samples share for any batch."""
    if not isinstance(states, Constant):
        return states
    first = states.tensor[:, :1]
    if not torch.equal(first.expand_as(states.tensor), states.tensor):
        return states
    one = Constant(first.contiguous(), states.name)
    return g.call(torch.Tensor.expand, one, [-1, batch, -1])


def _turned(g: Builder, states: Any, batch_first: bool) -> Any:
    """States of all directions, first samples or first directions; the other way is the same."""
    return g.call(torch.transpose, states, 0, 1) if batch_first else states


def _activation(node: NodeView, count: int) -> str:
    """The activation of an RNN, as torch calls it.

    Raises:
        Refused: another one than torch's layers have.
    """
    usual = _USUAL[node.kind] * count
    said = tuple(node.get("activations") or usual)
    relu = node.kind == "RNN" and said == ("Relu",) * count
    if said != usual and not relu:
        expected = f"{', '.join(usual)}" + (" or Relu" if node.kind == "RNN" else "")
        raise Refused(f"activations {', '.join(said)}; expected {expected}, as torch has them")
    return "relu" if relu else "tanh"


def _layer(
    node: NodeView,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    count: int,
    options: dict[str, Any],
) -> Any:
    """A module of torch with these parameters.

    Args:
        weight, recurrent: ``[directions, gates * H, I]`` and ``[directions, gates * H, H]``.
        bias: ``[directions, 2 * gates * H]``, of inputs and of states.
    """
    order, hidden = _GATES[node.kind], int(recurrent.shape[-1])
    outputs = len(order) * hidden
    for tensor, shape, what in (
        (weight, (count, outputs, int(weight.shape[-1])), "W"),
        (recurrent, (count, outputs, hidden), "R"),
        (bias, (count, 2 * outputs), "B"),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise Refused(f"{what} of sizes {list(tensor.shape)}; expected {list(shape)}")
    if node.get("hidden_size", hidden) != hidden:
        raise Refused(f"hidden_size {node.get('hidden_size')}, and weights of {hidden}")

    def gates(tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(0, (len(order), hidden))
        return torch.cat([parts[k] for k in order]).contiguous()

    layer = _CLASSES[node.kind](
        int(weight.shape[-1]), hidden, bias=bias is not None, bidirectional=count == 2,
        device="meta", **options,
    )  # fmt: skip
    for k, end in enumerate(("_l0", "_l0_reverse")[:count]):
        held = [weight[k], recurrent[k]]
        if bias is not None:
            held += list(bias[k].chunk(2))
        for leaf, tensor in zip(_LEAVES, held, strict=False):
            setattr(layer, leaf + end, nn.Parameter(gates(tensor)))
    return layer.eval()
