"""How an engine is called, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adalayer_native.detection import Detection
from adalayer_native.engine.call import Call
from adalayer_native.engine.parts import type_name, whole_numbers
from adalayer_native.engine.results import ID_TYPES, Port
from adalayer_native.errors import InputError

__all__ = ["Interface"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Interface:
    """What an engine's callers see of it, whatever computes its results.

    Attributes:
        inputs: in the order of the model's arguments.
        leaves: per leaf of ``out_spec`` its tensor's number as Leaf, or a constant.
        out_spec: containers of the result, a ``TreeSpec``.
        call: how arguments become inputs.
        preprocessing, class_names, detection, least_batch: see
            :class:`~adalayer_native.engine.Engine`.
    """

    inputs: tuple[Port, ...]
    leaves: list[Any]
    out_spec: Any
    call: Call
    preprocessing: Any = None
    class_names: list[str] | None = None
    detection: Detection | None = None
    least_batch: int = 1

    def label(self, position: int) -> str:
        """What messages call an input."""
        if position < len(self.inputs):
            return f"input {self.inputs[position].name!r}"
        return f"input {position}"

    def checked(
        self, inputs: Sequence[Any], device: torch.device
    ) -> tuple[list[Tensor], torch.dtype | None]:
        """The inputs, and the type of those that are floats; None if there are none.

        Raises:
            InputError: number, type, device, shape or batch of an input is wrong.
        """
        if len(inputs) != len(self.inputs):
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(f"expected {len(self.inputs)} inputs ({names}), got {len(inputs)}")
        found: list[Tensor] = []
        batch: int | None = None
        floats: torch.dtype | None = None
        for position, (x, port) in enumerate(zip(inputs, self.inputs, strict=True)):
            label = self.label(position)
            if not isinstance(x, Tensor):
                raise InputError(f"{label}: expected a torch.Tensor, got {type(x).__name__}")
            if port.is_float and x.dtype not in _FLOATS:
                raise InputError(
                    f"{label}: expected torch.float32 (or bfloat16, float16), got {x.dtype}"
                )
            ids = port.dtype in ID_TYPES
            if not port.is_float and x.dtype != port.dtype and not (ids and x.dtype in ID_TYPES):
                raise InputError(f"{label}: expected {port.dtype}, got {x.dtype}")
            if x.device != device:
                raise InputError(f"{label}: expected a tensor on {device}, got one on {x.device}")
            if x.layout != torch.strided:
                raise InputError(f"{label}: expected a dense tensor, got layout {x.layout}")
            shape = tuple(x.shape)
            if len(shape) != len(port.shape) + port.batched or not port.fits(shape[port.batched :]):
                raise InputError(f"{label}: expected shape {port}, got {list(shape)}")
            if port.batched:
                if batch is not None and shape[0] != batch:
                    raise InputError(
                        f"{label}: expected a batch of {batch} as in the first input, got "
                        f"{shape[0]}"
                    )
                batch = shape[0]
            if port.is_float:
                if floats is not None and x.dtype != floats:
                    raise InputError(
                        f"{label}: expected {floats} as in the first input, got {x.dtype}"
                    )
                floats = x.dtype
            found.append(whole_numbers(x, port.dtype, label) if ids else x)
        if batch is not None and 0 < batch < self.least_batch:
            raise InputError(
                f"{self.label(0)}: expected a batch of {self.least_batch} or more, got {batch}; "
                "the model treats one sample otherwise: squeeze() without an axis, for one, drops "
                "the batch, where flatten(1) or squeeze(-1) would not"
            )
        return found, floats

    def tensors_of(self, arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
        """Numpy arrays as tensors, which share their memory where they can.

        Raises:
            InputError: an array of a type that the input does not have.
        """
        tensors = []
        for position, item in enumerate(arrays):
            array = np.asarray(item)
            floats = position >= len(self.inputs) or self.inputs[position].is_float
            known = ("float32", "float16") if floats else _alike(self.inputs[position].dtype)
            if array.dtype.name not in known:
                raise InputError(
                    f"{self.label(position)}: expected an array of {known[0]}, got {array.dtype}"
                )
            if not array.flags.writeable or any(stride < 0 for stride in array.strides):
                array = array.copy()
            tensors.append(torch.from_numpy(array).to(device))
        return tensors


def _alike(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the types that an input of whole numbers may have, its own first."""
    others = [item for item in ID_TYPES if item != dtype] if dtype in ID_TYPES else []
    return tuple(map(type_name, (dtype, *others)))
