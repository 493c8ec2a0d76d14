"""What a replica runs: an engine with named inputs and outputs."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..detection import Detection, named
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = [
    "Description",
    "EngineRunner",
    "Input",
    "Runner",
    "TensorInfo",
    "check_inputs",
    "open_runner",
]

Array = npt.NDArray[np.float32]
Input = npt.NDArray[Any]  # float32 or int32, see TensorInfo.dtype


# Of token ids, by the name of torch's type: the front loads no torch.
_ANY = 1 << 31
_DATATYPES = {"torch.int64": "INT64", "torch.int32": "INT32"}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Attributes:
        name: as the model calls it.
        shape: sizes without the batch.
        datatype: of the protocol: FP32, or INT64 or INT32 for an input of token ids.
        rows: how many ids there are, where that is known.
        free: empty where all sizes are fixed; else per axis of ``shape`` None, or of a free one its
            name, the smallest and largest size, and what it is a multiple of. Of an output: whether
            the size follows from the inputs', where only that counts.
    """

    name: str
    shape: tuple[int, ...]
    datatype: str = "FP32"
    rows: int | None = None
    free: tuple[tuple[str, int, int, int] | None, ...] = ()

    @property
    def is_ids(self) -> bool:
        """Whether it holds token ids, int32 on the way to the replica, and not float32."""
        return self.datatype != "FP32"

    @property
    def dtype(self) -> type[np.float32] | type[np.int32]:
        """Of an array for the replica."""
        return np.int32 if self.is_ids else np.float32

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether these sizes, without the batch, are allowed."""
        if len(shape) != len(self.shape):
            return False
        free = self.free or (None,) * len(shape)
        return all(
            n == own if axis is None else axis[1] <= n <= axis[2] and n % axis[3] == 0
            for n, own, axis in zip(shape, self.shape, free, strict=True)
        )

    def at(self, shape: Sequence[int]) -> TensorInfo:
        """The same at another size."""
        return self if tuple(shape) == self.shape else replace(self, shape=tuple(shape))

    @property
    def shown(self) -> list[int]:
        """Sizes, -1 for free ones."""
        free = self.free or (None,) * len(self.shape)
        return [n if axis is None else -1 for n, axis in zip(self.shape, free, strict=True)]

    def __str__(self) -> str:
        free = self.free or (None,) * len(self.shape)
        sizes = [
            str(n)
            if axis is None
            else f"{axis[1]}..{axis[2]}" + ("" if axis[3] == 1 else f" by {axis[3]}")
            for n, axis in zip(self.shape, free, strict=True)
        ]
        return f"[{', '.join(['batch', *sizes])}]"

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
        detection: of a detector which outputs are boxes and scores, or None.
        softmax: whether the first output is probabilities already.
        platform: name for the metadata.
        most_output: bytes of one sample's outputs at the largest sizes.
        levels: of quality.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    preprocessing: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    detection: Detection | None = None
    softmax: bool = False
    platform: str = "adalayer_ada"
    most_output: int = 0
    levels: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = asdict(self)
        if self.detection is not None:
            found["detection"] = self.detection.as_dict()
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Description:
        """From :meth:`as_dict`."""

        def infos(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
            return tuple(
                TensorInfo(
                    str(r["name"]),
                    tuple(map(int, r["shape"])),
                    str(r["datatype"]),
                    None if r["rows"] is None else int(r["rows"]),
                    tuple(
                        None if a is None else (str(a[0]), int(a[1]), int(a[2]), int(a[3]))
                        for a in r["free"]
                    ),
                )
                for r in rows
            )

        names = data["class_names"]
        return cls(
            infos(data["inputs"]),
            infos(data["outputs"]),
            data["preprocessing"],
            None if names is None else tuple(map(str, names)),
            None if data["detection"] is None else Detection.from_dict(data["detection"]),
            bool(data["softmax"]),
            str(data["platform"]),
            int(data["most_output"]),
            int(data["levels"]),
        )


class Runner(Protocol):
    """A loaded model. Benchmarks serve other runtimes by giving another one."""

    description: Description

    def run(self, inputs: Sequence[Input], level: int = 0) -> list[Array]:
        """A batch: ``[n, ...]`` per input in, float32 or int32 as :attr:`TensorInfo.dtype` says;
        contiguous float32 ``[n, ...]`` out. ``level``: of those that the description has; 0 is
        not said.

        The inputs' memory is used again after the call.
        """
        ...


class EngineRunner:
    """A ``.ada`` file."""

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        import adalayer_native as ada

        ada.set_num_threads(threads)
        engine = ada.load(path)
        check_inputs(engine)
        # All of them from now on: when a lower one is wanted, there is no time to make it.
        self._engines = [engine.at_quality(level) for level in range(engine.levels)]
        inputs = tuple(
            TensorInfo(port.name, tuple(port.shape), free=_free(port))
            if port.is_float
            else TensorInfo(
                port.name,
                tuple(port.shape),
                _DATATYPES[str(port.dtype)],
                engine.tables.get(port.name),
                _free(port),
            )
            for port in engine.inputs
        )
        zeros = [np.zeros((1, *info.shape), info.dtype) for info in inputs]
        result, *_ = [each.run_flat(zeros) for each in self._engines]  # also warms up
        leaves = list(named(result).items())
        outputs = tuple(
            TensorInfo(
                name,
                tuple(value.shape[1:]),
                free=tuple(("", 1, _ANY, 1) if follows else None for follows in free),
            )
            for (name, value), free in zip(
                leaves, engine.following_outputs() or [()] * len(leaves), strict=True
            )
        )
        self._single = isinstance(result, np.ndarray)
        names = engine.class_names
        if engine.detection is not None:
            engine.detection.check({info.name: info.shape for info in outputs})
        self.description = Description(
            inputs,
            outputs,
            engine.preprocessing,
            None if names is None else tuple(names),
            engine.detection,
            self._single and engine.coverage(rounds=0).rows[-1].op == "softmax",
            most_output=engine.most_output_bytes(),
            levels=engine.levels,
        )

    def run(self, inputs: Sequence[Input], level: int = 0) -> list[Array]:
        """See :class:`Runner`."""
        result = self._engines[level].run_flat(inputs)
        if self._single:
            return [np.ascontiguousarray(result)]
        return [np.ascontiguousarray(value) for value in named(result).values()]


def _free(port: Any) -> tuple[tuple[str, int, int, int] | None, ...]:
    return tuple(
        None
        if axis is None
        else (axis.name, axis.size.first, axis.size.last, axis.size.multiple_of)
        for axis in port.axes
    )


def check_inputs(engine: Engine) -> None:
    """Whether the server can serve it.

    Raises:
        UnsupportedModelError: an input that is no batch of floats or of token ids.
    """
    for port in engine.inputs:
        if not ((port.is_float or str(port.dtype) in _DATATYPES) and port.batched):
            raise UnsupportedModelError(
                f"input {port.name!r}: the server takes batches of floats and of token ids (int64 "
                f"or int32), the model {port.dtype} {port}"
            )


def open_runner(name: str) -> Callable[[str, int], Runner]:
    """The callable that ``module:callable`` names."""
    module, _, attribute = name.partition(":")
    found: Callable[[str, int], Runner] = getattr(importlib.import_module(module), attribute)
    return found
