"""The smallest changes that recover most, chosen on half of the data and judged on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from adalayer_native._progress import ProgressBar
from adalayer_native.capture import Inputs
from adalayer_native.microscope.changes import Change, float_layer, more_bits, regrids
from adalayer_native.microscope.data import Halves
from adalayer_native.microscope.layer_errors import outputs_of, pieces, recorded
from adalayer_native.microscope.pairing import Pairs, scaled_channels
from adalayer_native.microscope.result import Row, Suggestion
from adalayer_native.nn.layer import NativeLayer
from adalayer_native.quantization.chains import ACT_ROOT

__all__ = ["suggest"]

NetworkError = Callable[[Any, list[Inputs], list[Any]], float]
"""Of a model on batches, from the float model's results there."""

LOOK = 6  # layers whose rounding costs the network most, that changes are tried for
WORST = 4  # rows of the largest own errors, for which they are tried as well
SCREEN = 32  # samples by which a layer's cost to the network is told
SHOWN = 5  # suggestions
LEAST = 0.01  # share of the network's error that a suggestion recovers
ENOUGH = 0.8  # of what the best change of a row recovers: a smaller one that gets so far is better
DECISIVE = 0.1  # share of a row's own error that makes its cause worth a change


def suggest(
    pairs: Pairs, rows: list[Row], halves: Halves, error: NetworkError, progress: bool
) -> tuple[tuple[Suggestion, ...], Suggestion | None]:
    """Suggestions, and all of them together.

    For the layers that cost the network most (each by itself in float, on a few samples) and the
    rows of the largest own errors: other ranges of the grid where rounding the input matters, more
    bits where rounding the weights does, and the layer in float. Of every row the smallest change
    that recovers nearly what its best does stays, and the best of those are judged.

    Args:
        pairs: what is compared.
        rows: worst own error first.
        halves: of the data.
        error: of the network, by which changes are judged.
        progress: show a progress bar.
    """
    model, native = pairs.model, pairs.native
    wanted = outputs_of(model, halves.choosing)
    before = error(native, halves.choosing, wanted)
    quantized = [row for row in rows if row.own > 0 and row.input_bits is not None]
    if before <= 0 or not quantized:
        return (), None
    costly = _costly(pairs, quantized, halves, error, progress)
    looked = list(dict.fromkeys([*costly[:LOOK], *quantized[:WORST]]))
    trials = {row.name: _trials(pairs, row, halves) for row in looked}
    gains: dict[tuple[Any, ...], float] = {}
    chosen: list[tuple[float, Change]] = []
    total = sum(map(len, trials.values()))
    with ProgressBar("Trying changes", total, unit="change", enabled=progress) as bar:
        for changes in trials.values():
            for change in changes:
                if change.key not in gains:
                    other = change.apply(native)
                    after = error(other, halves.choosing, wanted)
                    gains[change.key] = 1 - after / before
                bar.advance(1, change.name)
            best = max((gains[change.key] for change in changes), default=0.0)
            if best < LEAST:
                continue
            enough = [change for change in changes if gains[change.key] >= ENOUGH * best]
            smallest = min(enough, key=lambda change: change.bytes)
            if smallest.key not in [known.key for _, known in chosen]:
                chosen.append((gains[smallest.key], smallest))
    chosen.sort(key=lambda item: -item[0])
    return _judged(pairs, [change for _, change in chosen[:SHOWN]], halves, error)


def _costly(
    pairs: Pairs, rows: list[Row], halves: Halves, error: NetworkError, progress: bool
) -> list[Row]:
    """Layers whose rounding costs the network something, most first."""
    few: list[Inputs] = []
    room = SCREEN
    fewest = 1 if pairs.model.signature.single else 2
    for x in halves.choosing:
        if room >= fewest:
            few.append(x[:room])
            room -= few[-1].count
    wanted = outputs_of(pairs.model, few)
    before = error(pairs.native, few, wanted)
    layers = [row for row in rows if row.kind != "value"]
    gains: list[tuple[float, Row]] = []
    with ProgressBar("Screening layers", len(layers), unit="layer", enabled=progress) as bar:
        for row in layers:
            change = float_layer(pairs.layers[row.name])
            if change is not None:
                after = error(change.apply(pairs.native), few, wanted)
                gains.append((before - after, row))
            bar.advance(1, row.name)
    return [row for gain, row in sorted(gains, key=lambda item: -item[0]) if gain > 0]


def _trials(pairs: Pairs, row: Row, halves: Halves) -> list[Change]:
    """Changes for one row; the smaller ones of equal bytes first."""
    layer = pairs.layers.get(row.name) if row.kind != "value" else None
    site = row.name.removeprefix(f"{ACT_ROOT}.") if layer is None else layer.site
    assert site is not None
    found: list[Change | None] = []
    if row.activations is not None and row.activations >= DECISIVE * row.own:
        found += regrids(pairs, row.name, site, _seen(pairs, site, halves))
    if layer is not None and isinstance(layer.native, NativeLayer):
        if row.weights is not None and row.weights >= DECISIVE * row.own:
            found += more_bits(pairs, layer)
        found.append(float_layer(layer))
    return [change for change in found if change is not None]


def _seen(pairs: Pairs, site: str, halves: Halves) -> Iterator[Tensor]:
    """The float model's values that lie on a grid, piece by piece."""
    nodes, factor = pairs.producers[site], pairs.factors.get(site)
    cut = pieces(halves.choosing, pairs.model, nodes)
    for values in recorded(pairs.model, nodes, cut):
        for value in values.values():
            yield scaled_channels(value, factor)


def _judged(
    pairs: Pairs, changes: list[Change], halves: Halves, error: NetworkError
) -> tuple[tuple[Suggestion, ...], Suggestion | None]:
    """The effect of every change on samples that it was not chosen by; those that have one."""
    if not changes:
        return (), None
    judging = halves.judging
    wanted = outputs_of(pairs.model, judging)

    before = error(pairs.native, judging, wanted)
    found = []
    for change in changes:
        after = error(change.apply(pairs.native), judging, wanted)
        if after < (1 - LEAST) * before:
            found.append((change, _suggestion(change, before, after)))
    found.sort(key=lambda item: item[1].after)
    suggestions = tuple(item for _, item in found)
    if len(found) < 2:
        return suggestions, None
    everything = _all_of([change for change, _ in found])
    together = Suggestion(
        name="all of them",
        kind="all",
        text="together",
        value=None,
        bytes=sum(item.bytes for item in suggestions),
        before=before,
        after=error(everything(pairs.native), judging, wanted),
        changes=suggestions,
        _apply=everything,
    )
    return suggestions, together


def _suggestion(change: Change, before: float, after: float) -> Suggestion:
    return Suggestion(
        name=change.name,
        kind=change.kind,
        text=change.text,
        value=change.value,
        bytes=change.bytes,
        before=before,
        after=after,
        _apply=change.apply,
    )


def _all_of(changes: list[Change]) -> Callable[[Any], Any]:
    """Several changes in one copy: grids first, since a layer in float has none."""
    ordered = sorted(changes, key=lambda change: change.kind == "float")

    def apply(native: Any) -> Any:
        other = ordered[0].apply(native)
        for change in ordered[1:]:
            change.make(other)
        return other

    return apply
