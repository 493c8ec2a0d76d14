"""``adalayer study adalayernet | green``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._console import say
from .._options import (
    Batch,
    Data,
    Group,
    Quiet,
    Threads,
    above_zero,
    output_folder,
    told,
    whole_numbers,
)

__all__ = ["app"]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Repeat the two papers' experiments on real measurements; interrupted studies go on.",
)

Out = Annotated[
    Path,
    typer.Option(callback=output_folder, help="Directory for study.json, study.md and pictures."),
]
Minutes = Annotated[
    float | None, typer.Option(callback=above_zero, help="Stop cleanly after so many minutes.")
]
Country = Annotated[str, typer.Option(help="Whose electricity, for CO2: ISO alpha-3.")]
Energy = Annotated[bool, typer.Option(help="Meter energy and CO2 (extra [energy]).")]
Dataset = Annotated[
    str, typer.Option(help="cifar10 or cifar100: what --data holds, unless it is digits.")
]
Seconds = Annotated[float, typer.Option(min=0.01, help="Of measuring, per timing.")]


def _seed_list(text: str) -> str:
    if min(whole_numbers(text, "0,1") or [0]) < 0:
        raise typer.BadParameter(f"expected seeds of 0 or more, got {text!r}")
    return text


Seeds = Annotated[str, typer.Option(callback=_seed_list, help="Seeds, separated by commas.")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _only(value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"expected one of {known}, got {value!r}", param_hint="--only")
    return value


def _finish(data: dict[str, Any], out: Path) -> None:
    from .text import write_report

    files = write_report(out)
    if data["missing"]:
        say(f"not done yet: {', '.join(data['missing'])}; the same command goes on")
    say(f"written to {out}: {', '.join(['study.json', *(file.name for file in files)])}")


@app.command(short_help="The first paper: layer-wise compression.")
def adalayernet(
    data: Data,
    out: Out,
    models: Annotated[
        Path | None,
        typer.Option(help="Float weights, or a folder of them; without, they are trained."),
    ] = None,
    dataset: Dataset = "cifar10",
    size: Annotated[
        float, typer.Option(callback=above_zero, help="Budget: fraction of the float file.")
    ] = 0.165,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning.")] = 0,
    float_epochs: Annotated[int, typer.Option(min=1, help="Of training float weights.")] = 11,
    seeds: Seeds = "0,1",
    methods: Annotated[
        str, typer.Option(help="Some of uniform, adalayer, optimal, uniform-paper.")
    ] = "uniform,adalayer,optimal,uniform-paper",
    calibration: Annotated[int, typer.Option(min=1, help="Calibration images.")] = 1000,
    minutes: Minutes = None,
    threads: Threads = None,
    only: Annotated[
        str | None, typer.Option(help="compress, timing (measured anew) or report.")
    ] = None,
    country: Country = "ITA",
    energy: Energy = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory in new processes.")] = True,
    seconds: Seconds = 10.0,
    quiet: Quiet = False,
) -> None:
    """The first paper: float, uniform, layer-wise and optimal plans of AdaLayerNet, native."""
    from .adalayernet import AdalayernetSettings, run_adalayernet

    settings = told(
        AdalayernetSettings,
        locals(),
        seeds=whole_numbers(seeds) or [],
        methods=_names(methods),
        only=_only(only, ("compress", "timing", "report")),
        progress=not quiet,
    )
    _finish(run_adalayernet(settings), out)


@app.command(short_help="The second paper: widths over depth and time.")
def green(
    data: Data,
    out: Out,
    dataset: Dataset = "cifar10",
    epochs: Annotated[int, typer.Option(min=1, help="The paper: 400.")] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="Training images per epoch; the paper: all.")
    ] = 5000,
    batch_size: Batch = 128,
    lr: Annotated[float, typer.Option(callback=above_zero, help="Peak learning rate.")] = 0.1,
    seeds: Seeds = "0,1",
    configurations: Annotated[
        str, typer.Option(help="In the order of running; fixed-N: N bits everywhere.")
    ] = "full,ascending,descending,fixed,rising,falling,dynamic",
    fixed_bits: Annotated[int, typer.Option(min=2, max=8, help="Of configuration fixed.")] = 2,
    blocks: Annotated[int, typer.Option(min=1, help="Residual blocks per stage.")] = 3,
    image_size: Annotated[
        int, typer.Option(min=8, help="Pixels per side; the digits are enlarged to it.")
    ] = 32,
    curve_images: Annotated[
        int, typer.Option(min=1, help="Test images that are looked at after every epoch.")
    ] = 2000,
    stop_accuracy: Annotated[
        float, typer.Option(min=0, max=100, help="Training accuracy that ends a run; 0: never.")
    ] = 95.0,
    minutes: Minutes = None,
    threads: Threads = None,
    only: Annotated[
        str | None, typer.Option(help="train, timing (measured anew) or report.")
    ] = None,
    country: Country = "ITA",
    energy: Energy = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory in new processes.")] = True,
    seconds: Seconds = 10.0,
    quiet: Quiet = False,
) -> None:
    """The second paper: widths that rise and fall over depth and time, trained, then native."""
    from .green import GreenSettings, run_green

    settings = told(
        GreenSettings,
        locals(),
        seeds=whole_numbers(seeds) or [],
        configurations=_names(configurations),
        only=_only(only, ("train", "timing", "report")),
        progress=not quiet,
    )
    _finish(run_green(settings), out)
