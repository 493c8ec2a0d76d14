"""Whether an imported network computes the same for every batch, and at every size of images.

ONNX files speak of one batch, or of a free one whose size operators may ask for. What follows the
operators does so with an example, and nothing of the example may stay in the network: it is
followed with two different batches, which have to give the same graph. Where the file fixes the
batch, samples of a larger one must not know of each other, which two of them show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["difference", "mixed"]

_PLAIN = (int, float, str, tuple)
APART = 1e-2  # of the norm; rounding to a grid may turn another way in a larger batch


def difference(one: fx.GraphModule, other: fx.GraphModule) -> str | None:
    """The operator in which two graphs differ, as the file names it; None where none does."""
    nodes, others = list(one.graph.nodes), list(other.graph.nodes)
    for node, twin in zip(nodes, others, strict=False):
        same = node.op == twin.op and node.target == twin.target
        if same and node.op in ("get_attr", "call_module"):
            same = _equal(_held(one, node.target), _held(other, twin.target))
        if not same or not _equal(_arguments(node), _arguments(twin)):
            return _label(node)
    if len(nodes) != len(others):
        return _label((nodes if len(nodes) > len(others) else others)[-1])
    return None


def _label(node: fx.Node) -> str:
    while "onnx" not in node.meta and node.op != "root":  # a result stands behind its operator
        node = node.prev
    return str(node.meta.get("onnx", "the network"))


def _held(module: fx.GraphModule, target: Any) -> Any:
    """A constant, or all that a layer is: its tensors and its geometry."""
    found: Any = module
    for part in str(target).split("."):
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        return found
    plain = {key: value for key, value in vars(found).items() if isinstance(value, _PLAIN)}
    return {**plain, **found.state_dict(), "class": type(found).__name__}


def _arguments(node: fx.Node) -> Any:
    """With the numbers of nodes in their places: names may differ."""
    places = {n: i for i, n in enumerate(node.graph.nodes)}
    return pytree.tree_map(
        lambda part: ("node", places[part]) if isinstance(part, fx.Node) else part,
        (node.args, dict(node.kwargs)),
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    return type(a) is type(b) and bool(a == b or a != a)


@torch.no_grad()
def mixed(module: fx.GraphModule, examples: tuple[Tensor, ...], fixed: int) -> str | None:
    """What shows that samples of a batch know of each other; None where nothing does.

    Args:
        module: the imported network.
        examples: of its arguments, whose first axis is the batch.
        fixed: the file's batch.
    """
    generator = torch.Generator().manual_seed(0)
    parts = []
    for place in range(2):  # of other means and spreads, so that no sum of many values is alike
        made = []
        for example in examples:
            shape = (fixed, *example.shape[1:])
            if example.is_floating_point():
                x = torch.randn(shape, generator=generator) * (1 + 2 * place) + 2 * place
                made.append(x.to(example.dtype))
            else:
                made.append(torch.full(shape, place).to(example.dtype))
        parts.append(made)
    try:
        alone = [_tensors(module(*part)) for part in parts]
        together = _tensors(module(*(torch.cat(pair) for pair in zip(*parts, strict=True))))
    except (IndexError, RuntimeError):
        return None  # ids that a table has not: nothing can be said
    for k, got in enumerate(together):
        want = [part[k] for part in alone]
        if any(w.shape[:1] != (fixed,) for w in want) or got.shape[:1] != (2 * fixed,):
            continue  # no batch: what the file says of its results is checked elsewhere
        expected = torch.cat(want)
        if expected.shape != got.shape:
            return f"sizes {list(got.shape)} instead of {list(expected.shape)}"
        a, b = (torch.nan_to_num(t.double(), 0.0, 0.0, 0.0) for t in (expected, got))
        apart = float((a - b).norm())
        if apart > APART * float(a.norm()):
            return f"values {apart / max(1e-30, float(a.norm())):.1%} from what each gives alone"
    return None


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
