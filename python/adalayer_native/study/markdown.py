"""Small helpers of the studies' Markdown: tables, means with spreads, missing values."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["data_name", "machine_line", "number", "spread", "spread_text", "table"]


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line; the first column left, the others right."""
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float | None, digits: int = 2, *, unit: str = "") -> str:
    """The value, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation of at least two values."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_text(values: Sequence[float | None], digits: int = 2) -> str:
    """``mean ± sd``, the mean alone of one value, a dash of none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, deviation = spread(known)
    return number(mean, digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def data_name(data: Mapping[str, Any]) -> str:
    """What a study's data are called; of digits with the pixels they were enlarged to."""
    settings = data["settings"]
    name = str(settings["dataset"])
    return f"{name}-{settings['image_size']}" if name == "digits" else name


def machine_line(data: Mapping[str, Any]) -> str:
    """Machine, threads and versions in a sentence."""
    machine, images = data["machine"], data.get("images", {})
    threads = data.get("threads")
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores"
        f"{'' if threads is None else f', {threads} thread' + 's' * (threads > 1)}; kernels "
        f"{machine['isa']}, torch {machine['torch']}, Python {machine['python']}. Data: "
        f"{images.get('dataset', '–')}, {images.get('train_images', 0):,} training and "
        f"{images.get('test_images', 0):,} test images."
    )
