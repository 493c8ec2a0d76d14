"""``adalayer demo``: the main job on real handwritten digits, in minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from adalayer_native import files, ops
from adalayer_native._progress import ProgressBar
from adalayer_native.allocation import Budget, float_bytes
from adalayer_native.compress import compress
from adalayer_native.data import Batches, digits, loaders
from adalayer_native.measure import accuracy, model_milliseconds
from adalayer_native.models import adalayernet
from adalayer_native.report import comparison_table, figure6_table, ribbon
from adalayer_native.training import bf16_helps

__all__ = ["run_demo"]

# The digits are few and alike: so many images rank plans as well as more would, in less time.
CALIBRATION = 128
FINETUNE_EPOCHS = 2


def train_float(model: nn.Module, train: Batches, epochs: int, seed: int) -> None:
    """Trains the float network: SGD, one cycle, cross-entropy."""
    torch.manual_seed(seed)
    model.train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub for it
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    amp = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_helps())
    with ProgressBar("training the float network", steps, unit="step") as bar:
        for _ in range(epochs):
            for x, y in train:
                optimizer.zero_grad(set_to_none=True)
                with amp:
                    logits = model(x.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits.float(), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.advance(note=f"loss {loss.item():.3f}")
    model.eval()


def run_demo(out: Path, *, size: float = 0.10, epochs: int = 5, seed: int = 0) -> None:
    """Trains, compresses uniformly and layer by layer under the same budget, converts, compares.

    Writes plan.json, uniform.safetensors, adalayer.safetensors and ribbon.png to ``out``.

    Args:
        out: directory for the results.
        size: budget, as a fraction of the float file.
        epochs: training epochs of the float network.
        seed: of everything random.

    Raises:
        BudgetError: ``size`` is not reachable. OSError: ``out`` cannot be written.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    train, test = digits(32)
    data = loaders(train, test, batch_size=64, calibration=CALIBRATION, augment=False, seed=seed)
    console.print(
        f"AdaLayerNet on scikit-learn's handwritten digits: {len(train)} images to train, "
        f"{len(test)} to test; kernels: {ops.active_isa()}, {ops.get_num_threads()} threads"
    )
    torch.manual_seed(seed)
    model = adalayernet(len(train.classes))
    train_float(model, data.train, epochs, seed)

    budget = Budget(size=size)
    results = {}
    for method in ("uniform", "adalayer"):
        console.print(f"compressing to {size:.1%} of the float file, method {method}")
        results[method] = compress(
            model,
            data.calibration,
            budget,
            method=method,
            train_loader=data.train,
            epochs=2,
            seed=seed,
        )
    sizes = {
        name: files.save(result.model, out / f"{name}.safetensors")
        for name, result in results.items()
    }
    plan = results["adalayer"].plan
    plan.save(out / "plan.json")
    ribbon(plan, out / "ribbon.png")

    models = {"float": model, **{name: result.model for name, result in results.items()}}
    x, _ = next(iter(data.test))
    milliseconds = model_milliseconds(models, x[:1], seconds=4)
    titles = {"float": "float", "uniform": "uniform", "adalayer": "layer-wise"}
    rows = [
        {
            "name": titles[name],
            "accuracy": accuracy(each, data.test, title=f"testing {titles[name]}"),
            "bytes": sizes.get(name, float_bytes(model)),
            "ms": milliseconds[name],
        }
        for name, each in models.items()
    ]
    console.print(figure6_table(plan))
    console.print(comparison_table(rows))
    for line in (
        f"architecture ribbon: {out / 'ribbon.png'}",
        f"packed model: {out / 'adalayer.safetensors'} (adalayer info shows it)",
    ):
        console.print(line, markup=False, soft_wrap=True)  # a path that is cut cannot be copied
