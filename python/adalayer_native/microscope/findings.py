"""What is wrong with a row, in words."""

from __future__ import annotations

from dataclasses import replace

from adalayer_native.microscope.result import Row, interval

__all__ = ["finding"]

# A row is remarkable with four times the usual own error (6 dB).
_REMARKABLE = 4.0
_CLIPPING = 0.5  # share of the grid's error that makes clipping the cause
_UNUSED = 0.1  # share of a range beyond what was observed, at one end
_USED = 0.5  # share of a range that is too little


def finding(row: Row, typical: float) -> Row:
    """The row with a finding, where its own error is far above the usual one."""
    if row.input_bits is None or row.own <= _REMARKABLE * typical:
        return row
    assert row.activations is not None
    if row.weights is not None and row.weights > row.activations:
        return replace(row, finding=f"the weights' rounding to {row.bits} bits")
    return replace(row, finding=_of_grid(row))


def _of_grid(row: Row) -> str:
    assert row.calibrated is not None
    assert row.clipped is not None
    assert row.clipping is not None
    what = "its range" if row.kind == "value" else "the range of its input"
    low, high = row.calibrated
    seen_low, seen_high = row.observed
    width = high - low
    below, above = (seen_low - low) / width, (high - seen_high) / width  # below 0: clipped
    if row.clipping >= _CLIPPING:
        if max(below, above) > _UNUSED:
            levels = (1 << (row.input_bits or 8)) - 1
            now = round(-low / width * levels)
            return (
                f"{what} is shifted (zero point {now}): clips {100 * row.clipped:.2g} % and leaves "
                f"{100 * max(below, above):.0f} % unused"
            )
        return f"{what} clips {100 * row.clipped:.2g} % of the values"
    used = (min(high, seen_high) - max(low, seen_low)) / width
    if used < _USED:
        return f"{what} is too wide: {100 * used:.0f} % of it is used ({interval(row.observed)})"
    rounded = "its" if row.kind == "value" else "the input's"
    return f"{rounded} rounding to {row.input_bits} bits"
