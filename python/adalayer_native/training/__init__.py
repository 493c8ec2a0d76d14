"""Training: fine-tuning of prepared models, training of float models, with checkpoints."""

from adalayer_native.training.finetune import finetune
from adalayer_native.training.fit import fit
from adalayer_native.training.loop import History, bf16_helps
from adalayer_native.training.watch import Paused, Watch
from adalayer_native.training.widths import begin_widths

__all__ = ["History", "Paused", "Watch", "begin_widths", "bf16_helps", "finetune", "fit"]
