"""What of a result is not as it should be, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

QUANTIZED = 0.95  # of the multiply-accumulates of a convolutional network
COSINE = 0.99  # at 8 bits, where the noise of rounding alone leaves as much (rounding.py)
MORE = 1.25  # times the loss of that noise is accepted where it leaves less
MOST_NAMES = 3


def misses(record: Mapping[str, Any]) -> list[str]:
    """Every miss of one network, the gravest first; empty where all is well."""
    return list(_misses(record))


def _misses(record: Mapping[str, Any]) -> Iterator[str]:
    if "crashed" in record:
        yield f"the process {record['crashed']} (during: {record.get('stage', 'start')})"
    if "refused" in record:
        yield f"refused at {record['refused']['stage']}: {record['refused']['why']}"
    for case, outcome in record.get("equal", {}).items():
        if isinstance(outcome, str):
            yield f"captured, on {case}: {outcome}"
        elif outcome is not True and "fixed" not in outcome:
            yield f"captured ≠ float on {case}: {apart(outcome)}"
    for problem in record.get("sanity", {}).get("problems", ()):
        yield f"the float network itself: {problem}"
    for bits, part in record["bits"].items():
        for miss in _width_misses(record, int(bits), part):
            yield f"{bits} bits: {miss}"


def _width_misses(record: Mapping[str, Any], bits: int, part: Mapping[str, Any]) -> Iterator[str]:
    if "refused" in part:
        yield f"refused at {part['refused']['stage']}: {part['refused']['why']}"
    share = part.get("quantized_share")
    if share is not None and record["convolutional"] and share < QUANTIZED:
        yield f"{100 * share:.1f} % of the multiply-accumulates are quantized"
    if part.get("kept_float"):
        yield f"kept float: {grouped(part['kept_float'])}"
    for name, other in (("native", "simulation"), ("engine", "native")):
        if name in part and not part[name]["equal"]:
            yield f"{name} ≠ {other}: {apart(part[name])}"
    # An activation or a sum at the end of a network, in float32 as it is wanted, is no miss.
    products = {f"{name} ({op})": why for name, op, why, macs in part.get("in_torch", ()) if macs}
    if products:
        yield f"in torch: {grouped(products)}"
    if bits == 8:
        yield from _far_from_float(record, part)
    times = part.get("milliseconds")
    if times and times["engine"] > times["torch"]:
        yield f"{times['engine']:.3f} ms, torch {times['torch']:.3f} ms"


def _far_from_float(record: Mapping[str, Any], part: Mapping[str, Any]) -> Iterator[str]:
    """Cosines below what is asked for, or below what noise as large as rounding leaves."""
    for name, (cosine, _) in part.get("cosines", {}).items():
        noisy = part["rounded"][name][0] if "rounded" in part else 1.0
        if cosine >= (COSINE if noisy >= COSINE else 1 - MORE * (1 - noisy)):
            continue
        growth = record.get("sanity", {}).get("growth")
        grows = "" if growth is None else f", an error of the input grows {growth:.1f}-fold"
        yield f"cosine of {name} {cosine:.4f} (rounding alone leaves {noisy:.4f}{grows})"


def apart(found: Mapping[str, Any]) -> str:
    """A difference in words."""
    text = (
        f"{found['where']}, {100 * found['share']:.2g} % of the values, by up to "
        f"{found['relative']:.2g} of the rms ({found['levels']:.2g} levels)"
    )
    if found["nodes"]:
        first = [f"{name} ({op}, {n} of {total} by {most})" for name, op, n, total, most in
                 found["nodes"][:MOST_NAMES]]  # fmt: skip
        more = len(found["nodes"]) - len(first)
        text += "; begins at " + ", ".join(first) + (f" and {more} more" if more else "")
    return text


def grouped(reasons: Mapping[str, str]) -> str:
    """Names behind their common reasons, the most frequent reason first."""
    counts = Counter(reasons.values())
    parts = []
    for why, count in counts.most_common():
        names = [name for name, reason in reasons.items() if reason == why][:MOST_NAMES]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        parts.append(f"{', '.join(names)}{more}: {why}")
    return "; ".join(parts)
