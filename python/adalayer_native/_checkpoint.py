"""Checkpoints of runs: one safetensors file, replaced as a whole, no pickle.

Its metadata say which kind of run it is of, in which version, and by a hash of what the run depends
on whether it is this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._files import require_file, write_atomic
from .errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_checkpoint", "write_checkpoint"]


def write_checkpoint(
    path: str | os.PathLike[str],
    kind: tuple[str, str],
    identity: str,
    tensors: Mapping[str, Tensor],
    **texts: str,
) -> None:
    """Write a run's state; an interruption leaves the previous file.

    Args:
        kind: format and version.
        identity: hash of what the run depends on.
        texts: further metadata.
    """
    from safetensors.torch import save

    # clone: safetensors refuses views that share memory, channels_last is made contiguous
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = {"format": kind[0], "version": kind[1], "identity": identity, **texts}
    write_atomic(path, save(stored, metadata))


@contextmanager
def read_checkpoint(
    path: str | os.PathLike[str], kind: tuple[str, str]
) -> Iterator[tuple[dict[str, str], Any]]:
    """The metadata, and safetensors' handle to the tensors.

    Raises:
        FileFormatError: no such file, none of this kind, or corrupt: also where whoever reads it
            fails at what it holds.
    """
    from safetensors import SafetensorError, safe_open

    shown = os.fspath(path)
    require_file(path, "checkpoint")
    try:
        with safe_open(shown, framework="pt") as handle:
            metadata = handle.metadata() or {}
            found = metadata.get("format"), metadata.get("version")
            if found != kind:
                raise FileFormatError(
                    f"checkpoint {shown!r}: expected format {kind[0]} version {kind[1]}, got "
                    f"{found[0]} version {found[1]}"
                )
            yield metadata, handle
    except FileFormatError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"checkpoint {shown!r} is corrupt ({type(error).__name__}: {error}); delete it to "
            "start again"
        ) from error
