"""Results of single networks, kept from run to run in ``build/zoo``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import adalayer_native as ada
from adalayer_native._files import write_text_atomic
from bench.record import ROOT, describe_machine

FOLDER = ROOT / "build" / "zoo"
ABSENT = 3  # exit status of a worker whose package is not installed
FORMAT = 3  # of the files; others are measured again


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """The file of a network's result."""
    return folder / f"{name.replace('/', '-')}.json"


def key_of(package: str) -> dict[str, Any]:
    """What a result depends on, besides the network: versions, processor and kernels."""
    machine = describe_machine()
    versions = {
        "torch": machine["versions"]["torch"],
        "python": machine["python"],
        "adalayer_native": ada.__version__,
    }
    if package != "own":
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {"format": FORMAT, "cpu": machine["cpu"], "isa": machine["isa"], "versions": versions}


def write(path: Path, record: Mapping[str, Any], package: str) -> None:
    """Keep a result, with what it depends on."""
    text = json.dumps({"key": key_of(package), **record}, indent=1) + "\n"
    write_text_atomic(path, text)


def read(path: Path) -> dict[str, Any] | None:
    """A kept result; None without one, or where the file is not of this format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key", {}).get("format") != FORMAT:
        return None
    return record


def is_fresh(record: Mapping[str, Any] | None, package: str, bits: Iterable[int]) -> bool:
    """Whether a kept result answers what is asked now."""
    if record is None or not record.get("complete") or record["key"] != key_of(package):
        return False
    stopped = "refused" in record or "crashed" in record
    return stopped or {str(b) for b in bits} <= set(record["bits"])
