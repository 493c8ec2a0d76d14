"""What a long run starts from, as one hash: whoever resumes it must start from the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["fingerprint", "memory_of"]


def fingerprint(model: nn.Module, options: dict[str, Any]) -> str:
    """Hash of the options and of every tensor of a model."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(memory_of(value))
    return digest.hexdigest()


def memory_of(tensor: Tensor) -> memoryview:
    """The elements of a tensor as bytes, in order; what is negative or conjugate lazily, as it is
    meant."""
    import torch

    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    found: memoryview = values.reshape(-1).view(torch.uint8).numpy().data
    return found
