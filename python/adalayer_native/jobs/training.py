"""``train``: a float network, its weights and its report."""

from __future__ import annotations

import json
from typing import Any

import torch

from .._console import say
from .._files import write_atomic, write_text_atomic
from ..data import loaders
from ..measure import accuracy
from ..training import fit
from .job import TrainJob, arguments
from .opening import check_fit, open_model

__all__ = ["run_train"]


def run_train(job: TrainJob) -> dict[str, Any]:
    """Trains a float network and returns the report, which it also writes beside the weights.

    ``OUT`` gets the weights, ``OUT`` with the ending ``.json`` the report and with
    ``.checkpoint.safetensors`` the state of the run. Test images are only looked at in the end.

    Raises:
        AdaError: bad arguments, data or model. OSError: the output cannot be written.
    """
    from safetensors.torch import save as serialise

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    opened = open_model(job)
    model, train, test = opened.model, opened.train, opened.test
    data = loaders(train, test, batch_size=job.batch_size, augment=job.augment, seed=job.seed)
    data.train.drop_last = len(train) > job.batch_size  # batch norm of a few images is noise
    check_fit(job, model, data.calibration)
    if job.progress:
        say(f"normalisation: {opened.normalisation}")
    report_file = job.out.with_suffix(".json")
    # Shows now, not at the end, whether the directory can be written.
    write_text_atomic(report_file, json.dumps({"arguments": arguments(job)}, indent=2) + "\n")
    test.decode()  # an unreadable image shows before the work, not after it
    train.decode()
    history = fit(
        model,
        data.train,
        job.epochs,
        lr=job.lr,
        weight_decay=job.weight_decay,
        label_smoothing=job.label_smoothing,
        checkpoint=job.out.with_suffix(".checkpoint.safetensors"),
        seed=job.seed,
        progress=job.progress,
    )
    weights = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomic(job.out, serialise(weights))
    report: dict[str, Any] = {
        "arguments": arguments(job),
        "accuracy": accuracy(model, data.test, title="test accuracy", progress=job.progress),
        "test_images": len(test),
        "normalisation": opened.normalisation.as_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bf16": history.amp,
        "epochs": history.epochs,
    }
    write_text_atomic(report_file, json.dumps(report, indent=2) + "\n")
    written = f"written to {job.out}: test accuracy {report['accuracy']:.2f} %"
    say(written)
    return report
