"""Bytes of the saved file, computed from a plan before anything is quantized.

The list of tensors comes from :func:`~adalayer_native.quantization.file_contents.stored_model`; the
packed weight's length and the safetensors header are formulas. The number of non-zero weights is
taken from the plan's sparsity. Rounding can only add zeros, and zeros can only shrink a layer,
so the result is an upper bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import _C
from .._deprecated import renamed_arguments
from ..capture import captured
from ..errors import PlanError
from ..ops.packing import HEADER_BYTES
from ..plan import Plan
from ..pruning.patterns import FILE_BLOCK, pattern_pruned_count
from ..quantization.file_contents import StoredModel, stored_model

__all__ = [
    "estimate_bytes",
    "float_bytes",
    "layer_bytes",
    "packed_bytes",
    "safetensors_bytes",
]

# safetensors' own order of types; a file holds its tensors by descending type, then by name.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_WIDTH = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "F64": 8,
    "I64": 8,
}  # fmt: skip
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}

Entry = tuple[str, str, tuple[int, ...]]


def packed_bytes(
    count: int, nonzero: int, bits: int, *, blocks: tuple[int, int] | None = None
) -> int:
    """Length of ``weight_packed`` for ``count`` weights of ``bits`` bits, header included.

    Dense planes cost ``sum_g ceil(count * g / 8)``; a bitmask with packed non-zeros costs
    ``ceil(count / 8) + sum_g ceil(nonzero * g / 8)``, and a mask of 16 x 64 blocks with the weights
    of those that are not all zero ``ceil(number / 8) + sum_g ceil(stored * g / 8)``. The smallest
    is stored.

    Args:
        blocks: number of blocks and weights stored in them, where some blocks are known to be zero.
    """
    size = min(_C.fields_bytes(count, bits), -(-count // 8) + _C.fields_bytes(nonzero, bits))
    if blocks is not None:
        size = min(size, -(-blocks[0] // 8) + _C.fields_bytes(blocks[1], bits))
    return HEADER_BYTES + size


def file_blocks(shape: tuple[int, ...]) -> int:
    """Blocks of the file's encoding in a weight ``[O, I/groups, KH, KW]`` or ``[O, I]``."""
    return -(-shape[0] // FILE_BLOCK[0]) * -(-shape[1] // FILE_BLOCK[1]) * math.prod(shape[2:])


def layer_bytes(
    shape: tuple[int, ...],
    bits: int,
    sparsity: float,
    pattern: str = "unstructured",
    integers: Tensor | None = None,
) -> int:
    """:func:`packed_bytes` of a layer that is pruned by a pattern.

    Args:
        shape: of its weight, output channels first.
        integers: the weight itself, of that shape, where it is known.

    Raises:
        PlanError: unknown pattern, or a sparsity that it cannot have.
    """
    count = math.prod(shape)
    if integers is not None:
        blocks = file_blocks(shape), _in_blocks(integers)
        return packed_bytes(count, int(integers.count_nonzero()), bits, blocks=blocks)
    kept = count - pattern_pruned_count(shape, sparsity, pattern)
    whole = (file_blocks(shape), kept) if pattern.startswith("block") else None
    return packed_bytes(count, kept, bits, blocks=whole)


def _in_blocks(integers: Tensor) -> int:
    """Weights in the file's blocks that are not all zero."""
    rows, columns = FILE_BLOCK
    taps = integers.reshape(*integers.shape[:2], -1).ne(0)
    total = 0
    for part in taps.split(rows):
        for block in part.split(columns, dim=1):
            live = block.any(dim=1).any(dim=0)
            total += int(live.sum()) * block.shape[0] * block.shape[1]
    return total


def safetensors_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Length of a safetensors file holding the tensors ``(key, dtype, shape)``.

    8 bytes of length, the JSON header padded to a multiple of 8, then the data.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    offset = 0
    for key, dtype, shape in sorted(entries, key=lambda e: (-_ORDER.index(e[1]), e[0])):
        size = math.prod(shape) * _WIDTH[dtype]
        header[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def float_bytes(model: nn.Module) -> int:
    """Length of the model's ``state_dict`` saved as safetensors, floating point as float32."""
    return safetensors_bytes(
        (key, _NAMES.get(value.dtype, "F32"), tuple(value.shape))
        for key, value in model.state_dict().items()
    )


@renamed_arguments(layout="stored")
def estimate_bytes(
    model: nn.Module | torch.export.ExportedProgram,
    plan: Plan,
    *,
    stored: StoredModel | None = None,
    integers: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Length of the file that ``convert(prepare(model, plan))`` is saved to; an upper bound.

    Args:
        model: the float model, captured or not.
        plan: bits and sparsity per layer.
        stored: of this model for a plan that quantizes the same layers, if at hand.
        integers: quantized weights ``[O, I/groups, KH, KW]`` or ``[O, I]`` of layers where they are
            known; with all of them the result is exact. Default: what the plan's sparsity leaves.
        metadata: the file's text metadata, if it has any.

    Raises:
        PlanError: the plan does not fit the model, or ``stored`` not the plan.
        UnsupportedModelError: the model cannot be captured.
    """
    stored = stored_model(captured(model), plan) if stored is None else stored
    return safetensors_bytes(native_entries(stored, plan, integers), metadata)


def native_entries(
    stored: StoredModel, plan: Plan, integers: Mapping[str, Tensor] | None = None
) -> list[Entry]:
    """Every tensor of the saved file as ``(key, dtype, shape)``."""
    entries: list[Entry] = []
    for key, dtype, shape in stored.entries():
        if shape is None:
            layer = key.removesuffix(".weight_packed")
            bits = plan[layer].bits
            if bits is None:
                raise PlanError(
                    f"layer {layer!r}: the stored model has it native, the plan in float"
                )
            known = None if integers is None else integers.get(layer)
            form = tuple(stored.layers[layer].weight_shape)
            shape = (layer_bytes(form, bits, plan[layer].sparsity, plan[layer].pattern, known),)
        entries.append((key, dtype, shape))
    return entries
