"""Joules and CO2 of a piece of work: counters of the hardware where there are any, else codecarbon.

What counters give is called *measured*, what codecarbon derives from nominal powers *estimated*.
codecarbon runs in its offline mode and asks no server; it comes with the extra ``energy``.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import EnergyError, MissingExtraError

__all__ = ["EnergyUse", "Meter", "counters", "intensity"]

POWERCAP = Path("/sys/class/powercap")
KWH = 3.6e6  # joules
SAMPLE_SECONDS = 5.0  # between two looks at a counter; some wrap around within a minute


@dataclass(frozen=True)
class EnergyUse:
    """What a piece of work used.

    Attributes:
        joules: of all parts together.
        seconds: how long it took.
        measured: whether all of ``joules`` comes from hardware counters.
        source: where it comes from, such as ``"RAPL"``, ``"NVML + RAPL"`` or ``"codecarbon"``.
        parts: joules of each part (``"cpu"``, ``"gpu"``, ``"ram"``).
        co2_grams: grams of CO2 equivalent; ``None`` where the grid's intensity is not known.
        country: whose electricity was assumed, ISO 3166 alpha-3, or ``None``.
    """

    joules: float
    seconds: float
    measured: bool
    source: str
    parts: dict[str, float] = field(default_factory=dict)
    co2_grams: float | None = None
    country: str | None = None

    @property
    def label(self) -> str:
        """``"measured (RAPL)"`` or ``"estimated (codecarbon)"``; belongs beside every figure."""
        return f"{'measured' if self.measured else 'estimated'} ({self.source})"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "label": self.label}

    def per(self, count: float) -> EnergyUse:
        """Divided by a number of images or steps.

        Raises:
            ValueError: a count that is not above 0.
        """
        if not count > 0:
            raise ValueError(f"count must be above 0, got {count!r}")
        return EnergyUse(
            self.joules / count,
            self.seconds / count,
            self.measured,
            self.source,
            {name: value / count for name, value in self.parts.items()},
            None if self.co2_grams is None else self.co2_grams / count,
            self.country,
        )

    def co2_in(self, countries: Iterable[str]) -> dict[str, float]:
        """Grams of CO2 equivalent where the electricity of other countries is used.

        Raises:
            EnergyError, MissingExtraError: as :func:`intensity`.
        """
        return {country: self.joules / KWH * intensity(country) for country in countries}


def intensity(country: str) -> float:
    """Grams of CO2 equivalent per kWh of a country's electricity, its yearly mean.

    Args:
        country: ISO 3166 alpha-3, such as ``"ITA"``.

    Raises:
        EnergyError: a country of which codecarbon's data know nothing.
        MissingExtraError: codecarbon is not installed.
    """
    try:
        codecarbon: Any = importlib.import_module("codecarbon")
    except ImportError:
        raise MissingExtraError(
            "energy: the CO2 intensity of a country's electricity is in codecarbon's data; install "
            "adalayer_native[energy]"
        ) from None
    found = _mix(codecarbon).get(country, {}).get("carbon_intensity")
    if found is None:
        raise EnergyError(
            f"unknown country {country!r}: expected an ISO 3166 alpha-3 code such as 'ITA'"
        )
    return float(found)


class Counter:
    """A hardware counter that only grows, and starts at 0 again beyond ``limit`` if it has one."""

    def __init__(
        self, source: str, part: str, read: Callable[[], float], limit: float | None = None
    ) -> None:
        self.source, self.part, self.read, self.limit = source, part, read, limit
        self.last = read()
        self.joules = 0.0

    def sample(self) -> None:
        """Add what was used since the last look."""
        now = self.read()
        step = now - self.last
        if step < 0 and self.limit is not None:
            step += self.limit
        self.joules += max(0.0, step)
        self.last = now


def counters(powercap: Path = POWERCAP) -> list[Counter]:
    """The counters that this process may read: RAPL packages and memory, and NVIDIA GPUs.

    Reading RAPL often needs a privilege (``energy_uj`` is for root alone on most systems); what
    cannot be read is left out.
    """
    found: list[Counter] = []
    for zone in sorted(powercap.glob("*-rapl:*")) if powercap.is_dir() else []:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it. DRAM is a part that the package
        # does not count; the other parts it does. psys would count the packages a second time.
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            limit = float((zone / "max_energy_range_uj").read_text()) * 1e-6
            part = "ram" if name == "dram" else "cpu"
            found.append(Counter("RAPL", part, _rapl(zone / "energy_uj"), limit))
        except (OSError, ValueError):
            continue
    return found + _nvml()


def _rapl(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text()) * 1e-6


def _nvml() -> list[Counter]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except Exception:  # not installed, no driver, or no permission: there is no such counter
        return []
    found = []
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            read = partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)  # millijoules
            found.append(Counter("NVML", "gpu", partial(_thousandth, read)))
        except Exception:  # GPUs before Volta have no energy counter
            continue
    return found


def _thousandth(read: Callable[[], float]) -> float:
    return read() * 1e-3


class Meter:
    """Context manager around a piece of work; ``meter.use`` afterwards says what it used.

    ``with Meter(country="ITA") as meter: train()``. Counters of the hardware are taken for the
    parts that have one. Only if the processor has none does codecarbon estimate the whole, from
    nominal powers and the machine's load. Everything that runs on the machine is counted, not this
    process alone.

    Args:
        country: whose electricity, ISO 3166 alpha-3; for CO2.
        grams_per_kwh: CO2 intensity instead of the country's mean.
        found: counters; default: :func:`counters`.

    Raises:
        MissingExtraError: an estimate or a country's intensity is needed, and codecarbon is not
            installed.
        EnergyError: an unknown country, or an intensity below 0; on leaving, if codecarbon gives
            nothing.
    """

    def __init__(
        self,
        *,
        country: str | None = None,
        grams_per_kwh: float | None = None,
        found: list[Counter] | None = None,
    ) -> None:
        if grams_per_kwh is not None and not grams_per_kwh >= 0:
            raise EnergyError(f"grams_per_kwh must not be negative, got {grams_per_kwh!r}")
        self.country, self.grams_per_kwh = country, grams_per_kwh
        self._counters = counters() if found is None else found
        self._estimates = not any(c.part == "cpu" for c in self._counters)
        needs_intensity = country is not None and grams_per_kwh is None
        self._tracker: Any = None
        if self._estimates or needs_intensity:
            self._tracker = _tracker(country)
        self._use: EnergyUse | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def use(self) -> EnergyUse:
        """The result.

        Raises:
            RuntimeError: the work has not ended yet.
        """
        if self._use is None:
            raise RuntimeError("the meter is still running: its result is there after the block")
        return self._use

    def __enter__(self) -> Meter:
        for counter in self._counters:
            counter.last = counter.read()
            counter.joules = 0.0
        if self._tracker is not None:
            with _quiet():
                self._tracker.start()
        self._start = time.monotonic()
        # A counter must not wrap around unseen, however long the work takes.
        self._ended.clear()
        threading.Thread(target=self._watch, daemon=True, name="energy meter").start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with self._lock:
                for counter in self._counters:
                    counter.sample()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        seconds = time.monotonic() - self._start
        self._ended.set()
        with self._lock:
            for counter in self._counters:
                counter.sample()
        estimate = None
        if self._tracker is not None:
            with _quiet():
                self._tracker.stop()
            estimate = getattr(self._tracker, "final_emissions_data", None)
            if estimate is None and error is None:  # it logs its own errors and goes on
                raise EnergyError("codecarbon measured nothing; its log says why")
        if self._estimates and estimate is not None:
            parts = {
                "cpu": estimate.cpu_energy * KWH,
                "gpu": estimate.gpu_energy * KWH,
                "ram": estimate.ram_energy * KWH,
            }
            source, measured = "codecarbon", False
        else:
            parts = {}
            for counter in self._counters:
                parts[counter.part] = parts.get(counter.part, 0.0) + counter.joules
            source, measured = " + ".join(sorted({c.source for c in self._counters})), True
        joules = sum(parts.values())
        intensity = self.grams_per_kwh
        if intensity is None and self.country is not None and estimate is not None:
            # Its own ratio is the country's intensity, whatever it takes for the energy.
            used = estimate.energy_consumed
            intensity = 1000 * estimate.emissions / used if used > 0 else None
        self._use = EnergyUse(
            joules,
            seconds,
            measured,
            source,
            parts,
            None if intensity is None else joules / KWH * intensity,
            self.country,
        )


def _tracker(country: str | None) -> Any:
    """codecarbon's tracker, which writes no file and asks no server."""
    try:
        codecarbon: Any = importlib.import_module("codecarbon")
    except ImportError:
        raise MissingExtraError(
            "energy: this machine has no readable energy counter, or a country's CO2 intensity is "
            "asked for, and codecarbon is not installed; install adalayer_native[energy]"
        ) from None
    if country is not None:
        known = _countries(codecarbon)
        if known and country not in known:
            raise EnergyError(
                f"unknown country {country!r}: expected an ISO 3166 alpha-3 code such as 'ITA'"
            )
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    with _quiet():
        return codecarbon.OfflineEmissionsTracker(
            country_iso_code=country or "ITA",  # it insists on one; no CO2 is reported without ours
            save_to_file=False,
            save_to_logger=False,
            log_level="error",
            measure_power_secs=1,
            allow_multiple_runs=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Its deprecation warnings concern us, not the user; as errors they would end it silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _countries(codecarbon: Any) -> set[str]:
    """Codes that codecarbon has an energy mix of; empty if its data are not where we know them."""
    return set(_mix(codecarbon))


def _mix(codecarbon: Any) -> Mapping[str, Any]:
    """Its data by country; empty if they are not where we know them."""
    try:
        source = importlib.import_module("codecarbon.input").DataSource()
        found: Mapping[str, Any] = source.get_global_energy_mix_data()
        return found
    except Exception:  # another version keeps them elsewhere, and checks the code itself
        return {}
