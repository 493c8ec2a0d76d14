"""What a replica runs: an engine with named inputs and outputs."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["Description", "EngineRunner", "Runner", "TensorInfo", "check_inputs", "open_runner"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """Name and sizes without the batch of a float32 input or output."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one sample."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Description:
    """What the front has to know about a model.

    Attributes:
        inputs, outputs: in the order of :meth:`Runner.run`.
        preprocessing: what images need, or None.
        class_names: or None.
        softmax: whether the first output is probabilities already.
        platform: name for the metadata.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    preprocessing: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    softmax: bool = False
    platform: str = "adalayer_ada"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Description:
        """From :meth:`as_dict`."""

        def infos(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
            return tuple(TensorInfo(str(r["name"]), tuple(map(int, r["shape"]))) for r in rows)

        names = data["class_names"]
        return cls(
            infos(data["inputs"]),
            infos(data["outputs"]),
            data["preprocessing"],
            None if names is None else tuple(map(str, names)),
            bool(data["softmax"]),
            str(data["platform"]),
        )


class Runner(Protocol):
    """A loaded model. Benchmarks serve other runtimes by giving another one."""

    description: Description

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """A batch: float32 ``[n, ...]`` per input in, contiguous float32 ``[n, ...]`` out.

        The inputs' memory is used again after the call.
        """
        ...


class EngineRunner:
    """A ``.ada`` file."""

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        import adalayer_native as ada

        ada.set_num_threads(threads)
        self._engine = ada.load(path)
        engine = self._engine
        inputs = tuple(TensorInfo(port.name, tuple(port.shape)) for port in engine.inputs)
        check_inputs(engine)
        zeros = [np.zeros((1, *info.shape), np.float32) for info in inputs]
        leaves = _leaves(engine.run_flat(zeros), "")  # also warms up
        outputs = tuple(
            TensorInfo(name.lstrip(".") or "output", tuple(value.shape[1:]))
            for name, value in leaves
        )
        self._single = len(leaves) == 1 and leaves[0][0] == ""
        names = engine.class_names
        self.description = Description(
            inputs,
            outputs,
            engine.preprocessing,
            None if names is None else tuple(names),
            self._single and engine.coverage(rounds=0).rows[-1].op == "softmax",
        )

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See :class:`Runner`."""
        result = self._engine.run_flat(inputs)
        if self._single:
            return [np.ascontiguousarray(result)]
        return [np.ascontiguousarray(value) for _, value in _leaves(result, "")]


def check_inputs(engine: Engine) -> None:
    """Whether the server can serve it.

    Raises:
        UnsupportedModelError: an input that is no batch of floats.
    """
    for port in engine.inputs:
        if not (port.is_float and port.batched):
            raise UnsupportedModelError(
                f"input {port.name!r}: the server takes batches of floats, the model "
                f"{port.dtype} {port}"
            )


def _leaves(nested: Any, prefix: str) -> list[tuple[str, Array]]:
    """Arrays of a nested result with dotted names; constants in between are left out."""
    if isinstance(nested, np.ndarray):
        return [(prefix, nested)]
    items: Sequence[tuple[str, Any]] = ()
    if isinstance(nested, dict):
        items = [(f"{prefix}.{key}", value) for key, value in nested.items()]
    elif isinstance(nested, (list, tuple)):
        start = prefix or ".output"
        items = [(f"{start}_{k}", value) for k, value in enumerate(nested)]
    return [leaf for name, value in items for leaf in _leaves(value, name)]


def open_runner(name: str) -> Callable[[str, int], Runner]:
    """The callable that ``module:callable`` names."""
    module, _, attribute = name.partition(":")
    found: Callable[[str, int], Runner] = getattr(importlib.import_module(module), attribute)
    return found
