"""Networks of twenty lines each, as users write them."""

from __future__ import annotations

from bench.zoo.entry import Entry
from bench.zoo.networks.own import images, sequences, small

ENTRIES: tuple[Entry, ...] = (*images.ENTRIES, *sequences.ENTRIES, *small.ENTRIES)
