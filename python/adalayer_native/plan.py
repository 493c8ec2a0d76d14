"""The compression plan: for every layer how many bits its weights keep and how many are pruned.

A :class:`Plan` is plain data. It prints as a table, is edited by assignment
(``plan["conv1"].bits = 8``), round-trips through JSON, and decides nothing about how it is run;
where it was timed, it notes what ran.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._deprecated import renamed_fields
from ._files import require_file, write_text_atomic
from .errors import FileFormatError, PlanError, UnsupportedModelError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

__all__ = [
    "LayerPlan",
    "Plan",
    "float_text",
    "layer_kind",
    "protected_text",
    "supported_layers",
    "unknown_layer",
]

PLAN_FORMAT = "adalayer-plan"
PLAN_VERSION = 1
KINDS = ("conv2d", "conv_transpose2d", "linear")
PATTERNS = ("unstructured", "block16x64", "block32x64", "2:4")
MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (32, 64, 128)
SHOWN = 4  # protected layers below a table


@dataclass
class LayerPlan:
    """What happens to one layer's weight and to the activation that enters it.

    Values are checked when they are assigned (``plan["conv1"].bits = 6``) and when the plan is
    used or read.

    Attributes:
        name: the layer's name in ``model.named_modules()``.
        kind: ``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"``.
        params: number of weights (the bias is not counted).
        bits: bits per weight, 2 to 8; ``None`` leaves the layer in float.
        sparsity: share of weights set to zero, ``0 <= sparsity < 1``.
        pattern: how zeros are placed: ``"unstructured"``, ``"block16x64"``, ``"block32x64"`` or
            ``"2:4"`` (at sparsity 0.5); see :mod:`adalayer_native.pruning.patterns`.
        activation_bits: bits of the layer's input activation, 2 to 8.
        group_size: of a linear layer: 32, 64 or 128 input channels share a scale, and the last ones
            of an output may be fewer; ``None``: all of them do. It pays at 4 bits or fewer.
        kernel: what ran the layer where the plan's engine was timed
            (``"avx2 winograd 4x4, 32 of 36 taps s8"``); else empty. A note: another machine, or
            another plan, may run it otherwise.
    """

    name: str
    kind: str
    params: int
    bits: int | None
    sparsity: float = 0.0
    pattern: str = "unstructured"
    activation_bits: int = 8
    group_size: int | None = None
    kernel: str = ""

    def __setattr__(self, name: str, value: object) -> None:
        """Assign a value; after construction one that is out of range is refused at once."""
        if fields(self)[-1].name not in self.__dict__:  # still being constructed
            object.__setattr__(self, name, value)
            return
        if name not in {entry.name for entry in fields(self)}:
            known = ", ".join(entry.name for entry in fields(self))
            raise PlanError(f"plan of layer {self.name!r} has no {name!r}; it has {known}")
        before = getattr(self, name)
        object.__setattr__(self, name, value)
        try:
            self.check()
        except PlanError:
            object.__setattr__(self, name, before)
            raise
        if name != "kernel" and value != before:
            object.__setattr__(self, "kernel", "")  # that was the kernel of another layer

    def check(self) -> None:
        """Raise :class:`PlanError` where a value is out of range."""

        def bad(what: str, expected: str, got: object) -> PlanError:
            return PlanError(f"plan of layer {self.name!r}: {what} must be {expected}, got {got!r}")

        if self.kind not in KINDS:
            raise bad("kind", f"one of {KINDS}", self.kind)
        if not _is_int(self.params) or self.params < 0:
            raise bad("params", "a whole number >= 0", self.params)
        if self.bits is not None and not (_is_int(self.bits) and MIN_BITS <= self.bits <= MAX_BITS):
            raise bad("bits", f"a whole number from {MIN_BITS} to {MAX_BITS}, or None", self.bits)
        if (
            isinstance(self.sparsity, bool)
            or not isinstance(self.sparsity, (int, float))
            or not (math.isfinite(self.sparsity) and 0.0 <= self.sparsity < 1.0)
        ):
            raise bad("sparsity", "a number with 0 <= sparsity < 1", self.sparsity)
        if self.pattern not in PATTERNS:
            raise bad("pattern", f"one of {PATTERNS}", self.pattern)
        if self.pattern == "2:4" and self.sparsity not in (0.0, 0.5):
            raise bad("sparsity with pattern '2:4'", "0 or 0.5", self.sparsity)
        if not (_is_int(self.activation_bits) and MIN_BITS <= self.activation_bits <= MAX_BITS):
            raise bad(
                "activation_bits",
                f"a whole number from {MIN_BITS} to {MAX_BITS}",
                self.activation_bits,
            )
        if self.group_size is not None:
            if not _is_int(self.group_size) or self.group_size not in GROUP_SIZES:
                raise bad("group_size", f"one of {GROUP_SIZES}, or None", self.group_size)
            if self.kind != "linear":
                raise bad("group_size", f"None for a layer of kind {self.kind}", self.group_size)
        if not isinstance(self.kernel, str):
            raise bad("kernel", "text", self.kernel)

    @property
    def params_after(self) -> float:
        """Parameters after compression as the paper counts them: params * (1-P) * B / 32."""
        if self.bits is None:
            return float(self.params)
        return self.params * (1.0 - self.sparsity) * self.bits / 32.0


@renamed_fields(float_rest="float_work")
@dataclass
class Plan:
    """Plans of all layers, in the model's order.

    Attributes:
        layers: one :class:`LayerPlan` per layer, by name.
        method: how the plan came about (``"adalayer"``, ``"uniform"``, ..., ``"manual"``).
        hyper: the method's hyper-parameters as numbers.
        scores: per layer ``{"A": ..., "F": ..., "R": ..., "I": ...}`` where they are known, and
            ``"E"``, the loss increase that method ``"optimal"`` predicts for what the layer got,
            and ``"E_even"``, for what it would lose with ``measured["even_bits"]``.
        measured: what was measured when the plan was chosen (``"calibration_loss"``, ...), and
            ``"even_bits"``, the plan's mean width, rounded.
        float_work: what no plan for the model can make native, where it is known: by name of the
            layer or part of the model ``{"reason": ..., "share": ...}``, the share being that of
            the model's multiply-accumulates.
    """

    layers: dict[str, LayerPlan]
    method: str = "manual"
    hyper: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] | None = None
    measured: dict[str, float] = field(default_factory=dict)
    float_work: dict[str, dict[str, Any]] | None = None

    def __getitem__(self, name: str) -> LayerPlan:
        try:
            return self.layers[name]
        except KeyError:
            raise PlanError(unknown_layer(name, list(self.layers))) from None

    def __setitem__(self, name: str, value: LayerPlan | int | tuple[int, float] | None) -> None:
        """``plan[name] = bits``, ``(bits, sparsity)``, ``None`` for float, or a whole entry.

        Raises:
            PlanError: the plan has no such layer, or a value is out of range.
        """
        before = self[name]
        if isinstance(value, LayerPlan):
            entry = value
            if entry.name != name:
                raise PlanError(f"plan entry {name!r} cannot hold a plan for layer {entry.name!r}")
        else:
            bits, sparsity = value if isinstance(value, tuple) else (value, 0.0)
            entry = replace(before, bits=bits, sparsity=sparsity, kernel="")
        entry.check()
        self.layers[name] = entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    @property
    def average_bits(self) -> float:
        """Mean bits per weight over all layers; a float layer counts 32, a pruned weight 0."""
        total = sum(layer.params for layer in self.layers.values())
        if total == 0:
            return 0.0
        return 32.0 * sum(layer.params_after for layer in self.layers.values()) / total

    def protected(self) -> dict[str, str]:
        """Layers that got more bits than the plan's mean width, and why, the neediest first.

        The reason is what method ``"optimal"`` measured: what the layer alone would add to the loss
        at that width, and which share that is of what all layers would. Empty without it.
        """
        even = self.measured.get("even_bits")
        needs = {name: (self.scores or {}).get(name, {}).get("E_even", 0.0) for name in self.layers}
        total = sum(needs.values())
        if even is None or not total > 0:
            return {}
        found: dict[str, str] = {}
        for name, need in sorted(needs.items(), key=lambda item: -item[1]):
            bits = self.layers[name].bits
            if bits is not None and bits > even and need > 0:
                found[name] = (
                    f"{bits} bits; {even:.0f} would lose {need:.2g}, "
                    f"{100 * need / total:.2g} % of all layers' loss there"
                )
        return found

    def check(self) -> None:
        """Raise :class:`PlanError` where a value of any layer is out of range."""
        for name, layer in self.layers.items():
            if layer.name != name:
                raise PlanError(f"plan entry {name!r} holds a plan for layer {layer.name!r}")
            layer.check()

    def validate(self, model: nn.Module) -> None:
        """Check every value, and that the plan fits ``model``.

        Raises:
            PlanError: a value is out of range, or a layer is unknown, of another kind, or has
                another number of weights than the plan says.
            UnsupportedModelError: the model shares a module or a weight between two names.
        """
        self.check()
        modules = supported_layers(model)
        uncalled = getattr(model, "meta", {}).get("uncalled", ())
        for name, layer in self.layers.items():
            if name not in modules and name in uncalled:
                continue
            if name not in modules:
                raise PlanError(unknown_layer(name, list(modules)))
            module = modules[name]
            kind = layer_kind(module)
            if layer.kind != kind:
                raise PlanError(
                    f"plan of layer {name!r}: kind must be {kind!r} as in the model, "
                    f"got {layer.kind!r}"
                )
            if layer.params != module.weight.numel():
                raise PlanError(
                    f"plan of layer {name!r}: the model's layer has {module.weight.numel()} "
                    f"weights, the plan says {layer.params}"
                )

    # -- JSON -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text that :meth:`from_json` reads back to an equal plan."""
        data: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "method": self.method,
            "hyper": self.hyper,
            "measured": self.measured,
            "layers": [_row(layer) for layer in self.layers.values()],
        }
        if self.scores is not None:
            data["scores"] = self.scores
        if self.float_work is not None:
            data["float_rest"] = self.float_work  # as files of all versions call it
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> Plan:
        """Read a plan from JSON text; ``source`` names it in messages.

        Raises:
            FileFormatError: not JSON, or not a plan.
            PlanError: a plan with a value out of range.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FileFormatError(f"{source}: not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
            raise FileFormatError(
                f'{source}: expected a JSON object with "format": "{PLAN_FORMAT}"'
            )
        if data.get("version") != PLAN_VERSION:
            raise FileFormatError(
                f"{source}: expected plan version {PLAN_VERSION}, got {data.get('version')!r}"
            )
        rows = data.get("layers")
        if not isinstance(rows, list):
            raise FileFormatError(f'{source}: "layers" must be a list')
        known = {f.name for f in fields(LayerPlan)}
        layers: dict[str, LayerPlan] = {}
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("name"), str):
                raise FileFormatError(f'{source}: every layer must be an object with a "name"')
            name = row["name"]
            unknown = sorted(set(row) - known)
            if unknown:
                raise FileFormatError(f"{source}: layer {name!r} has unknown fields {unknown}")
            missing = sorted({"kind", "params", "bits"} - set(row))
            if missing:
                raise FileFormatError(f"{source}: layer {name!r} lacks the fields {missing}")
            if name in layers:
                raise FileFormatError(f"{source}: layer {name!r} appears twice")
            layers[name] = LayerPlan(**row)
        method, hyper = data.get("method", "manual"), data.get("hyper", {})
        scores, measured = data.get("scores"), data.get("measured", {})
        in_float = data.get("float_rest")
        if not isinstance(method, str) or not isinstance(hyper, dict):
            raise FileFormatError(f'{source}: "method" must be text and "hyper" an object')
        if not isinstance(measured, dict):
            raise FileFormatError(f'{source}: "measured" must be an object')
        if scores is not None and not isinstance(scores, dict):
            raise FileFormatError(f'{source}: "scores" must be an object')
        if in_float is not None and not isinstance(in_float, dict):
            raise FileFormatError(f'{source}: "float_rest" must be an object')
        plan = cls(
            layers=layers,
            method=method,
            hyper=hyper,
            scores=scores,
            measured=measured,
            float_work=in_float,
        )
        plan.check()
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is replaced as a whole or not at all."""
        write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            FileFormatError: missing or unreadable file, or not a plan.
            PlanError: a plan with a value out of range.
        """
        require_file(path, "plan")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"cannot read the plan {os.fspath(path)!r}: {error}") from None
        return cls.from_json(text, source=os.fspath(path))

    # -- printing ---------------------------------------------------------------------------

    def table(self) -> Table:
        """The plan as a rich table, one row per layer and a row of totals."""
        from rich.markup import escape
        from rich.table import Table

        hyper = ", ".join(f"{key}={value:g}" for key, value in self.hyper.items())
        lines = [hyper] if hyper else []
        if self.float_work:
            lines.append(f"Stays in float: {escape(float_text(self.float_work))}")
        protected = protected_text(self)
        if protected:
            lines.append(f"Protected: {escape(protected)}")
        table = Table(title=f"Plan ({self.method})", caption="\n".join(lines) or None)
        table.add_column("Layer")
        table.add_column("Kind")
        for heading in ("Weights", "Bits", "Pruned %", "Act. bits"):
            table.add_column(heading, justify="right")
        patterns = any(layer.pattern != PATTERNS[0] for layer in self.layers.values())
        if patterns:
            table.add_column("Pattern")
        grouped = any(layer.group_size for layer in self.layers.values())
        if grouped:
            table.add_column("Group", justify="right")
        kernels = any(layer.kernel for layer in self.layers.values())
        if kernels:
            table.add_column("Ran as")
        scored = [key for key in "AFRIE" if self.scores and self._has_score(key)]
        for key in scored:
            table.add_column(key, justify="right")
        for layer in self.layers.values():
            score = (self.scores or {}).get(layer.name, {})
            table.add_row(
                layer.name,
                layer.kind,
                f"{layer.params:,}",
                "float" if layer.bits is None else str(layer.bits),
                f"{100 * layer.sparsity:.1f}",
                "float" if layer.bits is None else str(layer.activation_bits),
                *([layer.pattern] if patterns else []),
                *([str(layer.group_size or "")] if grouped else []),
                *([escape(layer.kernel)] if kernels else []),
                *(_number(key, score[key]) if key in score else "" for key in scored),
            )
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{sum(layer.params for layer in self.layers.values()):,}",
            f"{self.average_bits:.2f}",
        )
        return table

    def _has_score(self, key: str) -> bool:
        return any(key in score for score in (self.scores or {}).values())

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _row(layer: LayerPlan) -> dict[str, Any]:
    """A layer as JSON values; older versions read plans without what they do not know."""
    row = asdict(layer)
    if not layer.kernel:
        del row["kernel"]
    if layer.group_size is None:
        del row["group_size"]
    return row


def float_text(rest: Mapping[str, Mapping[str, Any]], shown: int = 6) -> str:
    """What stays in float in words: names, shares of the work and reasons, the largest first."""
    order = sorted(rest.items(), key=lambda item: -float(item[1]["share"]))
    parts = [
        f"{name} ({100 * float(entry['share']):.2g} %: {entry['reason']})"
        for name, entry in order[:shown]
    ]
    if len(order) > shown:
        parts.append(f"and {len(order) - shown} more")
    return "; ".join(parts)


def protected_text(plan: Plan) -> str:
    """The layers that a plan protects, in words, the neediest first; empty where there are none."""
    parts = [f"{name} ({reason})" for name, reason in plan.protected().items()]
    more = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return "; ".join(parts[:SHOWN]) + more


def layer_kind(module: nn.Module) -> str:
    """``"conv2d"``, ``"conv_transpose2d"`` or ``"linear"`` for a supported layer."""
    from torch import nn

    if isinstance(module, nn.ConvTranspose2d):
        return "conv_transpose2d"
    return "conv2d" if isinstance(module, nn.Conv2d) else "linear"


def supported_layers(model: nn.Module) -> dict[str, Any]:
    """All ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.Linear`` modules of ``model`` by name.

    They come in the model's order.

    Raises:
        UnsupportedModelError: one module is registered under two names, or two layers share
            one weight parameter. Both names are given; untie them first.
    """
    from torch import nn

    found: dict[str, Any] = {}
    module_names: dict[int, str] = {}
    weight_names: dict[int, str] = {}
    closed = tuple(f"{name}." for name in getattr(model, "meta", {}).get("opaque", ()))
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            continue
        if f"{name}.".startswith(closed):
            continue  # in a submodule that the capture has excluded
        if id(module) in module_names:
            raise UnsupportedModelError(
                f"layers {module_names[id(module)]!r} and {name!r} are one module registered "
                f"twice; untie them first (copy.deepcopy one of them)"
            )
        # (Not module.weight: a parametrization would compute it, and may change its state.)
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in weight_names:
            raise UnsupportedModelError(
                f"layers {weight_names[id(weight)]!r} and {name!r} share one weight "
                f"parameter; untie them first (give one of them its own copy)"
            )
        module_names[id(module)] = name
        if weight is not None:
            weight_names[id(weight)] = name
        found[name] = module
    return found


def _number(key: str, value: float) -> str:
    # Errors span many orders of magnitude, the scores lie between 0 and 1.
    return f"{value:.2g}" if key == "E" else f"{value:.3f}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def unknown_layer(name: object, known: list[str]) -> str:
    """A sentence about a name that no layer has, with the closest names that are there."""
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known[:3]
    hint = f"; closest names: {', '.join(map(repr, close))}" if close else ""
    return f"unknown layer {name!r}{hint}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> PlanError:
    """An error about a name that no registry has, with all that it has and the closest."""
    names = tuple(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return PlanError(f"unknown {kind} {name!r}: {hint}expected one of {names}")
