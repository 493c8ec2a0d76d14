"""docs/studies.md from finished studies.

    python -m bench.studies_page RUN [RUN …]

RUN is an output directory of ``adalayer study``. The part of the page between a study's two
markers is replaced, its pictures are written beside the page; what stands around is written by
hand. A study that is not finished is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adalayer_native._files import write_text_atomic
from adalayer_native.study import load_study, section
from adalayer_native.study.markdown import data_name
from adalayer_native.study.pictures import write_pictures
from bench.markdown import markers, with_part
from bench.record import ROOT

PAGE = ROOT / "docs" / "studies.md"


def name_of(data: Mapping[str, Any]) -> str:
    """What a study is called on the page: its kind, and its data if they are not CIFAR-10."""
    name = data_name(data)
    return str(data["study"]) if name == "cifar10" else f"{data['study']} {name}"


def markers_of(name: str) -> tuple[str, str]:
    """What a study's part of the page begins and ends with."""
    return markers("bench/studies_page.py", name)


def write_page(runs: Sequence[Path], page: Path) -> None:
    """Replace the generated parts of the studies given.

    Raises:
        FileFormatError: a run that is missing, empty or not finished.
        ValueError: the page lacks a marker of a study.
    """
    # All of them first: a run that is refused must leave the page as it is.
    studies = [load_study(run) for run in runs]
    text = page.read_text(encoding="utf-8")
    for data in studies:
        prefix = f"images/{name_of(data).replace(' ', '-')}-"
        text = with_part(text, markers_of(name_of(data)), section(data, prefix), page)
    for data in studies:
        prefix = f"{name_of(data).replace(' ', '-')}-"
        write_pictures(data, page.parent / "images", prefix)
    write_text_atomic(page, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    given = parser.parse_args(arguments)
    write_page(given.runs, given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
