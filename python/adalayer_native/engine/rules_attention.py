"""The rule for attention: heads in the channels, tokens in the positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.engine.grids import Grid, Want
from adalayer_native.engine.lower import RULES, CannotLower, Lowering, Rule
from adalayer_native.engine.rules_images import joined
from adalayer_native.engine.rules_layers import check_grid, clamped
from adalayer_native.engine.rules_views import sliced
from adalayer_native.engine.views import Dims, Ref, Size, merged
from adalayer_native.ops.attention import additive_mask, score_scale, total_scale


def _in_place(ref: Ref, size: Size, letters: str) -> bool:
    """Whether a value lies as attention reads it: [heads x depth] channels, tokens in order."""
    c, h, w = size
    lead = dict(zip(letters[:-2], ref.dims[:-2], strict=True))
    tokens, depth = ref.dims[-2:]
    if merged([*lead.get("c", ()), *depth]) != merged([(c, h * w)]):
        return False
    if "h" in lead:
        return lead["h"] == merged([(h, w)]) and tokens == merged([(w, 1)])
    return tokens == merged([(h * w, 1)])


def _operand(low: Lowering, node: fx.Node, ref: Ref, letters: str) -> Ref:
    if _in_place(ref, low.size(ref), letters):
        return ref
    return low.arranged(ref, low.name(node, "reorder"), letters)


def _letters(low: Lowering, node: fx.Node, ref: Ref) -> str:
    """Where the axes of queries go: sequences to rows, heads to channels."""
    lead = len(ref.dims) - 2
    if lead < 0 or lead > 2:
        raise CannotLower(node, f"attention of {len(ref.dims) + 1} axes")
    if lead == 1 and _in_place(ref, low.size(ref), "hwc"):
        return "hwc"
    return ("wc", "cwc", "hcwc")[lead]


def _is_key_mask(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and op_name(operand) == "adalayer.key_mask.default"


def _key_mask(low: Lowering, node: fx.Node, operand: fx.Node) -> Ref:
    """What is added to the scores of every key of a sample: floats."""
    keys, _, zero, other, several = operand.args
    assert isinstance(keys, fx.Node)
    if low.exported.folds(node) != 1 or low.exported.folds(keys) != 1:
        raise CannotLower(node, "a mask of the call, and other axes in its batch")
    if keys in low.inside:
        raise CannotLower(operand, "its mask is computed by the graph")
    if keys.meta["val"].is_floating_point():
        return low.external(keys)
    if operand not in low.masks:
        ids = low.external(keys, ids=True)
        number = low.program.node(
            "choose", low.name(operand), [ids.value], low.size(ids), None,
            any=bool(several), zero=zero, other=other,
        )  # fmt: skip
        low.masks[operand] = Ref(number, ids.dims)
    return low.masks[operand]


def _mask(
    low: Lowering, node: fx.Node, operand: Any, letters: str, folds: int, head: int | None
) -> Tensor | None:
    """float32 [sequences or 1, heads or 1, queries, keys], of one head if given; None for none."""
    if operand is None:
        return None
    given = low.parameter(operand)
    if given is None:
        raise CannotLower(node, "its mask is computed by the graph")
    mask = additive_mask(given)
    if bool(mask.isnan().any()) or bool((mask == math.inf).any()):
        raise CannotLower(node, "its mask contains NaN or infinity")
    rank = node.meta["val"].dim()
    mask = mask.reshape((1,) * (rank - mask.dim()) + mask.shape)
    if mask.shape[0] != 1:
        raise CannotLower(node, "its mask differs between samples")
    if head is not None and mask.shape[-3] > 1:
        mask = mask[..., head : head + 1, :, :]
    # Axes that are merged into the batch are the view's first.
    lead = [*([1] if folds > 1 else []), *mask.shape[1:-2]]
    sizes = dict(zip(letters[:-2], lead, strict=True))
    queries, keys = node.meta["val"].shape[-2], arguments(node)["key"].meta["val"].shape[-2]
    mask = mask.reshape(sizes.get("h", 1), sizes.get("c", 1), *mask.shape[-2:])
    mask = mask.expand(-1, -1, queries, keys)
    return None if not bool(mask.any()) else mask


def _own_grid(low: Lowering, node: fx.Node, name: str) -> tuple[Ref, Grid]:
    a = arguments(node)
    ref, grid = low.on_own_grid(a[name])
    check_grid(low, node, grid, a[f"{name}_qparams"])
    return ref, grid


def _product(dims: Dims) -> int:
    return math.prod(n for atoms in dims for n, _ in atoms)


def _attention(low: Lowering, node: fx.Node, want: Want | None) -> Ref:
    """On a grid, or in float32."""
    a = arguments(node)
    grids = [_own_grid(low, node, name) for name in ("query", "key", "value")]
    factor = low.parameter(a["factor"])
    if factor is None and a["factor"] is not None:
        raise CannotLower(node, "its scale is computed by the graph")
    given = [ref for ref, _ in grids]
    if factor is None or factor.numel() == 1:
        return _heads(low, node, given, grids[0][1], grids[1][1], factor, None, want)
    # One after the other, each with its own scale.
    place, found = len(given[0].dims) - 3, {}
    heads = [_product(ref.dims[place : place + 1]) for ref in given]
    for head, own in enumerate(factor.reshape(-1)):
        numbers = (head * n // heads[0] for n in heads)
        parts = [
            sliced(low, node, ref, place, number, 1, 1)
            for ref, number in zip(given, numbers, strict=True)
        ]
        found[head] = _heads(low, node, parts, grids[0][1], grids[1][1], own, head, want)
    return joined(low, node, [node] * len(found), found, place, want)


def _heads(
    low: Lowering,
    node: fx.Node,
    operands: list[Ref],
    query_grid: Grid,
    key_grid: Grid,
    factor: Tensor | None,
    head: int | None,
    want: Want | None,
) -> Ref:
    """All heads, or the one that the operands are of."""
    a = arguments(node)
    query, key, value = operands
    letters = _letters(low, node, query)
    fixed, hiding = a["attn_mask"], []
    if _is_key_mask(fixed):
        hiding = [_key_mask(low, node, fixed).value]
        fixed = fixed.args[1]
    mask = _mask(low, node, fixed, letters, low.exported.folds(a["query"]), head)
    heads, key_heads = (
        _product(ref.dims[letters.index("c") :][:1]) if "c" in letters[:-2] else 1
        for ref in (query, key)
    )
    width = _product(value.dims[-1:])
    query, key, value = (_operand(low, node, ref, letters) for ref in (query, key, value))
    _, h, w = low.size(query)
    rows = "h" in letters and h > 1
    if rows and hiding:
        raise CannotLower(node, "a mask of the call for several sequences")
    size: Size = (heads * width, h, w)
    places = {"c": (heads, width * h * w), "h": (h, w)}
    dims = (
        *(merged([places[letter]]) for letter in letters[:-2]),
        merged([(w, 1)] if "h" in letters else [(h * w, 1)]),
        merged([(width, h * w)]),
    )
    scale = total_scale(a["scale"], factor)
    masked: dict[str, Any] = {}
    if mask is not None:
        masked["mask"] = low.program.f32(mask.to(torch.float32).numpy())
        masked["mask_rows"], masked["mask_heads"] = (size > 1 for size in mask.shape[:2])
    number = low.program.node(
        "attention",
        low.name(node),
        [query.value, key.value, value.value, *hiding],
        size,
        None if want is None else want.grid,
        heads=heads,
        key_heads=key_heads,
        rows=rows,
        causal=bool(a["is_causal"]),
        scale=score_scale(query_grid.scale, key_grid.scale, scale),
        **masked,
        **({} if want is None else want.finish()),
    )
    return Ref(number, dims)


def _attention_f32(low: Lowering, node: fx.Node, lo: float, hi: float) -> Ref:
    return clamped(low, node, _attention(low, node, None), lo, hi)


RULES["adalayer.grid_attention.default"] = Rule(_attention, _attention_f32, folds=True)


def _only_attention(low: Lowering, node: fx.Node, want: Want) -> Ref:
    raise CannotLower(node, "a mask that something else than attention reads")


RULES["adalayer.key_mask.default"] = Rule(_only_attention)
