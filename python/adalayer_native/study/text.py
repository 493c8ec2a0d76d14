"""A study as Markdown and pictures, from its ``study.json`` alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_text_atomic
from . import text_adalayernet, text_green
from .folder import load_study
from .pictures import write_pictures

__all__ = ["section", "write_report"]

TITLES = {"adalayernet": "AdaLayerNet", "green": "Layer-wise quantization in green-aware AI"}


def section(data: Mapping[str, Any], prefix: str = "") -> str:
    """The study's tables, with links to its pictures.

    Args:
        data: from :func:`load_study`.
        prefix: in front of the pictures' file names, a folder for instance.
    """
    kind = {"adalayernet": text_adalayernet, "green": text_green}[data["study"]]
    lines = []
    missing = data.get("missing", [])
    if missing:
        lines += [f"**Not finished.** Not done yet: {', '.join(missing)}.", ""]
    return "\n".join([*lines, *kind.lines(data, prefix)]).rstrip() + "\n"


def write_report(path: str | os.PathLike[str]) -> list[Path]:
    """Write ``study.md`` and the pictures beside ``study.json``; returns the files.

    Raises:
        FileFormatError: no study there. OSError: they cannot be written.
    """
    root = Path(path)
    data = load_study(root, finished=False)
    pictures = write_pictures(data, root)
    text = root / "study.md"
    write_text_atomic(text, f"# {TITLES[data['study']]}\n\n{section(data)}")
    return [text, *pictures]
