"""From exported operators to program nodes, driven by what readers ask for.

Values on a u8 grid are the normal case. Some nodes have a grid of their own: ``fake_quantize``, a
convolution with an output grid, and whatever moves such values around. Others (a convolution whose
only readers quantize their input themselves, a mean, a batch norm) are written straight to the grid
of their reader: a value that is never stored in float has no node in float. So lowering goes
backward from readers; ``u8(node, want)`` gives the program value of a node on the grid that is
wanted, and ``f32(node)`` the same in float32, for the outputs.

A rule that cannot do what is asked raises :class:`CannotLower`; the node that it names then runs in
torch, and the partition is made again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native import ops
from adalayer_native.engine.export import Exported, layer_name, op_name
from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.program import Program, Value, shorten
from adalayer_native.engine.results import ID_TYPES
from adalayer_native.engine.views import (
    BATCH,
    Atom,
    Dims,
    Positions,
    Ref,
    Size,
    arranged_as,
    axes_of,
    channel_order,
    image_dims,
    in_order,
    is_scattered,
    merged,
    offsets,
    outer_sum,
    reshaped,
)

__all__ = ["CannotLower", "Lowering", "Rule", "lower", "rule_for"]


class CannotLower(Exception):
    """A node that the program cannot express.

    Attributes:
        node: the node; None while the rule that asked is not known yet.
        reason: a sentence without the node's name.
    """

    def __init__(self, node: fx.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class U8Rule(Protocol):
    def __call__(self, low: Lowering, node: fx.Node, want: Want, /) -> Ref: ...


class F32Rule(Protocol):
    def __call__(self, low: Lowering, node: fx.Node, lo: float, hi: float, /) -> Ref: ...


@dataclass(frozen=True)
class Rule:
    """How one operator is lowered.

    Attributes:
        u8: its result on a grid.
        f32: its result in float32, where the program can do that.
        grid: the grid that its result lies on by itself: of the node, or None.
        folds: it works on tensors, too, that have other axes merged into their batch. Their views
            have these as a first axis.
        scatters: it works on tensors, too, whose batch is not the first axis (``views.BATCH``).
        piece: of an operator of several results that are no parts of its operand: one of them, by
            the node that takes it.
    """

    u8: U8Rule
    f32: F32Rule | None = None
    grid: Callable[[Grids, fx.Node], Grid | None] = lambda grids, node: None
    folds: bool = False
    scatters: bool = False
    piece: U8Rule | None = None


RULES: dict[str, Rule] = {}


def _around_batch(before: tuple[Atom, ...], copied: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """An axis of a copy, with the batch at its old place among the elements of one sample."""
    if BATCH not in before:
        return copied
    split = before.index(BATCH)
    sizes = [math.prod(n for n, _ in part) for part in (before[:split], before[split + 1 :])]
    parts = reshaped((copied,), sizes)
    assert parts is not None
    return (*parts[0], BATCH, *parts[1])


def letters_of(dims: Dims, size: Size) -> str:
    """Axes of a copy that leaves them where they are, as far as parts of one follow each other."""
    _, h, w = size
    letters, last = "", {"c": math.inf, "h": math.inf, "w": math.inf}
    for atoms in dims:
        if not atoms or atoms[-1] == BATCH:
            letters += " "
            continue
        stride = atoms[-1][1]
        letter = "c" if stride >= h * w else "h" if stride >= w else "w"
        if stride > last[letter]:
            return rows_of(dims)
        last[letter] = stride
        letters += letter
    # Axes of size 1 are anywhere.
    for letter in "chw":
        if letter not in letters:
            letters = letters.replace(" ", letter, 1)
    return letters.replace(" ", "c")


def rows_of(dims: Dims) -> str:
    """Axes of a copy of a view for who works along its last axis: rows of pixels, "hw...wc"."""
    return "h" * (len(dims) > 1) + "w" * (len(dims) - 2) + "c"


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator."""
    return RULES.get(op_name(node)) if node.op == "call_function" else None


class Grids:
    """Which nodes lie on a grid by themselves, whoever reads them."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Grid | None] = {}

    def __call__(self, node: Any) -> Grid | None:
        """The grid of a node, or None."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            rule = rule_for(node)
            self._known[node] = None if rule is None else rule.grid(self, node)
        return self._known[node]


class Lowering:
    """One program in the making.

    Attributes:
        program: what has been emitted so far.
        exported: the model.
        grids: intrinsic grids.
        as_float: quantized layers that are computed in float.
        masks: of keys, by the node that makes them.
        origins: by name of a value, the graph node that it holds, how the node's tensor shows it,
            and what was asked for. Checks compare the two with it.
    """

    def __init__(
        self,
        exported: Exported,
        inside: set[fx.Node],
        grids: Grids,
        as_float: Collection[fx.Node] = (),
    ) -> None:
        self.exported = exported
        self.inside = inside
        self.as_float = as_float
        self.grids = grids
        self.program = Program()
        self.inputs: list[fx.Node] = []
        self.origins: dict[str, tuple[fx.Node, Dims, Want]] = {}
        self._u8: dict[tuple[fx.Node, Want], Ref] = {}
        self._f32: dict[tuple[fx.Node, float, float], Ref] = {}
        self._external: dict[fx.Node, Ref] = {}
        self._names: dict[str, int] = {}
        self._asking: list[Rule] = []
        self._copies: dict[tuple[int, Dims, str], Ref] = {}
        self.masks: dict[fx.Node, Ref] = {}

    # -- what rules ask for -------------------------------------------------------------------

    def u8(self, node: Any, want: Want) -> Ref:
        """A node's value on the wanted grid."""
        if not isinstance(node, fx.Node):
            raise CannotLower(None, f"expected a tensor operand, got {node!r}")
        key = (node, want)
        if key not in self._u8:
            constant = self.parameter(node)
            if constant is not None:
                self._u8[key] = self.held(node, constant, want)
                return self._u8[key]
            ref = self._find_u8(node, want)
            self._u8[key] = ref
            self.origins.setdefault(self.value(ref).name, (node, ref.dims, want))
        return self._seen(self._u8[key])

    def _seen(self, ref: Ref) -> Ref:
        """What the rule that asked can work with."""
        if self._asking and not self._asking[-1].scatters and is_scattered(ref.dims):
            raise CannotLower(None, "its first axis is not the batch alone")
        return ref

    def on_own_grid(self, node: Any) -> tuple[Ref, Grid]:
        """A node's value on its own grid."""
        grid = self.grids(node)
        if grid is None:
            raise CannotLower(
                None, f"operand {node} is a float tensor that no quantizer puts on a u8 grid"
            )
        return self.u8(node, Want(grid)), grid

    def f32(self, node: Any, lo: float = -math.inf, hi: float = math.inf) -> Ref:
        """A node's value in float32, clamped."""
        if not isinstance(node, fx.Node):
            raise CannotLower(None, f"expected a tensor operand, got {node!r}")
        if self.parameter(node) is not None:
            raise CannotLower(None, f"operand {node} is a constant among floats")
        key = (node, lo, hi)
        if key not in self._f32:
            self._f32[key] = self._find_f32(node, lo, hi)
        return self._seen(self._f32[key])

    def _find_u8(self, node: fx.Node, want: Want) -> Ref:
        if node not in self.inside:
            return self.quantized(self.external(node), node, want)
        own = self.grids(node)
        if own is not None and Want(own) != want:
            return self.retable(self.u8(node, Want(own)), node, own, want)
        return self._apply(node, lambda rule: rule.u8(self, node, want))

    def _find_f32(self, node: fx.Node, lo: float, hi: float) -> Ref:
        if node not in self.inside:
            if (lo, hi) != (-math.inf, math.inf):
                raise CannotLower(None, "a float tensor from outside would have to be clamped")
            return self.external(node)
        own = self.grids(node)
        if own is not None:
            if any(math.isfinite(bound) and not own.holds(bound) for bound in (lo, hi)):
                raise CannotLower(None, f"a clamp to {lo} ... {hi}, between two levels of its grid")
            source = self.u8(node, Want(own, lo, hi))
            size = self.size(source)
            name = self.name(node, "dequantize")
            return Ref(
                self.program.node("dequantize", name, [source.value], size, None), source.dims
            )

        def run(rule: Rule) -> Ref:
            if rule.f32 is None:
                raise CannotLower(
                    None,
                    "its result is wanted in float32 (no quantized layer reads it), which the "
                    "engine has no operation for",
                )
            return rule.f32(self, node, lo, hi)

        return self._apply(node, run)

    def _apply(self, node: fx.Node, run: Callable[[Rule], Ref]) -> Ref:
        try:
            rule = rule_for(node)
            if rule is None:
                raise CannotLower(None, "the engine has no such operation")
            if isinstance(node.meta.get("val"), Tensor) and not rule.scatters:
                found = {self.exported.folds(n) for n in (node, *self.tensors(node))}
                if 0 in found or (found != {1} and not rule.folds):
                    raise CannotLower(None, "its first axis is not the batch alone")
            self._asking.append(rule)
            try:
                return run(rule)
            finally:
                self._asking.pop()
        except CannotLower as error:
            raise CannotLower(error.node or node, error.reason) from None

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The computed tensors that a node reads."""
        operands = (n for n in node.all_input_nodes if n.op != "get_attr")
        return [n for n in operands if isinstance(n.meta.get("val"), Tensor)]

    def quantized(self, source: Ref, node: fx.Node, want: Want) -> Ref:
        """Floats on the wanted grid."""
        plain = Want(want.grid)
        ref = self.emit("quantize", self.name(node, "quantize"), [source.value], source, plain)
        return self.retable(ref, node, plain.grid, want)

    def prepare_input(self, node: fx.Node) -> None:
        """Lower what a layer reads."""
        self._apply(node, lambda rule: LAYER_INPUTS[op_name(node)](self, node))

    def external(self, node: fx.Node, ids: bool = False) -> Ref:
        """A tensor that comes from outside the program: float32, or token ids."""
        if node not in self._external:
            sizes = self.exported.sizes(node)
            value = node.meta.get("val")
            dtype = value.dtype if isinstance(value, Tensor) else None
            if ids and (sizes is None or dtype not in (*ID_TYPES, torch.bool)):
                raise CannotLower(None, f"operand {node} is no batch of token ids ({value})")
            if not ids and (not sizes or dtype != torch.float32):
                raise CannotLower(
                    None, f"operand {node} is no batch of float32 images or vectors ({value})"
                )
            # A text is one row of pixels.
            c, h, *rest = (1, 1, *sizes) if ids else (*sizes, 1, 1)  # type: ignore[misc]
            size: Size = (c, h, math.prod(rest))
            number = self.program.value(node.name, size, None, ids)
            self.program.inputs.append(number)
            self.inputs.append(node)
            dims = reshaped(image_dims(size), sizes)  # type: ignore[arg-type]
            assert dims is not None
            self._external[node] = Ref(number, dims)
        return self._external[node]

    # -- emitting -----------------------------------------------------------------------------

    def value(self, ref: Ref) -> Value:
        """The program value of a ref."""
        return self.program.values[ref.value]

    def size(self, ref: Ref) -> Size:
        """c, h, w of a ref's program value."""
        return self.value(ref).size

    def name(self, node: fx.Node, suffix: str = "") -> str:
        """A name for a program node that nothing else in the program has."""
        name = layer_name(node) + (f".{suffix}" if suffix else "")
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}#{count + 1}"

    def emit(
        self, op: str, name: str, inputs: list[int], like: Ref, want: Want, **parameters: Any
    ) -> Ref:
        """A node whose u8 result has the shape and view of ``like``."""
        size = self.size(like)
        return Ref(self.program.node(op, name, inputs, size, want.grid, **parameters), like.dims)

    def retable(
        self,
        ref: Ref,
        node: fx.Node,
        source: Grid,
        want: Want,
        function: Callable[[Tensor], Tensor] | None = None,
    ) -> Ref:
        """``function`` of a value on ``source``, on another grid: one table, or nothing."""
        table = want.table(source, function)
        used = source.qmax + 1
        same = np.array_equal(table[:used], np.arange(used, dtype=np.uint8))
        if same and source == want.grid:
            return ref
        suffix = "" if function is not None else "table"
        name = self.name(node, suffix)
        return self.emit("lookup", name, [ref.value], ref, want, table=self.program.table(table))

    def held(
        self,
        node: fx.Node,
        constant: Tensor,
        want: Want | None,
        like: tuple[Size, Dims] | None = None,
    ) -> Ref:
        """A constant of one sample, ``[1, ...]``, on the wanted grid, or in float32.

        Args:
            like: size and view that it gets; by default those of a copy.
        """
        if not constant.dim() or constant.shape[0] != 1 or constant.dtype != torch.float32:
            raise CannotLower(None, f"a constant of {list(constant.shape)} among its operands")
        sizes = constant.shape[1:]
        if like is None:
            axes = "chw" if len(sizes) == 3 else rows_of(((),) * len(sizes))
            like = arranged_as(axes, sizes)
        size, dims = like
        name = self.name(node)
        if want is None:
            if not bool(torch.isfinite(constant).all()):
                raise CannotLower(None, "a constant among its operands that is not finite")
            values = in_order(constant.contiguous().numpy(), dims, size).transpose(2, 0, 1)
            number = self.program.node(
                "constant", name, [], size, None, values=self.program.f32(values)
            )
            return Ref(number, dims)
        grid = want.grid
        clamped = constant.clamp(want.lo, want.hi).contiguous()
        found = ops.quantize(clamped, grid.scale, grid.zero_point, grid.bits).numpy()
        in_memory = self.program.u8(in_order(found, dims, size))
        number = self.program.node("constant", name, [], size, grid, values=in_memory)
        return Ref(number, dims)

    # -- layouts ------------------------------------------------------------------------------

    def plain(self, ref: Ref, name: str) -> Ref:
        """The same tensor as [batch, c, h, w], or [batch, c] with one pixel, in memory."""
        size = self.size(ref)
        if len(ref.dims) == 3 and ref.dims == image_dims(size):
            return ref
        if len(ref.dims) == 1 and ref.dims == image_dims(size)[:1] and size[1:] == (1, 1):
            return ref
        grid = self.value(ref).grid
        if len(ref.dims) in (1, 3) and grid is not None:
            sizes = [math.prod(n for n, _ in atoms) for atoms in ref.dims]
            wanted: Size = (*sizes, *(1,) * (3 - len(sizes)))  # type: ignore[assignment]
            order = channel_order(ref.dims, size)
            if order is not None:
                number = self.program.node(
                    "gather", name, [ref.value], wanted, grid, index=self.program.i32(order)
                )
                return Ref(number, image_dims(wanted)[: len(sizes)])
            total = math.prod(size)
            flat: Size = (total, 1, 1)
            if flat in (size, wanted) and reshaped(ref.dims, [total]) == (merged([(total, 1)]),):
                number = self.program.node("reshape", name, [ref.value], wanted, grid)
                return Ref(number, image_dims(wanted)[: len(sizes)])
        return self.arranged(ref, name, "chw" if len(ref.dims) == 3 else rows_of(ref.dims))

    def rows(self, ref: Ref, name: str) -> Ref:
        """The same tensor with its last axis as the channels, alone."""
        c, h, w = self.size(ref)
        others = itertools.chain.from_iterable(ref.dims[:-1])
        if ref.dims[-1] == merged([(c, h * w)]) and all(stride < h * w for _, stride in others):
            return ref
        return self.in_rows(ref, name)

    def in_rows(self, ref: Ref, name: str) -> Ref:
        """A copy for who works along its last axis: rows of pixels."""
        return self.arranged(ref, name, rows_of(ref.dims))

    def alike(self, ref: Ref, target: Ref, name: str) -> Ref | None:
        """The same tensor as ``ref`` in the order in which ``target``, of the same sizes, lies.

        None where that splits an axis of its value.
        """
        if ref.dims == target.dims and self.size(ref) == self.size(target):
            return ref
        size = self.size(target)
        axes = axes_of(target.dims, size)
        if axes is None:
            return None
        lengths = dict(zip("chw", size, strict=True))
        letters = "".join(axes)
        split = reshaped(ref.dims, [lengths[letter] for letter in letters])
        if split is None:
            return None
        # Axes of size 1 are nowhere.
        ones = "".join(axis for axis in "chw" if axis not in letters)
        whole = (*split, *((),) * len(ones))
        return Ref(self.arranged(Ref(ref.value, whole), name, letters + ones).value, target.dims)

    def arranged(
        self, ref: Ref, name: str, axes: str, picked: Mapping[int, Positions] | None = None
    ) -> Ref:
        """A copy whose axes "c", "h" and "w" are the axes of the view at these letters in ``axes``.

        Axes with the same letter become one, the first of them the outermost.

        Args:
            picked: by number of an axis the positions along it that are copied, in their order.
        """
        known = (ref.value, ref.dims, axes)
        if picked is None and known in self._copies:
            return self._copies[known]
        copy = self._arranged(ref, name, axes, {} if picked is None else picked)
        if picked is None:
            self._copies[known] = copy
        return copy

    def _arranged(self, ref: Ref, name: str, axes: str, picked: Mapping[int, Positions]) -> Ref:
        grid = self.value(ref).grid
        groups = [[k for k, axis in enumerate(axes) if axis == part] for part in "chw"]
        places = [offsets(atoms)[picked.get(k, slice(None))] for k, atoms in enumerate(ref.dims)]
        tables = [outer_sum(places[k] for k in group) for group in groups]
        size, dims = arranged_as(axes, [len(place) for place in places])
        channel, row, column = (self.program.i32(table) for table in tables)
        number = self.program.node(
            "rearrange", name, [ref.value], size, grid, channel=channel, row=row, column=column
        )
        return Ref(number, tuple(map(_around_batch, ref.dims, dims)))

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's tensor without the batch."""
        sizes = self.exported.sizes(node)
        if sizes is None:
            raise CannotLower(None, "its first axis is not the batch alone")
        return sizes

    def parameter(self, node: Any) -> Tensor | None:
        """A number operand or one that is the same for all samples as a tensor; None for others."""
        if isinstance(node, fx.Node):
            return self.exported.constant(node)
        return torch.tensor(float(node)) if isinstance(node, (int, float)) else None


MAX_AXIS = 1 << 20  # kMaxAxis of csrc/engine/program.hpp


def _holder(low: Lowering, inside: list[fx.Node], value: Value) -> fx.Node:
    """The node whose tensor a value is, or that reads it or asked for it."""
    found = low.origins.get(value.name)
    if found is not None and found[0] in low.inside:
        return found[0]
    for node in inside:
        names = [item.name for item in node.all_input_nodes]
        if value.name in names or value.name.startswith(layer_name(node)):
            return node
    return inside[0]


@dataclass
class Lowered:
    """A program and how its boundary is connected.

    Attributes:
        program: shortened.
        inputs: graph nodes of the program's inputs.
        outputs: graph nodes whose values come out.
        sources: for each of them, which of the program's outputs it is.
        views: for each of them, how it shows that output.
        origins: see :class:`Lowering`.
    """

    program: Program
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    sources: list[int]
    views: list[Dims]
    origins: dict[str, tuple[fx.Node, Dims, Want]]


def lower(
    exported: Exported,
    inside: list[fx.Node],
    outputs: list[fx.Node],
    grids: Grids,
    as_float: Collection[fx.Node] = (),
) -> Lowered:
    """Lower the nodes ``inside`` (in graph order) so that ``outputs`` come out in float32.

    Args:
        as_float: quantized layers that are computed in float.

    Raises:
        CannotLower: naming the node that has to run in torch.
    """
    low = Lowering(exported, set(inside), grids, as_float)
    # In graph order, so that a deep network does not become a deep recursion.
    for node in inside:
        own = grids(node)
        if own is not None and isinstance(node.meta.get("val"), Tensor):
            if op_name(node).startswith("adalayer."):
                low.u8(node, Want(own))
        elif op_name(node) in LAYER_INPUTS:
            low.prepare_input(node)
    for node in outputs:
        if exported.constant(node) is not None:
            raise CannotLower(node, "its result is the same for all samples")
    refs = [low.f32(node) for node in outputs]
    program = low.program
    for value in program.values:
        if not all(1 <= n <= MAX_AXIS for n in value.size):
            raise CannotLower(_holder(low, inside, value), f"a tensor of {value.size} per sample")
    for node, ref in zip(outputs, refs, strict=True):
        if is_scattered(ref.dims):
            raise CannotLower(node, "its first axis is not the batch alone")
        if ref.value in program.inputs:
            raise CannotLower(node, "it hands an input of the program on as it is")
        if exported.folds(node) > 1 and node in exported.outputs:
            raise CannotLower(node, "its first axis is not the batch alone")
    numbers = list(dict.fromkeys(ref.value for ref in refs))
    program.outputs = numbers
    sources = [numbers.index(ref.value) for ref in refs]
    # An input that turned out to be unused stays: the caller passes it by position.
    shorten(program)
    return Lowered(program, low.inputs, outputs, sources, [ref.dims for ref in refs], low.origins)


# Operators that quantize their input themselves, and the function that asks for it.
LAYER_INPUTS: dict[str, Callable[[Lowering, fx.Node], Ref]] = {}
