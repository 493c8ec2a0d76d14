"""Engines from ``.ada`` files."""

from __future__ import annotations

import os

from adalayer_native import _C
from adalayer_native.engine.metadata import described_by
from adalayer_native.engine.parts import WEIGHTS, NativePart
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.steps import Step
from adalayer_native.errors import FileFormatError
from adalayer_native.files import PACKED, kind_of

__all__ = ["load"]


# A file that needs more, its weights and tables on this machine and one call's tensors included, is
# refused. The same default as in the C interface.
_MAX_MEMORY = 4 << 30


def load(
    path: str | os.PathLike[str], *, weights: str = "measured", max_memory: int | None = None
) -> Engine:
    """An engine from a ``.ada`` file; neither the model nor torch.export is needed.

    The file may be untrusted: it can be refused or compute something else than it claims, no more
    (``SECURITY.md``).

    Args:
        weights: "measured", "streamed" or "resident"; see :func:`adalayer_native.compile`.
        max_memory: bytes that the file, the weights and tables made of it and the tensors of one
            call may take in all; default 4 GiB. Nothing of that size is allocated before the check.
            Forms of weights that take more than they must (Winograd) are left out without room.

    Raises:
        ValueError: an unknown form of weights, or a limit below 1.
        FileFormatError: missing, truncated or damaged file, one of a newer version, or one that
            needs more memory than allowed. Of a packed model file, which :func:`.restore` opens,
            it says so.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    limit = _MAX_MEMORY if max_memory is None else max_memory
    if limit < 1:
        raise ValueError(f"max_memory must be at least 1 byte, got {max_memory}")
    try:
        program = _C.Program.load(os.fspath(path), limit)
    except OSError as error:
        raise FileFormatError(f"{os.fspath(path)}: cannot be read: {error}") from error
    except (ValueError, MemoryError) as error:
        hint = ""
        if kind_of(path) == PACKED:
            hint = "; it is a packed model file: adalayer_native.restore(model, path) opens it"
        raise FileFormatError(f"{os.fspath(path)}: {error}{hint}") from error
    try:
        # RecursionError: json and nest() follow the text as deep as it goes.
        interface, order, outputs = described_by(program)
        part = NativePart(program, outputs, weights, limit)
        first = len(interface.inputs)
        step = Step(part, order, [first + k for k in range(len(outputs))], [])
        return Engine([step], interface)
    except MemoryError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise FileFormatError(
            f"{os.fspath(path)}: its metadata do not describe its program ({error!r})"
        ) from error
