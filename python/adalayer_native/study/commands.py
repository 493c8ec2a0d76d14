"""``adalayer study adalayernet | green``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..data.layout import DATA_HELP

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Repeat the two papers' experiments on real measurements; interrupted studies go on.",
)

Data = Annotated[str, typer.Option(help=DATA_HELP)]
Out = Annotated[Path, typer.Option(help="Directory for study.json, study.md and pictures.")]
Minutes = Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")]
Country = Annotated[str, typer.Option(help="Whose electricity, for CO2: ISO alpha-3.")]
Energy = Annotated[bool, typer.Option(help="Meter energy and CO2 (extra [energy]).")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dataset = Annotated[str, typer.Option(help="cifar10 or cifar100: what --data holds.")]
Seconds = Annotated[float, typer.Option(min=0.01, help="Of measuring, per timing.")]


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected whole numbers separated by commas, such as 0,1, got {text!r}",
            param_hint=name,
        ) from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _only(value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"expected one of {known}, got {value!r}", param_hint="--only")
    return value


def _finish(data: dict[str, Any], out: Path) -> None:
    from .text import write_report

    files = write_report(out)
    console = Console(stderr=True)
    if data["missing"]:
        console.print(
            f"not done yet: {', '.join(data['missing'])}; the same command goes on",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    names = ", ".join(["study.json", *(file.name for file in files)])
    console.print(f"written to {out}: {names}", markup=False, soft_wrap=True)


@app.command()
def adalayernet(
    data: Data,
    out: Out,
    models: Annotated[
        Path | None,
        typer.Option(help="Float weights, or a folder of them; without, they are trained."),
    ] = None,
    dataset: Dataset = "cifar10",
    size: Annotated[float, typer.Option(help="Budget: fraction of the float file.")] = 0.165,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning.")] = 0,
    float_epochs: Annotated[int, typer.Option(min=1, help="Of training float weights.")] = 11,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1",
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

    settings = AdalayernetSettings(
        data=data,
        out=out,
        models=models,
        dataset=dataset,
        size=size,
        epochs=epochs,
        float_epochs=float_epochs,
        seeds=_numbers(seeds, "--seeds"),
        methods=_names(methods),
        calibration=calibration,
        minutes=minutes,
        threads=threads,
        only=_only(only, ("compress", "timing", "report")),
        country=country,
        energy=energy,
        memory=memory,
        seconds=seconds,
        progress=not quiet,
    )
    _finish(run_adalayernet(settings), out)


@app.command()
def green(
    data: Data,
    out: Out,
    dataset: Dataset = "cifar10",
    epochs: Annotated[int, typer.Option(min=1, help="The paper: 400.")] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="Training images per epoch; the paper: all.")
    ] = 5000,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1",
    configurations: Annotated[
        str, typer.Option(help="In the order of running; fixed-N: N bits everywhere.")
    ] = "full,ascending,descending,fixed,rising,falling",
    fixed_bits: Annotated[int, typer.Option(min=2, max=8, help="Of configuration fixed.")] = 2,
    blocks: Annotated[int, typer.Option(min=1, help="Residual blocks per stage.")] = 3,
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

    settings = GreenSettings(
        data=data,
        out=out,
        dataset=dataset,
        epochs=epochs,
        images=images,
        batch_size=batch_size,
        lr=lr,
        seeds=_numbers(seeds, "--seeds"),
        configurations=_names(configurations),
        fixed_bits=fixed_bits,
        blocks=blocks,
        curve_images=curve_images,
        stop_accuracy=stop_accuracy,
        minutes=minutes,
        threads=threads,
        only=_only(only, ("train", "timing", "report")),
        country=country,
        energy=energy,
        memory=memory,
        seconds=seconds,
        progress=not quiet,
    )
    _finish(run_green(settings), out)
