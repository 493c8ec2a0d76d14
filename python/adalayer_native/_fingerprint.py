"""What a long run starts from, as one hash: whoever resumes it must start from the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, options: dict[str, Any]) -> str:
    """Hash of the options and of every tensor of a model."""
    import torch

    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
