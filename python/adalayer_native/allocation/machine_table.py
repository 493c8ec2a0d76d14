"""The latencies of one machine in a file, so that plans for it can be made on another.

They are those of nodes by what these have to do (:mod:`~adalayer_native.engine.shapes`), not by
name: a table serves every network whose nodes all occur in what was measured. Where several nodes
are alike, the table has their mean.

The file is JSON; docs/latency-tables.md describes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._files import require_file, write_text_atomic
from .._version import __version__
from ..errors import FileFormatError, PlanError
from .layer_table import LayerTable
from .options import UNSTRUCTURED, Choice, Option

__all__ = ["MachineTable", "ShapeTimes", "Task"]

FORMAT, VERSION = "adalayer latencies", 1
NAMED = 3  # shapes that a message names, at most
_MOST_BYTES = 64 << 20


class Task(NamedTuple):
    """One node of a network that a plan is made for.

    Attributes:
        layer: whose bits are to be decided; "" where nothing is.
        shape: what it has to do.
        option: what is decided about it; ``None`` where it has no packed weights.
    """

    layer: str
    shape: str
    option: Option | None = None


@dataclass
class ShapeTimes:
    """Of the nodes that have one thing to do.

    Attributes:
        microseconds: per call, one per option of the table.
        kernels: what ran them, likewise; of nodes without packed weights there is none.
    """

    microseconds: list[float] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)


@dataclass
class MachineTable:
    """Microseconds of nodes on one machine.

    Attributes:
        machine: processor, instruction set, kernels and threads
            (:func:`~adalayer_native.allocation.store.machine`).
        batch: images per call.
        activation_bits: of the inputs that options say nothing about.
        options: the columns.
        shapes: times by what there is to do.
        programs: hash of what was measured.
        reference: microseconds of a call of the network at 8 bits, when it was first timed.
        package: version of the package that measured.
        source: the file, for messages.
    """

    machine: dict[str, Any]
    batch: int
    activation_bits: int
    options: list[Option] = field(default_factory=list)
    shapes: dict[str, ShapeTimes] = field(default_factory=dict)
    programs: str = ""
    reference: float | None = None
    package: str = __version__
    source: str = "the latency table"

    # -- the file -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, as a whole or not at all."""
        entries = [{"shape": shape, **vars(times)} for shape, times in self.shapes.items()]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "package": self.package,
            "machine": self.machine,
            "batch": self.batch,
            "activation_bits": self.activation_bits,
            "programs": self.programs,
            "reference": self.reference,
            "options": [option.values for option in self.options],
            "shapes": [{k: v for k, v in entry.items() if v != []} for entry in entries],
        }
        document["sha256"] = _digest(document)
        lines = [f"{json.dumps(k)}: {_lines(v)}" for k, v in document.items()]
        write_text_atomic(path, "{" + ",\n ".join(lines) + "}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MachineTable:
        """A table from its file.

        Raises:
            FileFormatError: no file, one that is damaged or of another kind or version, or one that
                was measured with other kernels than this package has.
        """
        name = os.fspath(path)
        require_file(path, "latency table")
        if os.path.getsize(path) > _MOST_BYTES:
            raise FileFormatError(
                f"{name}: {os.path.getsize(path):,} bytes; expected a latency table, at most "
                f"{_MOST_BYTES:,}"
            )
        try:
            with open(path, encoding="utf-8") as stream:
                document = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(
                f"{name}: cut off or damaged: expected the JSON that `adalayer profile` writes, "
                f"got: {error}"
            ) from None
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise FileFormatError(
                f"{name}: expected a file of format {FORMAT!r} (adalayer profile writes them), "
                f"got {found!r}"
            )
        if document.get("version") != VERSION:
            raise FileFormatError(
                f"{name}: expected version {VERSION} of the format, got {document.get('version')!r}"
            )
        written = document.pop("sha256", None)
        if written != _digest(document):
            raise FileFormatError(
                f"{name}: damaged, or changed by hand: its contents have the checksum "
                f"{_digest(document)}, expected {written}"
            )
        try:
            table = _parsed(document)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{name}: not a latency table: {error!r}") from None
        table.source = name
        kernels = _C.kernels_key()
        if table.machine["kernels"] != kernels:
            raise FileFormatError(
                f"{name}: measured with other kernels: expected {kernels} (this package, "
                f"{__version__}), got {table.machine['kernels']} (package {table.package}); "
                "measure it again there with this version"
            )
        return table

    # -- looking up -----------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Whose times these are, in words."""
        of = self.machine
        threads = f"{of['threads']} thread{'s' if of['threads'] != 1 else ''}"
        return f"{of['cpu']}, {of['isa']}, {threads}, batch {self.batch}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that were measured."""
        return tuple(sorted({option.bits for option in self.options if option.bits}))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Shares of zeros at places without a pattern."""
        found = {o.sparsity for o in self.options if o.pattern == UNSTRUCTURED}
        return tuple(sorted(found))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of zeros, the unstructured one first."""
        found = dict.fromkeys(option.pattern for option in self.options)
        return (UNSTRUCTURED, *(p for p in found if p != UNSTRUCTURED))

    @property
    def input_widths(self) -> tuple[int, ...]:
        """Bits of inputs besides the usual ones, the most first."""
        found = {o.activation_bits for o in self.options if o.activation_bits is not None}
        return tuple(sorted(found, reverse=True))

    def time(self, shape: str, option: Option | None) -> float:
        """Microseconds of one node; ``None``: of one without packed weights.

        Raises:
            PlanError: an option that the table lacks.
        """
        times = self.shapes[shape].microseconds
        if option is None:
            usual = [t for t, o in zip(times, self.options, strict=True) if not o.activation_bits]
            return float(np.median(usual))
        return times[self._column(option)]

    def _column(self, option: Option) -> int:
        try:
            return self.options.index(option)
        except ValueError:
            raise PlanError(
                f"{self.source}: no times of {_in_words(option)}; it has weights of "
                f"{_listed(self.widths)} bits with {_listed(self.sparsities)} of zeros, patterns "
                f"{', '.join(self.patterns)}, and inputs of "
                f"{_listed((self.activation_bits, *self.input_widths))} bits"
            ) from None

    def latencies(
        self,
        tasks: Sequence[Task],
        layers: Sequence[str],
        *,
        widths: Sequence[int],
        sparsities_of: Callable[[str], Sequence[float]],
        patterns: Sequence[str],
        input_widths: Sequence[int],
    ) -> LayerTable:
        """A network's table, as if it had been measured there.

        Args:
            tasks: all nodes of the network.
            layers: those that are decided about.
            widths, sparsities_of, patterns, input_widths: the options.

        Raises:
            PlanError: names the nodes, or the options, that were not measured.
        """
        self._require(tasks)
        parts = []
        for activation_bits in (None, *input_widths):
            for pattern in patterns:
                sparsities = tuple(sparsities_of(pattern))
                values = np.zeros((len(layers), len(widths), len(sparsities)))
                for task in tasks:
                    if not task.layer:
                        continue
                    row = list(layers).index(task.layer)
                    for i, bits in enumerate(widths):
                        for j, sparsity in enumerate(sparsities):
                            where = pattern if sparsity > 0 else UNSTRUCTURED
                            option = Option(bits, sparsity, where, activation_bits)
                            values[row, i, j] += self.time(task.shape, option)
                parts.append(
                    LayerTable(
                        "latency", "µs", tuple(layers), tuple(widths), sparsities, values,
                        pattern=pattern, activation_bits=activation_bits,
                    )
                )  # fmt: skip
        table = parts[0]
        table.others = tuple(parts[1:])
        table.constant = sum(self.time(t.shape, t.option) for t in tasks if not t.layer)
        table.about = {"batch": self.batch, **self.machine}
        return table

    def _require(self, tasks: Sequence[Task]) -> None:
        """All nodes are there."""
        missing = list(dict.fromkeys(t for t in tasks if t.shape not in self.shapes))
        if missing:
            shown = [f"{t.layer!r}: {t.shape}" if t.layer else t.shape for t in missing[:NAMED]]
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise PlanError(
                f"{self.source}: no times of {'; '.join(shown)}{more}. It was measured on "
                f"{self.title}, with another network or image size: expected one that has all "
                "shapes of this one"
            )

    def kernels(self, tasks: Sequence[Task], choice: Choice) -> dict[str, str]:
        """What ran every layer with its option; between measured sparsities, at the next one."""
        found: dict[str, str] = {}
        for task in tasks:
            if task.layer in choice and task.layer not in found:
                found[task.layer] = self._kernel(task.shape, choice[task.layer])
        return found

    def _kernel(self, shape: str, wanted: Option) -> str:
        def distance(column: int) -> tuple[bool, float]:
            option = self.options[column]
            return option.pattern != wanted.pattern, abs(option.sparsity - wanted.sparsity)

        alike = [
            column
            for column, option in enumerate(self.options)
            if (option.bits, option.activation_bits) == (wanted.bits, wanted.activation_bits)
        ]
        return self.shapes[shape].kernels[min(alike, key=distance)] if alike else ""


def _lines(value: Any) -> str:
    """JSON, with a line for each shape."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    return "[\n  " + ",\n  ".join(_lines(entry) for entry in value) + "]"


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _parsed(document: dict[str, Any]) -> MachineTable:
    machine = {key: document["machine"][key] for key in ("kernels", "cpu", "isa", "threads")}
    options = [_option(values) for values in document["options"]]
    shapes = {}
    for entry in document["shapes"]:
        times = ShapeTimes([float(t) for t in entry["microseconds"]], entry.get("kernels", []))
        if len(times.microseconds) != len(options) or not all(
            math.isfinite(t) and t >= 0 for t in times.microseconds
        ):
            raise ValueError(f"{entry['shape']}: expected {len(options)} times, 0 or more")
        if times.kernels and len(times.kernels) != len(options):
            raise ValueError(f"{entry['shape']}: expected {len(options)} kernels")
        shapes[str(entry["shape"])] = times
    return MachineTable(
        machine,
        int(document["batch"]),
        int(document["activation_bits"]),
        options,
        shapes,
        str(document["programs"]),
        document["reference"],
        str(document["package"]),
    )


def _option(values: Sequence[Any]) -> Option:
    """The reverse of :attr:`Option.values`."""
    option = Option(int(values[0]), float(values[1]))
    if len(values) > 2:
        option = option._replace(pattern=str(values[2]))
    return option if len(values) < 4 else option._replace(activation_bits=int(values[3]))


def _in_words(option: Option) -> str:
    words = f"weights of {option.bits} bits with {option.sparsity:g} of zeros"
    if option.pattern != UNSTRUCTURED:
        words += f" ({option.pattern})"
    if option.activation_bits is not None:
        words += f" and inputs of {option.activation_bits} bits"
    return words


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
