"""Training: fine-tuning of prepared models, training of float models, with checkpoints."""

from adalayer_native.training.dynamic import DynamicWidths
from adalayer_native.training.finetune import finetune
from adalayer_native.training.fit import fit
from adalayer_native.training.learned import check_learned
from adalayer_native.training.loop import History, bf16_helps
from adalayer_native.training.watch import Paused, Watch
from adalayer_native.training.widths import narrow_for_ranges

__all__ = [
    "DynamicWidths",
    "History",
    "Paused",
    "Watch",
    "bf16_helps",
    "check_learned",
    "finetune",
    "fit",
    "narrow_for_ranges",
]
