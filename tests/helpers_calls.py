"""Models that take and return nests of tensors, and their export with all arguments."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import adalayer_native as ada
from adalayer_native.engine import Engine
from adalayer_native.engine.compiler import compile_exported
from adalayer_native.engine.export import Exported


def exported_call(
    model: nn.Module, *args: Any, shapes: dict[int, Any] | None = None, **kwargs: Any
) -> Exported:
    """What a front end hands over: the graph of one call, and how its arguments are nested.

    Args:
        shapes: axes of every tensor that vary beside the batch.
    """
    batch = torch.export.Dim("batch")
    varying = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            varying[leaf] = {0: batch, **(shapes or {})}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, kwargs, dynamic_shapes=varying, strict=False)
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_module" or str(node.target).startswith("aten._assert"):
            module.graph.erase_node(node)
    outputs = next(node for node in module.graph.nodes if node.op == "output")
    holders = [node for node in module.graph.nodes if node.op == "placeholder"]
    return Exported(
        module,
        module.graph,
        [node for node in holders if isinstance(node.meta.get("val"), Tensor)],
        pytree.tree_leaves(outputs.args[0]),
        program.call_spec.in_spec,
        program.call_spec.out_spec,
        {},
    )


def compiled(model: nn.Module, *args: Any, signature: Any = None, **kwargs: Any) -> Engine:
    """An engine of one call."""
    return compile_exported(exported_call(model, *args, **kwargs), signature=signature)


class Pair(NamedTuple):
    """A container that is a tuple."""

    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    """A container that is a dataclass; what is None is no leaf."""

    scores: Any = None
    hidden: Any = None


class ModelOutput(OrderedDict):
    """A container like those of Hugging Face: fields by name and as items."""

    def __init__(self, **fields: Any) -> None:
        super().__init__((name, value) for name, value in fields.items() if value is not None)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


torch.export.register_dataclass(Record, serialized_type_name="tests.Record")
pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: ModelOutput(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.ModelOutput",
)


class Tokens(nn.Module):
    """Token ids, pixels and a mask for native layers, and arguments that change the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.conv = ada.nn.Conv2d.from_float(nn.Conv2d(3, 6, 3), 8, input_range=(0.0, 1.0))
        self.head = ada.nn.Linear.from_float(nn.Linear(6, 4), 8, input_range=(-4.0, 4.0))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        scale: int = 2,
        *,
        images: Any = None,
        fancy: bool = False,
    ) -> Any:
        found = self.table(ids)
        if mask is not None:
            found = found * mask.unsqueeze(-1)
        y = found.mean(1) * scale
        if images is not None:
            y = y + self.conv(images["pixels"].float() / 255).mean((2, 3)) + images["more"][0]
        y = self.head(y)
        return Record(y, y.argmax(1)) if fancy else ModelOutput(logits=y, state=None, best=[y > 0])


def token_inputs(batch: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of :class:`Tokens`."""
    random = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 10, (batch, 5), generator=random),
        "mask": torch.rand(batch, 5, generator=random) > 0.3,
        "images": {
            "pixels": torch.randint(0, 256, (batch, 3, 8, 8), generator=random, dtype=torch.uint8),
            "more": (torch.randn(batch, 6, generator=random), None),
        },
    }
