"""What a run of the benchmarks keeps: comparisons with all samples, single figures, targets."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adalayer_native.errors import FileFormatError
from bench.interleave import Comparison, Ratio, Spread, headline, ratios, spreads

FORMAT = "adalayer-bench"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "bench" / "results.json"


@dataclass(frozen=True)
class Target:
    """At least ``minimum`` times as fast as the fastest of ``peers``."""

    ours: str
    peers: tuple[str, ...]
    minimum: float


@dataclass
class Figure:
    """A single measured value, with the limit that it should keep if there is one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured for it."""

    name: str
    target: Target
    found: dict[str, Ratio]

    @property
    def ratio(self) -> Ratio | None:
        """The ratio that counts."""
        return headline(self.found)

    @property
    def met(self) -> bool:
        """Whether the target is reached; a comparison that is missing is a miss."""
        return self.ratio is not None and self.ratio.value >= self.target.minimum


@dataclass
class Results:
    """Everything of one or several runs on one machine; later runs replace what they repeat."""

    machine: dict[str, Any] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    targets: dict[str, list[Target]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    # The fastest probe of earlier runs: a whole run may happen to meet contended cores only.
    probe_floor: float = float("inf")

    def add(self, comparison: Comparison, targets: Iterable[Target] = ()) -> None:
        """Keeps a comparison and what was hoped for."""
        self.comparisons[comparison.name] = comparison
        self.targets[comparison.name] = list(targets)

    def fastest_probe(self) -> float:
        """Over all comparisons: contention may outlast one of them."""
        found = [c.fastest_probe() for c in self.comparisons.values()]
        return min([self.probe_floor, *found])

    def table(self, name: str) -> dict[str, dict[str, Spread]]:
        """Spread per candidate and state of one comparison."""
        comparison = self.comparisons[name]
        return spreads(comparison, self.fastest_probe())

    def ratios(self, name: str, ours: str, peers: Iterable[str]) -> dict[str, Ratio]:
        """Ratio of the fastest peer over ours per state."""
        return ratios(self.table(name), ours, peers)

    def verdicts(self) -> list[Verdict]:
        """Every target of every comparison."""
        return [
            Verdict(name, target, self.ratios(name, target.ours, target.peers))
            for name, targets in self.targets.items()
            for target in targets
        ]

    def missed(self) -> list[str]:
        """One line for every target that was not reached."""
        lines = []
        for verdict in self.verdicts():
            if not verdict.met:
                ratio = "not measured" if verdict.ratio is None else f"{verdict.ratio.value:.2f}x"
                target = verdict.target
                lines.append(
                    f"{verdict.name}: {target.ours} over {' / '.join(target.peers)} is {ratio}, "
                    f"wanted {target.minimum:g}x"
                )
        for figure in self.figures.values():
            if figure.met is False:
                limits = [
                    f"{word} {limit:g}"
                    for word, limit in (("at most", figure.at_most), ("at least", figure.at_least))
                    if limit is not None
                ]
                lines.append(
                    f"{figure.name}: {figure.value:.4g} {figure.unit}, wanted {', '.join(limits)}"
                )
        return lines

    # -- JSON -------------------------------------------------------------------------------

    def save(self, path: Path = RESULTS) -> None:
        """Writes everything, samples included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "format": FORMAT,
            "machine": self.machine,
            "probe_floor": self.fastest_probe(),
            "comparisons": [
                {**c.to_dict(), "targets": [asdict(t) for t in self.targets[name]]}
                for name, c in self.comparisons.items()
            ],
            "figures": [asdict(f) for f in self.figures.values()],
        }
        scratch = path.with_suffix(".tmp")
        # One line per comparison: the samples are for programs.
        lines = [
            ",\n".join(f"{json.dumps(key)}: {_json_rows(value)}" for key, value in data.items())
        ]
        scratch.write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path = RESULTS) -> Results:
        """What :meth:`save` wrote.

        Raises:
            ValueError: a file of another format.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a file of benchmark results")
        results = cls(machine=dict(data["machine"]), probe_floor=data["probe_floor"])
        for row in data["comparisons"]:
            targets = [Target(t["ours"], tuple(t["peers"]), t["minimum"]) for t in row["targets"]]
            results.add(Comparison.from_dict(row), targets)
        results.figures = {f["name"]: Figure(**f) for f in data["figures"]}
        return results


def _json_rows(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"


def results_of(path: Path, form: str, **empty: Any) -> dict[str, Any]:
    """What a program has measured so far; else ``empty``, with the machine.

    Raises:
        FileFormatError: the file holds other results.
    """
    if not path.is_file():
        return {"format": form, "machine": describe_machine(), **empty}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != form:
        raise FileFormatError(f"{path}: expected results of {form}")
    return data


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    import adalayer_native as ada
    from adalayer_native.allocation.store import processor

    versions = {}
    for name in ("torch", "openvino", "nncf", "onnxruntime", "onnx"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 0,
        "isa": ada.ops.active_isa(),
        "python": platform.python_version(),
        "versions": versions,
    }
