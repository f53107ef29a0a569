"""`birefnet train`: training and fine-tuning with the transformers Trainer.

This package holds the trainer, its recipes, data set and augmentation, LoRA adapters, ImageNet weights, and the report
and card of the result.
"""

from birefnet.training.dataset import MattingDataset
from birefnet.training.trainer import BiRefNetTrainer


__all__ = ["BiRefNetTrainer", "MattingDataset"]
