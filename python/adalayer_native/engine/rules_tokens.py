"""Rules for token ids and what is looked up with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from adalayer_native import ops
from adalayer_native.engine.grids import Want
from adalayer_native.engine.lower import RULES, CannotLower, Lowering, Rule
from adalayer_native.engine.results import ID_TYPES
from adalayer_native.engine.rules_layers import arguments
from adalayer_native.engine.rules_views import VIEWS, viewed
from adalayer_native.engine.views import Ref, Size, merged

_CASTS = ("aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default", "aten.to.device")


def _ids(low: Lowering, node: Any) -> Ref:
    """Token ids that come from outside, perhaps under another view or as another integer type."""
    if not isinstance(node, fx.Node):
        raise CannotLower(None, f"expected token ids, got {node!r}")
    if node not in low.inside:
        return low.external(node, ids=True)
    name = str(node.target)
    if name in VIEWS:
        return viewed(low, node, _ids(low, node.args[0]))
    if name in _CASTS and node.meta["val"].dtype in ID_TYPES:
        return _ids(low, node.args[0])
    raise CannotLower(node, "integers are computed in torch")


def _embedding(low: Lowering, node: fx.Node, want: Want) -> Ref:
    a = arguments(node)
    weight = low.parameter(a["weight"])
    if weight is None:
        raise CannotLower(node, "its table is computed by the graph")
    ids = _ids(low, a["indices"])
    if want.clamps:
        weight = weight.clamp(want.lo, want.hi)
    grid = want.grid
    levels = ops.quantize(weight.contiguous(), grid.scale, grid.zero_point, grid.bits)
    _, h, w = low.size(ids)
    size: Size = (int(weight.shape[1]), h, w)
    number = low.program.node(
        "embedding",
        low.name(node),
        [ids.value],
        size,
        grid,
        table=low.program.table(np.asarray(levels.numpy())),
    )
    # Ids have one channel: their places are the pixels of the result.
    return Ref(number, (*ids.dims, merged([(size[0], h * w)])))


RULES["aten.embedding.default"] = Rule(_embedding, folds=True)
