"""How much each layer matters: one small file per criterion, one registry."""

from . import (  # noqa: F401  (they register themselves)
    accuracy,
    accuracy_drop,
    activation_entropy,
    activation_sensitivity,
    fisher,
    gradient,
    hessian_trace,
    input_output_change,
    kl,
    kurtosis,
    latency,
    parameter_proportion,
    sparsity,
    variance,
    weight_entropy,
    weight_error,
    zscore,
)
from .analyze import analyze
from .registry import CRITERIA, Criterion, criterion
from .scores import LayerScore, LayerScores
from .task_loss import TaskLoss, Term

__all__ = [
    "CRITERIA",
    "Criterion",
    "LayerScore",
    "LayerScores",
    "TaskLoss",
    "Term",
    "analyze",
    "criterion",
]
