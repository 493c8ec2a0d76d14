"""Every network of the zoo."""

from __future__ import annotations

from bench.zoo.entry import Entry
from bench.zoo.networks import (
    efficientnet_lite,
    own,
    timm,
    torchvision,
    transformers,
    ultralytics,
)

NETWORKS: dict[str, Entry] = {
    entry.name: entry
    for entries in (
        timm.ENTRIES,
        transformers.ENTRIES,
        ultralytics.ENTRIES,
        torchvision.ENTRIES,
        efficientnet_lite.ENTRIES,
        own.ENTRIES,
    )
    for entry in entries
}
"""By name, in the order of the page."""
