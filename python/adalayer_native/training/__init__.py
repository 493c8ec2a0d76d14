"""Training: fine-tuning of prepared models with checkpoints."""

from adalayer_native.training.finetune import History, bf16_helps, finetune

__all__ = ["History", "bf16_helps", "finetune"]
