"""What a comparison has found, as rows, a table and JSON."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adalayer_native._files import read_json, require_file, write_text_atomic
from adalayer_native.errors import FileFormatError

__all__ = ["COMPARISON_FORMAT", "Comparison", "Row", "Suggestion", "decibels"]

COMPARISON_FORMAT = "adalayer-comparison"
COMPARISON_VERSION = 1
SHOWN = 20  # rows that a table on a terminal has, the worst ones


def decibels(error: float | None) -> float | None:
    """Signal to noise of a relative squared error, in dB; infinite without error."""
    if error is None:
        return None
    return math.inf if error == 0 else -10 * math.log10(error) if error < math.inf else -math.inf


@dataclass(frozen=True)
class Row:
    """One layer, or one value between layers.

    Errors are squared differences from the float model over the square of its values; of a layer
    those of its sums, before a residual is added and anything is clamped. ``None`` is what there is
    not: a layer in float has no grid, a value between layers no weights.

    Attributes:
        name: of the layer, or of the value: ``act_quant.`` and the float model's operation.
        kind: ``"conv2d"``, ``"conv_transpose2d"``, ``"linear"`` or ``"value"``.
        place: in the network, from 0 on.
        bits: of the weights; None in float.
        input_bits: of the grid of its input, or of the value's.
        own: error with the float model's inputs: weights and inputs rounded.
        weights: error with the weights alone rounded.
        activations: error with the inputs alone rounded.
        accumulated: error with the inputs that the native network has.
        cosine: between the float model's results and those.
        clipped: share of the float model's values that are beyond the grid by over half a step.
        clipping: share of the squared error of the grid that those have.
        calibrated: lowest and highest value of the grid.
        observed: of the float model's values.
        finding: what is wrong, in words; else empty.
    """

    name: str
    kind: str
    place: int
    bits: int | None
    input_bits: int | None
    own: float
    weights: float | None
    activations: float | None
    accumulated: float
    cosine: float
    clipped: float | None
    clipping: float | None
    calibrated: tuple[float, float] | None
    observed: tuple[float, float]
    finding: str = ""

    @property
    def snr(self) -> float:
        """Signal to noise of the accumulated error in dB."""
        found = decibels(self.accumulated)
        assert found is not None
        return found


@dataclass(frozen=True)
class Suggestion:
    """One change, and what it did to the network's error on data that it was not chosen by.

    Attributes:
        name: the layer or value that is changed.
        kind: ``"bits"`` (of the weights), ``"range"`` (of a grid), ``"input_bits"``, ``"float"``
            (the layer is excluded), or ``"all"`` (all other suggestions together).
        text: the change in words.
        value: bits, or the new lowest and highest value; None for ``"float"`` and ``"all"``.
        bytes: by which packed weights grow.
        before, after: the network's error without and with it.
        changes: of ``"all"``: the others.
    """

    name: str
    kind: str
    text: str
    value: int | tuple[float, float] | None
    bytes: int
    before: float
    after: float
    changes: tuple[Suggestion, ...] = ()
    _apply: Callable[[Any], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def recovered(self) -> float:
        """Share of the network's error that it takes away, at most 1."""
        return 1 - self.after / self.before

    def apply(self, native: Any) -> Any:
        """A copy of the converted model that was compared, with the change.

        It runs and compiles as that one does. (``calibrate`` and ``repair`` after an edit of the
        plan may do better than the change alone.)

        Raises:
            ValueError: of a comparison that was read from a file, or another model.
        """
        if self._apply is None:
            raise ValueError(
                "a comparison from a file cannot change a model; compare it again, or edit the plan"
            )
        try:
            return self._apply(native)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"{type(native).__name__} is not the converted model that was compared"
            ) from error


@dataclass
class Comparison:
    """Rows, worst own error first, and suggestions, most recovered first.

    Attributes:
        rows: layers and values between them.
        error: the network's, on the data of the table; see
            :func:`~adalayer_native.importance.outputs.distance`.
        measure: what that is: ``"kl_divergence"``, ``"squared_error"`` or both; ``"task_loss"`` or
            ``"loss_fn"`` where one was given.
        samples: of the table; judging: samples that suggestions were judged on.
        suggestions: each with its effect; empty if none lowers the error.
        together: all of them at once; None with fewer than two.
        note: why there are no suggestions, or what has to be known about the numbers; else empty.
        engine: of an engine: share of output values with the native model's bits, and the signal
            to noise between the two in dB.
    """

    rows: tuple[Row, ...]
    error: float
    measure: str
    samples: int
    judging: int = 0
    suggestions: tuple[Suggestion, ...] = ()
    together: Suggestion | None = None
    note: str = ""
    engine: dict[str, float | None] | None = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of a layer or value.

        Raises:
            KeyError: there is none; names those that there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are {', '.join(row.name for row in self.rows)}")

    # -- JSON -----------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """JSON values. Signal to noise is in dB, null where there is no error at all."""
        rows = []
        for row in self.rows:
            entry = {key: _plain(value) for key, value in asdict(row).items()}
            for kind in ("own", "weights", "activations", "accumulated"):
                entry[f"{kind}_snr_db"] = _finite(decibels(getattr(row, kind)))
                entry[kind] = _finite(entry[kind])
            rows.append(entry)
        return {
            "format": COMPARISON_FORMAT,
            "version": COMPARISON_VERSION,
            "error": _finite(self.error),
            "measure": self.measure,
            "samples": self.samples,
            "judging": self.judging,
            "note": self.note,
            "engine": self.engine,
            "rows": rows,
            "suggestions": [_entry(item) for item in self.suggestions],
            "together": None if self.together is None else _entry(self.together),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; the file is replaced as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_text_atomic(path, json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what :meth:`save` wrote; its suggestions can be read, not applied.

        Raises:
            FileFormatError: missing, damaged, or of another kind or version.
        """
        source = os.fspath(path)
        require_file(path)
        data = read_json(path, (COMPARISON_FORMAT, COMPARISON_VERSION))
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{source}: not a complete comparison: {error!r}") from None

    # -- for people -----------------------------------------------------------------------------

    def table(self, rows: int | None = SHOWN) -> Table:
        """The worst rows; all of them with ``None``."""
        shown = self.rows if rows is None else self.rows[:rows]
        table = Table(title=escape(self.summary()))
        for heading in ("Layer", "Bits"):
            table.add_column(heading)
        for heading in (
            "SNR dB", "own", "weights", "inputs", "cosine", "clipped %", "calibrated", "observed",
        ):  # fmt: skip
            table.add_column(heading, justify="right")
        table.add_column("Finding")
        for row in shown:
            table.add_row(*(escape(text) for text in _cells(row)))
        lines = [
            "SNR: with the inputs that the compressed network has; own: with the float network's, "
            "weights: of those alone, inputs: of those alone rounded"
        ]
        if len(shown) < len(self.rows):
            lines.append(
                f"{len(self.rows) - len(shown)} rows with smaller own errors are not shown"
            )
        if self.note:
            lines.append(self.note)
        table.caption = escape("; ".join(lines))
        return table

    def suggestion_table(self) -> Table | None:
        """Suggestions with their effects; None without any."""
        if not self.suggestions:
            return None
        table = Table(title=f"What would recover most, measured on {self.judging} other samples")
        for heading in ("Layer", "Change"):
            table.add_column(heading)
        for heading in ("more bytes", "error before", "after", "recovered %"):
            table.add_column(heading, justify="right")
        for item in (*self.suggestions, *([self.together] if self.together else [])):
            table.add_row(
                escape(item.name), escape(item.text), f"{item.bytes:,}", f"{item.before:.3g}",
                f"{item.after:.3g}", f"{100 * item.recovered:.1f}",
            )  # fmt: skip
        return table

    def summary(self) -> str:
        """The network's error in a sentence."""
        return f"{self.measure.replace('_', ' ')} {self.error:.3g} over {self.samples} samples"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Table]:
        yield self.table()
        suggestions = self.suggestion_table()
        if suggestions is not None:
            yield suggestions

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=180, color_system=None).print(self)
        return text.getvalue()


def number(value: float | None, digits: str = ".1f") -> str:
    """A number, nothing where there is none, and words for no error at all."""
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:{digits}}"


def width(row: Row) -> str:
    """Bits of weights and input: ``"4 / 8"``."""
    if row.bits is None and row.input_bits is None:
        return "float"
    return f"{'' if row.bits is None else f'{row.bits} / '}{row.input_bits}"


def interval(ends: tuple[float, float] | None) -> str:
    """Two ends of a range."""
    return "" if ends is None else f"{ends[0]:.3g} … {ends[1]:.3g}"


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        width(row),
        number(row.snr),
        *(number(decibels(value)) for value in (row.own, row.weights, row.activations)),
        f"{row.cosine:.4f}",
        "" if row.clipped is None else f"{100 * row.clipped:.2f}",
        interval(row.calibrated),
        interval(row.observed),
        row.finding,
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _entry(item: Suggestion) -> dict[str, Any]:
    keys = ("name", "kind", "text", "value", "bytes", "before", "after")
    entry = {key: _plain(getattr(item, key)) for key in keys} | {"recovered": item.recovered}
    if item.changes:
        entry["changes"] = [change.name for change in item.changes]
    return entry


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pair(value: Any) -> Any:
    return tuple(float(end) for end in value) if isinstance(value, list) else value


def _number_or(value: Any, other: float) -> float:
    return other if value is None else float(value)


def _read(data: Mapping[str, Any]) -> Comparison:
    rows = []
    for entry in data["rows"]:
        values = {f.name: _pair(entry[f.name]) for f in fields(Row)}
        for kind in ("own", "accumulated"):  # what no JSON number can say
            values[kind] = _number_or(values[kind], math.inf)
        rows.append(Row(**values))
    suggestions = [_suggestion(entry) for entry in data["suggestions"]]
    together = data["together"]
    if together is not None:
        named = {item.name: item for item in suggestions}
        changes = tuple(named[name] for name in together["changes"])
        together = _suggestion(together, changes)
    return Comparison(
        rows=tuple(rows),
        error=_number_or(data["error"], math.inf),
        measure=str(data["measure"]),
        samples=int(data["samples"]),
        judging=int(data["judging"]),
        suggestions=tuple(suggestions),
        together=together,
        note=str(data["note"]),
        engine=data["engine"],
    )


def _suggestion(entry: Mapping[str, Any], changes: tuple[Suggestion, ...] = ()) -> Suggestion:
    return Suggestion(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        text=str(entry["text"]),
        value=_pair(entry["value"]),
        bytes=int(entry["bytes"]),
        before=float(entry["before"]),
        after=float(entry["after"]),
        changes=changes,
    )
