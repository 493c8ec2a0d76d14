"""``compare``: a packed model beside its float network, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import plot
from .._console import print_table, say
from .._files import read_json, require_file
from ..data import Batches, ImageDataset, calibration_indices
from ..detection import Detection
from ..engine import load
from ..errors import DataError, FileFormatError
from ..importance import TaskLoss
from ..microscope import Comparison, compare
from ..models import is_file, load_weights
from ..quantization import restore
from ..report import COMPARISON
from .compiling import classes_of, known_normalisation, network_of, packed_of, run_report
from .job import CompareJob
from .normalise import DIGITS, chosen, preset
from .opening import build, open_splits

__all__ = ["run_compare"]

_BATCH = 32


def run_compare(job: CompareJob) -> dict[str, Any]:
    """Compares, writes and shows; returns the comparison as JSON values.

    Where a run has a ``model.ada``, its results are checked as well.

    Raises:
        AdaError: a file, model or data that does not fit. OSError: the output cannot be written.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    loss = _loss(job)
    packed = packed_of(job.source)
    known = run_report(packed)
    command = _command(packed)
    name = network_of(job.model, known, packed)
    weights = job.weights or _path(command.get("weights"))
    data = job.data or command.get("data")
    for missing, option in (
        (weights is None and not is_file(name), "--weights"),  # (an ONNX file has its own)
        (data is None, "--data"),
    ):
        if missing:
            raise DataError(
                f"{packed} does not say what it was made of: there is no work/command.json beside "
                f"it; give {option}"
            )
    if weights is not None:
        require_file(weights, "weight file")
    size = job.image_size or known.get("image_size")
    if size is None:
        raise DataError("the size of the images is not known; give --image-size")
    train, _ = open_splits(str(data), int(size), progress=job.progress)
    classes = classes_of(packed, known, name, job.classes)
    model = build(name, job.classes, classes, int(size))
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    normalisation = chosen(job) or known_normalisation(known)
    if normalisation is None:
        normalisation = DIGITS if data == "digits" else preset(name, model)
    train.mean, train.std = normalisation.mean, normalisation.std
    if job.progress:
        say(f"normalisation: {normalisation}")
    images = _images(job, train, command)
    sample, _ = next(iter(images))
    native = restore(model, packed, sample[:1])
    file = packed.with_name("model.ada")
    engine = load(file) if job.source.is_dir() and file.is_file() else None
    found = compare(
        model,
        native if engine is None else engine,
        images,
        of=None if engine is None else native,
        loss_fn=loss,
        samples=job.samples,
        suggest=job.suggest,
        progress=job.progress,
    )
    return _written(job, found, packed, file if engine is not None else None)


def _loss(job: CompareJob) -> TaskLoss | None:
    """The task's own loss, where the command says what the outputs are."""
    if job.detection is not None:
        if job.task:
            raise DataError("--detection and --task both say what the outputs are; give one")
        try:
            said = json.loads(job.detection)
        except ValueError as error:
            raise FileFormatError(f"--detection: not JSON: {error}") from None
        return TaskLoss.of_detection(Detection.from_dict(said))
    return TaskLoss.of(job.task) if job.task else None


def _written(
    job: CompareJob, found: Comparison, packed: Path, engine: Path | None
) -> dict[str, Any]:
    out = packed.with_name(COMPARISON) if job.out is None else job.out
    found.save(out)
    if job.picture is not None:
        plot.microscope(found, job.picture)
    console = Console(stderr=True)
    print_table(found.table(), console)
    suggestions = found.suggestion_table()
    if suggestions is not None:
        print_table(suggestions, console)
    if engine is not None:
        assert found.engine is not None
        share = 100 * (found.engine["equal"] or 0.0)
        say(f"{engine}: {share:.4g} % of its results have the bits of the torch modules")
    files = [str(path) for path in (out, job.picture) if path is not None]
    say(f"written to {', '.join(files)}")
    return found.as_dict()


def _command(packed: Path) -> dict[str, Any]:
    """What the run was told; nothing where it is not known."""
    path = packed.parent / "work" / "command.json"
    if packed.name != "model.safetensors" or not path.is_file():
        return {}
    return read_json(path)


def _path(text: Any) -> Path | None:
    return None if text is None else Path(str(text))


def _images(job: CompareJob, train: ImageDataset, command: dict[str, Any]) -> Batches:
    """Training images that the run was not calibrated with, as far as there are such."""
    before = min(int(command.get("calibration", 0)), len(train))
    seed = int(command.get("seed", job.seed))
    order = calibration_indices(train, before + job.samples, seed)
    fresh = order[before:]
    if len(fresh) < job.samples and before:
        more = min(job.samples, len(order)) - len(fresh)
        if more > 0:
            say(
                f"{more} of the images are some that the run was calibrated with: there are "
                f"{len(train):,} training images"
            )
            fresh = order[len(order) - len(fresh) - more :]
    return Batches(train, _BATCH, indices=fresh)
